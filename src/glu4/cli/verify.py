"""`glu4 verify`: check this machine's own backends, or a GPU MODE submission, against the specification."""

from __future__ import annotations

import secrets
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from glu4.cli.output import JsonOption, console, emit_json, error_line, progress

if TYPE_CHECKING:
    from glu4.verify.case import Case
    from glu4.verify.submission import Outcome, SubmissionReport

__all__ = ["command"]

SubmissionOption = Annotated[
    Path | None,
    typer.Option("--submission", metavar="FILE", help="Python file with custom_kernel(data), run in its own process."),
]
ProblemOption = Annotated[
    str | None,
    typer.Option(
        "--problem",
        metavar="NAME",
        help="dual_gemm or group_gemm: the contract of the submission. Without it: what its #!POPCORN line says, or dual_gemm.",
    ),
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Small shapes only (a submission), or 20 cases (backends).")]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", help="What the submission's import, and each call, may take.")
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Seed of the random data; without it a new one, which is printed.")
]
LogOption = Annotated[
    Path | None, typer.Option("--log", metavar="FILE", help="Keep what the submission prints, and its tracebacks, in FILE.")
]
EmulateOption = Annotated[
    bool,
    typer.Option("--emulate", help="No GPU: emulate the submission's launches at the public test shapes, some tiles of each."),
]
TilesOption = Annotated[
    int | None, typer.Option("--tiles", metavar="N", min=1, help="CTAs or clusters of each emulated launch; 2 without it.")
]
CasesOption = Annotated[
    int | None, typer.Option("--cases", metavar="N", min=1, help="Random cases for each backend; 100 without it.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu or cuda. Without it: cuda where there is one.")
]


def command(
    submission: SubmissionOption = None,
    problem: ProblemOption = None,
    quick: QuickOption = False,
    timeout: TimeoutOption = 120.0,
    cases: CasesOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    log: LogOption = None,
    emulate: EmulateOption = False,
    tiles: TilesOption = None,
    json: JsonOption = False,
) -> None:
    """Check results against the specification: the backends of this machine, or a submission.

    Exit code 0: all right. 1: something is wrong, and the fault is named where it is known. 2: could not run.
    """
    chosen = secrets.randbelow(1 << 20) if seed is None else seed
    try:
        _check_device(device)
        if submission is None:
            _check_unused({"--problem": problem, "--log": log}, "are for a submission; add --submission FILE")
            _check_unused({"--emulate": emulate or None, "--tiles": tiles}, "are for a submission; add --submission FILE")
            right = _backends(cases or (20 if quick else 100), chosen, device, json)
        else:
            _check_unused({"--cases": cases}, "is for this machine's backends; leave it out, or leave --submission out")
            if emulate:
                right = _emulated(submission, problem, chosen, quick, tiles, device, log, json)
            else:
                _check_unused({"--tiles": tiles}, "is for --emulate")
                right = _submission(submission, problem, chosen, quick, timeout, device, log, json)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if json:
            emit_json({"status": "could not run", "seed": chosen, "error": str(error)})
        error_line(error)
        raise typer.Exit(2) from None
    raise typer.Exit(0 if right else 1)


def _check_unused(options: dict[str, object], remedy: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(options)} {remedy}; got {', '.join(given)}")


def _check_device(device: str | None) -> None:
    import torch

    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch finds no CUDA device here; leave the option out to use the CPU")


# ---- a submission ----


def _submission(
    file: Path, problem: str | None, seed: int, quick: bool, timeout: float, device: str | None, log: Path | None, json: bool
) -> bool:
    from glu4.verify.submission import detect_problem, run, trials

    chosen = detect_problem(file) if problem is None else problem
    count = len(trials(chosen, seed, quick))
    with progress(f"checking {escape(file.name)}", total=count) as advance:
        report = run(
            file,
            chosen,
            seed=seed,
            quick=quick,
            timeout=timeout,
            device=device,
            log=log,
            on_outcome=lambda outcome: advance(1, f"checking {escape(file.name)}: {outcome.trial.shape}"),
        )
    if json:
        emit_json(_submission_document(report, seed))
    else:
        _print_submission(report, seed)
    return report.ok


def _emulated(
    file: Path, problem: str | None, seed: int, quick: bool, tiles: int | None, device: str | None, log: Path | None, json: bool
) -> bool:
    from glu4.cli.tiles import verify_emulated
    from glu4.verify.submission import PROBLEMS, detect_problem

    _check_unused({"--device": device}, "is not for --emulate, which runs on the CPU")
    chosen = detect_problem(file) if problem is None else problem
    if chosen not in PROBLEMS:
        raise ValueError(f"problem: expected one of {', '.join(PROBLEMS)}, got {chosen!r}")
    return verify_emulated(file, chosen, seed, quick, tiles or 2, log, json)


def _submission_document(report: SubmissionReport, seed: int) -> dict[str, Any]:
    return {
        "status": "right" if report.ok else "wrong",
        "submission": str(report.path),
        "problem": report.problem,
        "device": report.device,
        "seed": seed,
        "cases": [
            {
                "shape": str(outcome.trial.shape),
                "data": outcome.trial.data,
                "seed": outcome.trial.seed,
                "reused_buffers": outcome.trial.reuse,
                "right": outcome.ok,
                "findings": list(outcome.findings),
                "outside_public_tolerance": outcome.outside,
                "seconds": outcome.seconds,
            }
            for outcome in report.outcomes
        ],
    }


def _print_submission(report: SubmissionReport, seed: int) -> None:
    table = Table(
        title=f"{escape(report.path.name)}: {report.problem} on {report.device}, seed {seed}",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("M,N,K" if report.problem == "dual_gemm" else "groups")
    for name in ("data", "result"):
        table.add_column(name, no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    for outcome in report.outcomes:
        data = outcome.trial.data + (", same buffers" if outcome.trial.reuse else "")
        seconds = "-" if outcome.seconds is None else f"{outcome.seconds:.3f}"
        table.add_row(str(outcome.trial.shape), data, "right" if outcome.ok else "[bold red]WRONG[/]", seconds)
    console.print(table)
    for outcome in report.outcomes:
        _print_findings(outcome)
    wrong = sum(not outcome.ok for outcome in report.outcomes)
    total = len(report.outcomes)
    console.print(f"right on all {total} cases" if not wrong else f"WRONG on {wrong} of {total} cases")


def _print_findings(outcome: Outcome) -> None:
    for finding in outcome.findings:
        console.print(f"[bold red]WRONG[/] {escape(outcome.trial.name)}: {escape(finding)}")
    if outcome.ok and outcome.outside:
        console.print(
            f"note: {escape(outcome.trial.name)}: right, but {outcome.outside} elements are outside the public problem's "
            "tolerance of 1e-3, about one unit in the last place of float16"
        )


# ---- this machine's backends ----


def _backends(count: int, seed: int, device: str | None, json: bool) -> bool:
    import torch

    from glu4.verify.cases import random_cases
    from glu4.verify.checker import check

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tally: Counter[tuple[str, str, bool]] = Counter()
    wrong: list[dict[str, Any]] = []
    with progress(f"checking the backends on {where}", total=count) as advance:
        for case in random_cases(seed, count):
            for backend in _able(case, where):
                verdict = check(case, _run(case.to(where), backend).cpu())
                tally[backend, _group(case), verdict.ok] += 1
                if not verdict.ok:
                    wrong.append({"backend": backend, "case": case.name, "seed": case.seed, "summary": verdict.summary()})
            advance()
    if json:
        groups = [{"backend": b, "cases": g, "right": ok, "count": n} for (b, g, ok), n in sorted(tally.items())]
        status = "wrong" if wrong else "right"
        emit_json({"status": status, "device": where, "seed": seed, "groups": groups, "wrong": wrong})
    else:
        _print_backends(tally, wrong, where, seed)
    return not wrong


def _able(case: Case, where: str) -> list[str]:
    """The backends that can run a case on a device."""
    from glu4.dispatch import explain
    from glu4.problem import GroupedProblem, Problem, dense_problem, grouped_problem

    has_bias = case.gate_bias is not None or case.up_bias is not None
    dual = case.up is not None
    if case.group_offsets is not None:
        problem: Problem | GroupedProblem = grouped_problem(
            case.x, case.gate, dual=dual, activation=case.activation, out_dtype=case.out_dtype, has_bias=has_bias
        )
    else:
        problem = dense_problem(
            case.x, case.gate, dual=dual, activation=case.activation, out_dtype=case.out_dtype, has_bias=has_bias
        )
    return [c.backend for c in explain(problem, where).candidates if c.can_run]


def _run(case: Case, backend: str) -> Any:
    """The case through the public functions, into an output full of NaN, so that what is not written shows."""
    import torch

    import glu4

    rows = (case.x.shape[0],) if case.group_offsets is not None else tuple(case.x.shape[:-1])
    out = torch.full((*rows, case.gate.rows), torch.nan, dtype=case.out_dtype, device=case.gate.device)
    if case.up is None:
        weight = glu4.LinearWeight(case.gate)
        if backend != "portable":
            weight = weight.prepare(case.gate.device)
        if case.group_offsets is not None:
            result = glu4.grouped_linear(case.x, weight, case.group_offsets, bias=case.gate_bias, out=out, backend=backend)
            return result[: case.out_shape[0]]
        return glu4.linear(case.x, weight, bias=case.gate_bias, out=out, backend=backend)
    weights = glu4.GatedWeights(case.gate, case.up, gate_bias=case.gate_bias, up_bias=case.up_bias)
    if backend != "portable":
        weights = weights.prepare(case.gate.device)
    if case.group_offsets is None:
        return glu4.dual_gemm(case.x, weights, activation=case.activation, out=out, backend=backend)
    result = glu4.grouped_dual_gemm(case.x, weights, case.group_offsets, activation=case.activation, out=out, backend=backend)
    return result[: case.out_shape[0]]


def _group(case: Case) -> str:
    """What the table counts together: operation, activations, output type."""
    operation = ("" if case.group_offsets is None else "grouped_") + ("linear" if case.up is None else "dual_gemm")
    x = str(getattr(case.x, "dtype", "nvfp4")).removeprefix("torch.")
    return f"{operation}, {x} -> {str(case.out_dtype).removeprefix('torch.')}"


def _print_backends(tally: Counter[tuple[str, str, bool]], wrong: list[dict[str, Any]], where: str, seed: int) -> None:
    table = Table(title=f"backends on {where}, seed {seed}", title_justify="left", box=SIMPLE, pad_edge=False)
    for name in ("backend", "cases"):
        table.add_column(name)
    for name in ("right", "wrong"):
        table.add_column(name, justify="right", no_wrap=True)
    for backend, group in sorted({key[:2] for key in tally}):
        bad = tally[backend, group, False]
        table.add_row(backend, group, str(tally[backend, group, True]), f"[bold red]{bad}[/]" if bad else "0")
    console.print(table)
    for entry in wrong:
        console.print(f"[bold red]WRONG[/] {entry['backend']}: {escape(entry['case'])}: {escape(entry['summary'])}")
    total = sum(tally.values())
    console.print(f"right on all {total} cases" if not wrong else f"WRONG on {len(wrong)} of {total} cases")
