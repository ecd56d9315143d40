"""The operators: torch.library definitions with fakes, and the Python functions that users call.

A function makes its arguments canonical, has `problem` validate them, and runs one operator that fills an output allocated
outside; the operator asks `dispatch` for a backend. Operators take plain tensors (an NVFP4Tensor travels as its three parts),
so that torch.compile and torch.export see through them. An eager call of plain tensors runs the operator's own function at once
(`eager`), and one with prepared weights goes straight to its kernel (`backends.hopper.direct`): same kernel, less host time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glu4 import dispatch
from glu4.activation import SILU, Activation
from glu4.backends import portable
from glu4.backends.blackwell import launch as blackwell
from glu4.backends.blackwell import moe_launch
from glu4.backends.hopper import grouped_launch
from glu4.backends.hopper import launch as hopper
from glu4.backends.hopper.pack import UNIT_WORDS
from glu4.eager import ordinary, unwatched
from glu4.errors import UnsupportedError
from glu4.nvfp4 import NVFP4Tensor, _unchecked, gather_rows
from glu4.problem import check_dense, check_grouped, check_offsets, dense_problem, grouped_problem
from glu4.weights import GatedWeights, LinearWeight, outline, pack, unpack

__all__ = ["dual_gemm", "group_gemm", "grouped_dual_gemm", "grouped_linear", "linear"]

Operand = Tensor | NVFP4Tensor

_PACKED_EACH_CALL = (
    "weights are packed again at every call; use GatedWeights(gate, up).prepare(device) instead of (gate, up), "
    "LinearWeight(weight).prepare(device) instead of weight, and prepare them before torch.compile"
)
_UNPACKED_EACH_CALL = (
    "weights prepared with free_original=True are unpacked at every call that the Hopper kernel cannot run (glu4.explain says "
    "why); prepare them without free_original"
)


# ---- operators: out first, then operands as lists of parts: [values], or [codes, block scale bytes, global_scale] ----
# block scales travel as bytes: parts of torch that handle operators generically cannot do arithmetic on float8. A weight of
# which only the packed form is kept travels as [global_scale].


def _nvfp4(parts: list[Tensor]) -> NVFP4Tensor:
    codes, block_scale, global_scale = parts
    return _unchecked(codes, block_scale.view(torch.float8_e4m3fn), global_scale)


def _parts(w: NVFP4Tensor) -> list[Tensor]:
    return [w.codes, w.block_scale.view(torch.uint8), w.global_scale]


def _operand(parts: list[Tensor]) -> Operand:
    return parts[0] if len(parts) == 1 else _nvfp4(parts)


def _whole(packed: Tensor) -> Tensor:
    """Packed weights with the spare unit after them, which a clone, or a copy to another device, has lost."""
    end = packed.storage_offset() + packed.numel() + UNIT_WORDS
    if packed.is_contiguous() and packed.untyped_storage().nbytes() >= 4 * end:
        return packed
    buffer = torch.zeros(packed.numel() + UNIT_WORDS, dtype=packed.dtype, device=packed.device)
    return buffer[: packed.numel()].view(packed.shape).copy_(packed)


def _on_rows(x: Operand) -> Operand:
    """NVFP4 x `[L, M, K]` as rows `[L * M, K]` with one global scale each."""
    if not isinstance(x, NVFP4Tensor) or x.ndim == 2:
        return x
    flat, g = x.to_linear(), x.global_scale.unsqueeze(-1).expand(x.shape[:-1]).flatten()
    return _unchecked(flat.codes.flatten(0, -2), flat.block_scale.flatten(0, -2), g)


def _dense(
    out: Tensor,
    x: Operand,
    weights: Sequence[list[Tensor]],
    packed: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    backend: str | None,
) -> None:
    """Fill `out` `[M, N]` or `[L, M, N]` by one backend. weights: the parts of gate and up, or of one matrix."""
    scales = (weights[0][-1], weights[-1][-1])
    matrices = None if len(weights[0]) == 1 else tuple(_nvfp4(w) for w in weights)
    first = outline(out.shape[-1], x.shape[-1], scales[0]) if matrices is None else matrices[0]
    dual, has_bias = len(weights) == 2, biases != (None, None)
    problem = dense_problem(x, first, dual=dual, activation=activation, out_dtype=out.dtype, has_bias=has_bias)
    chosen = dispatch.select(problem, out.device, backend)
    target = out if chosen == "portable" or out.ndim == x.ndim else out.view(*x.shape[:-1], -1)
    if chosen == "blackwell":
        assert isinstance(x, NVFP4Tensor)
        assert matrices is not None, "weights are packed on Hopper GPUs alone"
        if not all(map(blackwell.is_prepared, matrices)):
            dispatch.warn_once(_PACKED_EACH_CALL)
        blackwell.dense(target, x, matrices, biases, activation, problem)
        return
    if chosen == "hopper":
        if packed is None:
            assert matrices is not None
            ready = pack(matrices)
            dispatch.warn_once(_PACKED_EACH_CALL)
        else:
            ready = _whole(packed)
        hopper.dense(target, x, ready, scales, biases, activation, problem, overlap=ready is packed)
        return
    if matrices is None:
        assert packed is not None
        dispatch.warn_once(_UNPACKED_EACH_CALL)
        matrices = unpack(packed, out.shape[-1], x.shape[-1], scales if dual else scales[:1])
    rows = _on_rows(x) if first.ndim == 2 else x
    portable.dense(out, rows, matrices[0], matrices[1] if dual else None, *biases, activation)


def _run_dual_gemm(
    out: Tensor,
    x: list[Tensor],
    gate: list[Tensor],
    up: list[Tensor],
    packed: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    constants: list[float],
    backend: str,
) -> None:
    act = Activation(activation, *constants)
    _dense(out, _operand(x), (gate, up), packed, (gate_bias, up_bias), act, backend or None)


def _run_linear(
    out: Tensor, x: list[Tensor], weight: list[Tensor], packed: Tensor | None, bias: Tensor | None, backend: str
) -> None:
    # a kernel for one matrix gives each half of its rows a scale and a bias
    _dense(out, _operand(x), (weight,), packed, (bias, bias), SILU, backend or None)


def _run_grouped_dual_gemm(
    out: Tensor,
    x: list[Tensor],
    gate: list[Tensor],
    up: list[Tensor],
    packed: Tensor | None,
    group_offsets: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    constants: list[float],
    check: bool,
    backend: str,
    order: Tensor | None = None,
) -> None:
    # order, int64 [T, top_k]: x is [T, K], and row r of the work is its row order[r] // top_k
    act = Activation(activation, *constants)
    operand, scales = _operand(x), (gate[-1], up[-1])
    matrices = None if len(gate) == 1 else (_nvfp4(gate), _nvfp4(up))
    first = outline(out.shape[-1], operand.shape[-1], scales[0]) if matrices is None else matrices[0]
    has_bias = gate_bias is not None or up_bias is not None
    problem = grouped_problem(operand, first, activation=act, out_dtype=out.dtype, has_bias=has_bias)
    if order is not None:
        problem = replace(problem, rows=order.numel())
    _debug_offsets(group_offsets, problem.rows, check)
    chosen = dispatch.select(problem, out.device, backend or None)
    if order is not None and chosen == "portable":
        operand = gather_rows(operand, order)
    if chosen == "blackwell":
        assert isinstance(operand, NVFP4Tensor)
        assert matrices is not None, "weights are packed on Hopper GPUs alone"
        if not all(map(blackwell.is_prepared, matrices)):
            dispatch.warn_once(_PACKED_EACH_CALL)
        moe_launch.grouped(out, operand, matrices, group_offsets, (gate_bias, up_bias), act, problem, order=order)
        return
    if chosen == "hopper":
        if packed is None:
            assert matrices is not None
            dispatch.warn_once(_PACKED_EACH_CALL)
            ready = pack(matrices)
        else:
            ready = _whole(packed)
        biases, overlap = (gate_bias, up_bias), ready is packed
        grouped_launch.grouped(out, operand, ready, group_offsets, scales, biases, act, problem, order=order, overlap=overlap)
        return
    if matrices is None:
        assert packed is not None
        dispatch.warn_once(_UNPACKED_EACH_CALL)
        gate_matrix, up_matrix = unpack(packed, out.shape[-1], operand.shape[-1], scales)
    else:
        gate_matrix, up_matrix = matrices
    portable.grouped(out, operand, gate_matrix, up_matrix, group_offsets, gate_bias, up_bias, act)


def _run_grouped_linear(
    out: Tensor,
    x: list[Tensor],
    weight: list[Tensor],
    packed: Tensor | None,
    group_offsets: Tensor,
    bias: Tensor | None,
    check: bool,
    backend: str,
) -> None:
    operand, scale = _operand(x), weight[-1]
    matrix = None if len(weight) == 1 else _nvfp4(weight)
    shape = outline(out.shape[-1], operand.shape[-1], scale) if matrix is None else matrix
    has_bias = bias is not None
    problem = grouped_problem(operand, shape, dual=False, activation=SILU, out_dtype=out.dtype, has_bias=has_bias)
    _debug_offsets(group_offsets, problem.rows, check)
    chosen = dispatch.select(problem, out.device, backend or None)
    if chosen == "blackwell":
        assert isinstance(operand, NVFP4Tensor)
        assert matrix is not None, "weights are packed on Hopper GPUs alone"
        if not blackwell.is_prepared(matrix):
            dispatch.warn_once(_PACKED_EACH_CALL)
        moe_launch.grouped(out, operand, (matrix,), group_offsets, (bias,), SILU, problem)
        return
    if chosen == "hopper":
        if packed is None:
            assert matrix is not None
            dispatch.warn_once(_PACKED_EACH_CALL)
            ready = pack((matrix,))
        else:
            ready = _whole(packed)
        # a kernel for one matrix gives each half of its rows a scale and a bias
        scales, biases, overlap = (scale, scale), (bias, bias), ready is packed
        grouped_launch.grouped(out, operand, ready, group_offsets, scales, biases, SILU, problem, overlap=overlap)
        return
    if matrix is None:
        assert packed is not None
        dispatch.warn_once(_UNPACKED_EACH_CALL)
        (matrix,) = unpack(packed, out.shape[-1], operand.shape[-1], (scale,))
    portable.grouped(out, operand, matrix, None, group_offsets, bias, None, SILU)


def _debug_offsets(group_offsets: Tensor, rows: int, asked: bool) -> None:
    """Check offsets where the caller or GLU4_DEBUG asks for it: when the operator runs, so in compiled graphs too."""
    if not asked and os.environ.get("GLU4_DEBUG", "0") in ("", "0"):
        return
    if group_offsets.is_meta:
        return
    if group_offsets.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if asked:
            raise UnsupportedError("check_offsets: the offsets cannot be read while a CUDA graph is captured; leave it out")
        return
    check_offsets(group_offsets, rows)


def _fills_out(*_: object) -> None:
    """The fake of every operator here: it writes `out`, whose metadata the caller already knows."""


_dual_gemm = torch.library.custom_op("glu4::dual_gemm", _run_dual_gemm, mutates_args=("out",))
_linear = torch.library.custom_op("glu4::linear", _run_linear, mutates_args=("out",))
_grouped_dual_gemm = torch.library.custom_op("glu4::grouped_dual_gemm", _run_grouped_dual_gemm, mutates_args=("out",))
_grouped_linear = torch.library.custom_op("glu4::grouped_linear", _run_grouped_linear, mutates_args=("out",))

for _operator in (_dual_gemm, _linear, _grouped_dual_gemm, _grouped_linear):
    _operator.register_fake(_fills_out)


def _call(operator: Callable[..., None], function: Callable[..., None], out: Tensor, *args: Any) -> None:
    """Run an operator's function at once where that can make no difference, else the operator."""
    lists = (a if isinstance(a, list) else (a,) for a in (out, *args))
    if ordinary([t for parts in lists for t in parts if isinstance(t, Tensor)]):
        torch.autograd.graph.increment_version(out)
        function(out, *args)
    else:
        operator(out, *args)


# ---- canonical arguments ----


def _rows_of(x: Operand, batched: bool) -> list[Tensor]:
    """x as the operators take it: `[L, M, K]` with batched weights, or in NVFP4 with one global scale each; else `[M, K]`."""
    if not isinstance(x, NVFP4Tensor):
        return [x if batched or x.ndim == 2 else x.reshape(-1, x.shape[-1])]
    if batched or x.ndim == 2:
        return _parts(x)
    if x.global_scale.ndim:
        lead = x.ndim - 3
        codes, scale = x.codes.flatten(0, lead), x.block_scale.view(torch.uint8).flatten(0, lead)
        return [codes, scale, x.global_scale.flatten()]
    flat = x.to_linear()
    return [flat.codes.flatten(0, -2), flat.block_scale.view(torch.uint8).flatten(0, -2), flat.global_scale]


def _held(weights: GatedWeights | LinearWeight) -> list[list[Tensor]]:
    """The parts of each matrix as the operators take them."""
    if weights.matrices is None:
        return [[scale] for scale in weights.scales]
    return [_parts(m) for m in weights.matrices]


def _prepared(
    weights: GatedWeights | LinearWeight, x: Operand, dtype: torch.dtype, backend: str | None, grouped: bool = False
) -> None:
    """Bring weights that reach a kernel for the first time and were not prepared into its form, and remember that."""
    if weights.packed is not None or weights.direct is not None or backend == "portable" or not unwatched():
        return
    if not (hopper.is_hopper(x.device) or blackwell.is_blackwell(x.device)):
        return
    dual = isinstance(weights, GatedWeights)
    make = grouped_problem if grouped else dense_problem
    problem = make(x, weights.outlines[0], dual=dual, activation=SILU, out_dtype=dtype, has_bias=False)
    chosen = dispatch.select(problem, x.device, backend)
    if chosen == "hopper":
        weights.remember_packed()
    elif chosen == "blackwell":
        weights.remember_arranged()


def _split(weights: GatedWeights | tuple[NVFP4Tensor, NVFP4Tensor]) -> GatedWeights:
    if isinstance(weights, GatedWeights):
        return weights
    if isinstance(weights, tuple) and len(weights) == 2:
        return GatedWeights(*weights)
    raise TypeError(f"weights: expected GatedWeights or a (gate, up) tuple of NVFP4Tensors, got {type(weights).__name__}")


def _constants(activation: Activation) -> list[float]:
    return [activation.alpha, activation.beta, activation.limit]


def _target(x: Operand, n: int, batched: bool, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """What the operator fills, `[M, N]` or `[L, M, N]`: `out` itself, seen so, where its strides allow that."""
    shape = (*x.shape[:-1], n) if batched else (x.shape[:-1].numel(), n)
    if out is not None and (out.ndim == len(shape) or out.is_contiguous()):
        return out.view(shape)
    return torch.empty(shape, dtype=dtype, device=x.device)


def _result(x: Operand, target: Tensor, out: Tensor | None) -> Tensor:
    """The filled target in the caller's shape, copied into an `out` whose strides did not allow filling it in place."""
    shaped = target.view((*x.shape[:-1], target.shape[-1]))
    if out is None:
        return shaped
    if out.ndim != target.ndim and not out.is_contiguous():
        out.copy_(shaped)
    return out


# ---- public functions ----


def dual_gemm(
    x: Operand,
    weights: GatedWeights | tuple[NVFP4Tensor, NVFP4Tensor],
    *,
    activation: Activation = SILU,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(x @ gate^T) * (x @ up^T), `[..., M, N]`.

    x           NVFP4Tensor (W4A4), or float16, bfloat16 or float32 (W4A16) `[..., M, K]`
    weights     gate and up `[N, K]`, which serve all leading dimensions of x, or `[L, N, K]` for x `[L, M, K]`
    activation  SILU, clamped_silu(limit), swiglu_oai(...) or IDENTITY
    out_dtype   float16, bfloat16 or float32; by default out's, else x's own, else (NVFP4 x) bfloat16
    out         filled and returned when given; any strides
    backend     a name from glu4.explain, to insist on it

    Only metadata is checked, so nothing synchronises. Raises TypeError or ValueError naming the argument; UnsupportedError
    when the backend asked for cannot run. There is no backward pass: an x that requires grad is a ValueError.

    On a Hopper or Blackwell GPU prepared weights are fastest. GatedWeights that were not prepared are brought into their
    kernel's form by the first call, which synchronises, and keep it; a (gate, up) tuple is brought there by each call, with
    one warning.
    """
    if not torch.compiler.is_compiling() and type(weights) is GatedWeights and (direct := weights.direct) is not None:
        done = direct(x, (weights.gate_bias, weights.up_bias), activation, out_dtype, out, backend)
        if done is not None:
            return done
    w = _split(weights)
    named = dict(zip(("gate", "up"), w.outlines, strict=True))
    checked = {"gate_bias": w.gate_bias, "up_bias": w.up_bias}
    dtype = check_dense(x, named, biases=checked, activation=activation, out_dtype=out_dtype, out=out)
    if w is weights:
        _prepared(w, x, dtype, backend)
    batched = len(w.shape) == 3
    target = _target(x, w.shape[-2], batched, dtype, out)
    _call(
        _dual_gemm,
        _run_dual_gemm,
        target,
        _rows_of(x, batched),
        *_held(w),
        w.packed,
        w.gate_bias,
        w.up_bias,
        activation.kind,
        _constants(activation),
        backend or "",
    )
    return _result(x, target, out)


def linear(
    x: Operand,
    weight: NVFP4Tensor | LinearWeight,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x @ weight^T + bias, `[..., M, N]`: one NVFP4 matrix, for down projections and attention.

    x, out_dtype, out, backend and errors as for `dual_gemm`; weight `[N, K]` or `[L, N, K]`, bias `[N]` or `[L, N]`. On a
    Hopper or Blackwell GPU a prepared LinearWeight is fastest, and an NVFP4Tensor is packed again by each call, with one
    warning.
    """
    if not torch.compiler.is_compiling() and type(weight) is LinearWeight and (direct := weight.direct) is not None:
        done = direct(x, (bias, bias), SILU, out_dtype, out, backend)
        if done is not None:
            return done
    matrix = weight.outlines[0] if isinstance(weight, LinearWeight) else weight
    dtype = check_dense(x, {"weight": matrix}, biases={"bias": bias}, out_dtype=out_dtype, out=out)
    if isinstance(weight, LinearWeight):
        _prepared(weight, x, dtype, backend)
    parts, packed = (_held(weight)[0], weight.packed) if isinstance(weight, LinearWeight) else (_parts(weight), None)
    batched = matrix.ndim == 3
    target = _target(x, matrix.rows, batched, dtype, out)
    _call(_linear, _run_linear, target, _rows_of(x, batched), parts, packed, bias, backend or "")
    return _result(x, target, out)


def grouped_dual_gemm(
    x: Operand,
    weights: GatedWeights | tuple[NVFP4Tensor, NVFP4Tensor],
    group_offsets: Tensor,
    *,
    activation: Activation = SILU,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    check_offsets: bool = False,
) -> Tensor:
    """A mixture of experts: rows group_offsets[e] to group_offsets[e + 1] of x by expert e, `[rows, N]`.

    x              NVFP4Tensor with linear block scales and one global scale, or float, `[rows, K]`, sorted by expert
    weights        stacked gate and up `[E, N, K]`, each expert with its own global scales
    group_offsets  int32 `[E + 1]` on x's device: 0 first, non-decreasing; equal neighbours make an empty expert
    check_offsets  read the offsets and raise ValueError where they are not so; this synchronises. The environment
                   variable GLU4_DEBUG=1 does the same for every call outside the capture of a CUDA graph

    Rows from group_offsets[E] on are left untouched: in a given `out` they keep what they held, in a new one they are
    uninitialised. Offsets that are not as stated and not checked give wrong rows, but no access outside x and `out`. Other
    arguments and errors as for `dual_gemm`.
    """
    w = _split(weights)
    return _grouped(x, w, w is weights, group_offsets, None, activation, out_dtype, out, backend, check_offsets)


def gathered_dual_gemm(
    x: Operand,
    weights: GatedWeights,
    group_offsets: Tensor,
    order: Tensor,
    *,
    activation: Activation,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    backend: str | None,
) -> Tensor:
    """`grouped_dual_gemm` of rows order // top_k of x `[T, K]`, `[T * top_k, N]`; order int64 `[T, top_k]`, by expert.

    Where a kernel gathers faster as it loads, no gathered x is made. The same bits either way.
    """
    return _grouped(x, weights, True, group_offsets, order, activation, out_dtype, out, backend, False)


def _grouped(
    x: Operand,
    w: GatedWeights,
    kept: bool,
    group_offsets: Tensor,
    order: Tensor | None,
    activation: Activation,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    backend: str | None,
    check_offsets: bool,
) -> Tensor:
    """kept: whether the caller keeps `w`, so that what is prepared of it serves later calls."""
    biases = {"gate_bias": w.gate_bias, "up_bias": w.up_bias}
    named = dict(zip(("gate", "up"), w.outlines, strict=True))
    rows = None if order is None else order.numel()
    dtype = check_grouped(
        x, named, group_offsets, biases=biases, activation=activation, out_dtype=out_dtype, out=out, rows=rows
    )
    if order is None:
        target = _target(x, w.shape[-2], False, dtype, out)
    else:
        target = torch.empty((order.numel(), w.shape[-2]), dtype=dtype, device=x.device) if out is None else out
    if kept:
        _prepared(w, x, dtype, backend, grouped=True)
    _call(
        _grouped_dual_gemm,
        _run_grouped_dual_gemm,
        target,
        _rows_of(x, False),
        *_held(w),
        w.packed,
        group_offsets,
        w.gate_bias,
        w.up_bias,
        activation.kind,
        _constants(activation),
        check_offsets,
        backend or "",
        order,
    )
    return _result(x, target, out) if order is None else target


def grouped_linear(
    x: Operand,
    weight: NVFP4Tensor | LinearWeight,
    group_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    check_offsets: bool = False,
) -> Tensor:
    """One NVFP4 matrix an expert, for down projections: rows group_offsets[e] to group_offsets[e + 1] of x times weight[e]^T,
    plus bias[e], `[rows, N]`.

    weight `[E, N, K]`, each expert with its own global scale; bias `[E, N]`. Everything else as for `grouped_dual_gemm`. On a
    Hopper or Blackwell GPU a prepared LinearWeight is fastest, and an NVFP4Tensor is packed again by each call, with one
    warning.
    """
    matrix = weight.outlines[0] if isinstance(weight, LinearWeight) else weight
    dtype = check_grouped(x, {"weight": matrix}, group_offsets, biases={"bias": bias}, out_dtype=out_dtype, out=out)
    if isinstance(weight, LinearWeight):
        _prepared(weight, x, dtype, backend, grouped=True)
    parts, packed = (_held(weight)[0], weight.packed) if isinstance(weight, LinearWeight) else (_parts(weight), None)
    target = _target(x, matrix.rows, False, dtype, out)
    args = (_rows_of(x, False), parts, packed, group_offsets, bias, check_offsets, backend or "")
    _call(_grouped_linear, _run_grouped_linear, target, *args)
    return _result(x, target, out)


def group_gemm(
    x: Sequence[Operand],
    weights: Sequence[NVFP4Tensor | LinearWeight],
    *,
    out_dtype: torch.dtype | None = None,
    out: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """x[g] @ weights[g]^T for every group g, each with its own M, N and K: a list of `[M, N]`.

    x        of each group an NVFP4Tensor or float `[M, K]`, with a global scale of its own
    weights  of each group an NVFP4Tensor or LinearWeight `[N, K]`; prepared LinearWeights are fastest on a Hopper GPU
    out      of each group what is filled and returned, when given

    Sizes are known on the host, unlike those of `grouped_linear`; each group is a `linear` of its own, one launch after the
    other. Raises what `linear` raises, naming the group, and ValueError for lists of different lengths.
    """
    lists = {"x": x, "weights": weights} | ({} if out is None else {"out": out})
    for name, value in lists.items():
        if isinstance(value, (Tensor, NVFP4Tensor, LinearWeight)) or not isinstance(value, Sequence):
            raise TypeError(f"{name}: expected a list with an entry a group, got {type(value).__name__}")
        if len(value) != len(x):
            raise ValueError(f"{name}: expected an entry for each of the {len(x)} groups of x, got {len(value)}")
    results = []
    for g, (tokens, weight) in enumerate(zip(x, weights, strict=True)):
        target = None if out is None else out[g]
        try:
            results.append(linear(tokens, weight, out_dtype=out_dtype, out=target, backend=backend))
        except (TypeError, ValueError, UnsupportedError) as error:
            raise type(error)(f"group {g}: {error}") from error
    return results
