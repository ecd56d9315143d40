"""Which backend runs a problem on a device, and the reason when another cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glu4.backends.hopper import launch as hopper
from glu4.backends.hopper.config import SHIPPED, legal
from glu4.errors import UnsupportedError
from glu4.problem import GroupedProblem, Problem

__all__ = ["BACKENDS", "Candidate", "Explanation", "explain", "select"]

BACKENDS = ("hopper", "portable")


@dataclass(frozen=True)
class Candidate:
    """One backend's answer for a problem: it can run it, or the reason why not."""

    backend: str
    can_run: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The backends for a problem on a device, best first; `chosen` is the first that can run it."""

    problem: Problem | GroupedProblem
    device: str
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> str:
        return next(c.backend for c in self.candidates if c.can_run)

    def __str__(self) -> str:
        lines = [f"{self.problem.operation} on {self.device}: {self.chosen}"]
        lines += [f"  {c.backend}: {'yes' if c.can_run else 'no'}, {c.reason}" for c in self.candidates]
        return "\n".join(lines)


def _describe(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, sm_{major}{minor})"


def _hopper_refusal(problem: Problem | GroupedProblem, device: torch.device) -> str | None:
    """Why the Hopper kernels cannot run `problem` on `device`; None when they can, given packed weights."""
    if not hopper.is_hopper(device):
        return "needs a GPU of compute capability 9.0"
    reasons = [legal(config, problem) for config in SHIPPED]
    if all(reasons):
        return reasons[0]
    if isinstance(problem, Problem) and not hopper.available(problem):
        return "its kernels are not compiled here; run glu4 compile"
    return None


def _portable_reason(problem: Problem | GroupedProblem, device: torch.device) -> str:
    how = "decodes exactly, a block at a time, and uses torch.matmul"
    if device.type == "cpu":
        return how
    reason = f"fallback on every device: {how}"
    if isinstance(problem, GroupedProblem):
        reason += "; reads group_offsets on the host, so it synchronises and cannot be captured in a CUDA graph"
    return reason


def explain(problem: Problem | GroupedProblem, device: torch.device | str = "cpu") -> Explanation:
    """The backends that could run `problem` on `device`, which one is chosen, and why not the others.

    The Hopper backend runs weights that `GatedWeights.prepare` has packed; others go to the portable one.
    """
    if not isinstance(problem, (Problem, GroupedProblem)):
        raise TypeError(f"problem: expected a glu4.Problem or glu4.GroupedProblem, got {type(problem).__name__}")
    device = torch.device(device)
    refusal = _hopper_refusal(problem, device)
    candidates = (
        Candidate("hopper", refusal is None, refusal or "weights from GatedWeights.prepare, decoded in registers"),
        Candidate("portable", True, _portable_reason(problem, device)),
    )
    return Explanation(problem, _describe(device), candidates)


def packs(device: torch.device) -> bool:
    """Whether `GatedWeights.prepare` should pack for `device`: a Hopper GPU for which kernels are there."""
    if not hopper.is_hopper(device):
        return False
    return any(hopper.available(Problem(1, 64, 64, x_format="float16", out_dtype=t)) for t in (torch.float16, torch.bfloat16))


def select(problem: Problem | GroupedProblem, device: torch.device, backend: str | None, packed: bool = False) -> str:
    """The backend for a call: "hopper" for packed weights where it can run, else "portable".

    Raises ValueError for an unknown `backend`, UnsupportedError when the one insisted on cannot run.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "portable" or (backend is None and not packed):
        return "portable"
    refusal = _hopper_refusal(problem, device)
    if refusal is None and not packed:
        refusal = "its weights are not packed; use GatedWeights.prepare"
    if refusal is None:
        return "hopper"
    if backend == "hopper":
        raise UnsupportedError(f"backend hopper: {refusal}")
    return "portable"
