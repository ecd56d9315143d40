"""Run dense problems with packed weights on a Hopper device.

`dense` takes what the operators take; `direct` is the short way for plain eager calls.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.backends.hopper import tuned
from glu4.backends.hopper.config import SHIPPED, TILE_K, Config
from glu4.backends.hopper.pack import UNIT_WORDS
from glu4.backends.hopper.spec import KernelSpec, shipped
from glu4.compiled import store
from glu4.compiled.driver import Kernel
from glu4.errors import UnsupportedError
from glu4.nvfp4 import BLOCK, E2M1_VALUES, NVFP4Tensor
from glu4.problem import Problem

__all__ = ["Choice", "available", "choice", "decode", "dense", "float32", "forget", "is_hopper", "load", "row_stride", "submit"]

_C = torch._C
_X_SCALE, _GATE_BIAS, _UP_BIAS, _IDENTITY = 1, 2, 4, 8
# parameters after x: m, k; weights; three scales; two biases; flags; alpha, beta, limit; out; one byte that is not read
_PARAMETERS = ("ii", "QiiQ", "Q", "Q", "Q", "Qi4x", "Qi4x", "i", "f", "f", "f", "QiiQ", "x")
_FORMATS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}

Format = torch.dtype | str  # of x: its dtype, or "nvfp4"
Choice = tuple[Kernel, tuple[int, int, int]]  # and its grid


# ---- devices and kernels ----


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _properties(index: int) -> tuple[str, int]:
    """Name and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


def is_hopper(device: torch.device) -> bool:
    """Whether `device` is a CUDA device of compute capability 9.0."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return _capability(torch.cuda.current_device() if device.index is None else device.index) == (9, 0)


@cache
def _kernel(spec: KernelSpec) -> Kernel | None:
    found = store.find(spec)
    if found is None:
        return None
    dtype = torch.bfloat16 if spec.x == "bf16" else torch.float16
    c = spec.config
    return Kernel(*found, _PARAMETERS, dtype, (c.box_tokens, TILE_K), (1, c.cluster, c.splits))


def _spec(config: Config, x: Format, out: torch.dtype, dual: bool) -> KernelSpec:
    # NVFP4 tokens are decoded to fp16, which holds them exactly
    return KernelSpec.of(config, x if isinstance(x, torch.dtype) else torch.float16, out, dual)


@lru_cache(maxsize=1 << 14)
def choice(m: int, n: int, k: int, dual: bool, x: Format, out: torch.dtype, index: int) -> Choice | None:
    """The best kernel that is packaged or cached, for one matrix pair (or matrix) on one device; None when there is none."""
    x_format = x if isinstance(x, str) else _FORMATS[x]
    problem = Problem(m, n, k, operation="dual_gemm" if dual else "linear", x_format=x_format, out_dtype=out)
    for config in tuned.ordered(problem, *_properties(index)):
        kernel = _kernel(_spec(config, x, out, dual))
        if kernel is not None:
            return kernel, config.grid(m, n, dual)
    return None


def available(dual: bool, x: Format, out: torch.dtype) -> bool:
    """Whether any kernel of an operation for x of a format and that output type is packaged or cached."""
    return any(_kernel(_spec(config, x, out, dual)) is not None for config in SHIPPED)


def load(dual: bool, packed: Tensor) -> None:
    """Load every kernel of an operation onto the device of `packed`, so that no later call has to, nor a captured graph."""
    for spec in shipped():
        kernel = _kernel(spec) if spec.dual == dual else None
        if kernel is not None:
            kernel.load(packed.get_device())
    _pairs(packed.device)


def forget() -> None:
    """Look for kernels and measured tables again at the next use, for those that were made since."""
    _kernel.cache_clear()
    choice.cache_clear()


# ---- tokens ----


@cache
def _pairs(device: torch.device) -> Tensor:
    """For each packed byte its two values in fp16, side by side as one int32."""
    values = torch.tensor(E2M1_VALUES, dtype=torch.float16)
    byte = torch.arange(256)
    return torch.stack((values[byte & 0xF], values[byte >> 4]), -1).view(torch.int32).flatten().to(device)


def decode(x: NVFP4Tensor) -> Tensor:
    """e2m1 * e4m3 of `[..., rows, K]` in fp16, exact, without the global scale."""
    codes = x.codes
    values = torch.index_select(_pairs(codes.device), 0, codes.flatten().int()).view(torch.float16)
    scale = x.linear_block_scale() if x.is_swizzled else x.block_scale
    blocks = values.view(*codes.shape[:-1], -1, BLOCK)
    return blocks.mul_(scale.half().unsqueeze(-1)).view(*codes.shape[:-1], -1)


def row_stride(x: Tensor) -> int | None:
    """The stride in elements of x's rows `[..., K]`, if a tensor map can address them: steps of 16 bytes, none overlapping."""
    if x.data_ptr() % 16:
        return None
    if x.is_contiguous():
        return x.shape[-1]
    if x.ndim != 2 or x.stride(1) != 1:
        return None
    rows, k = x.shape
    row = k if rows == 1 else x.stride(0)
    return row if row % 8 == 0 and k <= row < 1 << 35 else None


# ---- launching ----


def submit(
    chosen: Choice,
    index: int,
    tokens: tuple[int, int, int, int],
    packed: Tensor,
    scales: tuple[Tensor, Tensor],
    x_scale: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    out: tuple[int, int, int, int],
    overlap: bool,
) -> None:
    """One launch on device `index`, in its current stream.

    tokens   address, M, K and row stride in bytes, as a tensor map takes them
    biases   float32, dense, or None
    out      address, M, N and row stride in elements
    overlap  False when work just before in the stream writes `packed`: kernels may read weights before it is done
    """
    kernel, grid = chosen
    (_, m, k, _), n = tokens, out[2]
    gate, up = scales[0].data_ptr(), scales[1].data_ptr()
    flags = _IDENTITY if activation.kind == "identity" else 0
    x_scale_address = gate_bias = up_bias = gate  # addresses that are not read
    if x_scale is not None:
        flags |= _X_SCALE
        x_scale_address = x_scale.data_ptr()
    if biases[0] is not None:
        flags |= _GATE_BIAS
        gate_bias = biases[0].data_ptr()
    if biases[1] is not None:
        flags |= _UP_BIAS
        up_bias = biases[1].data_ptr()
    tiles, units, _ = packed.shape
    params = (
        m, k, packed.data_ptr(), tiles, units, units * UNIT_WORDS, gate, up, x_scale_address, gate_bias, n, up_bias, n, flags,
        activation.alpha, activation.beta, activation.limit, *out,
    )  # fmt: skip
    kernel.launch(index, _C._cuda_getCurrentRawStream(index), grid, tokens, params, overlap)


def _one(
    out: Tensor,
    tokens: Tensor,
    packed: Tensor,
    scales: tuple[Tensor, Tensor],
    x_scale: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    chosen: Choice,
    overlap: bool,
) -> None:
    """One launch. out `[M, N]`, its rows dense; tokens `[M, K]` in 16 bits; biases float32, dense."""
    (m, k), n = tokens.shape, out.shape[1]
    row = row_stride(tokens)
    if row is None:
        tokens = tokens.clone(memory_format=torch.contiguous_format)
        row = k
    source, target = (tokens.data_ptr(), m, k, 2 * row), (out.data_ptr(), m, n, out.stride(0))
    submit(chosen, out.get_device(), source, packed, scales, x_scale, biases, activation, target, overlap)


def _item(t: Tensor, index: int, ndim: int) -> Tensor:
    """Matrix `index`'s part of what is one a batch, `ndim` dimensions, or one a matrix."""
    return t[index] if t.ndim > ndim else t


def float32(bias: Tensor | None) -> Tensor | None:
    """A bias as the kernel reads it."""
    return None if bias is None else bias.to(torch.float32).contiguous()


def dense(
    out: Tensor,
    x: Tensor | NVFP4Tensor,
    packed: Tensor,
    scales: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    problem: Problem,
    config: Config | None = None,
    overlap: bool = True,
) -> None:
    """Fill `out [M, N]` from x `[M, K]`, or `[L, M, N]` from `[L, M, K]`: L launches, each with its own weights, or its own
    global scale of x, or both.

    packed   of `pack_gated` or `pack_matrix`, or `[L, ...]` of them, followed by one spare unit
    scales   gate's and up's, `[]` or `[L]`; for one matrix the same twice
    biases   `[N]` or `[L, N]`, or None; for one matrix the same twice
    config   insists on one kernel
    overlap  False when work just before in the stream writes `packed`: kernels may read weights before it is done
    """
    if out.numel() == 0:
        return
    if out.stride(-1) != 1:
        dense_out = torch.empty_like(out, memory_format=torch.contiguous_format)
        dense(dense_out, x, packed, scales, biases, activation, problem, config, overlap)
        out.copy_(dense_out)
        return
    chosen = _insisted(problem, x, out, config) if config else choice(*_sizes(problem, x, out), out.get_device())
    if chosen is None:
        raise UnsupportedError("no compiled Hopper kernel for this problem; run glu4 compile")
    tokens, x_scale = (decode(x), x.global_scale) if isinstance(x, NVFP4Tensor) else (x, None)
    floats = (float32(biases[0]), float32(biases[1]))
    if out.ndim == 2:
        _one(out, tokens, packed, scales, x_scale, floats, activation, chosen, overlap)
        return
    for i in range(out.shape[0]):
        own = packed[i] if packed.ndim == 4 else packed
        own_scales = (_item(scales[0], i, 0), _item(scales[1], i, 0))
        own_x_scale = None if x_scale is None else _item(x_scale, i, 0)
        own_biases = (_optional_item(floats[0], i), _optional_item(floats[1], i))
        _one(out[i], tokens[i], own, own_scales, own_x_scale, own_biases, activation, chosen, overlap)


def _sizes(problem: Problem, x: Tensor | NVFP4Tensor, out: Tensor) -> tuple[int, int, int, bool, Format, torch.dtype]:
    x_format: Format = "nvfp4" if isinstance(x, NVFP4Tensor) else x.dtype
    return out.shape[-2], out.shape[-1], x.shape[-1], problem.operation == "dual_gemm", x_format, out.dtype


def _insisted(problem: Problem, x: Tensor | NVFP4Tensor, out: Tensor, config: Config) -> Choice | None:
    m, n, _, dual, x_format, dtype = _sizes(problem, x, out)
    kernel = _kernel(_spec(config, x_format, dtype, dual))
    return None if kernel is None else (kernel, config.grid(m, n, dual))


def _optional_item(bias: Tensor | None, index: int) -> Tensor | None:
    return None if bias is None else _item(bias, index, 1)
