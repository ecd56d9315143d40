"""Values as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glu4.pages.numbers import day, interval, microseconds, moment, percent, plain, ratio


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (45.262, "45.3"), (2.46, "2.46"), (0.1802, "0.180"), (690.4, "690"), (9.996, "10.0"), (999.6, "1,000"), (12345.6, "12,346"),
        (0, "0"), (None, "-"), (math.nan, "-"), (math.inf, "-"),
    ],
)  # fmt: skip
def test_three_digits(value, expected):
    assert plain(value) == microseconds(value) == expected


@given(st.floats(1e-6, 1e9))
def test_what_is_written_is_within_half_a_unit_of_the_third_digit(value):
    text = plain(value)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.005000001)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0949, "1.09x"), (0.5, "0.50x"), (0.0123, "0.0123x"), (12.34, "12.3x"), (9.996, "10.0x"), (None, "-")],
)
def test_ratios(value, expected):
    assert ratio(value) == expected


def test_intervals_and_percent():
    assert interval(0.731, 1.2) == "0.73 to 1.20"
    assert [interval(None, 1.0), interval(1.0, math.inf)] == ["", ""]
    assert [percent(v) for v in (83.24, 7.123, 99.7, 104.2, None)] == ["83 %", "7.1 %", "99.7 %", "104 %", "-"]


def test_times_are_utc_and_impossible_ones_a_hyphen():
    assert [moment(1.7e9), day(1.7e9)] == ["2023-11-14 22:13 UTC", "2023-11-14"]
    assert [moment(v) for v in (1e30, math.nan, math.inf)] == ["-", "-", "-"]
