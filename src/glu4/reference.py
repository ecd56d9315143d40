"""THE SPECIFICATION: what every backend, kernel and outside submission must compute.

Operands are taken at their exact values: e2m1 * e4m3 for NVFP4, the float itself otherwise. Their products are exact in
float64; sums, global scales, bias and activation are float64; one rounding to the output type comes last.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from glu4.activation import SILU, Activation
from glu4.nvfp4 import NVFP4Tensor

__all__ = ["dual_gemm", "group_gemm", "grouped_dual_gemm", "grouped_linear", "linear", "preactivation", "round_once"]

Operand = Tensor | NVFP4Tensor


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to `dtype` with a single rounding to nearest even.

    torch converts float64 to a 16-bit type through float32, which rounds twice. Rounding to odd on the way (Boldo and
    Melquiond, 2005) makes the second rounding the only one.
    """
    if dtype in (torch.float64, torch.float32):
        return x.to(dtype)
    y = x.to(torch.float32)
    even = (y.view(torch.int32) & 1) == 0
    toward = torch.where(x > y.double(), torch.inf, -torch.inf).to(torch.float32)
    return torch.where((y.double() != x) & even & ~x.isnan(), torch.nextafter(y, toward), y).to(dtype)


def preactivation(x: Operand, weight: NVFP4Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T with both global scales and the bias, float64 `[..., M, N]`."""
    a = x.decode(torch.float64) if isinstance(x, NVFP4Tensor) else x.double()
    out = a @ weight.decode(torch.float64).mT * weight.global_scale.double()[..., None, None]
    if isinstance(x, NVFP4Tensor):
        out = out * x.global_scale.double()[..., None, None]
    return out if bias is None else out + bias.double().unsqueeze(-2)


def dual_gemm(
    x: Operand,
    gate: NVFP4Tensor,
    up: NVFP4Tensor,
    *,
    activation: Activation = SILU,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """act(x @ gate^T) * (x @ up^T): x `[..., M, K]`, weights `[N, K]` for all of x, or `[L, N, K]` for x `[L, M, K]`."""
    c = activation(preactivation(x, gate, gate_bias), preactivation(x, up, up_bias))
    return round_once(c, out_dtype)


def linear(x: Operand, weight: NVFP4Tensor, *, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float16) -> Tensor:
    """x @ weight^T + bias."""
    return round_once(preactivation(x, weight, bias), out_dtype)


def grouped_dual_gemm(
    x: Operand,
    gate: NVFP4Tensor,
    up: NVFP4Tensor,
    group_offsets: Tensor,
    *,
    activation: Activation = SILU,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Rows group_offsets[e] to group_offsets[e + 1] of x `[rows, K]` by expert e of the stacked weights `[E, N, K]`.

    Returns the rows up to group_offsets[E]; an operator with more rows leaves those beyond untouched.
    """
    ends = group_offsets.tolist()
    parts = [torch.empty(0, gate.rows, dtype=out_dtype, device=group_offsets.device)]  # for no experts at all
    for e, (start, end) in enumerate(itertools.pairwise(ends)):
        rows = x.narrow_rows(start, end - start) if isinstance(x, NVFP4Tensor) else x[start:end]
        bias = {
            "gate_bias": None if gate_bias is None else gate_bias[e],
            "up_bias": None if up_bias is None else up_bias[e],
        }
        parts.append(dual_gemm(rows, gate[e], up[e], activation=activation, out_dtype=out_dtype, **bias))
    return torch.cat(parts)


def grouped_linear(
    x: Operand,
    weight: NVFP4Tensor,
    group_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """As `grouped_dual_gemm`, with one matrix an expert and no activation."""
    parts = [torch.empty(0, weight.rows, dtype=out_dtype, device=group_offsets.device)]
    for e, (start, end) in enumerate(itertools.pairwise(group_offsets.tolist())):
        rows = x.narrow_rows(start, end - start) if isinstance(x, NVFP4Tensor) else x[start:end]
        parts.append(linear(rows, weight[e], bias=None if bias is None else bias[e], out_dtype=out_dtype))
    return torch.cat(parts)


def group_gemm(groups: list[tuple[Operand, NVFP4Tensor]], *, out_dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """The public group contract: every group its own x `[M, K]` and weight `[N, K]`, no activation."""
    return [linear(x, weight, out_dtype=out_dtype) for x, weight in groups]
