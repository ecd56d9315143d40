"""The parameters of a Blackwell kernel as the driver takes them: tensor maps made by the driver, addresses and numbers.

CuTe DSL's host code of `dual_gemm` passes, one after the other: both tiled MMAs (nothing in them), the tensor maps and the
extents of codes and scales of A, gate and up, C, the map of C where TMA stores it, global scales, biases, and numbers. Tests
compare these bytes with what that host code passes.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

from glu4.backends.blackwell.config import Config
from glu4.backends.blackwell.spec import KernelSpec
from glu4.compiled import driver

__all__ = ["ADDRESSES", "Shape", "addresses_of", "parameters", "scale_box", "sizes"]

ADDRESSES = (
    "a", "scale_a", "gate", "scale_gate", "up", "scale_up", "out", "workspace",
    "global_a", "global_gate", "global_up", "gate_bias", "up_bias",
)  # fmt: skip
# cuda.h of CUDA 13.0: CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion
_U16, _U4 = 1, 13
_OUT_TYPES = {"f16": 6, "bf16": 9}
_SWIZZLES = {16: 0, 32: 1, 64: 2, 128: 3}  # by the bytes of a box's row
_L2_128B = 2
_MAP_BYTES = 128
_EMPTY = bytes(12)  # a tiled MMA


@dataclass(frozen=True)
class Shape:
    """One launch: matrices, M, N, K (a multiple of 32), and the strides of C in elements."""

    batch: int
    m: int
    n: int
    k: int
    row_stride: int
    batch_stride: int


def sizes(spec: KernelSpec) -> list[int]:
    """Bytes of every parameter."""
    matrices = 2 * (1 + spec.weights)
    stored = [_MAP_BYTES, 12] if spec.config.store == "tma" else []
    return [12, 12, *[_MAP_BYTES] * matrices, *[12] * matrices, 8, 8, 8, 8, *stored, *[8] * 5, *[4] * 8]


def parameters(
    spec: KernelSpec, shape: Shape, addresses: dict[str, int], flags: int, constants: tuple[float, float, float]
) -> list[bytes]:
    """Every parameter; the maps are encoded by the driver.

    addresses  of `ADDRESSES`; with one matrix those of up are passed and not read
    flags      the kernel's (glu4.backends.blackwell.epilogue)
    constants  alpha, beta and limit of the activation
    """
    maps, extents = [], []
    for i, (name, rows) in enumerate((("a", shape.m), ("gate", shape.n), ("up", shape.n))[: 1 + spec.weights]):
        maps += [_codes(spec, i, shape, addresses[name], rows), _scales(spec, i, shape, addresses[f"scale_{name}"], rows)]
        atoms = (-(-rows // 128), -(-shape.k // 64))
        extents += [struct.pack("=3i", rows, shape.k, shape.batch), struct.pack("=3i", *atoms, shape.batch)]
    stored = []
    if spec.config.store == "tma":
        stored = [_out(spec, shape, addresses["out"]), struct.pack("=3i", shape.m, shape.n, shape.batch)]
    words = (addresses["out"], shape.row_stride, shape.batch_stride, addresses["workspace"])
    numbers = struct.pack("=ifffiiii", flags, *constants, shape.m, shape.n, shape.k, shape.batch)
    read = [struct.pack("=Q", addresses[name]) for name in ADDRESSES[-5:]]
    return [
        _EMPTY, _EMPTY, *maps, *extents, *(struct.pack("=Q", w) for w in words), *stored, *read,
        *(numbers[i : i + 4] for i in range(0, 32, 4)),
    ]  # fmt: skip


def addresses_of(spec: KernelSpec) -> list[tuple[int, str]]:
    """(parameter, what) of each address among the parameters; a tensor map begins with its own."""
    matrices = 2 * (1 + spec.weights)
    found = [(2 + i, name) for i, name in enumerate(ADDRESSES[:matrices])]
    after = 2 + 2 * matrices
    found += [(after, "out"), (after + 3, "workspace")]
    after += 4
    if spec.config.store == "tma":
        found.append((after, "out"))
        after += 2
    return found + [(after + i, name) for i, name in enumerate(ADDRESSES[-5:])]


# ---- tensor maps ----


def _codes(spec: KernelSpec, i: int, shape: Shape, address: int, rows: int) -> bytes:
    """Of codes of A (i 0) or a weight: K, rows, matrices; one box is a stage's part of one CTA."""
    c = spec.config
    box_rows = (c.tile_n if i else c.tile_m) // c.ctas
    strides = (shape.k // 2, rows * shape.k // 2)
    return _encode(_U4, address, (shape.k, rows, shape.batch), strides, (c.tile_k, box_rows, 1), c.tile_k // 2)


def _scales(spec: KernelSpec, i: int, shape: Shape, address: int, rows: int) -> bytes:
    """Of scales of A or a weight, 16 bits at a time: a 512-byte atom, atoms along K, along rows, matrices."""
    along_k, along_rows = -(-shape.k // 64), -(-rows // 128)
    strides = (512, 512 * along_k, 512 * along_k * along_rows)
    return _encode(_U16, address, (256, along_k, along_rows, shape.batch), strides, (256, *scale_box(spec.config, i), 1), 16)


def scale_box(c: Config, i: int) -> tuple[int, int]:
    """Atoms of scales along K and along rows that a CTA loads for a stage, of the first operand (i 0) or the second.

    Each CTA of a pair loads half of the second's, for both: half of the atoms along rows, or, of one, half along K.
    """
    along_k, along_rows = c.tile_k // 64, (c.scale_rows if i else 128) // 128
    if i and along_rows % c.ctas == 0:
        return along_k, along_rows // c.ctas
    return along_k // (c.ctas if i else 1), along_rows


def _out(spec: KernelSpec, shape: Shape, address: int) -> bytes:
    """Of C, as TMA writes it: load_width columns of a CTA's 128 rows."""
    width = spec.config.load_width
    strides = (2 * shape.row_stride, 2 * shape.batch_stride)
    kind = _OUT_TYPES[spec.out]
    return _encode(kind, address, (shape.n, shape.m, shape.batch), strides, (width, 128, 1), 2 * width)


def _encode(
    kind: int, address: int, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle_bytes: int
) -> bytes:
    """A tiled map with zeros out of bounds, by cuTensorMapEncodeTiled; strides in bytes, from the second dimension on."""
    memory = ctypes.create_string_buffer(_MAP_BYTES + 64)
    start = -ctypes.addressof(memory) % 64
    u64, u32, rank = ctypes.c_uint64, ctypes.c_uint32, len(dims)
    status = driver._cuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(memory) + start), kind, rank, ctypes.c_void_p(address), (u64 * rank)(*dims),
        (u64 * (rank - 1))(*strides), (u32 * rank)(*box), (u32 * rank)(*[1] * rank), 0, _SWIZZLES[swizzle_bytes], _L2_128B, 0,
    )  # fmt: skip
    driver._check(status, f"cuTensorMapEncodeTiled of {dims} with strides {strides} and box {box}")
    return memory.raw[start : start + _MAP_BYTES]
