"""This project's Hopper kernels, compiled here: right numbers, no alarm, and faults planted in their sources that are found."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emulator.dsl import compile_for_hopper
from emulator.runner import kinds
from glu4 import IDENTITY
from glu4.backends.hopper.config import DECODE_THREADS, DECODE_WORDS, SHIPPED, Config
from glu4.backends.hopper.pack import UNIT_WORDS, pack_gated, pack_matrix
from glu4.backends.hopper.spec import DecodeSpec, KernelSpec, Spec
from glu4.backends.hopper.tokens import decode, source
from glu4.emulator.launch import Result, emulate, load
from glu4.nvfp4 import NVFP4Tensor, _unchecked, pack_codes
from glu4.verify.case import Case
from glu4.verify.cases import full_range_case
from glu4.verify.checker import check
from operands import full_range

SCHEDULES = (("eager", 0), ("lazy", 0), ("random", 1))
COMPILER = Path(__file__).parent / "kernels" / "compile_hopper.py"
Edit = tuple[str, str, str]  # module of glu4.backends.hopper, what its source has once, what stands there instead


@cache
def ptx_of(*jobs: tuple[Spec, tuple[Edit, ...]]) -> tuple[str, ...]:
    """PTX of kernels, with faults planted in their sources."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "jobs.json")
        path.write_text(json.dumps([{"spec": spec.to_dict(), "edits": edits} for spec, edits in jobs]))
        compile_for_hopper([str(COMPILER), str(path), scratch], scratch, 240)
        return tuple(Path(scratch, f"{i}.ptx").read_text() for i in range(len(jobs)))


def fields(form: str, *values: Any) -> dict[str, str]:
    return {"bytes": struct.pack("<" + form, *values).hex()}


# ---- the gated product ----


def case_of(x_format: str, m: int, n: int, k: int) -> Case:
    return full_range_case(7, m, n, k, x_format=x_format, out_dtype=torch.float16, bias=True)


def tokens_of(case: Case, config: Config) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """(the parameters that describe the tokens, their buffers)."""
    x = case.x
    if isinstance(x, torch.Tensor):
        m, k = x.shape
        box = {
            "buffer": "x",
            "element_type": "f16",
            "global_shape": [k, m],
            "global_strides_bytes": [2 * k],
            "box_shape": [64, config.box_tokens],
            "swizzle": "128B",
        }
        return [{"tensor_map": box}, fields("ii", m, k)], {"x": x.contiguous().view(torch.uint16).numpy()}
    x = x.to_linear()
    sizes = fields("iiq", *source(x).params[1:4])
    params = [{"pack": [{"ptr": "x"}, sizes]}, {"pack": [{"ptr": "x_blocks"}, sizes]}]
    scales = x.block_scale.view(torch.uint8).contiguous().numpy()
    return params, {"x": x.codes.contiguous().numpy(), "x_blocks": scales, "x_scale": x.global_scale.reshape(1).numpy()}


def launch_of(config: Config, case: Case) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(launch description, buffers), behind a kernel that writes the tokens and reads the output's memory."""
    (m, n), nvfp4, dual = case.out_shape, isinstance(case.x, NVFP4Tensor), case.up is not None
    packed = pack_matrix(case.gate) if case.up is None else pack_gated(case.gate, case.up)
    tiles, units, _ = packed.shape
    spare = np.zeros(UNIT_WORDS, np.uint32)  # a last stage may read past the end
    params, buffers = tokens_of(case, config)
    written_before = [*buffers, "c"]
    buffers |= {
        "w": np.concatenate([packed.numpy().view(np.uint32).ravel(), spare]),
        "gate": case.gate.global_scale.reshape(1).numpy(),
        "up": (case.gate if case.up is None else case.up).global_scale.reshape(1).numpy(),
    }
    flags = nvfp4 | 2 * (case.gate_bias is not None) | 4 * (case.up_bias is not None)
    for name, bias in (("gate_bias", case.gate_bias), ("up_bias", case.up_bias)):
        buffers[name] = np.zeros(n, np.float32) if bias is None else bias.float().numpy()
    a = case.activation
    params += [
        {"pack": [{"ptr": "w"}, fields("iiq", tiles, units, units * UNIT_WORDS)]},
        {"ptr": "gate"}, {"ptr": "up"}, {"ptr": "x_scale" if nvfp4 else "gate"},
        {"pack": [{"ptr": "gate_bias"}, fields("i4x", n)]}, {"pack": [{"ptr": "up_bias"}, fields("i4x", n)]},
        {"i32": flags}, {"f32": a.alpha}, {"f32": a.beta}, {"f32": a.limit},
        {"pack": [{"ptr": "c"}, fields("iiq", m, n, n)]},
        {"bytes": "00"},
    ]  # fmt: skip
    launch = {
        "grid": list(config.grid(m, n, dual)), "block": [config.cta_threads(nvfp4)], "cluster": [1, config.cluster],
        "dynamic_smem": config.shared_bytes(nvfp4), "buffers": {"c": {"dtype": "uint16", "shape": [m, n]}}, "params": params,
        "dependent": written_before,
    }  # fmt: skip
    return launch, buffers


def output(result: Result) -> torch.Tensor:
    return torch.from_numpy(result.buffers["c"].view(np.int16)).view(torch.float16)


W4A4 = (SHIPPED[0], "nvfp4")


@pytest.mark.parametrize(
    ("config", "x_format", "shape"),
    [
        (SHIPPED[0], "float16", (20, 80, 208)),
        (SHIPPED[-1], "float16", (20, 80, 208)),
        (*W4A4, (11, 40, 192)),
        (*W4A4, (1, 24, 64)),
        (*W4A4, (3, 8, 3328)),  # two steps more than all stages hold
    ],
    ids=lambda v: v.name if isinstance(v, Config) else str(v),
)
def test_hopper_kernels(config: Config, x_format: str, shape: tuple[int, int, int]) -> None:
    assert shape[2] < 3000 or shape[2] > 64 * config.stage_units * (config.stages + 1)
    program = load(ptx_of((KernelSpec(config, "nvfp4" if x_format == "nvfp4" else "f16", "f16", True), ()))[0])
    case = case_of(x_format, *shape)
    launch, buffers = launch_of(config, case)
    for schedule, seed in SCHEDULES:
        result = emulate(program, launch, buffers, schedule_name=schedule, seed=seed)
        assert result.report.clean, str(result.report)
        verdict = check(case, output(result))
        assert verdict.ok, verdict.summary()


# mantissas in [1, 2), whose product with a power of two may be infinite
LARGER_MANTISSAS = (("dual_gemm", "(raw >> 23) - 126", "(raw >> 23) - 127"), ("dual_gemm", "| 0x3F000000", "| 0x3F800000"))


@pytest.mark.parametrize("edits", [(), LARGER_MANTISSAS], ids=["as it is", "planted"])
def test_sums_of_zero_stay_zero_under_the_largest_global_scales(edits: tuple[Edit, ...]) -> None:
    """A factor that is infinite would make NaN of a sum of zero, where the specification has 0."""
    config, largest = SHIPPED[0], torch.tensor(torch.finfo(torch.float32).max)
    case = case_of("nvfp4", 5, 40, 192)
    assert isinstance(case.x, NVFP4Tensor)
    assert case.up is not None
    x = _unchecked(torch.zeros_like(case.x.codes), case.x.block_scale, largest)
    gate, up = (_unchecked(w.codes, w.block_scale, largest) for w in (case.gate, case.up))
    case = replace(case, x=x, gate=gate, up=up, gate_bias=None, up_bias=None)
    launch, buffers = launch_of(config, case)
    result = emulate(load(ptx_of((KernelSpec(config, "nvfp4", "f16", True), edits))[0]), launch, buffers)
    right = not bool(output(result).count_nonzero())
    assert right == (not edits)
    assert right or bool(output(result).isnan().any())


def test_both_ways_of_w4a4_give_the_same_bits() -> None:
    """The kernel that decodes itself, and the one for fp16 with tokens decoded ahead, whose scale is then in the weights'."""
    config = SHIPPED[0]
    own, ahead = (load(text) for text in ptx_of(*((KernelSpec(config, x, "f16", True), ()) for x in ("nvfp4", "f16"))))
    case = case_of("nvfp4", 5, 40, 448)
    assert isinstance(case.x, NVFP4Tensor)
    scale = 2.0 ** torch.tensor(float(case.x.global_scale)).log2().round()
    case = replace(case, x=_unchecked(case.x.codes, case.x.linear_block_scale(), scale))
    assert case.up is not None
    gate, up = (_unchecked(w.codes, w.block_scale, w.global_scale * scale) for w in (case.gate, case.up))
    decoded = replace(case, x=decode(case.x), gate=gate, up=up)
    results = []
    for program, given in ((own, case), (ahead, decoded)):
        launch, buffers = launch_of(config, given)
        results.append(output(emulate(program, launch, buffers, hazards=False)).view(torch.int16))
    assert torch.equal(*results)
    assert len(results[0].unique()) > 100


def test_every_code_under_every_scale_through_the_kernel_that_decodes_itself() -> None:
    """One-hot weights of 1: the output is the tokens."""
    k = 64
    codes = torch.tensor([i | i + 1 << 4 for i in range(0, 16, 2)], dtype=torch.uint8).repeat(32, k // 16)
    scales = (torch.arange(128, dtype=torch.uint8) % 127).view(32, 4)  # not NaN, which is NaN in all of a row
    x = NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(1.0))
    one, unit = pack_codes(2 * torch.eye(k, dtype=torch.uint8)), torch.ones(k, k // 16).to(torch.float8_e4m3fn)
    case = Case("identity", 0, x, NVFP4Tensor(one, unit, torch.tensor(1.0)), None, IDENTITY, None, None, torch.float16)
    launch, buffers = launch_of(SHIPPED[0], case)
    result = emulate(ptx_of((KernelSpec(SHIPPED[0], "nvfp4", "f16", False), ()))[0], launch, buffers)
    assert result.report.clean, str(result.report)
    assert len(x.decode().abs().unique()) > 200
    assert torch.equal(output(result), x.decode(torch.float16))


NO_FENCE = ("dual_gemm", 'cute.arch.fence_proxy("async.shared", space="cta")\n        for u', "pass\n        for u")
ARRIVAL = "            cute.arch.mbarrier_arrive(pipe.sync_object_full.get_barrier(slot))\n"
# what has to be among the alarms; "numbers" where only the results tell
W4A4_FAULTS: dict[str, tuple[Edit, str]] = {
    "no proxy fence between decoding and products": (NO_FENCE, "missing proxy fence"),
    "the exponent of fp16 tokens": (("dual_gemm", "7 + TOKEN_BIAS if self.nvfp4 else 7", "7"), "numbers"),
    "codes of another step": (("decode_tokens", "column = step * STAGE_BLOCKS + block", "column = block"), "numbers"),
    "a stage is not waited for": (
        ("decode_tokens", "        pipe.sync_object_empty.wait(slot, phase)\n", ""), "data race"),
    "a copy is not waited for": (("decode_tokens", "wait_group(DECODE_AHEAD - 1)", "wait_group(DECODE_AHEAD)"), "missing wait"),
    "lanes do not wait for each other's copies": (
        ("decode_tokens", "wait_group(DECODE_AHEAD - 1)\n        cute.arch.sync_warp()\n", "wait_group(DECODE_AHEAD - 1)\n"),
        "data race"),
    "arrival before the other lanes have stored": (
        ("decode_tokens", "        cute.arch.sync_warp()\n        if lane == 0:\n" + ARRIVAL, "        if lane == 0:\n" + ARRIVAL),
        "data race"),
    "no arrival": (("decode_tokens", "        if lane == 0:\n" + ARRIVAL, ""), "deadlock"),
    "the kernel in front is not waited for": (
        ("dual_gemm", "setmaxregister_decrease(DECODER_REGISTERS)\n        cute.arch.griddepcontrol_wait()\n",
         "setmaxregister_decrease(DECODER_REGISTERS)\n"), "data race"),
    "rows past the last are read": (("decode_tokens", "& (first_row + row < rows)", ""), "out of bounds"),
    "chunks not swizzled": (("decode_tokens", "((chunk ^ (row % 8)) * 16)", "(chunk * 16)"), "numbers"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", W4A4_FAULTS)
def test_faults_in_the_kernel_that_decodes_tokens(fault: str) -> None:
    """Of every fault, some schedule tells."""
    spec = KernelSpec(SHIPPED[0], "nvfp4", "f16", True)
    compiled = ptx_of(*((spec, (edit,)) for edit, _ in W4A4_FAULTS.values()))
    program, kind = load(compiled[list(W4A4_FAULTS).index(fault)]), W4A4_FAULTS[fault][1]
    case = case_of("nvfp4", 3, 8, 3328 if fault == "a stage is not waited for" else 704)
    launch, buffers = launch_of(SHIPPED[0], case)
    told = set()
    for schedule, seed in SCHEDULES:
        result = emulate(program, launch, buffers, schedule_name=schedule, seed=seed, max_instructions=400_000)
        told |= set(kinds(result))
        if kind == "numbers" and not check(case, output(result)).ok:
            told.add("numbers")
        if kind in told:
            return
    pytest.fail(f"{kind} is not among {told}")


# ---- sm90_decode_tokens ----


def decoded_by_kernel(
    program: Any, x: NVFP4Tensor, schedule: str = "eager", seed: int = 0, short: int = 0, each: int = 1
) -> Result:
    """The launch that `tokens` makes, `each` words a thread, `short` CTAs fewer; the scales' padding is NaN."""
    codes = x.codes.numpy()
    scales = x.block_scale.view(torch.uint8).clone()
    if x.is_swizzled:
        used = _unchecked(x.codes, torch.ones(x.codes.shape[0], x.k // 16).to(torch.float8_e4m3fn), x.global_scale)
        scales[used.to_swizzled().block_scale.view(torch.uint8) == 0] = 0x7F
    words = codes.size // 4
    launch = {
        "grid": [-(-words // (DECODE_THREADS * each)) - short],
        "block": [DECODE_THREADS],
        "buffers": {"out": {"dtype": "uint16", "shape": [*x.shape]}},
        "params": [
            {"pack": [{"ptr": "codes"}, fields("i4x", words)]},
            {"pack": [{"ptr": "scales"}, fields("i4x", scales.numel())]},
            {"pack": [{"ptr": "out"}, fields("i4x", 4 * words)]},
            {"i32": x.k // 8 if x.is_swizzled else 0},
        ],
        "dependent": ["codes", "scales", "out"],
    }
    given = {"codes": codes, "scales": scales.numpy().ravel()}
    return emulate(program, launch, given, schedule_name=schedule, seed=seed)


def is_decoded(result: Result, x: NVFP4Tensor) -> bool:
    """Whether the output is x's decoded values bit for bit, with any NaN for a NaN."""
    got = torch.from_numpy(result.buffers["out"].view(np.int16)).view(torch.float16)
    want = x.decode(torch.float16)
    same = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())
    return bool(same.all())


def all_pairs() -> NVFP4Tensor:
    """Every byte of two codes under every scale byte from 0 to NaN."""
    codes = torch.arange(256, dtype=torch.uint8).expand(128, 256).contiguous()
    scales = torch.arange(128, dtype=torch.uint8).view(128, 1).expand(128, 32).contiguous()
    return _unchecked(codes, scales.view(torch.float8_e4m3fn), torch.tensor(1.0))


TOKENS = {
    "every pair": all_pairs,
    "one row": lambda: full_range(1, 1, 16),
    "a tail": lambda: full_range(2, 3, 48),
    "two atoms of scales each way": lambda: full_range(3, 131, 80),
}


@pytest.mark.parametrize("each", range(1, DECODE_WORDS + 1))
@pytest.mark.parametrize("swizzled", [False, True], ids=["linear", "swizzled"])
@pytest.mark.parametrize("name", TOKENS)
def test_the_kernel_that_decodes_ahead(name: str, swizzled: bool, each: int) -> None:
    program, x = load(ptx_of((DecodeSpec(), ()))[0]), TOKENS[name]()
    x = x.to_swizzled() if swizzled else x
    for schedule, seed in SCHEDULES[: 1 if name == "every pair" else None]:
        result = decoded_by_kernel(program, x, schedule, seed, each=each)
        assert result.report.clean, str(result.report)
        assert is_decoded(result, x)


def test_a_grid_of_one_cta_less_is_seen() -> None:
    program, x = load(ptx_of((DecodeSpec(), ()))[0]), TOKENS["two atoms of scales each way"]()
    assert is_decoded(decoded_by_kernel(program, x, each=DECODE_WORDS), x)
    assert not is_decoded(decoded_by_kernel(program, x, short=1, each=DECODE_WORDS), x)


DECODER_FAULTS: dict[str, Sequence[Edit]] = {
    "rows of an atom in their order": (("decode_tokens", "row % 32 * 16 + row % 128 // 32 * 4", "row % 128 * 4"),),
    "columns of atoms not rounded up": (("decode_tokens", "(width // 2 + 3) // 4", "swizzled // 2 // 4"),),
    "no second atom of rows": (("decode_tokens", "((row // 128) * atoms + column // 4)", "(column // 4)"),),
    "scales linear": (("decode_tokens", "if swizzled != 0:", "if swizzled == -1:"),),
    "2^-7 of the values": (
        (
            "decode_tokens",
            "asm_u32(_PRODUCT, values[pair], _TWO_TO_7)\n                store_16_bytes(out.iterator.toint() + Int64(word)",
            "values[pair]\n                store_16_bytes(out.iterator.toint() + Int64(word)",
        ),
    ),
    "no sign": (("decode_tokens", "odd = (word & 0x80808080) | ", "odd = "),),
    "halves exchanged": (("decode_tokens", '("0x1404", "0x3424")', '("0x3424", "0x1404")'),),
}
DECODER_ALARMS: dict[str, tuple[Sequence[Edit], str]] = {
    "the kernel in front is not waited for": (
        (("decode_tokens", "        cute.arch.griddepcontrol_wait()\n        words =", "        words ="),), "data race"),
    "words past the last": ((("decode_tokens", "if word < count:  # so", "if word >= 0:  # so"),), "out of bounds"),
    "words past the last are stored": ((("decode_tokens", "if word < count:\n                values",
                                         "if word >= 0:\n                values"),), "out of bounds"),
}  # fmt: skip


def test_faults_in_the_kernel_that_decodes_ahead() -> None:
    x = TOKENS["two atoms of scales each way"]().to_swizzled()
    edits = [*DECODER_FAULTS.values(), *(e for e, _ in DECODER_ALARMS.values())]
    compiled = iter(ptx_of(*((DecodeSpec(), tuple(e)) for e in edits)))
    for fault in DECODER_FAULTS:
        assert not is_decoded(decoded_by_kernel(load(next(compiled)), x), x), fault
    for fault, (_, kind) in DECODER_ALARMS.items():
        assert kind in kinds(decoded_by_kernel(load(next(compiled)), x)), fault
