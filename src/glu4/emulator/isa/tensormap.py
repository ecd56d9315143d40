"""tensormap.replace and tensormap.cp_fenceproxy, and the fences between writing a tensor map and using it.

Facts: PTX ISA 9.1, 9.7.9.28, 9.7.13.16 and 9.7.13.4 (fence.proxy.tensormap). Sizes and strides are given as they are, in
elements and bytes, as cute/arch/copy_sm90_desc.hpp of CUTLASS gives them since CUDA 12.5; only the rank counts from zero. A
tensor map counts as read when a copy is issued.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from glu4.emulator.clocks import KNOWN, Clock
from glu4.emulator.hazards import Origin
from glu4.emulator.isa.access import Fault, addresses, find
from glu4.emulator.isa.control import aligned, fence_generic
from glu4.emulator.isa.registry import Builder, Context, Modifiers, Step, U
from glu4.emulator.lanes import one_lane
from glu4.emulator.memory import Block
from glu4.emulator.tensor_map import ELEMENT_TYPES

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS", "check_fences", "fence", "replaced"]

BYTES = 128
_SCOPES = ("cta", "cluster", "gpu", "sys")
_SPACES = ("global", "shared::cta", "shared")
# Table 33: what the immediate of .elemtype names, None for what tensor maps of this emulator do not hold
_ELEMENTS = ("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f32_ftz", "f64", "bf16", "tf32", "tf32_ftz",
             "16u4_align8b", "16u4_align16b", "16u6_align16b")  # fmt: skip
# field: (first bit, bits from one ordinal to the next, width, how many ordinals, what is subtracted)
_FIELDS = {
    "global_address": (0, 0, 64, 1, 0),
    "rank": (68, 0, 3, 1, 0),
    "box_dim": (440, 8, 8, 5, 1),
    "global_dim": (256, 32, 32, 5, 1),
    "element_stride": (416, 3, 3, 5, 1),
}
_PLACES = {"interleave_layout": (75, 2), "swizzle_mode": (77, 2), "swizzle_atomicity": (83, 2), "fill_mode": (79, 1)}
_ENUMERATED = {"elemtype": 16, "interleave_layout": 3, "swizzle_mode": 4, "swizzle_atomicity": 4, "fill_mode": 2}


def _put(number: int, low: int, width: int, value: int) -> int:
    mask = (1 << width) - 1
    return number & ~(mask << low) | (value & mask) << low


def replaced(data: bytes, field: str, ordinal: int, value: int) -> bytes:
    """128 bytes of a tensor map with one field replaced; `value` as the instruction gives it."""
    n = int.from_bytes(data, "little")
    if field == "global_stride":
        n = _put(n, 96 + 32 * ordinal, 32, value >> 4)
        n = _put(n, 224 + 4 * ordinal, 4, value >> 36)
    elif field == "elemtype":
        element = ELEMENT_TYPES[_ELEMENTS[value]]
        n = _put(_put(n, 71, 4, element.code), 80, 1, int(element.tf32))
    elif field in _ENUMERATED:
        n = _put(n, *_PLACES[field], value)
    else:
        low, step, width, _, less = _FIELDS[field]
        n = _put(n, low + step * ordinal, width, value - less)
    return n.to_bytes(BYTES, "little")


def _locate(w: Split, context: Context, space: str, address: int, lane: int) -> tuple[Block, slice] | None:
    """The 128 bytes at an address; None after a report."""
    monitor = w.warp.cta.machine.monitor
    origin = Origin(context.instruction, w.warp, one_lane(lane))
    try:
        block, offset = find(w, space, address)
        if offset % 64:
            raise Fault("misaligned address", "a tensor map needs a multiple of 64", address)
        if offset < 0 or offset + BYTES > block.size:
            raise Fault("out of bounds", f"{BYTES} bytes at {block.name}+{offset}, which has {block.size}", address)
        if block.space not in ("global", "shared"):
            raise Fault("tensor map", f"a tensor map in {block.space} memory cannot be changed", address)
    except Fault as problem:
        monitor.report(problem.kind, problem.message, origin, f"{problem.address:#x}")
        return None
    return block, slice(offset, offset + BYTES)


def _touch(w: Split, context: Context, block: Block, where: slice, lane: int, write: bool) -> None:
    monitor = w.warp.cta.machine.monitor
    for half in (where.start // 64, where.start // 64 + 1):
        monitor.generic(w, context.instruction, block, np.array([half]), 64, write, False, one_lane(lane))
    w.warp.cta.machine.progress += 1


def _replace(context: Context, mods: Modifiers) -> Step:
    if not mods.take("tile"):
        raise mods.fail("only .tile is")
    field = mods.choice((*_FIELDS, "global_stride", *_ENUMERATED))
    space = mods.choice(_SPACES, "generic")
    if not mods.take("b1024"):
        raise mods.fail()
    kind = mods.choice(("b64",) if field in ("global_address", "global_stride") else ("b32",))
    ordinals = 4 if field == "global_stride" else _FIELDS[field][3] if field in _FIELDS else 1
    operands = list(context.operands(3 if ordinals > 1 else 2))
    place = addresses(context.address(operands.pop(0)))
    ordinal = context.literal(operands.pop(0)) if ordinals > 1 else 0
    if not 0 <= ordinal < ordinals:
        raise context.error(f"ordinal {ordinal} of .{field} does not exist")
    fixed: int | None = None
    row = 0
    if field in _ENUMERATED:
        fixed = context.literal(operands[0])
        if not 0 <= fixed < _ENUMERATED[field]:
            raise context.error(f"value {fixed} of .{field} does not exist or is not modelled")
    else:
        row = context.source(operands[0], kind)

    def step(w: Split) -> None:
        for lane, address in zip(np.flatnonzero(w.mask).tolist(), place(w).tolist()):
            found = _locate(w, context, space, address, lane)
            if found is None:
                continue
            block, where = found
            _touch(w, context, block, where, lane, False)
            new = replaced(block.data[where].tobytes(), field, ordinal, int(w.r[U][row][lane]) if fixed is None else fixed)
            block.data[where] = np.frombuffer(new, np.uint8)
            _touch(w, context, block, where, lane, True)

    return step


def _copy(context: Context, mods: Modifiers) -> Step:
    """tensormap.cp_fenceproxy: 128 bytes from shared to global memory, then a release for the tensormap proxy."""
    if not mods.take("global", "shared::cta", "tensormap::generic", "release"):
        raise mods.fail()
    mods.choice(_SCOPES)
    if not mods.take("sync", "aligned"):
        raise mods.fail()
    to, source, size = context.operands(3)
    if context.literal(size) != BYTES:
        raise context.error(f"the size must be {BYTES}")
    into, outof = addresses(context.address(to)), addresses(context.address(source))

    def step(w: Split) -> None:
        aligned(w, context)
        pairs = list(zip(into(w).tolist(), outof(w).tolist()))
        lanes = np.flatnonzero(w.mask).tolist()
        # threads that give the same addresses copy the same bytes
        for i, (to_address, from_address) in enumerate(pairs):
            if (to_address, from_address) in pairs[:i]:
                continue
            target = _locate(w, context, "global", to_address, lanes[i])
            origin = _locate(w, context, "shared::cta", from_address, lanes[i])
            if target is not None and origin is not None:
                _touch(w, context, *origin, lanes[i], False)
                target[0].data[target[1]] = origin[0].data[origin[1]]
                _touch(w, context, *target, lanes[i], True)
        release(w)

    return step


# fences: what a release or acquire for the tensormap proxy has seen


def fence(context: Context, mods: Modifiers) -> Step:
    """After `fence.proxy.tensormap::generic`."""
    order = mods.choice(("acquire", "release"))
    mods.choice(_SCOPES)
    place = None
    if order == "acquire":
        target, size = context.operands(2)
        if context.literal(size) != BYTES:
            raise context.error(f"the size must be {BYTES}")
        place = addresses(context.address(target))
    else:
        context.operands(0)

    def step(w: Split) -> None:
        if place is None:
            release(w)
        fence_generic(w, order)
        for address in sorted(set(place(w).tolist())) if place is not None else ():
            acquire(w, address)

    return step


def release(w: Split) -> None:
    """fence.proxy.tensormap::generic.release: what this thread knows may be used as tensor maps once acquired."""
    seen: dict[int, Any] = w.warp.cta.machine.tensor_map_fences
    number = w.warp.cta.cluster.number
    rows = w.clock.fit(w.warp.cta.cluster.entities)[KNOWN].copy()
    old = seen.get(number)
    if old is not None:
        size = max(old.size, rows.size)
        rows = np.maximum(np.pad(old, (0, size - old.size)), np.pad(rows, (0, size - rows.size)))
    seen[number] = rows


def acquire(w: Split, address: int) -> None:
    """fence.proxy.tensormap::generic.acquire of 128 bytes: writes that this thread knows of are seen by its later copies."""
    fences: dict[int, Any] = w.warp.extra.setdefault("tensormap fences", {})
    fences[address] = w.clock.copy()
    w.warp.tick(w)  # what it writes from now on is not before the fence


def _knows(clock: Clock, cluster: int, mine: int, entity: int, time: int) -> bool:
    """Whether a clock of cluster `mine` knows of a time of an entity of `cluster`."""
    rows = clock.rows if cluster == mine else (clock.foreign or {}).get(cluster)
    return rows is not None and entity < rows.shape[1] and bool(rows[KNOWN, entity] >= time)


def check_fences(w: Split, context: Context, block: Block, where: slice, address: int) -> None:
    """Before a copy uses a tensor map in global memory that the kernel has written: both fences must be in place."""
    machine = w.warp.cta.machine
    if block.space != "global" or not block.writes.size:
        return
    monitor = machine.monitor
    monitor.generic(w, context.instruction, block, where, 1, False, False, w.mask)
    origin = Origin(context.instruction, w.warp, w.mask)
    fence = w.warp.extra.get("tensormap fences", {}).get(address)
    for number in np.unique(block.writes[where]).tolist():
        record = monitor.records[number]
        if record is None:  # not written by this grid
            continue
        entity, time, cluster = int(monitor.entity[number]), int(monitor.time[number]), int(monitor.cluster[number])
        released = machine.tensor_map_fences.get(cluster)
        if released is None or entity >= released.size or released[entity] < time:
            missing = "release"
        elif fence is None or not _knows(fence, cluster, w.warp.cta.cluster.number, entity, time):
            missing = "acquire"
        else:
            continue
        text = f"a tensor map that the kernel has written is used with no fence.proxy.tensormap::generic.{missing} between"
        other = monitor.describe(record.origin, block.place(where.start))
        monitor.report("missing proxy fence", text, origin, block.place(where.start), other=other)
        return


def _tensormap(context: Context, mods: Modifiers) -> Step:
    word = mods.choice(("replace", "cp_fenceproxy"))
    return _replace(context, mods) if word == "replace" else _copy(context, mods)


INSTRUCTIONS: dict[str, Builder] = {"tensormap": _tensormap}
