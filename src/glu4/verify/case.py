"""A test case: one call, what it must give, and the parts and samples that a check looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from glu4 import reference
from glu4.activation import SILU, Activation
from glu4.nvfp4 import NVFP4Tensor

__all__ = ["Block", "Case", "take_rows"]

Kind = Literal["full_range", "one_hot", "exact_sum", "contest"]
ROW_CHUNK = 2048  # rows and columns handled at once: bounds the checker's memory at any size
COL_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Block:
    """A part of a call that uses one gate and one up matrix: rows `rows` and columns `cols` of the output `[R, N]`."""

    rows: slice
    cols: slice
    x: Tensor | NVFP4Tensor  # [r, K]
    gate: NVFP4Tensor  # [c, K]
    up: NVFP4Tensor | None
    gate_bias: Tensor | None  # [c]
    up_bias: Tensor | None

    def preactivations(self) -> tuple[Tensor, Tensor | None]:
        """float64 gate and up `[r, c]` by the specification; up is None for `linear`."""
        gate = reference.preactivation(self.x, self.gate, self.gate_bias)
        return gate, None if self.up is None else reference.preactivation(self.x, self.up, self.up_bias)


@dataclass(frozen=True, eq=False)
class Case:
    """One call of dual_gemm or linear (`up` None, `gate` the matrix), or of their grouped forms (`group_offsets` given).

    x              NVFP4Tensor, or float16, bfloat16 or float32 `[..., M, K]`; grouped `[rows, K]`
    gate, up       NVFP4Tensor `[N, K]`, `[L, N, K]` or, grouped, `[E, N, K]`
    gate_bias      `[N]`, `[L, N]` or `[E, N]`; the bias of `linear`; up_bias alike
    group_offsets  int32 `[E + 1]`; only rows up to the last offset are part of the result
    exact          the result must equal the specification's bit for bit, the sign of a zero aside
    """

    name: str
    seed: int
    x: NVFP4Tensor | Tensor
    gate: NVFP4Tensor
    up: NVFP4Tensor | None
    activation: Activation = SILU
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    out_dtype: torch.dtype = torch.float16
    group_offsets: Tensor | None = None
    kind: Kind = "full_range"
    exact: bool = False

    @property
    def out_shape(self) -> tuple[int, ...]:
        """`[..., M, N]`; grouped `[group_offsets[E], N]`."""
        if self.group_offsets is not None:
            return (int(self.group_offsets[-1]), self.gate.rows)
        return (*self.x.shape[:-1], self.gate.rows)

    @property
    def k(self) -> int:
        return self.gate.k

    def to(self, device: torch.device | str) -> Case:
        """The same case with its tensors on `device`."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            x=self.x.to(device),
            gate=self.gate.to(device),
            up=None if self.up is None else self.up.to(device),
            gate_bias=move(self.gate_bias),
            up_bias=move(self.up_bias),
            group_offsets=move(self.group_offsets),
        )

    def blocks(self) -> Iterator[Block]:
        """The call in parts of at most 2048 x 1024 outputs, operands on the CPU, rows counted in the output `[R, N]`."""
        here = self.to("cpu")
        for start, x, index in here._matrices():
            for c in range(0, here.gate.rows, COL_CHUNK):
                cols = min(COL_CHUNK, here.gate.rows - c)
                gate = _columns(here.gate, index, c, cols)
                up = None if here.up is None else _columns(here.up, index, c, cols)
                biases = [_bias(b, index, c, cols) for b in (here.gate_bias, here.up_bias)]
                for r in range(0, x.shape[0], ROW_CHUNK):
                    rows = min(ROW_CHUNK, x.shape[0] - r)
                    part = x.narrow_rows(r, rows) if isinstance(x, NVFP4Tensor) else x.narrow(0, r, rows)
                    yield Block(slice(start + r, start + r + rows), slice(c, c + cols), part, gate, up, *biases)

    def _matrices(self) -> Iterator[tuple[int, Tensor | NVFP4Tensor, int | None]]:
        """(first output row, x `[m, K]`, index of its weights or None) for every matrix of x or group of rows."""
        x = self.x
        if self.group_offsets is not None:
            ends = self.group_offsets.tolist()
            for e, (start, end) in enumerate(pairwise(ends)):
                if end > start:
                    yield start, x.narrow_rows(start, end - start) if isinstance(x, NVFP4Tensor) else x[start:end], e
            return
        if x.ndim == 2:
            yield 0, x, None
            return
        batch, rows = x.shape[:-2], x.shape[-2]
        for i in range(batch.numel()):
            index = torch.unravel_index(torch.tensor(i), batch)
            if isinstance(x, NVFP4Tensor):
                g = x.global_scale[index] if x.global_scale.ndim else x.global_scale
                matrix: Tensor | NVFP4Tensor = NVFP4Tensor(x.codes[index], x.block_scale[index], g)
            else:
                matrix = x[index]
            yield i * rows, matrix, i if self.gate.ndim == 3 else None

    def expected64(self) -> Tensor:
        """The specification's float64 values before the last rounding, shape `out_shape`."""
        shape = self.out_shape
        out = torch.zeros((torch.Size(shape[:-1]).numel(), shape[-1]), dtype=torch.float64)
        for block in self.blocks():
            gate, up = block.preactivations()
            out[block.rows, block.cols] = gate if up is None else self.activation(gate, up)
        return out.view(shape)

    def expected(self) -> Tensor:
        """`expected64` rounded once to `out_dtype`."""
        return reference.round_once(self.expected64(), self.out_dtype)

    def sample(self, rows: Tensor, cols: Tensor) -> Case:
        """The call that gives output rows `rows` and columns `cols` (int64 indices, sorted) of each matrix of this one."""
        offsets = self.group_offsets
        if offsets is not None:
            offsets = torch.searchsorted(rows, offsets.to(rows), right=False).to(torch.int32)

        def bias(b: Tensor | None) -> Tensor | None:
            return None if b is None else b.index_select(-1, cols)

        return replace(
            self,
            x=take_rows(self.x, rows) if isinstance(self.x, NVFP4Tensor) else self.x.index_select(-2, rows),
            gate=take_rows(self.gate, cols),
            up=None if self.up is None else take_rows(self.up, cols),
            gate_bias=bias(self.gate_bias),
            up_bias=bias(self.up_bias),
            group_offsets=offsets,
        )


def _columns(w: NVFP4Tensor, index: int | None, start: int, length: int) -> NVFP4Tensor:
    return (w if index is None else w[index]).narrow_rows(start, length)


def _bias(b: Tensor | None, index: int | None, start: int, length: int) -> Tensor | None:
    return None if b is None else (b if index is None else b[index]).narrow(0, start, length)


def take_rows(t: NVFP4Tensor, rows: Tensor) -> NVFP4Tensor:
    """Rows `rows` of every matrix `[..., rows, K]`, block scales linear."""
    scale = t.linear_block_scale().view(torch.uint8).index_select(-2, rows).view(torch.float8_e4m3fn)
    return NVFP4Tensor(t.codes.index_select(-2, rows), scale, t.global_scale)
