"""ldmatrix and stmatrix of 8-bit, 6-bit and 4-bit elements; those of 16 bits are in test_memory.py.

What is expected is worded after PTX ISA 9.7.14.5.15 and 9.7.14.5.16: a group of four threads has a row, a thread four columns of it
in a register, rows 8 to 15 in a second one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emulator.runner import kinds, run
from glu4.emulator.errors import PtxError

# 32 rows of 16 bytes lie 32 bytes apart; thread t gives the address of row t
SETUP = """.shared .align 16 .b8 room[1024]; .reg .b32 %t, %s, %r<4>, %v<4>; .reg .b64 %at, %o; mov.u32 %t, %tid.x; mov.u32 %s, room; mad.lo.u32 %s, %t, 32, %s;
"""
FILL = """mul.wide.u32 %o, %t, 16; add.u64 %at, %a, %o; ld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%at]; st.shared.v4.b32 [%s], {%v0, %v1, %v2, %v3}; bar.warp.sync -1;
"""


def load(words: str, count: int, memory: np.ndarray, fill: str = FILL) -> Any:
    vector = "{" + ", ".join(f"%r{i}" for i in range(count)) + "}"
    body = SETUP + fill + f"ldmatrix.sync.aligned.{words} {vector}, [%s];"
    body += f"mul.wide.u32 %o, %t, {4 * count}; add.u64 %at, %out, %o;" + "".join(
        f"st.global.b32 [%at+{4 * i}], %r{i};" for i in range(count)
    )
    return run(body, {"a": memory, "out": np.zeros((32, count), np.uint32)})


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of 16 elements at the start of 16 bytes."""
    out = np.full((len(codes), 16), 0xEE, np.uint8)
    for row, line in zip(out, codes):
        number = sum(int(code) << bits * i for i, code in enumerate(line))
        row[: 2 * bits] = np.frombuffer(number.to_bytes(2 * bits, "little"), np.uint8)
    return out


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("kind", "bits"), [("b6x16_p32", 6), ("b4x16_p64", 4)])
def test_rows_of_narrow_elements(count: int, kind: str, bits: int) -> None:
    codes = np.random.default_rng(count).integers(0, 1 << bits, (32, 16))
    r = load(f"m8n16.x{count}.shared.b8x16.{kind}", count, packed(codes, bits))
    assert r.report.clean, str(r.report)
    for t in range(32):
        for i in range(count):
            four = codes[8 * i + t // 4, 4 * (t % 4) : 4 * (t % 4) + 4].astype(np.uint8)
            assert r.buffers["out"][t, i] == four.view(np.uint32)[0]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("kind", "bits"), [("b8", 8), ("b8x16.b6x16_p32", 6), ("b8x16.b4x16_p64", 4)])
def test_columns_of_sixteen_by_sixteen(count: int, kind: str, bits: int) -> None:
    codes = np.random.default_rng(count).integers(0, 1 << bits, (32, 16))
    r = load(f"m16n16.x{count}.trans.shared::cta.{kind}", 2 * count, packed(codes, bits))
    assert r.report.clean, str(r.report)
    for t in range(32):
        for i in range(2 * count):
            matrix = codes[16 * (i // 2) : 16 * (i // 2) + 16].T
            four = matrix[t // 4 + 8 * (i % 2), 4 * (t % 4) : 4 * (t % 4) + 4].astype(np.uint8)
            assert r.buffers["out"][t, i] == four.view(np.uint32)[0]


def test_padding_is_not_read() -> None:
    for kind, written in (("b4x16_p64", 2), ("b6x16_p32", 3)):
        for stores in (written, written - 1):
            fill = FILL.replace(
                "st.shared.v4.b32 [%s], {%v0, %v1, %v2, %v3};",
                "".join(f"st.shared.b32 [%s+{4 * i}], %v{i};" for i in range(stores)),
            )
            r = load(f"m8n16.x4.shared.b8x16.{kind}", 4, np.zeros((32, 16), np.uint8), fill)
            assert kinds(r) == ([] if stores == written else ["uninitialised read"]), str(r.report)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_stores_of_eight_bits(count: int) -> None:
    """The 16 x 8 fragment of mma.sync's results: a thread has columns 2 q and 2 q + 1 of rows g and g + 8."""
    data = np.random.default_rng(count).integers(0, 256, (32, count, 4), dtype=np.uint8)
    vector = "{" + ", ".join(f"%r{i}" for i in range(count)) + "}"
    body = SETUP + f"mul.wide.u32 %o, %t, {4 * count}; add.u64 %at, %a, %o;"
    body += "".join(f"ld.global.b32 %r{i}, [%at+{4 * i}];" for i in range(count))
    body += f"stmatrix.sync.aligned.m16n8.x{count}.trans.shared.b8 [%s], {vector}; bar.warp.sync -1;"
    body += f".reg .pred %p; setp.lt.u32 %p, %t, {8 * count}; mul.wide.u32 %o, %t, 16; add.u64 %at, %out, %o;"
    body += "@%p ld.shared.v4.b32 {%v0, %v1, %v2, %v3}, [%s]; @%p st.global.v4.b32 [%at], {%v0, %v1, %v2, %v3};"
    r = run(body, {"a": data, "out": np.zeros((32, 16), np.uint8)})
    assert r.report.clean, str(r.report)
    for i in range(count):
        matrix = np.zeros((16, 8), np.uint8)
        for t in range(32):
            g, q = divmod(t, 4)
            matrix[g, 2 * q : 2 * q + 2], matrix[g + 8, 2 * q : 2 * q + 2] = data[t, i, :2], data[t, i, 2:]
        # stored by columns: a row of memory is a column of the matrix
        np.testing.assert_array_equal(r.buffers["out"][8 * i : 8 * i + 8], matrix.T)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ldmatrix.sync.aligned.m16n16.x1.shared.b8 {%r0, %r1}, [%s];", "m16n16 needs .trans"),
        ("ldmatrix.sync.aligned.m8n16.x1.trans.shared.b8x16.b4x16_p64 {%r0}, [%s];", "m8n16 has no .trans"),
        ("ldmatrix.sync.aligned.m8n16.x1.shared.b8 {%r0}, [%s];", "is not modelled"),
        ("ldmatrix.sync.aligned.m16n16.x4.trans.shared.b8 {%r0, %r1}, [%s];", "expected one of .x1, .x2"),
        ("stmatrix.sync.aligned.m16n8.x1.shared.b8 [%s], {%r0};", "m16n8 needs .trans"),
        ("stmatrix.sync.aligned.m16n16.x1.trans.shared.b8 [%s], {%r0, %r1};", "expected one of .m8n8, .m16n8"),
    ],
)
def test_shapes_that_do_not_exist_are_refused(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(SETUP + text)
