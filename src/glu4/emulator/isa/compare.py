"""setp and set: comparisons of integers and floats, with an optional second predicate combined in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.isa.registry import Builder, Context, F, Modifiers, S, Step, U
from glu4.emulator.isa.rounding import bf16_values, flush

__all__ = ["INSTRUCTIONS"]

Array = NDArray[Any]
Function = Callable[[Array, Array], Array]
_INTEGERS = ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64")
_FLOATS = ("f32", "f64", "f16", "f16x2", "bf16", "bf16x2")
_ORDERED: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
_WORDS = (*_ORDERED, *_UNSIGNED, *_UNORDERED, "num", "nan")
_BOOLEAN: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _function(mods: Modifiers, word: str, kind: str) -> Function:
    """The comparison, on values of `kind`."""
    if kind in _INTEGERS:
        legal = ("eq", "ne") if kind[0] == "b" else (*_ORDERED, *(_UNSIGNED if kind[0] == "u" else ()))
        if word not in legal:
            raise mods.fail(f".{word} does not compare .{kind}")
        return _ORDERED[_UNSIGNED.get(word, word)]
    if word in _UNORDERED:
        inner = _ORDERED[_UNORDERED[word]]
        return lambda a, b: inner(a, b) | np.isnan(a) | np.isnan(b)
    if word == "ne":  # ordered: false for NaN, unlike NumPy's
        return lambda a, b: (a < b) | (a > b)
    if word == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if word == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if word not in _ORDERED:
        raise mods.fail(f".{word} does not compare .{kind}")
    return _ORDERED[word]


def _reader(kind: str, ftz: bool) -> Callable[[Any, int], list[Array]]:
    """Values of a row, one array or two for packed types."""
    if kind in _INTEGERS:
        view = S if kind[0] == "s" else U
        return lambda w, row: [w.r[view][row]]
    if kind == "f32" and ftz:
        return lambda w, row: [flush(w.r[F][row])]
    if kind in ("f32", "f64"):
        return lambda w, row: [w.r[F][row]]

    def half(w: Any, row: int) -> list[Array]:
        words = w.r[U][row].view(np.uint16).reshape(32, -1)
        parts = []
        for k in range(words.shape[1]):
            part = np.ascontiguousarray(words[:, k])
            value = part.view(np.float16).astype(np.float64) if kind.startswith("f16") else bf16_values(part)
            if ftz and kind.startswith("f16"):
                value = np.where(np.abs(value) < 2.0**-14, 0.0, value)
            parts.append(value)
        return parts

    return half


def _carrier(kind: str) -> str:
    return {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}.get(kind, kind)


def _setp(context: Context, mods: Modifiers) -> Step:
    word = mods.choice(_WORDS)
    combine = mods.choice(_BOOLEAN, "")
    ftz = mods.take("ftz")
    kind = mods.choice((*_INTEGERS, *_FLOATS))
    if ftz and kind not in ("f32", "f16", "f16x2"):
        raise mods.fail()
    operands = context.operands(4 if combine else 3)
    first, second = context.pair(operands[0], "pred", "pred")
    packed = kind in ("f16x2", "bf16x2")
    if packed and second is None:
        raise context.error("expected p|q")
    carrier = _carrier(kind)
    a, b = context.source(operands[1], carrier), context.source(operands[2], carrier)
    other, negated = context.predicate(operands[3]) if combine else (0, False)
    function, read = _function(mods, word, kind), _reader(kind, ftz)
    boolean = _BOOLEAN.get(combine)
    if boolean is None and second is None and kind in (*_INTEGERS, "f32", "f64") and not ftz:
        return _simple(kind, function, first, a, b)

    def step(w: Any) -> None:
        r = w.r[U]
        results = [function(x, y) for x, y in zip(read(w, a), read(w, b))]
        third: Any = r[other] ^ negated if boolean else None
        if packed:
            pairs = list(zip((first, second), results))
        else:
            pairs = [(first, results[0]), (second, ~results[0])]
        values = [(row, v if boolean is None else boolean(v, third)) for row, v in pairs]
        for row, value in values:
            if row is not None:
                w.put(r[row], value)

    return step


def _simple(kind: str, function: Function, destination: int, a: int, b: int) -> Step:
    view = S if kind[0] == "s" else F if kind[0] == "f" else U

    def step(w: Any) -> None:
        r = w.r[view]
        if w.full:
            w.r[U][destination][...] = function(r[a], r[b])
        else:
            w.put(w.r[U][destination], function(r[a], r[b]))

    return step


def _set(context: Context, mods: Modifiers) -> Step:
    word = mods.choice(_WORDS)
    combine = mods.choice(_BOOLEAN, "")
    ftz = mods.take("ftz")
    result = mods.choice(("u32", "s32", "f32", "u16", "s16", "f16", "bf16", "f16x2", "bf16x2"))
    kind = mods.choice((*_INTEGERS, *_FLOATS))
    packed = kind in ("f16x2", "bf16x2")
    if packed != (result in ("f16x2", "bf16x2")) and not (packed and result in ("u32", "s32")):
        raise mods.fail()
    operands = context.operands(4 if combine else 3)
    carrier = _carrier(kind)
    target = _carrier(result)
    d = context.destination(operands[0], target)
    a, b = context.source(operands[1], carrier), context.source(operands[2], carrier)
    other, negated = context.predicate(operands[3]) if combine else (0, False)
    function, read = _function(mods, word, kind), _reader(kind, ftz)
    boolean = _BOOLEAN.get(combine)
    one = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80, "f16x2": 0x3C00, "bf16x2": 0x3F80}.get(result, -1)

    def step(w: Any) -> None:
        r = w.r[U]
        results = [function(x, y) for x, y in zip(read(w, a), read(w, b))]
        if boolean is not None:
            results = [boolean(v, r[other] ^ negated) for v in results]
        row = r[d]
        if packed:
            half = one & 0xFFFF
            words = np.where(results[0], half, 0) | (np.where(results[1], half, 0) << 16)
        else:
            words = np.where(results[0], one & ((1 << 8 * row.itemsize) - 1), 0)
        w.put(row, words.astype(row.dtype))

    return step


INSTRUCTIONS: dict[str, Builder] = {"setp": _setp, "set": _set}
