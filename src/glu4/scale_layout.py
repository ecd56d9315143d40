"""Where each block scale lies in memory: the linear layout and the 128x4 swizzled one.

Both describe a matrix of `rows` x `cols` block scales (`cols` = K / 16) and map it to storage and back. The
swizzled layout is the operand layout of Blackwell's block-scaled MMA and of cuBLAS ("1D block scaling factors
layout", cuBLAS documentation, section 3.1.5): atoms of 128 rows x 4 scales, 512 bytes each, rows and columns
padded to whole atoms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LinearLayout", "SwizzledLayout"]

ATOM_ROWS = 128
ATOM_COLS = 4
ATOM_BYTES = ATOM_ROWS * ATOM_COLS


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class LinearLayout:
    """Row-major `[rows, cols]`, one byte a scale, no padding: the layout of every checkpoint on disk."""

    rows: int
    cols: int

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor, without batch dimensions."""
        return (self.rows, self.cols)

    def offset(self, row: int, col: int) -> int:
        """Byte offset of one scale within its matrix."""
        _check_index(self, row, col)
        return row * self.cols + col

    def coordinates(self, offset: int) -> tuple[int, int] | None:
        """(row, col) of the scale stored at `offset`; None where only padding is stored."""
        _check_offset(self.rows * self.cols, offset)
        return divmod(offset, self.cols)

    def store(self, scales: Tensor) -> Tensor:
        """`[..., rows, cols]` to storage: here the tensor itself."""
        return scales

    def load(self, storage: Tensor) -> Tensor:
        """Storage to `[..., rows, cols]`: here the tensor itself."""
        return storage


@dataclass(frozen=True)
class SwizzledLayout:
    """The 128x4 layout, stored as `[..., rest_rows, rest_cols, 32, 4, 4]`, contiguous.

    rest_rows = ceil(rows / 128) and rest_cols = ceil(cols / 4). Scale (i, j) of a matrix lies at byte

        (i // 128 * rest_cols + j // 4) * 512 + (i % 32) * 16 + (i % 128 // 32) * 4 + j % 4

    so that the last three dimensions are i % 32, i % 128 // 32 and j % 4.
    """

    rows: int
    cols: int

    @property
    def rest_rows(self) -> int:
        return _ceil_div(self.rows, ATOM_ROWS)

    @property
    def rest_cols(self) -> int:
        return _ceil_div(self.cols, ATOM_COLS)

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor, without batch dimensions."""
        return (self.rest_rows, self.rest_cols, 32, 4, 4)

    @property
    def nbytes(self) -> int:
        """Bytes of one stored matrix, padding included."""
        return self.rest_rows * self.rest_cols * ATOM_BYTES

    def offset(self, row: int, col: int) -> int:
        """Byte offset of one scale within its matrix."""
        _check_index(self, row, col)
        atom = row // ATOM_ROWS * self.rest_cols + col // ATOM_COLS
        return atom * ATOM_BYTES + row % 32 * 16 + row % ATOM_ROWS // 32 * 4 + col % ATOM_COLS

    def coordinates(self, offset: int) -> tuple[int, int] | None:
        """(row, col) of the scale stored at `offset`; None where only padding is stored."""
        _check_offset(self.nbytes, offset)
        atom, within = divmod(offset, ATOM_BYTES)
        atom_row, atom_col = divmod(atom, self.rest_cols)
        row = atom_row * ATOM_ROWS + within % 16 // 4 * 32 + within // 16
        col = atom_col * ATOM_COLS + within % 4
        return (row, col) if row < self.rows and col < self.cols else None

    def store(self, scales: Tensor) -> Tensor:
        """`[..., rows, cols]` to storage; padding is zero bytes, never uninitialised memory."""
        batch = scales.shape[:-2]
        padded = torch.zeros(
            (*batch, self.rest_rows * ATOM_ROWS, self.rest_cols * ATOM_COLS), dtype=torch.uint8, device=scales.device
        )
        padded[..., : self.rows, : self.cols] = scales.view(torch.uint8)
        atoms = padded.view(*batch, self.rest_rows, 4, 32, self.rest_cols, 4)
        n = len(batch)
        order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)
        return atoms.permute(order).contiguous().view(scales.dtype)

    def load(self, storage: Tensor) -> Tensor:
        """Storage `[..., rest_rows, rest_cols, 32, 4, 4]` to `[..., rows, cols]`."""
        batch = storage.shape[: storage.ndim - 5]
        atoms = storage.view(torch.uint8)
        n = len(batch)
        order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)
        shape = (*batch, self.rest_rows * ATOM_ROWS, self.rest_cols * ATOM_COLS)
        # reshape to the padded shape, then cut: reshaping to the logical one scrambles every padded matrix
        linear = atoms.permute(order).reshape(shape)
        return linear[..., : self.rows, : self.cols].contiguous().view(storage.dtype)


def _check_index(layout: LinearLayout | SwizzledLayout, row: int, col: int) -> None:
    if not (0 <= row < layout.rows and 0 <= col < layout.cols):
        raise IndexError(f"scale ({row}, {col}) is outside a matrix of {layout.rows} x {layout.cols} scales")


def _check_offset(nbytes: int, offset: int) -> None:
    if not 0 <= offset < nbytes:
        raise IndexError(f"offset {offset} is outside a stored matrix of {nbytes} bytes")
