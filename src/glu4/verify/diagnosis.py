"""What went wrong: which named mistakes reproduce a wrong output, which part was never written, or where it is wrong.

Large results are looked at in a sample of the most wrong rows and columns and some others, full depth K each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glu4.reference import round_once
from glu4.verify.case import Block, Case
from glu4.verify.hypotheses import HYPOTHESES, Hypothesis, Probe, Variant, same_operands
from glu4.verify.metrics import Measurement, Terms, block_terms, measure, norm_limit, relative_error, ulp

__all__ = ["Diagnosis", "describe", "diagnose", "same_shape"]

SAMPLE = 48  # most wrong rows and columns looked at, besides a third as many others
FEW = 8  # of the most wrong, where most mistakes are ruled out
SUBTLE_SAMPLE = 128  # where only a norm shows the fault, more elements are needed to show it
# a 16-bit rounding in between is found when it explains this part of the squares beyond the output's own rounding, and
# at most MARGIN less than the best: of several roundings a part explains less, and one too many adds an error of its own
EXPLAINED = 0.5
MARGIN = 0.1
NEAR = 0.1  # a mistake "comes near" when the error from its result is at most this part of the error


@dataclass(frozen=True)
class Diagnosis:
    """A cause. `detail` says which operand, rows or range; `exact` is False for one that only comes near or is unknown."""

    name: str
    sentence: str
    detail: str = ""
    exact: bool = True

    def __str__(self) -> str:
        return f"{self.sentence} ({self.detail})" if self.detail else self.sentence


def diagnose(case: Case, output: Tensor, found: Measurement, initial: Tensor | None = None) -> list[Diagnosis]:
    """Every cause that reproduces a wrong `output`; one that says where and how much when there is none.

    found    what `measure` gave for it
    initial  what the output held before the call, if known
    """
    out = output.detach().cpu()
    flat = out.reshape(found.expected.shape)
    causes = _not_written(flat, found, None if initial is None else initial.detach().cpu().reshape(flat.shape))
    probe = _probe(case.to("cpu"), out, found)
    near: list[tuple[float, Diagnosis]] = []
    if not measure(probe.case, probe.output).agrees:
        for hypothesis in HYPOTHESES:
            causes += _reproducing(hypothesis, probe, near)
    if causes:
        return causes
    return [_unknown(flat, found, min(near, key=lambda n: n[0]) if near else None)]


def same_shape(case: Case, output: Tensor) -> list[Diagnosis]:
    """For an output of the wrong shape: is it the right one transposed?"""
    fits = output.ndim >= 2 and tuple(output.mT.shape) == case.out_shape and output.dtype == case.out_dtype
    if not fits or not measure(case, output.mT).agrees:
        return []
    return [Diagnosis("output transposed", "the output is the right one transposed")]


# ---- hypotheses ----


def _probe(case: Case, out: Tensor, found: Measurement) -> Probe:
    """The most wrong rows and columns, and others at random."""
    subtle = not bool(found.outside.any()) and not case.exact
    wrong = found.outside | found.inexact if case.exact else found.outside
    rows, cols = wrong.double().sum(1), wrong.double().sum(0)
    if subtle:
        rows, cols = (sums[0] / norm_limit(sums).clamp(min=1e-300) for sums in (found.ulps.rows, found.ulps.cols))
    rows = rows.view(-1, case.out_shape[-2]).sum(0)
    gen = torch.Generator().manual_seed(case.seed)
    most = SUBTLE_SAMPLE if subtle else SAMPLE

    def choose(badness: Tensor) -> tuple[Tensor, Tensor]:
        # equals in a random order, so that no pattern of places is favoured
        shuffled = torch.randperm(badness.numel(), generator=gen)
        order = shuffled[badness[shuffled].argsort(descending=True, stable=True)]
        others = order[most:][torch.randperm(max(0, order.numel() - most), generator=gen)[: most // 3]]
        chosen = torch.cat((order[:most], others)).sort().values
        return chosen, torch.searchsorted(chosen, order[:FEW].sort().values)

    (at_rows, worst_rows), (at_cols, worst_cols) = choose(rows), choose(cols)
    return Probe.at(case, out, at_rows, at_cols, (worst_rows, worst_cols))


def _reproducing(hypothesis: Hypothesis, probe: Probe, near: list[tuple[float, Diagnosis]]) -> list[Diagnosis]:
    """The variants of a hypothesis that the output agrees with; how near each comes at a few places is added to `near`."""
    few = probe.few
    promising = set()
    for variant in hypothesis.variants(few):
        if variant.values is None:
            found = measure(variant.case, few.output if variant.output is None else variant.output)
            out = (few.output if variant.output is None else variant.output).reshape(found.expected.shape)
            cause = Diagnosis(hypothesis.name, hypothesis.sentence, variant.detail)
            near.append((relative_error(out, found.expected), cause))
            if not found.agrees:
                continue
        promising.add(variant.detail)
    if not promising:
        return []
    causes: list[Diagnosis] = []
    cases: list[Case] = []
    explained: list[tuple[float, Diagnosis]] = []
    parts: list[tuple[Block, Terms]] = []
    for variant in hypothesis.variants(probe):
        cause = Diagnosis(hypothesis.name, hypothesis.sentence, variant.detail)
        if variant.values is not None:
            if not parts:
                parts = [(block, block_terms(block, probe.case.activation)) for block in probe.case.blocks()]
            explained.append((_explained(probe, parts, variant.values), cause))
        # the larger of two changes of the same effect says nothing more
        elif (
            variant.detail in promising
            and (variant.output is not None or not any(_repeats(variant.case, c) for c in cases))
            and _reproduces(probe, variant)
        ):
            cases.append(variant.case)
            causes.append(cause)
    best = max((part for part, _ in explained), default=0.0)
    return causes + [cause for part, cause in explained if part >= max(EXPLAINED, best - MARGIN)]


def _repeats(a: Case, b: Case) -> bool:
    rest = a.activation == b.activation and a.gate_bias is b.gate_bias and a.up_bias is b.up_bias
    return rest and same_operands(a, b)


def _reproduces(probe: Probe, variant: Variant) -> bool:
    return measure(variant.case, probe.output if variant.output is None else variant.output).agrees


def _explained(probe: Probe, parts: list[tuple[Block, Terms]], values: Tensor) -> float:
    """The part of the squares beyond output rounding (weighted as in NormSums) that disappears when the output is compared
    with `values` `[R, N]` instead of the specification, whose terms are `parts`."""
    out = probe.output.double().reshape(values.shape)
    excess = torch.zeros(2, dtype=torch.float64)
    for block, terms in parts:
        where = (block.rows, block.cols)
        actual, mistaken = out[where], values[where]
        counted = actual.isfinite() & mistaken.isfinite() & terms.value.isfinite()
        weight = counted / (ulp(torch.where(counted, terms.value, 0.0), probe.case.out_dtype) + 6 * terms.rms).square()
        for i, value in enumerate((terms.value, mistaken)):
            rounded = round_once(value, probe.case.out_dtype).double()
            squares = (actual - value).square() - (rounded - value).square()
            excess[i] += torch.where(counted & rounded.isfinite(), squares * weight, 0.0).sum()
    return 1 - float(excess[1] / excess[0]) if float(excess[0]) > 0 else 0.0


# ---- places ----


def _runs(mask: Tensor) -> list[tuple[int, int]]:
    """First and last index of every run of True in a 1-D mask."""
    edges = torch.cat((torch.tensor([0]), mask.int(), torch.tensor([0]))).diff().nonzero().flatten().tolist()
    return [(a, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _spans(mask: Tensor) -> str:
    runs = _runs(mask)
    text = ", ".join(f"{a}" if a == b else f"{a}..{b}" for a, b in runs[:4])
    return text + (f" and {len(runs) - 4} more ranges" if len(runs) > 4 else "")


def describe(mask: Tensor) -> str:
    """How many elements of `[R, N]` a mask holds and which rows and columns they lie in, in words."""
    count, total = int(mask.sum()), mask.numel()
    if count == total:
        return f"all {total} elements"
    rows, cols = mask.any(1), mask.any(0)
    where = []
    if not bool(rows.all()):
        where.append(f"in row{'s' if int(rows.sum()) > 1 else ''} {_spans(rows)}")
    if not bool(cols.all()):
        where.append(f"in column{'s' if int(cols.sum()) > 1 else ''} {_spans(cols)}")
    box = int(rows.sum()) * int(cols.sum())
    filled = "" if count == box else f" ({count / box:.0%} of them)" if where else ", spread over all rows and columns"
    return f"{count} of {total} elements{', ' if where else ''}{' and '.join(where)}{filled}"


def _not_written(out: Tensor, found: Measurement, initial: Tensor | None) -> list[Diagnosis]:
    """Whole rows or tiles of wrong elements that still hold what was there before: zeros, NaN, one number, `initial`."""
    wrong = found.outside
    if not bool(wrong.any()):
        return []
    held: list[tuple[str, Tensor]] = []
    if initial is not None:
        held.append(("what was there before", (out == initial) | (out.isnan() & initial.isnan())))
    finite = out[wrong & ~out.isnan()]
    held.append(("NaN", out.isnan()))
    held.append(("zeros", out == 0))
    if finite.numel():
        common = finite.double().mode().values
        if float(common) != 0:
            held.append((f"the number {float(common):g}", out.double() == common))
    for what, holds in held:
        untouched = wrong & holds
        rows, cols = untouched.any(1), untouched.any(0)
        box = holds & rows.unsqueeze(1) & cols.unsqueeze(0)
        size = int(rows.sum()) * int(cols.sum())
        # one stray element may hold anything; a place left out is filled, and explains every wrong element
        if size > 1 and int(box.sum()) == size and not bool((wrong & ~box).any()):
            return [Diagnosis("not written", f"a part of the output is never written: it holds {what}", _part(rows, cols))]
    return []


def _part(rows: Tensor, cols: Tensor) -> str:
    text = []
    for name, mask in (("row", rows), ("column", cols)):
        if not bool(mask.all()):
            text.append(f"{name}s {_spans(mask)}{_tile(mask)}")
    return ", ".join(text) if text else "all of it"


def _tile(mask: Tensor) -> str:
    """The largest power of two that divides the ends of every run (the matrix's own end aside), if it is above 1."""
    ends = [e for a, b in _runs(mask) for e in (a, b + 1) if e not in (0, mask.numel())]
    size = min((e & -e for e in ends), default=1)
    return f" (tiles of {size})" if size > 1 else ""


def _unknown(out: Tensor, found: Measurement, near: tuple[float, Diagnosis] | None) -> Diagnosis:
    """Where and how much, and the mistake that comes nearest if it explains most of the error."""
    error = relative_error(out, found.expected)
    wrong = found.outside if bool(found.outside.any()) else found.inexact
    where = (
        describe(wrong) if bool(found.outside.any()) else f"no element beyond its bound; {describe(wrong)} not rounded right"
    )
    detail = f"{where}; relative error {error:.3g}"
    if near is not None and near[0] < NEAR * error:
        cause = near[1]
        detail += f"; nearest: {cause} leaves {near[0]:.2g}"
    return Diagnosis("unknown", "wrong, cause unknown", detail, exact=False)
