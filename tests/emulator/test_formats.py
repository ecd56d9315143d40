"""formats.py against exact rational arithmetic and against the conversions of NVIDIA's own headers."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glu4.emulator import formats
from glu4.emulator.formats import FORMATS, convert_packed, decode, encode, pack, unpack

SMALL = ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"]
# exponent bits, mantissa bits, infinity and NaN as in IEEE 754
SHAPES = {
    "f32": (8, 23, True),
    "f16": (5, 10, True),
    "bf16": (8, 7, True),
    "e4m3": (4, 3, False),
    "e5m2": (5, 2, True),
    "e2m3": (2, 3, False),
    "e3m2": (3, 2, False),
    "e2m1": (2, 1, False),
}


def exact(name: str, code: int) -> Fraction | None:
    """The value of a code, from the definition; None for infinity and NaN."""
    exponent_bits, mantissa_bits, ieee = SHAPES[name]
    sign = -1 if code >> (exponent_bits + mantissa_bits) else 1
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    if ieee and exponent == (1 << exponent_bits) - 1:
        return None
    if name == "e4m3" and exponent == 15 and mantissa == 7:
        return None
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == 0:
        return sign * Fraction(mantissa) / 2**mantissa_bits * Fraction(2) ** (1 - bias)
    return sign * (1 + Fraction(mantissa) / 2**mantissa_bits) * Fraction(2) ** (exponent - bias)


@cache
def finite_values(name: str) -> list[tuple[Fraction, int]]:
    """(value, code) of every finite non-negative code, ascending."""
    exponent_bits, mantissa_bits, _ = SHAPES[name]
    values = [(exact(name, code), code) for code in range(1 << (exponent_bits + mantissa_bits))]
    return [(value, code) for value, code in values if value is not None]


def nearest(name: str, x: Fraction, rounding: str) -> int:
    """The code that `rounding` picks for a magnitude within the format's range, by comparing all candidates."""
    below = max((value, code) for value, code in finite_values(name) if value <= x)
    above = min((value, code) for value, code in finite_values(name) if value >= x)
    if rounding == "rz":
        return below[1]
    if rounding == "rp":
        return above[1]
    low, high = x - below[0], above[0] - x
    if low == high:
        if rounding == "rna":
            return above[1]
        return below[1] if below[1] % 2 == 0 else above[1]
    return below[1] if low < high else above[1]


@pytest.mark.parametrize("name", [*SMALL, "f16", "bf16"])
def test_every_code_decodes_to_its_exact_value(name: str) -> None:
    exponent_bits, mantissa_bits, _ = SHAPES[name]
    width = exponent_bits + mantissa_bits + 1
    codes = np.arange(0, 1 << width, 1 if width <= 8 else 7)
    for code, value in zip(codes.tolist(), decode(name, codes).tolist()):
        expected = exact(name, code)
        if expected is None:
            assert not np.isfinite(value)
        else:
            assert Fraction(value) == expected
            assert np.signbit(value) == (code >> (exponent_bits + mantissa_bits) == 1)


@pytest.mark.parametrize("name", [*SMALL, "f16", "bf16", "f32"])
def test_every_finite_code_survives_a_round_trip(name: str) -> None:
    fmt = FORMATS[name]
    codes = np.arange(1 << (fmt.magnitude_bits + 1), dtype=np.uint32) if name != "f32" else sampled_floats()
    values = decode(name, codes)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(encode(name, values[finite], satfinite=True), codes[finite])


def sampled_floats() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 1 << 32, 20000, dtype=np.uint64).astype(np.uint32)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("rounding", ["rn", "rz", "rna", "rp"])
def test_rounding_between_all_neighbours(name: str, rounding: str) -> None:
    values = finite_values(name)
    points = []
    for (low, _), (high, _) in pairwise(values):
        gap = high - low
        points += [low, low + gap / 4, low + gap / 2, low + gap * 3 / 4, low + gap / 1024]
    got = encode(name, [float(p) for p in points], rounding, satfinite=True)  # type: ignore[arg-type]
    assert got.tolist() == [nearest(name, p, rounding) for p in points]
    if rounding in ("rn", "rz", "rna"):
        negative = encode(name, [-float(p) for p in points], rounding, satfinite=True)  # type: ignore[arg-type]
        assert (negative ^ got).tolist() == [FORMATS[name].sign_bit] * len(points)
    else:
        towards_zero = encode(name, [float(p) for p in points], "rm", satfinite=True)
        assert towards_zero.tolist() == [nearest(name, p, "rz") for p in points]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from(["f16", "bf16"]))
def test_sixteen_bit_rounding_picks_the_nearest(x: float, name: str) -> None:
    code = int(encode(name, x, satfinite=True)[()])
    got = abs(decode(name, code))
    step = [
        abs(float(decode(name, (code & 0x7FFF) + d))) for d in (-1, 1) if 0 <= (code & 0x7FFF) + d <= FORMATS[name].max_code
    ]
    clipped = min(abs(x), FORMATS[name].max_value)
    assert all(abs(Fraction(float(got)) - Fraction(clipped)) <= abs(Fraction(s) - Fraction(clipped)) for s in step)


def test_float16_and_tf32_agree_with_numpy_and_bit_truncation() -> None:
    bits = sampled_floats()
    x = bits.view(np.float32)
    keep = ~np.isnan(x)
    with np.errstate(over="ignore", invalid="ignore"):
        half = x.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(encode("f16", x[keep]), half[keep])
    finite = np.isfinite(x)
    np.testing.assert_array_equal(encode("tf32", x[finite], "rz"), bits[finite] & np.uint32(0xFFFFE000))
    np.testing.assert_array_equal(decode("tf32", bits[finite]), (bits & np.uint32(0xFFFFE000))[finite].view(np.float32))
    assert encode("tf32", np.float32(1 + 2**-11), "rna").tolist() == 0x3F802000
    assert encode("tf32", np.nan).tolist() == 0x7FFFE000


@pytest.mark.parametrize(
    ("column", "name", "rounding", "satfinite"),
    [
        *[(f"{name}_sat", name, "rn", True) for name in SMALL],
        ("e4m3", "e4m3", "rn", False),
        ("e5m2", "e5m2", "rn", False),
        *[(f"ue8m0_{r}{s}", "ue8m0", r, bool(s)) for r in ("rz", "rp") for s in ("", "_sat")],
    ],
)
def test_conversions_equal_those_of_nvidias_headers(column: str, name: str, rounding: str, satfinite: bool) -> None:
    recorded = np.load(Path(__file__).parent / "fixtures" / "conversions.npz")
    x = recorded["bits"].view(np.float32)
    assert len(x) > 4000
    np.testing.assert_array_equal(encode(name, x, rounding, satfinite=satfinite), recorded[column])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "rounding", "expected"),
    [
        ("f16", 1e6, "rn", 0x7C00),
        ("f16", 1e6, "rz", 0x7BFF),
        ("f16", -1e6, "rp", 0xFBFF),
        ("f16", -1e6, "rm", 0xFC00),
        ("f16", np.inf, "rz", 0x7C00),
        ("bf16", -np.inf, "rn", 0xFF80),
        ("f16", np.nan, "rn", 0x7FFF),
        ("f32", 1e300, "rm", 0x7F7FFFFF),
        ("f32", 2.0**-150, "rp", 1),
    ],
)
def test_out_of_range(name: str, value: float, rounding: str, expected: int) -> None:
    assert int(encode(name, value, rounding)) == expected  # type: ignore[arg-type]


def test_relu_and_saturation() -> None:
    x = np.array([-1.0, -0.0, 0.5, np.nan, np.inf, -np.inf], dtype=np.float32)
    assert encode("e2m1", x, satfinite=True, relu=True).tolist() == [0, 0, 1, 7, 7, 0]
    assert encode("f16", x, relu=True).tolist() == [0, 0, 0x3800, 0x7FFF, 0x7C00, 0]
    assert encode("bf16", x, satfinite=True).tolist() == [0xBF80, 0x8000, 0x3F00, 0x7FFF, 0x7F7F, 0xFF7F]


def test_ue8m0_and_ue4m3_values() -> None:
    scales = decode("ue8m0", np.arange(256))
    assert scales[:255].tolist() == [2.0 ** (i - 127) for i in range(255)]
    assert np.isnan(scales[255])
    np.testing.assert_array_equal(decode("ue4m3", np.arange(128)), decode("e4m3", np.arange(128)))
    # the top bit of a ue4m3 byte is padding
    np.testing.assert_array_equal(decode("ue4m3", np.arange(128, 256)), decode("e4m3", np.arange(128)))


def test_packing_puts_the_first_operand_highest() -> None:
    assert convert_packed("e2m1", [np.float32([6.0]), np.float32([1.0])], satfinite=True).tolist() == [0x72]
    assert convert_packed("e2m1", [np.float32([v]) for v in (6, 1, -2, 0)], satfinite=True).tolist() == [0x72C0]
    assert convert_packed("e2m3", [np.float32([-7.5]), np.float32([1])], satfinite=True).tolist() == [0x3F08]
    assert convert_packed("f16", [np.float32([1]), np.float32([-2])]).tolist() == [0x3C00C000]
    assert convert_packed("f16", [np.array([0x72])], source="e2m1").tolist() == [0x46003C00]
    assert convert_packed("f16", [np.array([0x7FB8])], source="e4m3").tolist() == [0x7FFFBC00]
    assert convert_packed("bf16", [np.array([0x8000])], source="ue8m0").tolist() == [0x40000040]
    assert convert_packed("e4m3", [np.array([0x3C00C000])], source="f16", satfinite=True).tolist() == [0x38C0]


@given(st.lists(st.integers(0, 15), min_size=1, max_size=8))
def test_unpack_inverts_pack(codes: list[int]) -> None:
    word = pack("e2m1", [np.array(c) for c in codes])
    assert [int(c) for c in unpack("e2m1", word, len(codes))] == codes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decode("e5m3", 0), "format: 'e5m3' is unknown"),
        (lambda: encode("e2m1", 1.0), "satfinite: e2m1 has neither infinity nor NaN"),
        (lambda: encode("ue4m3", 1.0), "PTX converts nothing to ue4m3"),
        (lambda: encode("f16", 1.0, "rs"), "rounding: 'rs' is unknown"),  # type: ignore[arg-type]
        (lambda: encode("ue8m0", 1.0), "ue8m0 has rz and rp, not rn"),
        (lambda: encode("ue8m0", 1.0, "rz", relu=True), "relu: ue8m0 has no sign"),
        (lambda: pack("f16", [np.zeros(1)] * 3), "3 elements of 16 bits do not fit"),
        (lambda: unpack("e2m1", 0, 9), "9 elements of 4 bits do not fit"),
        (lambda: convert_packed("f16", [0, 0], source="e4m3"), "one e4m3x2 register is converted, given 2"),
    ],
)
def test_errors_name_what_is_wrong(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_tables_cannot_be_written() -> None:
    assert not formats._table("e2m1").flags.writeable
