"""Experts put together one at a time: what is read of one is copied into the stack and forgotten before the next is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glu4.errors import CheckpointError
from glu4.nvfp4 import NVFP4Tensor, _unchecked

__all__ = ["Stack", "stack_plain"]


class Stack:
    """`count` matrices of one shape, added in turn, each checked already."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._added = 0
        self._parts: tuple[Tensor, ...] = ()

    @property
    def shape(self) -> list[int]:
        """`[N, K]` of the matrices, empty before the first."""
        return [self._parts[0].shape[1], 2 * self._parts[0].shape[2]] if self._parts else []

    def fits(self, matrix: NVFP4Tensor) -> bool:
        """Whether `matrix` has the shape of those before it."""
        return not self._parts or list(matrix.shape) == self.shape

    def add(self, matrix: NVFP4Tensor) -> None:
        """Copy the next matrix."""
        parts = (matrix.codes, matrix.block_scale, matrix.global_scale)
        if not self._parts:
            self._parts = tuple(p.new_empty((self._count, *p.shape)) for p in parts)
        for whole, part in zip(self._parts, parts, strict=True):
            whole[self._added] = part
        self._added += 1

    def matrices(self) -> NVFP4Tensor:
        """All of them, `[count, N, K]`; ValueError before the last is added."""
        if self._added != self._count or not self._parts:
            raise ValueError(f"stack: {self._added} of {self._count} matrices are there")
        return _unchecked(*self._parts)


def stack_plain(load: Callable[[str], Tensor], names: Sequence[str]) -> Tensor:
    """Tensors of one shape and type, `[count, ...]`, read in turn; raises CheckpointError where one differs."""
    whole: Tensor | None = None
    for i, name in enumerate(names):
        value = load(name)
        if whole is None:
            whole = torch.empty((len(names), *value.shape), dtype=value.dtype)
        if value.shape != whole.shape[1:] or value.dtype != whole.dtype:
            other = f"{whole.dtype} {list(whole.shape[1:])}"
            raise CheckpointError(f"{name} is {value.dtype} {list(value.shape)}, other experts' is {other}")
        whole[i] = value
    assert whole is not None
    return whole
