"""tcgen05: tensor memory and the fifth-generation tensor core, for one CTA or a pair (PTX ISA 9.7.16).

mma, cp and shift of one thread complete in order where they share columns of tensor memory, and in any order else. The ISA's
list of in-order pairs lacks mma before cp; kernels rely on it when they load the next scales, so it is kept here too.

Compilers leave tcgen05.fence out where mbarriers have acquire and release semantics. A kernel with such a fence anywhere is
held to fences everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from glu4.emulator.async_queue import Operation, Work
from glu4.emulator.clocks import ACQUIRED, ALLOC, ASYNC, BEFORE, FENCED, KNOWN, LOAD, STORE, STREAM, TENSOR
from glu4.emulator.hazards import VIA_ASYNC, VIA_TENSOR, Origin
from glu4.emulator.isa import tcgen05_mma
from glu4.emulator.isa.access import Fault, addresses, find
from glu4.emulator.isa.asynchronous import Issue
from glu4.emulator.isa.control import aligned
from glu4.emulator.isa.mbarrier import barrier_at
from glu4.emulator.isa.registry import Builder, Context, Modifiers, Step, U
from glu4.emulator.isa.tmemory import TensorMemory, column_bits, index_of
from glu4.emulator.lanes import one_lane
from glu4.emulator.ptx.module import Vector
from glu4.emulator.split import Split, Wait
from glu4.emulator.tmem import Cells, register_cells

__all__ = ["INSTRUCTIONS"]

_GROUPS = ("cta_group::1", "cta_group::2")
_SHAPES = ("32x32b", "16x64b", "16x128b", "16x256b", "16x32bx2")
_NUMBERS = tuple(f"x{1 << i}" for i in range(8))


def _report(w: Split, context: Context, kind: str, message: str) -> None:
    w.warp.cta.machine.monitor.report(kind, message, Origin(context.instruction, w.warp, w.mask))


def _uniform(w: Split, context: Context, row: int, what: str) -> int:
    """The value that all active threads must agree on."""
    values = w.r[U][row][w.mask]
    if (values != values[0]).any():
        _report(w, context, "divergent execution", f"threads of the warp give different {what}")
    return int(values[0])


# allocation


def _pair(w: Split, group: int) -> list[Any]:
    """The CTAs that take part: one, or the pair, the even one first."""
    cta = w.warp.cta
    if group == 1:
        return [cta]
    ctas = cta.cluster.ctas
    even = cta.rank & ~1
    return ctas[even : even + 2]


def _check_group(w: Split, context: Context, memory: TensorMemory, group: int) -> bool:
    if memory.group not in (0, group):
        _report(w, context, "tensor memory misuse", f"cta_group::{group} in a kernel that also uses cta_group::{memory.group}")
    memory.group = group
    if group == 2 and len(_pair(w, 2)) != 2:
        _report(w, context, "tensor memory misuse", "cta_group::2 needs a cluster with pairs of CTAs")
        return False
    return True


def _collective(context: Context, name: str, group: int, body: Any) -> Step:
    """Run `body(splits, columns)` once one warp of each CTA of the group is here with the same number of columns."""

    def step(w: Split, columns: int, extra: int) -> Any:
        memory = TensorMemory.of(w.warp.cta)
        if not _check_group(w, context, memory, group):
            return None
        ctas = _pair(w, group)
        arrivals: dict[int, tuple[Split, int, int]] = ctas[0].extra.setdefault(("collective", name), {})
        recorder, meeting = w.warp.cta.machine.recorder, _meeting(w, ctas, name)
        arrivals[w.warp.cta.rank] = (w, columns, extra)
        if len(arrivals) < len(ctas):
            if recorder is not None and meeting is not None:
                recorder.awaits(w, *meeting)
            return w.block(Wait(f"the peer CTA's {name}"))
        if recorder is not None and meeting is not None:
            recorder.waited(w, *meeting)
        everyone = [arrivals[c.rank] for c in ctas]
        arrivals.clear()
        if len({c for _, c, _ in everyone}) > 1:
            _report(w, context, "tensor memory misuse", "the CTAs of the pair give different numbers of columns")
        merged = everyone[0][0].clock.copy()
        for split, _, _ in everyone[1:]:
            merged.merge(split.clock)
        return body(w, everyone, merged)

    return step  # type: ignore[return-value]


def _meeting(w: Split, ctas: list[Any], name: str) -> tuple[Any, int] | None:
    """Record an arrival where two CTAs meet: (key, number) of the meeting, None for one CTA or without a recording."""
    recorder = w.warp.cta.machine.recorder
    if recorder is None or len(ctas) < 2:
        return None
    key = ("meeting", ctas[0].cluster.number, ctas[0].rank, name)
    counts: dict[int, int] = ctas[0].extra.setdefault(key, {})
    number = counts[w.warp.cta.rank] = counts.get(w.warp.cta.rank, 0) + 1
    recorder.arrived(w, key, f"{name} of both CTAs", number)
    return key, number


def _alloc(context: Context, mods: Modifiers, group: int) -> Step:
    if not mods.take("sync", "aligned"):
        raise mods.fail()
    space = mods.choice(("shared::cta",), "generic")
    mods.choice(("b32",))
    place, count = context.operands(2)
    where, columns = addresses(context.address(place)), context.source(count, "b32")

    def finish(w: Split, everyone: list[Any], merged: Any) -> Any:
        memories = [TensorMemory.of(split.warp.cta) for split, _, _ in everyone]
        number = everyone[0][1]
        at = memories[0].free_place(number)
        if at is None or any(m.free_place(number) != at for m in memories):
            for split, size, target in everyone:
                memories[0].waiting.append((split, size, target))
                if split.state == 0:
                    split.block(Wait(f"{number} free columns of tensor memory"))
            return True
        for memory, (split, _, target) in zip(memories, everyone):
            memory.allocate(at, number, Origin(context.instruction, split.warp, split.mask))
            _write_address(split, context, space, target, at)
            if split is not w:
                split.wake()
        return None

    meet: Any = _collective(context, "tcgen05.alloc", group, finish)

    def step(w: Split) -> Any:
        aligned(w, context)
        number = _uniform(w, context, columns, "numbers of columns")
        memory = TensorMemory.of(w.warp.cta)
        if number not in (32, 64, 128, 256, 512):
            _report(w, context, "tensor memory misuse", f"{number} columns: a power of two from 32 to 512 is needed")
            return None
        if memory.relinquished:
            _report(w, context, "tensor memory misuse", "allocation after relinquish_alloc_permit")
        if number > memory.smallest:
            _report(
                w,
                context,
                "tensor memory misuse",
                f"{number} columns after an allocation of {memory.smallest}: sizes must not grow",
            )
        memory.smallest = min(memory.smallest, number)
        return meet(w, number, int(where(w)[0]))

    return step


def _write_address(w: Split, context: Context, space: str, target: int, value: int) -> None:
    """The address of the allocation, to shared memory."""
    try:
        block, offset = find(w, space, target)
        if offset % 4 or not 0 <= offset <= block.size - 4:
            raise Fault("out of bounds", "the address is written outside shared memory", target)
    except Fault as problem:
        _report(w, context, problem.kind, problem.message)
        return
    block.view(4)[offset // 4] = value
    w.warp.cta.machine.progress += 1
    if block.writes.size:
        # ordered before later accesses through either proxy: it keeps same-address order (PTX ISA 9.7.16.6.1)
        warp = w.warp
        warp.counts[ALLOC] += 1
        entity, time = warp.entity + ALLOC, warp.counts[ALLOC]
        monitor = warp.cta.machine.monitor
        origin = Origin(context.instruction, warp, one_lane(int(np.argmax(w.mask))))
        number = monitor.record(origin, entity, time, block, np.array([offset // 4]), 4, VIA_ASYNC)
        monitor.access(number, w.clock, KNOWN, True)
        w.clock.know(entity, time)


def _dealloc(context: Context, mods: Modifiers, group: int) -> Step:
    if not mods.take("sync", "aligned", "b32"):
        raise mods.fail()
    place, count = context.operands(2)
    base, columns = context.source(place, "b32"), context.source(count, "b32")

    def finish(w: Split, everyone: list[Any], merged: Any) -> Any:
        for split, number, address in everyone:
            memory = TensorMemory.of(split.warp.cta)
            first = address & 0xFFFF
            known = memory.allocated.get(first)
            if known is None or known[0] != number or address >> 16:
                text = f"columns {first} to {first + number - 1} were not allocated as such"
                _report(split, context, "tensor memory lifetime", text)
            else:
                _check_idle(split, context, memory, first, number, merged)
                del memory.allocated[first]
            if split is not w:
                split.wake()
        _retry(everyone[0][0].warp.cta, group)
        return None

    meet: Any = _collective(context, "tcgen05.dealloc", group, finish)

    def step(w: Split) -> Any:
        aligned(w, context)
        return meet(w, _uniform(w, context, columns, "numbers of columns"), _uniform(w, context, base, "addresses"))

    return step


def _check_idle(w: Split, context: Context, memory: TensorMemory, first: int, number: int, clock: Any) -> None:
    """All accesses to columns that are given back must have happened before."""
    monitor = w.warp.cta.machine.monitor
    bits = ((1 << number) - 1) << first
    for operation in list(w.warp.cta.machine.queue.pending):
        if operation.columns.get(memory.cta.rank, 0) & bits and operation.origin.warp.cta.cluster is memory.cta.cluster:
            monitor.report("tensor memory lifetime", f"columns {first} to {first + number - 1} are given back while in use",
                           Origin(context.instruction, w.warp, w.mask), other=monitor.describe(operation.origin))  # fmt: skip
            w.warp.cta.machine.complete(operation)  # so that what orders the two is looked at as under other schedules
    if memory.block.writes.size:
        index = (slice(0, 128), slice(first, first + number))
        number_of = monitor.record(
            Origin(context.instruction, w.warp, w.mask), w.warp.entity, w.warp.time, memory.block, index, 1, VIA_TENSOR
        )
        monitor.access(number_of, clock, KNOWN, True)


def _retry(cta: Any, group: int) -> None:
    """Wake what waits for columns; it tries again."""
    owner = cta.cluster.ctas[cta.rank & ~1] if group == 2 else cta
    memory = TensorMemory.of(owner)
    waiting, memory.waiting = memory.waiting, []
    for split, _, _ in waiting:
        split.pc -= 1
        split.wake()


def _relinquish(context: Context, mods: Modifiers, group: int) -> Step:
    if not mods.take("sync", "aligned"):
        raise mods.fail()
    context.operands(0)

    def step(w: Split) -> None:
        aligned(w, context)
        memory = TensorMemory.of(w.warp.cta)
        _check_group(w, context, memory, group)
        memory.relinquished = True

    return step


# loads and stores


def _strict(w: Split) -> bool:
    return bool(w.warp.cta.machine.tensor_fences)


def tensor_issue(w: Split, context: Context) -> Issue:
    """An operation of the tensor proxy, as far as tensor memory goes."""
    return Issue(w, context, proxy=TENSOR if _strict(w) else KNOWN)


def _register_operands(context: Context, operand: Any, shape: str, number: int, load: bool) -> list[int]:
    count = number * {"16x128b": 2, "16x256b": 4}.get(shape, 1)
    if count > 128:
        raise context.error(f"{shape}.x{number} does not exist")
    parts = context.vector(operand, count) if isinstance(operand, Vector) or count > 1 else (operand,)
    return [(context.destination if load else context.source)(p, "b32") for p in parts]


def _transfer(context: Context, mods: Modifiers, load: bool) -> Step:
    if not mods.take("sync", "aligned"):
        raise mods.fail()
    shape = mods.choice(_SHAPES)
    number = int(mods.choice(_NUMBERS)[1:])
    packed = mods.take("pack::16b" if load else "unpack::16b")
    mods.choice(("b32",))
    split_half = shape == "16x32bx2"
    operands = list(context.operands(3 if split_half else 2))
    data = operands.pop(0) if load else operands.pop()
    place = context.address(operands[0])
    half = context.literal(operands[1]) if split_half else 0
    rows = _register_operands(context, data, shape, number, load)
    where = addresses(place)

    def step(w: Split) -> None:
        aligned(w, context)
        at = where(w)
        if (at != at[0]).any():
            _report(w, context, "divergent execution", "threads of the warp give different addresses")
        issue = tensor_issue(w, context)
        try:
            cells = register_cells(int(at[0]) & 0xFFFFFFFF, shape, number, packed=packed, half_split=half)
        except ValueError as problem:
            issue.report("tensor memory misuse", str(problem))
            return
        if not _reachable(w, issue, cells):
            return
        (_load if load else _store)(w, issue, cells, rows, packed)

    return step


def _reachable(w: Split, issue: Issue, cells: Cells) -> bool:
    """Whether the lanes are in the warp's quarter and the columns are allocated."""
    quarter = w.warp.number % 4
    if int(cells.lanes.min()) < 32 * quarter or int(cells.lanes.max()) >= 32 * quarter + 32:
        text = f"warp {w.warp.number} reaches lanes {32 * quarter} to {32 * quarter + 31}, not {int(cells.lanes.min())}"
        issue.report("tensor memory misuse", text)
        return False
    memory = TensorMemory.of(w.warp.cta)
    if not memory.covers(column_bits(cells)):
        issue.report(
            "tensor memory lifetime", f"columns {int(cells.columns.min())} to {int(cells.columns.max())} are not all allocated"
        )
        return False
    return True


def _track(w: Split, issue: Issue, cells: Cells, name: str, run: Any, kind: int) -> Operation:
    """Submit a load or store and count it for its wait."""
    size = np.broadcast_shapes(cells.lanes.shape, cells.columns.shape)
    operation = Operation(name, issue.origin, run, work=Work("TMEM ld/st", bytes=4 * math.prod(size)))
    operation.columns = {w.warp.cta.rank: column_bits(cells)}
    w.warp.extra.setdefault(("tcgen05", kind), []).append(operation)
    issue.machine.submit(operation)
    return operation


def _load(w: Split, issue: Issue, cells: Cells, rows: list[int], packed: bool) -> None:
    memory = TensorMemory.of(w.warp.cta)
    warp, frame = w.warp, w.frame
    warp.counts[LOAD] += 1
    time = warp.counts[LOAD]
    index = index_of(cells)

    def run() -> None:
        issue.flags = VIA_TENSOR
        issue.access(memory.block, index, 1, warp.entity + LOAD, time, False)
        words = memory.cells[index]
        if packed:
            words = (words[..., 0] & np.uint32(0xFFFF)) | (words[..., 1] << np.uint32(16))
        for k, row in enumerate(rows):
            frame.rows[U][row][...] = words[:, k]

    for row in rows:
        frame.pending[row] = (-time, "load")
    operation = _track(w, issue, cells, "tcgen05.ld", run, LOAD)
    frame.loads[-time] = operation


def _store(w: Split, issue: Issue, cells: Cells, rows: list[int], packed: bool) -> None:
    memory = TensorMemory.of(w.warp.cta)
    warp = w.warp
    warp.counts[STORE] += 1
    time = warp.counts[STORE]
    values = np.stack([w.r[U][row] for row in rows], axis=1)
    index = index_of(cells)

    def run() -> None:
        issue.flags = VIA_TENSOR
        data = values if not packed else np.stack((values & np.uint32(0xFFFF), values >> np.uint32(16)), axis=-1)
        memory.cells[index] = data
        issue.access(memory.block, index, 1, warp.entity + STORE, time, True)

    _track(w, issue, cells, "tcgen05.st", run, STORE)


def _wait(context: Context, mods: Modifiers, kind: int) -> Step:
    if not mods.take("sync", "aligned"):
        raise mods.fail()
    context.operands(0)

    def step(w: Split) -> Any:
        aligned(w, context)
        warp = w.warp
        operations: list[Operation] = warp.extra.get(("tcgen05", kind), [])
        waiting = [o for o in operations if not o.done]
        if waiting:
            w.pc -= 1
            for operation in waiting:
                operation.waiters.append(w)
            return w.block(Wait(f"{len(waiting)} tcgen05 operations in flight"))
        if operations and warp.cta.machine.recorder is not None:
            warp.cta.machine.recorder.waited_for(w, operations, context.instruction.name)
        operations.clear()
        rows = w.clock.fit(warp.cta.cluster.entities)
        for row in (TENSOR, BEFORE, KNOWN):
            rows[row, warp.entity + kind] = warp.counts[kind]
        if kind == LOAD:
            w.frame.loads.clear()
            for row in [row for row, (_, how) in w.frame.pending.items() if how == "load"]:
                del w.frame.pending[row]
        return None

    return step


def _fence(context: Context, before: bool) -> Step:
    context.operands(0)

    # what a fence has ordered travels in the row of the async proxy, which has no other use for these entities; the fences
    # work with relaxed arrivals and waits, too (PTX ISA 9.7.16.6.4)
    def step(w: Split) -> None:
        rows = w.clock.rows
        if before:
            for row in (ASYNC, FENCED + 1):
                np.maximum(rows[row], rows[BEFORE], out=rows[row])
        else:
            for row in (ASYNC, ACQUIRED + 1):
                np.maximum(rows[TENSOR], rows[row], out=rows[TENSOR])

    return step


# the stream of one thread: mma, cp, shift and commit


def _commit(context: Context, mods: Modifiers, group: int) -> Step:
    if not mods.take("mbarrier::arrive::one"):
        raise mods.fail()
    space = mods.choice(("shared::cluster",), "generic")
    multicast = mods.take("multicast::cluster")
    mods.choice(("b64",))
    operands = context.operands(2 if multicast else 1)
    where = addresses(context.address(operands[0]))
    mask = context.source(operands[1], "b16") if multicast else None

    def step(w: Split) -> None:
        warp = w.warp
        _check_group(w, context, TensorMemory.of(warp.cta), group)
        for i, lane in enumerate(np.flatnonzero(w.mask).tolist()):
            address = int(where(w)[i])
            barrier = barrier_at(w, context, space, address)
            if barrier is None:
                continue
            issue = Issue(w, context, one_lane(lane))
            targets = [barrier]
            if mask is not None:
                targets = _multicast(issue, barrier, int(w.r[U][mask][lane]))
            time = warp.counts[STREAM]
            message = issue.message()
            entity = warp.entity + STREAM
            if message.shape[1] <= entity:
                message = np.pad(message, ((0, 0), (0, entity + 1 - message.shape[1])))
            message[:, entity] = time
            stream: list[Operation] = warp.extra.setdefault("tcgen05 stream", [])
            earlier = tuple(o for o in stream if not o.done)
            stream[:] = earlier

            def run(targets: Any = targets, message: Any = message, issue: Issue = issue) -> None:
                for target in targets:
                    target.signalled(issue.origin, target.entity, target.serial + 1)
                    target.arrive(1, issue.origin, message)

            issue.submit("tcgen05.commit", run, earlier)

    return step


def _multicast(issue: Issue, barrier: Any, mask: int) -> list[Any]:
    ctas = barrier.cta.cluster.ctas
    if not mask or mask >> len(ctas):
        issue.report("multicast", f"mask {mask:#x} names CTAs outside the cluster of {len(ctas)}")
    found = []
    for cta in ctas:
        if mask >> cta.rank & 1:
            there = cta.mbarriers.get(barrier.offset)
            if there is None:
                issue.report("mbarrier misuse", f"multicast: no mbarrier at offset {barrier.offset} of CTA {cta.rank}")
            else:
                found.append(there)
    return found


def _tcgen05(context: Context, mods: Modifiers) -> Step:
    word = mods.choice(
        ("alloc", "dealloc", "relinquish_alloc_permit", "ld", "st", "wait::ld", "wait::st", "cp", "mma", "shift", "commit",
         "fence::before_thread_sync", "fence::after_thread_sync")
    )  # fmt: skip
    if word.startswith("fence::"):
        return _fence(context, "before" in word)
    if word in ("ld", "st"):
        return _transfer(context, mods, word == "ld")
    if word.startswith("wait::"):
        return _wait(context, mods, LOAD if word == "wait::ld" else STORE)
    down = word == "shift" and mods.take("down")  # the ISA words the two the other way round in its examples
    stationary = word == "mma" and mods.take("ws")
    group = int(mods.choice(_GROUPS)[-1])
    if stationary:
        return tcgen05_mma.multiply(context, mods, group, True)
    if down:
        mods.words.append("down")
    if word in ("mma", "cp", "shift"):
        build = {"mma": tcgen05_mma.multiply, "cp": tcgen05_mma.copy, "shift": tcgen05_mma.shift}[word]
        return build(context, mods, group)
    build = {"alloc": _alloc, "dealloc": _dealloc, "relinquish_alloc_permit": _relinquish, "commit": _commit}[word]
    return build(context, mods, group)


INSTRUCTIONS: dict[str, Builder] = {"tcgen05": _tcgen05}
