"""What a plot is made of: elements, scales, ticks, markers, and text that fits. Colours are classes of the style sheet."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from glu4.pages.numbers import plain
from glu4.pages.template import clean

__all__ = [
    "FONT", "SERIES", "Scale", "element", "fitted", "log_ticks", "marker", "picture", "text", "text_width", "ticks", "titled",
    "written",
]  # fmt: skip

FONT = 12.0
SERIES = 8  # how many series have a colour and a marker of their own


def element(tag: str, *children: ElementTree.Element, **attributes: str | float) -> ElementTree.Element:
    """An SVG element; attribute names with _ for -, and a trailing _ for a word of Python."""
    found = ElementTree.Element(tag)
    for name, value in attributes.items():
        written_value = value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        found.set(name.rstrip("_").replace("_", "-"), written_value)
    found.extend(children)
    return found


def text(content: str, x: float, y: float, class_: str = "", anchor: str = "start") -> ElementTree.Element:
    """A line of text whose base line is at y."""
    found = element("text", x=x, y=y, text_anchor=anchor, **({"class": class_} if class_ else {}))
    found.text = clean(content)
    return found


def titled(found: ElementTree.Element, title: str) -> ElementTree.Element:
    """The element with a title, which a browser shows under the pointer."""
    child = element("title")
    child.text = clean(title)
    found.insert(0, child)
    return found


def picture(width: float, height: float, summary: str, children: Sequence[ElementTree.Element], class_: str) -> str:
    """The SVG text: scaled to the width it is given, `summary` read out in its place."""
    found = element(
        "svg", *children, role="img", aria_label=clean(summary), viewBox=f"0 0 {width:.0f} {height:.0f}", class_=class_
    )
    return ElementTree.tostring(found, encoding="unicode")


def text_width(content: str) -> float:
    """About how wide a line of text is, in units of the picture: wide East Asian characters count as one em."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in content)
    return FONT * (wide + 0.56 * (len(content) - wide))


def fitted(content: str, width: float) -> str:
    """The text, cut with an ellipsis where it is wider."""
    content = " ".join(content.split())
    if text_width(content) <= width:
        return content
    while content and text_width(content + "…") > width:
        content = content[:-1]
    return content.rstrip() + "…"


@dataclass(frozen=True)
class Scale:
    """Values low to high (both above 0 if log) to the coordinates start to end. Values outside go to the nearer end."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, log: bool, margin: float = 0.06) -> Scale:
        """One that holds all values with a margin on either side, a part of the range; what it cannot hold is left out."""
        held = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(held), max(held)) if held else (1.0, 1.0)
        if log:
            if high / low < 1.02:  # one value, or as good as one
                low, high = low / 1.1, high * 1.1
            more = (high / low) ** margin
            return cls(low / more, high * more, start, end, True)
        if high - low <= abs(high) * 1e-9:
            low, high = low - 1, high + 1
        more = (high - low) * margin
        return cls(low - more, high + more, start, end, False)


def ticks(scale: Scale, most: int) -> list[float]:
    """At most `most` round values in the scale."""
    if scale.log and scale.high / scale.low > 3:
        return log_ticks(scale.low, scale.high, most)
    return _linear_ticks(scale.low, scale.high, most)


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten with 2 and 5 between them where there is room; every second, third, ... power where there is little."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for parts in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [p * 10.0**e for e in range(first, last + 1) for p in parts]
        held = [v for v in found if low <= v <= high]
        if len(held) <= most:
            return held
    step = math.ceil((last - first + 1) / most)
    return [10.0**e for e in range(first, last + 1) if e % step == 0 and low <= 10.0**e <= high]


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    exponent = math.floor(math.log10((high - low) / most))
    for step in (part * 10.0**e for e in (exponent, exponent + 1) for part in (1, 2, 5)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [i * step for i in range(first, last + 1)]
    return []


def written(values: Sequence[float]) -> list[str]:
    """Ticks as text, with the decimals that tell them apart."""
    for digits in range(1, 7):
        found = [plain(v, digits) for v in values]
        # as short as they can be without saying another value
        if all(abs(float(t.replace(",", "")) - v) <= 1e-6 * max(1e-300, abs(v)) for t, v in zip(found, values)):
            return found
    return [plain(v, 6) for v in values]


def marker(series: int, x: float, y: float, hollow: bool = False, size: float = 4.5) -> ElementTree.Element:
    """The marker of a series at a point: a shape of its own, so that colour is not all that tells."""
    class_ = f"mark c{series % SERIES}" + (" hollow" if hollow else "")
    if series % SERIES == 0:
        return element("circle", cx=x, cy=y, r=size, class_=class_)
    corners = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        3: ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
        4: ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
        5: ((-1.2, 0), (0.9, -1.15), (0.9, 1.15)),
        6: ((1.2, 0), (-0.9, -1.15), (-0.9, 1.15)),
        7: ((-0.5, -1.2), (0.5, -1.2), (1.2, 0), (0.5, 1.2), (-0.5, 1.2), (-1.2, 0)),
    }[series % SERIES]
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return element("polygon", points=points, class_=class_)
