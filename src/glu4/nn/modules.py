"""GatedMLP and NVFP4Linear: NVFP4 weights as torch modules, W4A16 or W4A4.

W4A16 multiplies the weights by the activations as they are. W4A4 quantises the activations of each call first: under the
stored input scale where there is one, else under one scale for the whole call, amax / (6 * 448). With such a dynamic scale a
token's result depends on the other tokens of its call. Not-a-number and infinite activations reach the output as NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from glu4 import dispatch, ops
from glu4.activation import SILU, Activation
from glu4.nvfp4 import NVFP4Tensor, _unchecked
from glu4.quantizer import quantize
from glu4.weights import GatedWeights, LinearWeight

__all__ = ["GatedMLP", "Mode", "NVFP4Linear", "check_mode", "free_originals", "set_mode"]

Mode = Literal["w4a16", "w4a4"]


def check_mode(mode: str) -> Mode:
    """`mode` itself, or ValueError naming the accepted ones."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
    return cast(Mode, mode)


class _ExactBuffers(nn.Module):
    """A module some of whose buffers move with the model but are never cast: .half() would change what they mean."""

    exact_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _ExactBuffers:
        before = {name: self._buffers[name] for name in self.exact_buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class _Matrix(_ExactBuffers):
    """The three parts of an NVFP4Tensor as buffers."""

    exact_buffers = ("codes", "block_scale", "global_scale")
    codes: Tensor
    block_scale: Tensor
    global_scale: Tensor

    def __init__(self, matrix: NVFP4Tensor) -> None:
        super().__init__()
        for name in self.exact_buffers:
            self.register_buffer(name, getattr(matrix, name))

    def hold(self, matrix: NVFP4Tensor) -> None:
        """Let the buffers be these."""
        for name in self.exact_buffers:
            setattr(self, name, getattr(matrix, name))

    def held(self) -> NVFP4Tensor:
        """The buffers as one value, unchecked."""
        return _unchecked(self.codes, self.block_scale, self.global_scale)

    def tensor(self) -> NVFP4Tensor:
        """The buffers as one value; checks scales on the CPU, as every NVFP4Tensor does."""
        return NVFP4Tensor(self.codes, self.block_scale, self.global_scale)


def _operand(x: Tensor, module: GatedMLP | NVFP4Linear, weights: GatedWeights | LinearWeight) -> Tensor | NVFP4Tensor:
    """x `[..., K]`, or, quantised if the mode says so, its rows `[M, K]`, as the weights' kernel takes them."""
    if x.requires_grad and torch.is_grad_enabled():  # quantize would cut the gradient off without a word
        raise ValueError("x requires grad, and glu4 has no backward pass yet: call under torch.no_grad() or detach x")
    mode = module.mode
    if mode == "w4a16" and x.ndim > 1:
        return x
    rows = x.reshape(-1, x.shape[-1])
    if mode == "w4a16":
        return rows
    return quantize(rows, module.input_scale, layout=weights.x_layout, nonfinite="propagate")


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    """A result of x's rows with x's leading dimensions."""
    return rows if rows.ndim == x.ndim else rows.view(*x.shape[:-1], rows.shape[-1])


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _check_features(x: Tensor, k: int) -> None:
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x: expected [..., {k}], got shape {list(x.shape)}")


W = TypeVar("W", GatedWeights, LinearWeight)


def _prepare_after_load(module: nn.Module, _: object) -> None:
    assert isinstance(module, _Prepared)
    module._prepare_again()


def _restore_before(module: nn.Module, *_: object) -> None:
    assert isinstance(module, _Prepared)
    module._restore()


class _Prepared(_ExactBuffers, Generic[W]):
    """A module that keeps its weights checked and prepared for the device that its buffers are on.

    Once `_freed`, the matrices' buffers have a shape and no memory. Whatever looks into them restores them first: state_dict,
    load_state_dict, moves, copies. `dual`: gate and up, not one matrix.
    """

    dual: ClassVar[bool] = False
    _ready: W | None
    _freed: bool

    def __init__(self) -> None:
        super().__init__()
        self._ready = None
        self._freed = False
        self.register_state_dict_pre_hook(_restore_before)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_restore_before)  # type: ignore[no-untyped-call]
        # after its children, which hold the matrices
        self.register_load_state_dict_post_hook(_prepare_after_load)  # type: ignore[no-untyped-call]

    def _from_buffers(self) -> W:
        raise NotImplementedError

    def _current(self) -> W:
        """The weights, prepared once."""
        if self._ready is None:
            made = self._from_buffers()
            if torch.compiler.is_compiling():  # a graph can neither check values nor keep what it traced
                return made
            self._ready = made.prepare(made.device)
        return self._ready

    def _prepare_again(self) -> None:
        """Prepare now where a kernel wants that: a graph that torch.compile traces before the first call could not."""
        self._ready = None
        codes = self._matrices()[0].codes
        kind = (codes.device, self.dual, codes.ndim == 3)
        if dispatch.packs(*kind) or dispatch.arranges(*kind):
            with suppress(ValueError):  # memory not filled yet, or damaged weights: the next call says which
                self._current()

    def _matrices(self) -> list[_Matrix]:
        """Where the weights' parts are kept, in their order."""
        return [m for m in self.children() if isinstance(m, _Matrix)]

    def free_original(self) -> bool:
        """Keep the packed form alone, where there is one: whether it does."""
        ready = None if self._freed else self._current()
        if ready is not None and ready.packed is not None:
            self._ready = ready = ready.prepare(ready.device, free_original=True)
            self._freed = True
            for matrix, outline in zip(self._matrices(), ready.outlines, strict=True):
                matrix.hold(outline)
        return self._freed

    def _restore(self) -> None:
        """Give the buffers their values back."""
        if self._freed:
            assert self._ready is not None
            for matrix, original in zip(self._matrices(), self._ready.originals(), strict=True):
                matrix.hold(original)
            self._freed, self._ready = False, None
            self._prepare_again()

    def __getstate__(self) -> dict[str, Any]:
        self._restore()
        return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Prepared[W]:
        self._restore()
        self._ready = None
        super()._apply(fn, recurse)
        self._prepare_again()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._ready is not None and self._ready.packed is None:  # files hold NVFP4 alone
            self._prepare_again()


class GatedMLP(_Prepared[GatedWeights]):
    """down_proj(act(x @ gate^T) * (x @ up^T)): a gated MLP whose gate and up are NVFP4, each with its own global scale.

    weights     GatedWeights `[N, K]`; kept as buffers under the names of `GatedWeights.state_dict`, so that .to(),
                state_dict and load_state_dict work; .half() and the like leave codes and scales alone
    down_proj   any module from `[..., N]`: nn.Linear, NVFP4Linear, ...
    activation  the gated activation, SiLU by default
    mode        "w4a16" or "w4a4"; may be set later
    forward     x `[..., K]`, float16, bfloat16 or float32, to down_proj's output; there is no backward pass

    Raises ValueError for stacked weights (those are for glu4.grouped_dual_gemm) or an unknown mode.
    """

    exact_buffers = ("input_scale",)
    dual = True
    input_scale: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None

    def __init__(
        self, weights: GatedWeights, down_proj: nn.Module, *, activation: Activation = SILU, mode: Mode = "w4a16"
    ) -> None:
        super().__init__()
        self.activation = activation
        self.mode: Mode = check_mode(mode)
        for name in ("input_scale", "gate_bias", "up_bias"):
            self.register_buffer(name, None)
        self.weights = weights
        self.down_proj = down_proj

    def _from_buffers(self) -> GatedWeights:
        return GatedWeights(self.gate.tensor(), self.up.tensor(), self.input_scale, self.gate_bias, self.up_bias)

    @property
    def weights(self) -> GatedWeights:
        """Gate and up, checked and prepared once for the device they are on; set it to replace them."""
        return self._current()

    @weights.setter
    def weights(self, weights: GatedWeights) -> None:
        if len(weights.shape) != 2:
            raise ValueError(f"weights: expected gate and up [N, K], got a stack {list(weights.shape)}; see grouped_dual_gemm")
        self.in_features = weights.shape[1]
        self._freed = False
        self.gate, self.up = _Matrix(weights.gate), _Matrix(weights.up)
        for name in ("input_scale", "gate_bias", "up_bias"):
            setattr(self, name, _detached(getattr(weights, name)))
        self._prepare_again()

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` to down_proj's output, through `[..., N]` in x's dtype."""
        weights = self._current()
        _check_features(x, self.in_features)
        operand = _operand(x, self, weights)
        hidden = ops.dual_gemm(operand, weights, activation=self.activation, out_dtype=x.dtype)
        return cast(Tensor, self.down_proj(_shaped(hidden, x)))

    def extra_repr(self) -> str:
        n, k = self.weights.shape
        return f"in_features={k}, gated_features={n}, activation={self.activation.name}, mode={self.mode}"


class NVFP4Linear(_Prepared[LinearWeight]):
    """x @ weight^T + bias with an NVFP4 weight: the counterpart of torch.nn.Linear, W4A16 or W4A4.

    weight       NVFP4Tensor `[N, K]`, kept as buffers weight.codes, weight.block_scale, weight.global_scale
    bias         `[N]`, float16, bfloat16 or float32, or None
    input_scale  float32 multiplier `[]` for quantising activations, or None: dynamic
    forward      x `[..., K]`, float16, bfloat16 or float32, to `[..., N]` in x's dtype; there is no backward pass
    """

    exact_buffers = ("input_scale",)
    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight: NVFP4Tensor, bias: Tensor | None = None, *, input_scale: Tensor | None = None, mode: Mode = "w4a16"
    ) -> None:
        super().__init__()
        if weight.ndim != 2:
            raise ValueError(f"weight: expected [N, K], got shape {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.mode: Mode = check_mode(mode)
        self.weight = _Matrix(weight)
        self.register_buffer("bias", _detached(bias))
        self.register_buffer("input_scale", input_scale)
        self._prepare_again()

    def _from_buffers(self) -> LinearWeight:
        return LinearWeight(self.weight.tensor())

    @property
    def matrix(self) -> NVFP4Tensor:
        """The weight as one value, checked once."""
        return self._current().matrix

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` to `[..., N]`."""
        weight = self._current()
        _check_features(x, self.in_features)
        return _shaped(ops.linear(_operand(x, self, weight), weight, bias=self.bias, out_dtype=x.dtype), x)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, mode={self.mode}"


def free_originals(model: nn.Module) -> int:
    """Let every GatedMLP, NVFP4Linear and stack of experts of `model` keep its packed form alone, which halves what its weights
    take on a Hopper GPU; returns how many do. For inference: what needs NVFP4 again (state_dict, load_state_dict, moves,
    copies, saving) unpacks it, and both forms are held from then on.

    Only what is packed is freed, so elsewhere nothing changes. The same values come back, but codes of blocks with scale zero
    as zero. Call it after the last move or load; memory is free once nobody else holds the tensors.
    """
    return sum(m.free_original() for m in model.modules() if isinstance(m, _Prepared))


def set_mode(model: nn.Module, mode: Mode) -> int:
    """Switch every GatedMLP, NVFP4Linear and stack of experts of `model` to "w4a16" or "w4a4"; returns how many there are.

    Raises ValueError for an unknown mode or a model that holds no such module.
    """
    check_mode(mode)
    found = [m for m in model.modules() if isinstance(m, _ExactBuffers) and hasattr(m, "mode")]
    if not found:
        raise ValueError(
            "model: holds no GatedMLP and no NVFP4Linear; convert it with glu4.nn.convert or load it with glu4.nn.load"
        )
    for module in found:
        module.mode = mode  # type: ignore[assignment]
    return len(found)
