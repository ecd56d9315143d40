"""Numbers of the matrix instructions: mma.sync, wgmma and tcgen05.mma, and the register fragments of the first two.

One instruction computes D = round(sum over k of A * B + D): products and their sum in float64, then one rounding to D's type,
to nearest. For e2m1 with ue4m3 scales the sum is exact. The hardware's order and rounding of the additions are not documented
(PTX ISA 9.1, 9.7.15.5.2: at least single precision), so a comparison with hardware needs `accumulation_bound`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.formats import decode, encode
from glu4.emulator.instruction_descriptor import InstructionDescriptor

__all__ = [
    "OPERAND_BYTES",
    "Fragment",
    "accumulation_bound",
    "decode_containers",
    "decode_operand",
    "gather_operand",
    "mma_sync_fragments",
    "multiply",
    "read_scales",
    "storage_bits",
    "tcgen05_multiply",
    "unpack_sixteens",
    "wgmma_fragments",
]

_ONE_THREAD = 1 << 18  # multiplications of a product that OpenBLAS does on the calling thread
OPERAND_BYTES = 32  # of one row of A or B for one tcgen05.mma or wgmma, of every type
_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "u8": 8, "s8": 8, "e4m3": 8, "e5m2": 8, "e2m3": 6, "e3m2": 6, "e2m1": 4}

Index = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Fragment:
    """Row and column of each element that the threads hold: int64 [threads, registers, elements of a register]."""

    rows: Index
    columns: Index


def _grid(threads: int, registers: int, elements: int) -> tuple[Index, Index, Index]:
    thread, register, element = np.indices((threads, registers, elements), dtype=np.int64)
    return thread, register, element


def _operand_fragment(threads: int, registers: int, bits: int) -> Fragment:
    """A of a warp's 16 rows, as many elements a register as fit; each further warp has the next 16 rows."""
    per = 32 // bits
    thread, register, element = _grid(threads, registers, per)
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
    return Fragment(rows, per * (thread % 4) + element + 4 * per * (register // 2))


def _result_fragment(threads: int, registers: int, halves: int) -> Fragment:
    """D of a warp's 16 rows: two float32 registers, or one pair of f16, for each row and 8 columns."""
    thread, register, half = _grid(threads, registers, halves)
    pair, element = (register, half) if halves == 2 else (register // 2, register % 2)
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (pair % 2)
    return Fragment(rows, 2 * (thread % 4) + element + 8 * (pair // 2))


def wgmma_fragments(n: int, d_type: str, bits: int = 16) -> tuple[Fragment, Fragment]:
    """(A, D) of `wgmma.mma_async` m64nN for 128 threads; d_type f32 or s32, or f16 with two elements a register.

    bits: of an element of A, of which a row has 32 bytes. PTX ISA 9.7.15.5.1.1. Raises ValueError for an N or type that does
    not exist.
    """
    if n % 8 or not 8 <= n <= 256:
        raise ValueError(f"wgmma: N {n} is not possible; it is 8 to 256 in steps of 8")
    if d_type not in ("f32", "s32", "f16"):
        raise ValueError(f"wgmma: D type {d_type} is not modelled; modelled are f32, s32, f16")
    result = _result_fragment(128, n // 4, 2) if d_type == "f16" else _result_fragment(128, n // 2, 1)
    return _operand_fragment(128, 4, bits), result


def mma_sync_fragments(k: int, d_type: str, bits: int = 16) -> tuple[Fragment, Fragment, Fragment]:
    """(A, B, D) of `mma.sync` m16n8 whose rows have 16 or 32 bytes of elements of `bits` bits; rows of B's fragment are k.

    PTX ISA 9.7.14.5.6 to 9.7.14.5.10. Raises ValueError for another K or type.
    """
    if k * bits not in (128, 256):
        raise ValueError(f"mma.sync: K {k} is not modelled; modelled are m16n8k{128 // bits} and m16n8k{256 // bits}")
    if d_type not in ("f32", "s32", "f16"):
        raise ValueError(f"mma.sync: D type {d_type} is not modelled; modelled are f32, s32, f16")
    registers, per = k * bits // 128, 32 // bits
    thread, register, element = _grid(32, registers, per)
    b = Fragment(per * (thread % 4) + element + 4 * per * register, thread // 4)
    result = _result_fragment(32, 2, 2) if d_type == "f16" else _result_fragment(32, 4, 1)
    return _operand_fragment(32, 2 * registers, bits), b, result


def gather_operand(words: NDArray[np.uint32], fragment: Fragment, rows: int, depth: int, bits: int) -> NDArray[np.uint8]:
    """Bytes [rows, depth * bits / 8] of an operand from its registers, uint32 [threads, registers]."""
    kind = np.dtype(f"<u{bits // 8}")
    codes = np.empty((rows, depth), dtype=kind)
    codes[fragment.rows, fragment.columns] = np.ascontiguousarray(words).view(kind).reshape(fragment.rows.shape)
    return codes.view(np.uint8)


def storage_bits(kind: str, operand_type: str) -> int:
    """Bits of shared memory that one element of A or B takes: 8 for all types of kinds f8f6f4 and mxf8f6f4.

    Their 4-bit and 6-bit elements lie in sixteens, packed at the start of 16 bytes, the rest of which is padding
    (PTX ISA 9.7.16.10.4.4).
    """
    return 8 if kind in ("f8f6f4", "mxf8f6f4") else _BITS[operand_type]


def unpack_sixteens(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Sixteen elements of `bits` bits at the start of each 16 bytes to a byte each: uint8 of the same shape [rows, bytes]."""
    rows = data.shape[0]
    stream = np.unpackbits(data.reshape(rows, -1, 16), axis=-1, bitorder="little")[:, :, : 16 * bits]
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return np.asarray((stream.reshape(rows, -1, 16, bits) * weights).sum(axis=-1, dtype=np.uint8).reshape(rows, -1))


def decode_operand(data: NDArray[np.uint8], operand_type: str, storage: int) -> Values:
    """Values of an operand, float64 [rows, K], from its bytes, uint8 [rows, bytes], K contiguous.

    `storage` as `storage_bits` gives it; 4-bit elements have the lower K in the lower nibble.
    """
    bits = _BITS[operand_type]
    rows = data.shape[0]
    if operand_type in ("u8", "s8"):
        return np.ascontiguousarray(data).view(np.int8 if operand_type == "s8" else np.uint8).astype(np.float64)
    if bits == storage == 4:
        codes = np.stack([data & 15, data >> 4], axis=-1).reshape(rows, -1)
    elif bits == storage:
        codes = np.ascontiguousarray(data).view(f"<u{bits // 8}")
    else:
        codes = unpack_sixteens(data, bits)
    return decode(operand_type, codes)


def decode_containers(data: NDArray[np.uint8], operand_type: str) -> Values:
    """Values of elements of 4 or 6 bits that lie in a byte each, as operand A of kinds f8f6f4 and mxf8f6f4 in tensor memory.

    e2m1 lies in the four middle bits and the others in the six low ones, as PTX ISA 9.7.14.5.14 words it for mma.sync of these
    kinds; 9.7.16.10.4.3 shows tensor memory in figures only.
    """
    return decode(operand_type, data >> 2 if operand_type == "e2m1" else data)


def _product(a: Values, b: Values) -> Values:
    """A times B transposed, in pieces for which OpenBLAS starts no threads: on a busy machine waiting for them takes longer."""
    step = max(1, _ONE_THREAD // max(b.size, 1))
    if a.shape[0] <= step:
        return np.asarray(a @ b.T)
    return np.concatenate([a[i : i + step] @ b.T for i in range(0, a.shape[0], step)])


def multiply(
    a: Values,
    b: Values,
    d: NDArray[Any] | None,
    d_type: str,
    *,
    negate_a: bool = False,
    negate_b: bool = False,
    saturate: bool = False,
) -> NDArray[Any]:
    """A [M, K] times B [N, K] transposed, plus D [M, N] or nothing: [M, N], float32, float16 for d_type f16, int32 for s32.

    NaN and infinity follow IEEE 754. Integers beyond 32 bits wrap around, or with `saturate` stop at the ends.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        total = _product(a, b)
        if negate_a != negate_b:
            total = -total
        if d is not None:
            total = total + np.asarray(d, dtype=np.float64)
        if d_type == "f32":
            return total.astype(np.float32)
        if d_type == "s32":
            whole = total.astype(np.int64)
            return np.clip(whole, -(1 << 31), (1 << 31) - 1).astype(np.int32) if saturate else whole.astype(np.int32)
    return encode("f16", total).astype(np.uint16).view(np.float16)


def read_scales(words: NDArray[np.uint32], byte: int, scales: int, scale_type: str) -> Values:
    """Scales float64 [..., scales] from 32-bit words of tensor memory, from `byte` on."""
    shifts = 8 * (byte + np.arange(scales, dtype=np.uint32))
    return decode(scale_type, (np.asarray(words, dtype=np.uint32)[..., None] >> shifts) & 0xFF)


def _scaled(values: Values, scales: Values) -> Values:
    """[rows, K] times [rows, scales], each for K / scales elements."""
    rows, depth = values.shape
    return np.asarray((values.reshape(rows, scales.shape[1], -1) * scales[:, :, None]).reshape(rows, depth))


def tcgen05_multiply(
    instruction: InstructionDescriptor,
    lanes: Index,
    a: Values,
    b: Values,
    d: NDArray[Any] | None,
    scale_a: Values | None = None,
    scale_b: Values | None = None,
    scale_d: int = 0,
) -> NDArray[Any]:
    """One CTA's part of D after `tcgen05.mma`: [rows, N] of `instruction.d_type`.

    lanes: int64 [rows or 1, N or 1], the lanes of the accumulator (tmem.accumulator_cells).
    a: float64 [copies, rows, K]; two copies where half h of N has its own (tmem.operand_cells), else one.
    b: float64 [N, K]: for a pair the rows of both CTAs.
    d: the accumulator as it is, or None to overwrite; `scale_d` multiplies it by 2 to the power of minus that many.
    scale_a, scale_b: float64 [4, rows, scales] and [4, N or N / 2, scales] as each quarter of the lanes holds them
    (tmem.scale_cells): an element of D uses the copies in its own quarter. Raises ValueError where scales are missing.
    """
    i = instruction
    rows, n = a.shape[1], b.shape[0]
    if scale_d:
        if i.kind not in ("f16", "tf32") or not 0 <= scale_d <= 15:
            raise ValueError(f"tcgen05.mma: scale-input-d {scale_d} is not possible for kind::{i.kind}")
        d = None if d is None else np.ldexp(np.asarray(d, dtype=np.float64), -scale_d)
    if bool(i.scales) != (scale_a is not None) or bool(i.scales) != (scale_b is not None):
        raise ValueError(f"tcgen05.mma: kind::{i.kind} has {i.scales} scales a row")
    out = np.empty((rows, n), dtype={"f16": np.float16, "f32": np.float32, "s32": np.int32}[i.d_type])
    for where, column, quarter, copy in _tiles(np.broadcast_to(lanes, (rows, n)), a.shape[0], scale_a, scale_b):
        x, y = a[copy][where], b[column]
        if scale_a is not None and scale_b is not None:
            x = _scaled(x, scale_a[quarter][where])
            y = _scaled(y, scale_b[quarter][: y.shape[0]])
        old = None if d is None else d[where, column]
        out[where, column] = multiply(x, y, old, i.d_type, negate_a=i.negate_a, negate_b=i.negate_b, saturate=i.saturate)
    return out


def _same(scales: Values | None) -> bool:
    return scales is None or all(np.array_equal(scales[0], other, equal_nan=True) for other in scales[1:])


def _tiles(lanes: Index, copies: int, scale_a: Values | None, scale_b: Values | None) -> list[tuple[slice, slice, int, int]]:
    """(rows, columns, quarter of the lanes, copy of A) of the rectangles of D that lie in one quarter each.

    One rectangle for all of D where the quarters hold the same.
    """
    rows, n = lanes.shape
    quarters = lanes // 32
    halves = quarters[0, 0] != quarters[0, -1]
    if not halves and _same(scale_a) and _same(scale_b):
        return [(slice(0, rows), slice(0, n), 0, 0)]
    # rows of one quarter follow each other, and so do columns: cut where the quarter changes
    row_cuts = [0, *(np.flatnonzero(np.diff(quarters[:, 0])) + 1).tolist(), rows]
    column_cuts = [0, *(np.flatnonzero(np.diff(quarters[0])) + 1).tolist(), n]
    return [
        (slice(r0, r1), slice(c0, c1), int(quarters[r0, c0]), half if copies == 2 else 0)
        for r0, r1 in pairwise(row_cuts)
        for half, (c0, c1) in enumerate(pairwise(column_cuts))
    ]


def accumulation_bound(magnitude: NDArray[Any] | float, additions: int) -> NDArray[np.float64]:
    """How far float32 accumulation may be from the exact sum, in any order and with truncation.

    magnitude: the sum of the absolute values of everything added (products and the first D). additions: how many are added.
    Each addition errs by at most 2^-23 of its result, which no partial sum of absolute values exceeds by more than the errors
    before it: (1 + 2^-23)^additions - 1 times the magnitude.
    """
    return np.asarray(np.asarray(magnitude, dtype=np.float64) * np.expm1(additions * np.log1p(2.0**-23)))
