"""wgmma: asynchronous products of a warpgroup, operand A in registers or shared memory (PTX ISA 9.7.15).

The four warps of a warpgroup issue an operation together; it is in flight once the last of them has. It reads A's registers
and shared memory when it completes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.async_queue import Operation, Work
from glu4.emulator.clocks import WGMMA
from glu4.emulator.descriptors import SharedDescriptor, decode_wgmma, read_operand
from glu4.emulator.hazards import Origin
from glu4.emulator.isa.access import Fault
from glu4.emulator.isa.asynchronous import PRODUCTS, Groups, Issue
from glu4.emulator.isa.control import aligned
from glu4.emulator.isa.registry import Builder, Context, F, Modifiers, S, Step, U
from glu4.emulator.matrix import Fragment, decode_operand, gather_operand, multiply, wgmma_fragments
from glu4.emulator.ptx.module import Operand, Vector
from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS"]

_WARPS = 4
_SHAPES = tuple(f"m64n{n}k{k}" for k in (8, 16, 32) for n in range(8, 257, 8))
# bits of an element: what may be multiplied with what, and the types of D
_TYPES: dict[int, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    8: ((("e4m3", "e5m2"), ("f16", "f32")), (("u8", "s8"), ("s32",))),
    16: ((("f16",), ("f16", "f32")), (("bf16",), ("f32",))),
    32: ((("tf32",), ("f32",)),),
}
_fragments = cache(wgmma_fragments)
_NUMPY = {"f32": np.float32, "s32": np.int32, "f16": np.float16}


class _Form:
    """One wgmma instruction's constants."""

    def __init__(self, n: int, d_type: str, types: tuple[str, str], bits: int, saturate: bool) -> None:
        self.n = n
        self.d_type = d_type
        self.types = types
        self.bits = bits
        self.saturate = saturate
        self.d: list[int] = []
        self.a: list[int] = []
        self.a_descriptor: int | None = None
        self.b_descriptor = 0
        self.scale_d: tuple[int, bool] = (0, False)
        self.negate_a = self.negate_b = False
        self.a_major, self.b_major = "K", "K"


class _Warpgroup:
    """Operations of one warpgroup that not all of its warps have issued yet; count: operations so far."""

    def __init__(self) -> None:
        self.next = [0] * _WARPS
        self.partial: dict[int, _Product] = {}
        self.last: list[tuple[set[int], Operation]] = []


def _wgmma(context: Context, mods: Modifiers) -> Step:
    if mods.take("fence", "sync", "aligned"):
        context.operands(0)
        return lambda w: aligned(w, context)
    if mods.take("commit_group", "sync", "aligned"):
        context.operands(0)
        return lambda w: _commit(w, context)
    if mods.take("wait_group", "sync", "aligned"):
        return _wait(context, context.literal(context.operands(1)[0]))
    if mods.take("mma_async", "sync", "aligned"):
        return _multiply(context, mods)
    raise mods.fail()


def _commit(w: Split, context: Context) -> None:
    aligned(w, context)
    Groups.of(w, PRODUCTS).commit()


def _wait(context: Context, pending: int) -> Step:
    def step(w: Split) -> Any:
        aligned(w, context)
        groups = Groups.of(w, PRODUCTS)
        if groups.wait(w, pending, "wgmma.wait_group"):
            return True
        times: dict[int, int] = w.warp.extra.setdefault("wgmma times", {})
        last = groups.number - 1 - pending
        done = [times.pop(g) for g in sorted(times) if g <= last]
        if done:
            first = w.warp.cta.warps[w.warp.number // _WARPS * _WARPS]
            w.clock.know(first.entity + WGMMA, max(done))
        for row in [row for row, (group, _) in w.frame.pending.items() if group <= last]:
            del w.frame.pending[row]
        return None

    return step


def _immediate(context: Context, operand: Operand, legal: tuple[int, ...]) -> int:
    value = context.literal(operand)
    if value not in legal:
        raise context.error(f"expected one of {', '.join(map(str, legal))}, found {value}")
    return value


def _form(mods: Modifiers) -> _Form:
    """The shape and types of a product."""
    shape = mods.choice(_SHAPES)
    n, k = (int(part) for part in shape[4:].split("k"))
    bits = 256 // k
    saturate = mods.take("satfinite")
    d_type = mods.choice(("f32", "f16", "s32"))
    known = [name for names, _ in _TYPES[bits] for name in names]
    types = mods.choice(known), mods.choice(known)
    saturate = mods.take("satfinite") or saturate  # the ISA has it in both places
    pairs = [results for names, results in _TYPES[bits] if types[0] in names and types[1] in names]
    if not pairs or d_type not in pairs[0] or (saturate and d_type != "s32") or (d_type == "s32" and n > 32 and n % 16):
        raise mods.fail()
    return _Form(n, d_type, types, bits, saturate)


def _multiply(context: Context, mods: Modifiers) -> Step:
    form = _form(mods)
    n, d_type = form.n, form.d_type
    operands = list(context.operands(4, 8))
    form.d = [context.destination(o, "b32") for o in context.vector(operands[0], n // 4 if d_type == "f16" else n // 2)]
    in_registers = isinstance(operands[1], Vector)
    if in_registers:
        form.a = [context.source(o, "b32") for o in context.vector(operands[1], 4)]
    else:
        form.a_descriptor = context.source(operands[1], "b64")
    form.b_descriptor = context.source(operands[2], "b64")
    form.scale_d = context.predicate(operands[3])
    rest = operands[4:]
    if len(rest) != (0 if d_type == "s32" else 2 if form.bits != 16 else 3 if in_registers else 4):
        raise context.error("wrong number of operands")
    if rest:
        form.negate_a, form.negate_b = (_immediate(context, o, (1, -1)) < 0 for o in rest[:2])
    if form.bits == 16:
        form.b_major = "MN" if _immediate(context, rest[-1], (0, 1)) else "K"
        if not in_registers:
            form.a_major = "MN" if _immediate(context, rest[2], (0, 1)) else "K"
    touched = set(form.d) | set(form.a)
    written = context.function.unfenced(context.place) & touched

    def step(w: Split) -> None:
        aligned(w, context)
        warp = w.warp
        if written:
            _report(
                w, context, "missing wgmma.fence", f"{len(written)} of its registers are written after the last wgmma.fence"
            )
        _issue(w, context, form)
        warp.cta.machine.progress += 1

    return step


def _report(w: Split, context: Context, kind: str, message: str) -> None:
    w.warp.cta.machine.monitor.report(kind, message, Origin(context.instruction, w.warp, w.mask))


def _issue(w: Split, context: Context, form: _Form) -> None:
    """This warp's part; the last warp of the warpgroup submits the operation."""
    warp = w.warp
    number, quarter = warp.number // _WARPS, warp.number % _WARPS
    group: _Warpgroup = warp.cta.extra.setdefault(("wgmma", number), _Warpgroup())
    sequence = group.next[quarter]
    group.next[quarter] += 1
    product = group.partial.get(sequence)
    if product is None:
        product = group.partial[sequence] = _Product(w, context, form, sequence + 1)
    elif product.form is not form:
        _report(
            w,
            context,
            "divergent execution",
            f"another warp of the warpgroup is at PTX line {product.context.instruction.line}",
        )
    product.join(w, quarter)
    groups = Groups.of(w, PRODUCTS)
    groups.add(product.operation)
    warp.extra.setdefault("wgmma times", {})[groups.number] = sequence + 1
    for row in form.d:
        w.frame.pending[row] = (groups.number, "write")
    for row in form.a:
        w.frame.pending.setdefault(row, (groups.number, "read"))
        if w.frame.pending[row][1] == "read":
            w.frame.pending[row] = (groups.number, "read")
    if len(product.parts) == _WARPS:
        del group.partial[sequence]
        mine = set(form.d)
        group.last = [(rows, o) for rows, o in group.last if not o.done]
        product.operation.after = tuple(o for rows, o in group.last if rows & mine)
        group.last.append((mine, product.operation))
        warp.cta.machine.submit(product.operation)
    elif warp.cta.machine.recorder is not None:
        warp.cta.machine.recorder.part(product.operation)


class _Product:
    """One operation of a warpgroup."""

    def __init__(self, w: Split, context: Context, form: _Form, time: int) -> None:
        self.context = context
        self.form = form
        self.time = time
        self.issue = Issue(w, context)
        self.parts: dict[int, tuple[Any, bool]] = {}
        self.b = int(w.r[U][form.b_descriptor][0])
        self.a = None if form.a_descriptor is None else int(w.r[U][form.a_descriptor][0])
        k = 256 // form.bits
        product = {8: "f8 wgmma", 16: "f16 wgmma", 32: "tf32 wgmma"}[form.bits]
        work = Work("MMA (wgmma)", macs=64 * form.n * k, product=product, text=f"wgmma m64n{form.n}k{k}")
        self.operation = Operation("wgmma", self.issue.origin, self.run, work=work)
        self.entity = w.warp.cta.warps[w.warp.number // _WARPS * _WARPS].entity + WGMMA

    def join(self, w: Split, quarter: int) -> None:
        form = self.form
        row, negated = form.scale_d
        values = w.r[U][row]
        keep = bool(values[0]) ^ negated
        uniform = (values == values[0]).all() and self.b == int(w.r[U][form.b_descriptor][0])
        for descriptor in (form.b_descriptor, form.a_descriptor):
            uniform = uniform and (descriptor is None or bool((w.r[U][descriptor] == w.r[U][descriptor][0]).all()))
        if not uniform:
            self.issue.report("malformed descriptor", "descriptors or scale-d differ between the threads of the warpgroup")
        self.parts[quarter] = (w.frame, keep)
        if w.warp is not self.issue.warp:
            self.issue.clock.intersect(w.clock)  # every warp reads B, so that each must know of what was written
            w.warp.tick(w)

    def read(self, descriptor: SharedDescriptor, major: str, rows: int) -> NDArray[np.uint8]:
        """An operand of `rows` by 32 bytes from shared memory."""
        shared = self.issue.warp.cta.shared
        base = shared.base & 0xFFFFFF

        def fetch(where: NDArray[np.int64]) -> NDArray[np.uint8]:
            index = ((where & 0x3FFFF) - base) >> 4
            if int(index.min()) < 0 or int(index.max()) >= shared.size // 16:
                raise Fault(
                    "out of bounds", f"the descriptor reaches outside {shared.name} ({shared.size} bytes)", int(where.min())
                )
            self.issue.access(shared, _spans(index), 16, self.entity, self.time, False)
            return np.asarray(shared.view(8, 2)[index].view(np.uint8))

        return read_operand(descriptor, major, rows, 256 // self.form.bits, self.form.bits, fetch)  # type: ignore[arg-type]

    def operands(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """A [64, K] and B [n, K] as float64."""
        form = self.form
        b = decode_operand(self.read(decode_wgmma(self.b), form.b_major, form.n), form.types[1], form.bits)
        if self.a is not None:
            a = self.read(decode_wgmma(self.a), form.a_major, 64)
        else:
            parts = [self.parts[quarter][0] for quarter in range(_WARPS)]
            words = np.concatenate([np.stack([frame.rows[U][row] for row in form.a], axis=1) for frame in parts])
            a = gather_operand(words, _fragments(form.n, form.d_type, form.bits)[0], 64, 256 // form.bits, form.bits)
        return decode_operand(a, form.types[0], form.bits), b

    def run(self) -> None:
        form = self.form
        try:
            a, b = self.operands()
        except (ValueError, Fault) as problem:
            kind = problem.kind if isinstance(problem, Fault) else "malformed descriptor"
            self.issue.report(kind, str(problem))
            return
        fragment = _fragments(form.n, form.d_type)[1]
        for quarter, (frame, keep) in self.parts.items():
            rows, columns = _part(fragment, quarter)
            old = None
            if keep:
                old = np.empty((64, form.n), dtype=_NUMPY[form.d_type])
                old[rows, columns] = _read_d(frame, form)
                old = old[16 * quarter : 16 * quarter + 16]
            part = a[16 * quarter : 16 * quarter + 16]
            new = multiply(part, b, old, form.d_type, negate_a=form.negate_a, negate_b=form.negate_b, saturate=form.saturate)
            _write_d(frame, form, new[rows - 16 * quarter, columns])


def _part(fragment: Fragment, quarter: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows and columns of one warp's share."""
    threads = slice(32 * quarter, 32 * quarter + 32)
    return fragment.rows[threads], fragment.columns[threads]


def _read_d(frame: Any, form: _Form) -> NDArray[Any]:
    """[32, registers, elements]."""
    if form.d_type != "f16":
        view = F if form.d_type == "f32" else S
        return np.stack([frame.rows[view][row] for row in form.d], axis=1)[:, :, None]
    return np.stack([frame.rows[U][row] for row in form.d], axis=1).view(np.float16).reshape(32, -1, 2)


def _write_d(frame: Any, form: _Form, values: NDArray[Any]) -> None:
    words = np.ascontiguousarray(values).view(np.uint32).reshape(32, -1)
    for k, row in enumerate(form.d):
        frame.rows[U][row][...] = words[:, k]


def _spans(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """The distinct 16-byte units, in order."""
    return np.unique(index)


INSTRUCTIONS: dict[str, Builder] = {"wgmma": _wgmma}
