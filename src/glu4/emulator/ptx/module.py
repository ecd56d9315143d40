"""PTX as data: what the parser returns and everything else reads."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "SIZES",
    "Address",
    "Function",
    "Immediate",
    "Instruction",
    "Label",
    "Loc",
    "Module",
    "Negated",
    "Operand",
    "OperandList",
    "Pair",
    "Register",
    "Sink",
    "Special",
    "Symbol",
    "Variable",
    "Vector",
]

# bits of each fundamental, alternate and packed type (PTX ISA 5.2); predicates count as one
SIZES = {
    "pred": 1,
    **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)},
    "b128": 128,
    "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "tf32": 32,
    "f16x2": 32, "bf16x2": 32, "f32x2": 64, "u16x2": 32, "s16x2": 32,
    "e4m3": 8, "e5m2": 8, "e4m3x2": 16, "e5m2x2": 16, "e2m1x2": 8, "e3m2x2": 16, "e2m3x2": 16, "ue8m0x2": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Register:
    """A virtual register. index: its place in the function's list; type: as declared, without the dot."""

    name: str
    type: str
    index: int


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant. kind: "int" (value of any size, signed), "f32" or "f64" (value: the bits), "decimal" (value: a float)."""

    kind: str
    value: int | float


@dataclass(frozen=True, slots=True)
class Special:
    """A special register such as %tid.x, name with the percent sign and the component."""

    name: str


@dataclass(frozen=True, slots=True)
class Variable:
    """Memory with a name. count: elements, 0 for an unsized extern array; data: initial bytes, None for none.

    relocations: (byte offset, symbol, addend, generic) to be filled with addresses at launch.
    """

    name: str
    space: str
    type: str
    count: int
    align: int
    data: bytes | None = None
    extern: bool = False
    relocations: tuple[tuple[int, str, int, bool], ...] = ()

    @property
    def size(self) -> int:
        return self.count * SIZES[self.type] // 8


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable or function, plus a constant."""

    name: str
    offset: int = 0
    variable: Variable | None = None


@dataclass(frozen=True, slots=True)
class Label:
    """A branch target: an index into the function's instructions."""

    name: str
    target: int


@dataclass(frozen=True, slots=True)
class Sink:
    """The operand `_`: a destination that is not wanted."""


@dataclass(frozen=True, slots=True)
class Negated:
    """`!p` as a source operand."""

    operand: Register


@dataclass(frozen=True, slots=True)
class Pair:
    """`p|q`: two destinations."""

    first: Register | Sink
    second: Register | Sink


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b, ...}`."""

    elements: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class OperandList:
    """`(a, b, ...)` of a call."""

    elements: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Address:
    """`[base+offset]`, or `[base+offset, {coordinates}]` of a tensor; rest: further operands inside the brackets."""

    base: Register | Symbol | Immediate
    offset: int = 0
    rest: tuple[Operand, ...] = ()


Operand = Register | Immediate | Special | Symbol | Label | Sink | Negated | Pair | Vector | OperandList | Address


@dataclass(frozen=True, slots=True)
class Loc:
    """A source position from `.loc`."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. opcode: the first word; modifiers: the others, in order; guard: (predicate, negated) or None."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    line: int
    loc: Loc | None = None

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass(slots=True)
class Function:
    """A kernel (`entry`) or a device function.

    params, returns: in order; their space is "param", or "reg" for register parameters (then `registers` has them).
    directives: reqntid, maxntid, reqnctapercluster, ... to their numbers.
    tables: label to the targets of a `.branchtargets`.
    """

    name: str
    entry: bool
    line: int
    params: list[Variable] = field(default_factory=list)
    returns: list[Variable] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tables: dict[str, tuple[int, ...]] = field(default_factory=dict)
    defined: bool = False


@dataclass(slots=True)
class Module:
    """A PTX file. variables: those at module scope, by name."""

    version: tuple[int, int]
    target: tuple[str, ...]
    address_size: int = 64
    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)

    def entry(self, name: str | None = None) -> Function:
        """The kernel of that name, or the only one. Raises KeyError with the names there are."""
        kernels = [f.name for f in self.functions.values() if f.entry and f.defined]
        if name is None and len(kernels) == 1:
            return self.functions[kernels[0]]
        if name not in kernels:
            raise KeyError(f"entry: expected one of {', '.join(kernels) or 'no kernels'}, got {name}")
        return self.functions[str(name)]
