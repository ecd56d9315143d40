"""The limits, against adversarial and scalar checks of their own."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glu4 import IDENTITY, SILU, Activation, clamped_silu, swiglu_oai
from glu4.verify import full_range_case
from glu4.verify.metrics import _propagate, block_terms, measure, norm_limit, relative_error, ulp

ACTIVATIONS = (SILU, IDENTITY, clamped_silu(1.5), swiglu_oai(), Activation(alpha=-0.7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ulp_is_the_gap_to_the_next_number(dtype: torch.dtype) -> None:
    raw = torch.arange(0, 0x7C00 if dtype == torch.float16 else 0x7F80, dtype=torch.int32)
    values = raw.to(torch.int16).view(dtype).double()
    gaps = values.diff()
    assert torch.equal(ulp(values[:-1], dtype), gaps)
    middle = values[:-1] + gaps / 2
    assert torch.equal(ulp(middle, dtype), gaps)


@given(st.floats(-60, 60), st.floats(-30, 30), st.floats(0, 3), st.floats(0, 3), st.sampled_from(ACTIVATIONS))
@settings(max_examples=400, deadline=None)
def test_propagation_bounds_every_perturbation(gate: float, up: float, dg: float, du: float, act: Activation) -> None:
    def double(x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float64)

    bound = float(_propagate(act, double(gate), double(up), double(dg), double(du)))
    grid = torch.linspace(-1, 1, 41, dtype=torch.float64)
    g, u = torch.meshgrid(gate + dg * grid, up + du * grid, indexing="ij")
    moved = (act(g, u) - act(double(gate), double(up))).abs().max()
    assert float(moved) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: a.name)
def test_float32_evaluation_stays_within_its_stated_error(act: Activation) -> None:
    gen = torch.Generator().manual_seed(1)
    g = (torch.rand(200_000, generator=gen) * 2 - 1) * 80
    u = torch.randn(200_000, generator=gen) * 3
    zero = torch.zeros_like(g, dtype=torch.float64)
    exact = act(g.double(), u.double())
    bound = _propagate(act, g.double(), u.double(), zero, zero)
    assert bool(((act(g, u).double() - exact).abs() <= bound).all())
    # the statement is tight enough to mean something: within 64 units in the last place for |t| below 8
    near = ((act.alpha * g).abs() < 8) & (exact.abs() > 1e-3)
    if act.kind == "swish" and act.beta == 0:
        assert bool((bound[near] <= 64 * 2.0**-24 * exact[near].abs()).all())


def test_the_bound_holds_for_the_worst_order() -> None:
    """All positive products first, then all negative ones: the largest partial sums that there are."""
    for seed in range(5):
        case = full_range_case(seed, 8, 8, 2048, linear=True)
        (block,) = case.blocks()
        a, b = block.x.decode(), block.gate.decode()  # type: ignore[union-attr]
        terms = block_terms(block, case.activation)
        for i in range(8):
            products = (a[i] * b).sort(-1, descending=True).values
            total = torch.zeros(8)
            for k in range(products.shape[1]):
                total = total + products[:, k]
            p = total * (block.x.global_scale * block.gate.global_scale)  # type: ignore[union-attr]
            assert bool(((p.double() - terms.value[i]).abs() <= terms.bound[i]).all())


def test_the_bound_is_what_the_derivation_says() -> None:
    case = full_range_case(4, 3, 3, 256, linear=True)
    (block,) = case.blocks()
    terms = block_terms(block, case.activation)
    a = block.x.decode(torch.float64)  # type: ignore[union-attr]
    b = block.gate.decode(torch.float64)
    scale = Fraction(float(block.x.global_scale)) * Fraction(float(block.gate.global_scale))  # type: ignore[union-attr]
    for i in range(3):
        for j in range(3):
            s = sum(Fraction(abs(float(p))) for p in a[i] * b[j]) * scale
            least = Fraction(9, 4) * 256 * Fraction(1, 2**24) * s
            assert least <= Fraction(float(terms.bound[i, j])) <= least * Fraction(110, 100)


def test_expected_size_covers_measured_errors() -> None:
    """RMS of float32 sums in order, per element over many random orders, never above the RMS that the norms assume."""
    case = full_range_case(5, 6, 6, 1024, linear=True, out_dtype=torch.float32)
    (block,) = case.blocks()
    terms = block_terms(block, case.activation)
    a, b = block.x.decode(), block.gate.decode()  # type: ignore[union-attr]
    products = a[:, None] * b[None]
    squares = torch.zeros(6, 6, dtype=torch.float64)
    gen = torch.Generator().manual_seed(0)
    scale = (block.x.global_scale * block.gate.global_scale).double()  # type: ignore[union-attr]
    exact = products.double().sum(-1)
    for _ in range(60):
        order = torch.randperm(1024, generator=gen)
        total = torch.zeros(6, 6)
        for k in order.tolist():
            total = total + products[..., k]
        squares += ((total.double() - exact) * scale).square()
    assert bool(((squares / 60).sqrt() <= terms.rms).all())


def test_norm_limit_of_hand_made_sums() -> None:
    sums = torch.tensor([[0.0], [4.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    t = math.log(1e12)
    assert float(norm_limit(sums)) == pytest.approx(4 + 1 + math.sqrt(2 * t * 2) + t / 3 * 3, rel=1e-12)


def test_overflow_admits_the_largest_number_and_infinity_only_near_the_threshold() -> None:
    case = full_range_case(6, 4, 4, 64, linear=True)
    for value, allowed in ((65519.999, {65504.0, math.inf}), (65400.0, {65408.0}), (66000.0, {math.inf})):
        bias = torch.full((4,), value)
        zero = type(case)(
            case.name, case.seed, torch.zeros(1, 64).half(), case.gate, None, IDENTITY, gate_bias=bias, kind="contest"
        )
        for out in (65408.0, 65472.0, 65504.0, math.inf, math.nan, -math.inf):
            agrees = not bool(measure(zero, torch.full((1, 4), out).half()).outside.any())
            assert agrees == (out in allowed), (value, out)


def test_relative_error() -> None:
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a * 1.5, a) == pytest.approx(0.5)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert relative_error(torch.tensor([3.0, math.inf]), torch.tensor([3.0, math.inf])) == 0
