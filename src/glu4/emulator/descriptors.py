"""Shared-memory matrix descriptors of wgmma (sm_90) and tcgen05 (sm_100), and the addresses they stand for.

Facts: PTX ISA 9.1, 9.7.15.5.1.2 (wgmma), 9.7.16.3 and 9.7.16.4.1 (tcgen05), both with the canonical layouts; for 128-byte
swizzling with 32-byte atoms, which the ISA lists without strides, make_umma_desc in CUTLASS's cute/arch/mma_sm100_desc.hpp.

Swizzling is an exclusive or within the address itself, as TMA writes it, so a descriptor whose start was moved within a
pattern (a later step along K, another group of rows) still finds its elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.tensor_map import SWIZZLES, swizzle_address

__all__ = ["SharedDescriptor", "chunk_addresses", "decode_tcgen05", "decode_wgmma", "read_operand"]

Major = Literal["K", "MN"]
CHUNK_BYTES = 16

_WGMMA_SWIZZLES = {0: "none", 1: "128B", 2: "64B", 3: "32B"}
_TCGEN05_SWIZZLES = {0: "none", 1: "128B_atom_32B", 2: "128B", 4: "64B", 6: "32B"}


@dataclass(frozen=True)
class SharedDescriptor:
    """A matrix in shared memory: byte address of its start, two byte strides, and the swizzle (a key of SWIZZLES).

    K-major: rows come in groups of 8, `stride` bytes apart; `leading` separates 16-byte columns, and counts without swizzle
    only. MN-major: without swizzle `stride` separates 16-byte pieces along MN and `leading` groups of 8 along K; with one,
    `leading` separates pieces of the swizzle's width along MN and `stride` groups of 8 (32-byte atoms: 4) along K.
    """

    start: int
    leading: int
    stride: int
    swizzle: str


def _fields(name: str, descriptor: int, unused: tuple[tuple[int, int], ...]) -> tuple[int, int, int]:
    if not 0 <= descriptor < 1 << 64:
        raise ValueError(f"{name} descriptor: is 64 bits, given {descriptor:#x}")
    for low, high in unused:
        value = descriptor >> low & ((1 << (high - low + 1)) - 1)
        if value:
            raise ValueError(f"{name} descriptor {descriptor:#018x}: bits {low}-{high} are {value:#x}, not zero")
    if descriptor >> 49 & 7:
        raise ValueError(f"{name} descriptor {descriptor:#018x}: base offset {descriptor >> 49 & 7} is not modelled, only 0")
    start, leading, stride = (16 * (descriptor >> low & 0x3FFF) for low in (0, 16, 32))
    return start, leading, stride


def decode_wgmma(descriptor: int) -> SharedDescriptor:
    """The descriptor of `wgmma.mma_async`. Raises ValueError naming the field where it is malformed or not modelled."""
    start, leading, stride = _fields("wgmma", descriptor, ((14, 15), (30, 31), (46, 48), (52, 61)))
    return SharedDescriptor(start, leading, stride, _WGMMA_SWIZZLES[descriptor >> 62])


def decode_tcgen05(descriptor: int) -> SharedDescriptor:
    """The descriptor of `tcgen05.mma` and `tcgen05.cp`. Raises ValueError naming the field, as `decode_wgmma` does."""
    start, leading, stride = _fields("tcgen05", descriptor, ((14, 15), (30, 31), (53, 60)))
    if descriptor >> 46 & 7 != 1:
        raise ValueError(f"tcgen05 descriptor {descriptor:#018x}: version (bits 46-48) is {descriptor >> 46 & 7}, not 1")
    if descriptor >> 52 & 1:
        raise ValueError(f"tcgen05 descriptor {descriptor:#018x}: absolute leading addresses (bit 52) exist on sm_103a only")
    swizzle = _TCGEN05_SWIZZLES.get(descriptor >> 61)
    if swizzle is None:
        raise ValueError(f"tcgen05 descriptor {descriptor:#018x}: swizzle (bits 61-63) {descriptor >> 61} is not possible")
    return SharedDescriptor(start, leading, stride, swizzle)


def _split(index: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return index % size, index // size


def chunk_addresses(descriptor: SharedDescriptor, major: Major, rows: int, depth: int, bits: int) -> NDArray[np.int64]:
    """Byte address of each 16-byte chunk of a `rows` x `depth` operand (M or N by K) of elements of `bits` bits.

    K-major: int64 [rows, chunks along K]. MN-major: int64 [depth, chunks along MN]. Addresses are swizzled and not
    wrapped. Raises ValueError for an operand that is not whole chunks, and for layouts that do not exist.
    """
    d = descriptor
    length = depth if major == "K" else rows
    if length * bits % (8 * CHUNK_BYTES):
        raise ValueError(f"operand: {length} elements of {bits} bits are not whole 16-byte chunks along {major}")
    chunk = np.arange(length * bits // (8 * CHUNK_BYTES), dtype=np.int64)
    line = np.arange(rows if major == "K" else depth, dtype=np.int64)[:, None]
    width = SWIZZLES[d.swizzle][2]
    if major == "K":
        if d.swizzle == "128B_atom_32B":
            raise ValueError("operand: K-major matrices have no swizzle with 32-byte atoms")
        within, group = _split(line, 8)
        if not width:
            return d.start + within * CHUNK_BYTES + group * d.stride + chunk * d.leading
        if d.start % width + len(chunk) * CHUNK_BYTES > width:
            raise ValueError(f"operand: {depth} elements from byte {d.start % width} on leave a row of the {d.swizzle} swizzle")
        return swizzle_address(d.swizzle, d.start + within * width + group * d.stride + chunk * CHUNK_BYTES)
    if bits < 8:
        raise ValueError(f"operand: elements of {bits} bits cannot be MN-major")
    if not width:
        within, group = _split(line, 8)
        return d.start + chunk * d.stride + within * CHUNK_BYTES + group * d.leading
    within, group = _split(line, 4 if d.swizzle == "128B_atom_32B" else 8)
    place, piece = _split(chunk, width // CHUNK_BYTES)
    linear = d.start + place * CHUNK_BYTES + piece * d.leading + within * width + group * d.stride
    return swizzle_address(d.swizzle, linear)


def read_operand(
    descriptor: SharedDescriptor,
    major: Major,
    rows: int,
    depth: int,
    bits: int,
    read: Callable[[NDArray[np.int64]], NDArray[Any]],
) -> NDArray[np.uint8]:
    """The operand as uint8 [rows, depth * bits / 8], K contiguous, whatever its layout in shared memory.

    `read(addresses int64 [...])` returns uint8 [..., 16]: the chunk at each address. Raises ValueError as `chunk_addresses`.
    """
    chunks = np.asarray(read(chunk_addresses(descriptor, major, rows, depth, bits)), dtype=np.uint8)
    if major == "K":
        return chunks.reshape(rows, depth * bits // 8)
    elements = chunks.reshape(depth, rows, bits // 8)
    return np.ascontiguousarray(elements.transpose(1, 0, 2)).reshape(rows, depth * bits // 8)
