"""cvt in all its forms, and cvt.pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.formats import bf16_bits, convert_packed, encode
from glu4.emulator.isa.registry import Builder, Context, F, Modifiers, S, Step, U
from glu4.emulator.isa.rounding import (
    LEAST32,
    bf16_values,
    canonical,
    flush,
    quiet,
    round_to_f32,
    saturate,
    to_odd,
    two_sum,
    vanishes,
)
from glu4.emulator.ptx.module import SIZES

__all__ = ["INSTRUCTIONS"]

Array = NDArray[Any]
_INTEGERS = ("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64")
_FLOATS = ("f16", "bf16", "f32", "f64")
_PACKED = {"f16x2": "f16", "bf16x2": "bf16", "e4m3x2": "e4m3", "e5m2x2": "e5m2", "e2m1x2": "e2m1", "e2m3x2": "e2m3",
           "e3m2x2": "e3m2", "ue8m0x2": "ue8m0"}  # fmt: skip
_CARRIER = {"f16": "b16", "bf16": "b16", "tf32": "b32", "f16x2": "b32", "bf16x2": "b32", "e2m1x2": "b8"}
_ROUND: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cvt(context: Context, mods: Modifiers) -> Step:
    if mods.take("pack"):
        return _cvt_pack(context, mods)
    rounding = mods.choice(("rni", "rzi", "rmi", "rpi", "rn", "rna", "rz", "rm", "rp"), "")
    ftz, sat = mods.take("ftz"), mods.take("sat")
    relu = mods.take("relu")
    satfinite = mods.take("satfinite")
    relu = relu or mods.take("relu")
    to = mods.choice((*_INTEGERS, *_FLOATS, "tf32", *_PACKED))
    kind = mods.choice((*_INTEGERS, *_FLOATS, *_PACKED))
    if to in _PACKED or kind in _PACKED:
        return _packed(context, mods, to, kind, rounding, satfinite, relu)
    if satfinite or relu or to == "tf32":
        return _narrow(context, mods, to, kind, rounding, satfinite, relu)
    if to in _INTEGERS and kind in _INTEGERS:
        if rounding or ftz:
            raise mods.fail()
        return _integers(context, to, kind, sat)
    if to in _INTEGERS:
        if rounding not in _ROUND:
            raise mods.fail("float to integer needs .rni, .rzi, .rmi or .rpi")
        return _to_integer(context, to, kind, rounding, ftz)
    if kind in _INTEGERS:
        if rounding not in ("rn", "rz", "rm", "rp") or ftz:
            raise mods.fail("integer to float needs .rn, .rz, .rm or .rp")
        return _from_integer(context, to, kind, rounding, sat)
    return _floats(context, mods, to, kind, rounding, ftz, sat)


def _scalar(context: Context, to: str, kind: str, function: Callable[[Any], Array], raw: bool = False) -> Step:
    """d = function(values of a); the result is the bits or the value of d, cast to d's width. raw: of the bits of a.

    Integers wider than their type are cut on reading and extended on writing.
    """
    d, a = context.operands(2)
    destination, _ = context.wide_destination(d, _CARRIER.get(to, to))
    source, _ = context.wide_source(a, _CARRIER.get(kind, kind))
    view = S if to[0] == "s" else F if to in ("f32", "f64") else U
    read: Callable[[Any, int], Array] = (lambda w, row: w.r[U][row]) if raw else _reader(kind)
    narrow = np.dtype(f"{'i' if to[0] == 's' else 'u'}{SIZES[to] // 8}") if to in _INTEGERS else None

    def step(w: Any) -> None:
        value = function(read(w, source))
        if view == F:
            value = np.ascontiguousarray(value).view(np.uint32 if to == "f32" else np.uint64)
            w.put(w.r[U][destination], value)
            return
        if narrow is not None:
            value = value.astype(narrow)
        target = w.r[view][destination]
        w.put(target, value.astype(target.dtype))

    return step


def _reader(kind: str) -> Callable[[Any, int], Array]:
    """The values of a row: integers as their own type, halves and float64 as float64, float32 as float32."""
    if kind in _INTEGERS:
        dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{SIZES[kind] // 8}")
        return lambda w, row: w.r[U][row].astype(f"u{dtype.itemsize}").view(dtype)
    if kind == "bf16":
        return lambda w, row: bf16_values(w.r[U][row].astype(np.uint16))
    if kind == "f16":
        return lambda w, row: w.r[U][row].astype(np.uint16).view(np.float16).astype(np.float64)
    if kind == "f32":  # of a wider register the low half (PTX ISA 9.4.1)
        return lambda w, row: w.r[U][row].astype(np.uint32).view(np.float32)
    return lambda w, row: w.r[F][row]


def _integers(context: Context, to: str, kind: str, sat: bool) -> Step:
    if not sat:
        return _scalar(context, to, kind, lambda a: a)
    low, high = _range(to)

    def function(a: Array) -> Array:
        floor, top = max(low, int(np.iinfo(a.dtype).min)), min(high, int(np.iinfo(a.dtype).max))
        return np.clip(a, a.dtype.type(floor), a.dtype.type(top))

    return _scalar(context, to, kind, function)


def _range(kind: str) -> tuple[int, int]:
    bits = SIZES[kind]
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def _to_integer(context: Context, to: str, kind: str, rounding: str, ftz: bool) -> Step:
    low, high = _range(to)
    bits = SIZES[to]
    # NaN: the most negative pattern where 64 bits or float64 take part, else zero (PTX ISA 9.7.9.21, integer notes)
    nan = (1 << bits - 1) if kind == "f64" or bits == 64 else 0
    dtype = np.dtype(f"u{bits // 8}")

    def function(a: Array) -> Array:
        x = flush(a) if ftz and kind == "f32" else a
        x = _ROUND[rounding](x.astype(np.float64))
        inside = (x > low - 0.5) & (x < float(high) + (0.5 if bits < 53 else 0.0))
        safe = np.where(inside, x, 0.0)
        whole = safe.astype(np.uint64) if to == "u64" else safe.astype(np.int64).view(np.uint64)
        result = np.where(inside, whole, np.where(x > 0, np.uint64(high), np.uint64(low & (1 << 64) - 1)))
        result = np.where(np.isnan(x), np.uint64(nan), result)
        return result.astype(dtype)

    return _scalar(context, to, kind, function)


def _exact_double(a: Array) -> Array:
    """An integer array as float64, rounded to odd where 53 bits do not hold it."""
    if a.dtype.itemsize < 8:
        return a.astype(np.float64)
    return to_odd(*_halves(a))


def _halves(a: Array) -> tuple[Array, Array]:
    """64-bit integers as (nearest float64, exact rest)."""
    high = (a >> a.dtype.type(32)).astype(np.float64) * 2.0**32
    low = (a & a.dtype.type(0xFFFFFFFF)).astype(np.float64)
    return two_sum(high, low)


def _from_integer(context: Context, to: str, kind: str, rounding: str, sat: bool) -> Step:
    def function(a: Array) -> Array:
        if to == "f64":
            if a.dtype.itemsize < 8 or sat:
                value = a.astype(np.float64)
                return saturate(value) if sat else value
            s, e = _halves(a)
            wrong = {"rn": np.zeros(s.shape, bool), "rz": (s > 0) != (e > 0), "rm": e < 0, "rp": e > 0}[rounding] & (e != 0)
            target = {"rz": 0.0, "rm": -np.inf, "rp": np.inf}.get(rounding, 0.0)
            return np.where(wrong, np.nextafter(s, target), s)
        x = _exact_double(a)
        if to == "f32":
            value = round_to_f32(x, rounding)
            return saturate(value) if sat else value
        return encode(to, saturate(x) if sat else x, rounding)  # type: ignore[arg-type]

    return _scalar(context, to, kind, function)


def _floats(context: Context, mods: Modifiers, to: str, kind: str, rounding: str, ftz: bool, sat: bool) -> Step:
    if ftz and "f32" not in (to, kind):
        raise mods.fail()
    whole = _ROUND.get(rounding)
    if whole is not None and to != kind:
        raise mods.fail("rounding to an integer needs the same type on both sides")
    if rounding == "rna" or (SIZES[to] < SIZES[kind] and whole is None and not rounding):
        raise mods.fail("a rounding is needed")
    if SIZES[to] == SIZES[kind] and to != kind and not rounding:
        raise mods.fail("a rounding is needed")
    mode = rounding if whole is None and rounding else "rn"
    direct = mode == "rn" and not sat

    # what of a NaN reaches the result, and that float16 is made of subnormal numbers too, is as on an H100: PTX leaves it open
    if kind == "bf16" and to == "f32" and not (ftz or sat):
        return _scalar(context, to, kind, lambda a: (a.astype(np.uint32) << np.uint32(16)).view(np.float32), raw=True)

    def function(a: Array) -> Array:
        x = canonical(flush(a)) if ftz and kind == "f32" and to != "f16" else a
        if whole is not None:
            x = whole(x)
        if to == "f64":
            value = quiet(x.astype(np.float64))
            return saturate(value) if sat else value
        if to == "f32":
            single = x if kind == "f32" else _single(x, mode, ftz)
            single = flush(single) if ftz else single
            return saturate(single) if sat else single if kind == "f64" else canonical(single)
        if kind == "f64" and not sat:
            return np.where(np.isnan(x), _short_nan(x, to), encode(to, x, mode))  # type: ignore[arg-type]
        if direct and to == "f16":
            half = x.astype(np.float16)
            return np.where(np.isnan(half), np.uint16(0x7FFF), half.view(np.uint16))
        if direct:
            return bf16_bits(x)
        y = x.astype(np.float64)
        return encode(to, saturate(y) if sat else y, mode)  # type: ignore[arg-type]

    return _scalar(context, to, kind, function)


def _single(x: Array, mode: str, ftz: bool) -> Array:
    near = round_to_f32(x.astype(np.float64), mode)
    if ftz:
        lost = vanishes(x, near, LEAST32, lambda y: round_to_f32(y, mode))
        near = np.where(lost, np.copysign(np.float32(0.0), near), near)
    return near


def _short_nan(x: Array, to: str) -> Array:
    """The sign and the upper payload of float64 NaNs as f16 or bf16, quiet."""
    bits = np.ascontiguousarray(x).view(np.uint64) >> np.uint64(42 if to == "f16" else 45)
    quiet_bits, payload = (0x7E00, 0x1FF) if to == "f16" else (0x7FC0, 0x3F)
    sign = np.where(np.signbit(x), 0x8000, 0)
    return (sign | quiet_bits | (bits & np.uint64(payload)).astype(np.int64)).astype(np.uint16)


def _narrow(context: Context, mods: Modifiers, to: str, kind: str, rounding: str, satfinite: bool, relu: bool) -> Step:
    legal = ("rn", "rz", "rna") if to == "tf32" else ("rn", "rz")
    if kind != "f32" or to not in ("f16", "bf16", "tf32") or rounding not in legal or (rounding == "rna" and relu):
        raise mods.fail()

    def function(a: Array) -> Array:
        codes = encode(to, a, rounding, satfinite=satfinite, relu=relu)  # type: ignore[arg-type]
        if rounding == "rna":  # of a NaN the low bits are cut off, as on an H100
            codes = np.where(np.isnan(a), a.view(np.uint32) & np.uint32(0xFFFFE000), codes)
        return codes

    return _scalar(context, to, kind, function)


def _packed(context: Context, mods: Modifiers, to: str, kind: str, rounding: str, satfinite: bool, relu: bool) -> Step:
    """Two values at once. From f32: d, a, b with a in the upper half; else from one packed register."""
    if to not in _PACKED:
        raise mods.fail()
    target = _PACKED[to]
    small = target not in ("f16", "bf16")
    if kind == "f32":
        allowed = ("rz", "rp") if target == "ue8m0" else ("rn",) if small else ("rn", "rz")
        ok = rounding in allowed and (satfinite or not small or target == "ue8m0") and not (relu and target == "ue8m0")
    elif kind in ("f16x2", "bf16x2"):
        allowed = ("rz", "rp") if target == "ue8m0" else ("rn",)
        ok = small and rounding in allowed and (satfinite or target == "ue8m0") and (target != "ue8m0" or kind == "bf16x2")
    else:
        ok = kind in _PACKED and rounding == "rn" and to in (("bf16x2",) if kind == "ue8m0x2" else ("f16x2", "bf16x2"))
    if not ok:
        raise mods.fail()
    sources = 2 if kind == "f32" else 1
    operands = context.operands(1 + sources)
    d = context.destination(operands[0], _CARRIER.get(to, "b16"))
    rows = [context.source(o, _CARRIER.get(kind, "f32" if kind == "f32" else "b16")) for o in operands[1:]]
    fast: Any = {"f16": _fast_f16, "bf16": bf16_bits}.get(target)
    if kind != "f32" or rounding != "rn" or relu or satfinite:
        fast = None

    def step(w: Any) -> None:
        if kind == "f32":
            values = [w.r[F][row] for row in rows]
            if fast is not None:
                word = (fast(values[0]).astype(np.uint32) << np.uint32(16)) | fast(values[1])
            else:
                word = convert_packed(to[:-2], values, rounding, satfinite=satfinite, relu=relu)  # type: ignore[arg-type]
        else:
            word = convert_packed(to[:-2], [w.r[U][rows[0]]], rounding, source=_PACKED[kind], satfinite=satfinite, relu=relu)  # type: ignore[arg-type]
        target_row = w.r[U][d]
        w.put(target_row, word.astype(target_row.dtype))

    return step


def _fast_f16(x: Array) -> Array:
    half = x.astype(np.float16)
    return np.where(np.isnan(half), np.uint16(0x7FFF), half.view(np.uint16))


def _cvt_pack(context: Context, mods: Modifiers) -> Step:
    """cvt.pack.sat: two s32 saturated and packed; below 16 bits c, shifted up, fills the rest (PTX ISA 9.7.9.22)."""
    if not mods.take("sat"):
        raise mods.fail()
    to = mods.choice(("u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2"))
    kind = mods.choice(("s32",))
    bits = int(to[1:])
    third = mods.take("b32")
    if third != (bits < 16):
        raise mods.fail()
    operands = context.operands(4 if third else 3)
    d = context.destination(operands[0], "b32")
    a, b = context.source(operands[1], kind), context.source(operands[2], kind)
    c = context.source(operands[3], "b32") if third else None
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    mask = (1 << bits) - 1

    def step(w: Any) -> None:
        upper, lower = (np.clip(w.r[S][row], low, high).astype(np.int64) & mask for row in (a, b))
        word = (upper << bits) | lower
        if c is not None:
            word |= w.r[U][c].astype(np.int64) << 2 * bits
        w.put(w.r[U][d], (word & 0xFFFFFFFF).astype(np.uint32))

    return step


INSTRUCTIONS: dict[str, Builder] = {"cvt": _cvt}
