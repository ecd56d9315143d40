"""mma.sync of a warp: m16n8k8 and m16n8k16 in fp16 and bf16 (PTX ISA 9.7.14.5)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.isa.control import aligned
from glu4.emulator.isa.registry import Builder, Context, F, Modifiers, Step, U
from glu4.emulator.matrix import Fragment, decode_operand, mma_sync_fragments, multiply
from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS"]

_fragments = cache(mma_sync_fragments)


def _codes(w: Split, rows: list[int], fragment: Fragment, shape: tuple[int, int]) -> NDArray[Any]:
    """A matrix of 16-bit codes from the registers of all lanes."""
    words = np.stack([w.r[U][row] for row in rows], axis=1).view(np.uint16).reshape(32, -1, 2)
    codes = np.empty(shape, dtype=np.uint16)
    codes[fragment.rows, fragment.columns] = words
    return codes


def _mma(context: Context, mods: Modifiers) -> Step:
    if not mods.take("sync", "aligned"):
        raise mods.fail()
    k = int(mods.choice(("m16n8k8", "m16n8k16"))[5:].lstrip("k"))
    if not mods.take("row", "col"):
        raise mods.fail()
    d_type = mods.choice(("f32", "f16"))
    operand = mods.choice(("f16", "bf16"))
    mods.choice((operand,))
    mods.choice((d_type,))
    if d_type == "f16" and operand != "f16":
        raise mods.fail()
    operands = context.operands(4)
    count = 4 if d_type == "f32" else 2
    d = [context.destination(o, "b32") for o in context.vector(operands[0], count)]
    a = [context.source(o, "b32") for o in context.vector(operands[1], k // 4)]
    b = [context.source(o, "b32") for o in context.vector(operands[2], k // 8)]
    c = [context.source(o, "b32") for o in context.vector(operands[3], count)]
    a_part, b_part, d_part = _fragments(k, d_type)

    def step(w: Split) -> None:
        aligned(w, context)
        left = decode_operand(_codes(w, a, a_part, (16, k)).view(np.uint8), operand, 16)
        right = decode_operand(np.ascontiguousarray(_codes(w, b, b_part, (k, 8)).T).view(np.uint8), operand, 16)
        old: Any = np.empty((16, 8), dtype=np.float32 if d_type == "f32" else np.float16)
        if d_type == "f32":
            old[d_part.rows[..., 0], d_part.columns[..., 0]] = np.stack([w.r[F][row] for row in c], axis=1)
        else:
            old[d_part.rows, d_part.columns] = np.stack([w.r[U][row] for row in c], axis=1).view(np.float16).reshape(32, -1, 2)
        new = multiply(left, right, old, d_type)[d_part.rows, d_part.columns]
        words = np.ascontiguousarray(new).view(np.uint32).reshape(32, -1)
        for i, row in enumerate(d):
            np.copyto(w.r[U][row], words[:, i], where=w.mask)

    return step


INSTRUCTIONS: dict[str, Builder] = {"mma": _mma}
