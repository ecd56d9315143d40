"""Shapes, flops and bytes of a problem, and what a bad one says."""

from __future__ import annotations

import pytest
import torch

from glu4 import GroupedProblem, Problem


def test_flops_and_bytes_of_the_contest_shape() -> None:
    p = Problem(256, 4096, 7168)
    assert (p.flops, p.bytes) == (4 * 256 * 4096 * 7168, 36_159_488)
    assert Problem(256, 4096, 7168, operation="linear").flops == p.flops // 2


def test_bytes_follow_the_formats() -> None:
    weights = 2 * (8 * 32 // 2 + 8 * 32 // 16)
    assert Problem(3, 8, 32, x_format="bfloat16").bytes == weights + 3 * 32 * 2 + 3 * 8 * 2
    assert Problem(3, 8, 32, x_format="float32", out_dtype=torch.float32).bytes == weights + 3 * 32 * 4 + 3 * 8 * 4
    assert Problem(3, 8, 32, batch=5, batched=True).bytes == 5 * Problem(3, 8, 32).bytes


def test_grouped() -> None:
    p = GroupedProblem(rows=10, experts=4, n=8, k=32)
    assert p.flops == 4 * 10 * 8 * 32
    assert p.bytes == 10 * 18 + 4 * 2 * 8 * 18 + 10 * 8 * 2
    assert p.out_shape == (10, 8)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rows": -1}, "rows, experts, n: expected non-negative sizes, got -1, 4, 8"),
        ({"k": 24}, "k: expected a positive multiple of 16, got 24"),
        ({"x_format": "fp8"}, "x_format: expected nvfp4, float16, bfloat16 or float32, got 'fp8'"),
    ],
)
def test_bad_grouped_problems(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedProblem(**{"rows": 10, "experts": 4, "n": 8, "k": 32, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"k": 24}, ValueError, "k: expected a positive multiple of 16, got 24"),
        ({"m": -1}, ValueError, "expected non-negative sizes, got -1, 8, 1"),
        ({"x_format": "fp8"}, ValueError, "x_format: expected nvfp4, float16, bfloat16 or float32, got 'fp8'"),
        ({"operation": "gemm"}, ValueError, "operation: expected dual_gemm or linear, got 'gemm'"),
        ({"out_dtype": torch.float64}, TypeError, "out_dtype: expected float16, bfloat16 or float32, got torch.float64"),
        ({"batch": 2}, ValueError, "batch: expected 1 without batched weights, got 2"),
    ],
)
def test_bad_problems(kwargs: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Problem(**{"m": 1, "n": 8, "k": 16, **kwargs})  # type: ignore[arg-type]
