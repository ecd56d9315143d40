"""A mixture of experts from its router's choice: sort the tokens by expert, run the experts, put the results together.

    hidden, routing = moe_gate_up(x, topk_ids, weights)                   # [T * top_k, N], sorted by expert
    y = glu4.grouped_linear(hidden, down, routing.group_offsets)          # [T * top_k, K]
    out = moe_combine(y, routing, topk_weights)                           # [T, K]

Everything stays on the device and no size depends on the routing, so that nothing synchronises and a CUDA graph of it serves
every routing. The order is that of a stable sort and the sums are of fixed order: the same bits from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glu4 import dispatch, ops
from glu4.activation import SILU, Activation
from glu4.backends.tokens import launch as tokens_launch
from glu4.eager import ordinary
from glu4.nvfp4 import NVFP4Tensor
from glu4.weights import GatedWeights

__all__ = ["Routing", "moe_combine", "moe_gate_up", "sort_by_expert"]

_ID_DTYPES = (torch.int32, torch.int64)


class Routing(NamedTuple):
    """How `[T, top_k]` choices lie sorted by expert.

    order          int64 `[T * top_k]`: row r belongs to token order[r] // top_k and is its choice order[r] % top_k. Rows of one
                   expert keep the order of their tokens; choices of no expert here come last
    group_offsets  int32 `[E + 1]`: rows group_offsets[e] to group_offsets[e + 1] are expert e's
    places         int64 `[T * top_k]`, the inverse of order: the row of each choice; None: made of `order` where it is needed
    """

    order: Tensor
    group_offsets: Tensor
    places: Tensor | None = None


def sort_by_expert(topk_ids: Tensor, experts: int, *, backend: str | None = None) -> Routing:
    """The Routing of choices int32 or int64 `[T, top_k]` among experts 0 to `experts` - 1; ids outside are no expert's.

    On a Hopper or Blackwell GPU a kernel sorts where it can, unless backend is "portable", for torch's sort: the same Routing.
    Raises TypeError for another dtype, ValueError for another number of dimensions or backend.
    """
    by_torch = _by_torch(backend)
    if not isinstance(topk_ids, Tensor):
        raise TypeError(f"topk_ids: expected a torch.Tensor, got {type(topk_ids).__name__}")
    if topk_ids.dtype not in _ID_DTYPES:
        raise TypeError(f"topk_ids: expected int32 or int64, got {topk_ids.dtype}")
    if topk_ids.ndim != 2:
        raise ValueError(f"topk_ids: expected [T, top_k], got shape {list(topk_ids.shape)}")
    ids = topk_ids.flatten().contiguous()
    order, places = (torch.empty(ids.shape, dtype=torch.int64, device=ids.device) for _ in range(2))
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=ids.device)
    (_run_sort if ordinary((ids,)) else _sort)(order, places, offsets, ids, experts, by_torch)
    return Routing(order, offsets, places)


def _by_torch(backend: str | None) -> bool:
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(dispatch.BACKENDS)} or None, got {backend!r}")
    return backend == "portable"


def _run_sort(order: Tensor, places: Tensor, offsets: Tensor, ids: Tensor, experts: int, by_torch: bool) -> None:
    if not by_torch and tokens_launch.sorts(ids.device, ids.numel(), experts):
        tokens_launch.sort(ids, experts, order, places, offsets)
        return
    # 0 <= id < experts, the rest as one more expert behind them
    keys = torch.where((ids < 0) | (ids >= experts), experts, ids).to(torch.int32)
    found, _ = torch.sort(keys, stable=True, out=(torch.empty_like(keys), order))
    edges = torch.arange(experts + 1, dtype=torch.int32, device=ids.device)
    torch.searchsorted(found, edges, out_int32=True, out=offsets)
    places.copy_(_inverse(order))


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))


def _check_tokens(x: Tensor | NVFP4Tensor, topk_ids: Tensor, weights: GatedWeights) -> None:
    if not isinstance(x, (Tensor, NVFP4Tensor)):
        raise TypeError(f"x: expected an NVFP4Tensor or a torch.Tensor, got {type(x).__name__}")
    if x.ndim != 2:
        raise ValueError(f"x: expected [T, K], a row a token, got shape {list(x.shape)}")
    if isinstance(x, NVFP4Tensor) and x.is_swizzled:
        raise ValueError("x: grouped activations need linear block scales, got swizzled ones; use x.to_linear()")
    if not isinstance(weights, GatedWeights) or len(weights.shape) != 3:
        got = list(weights.shape) if isinstance(weights, GatedWeights) else type(weights).__name__
        raise ValueError(f"weights: expected stacked GatedWeights [E, N, K], got {got}")
    if isinstance(topk_ids, Tensor):
        if topk_ids.ndim == 2 and topk_ids.shape[0] != x.shape[0]:
            raise ValueError(f"topk_ids: expected a row for each of the {x.shape[0]} tokens of x, got {list(topk_ids.shape)}")
        if topk_ids.device != x.device:
            raise ValueError(f"topk_ids is on {topk_ids.device}, x is on {x.device}: move one with .to(device)")


def moe_gate_up(
    x: Tensor | NVFP4Tensor,
    topk_ids: Tensor,
    weights: GatedWeights,
    *,
    activation: Activation = SILU,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Routing]:
    """act(x @ gate[e]^T) * (x @ up[e]^T) for every expert e that each token chose.

    x         float16, bfloat16 or float32 (W4A16), or NVFP4Tensor with linear block scales (W4A4: quantised once, before
              tokens are repeated) `[T, K]`
    topk_ids  int32 or int64 `[T, top_k]` on x's device. An id below 0 or of E and above is of no expert here and is skipped:
              -1, or E, marks experts of other ranks under expert parallelism. An id may occur twice in a row
    weights   stacked GatedWeights `[E, N, K]`
    out       `[T * top_k, N]`, filled and returned when given

    Returns what `grouped_dual_gemm` gives, `[T * top_k, N]` sorted by expert, and the Routing, for the down projection and
    `moe_combine`. Rows from routing.group_offsets[E] on are skipped choices and left untouched. Other arguments and errors as
    for `grouped_dual_gemm`; there is nothing to check of offsets that are made here.
    """
    _check_tokens(x, topk_ids, weights)
    routing = sort_by_expert(topk_ids, weights.shape[0], backend=backend)
    order, offsets = routing.order.view(topk_ids.shape), routing.group_offsets
    hidden = ops.gathered_dual_gemm(
        x, weights, offsets, order, activation=activation, out_dtype=out_dtype, out=out, backend=backend
    )
    return hidden, routing


def moe_combine(
    y: Tensor,
    routing: Routing,
    topk_weights: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The weighted sum of each token's experts, `[T, H]`.

    y             `[T * top_k, H]`, sorted by expert: row r is of token routing.order[r] // top_k
    topk_weights  the router's weights `[T, top_k]`, float, in the order of topk_ids; skipped choices count as zero, whatever
                  their weight and whatever lies in their rows of y
    out_dtype     y's own by default

    Sums are float32, in the order of topk_ids. On a Hopper or Blackwell GPU a kernel adds up 16-bit y to y's own type, unless
    backend is "portable", for torch's operations. Raises ValueError where shapes do not fit together, or for another backend.
    """
    by_torch = _by_torch(backend)
    if topk_weights.ndim != 2 or y.ndim != 2 or not y.shape[0] == topk_weights.numel() == routing.order.shape[0]:
        raise ValueError(
            f"y, topk_weights: expected [T * top_k, H] and [T, top_k] with T * top_k = {routing.order.shape[0]}, "
            f"got {list(y.shape)} and {list(topk_weights.shape)}"
        )
    places = _inverse(routing.order) if routing.places is None else routing.places
    out = y.new_empty((topk_weights.shape[0], y.shape[1]), dtype=out_dtype or y.dtype)
    last = routing.group_offsets[-1:]
    if torch.is_grad_enabled() and (y.requires_grad or topk_weights.requires_grad):
        return _combined(y, places, topk_weights, last).to(out.dtype)
    (_run_combine if ordinary((y, places, topk_weights, last)) else _combine)(out, y, places, topk_weights, last, by_torch)
    return out


def _run_combine(out: Tensor, y: Tensor, places: Tensor, topk_weights: Tensor, last: Tensor, by_torch: bool) -> None:
    if not by_torch and tokens_launch.combines(y, out.dtype):
        tokens_launch.combine(y.contiguous(), places, topk_weights.float().contiguous(), last, out)
    else:
        out.copy_(_combined(y, places, topk_weights, last))


def _combined(y: Tensor, places: Tensor, topk_weights: Tensor, last: Tensor) -> Tensor:
    """The same by torch's operations, in float32."""
    rows = y.index_select(0, places).float() * topk_weights.flatten().float().unsqueeze(-1)
    # rows of skipped choices are uninitialised: zero times NaN would be NaN
    rows = torch.where((places < last).unsqueeze(-1), rows, 0.0)
    return rows.view(*topk_weights.shape, y.shape[1]).sum(1)


def _fills(*_: object) -> None:
    """The fake of both operators: they write tensors whose metadata the caller already knows."""


_sort = torch.library.custom_op("glu4::sort_by_expert", _run_sort, mutates_args=("order", "places", "offsets"))
_combine = torch.library.custom_op("glu4::moe_combine", _run_combine, mutates_args=("out",))
for _operator in (_sort, _combine):
    _operator.register_fake(_fills)
