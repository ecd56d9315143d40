"""Divergence: the lanes of a warp that run together, and the places where they meet again.

A branch that some lanes take and some do not makes two splits of one, which meet at the branch's immediate post-dominator.
Splits are scheduled on their own, so that lanes that spin do not keep the others from what they spin on; a split that has
waited to meet the rest of its warp for long, or with nothing else to run, goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glu4.emulator.clocks import Clock
from glu4.emulator.lanes import FULL_KEY, NONE, Mask, bits_of

if TYPE_CHECKING:
    from glu4.emulator.program import FunctionCode
    from glu4.emulator.warp import Warp

__all__ = ["BLOCKED", "GONE", "READY", "Frame", "Join", "Split", "Wait"]

READY, BLOCKED, GONE = 0, 1, 2


class Frame:
    """One activation of a function: registers, and the buffers of its .param variables. caller: (frame, place) or None."""

    __slots__ = ("buffers", "caller", "code", "function", "loads", "local_base", "pending", "returns", "rows")

    def __init__(self, code: FunctionCode, warp: Warp, local_base: int) -> None:
        self.function = code
        self.code = code.code
        self.rows = code.rows(warp)
        self.local_base = local_base
        self.buffers: dict[str, NDArray[Any]] = {}
        self.caller: tuple[Frame, int] | None = None
        self.returns: tuple[Any, ...] = ()
        # rows that an operation in flight reads or writes: row -> (its group, "read", "write" or "load")
        self.pending: dict[int, tuple[int, str]] = {}
        self.loads: dict[int, Any] = {}  # loads from tensor memory in flight, by their group


class Join:
    """Where the splits of one divergent branch meet. expected: lanes still to come or here; arrived: lanes here."""

    __slots__ = ("arrived", "expected", "frame", "parent", "place", "since", "waiting")

    def __init__(self, place: int, frame: Frame, expected: int, parent: Join | None, since: int) -> None:
        self.place = place
        self.frame = frame
        self.expected = expected
        self.arrived = 0
        self.parent = parent
        self.waiting: list[Split] = []
        self.since = since


class Wait:
    """What a blocked split waits for. poll: true once it may go on; timeout: it may go on without, as try_wait does."""

    __slots__ = ("key", "poll", "text", "timeout")

    def __init__(self, text: str, poll: Callable[[], bool] | None = None, timeout: bool = False, key: Any = None) -> None:
        self.text = text
        self.poll = poll
        self.timeout = timeout
        self.key = key


class Split:
    """Lanes of one warp with one program counter. mask: bool [32] (never changed in place); r: the frame's views of rows."""

    __slots__ = ("clock", "expired", "frame", "full", "join", "key", "mask", "pc", "r", "state", "timed_out", "trace", "wait",
                 "warp")  # fmt: skip

    def __init__(self, warp: Warp, frame: Frame, pc: int, mask: Mask, clock: Clock, join: Join | None) -> None:
        self.warp = warp
        self.frame = frame
        self.r = frame.rows
        self.pc = pc
        self.clock = clock
        self.join = join
        self.state = READY
        self.wait: Wait | None = None
        self.expired = -1  # the machine's progress when this split's wait last ran out of time
        self.timed_out = False  # the machine woke it without what it waits for
        self.trace: Any = None  # its Trace in a recording
        self.set_mask(mask)

    def set_mask(self, mask: Mask) -> None:
        self.mask = mask
        self.key = mask.tobytes()
        self.full = self.key == FULL_KEY

    def put(self, target: NDArray[Any], values: ArrayLike) -> None:
        """Write the active lanes of a register's row."""
        if self.full:
            target[...] = values  # a fifth of copyto's time
        else:
            np.copyto(target, values, where=self.mask)

    def run(self, budget: int) -> int:
        """Run up to `budget` instructions; returns how many were."""
        left = budget
        code = self.frame.code
        while left:
            left -= 1
            step = code[self.pc]
            self.pc += 1
            if step(self):
                break
        return budget - left

    def enter(self, frame: Frame, pc: int) -> None:
        self.frame = frame
        self.r = frame.rows
        self.pc = pc

    def block(self, wait: Wait) -> bool:
        """Stop here until something calls `wake`; for a Step to return."""
        self.state = BLOCKED
        self.wait = wait
        self.warp.cta.machine.blocked[self] = None
        return True

    def wake(self) -> None:
        if self.state == BLOCKED:
            self.state = READY
            self.wait = None
            machine = self.warp.cta.machine
            machine.blocked.pop(self, None)
            machine.ready.append(self)

    # divergence

    def diverge(self, taken: Mask, target: int, place: int | None) -> Split:
        """Lanes `taken` go to `target` as a new split, the others stay. place: where they meet, None for nowhere new."""
        warp = self.warp
        if place is not None and not (self.join is not None and self.join.place == place and self.join.frame is self.frame):
            self.join = Join(place, self.frame, bits_of(self.mask), self.join, warp.executed)
        other = Split(warp, self.frame, target, taken, self.clock.copy(), self.join)
        self.set_mask(self.mask & ~taken)
        warp.splits.append(other)
        if warp.cta.machine.recorder is not None:
            warp.cta.machine.recorder.forked(self, other)
        warp.cta.machine.ready.append(other)
        return other

    def arrive(self) -> bool:
        """Wait at the innermost join; True if this split stopped, False if it goes on as the merged one."""
        join = self.join
        assert join is not None
        join.arrived |= bits_of(self.mask)
        join.waiting.append(self)
        if join.arrived != join.expected:
            self.state = BLOCKED
            self.wait = Wait("the other lanes of its warp, to meet them after a branch")
            self.warp.cta.machine.blocked[self] = None
            return True
        self._merge(join)
        return False

    def _merge(self, join: Join) -> None:
        """Become all splits that wait at a join."""
        recorder = self.warp.cta.machine.recorder
        for other in join.waiting:
            if other is not self:
                if recorder is not None:
                    recorder.joined(self, other)
                self.set_mask(self.mask | other.mask)
                self.clock.merge(other.clock)
                other.retire()
        join.waiting.clear()
        self.join = join.parent

    def release(self) -> None:
        """Go on from a join without the lanes that have not come."""
        join = self.join
        assert join is not None
        assert self in join.waiting
        join.expected &= ~join.arrived
        join.arrived = 0
        self._merge(join)
        self.wake()

    def retire(self) -> None:
        self.state = GONE
        self.warp.cta.machine.blocked.pop(self, None)
        self.warp.splits.remove(self)

    def drop(self, gone: Mask) -> bool:
        """Lanes that exit; True if none is left."""
        bits = bits_of(gone)
        warp = self.warp
        warp.exit_lanes(self, gone)
        join = self.join
        rest = self.mask & ~gone
        empty = rest.tobytes() == NONE
        if empty:
            self.retire()
        else:
            self.set_mask(rest)
        while join is not None:
            join.expected &= ~bits
            if join.waiting and join.arrived == join.expected:
                first = join.waiting[0]
                first._merge(join)
                first.wake()
            join = join.parent
        return empty
