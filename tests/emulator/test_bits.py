"""Logic, shifts and bit fields against Python's integers, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.runner import op
from emulator.test_integer import check, operands, signed


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic(kind: str) -> None:
    check(f"and.{kind} %d, %a, %b;", kind, [kind, kind], lambda a, b: a & b)
    check(f"or.{kind} %d, %a, %b;", kind, [kind, kind], lambda a, b: a | b)
    check(f"xor.{kind} %d, %a, %b;", kind, [kind, kind], lambda a, b: a ^ b)
    check(f"not.{kind} %d, %a;", kind, [kind], lambda a: ~a)
    check(f"cnot.{kind} %d, %a;", kind, [kind], lambda a: int(a == 0))


def test_predicates() -> None:
    p, q = [0, 0, 1, 1] * 8, [0, 1, 0, 1] * 8
    for word, function in (("and", lambda x, y: x & y), ("or", lambda x, y: x | y), ("xor", lambda x, y: x ^ y)):
        got = op(f"{word}.pred %d, %a, %b;", "pred", ("pred", p), ("pred", q))
        assert got.tolist() == [function(x, y) for x, y in zip(p, q)]
        got = op(f"{word}.pred %d, %a, !%b;", "pred", ("pred", p), ("pred", q))
        assert got.tolist() == [function(x, 1 - y) for x, y in zip(p, q)]
    assert op("not.pred %d, %a;", "pred", ("pred", p)).tolist() == [1 - x for x in p]


@pytest.mark.parametrize("table", [0, 0x80, 0xC0, 0xEA, 0xF8, 0xFE, 0x96, 0x6A, 0x1B, 0xCA, 0xE8, 0xFF, 0x35])
def test_lop3(table: int) -> None:
    def expected(a: int, b: int, c: int) -> int:
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))

    check(f"lop3.b32 %d, %a, %b, %c, {table:#x};", "b32", ["b32"] * 3, expected)


def test_lop3_with_a_predicate() -> None:
    v = operands(32, 3)
    text = "{ .reg .pred %p, %t; setp.eq.u32 %t, 0, 1; lop3.or.b32 _|%p, %a, %b, %c, 0x80, %t; selp.b32 %d, 1, 0, %p; }"
    got = op(text, "b32", *[("b32", x) for x in v])
    assert got.tolist() == [int(a & b & c != 0) for a, b, c in zip(*v)]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits: int) -> None:
    values = operands(bits, 1)[0]
    counts = [(i * 7) % (bits + 9) for i in range(len(values))]
    counts[0], counts[1] = 1 << 31, 0xFFFFFFFF
    pairs = [(f"b{bits}", values), ("u32", counts)]
    mask = (1 << bits) - 1
    assert op(f"shl.b{bits} %d, %a, %b;", f"b{bits}", *pairs).tolist() == [
        v << c & mask if c < bits else 0 for v, c in zip(values, counts)
    ]
    assert op(f"shr.u{bits} %d, %a, %b;", f"b{bits}", *pairs).tolist() == [
        v >> c if c < bits else 0 for v, c in zip(values, counts)
    ]
    expected = [signed(v, bits) >> min(c, bits - 1) & mask for v, c in zip(values, counts)]
    assert op(f"shr.s{bits} %d, %a, %b;", f"b{bits}", *pairs).tolist() == expected


@pytest.mark.parametrize("direction", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(direction: str, mode: str) -> None:
    a, b = operands(32, 2)
    counts = [(i * 11) % 70 for i in range(len(a))]

    def expected(low: int, high: int, count: int) -> int:
        n = count & 31 if mode == "wrap" else min(count, 32)
        both = high << 32 | low
        return both << n >> 32 & 0xFFFFFFFF if direction == "l" else both >> n & 0xFFFFFFFF

    got = op(f"shf.{direction}.{mode}.b32 %d, %a, %b, %c;", "b32", ("b32", a), ("b32", b), ("u32", counts))
    assert got.tolist() == [expected(*row) for row in zip(a, b, counts)]


def selectors(mode: str, c: int) -> list[int]:
    """Byte selections of prmt, from the table of PTX ISA 9.7.9.7, most significant first."""
    tables = {
        "f4e": ["3210", "4321", "5432", "6543"],
        "b4e": ["5670", "6701", "7012", "0123"],
        "rc8": ["0000", "1111", "2222", "3333"],
        "ecl": ["3210", "3211", "3222", "3333"],
        "ecr": ["0000", "1110", "2210", "3210"],
        "rc16": ["1010", "3232", "1010", "3232"],
    }
    return [int(x) for x in tables[mode][c & 3]]


def test_prmt() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 1 << 32, 128, dtype=np.uint32) for _ in range(3))
    data = [(int(x) | int(y) << 32) for x, y in zip(a, b)]

    def generic(word: int, select: int) -> int:
        out = 0
        for i in range(4):
            s = select >> 4 * i & 15
            byte = word >> 8 * (s & 7) & 0xFF
            out |= (byte if s < 8 else 0xFF * (byte >> 7)) << 8 * i
        return out

    pairs = [("b32", a), ("b32", b), ("b32", c)]
    assert op("prmt.b32 %d, %a, %b, %c;", "b32", *pairs).tolist() == [generic(w, int(s)) for w, s in zip(data, c)]
    for mode in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        expected = []
        for w, s in zip(data, c):
            picked = [w >> 8 * k & 0xFF for k in selectors(mode, int(s))]
            expected.append(sum(x << 24 - 8 * i for i, x in enumerate(picked)))
        assert op(f"prmt.b32.{mode} %d, %a, %b, %c;", "b32", *pairs).tolist() == expected, mode


def field(kind: str, a: int, start: int, length: int) -> int:
    """bfe after the pseudocode of PTX ISA 9.7.1.19, one bit at a time."""
    bits = int(kind[1:])
    start, length = start & 0xFF, length & 0xFF
    sign = 0
    if kind[0] == "s" and length:
        sign = a >> min(start + length - 1, bits - 1) & 1
    out = 0
    for i in range(bits):
        bit = a >> i + start & 1 if i < length and i + start <= bits - 1 else sign
        out |= bit << i
    return out


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind: str) -> None:
    bits = int(kind[1:])
    rng = np.random.default_rng(3)
    values = operands(bits, 1)[0]
    start = [int(v) for v in rng.integers(0, bits + 4, len(values))]
    length = [int(v) for v in rng.integers(0, bits + 4, len(values))]
    start[:4], length[:4] = [0, 255, 256, bits - 1], [0, 255, 256 + 3, 5]
    triple = [(kind, values), ("u32", start), ("u32", length)]
    if bits == 64:  # which count in full, unlike the 32-bit forms
        start, length = ([min(v, 255) for v in column] for column in (start, length))
    assert op(f"bfe.{kind} %d, %a, %b, %c;", kind, *triple).tolist() == [
        field(kind, *row) for row in zip(values, start, length)
    ]
    if kind[0] == "u":
        other = values[::-1]
        got = op(f"bfi.b{bits} %d, %a, %b, %c, %e;", kind, (kind, values), (kind, other), *triple[1:])
        expected = []
        for a, b, s, n in zip(values, other, start, length):
            s, n = s & 0xFF, n & 0xFF
            for i in range(n):
                if s + i < bits:
                    b = b & ~(1 << s + i) | (a >> i & 1) << s + i
            expected.append(b)
        assert got.tolist() == expected


@pytest.mark.parametrize("bits", [32, 64])
def test_counting(bits: int) -> None:
    v = operands(bits, 1)[0]
    kind = f"b{bits}"
    assert op(f"popc.{kind} %d, %a;", "u32", (kind, v)).tolist() == [x.bit_count() for x in v]
    assert op(f"clz.{kind} %d, %a;", "u32", (kind, v)).tolist() == [bits - x.bit_length() for x in v]
    assert op(f"brev.{kind} %d, %a;", kind, (kind, v)).tolist() == [int(f"{x:0{bits}b}"[::-1], 2) for x in v]
    none = 0xFFFFFFFF
    assert op(f"bfind.u{bits} %d, %a;", "u32", (kind, v)).tolist() == [x.bit_length() - 1 & none for x in v]
    flipped = [~x & (1 << bits) - 1 if x >> bits - 1 else x for x in v]
    assert op(f"bfind.s{bits} %d, %a;", "u32", (kind, v)).tolist() == [x.bit_length() - 1 & none for x in flipped]
    amounts = [bits - x.bit_length() if x else none for x in v]
    assert op(f"bfind.shiftamt.u{bits} %d, %a;", "u32", (kind, v)).tolist() == amounts


def test_nth_set_bit() -> None:
    masks = [0xAAAAAAAA] * 4 + [0, 0xFFFFFFFF, 0x80000001, 0x80000001]
    base, offset = [3, 3, 2, 2, 5, 31, 0, 31], [1, -1, 1, -1, 1, 1, 2, -2]
    expected = [3, 3, 3, 1, 0xFFFFFFFF, 31, 31, 0]
    assert op("fns.b32 %d, %a, %b, %c;", "b32", ("b32", masks), ("u32", base), ("s32", offset)).tolist() == expected
    assert op("fns.b32 %d, %a, %b, 0;", "b32", ("b32", masks), ("u32", base)).tolist() == [
        b if m >> b & 1 else 0xFFFFFFFF for m, b in zip(masks, base)
    ]


def test_masks_and_extension() -> None:
    v = operands(32, 1)[0]
    n = [i % 40 for i in range(len(v))]

    def extend(x: int, width: int, sign: bool) -> int:
        x &= (1 << width) - 1
        return x - (1 << width) & 0xFFFFFFFF if sign and width and x >> width - 1 else x

    pair = [("b32", v), ("u32", n)]
    assert op("szext.clamp.s32 %d, %a, %b;", "b32", *pair).tolist() == [extend(x, min(k, 32), True) for x, k in zip(v, n)]
    assert op("szext.wrap.u32 %d, %a, %b;", "b32", *pair).tolist() == [extend(x, k & 31, False) for x, k in zip(v, n)]
    start = [i * 3 % 40 for i in range(len(v))]
    pair = [("u32", start), ("u32", n)]
    expected = [((1 << min(k, 32)) - 1 << s) & 0xFFFFFFFF for s, k in zip(start, n)]
    assert op("bmsk.clamp.b32 %d, %a, %b;", "b32", *pair).tolist() == expected
    expected = [((1 << (k & 31)) - 1 << (s & 31)) & 0xFFFFFFFF for s, k in zip(start, n)]
    assert op("bmsk.wrap.b32 %d, %a, %b;", "b32", *pair).tolist() == expected
