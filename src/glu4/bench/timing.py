"""Times of several contenders on one GPU, in turns, so that clock and temperature drift hits all alike.

A contender is a list of calls, one for each copy of its operands. Its calls are captured in one CUDA graph, as many rounds over
the copies as take about `REPLAY_MS`. In its turn a contender's graph is replayed `WARM_UPS` times untimed and `TIMED` times
timed, on end, after a rest of `REST_S`: large problems run at the power limit, where the clock takes 0.3 s to settle to what
the running kernel draws, and a chip that others have warmed draws more (docs/benchmarks.md has the measurement). Each has
`TURNS` turns. A call's time is a replay's, by CUDA events, divided by the number of calls in it.

Where many are candidates and only the fastest is asked for, `LOOKS` replays of each, without a rest, tell who is worth turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

__all__ = [
    "COLD_BYTES",
    "LOOKS",
    "REPLAY_MS",
    "REST_S",
    "TIMED",
    "TURNS",
    "WARM_UPS",
    "Call",
    "Cuda",
    "Failure",
    "Recorder",
    "Slower",
    "Timing",
    "copies",
    "interleaved",
    "listed",
]

REPLAY_MS = 8.0
REST_S = 0.4
WARM_UPS = 40
TIMED = 41
TURNS = 2
LOOKS = 5
COLD_BYTES = 200_000_000  # copies of one contender in all: four times the 50 MB of L2 of an H100 or H200
HANG_S = 20.0

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median and minimum over `samples` replays."""

    us: float
    us_min: float
    samples: int


@dataclass(frozen=True)
class Failure:
    """Why there is no time. `fatal`: the device does not answer any more, so nothing else can be measured in this process."""

    message: str
    fatal: bool = False


@dataclass(frozen=True)
class Slower:
    """A first look took `us` a call, too much above the fastest's for a turn."""

    us: float


def listed(timing: Timing | Slower | Failure) -> list[float] | str:
    """[median, minimum] as trials write them, or why there is no time."""
    return [timing.us, timing.us_min] if isinstance(timing, Timing) else str(timing)


class Recorder(Protocol):
    """What timing needs of a device; a test gives its own.

    capture  record `work` once, so that the returned function repeats it
    elapsed  milliseconds that `work` takes on the device; raises TimeoutError when it does not end
    rest     leave the device alone for some seconds
    alive    whether the device still answers after an error
    """

    def capture(self, work: Call) -> Call: ...
    def elapsed(self, work: Call) -> float: ...
    def rest(self, seconds: float) -> None: ...
    def alive(self) -> bool: ...


class Cuda:
    """The current CUDA device: CUDA graphs and events."""

    def __init__(self, hang_s: float = HANG_S) -> None:
        self._hang_s = hang_s
        self._hung = False
        cuda: Any = torch.cuda  # parts of it have no types
        self._start, self._end = (cuda.Event(enable_timing=True) for _ in range(2))
        self._side = cuda.Stream()

    def capture(self, work: Call) -> Call:
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            work()  # compiles and allocates what may not be done during a capture
        torch.cuda.current_stream().wait_stream(self._side)
        self._end.record()
        self._wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def elapsed(self, work: Call) -> float:
        self._start.record()
        work()
        self._end.record()
        self._wait()
        return float(self._start.elapsed_time(self._end))

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def _wait(self) -> None:
        deadline = time.monotonic() + self._hang_s
        while not self._end.query():
            if time.monotonic() > deadline:
                self._hung = True
                raise TimeoutError(f"the kernel did not end within {self._hang_s:g} s")
            time.sleep(2e-5)

    def alive(self) -> bool:
        if self._hung:
            return False
        try:
            torch.cuda.synchronize()
            return bool(torch.ones(1, device="cuda").item() == 1.0)
        except RuntimeError:
            return False


@dataclass
class _Runner:
    replay: Call
    calls: int
    times: list[float] = field(default_factory=list)


def copies(nbytes: int) -> int:
    """How many copies of `nbytes` of operands leave none of one in L2 when its turn comes again."""
    return max(2, -(-COLD_BYTES // max(1, nbytes)))


def describe(error: BaseException) -> str:
    """One line: the error's type and its message, at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _runner(calls: Sequence[Call], recorder: Recorder) -> _Runner:
    def rounds(count: int) -> Call:
        def work() -> None:
            for _ in range(count):
                for call in calls:
                    call()

        return work

    once = recorder.capture(rounds(1))
    recorder.elapsed(once)
    count = max(1, round(REPLAY_MS / max(recorder.elapsed(once), 1e-3)))
    return _Runner(recorder.capture(rounds(count)) if count > 1 else once, count * len(calls))


def interleaved(
    contenders: Mapping[str, Sequence[Call]], recorder: Recorder, margin: float | None = None
) -> dict[str, Timing | Failure | Slower]:
    """The time of each contender, by name. One that raises or hangs is a Failure and leaves the others alone.

    margin  whose first look takes more than that share above the fastest's gets no turn: Slower. None: all have turns

    After a fatal Failure the others keep the replays timed until then, and those that have none are Failures too.
    """
    failures: dict[str, Failure] = {}
    runners: dict[str, _Runner] = {}

    def guarded(name: str, step: Callable[[], None]) -> bool:
        """Whether to go on; an error of `step` is noted under `name`."""
        try:
            step()
        except Exception as error:
            failures[name] = Failure(describe(error), fatal=not recorder.alive())
            runners.pop(name, None)
            return not failures[name].fatal
        return True

    def prepare(name: str, calls: Sequence[Call]) -> None:
        runners[name] = _runner(calls, recorder)

    def replay(runner: _Runner, timed: bool) -> None:
        ms = recorder.elapsed(runner.replay)
        if timed:
            runner.times.append(ms / runner.calls * 1e3)

    going = all(guarded(name, lambda: prepare(name, calls)) for name, calls in contenders.items())  # noqa: B023

    def turn(name: str, runner: _Runner, warm_ups: int, timed: int) -> None:
        nonlocal going
        for i in range(warm_ups + timed):
            if going and name in runners:
                going = guarded(name, lambda: replay(runner, i >= warm_ups))  # noqa: B023

    slower: dict[str, Slower] = {}
    if margin is not None and len(runners) > 1:
        for name, runner in list(runners.items()):
            turn(name, runner, 2, LOOKS)
        looks = {name: statistics.median(runner.times) for name, runner in runners.items() if runner.times}
        for name, us in looks.items():
            runners[name].times.clear()
            if us > (1 + margin) * min(looks.values()):
                slower[name] = Slower(us)
                del runners[name]
    for _ in range(TURNS):
        for name, runner in list(runners.items()):
            recorder.rest(REST_S)
            turn(name, runner, WARM_UPS, TIMED)
    found: dict[str, Timing | Failure | Slower] = {**failures, **slower}
    for name in contenders:
        times = runners[name].times if name in runners else []
        if times:
            found[name] = Timing(statistics.median(times), min(times), len(times))
        elif name not in found:
            found[name] = Failure("not timed: the device was lost before", fatal=True)
    return {name: found[name] for name in contenders}
