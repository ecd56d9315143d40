"""Reading a recorded bench run for a page: what is wrong with a file is one sentence that names the file and the field."""

from __future__ import annotations

import json
import math
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from glu4.bench.contender import Row
from glu4.bench.machine import device_of
from glu4.bench.report import Recorded, shapes
from glu4.bench.roofline import limit

__all__ = ["Loaded", "load"]

_LARGEST = 2**31 - 1  # of M, N, K, as in glu4.problem's launches
_TYPES = {name: typing.get_args(kind) or (kind,) for name, kind in typing.get_type_hints(Row).items()}
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_NOT_NEGATIVE = ("us", "us_min", "limit_us", "max_rel_err", "fro_rel_err", "samples")


@dataclass(frozen=True)
class Loaded:
    """A run and its name on the page. unchosen: the file does not say which kernel a user gets, so the fastest of each shape
    was chosen; every row has its limit where the device is known."""

    name: str
    run: Recorded
    unchosen: bool


def load(path: Path) -> Loaded:
    """Read a file of `glu4 bench --output`, of an earlier form too.

    Raises ValueError, naming the file and the field, for a file that cannot be read, is not JSON, or does not hold such a run.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        return _loaded(path.stem, content)
    except _FieldError as error:
        raise ValueError(f"{path} is not a result of glu4 bench: {error}") from None


class _FieldError(Exception):
    """A sentence that names the field."""


def _loaded(name: str, content: Any) -> Loaded:
    if not isinstance(content, dict):
        raise _FieldError(f"expected an object with device and rows, got {_kind(content)}")
    device = content.get("device")
    if not isinstance(device, str) or not device:
        raise _FieldError(f"device: expected the device's name, got {_got(content, 'device')}")
    listed = content.get("rows")
    if not isinstance(listed, list) or not listed:
        raise _FieldError(f"rows: expected a list of measurements, got {_got(content, 'rows')}")
    rows = [_row(entry, f"rows[{i}]") for i, entry in enumerate(listed)]
    roofs = _roofs(content.get("roofs"))
    known = device_of(device, roofs)
    if known is not None:
        rows = [r if r.limit_us is not None else replace(r, limit_us=limit(r.problem, known).time_s * 1e6) for r in rows]
    unchosen = any(r.peer == "glu4" for r in rows) and not any(r.peer == "glu4" and r.chosen for r in rows)
    setting = {k: v for k, v in content.items() if k not in ("rows", "roofs")}
    return Loaded(name, Recorded(device, _choose(rows) if unchosen else rows, roofs, setting), unchosen)


def _choose(rows: list[Row]) -> list[Row]:
    """The rows with glu4's fastest of each shape marked as the one a user gets."""
    best = set()
    for shape in shapes(rows):
        timed = [i for i, r in enumerate(rows) if r.shape == shape and r.peer == "glu4" and r.us]
        best.update(sorted(timed, key=lambda i: rows[i].us or 0.0)[:1])
    return [replace(r, chosen=True) if i in best else r for i, r in enumerate(rows)]


def _row(entry: Any, where: str) -> Row:
    if not isinstance(entry, dict):
        raise _FieldError(f"{where}: expected an object, got {_kind(entry)}")
    missing = [name for name in ("peer", "m", "n", "k", "us", "us_min") if name not in entry]
    if missing:
        raise _FieldError(f"{where}.{missing[0]}: missing")
    for field in fields(Row):
        if field.name in entry:
            _check(field.name, entry[field.name], f"{where}.{field.name}")
    row = Row(**{f.name: entry[f.name] for f in fields(Row) if f.name in entry})
    try:
        _ = row.problem
    except (ValueError, TypeError) as error:
        raise _FieldError(f"{where}: {error}") from None
    return row


def _check(name: str, value: Any, where: str) -> None:
    """Raise _FieldError where a field of a row holds what it cannot."""
    allowed = _TYPES[name]
    number = float in allowed and type(value) in (int, float)
    if type(value) not in allowed and not number:
        words = " or ".join(_WORDS.get(t, "null") for t in allowed)
        raise _FieldError(f"{where}: expected {words}, got {_kind(value)}")
    if name in ("m", "n", "k") and not 0 < value <= _LARGEST:
        raise _FieldError(f"{where}: expected 1 to {_LARGEST}, got {_short(value)}")
    if type(value) in (int, float) and name in _NOT_NEGATIVE and not _is_finite(value):
        raise _FieldError(f"{where}: expected a finite number that is not negative, got {_short(value)}")


def _is_finite(value: Any) -> bool:
    """Whether it is a number of at least 0 that a float can hold."""
    return 0 <= value < 1e300 and math.isfinite(value)


def _roofs(found: Any) -> dict[str, float] | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise _FieldError(f"roofs: expected an object with bandwidth and flops, got {_kind(found)}")
    for name in ("bandwidth", "flops"):
        value = found.get(name)
        if type(value) not in (int, float) or not _is_finite(value) or not value:
            raise _FieldError(f"roofs.{name}: expected a positive number, got {_got(found, name)}")
    return {name: float(found[name]) for name in ("bandwidth", "flops")}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    """A number in a message: a whole one that is too long for it as its size."""
    return f"a number of {value.bit_length()} bits" if type(value) is int and value.bit_length() > 64 else repr(value)


def _got(content: dict[str, Any], name: str) -> str:
    if name not in content:
        return "nothing"
    value = content[name]
    return "an empty one" if value in ("", []) else _kind(value) if not isinstance(value, (int, float)) else _short(value)
