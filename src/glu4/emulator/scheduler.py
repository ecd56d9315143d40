"""Schedules: which warp runs next and for how long, and when asynchronous operations complete.

All choices come from one seeded generator, so that a run is repeated by its schedule's name and seed.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from glu4.emulator.async_queue import AsyncQueue, Operation

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["Schedule", "schedule"]


class Schedule:
    """Eager: operations complete when issued; warps take turns."""

    name = "eager"
    eager = True
    quantum = 256

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.random = random.Random(seed)

    def pick(self, ready: list[Split]) -> int:
        """Index of the split to run."""
        return 0

    def instructions(self) -> int:
        """How many it may run."""
        return self.quantum

    def completes(self, queue: AsyncQueue) -> Operation | None:
        """An operation to complete between two turns, if any."""
        return None

    def forced(self, eligible: list[Operation]) -> Operation:
        """The one to complete when nothing else can happen."""
        return eligible[0]

    def gives_up(self) -> bool:
        """Whether a try_wait whose phase is not complete returns false at once rather than waits."""
        return False

    def refuses(self) -> bool:
        """Whether a cluster that has not been launched is kept from the running one that asks for it."""
        return False

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


class _Lazy(Schedule):
    """Operations complete only when nothing else can happen, the youngest first."""

    name = "lazy"
    eager = False
    quantum = 4096

    def forced(self, eligible: list[Operation]) -> Operation:
        return eligible[-1]


class _Random(Schedule):
    """Turns of random length; operations complete at random, in runs that favour early or late; some warps are kept back."""

    name = "random"
    eager = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.scale = self.random.choice((2, 16, 64, 256, 1024))
        self.chance = self.random.choice((0.02, 0.2, 0.6))
        self.held: int | None = self.random.choice((None, 0, 1, 2, 3))
        self.impatience = self.random.choice((0.0, 0.1))

    def pick(self, ready: list[Split]) -> int:
        if self.held is not None and len(ready) > 1:
            others = [i for i, s in enumerate(ready) if (s.warp.number + s.warp.cta.rank) % 4 != self.held]
            if others and self.random.random() < 0.98:
                return self.random.choice(others)
        return self.random.randrange(len(ready))

    def instructions(self) -> int:
        return 1 + int(self.random.expovariate(1.0 / self.scale))

    def completes(self, queue: AsyncQueue) -> Operation | None:
        if queue.pending and self.random.random() < self.chance:
            eligible = queue.eligible()
            return self.random.choice(eligible) if eligible else None
        return None

    def forced(self, eligible: list[Operation]) -> Operation:
        return self.random.choice(eligible)

    def gives_up(self) -> bool:
        return self.random.random() < self.impatience

    def refuses(self) -> bool:
        return self.random.random() < 0.05


_SCHEDULES: dict[str, type[Schedule]] = {"eager": Schedule, "lazy": _Lazy, "random": _Random}


def schedule(name: str, seed: int = 0) -> Schedule:
    """A schedule by name: eager, lazy or random. Raises ValueError for another name."""
    if name not in _SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(_SCHEDULES)}, got {name}")
    return _SCHEDULES[name](seed)
