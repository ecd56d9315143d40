"""The portable backend against the specification: formats, blocks, memory, float32 products whatever torch is set to."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from glu4 import (
    IDENTITY,
    SILU,
    NVFP4Tensor,
    dual_gemm,
    grouped_dual_gemm,
    grouped_linear,
    linear,
    quantize,
    reference,
    swiglu_oai,
)
from glu4.backends import portable
from operands import full_range


def bound(x: torch.Tensor | NVFP4Tensor, w: NVFP4Tensor) -> torch.Tensor:
    """gamma_K * sum |a * b|, float64: any order of float32 additions, one more rounding a product and three for scales."""
    k = w.k + 4
    u = 2.0**-24
    a = x.dequantize(torch.float64).abs() if isinstance(x, NVFP4Tensor) else x.double().abs()
    return k * u / (1 - k * u) * (a @ w.dequantize(torch.float64).abs().mT)


def assert_linear_right(got: torch.Tensor, x: torch.Tensor | NVFP4Tensor, w: NVFP4Tensor) -> None:
    exact = reference.preactivation(x, w)
    assert ((got.double() - exact).abs() <= bound(x, w) * 1.0000001 + 2.0**-149).all()


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("kind", ["nvfp4", torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 16), (3, 130, 48), (130, 17, 208), (65, 129, 1040)])
def test_linear_in_float32(m: int, n: int, k: int, kind: str | torch.dtype, swizzled: bool) -> None:
    seed = m * n * k
    w = full_range(seed, n, k)
    x: torch.Tensor | NVFP4Tensor = full_range(seed + 1, m, k)
    if isinstance(kind, torch.dtype):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(kind)
    elif swizzled:
        x = x.to_swizzled()  # type: ignore[union-attr]
    got = linear(x, w.to_swizzled() if swizzled else w, out_dtype=torch.float32)
    assert_linear_right(got, x, w)


@pytest.mark.parametrize("swizzled", [False, True])
def test_more_than_one_block_in_every_dimension(monkeypatch: pytest.MonkeyPatch, swizzled: bool) -> None:
    monkeypatch.setattr(portable, "_N_BLOCK", 128)
    monkeypatch.setattr(portable, "_M_BLOCK", 128)
    monkeypatch.setattr(portable, "_K_BLOCK", 128)
    x, w = full_range(1, 300, 400), full_range(2, 260, 400)
    got = (
        linear(x.to_swizzled(), w.to_swizzled(), out_dtype=torch.float32) if swizzled else linear(x, w, out_dtype=torch.float32)
    )
    assert_linear_right(got, x, w)


def one_hot(k: int) -> torch.Tensor:
    return torch.eye(k, dtype=torch.float16)


def test_one_hot_tokens_return_every_decoded_weight_bit_for_bit() -> None:
    w = full_range(3, 64, 1040, scaled=False)
    ones = NVFP4Tensor(
        torch.full_like(w.codes, 0x22), torch.ones_like(w.block_scale.float()).to(torch.float8_e4m3fn), torch.tensor(1.0)
    )
    expected = w.decode(torch.float16).t()
    assert torch.equal(dual_gemm(one_hot(1040), (w, ones), activation=IDENTITY), expected)
    assert torch.equal(dual_gemm(one_hot(1040), (ones, w), activation=IDENTITY), expected)


@pytest.mark.parametrize(
    ("gx", "gw"), [(1e30, 1e30), (1e-30, 1e-30), (3e38, 3e-38), (1e-38, 3e38), (2.0**-126, 2.0**127), (1e-44, 1.0)]
)
def test_extreme_global_scales(gx: float, gw: float) -> None:
    x, w = full_range(5, 4, 32, scaled=False), full_range(6, 5, 32, scaled=False)
    x = NVFP4Tensor(x.codes, x.block_scale, torch.tensor(gx))
    w = NVFP4Tensor(w.codes, w.block_scale, torch.tensor(gw))
    w.codes[0] = 0  # a zero result must stay zero where the scales' product overflows
    got = linear(x, w, out_dtype=torch.float32)
    exact = reference.preactivation(x, w)
    assert torch.equal(got.isinf(), exact.float().isinf())
    assert not got.isnan().any()
    ok = ~got.isinf()
    assert ((got.double() - exact).abs()[ok] <= bound(x, w)[ok] + 2.0**-149).all()
    assert (got[:, 0] == 0).all()


def test_lower_matmul_precision_does_not_reach_the_products() -> None:
    code = """
import torch
torch.set_float32_matmul_precision("medium")
from glu4.backends import portable
device = torch.device("cpu")
with portable._full_float32(device):
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
assert torch.get_float32_matmul_precision() == "medium"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("k", [64, portable._K_BLOCK + 16])
def test_autocast_does_not_reach_the_products(k: int) -> None:
    x, w = torch.randn(3, k, generator=torch.Generator().manual_seed(0)), full_range(1, 8, k)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear(x, w)
        assert torch.is_autocast_enabled("cpu")
    assert_linear_right(got, x, w)


def test_extra_memory_stays_under_64_mib() -> None:
    """Peak resident memory of a call whose decoded weights would take 900 MiB, beyond that of its operands."""
    code = """
import resource, torch
torch.set_num_threads(1)
from glu4 import NVFP4Tensor, dual_gemm
def operand(rows, k):
    return NVFP4Tensor(torch.full((rows, k // 2), 0x21, dtype=torch.uint8),
                       torch.full((rows, k // 16), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.tensor(1.0))
small = operand(64, 32)
dual_gemm(small, (small, small))
x, gate, up = operand(1100, 28672), operand(2048, 28672), operand(2048, 28672)
out = torch.zeros(1100, 2048, dtype=torch.bfloat16)
x_float = torch.ones(600, 28672, dtype=torch.float16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dual_gemm(x.to("cpu"), (gate, up), out=out)
dual_gemm(x_float, (gate, up), out=out[:600])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    extra = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert extra < 64


def test_the_same_bits_from_run_to_run() -> None:
    x, gate, up = full_range(1, 37, 1040), full_range(2, 65, 1040), full_range(3, 65, 1040)
    first = dual_gemm(x, (gate, up))
    assert all(torch.equal(dual_gemm(x, (gate, up)), first) for _ in range(5))


def test_non_finite_activations_reach_only_their_rows() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    x[2, 5], x[4, 60] = float("nan"), float("inf")
    gate, up = (quantize(torch.randn(24, 64, generator=torch.Generator().manual_seed(s))) for s in (2, 3))
    out = dual_gemm(quantize(x, nonfinite="propagate"), (gate, up))
    assert out.isnan().all(1).tolist() == [False, False, True, False, True, False]
    assert out.isnan().any(1).tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("kind", ["nvfp4", "float"])
def test_grouped_ragged_and_empty_experts(kind: str) -> None:
    gate, up = full_range(1, 5, 40, 96), full_range(2, 5, 40, 96)
    x = full_range(3, 50, 96) if kind == "nvfp4" else torch.randn(50, 96, generator=torch.Generator().manual_seed(4)).half()
    offsets = torch.tensor([0, 0, 17, 18, 18, 43], dtype=torch.int32)
    out = torch.full((50, 40), -7.0, dtype=torch.float16)
    result = grouped_dual_gemm(x, (gate, up), offsets, out=out, activation=swiglu_oai())
    assert result is out
    assert (out[43:] == -7.0).all()
    expected = reference.grouped_dual_gemm(x, gate, up, offsets, activation=swiglu_oai(), out_dtype=torch.float64)
    one_ulp = (expected.abs() * 2.0**-10).clamp(min=2.0**-24)
    assert ((out[:43].double() - expected).abs() <= one_ulp).all()


BAD_OFFSETS = {
    (1, 5, 9): r"\[1, 5, 9\]: \[0\] is 1",
    (0, 6, 5): r"\[0, 6, 5\]: \[2\] = 5 is below \[1\] = 6",
    (0, 5, 51): r"\[0, 5, 51\]: \[2\] is 51",
    (0, -1, 5): r"\[1\] = -1 is below \[0\] = 0",
    (0, 2**31 - 1, -(2**31)): r"\[2\] = -2147483648 is below \[1\] = 2147483647",
}


@pytest.mark.parametrize("by_variable", [False, True])
@pytest.mark.parametrize("bad", BAD_OFFSETS)
def test_wrong_offsets_are_an_error_where_they_are_checked(
    bad: tuple[int, ...], by_variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, up, x = full_range(1, 2, 40, 96), full_range(2, 2, 40, 96), torch.zeros(50, 96).half()
    offsets = torch.tensor(bad, dtype=torch.int32)
    if by_variable:
        monkeypatch.setenv("GLU4_DEBUG", "1")
    match = "group_offsets: expected 0 first, non-decreasing, at most 50 .rows of x., got .*" + BAD_OFFSETS[bad]
    with pytest.raises(ValueError, match=match):
        grouped_dual_gemm(x, (gate, up), offsets, check_offsets=not by_variable)
    with pytest.raises(ValueError, match=match):
        grouped_linear(x, gate, offsets, check_offsets=not by_variable)
    monkeypatch.setenv("GLU4_DEBUG", "0")
    grouped_dual_gemm(x, (gate, up), offsets)


@pytest.mark.parametrize("bad", BAD_OFFSETS)
@pytest.mark.parametrize("kind", ["nvfp4", "float"])
def test_wrong_offsets_reach_no_row_beyond_the_tensors(bad: tuple[int, ...], kind: str) -> None:
    """x and out are the middle of larger tensors whose other rows must be neither read (NaN would show) nor written."""
    gate, up = full_range(1, 2, 40, 96), full_range(2, 2, 40, 96)
    whole = torch.full((90, 96), torch.nan).half()
    whole[20:70] = torch.randn(50, 96, generator=torch.Generator().manual_seed(4)).half()
    out = torch.full((90, 40), -7.0)
    x = quantize(whole, 0.01, nonfinite="propagate").narrow_rows(20, 50) if kind == "nvfp4" else whole[20:70]
    grouped_dual_gemm(x, (gate, up), torch.tensor(bad, dtype=torch.int32), out=out[20:70])
    start, middle, end = (min(max(e, 0), 50) for e in bad)
    written = torch.zeros(90, dtype=torch.bool)
    for a, b in ((start, middle), (middle, end)):
        written[20 + a : 20 + max(a, b)] = True
    assert (out[~written] == -7.0).all()
    assert (out[written] != -7.0).all()
    assert out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nvfp4", torch.float16, torch.bfloat16, torch.float32])
def test_fallback_on_cuda(kind: str | torch.dtype) -> None:
    w = full_range(1, 200, 1040)
    x: torch.Tensor | NVFP4Tensor = full_range(2, 70, 1040)
    if isinstance(kind, torch.dtype):
        x = torch.randn(70, 1040, generator=torch.Generator().manual_seed(3)).to(kind)
    torch.set_float32_matmul_precision("high")
    got = linear(x.to("cuda"), w.to("cuda"), out_dtype=torch.float32, backend="portable").cpu()
    # tensor cores align and truncate: 18 * 2^-23 for every 16 products instead of 2^-24 for each
    exact = reference.preactivation(x, w)
    assert ((got.double() - exact).abs() <= 2.25 * bound(x, w)).all()
    gate, up = full_range(3, 3, 64, 96, scaled=False), full_range(4, 3, 64, 96, scaled=False)
    assert torch.equal(
        dual_gemm(
            one_hot(96).cuda().expand(3, 96, 96), (gate.to("cuda"), up.to("cuda")), activation=IDENTITY, out_dtype=torch.float32
        ).cpu(),
        (gate.decode() * up.decode()).mT,
    )


def test_silu_of_large_negative_gates_is_zero_not_nan() -> None:
    x = torch.full((1, 16), -1000.0)
    w = quantize(torch.ones(8, 16))
    assert torch.equal(dual_gemm(x, (w, w), activation=SILU, out_dtype=torch.float32), torch.zeros(1, 8))
