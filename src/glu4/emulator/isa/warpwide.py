"""Instructions in which the lanes of a warp take part together: shfl, vote, match, redux, elect, activemask."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.hazards import Origin
from glu4.emulator.isa.registry import Builder, Context, F, Modifiers, S, Step, U
from glu4.emulator.lanes import bits_of, mask_of
from glu4.emulator.ptx.module import Pair
from glu4.emulator.split import Split, Wait

__all__ = ["INSTRUCTIONS", "together"]

_LANES = np.arange(32)


def together(context: Context, members: int, body: Any) -> Step:
    """Run `body` once all living lanes of the member mask are here; they may come in several splits (PTX ISA 9.7.9.6)."""
    place = context.place

    def step(w: Split) -> Any:
        warp = w.warp
        wanted = int(w.r[U][members][int(np.argmax(w.mask))])
        if wanted == 0xFFFFFFFF and w.full:
            body(w)
            return None
        need = mask_of(wanted) & warp.live
        if (w.mask & ~need).any():
            message = f"a thread outside the member mask {wanted:#x} executes it"
            w.warp.cta.machine.monitor.report("divergent execution", message,
                                              Origin(context.instruction, warp, w.mask))  # fmt: skip
        if not (need & ~w.mask).any():
            body(w)
            return None
        waiting = warp.extra.setdefault(("together", id(w.frame), place, wanted), [])
        union = w.mask.copy()
        for other in waiting:
            union |= other.mask
        if not (need & ~union).any():
            _run_merged(w, waiting, union, body)
            return None
        w.pc -= 1
        waiting.append(w)

        def ready() -> bool:
            rest = mask_of(wanted) & warp.live
            here = np.zeros(32, dtype=np.bool_)
            for other in waiting:
                here |= other.mask
            if (rest & ~here).any():
                return False
            waiting.remove(w)  # it comes again and finds the others
            return True

        missing = np.flatnonzero(need & ~union).tolist()
        return w.block(Wait(f"lanes {missing} of its warp, which the member mask {wanted:#x} names", poll=ready))

    return step


def _run_merged(w: Split, waiting: list[Split], union: NDArray[Any], body: Any) -> None:
    mask = w.mask
    for other in waiting:
        w.clock.merge(other.clock)
    w.set_mask(union)
    body(w)
    w.set_mask(mask)
    for other in waiting:
        other.pc += 1
        other.clock.merge(w.clock)
        other.wake()
    waiting.clear()


def _put(w: Split, row: int, values: Any) -> None:
    target = w.r[U][row]
    w.put(target, np.asarray(values).astype(target.dtype))


def _shfl(context: Context, mods: Modifiers) -> Step:
    if not mods.take("sync"):
        raise mods.fail("only shfl.sync is")
    mode = mods.choice(("up", "down", "bfly", "idx"))
    mods.choice(("b32",))
    d, a, b, c, members = context.operands(5)
    destination, predicate = context.pair(d, "b32", "pred")
    source, bval, cval = (context.source(o, "b32") for o in (a, b, c))

    def body(w: Split) -> None:
        r = w.r[U]
        values = r[source]
        amount = (r[bval] & 31).astype(np.int64)
        limit = r[cval].astype(np.int64)
        segment, clamp = (limit >> 8) & 31, limit & 31
        low = _LANES & segment
        high = low | (clamp & ~segment)
        if mode == "up":
            at = _LANES - amount
            inside = at >= high
        elif mode == "down":
            at = _LANES + amount
            inside = at <= high
        elif mode == "bfly":
            at = _LANES ^ amount
            inside = at <= high
        else:
            at = low | (amount & ~segment)
            inside = at <= high
        at = np.where(inside, at, _LANES)
        if not w.full and not w.mask[at[w.mask]].all():
            w.warp.cta.machine.monitor.report("divergent execution", "shfl reads a lane that does not take part",
                                              Origin(context.instruction, w.warp, w.mask))  # fmt: skip
        _put(w, destination, values[at])
        if predicate is not None:
            _put(w, predicate, inside)

    return together(context, context.source(members, "b32"), body)


def _vote(context: Context, mods: Modifiers) -> Step:
    if not mods.take("sync"):
        raise mods.fail("only vote.sync is")
    mode = mods.choice(("all", "any", "uni", "ballot"))
    kind = mods.choice(("b32",) if mode == "ballot" else ("pred",))
    d, a, members = context.operands(3)
    destination = context.destination(d, kind)
    source, negated = context.predicate(a)

    def body(w: Split) -> None:
        values = w.r[U][source] ^ negated
        active = values[w.mask]
        if mode == "ballot":
            result: Any = bits_of(values & w.mask)
        elif mode == "all":
            result = active.all()
        elif mode == "any":
            result = active.any()
        else:
            result = active.all() or not active.any()
        _put(w, destination, result)

    return together(context, context.source(members, "b32"), body)


def _match(context: Context, mods: Modifiers) -> Step:
    mode = mods.choice(("any", "all"))
    if not mods.take("sync"):
        raise mods.fail()
    kind = mods.choice(("b32", "b64"))
    d, a, members = context.operands(3)
    destination, predicate = context.pair(d, "b32", "pred")
    source = context.source(a, kind)

    def body(w: Split) -> None:
        values = w.r[U][source]
        if mode == "all":
            same = bool((values[w.mask] == values[w.mask][0]).all())
            _put(w, destination, bits_of(w.mask) if same else 0)
            if predicate is not None:
                _put(w, predicate, same)
            return
        equal = (values[:, None] == values[None, :]) & w.mask
        _put(w, destination, np.packbits(equal, axis=1, bitorder="little").view(np.uint32)[:, 0])

    return together(context, context.source(members, "b32"), body)


def _redux(context: Context, mods: Modifiers) -> Step:
    if not mods.take("sync"):
        raise mods.fail()
    operation = mods.choice(("add", "min", "max", "and", "or", "xor"))
    absolute, with_nan = mods.take("abs"), mods.take("NaN")
    kind = mods.choice(("b32",) if operation in ("and", "or", "xor") else ("u32", "s32", "f32"))
    if (kind == "f32" and operation == "add") or ((absolute or with_nan) and kind != "f32"):
        raise mods.fail()
    d, a, members = context.operands(3)
    destination, source = context.destination(d, kind), context.source(a, kind)
    view = {"s": S, "f": F}.get(kind[0], U)
    functions: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                                 "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip
    function = functions[operation]
    if kind == "f32" and not with_nan:
        function = np.fmin if operation == "min" else np.fmax

    def body(w: Split) -> None:
        values = w.r[view][source][w.mask]
        if absolute:
            values = np.abs(values)
        result = function.reduce(values, dtype=values.dtype)
        if kind == "f32" and np.isnan(result):
            _put(w, destination, 0x7FFFFFFF)
            return
        _put(w, destination, result.view(np.uint32))

    return together(context, context.source(members, "b32"), body)


def _elect(context: Context, mods: Modifiers) -> Step:
    if not mods.take("sync"):
        raise mods.fail()
    d, members = context.operands(2)
    if not isinstance(d, Pair):
        raise context.error("expected d|p")
    destination, predicate = context.pair(d, "b32", "pred")
    row = context.source(members, "b32")
    assert predicate is not None

    def body(w: Split) -> None:
        leader = int(np.argmax(w.mask))
        _put(w, destination, leader)
        _put(w, predicate, leader == _LANES)

    return together(context, row, body)


def _activemask(context: Context, mods: Modifiers) -> Step:
    mods.choice(("b32",))
    destination = context.destination(context.operands(1)[0], "b32")
    return lambda w: _put(w, destination, bits_of(w.mask))


INSTRUCTIONS: dict[str, Builder] = {
    "shfl": _shfl,
    "vote": _vote,
    "match": _match,
    "redux": _redux,
    "elect": _elect,
    "activemask": _activemask,
}
