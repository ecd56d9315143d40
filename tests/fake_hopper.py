"""A Hopper device made of Python: libcuda's calls as glu4 makes them, and kernels that compute what they are launched with.

A launch is read back from the very memory that cuLaunchKernelEx is given (configuration, attributes, parameters, tensor map), the
operands from the addresses in it, and the specified result is written to the address of the output. So the whole eager path runs
on CPU tensors, and a wrong byte anywhere gives a wrong result. The CPU is device -1, as torch's get_device says.
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

from glu4 import dispatch, reference
from glu4.activation import IDENTITY, Activation
from glu4.backends.hopper import flags, grouped_launch, launch
from glu4.backends.hopper.pack import UNIT_WORDS, unpack_gated, unpack_matrix
from glu4.backends.hopper.spec import DecodeSpec, GroupedSpec, KernelSpec, Spec, spec_from_dict
from glu4.compiled import driver, store
from glu4.nvfp4 import NVFP4Tensor
from glu4.scale_layout import SwizzledLayout

PARAMETERS = "=iiQiiQQQQQi4xQi4xifffQiiQ"
SIZES = [128, 8, 24, 8, 8, 8, 16, 16, 4, 4, 4, 4, 24, 1]
NVFP4_PARAMETERS = "=QiiQQiiQ" + PARAMETERS[3:]
NVFP4_SIZES = [24, 24, *SIZES[2:]]
GROUPED_PARAMETERS = "=iiQiii4xqqQi4xQi4xQi4xQQiiqQiiqifffQiiqQi4xQi4x"
GROUPED_SIZES = [128, 8, 40, 16, 16, 16, 8, 24, 24, 4, 4, 4, 4, 24, 16, 16]
# x and its rows instead of a tensor map; the index last
GATHERING_PARAMETERS = "=Qiiq" + GROUPED_PARAMETERS[3:] + "Qiiq"
GATHERING_SIZES = [24, *GROUPED_SIZES[2:], 24]
DECODER_PARAMETERS = "=Qi4xQi4xQi4xi"
DECODER_SIZES = [16, 16, 16, 4]
GATHERER_PARAMETERS = "=QiiqQiiqQiiqQi4x"
GATHERER_SIZES = [24, 24, 24, 16]
TYPES = {6: torch.float16, 10: torch.bfloat16}  # in a tensor map
CONTEXT = 77
SHARED_BYTES = 200_000


def memory(address: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over memory that is there already."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    raw = (ctypes.c_char * (span * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).as_strided(shape, stride)


@dataclass
class Launch:
    """What one launch said."""

    spec: Spec
    device: int
    stream: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    attributes: dict[int, tuple[int, ...]]
    tensor_map: bytes
    parameters: tuple[Any, ...]


def encode(address: int, hardware_type: int, columns: int, rows: int, row_bytes: int, box: tuple[int, int]) -> bytes:
    """The first 64 bytes of a 2-D tensor map of 16-bit values, 128-byte swizzle, as a driver writes them."""
    word = 1 << 4 | hardware_type << 7 | 3 << 13 | 2 << 17
    low = (
        struct.pack("<QII", address, word, row_bytes // 16 & 0xFFFFFFFF) + bytes(12) + struct.pack("<I", row_bytes // 16 >> 32)
    )
    high = struct.pack("<II", columns - 1, rows - 1) + bytes(15) + bytes((box[0] - 1, box[1] - 1)) + bytes(7)
    return low + high


@dataclass
class FakeCuda:
    """libcuda. pause: seconds that a launch waits before it reads its memory, so that others may overwrite it; failures: what
    calls return instead of success, once each."""

    launches: list[Launch] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    device: int = -1
    stream: int = 7
    pause: float = 0.0
    context: int = CONTEXT
    mode: int = 0  # of stream capture: global
    graph: int = 0  # the number of the one that is captured, 0 for none
    _images: list[bytes] = field(default_factory=list)

    def _done(self, name: str) -> int:
        self.calls.append(name)
        return self.failures.pop(name, 0)

    def cuStreamGetCaptureInfo_v2(self, stream: object, status: Any, number: Any, *_: object) -> int:
        status._obj.value, number._obj.value = int(self.graph != 0), self.graph
        return self._done("cuStreamGetCaptureInfo_v2")

    def cuLibraryLoadData(self, library: Any, image: bytes, *_: object) -> int:
        self._images.append(image)
        library._obj.value = len(self._images)
        assert self.mode == 2, "loading is not legal while a graph is captured"
        return self._done("cuLibraryLoadData")

    def cuLibraryGetKernel(self, kernel: Any, library: ctypes.c_void_p, entry: bytes) -> int:
        assert entry == b"entry"
        kernel._obj.value = library.value
        assert self.mode == 2, "loading is not legal while a graph is captured"
        return self._done("cuLibraryGetKernel")

    def cuKernelSetAttribute(self, attribute: int, value: int, kernel: object, device: int) -> int:
        assert (attribute, device) == (8, self.device)
        assert self.mode == 2, "loading is not legal while a graph is captured"
        return self._done("cuKernelSetAttribute")

    def cuKernelGetFunction(self, function: object, kernel: object) -> int:
        assert self.mode == 2, "loading is not legal while a graph is captured"
        return self._done("cuKernelGetFunction")

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = self.context
        return self._done("cuCtxGetCurrent")

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        context._obj.value = CONTEXT
        return self._done("cuDevicePrimaryCtxRetain")

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.context = context.value
        return self._done("cuCtxSetCurrent")

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        mode._obj.value, self.mode = self.mode, mode._obj.value
        return self._done("cuThreadExchangeStreamCaptureMode")

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_FAKE"
        return 0

    def cuTensorMapEncodeTiled(self, target: Any, dtype: int, rank: int, address: Any, dims: Any, strides: Any, box: Any,
                               steps: Any, interleave: int, swizzle: int, promotion: int, fill: int) -> int:  # fmt: skip
        assert (rank, list(steps), interleave, swizzle, promotion, fill) == (2, [1, 1], 0, 3, 2, 0)
        assert target.value % 64 == 0
        assert address.value % 16 == 0
        made = encode(address.value, {6: 6, 9: 10}[dtype], dims[0], dims[1], strides[0], (box[0], box[1]))
        ctypes.memmove(target.value, made + bytes(64), 128)
        return self._done("cuTensorMapEncodeTiled")

    def cuLaunchKernelEx(self, config: int, handle: int, pointers: int, extra: None) -> int:
        status = self._done("cuLaunchKernelEx")
        if not status and self.context != CONTEXT:
            return 201
        if status:
            return status
        stream_then = self.stream
        time.sleep(self.pause)
        *sizes, shared, stream, attributes, count = struct.unpack("=7I4xQQI4x", ctypes.string_at(config, 56))
        spec = spec_from_dict(json.loads(self._images[handle - 1]))
        held: dict[int, tuple[int, ...]] = {}
        for i in range(count):
            key, *value = struct.unpack_from("=I4x3I", ctypes.string_at(attributes + 72 * i, 72))
            held[key] = tuple(value)
        parameter_sizes, form = _parameters(spec)
        at = (ctypes.c_void_p * len(parameter_sizes)).from_address(pointers)
        raw = [ctypes.string_at(p, n) for p, n in zip(at, parameter_sizes, strict=True)]
        tensor_map = b""
        if parameter_sizes[0] == 128:
            assert at[0] % 64 == 0
            tensor_map = raw.pop(0)
        parameters = struct.unpack(form, b"".join(raw)[: struct.calcsize(form)])  # the last byte of some is not read
        assert stream == stream_then or self.pause
        launched = Launch(spec, self.device, stream, tuple(sizes[:3]), tuple(sizes[3:]), shared, held, tensor_map, parameters)
        self.launches.append(launched)
        compute = run_decoder if isinstance(spec, DecodeSpec) else run_grouped if isinstance(spec, GroupedSpec) else run
        compute(launched)
        return 0


def _parameters(spec: Spec) -> tuple[list[int], str]:
    """Sizes of a kernel's parameters, and how they are packed, but for a tensor map."""
    if isinstance(spec, DecodeSpec):
        return (GATHERER_SIZES, GATHERER_PARAMETERS) if spec.gather else (DECODER_SIZES, DECODER_PARAMETERS)
    if isinstance(spec, GroupedSpec):
        return (GATHERING_SIZES, GATHERING_PARAMETERS) if spec.config.gather else (GROUPED_SIZES, GROUPED_PARAMETERS)
    return (NVFP4_SIZES, NVFP4_PARAMETERS) if spec.nvfp4 else (SIZES, PARAMETERS)


def tokens_of(launched: Launch) -> Tensor:
    """The matrix that the tensor map covers; refuses a map that a driver would not write."""
    spec = launched.spec
    assert isinstance(spec, (KernelSpec, GroupedSpec))
    raw, box = launched.tensor_map, spec.config.box if isinstance(spec, GroupedSpec) else spec.config.box_tokens
    address, word, low = struct.unpack_from("<QII", raw)
    high, columns, rows = struct.unpack_from("<III", raw, 28)
    dtype = TYPES[word >> 7 & 15]
    row_bytes = (low | high << 32) * 16
    assert raw[:64] == encode(address, word >> 7 & 15, columns + 1, rows + 1, row_bytes, (64, box))
    assert address % 16 == 0
    assert row_bytes >= 2 * (columns + 1)
    assert spec.x == ("bf16" if dtype is torch.bfloat16 else "f16")
    return memory(address, (rows + 1, columns + 1), (row_bytes // 2, 1), dtype)


def nvfp4_of(codes: int, scales: int, m: int, blocks: int) -> NVFP4Tensor:
    """NVFP4 tokens with linear scales at two addresses, without their global scale."""
    code = memory(codes, (m, 8 * blocks), (8 * blocks, 1), torch.uint8)
    scale = memory(scales, (m, blocks), (blocks, 1), torch.uint8).view(torch.float8_e4m3fn)
    return NVFP4Tensor(code.clone(), scale.clone(), torch.tensor(1.0))


def rows_of(order: int, tokens: int, top_k: int, row: int) -> list[int]:
    """The row of x that each row of the work is, from an index in memory."""
    assert row == top_k
    assert order % 8 == 0
    return (memory(order, (tokens, top_k), (row, 1), torch.int64).flatten() // top_k).tolist()


def run_gatherer(launched: Launch) -> None:
    """Decode the rows that an index asks for, as the kernel would."""
    codes, tokens, words, row, scales, again, blocks, scale_row, *order, out, out_words = launched.parameters
    assert (again, order[1], 2 * blocks) == (tokens, tokens, words)
    rows = rows_of(*order)
    assert out_words == 4 * len(rows) * words
    assert (launched.block, launched.grid) == ((128, 1, 1), (len(rows), -(-words // 128), 1))
    code = memory(codes, (tokens, 4 * words), (4 * row, 1), torch.uint8).clone()
    scale = memory(scales, (tokens, blocks), (scale_row, 1), torch.uint8).clone().view(torch.float8_e4m3fn)
    values = NVFP4Tensor(code, scale, torch.tensor(1.0)).decode(torch.float16)
    memory(out, (len(rows), 8 * words), (8 * words, 1), torch.float16).copy_(values[rows])


def run_decoder(launched: Launch) -> None:
    """Decode what the kernel would."""
    assert isinstance(launched.spec, DecodeSpec)
    if launched.spec.gather:
        run_gatherer(launched)
        return
    codes, words, scales, scale_bytes, out, out_words, swizzled = launched.parameters
    assert out_words == 4 * words
    assert launched.block == (128, 1, 1)
    assert launched.shared_bytes == 0
    assert launched.grid == (-(-words // (256 if words >= 1 << 17 else 128)), 1, 1)
    target = memory(out, (words * 8,), (1,), torch.float16)
    if not swizzled:
        assert scale_bytes == words // 2
        target.copy_(nvfp4_of(codes, scales, 1, words // 2).decode(torch.float16).flatten())
        return
    rows, blocks = words // swizzled, swizzled // 2
    layout = SwizzledLayout(rows, blocks)
    stored = memory(scales, (scale_bytes,), (1,), torch.uint8)
    assert scale_bytes == prod(layout.storage_shape)
    linear = torch.stack([stored[layout.offset(r, b)] for r in range(rows) for b in range(blocks)])
    target.copy_(nvfp4_of(codes, linear.data_ptr(), rows, blocks).decode(torch.float16).flatten())


def _tokens(launched: Launch) -> tuple[int, int, Tensor, tuple[Any, ...]]:
    """(M, K, tokens, the parameters from the weights on)."""
    spec, parameters = launched.spec, launched.parameters
    assert isinstance(spec, KernelSpec)
    if spec.nvfp4:
        codes, m, blocks, row, scales, *again = parameters[:8]
        assert (blocks, m, blocks, blocks) == (row, *again)
        assert codes % 8 == scales % 4 == blocks % 4 == 0
        return m, 16 * blocks, nvfp4_of(codes, scales, m, blocks).decode(torch.float64), parameters[8:]
    return *parameters[:2], tokens_of(launched).double(), parameters[2:]


def run(launched: Launch) -> None:
    """Compute what the kernel would."""
    spec = launched.spec
    assert isinstance(spec, KernelSpec)
    c = spec.config
    m, k, tokens, rest = _tokens(launched)
    (weights, tiles, units, unit_stride, gate_scale, up_scale, x_scale, gate_bias, gate_n, up_bias, up_n, flags, alpha, beta,
     limit, out, out_m, n, out_row) = rest  # fmt: skip
    assert (out_m, gate_n, up_n, unit_stride) == (m, n, n, units * UNIT_WORDS)
    assert launched.block == (c.cta_threads(spec.nvfp4), 1, 1)
    assert launched.shared_bytes == SHARED_BYTES
    assert launched.grid == c.grid(m, n, spec.dual)
    assert launched.attributes.get(4, (1, 1, 1)) == (1, c.cluster, c.splits)
    assert tokens.shape == (m, k)
    packed = memory(weights, (tiles, units, UNIT_WORDS), (units * UNIT_WORDS, UNIT_WORDS, 1), torch.int32)
    memory(weights + packed.nbytes, (UNIT_WORDS,), (1,), torch.int32).sum()  # the spare unit, which a stage may read
    one = torch.tensor(1.0)
    both = unpack_gated(packed, n, k, one, one) if spec.dual else (unpack_matrix(packed, n, k, one),) * 2
    scales = [float(memory(s, (1,), (1,), torch.float32)) for s in (gate_scale, up_scale)]
    factor = float(memory(x_scale, (1,), (1,), torch.float32)) if flags & 1 else 1.0
    biases = [memory(b, (n,), (1,), torch.float32).double() if flags & f else 0.0 for b, f in ((gate_bias, 2), (up_bias, 4))]
    gate, up = (tokens @ w.decode(torch.float64).t() * (factor * s) + b for w, s, b in zip(both, scales, biases, strict=True))
    activation = IDENTITY if flags & 8 else Activation("swish", alpha, beta, limit)
    dtype = torch.bfloat16 if spec.out == "bf16" else torch.float16
    memory(out, (m, n), (out_row, 1), dtype).copy_(reference.round_once(activation(gate, up) if spec.dual else gate, dtype))


def run_grouped(launched: Launch) -> None:
    """Compute what a grouped kernel would, rows of no expert left alone."""
    spec = launched.spec
    assert isinstance(spec, GroupedSpec)
    head, rest, tail = launched.parameters[:2], launched.parameters[2:], ()
    if spec.config.gather:
        head, rest, tail = launched.parameters[:4], launched.parameters[4:-4], launched.parameters[-4:]
    (weights, experts, tiles, units, expert_stride, tile_stride, offsets, ends, gate_scale, gate_experts, up_scale,
     up_experts, x_scale, gate_bias, bias_experts, bias_n, bias_row, up_bias, *again, flags, alpha, beta, limit, out, out_rows, n,
     out_row, partials, partial_count, ready, ready_count) = rest  # fmt: skip
    if spec.config.gather:
        address, count, k, row = head
        assert address % 16 == 0
        assert row % 8 == 0
        assert row >= k
        index = rows_of(*tail)
        rows, dtype = len(index), torch.bfloat16 if spec.x == "bf16" else torch.float16
        tokens = memory(address, (count, k), (row, 1), dtype)[index].double()
    else:
        (rows, k), tokens = head, tokens_of(launched).double()
    assert (ends, gate_experts, up_experts, bias_experts) == (experts + 1, experts, experts, experts)
    assert (bias_n, bias_row, again, out_rows) == (n, n, [experts, n, n], rows)
    assert (expert_stride, tile_stride) == (tiles * units * UNIT_WORDS, units * UNIT_WORDS)
    assert (launched.grid, launched.block) == ((132, 1, 1), (spec.config.threads, 1, 1))
    c = spec.config
    assert (partial_count, ready_count) == (132 * c.rows * 64 * c.tokens, 132 * c.rows)
    memory(partials, (partial_count,), (1,), torch.float32).fill_(float("nan"))
    assert not memory(ready, (ready_count,), (1,), torch.int32).any()
    packed = memory(weights, (experts, tiles, units, UNIT_WORDS), (expert_stride, tile_stride, UNIT_WORDS, 1), torch.int32)
    memory(weights + packed.nbytes, (UNIT_WORDS,), (1,), torch.int32).sum()  # the spare unit, which a stage may read
    bounds = memory(offsets, (ends,), (1,), torch.int32).tolist()
    one = torch.tensor(1.0)
    assert tokens.shape == (rows, k)
    factor = float(memory(x_scale, (1,), (1,), torch.float32)) if flags & 1 else 1.0
    scales = [memory(s, (experts,), (1,), torch.float32).tolist() for s in (gate_scale, up_scale)]
    activation = IDENTITY if flags & 8 else Activation("swish", alpha, beta, limit)
    dtype = torch.bfloat16 if spec.out == "bf16" else torch.float16
    target = memory(out, (rows, n), (out_row, 1), dtype)
    for e in range(experts):
        first, end = bounds[e], bounds[e + 1]
        both = unpack_gated(packed[e], n, k, one, one) if spec.dual else (unpack_matrix(packed[e], n, k, one),) * 2
        biases = [memory(b, (experts, n), (n, 1), torch.float32)[e].double() if flags & f else 0.0
                  for b, f in ((gate_bias, 2), (up_bias, 4))]  # fmt: skip
        gate, up = (tokens[first:end] @ w.decode(torch.float64).t() * (factor * s[e]) + b
                    for w, s, b in zip(both, scales, biases, strict=True))  # fmt: skip
        assert spec.dual or torch.equal(gate, up)
        target[first:end] = reference.round_once(activation(gate, up) if spec.dual else gate, dtype)


def description(spec: Spec, pdl: bool = True) -> dict[str, Any]:
    """As the builder writes it."""
    if isinstance(spec, KernelSpec):
        threads, shared = spec.config.cta_threads(spec.nvfp4), SHARED_BYTES
    else:
        threads, shared = (spec.config.threads, SHARED_BYTES) if isinstance(spec, GroupedSpec) else (128, 0)
    return {"entry": "entry", "params": _parameters(spec)[0], "threads": threads, "shared_bytes": shared, "pdl": pdl}


def forget() -> None:
    """What this process remembers of kernels and warnings."""
    launch.forget()
    grouped_launch.forget()
    flags.forget()
    kept = (dispatch._provide, dispatch._compile, dispatch._provide_grouped, dispatch._compile_grouped)
    for remembered in (*kept, dispatch.warn_once, driver._primary_context):
        remembered.cache_clear()


@contextmanager
def _current_device(cuda: FakeCuda, index: int) -> Iterator[None]:
    before, cuda.device = cuda.device, index
    yield
    cuda.device = before


@contextmanager
def fake_hopper(monkeypatch: pytest.MonkeyPatch, compiled: bool = True) -> Iterator[FakeCuda]:
    """The CPU as a Hopper GPU, with every kernel compiled or with none."""
    cuda = FakeCuda()
    find = (lambda spec: (json.dumps(spec.to_dict()).encode(), description(spec))) if compiled else (lambda spec: None)
    monkeypatch.setattr(driver, "_cuda", lambda: cuda)
    monkeypatch.setattr(store, "find", find)
    monkeypatch.setattr(launch, "is_hopper", lambda device: device.type == "cpu")
    monkeypatch.setattr(launch, "_properties", lambda index: ("Fake Hopper", 132))
    monkeypatch.setattr(grouped_launch, "_processors", lambda index: 132)
    monkeypatch.setattr(flags, "_zeros", lambda index: torch.zeros(flags._OWNERS * flags.FLAGS, dtype=torch.int32))
    monkeypatch.setattr(flags, "_capturing", lambda: cuda.graph != 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: cuda.device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: cuda.stream, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: _current_device(cuda, index))
    forget()
    yield cuda
    forget()
