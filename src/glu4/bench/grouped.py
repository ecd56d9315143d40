"""Cases of the grouped operation: the tokens of each expert, the operands, drawn by seed, and the check of an output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from glu4 import reference
from glu4.activation import SILU
from glu4.bench.operands import FORMATS, ROWS_AT_ONCE, Operands, spread
from glu4.nvfp4 import NVFP4Tensor, quantize
from glu4.problem import GroupedProblem
from glu4.verify.case import Block, Case
from glu4.verify.checker import check

__all__ = ["GroupedOperands", "GroupedShape", "draw_grouped", "zipf_sizes"]

SAMPLE_ROWS, SAMPLE_COLS = 64, 128  # of the sharp check, which runs on the CPU
_SCALES = (0.5, 1.0, 2.0)  # powers of two, so that 16-bit peers can hold the same weights exactly


@dataclass(frozen=True)
class GroupedShape:
    """One case: gate and up `[N, K]` of each expert, and the tokens of each.

    sizes  tokens of each expert, or None: `tokens` tokens choose `top_k` different experts of `experts` each, with
           probabilities as 1 / rank (Zipf), drawn by the run's seed
    """

    case: str
    n: int
    k: int
    sizes: tuple[int, ...] | None = None
    experts: int = 0
    tokens: int = 0
    top_k: int = 1

    def drawn(self, seed: int) -> tuple[int, ...]:
        """Tokens of each expert in a run with that seed."""
        return zipf_sizes(self.experts, self.tokens, self.top_k, seed) if self.sizes is None else self.sizes


def zipf_sizes(experts: int, tokens: int, top_k: int, seed: int) -> tuple[int, ...]:
    """How many of `tokens` tokens choose each expert, if a token draws `top_k` different ones in proportion to 1 / rank.

    Ranks are a random order of the experts. Drawing without replacement is taking the largest of log(p) plus a Gumbel variable
    (Vieira 2014; Kool, van Hoof and Welling 2019). The same on every machine for one release of torch.
    """
    draw = torch.Generator().manual_seed(seed)
    rank = torch.randperm(experts, generator=draw).double() + 1
    uniform = torch.rand(tokens, experts, generator=draw, dtype=torch.float64).clamp(min=1e-300)
    chosen = (-rank.log() - (-uniform.log()).log()).topk(top_k, dim=1).indices
    return tuple(chosen.flatten().bincount(minlength=experts).tolist())


@dataclass(eq=False)
class GroupedOperands(Operands):
    """x `[m, k]` sorted by expert, gate and up `[E, n, k]` with global scales of their own, and the tokens of each expert."""

    case: str = ""
    sizes: tuple[int, ...] = ()

    @property
    def active(self) -> int:
        """Experts that have tokens, whose weights must be read."""
        return sum(size > 0 for size in self.sizes)

    @cached_property
    def offsets(self) -> Tensor:
        """int32 `[E + 1]` on the operands' device."""
        ends = [0, *itertools.accumulate(self.sizes)]
        return torch.tensor(ends, dtype=torch.int32, device=self.normal.device)

    def problem(self, x_format: str) -> GroupedProblem:  # type: ignore[override]
        """The GroupedProblem with that activation format; experts without tokens do not count."""
        return GroupedProblem(self.m, self.active, self.n, self.k, x_format=x_format, out_dtype=FORMATS[x_format])

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Experts that have tokens, with their rows."""
        ends = [0, *itertools.accumulate(self.sizes)]
        return ((e, slice(a, b)) for e, (a, b) in enumerate(itertools.pairwise(ends)) if b > a)

    def decoded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gate and up `[E, n, k]` in 16 bits, exact (global scales are powers of two)."""
        found = []
        for w in (self.gate, self.up):
            whole = torch.empty(w.shape, dtype=dtype, device=w.device)
            for e in range(w.shape[0]):  # one at a time: decoding takes several times the memory
                whole[e] = w[e].dequantize(dtype)
            found.append(whole)
        return found[0], found[1]

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Codes `[E, 2n, k/2]` and block scales `[E, 2n, k/16]`, gate's rows first, for peers with one global scale an expert:
        `smaller_scales`. The other matrix's block scales are 2 or 4 times as large instead, which is exact."""
        ratios = [w.global_scale / self.smaller_scales() for w in (self.gate, self.up)]
        scales = [w.block_scale.float() * r[:, None, None] for w, r in zip((self.gate, self.up), ratios)]
        return torch.cat((self.gate.codes, self.up.codes), 1), torch.cat(scales, 1).to(torch.float8_e4m3fn)

    def smaller_scales(self) -> Tensor:
        """The smaller global scale of each expert's gate and up, float32 `[E]`."""
        return torch.minimum(self.gate.global_scale, self.up.global_scale)

    def expected(self, x_format: str) -> Tensor:
        """The specification's values before the last rounding, float64 `[m, n]`."""
        if x_format not in self._expected:
            x = self.x(x_format, 1)[0]
            whole = torch.empty(self.m, self.n, dtype=torch.float64, device=self.normal.device)
            for e, rows in self.spans():
                part = _rows(x, rows)
                whole[rows] = SILU(*(reference.preactivation(part, w[e]) for w in (self.gate, self.up)))
            self._expected[x_format] = whole
        return self._expected[x_format]

    def _blocks(self, x_format: str) -> Iterator[Block]:
        x = self.x(x_format, 1)[0]
        for e, span in self.spans():
            for start in range(span.start, span.stop, ROWS_AT_ONCE):
                rows = slice(start, min(start + ROWS_AT_ONCE, span.stop))
                yield Block(rows, slice(0, self.n), _rows(x, rows), self.gate[e], self.up[e], None, None)

    def _sample(self, out: Tensor, x_format: str) -> str:
        rows, cols = (spread(size, count).to(out.device) for size, count in ((self.m, SAMPLE_ROWS), (self.n, SAMPLE_COLS)))
        x = self.x(x_format, 1)[0]
        whole = Case("measured case", 0, x, self.gate, self.up, out_dtype=out.dtype, group_offsets=self.offsets)
        # sampled before it moves: the stack can take gigabytes
        verdict = check(whole.sample(rows, cols).to("cpu"), out[rows][:, cols].cpu())
        return "" if verdict.ok else verdict.summary()


def _rows(x: Tensor | NVFP4Tensor, rows: slice) -> Tensor | NVFP4Tensor:
    return x.narrow_rows(rows.start, rows.stop - rows.start) if isinstance(x, NVFP4Tensor) else x[rows]


def draw_grouped(shape: GroupedShape, device: torch.device | str, seed: int = 0) -> GroupedOperands:
    """The operands of one case: the same on every run on one kind of device.

    Gate and up of one expert have different global scales, each 1/2, 1 or 2.
    """
    sizes = shape.drawn(seed)
    generator = torch.Generator(device).manual_seed(seed)
    picks = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), shape.k, generator=generator, device=device)
    first = torch.randint(0, 3, (len(sizes),), generator=picks)
    second = (first + torch.randint(1, 3, (len(sizes),), generator=picks)) % 3
    found = []
    for pick in (first, second):
        codes = torch.empty(len(sizes), shape.n, shape.k // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(len(sizes), shape.n, shape.k // 16, dtype=torch.float8_e4m3fn, device=device)
        for e in range(len(sizes)):
            drawn = torch.randn(shape.n, shape.k, generator=generator, device=device)
            one = quantize(drawn * 0.25, 1.0)
            codes[e], scales[e] = one.codes, one.block_scale
        found.append(NVFP4Tensor(codes, scales, torch.tensor(_SCALES)[pick].to(device)))
    return GroupedOperands(sum(sizes), shape.n, shape.k, found[0], found[1], x, case=shape.case, sizes=sizes)
