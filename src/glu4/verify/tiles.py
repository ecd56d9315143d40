"""Check what an emulated launch wrote: a few tiles of an output that was filled with a value that no kernel writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from glu4.nvfp4 import NVFP4Tensor
from glu4.verify.case import Case
from glu4.verify.checker import check

__all__ = ["UNWRITTEN", "Tile", "check_written", "sample", "spread"]

UNWRITTEN = 0x7E55  # a NaN with a payload in both 16-bit types


@dataclass(frozen=True)
class Tile:
    """One rectangle of the output that was written. finding: what is wrong with it, or empty."""

    batch: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    finding: str

    @property
    def name(self) -> str:
        where = f"rows {self.rows[0]} to {self.rows[1] - 1}, columns {self.columns[0]} to {self.columns[1] - 1}"
        return where + (f" of matrix {self.batch}" if self.batch else "")


def sample(grid: tuple[int, int, int], cluster: tuple[int, int, int] = (1, 1, 1), count: int = 4) -> list[tuple[int, int, int]]:
    """Up to `count` CTAs of a grid, the first of their clusters: opposite corners, then the others, of the first and last z."""
    x, y, z = ((0, (g - 1) // c * c) for g, c in zip(grid, cluster, strict=True))
    corners = [(x[i], y[j], z[k]) for k, i, j in product((0, 1), (0, 1), (0, 1))]
    corners.sort(key=lambda c: ((c[0] > 0) != (c[1] > 0), c[2] > 0))
    return list(dict.fromkeys(corners))[:count]


def spread(grid: tuple[int, int, int], cluster: tuple[int, int, int] = (1, 1, 1), count: int = 4) -> list[tuple[int, int, int]]:
    """Up to `count` CTAs of a grid, the first of their clusters: the first, the last, and others between at equal steps."""
    x, y, z = (g // c for g, c in zip(grid, cluster, strict=True))
    last = x * y * z - 1
    numbers = dict.fromkeys(round(i * last / max(count - 1, 1)) for i in range(count))
    return [(i % x * cluster[0], i // x % y * cluster[1], i // (x * y) * cluster[2]) for i in numbers]


def check_written(case: Case, out: Tensor) -> list[Tile]:
    """What of `out`, 16-bit `[M, N]` or `[L, M, N]` filled with `UNWRITTEN` before the launch, was written, against `case`.

    Of each matrix the written part must be one rectangle. Nothing written at all is a finding.
    """
    each = out if out.ndim == 3 else out.unsqueeze(0)
    found: list[Tile] = []
    for i, matrix in enumerate(each):
        written = matrix.view(torch.int16) != UNWRITTEN
        rows, columns = _extent(written.any(1)), _extent(written.any(0))
        if rows is None or columns is None:
            continue
        part = written[rows[0] : rows[1], columns[0] : columns[1]]
        if not bool(part.all()):
            gaps = int((~part).sum())
            found.append(Tile(i, rows, columns, f"{gaps} of {part.numel()} elements within what was written were not"))
            continue
        verdict = check(_part(case, i, rows, columns), matrix[rows[0] : rows[1], columns[0] : columns[1]])
        found.append(Tile(i, rows, columns, "" if verdict.ok else verdict.summary()))
    return found or [Tile(0, (0, 0), (0, 0), "nothing was written")]


def _extent(any_written: Tensor) -> tuple[int, int] | None:
    where = any_written.nonzero().flatten()
    return (int(where[0]), int(where[-1]) + 1) if where.numel() else None


def _part(case: Case, batch: int, rows: Sequence[int], columns: Sequence[int]) -> Case:
    """The rectangle of one matrix as a case of its own."""

    def matrix(t: NVFP4Tensor, span: Sequence[int]) -> NVFP4Tensor:
        one = t[batch] if t.ndim == 3 else t
        return one.narrow_rows(span[0], span[1] - span[0])

    def vector(t: Tensor | None) -> Tensor | None:
        return None if t is None else (t[batch] if t.ndim == 2 else t)[columns[0] : columns[1]]

    assert isinstance(case.x, NVFP4Tensor)
    up = None if case.up is None else matrix(case.up, columns)
    return replace(
        case, x=matrix(case.x, rows), gate=matrix(case.gate, columns), up=up, gate_bias=vector(case.gate_bias),
        up_bias=vector(case.up_bias),
    )  # fmt: skip
