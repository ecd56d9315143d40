"""ld, st, atom, red, and the instructions on addresses: cvta, isspacep, mapa, getctarank, prefetch and their kin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.clocks import ACQUIRED, FENCED, KNOWN
from glu4.emulator.hazards import Origin
from glu4.emulator.isa.access import POISON, Fault, addresses, fault, locate, touch
from glu4.emulator.isa.registry import Builder, Context, Modifiers, S, Step, U
from glu4.emulator.memory import CONST_BASE, LOCAL_BASE, PARAM_BASE, SHARED_BASE, WINDOW
from glu4.emulator.ptx.module import SIZES, Address, Operand, Register, Symbol, Vector

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS", "acquire", "release"]

_TYPES = ("b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64", "b128")
_SCOPES = ("cta", "cluster", "gpu", "sys")
_SPACES = ("global", "shared", "shared::cta", "shared::cluster", "const", "local", "param", "param::entry", "param::func")
_HINTS = {
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "unified",
    *(f"L1::{w}" for w in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")),
    *(f"L2::{w}" for w in ("evict_normal", "evict_first", "evict_last", "64B", "128B", "256B")),
}  # fmt: skip


def _hints(mods: Modifiers) -> bool:
    """Take cache operators and hints; True if a cache policy operand follows."""
    policy = False
    while mods.words and (mods.words[0] in _HINTS or mods.words[0] == "L2::cache_hint"):
        policy |= mods.words.pop(0) == "L2::cache_hint"
    return policy


def _order(mods: Modifiers, strengths: tuple[str, ...]) -> str:
    """weak, volatile, relaxed, acquire, release; with its scope taken."""
    if mods.take("mmio"):
        mods.choice(("relaxed", "acquire", "release"))
        mods.choice(("sys",))
        return "relaxed"
    order = mods.choice(("weak", "volatile", *strengths), "weak")
    if order in strengths:
        mods.choice(_SCOPES)
    return order


def _space(mods: Modifiers, default: str = "generic") -> str:
    return mods.choice(_SPACES, default).replace("::entry", "").replace("::func", "")


# synchronisation through memory


def release(w: Split, key: Any, relaxed: bool, update: bool) -> None:
    """A store that others may acquire from; `update`: it continues what an earlier release at the place began."""
    warp = w.warp
    machine = warp.cta.machine
    if not machine.monitor.enabled:
        return
    mine = warp.cta.cluster.number
    entry = dict(machine.locations.get(key, {})) if update else {}
    message = warp.release(w, FENCED if relaxed else KNOWN)
    entry[mine] = np.maximum(*_same(entry[mine], message)) if mine in entry else message
    for cluster, known in (w.clock.foreign or {}).items():
        entry[cluster] = np.maximum(*_same(entry[cluster], known)) if cluster in entry else known
    machine.locations[key] = entry


def _same(a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    size = max(a.shape[1], b.shape[1])
    return tuple(np.pad(m, ((0, 0), (0, size - m.shape[1]))) for m in (a, b))  # type: ignore[return-value]


def acquire(w: Split, key: Any, relaxed: bool) -> None:
    """A load that saw what was stored last at a place."""
    warp = w.warp
    entry = warp.cta.machine.locations.get(key)
    if not entry:
        return
    mine = warp.cta.cluster.number
    for cluster, message in entry.items():
        if cluster == mine:
            w.clock.receive(message, ACQUIRED if relaxed else KNOWN)
        else:
            w.clock.merge_foreign({cluster: message})


def _sync_keys(spot: tuple[Any, NDArray[Any]], unit: int) -> set[Any]:
    block, index = spot
    return {(block.name, i * unit) for i in set(index.tolist())}


# ld and st


def _elements(context: Context, mods: Modifiers, operand: Operand, kind: str, count: int, load: bool) -> list[tuple[int, int]]:
    parts = context.vector(operand, count) if count > 1 or isinstance(operand, Vector) else (operand,)
    get = context.wide_destination if load else context.wide_source
    return [get(part, kind) for part in parts]


def _shape(mods: Modifiers) -> tuple[str, int]:
    """(type, elements) at the end of ld and st."""
    count = int(mods.choice(("v2", "v4", "v8"), "v1")[1])
    kind = mods.choice(_TYPES)
    if SIZES[kind] * count > 256 or (kind == "b128" and count > 1):
        raise mods.fail(f"{count} elements of .{kind}")
    return kind, count


def _frame_variable(context: Context, operand: Operand) -> str | None:
    """The name of a .param variable of a call, or None for a kernel's parameter."""
    if isinstance(operand, Address) and isinstance(operand.base, Symbol) and operand.base.variable is not None:
        function = context.function.function
        if not function.entry or operand.base.variable not in function.params:
            return operand.base.name
    elif not context.function.function.entry:
        raise context.error("only named parameters of a device function are modelled")
    return None


def _form(context: Context, mods: Modifiers, strong: str) -> tuple[str, str, str, int, tuple[Operand, ...]]:
    """(order, state space, type, elements, operands) of ld or st; the operand after two is a cache policy."""
    order = _order(mods, ("relaxed", strong))
    space = _space(mods)
    policy = _hints(mods)
    kind, count = _shape(mods)
    operands = context.operands(2, 3)
    if len(operands) == 3 and not policy:
        raise context.error("unexpected third operand")
    return order, space, kind, count, operands


def _ld(context: Context, mods: Modifiers) -> Step:
    order, space, kind, count, operands = _form(context, mods, "acquire")
    rows = _elements(context, mods, operands[0], kind, count, True)
    if space == "param":
        name = _frame_variable(context, operands[1])
        if name is not None:
            return _frame_access(context, operands[1], name, kind, rows, True)
    return _load_step(context, operands[1], space, kind, rows, order)


def _put(w: Split, rows: list[tuple[int, int]], view: int, data: NDArray[Any]) -> None:
    """Write loaded elements, [lanes] or [lanes, elements], to rows, extended to their width."""
    r = w.r[view]
    if len(rows) == 1 and data.ndim == 1:
        if w.full:
            r[rows[0][0]][...] = data
        else:
            r[rows[0][0]][w.mask] = data
        return
    for k, (row, _) in enumerate(rows):
        if w.full:
            r[row][...] = data[:, k]
        else:
            r[row][w.mask] = data[:, k]


def _geometry(kind: str, count: int) -> tuple[int, int, int, int]:
    """(view, bytes of an element, elements, bytes of the access) with 128-bit elements as two of 64."""
    size = SIZES[kind] // 8
    view = S if kind[0] == "s" else U
    return (view, 8, 2, 16) if kind == "b128" else (view, size, count, size * count)


def _load_step(context: Context, place: Operand, space: str, kind: str, rows: list[tuple[int, int]], order: str) -> Step:
    where = addresses(context.address(place))
    view, size, count, unit = _geometry(kind, len(rows))
    find = locate(space, unit)
    strong = order != "weak"
    signed = np.dtype(f"i{size}")
    wide = kind == "b128"

    def faulty(w: Split, at: NDArray[Any]) -> NDArray[Any]:
        """Lane by lane: poison where the address is bad."""
        data = np.full((at.size, unit), POISON, dtype=np.uint8)
        for position, spot in fault(w, context, space, at, unit):
            block, index = spot
            data[position] = block.data[int(index[0]) * unit :][:unit]
        shaped = data.view(f"u{size}")
        return shaped[:, 0] if count == 1 else shaped

    def step(w: Split) -> None:
        at = where(w)
        try:
            block, index = spot = find(w, at)
            data = block.view(size, count)[index]
        except (Fault, IndexError):
            data = faulty(w, at)
        else:
            touch(w, context, spot, unit, False, strong)
            if strong:
                for key in _sync_keys(spot, unit):
                    acquire(w, key, order != "acquire")
        if wide:
            w.r[U][rows[0][0]][w.mask] = data
            return
        _put(w, rows, view, data.view(signed) if view == S else data)

    return step


def _st(context: Context, mods: Modifiers) -> Step:
    if mods.take("async"):
        from glu4.emulator.isa.transfer import st_async

        return st_async(context, mods)
    order, space, kind, count, operands = _form(context, mods, "release")
    rows = _elements(context, mods, operands[1], kind, count, False)
    if space == "param":
        name = _frame_variable(context, operands[0])
        if name is None:
            raise context.error("a kernel's parameters cannot be stored to")
        return _frame_access(context, operands[0], name, kind, rows, False)
    if space == "const":
        raise context.error("constant memory cannot be stored to")
    return _store_step(context, operands[0], space, kind, rows, order)


def gather(w: Split, rows: list[tuple[int, int]], size: int, wide: bool = False) -> NDArray[Any]:
    """Values of the active lanes, [lanes] or [lanes, elements], as unsigned integers of `size` bytes."""
    r = w.r[U]
    if wide or len(rows) == 1:
        row = r[rows[0][0]]
        values = row if w.full else row[w.mask]
    else:
        values = np.stack([r[row] for row, _ in rows], axis=1)
        if not w.full:
            values = values[w.mask]
    kind = np.dtype(f"u{size}")
    return values if values.dtype == kind else values.astype(kind)


def _store_step(context: Context, place: Operand, space: str, kind: str, rows: list[tuple[int, int]], order: str) -> Step:
    where = addresses(context.address(place))
    _, size, count, unit = _geometry(kind, len(rows))
    find = locate(space, unit)
    strong = order != "weak"
    wide = kind == "b128"

    def faulty(w: Split, at: NDArray[Any], values: NDArray[Any]) -> None:
        for position, (block, index) in fault(w, context, space, at, unit):
            if not block.readonly:
                block.view(size, count)[index] = values[position]

    def step(w: Split) -> None:
        at = where(w)
        values = gather(w, rows, size, wide)
        machine = w.warp.cta.machine
        machine.progress += 1
        try:
            block, index = spot = find(w, at)
            if block.readonly:
                raise Fault("out of bounds", f"store to {block.name}, which is read-only", int(at[0]))
            view = block.view(size, count)
            touch(w, context, spot, unit, True, strong, lambda: np.array_equal(view[index], values))
            if order == "weak" and at.size > 1:
                _store_checked(w, context, view, index, values, block.name)
            else:
                view[index] = values
        except (Fault, IndexError):
            faulty(w, at, values)
            return
        if strong:
            for key in _sync_keys(spot, unit):
                release(w, key, order != "release", False)

    return step


def _store_checked(
    w: Split, context: Context, view: NDArray[Any], index: NDArray[Any], values: NDArray[Any], name: str
) -> None:
    """Store; report two lanes that write different values to one place."""
    view[index] = values
    if not np.array_equal(view[index], values):
        machine = w.warp.cta.machine
        machine.monitor.report("data race", "lanes of one store write different values to the same bytes",
                               Origin(context.instruction, w.warp, w.mask), name)  # fmt: skip


def _frame_access(context: Context, operand: Operand, name: str, kind: str, rows: list[tuple[int, int]], load: bool) -> Step:
    """ld.param and st.param of the variables that carry a call's arguments."""
    assert isinstance(operand, Address)
    assert isinstance(operand.base, Symbol)
    assert operand.base.variable is not None
    view, size, count, unit = _geometry(kind, len(rows))
    total = max(operand.base.variable.size, 1)
    start = operand.base.offset + operand.offset
    if not 0 <= start <= total - unit:
        raise context.error(f"{unit} bytes at {name}+{start} are outside its {total}")
    signed = np.dtype(f"i{size}")

    def buffer(w: Split) -> NDArray[np.uint8]:
        if name not in w.frame.buffers:
            w.frame.buffers[name] = np.full((32, total), POISON, dtype=np.uint8)
        return w.frame.buffers[name]

    def load_step(w: Split) -> None:
        data = np.ascontiguousarray(buffer(w)[w.mask, start : start + unit]).view(f"u{size}")
        if kind == "b128":
            w.r[U][rows[0][0]][w.mask] = data
            return
        data = data[:, 0] if count == 1 else data
        _put(w, rows, view, data.view(signed) if view == S else data)

    def store_step(w: Split) -> None:
        values = np.ascontiguousarray(gather(w, rows, size, kind == "b128"))
        buffer(w)[w.mask, start : start + unit] = values.reshape(values.shape[0], -1).view(np.uint8)

    return load_step if load else store_step


# addresses


def _cvta(context: Context, mods: Modifiers) -> Step:
    back = mods.take("to")
    space = mods.choice(("global", "shared", "shared::cta", "shared::cluster", "const", "local", "param", "param::entry"))
    kind = mods.choice(("u64", "u32"))
    d, a = context.operands(2)
    destination, source = context.destination(d, kind), context.source(a, kind)
    bases = {"shared": SHARED_BASE, "local": LOCAL_BASE, "param": PARAM_BASE}
    base = bases.get(space.partition("::")[0], 0)
    if kind == "u32" and base:
        raise context.error("32-bit generic addresses are not modelled")
    shift = np.array((-base if back else base) & ((1 << 64) - 1), dtype=np.uint64).astype(f"u{SIZES[kind] // 8}")
    if isinstance(a, Register | Symbol) and base and not back and isinstance(a, Symbol) and not context.function.function.entry:
        raise context.error("the address of a device function's parameter is not modelled")

    def step(w: Split) -> None:
        r = w.r[U]
        np.add(r[source], shift, out=r[destination], where=w.mask)

    return step


def _isspacep(context: Context, mods: Modifiers) -> Step:
    space = mods.choice(("global", "shared", "shared::cta", "shared::cluster", "const", "local", "param", "param::entry"))
    p, a = context.operands(2)
    destination, source = context.destination(p, "pred"), context.source(a, "u64")
    named = {"shared": SHARED_BASE, "local": LOCAL_BASE, "param": PARAM_BASE, "const": CONST_BASE}
    low = named.get(space.partition("::")[0])

    def step(w: Split) -> None:
        values = w.r[S][source]
        if low is None:
            result = (values < CONST_BASE) | (values >= SHARED_BASE + WINDOW)
        else:
            result = (values >= low) & (values < low + WINDOW)
        if space in ("shared", "shared::cta"):
            result &= ((values - SHARED_BASE) >> 24) == w.warp.cta.rank
        w.put(w.r[U][destination], result)

    return step


def _mapa(context: Context, mods: Modifiers) -> Step:
    shared = mods.take("shared::cluster")
    kind = mods.choice(("u32", "u64"))
    d, a, b = context.operands(3)
    destination, source, rank = context.destination(d, kind), context.source(a, kind), context.source(b, "u32")
    if not shared and kind == "u32":
        raise context.error("32-bit generic addresses are not modelled")

    def step(w: Split) -> None:
        cta = w.warp.cta
        ranks = w.r[U][rank].astype(np.int64)
        # an address in no CTA, which is reported where it is used: compilers map for all lanes what some then use
        ranks = np.where(ranks < len(cta.cluster.ctas), ranks, 0xFF)
        values = w.r[S][source].astype(np.int64)
        w.put(w.r[U][destination], ((values & ~0xFF000000) | (ranks << 24)).astype(w.r[U][destination].dtype))

    return step


def _getctarank(context: Context, mods: Modifiers) -> Step:
    shared = mods.take("shared::cluster")
    kind = mods.choice(("u32", "u64"))
    d, a = context.operands(2)
    destination, source = context.destination(d, "u32"), context.source(a, kind)
    if not shared and kind == "u32":
        raise context.error("32-bit generic addresses are not modelled")

    def step(w: Split) -> None:
        w.put(w.r[U][destination], ((w.r[S][source] >> 24) & 0xFF).astype(np.uint32))

    return step


def _hint_only(words: set[str], low: int, high: int) -> Builder:
    """An instruction that changes nothing that can be observed."""

    def build(context: Context, mods: Modifiers) -> Step:
        while mods.words and mods.words[0] in words:
            mods.words.pop(0)
        for operand in context.operands(low, high):
            if isinstance(operand, Address):
                context.address(operand, rest=True)
            elif isinstance(operand, Vector):
                raise context.error("unexpected vector")
        return lambda w: None

    return build


def _createpolicy(context: Context, mods: Modifiers) -> Step:
    words = {
        "fractional",
        "range",
        "cvt",
        "global",
        "b64",
        *(f"L2::{w}" for w in ("evict_last", "evict_normal", "evict_first", "evict_unchanged")),
    }
    words.add("L2")
    while mods.words and mods.words[0] in words:
        mods.words.pop(0)
    destination = context.destination(context.operands(1, 4)[0], "b64")
    return lambda w: w.put(w.r[U][destination], np.uint64(0x12F0000000000000))


INSTRUCTIONS: dict[str, Builder] = {
    "ld": _ld,
    "ldu": _ld,
    "st": _st,
    "cvta": _cvta,
    "isspacep": _isspacep,
    "mapa": _mapa,
    "getctarank": _getctarank,
    "prefetch": _hint_only(
        {"tensormap", "global", "local", "param", "const", "L1", "L2", "L2::evict_last", "L2::evict_normal"}, 1, 1
    ),
    "prefetchu": _hint_only({"L1"}, 1, 1),
    "applypriority": _hint_only({"global", "L2::evict_normal"}, 2, 2),
    "createpolicy": _createpolicy,
}
