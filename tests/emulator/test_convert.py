"""cvt and comparisons."""

from __future__ import annotations

import math
import operator
from fractions import Fraction

import numpy as np
import pytest

from emulator.runner import HEAD, libm, op
from emulator.test_float import FORMATS, half_code, half_value
from emulator.test_integer import operands, signed, value
from glu4.emulator.errors import PtxError
from glu4.emulator.launch import load

KINDS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")


def register(kind: str) -> str:
    """The register that holds a type: 8-bit values live in 16 bits."""
    return f"b{max(int(kind[1:]), 16)}"


@pytest.mark.parametrize("to", KINDS)
def test_between_integers(to: str) -> None:
    for kind in KINDS:
        if kind == to:
            continue
        bits = int(kind[1:])
        raw = [v & (1 << bits) - 1 for v in operands(max(bits, 16), 1)[0]]
        inputs = [v | (0xA500 if bits == 8 else 0) for v in raw]  # the upper byte is not read
        numbers = [value(v, kind) for v in raw]
        width, out = int(to[1:]), int(register(to)[1:])

        def extended(v: int, width: int = width, out: int = out) -> int:
            v &= (1 << width) - 1
            return (signed(v, width) if to[0] == "s" else v) & (1 << out) - 1

        assert op(f"cvt.{to}.{kind} %d, %a;", register(to), (register(kind), inputs)).tolist() == [
            extended(v) for v in numbers
        ], kind
        low, high = (-(1 << width - 1), (1 << width - 1) - 1) if to[0] == "s" else (0, (1 << width) - 1)
        got = op(f"cvt.sat.{to}.{kind} %d, %a;", register(to), (register(kind), inputs)).tolist()
        assert got == [extended(min(max(v, low), high)) for v in numbers], f"sat {kind}"


FLOATS = np.array([0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 127.5, 128.5, -128.5, 255.9, 65535.5, 2147483520, 2147483648,
                   -2147483648, 4294967040, 9.2e18, 1.8e19, 1e30, -1e30, np.inf, -np.inf, np.nan, 1e-40], dtype=np.float32)  # fmt: skip


@pytest.mark.parametrize("to", KINDS)
def test_float_to_integer(to: str) -> None:
    rounders = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    width = int(to[1:])
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if to[0] == "s" else (0, (1 << width) - 1)
    out = int(register(to)[1:])
    for kind, values in (("f32", FLOATS), ("f64", FLOATS.astype(np.float64))):
        for word, rounder in rounders.items():
            expected = []
            for v in values.tolist():
                if math.isnan(v):
                    number = (1 << width - 1) if kind == "f64" or width == 64 else 0
                elif math.isinf(v):
                    number = high if v > 0 else low
                else:
                    number = min(max(rounder(v), low), high)
                number &= (1 << width) - 1
                expected.append((signed(number, width) if to[0] == "s" else number) & (1 << out) - 1)
            assert op(f"cvt.{word}.{to}.{kind} %d, %a;", register(to), (kind, values)).tolist() == expected, (word, kind)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_integer_to_float(kind: str, mode: str) -> None:
    raw = operands(int(kind[1:]), 1)[0] + [16777217, 16777219, 33554434 + 1, (1 << 31) - 1]
    numbers = [value(v, kind) for v in raw]
    for to, dtype, digits in (("f32", np.float32, 24), ("f64", np.float64, 53)):
        got = op(f"cvt.{mode}.{to}.{kind} %d, %a;", to, (kind, raw)).view(dtype)
        for n, g in zip(numbers, got):
            exact, near = n, int(g)
            unit = 1 << max(abs(exact).bit_length() - digits, 0)
            floor = exact // unit * unit
            if mode == "rn":
                rest = exact - floor
                expected = floor + unit * (rest * 2 > unit or (rest * 2 == unit and floor // unit % 2))
            elif mode == "rm":
                expected = floor
            elif mode == "rp":
                expected = -(-exact // unit) * unit
            else:
                expected = floor if exact >= 0 else -(-exact // unit) * unit
            assert near == expected, (n, mode, to)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_double_to_float(mode: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        (rng.uniform(-3, 3, 200) * 2.0 ** rng.integers(-150, 128, 200), [1e300, -1e300, 1e-60, 0.0, -0.0, np.inf])
    )
    got = op(f"cvt.{mode}.f32.f64 %d, %a;", "f32", ("f64", x)).view(np.float32)
    for v, g in zip(x.tolist(), got.tolist()):
        if math.isinf(v) or v == 0:
            assert g == v
            continue
        if math.isinf(g):
            assert mode == "rn" or (mode == "rp") == (v > 0)
            assert abs(v) > 3.4028234e38
            continue
        up, down = (float(np.nextafter(np.float32(g), np.float32(s * np.inf))) for s in (1, -1))
        if mode == "rn":
            assert all(abs(Fraction(g) - Fraction(v)) <= abs(Fraction(n) - Fraction(v)) for n in (up, down) if math.isfinite(n))
        elif mode == "rp" or (mode == "rz" and v < 0):
            assert g >= v > down
        else:
            assert g <= v < up


def test_halves() -> None:
    rng = np.random.default_rng(1)
    x = (rng.uniform(-2, 2, 300) * 2.0 ** rng.integers(-28, 17, 300)).astype(np.float32)
    for kind in FORMATS:
        got = op(f"cvt.rn.{kind}.f32 %d, %a;", "b16", ("f32", x)).tolist()
        assert got == [half_code(Fraction(float(v)), kind) for v in x]
        codes = rng.integers(0, 1 << 16, 300, dtype=np.uint16)
        back = op(f"cvt.f32.{kind} %d, %a;", "f32", ("b16", codes)).view(np.float32)
        for c, g in zip(codes.tolist(), back.tolist()):
            expected = half_value(c, kind)
            assert (math.isnan(expected) and math.isnan(g)) or expected == g
        pair = op(f"cvt.rn.{kind}x2.f32 %d, %a, %b;", "b32", ("f32", x), ("f32", x[::-1].copy())).tolist()
        codes_of = [half_code(Fraction(float(v)), kind) for v in x]
        assert pair == [high << 16 | low for high, low in zip(codes_of, codes_of[::-1])]
        relu = op(f"cvt.rn.relu.{kind}.f32 %d, %a;", "b16", ("f32", x)).tolist()
        assert relu == [0 if v >> 15 else v for v in codes_of]


def test_whole_numbers_as_floats() -> None:
    x = np.array([0.5, 1.5, -0.5, -2.5, 3.999, 1e10, -0.0], dtype=np.float32)
    for word, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        got = op(f"cvt.{word}.f32.f32 %d, %a;", "f32", ("f32", x)).view(np.float32)
        np.testing.assert_array_equal(got.view(np.uint32), function(x).view(np.uint32))
    sat = op("cvt.sat.f32.f32 %d, %a;", "f32", ("f32", np.array([-1, 0.25, 7, np.nan], np.float32))).view(np.float32)
    assert sat.tolist() == [0, 0.25, 1, 0]


def test_small_formats() -> None:
    """Codes whose values are written out here."""
    x = np.array([0, 0.5, -1, 1.4, 5.5, 1000, -1000, 0.25, 0.75, 2.5], dtype=np.float32)
    e2m1 = [0, 1, 10, 3, 7, 7, 15, 0, 2, 4]
    text = "{ .reg .b8 %q; cvt.rn.satfinite.e2m1x2.f32 %q, %a, %b; cvt.u32.u8 %d, %q; }"
    assert op(text, "b32", ("f32", x), ("f32", np.zeros(10, np.float32))).tolist() == [c << 4 for c in e2m1]
    y = np.array([448, 1000, -0.015625, 2.0**-9, 2.0**-10, 1.0625], dtype=np.float32)
    text = "{ .reg .b16 %q; cvt.rn.satfinite.e4m3x2.f32 %q, %b, %a; cvt.u32.u16 %d, %q; }"
    assert op(text, "b32", ("f32", y), ("f32", np.zeros(6, np.float32))).tolist() == [0x7E, 0x7E, 0x88, 1, 0, 0x38]
    text = "{ .reg .b16 %q; cvt.u16.u32 %q, %a; cvt.rn.f16x2.e4m3x2 %d, %q; }"
    assert op(text, "b32", ("b32", [0x7E38, 0x0188])).tolist() == [0x5F003C00, 0x1800A400]
    assert op("cvt.rna.tf32.f32 %d, %a;", "b32", ("f32", np.array([1 + 2.0**-11], np.float32))).tolist() == [0x3F802000]


def test_saturation_from_integers() -> None:
    a = ("s32", [-7, 0, 1, 300])
    assert op("cvt.rn.sat.f16.s32 %d, %a;", "b16", a).tolist() == [0, 0, 0x3C00, 0x3C00]
    assert op("cvt.rz.sat.f64.s32 %d, %a;", "f64", a).tolist() == [0, 0, 0x3FF << 52, 0x3FF << 52]


def test_what_is_left_of_a_nan() -> None:
    wide = ("b64", [0xFFF0000000000001, 0x7FFC123456789ABC])
    assert op("cvt.rn.f32.f64 %d, %a;", "f32", wide).tolist() == [0xFFC00000, 0x7FE091A2]
    assert op("cvt.rz.f16.f64 %d, %a;", "b16", wide).tolist() == [0xFE00, 0x7F04]
    assert op("cvt.rn.bf16.f64 %d, %a;", "b16", wide).tolist() == [0xFFC0, 0x7FE0]
    assert op("cvt.f32.bf16 %d, %a;", "f32", ("b16", [0xFF81])).tolist() == [0xFF810000]
    assert op("cvt.ftz.f32.bf16 %d, %a;", "f32", ("b16", [0xFF81])).tolist() == [0x7FFFFFFF]
    assert op("cvt.f64.f16 %d, %a;", "f64", ("b16", [0xFC01])).tolist() == [0xFFF8040000000000]
    single = ("b32", [0xFF812345])
    assert op("cvt.ftz.f64.f32 %d, %a;", "f64", single).tolist() == [0x7FFFFFFFE0000000]
    assert op("cvt.rna.tf32.f32 %d, %a;", "b32", single).tolist() == [0xFF812000]
    assert op("cvt.rn.tf32.f32 %d, %a;", "b32", single).tolist() == [0x7FFFE000]


def test_pack() -> None:
    a, b = [300, -300, 5, -5], [1, 2, 70000, -70000]
    assert op("cvt.pack.sat.u8.s32.b32 %d, %a, %b, 0xABCD1234;", "b32", ("s32", a), ("s32", b)).tolist() == [
        0x12340000 | min(max(x, 0), 255) << 8 | min(max(y, 0), 255) for x, y in zip(a, b)
    ]
    assert op("cvt.pack.sat.s16.s32 %d, %a, %b;", "b32", ("s32", a), ("s32", b)).tolist() == [
        (min(max(x, -32768), 32767) & 0xFFFF) << 16 | min(max(y, -32768), 32767) & 0xFFFF for x, y in zip(a, b)
    ]


# comparisons

ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_comparisons(kind: str) -> None:
    a, b = operands(int(kind[1:]), 2)
    for word, function in {**ORDERED, **(UNSIGNED if kind[0] == "u" else {})}.items():
        got = op(f"setp.{word}.{kind} %d, %a, %b;", "pred", (kind, a), (kind, b))
        assert got.tolist() == [int(function(value(x, kind), value(y, kind))) for x, y in zip(a, b)], word


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_float_comparisons(kind: str) -> None:
    values = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]
    dtype = np.float32 if kind == "f32" else np.float64
    a = np.array([x for x in values for _ in values], dtype)
    b = np.array([y for _ in values for y in values], dtype)
    for word, function in ORDERED.items():
        ordered = [int(function(x, y) and not (math.isnan(x) or math.isnan(y))) for x, y in zip(a, b)]
        assert op(f"setp.{word}.{kind} %d, %a, %b;", "pred", (kind, a), (kind, b)).tolist() == ordered, word
        either = [int(function(x, y) or math.isnan(x) or math.isnan(y)) for x, y in zip(a, b)]
        assert op(f"setp.{word}u.{kind} %d, %a, %b;", "pred", (kind, a), (kind, b)).tolist() == either, word
    nan = [int(math.isnan(x) or math.isnan(y)) for x, y in zip(a, b)]
    assert op(f"setp.nan.{kind} %d, %a, %b;", "pred", (kind, a), (kind, b)).tolist() == nan
    assert op(f"setp.num.{kind} %d, %a, %b;", "pred", (kind, a), (kind, b)).tolist() == [1 - v for v in nan]


def test_combined_predicates() -> None:
    a, b = operands(32, 2)
    p = [i % 2 for i in range(len(a))]
    for word, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        text = f"{{ .reg .pred %p, %q; setp.lt.{word}.u32 %p|%q, %a, %b, !%c; selp.b32 %d, 1, 0, %p; @%q or.b32 %d, %d, 2; }}"
        got = op(text, "b32", ("b32", a), ("b32", b), ("pred", p))
        assert got.tolist() == [function(int(x < y), 1 - z) | 2 * function(int(x >= y), 1 - z) for x, y, z in zip(a, b, p)]


def test_set_and_packed_comparisons() -> None:
    a, b = operands(32, 2)
    assert op("set.ge.u32.u32 %d, %a, %b;", "b32", ("b32", a), ("b32", b)).tolist() == [
        0xFFFFFFFF * (x >= y) for x, y in zip(a, b)
    ]
    assert op("set.lt.f32.s32 %d, %a, %b;", "b32", ("b32", a), ("b32", b)).tolist() == [
        0x3F800000 * (signed(x, 32) < signed(y, 32)) for x, y in zip(a, b)
    ]
    text = "{ .reg .pred %p, %q; setp.gt.f16x2 %p|%q, %a, %b; selp.b32 %d, 1, 0, %p; @%q or.b32 %d, %d, 2; }"
    assert op(text, "b32", ("b32", [0x3C00_4000, 0x4000_3C00]), ("b32", [0x3E00_3E00] * 2)).tolist() == [1, 2]
    assert op("setp.lt.ftz.f32 %d, %a, %b;", "pred", ("b32", [1, 0x80000001]), ("b32", [2, 0])).tolist() == [0, 0]


@pytest.mark.parametrize(
    "text",
    ["cvt.f32.s32 %d, %a;", "cvt.s32.f32 %d, %a;", "cvt.rn.s32.s16 %d, %a;", "cvt.f16.f32 %d, %a;", "cvt.rn.e2m1x2.f32 %d, %a, %b;",
     "setp.lo.s32 %p, %a, %b;", "setp.lt.b32 %p, %a, %b;", "add.rm.f16 %h, %h, %h;", "add.wrap.u32 %d, %a, %b;", "mul.u32 %d, %a, %b;",
     "ex2.f32 %d, %a;", "lop3.b32 %d, %a, %b, %a, 256;", "shfl.idx.b32 %d, %a, 0, 31;", "vote.all.pred %p, %p;"],
)  # fmt: skip
def test_combinations_that_do_not_exist_are_refused_by_line_and_name(text: str) -> None:
    body = f"{HEAD}.visible .entry k() {{\n.reg .b32 %d, %a, %b; .reg .b16 %h; .reg .pred %p;\n{text}\n}}"
    with pytest.raises(PtxError, match=r"^PTX line 6: ") as caught:
        load(body)
    assert text.split()[0] in str(caught.value)


def test_the_oracle_rounds() -> None:
    """The C library does change its rounding, so that the tests above mean something."""
    a, one, tiny = np.array([1], np.float32), np.array([1], np.float32), np.array([2.0**-30], np.float32)
    assert libm("fmaf", "rp", a, one, tiny)[0] > libm("fmaf", "rn", a, one, tiny)[0] == 1
