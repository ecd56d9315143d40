"""The operators: torch.library definitions with fakes, and the Python functions that users call.

A function makes its arguments canonical, has `problem` validate them, asks `dispatch` for a backend, and calls one operator
that fills an output allocated outside. Operators take plain tensors (an NVFP4Tensor travels as its three parts), so that
torch.compile and torch.export see through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glu4 import dispatch
from glu4.activation import SILU, Activation
from glu4.backends import portable
from glu4.backends.hopper import launch as hopper
from glu4.nvfp4 import NVFP4Tensor, _unchecked
from glu4.problem import check_dense, check_grouped, dense_problem, grouped_problem
from glu4.weights import GatedWeights

__all__ = ["dual_gemm", "grouped_dual_gemm", "linear"]

Operand = Tensor | NVFP4Tensor


# ---- operators: out first, then operands as lists of parts: [values], or [codes, block scale bytes, global_scale] ----
# block scales travel as bytes: parts of torch that handle operators generically cannot do arithmetic on float8


def _nvfp4(parts: list[Tensor]) -> NVFP4Tensor:
    codes, block_scale, global_scale = parts
    return _unchecked(codes, block_scale.view(torch.float8_e4m3fn), global_scale)


def _parts(w: NVFP4Tensor) -> list[Tensor]:
    return [w.codes, w.block_scale.view(torch.uint8), w.global_scale]


def _operand(parts: list[Tensor]) -> Operand:
    return parts[0] if len(parts) == 1 else _nvfp4(parts)


@torch.library.custom_op("glu4::dual_gemm", mutates_args=("out",))
def _dual_gemm(
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
    operand, gate_matrix, up_matrix = _operand(x), _nvfp4(gate), _nvfp4(up)
    has_bias = gate_bias is not None or up_bias is not None
    problem = dense_problem(operand, gate_matrix, dual=True, activation=act, out_dtype=out.dtype, has_bias=has_bias)
    # the Hopper kernel knows one global scale for all of x
    one_scale = not isinstance(operand, NVFP4Tensor) or operand.global_scale.ndim == 0
    chosen = dispatch.select(problem, out.device, backend or None, packed=packed is not None and one_scale)
    if chosen == "hopper" and packed is not None:
        scales = (gate_matrix.global_scale, up_matrix.global_scale)
        biases = (None if gate_bias is None else gate_bias.float(), None if up_bias is None else up_bias.float())
        hopper.dense(out, operand, packed, scales, biases, act, problem)
    else:
        portable.dense(out, operand, gate_matrix, up_matrix, gate_bias, up_bias, act)


@torch.library.custom_op("glu4::linear", mutates_args=("out",))
def _linear(out: Tensor, x: list[Tensor], weight: list[Tensor], bias: Tensor | None, backend: str) -> None:
    operand, matrix = _operand(x), _nvfp4(weight)
    has_bias = bias is not None
    problem = dense_problem(operand, matrix, dual=False, activation=SILU, out_dtype=out.dtype, has_bias=has_bias)
    dispatch.select(problem, out.device, backend or None)
    portable.dense(out, operand, matrix, None, bias, None, SILU)


@torch.library.custom_op("glu4::grouped_dual_gemm", mutates_args=("out",))
def _grouped_dual_gemm(
    out: Tensor,
    x: list[Tensor],
    gate: list[Tensor],
    up: list[Tensor],
    group_offsets: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    constants: list[float],
    backend: str,
) -> None:
    act = Activation(activation, *constants)
    operand, gate_matrix, up_matrix = _operand(x), _nvfp4(gate), _nvfp4(up)
    has_bias = gate_bias is not None or up_bias is not None
    problem = grouped_problem(operand, gate_matrix, activation=act, out_dtype=out.dtype, has_bias=has_bias)
    dispatch.select(problem, out.device, backend or None)
    portable.grouped(out, operand, gate_matrix, up_matrix, group_offsets, gate_bias, up_bias, act)


def _fills_out(*_: object) -> None:
    """The fake of every operator here: it writes `out`, whose metadata the caller already knows."""


_dual_gemm.register_fake(_fills_out)
_linear.register_fake(_fills_out)
_grouped_dual_gemm.register_fake(_fills_out)


# ---- canonical arguments ----


def _rows_of(x: Operand, batched: bool) -> list[Tensor]:
    """x as the operators take it: `[L, M, K]` with batched weights, else all leading dimensions flattened to rows."""
    if not isinstance(x, NVFP4Tensor):
        return [x if batched or x.ndim == 2 else x.reshape(-1, x.shape[-1])]
    if batched or x.ndim == 2:
        return _parts(x)
    flat = x.to_linear()
    g = flat.global_scale
    if g.ndim:  # one global scale a matrix becomes one a row
        g = g.unsqueeze(-1).expand(x.shape[:-1]).reshape(-1)
    return [flat.codes.flatten(0, -2), flat.block_scale.view(torch.uint8).flatten(0, -2), g]


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
    """
    w = _split(weights)
    biases = {"gate_bias": w.gate_bias, "up_bias": w.up_bias}
    dtype = check_dense(x, {"gate": w.gate, "up": w.up}, biases=biases, activation=activation, out_dtype=out_dtype, out=out)
    batched = w.gate.ndim == 3
    target = _target(x, w.gate.rows, batched, dtype, out)
    _dual_gemm(
        target,
        _rows_of(x, batched),
        _parts(w.gate),
        _parts(w.up),
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
    weight: NVFP4Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x @ weight^T + bias, `[..., M, N]`: one NVFP4 matrix, for down projections and attention.

    x, out_dtype, out, backend and errors as for `dual_gemm`; weight `[N, K]` or `[L, N, K]`, bias `[N]` or `[L, N]`.
    """
    dtype = check_dense(x, {"weight": weight}, biases={"bias": bias}, out_dtype=out_dtype, out=out)
    batched = weight.ndim == 3
    target = _target(x, weight.rows, batched, dtype, out)
    _linear(target, _rows_of(x, batched), _parts(weight), bias, backend or "")
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
) -> Tensor:
    """A mixture of experts: rows group_offsets[e] to group_offsets[e + 1] of x by expert e, `[rows, N]`.

    x              NVFP4Tensor with linear block scales and one global scale, or float, `[rows, K]`, sorted by expert
    weights        stacked gate and up `[E, N, K]`, each expert with its own global scales
    group_offsets  int32 `[E + 1]` on x's device: 0 first, non-decreasing; equal neighbours make an empty expert

    Rows from group_offsets[E] on are left untouched: in a given `out` they keep what they held, in a new one they are
    uninitialised. Other arguments and errors as for `dual_gemm`; the portable backend raises ValueError for offsets that
    are not as stated.
    """
    w = _split(weights)
    biases = {"gate_bias": w.gate_bias, "up_bias": w.up_bias}
    dtype = check_grouped(x, w.gate, w.up, group_offsets, biases=biases, activation=activation, out_dtype=out_dtype, out=out)
    target = _target(x, w.gate.rows, False, dtype, out)
    _grouped_dual_gemm(
        target,
        _rows_of(x, False),
        _parts(w.gate),
        _parts(w.up),
        group_offsets,
        w.gate_bias,
        w.up_bias,
        activation.kind,
        _constants(activation),
        backend or "",
    )
    return _result(x, target, out)
