"""atom and red: read-modify-write, lane by lane in order of lanes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.formats import decode, encode
from glu4.emulator.isa.access import Fault, addresses, fault, locate, touch
from glu4.emulator.isa.memory import acquire, gather, release
from glu4.emulator.isa.registry import Builder, Context, Modifiers, Step, U
from glu4.emulator.isa.rounding import canonical, flush, inherit
from glu4.emulator.ptx.module import SIZES, Operand

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS", "combiner"]

_SCOPES = ("cta", "cluster", "gpu", "sys")
_SPACES = ("global", "shared", "shared::cta", "shared::cluster")
_OPERATIONS = ("and", "or", "xor", "cas", "exch", "add", "inc", "dec", "min", "max")
_TYPES = ("b16", "b32", "b64", "b128", "u32", "u64", "s32", "s64", "f32", "f64", "f16", "f16x2", "bf16", "bf16x2")
_LEGAL = {
    "and": ("b32", "b64"), "or": ("b32", "b64"), "xor": ("b32", "b64"),
    "cas": ("b16", "b32", "b64", "b128"), "exch": ("b32", "b64", "b128"),
    "add": ("u32", "u64", "s32", "s64", "f32", "f64", "f16", "f16x2", "bf16", "bf16x2"),
    "inc": ("u32",), "dec": ("u32",),
    "min": ("u32", "u64", "s32", "s64", "f16", "f16x2", "bf16", "bf16x2"),
    "max": ("u32", "u64", "s32", "s64", "f16", "f16x2", "bf16", "bf16x2"),
}  # fmt: skip
Combine = Callable[[Any, Any], Any]


def combiner(operation: str, kind: str, where: str = "bulk") -> Combine:
    """A function on two unsigned NumPy scalars of `kind`'s width: (old, operand) to new.

    where: "global" or "shared" memory, or "bulk" of a bulk reduction. Only atom and red of float32 in global memory flush
    subnormal numbers (PTX ISA 9.7.13.5, and an H100 for bulk reductions).
    """
    bits = SIZES[kind]
    unsigned = np.dtype(f"u{bits // 8}")
    if kind in ("f16x2", "bf16x2"):
        one = combiner(operation, kind[:-2])

        def packed(a: Any, b: Any) -> Any:
            low = one(np.uint16(int(a) & 0xFFFF), np.uint16(int(b) & 0xFFFF))
            high = one(np.uint16(int(a) >> 16), np.uint16(int(b) >> 16))
            return np.uint32(int(low) | int(high) << 16)

        return packed
    if kind == "f32":
        return _flushed_sum if where == "global" else _single_sum
    if kind == "f64":
        return _double_sum_shared if where == "shared" else _double_sum
    if kind in ("f16", "bf16"):
        return _half(operation, kind)
    signed = np.dtype(f"i{bits // 8}")
    table: dict[str, Combine] = {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "exch": lambda a, b: b,
        "add": lambda a, b: a + b,
        "inc": lambda a, b: unsigned.type(0) if a >= b else a + unsigned.type(1),
        "dec": lambda a, b: b if a == 0 or a > b else a - unsigned.type(1),
        "min": np.minimum,
        "max": np.maximum,
    }
    if kind[0] == "s" and operation in ("min", "max"):
        function = table[operation]
        return lambda a, b: function(np.asarray(a).view(signed), np.asarray(b).view(signed)).view(unsigned)
    return table[operation]


def _single_sum(a: Any, b: Any) -> Any:
    return canonical(np.atleast_1d(a).view(np.float32) + np.atleast_1d(b).view(np.float32)).view(np.uint32)[0]


def _flushed_sum(a: Any, b: Any) -> Any:
    x, y = flush(np.atleast_1d(a).view(np.float32)), flush(np.atleast_1d(b).view(np.float32))
    return canonical(flush(x + y)).view(np.uint32)[0]


def _double_sum(a: Any, b: Any) -> Any:
    """In global memory a NaN stays as it is, the operand's before the old one: as on an H100; PTX leaves it open."""
    x, y = np.atleast_1d(a).view(np.float64), np.atleast_1d(b).view(np.float64)
    if np.isnan(y[0]) or np.isnan(x[0]):
        return np.uint64(b if np.isnan(y[0]) else a)
    return inherit(x + y).view(np.uint64)[0]


def _double_sum_shared(a: Any, b: Any) -> Any:
    x, y = np.atleast_1d(a).view(np.float64), np.atleast_1d(b).view(np.float64)
    return inherit(x + y, x, y).view(np.uint64)[0]


def _half(operation: str, kind: str) -> Combine:
    def run(a: Any, b: Any) -> Any:
        x, y = float(decode(kind, np.uint32(a))), float(decode(kind, np.uint32(b)))
        if operation == "add":
            value = x + y
        elif math.isnan(x) or math.isnan(y):
            value = y if math.isnan(x) else x
        else:  # -0 is less than +0
            value = (min if operation == "min" else max)(x, y, key=lambda v: (v, math.copysign(1.0, v)))
        return np.uint16(encode(kind, np.asarray(value)))

    return run


def _shape(mods: Modifiers, operation: str, returns: bool) -> tuple[bool, str, str]:
    """(whether a cache policy follows, vector word or nothing, type) at the end of atom and red."""
    mods.take("noftz")
    policy = mods.take("L2::cache_hint")
    vector = mods.choice(("v2", "v4", "v8"), "")
    if vector and mods.words and mods.words[0] not in ("f32", "f16", "bf16", "f16x2", "bf16x2"):
        raise mods.fail()
    kind = mods.choice(_TYPES)
    if kind not in _LEGAL[operation] or (not returns and operation in ("cas", "exch")):
        raise mods.fail()
    return policy, vector, kind


def _one(combine: Combine | None, count: int) -> Callable[..., Any]:
    """A function that does one lane's update of a place and returns what was there; combine: None for compare-and-swap."""

    def one(view: NDArray[Any], index: int, position: int, values: NDArray[Any], new: NDArray[Any] | None) -> Any:
        old = view[index].copy()
        if combine is None:
            assert new is not None
            if np.array_equal(old, values[position]):
                view[index] = new[position]
        elif count == 1:
            view[index] = combine(old, values[position])
        else:
            view[index] = [combine(o, v) for o, v in zip(old, values[position])]
        return old

    return one


def _atom(context: Context, mods: Modifiers) -> Step:
    returns = context.instruction.opcode == "atom"
    order = mods.choice(("relaxed", "acquire", "release", "acq_rel"), "relaxed")
    mods.choice(_SCOPES, "gpu")
    space = mods.choice(_SPACES, "generic")
    operation = mods.choice(_OPERATIONS)
    policy, vector, kind = _shape(mods, operation, returns)
    operands = list(context.operands(2 + returns, 4 + returns))
    count = int(vector[1]) if vector else 1
    carrier = kind if SIZES[kind] != 16 else "b16"
    destinations: list[int] = []
    if returns:
        d = operands.pop(0)
        parts: tuple[Operand, ...] = context.vector(d, count) if vector else (d,)
        destinations = [context.destination(p, carrier) for p in parts]
    place = addresses(context.address(operands.pop(0)))
    b = operands.pop(0)
    rows = [(context.source(p, carrier), SIZES[kind]) for p in (context.vector(b, count) if vector else (b,))]
    third = context.source(operands.pop(0), carrier) if operation == "cas" else None
    if len(operands) > policy:
        raise context.error("too many operands")
    wide = kind == "b128"  # as two elements of 64 bits
    size, count = (8, 2) if wide else (SIZES[kind] // 8, count)
    unit = size * count
    find = locate(space, unit)
    updates = [
        _one(None if operation == "cas" else combiner(operation, "b64" if wide else kind, where), count)
        for where in ("global", "shared")
    ]

    def step(w: Split) -> None:
        at = place(w)
        values = gather(w, rows, size, wide)
        new = None if third is None else w.r[U][third][w.mask]
        result = np.zeros((at.size, count), dtype=f"u{size}")
        try:
            block, index = spot = find(w, at)
            if int(index.max()) >= block.size // unit or block.readonly:
                raise Fault("out of bounds", f"outside {block.name}", int(at[0]))
        except Fault:
            for position, (block, single) in fault(w, context, space, at, unit):
                result[position] = updates[block.space == "shared"](
                    block.view(size, count), int(single[0]), position, values, new
                )
        else:
            keys = {(block.name, i * unit) for i in index.tolist()}
            for key in keys if returns else ():
                acquire(w, key, order not in ("acquire", "acq_rel"))
            view = block.view(size, count)
            before = view[index]
            one = updates[block.space == "shared"]
            for position, i in enumerate(index.tolist()):
                result[position] = one(view, i, position, values, new)
            changed = operation != "cas" or not np.array_equal(view[index], before)
            touch(w, context, spot, unit, True, True)
            # a compare-and-swap that failed has stored nothing
            if changed:
                w.warp.cta.machine.progress += 1
                for key in keys:
                    release(w, key, order not in ("release", "acq_rel"), True)
        for k, row in enumerate(destinations):
            w.r[U][row][w.mask] = result if wide else result[:, k]

    return step


def _red(context: Context, mods: Modifiers) -> Step:
    if mods.take("async"):
        from glu4.emulator.isa.transfer import red_async

        return red_async(context, mods)
    return _atom(context, mods)


INSTRUCTIONS: dict[str, Builder] = {"atom": _atom, "red": _red}
