"""Floating-point arithmetic in every rounding, comparisons, and the approximations."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from emulator.hardware.case import COUNT, Case, Form, elementwise, forms

__all__ = ["cases"]

MODES = ("rn", "rz", "rm", "rp")


def _single() -> list[Form]:
    found: list[Form] = []
    variants = [f"{m}{f}{s}" for m, f, s in product(MODES, ("", ".ftz"), ("", ".sat"))]
    for op in ("add", "sub", "mul"):
        found += forms(op, [f"{op}.{v}.f32" for v in variants], "32", "f32 f32")
        found += forms(op, [f"{op}.{m}.f64" for m in MODES], "64", "f64 f64")
    found += forms("fma", [f"fma.{v}.f32" for v in variants], "32", "f32 f32 f32")
    found += forms("fma", [f"mad.{m}.f32" for m in MODES], "32", "f32 f32 f32")
    found += forms("fma", [f"fma.{m}.f64" for m in MODES], "64", "f64 f64 f64")
    ftz = [f"{m}{f}" for m, f in product(MODES, ("", ".ftz"))]
    found += forms("div", [f"div.{v}.f32" for v in ftz], "32", "f32 f32")
    found += forms("div", [f"div.{m}.f64" for m in MODES], "64", "f64 f64")
    for op in ("rcp", "sqrt"):
        found += forms(op, [f"{op}.{v}.f32" for v in ftz], "32", "f32")
        found += forms(op, [f"{op}.{m}.f64" for m in MODES], "64", "f64")
    return found


def _extremes() -> list[Form]:
    found: list[Form] = []
    for op in ("min", "max"):
        variants = [f"{f}{n}{x}" for f, n, x in product(("", ".ftz"), ("", ".NaN"), ("", ".xorsign.abs"))]
        found += forms("extreme", [f"{op}{v}.f32" for v in variants], "32", "f32 f32")
        found += forms("extreme", f"{op}.f64", "64", "f64 f64")
        found += forms("extreme", [f"{op}{v}.f16" for v in variants], "16", "f16 f16")
        found += forms("extreme", [f"{op}{v}.f16x2" for v in variants], "32", "f16x2 f16x2")
        plain = [v for v in variants if "ftz" not in v]
        found += forms("extreme", [f"{op}{v}.bf16" for v in plain], "16", "bf16 bf16")
        found += forms("extreme", [f"{op}{v}.bf16x2" for v in plain], "32", "bf16x2 bf16x2")
    return found


def _signs() -> list[Form]:
    found: list[Form] = []
    for op in ("abs", "neg"):
        found += forms("sign", f"{op}.f32 {op}.ftz.f32", "32", "f32")
        found += forms("sign", f"{op}.f64", "64", "f64")
        found += forms("sign", f"{op}.f16 {op}.ftz.f16", "16", "f16")
        found += forms("sign", f"{op}.f16x2 {op}.ftz.f16x2", "32", "f16x2")
        found += forms("sign", f"{op}.bf16", "16", "bf16")
        found += forms("sign", f"{op}.bf16x2", "32", "bf16x2")
    found += forms("copysign", "copysign.f32", "32", "f32 f32") + forms("copysign", "copysign.f64", "64", "f64 f64")
    tests = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    found += forms("testp", [f"testp.{t}.f32" for t in tests], "p", "f32")
    return found + forms("testp", [f"testp.{t}.f64" for t in tests], "p", "f64")


def _halves() -> list[Form]:
    found: list[Form] = []
    for kind, bits in (("f16", "16"), ("f16x2", "32")):
        variants = [f".rn{f}{s}" for f, s in product(("", ".ftz"), ("", ".sat"))]
        for op in ("add", "sub", "mul"):
            found += forms("half", [f"{op}{v}.{kind}" for v in variants], bits, f"{kind} {kind}")
        variants += [".rn.relu", ".rn.ftz.relu", ".rn.oob", ".rn.oob.relu"]
        found += forms("half-fma", [f"fma{v}.{kind}" for v in variants], bits, f"{kind} {kind} {kind}")
    for kind, bits in (("bf16", "16"), ("bf16x2", "32")):
        found += forms("half", [f"{op}.rn.{kind}" for op in ("add", "sub", "mul")], bits, f"{kind} {kind}")
        variants = [f"fma.rn{v}.{kind}" for v in ("", ".relu", ".oob", ".oob.relu")]
        found += forms("half-fma", variants, bits, f"{kind} {kind} {kind}")
    return found


_ORDERED = ("eq", "ne", "lt", "le", "gt", "ge")
_UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")


def _comparisons() -> list[Form]:
    found: list[Form] = []
    for bits in ("16", "32", "64"):
        names = [f"setp.{c}.{t}{bits}" for t in "us" for c in _ORDERED] + [f"setp.{c}.b{bits}" for c in ("eq", "ne")]
        names += [f"setp.{c}.u{bits}" for c in ("lo", "ls", "hi", "hs")]
        found += forms("setp", names, "p", f"i{bits} i{bits}")
    for kind in ("f32", "f64", "f16", "bf16"):
        words = [f"setp.{c}.{kind}" for c in (*_ORDERED, *_UNORDERED)]
        if kind in ("f32", "f16"):
            words += [f"setp.{c}.ftz.{kind}" for c in (*_ORDERED, *_UNORDERED)]
        found += forms("setp", words, "p", f"{kind} {kind}")
    both = "{{ .reg .pred %x, %y; .reg .b32 %u; setp.{w} %x|%y, %a, %b{q}; selp.u32 %d, 1, 0, %x; selp.u32 %u, 2, 0, %y; or.b32 %d, %d, %u; }}"
    for kind in ("f16x2", "bf16x2"):
        texts = [both.format(w=f"{c}.{kind}", q="") for c in (*_ORDERED, *_UNORDERED)]
        found += forms("setp-both", texts, "32", f"{kind} {kind}")
    texts = [both.format(w=f"lt.{op}.f32", q=q) for op in ("and", "or", "xor") for q in (", %c", ", !%c")]
    texts += [both.format(w=f"ge.{op}.s32", q=", %c") for op in ("and", "or", "xor")]
    found += forms("setp-both", texts, "32", "f32 f32 p")
    for kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
        for result, bits in (
            ("u32", "32"),
            ("s32", "32"),
            ("f32", "32"),
            ("f16", "16"),
            ("bf16", "16"),
            ("f16x2", "32"),
            ("bf16x2", "32"),
        ):
            if _settable(result, kind):
                found += forms(
                    "set", [f"set.{c}.{result}.{kind}" for c in ("eq", "ne", "ltu", "ge", "nan")], bits, f"{kind} {kind}"
                )
    found += forms(
        "set", [f"set.{c}.{r}.{t}32" for c in _ORDERED for r in ("u32", "s32", "f32") for t in "us"], "32", "i32 i32"
    )
    return found + forms("set-bool", [f"set.lt.{op}.u32.f32" for op in ("and", "or", "xor")], "32", "f32 f32 p")


def _settable(result: str, kind: str) -> bool:
    if kind.endswith("x2"):
        return result == kind
    if kind in ("f16", "bf16"):
        return result in (kind, "u32", "s32")
    return result in ("u32", "s32", "f32")


def _approximate() -> list[Form]:
    """Forms whose error alone is documented; extra: (function, measure, limit) as test_hardware reads them."""
    found: list[Form] = []
    for name in ("rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2"):
        found += forms(name, f"{name}.approx.f32 {name}.approx.ftz.f32", "32", "f32")
    found += forms("tanh", "tanh.approx.f32", "32", "f32")
    found += forms("div", "div.approx.f32 div.approx.ftz.f32 div.full.f32 div.full.ftz.f32", "32", "f32 f32")
    for name in ("tanh", "ex2"):
        for kind, bits in (("f16", "16"), ("f16x2", "32"), ("bf16", "16"), ("bf16x2", "32")):
            ftz = ".ftz" if name == "ex2" and kind.startswith("b") else ""
            found += forms(f"{name}-half", f"{name}.approx{ftz}.{kind}", bits, kind)
    found += forms("double", "rcp.approx.ftz.f64 rsqrt.approx.f64 rsqrt.approx.ftz.f64", "64", "f64")
    return found


_OUTSIDE = (0x7FF7, 0xFFF7, 0x7FF6, 0x7FF8, 0x7FFF, 0xFFFF)  # the NaN that TMA fills with, and its neighbours


def _outside() -> list[Case]:
    """fma.oob on the NaN that it looks for, which random operands do not meet."""
    found: list[Form] = []
    for kind, bits in (("f16", "16"), ("bf16", "16"), ("f16x2", "32"), ("bf16x2", "32")):
        found += forms("oob", [f"fma.rn.oob{relu}.{kind}" for relu in ("", ".relu")], bits, f"{kind} {kind} {kind}")

    def make(plain: Case) -> Case:
        def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
            arrays = plain.make(rng)
            for array in arrays.values():
                halves = array.view(np.uint16)
                chosen = rng.random(halves.size) < 0.2
                halves[chosen] = rng.choice(np.array(_OUTSIDE, np.uint16), int(chosen.sum()))
            return arrays

        return replace(plain, make=inputs)

    return [make(case) for case in elementwise("float", found)]


def _border_pairs(digits: int, least: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Factors of `digits` bits whose products lie within some units of 2^least, as float64."""
    a = rng.integers(1 << digits - 1, 1 << digits, COUNT)
    b = (1 << 2 * digits - 1) // a + rng.integers(-1, 2, COUNT)
    sign = rng.choice([-1.0, 1.0], (2, COUNT))
    split = (least - 2 * digits + 1) // 2
    return sign[0] * np.ldexp(a.astype(np.float64), split), sign[1] * np.ldexp(
        b.astype(np.float64), least - 2 * digits + 1 - split
    )


def _flushes() -> list[Case]:
    """.ftz where a result is rounded to the least normal number: products, quotients and conversions on both sides of it."""
    both = [f"{m}.ftz.f32" for m in MODES]
    single = forms("flush", [f"mul.{v}" for v in both], "32", "f32 f32")
    single += forms("flush", [f"{{ .reg .b32 %z; mov.b32 %z, 0; fma.{v} %d, %a, %b, %z; }}" for v in both], "32", "f32 f32")
    quotients = forms("flush-div", [f"div.{v}" for v in both], "32", "f32 f32")
    half = forms(
        "flush", ["mul.rn.ftz.f16", "{ .reg .b16 %z; mov.b16 %z, 0; fma.rn.ftz.f16 %d, %a, %b, %z; }"], "16", "f16 f16"
    )
    narrow = forms("flush", [f"cvt.{v}.f64" for v in both], "32", "f64")

    def products(rng: np.random.Generator) -> dict[str, np.ndarray]:
        a, b = _border_pairs(24, -126, rng)
        return {"a": a.astype(np.float32).view(np.uint32), "b": b.astype(np.float32).view(np.uint32)}

    def quotient(rng: np.random.Generator) -> dict[str, np.ndarray]:
        n = (1 << 24) - rng.integers(0, 40, COUNT)
        a = np.ldexp(rng.choice([-1.0, 1.0], COUNT) * (n - rng.integers(0, 3, COUNT)), -149)
        b = np.ldexp(n.astype(np.float64), -23)
        return {"a": a.astype(np.float32).view(np.uint32), "b": b.astype(np.float32).view(np.uint32)}

    def halves(rng: np.random.Generator) -> dict[str, np.ndarray]:
        a, b = _border_pairs(11, -14, rng)
        return {"a": a.astype(np.float16).view(np.uint16), "b": b.astype(np.float16).view(np.uint16)}

    def near(rng: np.random.Generator) -> dict[str, np.ndarray]:
        away = np.ldexp(rng.choice([-1.0, 1.0], COUNT) * rng.uniform(0.5, 1, COUNT).round(3), rng.integers(-53, -21, COUNT))
        return {"a": (rng.choice([-1.0, 1.0], COUNT) * np.ldexp(1 + away, -126)).view(np.uint64)}

    made = elementwise("float", [*single, *quotients, *half, *narrow])
    return [replace(case, make=make) for case, make in zip(made, (products, quotient, halves, near), strict=True)]


def cases() -> list[Case]:
    table = [*_single(), *_extremes(), *_signs(), *_halves()]
    return [
        *elementwise("float", table),
        *_outside(),
        *_flushes(),
        *elementwise("compare", _comparisons()),
        *elementwise("approximate", _approximate(), count=512, compare="approximate"),
    ]
