"""Scales, ticks, markers and text of a plot."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glu4.pages.svg import SERIES, Scale, fitted, log_ticks, marker, text, text_width, ticks, written

POSITIVE = st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=8)


@given(POSITIVE, st.booleans())
def test_a_scale_keeps_order_and_puts_everything_inside(values, log):
    scale = Scale.over(values, 10.0, 300.0, log)
    places = [scale(v) for v in sorted(values)]
    assert places == sorted(places)
    assert all(10.0 < p < 300.0 for p in places)


def test_equal_ratios_are_equal_distances_on_a_logarithmic_scale():
    scale = Scale(1.0, 16.0, 0.0, 80.0, log=True)
    assert [scale(v) for v in (1, 2, 4, 16)] == pytest.approx([0, 20, 40, 80])
    assert [scale(0.1), scale(99.0)] == [0.0, 80.0], "what lies outside goes to the nearer end"


@pytest.mark.parametrize("values", [[], [math.nan], [0.0], [-1.0, math.inf]])
def test_a_logarithmic_scale_of_nothing_it_can_hold_is_still_one(values):
    assert 0.0 < Scale.over(values, 0.0, 100.0, log=True)(1.0) < 100.0


@given(POSITIVE, st.booleans(), st.integers(3, 9))
def test_ticks_are_in_the_scale_few_and_told_apart(values, log, most):
    scale = Scale.over(values, 0.0, 100.0, log)
    found = ticks(scale, most)
    assert len(found) <= most
    assert all(scale.low * (1 - 1e-9) - 1e-9 <= v <= scale.high * (1 + 1e-9) + 1e-9 for v in found)
    assert found == sorted(found)


@given(st.floats(0.2, 5.0), st.floats(1.05, 1e6))
def test_a_wide_plot_has_at_least_two_ticks(low, factor):
    found = ticks(Scale.over([low, low * factor], 0.0, 100.0, True), 9)
    assert len(found) >= 2
    names = written(found)
    assert len(set(names)) == len(names)
    assert [float(n.replace(",", "")) for n in names] == pytest.approx(found, rel=1e-5)


def test_logarithmic_ticks_thin_out():
    assert log_ticks(1.0, 10.0, 9) == pytest.approx([1, 2, 3, 5, 7, 10])
    assert log_ticks(0.5, 2000.0, 5) == pytest.approx([1, 10, 100, 1000])
    assert log_ticks(1e-9, 1e9, 5) == pytest.approx([1e-8, 1e-4, 1, 1e4, 1e8])


@given(st.text(max_size=60), st.floats(20, 300))
def test_fitted_text_fits(content, width):
    found = fitted(content, width)
    assert text_width(found) <= width
    assert found == " ".join(content.split()) or found.endswith("…")


def test_wide_characters_count_as_wide():
    assert text_width("日本") == 24.0
    assert fitted("日本語日本語", 40) == "日…" or text_width(fitted("日本語日本語", 40)) <= 40


def test_each_series_has_a_shape_and_a_colour_of_its_own():
    drawn = [marker(i, 0.0, 0.0) for i in range(SERIES)]
    shapes = {(m.tag, m.get("points")) for m in drawn}
    assert len(shapes) == SERIES
    assert len({m.get("class") for m in drawn}) == SERIES


def test_text_is_escaped_and_cleaned():
    made = ElementTree.tostring(text("<b>&\x00", 1, 2), encoding="unicode")
    assert made == '<text x="1" y="2" text-anchor="start">&lt;b&gt;&amp;\ufffd</text>'
