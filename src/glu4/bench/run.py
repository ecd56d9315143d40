"""One measured run: every shape, every contender, checked, then timed in turn; what went wrong is said in its row."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

import glu4
from glu4.bench import ours
from glu4.bench.contender import Contender, Row
from glu4.bench.devices import Device
from glu4.bench.grouped import GroupedOperands, GroupedShape, draw_grouped
from glu4.bench.operands import DATA, FORMATS, Checked, Operands, draw
from glu4.bench.roofline import limit
from glu4.bench.timing import (
    COLD_BYTES,
    REPLAY_MS,
    REST_S,
    TIMED,
    TURNS,
    WARM_UPS,
    Call,
    Failure,
    Recorder,
    Slower,
    Timing,
    describe,
    interleaved,
)

__all__ = ["METHOD", "Lost", "Settings", "measure_shape", "run"]

METHOD = (
    "Each contender: one CUDA graph over round-robin copies of weights and activations, at least two and at least "
    f"{COLD_BYTES // 10**6} MB in all, for a cold L2, in as many rounds as take about {REPLAY_MS:g} ms; {WARM_UPS} warm-up "
    f"replays and {TIMED} timed ones on end after {REST_S:g} s of rest, {TURNS} turns each; median and minimum, divided by the "
    "number of calls. "
    "Preparing weights is not timed; decoding NVFP4 activations is. Outputs are checked before timing: fused ones by the "
    "project's checker, those of peers that round in between by the norm of their error. " + DATA + " Grouped cases: tokens "
    "sorted by expert, offsets on the device; every expert's gate and up have different global scales of 1/2, 1 or 2."
)


class Lost(RuntimeError):
    """The device does not answer any more; `rows` is what the last shape gave until then."""

    def __init__(self, message: str, rows: Iterable[Row]) -> None:
        super().__init__(message)
        self.rows = [r if r.us or r.note else replace(r, note="not timed: the device was lost") for r in rows]


@dataclass(frozen=True)
class Settings:
    """What to measure, dense shapes and grouped cases. x_format: glu4's activations; configs: see `ours.contenders`; commit and
    variant: for the rows."""

    shapes: Sequence[tuple[int, int, int]]
    x_format: str = "float16"
    configs: str = "best"
    commit: str = ""
    variant: str = ""
    seed: int = 0
    grouped: Sequence[GroupedShape] = ()

    def __post_init__(self) -> None:
        if self.x_format not in FORMATS:
            raise ValueError(f"activation-format: expected one of {', '.join(FORMATS)}, got {self.x_format!r}")


def _row(contender: Contender, operands: Operands, settings: Settings, device: Device) -> Row:
    """A contender's row before it is measured."""
    problem = operands.problem(contender.x_format)
    is_ours = contender.name == "glu4"
    case, experts = (operands.case, operands.active) if isinstance(operands, GroupedOperands) else ("", 0)
    return Row(
        contender.name,
        *(operands.m, operands.n, operands.k),
        us=None,
        us_min=None,
        commit=settings.commit,
        config=contender.config,
        chosen=contender.chosen and is_ours,
        variant=settings.variant if is_ours else "",
        x_format=contender.x_format,
        weights=contender.weights,
        backend=glu4.explain(problem, operands.gate.device).chosen if is_ours else "",
        limit_us=round(limit(problem, device).time_s * 1e6, 3),
        case=case,
        experts=experts,
    )


def _checked(contender: Contender, operands: Operands, recorder: Recorder) -> tuple[list[Call], Checked]:
    """The contender's calls and what the check says of the first one's output."""
    calls = contender.prepare(operands)
    outputs: list[torch.Tensor] = []
    recorder.elapsed(lambda: outputs.append(calls[0]()))
    return list(calls), operands.check(outputs[0], contender.x_format, contender.roundings, contender.specified)


def _timed(row: Row, timing: Timing | Failure | Slower) -> Row:
    """The row with its time, or with why there is none; of one that had no turn without either."""
    if isinstance(timing, Slower):
        return row
    if isinstance(timing, Failure):
        return replace(row, note=f"failed: {timing.message}")
    return replace(row, us=round(timing.us, 3), us_min=round(timing.us_min, 3), samples=timing.samples)


def measure_shape(
    operands: Operands,
    contenders: Sequence[Contender],
    recorder: Recorder,
    settings: Settings,
    device: Device,
    margin: float | None = None,
) -> list[Row]:
    """The rows of one shape, in the order of `contenders`; margin: as for `timing.interleaved`.

    Raises Lost when one of them took the device with it.
    """
    rows = {c.key: _row(c, operands, settings, device) for c in contenders}
    ready: dict[str, list[Call]] = {}
    for contender in contenders:
        key = contender.key
        try:
            calls, found = _checked(contender, operands, recorder)
        except Exception as error:
            rows[key] = replace(rows[key], note=f"failed: {describe(error)}")
            if not recorder.alive():
                raise Lost(f"{contender.name} took the device with it: {describe(error)}", rows.values()) from error
            continue
        rows[key] = replace(rows[key], max_rel_err=found.max_rel_err, fro_rel_err=found.fro_rel_err)
        if found.wrong:
            rows[key] = replace(rows[key], note=f"wrong, so not timed: {found.wrong}")
        else:
            ready[key] = calls
    timings = interleaved(ready, recorder, margin)
    for key, timing in timings.items():
        rows[key] = _timed(rows[key], timing)
    fatal = next((t for t in timings.values() if isinstance(t, Failure) and t.fatal), None)
    if fatal is not None:
        raise Lost(fatal.message, rows.values())
    return list(rows.values())


def run(
    settings: Settings,
    device: Device,
    recorder: Recorder,
    on: torch.device | str = "cuda",
    others: Sequence[Contender] = (),
    grouped_others: Sequence[Contender] = (),
) -> Iterator[list[Row]]:
    """The rows of every shape and then of every grouped case in turn, glu4 and `others`. Raises Lost, with the rows of the
    shape it happened in."""
    for m, n, k in settings.shapes:
        operands = draw(m, n, k, on, settings.seed)
        mine = ours.contenders(operands, settings.x_format, settings.configs)
        yield measure_shape(operands, [*mine, *others], recorder, settings, device)
    for shape in settings.grouped:
        case = draw_grouped(shape, on, settings.seed)
        mine = ours.grouped_contenders(case, settings.x_format)
        yield measure_shape(case, [*mine, *grouped_others], recorder, settings, device)
        del case, mine  # gigabytes, which the next case needs
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
