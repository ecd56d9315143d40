"""Measured shapes: the same operands every time, and a check that lets no wrong contender be timed."""

from __future__ import annotations

import math

import pytest
import torch

from bench.fake_gpu import right
from glu4.activation import SILU
from glu4.bench.operands import FORMATS, SAMPLE_COLS, Operands, draw, replica, spread
from glu4.reference import preactivation, round_once


@pytest.fixture(scope="module")
def operands() -> Operands:
    return draw(40, 72, 256, "cpu", seed=3)


def test_operands_are_drawn_by_seed() -> None:
    first, again, other = (draw(3, 8, 32, "cpu", seed) for seed in (1, 1, 2))
    assert torch.equal(first.normal, again.normal)
    assert torch.equal(first.gate.codes, again.gate.codes)
    assert not torch.equal(first.gate.codes, first.up.codes)
    assert not torch.equal(first.gate.codes, other.gate.codes)
    assert float(first.gate.global_scale) == float(first.up.global_scale) == 1.0


@pytest.mark.parametrize("x_format", list(FORMATS))
def test_copies_hold_the_same_values_in_memory_of_their_own(operands: Operands, x_format: str) -> None:
    copies = operands.x(x_format, 3)
    parts = [x.codes if x_format == "nvfp4" else x for x in copies]
    assert torch.equal(parts[0], parts[2])
    assert len({p.data_ptr() for p in parts}) == 3
    assert operands.x(x_format, 2)[0] is copies[0]


def test_no_block_scale_is_so_small_that_a_peer_drops_it(operands: Operands) -> None:
    assert float(operands.gate.block_scale.float().min()) >= 2.0**-6


@pytest.mark.parametrize("x_format", list(FORMATS))
def test_a_right_output_passes(operands: Operands, x_format: str) -> None:
    found = operands.check(right(operands, x_format), x_format, 1, specified=True)
    assert found.wrong == ""
    eps = torch.finfo(FORMATS[x_format]).eps
    assert 0 < found.fro_rel_err < eps / 2
    assert 0 < found.max_rel_err < eps


def _through_16_bits(operands: Operands) -> torch.Tensor:
    """What a peer computes that writes gate and up in fp16 before the activation."""
    x = operands.x("float16", 1)[0]
    gate, up = (preactivation(x, w).half().double() for w in (operands.gate, operands.up))
    return round_once(SILU(gate, up), torch.float16)


def test_roundings_in_between_are_a_peers_right_and_not_ours(operands: Operands) -> None:
    output = _through_16_bits(operands)
    assert operands.check(output, "float16", 3, specified=False).wrong == ""
    assert operands.check(output, "float16", 1, specified=True).wrong
    assert "values are rounded to 16 bits in between (gate and up in float16)" in operands._sample(output, "float16")


@pytest.mark.parametrize("specified", [True, False])
@pytest.mark.parametrize(
    "fault",
    [
        lambda o, out: SILU(preactivation(o.x("float16", 1)[0], o.up), preactivation(o.x("float16", 1)[0], o.gate)).half(),
        lambda o, out: out * 1.01,
        lambda o, out: out.roll(1, 0),
        lambda o, out: torch.where(torch.arange(72) < 8, torch.nan, out),
        lambda o, out: torch.zeros_like(out),
    ],
    ids=["gate and up exchanged", "a scale", "rows shifted", "not written", "zeros"],
)
def test_wrong_outputs_do_not_pass(operands: Operands, fault, specified: bool) -> None:  # type: ignore[no-untyped-def]
    output = fault(operands, right(operands, "float16"))
    assert operands.check(output, "float16", 1 if specified else 3, specified=specified).wrong


def test_one_wrong_element_is_found_outside_the_sample(operands: Operands) -> None:
    big = draw(3, 600, 32, "cpu")
    output = right(big, "float16")
    columns = sorted(set(range(600)) - set(spread(600, SAMPLE_COLS).tolist()))
    # so small that no norm of the whole sees it
    small = 1e-5 * float(output.double().norm())
    at = int((output[0, columns].abs() - small).abs().argmin())
    output[0, columns[at]] = -output[0, columns[at]]
    assert big._sample(output, "float16") == ""
    assert big.check(output, "float16", 1, specified=True).wrong == "1 elements of rows 0 to 2 cannot be right"


def test_a_wrong_form_is_said(operands: Operands) -> None:
    output = right(operands, "float16")
    assert (
        operands.check(output.float(), "float16", 1, True).wrong
        == "[40, 72] torch.float32 where [40, 72] torch.float16 belongs"
    )
    found = operands.check(output[:-1], "float16", 1, True)
    assert found.wrong.startswith("[39, 72]")
    assert math.isnan(found.fro_rel_err)


@pytest.mark.parametrize(("size", "count"), [(1, 16), (5, 16), (16, 16), (7168, 16), (4096, 256)])
def test_samples_are_spread_from_end_to_end(size: int, count: int) -> None:
    found = spread(size, count).tolist()
    assert found == sorted(set(found))
    assert found[0] == 0
    assert found[-1] == size - 1
    assert len(found) == min(size, count)


def test_a_replica_keeps_what_lies_beyond_the_view() -> None:
    storage = torch.arange(12.0)
    view = storage[2:8].view(2, 3)
    copy = replica(view)
    assert torch.equal(copy, view)
    assert copy.data_ptr() != view.data_ptr()
    assert torch.equal(copy.as_strided((12,), (1,), 0), storage)
