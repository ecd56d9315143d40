"""Kernels of other compilers and this project's own: right numbers, no alarm, and faults that are found."""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emulator.kernels import launches
from emulator.runner import kinds
from glu4.backends.hopper.config import SHIPPED, Config
from glu4.backends.hopper.pack import UNIT_WORDS, pack_gated
from glu4.emulator.launch import Result, emulate, load
from glu4.verify.cases import full_range_case
from glu4.verify.checker import check

SCHEDULES = (("eager", 0), ("lazy", 0), ("random", 1))


def run_kernel(name: str, edit: Any = None, **options: Any) -> tuple[Result, bool]:
    """(result, whether the numbers are right)."""
    ptx, launch, problem = launches.load(name)
    inputs = launches.make_inputs(problem)
    result = emulate(edit(ptx) if edit else ptx, launch, inputs, **options)
    exact, bound = launches.expect(problem, inputs)
    if problem.out == "bf16":  # eight significant bits: half a unit is up to 2^-8, of which launches.expect counts half
        bound = bound + np.abs(exact) * 2.0**-9
    return result, bool((np.abs(launches.read_out(problem, result.buffers["C"]) - exact) <= bound).all())


@pytest.mark.parametrize("name", launches.names())
def test_blackwell_kernels(name: str) -> None:
    for schedule, seed in SCHEDULES:
        result, right = run_kernel(name, schedule_name=schedule, seed=seed)
        assert result.report.clean, str(result.report)
        assert right


def without(pattern: str, which: int = 0, new: str = "") -> Any:
    """An edit that takes out one line (or what a pattern matches of it)."""

    def edit(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx, re.MULTILINE))
        assert len(found) > which, pattern
        return ptx[: found[which].start()] + found[which].expand(new) + ptx[found[which].end() :]

    return edit


FAULTS = {
    "no wait for the accumulator": (r"^.*mbarrier\.try_wait\.parity\S+\s+(\w+), \[%r118\].*$", r"setp.eq.u32 \1, 0, 0;", "data race"),
    "no wait::ld": (r"tcgen05\.wait::ld.*", "", "data race"),
    "no wait::st": (r"tcgen05\.wait::st.*", "", "data race"),
    "no commit": (r"^.*tcgen05\.commit.*$", "", "deadlock"),
    "no dealloc": (r"^.*tcgen05\.dealloc.*$", "", "tensor memory lifetime"),
    "half the allocation": (r"(tcgen05\.alloc\S+ \[%r8\]), 256", r"\1, 128", "tensor memory lifetime"),
    "no expect_tx": (r"^.*mbarrier\.arrive\.expect_tx.*$", "", "deadlock"),
    "half the bytes expected": (r"(mbarrier\.arrive\.expect_tx.*), 36864", r"\1, 18432", "mbarrier misuse"),
    "twice the bytes expected": (r"(mbarrier\.arrive\.expect_tx.*), 36864", r"\1, 73728", "deadlock"),
    "no proxy fence before the store": (r"fence\.proxy\.async.*", "", "missing proxy fence"),
    "no wait for the store": (r"cp\.async\.bulk\.wait_group.*", "", "exit with work outstanding"),
    "barrier initialised twice": (r"^(.*mbarrier\.init.*)$", r"\1\n\1", "mbarrier misuse"),
    "barrier for one more": (r"(mbarrier\.init\.\S+ \[%r118\]), 1", r"\1, 2", "deadlock"),
    "no wait for the stage": (r"^.*mbarrier\.try_wait\.parity\S+\s+(\w+), \[%r41\].*$", r"setp.eq.u32 \1, 0, 0;", "data race"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_a_warp_specialised_kernel(fault: str) -> None:
    pattern, new, kind = FAULTS[fault]
    for schedule, seed in SCHEDULES:
        result, _ = run_kernel("triton_gemm_specialized", without(pattern, 0, new), schedule_name=schedule, seed=seed)
        assert kind in kinds(result), f"{schedule}: {result.report}"


# this project's Hopper kernels, compiled here

COMPILE = """
import sys, tempfile
from pathlib import Path
from cutlass import cute
from glu4.backends.hopper import build
from glu4.backends.hopper.config import Config
from glu4.backends.hopper.spec import KernelSpec
made = cute.compile
def keep(*arguments, **options):
    result = made(*arguments, **options)
    Path(sys.argv[1]).write_text(result.artifacts.PTX)
    return result
cute.compile = keep
with tempfile.TemporaryDirectory() as scratch:
    build.compile_spec(KernelSpec(eval(sys.argv[2]), "f16", "f16", True), scratch)
"""


def hopper_ptx(config: Config, directory: Path) -> str:
    """PTX of one configuration of the shipped kernel."""
    if importlib.util.find_spec("cutlass") is None:
        pytest.skip("needs CuTe DSL to compile the Hopper kernels")
    path = directory / "kernel.ptx"
    environment = {"CUTE_DSL_ARCH": "sm_90a", "PATH": "/usr/bin:/bin", "HOME": str(directory)}
    subprocess.run([sys.executable, "-c", COMPILE, str(path), repr(config)], check=True, env=environment, timeout=120)
    return path.read_text()


def hopper_launch(config: Config, m: int, n: int, k: int) -> tuple[dict[str, Any], dict[str, np.ndarray], Any]:
    """(launch description, buffers, case) of the gated product with biases."""
    case = full_range_case(7, m, n, k, x_format="float16", out_dtype=torch.float16, bias=True)
    assert case.up is not None
    packed = pack_gated(case.gate, case.up)
    tiles, units, _ = packed.shape
    spare = np.zeros(UNIT_WORDS, np.uint32)  # a last stage may read past the end
    biases = [b.float().numpy() for b in (case.gate_bias, case.up_bias) if b is not None]
    buffers = {
        "x": case.x.contiguous().view(torch.uint16).numpy(),  # type: ignore[union-attr]
        "w": np.concatenate([packed.numpy().view(np.uint32).ravel(), spare]),
        "gate": case.gate.global_scale.reshape(1).numpy(),
        "up": case.up.global_scale.reshape(1).numpy(),
        "gate_bias": biases[0],
        "up_bias": biases[1],
    }
    a = case.activation

    def fields(form: str, *values: Any) -> dict[str, str]:
        return {"bytes": struct.pack("<" + form, *values).hex()}

    box = {
        "buffer": "x",
        "element_type": "f16",
        "global_shape": [k, m],
        "global_strides_bytes": [2 * k],
        "box_shape": [64, config.box_tokens],
        "swizzle": "128B",
    }
    params = [
        {"tensor_map": box},
        fields("ii", m, k),
        {"pack": [{"ptr": "w"}, fields("iiq", tiles, units, units * UNIT_WORDS)]},
        {"ptr": "gate"}, {"ptr": "up"}, {"ptr": "gate"},
        {"pack": [{"ptr": "gate_bias"}, fields("i4x", n)]}, {"pack": [{"ptr": "up_bias"}, fields("i4x", n)]},
        {"i32": 6}, {"f32": a.alpha}, {"f32": a.beta}, {"f32": a.limit},
        {"pack": [{"ptr": "c"}, fields("iiq", m, n, n)]},
        {"bytes": "00"},
    ]  # fmt: skip
    launch = {
        "grid": list(config.grid(m, n, True)), "block": [config.threads], "cluster": [1, config.cluster],
        "dynamic_smem": config.shared_bytes, "buffers": {"c": {"dtype": "uint16", "shape": [m, n]}}, "params": params,
    }  # fmt: skip
    return launch, buffers, case


@pytest.mark.parametrize("config", [SHIPPED[0], SHIPPED[-1]], ids=lambda c: c.name)
def test_hopper_kernels(config: Config, tmp_path: Path) -> None:
    program = load(hopper_ptx(config, tmp_path))
    launch, buffers, case = hopper_launch(config, 20, 80, 208)
    for schedule, seed in SCHEDULES:
        result = emulate(program, launch, buffers, schedule_name=schedule, seed=seed)
        assert result.report.clean, str(result.report)
        out = torch.from_numpy(result.buffers["c"].view(np.int16)).view(torch.float16)
        verdict = check(case, out)
        assert verdict.ok, verdict.summary()
