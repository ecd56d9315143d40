"""A recording as one HTML page: a lane for each warp and engine, what waits for what, and where the time goes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from glu4.emulator.recording import CLASSES, Recording
from glu4.emulator.replay import Event, Lane, Rates, Timeline

__all__ = ["picture", "render"]

_ROW, _GAP, _HEAD = 20, 5, 30  # pixels: a row of bars, between lanes, the axis
_SMALL = 0.0012  # of the whole time: bars below this are drawn together with their neighbours
_LABEL = 0.035  # bars from here on have a text
_CLASS = {
    "TMA loads": "load", "bulk copies": "load", "cp.async": "copy", "st.async": "copy", "MMA (wgmma)": "mma",
    "MMA (tcgen05)": "mma", "tcgen05.cp": "cp", "TMEM ld/st": "tmem", "TMA stores": "store",
}  # fmt: skip
_LEGEND = (
    ("run", "a warp's own instructions"), ("wait", "a warp waits"), ("load", "TMA and bulk loads"), ("store", "TMA stores"),
    ("mma", "matrix products"), ("cp", "tcgen05.cp"), ("tmem", "TMEM loads and stores"), ("copy", "cp.async, st.async"),
    ("stuck", "never goes on"),
)  # fmt: skip


@dataclass
class _Shape:
    """A bar: x and w in percent of the time, y and h in pixels. tail: percent from its start to its completion."""

    x: str
    w: str
    y: int
    h: int
    kind: str
    title: str
    tail: str = ""
    label: str = ""
    key: str = ""


@dataclass
class _Row:
    """A lane as drawn."""

    lane: Lane
    y: int
    height: int
    name: str


@dataclass
class _Group:
    """One cluster's picture and tables."""

    title: str
    open: bool
    hazards: int
    height: int = 0
    rows: list[_Row] = field(default_factory=list)
    heads: list[tuple[int, str]] = field(default_factory=list)
    shapes: list[_Shape] = field(default_factory=list)
    ticks: list[_Shape] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)
    table: list[dict[str, str]] = field(default_factory=list)
    waits: list[dict[str, str]] = field(default_factory=list)


def render(recording: Recording, title: str, rates: Rates | None = None, clusters: int = 8) -> str:
    """One page with nothing outside it, for a browser, with or without scripts.

    rates: nominal ones if None. clusters: how many clusters of CTAs to draw; the first one with a hazard, or the first, is
    open. Raises ImportError without jinja2, saying what to install, and ValueError for rates that lack an engine's.
    """
    template = _environment().get_template("timeline.html.j2")
    timeline = recording.timed(rates)
    numbers, opened = _clusters(timeline, clusters)
    return str(
        template.render(
            title=title,
            total=_number(timeline.total),
            groups=[_group(timeline, number, number == opened) for number in numbers[:clusters]],
            left_out=max(0, len(numbers) - clusters),
            axis=_axis(timeline.total),
            legend=_legend(timeline),
            hazards=[hazard.partition("\n") for hazard in recording.hazards],
            unresolved=timeline.unresolved,
            rates=_rates(timeline),
            row=_ROW,
            head=_HEAD,
        )
    )


def picture(recording: Recording, rates: Rates | None = None, width: int = 1200) -> str:
    """The picture that `render` opens, as an SVG file of its own without texts on hover. width: in pixels. Raises as it."""
    template = _environment().get_template("timeline.svg.j2")
    timeline = recording.timed(rates)
    _, opened = _clusters(timeline, 1)
    module: Any = template.module
    text = module.alone(_group(timeline, opened, True), _axis(timeline.total), _HEAD, _ROW, _legend(timeline), width)
    return re.sub(r"<title>.*?</title>", "", str(text), flags=re.DOTALL).lstrip()


def _environment() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError('the timeline needs jinja2: pip install "glu4[report]"') from error
    loader = PackageLoader("glu4.emulator", "")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _clusters(timeline: Timeline, drawn: int) -> tuple[list[int], int]:
    """(numbers of the clusters that ran, the one to look at first: with a hazard, if one of those drawn has any)."""
    numbers = sorted({lane.cluster for lane in timeline.lanes})
    marked = {mark.lane.cluster for mark in timeline.hazards}
    return numbers, min(marked.intersection(numbers[:drawn]), default=numbers[0] if numbers else 0)


def _legend(timeline: Timeline) -> list[tuple[str, str]]:
    return [(kind, text) for kind, text in _LEGEND if _used(timeline, kind)]


def _used(timeline: Timeline, kind: str) -> bool:
    if kind in ("run", "wait", "stuck"):
        return any(e.kind == kind for e in timeline.events)
    return any(_CLASS.get(lane.name) == kind for lane in timeline.lanes)


# numbers


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:,.1f}"


def _percent(time: float, total: float) -> str:
    return f"{100 * time / total if total else 0:.3f}".rstrip("0").rstrip(".")


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""


def _bytes(count: float) -> str:
    return f"{count / 1024:,.0f} KiB" if count >= 8192 else f"{count:,.0f} B"


def _axis(total: float) -> list[tuple[str, str]]:
    """(percent, ticks) of about ten round times."""
    step = next((s * 10**k for k in range(12) for s in (1, 2, 5) if total / (s * 10**k) <= 12), 1)
    return [(_percent(t, total), _number(t)) for t in range(0, int(total) + 1, step)] if total else []


def _rates(timeline: Timeline) -> list[tuple[str, str]]:
    """What the picture assumes, for what it shows."""
    rates = timeline.rates
    names = {"alu": "an instruction", "special": "exp, division, ...", "memory": "plain load or store", "product": "mma.sync"}
    rows = [(names[c], f"{_number(rates.instruction[c])} ticks a warp") for c in CLASSES]
    for engine in dict.fromkeys(lane.name for lane in timeline.lanes if lane.is_engine):
        if engine in rates.bytes:
            rows.append(
                (engine, f"{_number(rates.bytes[engine])} bytes a tick, done {_number(rates.latency[engine])} ticks later")
            )
        else:
            kinds = ", ".join(
                f"{_number(v)} for {k}" for k, v in rates.macs.items() if k.endswith("wgmma") == ("wgmma" in engine)
            )
            rows.append((engine, f"products and sums a tick: {kinds}; done {_number(rates.latency[engine])} ticks later"))
    return rows


# pictures


def _group(timeline: Timeline, number: int, is_open: bool) -> _Group:
    lanes = [lane for lane in timeline.lanes if lane.cluster == number]
    ctas = list(dict.fromkeys(lane.cta for lane in lanes))
    title = f"CTA {ctas[0]}" if len(ctas) == 1 else f"Cluster of CTAs {', '.join(map(str, ctas))}"
    marks = [m for m in timeline.hazards if m.lane.cluster == number]
    group = _Group(title, is_open, len(marks))
    by_lane: dict[Lane, list[Event]] = defaultdict(list)
    for event in timeline.events:
        if event.lane.cluster == number:
            by_lane[event.lane].append(event)
    y, places = _HEAD, {}
    for lane in lanes:
        if not group.rows or group.rows[-1].lane.cta != lane.cta:
            group.heads.append((y, f"CTA {lane.cta}"))
            y += _ROW
        rows = _draw(group, timeline.total, by_lane[lane], y)
        group.rows.append(_Row(lane, y, rows * _ROW, lane.name))
        places[lane] = y + rows * _ROW // 2
        y += rows * _ROW + _GAP
        group.table.append(_line(lane, by_lane[lane], timeline.total))
    group.height = y
    _draw_links(group, timeline, number, places)
    for mark in marks:
        group.marks.append({"x": _percent(mark.time, timeline.total), "y": places[mark.lane], "text": mark.text})
    group.waits = _waits(e for events in by_lane.values() for e in events)
    return group


def _draw(group: _Group, total: float, events: list[Event], y: int) -> int:
    """The bars of a lane; returns its rows: lanes of a warp that run side by side need more than one."""
    ends: list[float] = []
    for event, count in _merged(events, total):
        width = event.end - event.start
        if event.kind in ("arrive", "issue"):
            group.ticks.append(_Shape(_percent(event.start, total), "", y, _ROW, event.kind, _title(event, 1)))
            continue
        row = 0
        if not event.lane.is_engine:
            row = next(
                (i for i, end in enumerate(ends) if end <= event.start + 0.004 * total or width < 0.004 * total), len(ends)
            )
            row = min(row, 3)
        ends += [0.0] * (row + 1 - len(ends))
        ends[row] = max(ends[row], event.end)
        busy = event.busy if event.lane.is_engine else width
        kind = event.kind if event.kind in ("run", "wait", "stuck") else _CLASS.get(event.lane.name, "copy")
        drawn = max(busy, 0.0002 * total) if busy else 0
        shape = _Shape(_percent(event.start, total), _percent(drawn, total), y + row * _ROW, _ROW, kind, _title(event, count))
        if width > busy:
            shape.tail = _percent(width, total)
        if kind == "wait":
            shape.key = _key(event.lane, event.end)
        if busy >= _LABEL * total:
            shape.label = _label(event, count)
        group.shapes.append(shape)
    return max(1, len(ends))


def _merged(events: list[Event], total: float) -> Iterator[tuple[Event, int]]:
    """Events with how many each stands for: small bars that follow each other are one."""
    held: Event | None = None
    count = 0
    last: dict[str, float] = {}
    for event in events:
        if event.kind in ("arrive", "issue"):
            if event.start - last.get(event.kind, -total) >= _SMALL * total / 2:
                last[event.kind] = event.start
                yield event, 1
            continue
        if held is not None and _touch(held, event, total):
            busy = event.start + event.busy - held.start if held.lane.is_engine else max(held.end, event.end) - held.start
            held = replace(held, end=max(held.end, event.end), busy=busy, instructions=held.instructions + event.instructions,
                           bytes=held.bytes + event.bytes, macs=held.macs + event.macs, line=min(held.line, event.line),
                           last_line=max(held.last_line, event.last_line))  # fmt: skip
            count += 1
            continue
        if held is not None:
            yield held, count
        held, count = event, 1
    if held is not None:
        yield held, count


def _touch(a: Event, b: Event, total: float) -> bool:
    """Whether b is drawn as part of a."""
    if a.kind != b.kind or a.kind in ("wait", "stuck") or min(a.busy, b.busy) > _SMALL * total:
        return False
    end = a.start + a.busy if a.lane.is_engine else a.end
    return bool(b.start <= end + _SMALL * total)


def _label(event: Event, count: int) -> str:
    if event.kind == "wait":
        if event.barrier:
            return f"+{event.barrier.rpartition('+')[2]} phase {event.phase}"
        return event.text.removeprefix("waits at ")
    if event.kind == "run":
        return f"{event.instructions:,}"
    return f"{count} x" if count > 1 else ""


def _title(event: Event, count: int) -> str:
    """What a person reads on hover."""
    lines = [f"{event.lane.name}, CTA {event.lane.cta}"]
    span = f"{_number(event.start)} to {_number(event.end)}, {_number(event.end - event.start)} ticks"
    if event.kind == "run":
        lines.append(f"{event.instructions:,} instructions: {span}")
    elif event.kind in ("arrive", "issue"):
        lines.append(f"{event.text if event.kind == 'arrive' else 'issues ' + event.text} at {_number(event.start)}")
    else:
        lines.append((f"{count} x " if count > 1 else "") + (event.text or event.kind))
        lines.append(span)
    if event.lane.is_engine and event.busy:
        amount = f"{event.macs:,} products and sums" if event.macs else _bytes(event.bytes)
        lines.append(f"{amount}, engine busy for {_number(event.busy)}")
    if event.line:
        ptx = f"PTX line {event.line}" if event.last_line <= event.line else f"PTX lines {event.line} to {event.last_line}"
        lines.append(ptx + (f", {event.source}" if event.source else ""))
    return "\n".join(lines)


def _key(lane: Lane, time: float) -> str:
    return f"{'.'.join(map(str, lane.cta))}.{lane.name.replace(' ', '')}.{time:g}"


def _draw_links(group: _Group, timeline: Timeline, number: int, places: dict[Lane, int]) -> None:
    for link in timeline.links:
        if link.end.cluster == number and link.start in places and link.end in places and link.start != link.end:
            group.links.append({"x": _percent(link.time, timeline.total), "a": places[link.start], "b": places[link.end],
                                "key": _key(link.end, link.time), "text": f"{link.text}\nat {_number(link.time)}"})  # fmt: skip


# tables


def _line(lane: Lane, events: list[Event], total: float) -> dict[str, str]:
    busy = sum(e.busy for e in events)
    row = {"lane": f"{lane.cta} {lane.name}", "busy": _share(busy, total), "waits": "", "amount": "", "rate": "", "flight": ""}
    if not lane.is_engine:
        row["count"] = f"{sum(e.instructions for e in events):,}"
        row["waits"] = _share(sum(e.end - e.start for e in events if e.kind in ("wait", "stuck")), total)
        return row
    moved, macs = sum(e.bytes for e in events), sum(e.macs for e in events)
    row["count"] = f"{sum(1 for e in events if e.busy):,}"
    row["amount"] = f"{macs / 1e6:,.1f} M products" if macs else _bytes(moved)
    row["rate"] = f"{_number((macs or moved) / total)} a tick" if total else ""
    changes = sorted([(e.start, 1) for e in events] + [(e.end, -1) for e in events], key=lambda c: (c[0], c[1]))
    level = top = 0
    for _, change in changes:
        level += change
        top = max(top, level)
    mean = sum(e.end - e.start for e in events) / total if total else 0
    row["flight"] = f"{top}, {mean:.1f} in the mean"
    return row


def _waits(events: Iterable[Event]) -> list[dict[str, str]]:
    """Where the ticks of waiting went: the ten places of most."""
    found: dict[tuple[str, int, str], list[Event]] = defaultdict(list)
    for e in events:
        if e.kind == "wait":
            found[e.barrier or e.text.removeprefix("waits at "), e.line, e.source].append(e)
    rows = sorted(found.items(), key=lambda item: -sum(e.end - e.start for e in item[1]))
    return [
        {
            "what": what,
            "line": f"{line}{f', {source}' if source else ''}",
            "count": f"{len(es):,}",
            "ticks": _number(sum(e.end - e.start for e in es)),
            "longest": _number(max(e.end - e.start for e in es)),
            "who": ", ".join(dict.fromkeys(e.lane.name for e in sorted(es, key=lambda e: e.lane.name))),
        }
        for (what, line, source), es in rows[:10]
    ]
