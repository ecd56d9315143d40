"""Values as people read them: sensible digits, a unit where one is needed, and a hyphen for what is not known."""

from __future__ import annotations

import math
from datetime import UTC, datetime

__all__ = ["NONE", "day", "interval", "microseconds", "moment", "percent", "plain", "ratio"]

NONE = "-"


def plain(value: float | None, digits: int = 3) -> str:
    """A number with that many significant digits, no exponent, and commas from 1000 on."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    # of the rounded value, so that 9.996 becomes 10.0 and not 10.00
    size = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def microseconds(value: float | None) -> str:
    """Microseconds with three significant digits, without the unit, which the heading names."""
    return plain(value)


def ratio(value: float | None) -> str:
    """A ratio of two times: two decimals below ten, else three significant digits."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.2f}x" if 0.1 <= abs(value) < 9.995 else f"{plain(value)}x"


def interval(low: float | None, high: float | None) -> str:
    """An interval of a ratio; nothing where an end is not known."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{ratio(low)[:-1]} to {ratio(high)[:-1]}"


def percent(value: float | None) -> str:
    """Per cent, whole from ten on."""
    return NONE if value is None or not math.isfinite(value) else f"{plain(value, 2 if abs(value) < 99.5 else 3)} %"


def moment(seconds: float) -> str:
    """Seconds since 1970 as date and time of day, UTC; a hyphen for a time that no calendar has."""
    return _written(seconds, "%Y-%m-%d %H:%M UTC")


def day(seconds: float) -> str:
    """Seconds since 1970 as a date, UTC."""
    return _written(seconds, "%Y-%m-%d")


def _written(seconds: float, form: str) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(form)
    except (ValueError, OverflowError, OSError):
        return NONE
