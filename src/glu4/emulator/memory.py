"""Memory: blocks of bytes with addresses, and the windows of the generic address space.

Generic addresses are 64 bits. Shared memory is a 32-bit window: (rank of the CTA in its cluster << 24) | offset, the form that
`mapa` yields. A CTA's own addresses carry its own rank, so that clearing bit 24 gives the even CTA of a pair.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONST_BASE", "GLOBAL_BASE", "LOCAL_BASE", "PARAM_BASE", "SHARED_BASE", "WINDOW", "Block", "Memory"]

WINDOW = 1 << 32  # bytes of each window below
PARAM_BASE = 0x7C00_0000_0000
CONST_BASE = 0x7B00_0000_0000
LOCAL_BASE = 0x7D00_0000_0000
SHARED_BASE = 0x7E00_0000_0000
GLOBAL_BASE = 0x0001_0000_0000
_GUARD = 1 << 20  # bytes between global blocks, so that running off one does not meet the next

_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Block:
    """Bytes with a base address. data: uint8; its first byte lies at `base`. readonly: stores are refused."""

    __slots__ = ("_views", "base", "data", "name", "readonly", "reads", "size", "space", "thread_bytes", "writes")

    def __init__(self, name: str, space: str, base: int, data: NDArray[np.uint8], readonly: bool = False) -> None:
        self.name = name
        self.space = space
        self.base = base
        self.data = data
        self.size = data.size
        self.readonly = readonly
        self.thread_bytes = 0  # local memory: bytes of one thread
        # shadow: per byte the record of the last write (0: never written), and the set of reads since
        self.writes: NDArray[np.uint32] = np.empty(0, np.uint32)
        self.reads: NDArray[np.uint32] = np.empty(0, np.uint32)
        self._views: dict[tuple[int, int, int], NDArray[Any]] = {}

    def shadow(self, written: bool) -> None:
        """Start tracking; `written`: the bytes hold values from the start."""
        self.writes = np.full(self.size, int(written), dtype=np.uint32)
        self.reads = np.zeros(self.size, dtype=np.uint32)
        self._views.clear()

    def place(self, offset: int) -> str:
        """An address in words."""
        if self.writes.ndim == 2:
            lane, column = divmod(offset, self.writes.shape[1])
            return f"{self.name} lane {lane} column {column}"
        return f"{self.name}+{offset}"

    def view(self, element: int, count: int = 1) -> NDArray[Any]:
        """The data as [units] of one element, or [units, count]; element: bytes."""
        key = (0, element, count)
        if key not in self._views:
            unit = element * count
            whole = self.data[: self.size // unit * unit].view(_TYPES[element])
            self._views[key] = whole if count == 1 else whole.reshape(-1, count)
        return self._views[key]

    def shadow_view(self, which: int, unit: int) -> NDArray[Any]:
        """The shadow as [units, bytes of a unit]; which: 1 writes, 2 reads."""
        key = (which, unit, 0)
        if key not in self._views:
            whole = self.writes if which == 1 else self.reads
            self._views[key] = whole[: self.size // unit * unit].reshape(-1, unit)
        return self._views[key]


class Memory:
    """Blocks by address, for the global, const and param windows."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._bases: list[int] = []
        self._next = {"global": GLOBAL_BASE, "const": CONST_BASE, "param": PARAM_BASE}

    def add(self, name: str, space: str, data: NDArray[np.uint8], align: int = 256, readonly: bool = False) -> Block:
        """A new block at the next free address of its window."""
        align = max(align, 256)
        base = -(-self._next[space] // align) * align
        self._next[space] = base + data.size + _GUARD
        block = Block(name, space, base, data, readonly)
        at = bisect_right(self._bases, base)
        self.blocks.insert(at, block)
        self._bases.insert(at, base)
        return block

    def find(self, address: int) -> Block | None:
        """The block that holds an address."""
        at = bisect_right(self._bases, address) - 1
        if at < 0:
            return None
        block = self.blocks[at]
        return block if address < block.base + block.size else None
