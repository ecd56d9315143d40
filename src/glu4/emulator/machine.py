"""The machine: memory, clusters, and the loop that runs warps and completes asynchronous operations until nothing is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.async_queue import AsyncQueue, Operation
from glu4.emulator.clocks import KNOWN
from glu4.emulator.errors import LaunchError
from glu4.emulator.hazards import Monitor
from glu4.emulator.isa import mbarrier, tmemory
from glu4.emulator.memory import PARAM_BASE, SHARED_BASE, Block, Memory
from glu4.emulator.program import Program
from glu4.emulator.ptx.module import Function, Variable
from glu4.emulator.recording import Recorder
from glu4.emulator.scheduler import Schedule
from glu4.emulator.split import GONE, READY, Split
from glu4.emulator.warp import SHARED_OFFSET, Cluster, Cta

__all__ = ["Launch", "Machine"]

Triple = tuple[int, int, int]
_RECORD = 1000  # bytes that one access of a warp is kept in
_MAX_SHARED = 232448  # bytes of static and dynamic shared memory of a CTA on sm_90 and sm_100
_SPIN = 5_000  # instructions that lanes of a warp may run without any effect while others wait to meet them
_IDLE = 1_000_000  # instructions without any effect after which a run that polls is called stuck


@dataclass(frozen=True)
class Launch:
    """Sizes of a launch. ctas: the only ones to run, None for all (whole clusters run)."""

    grid: Triple
    block: Triple
    cluster: Triple = (1, 1, 1)
    dynamic_shared: int = 0
    explicit_cluster: bool = False
    ctas: tuple[Triple, ...] | None = field(default=None)


class Machine:
    """One launch of one kernel. Make it, give it blocks of memory and parameter bytes, then `run`."""

    def __init__(self, program: Program, entry: Function, launch: Launch, schedule: Schedule, monitor: Monitor,
                 max_instructions: int = 200_000_000, resident: int = 4, processors: int = 132) -> None:  # fmt: skip
        self.program = program
        self.entry = program.functions[entry.name]
        self.launch = launch
        self.schedule = schedule
        self.monitor = monitor
        self.max_instructions = max_instructions
        self.resident = resident
        self.processors = processors
        self.memory = Memory()
        self.queue = AsyncQueue()
        self.ready: deque[Split] = deque()
        self.blocked: dict[Split, None] = {}
        self.locations: dict[Any, dict[int, Any]] = {}
        self.recorder: Recorder | None = None
        self.written_in_front: list[tuple[Block, NDArray[np.uint8]]] = []  # by the grid in front, until it ends
        self.seconds: float | None = None
        self.deadline = float("inf")
        self.max_records = 1 << 62
        self.executed = 0
        self.progress = 0
        self.stopped = False
        # whether tcgen05 instructions need tcgen05.fence between threads: where the kernel has any such fence
        self.tensor_fences = any(
            i.opcode == "tcgen05" and i.modifiers[:1] and i.modifiers[0].startswith("fence::")
            for f in program.module.functions.values()
            for i in f.instructions
        )
        self.tensor_maps: dict[tuple[bytes, str], Any] = {}
        self.tensor_map_fences: dict[int, Any] = {}  # cluster -> what releases for the tensormap proxy have covered
        self.running: list[Cluster] = []
        self.params = Block("parameters", "param", PARAM_BASE, np.zeros(0, np.uint8), True)
        self.param_places = _places(entry.params, 0)
        self.shared_places, self.shared_bytes = self._place_shared(entry)
        self.variable_blocks: dict[str, Block] = {}
        self._place_variables()
        self._waiting: Iterator[tuple[int, Triple]] = self._clusters()
        self._more = True

    def grid_in_front_ends(self) -> None:
        """What the grid in front writes is there, for everyone and before any wait for it returns."""
        while self.written_in_front:
            block, data = self.written_in_front.pop()
            block.data[: data.size] = data

    # memory

    def _place_shared(self, entry: Function) -> tuple[dict[str, int], int]:
        sized = self.program.shared_variables(entry)
        places: dict[str, int] = {}
        at = SHARED_OFFSET
        for v in sorted(sized, key=lambda v: -v.align):
            at = -(-at // v.align) * v.align
            places[v.name] = at
            at += v.size
        unsized = [v for v in self.program.module.variables.values() if v.space == "shared" and not v.count]
        align = max([16, *(v.align for v in unsized)])
        if unsized:
            at = -(-at // align) * align
            for v in unsized:
                places[v.name] = at
        total = at - SHARED_OFFSET + self.launch.dynamic_shared
        if total > _MAX_SHARED:
            raise LaunchError(f"dynamic_smem: {total} bytes of shared memory in all, a CTA has {_MAX_SHARED}")
        return places, total

    def _place_variables(self) -> None:
        module = self.program.module
        found = [v for v in module.variables.values() if v.space in ("global", "const")]
        for function in module.functions.values():
            found += [v for v in function.variables if v.space in ("global", "const")]
        for v in found:
            data = np.frombuffer(v.data or bytes(v.size), dtype=np.uint8).copy()
            block = self.memory.add(v.name, v.space, data, v.align, readonly=v.space == "const")
            if self.monitor.enabled and v.space == "global":
                block.shadow(True)
            self.variable_blocks[v.name] = block
        for v in found:
            self._relocate(v)

    def _relocate(self, variable: Variable) -> None:
        for offset, symbol, addend, generic in variable.relocations:
            if symbol in self.variable_blocks:
                value = self.variable_blocks[symbol].base
            elif symbol in self.shared_places:
                value = self.shared_places[symbol] + (SHARED_BASE if generic else 0)
            else:
                raise LaunchError(f"{variable.name}: the address of {symbol} is not known")
            data = (value + addend & (1 << 64) - 1).to_bytes(8, "little")
            target = self.variable_blocks[variable.name].data
            room = target[offset : offset + 8]
            room[:] = np.frombuffer(data[: room.size], np.uint8)

    def set_params(self, values: list[bytes]) -> None:
        """Bytes of each kernel parameter, in order. Raises LaunchError where number or size differ."""
        formal = self.entry.function.params
        if len(values) != len(formal):
            raise LaunchError(f"params: the kernel takes {len(formal)}, got {len(values)}")
        total = max([self.param_places[v.name] + v.size for v in formal], default=0)
        data = np.zeros(total, dtype=np.uint8)
        for v, raw in zip(formal, values):
            if len(raw) != v.size:
                raise LaunchError(f"params: {v.name} has {v.size} bytes, got {len(raw)}")
            place = self.param_places[v.name]
            data[place : place + v.size] = np.frombuffer(raw, np.uint8)
        self.params = Block("parameters", "param", PARAM_BASE, data, True)

    # clusters

    def _clusters(self) -> Iterator[tuple[int, Triple]]:
        """(number, first CTA) of each cluster of the launch."""
        size = self.launch.cluster
        ends = [g // s for g, s in zip(self.launch.grid, size)]
        places: Iterable[Triple] = ((x, y, z) for z in range(ends[2]) for y in range(ends[1]) for x in range(ends[0]))
        if self.launch.ctas is not None:  # a grid may be far larger than what is chosen of it
            chosen = {(x // size[0], y // size[1], z // size[2]) for x, y, z in self.launch.ctas}
            places = sorted(chosen, key=lambda place: place[::-1])
        for number, (x, y, z) in enumerate(places):
            yield number, (x * size[0], y * size[1], z * size[2])

    def _cluster(self, number: int, first: Triple) -> Cluster:
        cluster = Cluster(self, number, first)
        size = self.launch.cluster
        for rank in range(size[0] * size[1] * size[2]):
            x, y, z = rank % size[0], rank // size[0] % size[1], rank // (size[0] * size[1])
            cluster.ctas.append(Cta(self, cluster, (first[0] + x, first[1] + y, first[2] + z), rank))
        for cta in cluster.ctas:
            cta.start()
        return cluster

    def _admit(self) -> bool:
        """Start one more cluster; False if there is none."""
        found = next(self._waiting, None)
        if found is None:
            self._more = False
            return False
        self.running.append(self._cluster(*found))
        return True

    def cancel(self) -> Triple | None:
        """Take a cluster that has not been launched off the launch: its first CTA; None if there is none, or is refused."""
        if self.schedule.refuses():
            return None
        found = next(self._waiting, None)
        return None if found is None else found[1]

    def _retire(self) -> None:
        """Take clusters off that have ended, and their shared memory with them."""
        for cluster in [c for c in self.running if not c.alive]:
            if any(o.origin.warp.cta.cluster is cluster for o in self.queue.pending):
                continue
            self.running.remove(cluster)
            for cta in cluster.ctas:
                mbarrier.check_exit(cta)
                tmemory.check_exit(cta)
                cta.shared.data = cta.shared.writes = cta.shared.reads = np.empty(0, np.uint8)
                cta.shared._views.clear()

    # the loop

    def run(self) -> None:
        """Run to the end, to a deadlock, or to the limit of instructions; hazards are in the monitor."""
        with np.errstate(all="ignore"):
            while len(self.running) < self.resident and self._admit():
                pass
            mark, since = -1, 0
            while not self.stopped:
                if not self.ready:
                    if not self._unstick():
                        break
                    continue
                self._turn()
                if self.progress != mark:
                    mark, since = self.progress, self.executed
                elif self.executed - since > 1000 * (len(self.ready) + 1) and self.queue.pending:
                    self._force()
                elif self.executed - since > 500 * (len(self.ready) + 1) and self._release_join(_SPIN):
                    since = self.executed
                elif self.executed - since > _IDLE:
                    if not self._unstick():
                        self.monitor.report("deadlock", f"{self._who_runs()} poll for what never comes")
                        break
                    since = self.executed
                if self._over():
                    break

    def limit(self, seconds: float | None, memory: int) -> None:
        """End the run after a time, or when what is kept of its accesses is about that many bytes."""
        self.seconds = seconds
        self.deadline = float("inf") if seconds is None else time.perf_counter() + seconds
        self.max_records = memory // _RECORD

    def _over(self) -> bool:
        """Report a limit that is reached."""
        if self.executed > self.max_instructions:
            self.monitor.report("time limit", f"stopped after {self.executed} warp instructions")
        elif time.perf_counter() > self.deadline:
            self.monitor.report("time limit", f"stopped after {self.seconds:g} s and {self.executed} warp instructions")
        elif len(self.monitor.records) > self.max_records:
            kept = f"{len(self.monitor.records)} accesses, about {len(self.monitor.records) * _RECORD >> 20} MiB, are kept"
            self.monitor.report("memory limit", f"stopped after {self.executed} warp instructions: {kept}")
        else:
            return False
        return True

    def _turn(self) -> None:
        """Run one split for its share, then complete what the schedule wants."""
        ready = self.ready
        at = self.schedule.pick(ready)  # type: ignore[arg-type]
        if at:
            ready.rotate(-at)
        split = ready.popleft()
        if split.state != READY:
            return
        budget = self.schedule.instructions()
        # a warp is one clock: what its other lanes did meanwhile has moved its time on
        split.clock.rows[KNOWN, split.warp.entity] = split.warp.time
        ran = split.run(budget) if self.recorder is None else self.recorder.run(split, budget)
        self.executed += ran
        split.warp.executed += ran
        if split.state == READY:
            ready.append(split)
        elif split.state == GONE and not split.warp.splits:
            self._ended()
        while (operation := self.schedule.completes(self.queue)) is not None:
            self.complete(operation)

    def _ended(self) -> None:
        self._retire()
        while self._more and len(self.running) < self.resident and self._admit():
            pass

    def submit(self, operation: Operation) -> None:
        """Issue an asynchronous operation."""
        self.progress += 1
        if self.recorder is not None:
            self.recorder.part(operation)
        self.queue.add(operation, self.executed)
        if self.schedule.eager and not operation.after:
            self.complete(operation)

    def complete(self, operation: Operation) -> None:
        """Do an operation now, and before it those that have to come first."""
        if operation.done:
            return
        for earlier in operation.after:
            self.complete(earlier)
        self.progress += 1
        if self.recorder is not None:
            self.recorder.complete(self.queue, operation)
        else:
            self.queue.complete(operation)

    def _force(self) -> bool:
        eligible = self.queue.eligible()
        if not eligible:
            return False
        self.complete(self.schedule.forced(eligible))
        return True

    def _unstick(self) -> bool:
        """Nothing can run: let something happen that may. False when nothing may, which is the end or a deadlock."""
        if self._force():
            return True
        woken = [s for s in self.blocked if s.wait is not None and s.wait.poll is not None and s.wait.poll()]
        for split in woken[:1]:
            split.wake()
            return True
        for split in list(self.blocked):
            if split.wait is not None and split.wait.timeout and split.expired != self.progress:
                split.expired = self.progress
                split.timed_out = True
                split.wake()
                return True
        if self._release_join():
            return True
        if self._more and len(self.running) < self.processors and self._admit():
            return True
        if self.blocked:
            self._deadlock()
        self._retire()
        return False

    def _release_join(self, least: int = 0) -> bool:
        """Let a split go on without the lanes it waits for at the end of a branch; they may be waiting for it.

        least: instructions that its warp must have run since the branch.
        """
        for split in self.blocked:
            join = split.join
            if join is not None and split in join.waiting and split.warp.executed - join.since >= least:
                split.release()
                return True
        return False

    def _deadlock(self) -> None:
        lines = []
        for split in self.blocked:
            access = self.describe(split)
            lines.append(f"{access} waits for {split.wait.text if split.wait else 'nothing'}")
        shown = lines[:64] + ([f"and {len(lines) - 64} more"] if len(lines) > 64 else [])
        self.monitor.report("deadlock", "nothing can run and nothing is in flight:\n    " + "\n    ".join(shown))

    def now(self) -> int:
        """What the clocks read: a count of instructions, which grows."""
        self.executed += 1
        return self.executed

    def describe(self, split: Split) -> str:
        """Where a split stands."""
        instruction = split.frame.function.instruction_at[min(split.pc, len(split.frame.code) - 1)]
        where = f"line {instruction.line}" if instruction else "its end"
        lanes = "" if split.full else f" ({int(np.count_nonzero(split.mask))} threads)"
        return f"CTA {split.warp.cta.index} warp {split.warp.number}{lanes} at PTX {where}"

    def _who_runs(self) -> str:
        return ", ".join(self.describe(s) for s in list(self.ready)[:16])


def _places(variables: list[Variable], start: int) -> dict[str, int]:
    """Offsets that honour the alignments."""
    places: dict[str, int] = {}
    at = start
    for v in variables:
        at = -(-at // v.align) * v.align
        places[v.name] = at
        at += v.size
    return places
