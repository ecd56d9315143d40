"""What went wrong: reports, and the shadow memory that finds races by happens-before, whatever the schedule was.

Every access is a record: an entity, a time, and who did what where. A byte's shadow names the record of its last write and an
interned set of records that have read it since. An access races with a record that its clock does not know of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.clocks import ASYNC, KNOWN, TENSOR, Clock
from glu4.emulator.memory import Block
from glu4.emulator.ptx.module import Instruction

if TYPE_CHECKING:
    from glu4.emulator.split import Split
    from glu4.emulator.warp import Warp

__all__ = ["Access", "Hazard", "Monitor", "Origin"]

UNWRITTEN, HOST, PREVIOUS = 0, 1, 2  # the first records; PREVIOUS: the grid in front, which griddepcontrol.wait waits for
STRONG, VIA_ASYNC, VIA_TENSOR = 1, 2, 4  # flags of a record
_OWN_READS = 16  # reads of a byte by one warp that are kept since its lanes last met: a loop may hold any number
Index = NDArray[Any] | slice | tuple[Any, Any]  # of units, of bytes, or of a block of two dimensions


@dataclass(frozen=True)
class Access:
    """One side of a hazard. thread: index in the CTA, or None for all of a warp; address: in its space, with its name."""

    instruction: str
    line: int
    source: str | None
    cta: tuple[int, int, int]
    warp: int
    thread: int | None
    address: str | None

    def __str__(self) -> str:
        where = f"CTA {self.cta} warp {self.warp}" + (f" thread {self.thread}" if self.thread is not None else "")
        text = f"PTX line {self.line}{f' ({self.source})' if self.source else ''}: {self.instruction} by {where}"
        return f"{text} at {self.address}" if self.address else text


@dataclass
class Hazard:
    """kind: a short name of the class; access, other: the two sides; count: how often this pair of lines met."""

    kind: str
    message: str
    access: Access | None = None
    other: Access | None = None
    count: int = 1

    def __str__(self) -> str:
        text = f"{self.kind}: {self.message}"
        if self.access:
            text += f"\n  {self.access}"
        if self.other:
            text += f"\n  against {self.other}"
        return text


class Origin(NamedTuple):
    """Who does an access: the instruction, its warp and its lanes (a bool array, or None where no lane is meant)."""

    instruction: Instruction
    warp: Warp
    lanes: NDArray[Any] | None


@dataclass(slots=True)
class _Record:
    origin: Origin
    block: Block
    index: Any
    unit: int
    flags: int
    number: int
    time: int  # of its entity
    issued: tuple[int, int] | None  # of an asynchronous operation: the entity and time of its issue
    knew: NDArray[Any] | None = None  # what its thread knew of others then, or at the issue


class Monitor:
    """The hazards of one run. off: nothing is tracked, only what cannot be missed is reported."""

    def __init__(self, enabled: bool = True, limit: int = 100) -> None:
        self.enabled = enabled
        self.limit = limit
        self.hazards: dict[tuple[Any, ...], Hazard] = {}
        self.entity = np.zeros(1 << 12, dtype=np.int32)
        self.time = np.zeros(1 << 12, dtype=np.int32)
        self.cluster = np.full(1 << 12, -1, dtype=np.int32)
        self.time[PREVIOUS] = 1  # of entity 0, which is the grid in front in every cluster
        self.records: list[_Record | None] = [None, None, None]
        self.sets: list[tuple[int, ...]] = [(), (PREVIOUS,)]
        self.set_of: dict[tuple[int, ...], int] = {(): 0, (PREVIOUS,): 1}

    # reports

    def report(self, kind: str, message: str, origin: Origin | None = None, address: str | None = None,
               thread: int | None = None, other: Access | None = None) -> None:  # fmt: skip
        """Add a hazard; one of the same kind and lines only counts up."""
        access = None if origin is None else self.describe(origin, address, thread)
        key = (kind, access and access.line, other and other.line, None if access else message)
        known = self.hazards.get(key)
        if known is not None:
            known.count += 1
        elif len(self.hazards) < self.limit:
            self.hazards[key] = Hazard(kind, message, access, other)

    def describe(self, origin: Origin, address: str | None = None, thread: int | None = None) -> Access:
        instruction, warp, lanes = origin
        if thread is None and lanes is not None:
            active = np.flatnonzero(lanes)
            thread = warp.first_thread + int(active[0]) if active.size == 1 else None
        source = str(instruction.loc) if instruction.loc else None
        return Access(instruction.name, instruction.line, source, warp.cta.index, warp.number, thread, address)

    # records

    def depends(self, block: Block) -> None:
        """Note that the grid in front may still write and read a buffer until griddepcontrol.wait."""
        if block.writes.size:
            block.writes[block.writes == HOST] = PREVIOUS
            block.reads[:] = self.set_of[(PREVIOUS,)]

    def record(self, origin: Origin, entity: int, time: int, block: Block, index: Index, unit: int, flags: int,
               issued: tuple[int, int] | None = None) -> int:  # fmt: skip
        number = len(self.records)
        if number == self.entity.size:
            self.entity = np.concatenate((self.entity, np.zeros_like(self.entity)))
            self.time = np.concatenate((self.time, np.zeros_like(self.time)))
            self.cluster = np.concatenate((self.cluster, np.full_like(self.cluster, -1)))
        self.entity[number] = entity
        self.time[number] = time
        self.cluster[number] = origin.warp.cta.cluster.number
        self.records.append(_Record(origin, block, index, unit, flags, number, time, issued))
        return number

    def generic(self, split: Split, instruction: Instruction, block: Block, index: Index, unit: int,
                write: bool, strong: bool, lanes: NDArray[Any], same: Callable[[], bool] | None = None) -> None:  # fmt: skip
        """An access of a warp through the generic proxy; index: of units of `unit` bytes, one for each active lane.

        same: of a store, whether it writes what is there already; that is no race with the earlier store.
        """
        if not block.writes.size:
            return
        warp = split.warp
        origin = Origin(instruction, warp, lanes)
        number = self.record(origin, warp.entity, warp.time, block, index, unit, STRONG if strong else 0)
        self.access(number, split.clock, KNOWN, write, same=same)

    def access(self, number: int, clock: Clock, row: int, write: bool, read: bool = False,
               same: Callable[[], bool] | None = None) -> None:  # fmt: skip
        """Check a record against the shadow and enter it. row: how earlier writes must be known (KNOWN or ASYNC)."""
        record = self.records[number]
        assert record is not None
        record.knew = clock.known()
        block, index, unit = record.block, record.index, record.unit
        if isinstance(index, slice | tuple):
            writes, reads = block.writes[index], block.reads[index]
        else:
            writes, reads = block.shadow_view(1, unit)[index], block.shadow_view(2, unit)[index]
        self._check_writes(record, writes, clock, row, not write or read, same)
        if not write:
            self._add_reader(record, reads, clock, index, unit)
            return
        if reads.any():
            self._check_reads(record, reads, clock, TENSOR if row == TENSOR else KNOWN)
        if isinstance(index, slice | tuple):
            block.writes[index] = number
            block.reads[index] = 0
        else:
            block.shadow_view(1, unit)[index] = number
            block.shadow_view(2, unit)[index] = 0

    def _check_writes(
        self, record: _Record, writes: NDArray[Any], clock: Clock, row: int, read: bool, same: Callable[[], bool] | None = None
    ) -> None:
        """Against the last writes: unwritten bytes, and writes that are not known."""
        first = int(writes.flat[0]) if writes.size else HOST
        if (writes == first).all():
            if first > HOST:
                self._check_one(record, first, clock, row, "read" if read else "write", "written", same)
            elif first == UNWRITTEN and read:
                self._unwritten(record, writes)
            return
        if read and not writes.all():
            self._unwritten(record, writes)
        rows = clock.fit(record.origin.warp.cta.cluster.entities)
        warp = record.origin.warp
        entities = self.entity[writes]
        known = rows[row][entities] >= self.time[writes]
        near = self.cluster[writes] == warp.cta.cluster.number
        known &= near | (writes <= PREVIOUS)
        if record.flags & (VIA_ASYNC | VIA_TENSOR) == 0:  # lanes of one warp have to be in step, too
            known &= ~(near & (entities == warp.entity) & (writes > warp.synced))
        suspects = set(writes[~known].tolist())
        for suspect in suspects:
            self._check_one(record, suspect, clock, row, "read" if read else "write", "written", same)

    def _check_reads(self, record: _Record, reads: NDArray[Any], clock: Clock, row: int) -> None:
        for one in distinct(reads):
            for number in self.sets[one]:
                self._check_one(record, number, clock, row, "write", "read")

    def _knows(self, record: _Record, number: int, clock: Clock, row: int) -> bool:
        cluster = record.origin.warp.cta.cluster
        rows = clock.fit(cluster.entities)
        entity, owner = int(self.entity[number]), int(self.cluster[number])
        if owner != cluster.number and number > PREVIOUS:
            message = (clock.foreign or {}).get(owner)
            return (
                message is not None
                and entity < message.shape[1]
                and bool(message[(row == ASYNC and 1) or 0, entity] >= self.time[number])
            )
        return bool(rows[row, entity] >= self.time[number])

    def _check_one(self, record: _Record, number: int, clock: Clock, row: int, now: str, then: str,
                   same: Callable[[], bool] | None = None) -> None:  # fmt: skip
        """A record against one earlier record; reports what is missing between them."""
        if number == PREVIOUS:
            self._check_previous(record, clock, row, now)
            return
        other = self.records[number]
        if other is None or number == record.number:
            return
        if self._knows(record, number, clock, row):
            if not self._in_step(record, other):
                self._check_lanes(record, other, now, then)
            return
        if record.flags & other.flags & STRONG or (same is not None and same()):
            return
        offset = self._overlap(record, other)
        if offset is None:
            return
        address = record.block.place(offset)
        lane, other_lane = self._lane(record, offset), self._lane(other, offset)
        against = self.describe(other.origin, address, other_lane)
        if row == TENSOR and self._knows(record, number, clock, KNOWN):
            message = f"{now} of tensor memory that was {then}, with no tcgen05.fence before or after the threads' meeting"
            self.report("missing tcgen05.fence", message, record.origin, address, lane, against)  # fmt: skip
            return
        if row == ASYNC and self._knows(record, number, clock, KNOWN):
            self.report("missing proxy fence", f"{now} through the async proxy of what was {then} through the generic proxy, "
                        "with no fence.proxy.async between", record.origin, address, lane, against)  # fmt: skip
            return
        for operation, access in ((other, record), (record, other)):
            if _follows_issue(operation, access):
                wait = _completion(operation.origin.instruction)
                message = f"{now} of bytes that were {then}, with no wait ({wait}) between the operation's issue and the access"
                self.report("missing wait", message, record.origin, address, lane, against)
                return
        self.report("data race", f"{now} of bytes that were {then}, with nothing to order the two",
                    record.origin, address, lane, against)  # fmt: skip

    def _check_previous(self, record: _Record, clock: Clock, row: int, now: str) -> None:
        """A record against the grid in front, which a strong read may look over the shoulder of: it finds old values or new."""
        if self._knows(record, PREVIOUS, clock, row) or (now == "read" and record.flags & STRONG):
            return
        offset = int(_bytes(record)[0])
        self.report("data race", f"{now} of a buffer of the grid in front, with no griddepcontrol.wait before",
                    record.origin, record.block.place(offset), self._lane(record, offset))  # fmt: skip

    def _in_step(self, record: _Record, other: _Record) -> bool:
        """Whether two accesses that the warp's clock orders cannot be of different lanes out of step."""
        warp = record.origin.warp
        if warp is not other.origin.warp or (record.flags | other.flags) & (VIA_ASYNC | VIA_TENSOR | STRONG):
            return True
        if isinstance(record.index, slice | tuple) or isinstance(other.index, slice | tuple):
            return True
        return other.number <= warp.synced

    def _check_lanes(self, record: _Record, other: _Record, now: str, then: str) -> None:
        """Two accesses of one warp since its lanes last met: a race if different lanes touched a byte."""
        mine, their = np.asarray(record.index), np.asarray(other.index)
        alike = record.unit == other.unit and np.array_equal(mine, their) and bits(record) == bits(other)
        if alike and np.unique(mine).size == mine.size:
            return
        theirs: dict[int, set[int]] = {}
        for lane, offset in _lane_bytes(other):
            theirs.setdefault(offset, set()).add(lane)
        for lane, offset in _lane_bytes(record):
            for other_lane in theirs.get(offset, ()):
                if lane != other_lane:
                    address = record.block.place(offset)
                    first = record.origin.warp.first_thread
                    against = self.describe(other.origin, address, first + other_lane)
                    message = f"{now} of bytes that another lane of the warp has {then}, with no bar.warp.sync between"
                    self.report("data race", message, record.origin, address, first + lane, against)
                    return

    def _add_reader(self, record: _Record, reads: NDArray[Any], clock: Clock, index: Index, unit: int) -> None:
        block = record.block
        flat = reads.ravel()
        first = int(flat[0]) if flat.size else 0
        target: Any = index
        store = block.reads if isinstance(index, slice | tuple) else block.shadow_view(2, unit)
        if (flat == first).all():
            store[target] = self._with_reader(first, record, clock)
            return
        new = np.zeros_like(reads)
        for one in distinct(reads):
            np.copyto(new, self._with_reader(one, record, clock), where=reads == one)
        zero = reads == 0
        if zero.any():
            np.copyto(new, self._with_reader(0, record, clock), where=zero)
        store[target] = new

    def _with_reader(self, old: int, record: _Record, clock: Clock) -> int:
        """The set `old` with this record, without those it makes superfluous; at most one of other clusters."""
        mine = record.origin.warp.cta.cluster.number
        kept: list[int] = []
        own: list[int] = []  # earlier reads of the same warp, which matter for races between its lanes only
        foreign = 0
        for number in self.sets[old]:
            if self.cluster[number] != mine:
                foreign = number
            elif not self._knows(record, number, clock, KNOWN):
                kept.append(number)
            elif not self._covered(record, number):
                own.append(number)
        members = (*((foreign,) if foreign else ()), *kept, *own[-_OWN_READS:], record.number)
        found = self.set_of.get(members)
        if found is None:
            found = self.set_of[members] = len(self.sets)
            self.sets.append(members)
        return found

    def _covered(self, record: _Record, number: int) -> bool:
        """Whether a write that is ordered after this record is ordered after that one too, lanes included."""
        other = self.records[number]
        return other is None or self._in_step(record, other)

    # places

    def _overlap(self, record: _Record, other: _Record) -> int | None:
        """The first byte offset that both touch."""
        mine, theirs = _bytes(record), _bytes(other)
        both = np.intersect1d(mine, theirs)
        return int(both[0]) if both.size else None

    def _lane(self, record: _Record, offset: int) -> int | None:
        """The thread that touched a byte."""
        lanes = record.origin.lanes
        if lanes is None or isinstance(record.index, slice | tuple):
            return None
        active = np.flatnonzero(lanes)
        if active.size != record.index.size:
            return None
        hit = np.flatnonzero(record.index == offset // record.unit)
        return record.origin.warp.first_thread + int(active[hit[0]]) if hit.size else None

    def _unwritten(self, record: _Record, writes: NDArray[Any]) -> None:
        offset = int(_bytes(record)[np.flatnonzero(writes.ravel() == UNWRITTEN)[0]])
        address = record.block.place(offset)
        self.report(
            "uninitialised read", "read of memory that nothing wrote", record.origin, address, self._lane(record, offset)
        )


def _follows_issue(operation: _Record, access: _Record) -> bool:
    """Whether an access comes after the issue of an asynchronous operation of its cluster, in causality order."""
    mine, its = access.origin.warp, operation.origin.warp
    if operation.issued is None or mine.cta.cluster is not its.cta.cluster:
        return False
    entity, time = operation.issued
    if mine is its:
        return (access.issued or (entity, access.time))[1] > time
    return access.knew is not None and entity < access.knew.size and int(access.knew[entity]) > time


_COMPLETIONS = (
    ("tcgen05.ld", "tcgen05.wait::ld"),
    ("tcgen05.st", "tcgen05.wait::st"),
    ("tcgen05", "the mbarrier of a tcgen05.commit after it"),
    ("wgmma", "wgmma.wait_group"),
    ("bulk_group", "cp.async.bulk.wait_group"),
    ("complete_tx", "its mbarrier"),
    ("cp.async", "cp.async.wait_group"),
)


def _completion(instruction: Instruction) -> str:
    """What an asynchronous operation's completion is waited for with."""
    return next((wait for word, wait in _COMPLETIONS if word in instruction.name), "its completion mechanism")


def bits(record: _Record) -> bytes:
    """The lanes of a record, to compare."""
    return b"" if record.origin.lanes is None else record.origin.lanes.tobytes()


def distinct(values: NDArray[Any]) -> list[int]:
    """The distinct values other than 0; quick where equal values lie side by side."""
    flat = values.ravel()
    heads = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    found = set(flat[heads].tolist())
    found.add(int(flat[0]))
    found.discard(0)
    return sorted(found)


def _bytes(record: _Record) -> NDArray[Any]:
    if isinstance(record.index, slice):
        return np.arange(record.index.start, record.index.stop)
    if isinstance(record.index, tuple):
        return np.arange(record.block.writes.size).reshape(record.block.writes.shape)[record.index].ravel()
    units = np.asarray(record.index, dtype=np.int64).ravel()
    return (units[:, None] * record.unit + np.arange(record.unit)).ravel()


def _lane_bytes(record: _Record) -> list[tuple[int, int]]:
    """(lane, byte offset) of every byte that a warp's access touched."""
    lanes = record.origin.lanes
    if lanes is None or isinstance(record.index, slice | tuple):
        return []
    active = np.flatnonzero(lanes).tolist()
    units = np.asarray(record.index).ravel().tolist()
    return [(lane, u * record.unit + b) for lane, u in zip(active, units) for b in range(record.unit)]
