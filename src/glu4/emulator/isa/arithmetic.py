"""Floating-point arithmetic: add, sub, mul, fma, div, min, max, abs, neg, the approximations, and their packed forms.

Approximate instructions return the correctly rounded value, which is within every documented error bound; tanh.approx and the
half-precision ones likewise. A kernel must not depend on the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.formats import bf16_bits
from glu4.emulator.isa import alu
from glu4.emulator.isa.registry import Builder, Context, F, Modifiers, Step, U
from glu4.emulator.isa.rounding import (
    LEAST32,
    add_exact,
    bf16_values,
    by_fractions,
    canonical,
    flush,
    fma_to_f32,
    inherit,
    round_to_f32,
    saturate,
    vanishes,
)
from glu4.emulator.lanes import some

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS"]

Array = NDArray[Any]
_FLOATS = ("f32", "f64", "f16", "f16x2", "bf16", "bf16x2", "f32x2")
_MODES = ("rn", "rz", "rm", "rp")
_OUTSIDE = 0x7FF7  # what TMA fills with on request, in f16 and bf16 (recorded from an H100)
_CARRIER = {"f16x2": "b32", "bf16x2": "b32", "f32x2": "b64", "bf16": "b16", "f16": "b16"}


def is_float(mods: Modifiers) -> bool:
    return bool(mods.words) and mods.words[-1] in _FLOATS


# values of a row: one a lane, two of packed types, the lower half first; all are computed alike


def _reader(kind: str) -> Callable[[Split, int], Array]:
    """A function that gives a row's values as float32 (f32, f32x2) or float64."""
    if kind in ("f32", "f64"):
        return lambda w, row: w.r[F][row]
    if kind == "f16":
        return lambda w, row: w.r[F][row].astype(np.float64)
    if kind == "bf16":
        return lambda w, row: bf16_values(w.r[U][row])
    if kind == "f32x2":
        return lambda w, row: w.r[U][row].view(np.float32)
    if kind == "f16x2":
        return lambda w, row: w.r[U][row].view(np.float16).astype(np.float64)
    return lambda w, row: bf16_values(w.r[U][row].view(np.uint16))


def _f16_codes(x: Array) -> Array:
    half = x.astype(np.float16)
    codes = half.view(np.uint16)
    nan = np.isnan(half)
    if some(nan):
        codes = np.where(nan, np.uint16(0x7FFF), codes)
    return codes


def _writer(kind: str) -> Callable[[Split, int, Array], None]:
    """The inverse of `_reader`: rounds to the type and writes the active lanes."""
    one = _f16_codes if kind.startswith("f16") else bf16_bits
    # through integers: copying a float may quiet a NaN
    word = {"f32": np.uint32, "f64": np.uint64, "f32x2": np.uint64}.get(kind)

    def write(w: Split, row: int, values: Array) -> None:
        if word is not None:
            codes: Array = values.view(word) if values.flags.c_contiguous else np.ascontiguousarray(values).view(word)
        else:
            codes = one(values)
            if kind.endswith("x2"):
                codes = codes.view(np.uint32)
        w.put(w.r[U][row], codes)

    return write


def _half_flush(x: Array, kind: str) -> Array:
    least = 2.0**-14 if kind.startswith("f16") else 2.0**-126
    return np.where(np.abs(x) < least, np.copysign(0.0, x), x)


def _round_half(x: Array, kind: str) -> Array:
    """float64 rounded to a half type, as float64."""
    if kind.startswith("f16"):
        return x.astype(np.float16).astype(np.float64)
    return bf16_values(bf16_bits(x))


def _elementwise(
    context: Context, kind: str, count: int, function: Callable[..., Array], ftz: bool, sat: bool, relu: bool
) -> Step:
    """d = function(a, ...), on float32 arrays for f32, on float64 ones for all else."""
    operands = context.operands(count + 1)
    carrier = _CARRIER.get(kind, kind)
    destination = context.destination(operands[0], carrier)
    sources = [context.source(o, carrier) for o in operands[1:]]
    read, write = _reader(kind), _writer(kind)
    half = kind.startswith(("f16", "bf16"))
    single = kind.startswith("f32")

    def finish(x: Array) -> Array:
        if half:
            if not (ftz or relu or sat):
                return x  # which is rounded as it is written
            exact, x = x, _round_half(x, kind)
            if ftz:
                x = _half_flush(x, kind)
                lost = vanishes(exact, x, 2.0**-14, lambda y: _round_half(y, kind))
                x = np.where(lost, np.copysign(0.0, x), x)
            x = np.where(np.isnan(x) | (x > 0), x, 0.0) if relu else x
            return saturate(x) if sat else x
        if ftz:
            x = flush(x)
        if sat:
            return saturate(x)
        return canonical(x) if single else x

    def step(w: Split) -> None:
        values = [read(w, row) for row in sources]
        if ftz:
            values = [_half_flush(v, kind) if half else flush(v) for v in values]
        write(w, destination, finish(function(*values)))

    return step


# add, sub, mul, fma


def _wide(x: Array) -> Array:
    return x.astype(np.float64)


def _add_function(kind: str, mode: str) -> Callable[..., Array]:
    if kind.startswith("f32"):
        if mode == "rn":
            return lambda a, b: a + b

        def single(a: Array, b: Array) -> Array:
            total = round_to_f32(add_exact(_wide(a), _wide(b)), mode)
            if mode == "rm":  # x - x is -0 toward minus infinity
                zero = (total == 0) & ~((a == 0) & (b == 0) & ~np.signbit(a) & ~np.signbit(b))
                total = np.where(zero & np.isfinite(a) & np.isfinite(b) & (_wide(a) + _wide(b) == 0), np.float32(-0.0), total)
            return total

        return single
    if kind == "f64":

        def double(a: Array, b: Array) -> Array:
            total = a + b
            return inherit(total if mode == "rn" else by_fractions(add, (a, b), mode, np.float64, total), b, a)

        return double
    return lambda a, b: add_exact(a, b)


def add(a: Fraction, b: Fraction) -> Fraction:
    return a + b


def _mul_function(kind: str, mode: str) -> Callable[..., Array]:
    if kind.startswith("f32"):
        return (lambda a, b: a * b) if mode == "rn" else (lambda a, b: round_to_f32(_wide(a) * _wide(b), mode))
    if kind == "f64":

        def double(a: Array, b: Array) -> Array:
            product = a * b
            if mode != "rn":
                product = by_fractions(lambda x, y: x * y, (a, b), mode, np.float64, product)
            return inherit(product, b, a)

        return double
    return lambda a, b: a * b


def _fma_function(kind: str, mode: str) -> Callable[..., Array]:
    if kind.startswith("f32"):
        if mode == "rn":
            return fma_to_f32

        def single(a: Array, b: Array, c: Array) -> Array:
            product, wide = _wide(a) * _wide(b), _wide(c)
            total = round_to_f32(add_exact(product, wide), mode)
            if mode == "rm":
                cancels = (product + wide == 0) & ~(~np.signbit(product) & ~np.signbit(wide)) & np.isfinite(product)
                total = np.where(cancels & (total == 0), np.float32(-0.0), total)
            return total

        return single
    if kind == "f64":

        def double(a: Array, b: Array, c: Array) -> Array:
            total = by_fractions(lambda x, y, z: x * y + z, (a, b, c), mode, np.float64, a * b + c)
            if mode == "rm":  # an exact zero of terms that differ in sign is -0
                total = np.where(_cancels(a, b, c, total), -0.0, total)
            return inherit(total, b, c, a)

        return double
    return lambda a, b, c: add_exact(a * b, c)


def _cancels(a: Array, b: Array, c: Array, total: Array) -> Array:
    """Where a * b + c, rounded to `total`, is exactly zero and its terms differ in sign; float64."""
    found = (total == 0) & ((np.signbit(a) ^ np.signbit(b)) != np.signbit(c))
    for i in np.flatnonzero(found):
        found[i] = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i])) == 0
    return np.asarray(found)


def _flushing(function: Callable[..., Array], exact: Callable[..., Array], mode: str) -> Callable[..., Array]:
    """A float32 function under .ftz; exact: the float64 value that it rounds, or rounded to odd."""

    def run(*values: Array) -> Array:
        near = function(*values)
        if some(np.abs(near) == LEAST32):
            lost = vanishes(exact(*map(_wide, values)), near, LEAST32, lambda x: round_to_f32(x, mode))
            near = np.where(lost, np.copysign(np.float32(0.0), near), near)
        return near

    return run


def _qualified(mods: Modifiers) -> tuple[str, bool, bool, bool]:
    """{.rnd}{.ftz}{.sat}{.relu}: (mode, ftz, sat, relu)."""
    mode = mods.choice(_MODES, "rn")
    ftz = mods.take("ftz")
    return mode, ftz, mods.take("sat"), mods.take("relu")


def _zero_outside(context: Context, kind: str, fma: Step) -> Step:
    """fma.oob: +0 where a factor is the NaN that TMA puts out of bounds, of either sign (PTX ISA 9.7.4.4).

    The addend does not count, nor do other NaNs: recorded from an H100 (tests/emulator/hardware, float/oob).
    """
    carrier = _CARRIER[kind]
    d, *sources = context.operands(4)
    destination, rows = context.destination(d, carrier), [context.source(o, carrier) for o in sources[:2]]

    def step(w: Split) -> None:
        outside = np.logical_or.reduce([(w.r[U][row].view(np.uint16) & 0x7FFF) == _OUTSIDE for row in rows])
        fma(w)
        halves = w.r[U][destination].view(np.uint16)
        halves[outside & np.repeat(w.mask, outside.size // 32)] = 0

    return step


def _minus(plus: Callable[..., Array], kind: str) -> Callable[..., Array]:
    if kind == "f64":  # the sign of a NaN stays
        return lambda a, b: plus(a, np.where(np.isnan(b), b, -b))
    return lambda a, b: plus(a, -b)


def _binary(name: str) -> Builder:
    def build(context: Context, mods: Modifiers) -> Step:
        mode, ftz, sat, relu = _qualified(mods)
        outside = name == "fma" and not (ftz or sat or relu) and mods.take("oob")
        relu = relu or (outside and mods.take("relu"))
        kind = mods.choice(_FLOATS)
        _check(mods, kind, mode, ftz, sat, relu, name == "fma")
        if outside:
            if not kind.startswith(("f16", "bf16")):
                raise mods.fail()
            return _zero_outside(context, kind, _elementwise(context, kind, 3, _fma_function(kind, mode), ftz, sat, relu))
        if name == "fma":
            fused = _fma_function(kind, mode)
            if ftz and kind == "f32":
                fused = _flushing(fused, lambda a, b, c: add_exact(a * b, c), mode)
            return _elementwise(context, kind, 3, fused, ftz, sat, relu)
        if name == "mul":
            times = _mul_function(kind, mode)
            if ftz and kind == "f32":
                times = _flushing(times, lambda a, b: a * b, mode)
            return _elementwise(context, kind, 2, times, ftz, sat, relu)
        plus = _add_function(kind, mode)
        function = plus if name == "add" else _minus(plus, kind)
        return _elementwise(context, kind, 2, function, ftz, sat, relu)

    return build


def _check(mods: Modifiers, kind: str, mode: str, ftz: bool, sat: bool, relu: bool, fma: bool) -> None:
    half = kind.startswith(("f16", "bf16"))
    wrong = (half and mode != "rn") or (relu and not (half and fma)) or (ftz and kind in ("f64", "bf16", "bf16x2"))
    if wrong or (sat and kind in ("f64", "bf16", "bf16x2", "f32x2")):
        raise mods.fail()


def _either(integer: Builder, real: Builder) -> Builder:
    """One opcode for integers and floats: the type at the end tells which."""
    return lambda context, mods: (real if is_float(mods) else integer)(context, mods)


# min, max, abs, neg, copysign, testp


def _extreme(name: str) -> Builder:
    smallest = name == "min"

    def build(context: Context, mods: Modifiers) -> Step:
        ftz, with_nan = mods.take("ftz"), mods.take("NaN")
        xorsign = mods.take("xorsign", "abs")
        absolute = not xorsign and mods.take("abs")
        kind = mods.choice(_FLOATS[:6])
        if (kind == "f64" and (ftz or with_nan or xorsign)) or (ftz and kind.startswith("bf16")):
            raise mods.fail()
        count = len(context.instruction.operands) - 1
        if count not in (2, 3) or (count == 3 and (kind != "f32" or xorsign)) or (absolute and count == 2):
            raise context.error("wrong number of operands")

        def two(a: Array, b: Array) -> Array:
            sign = np.signbit(a) ^ np.signbit(b)
            if xorsign or absolute:
                a, b = np.abs(a), np.abs(b)
            first = (a < b) if smallest else (a > b)
            tie = (a == b) & (np.signbit(a) if smallest else ~np.signbit(a))  # -0 is less than +0
            result = np.where(first | tie | np.isnan(b), a, b)
            if kind == "f64":
                result = inherit(result, b, a)
            if with_nan:
                result = np.where(np.isnan(a) | np.isnan(b), np.nan, result).astype(a.dtype)
            return np.where(sign, -np.abs(result), np.abs(result)) if xorsign else result

        function = two if count == 2 else lambda a, b, c: two(two(a, b), c)
        return _elementwise(context, kind, count, function, ftz, False, False)

    return build


def _sign_bits(name: str) -> Builder:
    """abs and neg; a NaN becomes the canonical one, in float64 a quiet one with its sign (an H100's; PTX leaves it open)."""

    def build(context: Context, mods: Modifiers) -> Step:
        ftz = mods.take("ftz")
        kind = mods.choice(_FLOATS[:6])
        carrier = _CARRIER.get(kind, kind)
        d, a = context.operands(2)
        destination, source = context.destination(d, carrier), context.source(a, carrier)
        bits, mantissa = {"f32": (32, 23), "f64": (64, 52), "f16": (16, 10), "bf16": (16, 7)}[kind.removesuffix("x2")]
        word = np.dtype(f"u{bits // 8}").type
        sign, quiet = word(1 << (bits - 1)), word(1 << (mantissa - 1))
        infinity = sign - word(1 << mantissa)

        def step(w: Split) -> None:
            row = w.r[U][source]
            values = row.view(word)
            magnitude = values & ~sign
            if ftz:
                values = np.where(magnitude < word(1 << mantissa), values & sign, values)
            result = values ^ sign if name == "neg" else values & ~sign
            nan = magnitude > infinity
            if nan.any():
                result = np.where(nan, values | quiet if kind == "f64" else ~sign, result)
            w.put(w.r[U][destination], result.view(row.dtype))

        return step

    return build


def _copysign(context: Context, mods: Modifiers) -> Step:
    kind = mods.choice(("f32", "f64"))
    d, a, b = context.operands(3)
    destination, source, other = context.destination(d, kind), context.source(a, kind), context.source(b, kind)
    sign: Any = np.array(1 << (31 if kind == "f32" else 63), dtype=np.uint32 if kind == "f32" else np.uint64)

    def step(w: Split) -> None:
        r = w.r[U]
        w.put(r[destination], (r[other] & ~sign) | (r[source] & sign))

    return step


def _testp(context: Context, mods: Modifiers) -> Step:
    test = mods.choice(("finite", "infinite", "number", "notanumber", "normal", "subnormal"))
    kind = mods.choice(("f32", "f64"))
    p, a = context.operands(2)
    destination, source = context.destination(p, "pred"), context.source(a, kind)
    least = 2.0**-126 if kind == "f32" else 2.0**-1022
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & ((np.abs(x) >= least) | (x == 0)),  # zeros are (PTX ISA 9.7.3.1)
        "subnormal": lambda x: (np.abs(x) < least) & (x != 0),
    }
    function = tests[test]
    return lambda w: w.put(w.r[U][destination], function(w.r[F][source]))


# division, roots and approximations


def _exact_sqrt(x: Array, mode: str, kind: Any) -> Array:
    """Square root in a direction: to nearest, then one step where its square shows it to be on the wrong side."""
    near = np.sqrt(x)
    if mode == "rn":
        return near
    out = near.copy()
    for i, value in enumerate(x):
        if np.isfinite(value) and value > 0:
            square, exact = Fraction(float(near[i])) ** 2, Fraction(float(value))
            if mode in ("rz", "rm") and square > exact:
                out[i] = np.nextafter(near[i], kind(0))
            elif mode == "rp" and square < exact:
                out[i] = np.nextafter(near[i], kind(np.inf))
    return out


def _div(context: Context, mods: Modifiers) -> Step:
    form = mods.choice(("approx", "full", *_MODES))
    ftz = mods.take("ftz")
    kind = mods.choice(("f32", "f64") if form in _MODES else ("f32",))
    if ftz and kind == "f64":
        raise mods.fail()
    if form in ("rz", "rm", "rp"):
        real = np.float32 if kind == "f32" else np.float64

        def function(a: Array, b: Array) -> Array:
            return by_fractions(lambda x, y: x / y, (a, b), form, real, a / b)
    else:
        function = _fast_divide if form == "approx" else lambda a, b: a / b
    if kind == "f64":
        plain = function
        function = lambda a, b: inherit(plain(a, b), a, b)  # noqa: E731
    elif ftz and form in _MODES:
        function = _flushing(function, lambda a, b: a / b, form)
    return _elementwise(context, kind, 2, function, ftz, False, False)


def _fast_divide(a: Array, b: Array) -> Array:
    """div.approx: as a * (1 / b), whose reciprocal of a huge b is zero (PTX ISA 9.7.3.8)."""
    huge = (np.abs(b) > np.float32(2.0**126)) & np.isfinite(b)
    return np.where(huge, a * np.copysign(np.float32(0.0), b), a / b)


def _gross(context: Context, function: Callable[[Array], Array]) -> Step:
    """rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64: of the upper 32 bits, to the upper 32 bits (PTX ISA 9.7.3.14, 9.7.3.17)."""
    d, a = context.operands(2)
    destination, source = context.destination(d, "f64"), context.source(a, "f64")
    upper = np.uint64(0xFFFFFFFF00000000)

    def flat(x: Array) -> Array:
        return np.where(np.abs(x) < 2.0**-1022, np.copysign(0.0, x), x)

    def step(w: Split) -> None:
        value = flat(function(flat((w.r[U][source] & upper).view(np.float64))))
        bits = np.where(np.isnan(value), np.uint64(0x7FFFFFFF00000000), value.view(np.uint64) & upper)
        w.put(w.r[U][destination], bits)

    return step


def _reciprocal(root: bool) -> Builder:
    def build(context: Context, mods: Modifiers) -> Step:
        form = mods.choice(("approx", *_MODES))
        ftz = mods.take("ftz")
        kind = mods.choice(("f32", "f64"))
        if kind == "f64" and form == "approx" and ftz and not root:
            return _gross(context, lambda a: 1.0 / a)
        if kind == "f64" and (form == "approx" or ftz):
            raise mods.fail()
        real = np.float32 if kind == "f32" else np.float64
        if root:
            mode = "rn" if form == "approx" else form
            return _elementwise(context, kind, 1, lambda a: _exact_sqrt(a, mode, real), ftz, False, False)
        if form in ("approx", "rn"):
            return _elementwise(context, kind, 1, lambda a: real(1) / a, ftz, False, False)
        return _elementwise(
            context, kind, 1, lambda a: by_fractions(lambda x: 1 / x, (a,), form, real, real(1) / a), ftz, False, False
        )

    return build


def _tanh(x: Array) -> Array:
    return np.tanh(x)


def _half_exp2(x: Array) -> Array:
    """ex2.approx.f16: subnormal results are cut off, not rounded, as on an H100."""
    y = np.exp2(x)
    return np.where(y < 2.0**-14, np.floor(y * 2.0**24) * 2.0**-24, y)


_APPROXIMATE: dict[str, tuple[Callable[[Array], Array], tuple[str, ...]]] = {
    "sin": (np.sin, ("f32",)),
    "cos": (np.cos, ("f32",)),
    "lg2": (np.log2, ("f32",)),
    "ex2": (np.exp2, ("f32", "f16", "f16x2", "bf16", "bf16x2")),
    "tanh": (_tanh, ("f32", "f16", "f16x2", "bf16", "bf16x2")),
    "rsqrt": (lambda x: 1.0 / np.sqrt(x), ("f32", "f64")),
}


def _approximate(name: str) -> Builder:
    function, kinds = _APPROXIMATE[name]

    def build(context: Context, mods: Modifiers) -> Step:
        if not mods.take("approx"):
            raise mods.fail()
        ftz = mods.take("ftz")
        kind = mods.choice(kinds)
        if ftz and kind == "f64":
            return _gross(context, function)
        if (ftz and kind in ("f16", "f16x2")) or (name == "ex2" and kind.startswith("bf16") and not ftz):
            raise mods.fail()
        if kind == "f32":
            return _elementwise(context, kind, 1, lambda a: function(_wide(a)).astype(np.float32), ftz, False, False)
        if name == "ex2" and kind.startswith("f16"):
            return _elementwise(context, kind, 1, _half_exp2, ftz, False, False)
        return _elementwise(context, kind, 1, function, ftz, False, False)

    return build


INSTRUCTIONS: dict[str, Builder] = {
    "add": _either(alu.INTEGER["add"], _binary("add")),
    "sub": _either(alu.INTEGER["sub"], _binary("sub")),
    "mul": _either(alu.INTEGER["mul"], _binary("mul")),
    "mad": _either(alu.INTEGER["mad"], _binary("fma")),
    "fma": _binary("fma"),
    "div": _either(alu.INTEGER["div"], _div),
    "min": _either(alu.INTEGER["min"], _extreme("min")),
    "max": _either(alu.INTEGER["max"], _extreme("max")),
    "abs": _either(alu.INTEGER["abs"], _sign_bits("abs")),
    "neg": _either(alu.INTEGER["neg"], _sign_bits("neg")),
    "copysign": _copysign,
    "testp": _testp,
    "rcp": _reciprocal(False),
    "sqrt": _reciprocal(True),
    **{name: _approximate(name) for name in _APPROXIMATE},
}
