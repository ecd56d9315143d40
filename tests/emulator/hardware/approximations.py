"""The documented errors of approximate instructions, and what hardware's results measure in the same terms.

Limits: PTX ISA 9.1, 9.7.3 (div, rcp, sqrt, rsqrt, sin, cos, lg2, ex2, tanh), 9.7.4 (tanh and ex2 in half precision).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from emulator.hardware.case import Case

__all__ = ["LIMITS", "Limit", "measure"]

_PI = np.pi


@dataclass(frozen=True)
class Limit:
    """One documented bound. measure: "ulp", "relative" or "absolute"; inside: the operands that it is for."""

    measure: str
    bound: float
    inside: Callable[..., np.ndarray] = lambda *x: np.ones(x[0].shape, dtype=bool)
    where: str = "all"


def _between(low: float, high: float) -> Callable[..., np.ndarray]:
    return lambda *x: (np.abs(x[-1]) >= low) & (np.abs(x[-1]) <= high)


def _trigonometric() -> tuple[Limit, ...]:
    return (
        Limit("absolute", 2.0**-20.5, _between(0, 2 * _PI), "[-2 pi, 2 pi]"),
        Limit("absolute", 2.0**-14.7, _between(0, 100 * _PI), "[-100 pi, 100 pi]"),
    )


LIMITS: dict[str, tuple[Limit, ...]] = {
    "div.approx f32": (Limit("ulp", 2, _between(2.0**-126, 2.0**126), "2^-126 <= |b| <= 2^126"),),
    "div.full f32": (Limit("ulp", 2),),
    "rcp.approx f32": (Limit("ulp", 1),),
    "sqrt.approx f32": (Limit("relative", 2.0**-23),),
    "rsqrt.approx f32": (Limit("relative", 2.0**-22.9),),
    "sin.approx f32": _trigonometric(),
    "cos.approx f32": _trigonometric(),
    "lg2.approx f32": (
        Limit("absolute", 2.0**-22, lambda x: (x > 0.5) & (x < 2), "(0.5, 2)"),
        Limit("relative", 2.0**-22, lambda x: (x > 0) & ((x <= 0.5) | (x >= 2)), "outside (0.5, 2)"),
    ),
    "ex2.approx f32": (Limit("ulp", 2),),
    "tanh.approx f32": (Limit("relative", 2.0**-11),),
    "tanh.approx f16": (Limit("absolute", 2.0**-10.987),),
    "tanh.approx bf16": (Limit("absolute", 2.0**-8),),
    "ex2.approx f16": (Limit("relative", 2.0**-9.9),),
    "ex2.approx bf16": (Limit("relative", 2.0**-7),),
    # no bound is documented: 20 bits of the mantissa are looked at
    "rcp.approx f64": (Limit("relative", 2.0**-20),),
    "rsqrt.approx f64": (Limit("relative", 2.0**-20),),
}
_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "div": lambda a, b: a / b, "rcp": lambda a: 1 / a, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
    "sin": np.sin, "cos": np.cos, "lg2": np.log2, "ex2": np.exp2, "tanh": np.tanh,
}  # fmt: skip
# mantissa bits, least normal exponent, least exponent, first exponent that overflows
_RANGES = {
    "f16": (10, -14, -24, 16),
    "bf16": (7, -126, -133, 128),
    "f32": (23, -126, -149, 128),
    "f64": (52, -1022, -1074, 1024),
}


def _numbers(words: np.ndarray, kind: str) -> np.ndarray:
    """Values of an operand or result as long doubles; of packed types both halves."""
    raw = np.ascontiguousarray(words)
    with np.errstate(invalid="ignore"):
        if kind.startswith("f16"):
            return raw.view(np.float16).astype(np.longdouble)
        if kind.startswith("bf16"):
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.longdouble)
        return raw.view(np.float32 if kind == "f32" else np.float64).astype(np.longdouble)


@dataclass(frozen=True)
class Measured:
    """One instruction: errors by limit, as (limit, largest error); special: where only the bits count, [values]."""

    name: str
    errors: list[tuple[Limit, float]]
    special: np.ndarray
    """Where the exact result is a NaN, an infinity or a zero, or is out of range: hardware's bits are the specification."""


def measure(case: Case, row: int, words: np.ndarray) -> Measured:
    """The errors of the results of one row of an approximate case."""
    text = case.rows[row]
    opcode, *modifiers = text.split(".")
    full = modifiers[-1]
    kind = full.removesuffix("x2")
    flushes = "ftz" in modifiers
    mantissa, normal, least, top = _RANGES[kind]
    floor = 2.0**normal
    operands = [_numbers(case.inputs[n], full) for n in "ab"[: len(case.inputs)]]
    if flushes:
        operands = [np.where(np.abs(x) < floor, np.copysign(0.0, x), x) for x in operands]
    with np.errstate(all="ignore"):
        exact = _FUNCTIONS[opcode](*operands)
        got = _numbers(words, full)
        size = np.abs(exact)
        special = (
            ~np.isfinite(exact)
            | (size == 0)
            | (size >= np.longdouble(2.0) ** top)
            | (size < (floor if flushes else np.longdouble(2.0) ** least))
        )
        error = np.abs(got - exact)
        exponent = np.maximum(np.floor(np.log2(np.where(special, 1, size))), normal)
        scaled: dict[str, Any] = {"absolute": error, "relative": error / size, "ulp": error / np.exp2(exponent - mantissa)}
    name = f"{opcode}.{modifiers[0]} {kind}"
    found = []
    for limit in LIMITS[name]:
        inside = ~special & limit.inside(*operands) & (size >= floor if limit.measure == "relative" else True)
        values = scaled[limit.measure][inside]
        worst = np.nan if np.isnan(values).any() else float(values.max(initial=0))
        found.append((limit, worst))
    return Measured(text, found, special)
