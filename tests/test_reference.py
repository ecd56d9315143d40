"""The specification against exact rational arithmetic, and the single rounding against every tie it can meet."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from glu4 import IDENTITY, SILU, NVFP4Tensor, quantize, reference, swiglu_oai
from operands import full_range


def fractions(t: torch.Tensor) -> list[list[Fraction]]:
    return [[Fraction(v) for v in row] for row in t.double().tolist()]


def rational_linear(x, w) -> list[list[Fraction]]:  # type: ignore[no-untyped-def]
    a = fractions(x.dequantize(torch.float64)) if isinstance(x, NVFP4Tensor) else fractions(x)
    b = fractions(w.dequantize(torch.float64))
    return [[sum(p * q for p, q in zip(row, col, strict=True)) for col in b] for row in a]


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """Correct rounding, by comparing with the neighbours of torch's own conversion."""
    guess = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    up = torch.nextafter(guess, torch.tensor(float("inf"), dtype=dtype))
    down = torch.nextafter(guess, torch.tensor(float("-inf"), dtype=dtype))
    bits = {c.item(): c.view(torch.int16).item() for c in (down, guess, up)}
    return min(bits, key=lambda c: (abs(Fraction(c) - value), bits[c] & 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_against_rational_arithmetic(dtype: torch.dtype, wide: bool) -> None:
    x = full_range(1, 4, 48) if not wide else torch.randn(4, 48, generator=torch.Generator().manual_seed(2)).half()
    gate, up = full_range(2, 5, 48), full_range(3, 5, 48)
    got = reference.linear(x, gate, out_dtype=dtype)
    exact = rational_linear(x, gate)
    assert got.tolist() == [[nearest(v, dtype) for v in row] for row in exact]
    product = [[p * q for p, q in zip(r, s, strict=True)] for r, s in zip(exact, rational_linear(x, up), strict=True)]
    got = reference.dual_gemm(x, gate, up, activation=IDENTITY, out_dtype=torch.bfloat16)
    assert got.tolist() == [[nearest(v, torch.bfloat16) for v in row] for row in product]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_once_at_ties_and_next_to_them(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite() & (values.abs() < 1e4)]
    above = torch.nextafter(values, torch.full_like(values, float("inf")))
    tie = (values.double() + above.double()) / 2
    even = torch.where(values.view(torch.int16) % 2 == 0, values, above)
    assert torch.equal(reference.round_once(tie, dtype), even)
    # one float64 step off the tie: a detour through float32 would land on the tie and round to even
    tiny = tie.abs() * 2.0**-50
    assert torch.equal(reference.round_once(tie + tiny, dtype), above)
    assert torch.equal(reference.round_once(tie - tiny, dtype), values)


def test_round_once_at_the_ends() -> None:
    x = torch.tensor(
        [65519.99999, 65520.0, 1e300, -1e300, 2.0**-25, 2.0**-25 * (1 + 2**-40), float("nan")], dtype=torch.float64
    )
    got = reference.round_once(x, torch.float16)
    assert got[:-1].tolist() == [65504.0, float("inf"), float("inf"), float("-inf"), 0.0, 2.0**-24]
    assert got[-1].isnan()


def test_batches_experts_and_bias_agree_with_single_calls() -> None:
    x, gate, up = full_range(1, 3, 7, 32), full_range(2, 3, 5, 32), full_range(3, 3, 5, 32)
    bias = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    whole = reference.dual_gemm(x, gate, up, activation=swiglu_oai(), gate_bias=bias[0], up_bias=bias[1])
    for i in range(3):
        one = reference.dual_gemm(x[i], gate[i], up[i], activation=swiglu_oai(), gate_bias=bias[0, i], up_bias=bias[1, i])
        assert torch.equal(whole[i], one)
    rows = full_range(4, 9, 32)
    offsets = torch.tensor([0, 4, 4, 8], dtype=torch.int32)
    grouped = reference.grouped_dual_gemm(rows, gate, up, offsets)
    assert grouped.shape == (8, 5)
    assert torch.equal(grouped[:4], reference.dual_gemm(rows.narrow_rows(0, 4), gate[0], up[0]))
    assert torch.equal(grouped[4:], reference.dual_gemm(rows.narrow_rows(4, 4), gate[2], up[2]))


def test_no_experts_make_no_rows() -> None:
    none = quantize(torch.zeros(0, 8, 32))
    assert reference.grouped_dual_gemm(torch.zeros(3, 32), none, none, torch.zeros(1, dtype=torch.int32)).shape == (0, 8)


def test_group_gemm_takes_groups_of_any_shape() -> None:
    groups = [(full_range(1, 3, 32), full_range(2, 4, 32)), (full_range(3, 2, 64), full_range(4, 6, 64))]
    out = reference.group_gemm(groups)
    assert [tuple(c.shape) for c in out] == [(3, 4), (2, 6)]
    assert torch.equal(out[1], reference.linear(*groups[1]))


def test_global_scales_multiply_after_the_sum() -> None:
    x = quantize(torch.randn(2, 32, generator=torch.Generator().manual_seed(1)))
    gate, up = full_range(5, 3, 32), full_range(6, 3, 32)
    p = reference.preactivation(x, gate) * 1.0
    q = reference.preactivation(x, up)
    assert torch.equal(reference.dual_gemm(x, gate, up), reference.round_once(SILU(p, q), torch.float16))
