"""Stand-ins for a GPU: a recorder with a clock of its own, and contenders that compute on the CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from glu4.bench.contender import Contender
from glu4.bench.operands import FORMATS, Operands
from glu4.bench.timing import Call


class FakeGpu:
    """Time passes where a call says so with `spend`, and by `tick` milliseconds whenever it is asked for."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now = 0.0
        self.tick = tick
        self.lost = False
        self.rests: list[float] = []

    def spend(self, ms: float) -> None:
        self.now += ms

    def capture(self, work: Call) -> Call:
        work()
        return work

    def elapsed(self, work: Call) -> float:
        start = self.now
        self.now += self.tick
        work()
        return self.now - start

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)

    def alive(self) -> bool:
        return not self.lost


def right(operands: Operands, x_format: str) -> Tensor:
    """The specified result, rounded once."""
    from glu4.reference import round_once

    return round_once(operands.expected(x_format), FORMATS[x_format])


def contender(
    name: str,
    gpu: FakeGpu,
    ms: float = 0.1,
    output: Callable[[Operands], Tensor] = lambda o: right(o, "float16"),
    roundings: int = 1,
    **kwargs: object,
) -> Contender:
    """Two calls that take `ms` and return `output`."""

    def prepare(operands: Operands) -> list[Callable[[], Tensor]]:
        result = output(operands)

        def call() -> Tensor:
            gpu.spend(ms)
            return result

        return [call, call]

    return Contender(name, "nvfp4", "float16", roundings, prepare, **kwargs)  # type: ignore[arg-type]
