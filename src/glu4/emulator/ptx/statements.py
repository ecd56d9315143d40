"""Labels, instructions and their operands, within the scopes of a function body."""

from __future__ import annotations

from dataclasses import replace

from glu4.emulator.errors import PtxError
from glu4.emulator.ptx.constants import Cursor, constant, whole
from glu4.emulator.ptx.module import (
    Address,
    Function,
    Immediate,
    Instruction,
    Label,
    Loc,
    Negated,
    Operand,
    OperandList,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)

__all__ = ["Body", "Scope"]

_MAX_INSTRUCTIONS = 1 << 20
_MAX_NESTING = 8
_COMPONENTS = (".x", ".y", ".z", ".w")


class Scope:
    """Names of one pair of braces; inner ones hide outer ones."""

    def __init__(self, parent: Scope | None) -> None:
        self.parent = parent
        self.names: dict[str, Register | Variable] = {}
        self.labels: dict[str, int] = {}

    def declare(self, name: str, what: Register | Variable, line: int) -> None:
        if name in self.names:
            raise PtxError(f"{name} is declared twice", line)
        self.names[name] = what

    def find(self, name: str) -> Register | Variable | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None

    def label(self, name: str) -> int | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None


class Body:
    """Reads the statements of one function. Labels are resolved at its end, since a branch may go forward."""

    def __init__(self, cursor: Cursor, made: Function) -> None:
        self.cursor = cursor
        self.made = made
        self.scopes: list[Scope] = []
        self.tables: list[tuple[str, list[str], Scope, int]] = []
        self.prototypes: set[str] = set()

    def statement(self, scope: Scope, loc: Loc | None) -> None:
        cursor = self.cursor
        if cursor.token.kind == "name" and cursor.peek().text == ":":
            self.label(scope)
            return
        if cursor.accept(";"):
            return
        line = cursor.line
        guard = self.guard(scope) if cursor.accept("@") else None
        opcode = cursor.kind("name", "an instruction").text
        modifiers: list[str] = []
        while cursor.token.kind == "dot":
            modifiers.append(cursor.next().text[1:])
        operands: list[Operand] = []
        while not cursor.accept(";"):
            if operands:
                cursor.expect(",")
            operands.append(self.operand(scope, 0))
        if len(self.made.instructions) >= _MAX_INSTRUCTIONS:
            raise PtxError(f"more than {_MAX_INSTRUCTIONS} instructions", line)
        self.made.instructions.append(Instruction(opcode, tuple(modifiers), tuple(operands), guard, line, loc))
        self.scopes.append(scope)

    def label(self, scope: Scope) -> None:
        cursor = self.cursor
        name, line = cursor.text, cursor.line
        cursor.next()
        cursor.expect(":")
        if cursor.accept(".branchtargets"):
            targets = [cursor.kind("name", "a label").text]
            while cursor.accept(","):
                targets.append(cursor.kind("name", "a label").text)
            cursor.expect(";")
            self.tables.append((name, targets, scope, line))
            return
        if cursor.text in (".callprototype", ".calltargets"):
            while cursor.token.kind != "end" and not cursor.accept(";"):
                cursor.next()
            self.prototypes.add(name)
            return
        if name in scope.labels:
            raise PtxError(f"label {name} is defined twice", line)
        scope.labels[name] = len(self.made.instructions)

    def guard(self, scope: Scope) -> tuple[Register, bool]:
        cursor = self.cursor
        negated = cursor.accept("!")
        token = cursor.kind("name", "a predicate")
        found = scope.find(token.text)
        if not isinstance(found, Register) or found.type != "pred":
            raise PtxError(f"guard: {token.text} is not a predicate register", token.line)
        return found, negated

    # operands

    def operand(self, scope: Scope, depth: int) -> Operand:
        cursor = self.cursor
        if depth > _MAX_NESTING:
            raise PtxError("operands nested too deeply", cursor.line)
        if cursor.accept("{"):
            return Vector(self.items(scope, "}", depth))
        if cursor.text == "(" and cursor.token.kind == "op" and not self.is_expression():
            cursor.next()
            return OperandList(self.items(scope, ")", depth))
        if cursor.accept("["):
            return self.address(scope, depth)
        if cursor.text == "!" and cursor.peek().kind == "name":
            cursor.next()
            register = self.name(scope)
            if not isinstance(register, Register):
                raise PtxError("! needs a predicate", cursor.line)
            return Negated(register)
        if cursor.token.kind == "name" and cursor.text != "WARP_SZ":
            return self.named_operand(scope)
        return constant(cursor)

    def is_expression(self) -> bool:
        """Whether the parenthesis here starts a constant expression rather than the operands of a call."""
        return self.cursor.peek().kind in ("int", "float", "op", "dot") and self.cursor.peek().text != ")"

    def items(self, scope: Scope, end: str, depth: int) -> tuple[Operand, ...]:
        cursor = self.cursor
        found: list[Operand] = []
        while not cursor.accept(end):
            if found:
                cursor.expect(",")
            found.append(self.operand(scope, depth + 1))
        return tuple(found)

    def named_operand(self, scope: Scope) -> Operand:
        cursor = self.cursor
        found = self.name(scope)
        if cursor.accept("|"):
            second = self.name(scope)
            if not isinstance(found, Register | Sink) or not isinstance(second, Register | Sink):
                raise PtxError("a|b needs two registers", cursor.line)
            return Pair(found, second)
        if isinstance(found, Symbol) and cursor.text in ("+", "-"):
            return replace(found, offset=whole(cursor))
        return found

    def name(self, scope: Scope) -> Register | Special | Symbol | Sink:
        cursor = self.cursor
        token = cursor.kind("name", "an operand")
        if token.text == "_":
            return Sink()
        found = scope.find(token.text)
        if isinstance(found, Register):
            return found
        if isinstance(found, Variable):
            return Symbol(found.name, 0, found)
        if token.text.startswith("%"):
            component = cursor.next().text if cursor.text in _COMPONENTS else ""
            return Special(token.text + component)
        return Symbol(token.text)

    def address(self, scope: Scope, depth: int) -> Address:
        cursor = self.cursor
        base: Register | Symbol | Immediate
        if cursor.token.kind == "name" and cursor.text != "WARP_SZ":
            found = self.name(scope)
            if not isinstance(found, Register | Symbol):
                raise PtxError("an address starts with a register, a variable or a constant", cursor.line)
            base = found
        else:
            base = constant(cursor)
        offset = 0
        if cursor.accept("+") or cursor.text == "-":
            offset = whole(cursor)
        rest: list[Operand] = []
        while cursor.accept(","):
            rest.append(self.operand(scope, depth + 1))
        cursor.expect("]")
        return Address(base, offset, tuple(rest))

    # labels

    def finish(self) -> None:
        """Replace the names of labels by places; check that registers exist."""
        made = self.made
        for name, targets, scope, line in self.tables:
            places = [scope.label(target) for target in targets]
            if None in places:
                raise PtxError(f"{targets[places.index(None)]} is no label", line)
            made.tables[name] = tuple(p for p in places if p is not None)
        for i, instruction in enumerate(made.instructions):
            if any(type(o) is Symbol for o in instruction.operands):
                operands = tuple(self.resolve(o, self.scopes[i]) for o in instruction.operands)
                made.instructions[i] = replace(instruction, operands=operands)

    def resolve(self, operand: Operand, scope: Scope) -> Operand:
        if not isinstance(operand, Symbol) or operand.variable is not None:
            return operand
        target = scope.label(operand.name)
        if target is not None:
            return Label(operand.name, target)
        if operand.name in self.made.tables:
            return Label(operand.name, -1)
        if operand.name in self.prototypes:
            return Label(operand.name, -2)
        return operand
