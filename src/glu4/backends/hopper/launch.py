"""Run a dense problem with a packed weight on a Hopper device."""

from __future__ import annotations

import struct
from functools import cache, lru_cache

import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.backends.hopper.config import TILE_K, Config, candidates
from glu4.backends.hopper.pack import UNIT_WORDS
from glu4.backends.hopper.spec import KernelSpec
from glu4.compiled import store
from glu4.compiled.driver import Kernel, TensorMap
from glu4.errors import UnsupportedError
from glu4.nvfp4 import NVFP4Tensor
from glu4.problem import Problem

__all__ = ["available", "dense", "is_hopper"]

_ANY_HOPPER = 132  # multiprocessors of the H100 and H200; only orders the candidates
_X_SCALE, _GATE_BIAS, _UP_BIAS, _IDENTITY = 1, 2, 4, 8


def is_hopper(device: torch.device) -> bool:
    """Whether `device` is a CUDA device of compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _types(problem: Problem) -> tuple[torch.dtype, torch.dtype]:
    # NVFP4 tokens are decoded to fp16, which holds them exactly
    x = torch.bfloat16 if problem.x_format == "bfloat16" else torch.float16
    return x, problem.out_dtype


@cache
def _kernel(spec: KernelSpec) -> Kernel | None:
    found = store.find(spec)
    return None if found is None else Kernel(*found)


@lru_cache(maxsize=4096)
def _plan(problem: Problem, processors: int, config: Config | None = None) -> tuple[KernelSpec, Kernel] | None:
    """The best configuration whose kernel is packaged or cached, or the one insisted on; None when it is not there."""
    x, out = _types(problem)
    for chosen in (config,) if config else candidates(problem, processors):
        spec = KernelSpec.of(chosen, x, out, problem.operation == "dual_gemm")
        kernel = _kernel(spec)
        if kernel is not None:
            return spec, kernel
    return None


def available(problem: Problem) -> bool:
    """Whether there is a compiled kernel for `problem`, which the Hopper kernels must be able to run."""
    return _plan(problem, _ANY_HOPPER) is not None


def _as_tokens(x: Tensor | NVFP4Tensor) -> Tensor:
    """x `[M, K]` in 16 bits, without its global scale, as the tensor map needs it: 16-byte aligned rows."""
    if isinstance(x, NVFP4Tensor):
        return x.decode(torch.float16)
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and x.stride(0) >= x.shape[1]
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def dense(
    out: Tensor,
    x: Tensor | NVFP4Tensor,
    packed: Tensor,
    scales: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    problem: Problem,
    config: Config | None = None,
) -> None:
    """Fill `out [M, N]`. packed: of `pack_gated` or `pack_matrix`; scales: gate's and up's (for one matrix the same twice);
    biases: float32 `[N]` or None. `config` insists on one kernel."""
    if out.numel() == 0:
        return
    if out.stride(1) != 1:
        dense_out = torch.empty_like(out, memory_format=torch.contiguous_format)
        dense(dense_out, x, packed, scales, biases, activation, problem, config)
        out.copy_(dense_out)
        return
    index = x.device.index or 0
    plan = _plan(problem, _processors(index), config)
    if plan is None:
        raise UnsupportedError("no compiled Hopper kernel for this problem; run glu4 compile")
    spec, kernel = plan
    c = spec.config
    x_scale = x.global_scale if isinstance(x, NVFP4Tensor) else scales[0]
    tokens = _as_tokens(x)
    (m, k), n = tokens.shape, out.shape[1]
    flags = _X_SCALE * isinstance(x, NVFP4Tensor) | _GATE_BIAS * (biases[0] is not None)
    flags |= _UP_BIAS * (biases[1] is not None) | _IDENTITY * (activation.kind == "identity")
    unused = scales[0]
    gate_bias, up_bias = (unused if b is None else b for b in biases)
    params = [
        struct.pack("=ii", m, k),
        struct.pack("=QiiQ", packed.data_ptr(), packed.shape[0], packed.shape[1], packed.shape[1] * UNIT_WORDS),
        *(struct.pack("=Q", t.data_ptr()) for t in (*scales, x_scale)),
        *(struct.pack("=Qi4x", t.data_ptr(), n) for t in (gate_bias, up_bias)),
        struct.pack("=i", flags),
        *(struct.pack("=f", v) for v in (activation.alpha, activation.beta, activation.limit)),
        struct.pack("=QiiQ", out.data_ptr(), m, n, out.stride(0)),
        b"\0",
    ]
    outputs = c.rows * (32 if spec.dual else 64)
    grid = (-(-m // c.tokens), -(-n // outputs))
    with torch.cuda.device(index):
        stream = torch.cuda.current_stream().cuda_stream
        kernel.launch(grid, TensorMap(tokens, c.tokens, TILE_K), params, index, stream)
