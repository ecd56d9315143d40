"""What an instruction's builder sees: its modifiers, and its operands as rows of the register file.

A builder turns one Instruction into a Step when a module is loaded; a Step runs it for the active lanes of a split. Modifiers
and operands are all checked then, so that an instruction that is not modelled is refused before anything runs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from glu4.emulator.errors import PtxError
from glu4.emulator.ptx.module import (
    SIZES,
    Address,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)

if TYPE_CHECKING:
    from glu4.emulator.program import FunctionCode
    from glu4.emulator.split import Split

__all__ = ["Builder", "Context", "F", "Modifiers", "Place", "S", "Step", "U"]

# a Step returns something true to stop the split: it is blocked, gone, or somewhere else
Step = Callable[["Split"], Any]
Builder = Callable[["Context", "Modifiers"], Step]

U, S, F = 0, 1, 2  # views of a row: unsigned (or bool), signed, float

_ROW_TYPES = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64, 128: np.uint64}
_SPECIAL = {
    **{f"%{name}.{axis}": 32 for name in ("tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid") for axis in "xyz"},
    **{f"%{name}.{axis}": 32 for name in ("cluster_ctaid", "cluster_nctaid") for axis in "xyz"},
    **dict.fromkeys(("%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%cluster_ctarank", "%cluster_nctarank"), 32),
    **{f"%lanemask_{name}": 32 for name in ("eq", "le", "lt", "ge", "gt")},
    **dict.fromkeys(("%total_smem_size", "%dynamic_smem_size", "%aggr_smem_size"), 32),
    **dict.fromkeys(("%clock", "%clock_hi", "%globaltimer_lo", "%globaltimer_hi"), 32),
    "%gridid": 64, "%clock64": 64, "%globaltimer": 64, "%is_explicit_cluster": 1,
}  # fmt: skip
CLOCKS = ("%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi")


class Place(NamedTuple):
    """A memory operand: a row that holds addresses, and a constant to add."""

    row: int
    offset: int
    wide: bool


class Modifiers:
    """The words after the opcode, taken in the order in which PTX lists them."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        self.words = list(instruction.modifiers)

    def fail(self, why: str = "") -> PtxError:
        return PtxError(
            f"instruction {self.instruction.name} is not modelled{': ' + why if why else ''}", self.instruction.line
        )

    def take(self, *words: str) -> bool:
        """Whether the next words are these; they are taken if so."""
        if tuple(self.words[: len(words)]) == words:
            del self.words[: len(words)]
            return True
        return False

    def choice(self, options: Iterable[str], default: str | None = None) -> str:
        """The next word if it is one of `options`, else the default; an error where there is none."""
        if self.words and self.words[0] in options:
            return self.words.pop(0)
        if default is None:
            raise self.fail(f"expected one of .{', .'.join(options)}")
        return default

    def type(self, options: Iterable[str]) -> str:
        return self.choice(options)

    def done(self) -> None:
        if self.words:
            raise self.fail(f".{self.words[0]} is not known here")


class Context:
    """One instruction being built, in the function that holds it."""

    def __init__(self, function: FunctionCode, instruction: Instruction, place: int) -> None:
        self.function = function
        self.instruction = instruction
        self.place = place  # index of this instruction in the function

    def error(self, message: str) -> PtxError:
        return PtxError(f"{self.instruction.name}: {message}", self.instruction.line)

    def operands(self, low: int, high: int | None = None) -> tuple[Operand, ...]:
        """The operands, checked for their number."""
        found = self.instruction.operands
        if not low <= len(found) <= (high or low):
            raise self.error(f"expected {low if high is None else f'{low} to {high}'} operands, found {len(found)}")
        return found

    # rows

    def source(self, operand: Operand, kind: str) -> int:
        """Row of a value of PTX type `kind`: a register, a constant, a special register or the address of a symbol."""
        bits = SIZES[kind]
        if isinstance(operand, Register):
            self.check(operand, bits)
            return operand.index
        if isinstance(operand, Immediate):
            return self.function.constant(self.immediate(operand, kind), bits)
        if isinstance(operand, Special):
            return self.special(operand, bits)
        if isinstance(operand, Symbol):
            return self.function.symbol_row(operand, bits, self.instruction.line)
        raise self.error(f"expected a value of type .{kind}")

    def wide_source(self, operand: Operand, kind: str) -> tuple[int, int]:
        """As `source`, of a register at least as wide as the type (ld, st, cvt: PTX ISA 9.4.1): (row, bits)."""
        if isinstance(operand, Register) and 64 >= SIZES[operand.type] > SIZES[kind] > 1:
            return operand.index, SIZES[operand.type]
        return self.source(operand, kind), SIZES[kind]

    def destination(self, operand: Operand, kind: str) -> int:
        """Row of a destination; `_` gives a row that nothing reads."""
        bits = SIZES[kind]
        if isinstance(operand, Sink):
            return self.function.scratch(bits)
        if isinstance(operand, Special):
            raise self.error(f"{operand.name} is not a declared register")
        if not isinstance(operand, Register):
            raise self.error("expected a destination register")
        self.check(operand, bits)
        return operand.index

    def wide_destination(self, operand: Operand, kind: str) -> tuple[int, int]:
        if isinstance(operand, Register) and 64 >= SIZES[operand.type] > SIZES[kind] > 1:
            return operand.index, SIZES[operand.type]
        return self.destination(operand, kind), SIZES[kind]

    def check(self, register: Register, bits: int) -> None:
        if SIZES[register.type] != bits:
            raise self.error(f"register {register.name} is .{register.type}, expected {bits} bits")

    def predicate(self, operand: Operand) -> tuple[int, bool]:
        """(row, negated) of a predicate source."""
        if isinstance(operand, Negated):
            return self.source(operand.operand, "pred"), True
        return self.source(operand, "pred"), False

    def pair(self, operand: Operand, kind: str, second: str) -> tuple[int, int | None]:
        """Rows of `a|b`, or of `a` alone."""
        if isinstance(operand, Pair):
            return self.destination(operand.first, kind), self.destination(operand.second, second)
        return self.destination(operand, kind), None

    def vector(self, operand: Operand, count: int | None = None) -> tuple[Operand, ...]:
        if not isinstance(operand, Vector) or (count is not None and len(operand.elements) != count):
            raise self.error(f"expected a vector{f' of {count}' if count else ''}")
        return operand.elements

    def literal(self, operand: Operand) -> int:
        """An integer that must be a constant in the text."""
        if not isinstance(operand, Immediate) or operand.kind != "int":
            raise self.error("expected an integer constant")
        return int(operand.value)

    def special(self, operand: Special, bits: int) -> int:
        if operand.name not in _SPECIAL:
            raise PtxError(f"special register {operand.name} is not modelled", self.instruction.line)
        if (bits == 1) != (_SPECIAL[operand.name] == 1):
            raise self.error(f"{operand.name} is not of {bits} bits")
        return self.function.special_row(operand.name, bits)

    def address(self, operand: Operand, rest: bool = False) -> Place:
        """Row and offset of `[base+offset]`; 32-bit bases are zero-extended."""
        if not isinstance(operand, Address):
            raise self.error("expected an address in brackets")
        if operand.rest and not rest:
            raise self.error("unexpected operands inside the brackets")
        base = operand.base
        if isinstance(base, Register):
            bits = SIZES[base.type]
            if bits not in (32, 64):
                raise self.error(f"address register {base.name} is .{base.type}")
            return Place(base.index, operand.offset, bits == 64)
        if isinstance(base, Symbol):
            return Place(self.function.symbol_row(base, 64, self.instruction.line), operand.offset, True)
        return Place(self.function.constant(int(base.value), 64), operand.offset, True)

    # constants

    def immediate(self, operand: Immediate, kind: str) -> int:
        """The bits of a constant as that type."""
        bits = SIZES[kind]
        value = operand.value
        if kind == "pred":
            return int(bool(value))
        if operand.kind == "int" and not kind.startswith(("f", "bf")):
            return int(value) & ((1 << bits) - 1)
        if operand.kind in ("f32", "f64") and bits == (32 if operand.kind == "f32" else 64):
            return int(value)
        if kind in ("f32", "f64", "b32", "b64"):
            number = float(value) if operand.kind in ("int", "decimal") else _value_of(operand)
            if kind[0] == "b" and operand.kind != "decimal":
                raise self.error(f"constant does not fit .{kind}")
            raw = np.array(number, dtype=np.float32 if bits == 32 else np.float64)
            return int(raw.view(np.uint32 if bits == 32 else np.uint64))
        raise self.error(f"constant does not fit .{kind}")


def _value_of(operand: Immediate) -> float:
    code, size = ("<f", 4) if operand.kind == "f32" else ("<d", 8)
    return float(struct.unpack(code, int(operand.value).to_bytes(size, "little"))[0])


def row_type(bits: int) -> Any:
    """NumPy type of a row's unsigned view."""
    return _ROW_TYPES[bits]
