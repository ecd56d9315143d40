"""Run dense NVFP4 problems on a Blackwell device. Executed in emulation only so far: no such GPU was at hand.

`dense` takes what the operators take and brings it into the kernel's form; `submit` makes one launch and refuses what is not
in that form.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.backends.blackwell import arguments
from glu4.backends.blackwell.arguments import Shape
from glu4.backends.blackwell.config import Config, candidates, legal
from glu4.backends.blackwell.moe_config import moe_refusal
from glu4.backends.blackwell.spec import KernelSpec
from glu4.compiled import store
from glu4.compiled.driver import Kernel
from glu4.errors import UnsupportedError
from glu4.nvfp4 import NVFP4Tensor, _unchecked
from glu4.problem import GroupedProblem, Problem

__all__ = [
    "ARCHITECTURES",
    "Choice",
    "Plan",
    "Shape",
    "aligned",
    "architecture",
    "available",
    "choice",
    "chosen",
    "dense",
    "flags_of",
    "forget",
    "is_blackwell",
    "is_prepared",
    "load",
    "plan",
    "prepared",
    "refusal",
    "shipped",
    "submit",
]

_C = torch._C
ARCHITECTURES = {(10, 0): "sm_100a", (10, 3): "sm_103a"}  # by compute capability; code for one does not run on the other
_IDENTITY, _A_SCALES, _WEIGHT_SCALES, _GATE_BIAS, _UP_BIAS = 1, 2, 4, 8, 16  # as the kernel's `flags`
_ALIGNMENT = 16  # bytes: addresses and strides of tensor copies (CUDA driver API, cuTensorMapEncodeTiled)
# CUlaunchConfig and CUlaunchAttribute of CUDA 13.0, as glu4.compiled.driver has them
_CONFIG, _ATTRIBUTE_BYTES = struct.Struct("=7I4xQQI4x"), 72
_CLUSTER, _PROGRAMMATIC = 4, 6
_STREAM_AT = 32  # bytes into CUlaunchConfig
_PLANS = 1 << 12
# shapes whose candidates are the kernels that are compiled ahead; candidates differ in order only
_TYPICAL = (Problem(1, 128, 256), Problem(256, 4096, 7168), Problem(4096, 4096, 4096))


class Choice(NamedTuple):
    """processors: of the device, for a persistent kernel."""

    kernel: Kernel
    spec: KernelSpec
    processors: int


# ---- devices and kernels ----


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def architecture(device: torch.device) -> str | None:
    """The target of a device's kernels; None where there are none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return ARCHITECTURES.get(_capability(torch.cuda.current_device() if device.index is None else device.index))


def is_blackwell(device: torch.device) -> bool:
    """Whether `device` is a CUDA device of compute capability 10.0 or 10.3."""
    return architecture(device) is not None


def aligned(problem: Problem) -> Problem:
    """The problem that the kernel runs: K padded to a multiple of 32, which is done by `prepared`."""
    return replace(problem, k=-(-problem.k // 32) * 32)


def refusal(problem: Problem | GroupedProblem, device: torch.device) -> str | None:
    """Why these kernels cannot run `problem` on `device`, compiled or not; None when they can."""
    if not is_blackwell(device):
        return "needs a GPU of compute capability 10.0 or 10.3"
    if isinstance(problem, GroupedProblem):
        return moe_refusal(replace(problem, k=-(-problem.k // 32) * 32))
    if next(candidates(aligned(problem)), None) is not None:
        return None
    return legal(Config(), aligned(problem))


def shipped(dual: bool | None = None, arch: str = "sm_100a") -> list[KernelSpec]:
    """Every kernel that the dispatch can choose on one architecture; of one operation only, if `dual` says which."""
    found: dict[KernelSpec, None] = {}
    for two in (True, False) if dual is None else (dual,):
        for out in (torch.float16, torch.bfloat16):
            for typical in _TYPICAL:
                problem = replace(typical, operation="dual_gemm" if two else "linear", out_dtype=out)
                found |= dict.fromkeys(KernelSpec.of(c, out, two, arch) for c in candidates(problem))
    return list(found)


@cache
def _kernel(spec: KernelSpec) -> Kernel | None:
    found = store.find(spec)
    if found is None:
        return None
    formats = [f"{size}s" for size in arguments.sizes(spec)]
    return Kernel(*found, formats, cluster=(spec.config.ctas, 1, 1))


@lru_cache(maxsize=1 << 14)
def _choice(problem: Problem, index: int, arch: str) -> Choice | None:
    processors = _processors(index)
    for config in candidates(problem, processors):
        spec = KernelSpec.of(config, problem.out_dtype, problem.weight_matrices == 2, arch)
        kernel = _kernel(spec)
        if kernel is not None:
            return Choice(kernel, spec, processors)
    return None


def choice(problem: Problem, out: Tensor, config: Config | None = None) -> Choice:
    """The best kernel that is packaged or cached for the device of `out`, or the one of `config`.

    Raises UnsupportedError for another architecture, a configuration or problem that is not legal, and without a kernel.
    """
    arch = architecture(out.device)
    if arch is None:
        raise UnsupportedError(f"Blackwell kernels need a GPU of compute capability 10.0 or 10.3, and this is {out.device}")
    problem, index = aligned(problem), out.get_device()
    reason = refusal(problem, out.device) if config is None else legal(config, problem)
    if reason is not None:
        raise UnsupportedError(f"no Blackwell kernel for this problem: {reason}")
    if config is None:
        found = _choice(problem, index, arch)
    else:
        spec = KernelSpec.of(config, problem.out_dtype, problem.weight_matrices == 2, arch)
        kernel = _kernel(spec)
        found = None if kernel is None else Choice(kernel, spec, _processors(index))
    if found is None:
        raise UnsupportedError(f"no compiled Blackwell kernel for this problem; run glu4 compile --arch {arch}")
    return found


def chosen(problem: Problem, device: torch.device, index: int) -> Choice | None:
    """The best kernel that is packaged or cached for a device, number `index`; None where there is none."""
    arch = architecture(device)
    return None if arch is None or refusal(problem, device) is not None else _choice(aligned(problem), index, arch)


def available(dual: bool, out: torch.dtype, device: torch.device) -> bool:
    """Whether any kernel of an operation for that output type and device is packaged or cached."""
    arch = architecture(device)
    specs = [] if arch is None else [s for s in shipped(dual, arch) if s == KernelSpec.of(s.config, out, dual, arch)]
    return any(_kernel(spec) is not None for spec in specs)


def load(dual: bool, weight: NVFP4Tensor) -> None:
    """Load every kernel of an operation onto the device of `weight`, so that no later call has to, nor a captured graph."""
    for spec in shipped(dual, architecture(weight.device) or ""):
        kernel = _kernel(spec)
        if kernel is not None:
            kernel.load(weight.codes.get_device())


def forget() -> None:
    """Look for kernels again at the next use, for those that were made since."""
    _kernel.cache_clear()
    _choice.cache_clear()
    _plans.clear()


# ---- operands ----


def prepared(x: NVFP4Tensor) -> NVFP4Tensor:
    """`x` as the kernel reads it: 128x4 block scales whose padding is zero, rows of codes a multiple of 16 bytes apart.

    A block whose scale is zero adds nothing, whatever its codes, so the K that is added changes no result. Nothing is copied of
    what is in this form.
    """
    x = x.to_swizzled().with_aligned_rows()
    codes, scale = _addressable(x.codes, x.has_aligned_rows), _addressable(x.block_scale, x.block_scale.is_contiguous())
    if codes is x.codes and scale is x.block_scale:
        return x
    return _unchecked(codes, scale, x.global_scale).with_aligned_rows()


def is_prepared(x: NVFP4Tensor) -> bool:
    """Whether `prepared` would copy nothing."""
    scale = x.block_scale
    dense = x.is_swizzled and scale.is_contiguous() and x.has_aligned_rows
    return dense and not (x.codes.data_ptr() | scale.data_ptr()) % _ALIGNMENT


def _addressable(t: Tensor, dense: bool) -> Tensor:
    return t if dense and t.data_ptr() % _ALIGNMENT == 0 else t.clone(memory_format=torch.contiguous_format)


def _check_operand(name: str, x: NVFP4Tensor) -> None:
    """Raise ValueError for what a tensor map cannot address or the kernel would read wrongly."""
    if not x.is_swizzled:
        raise ValueError(f"{name}: the kernel reads block scales in 128x4 layout; use to_swizzled()")
    if not x.has_aligned_rows:
        raise ValueError(
            f"{name}: rows of codes must be {x.row_bytes} bytes apart, dense otherwise (tensor copies need multiples of "
            f"{_ALIGNMENT}), got strides {list(x.codes.stride())} of shape {list(x.codes.shape)}; use with_aligned_rows()"
        )
    if not x.block_scale.is_contiguous():
        raise ValueError(f"{name}: block scales must be contiguous, got strides {list(x.block_scale.stride())}")
    for part, t in (("codes", x.codes), ("block scales", x.block_scale)):
        if t.data_ptr() % _ALIGNMENT:
            raise ValueError(f"{name}: {part} must begin at a multiple of {_ALIGNMENT} bytes, got address {t.data_ptr():#x}")


def _check_out(out: Tensor, spec: KernelSpec) -> None:
    if out.stride(-1) != 1:
        raise ValueError(f"out: elements of a row must be side by side, got strides {list(out.stride())}")
    if spec.config.store != "tma":
        return
    steps = [s for s, extent in zip(out.stride()[:-1], out.shape[:-1], strict=True) if extent > 1]
    if out.data_ptr() % _ALIGNMENT or any(2 * s % _ALIGNMENT for s in steps):
        raise ValueError(
            f'out: store "tma" needs rows that begin at multiples of {_ALIGNMENT} bytes, got address {out.data_ptr():#x} and '
            f"strides {list(out.stride())}"
        )


# ---- launching ----


class _Frame:
    """The memory of one launch: configuration, attributes, parameters. One thread at a time may use it."""

    def __init__(self, chosen: Choice, grid: tuple[int, int, int], params: Sequence[bytes]) -> None:
        kernel = chosen.kernel
        starts, end = [], _CONFIG.size + 8 + 2 * _ATTRIBUTE_BYTES
        for value in params:
            end += -end % (64 if len(value) == 128 else 8)  # a tensor map lies at a multiple of 64
            starts.append(end)
            end += len(value)
        self._memory = ctypes.create_string_buffer(end + 64)
        base = -(-ctypes.addressof(self._memory) // 64) * 64
        self.bytes = memoryview(self._memory).cast("B")[base - ctypes.addressof(self._memory) :][: -(-end // 8) * 8]
        attributes = _CONFIG.size + 8
        shared = (kernel.shared_bytes, 0, base + attributes, kernel.clustered + kernel.overlaps)
        _CONFIG.pack_into(self.bytes, 0, *grid, kernel.threads, 1, 1, *shared)
        if kernel.clustered:
            struct.pack_into("=I4x3I", self.bytes, attributes, _CLUSTER, *kernel.cluster)
            attributes += _ATTRIBUTE_BYTES
        struct.pack_into("=I4xi", self.bytes, attributes, _PROGRAMMATIC, 1)
        for start, value in zip(starts, params, strict=True):
            self.bytes[start : start + len(value)] = value
        self.words = self.bytes.cast("Q")
        self.starts = starts
        self.config = base
        self._pointers = (ctypes.c_void_p * len(starts))(*(base + s for s in starts))
        self.pointers = ctypes.addressof(self._pointers)


class Plan:
    """Launches of one kernel on one device that differ in addresses alone."""

    def __init__(self, chosen: Choice, shape: Shape, flags: int, constants: tuple[float, float, float]) -> None:
        self._chosen, self._shape, self._flags, self._constants = chosen, shape, flags, constants
        config = chosen.spec.config
        self._grid = config.grid(shape.m, shape.n, shape.batch, chosen.processors)
        self._frames: list[Any] = []
        self._places: tuple[tuple[int, int], ...] = ()

    def launch(self, index: int, stream: int, addresses: tuple[int, ...], overlap: bool) -> None:
        """One launch on device `index`; addresses: in the order of arguments.ADDRESSES."""
        try:
            frame = self._frames.pop()  # one operation of the interpreter: no two threads get the same
        except IndexError:
            spec = self._chosen.spec
            named = dict(zip(arguments.ADDRESSES, addresses, strict=True))
            values = arguments.parameters(spec, self._shape, named, self._flags, self._constants)
            frame = _Frame(self._chosen, self._grid, values)
            number = {name: i for i, name in enumerate(arguments.ADDRESSES)}
            self._places = tuple((frame.starts[i] // 8, number[name]) for i, name in arguments.addresses_of(spec))
        words = frame.words
        for place, i in self._places:
            words[place] = addresses[i]
        words[_STREAM_AT // 8] = stream
        kernel = self._chosen.kernel
        if kernel.overlaps:
            struct.pack_into("=I", frame.bytes, 48, kernel.clustered + overlap)
        kernel.load(index)
        kernel.run(index, frame, self._frames)


_plans: dict[tuple[Any, ...], Plan] = {}


def plan(chosen: Choice, index: int, shape: Shape, flags: int, activation: Activation) -> Plan:
    """The plan of such launches on device `index`, remembered."""
    key = (chosen.spec, index, shape, flags, activation)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _PLANS:
            _plans.clear()
        constants = (activation.alpha, activation.beta, activation.limit)
        found = _plans[key] = Plan(chosen, shape, flags, constants)
    return found


def flags_of(activation: Activation, a_each: bool, weights_each: bool, gate_bias: Any, up_bias: Any) -> int:
    """The kernel's: activation, which global scales are one for each matrix, which biases there are."""
    present = (activation.kind == "identity", a_each, weights_each, gate_bias is not None, up_bias is not None)
    bits = (_IDENTITY, _A_SCALES, _WEIGHT_SCALES, _GATE_BIAS, _UP_BIAS)
    return sum(bit for bit, there in zip(bits, present) if there)


def submit(
    chosen: Choice,
    out: Tensor,
    x: NVFP4Tensor,
    weights: tuple[NVFP4Tensor, ...],
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    overlap: bool = True,
) -> None:
    """One launch in the device's current stream: `out` `[M, N]` or `[L, M, N]` from operands as `prepared` gives them.

    weights  gate and up, or one matrix: `[N, K]` or `[L, N, K]`; global scales `[]` or `[L]`
    biases   float32, dense, `[N]` or `[L, N]`, or None
    overlap  False: begin only when all work before it in the stream is done and visible, whatever the kernel could do

    Raises ValueError for operands that are not in the kernel's form.
    """
    for name, operand in zip(("x", "gate", "up"), (x, *weights)):
        _check_operand(name, operand)
    _check_out(out, chosen.spec)
    index = out.get_device()
    gate, up = weights[0], weights[-1]
    m, n = out.shape[-2:]
    batch = out.shape[0] if out.ndim == 3 else 1
    row_stride = out.stride(-2) if m > 1 else -(-n // 8) * 8  # of a single row any, that a tensor map takes
    shape = Shape(batch, m, n, 2 * x.row_bytes, row_stride, out.stride(0) if batch > 1 else m * row_stride)
    each = max(gate.global_scale.ndim, up.global_scale.ndim)  # gate's and up's have one form
    scales = [x.global_scale.contiguous(), *(_each(w.global_scale, each, batch) for w in (gate, up))]
    flags = flags_of(activation, bool(x.global_scale.ndim), bool(each), *biases)
    workspace = _workspace(chosen, shape, out.device)
    unread = scales[0].data_ptr()
    addresses = (
        x.codes.data_ptr(), x.block_scale.data_ptr(), gate.codes.data_ptr(), gate.block_scale.data_ptr(), up.codes.data_ptr(),
        up.block_scale.data_ptr(), out.data_ptr(), unread if workspace is None else workspace.data_ptr(),
        unread, scales[1].data_ptr(), scales[2].data_ptr(), *(unread if b is None else b.data_ptr() for b in biases),
    )  # fmt: skip
    stream = _C._cuda_getCurrentRawStream(index)
    plan(chosen, index, shape, flags, activation).launch(index, stream, addresses, overlap)


def _each(scale: Tensor, ndim: int, batch: int) -> Tensor:
    return scale.expand(batch).contiguous() if ndim else scale


def _workspace(chosen: Choice, shape: Shape, device: torch.device) -> Tensor | None:
    """Tickets, zero, and room for the sums of parts of K, of this launch alone; None where no tile is shared."""
    spec = chosen.spec
    if not spec.config.shares_tiles:
        return None
    size = spec.config.workspace_bytes(shape.m, shape.n, shape.batch, spec.weights, chosen.processors)
    return torch.zeros(size // 4, dtype=torch.int32, device=device)


def dense(
    out: Tensor,
    x: NVFP4Tensor,
    weights: tuple[NVFP4Tensor, ...],
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    problem: Problem,
    config: Config | None = None,
) -> None:
    """Fill `out [M, N]` from x `[M, K]`, or `[L, M, N]` from `[L, M, K]`.

    weights  gate and up, or one matrix: `[N, K]`, or `[L, N, K]`
    biases   `[N]` or `[L, N]`, or None; for one matrix the same twice
    config   insists on one kernel

    Operands that are not in the kernel's form are copied. One launch; L of them where x has a batch, or a global scale for
    each matrix, and the weights have none. Raises UnsupportedError as `choice` does.
    """
    if out.numel() == 0:
        return
    chosen = choice(problem, out, config)
    if not _writable(out, chosen.spec):
        dense_out = torch.empty_like(out, memory_format=torch.contiguous_format)
        dense(dense_out, x, weights, biases, activation, problem, config)
        out.copy_(dense_out)
        return
    # the kernel may start before the one in front of it has ended: not where that one makes what it reads early
    ready = tuple(prepared(w) for w in weights)
    overlap = all(a is b for a, b in zip(weights, ready, strict=True))
    gate_bias, up_bias = (None if b is None else b.to(torch.float32).contiguous() for b in biases)
    vectors = (gate_bias, up_bias if len(weights) == 2 else None)
    if out.ndim == 2 or weights[0].ndim == 3:
        submit(chosen, out, prepared(x), ready, vectors, activation, overlap)
        return
    for i in range(out.shape[0]):
        submit(chosen, out[i], prepared(x[i]), ready, vectors, activation, overlap)


def _writable(out: Tensor, spec: KernelSpec) -> bool:
    try:
        _check_out(out, spec)
    except ValueError:
        return False
    return True
