"""A recording in time: each warp and each engine takes its time, and what waits goes on when what it waits for has come.

A warp's own instructions take a fixed number of ticks each; an operation begins when it has been issued, when those before it
are done and when its engine is free, keeps the engine busy for its bytes or products, and is done a latency later. Engines are
of one CTA, as of one SM, and take operations in the order in which they become ready. Every cluster starts at 0.

Not counted: the other warps' use of issue slots, memory that engines and warps of other SMs share, latencies of plain loads.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from glu4.emulator.recording import CLASSES, Node, Recording, Signal, Trace, Unit

__all__ = ["ENGINES", "Event", "Lane", "Link", "Mark", "Rates", "Timeline", "replay"]

Triple = tuple[int, int, int]
_Rank = tuple[Any, ...]
ENGINES = ("TMA loads", "bulk copies", "cp.async", "st.async", "MMA (wgmma)", "MMA (tcgen05)", "tcgen05.cp", "TMEM ld/st",
           "TMA stores")  # fmt: skip


def _table(**values: float) -> Mapping[str, float]:
    return MappingProxyType(values)


@dataclass(frozen=True)
class Rates:
    """What things cost, in ticks; a tick stands for a clock of an SM. The defaults are nominal: round figures, no measurement.

    instruction: ticks of one warp's instruction, by class (special: exponentials, divisions and their kin, 4 lanes a clock;
    memory: plain loads and stores; product: mma.sync). bytes: that an engine moves in a tick. macs: products and sums in a
    tick, by operand type (data sheets of H100 and B200: 2048 for float16 on sm_90, doubled on sm_100, and for each halving of
    the operands). latency: ticks from the end of an operation's use of its engine to its completion.
    """

    instruction: Mapping[str, float] = field(default_factory=lambda: _table(alu=1, special=8, memory=4, product=16))
    bytes: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType(
            {"TMA loads": 64, "bulk copies": 64, "cp.async": 64, "st.async": 32, "tcgen05.cp": 128, "TMEM ld/st": 512,
             "TMA stores": 64}
        )
    )  # fmt: skip
    macs: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType(
            {"tf32 wgmma": 1024, "f16 wgmma": 2048, "f8 wgmma": 4096, "f16": 4096, "tf32": 2048, "i8": 8192, "f8f6f4": 8192,
             "mxf8f6f4": 8192, "mxf4": 16384, "mxf4nvf4": 16384}
        )
    )  # fmt: skip
    latency: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType(
            {"TMA loads": 600, "bulk copies": 600, "cp.async": 600, "st.async": 200, "MMA (wgmma)": 32, "MMA (tcgen05)": 32,
             "tcgen05.cp": 32, "TMEM ld/st": 16, "TMA stores": 400}
        )
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in CLASSES:
            if self.instruction.get(name, -1) < 0:
                raise ValueError(f"instruction: {name} needs a number of ticks that is not negative")
        for table in ("bytes", "macs"):
            for name, rate in getattr(self, table).items():
                if not rate > 0:
                    raise ValueError(f"{table}: the rate of {name} must be positive, got {rate}")
        if any(v < 0 for v in self.latency.values()):
            raise ValueError("latency: negative")

    def occupies(self, unit: Unit) -> float:
        """Ticks that an operation keeps its engine busy. Raises ValueError where there is no rate for it."""
        if not unit.engine or not (unit.bytes or unit.macs):
            return 0.0
        table, key, amount = ("macs", unit.product, unit.macs) if unit.macs else ("bytes", unit.engine, unit.bytes)
        if key not in getattr(self, table):
            raise ValueError(f"{table}: there is no rate for {key}")
        return float(amount / len(unit.ctas) / getattr(self, table)[key])

    def latency_of(self, unit: Unit) -> float:
        # a store's two halves: shared memory is read when the engine is done with it, the rest is the write
        return 0.0 if unit.kind.endswith(": read") else float(self.latency.get(unit.engine, 0))


@dataclass(frozen=True, slots=True, order=True)
class Lane:
    """A warp or an engine of one CTA."""

    cluster: int
    cta: Triple
    name: str

    @property
    def is_engine(self) -> bool:
        return not self.name.startswith("warp ")


@dataclass(frozen=True, slots=True)
class Event:
    """Something in a lane, from start to end in ticks.

    kind: "run", "wait", "arrive", "issue" or "stuck" of a warp; of an engine the operation's name. busy: ticks for which the
    engine is occupied, from the start on; of a warp, end - start but for waits. bytes, macs: of this CTA's share. line: in the
    PTX text, of a run its first. barrier, phase: of an mbarrier that is waited for or arrived at, else None.
    part: which lanes of a warp, numbered by branch.
    """

    lane: Lane
    start: float
    end: float
    kind: str
    busy: float = 0.0
    instructions: int = 0
    bytes: int = 0
    macs: int = 0
    line: int = 0
    last_line: int = 0
    source: str = ""
    barrier: str | None = None
    phase: int | None = None
    text: str = ""
    part: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """What came last to complete something, and a wait that it ended."""

    start: Lane
    end: Lane
    time: float
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A hazard where it was found."""

    lane: Lane
    time: float
    text: str


@dataclass(frozen=True)
class Timeline:
    """A run in time. events by start; links, hazards by time. unresolved: waits without a known cause, of no length."""

    rates: Rates
    events: tuple[Event, ...]
    links: tuple[Link, ...]
    hazards: tuple[Mark, ...]
    unresolved: int = 0

    @property
    def total(self) -> float:
        """Ticks from the start to the end of the last event."""
        return max((e.end for e in self.events), default=0.0)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """By cluster and CTA: engines, then warps."""
        return tuple(sorted({e.lane for e in self.events} | {m.lane for m in self.hazards}, key=_order))

    def busy(self, engine: str, cta: Triple | None = None) -> float:
        """Ticks for which lanes of a name ("MMA (tcgen05)", "TMA loads", "warp 0", ...) work; of one CTA, or of all in sum."""
        return sum(e.busy for e in self.events if e.lane.name == engine and cta in (None, e.lane.cta))

    def waits(self, warp: str, cta: Triple | None = None) -> float:
        """Ticks for which a warp waits; of one CTA, or of all in sum."""
        found = [e for e in self.events if e.kind == "wait" and e.lane.name == warp]
        return sum(e.end - e.start for e in found if cta in (None, e.lane.cta))


def _order(lane: Lane) -> tuple[int, Triple, int, int]:
    if lane.is_engine:
        return lane.cluster, lane.cta, 0, ENGINES.index(lane.name) if lane.name in ENGINES else len(ENGINES)
    return lane.cluster, lane.cta, 1, int(lane.name[5:])


def replay(recording: Recording, rates: Rates) -> Timeline:
    """Give times to a recording. Raises ValueError where the rates lack an engine's."""
    return _Replay(recording, rates).timeline()


class _Flow:
    """A trace on its way. at: the next node; entered: that node's cost is counted and it waits; time: now.

    begun, instructions, low, high: of what has run since the last event.
    """

    __slots__ = ("at", "begun", "entered", "high", "instructions", "lane", "low", "part", "source", "time", "trace")

    def __init__(self, trace: Trace, part: int) -> None:
        self.trace = trace
        self.part = part
        self.lane = Lane(trace.cluster, trace.cta, f"warp {trace.warp}")
        self.at = 0
        self.time = self.begun = 0.0
        self.entered = False
        self.instructions = 0
        self.low, self.high, self.source = 0, 0, ""


class _State:
    """A signal: how much is missing, when the last came and from where."""

    __slots__ = ("cause", "missing", "time", "waiting")

    def __init__(self, signal: Signal) -> None:
        self.missing = signal.parts
        self.time = 0.0
        self.cause: Lane | None = None
        self.waiting: list[Callable[[], None]] = []


class _Replay:
    def __init__(self, recording: Recording, rates: Rates) -> None:
        self.recording = recording
        self.rates = rates
        self.queue: list[tuple[float, _Rank, int, Callable[[], None]]] = []
        self.count = 0
        self.states: dict[int, _State] = {}
        self.free: dict[Lane, float] = defaultdict(float)
        self.events: list[Event] = []
        self.links: list[Link] = []
        self.marks: list[Mark] = []
        self.unresolved = 0

    def timeline(self) -> Timeline:
        parts: dict[Lane, int] = defaultdict(int)
        flows = []
        for trace in self.recording.traces:
            flow = _Flow(trace, 0)
            flow.part = parts[flow.lane]
            parts[flow.lane] += 1
            flows.append(flow)
            self.when([trace.start] if trace.start else [], 0.0, partial(self._start, flow))
        for unit in self.recording.units:
            rank = (1, *unit.ctas[0], unit.warp)  # at one time, warps by number: the order must not be the schedule's
            self.when([unit.starts, *unit.needs], 0.0, partial(self._operate, unit), rank)
        self._drain()
        # a wait whose cause was not recorded as such: go on without it, the one that is furthest behind first
        while open_flows := [f for f in flows if f.at < len(f.trace.nodes) and f.entered]:
            flow = min(open_flows, key=lambda f: f.time)
            self.unresolved += 1
            self._pass(flow, None, flow.time)
            self._drain()
        self._stick()
        self.events.sort(key=lambda e: (e.start, e.end))
        self.links.sort(key=lambda link: link.time)
        self.marks.sort(key=lambda mark: mark.time)
        return Timeline(self.rates, tuple(self.events), tuple(self.links), tuple(self.marks), self.unresolved)

    # time

    def _drain(self) -> None:
        while self.queue:
            heapq.heappop(self.queue)[-1]()

    def push(self, time: float, action: Callable[[], None], rank: _Rank = (0,)) -> None:
        self.count += 1
        heapq.heappush(self.queue, (time, rank, self.count, action))

    def state(self, signal: Signal) -> _State:
        found = self.states.get(id(signal))
        if found is None:
            found = self.states[id(signal)] = _State(signal)
        return found

    def when(self, signals: list[Signal], least: float, then: Callable[[float], None], rank: _Rank = (0,)) -> None:
        """Do something once all signals have come, at their latest time, but not before `least`."""
        missing = [s for s in map(self.state, signals) if s.missing > 0]
        if missing:
            missing[0].waiting.append(lambda: self.when(signals, least, then, rank))
            return
        time = max([least, *(self.state(s).time for s in signals)])
        self.push(time, lambda: then(time), rank)

    def give(self, signal: Signal, time: float, cause: Lane | None) -> None:
        state = self.state(signal)
        state.missing -= 1
        if time >= state.time or state.cause is None:
            state.time, state.cause = max(time, state.time), cause
        if not state.missing:
            waiting, state.waiting = state.waiting, []
            for action in waiting:
                action()

    # warps

    def _start(self, flow: _Flow, time: float) -> None:
        flow.time = flow.begun = time
        self._advance(flow)

    def _advance(self, flow: _Flow) -> None:
        """Run a warp up to a wait that is not over yet, or to its end."""
        nodes = flow.trace.nodes
        while flow.at < len(nodes):
            node = nodes[flow.at]
            self._enter(flow, node)
            signals = list(node.needs)
            if any(self.state(s).missing > 0 for s in signals):
                flow.entered = True
                self.when(signals, flow.time, partial(self._pass, flow, node))
                return
            last = max((self.state(s) for s in signals), key=lambda s: s.time, default=None)
            self._leave(flow, node, max(flow.time, last.time if last else 0.0), last.cause if last else None)

    def _enter(self, flow: _Flow, node: Node) -> None:
        """Count the instructions in front of a node."""
        if not any(node.counts):
            return
        if not flow.instructions:
            flow.begun, flow.low, flow.high, flow.source = flow.time, node.low, node.high, node.source
        flow.instructions += sum(node.counts)
        flow.time += sum(n * self.rates.instruction[c] for n, c in zip(node.counts, CLASSES))
        flow.low, flow.high = min(flow.low, node.low), max(flow.high, node.high)

    def _pass(self, flow: _Flow, node: Node | None, time: float) -> None:
        """A wait is over. node: which, or None to go on without what it waits for."""
        if not flow.entered or (node is not None and flow.trace.nodes[flow.at] is not node):
            return
        flow.entered = False
        at = flow.trace.nodes[flow.at]
        known = [self.state(s) for s in at.needs]
        last = max(known, key=lambda s: s.time, default=None)
        self._leave(flow, at, time, last.cause if last else None)
        self._advance(flow)

    def _leave(self, flow: _Flow, node: Node, time: float, cause: Lane | None) -> None:
        flow.at += 1
        waited = time > flow.time
        if node.kind not in ("fork", "join") or waited:
            self._flush(flow)
        signal = node.needs[0] if len(node.needs) == 1 else node.gives
        phase = signal if signal is not None and signal.kind == "phase" else None
        if node.kind in ("arrive", "issue", "stuck") or (node.kind == "wait" and waited):
            start = flow.time if node.kind == "wait" else time
            self.events.append(
                Event(flow.lane, start, time, node.kind, line=node.line, last_line=node.line, source=node.source,
                      barrier=phase.name if phase else None, phase=phase.phase if phase else None, text=node.text,
                      part=flow.part)
            )  # fmt: skip
        if node.kind == "wait" and waited and cause is not None:
            text = f"{cause.name} of CTA {cause.cta} ends: {flow.lane.name} {node.text}"
            self.links.append(Link(cause, flow.lane, time, text))
        if node.kind in ("hazard", "stuck"):
            self.marks.append(Mark(flow.lane, time, node.text))
        flow.time = time
        if node.gives is not None:
            self.give(node.gives, time, flow.lane)
        if flow.at == len(flow.trace.nodes):
            self._flush(flow)

    def _flush(self, flow: _Flow) -> None:
        """An event of the instructions since the last one."""
        if flow.instructions:
            self.events.append(
                Event(flow.lane, flow.begun, flow.time, "run", flow.time - flow.begun, flow.instructions, line=flow.low,
                      last_line=flow.high, source=flow.source, part=flow.part)
            )  # fmt: skip
        flow.instructions = 0

    def _stick(self) -> None:
        """What never goes on reaches to the end."""
        end = max((e.end for e in self.events), default=0.0)
        end += max(1.0, end / 20)
        self.events = [replace(e, end=end) if e.kind == "stuck" else e for e in self.events]

    # engines

    def _operate(self, unit: Unit, ready: float) -> None:
        """An operation is ready: give it its engine, of all CTAs at once."""
        lanes = [Lane(cluster, cta, unit.engine) for cluster, cta in unit.ctas] if unit.engine else []
        busy = self.rates.occupies(unit)
        start = max([ready, *(self.free[lane] for lane in lanes)]) if busy else ready
        end = start + busy + self.rates.latency_of(unit)
        text = unit.text or unit.kind
        for lane in lanes:
            if busy:
                self.free[lane] = start + busy
            self.events.append(
                Event(lane, start, end, unit.kind, busy, 0, unit.bytes // len(lanes), unit.macs // len(lanes), unit.line,
                      unit.line, unit.source, text=text)
            )  # fmt: skip
            self.marks += [Mark(lane, end, hazard) for hazard in unit.hazards]
        # a commit or an arrival has no engine: what it waited for is the cause
        cause = lanes[0] if lanes else max((self.state(s) for s in (unit.starts, *unit.needs)), key=lambda s: s.time).cause
        self.push(end, lambda: self._done(unit, end, cause))

    def _done(self, unit: Unit, time: float, cause: Lane | None) -> None:
        for signal in (unit.done, *unit.gives):
            self.give(signal, time, cause)
