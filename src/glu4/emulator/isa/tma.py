"""Bulk copies and reductions, plain and of tensors, with their two ways of completion (PTX ISA 9.7.9.25.4, 9.7.9.27)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.async_queue import Work
from glu4.emulator.clocks import BULK_READ, BULK_WRITE
from glu4.emulator.isa.access import Fault, addresses, find, shared_offset
from glu4.emulator.isa.asynchronous import READS, WRITES, Groups, Issue
from glu4.emulator.isa.mbarrier import MBarrier, barrier_at
from glu4.emulator.isa.registry import Context, Modifiers, S, Step, U
from glu4.emulator.isa.tensormap import check_fences
from glu4.emulator.memory import Block
from glu4.emulator.ptx.module import Address, Vector
from glu4.emulator.tensor_map import TensorMap, decode, four_rows, load_box, store_box, unit_addresses

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["Target", "bulk", "reduction", "targets"]

_TX = "mbarrier::complete_tx::bytes"
_REDUCTIONS = ("and", "or", "xor", "add", "inc", "dec", "min", "max")
Combine = Callable[[Any, Any], Any]


def bulk(context: Context, mods: Modifiers) -> Step:
    """After `cp.async.bulk`."""
    if mods.take("commit_group"):
        context.operands(0)
        return _commit
    if mods.take("wait_group"):
        return _wait_group(context, mods.take("read"))
    if mods.take("prefetch"):
        return _prefetch(context, mods)
    if mods.take("tensor"):
        return _tensor(context, mods)
    return _plain(context, mods)


def _commit(w: Split) -> None:
    Groups.of(w, WRITES).commit()
    Groups.of(w, READS).commit()


def reduction(context: Context, mods: Modifiers) -> Step:
    """After `cp.reduce.async.bulk`."""
    if mods.take("tensor"):
        return _tensor(context, mods, reduces=True)
    return _plain(context, mods, reduces=True)


def _wait_group(context: Context, read: bool) -> Step:
    pending = context.literal(context.operands(1)[0])

    def step(w: Split) -> Any:
        reads, writes = Groups.of(w, READS), Groups.of(w, WRITES)
        if reads.wait(w, pending, "cp.async.bulk.wait_group") or (
            not read and writes.wait(w, pending, "cp.async.bulk.wait_group")
        ):
            return True
        last = reads.number - 1 - pending
        entity = w.warp.entity
        w.clock.know(entity + BULK_READ, last)
        if not read:
            w.clock.know(entity + BULK_WRITE, last)
        return None

    return step


def _prefetch(context: Context, mods: Modifiers) -> Step:
    mods.words.clear()
    context.operands(1, 4)
    return lambda w: None


def _lanes(w: Split) -> list[tuple[int, NDArray[Any]]]:
    """(lane, mask of that lane) of each active lane: each of them issues its own operation."""
    found = []
    for lane in np.flatnonzero(w.mask).tolist():
        mask = np.zeros(32, dtype=np.bool_)
        mask[lane] = True
        found.append((lane, mask))
    return found


class Target:
    """A destination in shared memory, and the mbarrier that its bytes complete on."""

    __slots__ = ("barrier", "cta", "offset")

    def __init__(self, cta: Any, offset: int, barrier: MBarrier) -> None:
        self.cta = cta
        self.offset = offset
        self.barrier = barrier


def targets(
    w: Split, context: Context, issue: Issue, to: int, bar: int, mask: int | None, pair: bool, own: bool
) -> list[Target]:
    """Destinations of a load: one, or those of a multicast. pair: the mbarrier may be the peer's (cta_group::2)."""
    barrier = barrier_at(w, context, "shared::cluster", bar)
    if barrier is None:
        return []
    try:
        owner, offset = shared_offset(w, to)
        if own and owner is not w.warp.cta:
            raise Fault("out of bounds", "the destination is in another CTA", to)
    except Fault as problem:
        issue.report(problem.kind, problem.message, f"{problem.address:#x}")
        return []
    if mask is None:
        allowed = (owner.rank, owner.rank ^ 1) if pair else (owner.rank,)
        if barrier.cta.rank not in allowed:
            issue.report(
                "mbarrier misuse", f"the mbarrier is in CTA {barrier.cta.rank} of the cluster, the destination in {owner.rank}"
            )
            return []
        return [Target(owner, offset, barrier)]
    ctas = w.warp.cta.cluster.ctas
    if not mask or mask >> len(ctas):
        issue.report("multicast", f"mask {mask:#x} names CTAs outside the cluster of {len(ctas)}")
        mask &= (1 << len(ctas)) - 1
    found = []
    for rank in range(len(ctas)):
        if mask >> rank & 1:
            holder = ctas[(rank & ~1) | (barrier.cta.rank & 1)] if pair else ctas[rank]
            there = holder.mbarriers.get(barrier.offset)
            if there is None:
                issue.report("mbarrier misuse", f"multicast: no mbarrier at offset {barrier.offset} of CTA {rank}")
                continue
            found.append(Target(ctas[rank], offset, there))
    return found


def _check_copy(issue: Issue, size: int, *where: int) -> bool:
    """Whether sizes and addresses are multiples of 16."""
    for value in where:
        if value % 16:
            issue.report("misaligned address", "bulk copies need addresses that are multiples of 16", f"{value:#x}")
            return False
    if size % 16 or size <= 0:
        issue.report("bulk copy", f"size {size} is not a positive multiple of 16")
        return False
    return True


# plain copies


def _plain(context: Context, mods: Modifiers, reduces: bool = False) -> Step:
    to = mods.choice(("shared::cluster", "shared::cta", "global"))
    source = mods.choice(("global", "shared::cta"))
    loads = to != "global"
    legal = {
        ("shared::cluster", "global"),
        ("shared::cta", "global"),
        ("shared::cluster", "shared::cta"),
        ("global", "shared::cta"),
    }
    if (to, source) not in legal or (reduces and source == "global"):
        raise mods.fail()
    if not mods.take(_TX if loads else "bulk_group"):
        raise mods.fail("expected its completion mechanism")
    multicast = mods.take("multicast::cluster")
    policy = mods.take("L2::cache_hint")
    masked = mods.take("cp_mask")
    if multicast and (to, source) != ("shared::cluster", "global"):
        raise mods.fail()
    if masked and loads:
        raise mods.fail()
    combine, element = _combine(mods) if reduces else (None, 1)
    operands = list(context.operands(3 + loads, 6))
    into, outof = addresses(context.address(operands[0])), addresses(context.address(operands[1]))
    size = context.source(operands[2], "u32")
    rest = operands[3:]
    bar = addresses(context.address(rest.pop(0))) if loads else None
    mask = context.source(rest.pop(0), "b16") if multicast else None
    if policy:
        context.source(rest.pop(0), "b64")
    byte_mask = context.source(rest.pop(0), "b16") if masked else None
    if rest:
        raise context.error("too many operands")

    def step(w: Split) -> None:
        to_all, from_all = into(w).tolist(), outof(w).tolist()
        bars = bar(w).tolist() if bar is not None else [0] * len(to_all)
        for i, (lane, only) in enumerate(_lanes(w)):
            issue = Issue(w, context, only)
            count = int(w.r[U][size][lane])
            if not _check_copy(issue, count, to_all[i], from_all[i]):
                continue
            bits = None if byte_mask is None else int(w.r[U][byte_mask][lane])
            if loads:
                chosen = None if mask is None else int(w.r[U][mask][lane])
                for target in targets(w, context, issue, to_all[i], bars[i], chosen, False, to == "shared::cta"):
                    _load(w, issue, target, source, from_all[i], count, combine, element)
            else:
                _store(w, issue, from_all[i], count, _linear_writer(w, issue, to_all[i], bits), combine, element)

    return step


def _combine(mods: Modifiers) -> tuple[Combine, int]:
    from glu4.emulator.isa.atomics import combiner
    from glu4.emulator.ptx.module import SIZES

    operation = mods.choice(_REDUCTIONS)
    mods.take("noftz")
    kind = mods.choice(("f16", "bf16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64"))
    if (kind[0] == "b" and operation not in ("and", "or", "xor") and kind != "bf16") or (
        operation in ("and", "or", "xor") and kind not in ("b32", "b64")
    ):
        raise mods.fail()
    return combiner(operation, kind), SIZES[kind] // 8


def _slice(issue: Issue, block: Block, offset: int, count: int) -> slice | None:
    if offset >= 0 and offset + count <= block.size:
        return slice(offset, offset + count)
    issue.report("out of bounds", f"{count} bytes at {block.name}+{offset}, which has {block.size}")
    return None


def _source_slice(w: Split, issue: Issue, space: str, address: int, count: int) -> tuple[Block, slice] | None:
    try:
        block, offset = find(w, space, address)
    except Fault as problem:
        issue.report(problem.kind, problem.message, f"{problem.address:#x}")
        return None
    where = _slice(issue, block, offset, count)
    return None if where is None else (block, where)


def _load(
    w: Split, issue: Issue, target: Target, space: str, address: int, count: int, combine: Combine | None, element: int
) -> None:
    """Bytes into shared memory, completing on an mbarrier."""
    found = _source_slice(w, issue, space, address, count)
    where = _slice(issue, target.cta.shared, target.offset, count)
    if found is None or where is None:
        return
    block, source = found

    def run() -> None:
        barrier = target.barrier
        entity, time = barrier.entity, barrier.next_time()
        issue.access(block, source, 1, entity, time, False)
        _write(target.cta.shared, where, block.data[source], combine, element)
        issue.access(target.cta.shared, where, 1, entity, time, True, combine is not None)
        barrier.add_tx(-count, issue.origin, issue.message())

    issue.submit("bulk copy to shared memory", run, work=Work("bulk copies", bytes=count, ctas=(target.cta,)))


def _write(block: Block, where: slice, data: NDArray[np.uint8], combine: Combine | None, element: int) -> None:
    if combine is None:
        block.data[where] = data
        return
    kind = np.dtype(f"u{element}")
    old = block.data[where].view(kind)
    new = np.ascontiguousarray(data).view(kind)
    block.data[where] = np.array([combine(o, n) for o, n in zip(old, new)], dtype=kind).view(np.uint8)


Writer = Callable[[NDArray[np.uint8], int, int, Combine | None, int], None]


def _store(w: Split, issue: Issue, address: int, count: int, write: Writer, combine: Combine | None, element: int,
           engine: str = "bulk copies", gaps: Callable[[], NDArray[np.int64]] | None = None) -> None:  # fmt: skip
    """Bytes out of shared memory: a read that wait_group.read waits for, then a write.

    gaps: gives the units of 8 bytes that are read, where it is not all of them.
    """
    found = _source_slice(w, issue, "shared::cta", address, count)
    if found is None:
        return
    block, where = found
    reads, writes = Groups.of(w, READS), Groups.of(w, WRITES)
    entity, time = w.warp.entity, reads.number
    held: list[NDArray[np.uint8]] = []

    def read() -> None:
        held.append(block.data[where].copy())
        if gaps is None:
            issue.access(block, where, 1, entity + BULK_READ, time, False)
        else:
            issue.access(block, gaps(), 8, entity + BULK_READ, time, False)

    first = issue.submit("bulk copy from shared memory: read", read, work=Work(engine, bytes=count))
    second = issue.submit(
        "bulk copy from shared memory: write", lambda: write(held[0], entity + BULK_WRITE, time, combine, element), (first,),
        Work(engine),
    )  # fmt: skip
    reads.add(first)
    writes.add(second)


def _linear_writer(w: Split, issue: Issue, address: int, bits: int | None) -> Writer:
    def write(data: NDArray[np.uint8], entity: int, time: int, combine: Combine | None, element: int) -> None:
        found = _source_slice(w, issue, "global", address, data.size)
        if found is None:
            return
        block, where = found
        if bits is not None:
            keep = np.tile((bits >> np.arange(16)) & 1, data.size // 16).astype(bool)
            data = np.where(keep, data, block.data[where])
        _write(block, where, data, combine, element)
        issue.access(block, where, 1, entity, time, True)

    return write


# tensors


def _tensor(context: Context, mods: Modifiers, reduces: bool = False) -> Step:
    rank = int(mods.choice(("1d", "2d", "3d", "4d", "5d"))[0])
    words = set(mods.words)
    mods.words.clear()
    modes = {m for m in words if m.startswith(("tile", "im2col"))}
    four = "tile::scatter4" if _TX not in words else "tile::gather4"
    if modes - {"tile", four}:
        raise mods.fail(f".{min(modes - {'tile', four})} is not")
    if four in modes and (rank != 2 or len(modes) > 1 or reduces):
        raise mods.fail()
    mode = four if four in modes else "tile"
    words -= modes
    loads = _TX in words
    spaces = {"shared::cluster", "shared::cta", "global"} & words
    pair = "cta_group::2" in words
    multicast = "multicast::cluster" in words
    policy = "L2::cache_hint" in words
    operation = ({*_REDUCTIONS} & words or {""}).pop()
    known = {_TX, "bulk_group", "cta_group::1", "cta_group::2", "multicast::cluster", "L2::cache_hint", *spaces, operation}
    good = "global" in spaces and len(spaces) == 2 and ("bulk_group" in words) != loads and reduces == bool(operation)
    if words - known or not good or (loads and reduces) or (not loads and ("shared::cluster" in spaces or multicast or pair)):
        raise mods.fail()
    if loads:
        return _tensor_load(context, rank, mode, multicast, pair, policy, "shared::cta" in spaces)
    return _tensor_store(context, rank, mode, policy, operation)


def _map_operand(context: Context, operand: Any, rank: int, mode: str) -> tuple[Any, list[int]]:
    """(addresses of the tensor map, rows of the coordinates)."""
    count = rank if mode == "tile" else 5
    place = context.address(operand, rest=True)
    if not isinstance(operand, Address) or len(operand.rest) != 1 or not isinstance(operand.rest[0], Vector):
        raise context.error("expected [tensorMap, {coordinates}]")
    return addresses(place), [context.source(c, "s32") for c in context.vector(operand.rest[0], count)]


def _fetch_map(w: Split, issue: Issue, address: int, rank: int, mode: str) -> TensorMap | None:
    """The tensor map at a generic address, decoded once, as a mode of copies uses it."""
    if address % 64:
        issue.report("tensor map", "its address is not a multiple of 64", f"{address:#x}")
        return None
    found = _source_slice(w, issue, "generic", address, 128)
    if found is None:
        return None
    block, where = found
    check_fences(w, issue.context, block, where, address)
    raw = (block.data[where].tobytes(), mode)
    known: dict[tuple[bytes, str], TensorMap | str] = issue.machine.tensor_maps
    if raw not in known:
        try:
            known[raw] = decode(raw[0]) if mode == "tile" else four_rows(decode(raw[0]))
        except ValueError as problem:
            known[raw] = str(problem)
    result = known[raw]
    if isinstance(result, str) or result.rank != rank:
        issue.report(
            "tensor map", result if isinstance(result, str) else f"its rank is {result.rank}, the instruction's {rank}"
        )
        return None
    return result


def _tensor_load(context: Context, rank: int, mode: str, multicast: bool, pair: bool, policy: bool, own: bool) -> Step:
    operands = list(context.operands(3, 5))
    into, bar = addresses(context.address(operands[0])), addresses(context.address(operands[2]))
    maps, coordinates = _map_operand(context, operands[1], rank, mode)
    rest = operands[3:]
    mask = context.source(rest.pop(0), "b16") if multicast else None
    if policy:
        context.source(rest.pop(0), "b64")
    if rest:
        raise context.error("too many operands")

    def step(w: Split) -> None:
        to_all, map_all, bar_all = into(w).tolist(), maps(w).tolist(), bar(w).tolist()
        for i, (lane, only) in enumerate(_lanes(w)):
            issue = Issue(w, context, only)
            tensor = _fetch_map(w, issue, map_all[i], rank, mode)
            if tensor is None:
                continue
            at = [int(w.r[S][row][lane]) for row in coordinates]
            chosen = None if mask is None else int(w.r[U][mask][lane])
            for target in targets(w, context, issue, to_all[i], bar_all[i], chosen, pair, own):
                _load_tensor(w, issue, target, tensor, at)

    return step


def _load_tensor(w: Split, issue: Issue, target: Target, tensor: TensorMap, at: list[int]) -> None:
    shared = target.cta.shared
    window = target.offset + (shared.base & 0xFFFFFF)  # swizzles are of the address in the window

    def run() -> None:
        barrier = target.barrier
        entity, time = barrier.entity, barrier.next_time()

        def read(where: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
            return _read_rows(w, issue, where, size, entity, time)

        try:
            units = load_box(tensor, at, window, read)
        except (ValueError, Fault) as problem:
            issue.report("tensor copy", str(problem))
            return
        index = (units.addresses - (shared.base & 0xFFFFFF)) >> 3
        if int(index.max()) >= shared.size // 8:
            issue.report(
                "out of bounds",
                f"a box of {tensor.shared_bytes} bytes at {shared.name}+{target.offset}, which has {shared.size}",
            )
            return
        shared.view(8)[index] = np.ascontiguousarray(units.data).view(np.uint64)[:, 0]
        whole = index.size * 8 == tensor.shared_bytes
        where: Any = slice(target.offset, target.offset + tensor.shared_bytes) if whole else index
        issue.access(shared, where, 8, entity, time, True)
        barrier.add_tx(-units.transaction_bytes, issue.origin, issue.message())

    text = f"tensor copy to shared memory, {tensor.shared_bytes} bytes at {shared.name}+{target.offset}"
    work = Work("TMA loads", tensor.shared_bytes, ctas=(target.cta,), text=text)
    issue.submit("tensor copy to shared memory", run, work=work)


def _rows_view(block: Block, starts: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """[rows, size] bytes of a block; a view where the rows are evenly spaced."""
    if starts.size > 1:
        step = int(starts[1] - starts[0])
        if step > 0 and bool((np.diff(starts) == step).all()):
            return np.lib.stride_tricks.as_strided(block.data[int(starts[0]) :], (starts.size, size), (step, 1))
    return np.asarray(block.data[starts[:, None] + np.arange(size)])


def _find_rows(w: Split, where: NDArray[np.int64], size: int) -> tuple[Block, NDArray[np.int64]]:
    """(block, offsets of rows); raises Fault where rows leave it."""
    block, offset = find(w, "global", int(where[0]))
    starts = where - (int(where[0]) - offset)
    if int(starts.min()) < 0 or int(starts.max()) + size > block.size:
        raise Fault("out of bounds", f"the tensor map reaches outside {block.name} ({block.size} bytes)", int(where.max()))
    return block, starts


def _read_rows(w: Split, issue: Issue, where: NDArray[np.int64], size: int, entity: int, time: int) -> NDArray[np.uint8]:
    block, starts = _find_rows(w, where, size)
    _row_access(issue, block, starts, size, entity, time, False)
    return _rows_view(block, starts, size)


def _row_access(issue: Issue, block: Block, starts: NDArray[np.int64], size: int, entity: int, time: int, write: bool) -> None:
    if not block.writes.size:
        return
    step = next(n for n in (16, 8, 4, 2, 1) if size % n == 0 and not (np.bitwise_or.reduce(starts) % n))
    units = (starts // step)[:, None] + np.arange(size // step)
    issue.access(block, units.ravel(), step, entity, time, write)


def _tensor_store(context: Context, rank: int, mode: str, policy: bool, operation: str) -> Step:
    operands = context.operands(2, 3)
    if (len(operands) == 3) != policy:
        raise context.error("a cache policy goes with .L2::cache_hint")
    maps, coordinates = _map_operand(context, operands[0], rank, mode)
    outof = addresses(context.address(operands[1]))

    def step(w: Split) -> None:
        map_all, from_all = maps(w).tolist(), outof(w).tolist()
        for i, (lane, only) in enumerate(_lanes(w)):
            issue = Issue(w, context, only)
            tensor = _fetch_map(w, issue, map_all[i], rank, mode)
            if tensor is not None:
                _store_tensor(w, issue, tensor, [int(w.r[S][row][lane]) for row in coordinates], from_all[i], operation)

    return step


def _store_tensor(w: Split, issue: Issue, tensor: TensorMap, at: list[int], address: int, operation: str) -> None:
    from glu4.emulator.isa.atomics import combiner

    combine: Combine | None = None
    element = max(tensor.bits // 8, 1)
    if operation:
        kind = {"u16": "", "u8": ""}.get(tensor.element_type, tensor.element_type)
        kind = f"b{tensor.bits}" if operation in ("and", "or", "xor") and tensor.bits >= 32 else kind
        try:
            combine = combiner(operation, kind)
        except (KeyError, ValueError):
            issue.report("tensor copy", f"reduction {operation} of {tensor.element_type} does not exist")
            return
    shared = w.warp.cta.shared
    base = shared.base & 0xFFFFFF
    offset = address - shared.base

    def write(data: NDArray[np.uint8], entity: int, time: int, combine: Combine | None, element: int) -> None:
        def units(where: NDArray[np.int64]) -> NDArray[np.uint8]:
            return np.asarray(data.reshape(-1, 8)[(where - base - offset) >> 3])

        try:
            rows = store_box(tensor, at, base + offset, units, combine is not None)
            if not rows.addresses.size or not rows.data.shape[1]:
                return
            block, starts = _find_rows(w, rows.addresses, rows.data.shape[1])
        except (ValueError, Fault) as problem:
            issue.report("tensor copy", str(problem))
            return
        for start, row in zip(starts.tolist(), rows.data):
            _write(block, slice(start, start + row.size), row, combine, element)
        _row_access(issue, block, starts, rows.data.shape[1], entity, time, True)

    def units_read() -> NDArray[np.int64]:
        return (unit_addresses(tensor, base + offset) - base) >> 3

    gaps = tensor.pitch_bytes != tensor.row_bytes and (base + offset) % 128 == 0
    _store(w, issue, address, tensor.shared_bytes, write, combine, element, "TMA stores", units_read if gaps else None)
