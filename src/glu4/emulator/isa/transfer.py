"""cp.async, st.async and red.async."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.async_queue import Work
from glu4.emulator.clocks import COPY, KNOWN
from glu4.emulator.isa import tma
from glu4.emulator.isa.access import Fault, addresses, locate, shared_offset
from glu4.emulator.isa.asynchronous import COPIES, Groups, Issue
from glu4.emulator.isa.mbarrier import barrier_at
from glu4.emulator.isa.registry import Builder, Context, Modifiers, Step, U
from glu4.emulator.ptx.module import SIZES, Register

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS", "red_async", "st_async"]


def _cp(context: Context, mods: Modifiers) -> Step:
    if mods.take("reduce", "async", "bulk"):
        return tma.reduction(context, mods)
    if not mods.take("async"):
        raise mods.fail()
    if mods.take("bulk"):
        return tma.bulk(context, mods)
    if mods.take("commit_group"):
        context.operands(0)
        return lambda w: Groups.of(w, COPIES).commit()
    if mods.take("wait_group"):
        return _wait_group(context, context.literal(context.operands(1)[0]))
    if mods.take("wait_all"):
        context.operands(0)
        return _wait_group(context, None)
    if mods.take("mbarrier", "arrive"):
        return _arrive(context, mods)
    return _copy(context, mods)


def _copy(context: Context, mods: Modifiers) -> Step:
    """cp.async.{ca,cg}: each thread copies 4, 8 or 16 bytes."""
    cached = mods.choice(("ca", "cg"))
    mods.choice(("shared", "shared::cta"))
    mods.choice(("global",))
    policy = mods.take("L2::cache_hint")
    mods.choice(("L2::64B", "L2::128B", "L2::256B"), "")
    operands = list(context.operands(3, 5))
    destination, source = addresses(context.address(operands[0])), addresses(context.address(operands[1]))
    size = context.literal(operands[2])
    if size not in ((16,) if cached == "cg" else (4, 8, 16)):
        raise context.error(f"cannot copy {size} bytes")
    rest = operands[3:]
    if policy:
        rest.pop()
    count: int | None = None
    ignore: tuple[int, bool] | None = None
    if rest and isinstance(rest[0], Register) and rest[0].type == "pred":
        ignore = context.predicate(rest[0])
    elif rest:
        count = context.source(rest[0], "u32")
    into, outof = locate("shared", size), locate("global", 1)

    def step(w: Split) -> None:
        lanes = w.mask
        to, at = destination(w), source(w)
        sizes = np.full(to.size, size) if count is None else w.r[U][count][lanes].astype(np.int64)
        if ignore is not None:
            sizes = np.where((w.r[U][ignore[0]] ^ ignore[1])[lanes], 0, sizes)
        issue = Issue(w, context, proxy=KNOWN)
        if (sizes > size).any():
            issue.report("out of bounds", f"src-size {int(sizes.max())} of a copy of {size} bytes")
            sizes = np.minimum(sizes, size)
        groups = Groups.of(w, COPIES)
        entity, time = w.warp.entity + COPY, groups.number
        operation = issue.submit("cp.async", lambda: _do_copy(w, issue, into, outof, to, at, sizes, size, entity, time),
                                 work=Work("cp.async", bytes=int(sizes.sum())))  # fmt: skip
        groups.add(operation)

    return step


def _do_copy(w: Split, issue: Issue, into: Any, outof: Any, to: NDArray[Any], at: NDArray[Any], sizes: NDArray[Any],
             size: int, entity: int, time: int) -> None:  # fmt: skip
    """The copies of one warp's cp.async, at their completion."""
    data = np.zeros((to.size, size), dtype=np.uint8)
    try:
        for n in sorted(set(sizes.tolist()) - {0}):
            chosen = sizes == n
            if int(np.bitwise_or.reduce(at[chosen])) % size:
                raise Fault("misaligned address", f"source is not a multiple of {size}", int(at[chosen][0]))
            block, index = outof(w, at[chosen])
            if int(index.max()) + n > block.size:
                raise Fault("out of bounds", f"reads past the end of {block.name}", int(at[chosen].max()))
            places = index[:, None] + np.arange(n)
            data[chosen, :n] = block.data[places]
            issue.access(block, places.ravel(), 1, entity, time, False)
        block, index = into(w, to)
        if int(index.max()) >= block.size // size:
            raise Fault("out of bounds", f"writes past the end of {block.name}", int(to.max()))
        block.data[: block.size // size * size].reshape(-1, size)[index] = data
        issue.access(block, index, size, entity, time, True)
    except Fault as problem:
        issue.report(problem.kind, problem.message, f"{problem.address:#x}")


def _wait_group(context: Context, pending: int | None) -> Step:
    def step(w: Split) -> Any:
        groups = Groups.of(w, COPIES)
        if pending is None and groups.open:
            groups.commit()
        if groups.wait(w, pending or 0, "cp.async.wait_group"):
            return True
        # these copies were made through the generic proxy: a proxy fence has yet to order them for the async proxy
        rows = w.clock.fit(w.warp.cta.cluster.entities)
        entity = w.warp.entity + COPY
        rows[KNOWN, entity] = max(int(rows[KNOWN, entity]), groups.number - 1 - (pending or 0))
        return None

    return step


def _arrive(context: Context, mods: Modifiers) -> Step:
    """cp.async.mbarrier.arrive: an arrival once all earlier copies of the thread are done."""
    noinc = mods.take("noinc")
    space = mods.choice(("shared", "shared::cta"), "generic")
    mods.choice(("b64",))
    where = addresses(context.address(context.operands(1)[0]))

    def step(w: Split) -> None:
        groups = Groups.of(w, COPIES)
        earlier = tuple(groups.unfinished)
        group = groups.number
        if groups.open:  # so that later copies have a later time
            groups.commit()
        at = where(w)
        issue = Issue(w, context, proxy=KNOWN)
        for address in sorted(set(at.tolist())):
            barrier = barrier_at(w, context, space, address)
            if barrier is None:
                continue
            count = int(np.count_nonzero(at == address))
            if not noinc:
                barrier.pending += count
            entity = w.warp.entity + COPY

            def run(barrier: Any = barrier, count: int = count, entity: int = entity) -> None:
                message = np.zeros((2, entity + 1), dtype=np.int32)
                message[0, entity] = group
                barrier.arrive(count, issue.origin, message)

            issue.submit("cp.async.mbarrier.arrive", run, earlier)

    return step


# stores with completion on an mbarrier


def _remote(context: Context, mods: Modifiers, kinds: tuple[str, ...], combine: Any, count: int) -> Step:
    kind = mods.choice(kinds)
    size = SIZES[kind] // 8
    operands = context.operands(3)
    to, bar = addresses(context.address(operands[0])), addresses(context.address(operands[2]))
    parts = context.vector(operands[1], count) if count > 1 else (operands[1],)
    rows = [context.source(p, kind) for p in parts]
    unit = size * count

    def step(w: Split) -> None:
        values = np.stack([w.r[U][row][w.mask] for row in rows], axis=1)
        for i, (address, barrier_address) in enumerate(zip(to(w).tolist(), bar(w).tolist())):
            lane = np.zeros(32, dtype=np.bool_)
            lane[np.flatnonzero(w.mask)[i]] = True
            issue = Issue(w, context, lane, proxy=KNOWN)
            barrier = barrier_at(w, context, "shared::cluster", barrier_address)
            try:
                owner, offset = shared_offset(w, address)
                if offset % unit or offset + unit > owner.shared.size:
                    raise Fault(
                        "misaligned address" if offset % unit else "out of bounds", f"{unit} bytes at {address:#x}", address
                    )
                if barrier is not None and barrier.cta is not owner:
                    raise Fault("mbarrier misuse", "the mbarrier is not in the CTA that is written", address)
            except Fault as problem:
                issue.report(problem.kind, problem.message, f"{address:#x}")
                continue
            if barrier is None:
                continue

            def run(
                owner: Any = owner, offset: int = offset, new: Any = values[i], issue: Issue = issue, barrier: Any = barrier
            ) -> None:
                view = owner.shared.view(size)[offset // size :][:count]
                view[...] = new if combine is None else [combine(o, n) for o, n in zip(view, new)]
                issue.access(
                    owner.shared, np.array([offset // unit]), unit, barrier.entity, barrier.next_time(), combine is None
                )
                barrier.add_tx(-unit, issue.origin, issue.message())

            issue.submit(context.instruction.name, run, work=Work("st.async", bytes=unit, ctas=(owner,)))

    return step


def _completion(mods: Modifiers) -> None:
    if mods.take("weak") or mods.take("relaxed", "cluster"):
        pass
    mods.take("shared::cluster")
    if not mods.take("mbarrier::complete_tx::bytes"):
        raise mods.fail("expected .mbarrier::complete_tx::bytes")
    mods.take("shared::cluster")


def st_async(context: Context, mods: Modifiers) -> Step:
    _completion(mods)
    count = int(mods.choice(("v2", "v4"), "v1")[1])
    return _remote(context, mods, ("b32", "b64", "u32", "u64", "s32", "s64", "f32", "f64"), None, count)


def red_async(context: Context, mods: Modifiers) -> Step:
    from glu4.emulator.isa.atomics import combiner

    _completion(mods)
    operation = mods.choice(("inc", "dec", "min", "max", "add", "and", "or", "xor"))
    legal = {"inc": ("u32",), "dec": ("u32",), "min": ("u32", "s32"), "max": ("u32", "s32"), "add": ("u32", "s32", "u64")}
    kinds = legal.get(operation, ("b32",))
    if not mods.words or mods.words[0] not in kinds:
        raise mods.fail()
    return _remote(context, mods, kinds, combiner(operation, mods.words[0]), 1)


INSTRUCTIONS: dict[str, Builder] = {
    "cp": _cp,
}
