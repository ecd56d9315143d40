"""Whether a call may run at once, without the operator that torch's dispatcher knows.

An operator costs some 50 us on the host. What it gives: torch.compile, export and make_fx see it, modes and transforms can
intercept it, and tensors that are not plain memory are turned into such. None of that is needed for plain tensors while nothing
watches; on any doubt the operator runs, so the two ways can differ in time only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["ordinary", "plain", "unwatched"]

_C = torch._C


def unwatched() -> bool:
    """Whether no tracer, mode or functorch transform is active in this thread."""
    return not (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._functorch.peek_interpreter_stack() is not None
    )


def plain(t: Tensor) -> bool:
    """Whether `t` is no subclass, wrapper, sparse or nested tensor, nor lazy: its pointer and strides say it all."""
    # torch.nn.Parameter is a plain tensor with another class
    return (
        (type(t) is Tensor or type(t) is torch.nn.Parameter)
        and t.layout is torch.strided
        and not t.is_neg()
        and not t._is_zerotensor()
        and not t.is_nested
        and not _C._dispatch_isTensorSubclassLike(t)
    )


def ordinary(tensors: Iterable[Tensor]) -> bool:
    """Whether a call on `tensors`, what it fills included, may skip the operator: nothing watches, all are plain, and autograd
    has nothing to record."""
    grad = torch.is_grad_enabled()
    return unwatched() and all(plain(t) and not (grad and t.requires_grad) for t in tensors)
