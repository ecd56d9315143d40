"""Run mixtures of experts with packed weights on a Hopper device: one launch for all experts, nothing read back by the host."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.backends.hopper import flags, tokens
from glu4.backends.hopper.config import TILE_K
from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED, GroupedConfig, grouped_candidates
from glu4.backends.hopper.launch import float32
from glu4.backends.hopper.pack import UNIT_WORDS
from glu4.backends.hopper.spec import GroupedSpec
from glu4.compiled import store
from glu4.compiled.driver import Kernel
from glu4.errors import UnsupportedError
from glu4.nvfp4 import NVFP4Tensor
from glu4.problem import GroupedProblem

__all__ = ["available", "forget", "grouped", "grouped_kernel", "load", "submit"]

_C = torch._C
_X_SCALE, _GATE_BIAS, _UP_BIAS, _IDENTITY = 1, 2, 4, 8
# parameters after the tensor map: rows, k; weights [experts, tiles, units]; offsets; gate's and up's scales; x's scale; biases
# [experts, n]; flags; alpha, beta, limit; out [rows, n]; partial sums; their flags
_PARAMETERS = ("ii", "Qiii4xqq", "Qi4x", "Qi4x", "Qi4x", "Q", "Qiiq", "Qiiq", "i", "f", "f", "f", "Qiiq", "Qi4x", "Qi4x")


@cache
def grouped_kernel(spec: GroupedSpec) -> Kernel | None:
    """A kernel that is packaged or cached."""
    found = store.find(spec)
    return None if found is None else made_kernel(spec, *found)


def made_kernel(spec: GroupedSpec, cubin: bytes, description: dict[str, object]) -> Kernel:
    """The kernel of a cubin, as its builder described it."""
    dtype = torch.bfloat16 if spec.x == "bf16" else torch.float16
    return Kernel(cubin, description, _PARAMETERS, dtype, (spec.config.box, TILE_K))


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _spec(config: GroupedConfig, x: torch.dtype | str, out: torch.dtype) -> GroupedSpec:
    # NVFP4 tokens are decoded to fp16, which holds them exactly
    return GroupedSpec.of(config, x if isinstance(x, torch.dtype) else torch.float16, out)


def available(x: torch.dtype | str, out: torch.dtype) -> bool:
    """Whether any kernel for x of a format ("nvfp4" or a dtype) and that output type is packaged or cached."""
    return any(grouped_kernel(_spec(config, x, out)) is not None for config in GROUPED_SHIPPED)


def load(index: int) -> None:
    """Load every kernel onto device `index`, so that no later call has to, nor a captured graph."""
    types = (torch.float16, torch.bfloat16)
    kernels = [grouped_kernel(_spec(c, x, out)) for c in GROUPED_SHIPPED for x in types for out in types]
    for kernel in (*kernels, tokens.decoder()):
        if kernel is not None:
            kernel.load(index)
    flags.reserve(index)


def forget() -> None:
    """Look for kernels again at the next use, for those that were made since."""
    grouped_kernel.cache_clear()


def submit(
    kernel: Kernel,
    config: GroupedConfig,
    index: int,
    x: Tensor,
    packed: Tensor,
    offsets: Tensor,
    scales: tuple[Tensor, Tensor],
    x_scale: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    out: Tensor,
) -> None:
    """One launch of the kernel of `config` on device `index`, in its current stream.

    x        `[rows, K]` in 16 bits, of which the rows before the last offset are read
    packed   int32 `[E, tiles, units, 576]`, followed by one spare unit
    offsets  int32 `[E + 1]`
    scales   gate's and up's, float32 `[E]`
    biases   float32 `[E, N]`, dense, or None
    out      `[rows, N]`, rows dense; those from the last offset on are left as they are
    """
    experts, tiles, units, _ = packed.shape
    rows, n = out.shape
    source = tokens.source(x)
    assert source.matrix is not None
    gate, up = scales[0].data_ptr(), scales[1].data_ptr()
    said = _IDENTITY if activation.kind == "identity" else 0
    x_scale_address = gate_bias = up_bias = gate  # addresses that are not read
    if x_scale is not None:
        said |= _X_SCALE
        x_scale_address = x_scale.data_ptr()
    if biases[0] is not None:
        said |= _GATE_BIAS
        gate_bias = biases[0].data_ptr()
    if biases[1] is not None:
        said |= _UP_BIAS
        up_bias = biases[1].data_ptr()
    ctas, stream = _processors(index), _C._cuda_getCurrentRawStream(index)
    partials = torch.empty(ctas * config.rows * 64 * config.tokens, dtype=torch.float32, device=out.device)
    ready = ctas * config.rows
    assert ready <= flags.FLAGS
    params = (
        *source.params, packed.data_ptr(), experts, tiles, units, tiles * units * UNIT_WORDS, units * UNIT_WORDS,
        offsets.data_ptr(), experts + 1, gate, experts, up, experts, x_scale_address, gate_bias, experts, n, n, up_bias,
        experts, n, n, said, activation.alpha, activation.beta, activation.limit, out.data_ptr(), rows, n, out.stride(0),
        partials.data_ptr(), partials.numel(), flags.take(index, stream), ready,
    )  # fmt: skip
    kernel.launch(index, stream, (ctas, 1, 1), source.matrix, params)


def grouped(
    out: Tensor,
    x: Tensor | NVFP4Tensor,
    packed: Tensor,
    offsets: Tensor,
    scales: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    problem: GroupedProblem,
    config: GroupedConfig | None = None,
) -> None:
    """Fill the rows of `out [rows, N]` before the last offset from x `[rows, K]`, sorted by expert; arguments as for `submit`.

    config  insists on one kernel
    """
    if out.numel() == 0 or packed.shape[0] == 0:
        return
    if out.stride(-1) != 1:
        dense_out = out.clone(memory_format=torch.contiguous_format)  # rows of no expert keep what they hold
        grouped(dense_out, x, packed, offsets, scales, biases, activation, problem, config)
        out.copy_(dense_out)
        return
    index = out.get_device()
    x_format = "nvfp4" if isinstance(x, NVFP4Tensor) else x.dtype
    configs = grouped_candidates(problem) if config is None else iter((config,))
    found = ((grouped_kernel(_spec(c, x_format, out.dtype)), c) for c in configs)
    kernel, chosen = next(((k, c) for k, c in found if k is not None), (None, None))
    if kernel is None or chosen is None:
        raise UnsupportedError("no compiled Hopper kernel for this problem; run glu4 compile")
    x_scale = x.global_scale if isinstance(x, NVFP4Tensor) else None
    decoded = tokens.prepared(x, False, index)
    assert isinstance(decoded, Tensor)
    float_scales = (scales[0].contiguous(), scales[1].contiguous())
    floats = (float32(biases[0]), float32(biases[1]))
    submit(kernel, chosen, index, decoded, packed, offsets.contiguous(), float_scales, x_scale, floats, activation, out)
