"""A Module made ready to run: each instruction a Step, branches with their points of reconvergence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.errors import PtxError
from glu4.emulator.flow import reconvergence, registers_in_flight, unfenced_registers
from glu4.emulator.isa import INSTRUCTIONS
from glu4.emulator.isa.control import guarded, join_step, off_the_end
from glu4.emulator.isa.registry import Context, Modifiers, Step, row_type
from glu4.emulator.isa.watch import watched
from glu4.emulator.lanes import LANES
from glu4.emulator.ptx.module import SIZES, Function, Instruction, Module, Symbol, Variable

__all__ = ["FunctionCode", "Program"]

EXIT = -1  # where lanes that return from a function at different times wait for each other


class Program:
    """A module whose every instruction is known. Raises PtxError, naming line and opcode, for one that is not."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.functions: dict[str, FunctionCode] = {}
        for function in module.functions.values():
            if function.defined:
                self.functions[function.name] = FunctionCode(self, function)
        with np.errstate(all="ignore"):  # constants that overflow their type
            for code in self.functions.values():
                code.build()

    def shared_variables(self, entry: Function) -> list[Variable]:
        """Those with a size that the kernel's own text and module declare."""
        found = [v for v in self.module.variables.values() if v.space == "shared" and v.count]
        for function in self.module.functions.values():
            if function is entry or not function.entry:
                found += [v for v in function.variables if v.space == "shared" and v.count]
        return found


class FunctionCode:
    """Steps of one function. A row is a register, a constant, a special register or an address; rows are numbered as used."""

    def __init__(self, program: Program, function: Function) -> None:
        self.program = program
        self.function = function
        self.name = function.name
        self.code: list[Step] = []
        self.start: list[int] = []  # instruction -> place in `code`
        self.instruction_at: list[Instruction | None] = []
        self.reconverge: dict[int, int | None] = {}
        self.bits = [SIZES[r.type] for r in function.registers]
        # after the registers: ("constant", array) | ("special", name) | ("symbol", Symbol) | ("scratch", None)
        self.extra: list[tuple[str, Any]] = []
        self._known: dict[Any, int] = {}
        self._banks: dict[int, list[int]] | None = None  # registers by width
        self._constants: dict[int, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = {}
        self._unfenced: list[set[int]] | None = None
        self._in_flight = registers_in_flight(function)
        self.local_offsets: dict[str, int] = {}
        self.local_size = 0
        self._place_locals()

    def _place_locals(self) -> None:
        offset = 0
        for v in self.function.variables:
            if v.space == "local":
                offset = -(-offset // v.align) * v.align
                self.local_offsets[v.name] = offset
                offset += v.size
        self.local_size = -(-offset // 16) * 16

    # rows

    def _row(self, key: Any, bits: int, what: tuple[str, Any]) -> int:
        if key not in self._known:
            self._known[key] = len(self.bits)
            self.bits.append(bits)
            self.extra.append(what)
        return self._known[key]

    def constant(self, value: int, bits: int) -> int:
        shape = (LANES, 2) if bits == 128 else LANES
        words = np.zeros(shape, dtype=row_type(bits))
        if bits == 128:
            words[:] = (value & (1 << 64) - 1, value >> 64)
        else:
            words[:] = bool(value) if bits == 1 else value & ((1 << bits) - 1)
        words.flags.writeable = False
        return self._row(("constant", value, bits), bits, ("constant", words))

    def special_row(self, name: str, bits: int) -> int:
        return self._row(("special", name, bits), bits, ("special", name))

    def symbol_row(self, symbol: Symbol, bits: int, line: int) -> int:
        if bits not in (32, 64):
            raise PtxError(f"the address of {symbol.name} does not fit {bits} bits", line)
        variable = symbol.variable or self.program.module.variables.get(symbol.name)
        if variable is None:
            what = (
                "a function, and only direct calls are modelled" if symbol.name in self.program.functions else "not a variable"
            )
            raise PtxError(f"{symbol.name} is {what}", line)
        where = Symbol(symbol.name, symbol.offset, variable)
        return self._row(("symbol", id(variable), symbol.name, symbol.offset, bits), bits, ("symbol", where))

    def scratch(self, bits: int) -> int:
        return self._row(("scratch", bits), bits, ("scratch", None))

    def unfenced(self, place: int) -> set[int]:
        """Registers that may have been written since the last wgmma.fence before an instruction."""
        if self._unfenced is None:
            self._unfenced = unfenced_registers(self.function)
        return self._unfenced[place]

    # code

    def build(self) -> None:
        function = self.function
        after = reconvergence(function)
        joins = {place for place in after.values() if place is not None and place >= 0}
        count = len(function.instructions)
        at = 0
        for i in range(count + 1):
            self.start.append(at)
            at += 1 + (i in joins)
        self.reconverge = {i: None if p is None else (EXIT if p >= count else self.start[p]) for i, p in after.items()}
        for i, instruction in enumerate(function.instructions):
            if i in joins:
                self.emit(join_step(self.start[i]), instruction)
            self.emit(self.step(i, instruction), instruction)
        if count in joins:
            self.emit(join_step(self.start[count]), None)
        self.emit(off_the_end(function.name), None)

    def emit(self, step: Step, instruction: Instruction | None) -> None:
        self.code.append(step)
        self.instruction_at.append(instruction)

    def step(self, place: int, instruction: Instruction) -> Step:
        builder = INSTRUCTIONS.get(instruction.opcode)
        modifiers = Modifiers(instruction)
        if builder is None:
            raise modifiers.fail()
        context = Context(self, instruction, place)
        try:
            made = builder(context, modifiers)
        except PtxError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError) as error:
            raise PtxError(f"{instruction.name}: malformed ({error})", instruction.line) from error
        modifiers.done()
        return guarded(context, watched(context, made, self._in_flight))

    def rows(self, warp: Any) -> tuple[list[NDArray[Any]], list[NDArray[Any]], list[NDArray[Any]]]:
        """A register file for one warp: unsigned, signed and float views of each row."""
        count = len(self.function.registers)
        if self._banks is None:
            self._banks = {}
            for i in range(count):
                self._banks.setdefault(self.bits[i], []).append(i)
        unsigned: list[NDArray[Any]] = [_NOTHING] * count
        signed, floats = unsigned.copy(), unsigned.copy()
        for bits, members in self._banks.items():
            shape = (len(members), LANES, 2) if bits == 128 else (len(members), LANES)
            bank = np.zeros(shape, dtype=row_type(bits))
            if bits > 1:
                bank.view(np.uint8)[...] = 0xD7  # what an uninitialised register holds
            # one view of a bank is quicker than one of each row
            for index, u, s, f in zip(members, bank, _signed(bank, bits), _floats(bank, bits)):
                unsigned[index], signed[index], floats[index] = u, s, f
        for i, (kind, what) in enumerate(self.extra):
            bits = self.bits[count + i]
            views = self._constants.get(i)
            if views is None:
                row = _extra_row(warp, kind, what, bits, self)
                views = row, _signed(row, bits), _floats(row, bits)
                if kind == "constant":  # never written: the same for all warps
                    self._constants[i] = views
            for rows, view in zip((unsigned, signed, floats), views):
                rows.append(view)
        return unsigned, signed, floats


def _extra_row(warp: Any, kind: str, what: Any, bits: int, code: FunctionCode) -> NDArray[Any]:
    if kind == "constant":
        return what  # type: ignore[no-any-return]
    row = np.zeros((LANES, 2) if bits == 128 else LANES, dtype=row_type(bits))
    if kind == "special":
        row[:] = warp.special(what).astype(row.dtype)
    elif kind == "symbol":
        row[:] = warp.address_of(what, code) & ((1 << bits) - 1)
    return row


_NOTHING = np.empty(0)
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_FLOATS = {2: np.float16, 4: np.float32, 8: np.float64}


def _signed(rows: NDArray[Any], bits: int) -> NDArray[Any]:
    return rows if bits in (1, 128) else rows.view(_SIGNED[bits // 8])


def _floats(rows: NDArray[Any], bits: int) -> NDArray[Any]:
    return rows.view(_FLOATS[bits // 8]) if bits // 8 in _FLOATS else rows
