"""Logic, shifts and bit fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.isa.alu import computed
from glu4.emulator.isa.registry import Builder, Context, Modifiers, S, Step, U
from glu4.emulator.ptx.module import SIZES, Negated, Pair

__all__ = ["INSTRUCTIONS"]

Array = NDArray[Any]
_BITS = ("b16", "b32", "b64")


def _logic(ufunc: Any) -> Builder:
    def build(context: Context, mods: Modifiers) -> Step:
        kind = mods.choice(("pred", *_BITS))
        operands = context.operands(3)
        d = context.destination(operands[0], kind)
        flips = [isinstance(o, Negated) for o in operands[1:]]
        if any(flips) and kind != "pred":
            raise context.error("only a predicate can be negated")
        a, b = (context.source(o.operand if isinstance(o, Negated) else o, kind) for o in operands[1:])
        if any(flips):

            def flipped(w: Any) -> None:
                r = w.r[U]
                w.put(r[d], ufunc(r[a] ^ flips[0], r[b] ^ flips[1]))

            return flipped

        def step(w: Any) -> None:
            r = w.r[U]
            if w.full:
                ufunc(r[a], r[b], out=r[d])
            else:
                ufunc(r[a], r[b], out=r[d], where=w.mask)

        return step

    return build


def _not(context: Context, mods: Modifiers) -> Step:
    kind = mods.choice(("pred", *_BITS))
    d, a = context.operands(2)
    destination, source = context.destination(d, kind), context.source(a, kind)

    def step(w: Any) -> None:
        r = w.r[U]
        np.invert(r[source], r[destination], where=w.mask)

    return step


def _cnot(context: Context, mods: Modifiers) -> Step:
    kind = mods.choice(_BITS)
    return computed(context, (kind, kind), lambda a: a == 0)


def _lop3(context: Context, mods: Modifiers) -> Step:
    boolean = mods.choice(("or", "and"), "")
    mods.choice(("b32",))
    operands = list(context.operands(6 if boolean else 5))
    extra = context.predicate(operands.pop()) if boolean else (0, False)
    table = context.literal(operands.pop())
    if not 0 <= table < 256:
        raise context.error(f"the table must be 0 to 255, found {table}")
    first = operands[0]
    if boolean:
        if not isinstance(first, Pair):
            raise context.error("expected d|p")
        d, p = context.pair(first, "b32", "pred")
    else:
        d, p = context.destination(first, "b32"), None
    a, b, c = (context.source(o, "b32") for o in operands[1:])
    function = _table(table)

    def step(w: Any) -> None:
        r = w.r[U]
        result = function(r[a], r[b], r[c])
        w.put(r[d], result)
        if p is not None:
            other = r[extra[0]] ^ extra[1]
            w.put(r[p], (result != 0) | other if boolean == "or" else (result != 0) & other)

    return step


def _table(table: int) -> Callable[[Array, Array, Array], Array]:
    """Bit i of the result is bit (a_i << 2 | b_i << 1 | c_i) of the table: the sum of its minterms."""
    simple: dict[int, Callable[[Array, Array, Array], Array]] = {
        0xC0: lambda a, b, c: a & b,
        0xEA: lambda a, b, c: (a & b) | c,
        0xF8: lambda a, b, c: a | (b & c),
        0x80: lambda a, b, c: a & b & c,
        0xFE: lambda a, b, c: a | b | c,
        0x96: lambda a, b, c: a ^ b ^ c,
        0x6A: lambda a, b, c: (a & b) ^ c,
    }
    if table in simple:
        return simple[table]

    def general(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros_like(a)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return general


def _shift(left: bool) -> Builder:
    def build(context: Context, mods: Modifiers) -> Step:
        kind = mods.choice(_BITS if left else (*_BITS, "u16", "u32", "u64", "s16", "s32", "s64"))
        d, a, b = context.operands(3)
        destination, source, amount = context.destination(d, kind), context.source(a, kind), context.source(b, "u32")
        bits = SIZES[kind]
        view = S if kind[0] == "s" else U
        ufunc = np.left_shift if left else np.right_shift
        limit = np.uint32(bits - 1)

        def step(w: Any) -> None:
            count = w.r[U][amount]
            r = w.r[view]
            value = r[source]
            # a count of the width or more shifts everything out (PTX ISA 9.7.8.8: counts are clamped)
            clamped = np.minimum(count, limit).astype(value.dtype)
            result = ufunc(value, clamped)
            if view == U:
                over = count > limit
                if over.any():
                    result[over] = 0
            w.put(r[destination], result)

        return step

    return build


def _shf(context: Context, mods: Modifiers) -> Step:
    left = mods.choice(("l", "r")) == "l"
    wrap = mods.choice(("wrap", "clamp")) == "wrap"
    mods.choice(("b32",))

    def function(a: Array, b: Array, c: Array) -> Array:
        n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        if left:
            return np.asarray((both << n) >> np.uint64(32)).astype(np.uint32)
        return (both >> n).astype(np.uint32)

    return computed(context, ("b32",) * 3 + ("u32",), function)


def _prmt(context: Context, mods: Modifiers) -> Step:
    mods.choice(("b32",))
    mode = mods.choice(("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"), "")
    lane = np.arange(32)[:, None]

    def selection(c: Array) -> Array:
        """Byte selectors, [32, 4]."""
        if not mode:
            return (c[:, None] >> (4 * np.arange(4, dtype=np.uint32))).astype(np.int64) & 15
        k = (c & 3).astype(np.int64)[:, None]
        j = np.arange(4)[None, :]
        forms = {"f4e": k + j, "b4e": (k - j) & 7, "rc8": k + 0 * j, "ecl": np.maximum(j, k), "ecr": np.minimum(j, k)}
        return forms[mode] if mode in forms else (k & 1) * 2 + (j & 1)

    def function(a: Array, b: Array, c: Array) -> Array:
        data = np.stack((a, b), axis=1).view(np.uint8)
        chosen = selection(c)
        picked = data[lane, chosen & 7]
        if not mode:
            picked = np.where(chosen & 8, np.where(picked & 0x80, 0xFF, 0), picked)
        return np.ascontiguousarray(picked.astype(np.uint8)).view(np.uint32)[:, 0]

    return computed(context, ("b32",) * 4, function)


def _field(x: Array, bits: int) -> Array:
    """A position or length of bfe and bfi: its low 8 bits (PTX ISA 9.7.1.19), in 64-bit forms all of it, as on an H100."""
    return np.minimum(x & 0xFF if bits == 32 else x, 0xFF).astype(np.int64)


def _bfe(context: Context, mods: Modifiers) -> Step:
    kind = mods.choice(("u32", "u64", "s32", "s64"))
    bits = SIZES[kind]
    word = np.dtype(f"u{bits // 8}").type

    def function(a: Array, b: Array, c: Array) -> Array:
        start, length = _field(b, bits), _field(c, bits)
        x = a.view(np.dtype(f"u{bits // 8}"))
        shifted = np.where(start >= bits, word(0), x >> np.minimum(start, bits - 1).astype(x.dtype))
        mask = np.where(length >= bits, ~word(0), (word(1) << np.minimum(length, bits - 1).astype(x.dtype)) - word(1))
        field = shifted & mask
        if kind[0] == "s":
            at = np.minimum(start + length - 1, bits - 1)
            sign = (x >> np.maximum(at, 0).astype(x.dtype)) & word(1)
            field = np.where((sign != 0) & (length > 0), field | ~mask, field)
            # past the top, all bits are the sign
            top = np.clip(bits - start, 0, bits)
            high = np.where(top >= bits, word(0), ~((word(1) << np.minimum(top, bits - 1).astype(x.dtype)) - word(1)))
            field = np.where((sign != 0) & (length > 0), field | high, field)
        return np.asarray(field).view(a.dtype)

    return computed(context, (kind, kind, "u32", "u32"), function)


def _bfi(context: Context, mods: Modifiers) -> Step:
    kind = mods.choice(("b32", "b64"))
    bits = SIZES[kind]
    word = np.dtype(f"u{bits // 8}").type

    def function(a: Array, b: Array, c: Array, d: Array) -> Array:
        start, length = _field(c, bits), _field(d, bits)
        mask = np.where(length >= bits, ~word(0), (word(1) << np.minimum(length, bits - 1).astype(a.dtype)) - word(1))
        inside = start < bits
        at = np.minimum(start, bits - 1).astype(a.dtype)
        mask = np.where(inside, mask << at, word(0))
        return np.asarray((b & ~mask) | ((a << at) & mask))

    return computed(context, (kind, kind, kind, "u32", "u32"), function)


def _popc(context: Context, mods: Modifiers) -> Step:
    return computed(context, ("u32", mods.choice(("b32", "b64"))), np.bitwise_count)


def _highest(x: Array) -> Array:
    """Position of the highest one of unsigned values, -1 for zero."""
    result = np.full(x.shape, -1, dtype=np.int64)
    value = x.copy()
    for step in (32, 16, 8, 4, 2, 1):
        if step < 8 * x.dtype.itemsize:
            big = value >> x.dtype.type(step) != 0
            result = result + np.where(big, step, 0)
            value = np.where(big, value >> x.dtype.type(step), value)
    return np.asarray(result + (value != 0))


def _clz(context: Context, mods: Modifiers) -> Step:
    kind = mods.choice(("b32", "b64"))
    return computed(context, ("u32", kind), lambda a: SIZES[kind] - 1 - _highest(a))


def _bfind(context: Context, mods: Modifiers) -> Step:
    amount = mods.take("shiftamt")
    kind = mods.choice(("u32", "u64", "s32", "s64"))
    bits = SIZES[kind]

    def function(a: Array) -> Array:
        x = np.where(a < 0, ~a, a).view(f"u{bits // 8}") if kind[0] == "s" else a
        at = _highest(np.ascontiguousarray(x))
        return np.where(at < 0, -1, bits - 1 - at if amount else at)

    return computed(context, ("u32", kind), function)


def _brev(context: Context, mods: Modifiers) -> Step:
    kind = mods.choice(("b32", "b64"))

    def function(a: Array) -> Array:
        flipped = np.packbits(np.unpackbits(np.ascontiguousarray(a).view(np.uint8), bitorder="little"), bitorder="big")
        return np.ascontiguousarray(flipped.view(a.dtype).byteswap())

    return computed(context, (kind, kind), function)


def _fns(context: Context, mods: Modifiers) -> Step:
    mods.choice(("b32",))

    def one(mask: int, base: int, offset: int) -> int:
        base &= 31
        if offset == 0:
            return base if mask >> base & 1 else -1
        step = 1 if offset > 0 else -1
        left, at = abs(offset), base
        while 0 <= at < 32:
            left -= mask >> at & 1
            if left == 0:
                return at
            at += step
        return -1

    def function(a: Array, b: Array, c: Array) -> Array:
        return np.array([one(int(x), int(y), int(z)) for x, y, z in zip(a, b, c)], dtype=np.int64)

    return computed(context, ("b32", "b32", "u32", "s32"), function)


def _szext(context: Context, mods: Modifiers) -> Step:
    clamp = mods.choice(("clamp", "wrap")) == "clamp"
    kind = mods.choice(("u32", "s32"))

    def function(a: Array, b: Array) -> Array:
        n = np.minimum(b, 32).astype(np.int64) if clamp else (b & 31).astype(np.int64)
        value = (a.astype(np.int64) & 0xFFFFFFFF) & ((1 << n) - 1)
        sign = (value >> np.maximum(n - 1, 0)) & (n > 0)
        return np.where((sign != 0) & (kind == "s32"), value - (1 << n), value)

    return computed(context, (kind, kind, "u32"), function)


def _bmsk(context: Context, mods: Modifiers) -> Step:
    clamp = mods.choice(("clamp", "wrap")) == "clamp"
    mods.choice(("b32",))

    def function(a: Array, b: Array) -> Array:
        start = a.astype(np.int64) if clamp else a.astype(np.int64) & 31
        count = np.minimum(b.astype(np.int64), 32) if clamp else b.astype(np.int64) & 31
        mask = ((1 << count) - 1) << np.minimum(start, 32)
        return mask & 0xFFFFFFFF

    return computed(context, ("b32", "u32", "u32"), function)


INSTRUCTIONS: dict[str, Builder] = {
    "and": _logic(np.bitwise_and),
    "or": _logic(np.bitwise_or),
    "xor": _logic(np.bitwise_xor),
    "not": _not,
    "cnot": _cnot,
    "lop3": _lop3,
    "shl": _shift(True),
    "shr": _shift(False),
    "shf": _shf,
    "prmt": _prmt,
    "bfe": _bfe,
    "bfi": _bfi,
    "popc": _popc,
    "clz": _clz,
    "bfind": _bfind,
    "brev": _brev,
    "fns": _fns,
    "szext": _szext,
    "bmsk": _bmsk,
}
