"""Rectangles of an output that was filled beforehand: what was written is checked, what was not is told."""

from __future__ import annotations

import pytest
import torch

from glu4 import reference
from glu4.verify import Case, full_range_case
from glu4.verify.tiles import UNWRITTEN, check_written, sample, spread


def expected(case: Case) -> torch.Tensor:
    if case.up is None:
        return reference.linear(case.x, case.gate, bias=case.gate_bias)
    return reference.dual_gemm(case.x, case.gate, case.up, gate_bias=case.gate_bias, up_bias=case.up_bias)


def partly(case: Case, *parts: tuple[int, slice, slice]) -> torch.Tensor:
    """The right output in some rectangles, and nothing elsewhere."""
    right = expected(case).view(-1, *case.out_shape[-2:])
    out = torch.full(right.shape, UNWRITTEN, dtype=torch.int16).view(torch.float16)
    for matrix, rows, columns in parts:
        out[matrix, rows, columns] = right[matrix, rows, columns]
    return out


def test_right_tiles_are_named() -> None:
    case = full_range_case(1, 40, 24, 64, bias=True)
    found = check_written(case, partly(case, (0, slice(8, 40), slice(16, 24)))[0])
    assert [(t.finding, t.name) for t in found] == [("", "rows 8 to 39, columns 16 to 23")]


@pytest.mark.parametrize("linear", [False, True])
def test_each_matrix_of_a_batch(linear: bool) -> None:
    case = full_range_case(2, 40, 24, 64, batch=3, linear=linear)
    found = check_written(case, partly(case, (0, slice(0, 8), slice(0, 24)), (2, slice(32, 40), slice(0, 8))))
    assert [t.finding for t in found] == ["", ""]
    assert found[1].name == "rows 32 to 39, columns 0 to 7 of matrix 2"


def test_wrong_numbers_gaps_and_nothing_are_findings() -> None:
    case = full_range_case(3, 40, 24, 64)
    wrong = partly(case, (0, slice(0, 16), slice(0, 16)))[0]
    wrong[3, 5] = 1000.0
    assert check_written(case, wrong)[0].finding.startswith("wrong: ")
    gaps = partly(case, (0, slice(0, 8), slice(0, 8)), (0, slice(16, 24), slice(8, 16)))[0]
    assert check_written(case, gaps)[0].finding == "256 of 384 elements within what was written were not"
    assert check_written(case, partly(case)[0])[0].finding == "nothing was written"


def test_a_tile_of_another_place_is_wrong() -> None:
    case = full_range_case(4, 40, 24, 64)
    moved = partly(case)[0]
    moved[0:8, 0:8] = expected(case)[8:16, 0:8]
    assert check_written(case, moved)[0].finding


def test_samples_are_corners_and_begin_clusters() -> None:
    assert sample((6, 4, 1), (2, 1, 1), 9) == [(0, 0, 0), (4, 3, 0), (0, 3, 0), (4, 0, 0)]
    assert sample((6, 4, 1), (2, 1, 1), 2) == [(0, 0, 0), (4, 3, 0)]
    assert sample((1, 1, 3), count=4) == [(0, 0, 0), (0, 0, 2)]
    assert sample((2, 1, 1), (2, 1, 1), 4) == [(0, 0, 0)]


def test_spread_samples_begin_clusters_at_equal_steps() -> None:
    assert spread((10, 1, 1), (2, 1, 1), 3) == [(0, 0, 0), (4, 0, 0), (8, 0, 0)]
    assert spread((10, 1, 1), (2, 1, 1), 9) == [(0, 0, 0), (2, 0, 0), (4, 0, 0), (6, 0, 0), (8, 0, 0)]
    assert spread((4, 3, 1), (2, 1, 1), 2) == [(0, 0, 0), (2, 2, 0)]
    assert spread((4, 1, 1), count=1) == [(0, 0, 0)]
