"""Exact rounding of float32 and float64 arithmetic in any direction, vectorised where float64 suffices."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.lanes import some

__all__ = [
    "LEAST32",
    "NAN32",
    "add_exact",
    "bf16_values",
    "by_fractions",
    "canonical",
    "flush",
    "fma_to_f32",
    "inherit",
    "quiet",
    "round_to_f32",
    "saturate",
    "to_odd",
    "vanishes",
]

Array = NDArray[Any]
NAN32 = np.uint32(0x7FFFFFFF)  # what float32 instructions of PTX return for a NaN
LEAST32 = 2.0**-126  # the least normal float32
_QUIET64 = np.uint64(1 << 51)
_NAN64 = np.uint64(0xFFF8 << 48)  # what float64 instructions return for an invalid operation, as an H100 gives it
_DIRECTED = ("rz", "rm", "rp")


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """(s, e): s the float64 sum, s + e the exact one."""
    s = a + b
    back = s - a
    return s, (a - (s - back)) + (b - back)


def to_odd(s: Array, e: Array) -> Array:
    """s + e rounded to odd, which can be rounded once more to a shorter format without error (Boldo and Melquiond 2008)."""
    inexact = e != 0
    if not some(inexact):
        return s
    bits = np.ascontiguousarray(s).view(np.int64)
    inexact = inexact & np.isfinite(s) & np.isfinite(e) & ((bits & 1) == 0)
    step = np.where((e > 0) == (s > 0), 1, -1)
    return np.asarray(np.where(inexact, bits + step, bits)).view(np.float64)


def add_exact(a: Array, b: Array) -> Array:
    """The float64 sum rounded to odd."""
    return to_odd(*two_sum(a, b))


def fma_to_f32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 values, rounded once, to nearest."""
    product, wide = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + wide
    # rounding twice differs only where the first result lies halfway between two float32, or may do so among subnormal ones
    small = np.abs(total) < LEAST32
    if some((total.view(np.int64) & 0x1FFFFFFF) == 0x10000000) or (some(small) and some(small & (total != 0.0))):
        total = add_exact(product, wide)
    return total.astype(np.float32)


def round_to_f32(x: Array, mode: str = "rn") -> Array:
    """float64 to float32 in a direction: rn, rz, rm or rp."""
    near = x.astype(np.float32)
    if mode == "rn":
        return near
    wide = near.astype(np.float64)
    finite = np.isfinite(x)
    if mode == "rz":
        wrong = np.abs(wide) > np.abs(x)
        target = np.float32(0.0)
    elif mode == "rm":
        wrong, target = wide > x, np.float32(-np.inf)
    else:
        wrong, target = wide < x, np.float32(np.inf)
    wrong &= finite
    return np.where(wrong, np.nextafter(near, target), near)


def flush(x: Array) -> Array:
    """Subnormal float32 values to zero of the same sign."""
    small = np.abs(x) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0.0), x), x) if some(small) else x


def saturate(x: Array) -> Array:
    """Clamped to [0, 1], NaN to +0."""
    zero = x.dtype.type(0.0)
    return np.asarray(np.where(x > 0, np.minimum(x, x.dtype.type(1.0)), zero))


def canonical(x: Array) -> Array:
    """float32 with every NaN made the one that PTX returns."""
    nan = np.isnan(x)
    if some(nan):
        x = x.copy()
        x.view(np.uint32)[nan] = NAN32
    return x


def inherit(result: Array, *operands: Array) -> Array:
    """A float64 result whose NaN is that of the first of `operands` that is one, made quiet.

    PTX leaves open which; the order of precedence is an H100's (tests/emulator/hardware).
    """
    nan = np.isnan(result)
    if not some(nan):
        return result
    bits = np.where(nan, _NAN64, np.ascontiguousarray(result).view(np.uint64))
    for x in reversed(operands):
        bits = np.where(nan & np.isnan(x), np.ascontiguousarray(x).view(np.uint64) | _QUIET64, bits)
    return bits.view(np.float64)


def quiet(x: Array) -> Array:
    """float64 with every signalling NaN made quiet."""
    bits = np.ascontiguousarray(x).view(np.uint64)
    result: Array = np.where(np.isnan(x), bits | _QUIET64, bits).view(np.float64)
    return result


def vanishes(exact: Array, near: Array, least: float, rounded: Callable[[Array], Array]) -> Array:
    """Where .ftz flushes a result although it was rounded up to the least normal number.

    Hardware rounds first, but as if exponents had no limit (an H100's mul and fma). exact: float64, `near` rounded; `rounded`
    rounds to the type.
    """
    at: Array = np.abs(near) == least
    if not some(at):
        return at
    return np.asarray(at & (np.abs(exact) < least) & (np.abs(rounded(exact * 256.0)) < least * 256.0))


def bf16_values(codes: Array) -> Array:
    """uint16 codes to float64."""
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def by_fractions(
    function: Callable[..., Fraction], operands: tuple[Array, ...], mode: str, kind: Any, fallback: Array
) -> Array:
    """Lane by lane in exact arithmetic; `fallback` (rounded to nearest) where an operand is not finite or the result 0."""
    out = fallback.copy()
    for i in range(out.size):
        values = [float(o[i]) for o in operands]
        if not all(map(math.isfinite, values)):
            continue
        try:
            exact = function(*[Fraction(v) for v in values])
        except ZeroDivisionError:
            continue
        if exact == 0:
            if mode == "rm" and not np.signbit(out[i]) and function.__name__ == "add" and any(values):
                out[i] = -0.0
            continue
        out[i] = _round_fraction(exact, mode, kind)
    return out


def _round_fraction(exact: Fraction, mode: str, kind: Any) -> Any:
    """An exact value to a NumPy float type."""
    digits, lowest = (24, -149) if kind is np.float32 else (53, -1074)
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - digits + 1, lowest)
    whole, rest = divmod(magnitude, unit)
    away = mode == "rn" and (rest * 2 > unit or (rest * 2 == unit and whole % 2))
    away |= (mode == "rp" and exact > 0 and rest != 0) or (mode == "rm" and exact < 0 and rest != 0)
    total = (int(whole) + int(away)) * unit
    sign = -1.0 if exact < 0 else 1.0  # the exact value may be too large for a float
    largest = (2 - Fraction(2) ** (1 - digits)) * Fraction(2) ** (127 if kind is np.float32 else 1023)
    if total > largest:
        inward = mode == "rz" or (mode == "rm" and exact > 0) or (mode == "rp" and exact < 0)
        total = largest if inward else Fraction(0)
        if not inward:
            return kind(math.copysign(math.inf, sign))
    return kind(math.copysign(float(total), sign))
