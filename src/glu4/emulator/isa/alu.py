"""Integer arithmetic, mov and selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.isa.registry import CLOCKS, Builder, Context, Modifiers, S, Step, U
from glu4.emulator.ptx.module import SIZES, Sink, Special, Vector

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS", "INTEGER"]

Array = NDArray[Any]
_INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
_PAIRS = ("u16x2", "s16x2")
_MOV = ("b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f16", "bf16", "f32", "f64", "pred", "b128")


def _view(kind: str) -> int:
    return S if kind[0] == "s" else U


def _ufunc(context: Context, kind: str, ufunc: Any, count: int) -> Step:
    """d = ufunc(a[, b]) on whole rows."""
    operands = context.operands(count + 1)
    d = context.destination(operands[0], kind)
    rows = [context.source(o, kind) for o in operands[1:]]
    view = _view(kind)
    if count == 1:
        (a,) = rows

        def unary(w: Split) -> None:
            r = w.r[view]
            if w.full:
                ufunc(r[a], out=r[d])
            else:
                ufunc(r[a], out=r[d], where=w.mask)

        return unary
    a, b = rows

    def binary(w: Split) -> None:
        r = w.r[view]
        if w.full:
            ufunc(r[a], r[b], out=r[d])
        else:
            ufunc(r[a], r[b], out=r[d], where=w.mask)

    return binary


def computed(context: Context, kinds: tuple[str, ...], function: Callable[..., Array]) -> Step:
    """d = function(a, ...), with the types of d and of each source; the result is cast to d's type."""
    operands = context.operands(len(kinds))
    d = context.destination(operands[0], kinds[0])
    rows = [(context.source(o, k), _view(k)) for o, k in zip(operands[1:], kinds[1:])]
    view = _view(kinds[0])

    def step(w: Split) -> None:
        target = w.r[view][d]
        value = function(*[w.r[v][row] for row, v in rows])
        if w.full:
            target[...] = value
        else:
            w.put(target, value.astype(target.dtype))

    return step


def _packed(function: Callable[..., Array], signed: bool) -> Callable[..., Array]:
    """A function of 16-bit halves as one of 32-bit words."""
    half = np.int16 if signed else np.uint16

    def run(*words: Array) -> Array:
        halves = [np.ascontiguousarray(x).view(half) for x in words]
        return np.ascontiguousarray(function(*halves)).view(np.uint32)

    return run


def _limits(kind: str) -> tuple[int, int]:
    bits = SIZES[kind]
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def _add(name: str) -> Builder:
    ufunc = np.add if name == "add" else np.subtract

    def build(context: Context, mods: Modifiers) -> Step:
        if mods.take("cc"):
            return _carrying(context, mods, name, False)
        sat = mods.take("sat")
        kind = mods.choice((*_INTEGERS, *_PAIRS))
        if kind in _PAIRS:
            return computed(context, ("b32",) * 3, _packed(lambda a, b: ufunc(a, b), kind[0] == "s"))
        if not sat:
            return _ufunc(context, kind, ufunc, 2)
        if kind != "s32":
            raise mods.fail()
        low, high = _limits(kind)
        return computed(context, (kind,) * 3, lambda a, b: np.clip(ufunc(a.astype(np.int64), b.astype(np.int64)), low, high))

    return build


def _carry_in(name: str) -> Builder:
    """addc and subc."""
    return lambda context, mods: _carrying(context, mods, name, True)


def _carrying(context: Context, mods: Modifiers, name: str, takes: bool) -> Step:
    gives = not takes or mods.take("cc")
    kind = mods.choice(("u32", "s32", "u64", "s64"))
    d, a, b = context.operands(3)
    destination, first, second = context.destination(d, kind), context.source(a, kind), context.source(b, kind)

    def step(w: Split) -> None:
        r = w.r[U]
        x, y = r[first], r[second]
        carry = w.warp.extra.setdefault("carry", np.zeros(32, np.bool_))
        one = (carry if takes else np.zeros(32, np.bool_)).astype(x.dtype)
        if name == "add":
            half = x + y
            total = half + one
            out = (half < x) | (total < half)
        else:
            half = x - y
            total = half - one
            out = (x < y) | (half < one)
        if gives:
            w.put(carry, out)
        w.put(r[destination], total)

    return step


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the product of two integer arrays."""
    if a.dtype.itemsize < 8:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide)) >> wide(8 * a.dtype.itemsize)
    low, sign = np.uint64(0xFFFFFFFF), np.uint64(63)
    x, y = a.view(np.uint64), b.view(np.uint64)
    half = np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    rest = x0 * y1 + (middle & low)
    result = x1 * y1 + (middle >> half) + (rest >> half)
    if a.dtype.kind == "i":
        result = result - np.where(x >> sign, y, np.uint64(0)) - np.where(y >> sign, x, np.uint64(0))
    return np.asarray(result.view(a.dtype))


def _mul(context: Context, mods: Modifiers) -> Step:
    part = mods.choice(("hi", "lo", "wide"))
    kind = mods.choice(_INTEGERS)
    if part == "lo":
        return _ufunc(context, kind, np.multiply, 2)
    if part == "hi":
        return computed(context, (kind,) * 3, high_product)
    wide = _wider(mods, kind)
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{SIZES[wide] // 8}")
    return computed(context, (wide, kind, kind), lambda a, b: a.astype(dtype) * b.astype(dtype))


def _wider(mods: Modifiers, kind: str) -> str:
    if SIZES[kind] == 64:
        raise mods.fail("there is no .wide of 64 bits")
    return f"{kind[0]}{SIZES[kind] * 2}"


def _mad(context: Context, mods: Modifiers) -> Step:
    part = mods.choice(("hi", "lo", "wide"))
    if mods.words[:1] == ["cc"]:
        return _mad_carry(context, mods, part, False)
    sat = mods.take("sat")
    kind = mods.choice(_INTEGERS)
    if part == "wide":
        wide = _wider(mods, kind)
        dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{SIZES[wide] // 8}")
        return computed(context, (wide, kind, kind, wide), lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c)
    if sat:
        if part != "hi" or kind != "s32":
            raise mods.fail()
        low, high = _limits(kind)
        return computed(context, (kind,) * 4, lambda a, b, c: np.clip(high_product(a, b) + c.astype(np.int64), low, high))
    if part == "lo":
        return computed(context, (kind,) * 4, lambda a, b, c: a * b + c)
    return computed(context, (kind,) * 4, lambda a, b, c: high_product(a, b).astype(a.dtype) + c)


def _mad_carry(context: Context, mods: Modifiers, part: str, takes: bool) -> Step:
    """mad.cc and madc: the product's half is added with carry."""
    gives = mods.take("cc")
    kind = mods.choice(("u32", "s32", "u64", "s64"))
    if part == "wide":
        raise mods.fail()
    d, *sources = context.operands(4)
    destination = context.destination(d, kind)
    rows = [context.source(o, kind) for o in sources]
    view = _view(kind)

    def step(w: Split) -> None:
        a, b, c = (w.r[view][row] for row in rows)
        half = (a * b if part == "lo" else high_product(a, b).astype(a.dtype)).view(f"u{a.itemsize}")
        carry = w.warp.extra.setdefault("carry", np.zeros(32, np.bool_))
        total = half + c.view(half.dtype)
        out = total < half
        if takes:
            again = total + carry.astype(total.dtype)
            out |= again < total
            total = again
        if gives:
            w.put(carry, out)
        w.put(w.r[U][destination], total)

    return step


def _madc(context: Context, mods: Modifiers) -> Step:
    return _mad_carry(context, mods, mods.choice(("hi", "lo")), True)


def _mul24(accumulate: bool) -> Builder:
    def build(context: Context, mods: Modifiers) -> Step:
        part = mods.choice(("hi", "lo"))
        sat = accumulate and part == "hi" and mods.take("sat")
        kind = mods.choice(("s32",) if sat else ("u32", "s32"))
        low, high = _limits(kind)
        shift = np.int64(16 if part == "hi" else 0)

        def product(a: Array, b: Array) -> Array:
            x, y = a.astype(np.int64) << 40, b.astype(np.int64) << 40
            if kind == "s32":
                return ((x >> 40) * (y >> 40)) >> shift
            mask = np.int64(0xFFFFFF)
            return ((a.astype(np.int64) & mask) * (b.astype(np.int64) & mask)) >> shift

        if sat:
            return computed(context, (kind,) * 4, lambda a, b, c: np.clip(product(a, b) + c, low, high))
        if accumulate:
            return computed(context, (kind,) * 4, lambda a, b, c: product(a, b) + c)
        return computed(context, (kind,) * 3, product)

    return build


def _sad(context: Context, mods: Modifiers) -> Step:
    kind = mods.choice(_INTEGERS)
    return computed(context, (kind,) * 4, lambda a, b, c: np.where(a < b, b - a, a - b) + c)


def _divide(remainder: bool) -> Builder:
    def build(context: Context, mods: Modifiers) -> Step:
        kind = mods.choice(_INTEGERS)

        def function(a: Array, b: Array) -> Array:
            zero = b == 0
            safe = np.where(zero, b.dtype.type(1), b)
            quotient = a // safe
            if kind[0] == "s":  # toward zero
                quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0)))
            if remainder:
                return np.where(zero, a, a - quotient * safe)
            return np.where(zero, b.dtype.type(-1) if kind[0] == "s" else ~b.dtype.type(0), quotient)

        return computed(context, (kind,) * 3, function)

    return build


def _extreme(name: str) -> Builder:
    ufunc = np.minimum if name == "min" else np.maximum

    def build(context: Context, mods: Modifiers) -> Step:
        relu = mods.take("relu")
        kind = mods.choice((*_INTEGERS, *_PAIRS))
        if relu and kind not in ("s32", "s16x2"):
            raise mods.fail()
        if kind in _PAIRS:
            zero = np.int16(0)
            function = (lambda a, b: np.maximum(ufunc(a, b), zero)) if relu else (lambda a, b: ufunc(a, b))
            return computed(context, ("b32",) * 3, _packed(function, kind[0] == "s"))
        if relu:
            return computed(context, (kind,) * 3, lambda a, b: np.maximum(ufunc(a, b), np.int32(0)))
        return _ufunc(context, kind, ufunc, 2)

    return build


def _unary(ufunc: Any) -> Builder:
    def build(context: Context, mods: Modifiers) -> Step:
        return _ufunc(context, mods.choice(("s16", "s32", "s64")), ufunc, 1)

    return build


def _dot(context: Context, mods: Modifiers) -> Step:
    """dp4a and dp2a."""
    two = context.instruction.opcode == "dp2a"
    high = two and mods.choice(("lo", "hi")) == "hi"
    first, second = mods.choice(("u32", "s32")), mods.choice(("u32", "s32"))
    result = "s32" if "s32" in (first, second) else "u32"

    def parts(x: Array, kind: str, bits: int) -> Array:
        dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
        return np.ascontiguousarray(x).view(dtype).reshape(32, -1).astype(np.int64)

    def function(a: Array, b: Array, c: Array) -> Array:
        x, y = parts(a, first, 16 if two else 8), parts(b, second, 8)
        if two:
            y = y[:, 2:] if high else y[:, :2]
        return np.asarray((x * y).sum(axis=1) + c.astype(np.int64))

    return computed(context, (result, first, second, result), function)


# moving


def _mov(context: Context, mods: Modifiers) -> Step:
    kind = mods.choice(_MOV)
    d, a = context.operands(2)
    if isinstance(a, Special) and a.name in CLOCKS:
        return _read_clock(context, kind)
    if isinstance(d, Vector):
        return _unpack(context, kind, d, a)
    if isinstance(a, Vector):
        return _pack(context, kind, d, a)
    destination, source = context.destination(d, kind), context.source(a, kind)
    if kind == "b128":

        def quad(w: Split) -> None:
            w.r[U][destination][w.mask] = w.r[U][source][w.mask]

        return quad

    def step(w: Split) -> None:
        r = w.r[U]
        if w.full:
            r[destination][...] = r[source]
        else:
            w.put(r[destination], r[source])

    return step


def _read_clock(context: Context, kind: str) -> Step:
    d, a = context.operands(2)
    assert isinstance(a, Special)
    high = a.name.endswith("_hi")
    destination = context.destination(d, kind)

    def step(w: Split) -> None:
        row = w.r[U][destination]
        now = w.warp.cta.machine.now()
        w.put(row, np.array(now >> 32 if high else now & (1 << row.itemsize * 8) - 1, dtype=row.dtype))

    return step


def _vector_bits(context: Context, kind: str, vector: Vector) -> int:
    count = len(vector.elements)
    if count not in (2, 4, 8) or SIZES[kind] % count or SIZES[kind] // count < 8:
        raise context.error(f"{count} elements do not make .{kind}")
    return SIZES[kind] // count


def _pack(context: Context, kind: str, d: Any, a: Vector) -> Step:
    bits = _vector_bits(context, kind, a)
    destination = context.destination(d, kind)
    rows = [context.source(e, f"b{bits}") for e in a.elements]

    def step(w: Split) -> None:
        r = w.r[U]
        packed = np.stack([r[row] for row in rows], axis=1)
        target = r[destination]
        if kind == "b128":
            target[w.mask] = packed.view(np.uint64)[w.mask]
        else:
            w.put(target, packed.view(target.dtype)[:, 0])

    return step


def _unpack(context: Context, kind: str, d: Vector, a: Any) -> Step:
    bits = _vector_bits(context, kind, d)
    source = context.source(a, kind)
    rows = [None if isinstance(e, Sink) else context.destination(e, f"b{bits}") for e in d.elements]
    dtype = np.dtype(f"u{bits // 8}")

    def step(w: Split) -> None:
        r = w.r[U]
        parts = np.ascontiguousarray(r[source]).view(dtype).reshape(32, -1).copy()
        for k, row in enumerate(rows):
            if row is not None:
                w.put(r[row], parts[:, k])

    return step


def _selp(context: Context, mods: Modifiers) -> Step:
    kind = mods.choice(tuple(k for k in _MOV if k not in ("pred", "b128", "f16", "bf16")))
    d, a, b, c = context.operands(4)
    destination, first, second = context.destination(d, kind), context.source(a, kind), context.source(b, kind)
    predicate, negated = context.predicate(c)
    if negated:
        first, second = second, first

    def step(w: Split) -> None:
        r = w.r[U]
        w.put(r[destination], np.where(r[predicate], r[first], r[second]))

    return step


def _slct(context: Context, mods: Modifiers) -> Step:
    ftz = mods.take("ftz")
    kind = mods.choice(("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"))
    chooser = mods.choice(("s32", "f32"))
    if ftz and chooser != "f32":
        raise mods.fail()
    d, a, b, c = context.operands(4)
    destination, first, second = context.destination(d, kind), context.source(a, kind), context.source(b, kind)
    source = context.source(c, chooser)
    view = S if chooser == "s32" else 2

    def step(w: Split) -> None:
        r = w.r[U]
        values = w.r[view][source]
        if ftz:
            values = np.where(np.abs(values) < 2.0**-126, 0, values)
        w.put(r[destination], np.where(values >= 0, r[first], r[second]))

    return step


INTEGER: dict[str, Builder] = {
    "add": _add("add"),
    "sub": _add("sub"),
    "mul": _mul,
    "mad": _mad,
    "div": _divide(False),
    "min": _extreme("min"),
    "max": _extreme("max"),
    "abs": _unary(np.abs),
    "neg": _unary(np.negative),
}

INSTRUCTIONS: dict[str, Builder] = {
    "addc": _carry_in("add"),
    "subc": _carry_in("sub"),
    "madc": _madc,
    "mul24": _mul24(False),
    "mad24": _mul24(True),
    "sad": _sad,
    "rem": _divide(True),
    "dp4a": _dot,
    "dp2a": _dot,
    "mov": _mov,
    "selp": _selp,
    "slct": _slct,
}
