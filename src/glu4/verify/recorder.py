"""libcuda made of Python, for a submission's process with no GPU: launches are recorded, tensor maps encoded, nothing is run.

It knows the calls of glu4's own host code (glu4.compiled.driver); a submission that calls others gets an AttributeError that
names the call. What is recorded can be emulated, because kernels come from `cute.compile` in the same process: the wrapper kept
here remembers the PTX of each cubin.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

from glu4.emulator.capture import CapturedLaunch
from glu4.emulator.ptx import parse
from glu4.emulator.tensor_map import TensorMap, encode

__all__ = ["Recorder"]

_TYPES = {0: "u8", 1: "u16", 2: "u32", 6: "f16", 7: "f32", 9: "bf16", 13: "16u4_align8b", 14: "16u4_align16b"}
_SWIZZLES = {0: "none", 1: "32B", 2: "64B", 3: "128B"}  # CUtensorMapSwizzle of cuda.h, as _TYPES is CUtensorMapDataType
_PROMOTIONS = ("none", "64B", "128B", "256B")
_FILLS = ("zero", "nan")
_CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_INVALID, _NOT_FOUND = 1, 500  # CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_FOUND
_CONTEXT = 1


class _Call:
    """One function of the library; `argtypes` may be set as on ctypes' own."""

    def __init__(self, function: Callable[..., int]) -> None:
        self._function = function
        self.argtypes: Any = None

    def __call__(self, *args: Any) -> int:
        return self._function(*args)


class Recorder:
    """The library. launches: (PTX, launch) in their order."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, CapturedLaunch]] = []
        self._ptx: dict[bytes, str] = {}
        self._libraries: list[str] = []
        self._kernels: list[tuple[str, str, list[int]]] = []  # PTX, entry, bytes of its parameters
        self._calls: dict[str, _Call] = {}

    def __getattr__(self, name: str) -> _Call:
        function = type(self).__dict__.get(f"_{name}")
        if not name.startswith("cu") or function is None:
            raise AttributeError(f"{name}: this call of libcuda is not recorded")
        return self._calls.setdefault(name, _Call(function.__get__(self)))

    def remember(self, cubin: bytes, ptx: str) -> None:
        """What a cubin was assembled from."""
        self._ptx[cubin] = ptx

    def compile(self, compile_: Callable[..., Any]) -> Callable[..., Any]:
        """`cute.compile`, which remembers what it made; made without `--keep-ptx --keep-cubin` it cannot be emulated."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            made = compile_(*args, **kwargs)
            artifacts = getattr(made, "artifacts", None)
            if artifacts is not None and artifacts.PTX and artifacts.CUBIN:
                self.remember(bytes(artifacts.CUBIN), artifacts.PTX)
            return made

        return wrapped

    # ---- calls ----

    def _cuLibraryLoadData(self, library: Any, image: bytes, *_: Any) -> int:
        if image not in self._ptx:
            raise RuntimeError("a kernel was loaded that cute.compile did not make with --keep-ptx and --keep-cubin")
        self._libraries.append(self._ptx[image])
        library._obj.value = len(self._libraries)
        return 0

    def _cuLibraryGetKernel(self, kernel: Any, library: Any, name: bytes) -> int:
        ptx = self._libraries[library.value - 1]
        entry = parse(ptx).functions.get(name.decode())
        if entry is None:
            return _NOT_FOUND
        self._kernels.append((ptx, name.decode(), [p.size for p in entry.params]))
        kernel._obj.value = len(self._kernels)
        return 0

    def _cuKernelSetAttribute(self, *_: Any) -> int:
        return 0

    def _cuKernelGetFunction(self, *_: Any) -> int:
        return 0

    def _cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = _CONTEXT
        return 0

    def _cuThreadExchangeStreamCaptureMode(self, *_: Any) -> int:
        return 0

    def _cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = {_INVALID: b"CUDA_ERROR_INVALID_VALUE", _NOT_FOUND: b"CUDA_ERROR_NOT_FOUND"}.get(status, b"unknown")
        return 0

    def _cuTensorMapEncodeTiled(
        self, target: Any, kind: int, rank: int, address: Any, dims: Any, strides: Any, box: Any, steps: Any, interleave: int,
        swizzle: int, promotion: int, fill: int,
    ) -> int:  # fmt: skip
        try:
            made = TensorMap(
                address.value or 0, _TYPES[kind], tuple(dims)[:rank], tuple(strides)[: rank - 1], tuple(box)[:rank],
                tuple(steps)[:rank], _SWIZZLES[swizzle], oob_fill=_FILLS[fill], l2_promotion=_PROMOTIONS[promotion],
            )  # fmt: skip
        except (ValueError, KeyError):
            return _INVALID
        if interleave:
            return _INVALID
        ctypes.memmove(target.value, encode(made), 128)
        return 0

    def _cuLaunchKernelEx(self, config: int, handle: int, pointers: int, extra: Any) -> int:
        grid_x, grid_y, grid_z, *block, shared, _, attributes, count = struct.unpack("=7I4xQQI4x", ctypes.string_at(config, 56))
        held = {}
        for i in range(count):
            key, value = struct.unpack("=I4x64s", ctypes.string_at(attributes + 72 * i, 72))
            held[key] = value
        ptx, entry, sizes = self._kernels[handle - 1]
        at = (ctypes.c_void_p * len(sizes)).from_address(pointers)
        params = tuple(ctypes.string_at(p, n) for p, n in zip(at, sizes, strict=True) if p is not None)
        cluster = None
        if _CLUSTER in held:
            x, y, z = struct.unpack("=3I", held[_CLUSTER][:12])
            cluster = (x, y, z)
        launch = CapturedLaunch(entry, (grid_x, grid_y, grid_z), (block[0], block[1], block[2]), cluster, shared, held, params)
        self.launches.append((ptx, launch))
        return 0
