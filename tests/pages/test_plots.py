"""The two plots: each value is where it belongs, nothing leaves the picture, and both sizes hold the same."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glu4.pages.plots import NARROW, WIDE, Axis, Key, Line, Mark, Points, Row, plane, rows


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in ElementTree.fromstring(svg).iter("circle")]


def test_rows_stand_below_one_another_and_equal_ratios_lie_equally_far():
    content = [Row(name, [Mark(v, 0, name)]) for name, v in (("half", 0.5), ("one", 1.0), ("two", 2.0))]
    figure = rows(content, "ratio", "a summary", "here")
    for svg in (figure.wide, figure.narrow):
        (x1, y1), (x2, y2), (x3, y3) = circles(svg)
        assert y1 < y2 < y3
        assert x2 - x1 == pytest.approx(x3 - x2, abs=0.21)
        (line,) = [e for e in ElementTree.fromstring(svg).iter("line") if e.get("class") == "reference"]
        assert float(line.attrib["x1"]) == pytest.approx(x2, abs=0.11), "the line of the reference goes through 1"


def test_an_interval_reaches_from_its_low_to_its_high():
    figure = rows([Row("a", [Mark(1.0, 0, "a", 0.5, 2.0), Mark(0.5, 0, "b"), Mark(2.0, 0, "c")])], "ratio", "s")
    bars = [e for e in ElementTree.fromstring(figure.wide).iter("line") if e.get("class") == "bar c0"]
    ends = sorted(x for x, _ in circles(figure.wide))
    assert [float(bars[0].attrib[name]) for name in ("x1", "x2")] == pytest.approx([ends[0], ends[2]])


def test_a_heading_is_bold_and_has_no_line():
    figure = rows([Row("group"), Row("a", [Mark(1.5, 0, "a")])], "ratio", "s")
    bold = [e for e in ElementTree.fromstring(figure.wide).iter("text") if e.get("class") == "strong"]
    assert len(bold) == 1


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_values_without_a_place_are_left_out(value):
    assert len(circles(rows([Row("a", [Mark(value, 0, ""), Mark(2.0, 0, "")])], "r", "s").wide)) == 1
    assert len(circles(plane([Points(0, [(value, 1.0, ""), (2.0, 1.0, "")])], [], Axis("x"), Axis("y"), "s").wide)) == 1


_VALUES = st.floats(1e-4, 1e6)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.text(max_size=80), st.lists(st.tuples(_VALUES, st.none() | _VALUES), max_size=4)), max_size=6),
    st.text(max_size=40),
)
def test_nothing_leaves_the_picture(content, words):
    made = [Row(name, [Mark(v, 0, name, low, v) for v, low in marks]) for name, marks in content]
    points = [
        Points(0, [(v, m.value, name)])
        for name, marks in content
        for m in (Mark(v, 0, "") for v, _ in marks)
        for v in (m.value,)
    ]
    for figure in (rows(made, words, words, words), plane(points, [], Axis(words), Axis(words), words)):
        for svg, width in ((figure.wide, WIDE), (figure.narrow, NARROW)):
            root = ElementTree.fromstring(svg)
            height = float(root.attrib["viewBox"].split()[3])
            assert root.attrib["viewBox"].split()[2] == f"{width:.0f}"
            for at in root.iter():
                for name, limit in (
                    ("x1", width),
                    ("x2", width),
                    ("cx", width),
                    ("y1", height),
                    ("y2", height),
                    ("cy", height),
                    ("y", height),
                ):
                    assert 0 <= float(at.get(name, 0)) <= limit


def test_points_in_a_plane_rise_with_y_and_the_legend_is_kept():
    key = Key(0, "a <name>")
    figure = plane(
        [Points(0, [(1.0, 1.0, "p"), (10.0, 10.0, "q")])],
        [Line([(1.0, 1.0), (10.0, 10.0)], "roof")],
        Axis("x"),
        Axis("y"),
        "s",
        [key],
    )
    (x1, y1), (x2, y2) = circles(figure.wide)
    assert x1 < x2
    assert y1 > y2
    (line,) = [e for e in ElementTree.fromstring(figure.wide).iter("polyline") if e.get("class") == "line roof"]
    assert line.attrib["points"] == f"{x1:.1f},{y1:.1f} {x2:.1f},{y2:.1f}"
    assert figure.legend == [key]
    assert 'aria-hidden="true"' in key.svg


def test_named_ticks_stand_under_their_places():
    axis = Axis("order", log=False, at=[(0, "Monday"), (10, "Friday")])
    root = ElementTree.fromstring(plane([Points(0, [(0, 1.0, ""), (10, 2.0, "")])], [], axis, Axis("y"), "s").wide)
    named = {e.text: float(e.attrib["x"]) for e in root.iter("text")}
    (x1, _), (x2, _) = [(float(c.attrib["cx"]), 0) for c in root.iter("circle")]
    assert (named["Monday"], named["Friday"]) == pytest.approx((x1, x2))
