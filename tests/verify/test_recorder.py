"""libcuda made of Python: what it records, and what it does not know."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from glu4.emulator.tensor_map import decode
from glu4.verify.recorder import Recorder

PTX = """.version 8.8
.target sm_100a
.address_size 64
.visible .entry k(.param .u64 k_param_0, .param .align 4 .b8 k_param_1[12]) { ret; }
"""


def loaded() -> tuple[Recorder, int]:
    recorder = Recorder()
    made = SimpleNamespace(artifacts=SimpleNamespace(PTX=PTX, CUBIN=b"cubin"))
    assert recorder.compile(lambda *a, **k: made)(1, options="--keep-ptx") is made
    library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    assert recorder.cuLibraryLoadData(ctypes.byref(library), b"cubin", None, None, 0, None, None, 0) == 0
    assert recorder.cuLibraryGetKernel(ctypes.byref(kernel), library, b"k") == 0
    return recorder, int(kernel.value or 0)


def test_a_launch_is_recorded() -> None:
    recorder, handle = loaded()
    recorder.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4  # as host code may set
    attributes = ctypes.create_string_buffer(struct.pack("=I4x3I52x", 4, 2, 1, 1))
    config = ctypes.create_string_buffer(struct.pack("=7I4xQQI4x", 4, 3, 2, 192, 1, 1, 999, 5, ctypes.addressof(attributes), 1))
    values = [ctypes.create_string_buffer(b) for b in (struct.pack("=Q", 77), bytes(range(12)))]
    pointers = (ctypes.c_void_p * 2)(*(ctypes.addressof(v) for v in values))
    assert recorder.cuLaunchKernelEx(ctypes.addressof(config), handle, ctypes.addressof(pointers), None) == 0
    ((ptx, launch),) = recorder.launches
    assert ptx == PTX
    assert (launch.kernel, launch.grid, launch.block, launch.cluster, launch.dynamic_smem) == (
        "k", (4, 3, 2), (192, 1, 1), (2, 1, 1), 999,
    )  # fmt: skip
    assert launch.params == (struct.pack("=Q", 77), bytes(range(12)))


def encode(
    recorder: Recorder, kind: int = 13, dims: Any = (256, 128), stride: int = 128, interleave: int = 0
) -> tuple[int, bytes]:
    memory = ctypes.create_string_buffer(128)
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    status = recorder.cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(memory)), kind, 2, ctypes.c_void_p(0x7000_0000_0000), (u64 * 2)(*dims),
        (u64 * 1)(stride), (u32 * 2)(256, 128), (u32 * 2)(1, 1), interleave, 3, 2, 0,
    )  # fmt: skip
    return status, memory.raw


def test_tensor_maps_are_encoded_and_wrong_ones_refused() -> None:
    recorder = Recorder()
    status, data = encode(recorder)
    made = decode(data)
    assert (status, made.element_type, made.swizzle, made.box_shape) == (0, "16u4_align8b", "128B", (256, 128))
    assert encode(recorder, stride=100)[0] == 1
    assert encode(recorder, kind=99)[0] == 1
    assert encode(recorder, interleave=1)[0] == 1
    name = ctypes.c_char_p()
    assert recorder.cuGetErrorName(1, ctypes.byref(name)) == 0
    assert name.value == b"CUDA_ERROR_INVALID_VALUE"


def test_what_it_does_not_know_is_an_error() -> None:
    recorder, _ = loaded()
    with pytest.raises(AttributeError, match="cuMemAlloc: this call of libcuda is not recorded"):
        _ = recorder.cuMemAlloc
    with pytest.raises(RuntimeError, match=r"cute.compile did not make with --keep-ptx and --keep-cubin"):
        recorder.cuLibraryLoadData(ctypes.byref(ctypes.c_void_p()), b"other")
    library = ctypes.c_void_p(1)
    assert recorder.cuLibraryGetKernel(ctypes.byref(ctypes.c_void_p()), library, b"other") == 500


def test_calls_that_only_succeed() -> None:
    recorder = Recorder()
    context = ctypes.c_void_p()
    assert recorder.cuCtxGetCurrent(ctypes.byref(context)) == 0
    assert context.value
    for call in (recorder.cuKernelSetAttribute, recorder.cuKernelGetFunction, recorder.cuThreadExchangeStreamCaptureMode):
        assert call(None, None) == 0
