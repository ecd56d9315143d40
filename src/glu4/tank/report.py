"""The page of a ledger, and the table of its outcomes for the documentation."""

from __future__ import annotations

import html
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glu4.pages import plots
from glu4.pages.numbers import NONE, day, interval, moment, ratio
from glu4.pages.svg import SERIES
from glu4.pages.template import render
from glu4.tank.claims import Claim, Run, claims, histories, read
from glu4.tank.ledger import Ledger, LedgerError

__all__ = ["outcomes", "page", "write"]


def write(ledger_path: str | Path, output_path: str | Path) -> None:
    """Write the page of a ledger: one HTML file with nothing outside it.

    Raises LedgerError for a file that is no ledger, OSError for an output that cannot be written, ImportError without jinja2.
    """
    Path(output_path).write_text(page(_runs(ledger_path)), encoding="utf-8")


def _runs(path: str | Path) -> list[Run]:
    ledger = Ledger(path, create=False)
    try:
        return read(ledger)
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise LedgerError(f"{path}: not a readable ledger ({error})") from None


def page(runs: Sequence[Run]) -> str:
    """The HTML page."""
    now = claims(runs)
    return render(
        "tank.html.j2",
        runs=runs,
        claims=now,
        counts=Counter(c.status for c in now).most_common(),
        rounds=len({run.record.name for run in runs}),
        claimed=_claimed(now),
        floors=_floors(runs),
        settings={run.record.run: list(_flat(run.record.environment.details)) for run in runs},
    )


def _claimed(now: Sequence[Claim]) -> plots.Figure | None:
    """Claimed against measured or predicted, claim by claim under their rounds; None where there is nothing to draw."""
    content: list[plots.Row] = []
    for name in dict.fromkeys(c.round.name for c in now):
        drawn = [(c, _marks(c)) for c in now if c.round.name == name]
        content += [plots.Row(name)] * any(marks for _, marks in drawn)
        content += [plots.Row(c.entry.entry, marks) for c, marks in drawn if marks]
    marks = [m for row in content for m in row.marks]
    if not marks:
        return None
    legend = [
        plots.Key(2, "claimed", hollow=True),
        plots.Key(0, "measured, with its 95 % interval"),
        plots.Key(0, "predicted", hollow=True),
    ]
    both = [(c.entry.claimed_speedup, c.verdict.speedup) for c in now if c.verdict]
    above = [claimed > found for claimed, found in both if claimed and found]
    summary = f"Claimed and measured speedups. {sum(above)} of {len(above)} claims that have both lie above what was found."
    return plots.rows(content, "speedup over the baseline", summary, "baseline", [k for k in legend if _used(k, marks)])


def _used(key: plots.Key, marks: Sequence[plots.Mark]) -> bool:
    return any((m.series, m.hollow) == (key.series, key.hollow) for m in marks)


def _marks(claim: Claim) -> list[plots.Mark]:
    name, found, verdict = claim.entry.entry, [], claim.verdict
    if verdict is not None and verdict.speedup:
        measured = verdict.basis == "measured"
        spread = interval(verdict.low, verdict.high)
        title = f"{name}: {verdict.basis} {ratio(verdict.speedup)}{f', {spread}' if spread else ''}"
        found.append(plots.Mark(verdict.speedup, 0, title, verdict.low, verdict.high, hollow=not measured))
    if claim.entry.claimed_speedup:
        title = f"{name}: claimed {ratio(claim.entry.claimed_speedup)}"
        found.append(plots.Mark(claim.entry.claimed_speedup, 2, title, hollow=True))
    return found


def _floors(runs: Sequence[Run]) -> plots.Figure | None:
    """Distance to the floor, verdict after verdict; None where no verdict has one."""
    found = histories(runs)
    if not found:
        return None
    points, lines, legend = [], [], []
    days: dict[str, int] = {}
    for i, history in enumerate(found):
        series = i % SERIES
        for m in history.moments:
            days[day(m.finished)] = min(m.position, days.get(day(m.finished), m.position))
        before = [(m.position, m.baseline, f"{m.name}, baseline: {ratio(m.baseline)} the floor") for m in history.moments]
        after = [(m.position, m.entry, f"{m.name}: {ratio(m.entry)} the floor, {moment(m.finished)}") for m in history.moments]
        points += [plots.Points(series, before, hollow=True), plots.Points(series, after)]
        lines.append(plots.Line(list(_steps([(m.position, m.best) for m in history.moments])), f"c{series}"))
        legend.append(plots.Key(series, history.name))
    last = {history.name: history.moments[-1].best for history in found}
    summary = (
        "Distance to the floor over time. Now: " + "; ".join(f"{name}: {ratio(best)}" for name, best in last.items()) + "."
    )
    at = sorted((position, name) for name, position in days.items())
    verdicts = sum(len(history.moments) for history in found)
    x = plots.Axis(f"{verdicts} timed verdicts, in order", log=False, at=at)
    floor = plots.Line([(0, 1.0), (max(verdicts - 1, 1), 1.0)], "floor", [(0, 1.0, "floor", "start")])
    return plots.plane(points, [floor, *lines], x, plots.Axis("time / floor"), summary, legend)


def _steps(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """A line that stays until the next point and then jumps."""
    last: float | None = None
    for x, y in points:
        if last is not None:
            yield x, last
        yield x, y
        last = y


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """A nested document as (path, text) pairs."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name} {key}".strip())
    elif isinstance(value, list):
        yield name, ", ".join(str(inner) for inner in value)
    elif value not in (None, ""):
        yield name, str(value)


# ---- the table of the documentation ----


def outcomes(ledger_path: str | Path) -> str:
    """Markdown table of every claim's outcome now; one sentence where the ledger does not exist or holds no claim."""
    now = claims(_runs(ledger_path)) if Path(ledger_path).is_file() else []
    if not now:
        return "No round has been recorded yet.\n"
    head = "| Round | Entry | Claimed | Found | 95 % interval | Now |\n| --- | --- | ---: | ---: | ---: | --- |\n"
    return head + "".join(_markdown(c) for c in now)


def _markdown(claim: Claim) -> str:
    verdict = claim.verdict
    found = NONE if verdict is None or verdict.speedup is None else ratio(verdict.speedup)
    cells = (
        _cell(claim.round.name),
        _cell(claim.entry.entry),
        ratio(claim.entry.claimed_speedup),
        found,
        interval(verdict.low, verdict.high) if verdict is not None else "",
        _cell(claim.status),
    )
    return f"| {' | '.join(cells)} |\n"


def _cell(text: str) -> str:
    """Text that Markdown shows as it is, in one cell."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|" else c for c in plain)
