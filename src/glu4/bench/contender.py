"""What is measured: glu4 and its peers in one form, and the row that a measurement of one of them makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import Tensor

from glu4.bench.operands import Operands
from glu4.problem import GroupedProblem, Problem

__all__ = ["Contender", "Row", "Shape"]

Shape = tuple[int, int, int] | tuple[int, int, int, str]
Weights = Literal["nvfp4", "16-bit"]


def _runs() -> str | None:
    return None


@dataclass(frozen=True)
class Contender:
    """One implementation of silu(x @ gate^T) * (x @ up^T).

    weights    what its weights are kept in; "16-bit" ones were decoded beforehand
    x_format   of the activations: "float16", "bfloat16" or "nvfp4"
    roundings  to 16 bits, from the sums to the result: 1 fused, 3 when gate and up are written in 16 bits on the way
    prepare    one call for each copy of the operands; each returns the output `[m, n]`. Preparing is not timed
    missing    why it cannot run here, in one sentence; None when it can
    specified  held to the specification itself, which a peer is not: see `Operands.check`
    config     which kernel of its own, where there are several; chosen: the one that a user gets
    """

    name: str
    weights: Weights
    x_format: str
    roundings: int
    prepare: Callable[[Operands], list[Callable[[], Tensor]]]
    missing: Callable[[], str | None] = _runs
    specified: bool = False
    config: str = ""
    chosen: bool = True

    @property
    def key(self) -> str:
        """Its name, and its kernel's when it is not the one that a user gets."""
        return self.name if self.chosen else f"{self.name}:{self.config}"


@dataclass(frozen=True)
class Row:
    """One contender on one shape. us, us_min: microseconds a call, median and minimum of `samples` replays; None when it was
    not timed, and `note` says why. limit_us: of `glu4 roofline`, with NVFP4 weights whatever the contender holds. case: of a
    grouped case its name, of whose m tokens `experts` experts have some; empty for a dense shape."""

    peer: str
    m: int
    n: int
    k: int
    us: float | None
    us_min: float | None
    commit: str = ""
    config: str = ""
    chosen: bool = False
    variant: str = ""
    x_format: str = ""
    weights: str = ""
    backend: str = ""
    limit_us: float | None = None
    max_rel_err: float | None = None
    fro_rel_err: float | None = None
    samples: int = 0
    note: str = ""
    case: str = ""
    experts: int = 0

    @property
    def shape(self) -> Shape:
        """What tells problems apart: the sizes, and a grouped case's name."""
        return (self.m, self.n, self.k, self.case) if self.case else (self.m, self.n, self.k)

    @property
    def problem(self) -> Problem | GroupedProblem:
        x_format = self.x_format or "float16"
        if self.case:
            return GroupedProblem(self.m, self.experts, self.n, self.k, x_format=x_format)
        return Problem(self.m, self.n, self.k, x_format=x_format)

    @property
    def tflops(self) -> float | None:
        """4MNK operations over the median."""
        return self.problem.flops / self.us * 1e-6 if self.us else None

    @property
    def gb_s(self) -> float | None:
        """Bytes of the contender's own operands and its output over the median: a 16-bit weight takes 2, in NVFP4 9/16.
        None too where the row does not say what it holds."""
        if not (self.us and self.weights):
            return None
        matrices = 2 * (self.experts if self.case else 1)
        more = matrices * self.n * (2 * self.k - self.k * 9 // 16) if self.weights == "16-bit" else 0
        return (self.problem.bytes + more) / self.us * 1e-3

    @property
    def percent_of_limit(self) -> float | None:
        """`limit_us` over the median."""
        return 100 * self.limit_us / self.us if self.us and self.limit_us is not None else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without what is empty; `us` and `us_min` are always there."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        stored = {k: v for k, v in finite.items() if k in ("us", "us_min") or v not in (None, "")}
        if not self.case:
            del stored["experts"]
        computed = {"tflops": self.tflops, "gb_s": self.gb_s, "percent_of_limit": self.percent_of_limit}
        return stored | {k: round(v, 1) for k, v in computed.items() if v is not None}

    @classmethod
    def read(cls, entry: Any) -> Row:
        """A row of a recorded run, of an earlier form too; raises ValueError when it says too little."""
        if not isinstance(entry, dict) or not _tells(entry):
            raise ValueError(f"rows: expected peer, m, n, k, us and us_min in each, got {entry!r:.200}")
        known = {f.name for f in fields(cls)}
        row = cls(**{k: v for k, v in entry.items() if k in known})
        _ = row.problem  # its own message for sizes that no problem has
        return row


def _tells(entry: dict[str, Any]) -> bool:
    sizes = all(type(entry.get(name)) is int for name in ("m", "n", "k"))
    times = all(name in entry and isinstance(entry[name], (int, float, type(None))) for name in ("us", "us_min"))
    return sizes and times and isinstance(entry.get("peer"), str)
