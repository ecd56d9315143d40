"""What asynchronous operations share: a snapshot of what their issuer knew, and the accesses they make when they complete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.async_queue import Operation, Work
from glu4.emulator.clocks import ASYNC, COPY, KNOWN, Message
from glu4.emulator.hazards import VIA_ASYNC, Origin
from glu4.emulator.isa.registry import Context
from glu4.emulator.memory import Block
from glu4.emulator.split import Split, Wait

if TYPE_CHECKING:
    from glu4.emulator.warp import Warp

__all__ = ["COPIES", "PRODUCTS", "READS", "WRITES", "Groups", "Issue", "check_exit"]

Index = NDArray[Any] | slice | tuple[Any, Any]
# names of a warp's groups
READS, WRITES, COPIES, PRODUCTS = "bulk reads", "bulk writes", "cp.async", "wgmma"


class Issue:
    """One asynchronous operation at its issue. proxy: ASYNC, or KNOWN where the generic proxy does the work."""

    __slots__ = ("clock", "context", "flags", "issued", "machine", "monitor", "origin", "proxy", "warp")

    def __init__(self, w: Split, context: Context, lanes: NDArray[Any] | None = None, proxy: int = ASYNC) -> None:
        self.warp = w.warp
        self.context = context
        self.machine = w.warp.cta.machine
        self.monitor = self.machine.monitor
        self.origin = Origin(context.instruction, w.warp, w.mask if lanes is None else lanes)
        self.clock = w.clock.copy()
        self.issued = (w.warp.entity, w.warp.time)
        w.warp.tick(w)  # what the issuer does from now on is not before the operation
        self.proxy = proxy
        self.flags = VIA_ASYNC if proxy == ASYNC else 0

    def access(self, block: Block, index: Index, unit: int, entity: int, time: int, write: bool, read: bool = False) -> None:
        """An access that others may rely on once they know of (entity, time)."""
        if block.writes.size:
            number = self.monitor.record(self.origin, entity, time, block, index, unit, self.flags, self.issued)
            self.monitor.access(number, self.clock, self.proxy, write, read)

    def message(self) -> Message:
        """What its completion releases: what the issuer knew, without its own latest accesses, which nothing has released."""
        rows = self.clock.message()
        entity = self.warp.entity
        rows[:, entity] = np.minimum(rows[:, entity], self.clock.rows[KNOWN, entity] - 1)
        return rows

    def report(self, kind: str, message: str, address: str | None = None) -> None:
        self.monitor.report(kind, message, self.origin, address)

    def submit(self, name: str, run: Any, after: tuple[Operation, ...] = (), work: Work | None = None) -> Operation:
        operation = Operation(name, self.origin, run, after, work)
        self.machine.submit(operation)
        return operation


class Groups:
    """Groups of operations that a warp commits and waits for. number: of the group that the next commit closes."""

    __slots__ = ("members", "number", "open")

    def __init__(self) -> None:
        self.number = 1
        self.open: list[Operation] = []
        self.members: dict[int, list[Operation]] = {}

    @classmethod
    def of(cls, w: Split, name: str) -> Groups:
        found = w.warp.extra.get(name)
        if found is None:
            found = w.warp.extra[name] = cls()
        return found

    def add(self, operation: Operation) -> None:
        self.open.append(operation)

    def commit(self) -> None:
        if self.open:
            self.members[self.number] = self.open
        self.open = []
        self.number += 1

    def wait(self, w: Split, pending: int, what: str) -> bool:
        """True if the split stopped, to come again; False once at most `pending` groups are in flight."""
        last = self.number - 1 - pending
        waiting = [o for g, ops in self.members.items() if g <= last for o in ops if not o.done]
        if waiting:
            w.pc -= 1
            for operation in waiting:
                operation.waiters.append(w)
            return w.block(Wait(f"{what}: {len(waiting)} operations in flight"))
        over = [g for g in self.members if g <= last]
        recorder = w.warp.cta.machine.recorder
        if recorder is not None and over:
            recorder.waited_for(w, [o for g in over for o in self.members[g]], f"{what} {pending}")
        for group in over:
            del self.members[group]
        return False

    def unwaited(self, seen: int = 0) -> list[Operation]:
        """Operations that no wait covered, done or not, of groups after `seen`."""
        return [o for g, ops in self.members.items() if g > seen for o in ops] + self.open

    @property
    def unfinished(self) -> list[Operation]:
        return [o for ops in (*self.members.values(), self.open) for o in ops if not o.done]


def _seen(warp: Warp) -> int:
    """The last group of cp.async of which a thread of the cluster knew when it exited, through an mbarrier."""
    known, entity = warp.cta.cluster.exit_known, warp.entity + COPY
    return int(known[entity]) if entity < known.size else 0


def check_exit(warp: Warp) -> None:
    """Groups that a warp never waited for before its last thread exited."""
    for name in (READS, COPIES, PRODUCTS):
        groups = warp.extra.get(name)
        left = groups.unwaited(_seen(warp) if name == COPIES else 0) if isinstance(groups, Groups) else []
        if left:
            origin = left[0].origin
            what = {
                READS: "its source in shared memory may be read",
                COPIES: "shared memory may be written",
                PRODUCTS: "it may run",
            }[name]
            message = f"threads exit without a wait for an operation, so that {what} after they are gone"
            warp.cta.machine.monitor.report("exit with work outstanding", message, origin)
