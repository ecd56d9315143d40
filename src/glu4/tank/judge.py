"""The judge: the specification first, the clock second, and a verdict whatever an entry does.

The order for an entry: its configuration's rules and the compiler; a full-range case, whose output this process checks; for a
submission the adapter of glu4.verify; then the clock, or, where the device is not, the model.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from glu4.backends.blackwell import config as blackwell
from glu4.backends.blackwell.emulation import export
from glu4.backends.blackwell.spec import KernelSpec as BlackwellSpec
from glu4.bench.devices import device
from glu4.bench.machine import slug
from glu4.bench.model_sm100 import predict
from glu4.bench.roofline import limit
from glu4.compiled import store
from glu4.errors import UnsupportedError
from glu4.problem import Problem
from glu4.tank import clock
from glu4.tank.clock import Pair, Ratio
from glu4.tank.kernels import config_of, refusal, specs_of
from glu4.tank.ledger import Sample, ShapeResult, Verdict
from glu4.tank.process import Process, started
from glu4.tank.round import Change, Entry, Round
from glu4.tank.worker import Stopped, case_of
from glu4.verify import submission
from glu4.verify.checker import check
from glu4.verify.contest import SEED, DualShape

__all__ = ["Judged", "judge", "where"]

_FLOORS = {"h100": "h100", "h200": "h200", "b200": "b200-contest"}
_SUBMITTED = DualShape(128, 128, 256)
# a predicted change of less is none: the model is not that sharp (docs/model-sm100.md)
_MODEL = 0.01
# the diagnosis's words for the fault that the idea of these rounds comes from, and what it means for a dual GEMM
_ONE_PRODUCT = {
    "only one of the two products is computed (gate)": "computes A@B1 only: second product, SiLU and multiply are missing",
    "only one of the two products is computed (up)": "computes A@B2 only: first product, SiLU and multiply are missing",
}


@dataclass(frozen=True)
class Judged:
    """A verdict with what it rests on."""

    verdict: Verdict
    shapes: list[ShapeResult]
    samples: list[Sample]


def where(r: Round) -> str:
    """ "cuda" where the round's device is this machine's, "cpu" for rounds of the CPU, else "emulate"."""
    if r.device == "cpu":
        return "cpu"
    if torch.cuda.is_available() and slug(torch.cuda.get_device_name()) == r.device:
        return "cuda"
    return "emulate"


def judge(r: Round, entry: Entry, run: str, at: str) -> Judged:
    """The verdict of one entry; `at` as `where` says. Raises nothing that an entry could cause."""
    basis = "none"
    try:
        _compiled(r, entry, at)
        request = _request(r, entry, at)
        # what the output comes from; a file on a machine without the device runs on its CPU
        basis = "measured" if at != "emulate" else "emulated" if entry.whole.kind == "config" else "none"
        with started(request) as process:
            _checked(process, request)
            if entry.whole.kind == "submission":
                _adapted(r, entry.whole, at)
            if at == "emulate":
                return _predicted(r, entry, run, basis)
            process.go()
            return _measured(r, entry, run, _pairs(process))
    except Stopped as stopped:
        reached = "none" if stopped.outcome in ("does not compile", "not run") else basis
        return Judged(_verdict(run, entry, stopped.outcome, reached, str(stopped)), [], [])


def _verdict(run: str, entry: Entry, outcome: str, basis: str, sentence: str, found: Ratio | None = None) -> Verdict:
    value, low, high = (None, None, None) if found is None else (found.value, found.low, found.high)
    return Verdict(run, entry.name, outcome, basis, sentence, value, low, high, time.time())


def _request(r: Round, entry: Entry, at: str) -> dict[str, Any]:
    def plain(change: Change) -> dict[str, Any]:
        path = None if change.path is None else str(change.path.resolve())
        return {"kind": change.kind, "fields": dict(change.fields), "path": path}

    return {
        "entry": plain(entry.whole), "baseline": plain(r.baseline), "backend": r.backend, "where": at, "x_format": r.x_format,
        "shapes": [list(s) for s in r.shapes], "emulated": list(r.emulated), "seed": r.seed, "pairs": r.pairs,
        "time_limit": r.time_limit, "memory_gib": r.memory_gib,
    }  # fmt: skip


# ---- rules and the compiler ----


def _compiled(r: Round, entry: Entry, at: str) -> None:
    """Raise Stopped when a configuration may not run, or does not compile; kernels of this machine's device are compiled."""
    if entry.whole.kind != "config":
        return
    try:
        config = config_of(r.backend, entry.whole.fields)
    except (ValueError, TypeError) as error:
        raise Stopped("does not compile", str(error)) from None
    rule = refusal(config, r.problems())
    if rule is None and at != "cuda":
        return  # the emulator compiles for itself
    try:
        if isinstance(config, blackwell.Config) and rule is not None:
            with tempfile.TemporaryDirectory() as scratch:  # tells the compiler's own error line from its traceback
                export([BlackwellSpec.of(config, torch.float16)], Path(scratch))
        else:
            store.compile_missing(specs_of(config, r.x_format))
        message = ""
    except UnsupportedError as error:
        message = " ".join(str(error).split())
    if rule is not None:
        tried = store.installed_dsl() == store.DSL_VERSION
        said = message if tried and message else "CuTe DSL compiles it all the same" if tried else "CuTe DSL was not asked"
        raise Stopped("does not compile", f"{said}; the rule: {rule}")
    if message and store.installed_dsl() is None:
        raise Stopped("not run", f"its kernel is not compiled; glu4 tank compile makes it where CuTe DSL is ({message})")
    if message:
        raise Stopped("does not compile", message)


# ---- the specification ----


def _checked(process: Process, request: dict[str, Any]) -> None:
    """Check the output of the full-range case; raises Stopped with the diagnosis."""
    said = process.answer()
    case = case_of(request)
    out = load_file(process.folder / "out.safetensors")["out"]
    found = check(case, out)
    if not found.ok:
        raise Stopped("wrong result", _named(found.summary()))
    if said["hazard"]:
        raise Stopped("wrong result", f"right numbers, but a hazard: {said['hazard']}")


def _named(summary: str) -> str:
    """The sentence of a wrong result, the fault first where it is known by name."""
    text = " ".join(summary.removeprefix("wrong: ").split())
    for words, meaning in _ONE_PRODUCT.items():
        if words in text:
            return f"{meaning} ({text.partition('. Diagnosis:')[0]})"
    return text[:1000]


def _adapted(r: Round, change: Change, at: str) -> None:
    """A submission through the adapter: public and full-range data, and the same buffers again."""
    assert change.path is not None
    shapes: list[tuple[Any, bool]] = [("public", False), ("full range", False), ("full range", True)]
    planned = [
        submission.Trial("dual_gemm", _SUBMITTED, kind, SEED if kind == "public" else r.seed + i, again)
        for i, (kind, again) in enumerate(shapes)
    ]
    try:
        on = "cuda" if at == "cuda" else "cpu"
        report = submission.run(change.path, "dual_gemm", timeout=min(120.0, r.time_limit), device=on, only=planned)
    except submission.SubmissionError as error:
        raise Stopped("hung" if "ran longer than" in str(error) else "crashed", str(error)) from None
    wrong = next((o for o in report.outcomes if not o.ok), None)
    if wrong is not None:
        raise Stopped("wrong result", _named(wrong.findings[0]))


# ---- the clock ----


def _pairs(process: Process) -> list[tuple[tuple[int, int, int], list[Pair]]]:
    found = []
    while "done" not in (said := process.answer()):
        m, n, k = said["shape"]
        found.append(((m, n, k), [Pair(b, e, bool(first)) for b, e, first in said["pairs"]]))
    return found


def _measured(r: Round, entry: Entry, run: str, timed: Sequence[tuple[tuple[int, int, int], list[Pair]]]) -> Judged:
    shapes, samples = [], []
    for (m, n, k), pairs in timed:
        name, found = f"{m}, {n}, {k}", clock.ratio(pairs)
        before, after = (statistics.median(getattr(p, f) for p in pairs) for f in ("baseline_us", "entry_us"))
        spread = (clock.outcome(found), found.value, found.low, found.high)
        shapes.append(ShapeResult(run, entry.name, name, *spread, before, after, _floor(r, m, n, k)))
        samples += [
            Sample(run, entry.name, name, i, round(p.baseline_us, 3), round(p.entry_us, 3), int(p.entry_first))
            for i, p in enumerate(pairs)
        ]
    whole = clock.combined([pairs for _, pairs in timed])
    outcome = clock.outcome(whole)
    counts = [f"{sum(s.outcome == word for s in shapes)} {word}" for word in ("faster", "slower", "no difference")]
    sentence = f"of {len(shapes)} shapes, with {r.pairs} pairs each: {', '.join(counts)}"
    return Judged(_verdict(run, entry, outcome, "measured", sentence, whole), shapes, samples)


def _floor(r: Round, m: int, n: int, k: int) -> float | None:
    if r.device not in _FLOORS:
        return None
    return limit(Problem(m, n, k, x_format=r.x_format), device(_FLOORS[r.device])).time_s * 1e6


# ---- without the device ----


def _predicted(r: Round, entry: Entry, run: str, basis: str) -> Judged:
    """Correct in the emulator or on the CPU; for Blackwell configurations the model's times beside it."""
    seen = "right in the emulator, without a hazard, under three schedules" if basis == "emulated" else "right on the CPU"
    config = config_of(r.backend, entry.whole.fields) if entry.whole.kind == "config" else None
    before = config_of(r.backend, r.baseline.fields) if r.baseline.kind == "config" else None
    if not (isinstance(config, blackwell.Config) and isinstance(before, blackwell.Config)):
        return Judged(_verdict(run, entry, "correct", basis, f"{seen}; no {r.device} here, so it was not timed"), [], [])
    shapes = []
    try:
        for problem in r.problems():
            was, is_now = predict(problem, before).us, predict(problem, config).us
            speedup, name = was / is_now, f"{problem.m}, {problem.n}, {problem.k}"
            spread = (_side(speedup), speedup, speedup, speedup, was, is_now)
            shapes.append(ShapeResult(run, entry.name, name, *spread, _floor(r, problem.m, problem.n, problem.k)))
    except UnsupportedError as error:
        return Judged(_verdict(run, entry, "correct", basis, f"{seen}; not predicted: {error}"), [], [])
    mean = statistics.geometric_mean(s.speedup for s in shapes)
    sentence = f"{seen}; the time is a prediction of the model, and no {r.device} has run it"
    verdict = Verdict(run, entry.name, _side(mean), "predicted", sentence, mean, None, None, time.time())
    return Judged(verdict, shapes, [])


def _side(speedup: float) -> str:
    return "faster" if speedup > 1 + _MODEL else "slower" if speedup < 1 / (1 + _MODEL) else "no difference"
