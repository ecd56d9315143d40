"""What ran: for each warp its instructions, waits and arrivals in program order, and who waited for whom.

A recording holds causes, not times: which arrivals and copies completed a phase of an mbarrier, which waits needed that phase,
which operations a group holds. `replay` gives times to them, so that the turns of the schedule that ran leave no trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glu4.emulator.async_queue import AsyncQueue, Operation
    from glu4.emulator.isa.mbarrier import MBarrier
    from glu4.emulator.machine import Machine
    from glu4.emulator.program import FunctionCode
    from glu4.emulator.replay import Event, Rates, Timeline
    from glu4.emulator.split import Split

__all__ = ["CLASSES", "Node", "Recorder", "Recording", "Signal", "Trace", "Unit"]

CLASSES = ("alu", "special", "memory", "product")  # of a warp's own instructions, for their cost
_UNCOUNTED = len(CLASSES)  # where lanes meet after a branch: no instruction
_SPECIAL = frozenset(("ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt", "sqrt", "div"))
_MEMORY = frozenset(("ld", "ldu", "st", "atom", "red", "ldmatrix", "stmatrix"))
_STREAM = ("tcgen05.mma", "tcgen05.cp", "tcgen05.shift")
_AFTER = {
    "bulk copy from shared memory: write": "bulk copy from shared memory: read",
    "cp.async.mbarrier.arrive": "cp.async",
}
Triple = tuple[int, int, int]


@dataclass(slots=True, eq=False)
class Signal:
    """Something that is waited for; it comes when `parts` contributions have.

    kind: phase (of an mbarrier), barrier, operation, issue, branch or meeting.
    """

    kind: str
    name: str = ""
    phase: int = 0
    parts: int = 0


@dataclass(slots=True, eq=False)
class Unit:
    """One asynchronous operation. kind: its name; ctas: (cluster, CTA) whose engine it uses; warp: that issued it.

    starts: its issue; needs: what has to be done first; done: its completion; gives: phases that its completion contributes to.
    bytes, macs: in all; product: operand type of a matrix product, which its rate is found by.
    """

    kind: str
    engine: str
    ctas: tuple[tuple[int, Triple], ...]
    warp: int
    line: int
    source: str
    starts: Signal
    done: Signal
    bytes: int = 0
    macs: int = 0
    product: str = ""
    text: str = ""
    needs: list[Signal] = field(default_factory=list)
    gives: list[Signal] = field(default_factory=list)
    hazards: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Node:
    """What a warp did at one place: after `counts` plain instructions (by CLASSES) of PTX lines low to high.

    kind: wait, arrive, issue, fork, join, hazard, stuck or end. needs: signals it waits for; gives: one it contributes to.
    """

    kind: str
    counts: tuple[int, ...]
    low: int
    high: int
    line: int
    source: str
    needs: tuple[Signal, ...] = ()
    gives: Signal | None = None
    text: str = ""


@dataclass(slots=True, eq=False)
class Trace:
    """One split of a warp, from its start to its end. start: the branch that made it, or None for the kernel's start."""

    cluster: int
    cta: Triple
    warp: int
    start: Signal | None
    nodes: list[Node] = field(default_factory=list)
    counts: list[int] = field(default_factory=lambda: [0] * (_UNCOUNTED + 1))
    low: int = 1 << 60
    high: int = 0
    polled: tuple[int, list[int], int, int] | None = None  # since a wait at that place failed: what had been counted
    resumes: tuple[Signal, str] | None = None  # what it waits for, and goes on after


@dataclass(frozen=True)
class Recording:
    """A run's causes. traces: splits of warps in the order of their starts; units: asynchronous operations as issued."""

    traces: tuple[Trace, ...]
    units: tuple[Unit, ...]
    hazards: tuple[str, ...] = ()

    def timed(self, rates: Rates | None = None) -> Timeline:
        """The run in time, at these rates; nominal ones if None."""
        from glu4.emulator.replay import Rates, replay

        return replay(self, rates or Rates())

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """Events at nominal rates, by start."""
        return self.timed().events


class Recorder:
    """Writes the recording of a machine while it runs."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.traces: list[Trace] = []
        self.units: list[Unit] = []
        self.phases: dict[Any, Signal] = {}  # by what completes: (cluster, rank, offset, serial) of an mbarrier, and others
        self.streams: dict[Any, dict[Any, Unit]] = {}  # the last operations of each warp, by what orders later ones after them
        self.trace: Trace | None = None
        self.unit: Unit | None = None
        self.at = 0
        self.function: FunctionCode | None = None
        self.known = 0  # hazards marked so far
        self._tables: dict[int, tuple[list[int], list[int]]] = {}

    # warps

    def run(self, split: Split, budget: int) -> int:
        """As Split.run, counting."""
        trace = split.trace = split.trace or self._trace(split, None)
        self.trace, self.function = trace, split.frame.function
        classes, lines = self._table(self.function)
        if trace.resumes is not None:
            signal, text = trace.resumes
            trace.resumes = None
            self.node(trace, "wait", (signal,), None, text, split.pc - 1)
        code, counts, hazards = split.frame.code, trace.counts, self.machine.monitor.hazards
        left = budget
        while left:
            left -= 1
            at = self.at = split.pc
            split.pc = at + 1
            stop = code[at](split)
            if len(hazards) != self.known:
                self._mark()
            if stop and split.pc == at:  # it comes again
                break
            counts[classes[at]] += 1
            line = lines[at]
            if line < trace.low:
                trace.low = line
            if line > trace.high:
                trace.high = line
            if stop:
                break
        self.trace = None
        return budget - left

    def _table(self, code: FunctionCode) -> tuple[list[int], list[int]]:
        """Class and PTX line of each place of a function."""
        found = self._tables.get(id(code))
        if found is None:
            classes = [_UNCOUNTED] * len(code.code)
            for i, instruction in enumerate(code.function.instructions):
                classes[code.start[i + 1] - 1] = _class_of(instruction)
            lines = [0 if i is None else i.line for i in code.instruction_at]
            last = max(lines, default=0)
            found = self._tables[id(code)] = classes, [line or last for line in lines]
        return found

    def _trace(self, split: Split, start: Signal | None) -> Trace:
        cta = split.warp.cta
        trace = Trace(cta.cluster.number, cta.index, split.warp.number, start)
        self.traces.append(trace)
        return trace

    def node(self, trace: Trace, kind: str, needs: tuple[Signal, ...] = (), gives: Signal | None = None, text: str = "",
             at: int | None = None) -> Node:  # fmt: skip
        """Add a node where the trace stands; at: place of its instruction, or that which runs now."""
        instruction = self.function.instruction_at[self.at if at is None else at] if self.function else None
        line = instruction.line if instruction else 0
        source = str(instruction.loc) if instruction and instruction.loc else ""
        low = min(trace.low, trace.high)
        made = Node(kind, tuple(trace.counts[:_UNCOUNTED]), low, trace.high, line, source, needs, gives, text)
        trace.nodes.append(made)
        trace.counts[:] = [0] * len(trace.counts)
        trace.low, trace.high, trace.polled = 1 << 60, 0, None
        if gives is not None:
            gives.parts += 1
        return made

    def forked(self, split: Split, other: Split) -> None:
        """A branch made `other` of some lanes of `split`."""
        signal = Signal("branch")
        self.node(split.trace or self._begin(split), "fork", (), signal)
        other.trace = self._trace(other, signal)

    def joined(self, split: Split, other: Split) -> None:
        """`split` goes on as both."""
        signal = Signal("branch")
        self.node(other.trace or self._begin(other), "end", (), signal)
        self.node(split.trace or self._begin(split), "join", (signal,))

    def _begin(self, split: Split) -> Trace:
        made = split.trace = self._trace(split, None)
        return made

    # barriers

    def _phase(self, key: Any, kind: str, name: str, number: int) -> Signal:
        found = self.phases.get(key)
        if found is None:
            found = self.phases[key] = Signal(kind, name, number)
        return found

    def contribute(self, barrier: MBarrier) -> None:
        """An arrival, bytes or expected bytes of the running phase of an mbarrier, by what runs now."""
        cta = barrier.cta
        key = (cta.cluster.number, cta.rank, barrier.offset, barrier.serial)
        signal = self._phase(key, "phase", barrier.name, barrier.phase)
        if self.unit is not None:
            self.unit.gives.append(signal)
            signal.parts += 1
        elif self.trace is not None:
            self.node(self.trace, "arrive", (), signal, f"arrives at {signal.name}, phase {signal.phase}")

    def polled(self, w: Split) -> None:
        """A wait failed and may be tried again: what runs until then is no work."""
        trace = self.trace
        if trace is not None and (trace.polled is None or trace.polled[0] != self.at):
            trace.polled = (self.at, trace.counts.copy(), trace.low, trace.high)

    def acquired(self, w: Split, barrier: MBarrier) -> None:
        """A wait saw the last phase of an mbarrier complete."""
        trace, cta = self.trace, barrier.cta
        if trace is None:
            return
        if trace.polled is not None and trace.polled[0] == self.at:
            trace.counts[:], trace.low, trace.high = trace.polled[1], trace.polled[2], trace.polled[3]
        signal = self.phases.get((cta.cluster.number, cta.rank, barrier.offset, barrier.serial - 1))
        if barrier.phase and signal is not None:
            self.node(trace, "wait", (signal,), None, f"waits for {signal.name}, phase {signal.phase}")

    def arrived(self, w: Split, key: Any, name: str, phase: int) -> None:
        """An arrival at a barrier of threads."""
        if w.trace is not None:
            self.node(w.trace, "arrive", (), self._phase((*key, phase), "barrier", name, phase), f"arrives at {name}")

    def awaits(self, w: Split, key: Any, phase: int) -> None:
        """It blocks at a barrier of threads, and goes on with the next instruction."""
        signal = self.phases.get((*key, phase))
        if w.trace is not None and signal is not None:
            w.trace.resumes = (signal, f"waits at {signal.name}")

    def waited(self, w: Split, key: Any, phase: int) -> None:
        """It finds a phase of a barrier of threads complete."""
        signal = self.phases.get((*key, phase))
        if w.trace is not None and signal is not None:
            self.node(w.trace, "wait", (signal,), None, f"waits at {signal.name}")

    # operations

    def waited_for(self, w: Split, operations: Iterable[Operation], what: str) -> None:
        """A wait for groups of operations is over."""
        signals = tuple(o.record.done for o in operations if o.record is not None)
        if signals and w.trace is not None:
            self.node(w.trace, "wait", signals, None, what)

    def part(self, operation: Operation) -> None:
        """The running warp issues an operation, or its part of one that several warps issue together."""
        unit = operation.record or self._unit(operation)
        if self.trace is not None:
            self.node(self.trace, "issue", (), unit.starts, unit.text or unit.kind)

    def _unit(self, operation: Operation) -> Unit:
        origin, work = operation.origin, operation.work
        warp, instruction = origin.warp, origin.instruction
        ctas = tuple((c.cluster.number, c.index) for c in ((work and work.ctas) or (warp.cta,)))
        source = str(instruction.loc) if instruction.loc else ""
        unit = Unit(operation.name, work.engine if work else "", ctas, warp.number, instruction.line, source, Signal("issue"),
                    Signal("operation", operation.name, parts=1))  # fmt: skip
        if work is not None:
            unit.bytes, unit.macs, unit.product, unit.text = work.bytes, work.macs, work.product, work.text
        stream = self.streams.setdefault((warp.cta.cluster.number, warp.cta.rank, warp.number), {})
        unit.needs += [u.done for u in _earlier(unit.kind, operation.columns, stream)]
        stream[_place(unit.kind, operation.columns)] = unit
        operation.record = unit
        self.units.append(unit)
        return unit

    def complete(self, queue: AsyncQueue, operation: Operation) -> None:
        """Complete an operation; what it signals is its doing."""
        outer, self.unit = self.unit, operation.record
        queue.complete(operation)
        if len(self.machine.monitor.hazards) != self.known:
            self._mark()
        self.unit = outer

    # the end

    def _mark(self) -> None:
        """Put new hazards where they were found."""
        hazards = list(self.machine.monitor.hazards.values())
        for hazard in hazards[self.known :]:
            text = f"{hazard.kind}: {hazard.message}"
            if self.unit is not None:
                self.unit.hazards.append(text)
            elif self.trace is not None:
                self.node(self.trace, "hazard", (), None, text)
        self.known = len(hazards)

    def finish(self) -> Recording:
        """The recording; what still waits is stuck."""
        self.trace = self.unit = None
        hazards = list(self.machine.monitor.hazards.values())
        late = "; ".join(h.kind for h in hazards[self.known :] if h.kind == "deadlock")
        for split in self.machine.blocked:
            if split.trace is not None and split.wait is not None:
                self.function = split.frame.function
                at = min(split.pc, len(split.frame.code) - 1)
                self.node(split.trace, "stuck", (), None, f"{late or 'stopped'}: waits for {split.wait.text}", at)
        for trace in self.traces:
            if any(trace.counts):
                self.function = None
                self.node(trace, "end")
        return Recording(tuple(self.traces), tuple(self.units), tuple(str(h) for h in hazards))


def _class_of(instruction: Any) -> int:
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode in _SPECIAL:
        return 1
    if opcode in _MEMORY:
        return 0 if modifiers[:1] == ("param",) or "async" in modifiers else 2
    return 3 if opcode == "mma" else 0


def _place(kind: str, columns: dict[int, int]) -> Any:
    """What an operation is the last of, in its warp: later ones are in order after it by this."""
    return (kind, tuple(sorted(columns.items()))) if kind in _STREAM else kind


def _earlier(kind: str, columns: dict[int, int], stream: dict[Any, Unit]) -> Sequence[Unit]:
    """The operations of a warp that one has to come after, whichever of them the schedule had completed by then.

    One engine takes its operations in order, so that the last of each kind stands for those before it.
    """
    if kind in _STREAM:
        return [
            unit
            for key, unit in stream.items()
            if isinstance(key, tuple) and key[0] != kind and any(columns.get(rank, 0) & bits for rank, bits in key[1])
        ]
    if kind == "tcgen05.commit":
        return [unit for key, unit in stream.items() if isinstance(key, tuple)]
    before = _AFTER.get(kind)
    return [stream[before]] if before in stream else []
