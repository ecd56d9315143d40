"""Branches, calls, exits, barriers and fences."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.clocks import FENCED, INIT, KNOWN, PREVIOUS_GRID
from glu4.emulator.hazards import Origin
from glu4.emulator.isa.registry import Builder, Context, Modifiers, Step, U
from glu4.emulator.lanes import NONE
from glu4.emulator.ptx.module import Label, OperandList, Symbol
from glu4.emulator.split import Frame, Split, Wait

__all__ = ["INSTRUCTIONS", "aligned", "fence_generic", "guarded", "join_step", "off_the_end"]

EXIT = -1
_SCOPES = ("cta", "cluster", "gpu", "sys")
_OWN_GUARD = ("bra", "brx", "exit", "ret", "call")


def guarded(context: Context, step: Step) -> Step:
    """The step under its instruction's guard predicate."""
    guard = context.instruction.guard
    if guard is None or context.instruction.opcode in _OWN_GUARD:
        return step
    row, negated = context.source(guard[0], "pred"), guard[1]

    def run(w: Split) -> Any:
        p = w.r[U][row]
        active = w.mask & ~p if negated else w.mask & p
        key = active.tobytes()
        if key == NONE:
            return None
        if key == w.key:
            return step(w)
        mask = w.mask
        w.set_mask(active)
        try:
            return step(w)
        finally:
            w.set_mask(mask)

    return run


def _taken(context: Context) -> Any:
    """A function that gives the active lanes whose guard holds, or None for all of them."""
    guard = context.instruction.guard
    if guard is None:
        return lambda w: None
    row, negated = context.source(guard[0], "pred"), guard[1]

    def lanes(w: Split) -> NDArray[Any] | None:
        p = w.r[U][row]
        active = w.mask & ~p if negated else w.mask & p
        return None if active.tobytes() == w.key else active

    return lanes


def aligned(w: Split, context: Context) -> None:
    """Report an instruction that all threads of the warp must execute together, if some are elsewhere."""
    if w.key != w.warp.live.tobytes():
        message = f"{int(np.count_nonzero(w.mask))} of {int(np.count_nonzero(w.warp.live))} threads of the warp execute it"
        w.warp.cta.machine.monitor.report("divergent execution", message, Origin(context.instruction, w.warp, w.mask))


def join_step(place: int) -> Step:
    """Where splits of a divergent branch meet."""

    def step(w: Split) -> Any:
        while w.join is not None and w.join.place == place and w.join.frame is w.frame:
            if w.arrive():
                return True
        return None

    return step


def off_the_end(name: str) -> Step:
    """After the last instruction: as ret."""
    return _leave


def _leave(w: Split) -> Any:
    """Return from the function, or exit from the kernel."""
    frame = w.frame
    while w.join is not None and w.join.place == EXIT and w.join.frame is frame:
        w.pc -= 1
        if w.arrive():
            return True
    if frame.caller is None:
        w.drop(w.mask)
        return True
    back, place = frame.caller
    for formal, actual, size in frame.returns:
        _copy(frame, formal, back, actual, size, w.mask)
    w.enter(back, place)
    return True


def _bra(context: Context, mods: Modifiers) -> Step:
    uniform = mods.take("uni")
    (label,) = context.operands(1)
    if not isinstance(label, Label) or label.target < 0:
        raise context.error("expected a label")
    function, place = context.function, context.place
    target = label.target
    lanes = _taken(context)
    if context.instruction.guard is None:

        def jump(w: Split) -> None:
            w.pc = function.start[target]

        return jump
    guard = context.instruction.guard
    row, negated = context.source(guard[0], "pred"), guard[1]

    def step(w: Split) -> None:
        p = w.r[U][row]
        key = p.tobytes() if w.full else (p & w.mask).tobytes()
        if key == NONE:
            if negated:
                w.pc = function.start[target]
        elif key == w.key:
            if not negated:
                w.pc = function.start[target]
        else:
            if uniform:
                _report(w, context, "divergent execution", "bra.uni whose threads do not agree")
            taken = lanes(w)
            assert taken is not None
            w.diverge(taken, function.start[target], function.reconverge.get(place))

    return step


def _brx(context: Context, mods: Modifiers) -> Step:
    if not mods.take("idx"):
        raise mods.fail()
    mods.take("uni")
    index, label = context.operands(2)
    if not isinstance(label, Label) or label.name not in context.function.function.tables:
        raise context.error("expected the label of a .branchtargets")
    targets = context.function.function.tables[label.name]
    row = context.source(index, "u32")
    function, place = context.function, context.place
    if context.instruction.guard is not None:
        raise context.error("a guarded brx is not modelled")

    def step(w: Split) -> Any:
        values = w.r[U][row]
        wanted = sorted(set(values[w.mask].tolist()))
        if wanted[-1] >= len(targets):
            _report(w, context, "out of bounds", f"branch index {wanted[-1]} of {len(targets)} targets")
            w.drop(w.mask)
            return True
        for value in wanted[1:]:
            w.diverge(w.mask & (values == value), function.start[targets[value]], function.reconverge.get(place))
        w.pc = function.start[targets[wanted[0]]]
        return None

    return step


def _report(w: Split, context: Context, kind: str, message: str) -> None:
    w.warp.cta.machine.monitor.report(kind, message, Origin(context.instruction, w.warp, w.mask))


def _exit(context: Context, mods: Modifiers) -> Step:
    context.operands(0)
    lanes = _taken(context)

    def step(w: Split) -> Any:
        gone = lanes(w)
        gone = w.mask if gone is None else gone
        return bool(gone.any()) and w.drop(gone)

    return step


def _ret(context: Context, mods: Modifiers) -> Step:
    mods.take("uni")
    context.operands(0)
    lanes = _taken(context)
    function, place = context.function, context.place

    def step(w: Split) -> Any:
        gone = lanes(w)
        if gone is None:
            return _leave(w)
        if not gone.any():
            return None
        if w.frame.caller is None:
            return w.drop(gone)
        # the lanes that return wait at the function's end for the others
        w.diverge(gone, len(function.code) - 1, function.reconverge.get(place))
        return None

    return step


def _call(context: Context, mods: Modifiers) -> Step:
    mods.take("uni")
    operands = list(context.instruction.operands)
    returns = operands.pop(0).elements if operands and isinstance(operands[0], OperandList) else ()  # type: ignore[union-attr]
    if not operands or not isinstance(operands[0], Symbol):
        raise context.error("only direct calls are modelled")
    name = operands[0].name
    code = context.function.program.functions.get(name)
    if code is None:
        raise context.error(f"{name} has no body in this module")
    arguments = operands[1].elements if len(operands) > 1 and isinstance(operands[1], OperandList) else ()
    callee = code.function
    if len(arguments) != len(callee.params) or len(returns) != len(callee.returns):
        raise context.error(f"{name} takes {len(callee.params)} arguments and returns {len(callee.returns)}")
    if context.instruction.guard is not None:
        raise context.error("a guarded call is not modelled")
    names = [_actual(context, a, v) for a, v in zip(arguments, callee.params)]
    inward = [(actual, v.name, v.size) for actual, v in zip(names, callee.params)]
    outward = tuple((v.name, _actual(context, a, v), v.size) for a, v in zip(returns, callee.returns))

    def step(w: Split) -> Any:
        base = w.frame.local_base + w.frame.function.local_size
        frame = Frame(code, w.warp, base)
        depth, at = 0, w.frame
        while at.caller is not None:
            depth, at = depth + 1, at.caller[0]
        if depth > 200 or base + code.local_size > 1 << 20:
            _report(w, context, "stack overflow", f"calls nested {depth} deep")
            w.drop(w.mask)
            return True
        w.warp.grow_local(base + code.local_size)
        for actual, formal, size in inward:
            _copy(w.frame, actual, frame, formal, size, w.mask)
        frame.caller = (w.frame, w.pc)
        frame.returns = outward
        w.enter(frame, 0)
        return True

    return step


def _actual(context: Context, actual: Any, formal: Any) -> str:
    """Name of the .param variable that carries an argument."""
    if not isinstance(actual, Symbol) or formal.space != "param":
        raise context.error("only arguments in .param variables are modelled")
    return actual.name


def _copy(source: Any, name: str, target: Any, formal: str, size: int, mask: NDArray[Any]) -> None:
    """An argument or result from the buffer of one frame to another's, for the active lanes."""
    size = max(size, 1)
    values = source.buffers.get(name)
    room = target.buffers.setdefault(formal, np.full((32, size), 0xD7, np.uint8))
    if values is not None:
        count = min(room.shape[1], values.shape[1])
        room[mask, :count] = values[mask, :count]


# barriers


def _count_lanes(w: Split, is_aligned: bool) -> int:
    """Threads that an arrival counts for: threads of the warp that exist no more count with the others."""
    active = int(np.count_nonzero(w.mask))
    dead = 32 - int(np.count_nonzero(w.warp.live))
    return 32 if is_aligned or active + dead == 32 else active


def _barrier(context: Context, mods: Modifiers) -> Step:
    short = context.instruction.opcode == "bar"
    if mods.take("warp", "sync"):
        return _warp_sync(context)
    if not short and mods.take("cluster"):
        return _cluster_barrier(context, mods)
    mods.take("cta")
    action = mods.choice(("sync", "red", "arrive"))
    operation = mods.choice(("popc", "and", "or")) if action == "red" else ""
    is_aligned = mods.take("aligned") or short
    result: int | None = None
    source: tuple[int, bool] = (0, False)
    operands = list(context.operands(1, 4))
    if operation:
        kind = mods.choice(("u32",) if operation == "popc" else ("pred",))
        result = context.destination(operands.pop(0), kind)
        source = context.predicate(operands.pop())
    if not 1 <= len(operands) <= 2 or (action == "arrive" and len(operands) != 2):
        raise context.error("wrong number of operands")
    number = context.source(operands[0], "u32")
    threads = context.source(operands[1], "u32") if len(operands) == 2 else None

    def finish(split: Split, total: Any) -> None:
        assert result is not None
        value = total if operation == "popc" else bool(total)
        row = split.r[U][result]
        np.copyto(row, np.asarray(value).astype(row.dtype), where=split.mask)

    def step(w: Split) -> Any:
        first = int(np.argmax(w.mask))
        which = int(w.r[U][number][first])
        count = 0 if threads is None else int(w.r[U][threads][first])
        if is_aligned:
            aligned(w, context)
        if which > 15 or count % 32:
            _report(w, context, "barrier misuse", f"barrier {which} with {count} threads")
            return None
        values = w.r[U][source[0]] ^ source[1] if operation else None
        return _arrive(w, context, which, count, is_aligned, action != "arrive", (operation, values, finish))

    return step


def _arrive(w: Split, context: Context, which: int, count: int, is_aligned: bool, wait: bool, reduction: Any) -> Any:
    cta = w.warp.cta
    barrier = cta.barriers[which]
    if barrier.arrived and barrier.expected != count:
        _report(
            w,
            context,
            "barrier misuse",
            f"barrier {which} expects {barrier.expected or 'all'} threads, arrival says {count or 'all'}",
        )
    barrier.expected = count
    barrier.origin = Origin(context.instruction, w.warp, w.mask)
    barrier.release(w, w.warp.release(w))
    recorder, phase = cta.machine.recorder, barrier.phase
    key = ("barrier", cta.cluster.number, cta.rank, which)
    if recorder is not None:
        recorder.arrived(w, key, f"barrier {which}", phase)
    operation, values, finish = reduction
    if operation:
        active = values[w.mask]
        if operation == "popc":
            barrier.reduction = (barrier.reduction or 0) + int(active.sum())
        elif operation == "and":
            barrier.reduction = bool(active.all()) and barrier.reduction is not False
        else:
            barrier.reduction = bool(active.any()) or bool(barrier.reduction)
    barrier.arrived += int(np.count_nonzero(w.mask)) if count == 0 else _count_lanes(w, is_aligned)
    if wait:
        barrier.waiting.append((w, finish if operation else None))
        w.block(Wait(f"barrier {which}"))
        if recorder is not None:
            recorder.awaits(w, key, phase)
    if count and barrier.arrived > count:
        _report(w, context, "barrier misuse", f"{barrier.arrived} threads arrive at barrier {which} of {count}")
    if barrier.arrived >= (count or cta.alive):
        barrier.complete()
    return wait


def _cluster_barrier(context: Context, mods: Modifiers) -> Step:
    action = mods.choice(("arrive", "wait"))
    order = mods.choice(("release", "relaxed") if action == "arrive" else ("acquire",), "")
    is_aligned = mods.take("aligned")
    context.operands(0)

    def arrive(w: Split) -> None:
        if is_aligned:
            aligned(w, context)
        warp = w.warp
        cluster = warp.cta.cluster
        barrier = cluster.barrier
        arrived = warp.extra.setdefault("cluster_arrived", np.full(32, -1))
        if (arrived[w.mask] >= barrier.phase).any():
            _report(w, context, "barrier misuse", "barrier.cluster.arrive twice without barrier.cluster.wait")
            return
        arrived[w.mask] = barrier.phase
        barrier.arrived += int(np.count_nonzero(w.mask))
        if warp.cta.machine.recorder is not None:
            warp.cta.machine.recorder.arrived(w, ("cluster", cluster.number), "the cluster's barrier", barrier.phase)
        barrier.release(w, warp.release(w, FENCED if order == "relaxed" else KNOWN))
        cluster.check_barrier()

    def wait(w: Split) -> Any:
        if is_aligned:
            aligned(w, context)
        warp = w.warp
        barrier = warp.cta.cluster.barrier
        arrived = warp.extra.setdefault("cluster_arrived", np.full(32, -1))
        phase = int(arrived[w.mask].max())
        if phase < 0 or (arrived[w.mask] != phase).any():
            _report(w, context, "barrier misuse", "barrier.cluster.wait without barrier.cluster.arrive")
            return None
        if barrier.phase > phase:
            message, foreign = warp.cta.cluster.released
            if message is not None:
                w.clock.receive(message)
            w.clock.merge_foreign(foreign)
            warp.met()
            if warp.cta.machine.recorder is not None:
                warp.cta.machine.recorder.waited(w, ("cluster", warp.cta.cluster.number), phase)
            return None
        w.pc -= 1
        barrier.waiting.append((w, None))
        return w.block(Wait("barrier.cluster.wait"))

    return arrive if action == "arrive" else wait


def _warp_sync(context: Context) -> Step:
    from glu4.emulator.isa.warpwide import together

    (members,) = context.operands(1)

    def body(w: Split) -> None:
        w.warp.met()

    return together(context, context.source(members, "b32"), body)


# fences


def _fence(context: Context, mods: Modifiers) -> Step:
    if mods.take("mbarrier_init", "release", "cluster"):
        context.operands(0)
        return _fence_init
    if mods.take("proxy"):
        return _fence_proxy(context, mods)
    order = mods.choice(("sc", "acq_rel", "acquire", "release"), "acq_rel")
    if mods.words and mods.words[0].startswith("sync_restrict::"):
        mods.choice(("sync_restrict::shared::cta", "sync_restrict::shared::cluster"))
    mods.choice(_SCOPES)
    context.operands(0)
    return lambda w: fence_generic(w, order)


def fence_generic(w: Split, order: str) -> None:
    if order != "release":
        w.clock.acquire_fence()
    if order != "acquire":
        w.warp.fence_release(w)


def _fence_init(w: Split) -> None:
    entity = w.warp.entity + INIT
    rows = w.clock.rows
    rows[FENCED, entity] = rows[KNOWN, entity]


def _fence_proxy(context: Context, mods: Modifiers) -> Step:
    if mods.take("tensormap::generic"):
        from glu4.emulator.isa import tensormap

        return tensormap.fence(context, mods)
    if mods.take("async::generic"):
        mods.choice(("acquire", "release"))
        mods.choice(("sync_restrict::shared::cta", "sync_restrict::shared::cluster"))
        mods.choice(("cluster",))
        context.operands(0)
    else:
        kind = mods.choice(("async", "async.global", "alias"))
        if kind == "async":
            mods.choice(("global", "shared::cta", "shared::cluster"), "")
        context.operands(0)
        if kind == "alias":
            return lambda w: None
    return lambda w: w.warp.fence_async(w)


def _membar(context: Context, mods: Modifiers) -> Step:
    if mods.take("proxy"):
        return _fence_proxy(context, mods)
    mods.choice(("cta", "gl", "sys"))
    context.operands(0)
    return lambda w: fence_generic(w, "sc")


# the rest


def _setmaxnreg(context: Context, mods: Modifiers) -> Step:
    mods.choice(("inc", "dec"))
    if not mods.take("sync", "aligned", "u32"):
        raise mods.fail()
    count = context.literal(context.operands(1)[0])
    if not 24 <= count <= 256 or count % 8:
        raise context.error(f"expected 24 to 256 registers in steps of 8, found {count}")
    return lambda w: aligned(w, context)


def _griddepcontrol(context: Context, mods: Modifiers) -> Step:
    action = mods.choice(("launch_dependents", "wait"))
    context.operands(0)
    if action == "launch_dependents":
        return lambda w: None

    def wait(w: Split) -> None:  # all of the grid in front is visible from here on (PTX ISA 9.7.13.13)
        w.warp.cta.machine.grid_in_front_ends()
        w.clock.know(PREVIOUS_GRID, 1)

    return wait


def _trap(context: Context, mods: Modifiers) -> Step:
    context.operands(0)

    def step(w: Split) -> Any:
        _report(w, context, "trap", "the kernel stopped itself")
        w.warp.cta.machine.stopped = True
        w.drop(w.mask)
        return True

    return step


def _nanosleep(context: Context, mods: Modifiers) -> Step:
    mods.choice(("u32",))
    context.source(context.operands(1)[0], "u32")
    return lambda w: True


def _pmevent(context: Context, mods: Modifiers) -> Step:
    mods.take("mask")
    context.literal(context.operands(1)[0])
    return lambda w: None


INSTRUCTIONS: dict[str, Builder] = {
    "bra": _bra,
    "brx": _brx,
    "exit": _exit,
    "ret": _ret,
    "call": _call,
    "bar": _barrier,
    "barrier": _barrier,
    "fence": _fence,
    "membar": _membar,
    "setmaxnreg": _setmaxnreg,
    "griddepcontrol": _griddepcontrol,
    "trap": _trap,
    "brkpt": _trap,
    "nanosleep": _nanosleep,
    "pmevent": _pmevent,
}
