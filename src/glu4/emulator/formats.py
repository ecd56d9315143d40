"""Floating-point formats of PTX: bit patterns to values and back, with PTX's roundings, saturation and packing.

Facts: PTX ISA 9.1, 5.2.3 (the formats) and 9.7.9.21 (`cvt`). What that text leaves open (the sign of a NaN, what happens
below the range of ue8m0) follows the host code of the CUDA 13.0 headers cuda_fp8.hpp, cuda_fp6.hpp and cuda_fp4.hpp, against
which the tests compare.

Values are float64, which holds every value of every format here exactly. Codes are unsigned integers in the low bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glu4.emulator.lanes import some

__all__ = ["FORMATS", "FloatFormat", "Rounding", "bf16_bits", "convert_packed", "decode", "encode", "pack", "unpack"]

Rounding = Literal["rn", "rna", "rz", "rm", "rp"]
Codes = NDArray[np.uint32]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class FloatFormat:
    """A binary format with implicit leading bit and subnormals.

    `low_zeros` counts bits below the mantissa that belong to the register but not to the format (tf32). `packed_bits` is the
    width of one element in a packed register. `max_code` is the largest finite magnitude, `nan` PTX's canonical NaN (None:
    the format has none), `infinity` the code of +infinity (None: the format has none).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max_code: int
    nan: int | None
    infinity: int | None = None
    signed: bool = True
    low_zeros: int = 0
    packed_bits: int = 8

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number and of all subnormal ones."""
        return 1 - self.bias

    @property
    def magnitude_bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits

    @property
    def sign_bit(self) -> int:
        """Mask of the sign, zero for an unsigned format; without `low_zeros`."""
        return 1 << self.magnitude_bits if self.signed else 0

    @property
    def max_value(self) -> float:
        """Largest finite value."""
        return float(decode(self.name, self.max_code << self.low_zeros))


_UE8M0 = "ue8m0"

# name: exponent bits, mantissa bits, largest finite code, canonical NaN, infinity
FORMATS: dict[str, FloatFormat] = {
    f.name: f
    for f in (
        FloatFormat("f32", 8, 23, 0x7F7FFFFF, 0x7FFFFFFF, 0x7F800000, packed_bits=32),
        FloatFormat("tf32", 8, 10, 0x3FBFF, 0x3FFFF, 0x3FC00, low_zeros=13, packed_bits=32),
        FloatFormat("f16", 5, 10, 0x7BFF, 0x7FFF, 0x7C00, packed_bits=16),
        FloatFormat("bf16", 8, 7, 0x7F7F, 0x7FFF, 0x7F80, packed_bits=16),
        FloatFormat("e4m3", 4, 3, 0x7E, 0x7F),
        FloatFormat("e5m2", 5, 2, 0x7B, 0x7F, 0x7C),
        FloatFormat("e2m3", 2, 3, 0x1F, None),
        FloatFormat("e3m2", 3, 2, 0x1F, None),
        FloatFormat("e2m1", 2, 1, 0x7, None, packed_bits=4),
        FloatFormat("ue4m3", 4, 3, 0x7E, 0x7F, signed=False),
        FloatFormat(_UE8M0, 8, 0, 0xFE, 0xFF, signed=False),
    )
}


def _format(name: str) -> FloatFormat:
    try:
        return FORMATS[name]
    except KeyError:
        raise ValueError(f"format: {name!r} is unknown; known are {', '.join(FORMATS)}") from None


@cache
def _table(name: str) -> Values:
    """Value of every code of a format of at most 8 bits."""
    fmt = FORMATS[name]
    codes = np.arange(1 << (fmt.magnitude_bits + fmt.signed), dtype=np.uint32)
    table = np.ldexp(1.0, codes.astype(np.int64) - 127) if name == _UE8M0 else _decode_any(fmt, codes)
    if name == _UE8M0:
        table[0xFF] = np.nan
    table.setflags(write=False)
    return table


def _decode_any(fmt: FloatFormat, codes: Codes) -> Values:
    magnitude = codes & np.uint32((1 << fmt.magnitude_bits) - 1)
    exponent = (magnitude >> np.uint32(fmt.mantissa_bits)).astype(np.int64)
    mantissa = (magnitude & np.uint32((1 << fmt.mantissa_bits) - 1)).astype(np.float64)
    normal = exponent > 0
    significand = np.where(normal, mantissa + (1 << fmt.mantissa_bits), mantissa)
    values = np.ldexp(significand, np.where(normal, exponent - fmt.bias, fmt.min_exponent) - fmt.mantissa_bits)
    values = np.where(magnitude > fmt.max_code, np.nan, values)
    if fmt.infinity is not None:
        values = np.where(magnitude == fmt.infinity, np.inf, values)
    return np.asarray(np.where(codes & np.uint32(fmt.sign_bit), -values, values), dtype=np.float64)


def decode(name: str, codes: ArrayLike) -> Values:
    """Values of bit patterns, exact, as float64 of the same shape.

    Bits above the format's width are ignored, as are tf32's low 13 bits. Raises ValueError for an unknown format.
    """
    fmt = _format(name)
    bits = np.asarray(codes).astype(np.uint32) >> np.uint32(fmt.low_zeros)
    width = fmt.magnitude_bits + fmt.signed
    if width <= 8:
        return np.asarray(_table(name)[bits & np.uint32((1 << width) - 1)])
    if name == "f16":
        return _widen(bits.astype(np.uint16).view(np.float16))
    if name == "bf16":
        return _widen(np.asarray(bits << np.uint32(16)).view(np.float32))
    if name == "f32":
        return _widen(bits.view(np.float32))
    return _decode_any(fmt, bits)


def _widen(values: ArrayLike) -> Values:
    """To float64; NumPy warns of signalling NaNs, which are ordinary inputs here."""
    with np.errstate(invalid="ignore"):
        return np.asarray(values, dtype=np.float64)


def bf16_bits(x: Values | NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 or float64 to uint16 codes, to nearest even, NaN to 0x7fff."""
    if x.dtype == np.float32:
        near = np.ascontiguousarray(x, np.float32)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            near = x.astype(np.float32)
    if not some(near != x):  # nor a NaN among them
        bits = near.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    with np.errstate(invalid="ignore"):
        error = x - near.astype(np.float64)
    bits = near.view(np.uint32).astype(np.int64)
    odd = np.isfinite(near) & (error != 0) & ((bits & 1) == 0)
    bits = np.where(odd, bits + np.where((error > 0) == (x > 0), 1, -1), bits)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _round(scaled: Values, negative: NDArray[np.bool_], rounding: Rounding) -> Values:
    """Magnitudes in units of the last place to whole ones."""
    if rounding == "rn":
        return np.rint(scaled)
    if rounding == "rna":
        return np.floor(scaled + 0.5)
    if rounding == "rz":
        return np.floor(scaled)
    away = negative if rounding == "rm" else ~negative
    return np.where(away, np.ceil(scaled), np.floor(scaled))


def _encode_ue8m0(values: Values, rounding: Rounding, satfinite: bool) -> Codes:
    """The magnitude's exponent: signs are dropped, 2^-127 and below become 0."""
    if rounding not in ("rz", "rp"):
        raise ValueError(f"rounding: ue8m0 has rz and rp, not {rounding}")
    magnitude = np.abs(values)
    mantissa, exponent = np.frexp(np.where(np.isfinite(magnitude), magnitude, 1.0))
    code = exponent.astype(np.int64) - 1 + 127
    if rounding == "rp":
        code = code + (mantissa > 0.5)
    code = np.where(magnitude <= 2.0**-127, 0, np.clip(code, 0, 0xFF))
    code = np.where(np.isinf(magnitude), 0xFF, code)
    if satfinite:
        code = np.minimum(code, 0xFE)
    return np.where(np.isnan(values), 0xFF, code).astype(np.uint32)


def encode(name: str, values: ArrayLike, rounding: Rounding = "rn", *, satfinite: bool = False, relu: bool = False) -> Codes:
    """Bit patterns nearest to float32 or float64 values, uint32 of the same shape.

    `satfinite` replaces what is out of range, infinities included, by the largest finite value; without it that becomes an
    infinity, or NaN where the format has none (toward zero: the largest finite value). NaN becomes the canonical NaN, or the
    largest value where the format has none. `relu` makes every negative result +0. Formats without infinity and NaN need
    `satfinite`, as in PTX. Raises ValueError for an unknown format, for ue4m3 (PTX converts nothing to it) and for a
    rounding that the format does not have.
    """
    fmt = _format(name)
    x = _widen(values)
    if name == _UE8M0:
        if relu:
            raise ValueError("relu: ue8m0 has no sign")
        return _encode_ue8m0(x, rounding, satfinite)
    if not fmt.signed:
        raise ValueError(f"format: PTX converts nothing to {name}")
    if fmt.nan is None and not satfinite:
        raise ValueError(f"satfinite: {name} has neither infinity nor NaN, so PTX requires .satfinite")
    if rounding not in ("rn", "rna", "rz", "rm", "rp"):
        raise ValueError(f"rounding: {rounding!r} is unknown; known are rn, rna, rz, rm, rp")
    if name in ("f16", "bf16") and rounding == "rn" and not satfinite and not relu:
        if name == "bf16":
            return bf16_bits(x).astype(np.uint32)
        with np.errstate(over="ignore", invalid="ignore"):
            half = x.astype(np.float16)
        return np.where(np.isnan(half), np.uint16(0x7FFF), half.view(np.uint16)).astype(np.uint32)
    negative = np.signbit(x)
    finite = np.isfinite(x)
    magnitude = np.where(finite, np.abs(x), 1.0)
    exponent = np.maximum(np.frexp(magnitude)[1].astype(np.int64) - 1, fmt.min_exponent)
    exponent = np.where(magnitude == 0, fmt.min_exponent, np.minimum(exponent, fmt.bias + 1))
    scaled = np.minimum(np.ldexp(magnitude, fmt.mantissa_bits - exponent), 2.0**60)
    units = _round(scaled, negative, rounding)
    # a significand that rounds up to the next power of two carries into the exponent field by itself
    code = ((exponent - fmt.min_exponent) << fmt.mantissa_bits) + units.astype(np.int64)
    code = _overflow(fmt, code, finite, np.isnan(x), negative, rounding, satfinite)
    sign = np.where(negative & ~np.isnan(x), fmt.sign_bit, 0)
    if relu:
        code = np.where(sign != 0, 0, code)
        sign = np.zeros_like(sign)
    return ((code | sign) << fmt.low_zeros).astype(np.uint32)


def _overflow(
    fmt: FloatFormat,
    code: NDArray[np.int64],
    finite: NDArray[np.bool_],
    nan: NDArray[np.bool_],
    negative: NDArray[np.bool_],
    rounding: Rounding,
    satfinite: bool,
) -> NDArray[np.int64]:
    """Codes with those beyond the format replaced: by the largest finite value, infinity or NaN."""
    beyond = fmt.infinity if fmt.infinity is not None else fmt.nan
    too_big = code > fmt.max_code
    if satfinite or beyond is None:
        code = np.where(too_big | ~finite, fmt.max_code, code)
    else:
        if rounding == "rz":
            code = np.where(too_big, fmt.max_code, code)
        elif rounding in ("rm", "rp"):
            inward = ~negative if rounding == "rm" else negative
            code = np.where(too_big & inward, fmt.max_code, code)
        code = np.where((code > fmt.max_code) | ~finite, beyond, code)
    return np.where(nan, fmt.max_code if fmt.nan is None else fmt.nan, code)


def pack(name: str, codes: Sequence[NDArray[Any]]) -> Codes:
    """One register of several codes, the first in the highest bits, as `cvt` packs its operands a, b, e, f."""
    bits = _format(name).packed_bits
    if not codes or bits * len(codes) > 32:
        raise ValueError(f"pack: {len(codes)} elements of {bits} bits do not fit a 32-bit register")
    word = np.zeros(np.shape(codes[0]), dtype=np.uint32)
    for code in codes:
        word = (word << np.uint32(bits % 32)) | (np.asarray(code).astype(np.uint32) & np.uint32((1 << bits) - 1))
    return word


def unpack(name: str, words: ArrayLike, count: int) -> list[Codes]:
    """The `count` codes of a register, highest bits first: the inverse of `pack`."""
    bits = _format(name).packed_bits
    if count < 1 or bits * count > 32:
        raise ValueError(f"unpack: {count} elements of {bits} bits do not fit a 32-bit register")
    register = np.asarray(words).astype(np.uint32)
    mask = np.uint32((1 << bits) - 1)
    return [(register >> np.uint32(bits * i)) & mask for i in reversed(range(count))]


def convert_packed(
    to: str,
    sources: Sequence[ArrayLike],
    rounding: Rounding = "rn",
    *,
    source: str | None = None,
    satfinite: bool = False,
    relu: bool = False,
) -> Codes:
    """A packed `cvt`, for example `cvt.rn.satfinite.e2m1x2.f32 d, a, b` or `cvt.rn.f16x2.e4m3x2 d, a`.

    With `source` None, `sources` are float32 values in operand order (a, b or a, b, e, f). Otherwise `sources` is one packed
    register of two elements of format `source`. Returns the packed register. Raises ValueError as `encode` and `pack` do.
    """
    if source is not None:
        if len(sources) != 1:
            raise ValueError(f"convert_packed: one {source}x2 register is converted, given {len(sources)}")
        values: list[Values] = [decode(source, code) for code in unpack(source, sources[0], 2)]
    else:
        values = [_widen(value) for value in sources]
    return pack(to, [encode(to, value, rounding, satfinite=satfinite, relu=relu) for value in values])
