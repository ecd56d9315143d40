"""The short way from prepared weights to a launch, for eager calls with nothing out of the ordinary.

It makes the launch that `launch.dense` would make. On everything it does not know it gives up before anything has happened, and
the caller goes the long way, which checks arguments in full and says what is wrong with them. All that a call can depend on is
looked at anew in each: only what follows from numbers is remembered, the choice of a kernel and the constants of its launch.

Calls with 16-bit tokens, dense, and no biases repeat a launch once made (`launch.Plan`), in some 0.6 of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.backends.hopper.launch import Plan, choice, float32, keep, plans, submit
from glu4.backends.hopper.tokens import format_of, prepared, row_stride, source
from glu4.eager import plain, unwatched
from glu4.nvfp4 import NVFP4Tensor

__all__ = ["Direct"]

_C = torch._C
_STRIDED = torch.strided
_TYPES = (torch.float16, torch.bfloat16)
_BIAS_TYPES = (torch.float32, torch.bfloat16, torch.float16)

Biases = tuple[Tensor | None, Tensor | None]


class Direct:
    """One prepared weight `[N, K]` on one device: makes plain calls.

    packed  of `pack_gated` (dual) or `pack_matrix`; no work that writes it may be under way
    scales  global scales `[]`: gate's and up's, or one matrix's twice; their values are read by each launch
    """

    __slots__ = ("_device", "_dual", "_index", "_k", "_n", "_packed", "_plans", "_scales")

    def __init__(self, packed: Tensor, shape: tuple[int, int], scales: tuple[Tensor, Tensor], dual: bool) -> None:
        self._packed, self._scales, self._dual = packed, scales, dual
        self._n, self._k = shape
        self._device, self._index = packed.device, packed.get_device()
        self._plans = plans(self._n, self._k, dual, self._index)

    def __call__(
        self,
        x: Tensor | NVFP4Tensor,
        biases: Biases,
        activation: Activation,
        out_dtype: torch.dtype | None,
        out: Tensor | None,
        backend: str | None,
    ) -> Tensor | None:
        """The result, `[..., M, N]`; None, with nothing done, where the long way is needed."""
        if not unwatched() or not (backend is None or backend == "hopper"):
            return None
        if type(x) is Tensor and biases[0] is None and biases[1] is None:
            done = self._again(x, activation, out_dtype, out)
            if done is not None:
                return done
        if type(activation) is not Activation or not (out is None or plain(out)):
            return None
        if torch.is_grad_enabled() and self._wants_grad(x, biases, out):
            return None
        lead: Sequence[int]
        if isinstance(x, NVFP4Tensor):
            if not self._takes_nvfp4(x):
                return None
            lead, default = x.codes.shape[:-1], torch.bfloat16
        else:
            # in this order: a value that is no tensor fails first
            if not plain(x) or x.get_device() != self._index or x.dtype not in _TYPES:
                return None
            *lead, columns = x.shape
            default = x.dtype
            if columns != self._k:
                return None
        m, n, k = prod(lead), self._n, self._k
        row = k if isinstance(x, NVFP4Tensor) else row_stride(x)
        dtype = out_dtype or (default if out is None else out.dtype)
        if not (m and lead and row and dtype in _TYPES and self._takes_bias(biases[0]) and self._takes_bias(biases[1])):
            return None
        chosen = choice(m, n, k, self._dual, format_of(x), dtype, self._index)
        if chosen is None or not (out is None or self._fills(out, dtype, (*lead, n), x)):
            return None
        out_row = n
        if out is None:
            out = torch.empty((*lead, n), dtype=dtype, device=self._device)
        else:
            torch.autograd.graph.increment_version(out)  # as the operator does, which says that it writes `out`
            out_row = out.stride(0) if out.ndim == 2 else n
        x_scale = x.global_scale if isinstance(x, NVFP4Tensor) else None
        tokens, target = source(prepared(x, chosen.nvfp4, self._index)), (out.data_ptr(), m, n, out_row)
        floats = (float32(biases[0]), float32(biases[1]))
        submit(chosen, self._index, tokens, self._packed, self._scales, x_scale, floats, activation, target, True)
        if type(x) is Tensor and biases[0] is None and biases[1] is None and x.is_contiguous():
            plan = Plan(chosen, x, self._packed, activation, (*lead, n), dtype)
            keep(self._plans, (x.shape, x.dtype, out_dtype), plan)
        return out

    def _again(self, x: Tensor, activation: Activation, out_dtype: torch.dtype | None, out: Tensor | None) -> Tensor | None:
        """The result of a call like one before; None, with nothing done, if there was none. x is of no subclass."""
        # the rest of `plain`, but for tensors without memory, whose address is 0
        if x.layout is not _STRIDED or x.is_nested or x.is_neg() or _C._dispatch_isTensorSubclassLike(x):
            return None
        plan = self._plans.get((x.shape, x.dtype, out_dtype))
        if plan is None or not (plan.activation is activation or plan.activation == activation):
            return None
        address = x.data_ptr()
        if address & 15 or not address or not x.is_contiguous() or x.get_device() != self._index:
            return None
        gate, up = self._scales
        if torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad or up.requires_grad):
            return None
        if out is None:
            out = x.new_empty(*plan.shape) if x.dtype is plan.dtype else x.new_empty(plan.shape, dtype=plan.dtype)
            target = out.data_ptr()
        else:
            target = self._written(out, plan, address)
            if not target:
                return None
        plan.launch(address, self._packed.data_ptr(), gate.data_ptr(), up.data_ptr(), target)
        return out

    def _written(self, out: Tensor, plan: Plan, x: int) -> int:
        """The address of a dense `out` that a plan can fill, apart from x at that address; else 0."""
        if not plain(out) or out.dtype is not plan.dtype or out.shape != plan.shape or out.get_device() != self._index:
            return 0
        if not out.is_contiguous() or (out.requires_grad and torch.is_grad_enabled()):
            return 0
        address = out.data_ptr()
        if address < x + plan.in_bytes and x < address + plan.out_bytes:
            return 0
        torch.autograd.graph.increment_version(out)  # as the operator does, which says that it writes `out`
        return address

    def _takes_nvfp4(self, x: NVFP4Tensor) -> bool:
        codes, g = x.codes, x.global_scale
        return (
            plain(codes)
            and plain(x.block_scale)
            and plain(g)
            and codes.get_device() == self._index
            and g.ndim == 0
            and codes.shape[-1] * 2 == self._k
        )

    def _takes_bias(self, bias: Tensor | None) -> bool:
        return bias is None or (
            plain(bias) and bias.dtype in _BIAS_TYPES and tuple(bias.shape) == (self._n,) and bias.get_device() == self._index
        )

    def _fills(self, out: Tensor, dtype: torch.dtype, shape: tuple[int, ...], x: Tensor | NVFP4Tensor) -> bool:
        """Whether `out` can be written in place, and shares no memory with x."""
        if not (out.dtype == dtype and tuple(out.shape) == shape and out.get_device() == self._index):
            return False
        rows_apart = out.ndim == 2 and out.stride(1) == 1 and (out.stride(0) >= shape[1] or shape[0] == 1)
        parts = (x.codes, x.block_scale) if isinstance(x, NVFP4Tensor) else (x,)
        return (rows_apart or out.is_contiguous()) and all(_apart(out, part) for part in parts)

    def _wants_grad(self, x: Tensor | NVFP4Tensor, biases: Biases, out: Tensor | None) -> bool:
        tensors = (x.global_scale if isinstance(x, NVFP4Tensor) else x, *self._scales, *biases, out)
        return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from a's first to its last element lies before or after b's."""
    (first_a, end_a), (first_b, end_b) = _extent(a), _extent(b)
    return end_a <= first_b or end_b <= first_a


def _extent(t: Tensor) -> tuple[int, int]:
    first = t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return first, first + (last + 1) * t.itemsize
