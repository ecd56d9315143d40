"""Load cubins and launch them through libcuda with ctypes: no CuTe DSL, no CUDA toolkit, no C compiler.

A launch reads one block of memory (`_Frame`): the kernel's parameters, CUlaunchConfig, the tensor map, the launch attributes.
All that changes from call to call lies side by side in it, so that one `struct` pack fills it in. `Repeat` makes launches that
differ in addresses alone, and stores just those.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from glu4.errors import UnsupportedError

__all__ = ["Kernel", "Relaxed", "Repeat", "capture_id"]

_C = torch._C
# cuda.h of CUDA 13.0
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER, _PROGRAMMATIC = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, ..._PROGRAMMATIC_STREAM_SERIALIZATION
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_INVALID_CONTEXT = 201
_SWIZZLE_128B, _L2_128B = 3, 2
_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_MAP_BYTES, _CONFIG_BYTES, _ATTRIBUTE_BYTES = 128, 56, 72  # sizeof CUtensorMap, CUlaunchConfig, CUlaunchAttribute
_CONFIG = "7I4xQQI12x"  # grid, block, shared bytes; stream, attributes, their number; up to the map's alignment
# of a 2-D tensor map: address; a word for type, swizzle and so on; row stride / 16; columns - 1, rows - 1. Found by comparing
# what cuTensorMapEncodeTiled wrote for 307 such matrices on an H100: every other byte depends on type, box and swizzle alone
_MAP = "QII16xII"
_STREAM, _ATTRIBUTES, _ADDRESS = 4, 5, 8  # 64-bit words from _CONFIG on: stream, attributes, the map's address
Matrix = tuple[int, int, int, int]  # address, rows, columns, bytes from row to row
_NO_MATRIX = (0, 1, 1, 0)


@cache
def _cuda() -> Any:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(f"the NVIDIA driver library libcuda.so.1 cannot be loaded: {error}") from error
    library.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4  # so that addresses may be plain integers
    return library


def _check(status: int, what: str) -> None:
    if status:
        name = ctypes.c_char_p()
        _cuda().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{what} failed: {(name.value or b'unknown').decode()} ({status})")


class Relaxed:
    """A context in which loading a kernel and allocating are legal even while this thread captures a CUDA graph: nothing of it
    belongs to the graph."""

    def __enter__(self) -> None:
        self._mode = ctypes.c_int(_RELAXED)
        _check(_cuda().cuThreadExchangeStreamCaptureMode(ctypes.byref(self._mode)), "cuThreadExchangeStreamCaptureMode")

    def __exit__(self, *_: object) -> None:
        _cuda().cuThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))


def capture_id(stream: int) -> int:
    """What tells the CUDA graph that `stream` is captured into from any other; 0 while nothing is captured."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    found = _cuda().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    _check(found, "cuStreamGetCaptureInfo")
    return number.value if status.value else 0


def _on(device: int) -> AbstractContextManager[Any]:
    return nullcontext() if _C._cuda_getDevice() == device else torch.cuda.device(device)


@cache
def _primary_context(device: int) -> ctypes.c_void_p:
    context = ctypes.c_void_p()
    _check(_cuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    return context


def _bind(device: int) -> None:
    """Give this thread the context that torch uses on a device, if it has none yet."""
    context = ctypes.c_void_p()
    _check(_cuda().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        _check(_cuda().cuCtxSetCurrent(_primary_context(device)), "cuCtxSetCurrent")


def _encode(address: int, columns: int, row_bytes: int, dtype: torch.dtype, box_rows: int, box_columns: int) -> bytes:
    """A tensor map of one row of a 16-bit matrix: 2-D, tiled, 128-byte swizzle, zeros out of bounds."""
    memory = ctypes.create_string_buffer(_MAP_BYTES + 64)
    start = -ctypes.addressof(memory) % 64
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    status = _cuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(memory) + start), _MAP_TYPES[dtype], 2, ctypes.c_void_p(address),
        (u64 * 2)(columns, 1), (u64 * 1)(row_bytes), (u32 * 2)(box_columns, box_rows), (u32 * 2)(1, 1),
        0, _SWIZZLE_128B, _L2_128B, 0,
    )  # fmt: skip
    _check(status, "cuTensorMapEncodeTiled")
    return memory.raw[start : start + _MAP_BYTES]


class _Frame:
    """The memory of one launch. One thread at a time may use it."""

    def __init__(self, kernel: Kernel, tensor_map: bytes) -> None:
        sizes = kernel.param_sizes[kernel.mapped :]
        parameters = -(-sum(sizes) // 64) * 64
        config, map_start = parameters, parameters + _CONFIG_BYTES + 8
        attributes = map_start + _MAP_BYTES
        memory = ctypes.create_string_buffer(attributes + 2 * _ATTRIBUTE_BYTES + 64)
        base = -(-ctypes.addressof(memory) // 64) * 64
        self.start = base - ctypes.addressof(memory)
        self.memory = memory
        self.config = base + config
        self.attributes = base + attributes
        self.bytes = memoryview(memory).cast("B")[self.start : self.start + kernel.packed_size]
        self.words = self.bytes.cast("Q")
        self.holds: Repeat | None = None  # whose constants
        self.map_word: int = struct.unpack_from("=I", tensor_map, 8)[0]
        ctypes.memmove(base + map_start, tensor_map, _MAP_BYTES)
        if kernel.clustered:
            ctypes.memmove(base + attributes, struct.pack("=I4x3I", _CLUSTER, *kernel.cluster), 20)
        last = base + attributes + _ATTRIBUTE_BYTES * kernel.clustered
        ctypes.memmove(last, struct.pack("=I4xi", _PROGRAMMATIC, 1), 12)
        places = [base + map_start] * kernel.mapped + [base + sum(sizes[:i]) for i in range(len(sizes))]
        self._pointers = (ctypes.c_void_p * len(places))(*places)
        self.pointers = ctypes.addressof(self._pointers)


class Kernel:
    """A loaded kernel: usable on every device of its architecture, from any stream and any thread.

    description  as the builder wrote it
    formats      how `struct` packs each parameter, after the first where that is a tensor map; checked against the description
    dtype, box   of the tensor map: 16-bit type, (rows, columns); None for a kernel without one
    cluster      CTAs of a cluster along the grid's x, y and z
    """

    def __init__(
        self,
        cubin: bytes,
        description: dict[str, Any],
        formats: Sequence[str],
        dtype: torch.dtype | None = None,
        box: tuple[int, int] | None = None,
        cluster: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        self.threads: int = description["threads"]
        self.shared_bytes: int = description["shared_bytes"]
        self.param_sizes: list[int] = description["params"]
        self.cluster, self.clustered = cluster, cluster != (1, 1, 1)
        self.overlaps = bool(description.get("pdl"))
        self.mapped = box is not None
        own = [struct.calcsize("=" + f) for f in formats]
        sizes = [_MAP_BYTES] * self.mapped + own
        if sizes != self.param_sizes:
            raise RuntimeError(f"the kernel takes parameters of {self.param_sizes} bytes, this version passes {sizes}")
        padding = -sum(own) % 64
        packing = struct.Struct("=" + "".join(formats) + f"{padding}x" + _CONFIG + _MAP)
        self._pack, self.packed_size = packing.pack_into, packing.size
        self._dtype, self._box = dtype, box
        self._map: bytes | None = None
        self.frames: list[_Frame] = []  # those that no thread is using
        self._ready: set[int] = set()
        self._cubin = cubin
        self._library, self._kernel = ctypes.c_void_p(), ctypes.c_void_p()
        nothing = (None, None, 0, None, None, 0)
        with Relaxed():
            _check(_cuda().cuLibraryLoadData(ctypes.byref(self._library), cubin, *nothing), "cuLibraryLoadData")
            entry = description["entry"].encode()
            _check(_cuda().cuLibraryGetKernel(ctypes.byref(self._kernel), self._library, entry), "cuLibraryGetKernel")
        self.handle = self._kernel.value
        self._launch = _cuda().cuLaunchKernelEx

    def load(self, device: int) -> None:
        """Make the kernel ready on a device, as the first launch there would."""
        if device in self._ready:
            return
        function = ctypes.c_void_p()
        with _on(device), Relaxed():
            _bind(device)
            status = _cuda().cuKernelSetAttribute(_MAX_DYNAMIC_SHARED, self.shared_bytes, self._kernel, device)
            _check(status, "cuKernelSetAttribute")
            # the driver loads code when it is first needed, unless asked for before
            _check(_cuda().cuKernelGetFunction(ctypes.byref(function), self._kernel), "cuKernelGetFunction")
        self._ready.add(device)

    def _frame(self, address: int, columns: int, row_bytes: int) -> _Frame:
        if self._map is None:
            if self._dtype is None or self._box is None:
                self._map = bytes(_MAP_BYTES)
            else:
                self._map = _encode(address, columns, row_bytes, self._dtype, *self._box)
        return _Frame(self, self._map)

    def launch(
        self,
        device: int,
        stream: int,
        grid: tuple[int, int, int],
        matrix: Matrix | None,
        params: tuple[int | float, ...],
        overlap: bool = True,
    ) -> None:
        """Launch on `stream` of `device`.

        matrix   what the tensor map covers, if there is one; address and stride are multiples of 16, the stride less than 2^36
        params   the values of every parameter but the map, in the order of `formats`
        overlap  False: begin only when all work before it in the stream is done and visible, whatever the kernel could do
        """
        if device not in self._ready:
            self.load(device)
        matrix = matrix or _NO_MATRIX
        frame = self.take(*matrix)
        frame.holds = None
        self.fill(frame.memory, frame.start, matrix, params, grid, stream, frame.attributes, frame.map_word, overlap)
        self.run(device, frame)

    def fill(
        self,
        memory: Any,
        start: int,
        matrix: Matrix,
        params: tuple[int | float, ...],
        grid: tuple[int, int, int],
        stream: int,
        attributes: int,
        map_word: int,
        overlap: bool,
    ) -> None:
        """Write all of a launch that changes from call to call."""
        address, rows, columns, row_bytes = matrix
        self._pack(
            memory, start, *params, *grid, self.threads, 1, 1, self.shared_bytes, stream, attributes,
            self.clustered + (overlap and self.overlaps), address, map_word, row_bytes >> 4, columns - 1, rows - 1,
        )  # fmt: skip

    def take(self, address: int, rows: int, columns: int, row_bytes: int) -> _Frame:
        """Memory for a launch that no thread is using; `run` gives it back."""
        try:
            return self.frames.pop()  # one operation of the interpreter: no two threads get the same
        except IndexError:
            return self._frame(address, columns, row_bytes)

    def run(self, device: int, frame: Any, frames: list[Any] | None = None) -> None:
        """Launch what `frame` says, which is given back: to `frames`, of those that are not made here."""
        if _C._cuda_getDevice() == device:
            status = self._launch(frame.config, self.handle, frame.pointers, None)
        else:
            with torch.cuda.device(device):
                status = self._launch(frame.config, self.handle, frame.pointers, None)
        if status == _INVALID_CONTEXT:  # a thread that has made no CUDA call of its own yet
            with _on(device):
                _bind(device)
                status = self._launch(frame.config, self.handle, frame.pointers, None)
        (self.frames if frames is None else frames).append(frame)
        if status:
            _check(status, "cuLaunchKernelEx")


class Repeat:
    """Launches of one kernel on one device that differ in addresses alone: what `Kernel.launch` would do, in less time.

    device, grid, matrix, params, overlap  as for `Kernel.launch`; addresses in them are not used
    varied                                 where in the parameters after the map, in 64-bit words, four addresses are that vary
    """

    __slots__ = ("_a", "_attributes", "_b", "_c", "_constants", "_d", "_device", "_kernel", "_map", "_matrix", "_stream")

    def __init__(
        self,
        kernel: Kernel,
        device: int,
        grid: tuple[int, int, int],
        matrix: Matrix,
        params: tuple[int | float, ...],
        varied: tuple[int, int, int, int],
        overlap: bool = True,
    ) -> None:
        kernel.load(device)
        frame = kernel.take(*matrix)
        kernel.frames.append(frame)
        constants = bytearray(kernel.packed_size)
        kernel.fill(constants, 0, matrix, params, grid, 0, 0, frame.map_word, overlap)
        self._constants = bytes(constants)
        self._kernel, self._device, self._matrix = kernel, device, matrix
        self._a, self._b, self._c, self._d = varied
        config = (len(constants) - struct.calcsize("=" + _CONFIG + _MAP)) // 8
        self._stream, self._attributes, self._map = config + _STREAM, config + _ATTRIBUTES, config + _ADDRESS

    def __call__(self, stream: int, address: int, a: int, b: int, c: int, d: int) -> None:
        """address: of the tensor map's matrix; a to d: the parameters that vary."""
        kernel = self._kernel
        try:
            frame = kernel.frames.pop()  # as in `Kernel.take`, which would cost a call
        except IndexError:
            frame = kernel.take(*self._matrix)
        words = frame.words
        if frame.holds is not self:
            frame.bytes[:] = self._constants
            words[self._attributes] = frame.attributes
            frame.holds = self
        words[self._a] = a
        words[self._b] = b
        words[self._c] = c
        words[self._d] = d
        words[self._stream] = stream
        words[self._map] = address
        kernel.run(self._device, frame)
