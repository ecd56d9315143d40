"""The two plots of the pages: values of named rows along one axis, and points in a plane.

Each is drawn twice, for wide and for narrow screens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

from glu4.pages.svg import Scale, element, fitted, marker, picture, text, text_width, ticks, titled, written

__all__ = ["Axis", "Figure", "Key", "Line", "Mark", "Points", "Row", "plane", "rows"]

# units are CSS pixels at the size that each is meant for: its text is then FONT pixels high
WIDE, NARROW = 760.0, 330.0


@dataclass(frozen=True)
class Key:
    """A line of the legend: which marker, and what it stands for."""

    series: int
    name: str
    hollow: bool = False

    @property
    def svg(self) -> str:
        """The marker alone, for a reader's eye only: the name stands beside it."""
        found = element("svg", marker(self.series, 8, 8, self.hollow), viewBox="0 0 16 16", class_="key", aria_hidden="true")
        return ElementTree.tostring(found, encoding="unicode")


@dataclass(frozen=True)
class Figure:
    """A plot, drawn twice, of which the page shows the one that fits; both are SVG text."""

    wide: str
    narrow: str
    legend: list[Key] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """A value of a row, with its interval if it has one; `title` is shown under the pointer."""

    value: float
    series: int
    title: str
    low: float | None = None
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Row:
    """A named row of marks; one without marks is a heading."""

    label: str
    marks: Sequence[Mark] = ()


def rows(content: Sequence[Row], axis: str, summary: str, reference: str = "", legend: Sequence[Key] = ()) -> Figure:
    """Rows of ratios on a logarithmic axis, with a line at 1, which `reference` names. Marks that such an axis has no place
    for (0, infinite, not a number) are left out."""
    return Figure(*_both(lambda width: _rows(content, axis, summary, reference, width)), list(legend))


def _both(draw: Callable[[float], str]) -> tuple[str, str]:
    return draw(WIDE), draw(NARROW)


def _class(width: float) -> str:
    return "plot wide" if width == WIDE else "plot narrow"


def _drawable(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _rows(content: Sequence[Row], axis: str, summary: str, reference: str, width: float) -> str:
    narrow = width == NARROW
    # on a phone a label has a line of its own above its marks
    longest = max((text_width(r.label) for r in content), default=0.0)
    left = 10.0 if narrow else min(longest + 12, 260.0)
    marks = [m for r in content for m in r.marks if _drawable(m.value)]
    ends = [v for m in marks for v in (m.value, m.low, m.high) if v is not None and _drawable(v)]
    scale = Scale.over([1.0, *ends], left, width - 12, log=True)
    top, y = 22.0, 22.0
    drawn: list[ElementTree.Element] = []
    for row in content:
        room = width - 14 if narrow or not row.marks else left - 10
        heading = not row.marks
        drawn.append(titled(text(fitted(row.label, room), 2, y + 15, "strong" if heading else ""), row.label))
        y += 22 if heading else (20 if narrow else 0)
        if not heading:
            drawn.append(element("line", x1=left, x2=width - 12, y1=y + 11, y2=y + 11, class_="grid"))
            drawn += [part for m in row.marks if _drawable(m.value) for part in _mark(m, scale, y + 11)]
            y += 24
    at_one = scale(1.0)
    anchor = "end" if at_one > width * 0.7 else "start" if at_one < left + 60 else "middle"
    under = [*_x_axis(scale, axis, top, y + 4, width, left), _vertical(at_one, top - 6, y + 4, "reference")]
    if reference:
        under.append(text(reference, at_one, 12, "soft", anchor))
    return picture(width, y + 46, summary, [*under, *drawn], _class(width))


def _mark(mark: Mark, scale: Scale, y: float) -> list[ElementTree.Element]:
    group = []
    if mark.low is not None and mark.high is not None and not math.isnan(mark.low) and not math.isnan(mark.high):
        low, high = scale(mark.low), scale(mark.high)
        class_ = f"bar c{mark.series % 8}"
        group = [element("line", x1=low, x2=high, y1=y, y2=y, class_=class_)]
        group += [element("line", x1=x, x2=x, y1=y - 4, y2=y + 4, class_=class_) for x in (low, high)]
    return [titled(element("g", *group, marker(mark.series, scale(mark.value), y, mark.hollow)), mark.title)]


def _vertical(x: float, y1: float, y2: float, class_: str) -> ElementTree.Element:
    return element("line", x1=x, x2=x, y1=y1, y2=y2, class_=class_)


def _x_axis(scale: Scale, label: str, top: float, bottom: float, width: float, left: float) -> list[ElementTree.Element]:
    values = ticks(scale, 6 if width == NARROW else 9)
    found = [_vertical(scale(v), top, bottom, "grid") for v in values]
    found += _tick_labels([(scale(v), name) for v, name in zip(values, written(values))], bottom + 15)
    middle = (left + width - 12) / 2
    return [*found, text(fitted(label, width - left), middle, bottom + 34, "soft", "middle")]


def _tick_labels(found: Sequence[tuple[float, str]], y: float) -> list[ElementTree.Element]:
    """Names centred under their places, each left out that would touch the one before."""
    drawn, free = [], -math.inf
    for x, name in found:
        half = text_width(name) / 2
        if x - half > free:
            drawn.append(text(name, x, y, "", "middle"))
            free = x + half + 6
    return drawn


@dataclass(frozen=True)
class Axis:
    """label: of the axis; log; at: (value, name) of ticks that are not to be round values."""

    label: str
    log: bool = True
    at: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class Points:
    """A series of (x, y, title)."""

    series: int
    points: Sequence[tuple[float, float, str]]
    hollow: bool = False


@dataclass(frozen=True)
class Line:
    """A line through (x, y), with a name at the middle of each named part; `class_`: roof, or c0 to c7."""

    points: Sequence[tuple[float, float]]
    class_: str
    names: Sequence[tuple[float, float, str, str]] = ()  # x, y, name, anchor


def plane(
    content: Sequence[Points], lines: Sequence[Line], x: Axis, y: Axis, summary: str, legend: Sequence[Key] = ()
) -> Figure:
    """Points and lines in a plane. Points that a logarithmic axis has no place for are left out."""
    return Figure(*_both(lambda width: _plane(content, lines, (x, y), summary, width)), list(legend))


def _has_place(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _plane(content: Sequence[Points], lines: Sequence[Line], axes: tuple[Axis, Axis], summary: str, width: float) -> str:
    height = 300.0 if width == NARROW else 400.0
    x_axis, y_axis = axes
    kept = [(s, [p for p in s.points if _has_place(p[0], x_axis) and _has_place(p[1], y_axis)]) for s in content]
    flat = [(px, py) for _, points in kept for px, py, _ in points] + [p for line in lines for p in line.points]
    top, bottom = 26.0, height - 44
    y_scale = Scale.over([p[1] for p in flat], bottom, top, y_axis.log)
    y_values = ticks(y_scale, 7)
    names = written(y_values)
    left = 12 + max((text_width(n) for n in names), default=0.0)
    x_scale = Scale.over([p[0] for p in flat], left, width - 10, x_axis.log)
    drawn = [element("line", x1=left, x2=width - 10, y1=y_scale(v), y2=y_scale(v), class_="grid") for v in y_values]
    drawn += [text(n, left - 6, y_scale(v) + 4, "", "end") for v, n in zip(y_values, names)]
    drawn.append(text(fitted(y_axis.label, width - 4), 2, 12, "soft"))
    if x_axis.at:
        drawn += _tick_labels([(x_scale(v), name) for v, name in x_axis.at], bottom + 16)
        drawn.append(text(fitted(x_axis.label, width), (left + width) / 2, bottom + 36, "soft", "middle"))
    else:
        drawn += _x_axis(x_scale, x_axis.label, top, bottom, width, left)
    for line in lines:
        places = " ".join(f"{x_scale(px):.1f},{y_scale(py):.1f}" for px, py in line.points)
        drawn.append(element("polyline", points=places, class_=f"line {line.class_}"))
    for line in lines:
        drawn += [text(name, x_scale(px), y_scale(py) - 7, "soft", anchor) for px, py, name, anchor in line.names]
    for series, points in kept:
        drawn += [titled(_point(series, x_scale(px), y_scale(py)), title) for px, py, title in points]
    return picture(width, height, summary, drawn, _class(width))


def _point(series: Points, x: float, y: float) -> ElementTree.Element:
    return element("g", marker(series.series, x, y, series.hollow))
