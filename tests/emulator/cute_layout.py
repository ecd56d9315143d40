"""CuTe layouts written as text, evaluated: shape and stride trees, with an optional swizzle before them.

Written from the definition of a layout (a function from coordinates to integers), for tests that compare the emulator's maps
with recorded layouts; nothing of the emulator is used.
"""

from __future__ import annotations

import json
import re
from ast import literal_eval
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

RECORDED = Path(__file__).parent / "fixtures" / "cute_layouts.json"


def recorded(section: str) -> list[dict[str, Any]]:
    return list(json.loads(RECORDED.read_text())[section])


def _size(shape: Any) -> int:
    return prod(_size(s) for s in shape) if isinstance(shape, tuple) else int(shape)


def _evaluate(shape: Any, stride: Any, index: np.ndarray) -> np.ndarray:
    """A mode at a one-dimensional index, which is split among its submodes, the first varying fastest."""
    if not isinstance(shape, tuple):
        return index * stride
    total = np.zeros_like(index)
    for part, step in zip(shape, stride):
        total = total + _evaluate(part, step, index % _size(part))
        index = index // _size(part)
    return total


class Layout:
    """`Layout(text)(i, j, ...)`: one index, or array of indices, for each top-level mode, broadcast; offsets as int64.

    A swizzle S<B,M,S> is kept in `swizzle` and not applied: it acts on byte addresses.
    """

    def __init__(self, text: str) -> None:
        swizzle = re.match(r"S<(\d+),(\d+),(\d+)> o 0 o ", text)
        self.swizzle = tuple(int(g) for g in swizzle.groups()) if swizzle else (0, 4, 3)
        # a mode of one element is written (x)
        shape, stride = (part.replace("(1)", "1") for part in text[swizzle.end() if swizzle else 0 :].split(":"))
        self.shape, self.stride = literal_eval(shape), literal_eval(stride)

    def sizes(self) -> list[int]:
        return [_size(s) for s in self.shape]

    def __call__(self, *index: Any) -> np.ndarray:
        modes = [_evaluate(s, d, np.asarray(i, dtype=np.int64)) for s, d, i in zip(self.shape, self.stride, index)]
        return np.asarray(sum(np.broadcast_arrays(*modes)))

    def swizzled(self, byte_address: np.ndarray) -> np.ndarray:
        """Byte addresses after S<B,M,S>: bits M to M+B-1 exclusive-or bits M+S to M+S+B-1."""
        bits, base, shift = self.swizzle
        return byte_address ^ ((byte_address >> (base + shift) & ((1 << bits) - 1)) << base)
