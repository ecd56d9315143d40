"""`glu4 emulate --kernel` of the kernels for mixtures of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glu4.cli.output import emit_json, progress
from glu4.cli.tiles import aligned, changed, print_kernel

if TYPE_CHECKING:
    from glu4.verify import Case

__all__ = ["KERNELS", "emulate_experts"]

KERNELS = {"sm100_grouped_dual_gemm_w4a4": True, "sm100_grouped_linear_w4a4": False}  # whether there are two matrices


def _shape(text: str | None) -> tuple[int, int, int, int]:
    try:
        numbers = [int(v) for v in (text or "").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4 or min(numbers) < 1:
        raise ValueError(f"--shape: expected ROWS,N,K,EXPERTS, positive, got {text!r}")
    rows, n, k, experts = numbers
    return rows, n, k, experts


def _case(seed: int, shape: tuple[int, int, int, int], dual: bool) -> Case:
    """Full-range data; each row chooses an expert, so that some have none where there are few rows."""
    import torch

    from glu4.verify.cases import full_range_case

    rows, n, k, experts = shape
    chosen = torch.randint(0, experts, (rows,), generator=torch.Generator().manual_seed(seed))
    sizes = chosen.bincount(minlength=experts).tolist()
    return full_range_case(seed, rows, n, k, group_sizes=sizes, linear=not dual, bias=True)


def emulate_experts(
    kernel: str, config: str | None, shape: str | None, plan: list[tuple[str, int]], limits: dict[str, Any], json: bool
) -> bool:
    """Compile a kernel and the one that numbers its tiles, emulate both under every schedule of `plan`; whether all is right.

    The whole grid is run: only the device knows where an expert's tiles are.
    """
    import tempfile
    from dataclasses import asdict
    from pathlib import Path

    from glu4.backends.blackwell.moe_config import MoeConfig, moe_candidates, moe_legal
    from glu4.backends.blackwell.moe_emulation import ExportedExperts
    from glu4.backends.blackwell.moe_spec import MoeSpec
    from glu4.problem import GroupedProblem

    dual, (rows, n, k, experts) = KERNELS[kernel], _shape(shape)
    operation = "grouped_dual_gemm" if dual else "grouped_linear"
    problem = GroupedProblem(rows, experts, n, -(-k // 32) * 32, operation=operation)
    base = next(moe_candidates(problem), MoeConfig(gated=dual))
    chosen = changed(base, config, lambda c: c.grouped.most_stages)
    if (reason := moe_legal(chosen, problem)) is not None:
        raise ValueError(f"--config: {reason}")
    with tempfile.TemporaryDirectory() as scratch, progress("compiling", total=1 + len(plan)) as advance:
        made = ExportedExperts(MoeSpec(chosen), Path(scratch))
        advance(1, "emulating")
        found = []
        for name, seed in plan:
            found += _rows(made, (rows, n, k, experts), name, seed, limits)
            advance(1, f"emulating: {name}, seed {seed}")
    right = not any(row["findings"] for row in found)
    if json:
        head = {"tool": "glu4 emulate", "kernel": made.spec.name, "shape": [rows, n, k, experts], "clean": right}
        emit_json(head | {"config": asdict(chosen), "tiles": found})
    else:
        print_kernel(made.spec.name, found)
    return right


def _rows(
    made: Any, shape: tuple[int, int, int, int], schedule: str, seed: int, limits: dict[str, Any]
) -> list[dict[str, Any]]:
    """What each kernel did under one schedule: hazards of both, and the numbers of the second."""
    import numpy as np

    from glu4.backends.blackwell.moe_emulation import ExpertCall
    from glu4.nvfp4 import NVFP4Tensor
    from glu4.verify.checker import check
    from glu4.verify.tiles import UNWRITTEN

    case = _case(seed, shape, made.config.gated)
    assert isinstance(case.x, NVFP4Tensor)
    assert case.group_offsets is not None
    weights = tuple(aligned(w) for w in (case.gate, case.up) if w is not None)
    biases = (case.gate_bias, case.up_bias)[: len(weights)]
    call = ExpertCall(aligned(case.x), weights, biases, case.group_offsets, case.activation)
    ran = made.run(call, np.full(shape[:2], UNWRITTEN, np.uint16), schedule_name=schedule, seed=seed, **limits)
    verdict = check(case, ran.out)
    sizes = case.group_offsets.diff()
    named = f"{shape[0]} rows of {int((sizes > 0).sum())} of {shape[3]} experts"
    rows = []
    for what, result, wrong in (
        ("tiles numbered", ran.tiles, []),
        (named, ran.products, [] if verdict.ok else [verdict.summary()]),
    ):
        head = {"schedule": schedule, "seed": seed, "instructions": result.report.instructions}
        findings = [*(str(h) for h in result.report.hazards), *wrong]
        rows.append(head | {"seconds": result.report.seconds, "tile": what, "findings": findings})
    return rows
