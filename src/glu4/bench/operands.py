"""The operands of one measured shape, drawn by seed, and the check of a contender's output before it is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glu4 import reference
from glu4.activation import SILU
from glu4.nvfp4 import NVFP4Tensor, quantize
from glu4.problem import Problem
from glu4.verify.case import Block, Case
from glu4.verify.checker import check
from glu4.verify.metrics import block_terms

__all__ = ["DATA", "FORMATS", "Checked", "Operands", "draw", "replica", "spread"]

DATA = (
    "Data: normal activations, rounded to each contender's own format; weights normal with standard deviation 0.25 in NVFP4 "
    "with global scales 1, because peers take one scale for gate and up. Every copy holds the same values."
)
FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "nvfp4": torch.float16}  # activation format: output dtype
ROWS_AT_ONCE = 512  # of the whole-output check: bounds its float64 memory
SAMPLE_ROWS, SAMPLE_COLS = 16, 256
# |d silu(g) / silu(g)| / |dg / g| = 1 + g (1 - sigmoid(g)) for g > 0, where the norm lies, is at most this
GATE_AMPLIFICATION = 1.28


@dataclass(frozen=True)
class Checked:
    """An output against the specification: `wrong` says what is wrong, in one sentence, and is empty for a right one.

    max_rel_err  max |d| / max |expected|, over the whole output
    fro_rel_err  ||d|| / ||expected||
    """

    wrong: str
    max_rel_err: float
    fro_rel_err: float


@dataclass(eq=False)
class Operands:
    """x `[m, k]`, gate and up `[n, k]` of one shape on one device, and the specified results of each activation format."""

    m: int
    n: int
    k: int
    gate: NVFP4Tensor
    up: NVFP4Tensor
    normal: Tensor  # float32 [m, k], what every format of x is rounded from
    _x: dict[str, list[Tensor | NVFP4Tensor]] = field(default_factory=dict)
    _expected: dict[str, Tensor] = field(default_factory=dict)

    def problem(self, x_format: str) -> Problem:
        """The Problem with that activation format and the output type that goes with it."""
        return Problem(self.m, self.n, self.k, x_format=x_format, out_dtype=FORMATS[x_format])

    def x(self, x_format: str, count: int) -> list[Tensor | NVFP4Tensor]:
        """`count` copies of the activations, each in memory of its own; contenders share them."""
        held = self._x.setdefault(x_format, [])
        while len(held) < count:
            held.append(quantize(self.normal) if x_format == "nvfp4" else self.normal.to(FORMATS[x_format], copy=True))
        return held[:count]

    def out(self, x_format: str) -> Tensor:
        """Memory for an output `[m, n]`, full of NaN, so that what is never written shows."""
        return torch.full((self.m, self.n), torch.nan, dtype=FORMATS[x_format], device=self.normal.device)

    def decoded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gate and up `[n, k]` in 16 bits, exact (global scales are 1)."""
        return self.gate.decode(dtype), self.up.decode(dtype)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Codes `[2n, k/2]` and block scales `[2n, k/16]`, gate's rows first, as peers take them that hold one NVFP4 matrix."""
        codes = torch.cat((self.gate.codes, self.up.codes))
        scales = torch.cat((self.gate.block_scale.view(torch.uint8), self.up.block_scale.view(torch.uint8)))
        return codes, scales.view(torch.float8_e4m3fn)

    def expected(self, x_format: str) -> Tensor:
        """The specification's values before the last rounding, float64 `[m, n]`."""
        if x_format not in self._expected:
            x = self.x(x_format, 1)[0]
            gate, up = (reference.preactivation(x, w) for w in (self.gate, self.up))
            self._expected[x_format] = SILU(gate, up)
        return self._expected[x_format]

    def check(self, out: Tensor, x_format: str, roundings: int, specified: bool) -> Checked:
        """Check an output `[m, n]` of a contender that rounds to 16 bits `roundings` times between the sums and the result.

        All are held to that many roundings in the Frobenius norm: 1 when only the result is rounded, 3 when gate and up are
        before. A `specified` one besides to the project's checker: every element to its bound, and a sample of rows and columns
        to the norms, where an approximate sigmoid shows, which peers may have.
        """
        expected = self.expected(x_format)
        dtype = FORMATS[x_format]
        if tuple(out.shape) != (self.m, self.n) or out.dtype != dtype:
            return Checked(f"{list(out.shape)} {out.dtype} where {[self.m, self.n]} {dtype} belongs", torch.nan, torch.nan)
        error = out.double() - expected
        largest, norm = (float(f(error) / f(expected)) for f in (_largest, torch.linalg.norm))
        limit = torch.finfo(dtype).eps / 2 * (roundings + (GATE_AMPLIFICATION - 1) * (roundings > 1))
        wrong = "" if norm <= limit else f"relative error {norm:.3g}, at most {limit:.3g} can be rounding"
        if not wrong and specified:
            wrong = self._outside(out, x_format) or self._sample(out, x_format)
        return Checked(wrong, largest, norm)

    def _outside(self, out: Tensor, x_format: str) -> str:
        """What the element bounds of `glu4.verify.metrics` say of the whole output; empty when all are kept."""
        for block in self._blocks(x_format):
            terms, rows = block_terms(block, SILU), block.rows
            low, high = (reference.round_once(terms.value + d, out.dtype) for d in (-terms.bound, terms.bound))
            count = int((~((out[rows] >= low) & (out[rows] <= high))).sum())
            if count:
                return f"{count} elements of rows {rows.start} to {rows.stop - 1} cannot be right"
        return ""

    def _blocks(self, x_format: str) -> Iterator[Block]:
        """The call in parts of at most ROWS_AT_ONCE rows, each with one gate and one up matrix."""
        x = self.x(x_format, 1)[0]
        for start in range(0, self.m, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, self.m))
            part = x.narrow_rows(start, rows.stop - start) if isinstance(x, NVFP4Tensor) else x[rows]
            yield Block(rows, slice(0, self.n), part, self.gate, self.up, None, None)

    def _sample(self, out: Tensor, x_format: str) -> str:
        """What the checker says of rows and columns spread over the output; it is the sharp one and runs on the CPU."""
        rows, cols = spread(self.m, SAMPLE_ROWS), spread(self.n, SAMPLE_COLS)
        x = self.x(x_format, 1)[0]
        case = Case("measured shape", 0, x, self.gate, self.up, out_dtype=out.dtype).to("cpu").sample(rows, cols)
        verdict = check(case, out.cpu()[rows][:, cols])
        return "" if verdict.ok else verdict.summary()


def _largest(t: Tensor) -> Tensor:
    return t.abs().amax() if t.numel() else t.new_zeros(())


def spread(size: int, count: int) -> Tensor:
    """At most `count` different indices from 0 to size - 1, both ends among them, and no two in step with a tile size."""
    return torch.tensor(sorted({round(i * (size - 1) / max(1, count - 1)) for i in range(count)}))


def draw(m: int, n: int, k: int, device: torch.device | str, seed: int = 0) -> Operands:
    """The operands of one shape: the same on every run on one kind of device."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, k, generator=generator, device=device)

    x = normal(m)
    gate, up = (quantize(normal(n) * 0.25, 1.0) for _ in range(2))
    return Operands(m, n, k, gate, up, x)


def replica(t: Tensor) -> Tensor:
    """A copy in memory of its own, with all of the storage that `t` views, such as what a kernel may read beyond the end."""
    storage: Any = t.untyped_storage()
    return t.new_empty(0).set_(storage.clone(), t.storage_offset(), t.size(), t.stride())
