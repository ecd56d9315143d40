"""Named lists of shapes, so that every measurement and table means the same ones."""

from __future__ import annotations

from glu4.bench.grouped import GroupedShape
from glu4.problem import Problem
from glu4.verify.contest import DUAL_BENCHMARKS, DUAL_TESTS, GROUP_BENCHMARKS, DualShape, GroupShape

__all__ = ["DECODE", "GROUPED_SUITES", "SUITES", "dual_problem", "group_problems", "suite"]

# tokens per step from one sequence to a full prefill, at the widest layer of the public problem
DECODE = tuple(DualShape(m, 4096, 7168) for m in (1, 16, 64, 128, 1024, 4096))

# every shape once: the problem lists (1536, 512, 7168) twice
SUITES: dict[str, tuple[DualShape | GroupShape, ...]] = {
    "seed": (*DUAL_BENCHMARKS, *dict.fromkeys(DUAL_TESTS)),
    "decode": DECODE,
    "group": GROUP_BENCHMARKS,
}


def _seed_case(shape: GroupShape) -> GroupedShape:
    """Gate and up of a listed group shape's sizes, which all its groups share but for M."""
    ((n, k),) = {(n, k) for _, n, k in shape.sizes}
    return GroupedShape(f"seed g{len(shape.sizes)} N{n} K{k}", n, k, tuple(m for m, _, _ in shape.sizes))


def _moe_cases(experts: int, n: int, k: int, top_k: int, each: tuple[int, ...]) -> tuple[GroupedShape, ...]:
    """`each` tokens an expert, and as many in all with skewed routing."""
    balanced = [GroupedShape(f"E{experts} x{m} N{n} K{k}", n, k, (m,) * experts) for m in each]
    skewed = [
        GroupedShape(f"E{experts} zipf {m * experts} N{n} K{k}", n, k, None, experts, m * experts // top_k, top_k) for m in each
    ]
    return (*balanced, *skewed)


# grouped-seed: the public group problem's sizes, gate and up each. moe: layers of Qwen3-30B-A3B (128 experts, 8 a token) and 32
# of DeepSeek-V3's experts on one rank, from decode to prefill, balanced and as 1 / rank
GROUPED_SUITES: dict[str, tuple[GroupedShape, ...]] = {
    "grouped-seed": tuple(_seed_case(shape) for shape in GROUP_BENCHMARKS),
    "moe": (*_moe_cases(128, 768, 2048, 8, (4, 64)), *_moe_cases(32, 2048, 7168, 1, (4, 128))),
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
