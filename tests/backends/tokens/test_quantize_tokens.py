"""The kernel that quantises tokens, in the emulator: bit for bit what torch makes of them on the CPU."""

from __future__ import annotations

import ctypes
import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from backends.blackwell.exported import ExportedKernel
from backends.tokens.routed import device, run
from glu4 import nvfp4
from glu4.backends.tokens import launch
from glu4.compiled.cubin import resources
from glu4.emulator.capture import capture, pointer, scalar
from glu4.emulator.launch import load
from glu4.nvfp4 import NVFP4Tensor
from glu4.quantizer import quantize

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
SMALLEST, LARGEST = 2.0**-149, torch.finfo(torch.float32).max


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Bit patterns of all kinds, each block about a size of its own; some zeros, and blocks with a NaN or an infinity."""
    g = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-24, 16, (*shape[:-1], shape[-1] // 16, 1), generator=g).expand(*shape[:-1], -1, 16)
    x = torch.randn(shape, generator=g) * torch.exp2(exponents.reshape(shape).float())
    x = torch.where(torch.rand(shape, generator=g) < 0.05, torch.zeros(()), x).to(dtype)
    wild = torch.randint(-(2**15), 2**15, shape, generator=g, dtype=torch.int16).view(dtype)
    x = torch.where(torch.rand(shape, generator=g) < 0.02, wild, x)
    endless = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)[torch.randint(0, 3, shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 0.004, endless, x)


def ties(dtype: torch.dtype, g: float) -> Tensor:
    """Blocks whose largest value asks for scale 1, and all values in steps of an eighth of the global scale: every midpoint."""
    steps = torch.arange(64).view(4, 16) / 8
    steps = torch.where(steps > 6, 6.0, steps)
    steps[:, 0] = 6.0
    return (torch.cat((steps, -steps)) * g).to(dtype)


def quantized(
    made: ExportedKernel, kernels: dict[str, ExportedKernel], x: Tensor, g: Tensor | float, program: Any = None, **options: Any
) -> tuple[list[str], NVFP4Tensor]:
    """(alarms, what the launch that `quantize` makes leaves), with a sentinel where nothing is written."""
    layout = options.pop("layout", "linear")
    with device(kernels) as recorder:
        out = quantize(x, g, nonfinite="propagate", layout=layout)
    ((_, launched),) = recorder.launches
    whole = (
        out.codes
        if out.codes.is_contiguous()
        else out.codes.as_strided((*out.codes.shape[:-1], out.row_bytes), out.codes.stride())
    )
    memory = {
        "x": x if x.is_contiguous() else torch.as_strided(x, (x.untyped_storage().nbytes() // 2,), (1,), 0),
        "g": out.global_scale.reshape(-1),
        "codes": whole.fill_(0x5A),
        "scales": out.block_scale.view(torch.uint8).fill_(0x5A),
    }
    result, found = run(made, launched, memory, program, **{"schedule_name": "random", "seed": 1, **options})
    codes = found["codes"].view(whole.shape)[..., : x.shape[-1] // 2]
    scales = found["scales"].view(torch.uint8).view(out.block_scale.shape)
    return [str(h) for h in result.report.hazards], nvfp4._unchecked(codes, scales.view(torch.float8_e4m3fn), out.global_scale)


def same(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    assert a.codes.shape == b.codes.shape
    assert a.block_scale.shape == b.block_scale.shape
    assert torch.equal(a.global_scale, b.global_scale)
    return torch.equal(a.codes, b.codes) and torch.equal(a.block_scale.view(torch.uint8), b.block_scale.view(torch.uint8))


def proven(kernels: dict[str, ExportedKernel], x: Tensor, g: Tensor | float, **options: Any) -> None:
    name = {v: k for k, v in TYPES.items()}[x.dtype]
    layout = options.get("layout", "linear")
    alarms, found = quantized(kernels[f"quantize_tokens_{name}"], kernels, x, g, **options)
    assert alarms == []
    assert same(found, nvfp4.quantize(x, g, nonfinite="propagate", layout=layout))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("g", [1.0, 0.0173, SMALLEST, 2.0**-120, 2.0**-30, 3e4, 2.0**60, LARGEST])
def test_values_of_every_size(kernels: dict[str, ExportedKernel], name: str, g: float) -> None:
    """Under global scales whose products are subnormal, or for which most values are too large or too small."""
    proven(kernels, drawn(int(g) % 97, 6, 560, dtype=TYPES[name]), g)


@pytest.mark.parametrize("name", TYPES)
def test_every_value_there_is(kernels: dict[str, ExportedKernel], name: str) -> None:
    """All 65536 patterns of 16 bits, side by side and shuffled."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    shuffled = patterns[torch.randperm(65536, generator=torch.Generator().manual_seed(3))]
    proven(kernels, torch.stack((patterns, shuffled)).view(TYPES[name]), 0.013)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("g", [1.0, 2.0**-10, 0.75])
def test_ties(kernels: dict[str, ExportedKernel], name: str, g: float) -> None:
    x = ties(TYPES[name], g)
    assert nvfp4.quantize(x, g).block_scale.float().unique().tolist() == [1.0]
    proven(kernels, x, g)


def near_ties(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x `[L, 1, 16]`, global scales): quotients of values within a few units in the last place of a midpoint, most of them no tie
    though they round to one, which a division that is off by one would tell apart."""
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]).view(7, 1, 1)
    values = (1 + torch.arange(0, 128, 5) / 128).view(1, -1, 1)
    off = torch.arange(-2, 3, dtype=torch.int32).view(1, 1, -1)
    g = ((values / midpoints).view(torch.int32) + off).view(torch.float32)
    x = torch.zeros(*g.shape, 16)
    x[..., 1:8], x[..., 8:] = values.unsqueeze(-1), -values.unsqueeze(-1)
    x[..., 0] = 6 * g  # about: the block's scale is 1
    return x.view(-1, 1, 16).to(dtype), g.flatten()


@pytest.mark.parametrize("name", TYPES)
def test_quotients_beside_a_tie(kernels: dict[str, ExportedKernel], name: str) -> None:
    x, g = near_ties(TYPES[name])
    assert nvfp4.quantize(x, g).block_scale.float().unique().tolist() == [1.0]
    exact, rounded = x[:, 0, 1].double() / g.double(), x[:, 0, 1].float() / g
    hidden = (rounded * 8 == (rounded * 8).round()) & (exact != rounded.double())
    assert hidden.sum() > 50, "quotients that are no tie round to one"
    proven(kernels, x, g)


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (129, 80), (2, 5, 2064), (3, 2, 131, 64)], ids=str)
def test_every_shape(one_source: dict[str, ExportedKernel], layout: str, shape: tuple[int, ...]) -> None:
    """Padding is zero, whatever lay there, and matrices have global scales of their own."""
    x = drawn(5, *shape, dtype=torch.bfloat16)
    proven(one_source, x, torch.rand(shape[:-2], generator=torch.Generator().manual_seed(6)) + 0.01, layout=layout)


def test_rows_apart_and_rows_that_are_copied(one_source: dict[str, ExportedKernel]) -> None:
    wide = drawn(7, 6, 96, dtype=torch.float16)
    proven(one_source, wide[:, :64], 0.5)
    for odd in (wide[:, 1:65], wide.t().contiguous().t()[:, :64]):
        with device(one_source) as recorder:
            quantize(odd, 0.5, nonfinite="propagate")
        ((_, launched),) = recorder.launches
        assert int.from_bytes(launched.params[7], "little") == 64, "a row's length of the copy"


def test_global_scales_that_lie_apart(one_source: dict[str, ExportedKernel]) -> None:
    """Strided or expanded, they are read as a dense copy."""
    x = drawn(12, 3, 2, 32, dtype=torch.float16)
    wide = torch.tensor([0.5, torch.nan, 0.25, torch.nan, 2.0, torch.nan])
    read: list[Tensor] = []
    for g in (wide[::2], torch.tensor(0.5).expand(3)):
        with device(one_source), patch.object(launch, "_launch", side_effect=lambda *a: read.append(floats(a[3][1]))):
            quantize(x, g, nonfinite="propagate")
        assert torch.equal(read.pop(), g)


def floats(address: int) -> Tensor:
    """Three of them, now."""
    return torch.tensor(list((ctypes.c_float * 3).from_address(address)))


@pytest.mark.parametrize("options", [{"schedule_name": "lazy"}, {"schedule_name": "eager"}, {"seed": 2}], ids=str)
def test_schedules(one_source: dict[str, ExportedKernel], options: dict[str, Any]) -> None:
    proven(one_source, drawn(8, 9, 272, dtype=torch.bfloat16), 0.25, **options)


# pattern, what its first match becomes, what is found
FAULTS = {
    "no wait for the kernel in front": (r"griddepcontrol\.wait;", "", "data race"),
    "a quotient rounded once too few": (r"fma\.rn\.f32 (%\w+), (%\w+), (%\w+), (%\w+);", r"mov.f32 \1, \4;", "numbers"),
    "a larger block scale": (r"cvt\.rn\.satfinite\.e4m3x2\.f32 both, (%\w+), \1;", r"cvt.rn.satfinite.e4m3x2.f32 both, 0f43E00000, 0f43E00000;", "numbers"),
    "infinity counts": (r"(setp\.\w+\.\w+\s+%\w+, %\w+), 2139095040;", r"\1, -1;", "numbers"),
    "a block too far": (r"st\.global\.b8\s+\[(%\w+)\]", r"st.global.b8 [\1+64]", "out of bounds"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(kernels: dict[str, ExportedKernel], fault: str) -> None:
    old, new, kind = FAULTS[fault]
    made = kernels["quantize_tokens_bf16"]
    changed = re.sub(old, new, made.ptx) if kind == "numbers" else re.sub(old, new, made.ptx, count=1)
    assert changed != made.ptx
    x = drawn(9, 8, 512, dtype=torch.bfloat16)
    expected = nvfp4.quantize(x, 0.31, nonfinite="propagate")
    alarms, found = quantized(made, kernels, x, 0.31)
    assert alarms == []
    assert same(found, expected)
    alarms, found = quantized(made, kernels, x, 0.31, load(changed))
    assert not same(found, expected) if kind == "numbers" else any(kind in a for a in alarms), alarms


def test_what_torch_quantizes_instead(one_source: dict[str, ExportedKernel]) -> None:
    x = drawn(10, 4, 32, dtype=torch.float16).nan_to_num(0, 0, 0)
    with device(one_source) as recorder:
        assert launch.quantizes(x)
        assert not launch.quantizes(x.float())
        assert not launch.quantizes(x[:0])
        huge = torch.empty((1 << 20, 1 << 16), dtype=torch.float16, device="meta")
        assert not launch.quantizes(huge), "more scales than 31 bits count"
        for given in (x.float(), x[:0]):
            quantize(given, 0.5)
        quantize(x, 0.5, "four_over_six")
        quantize(x, 0.5, backend="portable")
    assert not recorder.launches
    assert not launch.quantizes(x), "no kernel runs on a CPU"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_global_scale_of_its_own(one_source: dict[str, ExportedKernel], bad: float) -> None:
    """The default one, and the refusal of what is not finite, without and with a global scale."""
    x = drawn(11, 2, 7, 64, dtype=torch.bfloat16).nan_to_num(0, 0, 0)
    x[0] = -x[0].abs()
    with device(one_source) as recorder:
        assert torch.equal(quantize(x).global_scale, nvfp4.quantize(x).global_scale)
        assert torch.equal(quantize(torch.zeros_like(x)).global_scale, torch.ones(2))
        x[1, 3, 5] = bad
        assert torch.equal(
            quantize(x, nonfinite="propagate").global_scale, nvfp4.quantize(x, nonfinite="propagate").global_scale
        )
        for g in (None, 0.5):
            with pytest.raises(ValueError, match="holds NaN or infinity"):
                quantize(x, g)
    assert len(recorder.launches) == 3


def test_parameters_are_those_of_the_host_code(kernels: dict[str, ExportedKernel]) -> None:
    for (name, dtype), layout in zip(TYPES.items(), ("linear", "swizzled"), strict=True):
        made = kernels[f"quantize_tokens_{name}"]
        with device(kernels) as recorder:
            quantize(torch.zeros((3, 130, 80), dtype=dtype), torch.ones(3), layout=layout, nonfinite="propagate")  # type: ignore[arg-type]
        ((_, ours),) = recorder.launches
        sizes = (3, 130, 5, 80, 6 if layout == "swizzled" else 5, 1, int(layout == "swizzled"))
        given = [pointer(0x7000_0000_0000 + (i << 36)) for i in range(4)] + [scalar("i32", v) for v in sizes]
        (theirs,) = capture(made.file(".o"), made.ptx, [*given, pointer(0)])
        assert [len(p) for p in ours.params] == [len(p) for p in theirs.params] == made.description["params"]
        assert ours.params[4:] == theirs.params[4:]
        assert (ours.grid, ours.block) == (theirs.grid, theirs.block)
        assert ours.dynamic_smem == theirs.dynamic_smem == 0
        assert resources(made.cubin) == (made.description["registers"], 0)
