"""mbarrier: counts, transaction bytes and phases (PTX ISA 9.7.13.15), and what goes wrong with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.clocks import ACQUIRED, FENCED, INIT, KNOWN, Clock, Message, combine, combine_foreign
from glu4.emulator.hazards import Origin
from glu4.emulator.isa.access import Fault, addresses, shared_offset, window
from glu4.emulator.isa.registry import Builder, Context, Modifiers, Step, U
from glu4.emulator.ptx.module import Address, Operand, Sink
from glu4.emulator.split import Split, Wait

if TYPE_CHECKING:
    from glu4.emulator.warp import Cta

__all__ = ["INSTRUCTIONS", "MBarrier", "barrier_at", "check_exit"]

_MAX_COUNT = (1 << 20) - 1
_SPACES = ("shared", "shared::cta", "shared::cluster")


class MBarrier:
    """One mbarrier. entity: of the asynchronous operations that complete on it; serial: its time, phases of all its lives."""

    __slots__ = (
        "copied",
        "count",
        "cta",
        "entity",
        "foreign",
        "init",
        "message",
        "offset",
        "origin",
        "pending",
        "phase",
        "released",
        "remote",
        "serial",
        "tx",
        "waiting",
    )

    def __init__(self, cta: Cta, offset: int, count: int, origin: Origin) -> None:
        self.cta = cta
        self.offset = offset
        self.count = count
        self.pending = count
        self.tx = 0
        self.phase = 0
        old = cta.extra.setdefault("mbarriers", {}).get(offset)
        self.entity = old.entity if old else cta.cluster.new_entity()
        self.serial = old.serial + 1 if old else 0
        cta.extra["mbarriers"][offset] = self
        self.init = (0, 0)
        self.copied = 0  # time of the last operation that writes shared memory and completes here
        # the last signal of each entity of other CTAs: its time, the phase it counts for, who
        self.remote: dict[int, tuple[int, int, Origin]] = {}
        self.message: Message | None = None
        self.released: Message | None = None
        self.foreign: dict[int, Message] | None = None  # what arrivals knew of other clusters
        self.waiting: list[Split] = []
        self.origin = origin

    @property
    def name(self) -> str:
        return f"mbarrier at {self.cta.shared.name}+{self.offset}"

    def next_time(self) -> int:
        """The time of an operation that completes in the running phase."""
        self.copied = self.serial + 1
        return self.copied

    def state(self) -> str:
        return f"phase {self.phase}, {self.pending} of {self.count} arrivals and {self.tx} bytes outstanding"

    def report(self, message: str, origin: Origin | None) -> None:
        self.cta.machine.monitor.report("mbarrier misuse", f"{self.name}: {message}", origin)

    def signalled(self, origin: Origin, entity: int, time: int) -> None:
        """Note a signal by another CTA, which has to come before this CTA's end; (entity, time): what is known with it."""
        if origin.warp.cta is not self.cta:
            self.remote[entity] = (time, self.serial + 1, origin)

    def arrive(self, count: int, origin: Origin, message: Message | None, drop: bool = False) -> None:
        if count > self.pending:
            self.report(f"{count} arrivals where {self.pending} are expected ({self.state()})", origin)
            count = self.pending
        if message is not None:
            self.message = combine(self.message, message)
        self.pending -= count
        if drop:
            self.count -= count
        self.update(origin)

    def add_tx(self, size: int, origin: Origin, message: Message | None = None) -> None:
        """expect_tx, or complete_tx with a negative size and what it releases."""
        if message is not None:
            self.message = combine(self.message, message)
            self.signalled(origin, self.entity, self.serial + 1)
        self.tx += size
        if abs(self.tx) > _MAX_COUNT:
            self.report(f"the count of transaction bytes leaves its range ({self.tx})", origin)
        self.update(origin)

    def update(self, origin: Origin) -> None:
        machine = self.cta.machine
        machine.progress += 1
        if machine.recorder is not None:
            machine.recorder.contribute(self)
        if not self.cta.alive and origin.warp.cta is not self.cta:
            machine.monitor.report(
                "cluster lifetime", f"{self.name}: signalled by another CTA after its own has exited", origin
            )
        if self.pending > 0:
            return
        if self.tx < 0:
            self.report(f"{-self.tx} bytes more were transferred than expected in phase {self.phase}", origin)
        if self.tx:
            return
        self.phase += 1
        self.serial += 1
        self.pending = self.count
        self.released = combine(self.released, self.message) if self.message is not None else self.released
        self.message = None
        waiting, self.waiting = self.waiting, []
        for split in waiting:
            split.wake()

    def acquire(self, clock: Clock, relaxed: bool = False) -> None:
        """A thread saw the last phase complete."""
        if self.released is not None:
            clock.receive(self.released, ACQUIRED if relaxed else KNOWN)
        clock.merge_foreign(self.foreign)
        clock.know(self.entity, self.serial)


def barrier_at(w: Split, context: Context, space: str, address: int) -> MBarrier | None:
    """The mbarrier at an address, or None after a report."""
    monitor = w.warp.cta.machine.monitor
    origin = Origin(context.instruction, w.warp, w.mask)
    if space == "generic":
        kind, address = window(address)
        if not kind.startswith("shared"):
            monitor.report("mbarrier misuse", "the address is not in shared memory", origin, f"{address:#x}")
            return None
    try:
        cta, offset = shared_offset(w, address)
        if cta is not w.warp.cta and space in ("shared", "shared::cta"):
            raise Fault("out of bounds", "the address is in another CTA's shared memory", address)
    except Fault as problem:
        monitor.report(problem.kind, problem.message, origin, f"{address:#x}")
        return None
    found: MBarrier | None = cta.mbarriers.get(offset)
    where = f"{cta.shared.name}+{offset}"
    if found is None:
        monitor.report("mbarrier misuse", "there is no initialised mbarrier here", origin, where)
        return None
    entity, time = found.init
    if monitor.enabled and w.clock.fit(cta.cluster.entities)[KNOWN, entity] < time:
        monitor.report("mbarrier misuse", "use of an mbarrier whose initialisation is not ordered before", origin, where,
                       other=monitor.describe(found.origin, where))  # fmt: skip
    return found


def check_exit(cta: Cta) -> None:
    """What is left open when all threads of a CTA have exited."""
    for barrier in cta.mbarriers.values():
        if barrier.tx:
            barrier.report(f"the kernel ended with {barrier.tx} transaction bytes outstanding", barrier.origin)
        if barrier.copied > _time(cta.cluster.exit_known, barrier.entity):
            message = f"{barrier.name}: threads exit without a wait for copies into shared memory"
            cta.machine.monitor.report("exit with work outstanding", message, barrier.origin)
        for entity, (time, phase, origin) in barrier.remote.items():
            if _time(cta.exit_known, entity) < time and _time(cta.exit_known, barrier.entity) < phase:
                message = f"{barrier.name}: a signal of another CTA that nothing orders before the end of this one"
                cta.machine.monitor.report("cluster lifetime", message, origin)


def _time(known: NDArray[Any], entity: int) -> int:
    return int(known[entity]) if entity < known.size else 0


def _space(mods: Modifiers) -> str:
    return mods.choice(_SPACES, "generic")


def _semantics(mods: Modifiers, strong: str) -> bool:
    """Take `.sem.scope`; True if relaxed."""
    if mods.words and mods.words[0] in (strong, "relaxed"):
        relaxed = mods.words.pop(0) == "relaxed"
        mods.choice(("cta", "cluster"))
        return relaxed
    return False


def _each(w: Split, where: NDArray[Any]) -> list[tuple[int, NDArray[Any]]]:
    """(address, positions) of the distinct addresses among the active lanes."""
    if where.size == 1 or (where == where[0]).all():
        return [(int(where[0]), np.arange(where.size))]
    return [(a, np.flatnonzero(where == a)) for a in sorted(set(where.tolist()))]


def _init(context: Context, mods: Modifiers) -> Step:
    space = _space(mods)
    mods.choice(("b64",))
    place, operand = context.operands(2)
    where, count = addresses(context.address(place)), context.source(operand, "u32")

    def step(w: Split) -> None:
        warp = w.warp
        origin = Origin(context.instruction, warp, w.mask)
        counts = w.r[U][count][w.mask]
        monitor = warp.cta.machine.monitor
        for address, positions in _each(w, where(w)):
            kind, local = window(address) if space == "generic" else ("shared", address)
            offset = local - warp.cta.shared.base
            if not kind.startswith("shared") or not 0 <= offset <= warp.cta.shared.size - 8 or offset % 8:
                monitor.report(
                    "out of bounds", "mbarrier.init outside the CTA's shared memory or misaligned", origin, f"{address:#x}"
                )
                continue
            if positions.size > 1:
                monitor.report("mbarrier misuse", "several threads initialise one mbarrier", origin, f"{address:#x}")
            expected = int(counts[positions[0]])
            if not 1 <= expected <= _MAX_COUNT:
                monitor.report("mbarrier misuse", f"count {expected} is outside 1 to {_MAX_COUNT}", origin, f"{address:#x}")
            old = warp.cta.mbarriers.get(offset)
            if old is not None:
                old.report("initialised again without mbarrier.inval", origin)
            _create(w, context, offset, expected, origin)

    return step


def _create(w: Split, context: Context, offset: int, expected: int, origin: Origin) -> None:
    warp = w.warp
    barrier = MBarrier(warp.cta, offset, expected, origin)
    warp.counts[INIT] += 1
    barrier.init = (warp.entity + INIT, warp.counts[INIT])
    w.clock.fit(warp.cta.cluster.entities)[KNOWN, barrier.init[0]] = barrier.init[1]
    warp.cta.mbarriers[offset] = barrier
    shared = warp.cta.shared
    shared.data[offset : offset + 8] = 0xB7
    if shared.writes.size:
        monitor = warp.cta.machine.monitor
        number = monitor.record(origin, warp.entity, warp.time, shared, slice(offset, offset + 8), 8, 0)
        monitor.access(number, w.clock, KNOWN, True)


def _inval(context: Context, mods: Modifiers) -> Step:
    space = _space(mods)
    mods.choice(("b64",))
    where = addresses(context.address(context.operands(1)[0]))

    def step(w: Split) -> None:
        origin = Origin(context.instruction, w.warp, w.mask)
        for address, _ in _each(w, where(w)):
            barrier = barrier_at(w, context, space, address)
            if barrier is None:
                continue
            if barrier.tx or barrier.waiting:
                barrier.report(f"invalidated while in use ({barrier.state()})", origin)
            del barrier.cta.mbarriers[barrier.offset]
            if barrier.cta.shared.writes.size:
                monitor = w.warp.cta.machine.monitor
                number = monitor.record(
                    origin, w.warp.entity, w.warp.time, barrier.cta.shared, slice(barrier.offset, barrier.offset + 8), 8, 0
                )
                monitor.access(number, w.clock, KNOWN, True)

    return step


def _tx(context: Context, mods: Modifiers, sign: int) -> Step:
    _semantics(mods, "relaxed")
    space = _space(mods)
    mods.choice(("b64",))
    place, operand = context.operands(2)
    where, size = addresses(context.address(place)), context.source(operand, "u32")

    def step(w: Split) -> None:
        sizes = w.r[U][size][w.mask]
        for address, positions in _each(w, where(w)):
            barrier = barrier_at(w, context, space, address)
            if barrier is not None:
                barrier.add_tx(sign * int(sizes[positions].sum()), Origin(context.instruction, w.warp, w.mask))

    return step


def _arrive(context: Context, mods: Modifiers, drop: bool) -> Step:
    expect = mods.take("expect_tx")
    mods.take("noComplete")
    relaxed = _semantics(mods, "release")
    space = _space(mods)
    mods.choice(("b64",))
    operands: list[Operand] = list(context.operands(1, 3))
    state = None
    if len(operands) > 1 and not isinstance(operands[0], Address):
        first = operands.pop(0)
        state = None if isinstance(first, Sink) else context.destination(first, "b64")
    where = addresses(context.address(operands.pop(0)))
    if expect and len(operands) != 1:
        raise context.error("expected a number of bytes")
    extra = context.source(operands[0], "u32") if operands else None

    def step(w: Split) -> None:
        warp = w.warp
        origin = Origin(context.instruction, warp, w.mask)
        values = None if extra is None else w.r[U][extra][w.mask].astype(np.int64)
        now = warp.time
        message = warp.release(w, FENCED if relaxed else KNOWN)
        foreign = w.clock.foreign
        tokens = np.zeros(int(np.count_nonzero(w.mask)), dtype=np.uint64)
        for address, positions in _each(w, where(w)):
            barrier = barrier_at(w, context, space, address)
            if barrier is None:
                continue
            barrier.foreign = combine_foreign(barrier.foreign, foreign)
            barrier.signalled(origin, warp.entity, now)
            tokens[positions] = (barrier.phase << 20) | barrier.pending
            if expect:
                assert values is not None
                # both at once: the phase cannot complete in between
                barrier.tx += int(values[positions].sum())
                barrier.arrive(positions.size, origin, message, drop)
            else:
                count = positions.size if values is None else int(values[positions].sum())
                barrier.arrive(count, origin, message, drop)
        if state is not None:
            w.r[U][state][w.mask] = tokens

    return step


def _wait(context: Context, mods: Modifiers, blocking: bool) -> Step:
    parity = mods.take("parity")
    relaxed = _semantics(mods, "acquire")
    space = _space(mods)
    mods.choice(("b64",))
    operands = context.operands(3, 4 if blocking else 3)
    predicate = context.destination(operands[0], "pred")
    where = addresses(context.address(operands[1]))
    phase = context.source(operands[2], "u32" if parity else "b64")
    if len(operands) == 4:
        context.source(operands[3], "u32")

    def complete(barrier: MBarrier, wanted: int) -> bool:
        return (barrier.phase & 1) != (wanted & 1) if parity else barrier.phase != wanted >> 20

    def step(w: Split) -> Any:
        wanted = w.r[U][phase][w.mask]
        groups = _each(w, where(w))
        result = np.zeros(wanted.size, dtype=np.bool_)
        open_barrier: MBarrier | None = None
        recorder = w.warp.cta.machine.recorder
        timed_out, w.timed_out = w.timed_out, False
        for address, positions in groups:
            barrier = barrier_at(w, context, space, address)
            if barrier is None:
                result[positions] = True  # reported; going on shows what follows
                continue
            if timed_out and w in barrier.waiting:
                barrier.waiting.remove(w)
            for value in set(wanted[positions].tolist()):
                if complete(barrier, value):
                    result[positions[wanted[positions] == value]] = True
                    barrier.acquire(w.clock, relaxed)
                    if recorder is not None:
                        recorder.acquired(w, barrier)
                else:
                    open_barrier = barrier
        machine = w.warp.cta.machine
        if blocking and open_barrier is not None and not result.any() and not timed_out and not machine.schedule.gives_up():
            w.pc -= 1
            open_barrier.waiting.append(w)
            text = f"{open_barrier.name} ({open_barrier.state()}; waits for " + (
                f"parity {int(wanted[0])})" if parity else "its phase)"
            )
            return w.block(Wait(text, timeout=True))
        if recorder is not None and not result.any():
            recorder.polled(w)
        w.r[U][predicate][w.mask] = result
        return not result.all()

    return step


def _pending_count(context: Context, mods: Modifiers) -> Step:
    mods.choice(("b64",))
    d, a = context.operands(2)
    destination, source = context.destination(d, "u32"), context.source(a, "b64")

    def step(w: Split) -> None:
        w.put(w.r[U][destination], (w.r[U][source] & np.uint64(_MAX_COUNT)).astype(np.uint32))

    return step


def _mbarrier(context: Context, mods: Modifiers) -> Step:
    word = mods.choice(
        ("init", "inval", "expect_tx", "complete_tx", "arrive", "arrive_drop", "test_wait", "try_wait", "pending_count")
    )
    if word == "init":
        return _init(context, mods)
    if word == "inval":
        return _inval(context, mods)
    if word in ("expect_tx", "complete_tx"):
        return _tx(context, mods, 1 if word == "expect_tx" else -1)
    if word in ("arrive", "arrive_drop"):
        return _arrive(context, mods, word == "arrive_drop")
    if word == "pending_count":
        return _pending_count(context, mods)
    return _wait(context, mods, word == "try_wait")


INSTRUCTIONS: dict[str, Builder] = {"mbarrier": _mbarrier}
