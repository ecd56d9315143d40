"""Floating-point arithmetic: every rounding against the C library, halves and approximations against exact values."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from emulator.runner import libm, op

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # signalling NaNs
NAN = 0x7FFFFFFF
MODES = ("rn", "rz", "rm", "rp")
EDGE32 = np.array([0x0, 0x80000000, 0x3F800000, 0xBF800000, 0x1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000,
                   0xFF800000, 0x7FC12345, 0xFFA00001, 0x34000000, 0x4B800001], dtype=np.uint32).view(np.float32)  # fmt: skip


def floats(count: int, dtype: type = np.float32, seed: int = 0) -> list[np.ndarray]:
    """`count` columns: all pairs of edges, then random values of near exponents, so that rounding and cancelling happen."""
    rng = np.random.default_rng(seed)
    edges = EDGE32.astype(dtype) if dtype is not np.float32 else EDGE32
    grid = np.meshgrid(edges, edges, indexing="ij")
    columns = [grid[0].ravel(), grid[1].ravel(), grid[1].ravel()[::-1]][:count]
    extra = [(rng.uniform(-2, 2, 400) * 2.0 ** rng.integers(-12, 13, 400)).astype(dtype) for _ in range(count)]
    return [np.concatenate((c, e)) for c, e in zip(columns, extra)]


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits; NaN in float32 is the one that PTX returns."""
    raw = expected.view(f"u{expected.itemsize}").copy()
    nan = np.isnan(expected)
    if expected.dtype == np.float32:
        raw[nan] = NAN
        np.testing.assert_array_equal(got, raw)
    else:
        np.testing.assert_array_equal(got[~nan], raw[~nan])
        assert np.isnan(got.view(expected.dtype)[nan]).all()


@pytest.mark.parametrize("mode", MODES)
def test_fma(mode: str) -> None:
    a, b, c = floats(3)
    same(op(f"fma.{mode}.f32 %d, %a, %b, %c;", "f32", ("f32", a), ("f32", b), ("f32", c)), libm("fmaf", mode, a, b, c))
    a, b, c = (x[::5] for x in floats(3, np.float64, 1))
    same(op(f"fma.{mode}.f64 %d, %a, %b, %c;", "f64", ("f64", a), ("f64", b), ("f64", c)), libm("fma", mode, a, b, c))


@pytest.mark.parametrize("exponent", [0, -100, -126], ids=["normal", "small", "subnormal"])
def test_fma_just_beside_halfway(exponent: int) -> None:
    """c plus half a unit of its last place and a hair more or less, which float64 does not hold."""
    rng = np.random.default_rng(exponent % 7)
    units = rng.integers(1 if exponent == -126 else 2**23, 2**23 if exponent == -126 else 2**24, 400).astype(np.float64)
    c = np.ldexp(units, exponent - 23).astype(np.float32)
    scale = 2.0 ** ((exponent - 24) / 2)
    a = (rng.choice([-scale, scale], 400) * (1 + 2.0**-23)).astype(
        np.float32
    )  # a b is half (1 - 2^-46), or half (1 + 2^-22 + 2^-46)
    b = (scale * (1 + rng.choice([-1, 1], 400) * 2.0**-23)).astype(np.float32)
    right = libm("fmaf", "rn", a, b, c)
    same(op("fma.rn.f32 %d, %a, %b, %c;", "f32", ("f32", a), ("f32", b), ("f32", c)), right)
    twice = (a.astype(np.float64) * b + c.astype(np.float64)).astype(np.float32)
    assert (twice != right).sum() > 50


@pytest.mark.parametrize("mode", MODES)
def test_add_and_mul(mode: str) -> None:
    a, b = floats(2)
    one = np.ones_like(a)
    same(op(f"add.{mode}.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", b)), libm("fmaf", mode, a, one, b))
    same(op(f"sub.{mode}.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", b)), libm("fmaf", mode, b, -one, a))
    # plus a zero of the product's own sign, which changes nothing
    zero = np.copysign(np.float32(0.0), np.where(np.signbit(a) != np.signbit(b), np.float32(-1), np.float32(1)))
    same(op(f"mul.{mode}.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", b)), libm("fmaf", mode, a, b, zero))
    a, b = (x[::5] for x in floats(2, np.float64))
    one = np.ones_like(a)
    same(op(f"add.{mode}.f64 %d, %a, %b;", "f64", ("f64", a), ("f64", b)), libm("fma", mode, a, one, b))
    zero = np.copysign(0.0, np.where(np.signbit(a) != np.signbit(b), -1.0, 1.0))
    same(op(f"mul.{mode}.f64 %d, %a, %b;", "f64", ("f64", a), ("f64", b)), libm("fma", mode, a, b, zero))


@pytest.mark.parametrize("mode", MODES)
def test_square_root(mode: str) -> None:
    (a,) = floats(1)
    same(op(f"sqrt.{mode}.f32 %d, %a;", "f32", ("f32", a)), libm("sqrtf", mode, a))
    a = a.astype(np.float64)[::3]
    same(op(f"sqrt.{mode}.f64 %d, %a;", "f64", ("f64", a)), libm("sqrt", mode, a))


def right_side(near: float, exact: Fraction, mode: str, dtype: type) -> bool:
    """Whether a result is the neighbour of an exact value that a direction asks for."""
    value = Fraction(near)
    if value == exact:
        return True
    up = dtype(np.nextafter(dtype(near), dtype(np.inf)))
    down = dtype(np.nextafter(dtype(near), dtype(-np.inf)))
    if mode == "rp" or (mode == "rz" and exact < 0):
        return value > exact > Fraction(float(down))
    if mode == "rm" or mode == "rz":
        return value < exact < Fraction(float(up))
    gap = abs(value - exact)
    return all(gap <= abs(Fraction(float(n)) - exact) for n in (up, down) if math.isfinite(n))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_division(mode: str, kind: str) -> None:
    dtype = np.float32 if kind == "f32" else np.float64
    rng = np.random.default_rng(4)
    a, b = ((rng.uniform(1, 4, 150) * rng.choice([-1, 1], 150)).astype(dtype) for _ in range(2))
    got = op(f"div.{mode}.{kind} %d, %a, %b;", kind, (kind, a), (kind, b)).view(dtype)
    assert all(right_side(float(g), Fraction(float(x)) / Fraction(float(y)), mode, dtype) for g, x, y in zip(got, a, b))
    got = op(f"rcp.{mode}.{kind} %d, %a;", kind, (kind, a)).view(dtype)
    assert all(right_side(float(g), 1 / Fraction(float(x)), mode, dtype) for g, x in zip(got, a))


def test_division_of_edges() -> None:
    a = np.array([0, 1, -1, np.inf, 0, np.nan], dtype=np.float32)
    b = np.array([0, 0, -0.0, np.inf, 1, 1], dtype=np.float32)
    expected = np.array([np.nan, np.inf, np.inf, np.nan, 0, np.nan], dtype=np.float32)
    for form in ("rn", "rz", "approx", "full"):
        same(op(f"div.{form}.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", b)), expected)


def test_flush_and_saturate() -> None:
    tiny, least = np.float32(1e-40), np.float32(2.0**-126)
    a = np.array([tiny, -tiny, least, 1, 2, -3, np.nan, np.inf], dtype=np.float32)
    b = np.array([1, 1, 0.5, tiny, 0.25, 0.5, 1, 1], dtype=np.float32)
    same(
        op("mul.ftz.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", b)),
        np.array([0, -0.0, 0, 0, 0.5, -1.5, np.nan, np.inf], dtype=np.float32),
    )
    same(op("mul.sat.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", b)),
         np.array([tiny, 0, np.float32(2.0**-127), tiny, 0.5, 0, 0, 1], dtype=np.float32))  # fmt: skip
    same(
        op("fma.rn.ftz.sat.f32 %d, %a, %b, %a;", "f32", ("f32", a), ("f32", b)),
        np.array([0, 0, 1.5 * least, 1, 1, 0, 0, 1], dtype=np.float32),
    )


def test_min_and_max() -> None:
    nan, inf = np.float32(np.nan), np.float32(np.inf)
    a = np.array([1, -0.0, 0.0, nan, 2, nan, -inf], dtype=np.float32)
    b = np.array([2, 0.0, -0.0, 3, nan, nan, inf], dtype=np.float32)
    pair = [("f32", a), ("f32", b)]
    same(op("min.f32 %d, %a, %b;", "f32", *pair), np.array([1, -0.0, -0.0, 3, 2, nan, -inf], dtype=np.float32))
    same(op("max.f32 %d, %a, %b;", "f32", *pair), np.array([2, 0.0, 0.0, 3, 2, nan, inf], dtype=np.float32))
    same(op("max.NaN.f32 %d, %a, %b;", "f32", *pair), np.array([2, 0.0, 0.0, nan, nan, nan, inf], dtype=np.float32))
    c = np.array([-5, 3, -2], dtype=np.float32)
    d = np.array([4, -7, -1], dtype=np.float32)
    same(op("max.xorsign.abs.f32 %d, %a, %b;", "f32", ("f32", c), ("f32", d)), np.array([-5, -7, 2], dtype=np.float32))
    same(op("max.f32 %d, %a, %b, %c;", "f32", ("f32", c), ("f32", d), ("f32", -c)), np.array([5, 3, 2], dtype=np.float32))


def test_sign_instructions() -> None:
    """A NaN becomes the canonical one, in float64 a quiet one of its own sign."""
    a = np.array([0x7FC12345, 0xFFA00001, 0x80000000, 0x3F800000], dtype=np.uint32)
    assert op("neg.f32 %d, %a;", "f32", ("b32", a)).tolist() == [NAN, NAN, 0, 0xBF800000]
    assert op("abs.f32 %d, %a;", "f32", ("b32", a)).tolist() == [NAN, NAN, 0, 0x3F800000]
    assert op("neg.f16x2 %d, %a;", "b32", ("b32", a)).tolist() == [0x7FFFA345, 0x7FFF8001, 0x00008000, 0xBF808000]
    assert op("abs.bf16 %d, %a;", "b16", ("b16", [0x8001, 0x7FC0])).tolist() == [1, 0x7FFF]
    assert op("abs.ftz.f16 %d, %a;", "b16", ("b16", [0x8001, 0x8400, 0xFC01])).tolist() == [0, 0x0400, 0x7FFF]
    wide = [0xFFF0000000000001, 0x7FF8000000000005, 0x8000000000000000]
    assert op("neg.f64 %d, %a;", "f64", ("b64", wide)).tolist() == [0xFFF8000000000001, 0x7FF8000000000005, 0]
    assert op("copysign.f32 %d, %a, %b;", "f32", ("b32", a), ("b32", [0x3F800000] * 4)).tolist() == [
        0xBF800000 & (v | 0x7FFFFFFF) if v >> 31 else 0x3F800000 for v in a.tolist()
    ]


def test_testp() -> None:
    a = np.array([0x0, 0x1, 0x3F800000, 0x7F800000, 0x7FC00000], dtype=np.uint32)
    expected = {
        "finite": "11100",
        "infinite": "00010",
        "number": "11110",
        "notanumber": "00001",
        "normal": "10100",
        "subnormal": "01000",
    }
    for word, bits in expected.items():
        assert op(f"testp.{word}.f32 %d, %a;", "pred", ("b32", a)).tolist() == [int(c) for c in bits], word


def test_float64_nans_are_inherited() -> None:
    """In an H100's order of precedence, made quiet; an invalid operation gives its own."""
    x, y, z, one = 0x7FF0000000000001, 0xFFF8000000000002, 0x7FF8000000000003, 0x3FF0000000000000
    quiet = x | 1 << 51
    a, b = ("b64", [x, one, x, y]), ("b64", [y, x, one, x])
    for word in ("add.rn", "sub.rz", "mul.rm", "min", "max"):
        numbers = [one, one] if word in ("min", "max") else [quiet, quiet]
        assert op(f"{word}.f64 %d, %a, %b;", "f64", a, b).tolist() == [y, *numbers, quiet], word
    assert op("div.rn.f64 %d, %a, %b;", "f64", a, b).tolist() == [quiet, quiet, quiet, y]
    triples = [("b64", v) for v in ([x, x, one], [y, one, one], [z, z, x])]
    assert op("fma.rn.f64 %d, %a, %b, %c;", "f64", *triples).tolist() == [y, z, quiet]
    infinity = 0x7FF0000000000000
    assert op("sub.f64 %d, %a, %a;", "f64", ("b64", [infinity])).tolist() == [0xFFF8000000000000]


def test_float64_sums_that_cancel_downwards_are_negative_zero() -> None:
    values = [("f64", np.array(v)) for v in ([1.0, -0.0, 2.0**-1074], [-1.0, 1.0, 2.0**-1074], [1.0, 0.0, -0.0])]
    assert op("fma.rm.f64 %d, %a, %b, %c;", "f64", *values).tolist() == [1 << 63, 1 << 63, 0]
    assert op("fma.rn.f64 %d, %a, %b, %c;", "f64", *values).tolist() == [0, 0, 0]


def test_results_are_flushed_before_their_exponent_is_limited() -> None:
    """2^-126 (1 - 2^-24) has 24 bits below the normal numbers, though a subnormal number would be rounded up; (1 - 2^-26) has not."""
    a, b = np.array([2.0**-63 * (1 - 2.0**-24)] * 2, np.float32), np.array([2.0**-63, -(2.0**-63)], np.float32)
    zero = np.zeros(2, np.float32)
    assert op("mul.rn.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", b)).tolist() == [0x00800000, 0x80800000]
    assert op("mul.rn.ftz.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", b)).tolist() == [0, 0x80000000]
    assert op("fma.rn.ftz.f32 %d, %a, %b, %c;", "f32", ("f32", a), ("f32", b), ("f32", zero)).tolist() == [0, 0x80000000]
    # a product of two 24-bit numbers at most 2^-26 of itself below 2^47: rounded to 24 bits it is 2^-126 again
    near, other = next((n, (1 << 47) // n) for n in range(11863283, 1 << 24) if 0 < (1 << 47) % n < 1 << 21)
    pair = [("f32", np.array([v * 2.0**e], np.float32)) for v, e in ((near, -86), (other, -87))]
    assert op("mul.rn.ftz.f32 %d, %a, %b;", "f32", *pair).tolist() == [0x00800000]
    assert op("mul.rn.ftz.f16 %d, %a, %b;", "b16", ("b16", [0x8400]), ("b16", [0x3BFF])).tolist() == [0x8000]


def test_fma_oob() -> None:
    """The NaN that TMA fills with, of either sign, makes the result zero as a factor; others do not, nor does an addend."""
    outside, minus, one, nan = 0x7FF7, 0xFFF7, 0x3F80, 0x7FFF
    zero = [(outside, one, one), (one, outside, one), (minus, one, nan), (nan, minus, outside)]
    not_zero = [(nan, one, one), (one, nan, one), (one, one, outside), (one, one, minus), (0x7FF6, 0x7FF8, one)]
    triples = [("b16", list(v)) for v in zip(*zero, *not_zero)]
    assert op("fma.rn.oob.bf16 %d, %a, %b, %c;", "b16", *triples).tolist() == [0] * len(zero) + [nan] * len(not_zero)
    packed = [("b32", [v]) for v in (outside << 16 | 0x3C00, 0x3C003C00, 0x3C003C00)]
    assert op("fma.rn.oob.relu.f16x2 %d, %a, %b, %c;", "b32", *packed).tolist() == [0x4000]


# halves

FORMATS = {"f16": (5, 10), "bf16": (8, 7)}


def half_value(code: int, kind: str) -> float:
    exponent_bits, mantissa_bits = FORMATS[kind]
    bias = (1 << exponent_bits - 1) - 1
    sign = -1.0 if code >> 15 else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = code & (1 << mantissa_bits) - 1
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def half_code(exact: Fraction, kind: str) -> int:
    """Nearest code, ties to even, of a non-zero value."""
    exponent_bits, mantissa_bits = FORMATS[kind]
    bias = (1 << exponent_bits - 1) - 1
    magnitude = abs(exact)
    exponent = max(math.floor(math.log2(magnitude)), 1 - bias)
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    while exponent > 1 - bias and Fraction(2) ** exponent > magnitude:
        exponent -= 1
    units = magnitude / Fraction(2) ** (exponent - mantissa_bits)
    whole = math.floor(units)
    rest = units - whole
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole & 1)
    code = min(whole + (exponent + bias - 1 << mantissa_bits), (1 << exponent_bits) - 1 << mantissa_bits)
    return code | (0x8000 if exact < 0 else 0)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_arithmetic(kind: str) -> None:
    rng = np.random.default_rng(6)
    a, b, c = (rng.integers(0, 1 << 16, 500, dtype=np.uint16) for _ in range(3))
    c[:100] = a[:100] ^ 0x8000  # cancelling
    for text, count in ((f"add.{kind} %d, %a, %b;", 2), (f"mul.{kind} %d, %a, %b;", 2), (f"fma.rn.{kind} %d, %a, %b, %c;", 3)):
        got = op(text, "b16", *[("b16", v) for v in (a, b, c)[:count]]).tolist()
        for x, y, z, g in zip(a.tolist(), b.tolist(), c.tolist(), got):
            p, q, r = (half_value(v, kind) for v in (x, y, z))
            if not all(map(math.isfinite, (p, q, r))):
                continue
            fx, fy, fz = Fraction(p), Fraction(q), Fraction(r)
            exact = fx + fy if text.startswith("add") else fx * fy if text.startswith("mul") else fx * fy + fz
            if exact:
                assert g == half_code(exact, kind), (text, p, q, r)
            else:
                assert g & 0x7FFF == 0
    assert op(f"add.{kind} %d, %a, %a;", "b16", ("b16", [0x7FFF, 0xFFFF])).tolist() == [0x7FFF, 0x7FFF]


def test_packed_halves_and_relu() -> None:
    one, two, minus = 0x3C00, 0x4000, 0xBC00
    a, b = [one | minus << 16], [two | two << 16]
    assert op("fma.rn.relu.f16x2 %d, %a, %b, %a;", "b32", ("b32", a), ("b32", b)).tolist() == [0x4200]
    assert op("add.f16x2 %d, %a, %b;", "b32", ("b32", a), ("b32", b)).tolist() == [0x4200 | one << 16]
    assert op("mul.bf16x2 %d, %a, %b;", "b32", ("b32", [0x3FC0_4000]), ("b32", [0x4000_4040])).tolist() == [0x4040_40C0]
    assert op("add.rn.f32x2 %d, %a, %b;", "b64", ("b64", [0x3F800000_40000000]), ("b64", [0x40000000_40000000])).tolist() == [
        0x40400000_40800000
    ]
    assert op("max.f16x2 %d, %a, %b;", "b32", ("b32", a), ("b32", b)).tolist() == b


# approximations, at their documented errors


def relative(text: str, x: np.ndarray, exact: np.ndarray) -> float:
    got = op(text, "f32", ("f32", x)).view(np.float32).astype(np.float64)
    return float(np.max(np.abs(got / exact - 1)))


def test_approximations() -> None:
    rng = np.random.default_rng(7)
    x = rng.uniform(0.01, 100, 300).astype(np.float32)
    wide = x.astype(np.float64)
    assert relative("rcp.approx.f32 %d, %a;", x, 1 / wide) < 2.0**-23
    assert relative("rsqrt.approx.f32 %d, %a;", x, wide**-0.5) < 2.0**-22.9
    assert relative("sqrt.approx.f32 %d, %a;", x, wide**0.5) < 2.0**-23
    assert relative("ex2.approx.f32 %d, %a;", x / 10, np.exp2((x / 10).astype(np.float64))) < 2.0**-22.5
    assert relative("tanh.approx.f32 %d, %a;", x / 50, np.tanh((x / 50).astype(np.float64))) < 2.0**-11
    assert relative("lg2.approx.f32 %d, %a;", x + 2, np.log2((x + 2).astype(np.float64))) < 2.0**-22
    angle = rng.uniform(-3.1, 3.1, 300).astype(np.float32)
    for word, function in (("sin", np.sin), ("cos", np.cos)):
        got = op(f"{word}.approx.f32 %d, %a;", "f32", ("f32", angle)).view(np.float32)
        assert np.max(np.abs(got - function(angle.astype(np.float64)))) < 2.0**-20.5
    edges = np.array([0, -0.0, np.inf, -np.inf, np.nan, -1], dtype=np.float32)
    inf = np.float32(np.inf)
    same(op("rcp.approx.ftz.f32 %d, %a;", "f32", ("f32", edges)), np.array([inf, -inf, 0, -0.0, np.nan, -1], dtype=np.float32))
    same(op("ex2.approx.ftz.f32 %d, %a;", "f32", ("f32", edges)), np.array([1, 1, inf, 0, np.nan, 0.5], dtype=np.float32))
    same(
        op("lg2.approx.f32 %d, %a;", "f32", ("f32", edges)),
        np.array([-inf, -inf, inf, np.nan, np.nan, np.nan], dtype=np.float32),
    )
    same(
        op("ex2.approx.ftz.f32 %d, %a;", "f32", ("f32", np.array([-126.5, 128], np.float32))),
        np.array([0, inf], dtype=np.float32),
    )
    assert op("tanh.approx.f16x2 %d, %a;", "b32", ("b32", [0x3C00_0000])).tolist() == [
        half_code(Fraction(math.tanh(1)), "f16") << 16
    ]
    assert op("ex2.approx.ftz.bf16 %d, %a;", "b16", ("b16", [0x4000])).tolist() == [0x4080]
