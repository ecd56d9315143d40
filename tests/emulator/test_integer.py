"""Integer instructions against Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from emulator.runner import op, run

EDGES = {
    16: [0, 1, 2, 0x7FFF, 0x8000, 0xFFFF, 0x1234],
    32: [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xFFFF0000],
    64: [0, 1, 2, 63, 64, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0x123456789ABCDEF0, 0xFFFFFFFF],
}


def operands(bits: int, count: int, seed: int = 0) -> list[list[int]]:
    """Every pair of edge values, then random ones."""
    rng = np.random.default_rng(seed)
    edges = EDGES[bits]
    rows = [(a, b) for a in edges for b in edges]
    first, second = [r[0] for r in rows], [r[1] for r in rows]
    columns = [first, second, second[::-1], first[::-1]][:count]
    return [c + [int(v) for v in rng.integers(0, 1 << bits, 40, dtype=np.uint64 if bits == 64 else np.int64)] for c in columns]


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def value(raw: int, kind: str) -> int:
    return signed(raw, int(kind[1:])) if kind[0] == "s" else raw


def check(text: str, out: str, sources: list[str], function: Callable[..., int], seed: int = 0) -> None:
    columns = []
    for i, kind in enumerate(sources):
        columns.append(operands(int(kind[1:]), 4, seed + i)[i])
    length = min(map(len, columns))
    columns = [c[:length] for c in columns]
    got = op(text, out, *[(kind, c) for kind, c in zip(sources, columns)])
    bits = int(out[1:])
    expected = [function(*(value(v, k) for v, k in zip(row, sources))) & (1 << bits) - 1 for row in zip(*columns)]
    assert got.tolist() == expected


def quotient(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


KINDS = ("u16", "s16", "u32", "s32", "u64", "s64")


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic(kind: str) -> None:
    bits = int(kind[1:])
    check(f"add.{kind} %d, %a, %b;", kind, [kind, kind], lambda a, b: a + b)
    check(f"sub.{kind} %d, %a, %b;", kind, [kind, kind], lambda a, b: a - b)
    check(f"mul.lo.{kind} %d, %a, %b;", kind, [kind, kind], lambda a, b: a * b)
    check(f"mul.hi.{kind} %d, %a, %b;", kind, [kind, kind], lambda a, b: (a * b) >> bits)
    check(f"mad.lo.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: a * b + c)
    check(f"mad.hi.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: ((a * b) >> bits) + c)
    check(f"sad.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: abs(a - b) + c)
    check(f"min.{kind} %d, %a, %b;", kind, [kind, kind], min)
    check(f"max.{kind} %d, %a, %b;", kind, [kind, kind], max)


@pytest.mark.parametrize("kind", KINDS)
def test_division(kind: str) -> None:
    bits = int(kind[1:])
    a, b = operands(bits, 2)
    keep = [(x, y) for x, y in zip(a, b) if y]
    pairs = [(kind, [x for x, _ in keep]), (kind, [y for _, y in keep])]
    expected = [quotient(value(x, kind), value(y, kind)) & (1 << bits) - 1 for x, y in keep]
    assert op(f"div.{kind} %d, %a, %b;", kind, *pairs).tolist() == expected
    remainders = [
        (value(x, kind) - value(y, kind) * quotient(value(x, kind), value(y, kind))) & (1 << bits) - 1 for x, y in keep
    ]
    assert op(f"rem.{kind} %d, %a, %b;", kind, *pairs).tolist() == remainders


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_sign(kind: str) -> None:
    check(f"neg.{kind} %d, %a;", kind, [kind], lambda a: -a)
    check(f"abs.{kind} %d, %a;", kind, [kind], abs)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind: str) -> None:
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    check(f"mul.wide.{kind} %d, %a, %b;", wide, [kind, kind], lambda a, b: a * b)
    columns = [operands(int(kind[1:]), 2)[0], operands(int(kind[1:]), 2)[1]]
    c = [(x * 0x9E3779B1) & (1 << int(wide[1:])) - 1 for x in columns[0]]
    got = op(f"mad.wide.{kind} %d, %a, %b, %c;", wide, (kind, columns[0]), (kind, columns[1]), (wide, c))
    mask = (1 << int(wide[1:])) - 1
    assert got.tolist() == [(value(x, kind) * value(y, kind) + z) & mask for x, y, z in zip(*columns, c)]


def test_saturation() -> None:
    low, high = -(1 << 31), (1 << 31) - 1
    check("add.sat.s32 %d, %a, %b;", "s32", ["s32", "s32"], lambda a, b: min(max(a + b, low), high))
    check("sub.sat.s32 %d, %a, %b;", "s32", ["s32", "s32"], lambda a, b: min(max(a - b, low), high))
    check("mad.hi.sat.s32 %d, %a, %b, %c;", "s32", ["s32"] * 3, lambda a, b, c: min(max((a * b >> 32) + c, low), high))
    check("max.relu.s32 %d, %a, %b;", "s32", ["s32", "s32"], lambda a, b: max(a, b, 0))
    check("min.relu.s32 %d, %a, %b;", "s32", ["s32", "s32"], lambda a, b: max(min(a, b), 0))


def halves(function: Callable[[int, int], int], sign: bool) -> Callable[[int, int], int]:
    def packed(a: int, b: int) -> int:
        out = 0
        for shift in (0, 16):
            x, y = (v >> shift & 0xFFFF for v in (a, b))
            x, y = (signed(x, 16), signed(y, 16)) if sign else (x, y)
            out |= (function(x, y) & 0xFFFF) << shift
        return out

    return packed


def test_packed_halves() -> None:
    check("add.u16x2 %d, %a, %b;", "b32", ["b32", "b32"], halves(lambda x, y: x + y, False))
    check("min.s16x2 %d, %a, %b;", "b32", ["b32", "b32"], halves(min, True))
    check("max.u16x2 %d, %a, %b;", "b32", ["b32", "b32"], halves(max, False))
    check("max.relu.s16x2 %d, %a, %b;", "b32", ["b32", "b32"], halves(lambda x, y: max(x, y, 0), True))


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_24_bits(kind: str) -> None:
    def low24(v: int) -> int:
        return signed(v & 0xFFFFFF, 24) if kind == "s32" else v & 0xFFFFFF

    check(f"mul24.lo.{kind} %d, %a, %b;", kind, [kind, kind], lambda a, b: low24(a) * low24(b))
    check(f"mul24.hi.{kind} %d, %a, %b;", kind, [kind, kind], lambda a, b: low24(a) * low24(b) >> 16)
    check(f"mad24.lo.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: low24(a) * low24(b) + c)


def bytes_of(v: int, sign: bool) -> list[int]:
    return [signed(v >> 8 * i & 0xFF, 8) if sign else v >> 8 * i & 0xFF for i in range(4)]


def test_dot_products() -> None:
    check("dp4a.s32.u32 %d, %a, %b, %c;", "s32", ["b32", "b32", "s32"],
          lambda a, b, c: sum(x * y for x, y in zip(bytes_of(a, True), bytes_of(b, False))) + c)  # fmt: skip

    def dp2a(a: int, b: int, c: int) -> int:
        x = [a & 0xFFFF, a >> 16 & 0xFFFF]
        return sum(p * q for p, q in zip(x, bytes_of(b, True)[2:])) + c

    check("dp2a.hi.u32.s32 %d, %a, %b, %c;", "s32", ["b32", "b32", "s32"], dp2a)


def test_carries() -> None:
    """A 128-bit sum and difference from 32-bit pieces."""
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 1 << 32, (4, 32), dtype=np.uint32) for _ in range(2))
    a[1] = b[1] = 0xFFFFFFFF
    body = """.reg .b32 %t, %x<4>, %y<4>, %z<4>; .reg .b64 %o, %s; mov.u32 %t, %tid.x; mul.wide.u32 %o, %t, 4;"""
    for i in range(4):
        for name, reg in (("a", "x"), ("b", "y")):
            body += f"add.u64 %s, %{name}, %o; ld.global.b32 %{reg}{i}, [%s+{128 * i}];\n"
    for word, out in (("add", "sum"), ("sub", "difference")):
        body += f"{word}.cc.u32 %z0, %x0, %y0; {word}c.cc.u32 %z1, %x1, %y1; {word}c.cc.u32 %z2, %x2, %y2; {word}c.u32 %z3, %x3, %y3;\n"
        body += "".join(f"add.u64 %s, %{out}, %o; st.global.b32 [%s+{128 * i}], %z{i};\n" for i in range(4))
    zero = np.zeros((4, 32), np.uint32)
    r = run(body, {"a": a, "b": b, "sum": zero, "difference": zero})
    assert r.report.clean

    def whole(m: np.ndarray, lane: int) -> int:
        return sum(int(m[i, lane]) << 32 * i for i in range(4))

    for lane in range(32):
        x, y = whole(a, lane), whole(b, lane)
        assert whole(r.buffers["sum"], lane) == (x + y) % (1 << 128)
        assert whole(r.buffers["difference"], lane) == (x - y) % (1 << 128)


def test_wide_product_by_carries() -> None:
    """The upper word of a 64-bit product by mad.lo.cc and madc.hi."""
    text = """{ .reg .b32 %u, %v, %w, %x, %y, %z; mov.b64 {%u, %v}, %a; mov.b64 {%w, %x}, %b;
    mul.lo.u32 %y, %u, %w; mul.hi.u32 %z, %u, %w; mad.lo.cc.u32 %y, %u, %w, %y; madc.hi.u32 %z, %u, %w, %z; mov.b64 %d, {%y, %z}; }"""
    columns = operands(64, 2)
    got = op(text, "b64", ("b64", columns[0]), ("b64", columns[1]))
    low = 0xFFFFFFFF
    assert got.tolist() == [((a & low) * (b & low) * 2) & (1 << 64) - 1 for a, b in zip(*columns)]


def test_mov_packs_and_unpacks() -> None:
    v = operands(64, 1)[0]
    text = "{ .reg .b16 %w<4>; mov.b64 {%w0, %w1, %w2, %w3}, %a; mov.b64 %d, {%w3, %w2, %w1, %w0}; }"
    assert op(text, "b64", ("b64", v)).tolist() == [sum((x >> 48 - 16 * i & 0xFFFF) << 16 * i for i in range(4)) for x in v]
    text = "{ .reg .b32 %lo; mov.b64 {%lo, _}, %a; mov.b64 %d, {%lo, %lo}; }"
    assert op(text, "b64", ("b64", v)).tolist() == [(x & 0xFFFFFFFF) * 0x100000001 for x in v]
    text = "{ .reg .b128 %q; .reg .b64 %h; mov.b128 %q, {%a, %b}; mov.b128 {_, %d}, %q; }"
    assert op(text, "b64", ("b64", v), ("b64", v[::-1])).tolist() == v[::-1]


def test_selection() -> None:
    v = operands(32, 2)
    p = [i % 3 == 0 for i in range(len(v[0]))]
    got = op("selp.b32 %d, %a, %b, %c;", "b32", ("b32", v[0]), ("b32", v[1]), ("pred", [int(x) for x in p]))
    assert got.tolist() == [a if q else b for a, b, q in zip(*v, p)]
    got = op("slct.u32.s32 %d, %a, %b, %c;", "u32", ("u32", v[0]), ("u32", v[1]), ("s32", v[1][::-1]))
    assert got.tolist() == [a if signed(c, 32) >= 0 else b for a, b, c in zip(*v, v[1][::-1])]
    f = np.array([1.0, -1.0, -0.0, 0.0, np.nan, -1e-40] * 4, dtype=np.float32)
    ones, twos = ("b32", [1] * 24), ("b32", [2] * 24)
    assert op("slct.ftz.b32.f32 %d, %a, %b, %c;", "b32", ones, twos, ("f32", f)).tolist() == [1, 2, 1, 1, 2, 1] * 4
