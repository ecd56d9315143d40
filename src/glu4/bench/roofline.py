"""The least time a problem can take on a device: one formula for every table, plot and ratio in the project.

    time = max(bytes / bandwidth, flops / rate)

`bytes` counts every operand once and the output once, without padding; `flops` counts multiplies and adds of the matrix
products. Both come from `glu4.problem`, and problems that run as one launch (a group) are summed before the formula.
With measured rates the result is a measured-rate limit, which a lucky run may pass by a few percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glu4.bench.devices import Device
from glu4.problem import GroupedProblem, Problem

__all__ = ["Limit", "limit"]


@dataclass(frozen=True)
class Limit:
    """Seconds that moving `bytes` and computing `flops` take on one device at least."""

    bytes: int
    flops: int
    memory_s: float
    compute_s: float

    @property
    def time_s(self) -> float:
        return max(self.memory_s, self.compute_s)

    @property
    def bound(self) -> str:
        """ "memory" or "compute": which of the two is the longer."""
        return "memory" if self.memory_s >= self.compute_s else "compute"


def limit(problems: Problem | GroupedProblem | Sequence[Problem], device: Device) -> Limit:
    """The limit of one problem, or of several that run as one launch; an empty sequence takes no time."""
    several = [problems] if isinstance(problems, (Problem, GroupedProblem)) else problems
    nbytes = sum(p.bytes for p in several)
    flops = sum(p.flops for p in several)
    return Limit(nbytes, flops, nbytes / device.bandwidth, flops / device.flops)
