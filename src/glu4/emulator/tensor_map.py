"""The 128-byte tensor map of TMA, and the boxes it copies between global and shared memory (tiled mode).

The bit layout was fitted to what drivers and CuTe DSL write, and the rules of `TensorMap` to what an H100's driver accepts
(tests/emulator/fixtures/tensor_maps_h100.json.xz). Facts of the copies: PTX ISA 9.1, 5.5.1 (sub-byte types), 5.5.3 (boxes,
traversal strides, out-of-bounds elements), 5.5.7 (swizzling), 9.7.9.27.1.1 (restrictions); cuTensorMapEncodeTiled in cuda.h.

Shapes and coordinates are innermost first and count elements; strides count bytes and leave out the innermost dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BoxRows",
    "BoxUnits",
    "FourRows",
    "TensorMap",
    "decode",
    "encode",
    "four_rows",
    "load_box",
    "store_box",
    "swizzle_address",
    "unit_addresses",
]

UNIT_BYTES = 8
SHARED_MEMORY_BYTES = 228 * 1024  # of an SM; the driver refuses larger boxes


@dataclass(frozen=True)
class _ElementType:
    code: int  # bits 71-74
    bits: int
    floating: bool = False
    tf32: bool = False  # bit 80


ELEMENT_TYPES = {
    "u8": _ElementType(0, 8),
    "u16": _ElementType(1, 16),
    "u32": _ElementType(2, 32),
    "s32": _ElementType(3, 32),
    "u64": _ElementType(4, 64),
    "s64": _ElementType(5, 64),
    "f16": _ElementType(6, 16, True),
    "f32": _ElementType(7, 32, True),
    "tf32": _ElementType(7, 32, True, True),
    "f32_ftz": _ElementType(8, 32, True),
    "tf32_ftz": _ElementType(8, 32, True, True),
    "f64": _ElementType(9, 64, True),
    "bf16": _ElementType(10, 16, True),
    "16u4_align8b": _ElementType(11, 4),
    "16u4_align16b": _ElementType(12, 4),
    "16u6_align16b": _ElementType(13, 6),
}
# name: (bits 77-78, bits 83-84, span in bytes)
SWIZZLES = {
    "none": (0, 0, 0),
    "32B": (1, 0, 32),
    "64B": (2, 0, 64),
    "128B": (3, 0, 128),
    "128B_atom_32B": (3, 1, 128),
    "128B_atom_32B_flip_8B": (3, 2, 128),
    "128B_atom_64B": (3, 3, 128),
}
INTERLEAVES = ("none", "16B", "32B")
OOB_FILLS = ("zero", "nan")
L2_PROMOTIONS = ("none", "64B", "128B", "256B")
_PADDED = ("16u4_align16b", "16u6_align16b")
_PADDED_SWIZZLES = {
    "16u4_align16b": ("none", "128B", "128B_atom_32B"),
    "16u6_align16b": ("none", "128B", "128B_atom_32B", "128B_atom_64B"),
}
# PTX names the fill but not its bits; an H100 fills float16, bfloat16 and float32 so (tests/emulator/hardware)
_PIECE_BYTES = 16  # of a row, which a store writes whole
_NAN_BYTES = np.frombuffer(b"\xf7\x7f", dtype=np.uint8)


def _fail(field: str, what: str) -> None:
    raise ValueError(f"tensor map: {field} {what}")


@dataclass(frozen=True)
class TensorMap:
    """A tensor map, valid by construction.

    Raises ValueError naming the field where cuTensorMapEncodeTiled would refuse it. `swizzle`, `interleave`, `oob_fill`,
    `element_type` and `l2_promotion` are the keys of SWIZZLES, INTERLEAVES, OOB_FILLS, ELEMENT_TYPES, L2_PROMOTIONS.
    """

    address: int
    element_type: str
    global_shape: tuple[int, ...]
    global_strides: tuple[int, ...]
    box_shape: tuple[int, ...]
    element_strides: tuple[int, ...]
    swizzle: str = "none"
    interleave: str = "none"
    oob_fill: str = "zero"
    l2_promotion: str = "none"

    def __post_init__(self) -> None:
        for field, value, known in (
            ("element_type", self.element_type, ELEMENT_TYPES),
            ("swizzle", self.swizzle, SWIZZLES),
            ("interleave", self.interleave, INTERLEAVES),
            ("oob_fill", self.oob_fill, OOB_FILLS),
            ("l2_promotion", self.l2_promotion, L2_PROMOTIONS),
        ):
            if value not in known:
                _fail(field, f"{value!r} is unknown; known are {', '.join(known)}")
        rank = self.rank
        if not 1 <= rank <= 5:
            _fail("global_shape", f"has rank {rank}; 1 to 5 are possible")
        if self.interleave != "none" and rank < 3:
            _fail("interleave", f"{self.interleave} needs rank 3 or more, given {rank}")
        for field, values, length in (
            ("global_strides", self.global_strides, rank - 1),
            ("box_shape", self.box_shape, rank),
            ("element_strides", self.element_strides, rank),
        ):
            if len(values) != length:
                _fail(field, f"has {len(values)} entries; rank {rank} needs {length}")
        self._check_global()
        self._check_box()

    def _check_global(self) -> None:
        alignment = 32 if self.interleave == "32B" or self.element_type in _PADDED else 16
        if self.address % alignment or not 0 <= self.address < 1 << 64:
            _fail("address", f"{self.address:#x} is not a multiple of {alignment}")
        for i, size in enumerate(self.global_shape):
            if not 1 <= size <= 1 << 32:
                _fail(f"global_shape[{i}]", f"{size} is not between 1 and 2^32")
        multiple = 128 if self.element_type in _PADDED else 2 if self.element_type == "16u4_align8b" else 1
        if self.global_shape[0] % multiple:
            _fail("global_shape[0]", f"{self.global_shape[0]} is not a multiple of {multiple}, as {self.element_type} needs")
        for i, stride in enumerate(self.global_strides):
            if stride % alignment or not 0 <= stride < 1 << 40:
                _fail(f"global_strides[{i}]", f"{stride} is not a multiple of {alignment} below 2^40")

    def _check_box(self) -> None:
        for i, size in enumerate(self.box_shape):
            if not 1 <= size <= 256:
                _fail(f"box_shape[{i}]", f"{size} is not between 1 and 256")
        for i, step in enumerate(self.element_strides):
            if not 1 <= step <= 8:
                _fail(f"element_strides[{i}]", f"{step} is not between 1 and 8")
        inner_bits = self.box_shape[0] * self.bits
        if self.element_type in _PADDED and self.box_shape[0] != 128:
            _fail("box_shape[0]", f"{self.box_shape[0]} must be 128 for {self.element_type}")
        if self.interleave == "none" and inner_bits % 128:
            _fail("box_shape[0]", f"{self.box_shape[0]} elements are {inner_bits / 8:g} bytes, not a multiple of 16")
        span = SWIZZLES[self.swizzle][2]
        # padded types: 128 elements of one byte each are 128 bytes of shared memory
        row = 128 if self.element_type in _PADDED else inner_bits // 8
        if self.interleave == "none" and span and row > span:
            _fail("box_shape[0]", f"is {row} bytes wide; swizzle {self.swizzle} allows {span}")
        if self.interleave == "32B" and self.swizzle not in ("none", "32B"):
            _fail("swizzle", f"{self.swizzle} cannot be combined with interleave 32B")
        allowed = _PADDED_SWIZZLES.get(self.element_type)
        if allowed and self.swizzle not in allowed:
            _fail("swizzle", f"{self.swizzle} is not possible for {self.element_type}; possible are {', '.join(allowed)}")
        if self.oob_fill == "nan" and not ELEMENT_TYPES[self.element_type].floating:
            _fail("oob_fill", f"nan needs a floating-point element type, given {self.element_type}")
        size = self.row_bytes * prod(self.counts[1:])
        if size > SHARED_MEMORY_BYTES:
            _fail("box_shape", f"{self.box_shape} is {size} bytes; shared memory has {SHARED_MEMORY_BYTES}")

    @property
    def rank(self) -> int:
        return len(self.global_shape)

    @property
    def bits(self) -> int:
        """Bits of an element in global memory."""
        return ELEMENT_TYPES[self.element_type].bits

    @property
    def counts(self) -> tuple[int, ...]:
        """Elements the box takes along each dimension: with a traversal stride s, the box covers ceil(size / s).

        The innermost dimension has no traversal stride unless it is interleaved.
        """
        steps = self.element_strides if self.interleave != "none" else (1, *self.element_strides[1:])
        return tuple(-(-size // step) for size, step in zip(self.box_shape, steps))

    @property
    def row_bytes(self) -> int:
        """Bytes in shared memory of one run along the innermost dimension."""
        return self.counts[0] if self.element_type in _PADDED else self.counts[0] * self.bits // 8

    @property
    def pitch_bytes(self) -> int:
        """Bytes of shared memory from one row to the next: the swizzle's span, of which a narrower row leaves the rest alone.

        Recorded from an H100: tests/emulator/hardware, tensor/load-narrow.
        """
        return max(self.row_bytes, SWIZZLES[self.swizzle][2])

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a whole box occupies, gaps included."""
        return self.pitch_bytes * prod(self.counts[1:])

    @property
    def transaction_bytes(self) -> int:
        """What one box adds to an mbarrier's completed bytes: every element, out of bounds or not, without padding.

        That padding is not counted is seen in CUTLASS, whose kernels for 16u4_align16b expect 4 bits an element
        (TmaTransactionBytes in sm100_mma_warpspecialized.hpp).
        """
        return prod(self.counts) * self.bits // 8


class FourRows(TensorMap):
    """A map as tile::gather4 and tile::scatter4 use it: four rows of rank 2, each a box (PTX ISA 5.5.3.4).

    Its coordinates are five: the column, then the row of each. Raises ValueError for a map that these modes cannot use.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank != 2 or self.interleave != "none":
            _fail("global_shape", f"has rank {self.rank} and interleave {self.interleave}; four rows need rank 2 and none")
        if self.box_shape[1] != 1:
            _fail("box_shape[1]", f"is {self.box_shape[1]}; four rows need 1")

    @property
    def counts(self) -> tuple[int, ...]:
        return (super().counts[0], 4)


def four_rows(tensor_map: TensorMap) -> FourRows:
    """The same map for tile::gather4 and tile::scatter4. Raises ValueError as FourRows does."""
    return FourRows(**{f.name: getattr(tensor_map, f.name) for f in fields(TensorMap)})


def _bits(number: int, low: int, width: int) -> int:
    return number >> low & ((1 << width) - 1)


def decode(data: bytes) -> TensorMap:
    """The map in 128 bytes, of which tiled mode uses the first 64; bit 85 and bytes 64 to 127 vary with the writer.

    Raises ValueError naming the field for bytes that are not a tiled map.
    """
    if len(data) != 128:
        raise ValueError(f"tensor map: is 128 bytes, given {len(data)}")
    n = int.from_bytes(data[:64], "little")
    if _bits(n, 64, 4) not in (0, 2):
        _fail("tag", f"(bits 64-67) is {_bits(n, 64, 4)}, not that of a tiled map")
    for low, width in ((86, 10), (240, 16), (431, 9), (480, 32)):
        if _bits(n, low, width):
            _fail("reserved bits", f"{low} to {low + width - 1} are {_bits(n, low, width):#x}, not zero")
    rank = _bits(n, 68, 3) + 1
    if rank > 5:
        _fail("rank", f"is {rank}; 1 to 5 are possible")
    kind = (_bits(n, 71, 4), bool(_bits(n, 80, 1)))
    element = next((name for name, e in ELEMENT_TYPES.items() if (e.code, e.tf32) == kind), None)
    if element is None:
        _fail("element_type", f"(bits 71-74) {kind[0]} with tf32 bit {int(kind[1])} is unknown")
    swizzle = next(
        (name for name, (mode, atom, _) in SWIZZLES.items() if (mode, atom) == (_bits(n, 77, 2), _bits(n, 83, 2))), None
    )
    if swizzle is None:
        _fail("swizzle", f"(bits 77-78) {_bits(n, 77, 2)} cannot have atom (bits 83-84) {_bits(n, 83, 2)}")
    if _bits(n, 75, 2) == 3:
        _fail("interleave", "(bits 75-76) is 3; 0 to 2 are possible")
    return TensorMap(
        address=_bits(n, 0, 64),
        element_type=str(element),
        global_shape=tuple(_bits(n, 256 + 32 * i, 32) + 1 for i in range(rank)),
        global_strides=tuple(16 * (_bits(n, 96 + 32 * i, 32) | _bits(n, 224 + 4 * i, 4) << 32) for i in range(rank - 1)),
        box_shape=tuple(_bits(n, 440 + 8 * i, 8) + 1 for i in range(rank)),
        element_strides=tuple(_bits(n, 416 + 3 * i, 3) + 1 for i in range(rank)),
        swizzle=str(swizzle),
        interleave=INTERLEAVES[_bits(n, 75, 2)],
        oob_fill=OOB_FILLS[_bits(n, 79, 1)],
        l2_promotion=L2_PROMOTIONS[_bits(n, 81, 2)],
    )


def encode(tensor_map: TensorMap) -> bytes:
    """128 bytes, as a driver 13.0 writes their first 64; the rest is zero."""
    element = ELEMENT_TYPES[tensor_map.element_type]
    mode, atom, _ = SWIZZLES[tensor_map.swizzle]
    n = tensor_map.address
    for low, value in (
        (68, tensor_map.rank - 1),
        (71, element.code),
        (75, INTERLEAVES.index(tensor_map.interleave)),
        (77, mode),
        (79, OOB_FILLS.index(tensor_map.oob_fill)),
        (80, int(element.tf32)),
        (81, L2_PROMOTIONS.index(tensor_map.l2_promotion)),
        (83, atom),
    ):
        n |= value << low
    for i, stride in enumerate(tensor_map.global_strides):
        n |= (stride // 16 & 0xFFFFFFFF) << (96 + 32 * i) | (stride // 16 >> 32) << (224 + 4 * i)
    for i in range(tensor_map.rank):
        n |= (tensor_map.global_shape[i] - 1) << (256 + 32 * i)
        n |= (tensor_map.element_strides[i] - 1) << (416 + 3 * i) | (tensor_map.box_shape[i] - 1) << (440 + 8 * i)
    return n.to_bytes(128, "little")


def swizzle_address(swizzle: str, address: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shared-memory addresses after swizzling, for byte addresses before it: an exclusive or within the address itself.

    The patterns are the tables of PTX ISA 5.5.7. Raises ValueError for an unknown swizzle.
    """
    a = np.asarray(address, dtype=np.int64)
    line = a >> 7
    if swizzle == "none":
        return a
    if swizzle in ("32B", "64B", "128B"):
        mask = {"32B": 1, "64B": 3, "128B": 7}[swizzle]
        return a ^ ((line & mask) << 4)
    if swizzle == "128B_atom_32B":
        return a ^ ((line & 3) << 5)
    if swizzle == "128B_atom_32B_flip_8B":
        return a ^ ((line & 3) << 5) ^ ((line & 1) << 3)
    if swizzle == "128B_atom_64B":
        return a ^ ((line & 1) << 6)
    raise ValueError(f"swizzle: {swizzle!r} is unknown; known are {', '.join(SWIZZLES)}")


@dataclass(frozen=True)
class BoxUnits:
    """What a load writes to shared memory: `data` uint8 [units, 8] at the byte addresses `addresses` int64 [units].

    Padding between elements (16u4_align16b) is in no unit: the hardware leaves it unwritten.
    """

    addresses: NDArray[np.int64]
    data: NDArray[np.uint8]
    transaction_bytes: int


@dataclass(frozen=True)
class BoxRows:
    """What a store writes to global memory: `data` uint8 [rows, bytes] at byte addresses `addresses` int64 [rows]."""

    addresses: NDArray[np.int64]
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class _Window:
    """A box's rows: which are inside the tensor and where, and which bytes of each row are."""

    inside: NDArray[np.bool_]  # [rows]
    starts: NDArray[np.int64]  # [rows] address of the first in-bounds byte of a row; meaningless where not inside
    first: int  # in-bounds bytes of a packed row: [first, last)
    last: int
    packed: int  # bytes of a packed row


def _window(tensor_map: TensorMap, coordinates: Sequence[int]) -> _Window:
    t = tensor_map
    if len(coordinates) != (5 if isinstance(t, FourRows) else t.rank):
        raise ValueError(f"coordinates: {len(coordinates)} given for a tensor map of rank {t.rank}")
    if t.interleave != "none":
        raise ValueError(f"interleave: {t.interleave} is not modelled")
    if t.element_type in ("tf32", "tf32_ftz", "f32_ftz", "16u6_align16b"):
        raise ValueError(f"element_type: copies of {t.element_type} are not modelled")
    x = coordinates[0]
    # 16 bytes: hardware refuses others as an illegal instruction (recorded from an H100)
    multiple = 128 if t.element_type in _PADDED else 128 // t.bits
    if x % multiple:
        raise ValueError(f"coordinates: the first is {x}; {t.element_type} needs a multiple of {multiple}")
    inside = np.ones(1, dtype=np.bool_)
    offset = np.zeros(1, dtype=np.int64)
    # the first dimension varies fastest, so later ones become leading axes
    for dim in range(1, t.rank):
        at = coordinates[dim] + np.arange(t.counts[dim], dtype=np.int64) * t.element_strides[dim]
        if isinstance(t, FourRows):
            at = np.array(coordinates[1:], dtype=np.int64)
        inside = (((at >= 0) & (at < t.global_shape[dim]))[:, None] & inside).ravel()
        offset = ((at * t.global_strides[dim - 1])[:, None] + offset).ravel()
    first = min(max(-x, 0), t.counts[0]) * t.bits // 8
    last = min(max(t.global_shape[0] - x, 0), t.counts[0]) * t.bits // 8
    starts = t.address + offset + x * t.bits // 8 + first
    return _Window(inside & (last > first), starts, first, max(last, first), t.counts[0] * t.bits // 8)


def unit_addresses(tensor_map: TensorMap, shared_address: int) -> NDArray[np.int64]:
    """Address of each 8-byte unit of the box in its order in global memory."""
    if shared_address % 128:
        raise ValueError(f"shared address: {shared_address:#x} is not a multiple of 128")
    step = 2 * UNIT_BYTES if tensor_map.element_type in _PADDED else UNIT_BYTES
    rows = np.arange(0, tensor_map.shared_bytes, tensor_map.pitch_bytes, dtype=np.int64)
    linear = shared_address + rows[:, None] + np.arange(0, tensor_map.row_bytes, step, dtype=np.int64)
    return swizzle_address(tensor_map.swizzle, linear.ravel())


def load_box(
    tensor_map: TensorMap,
    coordinates: Sequence[int],
    shared_address: int,
    read: Callable[[NDArray[np.int64], int], NDArray[Any]],
) -> BoxUnits:
    """A tiled load: the units that land in shared memory.

    `read(addresses int64 [rows], size)` returns uint8 [rows, size] of global memory; it is asked only for in-bounds bytes,
    and not at all if there are none. Elements outside the tensor are filled as the map says. Raises ValueError for
    coordinates or an address (a multiple of 128) that the instruction may not have, and for what is not modelled: interleaved
    layouts, tf32, flushing types and 6-bit types.
    """
    window = _window(tensor_map, coordinates)
    rows = np.zeros((len(window.inside), window.packed), dtype=np.uint8)
    if tensor_map.oob_fill == "nan":
        rows[:] = np.tile(_NAN_BYTES, window.packed // 2)
    if window.inside.any():
        size = window.last - window.first
        rows[window.inside, window.first : window.last] = read(window.starts[window.inside], size)
    addresses = unit_addresses(tensor_map, shared_address)
    return BoxUnits(addresses, rows.reshape(-1, UNIT_BYTES), tensor_map.transaction_bytes)


def store_box(
    tensor_map: TensorMap,
    coordinates: Sequence[int],
    shared_address: int,
    read_shared: Callable[[NDArray[np.int64]], NDArray[Any]],
    reduces: bool = False,
) -> BoxRows:
    """A tiled store (or the operand of a reduction): the rows of global memory it writes, out-of-bounds elements dropped.

    A store drops only whole pieces of 16 bytes along a row: where the tensor's row ends within one, the box's elements beyond
    it are written up to the next multiple of 16 bytes (recorded from an H100: tests/emulator/hardware, tensor/store-type-u8).
    Of reductions no such edge was recorded: they keep to the elements, as PTX says.

    `read_shared(addresses int64 [units])` returns uint8 [units, 8]. Raises ValueError as `load_box` does, for
    16u4_align16b, which PTX does not store, and for negative coordinates, which hardware refuses of stores and reductions
    (an illegal instruction on an H100; CUDA C++ Programming Guide, Tensor Memory Accelerator).
    """
    if tensor_map.element_type == "16u4_align16b":
        raise ValueError("element_type: 16u4_align16b cannot be stored")
    if min(coordinates) < 0 and not isinstance(tensor_map, FourRows):
        raise ValueError(f"coordinates: {tuple(coordinates)} has a negative one; a store or reduction may not")
    window = _window(tensor_map, coordinates)
    units = read_shared(unit_addresses(tensor_map, shared_address))
    rows = np.asarray(units, dtype=np.uint8).reshape(-1, window.packed)
    # the first in-bounds byte is a multiple of 16 in global memory, and so is the box's end
    last = window.last if reduces else -(-window.last // _PIECE_BYTES) * _PIECE_BYTES
    return BoxRows(window.starts[window.inside], rows[window.inside, window.first : last])
