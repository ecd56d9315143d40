"""Where things lie in tensor memory: accumulators, operand A, scales, the shapes of tcgen05.cp, .ld, .st and .shift.

Every function returns cells: broadcastable int64 arrays of lanes (0 to 127) and 32-bit columns (0 to 511), relative to lane 0
and column 0 of the CTA. PTX ISA 9.1 shows these layouts in figures only; they are taken from CUTLASS, whose layout library
the tests compare with: cute/atom/mma_traits_sm100_frag.hpp (accumulators, A, scales) and cute/atom/copy_traits_sm100.hpp
(cp, ld, st). What is in neither is refused or says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COLUMNS",
    "LANES",
    "Cells",
    "ScaleCells",
    "accumulator_cells",
    "cp_cells",
    "is_split",
    "operand_cells",
    "register_cells",
    "scale_cells",
    "shift_cells",
    "split_address",
]

LANES = 128
COLUMNS = 512
QUARTERS = 4  # subpartitions of 32 lanes, one for each warp of a warpgroup
QUARTER_LANES = LANES // QUARTERS

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """Broadcastable lanes and columns. Two cells may be one (copies in several lanes are separate cells)."""

    lanes: Index
    columns: Index


@dataclass(frozen=True)
class ScaleCells:
    """Cells of scales [4, rows] as each quarter of the lanes reads them; a scale is `scales` bytes of the word from `byte`."""

    lanes: Index
    columns: Index
    byte: int
    scales: int


def split_address(address: int) -> tuple[int, int]:
    """(lane, column) of a 32-bit tensor memory address (PTX ISA 9.7.16.1.1). Raises ValueError beyond 128 x 512."""
    lane, column = address >> 16, address & 0xFFFF
    if not 0 <= lane < LANES or column >= COLUMNS:
        raise ValueError(f"tensor memory address {address:#010x}: lane {lane}, column {column} is not in {LANES} x {COLUMNS}")
    return lane, column


def _check(what: str, lanes: Index, columns: Index) -> None:
    if lanes.size and (lanes.max() >= LANES or columns.max() >= COLUMNS):
        raise ValueError(
            f"{what}: lane {int(lanes.max())}, column {int(columns.max())} is not in {LANES} x {COLUMNS} of tensor memory"
        )


def _grid(*sizes: int) -> list[Index]:
    """One index array for each axis, shaped to broadcast with the others."""
    return [
        np.arange(size, dtype=np.int64).reshape([-1 if i == j else 1 for j in range(len(sizes))])
        for i, size in enumerate(sizes)
    ]


def _row_lanes(m: int, cta_group: int, lane: int) -> Index:
    """Lane of each row that one CTA holds, [rows], for an accumulator or A at `lane`."""
    rows = m // cta_group
    row = np.arange(rows, dtype=np.int64)
    if (m, cta_group) == (64, 1):
        if lane not in (0, 16):
            raise ValueError(f"tensor memory: M 64 lies at lane 0 or 16, given {lane}")
        return lane + QUARTER_LANES * (row // 16) + row % 16
    if lane:
        raise ValueError(f"tensor memory: M {m} of cta_group::{cta_group} lies at lane 0, given {lane}")
    return row


def is_split(m: int, cta_group: int) -> bool:
    """Whether the accumulator is the 2x2 one, with the second half of N in the upper 64 lanes (M 128 of a CTA pair)."""
    return (m, cta_group) == (128, 2)


def accumulator_cells(address: int, m: int, n: int, cta_group: int, stationary: bool = False) -> Cells:
    """Cells of a CTA's part of D: [M / cta_group, N], one 32-bit cell an element (16-bit D in the low half).

    CTA r of a pair holds rows r * M / 2 and on, all columns. Layouts A, B, D and F of PTX ISA 9.7.16.10.5, and with
    `stationary` (.ws) E, G and D, whose M of 64 and 32 put each half or quarter of N into lanes of its own.
    """
    lane, column = split_address(address)
    if stationary:
        if lane:
            raise ValueError(f"tensor memory: D of .ws lies at lane 0, given {lane}")
        row, place = _grid(m, n)
        width = n * m // LANES
        lanes, columns = row + m * (place // width), column + place % width
        _check("accumulator", lanes, columns)
        return Cells(lanes, columns)
    lanes = _row_lanes(m, cta_group, lane)[:, None]
    columns = np.arange(n, dtype=np.int64)[None, :]
    if is_split(m, cta_group):
        lanes, columns = lanes + 64 * (columns // (n // 2)), columns % (n // 2)
    columns = column + columns
    _check("accumulator", lanes, columns)
    return Cells(lanes, columns)


def operand_cells(address: int, m: int, cta_group: int, words: int) -> Cells:
    """Cells of a CTA's part of A in tensor memory: [copies, M / cta_group, words], K packed into 32-bit words.

    For the 2x2 accumulator A is there twice: copy h lies in lanes 64 h and on and is multiplied with half h of N.
    """
    lane, column = split_address(address)
    copies = 2 if is_split(m, cta_group) else 1
    lanes = _row_lanes(m, cta_group, lane)[None, :, None] + 64 * np.arange(copies, dtype=np.int64)[:, None, None]
    columns = column + np.arange(words, dtype=np.int64)[None, None, :]
    _check("operand A", lanes, columns)
    return Cells(lanes, columns)


def scale_cells(address: int, rows: int, scales: int, scale_id: int) -> ScaleCells:
    """Cells of the scales of one operand and instruction: [4, rows], each quarter of the lanes reading its own copy.

    Row r lies in lane r mod 32 of every quarter, column r / 32; its `scales` bytes start at byte `scale_id`. `rows` is a CTA's
    rows of A, or N, or N / 2 for B with the 2x2 accumulator: there quarters 0 and 1 hold the first half of N and
    quarters 2 and 3 the second, each from row 0 on.
    """
    lane, column = split_address(address & 0x3FFFFFFF)
    if lane:
        raise ValueError(f"scales: they lie at lane 0 of tensor memory, given {lane}")
    quarter, row = _grid(QUARTERS, rows)
    lanes = row % QUARTER_LANES + QUARTER_LANES * quarter
    columns = column + row // QUARTER_LANES + 0 * quarter
    _check("scales", lanes, columns)
    return ScaleCells(lanes, columns, scale_id, scales)


# (shape, multicast): source rows, 32-bit words of a row, and for each copy the first lane of each group of rows
_CP = {
    ("128x256b", ""): (128, 8, ((0,),)),
    ("128x128b", ""): (128, 4, ((0,),)),
    ("64x128b", "warpx2::02_13"): (64, 4, ((0,), (64,))),
    ("64x128b", "warpx2::01_23"): (64, 4, ((0, 64), (32, 96))),
    ("32x128b", "warpx4"): (32, 4, ((0,), (32,), (64,), (96,))),
}


def cp_cells(address: int, shape: str, multicast: str = "") -> Cells:
    """Target cells of `tcgen05.cp`: [copies, rows, words]; the source is a K-major matrix of `rows` x 4 * `words` bytes.

    `multicast` is "warpx4", "warpx2::02_13", "warpx2::01_23" or none. With cta_group::2 each CTA copies from its own shared
    memory into its own tensor memory. 4x256b puts a row into one lane of each quarter; its source is taken to be a matrix of
    four rows like any other. Raises ValueError for combinations that do not exist.
    """
    lane, column = split_address(address)
    if (shape, multicast) == ("4x256b", ""):
        if lane >= QUARTER_LANES:
            raise ValueError(f"tcgen05.cp: shape {shape} needs a lane below {QUARTER_LANES}, given {lane}")
        row, word = _grid(4, 8)
        lanes, columns = (lane + QUARTER_LANES * row)[None], (column + word)[None]
        _check("tcgen05.cp", lanes, columns)
        return Cells(lanes, columns)
    if (shape, multicast) not in _CP:
        known = ", ".join(".".join(filter(None, key)) for key in _CP)
        raise ValueError(f"tcgen05.cp: {'.'.join(filter(None, (shape, multicast)))} is not modelled; modelled are {known}")
    rows, words, copies = _CP[shape, multicast]
    if lane:
        raise ValueError(f"tcgen05.cp: shape {shape} needs lane 0, given {lane}")
    size = rows // len(copies[0])
    first = np.array(copies, dtype=np.int64)[:, :, None]  # [copies, groups, 1]
    lanes = (first + np.arange(size, dtype=np.int64)).reshape(len(copies), rows, 1)
    columns = column + np.arange(words, dtype=np.int64)[None, None, :]
    _check("tcgen05.cp", lanes, columns)
    return Cells(lanes, columns)


# shape: registers of .x1
_REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}


def _register_grid(shape: str, count: int, half_split: int, spread: int) -> tuple[Index, Index]:
    """(lane, column) offsets [32 threads, registers]; `spread` columns of 16 bits go into one register."""
    thread, register = _grid(32, count)
    if shape == "32x32b":
        return thread + 0 * register, spread * register + 0 * thread
    if shape == "16x32bx2":
        return thread % 16 + 0 * register, half_split * (thread // 16) + spread * register
    if shape == "16x64b":
        return thread // 4 + 8 * (thread % 2) + 0 * register, spread * (thread // 2 % 2 + 2 * register)
    if shape == "16x128b":
        return thread // 4 + 8 * (register % 2), spread * (thread % 4 + 4 * (register // 2))
    pair = register % 2 + 8 * (register // 4)
    return thread // 4 + 8 * (register // 2 % 2), spread * (2 * (thread % 4) + pair)


def register_cells(address: int, shape: str, num: int, *, packed: bool = False, half_split: int = 0) -> Cells:
    """Cells of `tcgen05.ld` and `.st`: [32 threads, registers], or [32, registers, 2] with .pack::16b or .unpack::16b.

    Packed, the low and high half of a register are the low halves of two adjacent columns. `num` is the N of .xN;
    `half_split` is 16x32bx2's immediate, the column offset of its second half. The lanes must be in the warp's own quarter,
    which the caller checks. Raises ValueError for a shape, number or lane that does not exist.
    """
    lane, column = split_address(address)
    if shape not in _REGISTERS:
        raise ValueError(f"tcgen05.ld/st: shape {shape} is unknown; known are {', '.join(_REGISTERS)}")
    count = num * _REGISTERS[shape]
    if num not in (1, 2, 4, 8, 16, 32, 64, 128) or count > 128:
        raise ValueError(f"tcgen05.ld/st: {shape}.x{num} does not exist")
    if lane % (32 if shape == "32x32b" else 16):
        raise ValueError(f"tcgen05.ld/st: {shape} cannot start at lane {lane}")
    lanes, columns = _register_grid(shape, count, half_split, 2 if packed else 1)
    lanes, columns = lane + lanes, column + columns
    if packed:
        lanes, columns = np.repeat(lanes[:, :, None], 2, axis=2), columns[:, :, None] + np.arange(2)
    _check("tcgen05.ld/st", lanes, columns)
    return Cells(lanes, columns)


def shift_cells(address: int) -> tuple[Cells, Cells]:
    """(source, target) cells [31, 8] of `tcgen05.shift.down`: lane i + 1 goes to lane i for 31 lanes of a warp, 32 bytes each.

    The ISA says that all rows but the last move by one; that they move to the lower lane, leaving the warp's last one for new
    data, follows from tcgen05.cp.4x256b, which refreshes exactly those lanes. No kernel known here uses it.
    """
    lane, column = split_address(address)
    if lane % QUARTER_LANES:
        raise ValueError(f"tcgen05.shift: lane {lane} is not a multiple of {QUARTER_LANES}")
    row, word = _grid(QUARTER_LANES - 1, 8)
    columns = column + word + 0 * row
    _check("tcgen05.shift", lane + row, columns)
    return Cells(lane + row + 1, columns), Cells(lane + row, columns)
