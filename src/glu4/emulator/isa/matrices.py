"""ldmatrix, stmatrix and movmatrix (PTX ISA 9.7.14.5.15 to 9.7.14.5.17).

The figures of the shapes of 8-bit elements are worded in CUTLASS: cute/arch/copy_sm100.hpp, cute/atom/copy_traits_sm100.hpp,
and fp4_shift_A in cute/atom/mma_traits_sm120.hpp for where the bits of narrow elements go, which is the low bits of a byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.hazards import Origin
from glu4.emulator.isa.access import Fault, locate
from glu4.emulator.isa.control import aligned
from glu4.emulator.isa.registry import Builder, Context, Modifiers, Step, U
from glu4.emulator.matrix import unpack_sixteens
from glu4.emulator.ptx.module import Register

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["INSTRUCTIONS"]

_PACKED = {"b6x16_p32": 6, "b4x16_p64": 4}


class _Form(NamedTuple):
    """matrices: how many; rows: of one, 16 bytes each; bits: of an element in memory."""

    shape: str
    matrices: int
    rows: int
    transposed: bool
    space: str
    bits: int

    @property
    def registers(self) -> int:
        return self.matrices * self.rows // 8


def _form(mods: Modifiers, load: bool) -> _Form:
    if not mods.take("sync", "aligned"):
        raise mods.fail()
    shape = mods.choice(("m8n8", "m8n16", "m16n16") if load else ("m8n8", "m16n8"))
    count = int(mods.choice(("x1", "x2") if shape == "m16n16" else ("x1", "x2", "x4"))[1])
    transposed = mods.take("trans")
    if (shape in ("m16n16", "m16n8")) > transposed or (shape == "m8n16" and transposed):
        raise mods.fail(f"{shape} {'has no' if transposed else 'needs'} .trans")
    space = mods.choice(("shared", "shared::cta"), "generic")
    bits = 8
    if shape == "m8n8":
        mods.choice(("b16",))
        bits = 16
    elif load and mods.take("b8x16"):
        bits = _PACKED[mods.choice(_PACKED)]
    elif shape == "m8n16" or not mods.take("b8"):
        raise mods.fail()
    return _Form(shape, count, 16 if shape == "m16n16" else 8, transposed, space, bits)


def _rows(context: Context, operand: Any, space: str) -> Any:
    """A function that gives (block, index of 16-byte rows) for the lanes that hold addresses."""
    row, offset, _ = context.address(operand)
    find_rows = locate(space, 16)

    def rows(w: Split, count: int) -> tuple[Any, NDArray[Any]]:
        values = w.r[U][row][:count].astype(np.int64) + offset
        block, index = find_rows(w, values)
        if int(index.max()) >= block.size // 16:
            raise Fault("out of bounds", f"outside {block.name}", int(values.max()))
        return block, index

    return rows


def _registers(context: Context, operand: Any, count: int, load: bool) -> list[int]:
    parts = context.vector(operand, count) if count > 1 or not isinstance(operand, Register) else (operand,)
    return [(context.destination if load else context.source)(p, "b32") for p in parts]


def _loaded(form: _Form, rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Registers [registers, 32] from the rows in memory, uint8 [matrices * rows, 16]."""
    if form.bits < 8:
        rows = unpack_sixteens(rows, form.bits)
    if form.shape == "m16n16":
        # a register holds four elements of one column; the second those of the column eight further on
        columns = np.ascontiguousarray(rows.reshape(form.matrices, 16, 16).transpose(0, 2, 1))
        return columns.view(np.uint32).reshape(2 * form.matrices, 32)
    matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(form.matrices, 8, 8)
    matrices = matrices.transpose(0, 2, 1) if form.transposed else matrices
    return np.ascontiguousarray(matrices).view(np.uint32).reshape(form.matrices, 32)


def _stored(form: _Form, words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Rows in memory from the registers [matrices, 32]."""
    if form.shape == "m16n8":
        # byte i + 2 j of thread 4 g + q goes to row 2 q + i, column g + 8 j
        parts = words.view(np.uint8).reshape(form.matrices, 8, 4, 2, 2)
        return np.ascontiguousarray(parts.transpose(0, 2, 4, 3, 1)).reshape(-1, 16)
    matrices = words.view(np.uint16).reshape(form.matrices, 8, 8)
    matrices = matrices.transpose(0, 2, 1) if form.transposed else matrices
    return np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)


def _touch(w: Split, context: Context, form: _Form, block: Any, index: NDArray[Any], load: bool) -> None:
    """Tell the monitor; of narrow elements only the bytes that are not padding are read."""
    lanes = np.arange(32) < index.size
    monitor = w.warp.cta.machine.monitor
    unit, parts = {4: (8, (0,)), 6: (4, (0, 1, 2))}.get(form.bits, (16, (0,)))
    for part in parts:
        monitor.generic(w, context.instruction, block, index * (16 // unit) + part, unit, not load, False, lanes)


def _matrix(load: bool) -> Builder:
    def build(context: Context, mods: Modifiers) -> Step:
        form = _form(mods, load)
        operands = context.operands(2)
        data, place = operands if load else operands[::-1]
        registers = _registers(context, data, form.registers, load)
        rows = _rows(context, place, form.space)

        def step(w: Split) -> None:
            aligned(w, context)
            try:
                block, index = rows(w, form.rows * form.matrices)
            except (Fault, IndexError) as problem:
                _report(w, context, problem, np.arange(32) < form.rows * form.matrices)
                return
            view = block.data[: block.size // 16 * 16].reshape(-1, 16)
            if load:
                for register, word in zip(registers, _loaded(form, view[index])):
                    w.put(w.r[U][register], word)
            else:
                view[index] = _stored(form, np.stack([w.r[U][register] for register in registers]))
                w.warp.cta.machine.progress += 1
            if block.writes.size:
                _touch(w, context, form, block, index, load)

        return step

    return build


def _report(w: Split, context: Context, problem: Exception, lanes: NDArray[Any]) -> None:
    kind = problem.kind if isinstance(problem, Fault) else "out of bounds"
    w.warp.cta.machine.monitor.report(kind, str(problem), Origin(context.instruction, w.warp, lanes))


def _movmatrix(context: Context, mods: Modifiers) -> Step:
    if not mods.take("sync", "aligned", "m8n8", "trans", "b16"):
        raise mods.fail()
    d, a = context.operands(2)
    destination, source = context.destination(d, "b32"), context.source(a, "b32")

    def step(w: Split) -> None:
        aligned(w, context)
        matrix = w.r[U][source].view(np.uint16).reshape(8, 8)
        w.put(w.r[U][destination], np.ascontiguousarray(matrix.T).view(np.uint32).ravel())

    return step


INSTRUCTIONS: dict[str, Builder] = {
    "ldmatrix": _matrix(True),
    "stmatrix": _matrix(False),
    "movmatrix": _movmatrix,
}
