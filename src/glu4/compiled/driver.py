"""Load cubins and launch them through libcuda with ctypes: no CuTe DSL, no CUDA toolkit, no C compiler."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import torch
from torch import Tensor

from glu4.errors import UnsupportedError

__all__ = ["Kernel", "TensorMap"]

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SWIZZLE_128B, _L2_128B = 3, 2
_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType


@cache
def _cuda() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(f"the NVIDIA driver library libcuda.so.1 cannot be loaded: {error}") from error


def _check(status: int, what: str) -> None:
    if status:
        name = ctypes.c_char_p()
        _cuda().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{what} failed: {(name.value or b'unknown').decode()} ({status})")


class TensorMap:
    """A 2-D tiled tensor map of a 16-bit row-major matrix, 128-byte swizzle, zeros out of bounds (cuTensorMapEncodeTiled)."""

    def __init__(self, matrix: Tensor, box_rows: int, box_cols: int) -> None:
        self._memory = ctypes.create_string_buffer(192)
        self.address = -(-ctypes.addressof(self._memory) // 64) * 64
        rows, cols = matrix.shape
        u64, u32 = ctypes.c_uint64, ctypes.c_uint32
        status = _cuda().cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.address), _MAP_TYPES[matrix.dtype], 2, ctypes.c_void_p(matrix.data_ptr()),
            (u64 * 2)(cols, rows), (u64 * 1)(matrix.stride(0) * 2), (u32 * 2)(box_cols, box_rows), (u32 * 2)(1, 1),
            0, _SWIZZLE_128B, _L2_128B, 0,
        )  # fmt: skip
        _check(status, "cuTensorMapEncodeTiled")


class Kernel:
    """A loaded kernel: usable on every device of its architecture, from any stream."""

    def __init__(self, cubin: bytes, description: dict[str, Any]) -> None:
        self.threads: int = description["threads"]
        self.shared_bytes: int = description["shared_bytes"]
        self.param_sizes: list[int] = description["params"]
        self._cubin = cubin
        self._library, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        nothing = (None, None, 0, None, None, 0)
        _check(_cuda().cuLibraryLoadData(ctypes.byref(self._library), cubin, *nothing), "cuLibraryLoadData")
        entry = description["entry"].encode()
        _check(_cuda().cuLibraryGetKernel(ctypes.byref(self._handle), self._library, entry), "cuLibraryGetKernel")
        self._ready: set[int] = set()

    def _prepare(self, device: int) -> None:
        status = _cuda().cuKernelSetAttribute(_MAX_DYNAMIC_SHARED, self.shared_bytes, self._handle, device)
        _check(status, "cuKernelSetAttribute")
        self._ready.add(device)

    def launch(self, grid: tuple[int, int], tensor_map: TensorMap, params: list[bytes], device: int, stream: int) -> None:
        """Launch on `stream` of the current device. params: the bytes of every parameter after the first, the map."""
        if device not in self._ready:
            self._prepare(device)
        sizes = [len(p) for p in params]
        if sizes != self.param_sizes[1:]:
            raise RuntimeError(f"the kernel takes parameters of {self.param_sizes[1:]} bytes, got {sizes}")
        held = [ctypes.create_string_buffer(p, len(p) + 8) for p in params]
        pointers = (ctypes.c_void_p * (len(params) + 1))(tensor_map.address, *(ctypes.addressof(h) for h in held))
        config = struct.pack("7I4xQQI4x", *grid, 1, self.threads, 1, 1, self.shared_bytes, stream, 0, 0)
        _check(_cuda().cuLaunchKernelEx(config, self._handle, pointers, None), "cuLaunchKernelEx")
