"""The short way from prepared weights to a Blackwell launch, for eager calls with nothing out of the ordinary.

It makes the launch that `launch.dense` would make. On everything it does not know it gives up before anything has happened, and
the caller goes the long way, which checks arguments in full and says what is wrong with them. Only what follows from numbers is
remembered, the choice of a kernel and the constants of its launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.backends.blackwell import launch
from glu4.eager import plain, unwatched
from glu4.nvfp4 import NVFP4Tensor
from glu4.problem import Problem

__all__ = ["Direct"]

_C = torch._C
_TYPES = (torch.float16, torch.bfloat16)
_MOST = 1 << 12  # plans
_ALIGNED = 15  # address bits that are zero for tensor copies


class Direct:
    """Gate and up, or one matrix, `[N, K]` as `launch.prepared` gives them, on one device: makes plain calls.

    No work that writes the matrices may be under way: kernels may read them before what is in front in the stream has ended.
    """

    __slots__ = ("_addresses", "_device", "_dual", "_held", "_index", "_k", "_n", "_plans", "_scales")

    def __init__(self, matrices: tuple[NVFP4Tensor, ...]) -> None:
        gate, up = matrices[0], matrices[-1]
        self._held, self._scales = matrices, (gate.global_scale, up.global_scale)
        self._dual, (self._n, self._k) = len(matrices) == 2, gate.shape
        self._device, self._index = gate.device, gate.codes.get_device()
        parts = (gate.codes, gate.block_scale, up.codes, up.block_scale)
        self._addresses = tuple(t.data_ptr() for t in parts)
        # of M, the output's type and the identity of an activation, which is held so that no other gets it
        self._plans: dict[tuple[int, torch.dtype, int], tuple[launch.Plan | None, bool, Activation]] = {}

    def __call__(
        self,
        x: Tensor | NVFP4Tensor,
        biases: tuple[Tensor | None, Tensor | None],
        activation: Activation,
        out_dtype: torch.dtype | None,
        out: Tensor | None,
        backend: str | None,
    ) -> Tensor | None:
        """The result `[M, N]`; None, with nothing done, where the long way is needed."""
        if type(x) is not NVFP4Tensor or biases[0] is not None or biases[1] is not None or type(activation) is not Activation:
            return None
        if not (backend is None or backend == "blackwell") or not unwatched():
            return None
        codes, scales, unit = x.codes, x.block_scale, x.global_scale
        if not self._takes(codes, scales, unit) or (out is not None and not plain(out)):
            return None
        m, dtype = codes.shape[0], out_dtype or (torch.bfloat16 if out is None else out.dtype)
        found = self._plans.get((m, dtype, id(activation))) or self._plan(m, dtype, activation)
        plan, copied = found[0], found[1]
        if plan is None:
            return None
        if out is None:
            out = torch.empty((m, self._n), dtype=dtype, device=self._device)
        elif self._fills(out, m, dtype, copied, x):
            torch.autograd.graph.increment_version(out)  # as the operator does, which says that it writes `out`
        else:
            return None
        gate, up = self._scales
        unread = unit.data_ptr()
        addresses = (
            codes.data_ptr(), scales.data_ptr(), *self._addresses, out.data_ptr(), unread, unread, gate.data_ptr(),
            up.data_ptr(), unread, unread,
        )  # fmt: skip
        plan.launch(self._index, _C._cuda_getCurrentRawStream(self._index), addresses, True)
        return out

    def _takes(self, codes: Tensor, scales: Tensor, unit: Tensor) -> bool:
        """Whether x is one plain matrix in the kernel's form, on this device, and nothing asks for a gradient."""
        if not (plain(codes) and plain(scales) and plain(unit)) or codes.ndim != 2 or scales.ndim != 5 or unit.ndim:
            return False
        if codes.shape[1] * 2 != self._k or not codes.shape[0] or not (codes.is_contiguous() and scales.is_contiguous()):
            return False
        if self._k % 32 or (codes.data_ptr() | scales.data_ptr()) & _ALIGNED or codes.get_device() != self._index:
            return False
        gate, up = self._scales
        return not (torch.is_grad_enabled() and (unit.requires_grad or gate.requires_grad or up.requires_grad))

    def _plan(self, m: int, dtype: torch.dtype, activation: Activation) -> tuple[launch.Plan | None, bool, Activation]:
        """(plan of a launch for M rows, whether TMA stores C, activation); no plan without a kernel, or one that splits K."""
        found, copied = None, False
        operation: Any = "dual_gemm" if self._dual else "linear"
        if dtype in _TYPES:
            chosen = launch.chosen(
                Problem(m, self._n, self._k, operation=operation, out_dtype=dtype), self._device, self._index
            )
            if chosen is not None and not chosen.spec.config.shares_tiles:
                shape = launch.Shape(1, m, self._n, self._k, self._n, m * self._n)
                flags = launch.flags_of(activation, False, False, None, None)
                found, copied = launch.plan(chosen, self._index, shape, flags, activation), chosen.spec.config.store == "tma"
        if len(self._plans) >= _MOST:
            self._plans.clear()
        made = self._plans[m, dtype, id(activation)] = (found, copied, activation)
        return made

    def _fills(self, out: Tensor, m: int, dtype: torch.dtype, copied: bool, x: NVFP4Tensor) -> bool:
        """Whether a kernel can write `out` in place, and it shares no memory with x."""
        if out.dtype is not dtype or tuple(out.shape) != (m, self._n) or out.get_device() != self._index:
            return False
        if not out.is_contiguous() or (out.requires_grad and torch.is_grad_enabled()):
            return False
        begin = out.data_ptr()
        if copied and begin & _ALIGNED:
            return False
        end = begin + 2 * m * self._n
        return all(end <= t.data_ptr() or t.data_ptr() + t.numel() <= begin for t in (x.codes, x.block_scale))
