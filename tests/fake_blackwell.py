"""A Blackwell device made of Python: libcuda's calls as glu4 makes them, and kernels that compute what they are launched with.

A launch is read back from the very memory that cuLaunchKernelEx is given: configuration, attributes, parameters, tensor maps.
Maps are encoded by the emulator's codec, which refuses what an H100's driver refuses; operands are read at the addresses, extents
and strides in them, and the specified result is written where the parameters say. So the whole eager path runs on CPU tensors,
and a wrong byte anywhere gives a wrong result. The CPU is device -1, as torch's get_device says.
"""

from __future__ import annotations

import ctypes
import json
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_hopper import CONTEXT, FakeCuda, memory
from glu4 import dispatch, reference
from glu4.activation import IDENTITY, Activation
from glu4.backends.blackwell import arguments, launch, moe_launch
from glu4.backends.blackwell.moe_config import most_tiles
from glu4.backends.blackwell.moe_spec import MoeSpec, TileSpec, spec_from_dict
from glu4.backends.blackwell.moe_tokens import tile_table, tiled_scales
from glu4.backends.blackwell.spec import KernelSpec
from glu4.compiled import driver, store
from glu4.emulator.tensor_map import TensorMap, decode, encode
from glu4.nvfp4 import NVFP4Tensor
from glu4.scale_layout import SwizzledLayout

SHARED_BYTES = 200_000
DRIVER_TYPES = {1: "u16", 6: "f16", 9: "bf16", 13: "16u4_align8b"}  # CUtensorMapDataType of cuda.h
DRIVER_SWIZZLES = {0: "none", 1: "32B", 2: "64B", 3: "128B"}


@dataclass
class Launch:
    """What one launch said. parameters: the bytes of each."""

    spec: Any  # KernelSpec, MoeSpec or TileSpec
    device: int
    stream: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    attributes: dict[int, tuple[int, ...]]
    parameters: list[bytes]


@dataclass
class FakeBlackwell(FakeCuda):
    """libcuda. compute: whether a launch computes its result, or is recorded alone."""

    made: list[Launch] = field(default_factory=list)
    compute: bool = True

    def cuTensorMapEncodeTiled(self, target: Any, dtype: int, rank: int, address: Any, dims: Any, strides: Any, box: Any,
                               steps: Any, interleave: int, swizzle: int, promotion: int, fill: int) -> int:  # fmt: skip
        assert (interleave, promotion, fill) == (0, 2, 0)
        assert target.value % 64 == 0
        try:
            made = TensorMap(
                address.value or 0, DRIVER_TYPES[dtype], tuple(dims), tuple(strides), tuple(box), tuple(steps),
                DRIVER_SWIZZLES[swizzle], l2_promotion="128B",
            )  # fmt: skip
        except ValueError:
            return 1
        assert made.rank == rank
        ctypes.memmove(target.value, encode(made), 128)
        return self._done("cuTensorMapEncodeTiled")

    def cuLaunchKernelEx(self, config: int, handle: int, pointers: int, extra: None) -> int:
        status = self._done("cuLaunchKernelEx")
        if not status and self.context != CONTEXT:
            return 201
        if status:
            return status
        time.sleep(self.pause)
        *sizes, shared, stream, attributes, count = struct.unpack("=7I4xQQI4x", ctypes.string_at(config, 56))
        listed = json.loads(self._images[handle - 1])
        spec: Any = KernelSpec.from_dict(listed) if "dual" in listed else spec_from_dict(listed)
        held: dict[int, tuple[int, ...]] = {}
        for i in range(count):
            key, *value = struct.unpack_from("=I4x3I", ctypes.string_at(attributes + 72 * i, 72))
            held[key] = tuple(value)
        lengths = sizes_of(spec)
        at = (ctypes.c_void_p * len(lengths)).from_address(pointers)
        raw = [ctypes.string_at(p, n) for p, n in zip(at, lengths, strict=True)]
        assert all(p % {128: 64, 4: 4}.get(n, 8) == 0 for p, n in zip(at, lengths, strict=True))
        launched = Launch(spec, self.device, stream, tuple(sizes[:3]), tuple(sizes[3:]), shared, held, raw)  # type: ignore[arg-type]
        self.made.append(launched)
        if self.compute:
            of = {KernelSpec: run, MoeSpec: run_experts, TileSpec: run_tiles}
            of[type(spec)](launched)
        return 0


def sizes_of(spec: Any) -> list[int]:
    """Bytes of every parameter."""
    if isinstance(spec, TileSpec):
        formats = moe_launch.GATHER_PARAMETERS if spec.gather else moe_launch.TILE_PARAMETERS
        return [struct.calcsize("=" + f) for f in formats]
    return arguments.sizes(spec) if isinstance(spec, KernelSpec) else list(moe_launch.parameters_of(spec.config))


@dataclass
class _Values:
    """The parameters of a launch by name."""

    maps: list[TensorMap]
    extents: list[tuple[int, ...]]
    out: int
    row_stride: int
    batch_stride: int
    workspace: int
    stored: list[bytes]
    read: list[int]  # addresses of global scales and biases
    flags: int
    constants: tuple[float, float, float]
    shape: tuple[int, int, int, int]  # m, n, k, batch


def values_of(spec: KernelSpec, raw: list[bytes]) -> _Values:
    count = 2 * (1 + spec.weights)
    rest = raw[2:]
    maps, rest = [decode(b) for b in rest[:count]], rest[count:]
    extents, rest = [struct.unpack("=3i", b) for b in rest[:count]], rest[count:]
    out, row, batch, workspace = (struct.unpack("=Q", b)[0] for b in rest[:4])
    rest = rest[4:]
    stored = rest[:2] if spec.config.store == "tma" else []
    rest = rest[len(stored) :]
    read = [struct.unpack("=Q", b)[0] for b in rest[:5]]
    flags, alpha, beta, limit, m, n, k, batches = struct.unpack("=ifffiiii", b"".join(rest[5:]))
    return _Values(
        maps, extents, out, row, batch, workspace, stored, read, flags, (alpha, beta, limit), (m, n, k, batches)
    )  # fmt: skip


def _matrix(codes: TensorMap, scales: TensorMap, rows: int, k: int, batch: int) -> NVFP4Tensor:
    """The operand that two maps cover, `[batch, rows, k]`, global scale 1."""
    assert (codes.element_type, codes.global_shape) == ("16u4_align8b", (k, rows, batch))
    row, matrix = codes.global_strides
    values = memory(codes.address, (batch, rows, k // 2), (matrix, row, 1), torch.uint8)
    layout = SwizzledLayout(rows, k // 16)
    atoms = layout.storage_shape[:2]
    assert (scales.element_type, scales.global_shape) == ("u16", (256, atoms[1], atoms[0], batch))
    assert scales.global_strides == (512, 512 * atoms[1], 512 * atoms[0] * atoms[1])
    held = memory(scales.address, (batch, prod(layout.storage_shape)), (prod(layout.storage_shape), 1), torch.uint8)
    stored = held.view(batch, *layout.storage_shape).view(torch.float8_e4m3fn)
    return NVFP4Tensor(values.clone(), layout.load(stored).clone(), torch.ones(()))


def _scale(address: int, each: bool, batch: int) -> Tensor:
    return memory(address, (batch if each else 1,), (1,), torch.float32).double().view(-1, 1, 1)


def run(launched: Launch) -> None:
    """Compute what the kernel would."""
    spec, c = launched.spec, launched.spec.config
    v = values_of(spec, launched.parameters)
    m, n, k, batch = v.shape
    assert k % 32 == 0
    assert launched.block == (c.threads, 1, 1)
    assert launched.shared_bytes == SHARED_BYTES
    assert launched.grid == c.grid(m, n, batch, 148)
    assert launched.attributes.get(4, (1, 1, 1)) == (c.ctas, 1, 1)
    if c.shares_tiles:
        size = c.workspace_bytes(m, n, batch, spec.weights, 148)
        tickets = c.tickets(m, n, batch)
        assert not memory(v.workspace, (tickets,), (1,), torch.int32).any(), "tickets are zero before a launch"
        memory(v.workspace, (size // 4,), (1,), torch.int32)[tickets:] = 7
    operands = [_matrix(*v.maps[2 * i : 2 * i + 2], n if i else m, k, batch) for i in range(1 + spec.weights)]
    each = (v.flags & 2, v.flags & 4, v.flags & 4)
    a_scale, gate_scale, up_scale = (_scale(s, bool(e), batch) for s, e in zip(v.read[:3], each, strict=True))
    gate_bias, up_bias = (
        memory(b, (batch, n), (n, 1), torch.float32).double().unsqueeze(1) if v.flags & f else 0.0
        for b, f in zip(v.read[3:], (8, 16), strict=True)
    )
    a = operands[0].decode(torch.float64)
    gate = a @ operands[1].decode(torch.float64).mT * (a_scale * gate_scale) + gate_bias
    dtype = torch.bfloat16 if spec.out == "bf16" else torch.float16
    value = gate
    if spec.dual:
        up = a @ operands[2].decode(torch.float64).mT * (a_scale * up_scale) + up_bias
        value = (IDENTITY if v.flags & 1 else Activation("swish", *v.constants))(gate, up)
    if c.store == "tma":
        stored = decode(v.stored[0])
        assert (stored.address, stored.global_shape) == (v.out, (n, m, batch))
        assert stored.global_strides == (2 * v.row_stride, 2 * v.batch_stride)
    target = memory(v.out, (batch, m, n), (v.batch_stride, v.row_stride, 1), dtype)
    target.copy_(reference.round_once(value, dtype))


def run_experts(launched: Launch) -> None:
    """Compute what the kernel for mixtures of experts would: tile by tile, as its table says."""
    c, raw = launched.spec.config, launched.parameters[2:]
    count, weights = (6, 2) if c.gated else (4, 1)
    maps, raw = [decode(b) for b in raw[:count]], raw[count:]
    n, k, experts = struct.unpack("=3i", raw[0])
    rows, also_k = struct.unpack("=2i", raw[2])
    atoms, along_k = struct.unpack("=2i", raw[3])
    table_at, out_at, stride, *read = (struct.unpack("=Q", b)[0] for b in raw[4 : 8 + 2 * weights])
    flags, alpha, beta, limit, again_n, again_k = struct.unpack("=ifffii", b"".join(raw[8 + 2 * weights :]))
    assert (again_n, again_k, also_k, k % 32) == (n, k, k, 0)
    assert launched.block == (192, 1, 1)
    assert launched.shared_bytes == SHARED_BYTES
    assert launched.grid == c.grid(rows, experts, n, 148)
    assert launched.attributes.get(4, (1, 1, 1)) == (c.ctas, 1, 1)
    assert (maps[2].element_type, maps[2].global_shape, maps[2].global_strides) == ("16u4_align8b", (k, rows), (k // 2,))
    assert maps[3].global_shape == (256, along_k, atoms)
    matrices = [_matrix(maps[i], maps[i + 1], n, k, experts).decode(torch.float64) for i in range(0, count, 4)]
    codes = memory(maps[2].address, (rows, k // 2), (k // 2, 1), torch.uint8)
    layout = SwizzledLayout(128 * atoms, k // 16)
    stored = memory(maps[3].address, (layout.nbytes,), (1,), torch.uint8).view(layout.storage_shape)
    scales = layout.load(stored)
    a_scale = memory(read[0], (1,), (1,), torch.float32).double()
    globals_ = [memory(address, (experts,), (1,), torch.float32).double() for address in read[1 : 1 + weights]]
    biases = [
        memory(b, (experts, n), (n, 1), torch.float32).double() if flags & bit else torch.zeros(experts, n).double()
        for b, bit in zip(read[1 + weights :], (8, 16))
    ]
    dtype = torch.bfloat16 if launched.spec.out == "bf16" else torch.float16
    target = memory(out_at, (rows, n), (stride, 1), dtype)
    count = int(memory(table_at, (1,), (1,), torch.int32))
    for tile, (e, first, begin, end) in enumerate(memory(table_at, (count + 1, 4), (4, 1), torch.int32)[1:].tolist()):
        start = begin + (tile - first) * c.tile_n
        here = slice(start, min(start + c.tile_n, end))
        own = scales[tile * c.tile_n :][: here.stop - start].view(torch.float8_e4m3fn)
        x = NVFP4Tensor(codes[here].clone(), own.clone(), torch.ones(())).decode(torch.float64)
        sums = [x @ w[e].mT * (a_scale * g[e]) + b[e] for w, g, b in zip(matrices, globals_, biases, strict=True)]
        value = (IDENTITY if flags & 1 else Activation("swish", alpha, beta, limit))(*sums) if c.gated else sums[0]
        target[here].copy_(reference.round_once(value, dtype))


def run_tiles(launched: Launch) -> None:
    """Compute what the kernel that numbers tiles would, in memory that it need not have to itself."""
    tile_n, count = launched.spec.tile_n, len(moe_launch.TILE_PARAMETERS)
    raw = [struct.unpack(f"={f}", b)[0] for f, b in zip(moe_launch.GATHER_PARAMETERS, launched.parameters)]
    *pointers, stride, rows, experts, most, columns = raw[:count]
    assert most == most_tiles(rows, experts, tile_n)
    assert launched.block == (128, 1, 1)
    assert launched.grid == (-(-most * tile_n // 128) * 128 // tile_n, 1, 1)
    offsets = memory(pointers[0], (experts + 1,), (1,), torch.int32)
    sources = torch.arange(rows)
    if launched.spec.gather:
        order_at, codes_at, found_at, top_k, row_bytes = raw[count:]
        sources = memory(order_at, (rows,), (1,), torch.int64) // top_k
        codes = memory(codes_at, (rows // top_k, row_bytes), (row_bytes, 1), torch.uint8)
        assert (codes_at % 16, row_bytes % 16) == (0, 0)
        memory(found_at, (rows, row_bytes), (row_bytes, 1), torch.uint8).copy_(codes[sources])
    count = int(sources.max()) + 1
    scales = memory(pointers[1], (count, columns), (stride, 1), torch.uint8).clone()[sources].view(torch.float8_e4m3fn)
    table = tile_table(offsets, rows, tile_n)
    tiled = tiled_scales(scales, table, tile_n).view(torch.uint8)
    memory(pointers[2], table.shape, (4, 1), torch.int32).copy_(table)
    memory(pointers[3], (tiled.numel(),), (1,), torch.uint8).copy_(tiled.flatten())


def description(spec: Any) -> dict[str, Any]:
    """As the builder writes it."""
    if isinstance(spec, TileSpec):
        return {"entry": "entry", "params": sizes_of(spec), "threads": 128, "shared_bytes": SHARED_BYTES, "pdl": True}
    threads = spec.config.threads if isinstance(spec, KernelSpec) else 192
    return {
        "entry": "entry", "params": sizes_of(spec), "threads": threads, "shared_bytes": SHARED_BYTES, "pdl": spec.config.pdl,
    }  # fmt: skip


def compiled(spec: Any) -> tuple[bytes, dict[str, Any]] | None:
    """Any Blackwell kernel, as `store.find` gives it."""
    ours = isinstance(spec, (KernelSpec, MoeSpec, TileSpec))
    return (json.dumps(spec.to_dict()).encode(), description(spec)) if ours else None


def forget() -> None:
    """What this process remembers of kernels and warnings."""
    launch.forget()
    moe_launch.forget()
    for remembered in (
        dispatch._provide,
        dispatch._provide_blackwell,
        dispatch._provide_blackwell_grouped,
        dispatch._compile,
        dispatch._compile_grouped,
        dispatch.warn_once,
        driver._primary_context,
    ):
        remembered.cache_clear()


@contextmanager
def _current_device(cuda: FakeCuda, index: int) -> Iterator[None]:
    before, cuda.device = cuda.device, index
    yield
    cuda.device = before


@contextmanager
def fake_blackwell(
    monkeypatch: pytest.MonkeyPatch, found: Any = compiled, arch: str = "sm_100a", compute: bool = True
) -> Iterator[FakeBlackwell]:
    """The CPU as a Blackwell GPU. found: as `store.find`."""
    cuda = FakeBlackwell(compute=compute)
    monkeypatch.setattr(driver, "_cuda", lambda: cuda)
    monkeypatch.setattr(store, "find", found)
    monkeypatch.setattr(launch, "architecture", lambda device: arch if device.type == "cpu" else None)
    monkeypatch.setattr(launch, "_processors", lambda index: 148)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: cuda.device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: cuda.stream, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: _current_device(cuda, index))
    forget()
    yield cuda
    forget()
