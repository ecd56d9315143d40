"""mma.sync in every type that is modelled; where elements lie is worded after PTX ISA 9.7.14.5.6 to 9.7.14.5.10."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.runner import run
from emulator.test_wgmma import OPERANDS
from glu4.emulator.errors import PtxError

# K, types of A, B and D
CASES = [
    (4, "tf32", "tf32", "f32"), (8, "tf32", "tf32", "f32"), (8, "f16", "f16", "f16"), (16, "f16", "f16", "f32"),
    (16, "e4m3", "e5m2", "f32"), (32, "e5m2", "e4m3", "f16"), (32, "e4m3", "e4m3", "f32"),
    (16, "u8", "s8", "s32"), (32, "s8", "u8", "s32"), (32, "s8", "s8", "s32"),
]  # fmt: skip
NUMPY = {"f32": np.float32, "f16": np.float16, "s32": np.int32}


def multiply(k: int, a_type: str, b_type: str, d_type: str, c: np.ndarray, saturate: str = "") -> tuple[np.ndarray, np.ndarray]:
    """(D, A B^T + C exactly) of one warp."""
    rng = np.random.default_rng(k)
    (a, x), (b, y) = ((s[:, :k], v[:, :k]) for s, v in (OPERANDS[a_type](rng, 16), OPERANDS[b_type](rng, 8)))
    per = 4 // a.itemsize  # elements of a register
    lanes = [(t // 4, t % 4) for t in range(32)]
    registers = k // (4 * per)  # of B; A has twice as many, for its upper and lower 8 rows
    a_part = [
        [[a[g + 8 * (r % 2), 4 * per * (r // 2) + per * q + e] for e in range(per)] for r in range(2 * registers)]
        for g, q in lanes
    ]
    b_part = [[[b[g, 4 * per * r + per * q + e] for e in range(per)] for r in range(registers)] for g, q in lanes]
    c_part = np.array([[[c[g + 8 * r, 2 * q + h] for h in (0, 1)] for r in (0, 1)] for g, q in lanes], c.dtype)
    count = 2 if d_type == "f16" else 4
    body = ".reg .b32 %t, %ra<4>, %rb<2>, %rc<4>; .reg .b64 %o, %at; mov.u32 %t, %tid.x;"
    for name, size in (("a", 2 * registers), ("b", registers), ("c", count)):
        body += f"mul.wide.u32 %o, %t, {4 * size}; add.u64 %at, %{name}, %o;"
        body += "".join(f"ld.global.b32 %r{name}{i}, [%at+{4 * i}];" for i in range(size))
    vectors = [
        "{" + ", ".join(f"%r{name}{i}" for i in range(size)) + "}"
        for name, size in (("c", count), ("a", 2 * registers), ("b", registers), ("c", count))
    ]
    body += f"mma.sync.aligned.m16n8k{k}.row.col{saturate}.{d_type}.{a_type}.{b_type}.{d_type} {', '.join(vectors)};"
    body += f"mul.wide.u32 %o, %t, {4 * count}; add.u64 %at, %out, %o;"
    body += "".join(f"st.global.b32 [%at+{4 * i}], %rc{i};" for i in range(count))
    r = run(body, {"a": np.array(a_part, a.dtype), "b": np.array(b_part, b.dtype), "c": c_part, "out": np.zeros_like(c_part)})
    assert r.report.clean, str(r.report)
    d = np.zeros((16, 8))
    for t, (g, q) in enumerate(lanes):
        for row in (0, 1):
            d[g + 8 * row, 2 * q : 2 * q + 2] = r.buffers["out"][t, row]
    return d, x @ y.T + c


@pytest.mark.parametrize(("k", "a", "b", "d"), CASES)
def test_products(k: int, a: str, b: str, d: str) -> None:
    c = np.random.default_rng(0).integers(-9, 10, (16, 8)).astype(NUMPY[d])
    got, exact = multiply(k, a, b, d, c)
    np.testing.assert_array_equal(got, exact)


@pytest.mark.parametrize(("a_major", "b_major"), [("row", "col"), ("col", "row"), ("row", "row"), ("col", "col")])
@pytest.mark.parametrize(("d_type", "c_type"), [("f16", "f16"), ("f32", "f16"), ("f32", "f32")])
def test_four_products_of_eight_by_eight(a_major: str, b_major: str, d_type: str, c_type: str) -> None:
    """The formulas of 9.7.14.5.1, element by element."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-4, 5, (4, *shape)).astype(np.float16) for shape in ((8, 4), (4, 8), (8, 8)))

    def place(lane: int, i: int, kind: str) -> tuple[int, int]:
        low = lane < 16
        if kind == "f16":
            return (lane % 4 if low else lane % 4 + 4), i
        x = (lane & 1) + (i & 2)
        return (x if low else x + 4), (i & 4) + (lane & 2) + (i & 1)

    parts: dict[str, list[list[float]]] = {"a": [], "b": [], "c": []}
    for lane in range(32):
        n, low = lane % 16 // 4, lane < 16
        near = lane % 4 if low else lane % 4 + 4
        far = [i if low else i + 4 for i in range(4)]
        parts["a"].append([a[n, near, i] if a_major == "row" else a[n, far[i], lane % 4] for i in range(4)])
        parts["b"].append([b[n, lane % 4, far[i]] if b_major == "row" else b[n, i, near] for i in range(4)])
        parts["c"].append([c[n][place(lane, i, c_type)] for i in range(8)])
    data = {
        "a": np.array(parts["a"], np.float16),
        "b": np.array(parts["b"], np.float16),
        "c": np.array(parts["c"], NUMPY[c_type]),
    }
    counts = {"a": 2, "b": 2, "c": 4 if c_type == "f16" else 8, "d": 4 if d_type == "f16" else 8}
    body = ".reg .b32 %t, %ra<2>, %rb<2>, %rc<8>, %rd<8>; .reg .b64 %o, %at; mov.u32 %t, %tid.x;"
    for name in "abc":
        body += f"mul.wide.u32 %o, %t, {4 * counts[name]}; add.u64 %at, %{name}, %o;"
        body += "".join(f"ld.global.b32 %r{name}{i}, [%at+{4 * i}];" for i in range(counts[name]))
    vectors = ["{" + ", ".join(f"%r{name}{i}" for i in range(counts[name])) + "}" for name in "dabc"]
    body += f"mma.sync.aligned.m8n8k4.{a_major}.{b_major}.{d_type}.f16.f16.{c_type} {', '.join(vectors)};"
    body += f"mul.wide.u32 %o, %t, {4 * counts['d']}; add.u64 %at, %out, %o;"
    body += "".join(f"st.global.b32 [%at+{4 * i}], %rd{i};" for i in range(counts["d"]))
    r = run(body, {**data, "out": np.zeros((32, 8), NUMPY[d_type])})
    assert r.report.clean, str(r.report)
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    for lane in range(32):
        for i in range(8):
            assert r.buffers["out"][lane, i] == exact[lane % 16 // 4][place(lane, i, d_type)]


def test_integers_stop_or_wrap() -> None:
    c = np.full((16, 8), -(2**31) + 3, np.int32)
    wrapped, exact = multiply(32, "s8", "s8", "s32", c)
    assert (exact < -(2**31)).any()
    np.testing.assert_array_equal(wrapped, (exact + 2**31) % 2**32 - 2**31)
    stopped, _ = multiply(32, "s8", "s8", "s32", c, ".satfinite")
    np.testing.assert_array_equal(stopped, np.maximum(exact, -(2**31)))


@pytest.mark.parametrize(
    "words",
    [
        "m8n8k4.row.col.f16.f16.f16.f32",
        "m8n8k4.row.col.f64.f64.f64.f64",
        "m16n8k16.row.col.f16.bf16.bf16.f16",
        "m16n8k32.row.col.f32.f16.f16.f32",
        "m16n8k4.row.col.f32.f16.f16.f32",
        "m16n8k32.row.col.s32.s8.e4m3.s32",
        "m16n8k64.row.col.s32.s4.s4.s32",
        "m16n8k32.row.col.kind::f8f6f4.f32.e4m3.e4m3.f32",
        "m16n8k8.row.col.satfinite.f32.tf32.tf32.f32",
        "m16n8k16.row.row.f32.f16.f16.f32",
    ],
)
def test_others_are_refused_by_name(words: str) -> None:
    text = f".reg .b32 %r<4>; mma.sync.aligned.{words} {{%r0, %r1, %r2, %r3}}, {{%r0, %r1}}, {{%r0}}, {{%r0, %r1, %r2, %r3}};"
    with pytest.raises(PtxError, match=rf"mma.sync.aligned.{words} is not modelled"):
        run(text)
