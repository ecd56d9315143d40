"""Launches of cases through the CUDA driver, by ctypes: the driver library is all that the recording machine needs."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.hardware.case import Case

__all__ = ["Blank", "Gpu", "start_buffers"]

_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 5, 6
_TYPES = (
    "u8",
    "u16",
    "u32",
    "s32",
    "u64",
    "s64",
    "f16",
    "f32",
    "f64",
    "bf16",
    "f32_ftz",
    "tf32",
    "tf32_ftz",
)  # CUtensorMapDataType
_SWIZZLES = ("none", "32B", "64B", "128B")
_SCALARS = {
    "u8": "<B",
    "u16": "<H",
    "u32": "<I",
    "u64": "<Q",
    "i8": "<b",
    "i16": "<h",
    "i32": "<i",
    "i64": "<q",
    "f32": "<f",
    "f64": "<d",
}


def _triple(values: list[int]) -> tuple[int, int, int]:
    x, y, z = (*values, 1, 1)[:3]
    return x, y, z


def start_buffers(case: Case) -> dict[str, np.ndarray]:
    """All buffers as they are before the launch."""
    found = {name: np.ascontiguousarray(a) for name, a in case.inputs.items()}
    for name, described in case.launch.get("buffers", {}).items():
        if name not in found:
            array = np.empty(described["shape"], described["dtype"])
            array.reshape(-1).view(np.uint8)[:] = 0xD7
            found[name] = array
    return found


def map_arguments(described: dict[str, Any], address: int) -> dict[str, Any]:
    """Arguments of cuTensorMapEncodeTiled for a tensor map of the launch format. Raises ValueError for what it lacks."""
    rank = len(described["global_shape"])
    if described.get("interleave", "none") != "none":
        raise ValueError("interleave is not recorded")
    return {
        "type": _TYPES.index(described["element_type"]),
        "rank": rank,
        "address": address + described.get("offset", 0),
        "dims": described["global_shape"],
        "strides": described["global_strides_bytes"] or [0],
        "box": described["box_shape"],
        "steps": described.get("element_strides", [1] * rank),
        "swizzle": _SWIZZLES.index(described.get("swizzle", "none")),
        "fill": ("zero", "nan").index(described.get("oob_fill", "zero")),
    }


class Blank:
    """In place of a GPU: checks a case and returns its buffers as they were."""

    name, driver = "none", 0

    def run(self, case: Case, loaded: Callable[[], None]) -> dict[str, np.ndarray]:
        loaded()
        buffers = start_buffers(case)
        for parameter in case.launch["params"]:
            if "tensor_map" in parameter:
                map_arguments(parameter["tensor_map"], 0)
        return {name: buffers[name] for name in case.outputs}


class Gpu:
    """The first CUDA device. Raises RuntimeError, naming the call, where the driver reports an error."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context, version = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, 256, device)
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.name, self.driver = text.value.decode(), version.value
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'?').decode()} ({code})")

    def run(self, case: Case, loaded: Callable[[], None]) -> dict[str, np.ndarray]:
        """Load, call `loaded`, launch once, and return the outputs."""
        module = self.load(case.ptx)
        loaded()
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), module, b"k")
        buffers = start_buffers(case)
        pointers = {name: self.upload(array) for name, array in buffers.items()}
        shared = case.launch.get("dynamic_smem", 0)
        blobs = [self.parameter(p, pointers) for p in case.launch["params"]]
        table = (ctypes.c_void_p * max(len(blobs), 1))(*(ctypes.addressof(b) for b, _ in blobs))
        for index, (blob, offset) in enumerate(blobs):
            table[index] = ctypes.addressof(blob) + offset
        grid, block = _triple(case.launch["grid"]), _triple(case.launch["block"])
        self.call("cuLaunchKernel", function, *map(ctypes.c_uint, (*grid, *block, shared)), None, table, None)
        self.call("cuCtxSynchronize")
        found = {}
        for name in case.outputs:
            out = np.empty_like(buffers[name])
            self.call("cuMemcpyDtoH_v2", out.ctypes.data_as(ctypes.c_void_p), pointers[name], ctypes.c_size_t(out.nbytes))
            found[name] = out
        for pointer in pointers.values():
            self.call("cuMemFree_v2", pointer)
        self.call("cuModuleUnload", module)
        return found

    def load(self, ptx: str) -> ctypes.c_void_p:
        module = ctypes.c_void_p()
        log = ctypes.create_string_buffer(8192)
        options = (ctypes.c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
        try:
            self.call("cuModuleLoadDataEx", ctypes.byref(module), ctypes.c_char_p(ptx.encode()), 2, options, values)
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {log.value.decode(errors='replace').strip()[:1500]}") from None
        return module

    def upload(self, array: np.ndarray) -> ctypes.c_uint64:
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(array.nbytes, 16)))
        self.call("cuMemcpyHtoD_v2", pointer, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes))
        return pointer

    def parameter(self, described: dict[str, Any], pointers: dict[str, ctypes.c_uint64]) -> tuple[Any, int]:
        """(storage, offset in it) of one parameter's bytes."""
        kind, value = next(iter(described.items()))
        if kind == "tensor_map":
            return self.encode(map_arguments(value, pointers[value["buffer"]].value))
        if kind == "ptr":
            data = struct.pack("<Q", pointers[value].value + described.get("offset", 0))
        else:
            data = struct.pack(_SCALARS[kind], value)
        return ctypes.create_string_buffer(data, len(data)), 0

    def encode(self, a: dict[str, Any]) -> tuple[Any, int]:
        storage = ctypes.create_string_buffer(192)
        offset = -ctypes.addressof(storage) % 64
        u64, u32, rank = ctypes.c_uint64, ctypes.c_uint32, a["rank"]
        self.call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(ctypes.addressof(storage) + offset),
            a["type"],
            u32(rank),
            ctypes.c_void_p(a["address"]),
            (u64 * rank)(*a["dims"]),
            (u64 * len(a["strides"]))(*a["strides"]),
            (u32 * rank)(*a["box"]),
            (u32 * rank)(*a["steps"]),
            0,
            a["swizzle"],
            0,
            a["fill"],
        )
        return storage, offset
