"""Which backend runs a problem on a device, and the reason when another cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glu4.problem import GroupedProblem, Problem

__all__ = ["BACKENDS", "Candidate", "Explanation", "explain", "select"]

BACKENDS = ("portable",)


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


def _portable_reason(problem: Problem | GroupedProblem, device: torch.device) -> str:
    if device.type == "cpu":
        return "decodes exactly, a block at a time, and uses torch.matmul"
    reason = "fallback: there is no compiled kernel for this device yet; decodes a block at a time and uses torch.matmul"
    if isinstance(problem, GroupedProblem):
        reason += "; reads group_offsets on the host, so it synchronises and cannot be captured in a CUDA graph"
    return reason


def explain(problem: Problem | GroupedProblem, device: torch.device | str = "cpu") -> Explanation:
    """The backends that could run `problem` on `device`, which one is chosen, and why not the others."""
    device = torch.device(device)
    portable = Candidate("portable", True, _portable_reason(problem, device))
    return Explanation(problem, _describe(device), (portable,))


def select(problem: Problem | GroupedProblem, device: torch.device, backend: str | None) -> str:
    """The backend for a call; raises ValueError for an unknown name."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    return backend or "portable"
