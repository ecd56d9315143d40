"""Hopper results against the specification: shapes of the suites, every M, odd sizes, the whole range, random problems."""

from __future__ import annotations

import pytest

from glu4.bench.suites import SUITES
from glu4.verify.cases import full_range_case
from glu4.verify.contest import DualShape
from gpu import proofs
from gpu.harness import FORMATS, Target

# (N, K): every M of the seed and decode suites
SHAPES: dict[tuple[int, int], list[int]] = {}
for _shape in (*SUITES["seed"], *SUITES["decode"]):
    assert isinstance(_shape, DualShape)
    if _shape.m not in SHAPES.setdefault((_shape.n, _shape.k), []):
        SHAPES[_shape.n, _shape.k].append(_shape.m)

ODD_NS = (1, 3, 7, 8, 12, 24, 31, 33, 40, 56, 72, 88, 104, 120, 136, 264, 520, 1000)
ODD_KS = (16, 48, 80, 112, 144, 176, 208, 272, 1040, 7184)


@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize(("n", "k"), SHAPES, ids=lambda size: str(size))
def test_shapes_of_the_suites(target: Target, n: int, k: int, x_format: str) -> None:
    ms = SHAPES[n, k]
    if not target.full:  # the CPU computes the same tails of far smaller ones
        ms, n, k = [m % 61 + 1 for m in ms], n % 71 + 8, k % 240 // 16 * 16 + 16
    proofs.right_for_every_m(target, full_range_case(n + k, max(ms), n, k, x_format=x_format), ms)


@pytest.mark.parametrize("x_format", FORMATS)
def test_every_m_to_300(target: Target, x_format: str) -> None:
    case = full_range_case(300, 300, 72, 208, x_format=x_format, bias=True)
    proofs.right_for_every_m(target, case, target.some(range(1, 301), 4))


@pytest.mark.parametrize("x_format", FORMATS)
def test_tails_of_m_at_full_width(target: Target, x_format: str) -> None:
    n, k = (4096, 1040) if target.full else (136, 80)
    case = full_range_case(11, 300, n, k, x_format=x_format)
    ms = (1, 3, 8, 9, 17, 31, 64, 65, 100, 129, 193, 255, 257, 300)
    proofs.right_for_every_m(target, case, target.some(ms, 3))


@pytest.mark.parametrize("x_format", FORMATS)
def test_odd_sizes_of_n_and_k(target: Target, x_format: str) -> None:
    for n in target.some(ODD_NS, 4):
        proofs.right_for_sizes(target, x_format, n, ODD_KS if target.full else ODD_KS[:3], (1, 5, 33, 130))


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
@pytest.mark.parametrize("x_format", FORMATS)
def test_extreme_global_scales(target: Target, x_format: str, linear: bool) -> None:
    proofs.right_with_extreme_scales(target, x_format, linear)


@pytest.mark.parametrize("part", range(10))
def test_random_problems(target: Target, part: int) -> None:
    proofs.right_in_random_problems(target, part * 100, 100 if target.full else 4)


@pytest.mark.parametrize("x_format", ["float16", "bfloat16"])
def test_one_row_seen_as_many(target: Target, x_format: str) -> None:
    proofs.right_after_expanding(target, full_range_case(12, 33, 40, 208, x_format=x_format))
