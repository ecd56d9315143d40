"""The checker: is an output what the specification says, and if not, where, by how much, and what was computed instead?

Three layers, each with its derivation where it is computed:

  element  every element within the bound that follows from sum|a*b| (metrics, top); NaN and infinities where they belong
  norm     sums of squares over everything, every row and every column within what output rounding and float32
           accumulation leave of them (metrics.NormSums); this is the sharp one: it sees a second 16-bit rounding
  exact    for cases that have one right answer: equality bit for bit, the sign of a zero aside (cases)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glu4.reference import round_once
from glu4.verify.case import Case
from glu4.verify.diagnosis import Diagnosis, describe, same_shape
from glu4.verify.diagnosis import diagnose as _diagnose
from glu4.verify.metrics import Measurement, measure, relative_error

__all__ = ["Diagnosis", "Finding", "Report", "Verdict", "check", "check_backend"]


@dataclass(frozen=True)
class Finding:
    """One failed check: `layer` is shape, dtype, element, norm or exact; `message` says what, where and how much."""

    layer: str
    message: str


@dataclass(frozen=True)
class Verdict:
    """What `check` found.

    findings   the failed checks; none when ok
    diagnosis  the hypotheses that reproduce a wrong result, or one that says the cause is unknown
    stats      relative_error (Frobenius, against the unrounded value), rounding_error (the part of it that the output
               type makes unavoidable), outside (elements beyond their bound), inexact (elements not equal to the value
               rounded once), elements, and measured / limit for each norm
    """

    ok: bool
    findings: list[Finding]
    diagnosis: list[Diagnosis] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)

    def summary(self) -> str:
        """One line when right; otherwise what failed first and what reproduces it."""
        if self.ok:
            error, rounding = self.stats.get("relative_error", 0.0), self.stats.get("rounding_error", 0.0)
            return f"right: relative error {error:.3g}, of which {rounding:.3g} is output rounding"
        causes = "; or ".join(str(d) for d in self.diagnosis)
        return f"wrong: {self.findings[0].message}" + (f". Diagnosis: {causes}" if causes else "")


@dataclass(frozen=True)
class Report:
    """Verdicts of many cases, in order."""

    verdicts: list[tuple[Case, Verdict]]

    @property
    def ok(self) -> bool:
        return all(v.ok for _, v in self.verdicts)

    def summary(self) -> str:
        """How many cases are right, and the first wrong one."""
        wrong = [(case, v) for case, v in self.verdicts if not v.ok]
        count = len(self.verdicts)
        if not wrong:
            return f"all {count} cases right"
        case, verdict = wrong[0]
        return f"{len(wrong)} of {count} cases wrong; first {case.name} (seed {case.seed}): {verdict.summary()}"


def check(case: Case, output: Tensor, *, initial: Tensor | None = None, diagnose: bool = True) -> Verdict:
    """Check `output` against the specification of `case`.

    output    shape case.out_shape and dtype case.out_dtype, on any device; a grouped output may have more rows, which are
              not part of the result; TypeError for anything but a tensor
    initial   what the output's memory held before the call, so that parts never written can be told
    diagnose  say what was computed instead, where that can be found out
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"output: expected a torch.Tensor, got {type(output).__name__}")
    wrong_form = _check_form(case, output)
    if wrong_form:
        shape_only = diagnose and wrong_form[0].layer == "shape"
        return Verdict(False, wrong_form, same_shape(case, output) if shape_only else [])
    rows = case.out_shape[0]
    if case.group_offsets is not None:
        output, initial = output[:rows], None if initial is None else initial[:rows]
    found = measure(case, output)
    findings = _findings(case, output, found)
    verdict = Verdict(not findings, findings, stats=_stats(case, output, found))
    if findings and diagnose:
        verdict.diagnosis.extend(_diagnose(case, output, found, initial))
    return verdict


def check_backend(run: Callable[[Case], Tensor], cases: Iterable[Case], *, diagnose: bool = True) -> Report:
    """Run every case with `run` and check what it returns; an exception of `run` passes through."""
    return Report([(case, check(case, run(case), diagnose=diagnose)) for case in cases])


def _check_form(case: Case, output: Tensor) -> list[Finding]:
    shape = tuple(output.shape)
    more_rows = case.group_offsets is not None and len(shape) == 2 and shape == (case.x.shape[0], case.gate.rows)
    if shape != case.out_shape and not more_rows:
        return [Finding("shape", f"the output has shape {list(shape)}, expected {list(case.out_shape)}")]
    if output.dtype != case.out_dtype:
        return [Finding("dtype", f"the output has dtype {output.dtype}, expected {case.out_dtype}")]
    return []


def _stats(case: Case, output: Tensor, found: Measurement) -> dict[str, float]:
    rounded = round_once(found.expected, case.out_dtype)
    return {
        "elements": float(found.expected.numel()),
        "outside": float(found.outside.sum()),
        "inexact": float(found.inexact.sum()),
        "relative_error": relative_error(output.detach().cpu().reshape(found.expected.shape), found.expected),
        "rounding_error": relative_error(rounded, found.expected),
        **found.norm_ratios,
    }


def _findings(case: Case, output: Tensor, found: Measurement) -> list[Finding]:
    out = output.detach().cpu().reshape(found.expected.shape)
    findings = []
    if bool(found.outside.any()):
        findings.append(Finding("element", _element_message(case, out, found)))
    above = {name: ratio for name, ratio in found.norm_ratios.items() if ratio > 1}
    if above:
        name = max(above, key=above.__getitem__)
        error, rounding = (relative_error(t, found.expected) for t in (out, round_once(found.expected, out.dtype)))
        text = (
            f"relative error {error:.3g} where output rounding alone makes {rounding:.3g}; "
            f"the {name} norm is {above[name]:.3g} times what a right result may reach"
        )
        findings.append(Finding("norm", text))
    if case.exact and bool(found.inexact.any()):
        findings.append(Finding("exact", _exact_message(case, out, found)))
    return findings


def _element_message(case: Case, out: Tensor, found: Measurement) -> str:
    flat = (out.double() - found.expected).abs().nan_to_num(nan=torch.inf).where(found.outside, -1.0).argmax()
    row, col = divmod(int(flat), out.shape[1])
    got, want = float(out[row, col]), float(found.expected[row, col])
    return f"{describe(found.outside)} cannot be right; the farthest, [{row}, {col}], is {got:.6g}, expected {want:.6g}"


def _exact_message(case: Case, out: Tensor, found: Measurement) -> str:
    row, col = (int(i) for i in found.inexact.nonzero()[0])
    want = float(round_once(found.expected[row, col], case.out_dtype))
    return (
        f"{describe(found.inexact)} of an exact case differ in their bits; the first, [{row}, {col}], "
        f"is {float(out[row, col])!r}, expected {want!r}"
    )
