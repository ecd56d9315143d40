"""mma.sync of a warp: m16n8 with rows of 16 or 32 bytes, in fp16, bf16, tf32, FP8 and 8-bit integers, and m8n8k4 in fp16.

PTX ISA 9.7.14.5.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from glu4.emulator.isa.control import aligned
from glu4.emulator.isa.registry import Builder, Context, F, Modifiers, S, Step, U
from glu4.emulator.matrix import decode_operand, gather_operand, mma_sync_fragments, multiply
from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS"]

_fragments = cache(mma_sync_fragments)
_FP8, _INTEGERS = ("e4m3", "e5m2"), ("u8", "s8")
# types that A and B may have together, their bits, and those of C and D
_FAMILIES: tuple[tuple[tuple[str, ...], int, tuple[str, ...]], ...] = (
    (("f16",), 16, ("f16", "f32")),
    (("bf16",), 16, ("f32",)),
    (("tf32",), 32, ("f32",)),
    (_FP8, 8, ("f16", "f32")),
    (_INTEGERS, 8, ("s32",)),
)


def _types(mods: Modifiers, k: int) -> tuple[str, str, str, int, bool]:
    """(D, A, B, bits of A and B, saturate) after `.row.col`."""
    saturate = mods.take("satfinite")
    d_type = mods.choice(("f32", "f16", "s32"))
    a = mods.choice([name for names, _, _ in _FAMILIES for name in names])
    b = mods.choice([name for names, _, _ in _FAMILIES for name in names])
    mods.choice((d_type,))
    for names, bits, results in _FAMILIES:
        if a in names and b in names and d_type in results and k * bits in (128, 256) and not (saturate and d_type != "s32"):
            return d_type, a, b, bits, saturate
    raise mods.fail()


def _mma(context: Context, mods: Modifiers) -> Step:
    if not mods.take("sync", "aligned"):
        raise mods.fail()
    if mods.take("m8n8k4"):
        return _four(context, mods)
    k = int(mods.choice(("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32"))[5:].lstrip("k"))
    if not mods.take("row", "col"):
        raise mods.fail()
    d_type, a_type, b_type, bits, saturate = _types(mods, k)
    operands = context.operands(4)
    count = 2 if d_type == "f16" else 4
    registers = k * bits // 128
    d = [context.destination(o, "b32") for o in context.vector(operands[0], count)]
    a = [context.source(o, "b32") for o in context.vector(operands[1], 2 * registers)]
    parts = context.vector(operands[2], registers) if registers > 1 or hasattr(operands[2], "elements") else (operands[2],)
    b = [context.source(o, "b32") for o in parts]
    c = [context.source(o, "b32") for o in context.vector(operands[3], count)]
    a_part, b_part, d_part = _fragments(k, d_type, bits)
    b_rows = type(b_part)(b_part.columns, b_part.rows)  # B transposed: [n, k]

    def words(w: Split, rows: list[int]) -> Any:
        return np.stack([w.r[U][row] for row in rows], axis=1)

    def step(w: Split) -> None:
        aligned(w, context)
        left = decode_operand(gather_operand(words(w, a), a_part, 16, k, bits), a_type, bits)
        right = decode_operand(gather_operand(words(w, b), b_rows, 8, k, bits), b_type, bits)
        old: Any = np.empty((16, 8), dtype={"f32": np.float32, "s32": np.int32, "f16": np.float16}[d_type])
        if d_type == "f16":
            old[d_part.rows, d_part.columns] = words(w, c).view(np.float16).reshape(32, -1, 2)
        else:
            view = F if d_type == "f32" else S
            old[d_part.rows[..., 0], d_part.columns[..., 0]] = np.stack([w.r[view][row] for row in c], axis=1)
        new = multiply(left, right, old, d_type, saturate=saturate)[d_part.rows, d_part.columns]
        results = np.ascontiguousarray(new).view(np.uint32).reshape(32, -1)
        for i, row in enumerate(d):
            w.put(w.r[U][row], results[:, i])

    return step


# m8n8k4: four products, each of four threads below 16 and the four that are 16 further on (9.7.14.5.1)


def _four_fragment(count: int, row: Any, column: Any) -> tuple[Any, Any, Any]:
    """(product, row, column) of each element, [32, count]; row, column: of (thread, element, 4 for the upper threads)."""
    thread, i = np.indices((32, count), dtype=np.int64)
    upper = 4 * (thread // 16)
    return thread % 16 // 4, row(thread % 4, i, upper) + 0 * thread, column(thread % 4, i, upper) + 0 * thread


def _four_results(d_type: str) -> tuple[Any, Any, Any]:
    if d_type == "f16":
        return _four_fragment(8, lambda t, i, up: t + up, lambda t, i, up: i)
    return _four_fragment(8, lambda t, i, up: (t & 1) + (i & 2) + up, lambda t, i, up: (i & 4) + (t & 2) + (i & 1))


def _four(context: Context, mods: Modifiers) -> Step:
    """After `mma.sync.aligned.m8n8k4`."""
    a_major, b_major = mods.choice(("row", "col")), mods.choice(("row", "col"))
    d_type = mods.choice(("f32", "f16"))
    if not mods.take("f16", "f16"):
        raise mods.fail()
    c_type = mods.choice(("f32", "f16"))
    if (c_type, d_type) == ("f32", "f16"):
        raise mods.fail()
    operands = context.operands(4)
    counts = {"f16": 4, "f32": 8}
    d = [context.destination(o, "b32") for o in context.vector(operands[0], counts[d_type])]
    a, b = ([context.source(o, "b32") for o in context.vector(operand, 2)] for operand in operands[1:3])
    c = [context.source(o, "b32") for o in context.vector(operands[3], counts[c_type])]
    lines = _four_fragment(4, lambda t, i, up: t + up, lambda t, i, up: i)  # a thread has a row of A, or column of B
    depths = _four_fragment(4, lambda t, i, up: i + up, lambda t, i, up: t)  # or four rows, or columns, of one K
    a_part, b_part = depths if a_major == "col" else lines, depths if b_major == "row" else lines
    c_part, d_part = _four_results(c_type), _four_results(d_type)

    def values(w: Split, rows: list[int], kind: Any) -> Any:
        return np.stack([w.r[U][row] for row in rows], axis=1).view(kind)

    def step(w: Split) -> None:
        aligned(w, context)
        left, right = np.empty((4, 8, 4)), np.empty((4, 8, 4))
        left[a_part], right[b_part] = values(w, a, np.float16), values(w, b, np.float16)
        old = np.empty((4, 8, 8))
        old[c_part] = values(w, c, np.float32 if c_type == "f32" else np.float16)
        new = np.stack([multiply(x, y, z, d_type) for x, y, z in zip(left, right, old)])[d_part]
        results = np.ascontiguousarray(new).view(np.uint32).reshape(32, -1)
        for i, row in enumerate(d):
            w.put(w.r[U][row], results[:, i])

    return step


INSTRUCTIONS: dict[str, Builder] = {"mma": _mma}
