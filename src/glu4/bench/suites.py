"""Named lists of shapes, so that every measurement and table means the same ones."""

from __future__ import annotations

from glu4.problem import Problem
from glu4.verify.contest import DUAL_BENCHMARKS, DUAL_TESTS, GROUP_BENCHMARKS, DualShape, GroupShape

__all__ = ["DECODE", "SUITES", "dual_problem", "group_problems", "suite"]

# tokens per step from one sequence to a full prefill, at the widest layer of the public problem
DECODE = tuple(DualShape(m, 4096, 7168) for m in (1, 16, 64, 128, 1024, 4096))

# every shape once: the problem lists (1536, 512, 7168) twice
SUITES: dict[str, tuple[DualShape | GroupShape, ...]] = {
    "seed": (*DUAL_BENCHMARKS, *dict.fromkeys(DUAL_TESTS)),
    "decode": DECODE,
    "group": GROUP_BENCHMARKS,
}


def suite(name: str) -> tuple[DualShape | GroupShape, ...]:
    """The shapes of one suite; raises ValueError naming those there are."""
    if name not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name]


def dual_problem(shape: DualShape, x_format: str = "nvfp4") -> Problem:
    """The Problem of one dual shape with fp16 output; `x_format` as in `Problem`."""
    return Problem(shape.m, shape.n, shape.k, batch=shape.batch, x_format=x_format)


def group_problems(shape: GroupShape, x_format: str = "nvfp4") -> list[Problem]:
    """One linear Problem a group, fp16 output: the plain grouped GEMM of the public problem."""
    return [Problem(m, n, k, operation="linear", x_format=x_format) for m, n, k in shape.sizes]
