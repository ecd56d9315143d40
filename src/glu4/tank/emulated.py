"""A configuration's kernel in the emulator, on a small full-range case: its output and the hazards, with no GPU."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glu4.backends.blackwell import config as blackwell
from glu4.backends.blackwell.emulation import Operands, export
from glu4.backends.blackwell.spec import KernelSpec
from glu4.backends.hopper.config import Config
from glu4.backends.hopper.pack import UNIT_WORDS, pack_gated
from glu4.emulator.launch import emulate, load
from glu4.errors import UnsupportedError
from glu4.tank.stages import StagesSpec
from glu4.verify.case import Case

__all__ = ["SCHEDULES", "run"]

SCHEDULES = (("eager", 0), ("lazy", 0), ("random", 1))
_PROCESSORS = 4  # of the emulated device: a persistent kernel then takes several tiles


def run(config: Config | blackwell.Config, case: Case) -> tuple[Tensor, str]:
    """(output, the first hazard under any of SCHEDULES or nothing). Raises UnsupportedError with the compiler's message.

    case: dual, without biases; for Hopper with 16-bit tokens.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(config, blackwell.Config):
            return _blackwell(config, case, Path(scratch))
        return _hopper(config, case, Path(scratch))


def _blackwell(config: blackwell.Config, case: Case, scratch: Path) -> tuple[Tensor, str]:
    (kernel,) = export([KernelSpec.of(config, case.out_dtype)], scratch)
    m, n = case.out_shape
    operands = Operands(case.x, case.gate, case.up, case.activation)  # type: ignore[arg-type]
    found, hazard = torch.empty(0), ""
    pitch = -(-n // 8) * 8
    for name, seed in SCHEDULES:
        out = np.full((1, m, pitch), 0x7E01, np.uint16)
        result, c = kernel.run(operands, out, processors=_PROCESSORS, schedule_name=name, seed=seed)
        found = c[0]
        if not result.report.clean:
            hazard = hazard or f"{name} schedule: {result.report.hazards[0]}"
    return found.clone(), hazard


def _ptx(config: Config, scratch: Path) -> str:
    spec = StagesSpec.of(config, torch.float16, torch.float16, True)
    listing = scratch / "specs.json"
    listing.write_text(json.dumps([spec.to_dict()]))
    environment = {**os.environ, "CUTE_DSL_ARCH": spec.arch, "CUTE_DSL_DISABLE_FILE_CACHING": "1"}
    command = [sys.executable, "-P", "-m", spec.builder, str(listing), str(scratch), "--ptx"]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if made.returncode:
        lines = [line for line in made.stderr.splitlines() if line.strip()]
        raise UnsupportedError(lines[-1].strip() if lines else "no message")
    return (scratch / f"{spec.name}.ptx").read_text()


def _fields(form: str, *values: Any) -> dict[str, str]:
    return {"bytes": struct.pack("<" + form, *values).hex()}


def _launch(c: Config, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """(launch description, buffers) of a Hopper kernel, as glu4.backends.hopper.launch makes it."""
    (m, n), k, a = case.out_shape, case.k, case.activation
    assert isinstance(case.x, Tensor)
    assert case.up is not None
    packed = pack_gated(case.gate, case.up)
    tiles, units, _ = packed.shape
    tokens = {
        "buffer": "x", "element_type": "f16", "global_shape": [k, m], "global_strides_bytes": [2 * k],
        "box_shape": [64, c.box_tokens], "swizzle": "128B",
    }  # fmt: skip
    spare = np.zeros(UNIT_WORDS, np.uint32)  # a last stage may read past the end
    buffers = {
        "x": case.x.contiguous().view(torch.uint16).numpy(),
        "w": np.concatenate([packed.numpy().view(np.uint32).ravel(), spare]),
        "gate": case.gate.global_scale.reshape(1).numpy(),
        "up": case.up.global_scale.reshape(1).numpy(),
        "bias": np.zeros(n, np.float32),
    }
    params: list[dict[str, Any]] = [
        {"tensor_map": tokens}, _fields("ii", m, k), {"pack": [{"ptr": "w"}, _fields("iiq", tiles, units, units * UNIT_WORDS)]},
        {"ptr": "gate"}, {"ptr": "up"}, {"ptr": "gate"},
        {"pack": [{"ptr": "bias"}, _fields("i4x", n)]}, {"pack": [{"ptr": "bias"}, _fields("i4x", n)]},
        {"i32": 0}, {"f32": a.alpha}, {"f32": a.beta}, {"f32": a.limit},
        {"pack": [{"ptr": "c"}, _fields("iiq", m, n, n)]}, {"bytes": "00"},
    ]  # fmt: skip
    launch = {
        "grid": list(c.grid(m, n, True)), "block": [c.cta_threads(False)], "cluster": [1, c.cluster, c.splits],
        "dynamic_smem": c.shared_bytes(False), "buffers": {"c": {"dtype": "uint16", "shape": [m, n]}}, "params": params,
        "dependent": ["x", "c"],
    }  # fmt: skip
    return launch, buffers


def _hopper(config: Config, case: Case, scratch: Path) -> tuple[Tensor, str]:
    program = load(_ptx(config, scratch))
    launch, buffers = _launch(config, case)
    found, hazard = torch.empty(0), ""
    for name, seed in SCHEDULES:
        result = emulate(program, launch, buffers, schedule_name=name, seed=seed)
        found = torch.from_numpy(result.buffers["c"].view(np.int16)).view(torch.float16)
        if not result.report.clean:
            hazard = hazard or f"{name} schedule: {result.report.hazards[0]}"
    return found, hazard
