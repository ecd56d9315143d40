"""Run mixtures of experts with packed weights on a Hopper device: one launch for all experts, nothing read back by the host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.backends.hopper import flags, tokens
from glu4.backends.hopper.config import TILE_K
from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED, GroupedConfig, grouped_candidates
from glu4.backends.hopper.launch import float32
from glu4.backends.hopper.pack import UNIT_WORDS
from glu4.backends.hopper.spec import GroupedSpec, shipped_grouped
from glu4.compiled import store
from glu4.compiled.driver import Kernel, Matrix
from glu4.errors import UnsupportedError
from glu4.nvfp4 import NVFP4Tensor, gather_rows
from glu4.problem import GroupedProblem

__all__ = ["GATHERS", "available", "forget", "gather_of", "grouped", "grouped_kernel", "load", "submit"]

_C = torch._C
_X_SCALE, _GATE_BIAS, _UP_BIAS, _IDENTITY = 1, 2, 4, 8
# ways of tokens that lie unsorted to the products: a copy in memory, a copy as they are decoded, the kernel's own loads
GATHERS = ("copy", "decode", "load")
_NARROW = 1024  # rows of gate up to which the loads gather, whatever the tokens; they gained at 768 and lost at 2048
_PIECES = 1 << 32  # of 16 bytes, which the loads count in 32 bits
# parameters after the tensor map: rows, k; weights [experts, tiles, units]; offsets; gate's and up's scales; x's scale; biases
# [experts, n]; flags; alpha, beta, limit; out [rows, n]; partial sums; their flags
_PARAMETERS = ("ii", "Qiii4xqq", "Qi4x", "Qi4x", "Qi4x", "Q", "Qiiq", "Qiiq", "i", "f", "f", "f", "Qiiq", "Qi4x", "Qi4x")
# with the gather in the loads: x and its rows, instead of the map; the index last
_GATHERING = ("Qiiq", *_PARAMETERS[1:], "Qiiq")


@cache
def grouped_kernel(spec: GroupedSpec) -> Kernel | None:
    """A kernel that is packaged or cached."""
    found = store.find(spec)
    return None if found is None else made_kernel(spec, *found)


def made_kernel(spec: GroupedSpec, cubin: bytes, description: dict[str, object]) -> Kernel:
    """The kernel of a cubin, as its builder described it."""
    if spec.config.gather:
        return Kernel(cubin, description, _GATHERING)
    dtype = torch.bfloat16 if spec.x == "bf16" else torch.float16
    return Kernel(cubin, description, _PARAMETERS, dtype, (spec.config.box, TILE_K))


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _spec(config: GroupedConfig, x: torch.dtype | str, out: torch.dtype, dual: bool) -> GroupedSpec:
    # NVFP4 tokens are decoded to fp16, which holds them exactly
    return GroupedSpec.of(config, x if isinstance(x, torch.dtype) else torch.float16, out, dual)


def available(dual: bool, x: torch.dtype | str, out: torch.dtype) -> bool:
    """Whether any kernel of an operation for x of a format ("nvfp4" or a dtype) and that output type is packaged or cached."""
    return any(grouped_kernel(_spec(config, x, out, dual)) is not None for config in GROUPED_SHIPPED)


def load(dual: bool, index: int) -> None:
    """Load every kernel of an operation onto device `index`, so that no later call has to, nor a captured graph."""
    kernels = [grouped_kernel(spec) for spec in shipped_grouped(dual) if isinstance(spec, GroupedSpec)]
    for kernel in (*kernels, tokens.decoder(), tokens.gatherer() if dual else None):
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
    order: Tensor | None = None,
    overlap: bool = True,
) -> None:
    """One launch of the kernel of `config` on device `index`, in its current stream.

    x        `[rows, K]` in 16 bits, of which the rows before the last offset are read
    packed   int32 `[E, tiles, units, 576]`, followed by one spare unit
    offsets  int32 `[E + 1]`
    scales   gate's and up's, float32 `[E]`; for one matrix the same twice
    biases   float32 `[E, N]`, dense, or None; for one matrix the same twice
    out      `[rows, N]`, rows dense; those from the last offset on are left as they are
    order    int64 `[T, top_k]`, dense, for a configuration that gathers: row r is row order[r] // top_k of x `[T, K]`, whose
             rows a tensor map could address (`tokens.row_stride`)
    overlap  False when work just before in the stream writes `packed`: kernels may read weights before it is done
    """
    experts, tiles, units, _ = packed.shape
    rows, n = out.shape
    matrix: Matrix | None = None
    tail: tuple[int, ...] = ()
    if order is None:
        source = tokens.source(x)
        matrix, head = source.matrix, source.params
    else:
        row = tokens.row_stride(x)
        assert row is not None
        head = (x.data_ptr(), *x.shape, row)
        tail = (order.data_ptr(), *order.shape, order.shape[1])
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
        *head, packed.data_ptr(), experts, tiles, units, tiles * units * UNIT_WORDS, units * UNIT_WORDS,
        offsets.data_ptr(), experts + 1, gate, experts, up, experts, x_scale_address, gate_bias, experts, n, n, up_bias,
        experts, n, n, said, activation.alpha, activation.beta, activation.limit, out.data_ptr(), rows, n, out.stride(0),
        partials.data_ptr(), partials.numel(), flags.take(index, stream), ready, *tail,
    )  # fmt: skip
    kernel.launch(index, stream, (ctas, 1, 1), matrix, params, overlap)


def gather_of(problem: GroupedProblem) -> str:
    """How tokens that lie unsorted come to the products of `problem`, one of GATHERS; the environment variable GLU4_GATHER
    insists. "decode" is of NVFP4 tokens, and otherwise "copy".

    As measured on an H200 (docs/notebook-hopper.md, section 7): a row's copy costs what it costs, and the loads cost a share of
    its products, which are fewer the narrower the experts are; with few tokens an expert, weights take longer than either, and
    NVFP4 ones are gathered as they are decoded anyway.
    """
    narrow, few = problem.n <= _NARROW, problem.rows <= 16 * problem.experts
    if problem.x_format == "nvfp4":
        best = "load" if narrow and not few else "decode"
    else:
        best = "load" if narrow or few else "copy"
    chosen = os.environ.get("GLU4_GATHER") or best
    if chosen not in GATHERS:
        raise ValueError(f"GLU4_GATHER: expected one of {', '.join(GATHERS)}, got {chosen!r}")
    return "copy" if chosen == "decode" and problem.x_format != "nvfp4" else chosen


def _sorted(
    x: Tensor | NVFP4Tensor, order: Tensor, problem: GroupedProblem, index: int
) -> tuple[Tensor | NVFP4Tensor, Tensor | None]:
    """(x, order) that are left when `gather_of` is done, as far as kernels can: order None where rows are sorted."""
    how = gather_of(problem)
    if how == "decode":
        assert isinstance(x, NVFP4Tensor)
        decoded = tokens.gathered(x, order, index)
        if decoded is not None:
            return decoded, None
    if how == "load":
        values = tokens.prepared(x, False, index)
        assert isinstance(values, Tensor)
        row = tokens.row_stride(values)
        if row is not None and values.shape[0] * row < _PIECES * 8:
            return values, order
    return gather_rows(x, order), None


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
    order: Tensor | None = None,
    overlap: bool = True,
) -> None:
    """Fill the rows of `out [rows, N]` before the last offset from x `[rows, K]`, sorted by expert; arguments as for `submit`.

    packed  of gate and up or, where the problem is a grouped_linear, of one matrix
    config  insists on one kernel, of sorted rows
    order   int64 `[T, top_k]`: x is `[T, K]`, and row r of the work is its row order[r] // top_k
    overlap  False when work just before in the stream writes `packed`
    """
    if out.numel() == 0 or packed.shape[0] == 0:
        return
    if out.stride(-1) != 1:
        dense_out = out.clone(memory_format=torch.contiguous_format)  # rows of no expert keep what they hold
        grouped(dense_out, x, packed, offsets, scales, biases, activation, problem, config, order, overlap)
        out.copy_(dense_out)
        return
    index = out.get_device()
    x_format = "nvfp4" if isinstance(x, NVFP4Tensor) else x.dtype
    x_scale = x.global_scale if isinstance(x, NVFP4Tensor) else None
    kernel, chosen = None, None
    dual = problem.operation == "grouped_dual_gemm"
    if order is not None:
        assert config is None
        assert dual
        x, order = _sorted(x, order.contiguous(), problem, index)
    if order is not None:
        kernel, chosen = _first(grouped_candidates(problem, True, _processors(index)), x_format, out.dtype, dual)
        if kernel is None:
            x, order = gather_rows(x, order), None
    if kernel is None:
        candidates = grouped_candidates(problem, False, _processors(index)) if config is None else iter((config,))
        kernel, chosen = _first(candidates, x_format, out.dtype, dual)
    if kernel is None or chosen is None:
        raise UnsupportedError("no compiled Hopper kernel for this problem; run glu4 compile")
    decoded = tokens.prepared(x, False, index)
    assert isinstance(decoded, Tensor)
    float_scales = (scales[0].contiguous(), scales[1].contiguous())
    floats = (float32(biases[0]), float32(biases[1]))
    submit(
        kernel, chosen, index, decoded, packed, offsets.contiguous(), float_scales, x_scale, floats, activation, out, order,
        overlap,
    )  # fmt: skip


def _first(
    configs: Iterator[GroupedConfig], x: torch.dtype | str, out: torch.dtype, dual: bool
) -> tuple[Kernel, GroupedConfig] | tuple[None, None]:
    """The first of `configs` whose kernel is packaged or cached, and the kernel."""
    found = ((grouped_kernel(_spec(c, x, out, dual)), c) for c in configs)
    return next(((k, c) for k, c in found if k is not None), (None, None))
