"""What `glu4 verify --submission FILE --emulate` and `glu4 emulate --kernel` print, and the latter's own part.

Compiling needs nvidia-cutlass-dsl, capturing a launch a C compiler; no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from glu4.cli.output import console, emit_json, progress

if TYPE_CHECKING:
    from glu4.backends.blackwell.config import Config
    from glu4.verify.emulated import Emulated

__all__ = ["KERNELS", "aligned", "changed", "emulate_kernel", "print_kernel", "verify_emulated"]

C = TypeVar("C")

KERNELS = {"sm100_dual_gemm_w4a4": True, "sm100_linear_w4a4": False}  # whether there are two matrices


# ---- a submission ----


def verify_emulated(file: Path, problem: str, seed: int, quick: bool, tiles: int, log: Path | None, json: bool) -> bool:
    """Emulate a submission's launches at the public test shapes; whether all is right."""
    from glu4.verify.emulated import run, shapes

    chosen = shapes(quick, problem)
    with progress(f"emulating {escape(file.name)}", total=len(chosen)) as advance:
        found = run(
            file, chosen, seed=seed, tiles=tiles, log=log,
            on_outcome=lambda outcome: advance(1, f"emulating {escape(file.name)}: {outcome.shape}"),
        )  # fmt: skip
    right = all(outcome.ok for outcome in found)
    if json:
        from dataclasses import asdict

        head = {"status": "right" if right else "wrong", "submission": str(file), "problem": problem, "seed": seed}
        emit_json(head | {
            "shapes": [asdict(outcome) | {"right": outcome.ok} for outcome in found]})  # fmt: skip
    else:
        _print(file, problem, found, seed)
    return right


def _print(file: Path, problem: str, found: list[Emulated], seed: int) -> None:
    table = Table(title=f"{escape(file.name)} in the emulator, seed {seed}", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("M,N,K" if problem == "dual_gemm" else "groups", no_wrap=problem == "dual_gemm")
    for name in ("grid", "tiles", "result"):
        table.add_column(name, no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    for outcome in found:
        grid = "x".join(map(str, outcome.grid))
        result = "right" if outcome.ok else "[bold red]WRONG[/]"
        table.add_row(outcome.shape, grid, str(len(outcome.tiles)), result, f"{outcome.seconds:.1f}")
    console.print(table)
    for outcome in found:
        for finding in outcome.findings:
            console.print(f"[bold red]WRONG[/] {escape(outcome.shape)}: {escape(finding)}")
    wrong = sum(not outcome.ok for outcome in found)
    sampled = f"{sum(len(outcome.tiles) for outcome in found)} tiles of {len(found)} launches"
    console.print(f"right on {sampled}, and no hazard" if not wrong else f"WRONG on {wrong} of {len(found)} shapes")


# ---- a kernel ----


def config_of(text: str | None, m: int, n: int, k: int, dual: bool) -> Config:
    """`field=value,..` on the shape's default; raises ValueError for a field or value that there is not."""
    from dataclasses import replace

    from glu4.backends.blackwell.config import Config, candidates
    from glu4.problem import Problem

    base = next(candidates(Problem(m, n, k, operation="dual_gemm" if dual else "linear")), Config())
    found = changed(base, text, lambda c: c.most_stages(2 if dual else 1))
    first = text is None or "gate_first" not in text
    return replace(found, gate_first=min(found.gate_first, found.stages)) if first else found


def changed(base: C, text: str | None, most_stages: Callable[[C], int]) -> C:
    """`field=value,..` on a configuration; of the stages, unless they are given, as many are kept as fit.

    Raises ValueError for a field or value that there is not.
    """
    from dataclasses import fields, replace

    if text is None or text == "default":
        return base
    known = {f.name: type(getattr(base, f.name)) for f in fields(base)}  # type: ignore[arg-type] # a dataclass
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (s.strip() for s in part.partition("="))
        if name not in known:
            raise ValueError(f"--config: expected field=value with one of {', '.join(known)}, got {part!r}")
        try:
            given[name] = value.lower() == "true" if known[name] is bool and value.lower() in ("true", "false") else (
                int(value) if known[name] is int else _word(value, known[name]))  # fmt: skip
        except ValueError:
            raise ValueError(f"--config: {name}: expected {known[name].__name__}, got {value!r}") from None
    found: Any = replace(base, **given)  # type: ignore[type-var]
    if "stages" not in given:
        found = replace(found, stages=max(1, min(found.stages, most_stages(found))))
    return found  # type: ignore[no-any-return]


def _word(value: str, kind: type) -> str:
    if kind is bool:
        raise ValueError(value)
    return value


def shape_of(text: str | None) -> tuple[int, int, int, int]:
    """`M,N,K` or `M,N,K,L`."""
    try:
        numbers = [int(v) for v in (text or "").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (3, 4) or min(numbers) < 1:
        raise ValueError(f"--shape: expected M,N,K or M,N,K,L, positive, got {text!r}")
    m, n, k, batch = (*numbers, 1)[:4]
    return m, n, k, batch


def emulate_kernel(
    kernel: str,
    config: str | None,
    shape: str | None,
    plan: list[tuple[str, int]],
    tiles: int,
    limits: dict[str, Any],
    json: bool,
) -> bool:
    """Compile a kernel, capture its launch, emulate tiles of it under every schedule of `plan`; whether all is right.

    Where CTAs take tiles of their own choice (a persistent schedule) the whole grid is run.
    """
    import tempfile
    from dataclasses import replace

    import torch

    from glu4.backends.blackwell.config import legal
    from glu4.backends.blackwell.emulation import export
    from glu4.backends.blackwell.spec import KernelSpec
    from glu4.problem import Problem

    dual, (m, n, k, batch) = KERNELS[kernel], shape_of(shape)
    padded = -(-k // 32) * 32
    chosen = config_of(config, m, n, padded, dual)
    problem = Problem(m, n, padded, batch, "dual_gemm" if dual else "linear", out_dtype=torch.float16)
    if (reason := legal(chosen, problem)) is not None:
        raise ValueError(f"--config: {reason}")
    with tempfile.TemporaryDirectory() as scratch, progress("compiling", total=1 + len(plan)) as advance:
        (made,) = export([KernelSpec(chosen, "f16", dual)], Path(scratch))
        advance(1, "emulating")
        rows = []
        for name, seed in plan:
            rows += _tiles(made, (m, n, k, batch), name, seed, tiles, limits)
            advance(1, f"emulating: {name}, seed {seed}")
    right = not any(row["findings"] for row in rows)
    if json:
        head = {"tool": "glu4 emulate", "kernel": made.spec.name, "shape": [m, n, k, batch], "clean": right}
        emit_json(head | {"config": {f: getattr(chosen, f) for f in vars(replace(chosen))}, "tiles": rows})
    else:
        print_kernel(made.spec.name, rows)
    return right


def _tiles(
    made: Any, shape: tuple[int, int, int, int], schedule: str, seed: int, count: int, limits: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each tile that one schedule ran."""
    import numpy as np

    from glu4.backends.blackwell.emulation import Operands
    from glu4.verify.cases import full_range_case
    from glu4.verify.tiles import UNWRITTEN, check_written, sample

    m, n, k, batch = shape
    case = full_range_case(seed, m, n, k, batch=batch if batch > 1 else None, linear=not made.spec.dual)
    operands = Operands(aligned(case.x), aligned(case.gate), None if case.up is None else aligned(case.up), case.activation)
    c = made.spec.config
    sampled: list[Any] = [None]
    if c.schedule == "one_wave":
        grid = c.grid(m, n, batch)
        firsts = sample((grid[0], grid[1], batch), (c.ctas, 1, 1), count)
        sampled = [[(x, y, z * c.split + i) for i in range(c.split)] for x, y, z in firsts]
    rows = []
    for ctas in sampled:
        out = np.full((batch, m, n), UNWRITTEN, np.uint16)
        result, got = made.run(operands, out, ctas=ctas, schedule_name=schedule, seed=seed, **limits)
        found = check_written(case, got)
        hazards = [str(h) for h in result.report.hazards]
        head = {"schedule": schedule, "seed": seed, "instructions": result.report.instructions}
        head |= {"seconds": result.report.seconds}
        findings = [[*hazards, *([tile.finding] if tile.finding else [])] for tile in found]
        rows += [head | {"tile": tile.name, "findings": f} for tile, f in zip(found, findings, strict=True)]
    return rows


def aligned(t: Any) -> Any:
    """An operand with K padded to a multiple of 32, by blocks whose scale is zero."""
    import torch

    from glu4.nvfp4 import NVFP4Tensor

    if t.k % 32 == 0:
        return t
    linear = t.to_linear()
    codes = torch.nn.functional.pad(linear.codes, (0, 8))
    scale = torch.nn.functional.pad(linear.block_scale.view(torch.uint8), (0, 1)).view(torch.float8_e4m3fn)
    return NVFP4Tensor(codes, scale, t.global_scale)


def print_kernel(name: str, rows: list[dict[str, Any]]) -> None:
    """A line for each tile that was run."""
    console.print(escape(name), highlight=False, soft_wrap=True)
    for row in rows:
        random = f", seed {row['seed']}" if row["schedule"] == "random" else ""
        what = "right, no hazard" if not row["findings"] else "[bold red]WRONG[/]"
        took = f"{row['instructions']} warp instructions in {row['seconds']:.1f} s"
        console.print(f"{row['schedule']}{random}: {row['tile']}: {what}, {took}", highlight=False, soft_wrap=True)
        for finding in row["findings"]:
            console.print(f"  {escape(finding)}", highlight=False, soft_wrap=True)
