"""Stacks of experts as torch modules: GatedExperts takes the place of the experts of a transformers model.

All of it runs on sorted tokens (`glu4.moe`), with no size that depends on the routing. W4A4 quantises the tokens once for all
experts, before they are repeated: under the largest of the experts' stored input scales where there are any, which none of
them clips, else under one dynamic scale.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor, nn

from glu4 import moe, ops
from glu4.activation import SILU, Activation
from glu4.backends.blackwell import launch as blackwell
from glu4.backends.hopper import launch as hopper
from glu4.nn.modules import Mode, _detached, _Matrix, _Prepared, check_mode
from glu4.nvfp4 import NVFP4Tensor
from glu4.quantizer import quantize
from glu4.weights import GatedWeights, LinearWeight

__all__ = ["ExpertsLinear", "GatedExperts", "NVFP4ExpertsLinear"]


def _largest(input_scale: Tensor | None) -> Tensor | None:
    return None if input_scale is None else input_scale.amax()


class ExpertsLinear(nn.Module):
    """x @ weight[e]^T for rows sorted by expert, with 16- or 32-bit weights.

    weight   `[E, N, K]`
    forward  x `[rows, K]` and group_offsets int32 `[E + 1]` to `[rows, N]`; rows from group_offsets[E] on are uninitialised
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, group_offsets: Tensor) -> Tensor:
        weight = self.weight
        x = x.to(weight.dtype)
        # torch's grouped product takes rows that start at multiples of 16 bytes
        if all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:]):
            return nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=group_offsets[1:])
        out = x.new_empty(x.shape[0], weight.shape[1])
        for e, (start, end) in enumerate(itertools.pairwise(group_offsets.tolist())):
            out[start:end] = x[start:end] @ weight[e].t()
        return out

    def extra_repr(self) -> str:
        e, n, k = self.weight.shape
        return f"experts={e}, in_features={k}, out_features={n}"


class NVFP4ExpertsLinear(_Prepared[LinearWeight]):
    """The same with NVFP4 weights, W4A16 or W4A4.

    weight       NVFP4Tensor `[E, N, K]`, kept as buffers weight.codes, weight.block_scale, weight.global_scale
    input_scale  float32 multiplier `[]` or `[E]`, the largest of which serves all, or None: dynamic
    """

    exact_buffers: ClassVar[tuple[str, ...]] = ("input_scale",)
    input_scale: Tensor | None

    def __init__(self, weight: NVFP4Tensor, *, input_scale: Tensor | None = None, mode: Mode = "w4a16") -> None:
        super().__init__()
        if weight.ndim != 3:
            raise ValueError(f"weight: expected [E, N, K], got shape {list(weight.shape)}")
        self.mode: Mode = check_mode(mode)
        self.weight = _Matrix(weight)
        self.register_buffer("input_scale", input_scale)
        self._prepare_again()

    def _from_buffers(self) -> LinearWeight:
        return LinearWeight(self.weight.tensor())

    def _current(self) -> LinearWeight:
        device = self.weight.codes.device
        own = hopper.is_hopper(device) or blackwell.is_blackwell(device)
        if self._ready is None and (torch.compiler.is_compiling() or not own):
            return LinearWeight(self.weight.held())  # as they are: there is nothing to prepare
        return super()._current()

    @property
    def matrix(self) -> NVFP4Tensor:
        """The weights as one value."""
        return self.weight.tensor() if self._ready is None else self._ready.matrix

    def forward(self, x: Tensor, group_offsets: Tensor) -> Tensor:
        """x `[rows, K]`, of which the rows from group_offsets[E] on count for a dynamic scale too, to `[rows, N]`."""
        operand = quantize(x, _largest(self.input_scale), nonfinite="propagate") if self.mode == "w4a4" else x
        return ops.grouped_linear(operand, self._current(), group_offsets, out_dtype=x.dtype)

    def extra_repr(self) -> str:
        e, n, k = self.weight.held().shape
        return f"experts={e}, in_features={k}, out_features={n}, mode={self.mode}"


class GatedExperts(_Prepared[GatedWeights]):
    """The experts of a mixture-of-experts layer: NVFP4 gate and up, each expert with two global scales of its own.

    weights     GatedWeights `[E, N, K]`
    down_proj   ExpertsLinear or NVFP4ExpertsLinear `[E, K, N]`
    activation  the gated activation, SiLU by default
    mode        "w4a16" or "w4a4" of gate and up; may be set later
    forward     x `[T, K]`, the router's choices int32 or int64 `[T, top_k]` and its weights `[T, top_k]`, as transformers
                passes them, to `[T, K]`. A choice below 0 or of E and above is another rank's and counts nothing

    Raises ValueError for weights that are no stack, an unknown mode, or an x that requires grad.
    """

    exact_buffers: ClassVar[tuple[str, ...]] = ("input_scale",)
    dual = True
    input_scale: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None

    def __init__(
        self, weights: GatedWeights, down_proj: nn.Module, *, activation: Activation = SILU, mode: Mode = "w4a16"
    ) -> None:
        super().__init__()
        if len(weights.shape) != 3:
            raise ValueError(f"weights: expected a stack [E, N, K], got {list(weights.shape)}; see GatedMLP")
        self.num_experts, self.intermediate_dim, self.hidden_dim = weights.shape
        self.activation = activation
        self.mode: Mode = check_mode(mode)
        self.gate, self.up = _Matrix(weights.gate), _Matrix(weights.up)
        for name in ("input_scale", "gate_bias", "up_bias"):
            self.register_buffer(name, _detached(getattr(weights, name)))
        self.down_proj = down_proj
        self._prepare_again()

    def _from_buffers(self) -> GatedWeights:
        return GatedWeights(self.gate.tensor(), self.up.tensor(), self.input_scale, self.gate_bias, self.up_bias)

    @property
    def weights(self) -> GatedWeights:
        """Gate and up, checked and prepared once for the device they are on."""
        return self._current()

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x `[T, K]` to `[T, K]`."""
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x requires grad, and glu4 has no backward pass yet: call under torch.no_grad() or detach x")
        weights = self._current()
        operand = quantize(x, _largest(self.input_scale), nonfinite="propagate") if self.mode == "w4a4" else x
        # skipped rows are zero, so that they do not reach a dynamic scale of the down projection
        out = x.new_zeros(topk_ids.numel(), self.intermediate_dim) if getattr(self.down_proj, "mode", "") == "w4a4" else None
        hidden, routing = moe.moe_gate_up(operand, topk_ids, weights, activation=self.activation, out_dtype=x.dtype, out=out)
        y = self.down_proj(hidden, routing.group_offsets)
        return moe.moe_combine(y, routing, topk_weights, out_dtype=x.dtype)

    def extra_repr(self) -> str:
        sizes = f"experts={self.num_experts}, in_features={self.hidden_dim}, gated_features={self.intermediate_dim}"
        return f"{sizes}, activation={self.activation.name}, mode={self.mode}"
