"""The clock: pairs of times in random order, and what they say of a ratio.

A sample is one replay of the baseline and one of the entry, in an order that a coin decides. Each replay goes over all copies
of the operands, so that none is in L2 when its turn comes. The number of pairs is fixed before the first is timed. The
logarithms of the ratios have a mean with a t interval; the verdict is faster or slower when all of the interval (95 %)
lies on one side of 1.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from glu4.bench.timing import REPLAY_MS, Call, Recorder

__all__ = ["Pair", "Ratio", "Wall", "combined", "outcome", "pairs", "ratio", "t_quantile"]

WARM_UPS = 3  # pairs before those that count


@dataclass(frozen=True)
class Pair:
    """Microseconds a call of both, and whether the entry ran first."""

    baseline_us: float
    entry_us: float
    entry_first: bool


@dataclass(frozen=True)
class Ratio:
    """Baseline time over entry time, above 1 where the entry is faster, with its 95 % interval."""

    value: float
    low: float
    high: float


class Wall:
    """A Recorder for work on the CPU: it repeats the work and reads the process's monotonic clock."""

    def capture(self, work: Call) -> Call:
        return work

    def elapsed(self, work: Call) -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    def alive(self) -> bool:
        return True

    def rest(self, seconds: float) -> None:
        return None


def _replay(calls: Sequence[Call], recorder: Recorder, replay_ms: float) -> tuple[Call, int]:
    """(a replay of about `replay_ms`, the calls in it)."""

    def rounds(count: int) -> Call:
        def work() -> None:
            for _ in range(count):
                for call in calls:
                    call()

        return work

    once = recorder.capture(rounds(1))
    recorder.elapsed(once)
    count = max(1, round(replay_ms / max(recorder.elapsed(once), 1e-3)))
    return (recorder.capture(rounds(count)) if count > 1 else once), count * len(calls)


def pairs(
    baseline: Sequence[Call], entry: Sequence[Call], recorder: Recorder, count: int, seed: int, replay_ms: float = REPLAY_MS
) -> list[Pair]:
    """`count` timed pairs; raises what a call raises, and TimeoutError for a kernel that hangs."""
    both = (_replay(baseline, recorder, replay_ms), _replay(entry, recorder, replay_ms))
    coin = random.Random(seed)
    found = []
    for i in range(WARM_UPS + count):
        first = coin.random() < 0.5
        us = [0.0, 0.0]
        for which in (1, 0) if first else (0, 1):
            replay, calls = both[which]
            us[which] = recorder.elapsed(replay) / calls * 1e3
        if i >= WARM_UPS:
            found.append(Pair(us[0], us[1], first))
    return found


# ---- statistics ----


def ratio(found: Sequence[Pair]) -> Ratio:
    """Of one shape."""
    return _interval([math.log(p.baseline_us / p.entry_us) for p in found])


def combined(shapes: Sequence[Sequence[Pair]]) -> Ratio:
    """The geometric mean over shapes with as many pairs each; pair i of one shape is as good as independent of another's."""
    logs = [[math.log(p.baseline_us / p.entry_us) for p in found] for found in shapes]
    return _interval([statistics.fmean(column) for column in zip(*logs, strict=True)])


def _interval(logs: Sequence[float]) -> Ratio:
    middle = statistics.fmean(logs)
    half = t_quantile(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def outcome(r: Ratio) -> str:
    return "faster" if r.low > 1 else "slower" if r.high < 1 else "no difference"


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Of Student's t, by bisection of its integral (Simpson's rule over the angle, for which the integrand is cos^(n-1))."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def below(t: float) -> float:
        end, steps = math.atan(t / math.sqrt(freedom)), 200
        values = [math.cos(end * i / steps) ** (freedom - 1) for i in range(steps + 1)]
        return 0.5 + scale * end / steps / 3 * (values[0] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]) + values[-1])

    low, high = 0.0, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return low
