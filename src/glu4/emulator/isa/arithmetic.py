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

from glu4.emulator.isa import alu
from glu4.emulator.isa.registry import Builder, Context, F, Modifiers, Step, U
from glu4.emulator.isa.rounding import (
    add_exact,
    bf16_bits,
    bf16_values,
    by_fractions,
    canonical,
    flush,
    round_to_f32,
    saturate,
)

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS"]

Array = NDArray[Any]
_FLOATS = ("f32", "f64", "f16", "f16x2", "bf16", "bf16x2", "f32x2")
_MODES = ("rn", "rz", "rm", "rp")
_CARRIER = {"f16x2": "b32", "bf16x2": "b32", "f32x2": "b64", "bf16": "b16", "f16": "b16"}


def is_float(mods: Modifiers) -> bool:
    return bool(mods.words) and mods.words[-1] in _FLOATS


# values of a row, as parts that are computed alike


def _parts(kind: str) -> Callable[[Split, int], list[Array]]:
    """A function that gives a row's values: float32 or float64 arrays, two of them for packed types."""
    if kind in ("f32", "f64"):
        return lambda w, row: [w.r[F][row]]
    if kind == "f16":
        return lambda w, row: [w.r[F][row].astype(np.float64)]
    if kind == "bf16":
        return lambda w, row: [bf16_values(w.r[U][row])]

    def packed(w: Split, row: int) -> list[Array]:
        words = w.r[U][row]
        if kind == "f32x2":
            pair = words.view(np.float32).reshape(-1, 2)
            return [pair[:, 0], pair[:, 1]]
        if kind == "f16x2":
            pair = words.view(np.float16).reshape(-1, 2).astype(np.float64)
            return [pair[:, 0], pair[:, 1]]
        halves: Any = words.view(np.uint16).reshape(-1, 2)
        return [bf16_values(halves[:, 0]), bf16_values(halves[:, 1])]

    return packed


def _f16_codes(x: Array) -> Array:
    half = x.astype(np.float16)
    codes = half.view(np.uint16)
    nan = np.isnan(half)
    if nan.any():
        codes = np.where(nan, np.uint16(0x7FFF), codes)
    return codes


def _writer(kind: str) -> Callable[[Split, int, list[Array]], None]:
    """The inverse of `_parts`: rounds to the type and writes the active lanes."""

    def write(w: Split, row: int, parts: list[Array]) -> None:
        target = w.r[F][row] if kind in ("f32", "f64") else w.r[U][row]
        if kind in ("f32", "f64"):
            # through integers: copying a float may quiet a NaN
            bits = np.ascontiguousarray(parts[0]).view(np.uint32 if kind == "f32" else np.uint64)
            np.copyto(w.r[U][row], bits, where=w.mask)
            return
        if kind == "f32x2":
            codes = np.stack(parts, axis=1).view(np.uint64)[:, 0]
        elif kind in ("f16", "bf16"):
            codes = (_f16_codes if kind == "f16" else bf16_bits)(parts[0])
        else:
            one = _f16_codes if kind == "f16x2" else bf16_bits
            codes = one(parts[0]).astype(np.uint32) | (one(parts[1]).astype(np.uint32) << np.uint32(16))
        np.copyto(target, codes, where=w.mask)

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
    read, write = _parts(kind), _writer(kind)
    half = kind.startswith(("f16", "bf16"))
    single = kind.startswith("f32")

    def finish(x: Array) -> Array:
        if half:
            x = _round_half(x, kind)
            x = _half_flush(x, kind) if ftz else x
            x = np.where(np.isnan(x) | (x > 0), x, 0.0) if relu else x
            return saturate(x) if sat else x
        if ftz:
            x = flush(x)
        if sat:
            return saturate(x)
        return canonical(x) if single else x

    def step(w: Split) -> None:
        inputs = [read(w, row) for row in sources]
        out: list[Array] = []
        for values in zip(*inputs):
            if ftz:
                values = tuple(_half_flush(v, kind) if half else flush(v) for v in values)
            out.append(finish(function(*values)))
        write(w, destination, out)

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
        return lambda a, b: a + b if mode == "rn" else by_fractions(add, (a, b), mode, np.float64, a + b)
    return lambda a, b: add_exact(a, b)


def add(a: Fraction, b: Fraction) -> Fraction:
    return a + b


def _mul_function(kind: str, mode: str) -> Callable[..., Array]:
    if kind.startswith("f32"):
        return (lambda a, b: a * b) if mode == "rn" else (lambda a, b: round_to_f32(_wide(a) * _wide(b), mode))
    if kind == "f64" and mode != "rn":
        return lambda a, b: by_fractions(lambda x, y: x * y, (a, b), mode, np.float64, a * b)
    return lambda a, b: a * b


def _fma_function(kind: str, mode: str) -> Callable[..., Array]:
    if kind.startswith("f32"):

        def single(a: Array, b: Array, c: Array) -> Array:
            product, wide = _wide(a) * _wide(b), _wide(c)
            total = round_to_f32(add_exact(product, wide), mode)
            if mode == "rm":
                cancels = (product + wide == 0) & ~(~np.signbit(product) & ~np.signbit(wide)) & np.isfinite(product)
                total = np.where(cancels & (total == 0), np.float32(-0.0), total)
            return total

        return single
    if kind == "f64":
        return lambda a, b, c: by_fractions(lambda x, y, z: x * y + z, (a, b, c), mode, np.float64, a * b + c)
    return lambda a, b, c: add_exact(a * b, c)


def _qualified(mods: Modifiers) -> tuple[str, bool, bool, bool]:
    """{.rnd}{.ftz}{.sat}{.relu}: (mode, ftz, sat, relu)."""
    mode = mods.choice(_MODES, "rn")
    ftz = mods.take("ftz")
    return mode, ftz, mods.take("sat"), mods.take("relu")


def _binary(name: str) -> Builder:
    def build(context: Context, mods: Modifiers) -> Step:
        mode, ftz, sat, relu = _qualified(mods)
        kind = mods.choice(_FLOATS)
        _check(mods, kind, mode, ftz, sat, relu, name == "fma")
        if name == "fma":
            return _elementwise(context, kind, 3, _fma_function(kind, mode), ftz, sat, relu)
        if name == "mul":
            return _elementwise(context, kind, 2, _mul_function(kind, mode), ftz, sat, relu)
        plus = _add_function(kind, mode)
        function = plus if name == "add" else lambda a, b: plus(a, -b)
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
            if with_nan:
                result = np.where(np.isnan(a) | np.isnan(b), np.nan, result).astype(a.dtype)
            return np.where(sign, -np.abs(result), np.abs(result)) if xorsign else result

        function = two if count == 2 else lambda a, b, c: two(two(a, b), c)
        return _elementwise(context, kind, count, function, ftz, False, False)

    return build


def _sign_bits(name: str) -> Builder:
    """abs and neg work on the bits, so that a NaN keeps its payload."""

    def build(context: Context, mods: Modifiers) -> Step:
        ftz = mods.take("ftz")
        kind = mods.choice(_FLOATS[:6])
        bits = {"f32": 32, "f64": 64, "f16": 16, "bf16": 16}.get(kind, 32)
        carrier = _CARRIER.get(kind, kind)
        d, a = context.operands(2)
        destination, source = context.destination(d, carrier), context.source(a, carrier)
        sign = 0x80008000 if kind.endswith("x2") else 1 << (bits - 1)
        word = np.array(sign, dtype=f"u{bits // 8}")

        def step(w: Split) -> None:
            values = w.r[U][source]
            if ftz and kind == "f32":
                values = flush(w.r[F][source]).view(np.uint32)
            np.copyto(w.r[U][destination], values ^ word if name == "neg" else values & ~word, where=w.mask)

        return step

    return build


def _copysign(context: Context, mods: Modifiers) -> Step:
    kind = mods.choice(("f32", "f64"))
    d, a, b = context.operands(3)
    destination, source, other = context.destination(d, kind), context.source(a, kind), context.source(b, kind)
    sign: Any = np.array(1 << (31 if kind == "f32" else 63), dtype=np.uint32 if kind == "f32" else np.uint64)

    def step(w: Split) -> None:
        r = w.r[U]
        np.copyto(r[destination], (r[other] & ~sign) | (r[source] & sign), where=w.mask)

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
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= least),
        "subnormal": lambda x: (np.abs(x) < least) & (x != 0),
    }
    function = tests[test]
    return lambda w: np.copyto(w.r[U][destination], function(w.r[F][source]), where=w.mask)


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
        return _elementwise(
            context, kind, 2, lambda a, b: by_fractions(lambda x, y: x / y, (a, b), form, real, a / b), ftz, False, False
        )
    return _elementwise(context, kind, 2, lambda a, b: a / b, ftz, False, False)


def _reciprocal(root: bool) -> Builder:
    def build(context: Context, mods: Modifiers) -> Step:
        form = mods.choice(("approx", *_MODES))
        ftz = mods.take("ftz")
        kind = mods.choice(("f32", "f64"))
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
        if (ftz and kind in ("f16", "f16x2", "f64")) or (name == "ex2" and kind.startswith("bf16") and not ftz):
            raise mods.fail()
        if kind == "f32":
            return _elementwise(context, kind, 1, lambda a: function(_wide(a)).astype(np.float32), ftz, False, False)
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
