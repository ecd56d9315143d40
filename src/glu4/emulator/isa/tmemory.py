"""Tensor memory of a CTA: its cells, which columns are allocated, and its shadow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.hazards import Origin
from glu4.emulator.memory import Block
from glu4.emulator.tmem import COLUMNS, LANES, Cells

if TYPE_CHECKING:
    from glu4.emulator.warp import Cta

__all__ = ["TensorMemory", "check_exit", "column_bits", "index_of"]


class TensorMemory:
    """128 lanes by 512 columns of 32 bits. allocated: first column to (columns, who); group: the cta_group in use."""

    def __init__(self, cta: Cta) -> None:
        self.cta = cta
        self.cells = np.full((LANES, COLUMNS), 0xD7D7D7D7, dtype=np.uint32)
        self.block = Block(f"tensor memory{list(cta.index)}", "tensor", 0, np.zeros(0, np.uint8))
        if cta.machine.monitor.enabled:
            self.block.writes = np.zeros((LANES, COLUMNS), dtype=np.uint32)
            self.block.reads = np.zeros((LANES, COLUMNS), dtype=np.uint32)
        self.allocated: dict[int, tuple[int, Origin]] = {}
        self.smallest = COLUMNS
        self.relinquished = False
        self.group = 0
        self.waiting: list[Any] = []

    @classmethod
    def of(cls, cta: Cta) -> TensorMemory:
        found = cta.extra.get("tensor memory")
        if found is None:
            found = cta.extra["tensor memory"] = cls(cta)
        return found

    def free_place(self, columns: int) -> int | None:
        """The first free columns, None if there are none."""
        at = 0
        for first, (size, _) in sorted(self.allocated.items()):
            if at + columns <= first:
                return at
            at = first + size
        return at if at + columns <= COLUMNS else None

    def allocate(self, place: int, columns: int, origin: Origin) -> None:
        self.allocated[place] = (columns, origin)
        self.cells[:, place : place + columns] = 0xD7D7D7D7
        if self.block.writes.size:  # what an earlier owner wrote is not there any more
            self.block.writes[:, place : place + columns] = 0

    def covers(self, columns: int) -> bool:
        """Whether every column of a set is allocated."""
        for first, (size, _) in self.allocated.items():
            columns &= ~(((1 << size) - 1) << first)
        return not columns


def column_bits(cells: Cells) -> int:
    """The columns of cells, bit by bit."""
    bits = 0
    for column in np.unique(cells.columns).tolist():
        bits |= 1 << column
    return bits


def index_of(cells: Cells) -> tuple[Any, Any]:
    """An index for the two dimensions, in the shape of the cells; slices where they are a rectangle [lanes, columns]."""
    lanes, columns = cells.lanes, cells.columns
    if lanes.ndim == 2 and lanes.shape[1] == 1 and columns.shape[0] == 1:
        a, b = lanes[:, 0], columns[0]
        if _consecutive(a) and _consecutive(b):
            return slice(int(a[0]), int(a[-1]) + 1), slice(int(b[0]), int(b[-1]) + 1)
    elif lanes.ndim == 2 and lanes.shape == columns.shape and (lanes == lanes[:, :1]).all() and (columns == columns[:1]).all():
        return index_of(Cells(lanes[:, :1], columns[:1]))
    return np.broadcast_arrays(lanes, columns)[0], np.broadcast_arrays(lanes, columns)[1]


def _consecutive(a: NDArray[Any]) -> bool:
    return bool((np.diff(a) == 1).all())


def check_exit(cta: Cta) -> None:
    """Tensor memory that is still allocated when the CTA has ended."""
    memory: TensorMemory | None = cta.extra.get("tensor memory")
    if memory is not None:
        for first, (size, origin) in memory.allocated.items():
            cta.machine.monitor.report(
                "tensor memory lifetime", f"columns {first} to {first + size - 1} are never deallocated", origin
            )
