"""Warps, CTAs and clusters: who runs, and the barriers between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.clocks import ASYNC, FENCED, GENERIC, KNOWN, PER_WARP, Clock, Message, combine, combine_foreign
from glu4.emulator.isa.asynchronous import check_exit
from glu4.emulator.lanes import FULL, LANES, mask_of
from glu4.emulator.memory import Block
from glu4.emulator.ptx.module import Symbol
from glu4.emulator.split import Frame, Split

if TYPE_CHECKING:
    from glu4.emulator.isa.mbarrier import MBarrier
    from glu4.emulator.machine import Machine
    from glu4.emulator.program import FunctionCode

__all__ = ["SHARED_OFFSET", "Barrier", "Cluster", "Cta", "Warp"]

SHARED_OFFSET = 1024  # bytes of each CTA's shared window that the system keeps (CUDA programming guide, from sm_90 on)


class Barrier:
    """A barrier of threads. arrived: of the running phase; expected: 0 for all that are alive; message: what they released."""

    __slots__ = ("arrived", "expected", "foreign", "message", "origin", "phase", "reduction", "waiting")

    def __init__(self) -> None:
        self.phase = 0
        self.arrived = 0
        self.expected = 0
        self.message: Message | None = None
        self.foreign: dict[int, Message] | None = None  # what the releases know of other clusters
        self.waiting: list[tuple[Split, Any]] = []
        self.reduction: Any = None
        self.origin: Any = None

    def release(self, split: Split, message: Message) -> None:
        """Take an arrival's release."""
        self.message = combine(self.message, message)
        self.foreign = combine_foreign(self.foreign, split.clock.foreign)

    def complete(self) -> None:
        """All are there: wake those that wait, with what the others released."""
        self.phase += 1
        self.arrived = 0
        self.expected = 0
        message, self.message = self.message, None
        foreign, self.foreign = self.foreign, None
        waiting, self.waiting = self.waiting, []
        reduction, self.reduction = self.reduction, None
        for split, finish in waiting:
            if message is not None:
                split.clock.receive(message)
            split.clock.merge_foreign(foreign)
            split.warp.met()
            if finish is not None:
                finish(split, reduction)
            split.wake()
        if waiting:
            waiting[0][0].warp.cta.machine.progress += 1


class Cluster:
    """CTAs that reach each other's shared memory. entities: of its clocks (see clocks.py)."""

    def __init__(self, machine: Machine, number: int, first: tuple[int, int, int]) -> None:
        self.machine = machine
        self.number = number
        self.first = first
        self.ctas: list[Cta] = []
        self.barrier = Barrier()
        self.entities = 1  # entity 0 is the grid in front, the same in every cluster
        self.released: tuple[Message | None, dict[int, Message] | None] = (None, None)  # by the barrier's last phase
        self.exit_known = np.zeros(0, dtype=np.int32)  # the last time of each entity that some thread knew when it exited

    def new_entity(self, count: int = 1) -> int:
        self.entities += count
        return self.entities - count

    @property
    def alive(self) -> int:
        """Threads that have not exited."""
        return sum(cta.alive for cta in self.ctas)

    def check_barrier(self) -> None:
        if self.barrier.arrived and self.barrier.arrived >= self.alive:
            self.released = (self.barrier.message, self.barrier.foreign)
            self.machine.progress += 1
            self.barrier.complete()


class Cta:
    """One CTA. index: %ctaid; rank: in its cluster."""

    def __init__(self, machine: Machine, cluster: Cluster, index: tuple[int, int, int], rank: int) -> None:
        self.machine = machine
        self.cluster = cluster
        self.index = index
        self.rank = rank
        launch = machine.launch
        self.threads = launch.block[0] * launch.block[1] * launch.block[2]
        self.alive = self.threads
        self.exit_known = np.zeros(0, dtype=np.int32)  # the last time of each entity that some thread knew when it exited
        self.shared_base = (rank << 24) | SHARED_OFFSET
        self.shared = Block(f"shared{list(index)}", "shared", self.shared_base, np.zeros(machine.shared_bytes, np.uint8))
        self.barriers = [Barrier() for _ in range(16)]
        self.mbarriers: dict[int, MBarrier] = {}
        self.extra: dict[Any, Any] = {}  # state of instruction families that few kernels use, such as tensor memory
        self.warps: list[Warp] = []
        if machine.monitor.enabled:
            self.shared.shadow(False)
        else:
            self.shared.data[:] = 0xA5

    def start(self) -> None:
        for number in range(-(-self.threads // LANES)):
            self.warps.append(Warp(self, number))

    def check_barriers(self) -> None:
        """After threads exited: barriers that wait for all threads that are left."""
        for barrier in self.barriers:
            if barrier.waiting and barrier.expected == 0 and barrier.arrived >= self.alive:
                barrier.complete()
        self.cluster.check_barrier()


class Warp:
    """32 lanes. entity, time: of its accesses through the generic proxy; synced: the last record when its lanes last met."""

    def __init__(self, cta: Cta, number: int) -> None:
        self.cta = cta
        self.number = number
        self.first_thread = number * LANES
        count = min(LANES, cta.threads - self.first_thread)
        self.live = FULL if count == LANES else mask_of((1 << count) - 1)
        cluster = cta.cluster
        self.entity = cluster.new_entity(PER_WARP)
        self.time = 1
        self.synced = 0
        self.counts = [0] * PER_WARP  # operations issued, of each entity
        self.extra: dict[Any, Any] = {}
        self.local = Block(f"local of warp {number}", "local", 0, np.empty(0, np.uint8))
        self.splits: list[Split] = []
        self.executed = 0  # instructions
        machine = cta.machine
        clock = Clock.new(cluster.entities + 64)
        clock.rows[KNOWN, self.entity + GENERIC] = self.time
        frame = Frame(machine.entry, self, 0)
        self.grow_local(machine.entry.local_size)
        split = Split(self, frame, 0, self.live, clock, None)
        self.splits.append(split)
        machine.ready.append(split)

    # clocks

    def release(self, split: Split, row: int = KNOWN) -> Message:
        """What `split` releases now; later accesses are not part of it. row: KNOWN, or FENCED for a relaxed one."""
        message = split.clock.message(row)
        if row == KNOWN:
            self.tick(split)
        return message

    def tick(self, split: Split) -> None:
        self.time += 1
        split.clock.rows[KNOWN, self.entity] = self.time

    def met(self) -> None:
        """The lanes met at a barrier: what they did before is in order."""
        self.synced = len(self.cta.machine.monitor.records) - 1

    def fence_release(self, split: Split) -> None:
        rows = split.clock.rows
        np.maximum(rows[FENCED : FENCED + 2], rows[KNOWN : KNOWN + 2], out=rows[FENCED : FENCED + 2])
        self.tick(split)

    def fence_async(self, split: Split) -> None:
        rows = split.clock.rows
        np.maximum(rows[ASYNC], rows[KNOWN], out=rows[ASYNC])
        self.tick(split)

    # lanes

    def exit_lanes(self, split: Split, gone: NDArray[Any]) -> None:
        cta = self.cta
        known = split.clock.fit(cta.cluster.entities)[KNOWN]
        for place in (cta, cta.cluster):
            place.exit_known = _larger(place.exit_known, known)
        self.live = self.live & ~gone
        cta.alive -= int(np.count_nonzero(gone))
        cta.machine.progress += 1
        arrived = self.extra.get("cluster_arrived")
        if arrived is not None:
            cta.cluster.barrier.arrived -= int(np.count_nonzero(arrived[gone] == cta.cluster.barrier.phase))
        if not self.live.any():
            check_exit(self)
        cta.check_barriers()

    def grow_local(self, size: int) -> None:
        """Make each lane's local memory at least `size` bytes."""
        old = self.local.thread_bytes
        if size <= old:
            return
        data = np.full((LANES, size), 0xD7, dtype=np.uint8)
        data[:, :old] = self.local.data.reshape(LANES, -1)[:, :old] if old else 0
        block = Block(self.local.name, "local", 0, data.reshape(-1))
        block.thread_bytes = size
        if self.cta.machine.monitor.enabled:
            block.shadow(False)
            if old:
                block.writes.reshape(LANES, -1)[:, :old] = self.local.writes.reshape(LANES, -1)
        self.local = block

    # values

    def special(self, name: str) -> NDArray[Any]:
        """A special register that does not change while the kernel runs: int64 [32]."""
        return _special(self, name)

    def address_of(self, symbol: Symbol, code: FunctionCode) -> int:
        """A variable's address in its own state space (PTX ISA 6.4: what `mov` of its name gives)."""
        variable = symbol.variable
        assert variable is not None
        machine = self.cta.machine
        if variable.space == "shared":
            return int(self.cta.rank << 24) + machine.shared_places[variable.name] + symbol.offset
        if variable.space == "local":
            return code.local_offsets[variable.name] + symbol.offset
        if variable.space == "param":
            return machine.param_places.get(variable.name, 0) + symbol.offset
        return machine.variable_blocks[variable.name].base + symbol.offset


def _larger(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """The larger of two vectors of times, as a new array as long as the longer one."""
    long, short = (a, b) if a.size > b.size else (b, a)
    out = long.copy()
    np.maximum(out[: short.size], short, out=out[: short.size])
    return out


def _special(warp: Warp, name: str) -> NDArray[Any]:
    cta, machine = warp.cta, warp.cta.machine
    launch = machine.launch
    lane = np.arange(LANES, dtype=np.int64)
    base, _, axis_name = name[1:].partition(".")
    axis = "xyz".index(axis_name) if axis_name else 0
    if base == "tid":
        thread = lane + warp.first_thread
        x, y, _ = launch.block
        return (thread % x, thread // x % y, thread // (x * y))[axis]
    masks = {"eq": 1 << lane, "le": (2 << lane) - 1, "lt": (1 << lane) - 1, "ge": -(1 << lane), "gt": -(2 << lane)}
    if base.startswith("lanemask_"):
        return np.asarray(masks[base[9:]] & 0xFFFFFFFF)
    cluster_size = launch.cluster
    in_cluster = tuple(cta.index[i] - cta.cluster.first[i] for i in range(3))
    values = {
        "laneid": lane,
        "ntid": launch.block[axis],
        "ctaid": cta.index[axis],
        "nctaid": launch.grid[axis],
        "warpid": warp.number,
        "nwarpid": -(-cta.threads // LANES),
        "smid": cta.cluster.number % machine.processors,
        "nsmid": machine.processors,
        "gridid": 1,
        "clusterid": cta.cluster.first[axis] // cluster_size[axis],
        "nclusterid": launch.grid[axis] // cluster_size[axis],
        "cluster_ctaid": in_cluster[axis],
        "cluster_nctaid": cluster_size[axis],
        "cluster_ctarank": cta.rank,
        "cluster_nctarank": len(cta.cluster.ctas),
        "is_explicit_cluster": int(launch.explicit_cluster),
        "total_smem_size": machine.shared_bytes,
        "aggr_smem_size": machine.shared_bytes + SHARED_OFFSET,
        "dynamic_smem_size": launch.dynamic_shared,
    }
    return np.broadcast_to(np.asarray(values.get(base, 0), dtype=np.int64), (LANES,))
