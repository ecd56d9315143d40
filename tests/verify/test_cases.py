"""Test cases are what they say: whole format, usable outputs, exact sums, decoded weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from glu4 import SILU, NVFP4Tensor
from glu4.nvfp4 import unpack_codes
from glu4.verify import exact_sum_case, full_range_case, one_hot_case, random_cases, saturated_exact_case
from glu4.verify.cases import gate_std, usable_fraction


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small products: threads that share cores with other workers only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int16)


def test_random_cases_are_usable_and_half_are_active() -> None:
    shapes = set()
    for i, case in enumerate(random_cases(1, 120)):
        assert usable_fraction(case) >= 0.95
        if i % 2 == 0 and case.up is not None and math.prod(case.out_shape) > 1:
            assert 0.5 <= gate_std(case) <= 4
        shapes.add(
            (case.x.ndim, case.gate.ndim, case.group_offsets is not None, case.up is None, isinstance(case.x, NVFP4Tensor))
        )
        if case.up is not None and case.gate.global_scale.numel():
            assert bool(((case.up.global_scale / case.gate.global_scale - 1).abs() > 0.05).all())
        if case.group_offsets is not None:
            assert int(case.group_offsets[-1]) == case.x.shape[0]
    assert len(shapes) == 10  # dense, batched, grouped, linear, grouped linear; each W4A4 and W4A16


def test_cases_are_the_same_for_the_same_seed() -> None:
    a, b = (full_range_case(5, 8, 8, 64, bias=True) for _ in range(2))
    assert torch.equal(a.expected(), b.expected())
    assert not torch.equal(a.expected(), full_range_case(6, 8, 8, 64, bias=True).expected())


def test_full_range_draws_the_whole_format() -> None:
    codes, scales = set(), set()
    for seed in range(8):
        case = full_range_case(seed, 16, 64, 1024)
        codes |= set(unpack_codes(case.gate.codes).unique().tolist())
        scales |= set(case.gate.linear_block_scale().view(torch.uint8).unique().tolist())
    assert codes == set(range(16))
    assert scales == set(range(127))


def test_unit_global_scales() -> None:
    case = full_range_case(2, 32, 32, 2048, unit_global_scale=True)
    assert case.up is not None
    assert isinstance(case.x, NVFP4Tensor)
    assert all(float(t.global_scale) == 1 for t in (case.x, case.gate, case.up))
    assert 0.5 <= gate_std(case) <= 4
    raw = case.gate.linear_block_scale().view(torch.uint8)
    assert int(raw.min()) == 0
    assert bool((raw == 1).any())


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"group_sizes: expected sizes that sum to m = 4, .* got \[1, 2\]"):
        full_range_case(1, 4, 8, 64, group_sizes=[1, 2])
    for sizes in ((-1, 8, 64), (4, 8, 17), (4, 8, 0)):
        with pytest.raises(ValueError, match=f"and a positive k that 16 divides, got {', '.join(map(str, sizes))}"):
            full_range_case(1, *sizes)
    with pytest.raises(ValueError, match='unit_global_scale: needs x_format "nvfp4"'):
        full_range_case(1, 4, 8, 64, x_format="float16", unit_global_scale=True)
    with pytest.raises(ValueError, match="expected k >= 32 and float16 or float32"):
        saturated_exact_case(1, 4, 8, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", ["gate", "up"])
def test_one_hot_shows_every_decoded_value_bit_for_bit(which: str, dtype: torch.dtype) -> None:
    case = one_hot_case(3, which=which, out_dtype=dtype)
    assert case.up is not None
    assert isinstance(case.x, NVFP4Tensor)
    shown = case.gate if which == "gate" else case.up
    decoded = shown.decode().T
    other = case.up if which == "gate" else case.gate
    factor = shown.global_scale * other.global_scale * case.x.global_scale**2
    # + 0 makes the zero of a negative code positive, as a sum that begins with +0 does
    assert torch.equal(bits(case.expected()), bits((decoded * factor + 0.0).to(dtype)))
    assert decoded.abs().unique().numel() == 238
    assert {-1.0, 0.0, 1.0} == set(decoded.sign().unique().tolist())


def partial_sums(case, w):  # type: ignore[no-untyped-def]
    x = case.x.decode(torch.float64) if isinstance(case.x, NVFP4Tensor) else case.x.double()
    return x, w.decode(torch.float64)


@pytest.mark.parametrize("k", [16, 32, 64, 256, 1024, 7168, 53248])
@pytest.mark.parametrize("x_format", ["nvfp4", "float16", "bfloat16"])
def test_exact_sums_fit_float32(k: int, x_format: str) -> None:
    case = exact_sum_case(k, 8, 8, k, x_format=x_format)
    assert case.up is not None
    for w in (case.gate, case.up):
        x, values = partial_sums(case, w)
        q = 0.25
        magnitude = x.abs() @ values.abs().T
        assert float(magnitude.max()) <= 2**24 * q
        products = x[:, None] * values[None]
        assert torch.equal(products, (products / q).round() * q)
        sums = (x @ values.T) / q
        assert float(sums.abs().max()) < 2**12
    c = case.expected64()
    assert torch.equal(c, c.float().double())
    assert bool((c != 0).double().mean() > 0.8)
    assert float(c.abs().max()) < 65504


@pytest.mark.parametrize("k", [64, 1024, 7168])
def test_exact_sums_pass_large_partial_sums_through_the_accumulator(k: int) -> None:
    case = exact_sum_case(9, 8, 8, k)
    x, w = partial_sums(case, case.gate)
    running = (x[:, None] * w[None]).cumsum(-1).abs().amax(-1) / 0.25
    assert float(running.min()) > 2**19


@pytest.mark.parametrize("k", [32, 48, 256, 4096])
def test_saturated_sums(k: int) -> None:
    case = saturated_exact_case(k, 16, 24, k)
    (block,) = case.blocks()
    g, u = block.preactivations()
    assert u is not None
    assert float(g.min()) >= 33
    assert float(g.max()) <= 63
    assert float(u.abs().max()) <= 15
    assert torch.equal(g, g.round())
    assert u.unique().numel() > 4
    assert case.activation == SILU
    assert torch.equal(case.expected().double(), g * u)


def test_samples_are_parts_of_the_whole() -> None:
    rows, cols = torch.tensor([1, 4, 5, 9]), torch.tensor([0, 7, 30])
    for options in ({}, {"batch": 3, "bias": True}, {"group_sizes": [3, 0, 4, 5], "bias": True}, {"linear": True}):
        case = full_range_case(7, 12, 40, 128, **options)
        part = case.sample(rows, cols)
        whole = case.expected64().index_select(-2, rows).index_select(-1, cols)
        torch.testing.assert_close(part.expected64(), whole, rtol=1e-9, atol=0)


def test_blocks_tile_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    case = full_range_case(8, 50, 70, 64, bias=True)
    whole = case.expected64()
    monkeypatch.setattr("glu4.verify.case.ROW_CHUNK", 16)
    monkeypatch.setattr("glu4.verify.case.COL_CHUNK", 32)
    assert len(list(case.blocks())) == 4 * 3
    torch.testing.assert_close(case.expected64(), whole, rtol=1e-14, atol=0)
