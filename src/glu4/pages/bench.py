"""The page of one or more recorded bench runs: table, roofline, speed against peers, distance to the floor, and the setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glu4.bench.contender import Row, Shape
from glu4.bench.devices import Device
from glu4.bench.machine import device_of, slug
from glu4.bench.picture import intensity
from glu4.bench.report import Recorded, lines, off_reference, shapes
from glu4.pages import plots
from glu4.pages.numbers import microseconds, percent, plain, ratio
from glu4.pages.recorded import Loaded, load
from glu4.pages.svg import SERIES
from glu4.pages.template import render

__all__ = ["page", "write"]


@dataclass(frozen=True)
class _Line:
    """A line of the table; None where nothing was timed."""

    shape: Shape
    us: float | None = None
    us_min: float | None = None
    tflops: float | None = None
    limit_us: float | None = None
    peer: str | None = None
    peer_us: float | None = None
    speed_up: float | None = None

    @property
    def side(self) -> str:
        """The style of `speed_up`: none for one that is written 1.00."""
        far = self.speed_up is not None and abs(self.speed_up - 1) >= 0.005
        return "" if not far or self.speed_up is None else "good" if self.speed_up > 1 else "bad"

    @property
    def of_limit(self) -> float | None:
        return 100 * self.limit_us / self.us if self.us and self.limit_us is not None else None


@dataclass(frozen=True)
class _Run:
    """One file as the template takes it; `roofs` says what the roofline is drawn with, or why there is none."""

    name: str
    device: str
    formats: str
    unchosen: bool
    lines: list[_Line]
    roofline: plots.Figure | None
    roofs: str
    peers: plots.Figure | None
    floors: plots.Figure | None
    wrong: list[str]
    off: list[str]
    method: str
    setting: list[tuple[str, str]]

    def at(self, shape: Shape) -> _Line:
        """The line of a shape; an empty one where this file has none."""
        return next((line for line in self.lines if line.shape == shape), _Line(shape))


def write(results: Sequence[Path], output: Path) -> None:
    """Write the page of these results. Raises ValueError for files that `load` refuses, ImportError without jinja2."""
    output.write_text(page([load(path) for path in results]), encoding="utf-8")


def page(loaded: Sequence[Loaded]) -> str:
    """The HTML page of at least one run."""
    runs = [_run(one.run, name, one.unchosen) for one, name in zip(loaded, _names([one.name for one in loaded]))]
    every = list(dict.fromkeys(line.shape for run in runs for line in run.lines))
    devices = list(dict.fromkeys(run.device for run in runs))
    return render(
        "bench.html.j2",
        title=", ".join(devices),
        runs=runs,
        shapes=every,
        compared=_compared(runs, every) if len(runs) > 1 else None,
        summary=_summary(runs[0]) if len(runs) == 1 else f"{len(runs)} recorded runs, each with its own setting below.",
    )


def _names(found: Sequence[str]) -> list[str]:
    """Names that differ: a number after those that come twice."""
    return [name if found.count(name) == 1 else f"{name} ({found[: i + 1].count(name)})" for i, name in enumerate(found)]


def _run(run: Recorded, name: str, unchosen: bool) -> _Run:
    table = [_line(line) for line in lines(run.rows)]
    rates = device_of(run.device, run.roofs)
    formats = sorted({r.x_format for r in run.rows if r.peer == "glu4" and r.x_format})
    drawable = rates is not None and any(r.us for r in run.rows)
    return _Run(
        name=name,
        device=run.device,
        formats=f"activations {' and '.join(formats)}" if formats else "activations float16",
        unchosen=unchosen,
        lines=table,
        roofline=_roofline(run, rates) if rates is not None and drawable else None,
        roofs=_roofs(run, rates),
        peers=_peers(run.rows),
        floors=_floors(table),
        wrong=_wrong(run.rows),
        off=off_reference(run.rows, slug(run.device)),
        method=str(run.setting.get("method") or "The file does not say how."),
        setting=_setting(run),
    )


def _line(line: Any) -> _Line:
    ours, peer = line.ours, line.peer
    return _Line(
        shape=line.shape,
        us=ours and ours.us,
        us_min=ours and ours.us_min,
        tflops=ours and ours.tflops,
        limit_us=ours.limit_us if ours else peer and peer.limit_us,
        peer=peer and peer.peer,
        peer_us=peer and peer.us,
        speed_up=line.speed_up,
    )


def _summary(run: _Run) -> str:
    against = [line.speed_up for line in run.lines if line.speed_up]
    near = [line.of_limit for line in run.lines if line.of_limit]
    said = []
    if against:
        ahead = sum(s > 1 for s in against)
        mean = f"{ratio(_mean(against))} in the geometric mean"
        said.append(f"glu4 is faster than the fastest peer at {ahead} of {len(against)} shapes, {mean}")
    if near:
        said.append(f"it reaches {percent(min(near))} to {percent(max(near))} of the limit")
    return f"{'; '.join(said)}." if said else "glu4 was not timed in this run."


def _mean(values: Sequence[float]) -> float:
    """The geometric mean, which ratios have."""
    return math.exp(sum(math.log(v) for v in values) / len(values))


def _wrong(rows: Sequence[Row]) -> list[str]:
    """What each contender's rows note, each note once with all its shapes."""
    shapes_of: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.note:
            shapes_of.setdefault((row.peer, row.config, row.note), []).append(_size(row.shape))
    return [
        f"{' '.join(filter(None, (peer, config)))} {note} (at {'; '.join(found)})"
        for (peer, config, note), found in shapes_of.items()
    ]


def _size(shape: Shape) -> str:
    """M, N, K of a dense shape; a grouped case goes by its name, which holds them."""
    return str(shape[3]) if len(shape) == 4 else ", ".join(map(str, shape))


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Timed rows of each contender, glu4 first; of glu4 those that a user gets."""
    timed = [r for r in rows if r.us and (r.peer != "glu4" or r.chosen)]
    # glu4 keeps its colour, and a peer its own, in every plot of a page
    names = ["glu4", *sorted({r.peer for r in rows} - {"glu4"})]
    return {name: [r for r in timed if r.peer == name] for name in names}


def _mark(value: float, series: int, title: str) -> plots.Mark:
    """The mark of a series by its number: past those that have a marker of their own, the same ones hollow."""
    return plots.Mark(value, series % SERIES, title, hollow=series >= SERIES)


def _legend(series: dict[str, list[Row]], hollow_from: int = SERIES) -> list[plots.Key]:
    return [plots.Key(i % SERIES, name, i >= hollow_from) for i, (name, rows) in enumerate(series.items()) if rows]


def _roofs(run: Recorded, rates: Device | None) -> str:
    if rates is None:
        return f"no rates are known of {run.device}, and the run measured none (glu4 bench --rooflines does)."
    if not any(r.us for r in run.rows):
        return "the run timed nothing."
    measured = ""
    if run.roofs is not None:
        copy, product = run.roofs["bandwidth"] / 1e12, run.roofs["flops"] / 1e12
        measured = f" Measured in this run: {plain(copy)} TB/s and {plain(product)} TFLOP/s."
    return (
        f"The line is the limit: {plain(rates.bandwidth / 1e12)} TB/s, then {plain(rates.flops / 1e12)} TFLOP/s. {rates.source}"
        f"{measured} Each point is one shape; higher is faster, and points above one another are the same problem."
    )


def _roofline(run: Recorded, rates: Device) -> plots.Figure:
    """Points of every contender under the two roofs."""
    series = _series(run.rows)
    ridge, top = rates.flops / rates.bandwidth, rates.flops / 1e12
    at = [intensity(r) for rows in series.values() for r in rows]
    left, right = min(*at, ridge) / 1.5, max(*at, ridge) * 1.5
    slope = rates.bandwidth / 1e12
    middle = (left * ridge) ** 0.5
    roof = plots.Line(
        [(left, left * slope), (ridge, top), (right, top)],
        "roof",
        [(middle, middle * slope, "memory", "end"), (ridge * 1.05, top, "matrix products", "start")],
    )
    points = [
        plots.Points(i % SERIES, [(intensity(r), r.tflops or 0.0, _title(r)) for r in rows], hollow=i > 0)
        for i, rows in enumerate(series.values())
    ]
    ours = [r.percent_of_limit for r in series["glu4"] if r.percent_of_limit]
    reach = f" glu4 reaches {percent(min(ours))} to {percent(max(ours))} of the limit." if ours else ""
    return plots.plane(
        points[::-1],  # glu4 on top
        [roof],
        plots.Axis("operations per byte that must move"),
        plots.Axis("TFLOP/s"),
        f"Roofline of {run.device} with {len(at)} measured points.{reach} The numbers are in the table above.",
        _legend(series, hollow_from=1),
    )


def _title(row: Row) -> str:
    return f"{row.peer}, {_size(row.shape)}: {microseconds(row.us)} µs, {plain(row.tflops)} TFLOP/s"


def _peers(rows: Sequence[Row]) -> plots.Figure | None:
    """Each peer's median over glu4's, shape by shape; None where no peer was timed beside glu4."""
    series = _series(rows)
    ours = {r.shape: r.us for r in series["glu4"]}
    content = []
    for shape in shapes(rows):
        us = ours.get(shape)
        if not us:
            continue
        marks = [
            _mark(r.us / us, i, f"{name}: {microseconds(r.us)} µs, glu4 {microseconds(us)} µs")
            for i, (name, timed) in enumerate(series.items())
            for r in timed
            if i and r.us and r.shape == shape
        ]
        if marks:
            content.append(plots.Row(_size(shape), marks))
    if not content:
        return None
    least = [min(m.value for m in row.marks) for row in content]
    summary = f"Time of each peer over glu4's. Against the fastest peer: {ratio(min(least))} to {ratio(max(least))}."
    return plots.rows(content, "peer's time / glu4's time", summary, "glu4", _legend(series)[1:])


def _floors(table: Sequence[_Line]) -> plots.Figure | None:
    """glu4's time over the limit, shape by shape; None where no limit is known."""
    content = []
    for line in table:
        if line.us and line.limit_us:
            above, best = line.us / line.limit_us, line.us_min / line.limit_us if line.us_min else None
            title = f"{_size(line.shape)}: {microseconds(line.us)} µs, limit {microseconds(line.limit_us)} µs"
            content.append(plots.Row(_size(line.shape), [plots.Mark(above, 0, title, best, above if best else None)]))
    if not content:
        return None
    values = [row.marks[0].value for row in content]
    summary = f"Time of glu4 over the floor: {ratio(min(values))} to {ratio(max(values))}."
    return plots.rows(content, "glu4's time / floor", summary, "floor")


def _compared(runs: Sequence[_Run], every: Sequence[Shape]) -> plots.Figure:
    """glu4's time in each file over the first one's that has the shape."""
    content = []
    for shape in every:
        timed = [(i, run.name, us) for i, run in enumerate(runs) if (us := run.at(shape).us)]
        if len(timed) > 1:
            first = timed[0][2]
            marks = [_mark(us / first, i, f"{name}: {microseconds(us)} µs") for i, name, us in timed]
            content.append(plots.Row(_size(shape), marks))
    legend = [plots.Key(i % SERIES, run.name, i >= SERIES) for i, run in enumerate(runs)]
    summary = f"Time of glu4 in {len(runs)} files, at {len(content)} shapes that more than one of them timed."
    return plots.rows(content, "time / first file's time", summary, "first file", legend)


# a field of the file under the name it has for people; others keep their own
_LABELS = {
    "device": "Device", "driver_version": "Driver", "driver": "Driver", "clocks.max.sm": "Largest SM clock",
    "clocks.max.mem": "Largest memory clock", "glu4": "glu4", "commit": "Commit", "seed": "Seed", "python": "Python",
    "cuda": "CUDA", "torch": "PyTorch", "triton": "Triton", "variant": "Variant", "lost": "Device lost",
}  # fmt: skip


def _setting(run: Recorded) -> list[tuple[str, str]]:
    """Label and value of all that the file says of its setting, but the method, which has a paragraph of its own."""
    found = []
    for name, value in run.setting.items():
        if name in ("method", "clocks", "left_out") or value in (None, "") or isinstance(value, (dict, list)):
            continue
        found.append((_LABELS.get(name, name), str(value)))
    found += _clocks(run.setting.get("clocks"))
    left_out = run.setting.get("left_out")
    if isinstance(left_out, dict):
        found += [(f"{name} left out", str(reason)) for name, reason in left_out.items()]
    variants = sorted({r.variant for r in run.rows if r.variant})
    return found + ([("Variant of the rows", ", ".join(variants))] if variants else [])


def _clocks(readings: Any) -> list[tuple[str, str]]:
    """The range of each reading over the run: SM clock, memory clock, temperature and power."""
    if not isinstance(readings, list):
        return []
    names = {"clocks.sm": "SM clock", "clocks.mem": "Memory clock", "temperature.gpu": "Temperature, °C", "power.draw": "Power"}
    found = []
    for key, label in names.items():
        read = [str(r[key]) for r in readings if isinstance(r, dict) and r.get(key)]
        if read:
            low, high = min(read, key=_number), max(read, key=_number)
            found.append((label, low if low == high else f"{low} to {high} ({len(read)} readings)"))
    return found


def _number(reading: str) -> float:
    """The number that a reading of nvidia-smi starts with; 0 for one that starts with none."""
    try:
        return float(reading.split()[0])
    except (ValueError, IndexError):
        return 0.0
