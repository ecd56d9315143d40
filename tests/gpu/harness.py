"""What the GPU proofs share: where they run, a case's call there, guarded memory, and the checker's limits on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

import glu4
from glu4 import GatedWeights, LinearWeight, NVFP4Tensor
from glu4.backends.hopper import launch
from glu4.backends.hopper.config import SHIPPED, Config
from glu4.backends.hopper.pack import pack_gated, pack_matrix
from glu4.problem import dense_problem
from glu4.verify.case import Block, Case
from glu4.verify.checker import check
from glu4.verify.metrics import Measurement, NormSums, Terms, _compare, _norm_parts, block_terms, ulp

FORMATS = ("nvfp4", "float16", "bfloat16")
OUT = (torch.float16, torch.bfloat16)
SENTINEL = 0x5AA5
_SIDE = 1024  # rows and columns of the part whose float64 temporaries exist at once

T = TypeVar("T")
Operand = Tensor | NVFP4Tensor


def no_hopper() -> str | None:
    """Why no Hopper kernel can run here; None when one can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"needs a GPU of compute capability 9.0, this is {torch.cuda.get_device_name()}"
    return None


@dataclass(frozen=True)
class Target:
    """A backend, the device it runs on, its configurations, and whether every case is run or a few."""

    backend: str
    device: str
    configs: tuple[Config | None, ...]
    full: bool

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def some(self, items: Sequence[T], few: int = 2) -> Sequence[T]:
        """All of `items`, or `few` of them from first to last."""
        if self.full or len(items) <= few:
            return items
        return [items[i * (len(items) - 1) // max(1, few - 1)] for i in range(few)]


PORTABLE = Target("portable", "cpu", (None,), full=False)
HOPPER = Target("hopper", "cuda", SHIPPED, full=True)


# ---- a case's call on a target ----


FORMS = ("prepared", "freed", "object", "tensors")


class Call:
    """A dense case on a target: call it with other tokens, memory or output type, or insist on a configuration. Without one it
    goes through glu4's public functions, and the target's backend is insisted on.

    form  how weights are given: "prepared", "freed" (prepared, only the packed form kept), "object" (not prepared, packed by
          the first call) or "tensors" (packed by each call)
    """

    def __init__(self, target: Target, case: Case, form: str = "prepared") -> None:
        self.target, self.case = target, case.to(target.device)
        self._packed: Tensor | None = None
        self.weights = self._given(form)

    def _given(self, form: str) -> GatedWeights | LinearWeight | NVFP4Tensor | tuple[NVFP4Tensor, NVFP4Tensor]:
        c = self.case
        if form == "tensors" and c.gate_bias is None and c.up_bias is None:
            return c.gate if c.up is None else (c.gate, c.up)
        made: GatedWeights | LinearWeight
        if c.up is None:
            made = LinearWeight(c.gate)
        else:
            made = GatedWeights(c.gate, c.up, gate_bias=c.gate_bias, up_bias=c.up_bias)
        return made if form == "object" else made.prepare(self.target.device, free_original=form == "freed")

    def __call__(
        self,
        x: Operand | None = None,
        *,
        out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        config: Config | None = None,
    ) -> Tensor:
        c = self.case
        x = c.x if x is None else x
        dtype = out.dtype if out is not None else out_dtype or c.out_dtype
        if config is not None:
            return self._raw(x, out, dtype, config)
        if c.up is None:
            assert isinstance(self.weights, (LinearWeight, NVFP4Tensor))
            return glu4.linear(x, self.weights, bias=c.gate_bias, out=out, out_dtype=dtype, backend=self.target.backend)
        assert isinstance(self.weights, (GatedWeights, tuple))
        given = {"out": out, "out_dtype": dtype, "backend": self.target.backend}
        return glu4.dual_gemm(x, self.weights, activation=c.activation, **given)

    def _raw(self, x: Operand, out: Tensor | None, dtype: torch.dtype, config: Config) -> Tensor:
        """The launch itself, which neither validates nor chooses."""
        c = self.case
        if self._packed is None:
            self._packed = pack_matrix(c.gate) if c.up is None else pack_gated(c.gate, c.up)
            self.target.synchronize()  # kernels may read weights before the work ahead of them is done
        if out is None:
            out = torch.full((x.shape[0], c.gate.rows), float("nan"), dtype=dtype, device=self.target.device)
        second = c.gate if c.up is None else c.up
        biases = (c.gate_bias, c.gate_bias if c.up is None else c.up_bias)
        form = {"dual": c.up is not None, "activation": c.activation, "out_dtype": dtype, "has_bias": biases[0] is not None}
        scales = (c.gate.global_scale, second.global_scale)
        launch.dense(out, x, self._packed, scales, biases, c.activation, dense_problem(x, c.gate, **form), config)
        return out


def rows(x: Operand, start: int, length: int) -> Operand:
    """Rows `start` to `start + length` of tokens."""
    return x.narrow_rows(start, length) if isinstance(x, NVFP4Tensor) else x.narrow(0, start, length)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two 16-bit tensors are equal bit for bit, NaN and the sign of zero included."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def assert_checked(case: Case, output: Tensor, what: str = "", *, diagnose: bool = True) -> None:
    """The project's checker, with its diagnosis."""
    verdict = check(case, output.cpu(), diagnose=diagnose)
    assert verdict.ok, f"{what} {case.name} seed {case.seed}: {verdict.summary()}"


# ---- memory ----


def guarded(
    m: int, n: int, dtype: torch.dtype, device: str, *, pad: int = 0, offset: int = 0
) -> tuple[Tensor, Callable[[], bool]]:
    """An output `[m, n]` full of NaN with `pad` elements after each row and at least 4096 on either side; and a function that
    says whether all of these are as they were."""
    span = m * (n + pad)
    buffer = torch.full((4096 + offset + span + 4096,), SENTINEL, dtype=torch.int16, device=device)
    out = buffer.view(dtype).as_strided((m, n), (n + pad, 1), 4096 + offset)
    out.fill_(float("nan"))

    def untouched() -> bool:
        rest = buffer.clone()
        rest.as_strided((m, n), (n + pad, 1), 4096 + offset).fill_(SENTINEL)
        return bool((rest == SENTINEL).all())

    return out, untouched


X_LAYOUTS = ("dense", "padded", "odd stride", "off by 2 bytes", "off by 8 bytes", "transposed", "three dimensions")


def laid_out(x: Operand, layout: str) -> Operand:
    """The same tokens in memory laid out otherwise, among NaNs; NVFP4 tokens as they are or with other block scales' layout."""
    if isinstance(x, NVFP4Tensor):
        return x.to_swizzled() if X_LAYOUTS.index(layout) % 2 else x.to_linear()
    m, k = x.shape
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "three dimensions":
        return x.reshape(1, m, k) if m % 2 else x.reshape(2, m // 2, k)
    stride, start = {
        "dense": (k, 0),
        "padded": (k + 24, 8),
        "odd stride": (k + 1, 0),
        "off by 2 bytes": (k, 1),
        "off by 8 bytes": (k + 8, 4),
    }[layout]
    buffer = torch.full((start + m * stride + 64,), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer.as_strided((m, k), (stride, 1), start)
    view.copy_(x)
    return view


OUT_LAYOUTS = ("new", "dense", "padded", "odd", "transposed")


def output_for(layout: str, m: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor | None, Callable[[], bool]]:
    """An output of one of OUT_LAYOUTS (None for a new one) and whether its surroundings are untouched."""
    if layout == "new":
        return None, lambda: True
    if layout == "transposed":
        out, untouched = guarded(n, m, dtype, device)
        return out.t(), untouched
    pad, offset = {"dense": (0, 0), "padded": (16, 8), "odd": (3, 1)}[layout]
    return guarded(m, n, dtype, device, pad=pad, offset=offset)


# ---- the checker's limits on the device ----


class Oracle:
    """The specification's values of a dense case and the checker's limits, computed once on the target's device in float64,
    for outputs that are too large or too many for the checker, which works on the CPU. `test_oracle` holds it to the checker's
    own verdicts."""

    def __init__(self, target: Target, case: Case) -> None:
        here = case.to(target.device)
        assert here.x.ndim == 2
        m, n = here.x.shape[0], here.gate.rows
        parts = torch.empty((3, m, n), dtype=torch.float64, device=target.device)
        for r in range(0, m, _SIDE):
            for c in range(0, n, _SIDE):
                block = _block(here, slice(r, min(m, r + _SIDE)), slice(c, min(n, c + _SIDE)))
                terms = block_terms(block, here.activation)
                parts[:, block.rows, block.cols] = torch.stack((terms.value, terms.bound, terms.rms))
        self.case, self.terms = here, Terms(*parts)

    def faults(self, output: Tensor, start: int = 0) -> str | None:
        """What is wrong with `output [m, N]`, which is rows `start` and on of the case; None when it is right."""
        whole = slice(start, start + output.shape[0])
        found = measure(Terms(*(t[whole] for t in (self.terms.value, self.terms.bound, self.terms.rms))), output)
        if found.agrees:
            return None
        ratios = {name: round(ratio, 3) for name, ratio in found.norm_ratios.items()}
        first = found.outside.nonzero()[:1].tolist()
        return f"{int(found.outside.sum())} of {output.numel()} elements cannot be right, first {first}; norms {ratios}"


def _block(case: Case, at: slice, cols: slice) -> Block:
    def columns(w: NVFP4Tensor) -> NVFP4Tensor:
        return w.narrow_rows(cols.start, cols.stop - cols.start)

    return Block(
        at,
        cols,
        rows(case.x, at.start, at.stop - at.start),
        columns(case.gate),
        None if case.up is None else columns(case.up),
        None if case.gate_bias is None else case.gate_bias[cols],
        None if case.up_bias is None else case.up_bias[cols],
    )


def measure(terms: Terms, output: Tensor) -> Measurement:
    """`glu4.verify.metrics.measure` of one part, on the device that holds it."""
    actual = output.double()
    rounded, wrong, counted = _compare(actual, terms, output.dtype)
    usable = Terms(*(torch.where(counted, t, 0.0) for t in (terms.value, terms.bound, terms.rms)))
    step = ulp(usable.value, output.dtype)
    pair = (torch.where(counted, actual, 0.0), torch.where(counted, rounded, 0.0))
    sums = []
    for weight in (counted.double(), counted / (step + 6 * usable.rms).square()):
        parts = _norm_parts(*pair, usable, step, weight)
        by_row, by_col = (torch.cat((parts[:4].sum(d), parts[4:].amax(d))) for d in (2, 1))
        sums.append(NormSums(by_row, by_col))
    inexact = (actual != rounded) & ~(actual.isnan() & rounded.isnan())
    return Measurement(terms.value, wrong, inexact, sums[0], sums[1], 0.0)


def with_tokens(case: Case, x: Operand) -> Case:
    """The same case with other tokens."""
    return replace(case, x=x)
