"""Tokens to a Module: directives, declarations and scopes. Instructions are in `statements.py`."""

from __future__ import annotations

from dataclasses import replace

from glu4.emulator.errors import PtxError
from glu4.emulator.ptx.constants import Cursor, constant, number, to_bytes, whole
from glu4.emulator.ptx.lexer import tokenize
from glu4.emulator.ptx.module import SIZES, Function, Loc, Module, Register, Symbol, Variable
from glu4.emulator.ptx.statements import Body, Scope

__all__ = ["parse"]

_MAX_SCOPES = 200
_MAX_REGISTERS = 1 << 17
_MAX_BYTES = 1 << 28
_LINKAGE = (".visible", ".extern", ".weak", ".common", ".internal")
_SPACES = (".global", ".const", ".shared", ".local", ".param")
_NUMBERS = {
    ".maxntid": 3, ".reqntid": 3, ".maxnreg": 1, ".minnctapersm": 1, ".maxnctapersm": 1, ".reqnctapercluster": 3,
    ".maxclusterrank": 1,
}  # fmt: skip
_FLAGS = (".explicitcluster", ".noreturn", ".blocksareclusters")


def parse(text: str) -> Module:
    """The Module of a PTX text of version 8.0 to 9.5. Raises PtxError, naming the line."""
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str) -> None:
        self.cursor = Cursor(tokenize(text))
        self.out = Module((0, 0), ())
        self.scope = Scope(None)
        self.loc: Loc | None = None

    # module scope

    def module(self) -> Module:
        cursor = self.cursor
        while cursor.token.kind != "end":
            if cursor.accept(".version"):
                self.version()
            elif not self.out.version[0]:
                raise PtxError(f"expected .version first, found {cursor.text!r}", cursor.line)
            else:
                self.module_statement()
        if not self.out.version[0]:
            raise PtxError("no .version: this is not PTX")
        self.check_symbols()
        return self.out

    def version(self) -> None:
        token = self.cursor.next()
        major, _, minor = token.text.partition(".")
        if not (major.isdigit() and minor.isdigit()) or not (8, 0) <= (int(major), int(minor)) <= (9, 5):
            raise PtxError(f".version: expected 8.0 to 9.5, found {token.text}", token.line)
        self.out.version = (int(major), int(minor))

    def module_statement(self) -> None:
        cursor = self.cursor
        if cursor.accept(".target"):
            names = [cursor.kind("name", "a target").text]
            while cursor.accept(","):
                names.append(cursor.kind("name", "a target").text)
            self.out.target = tuple(names)
        elif cursor.accept(".address_size"):
            size = number(cursor)
            if size != 64:
                raise PtxError(f".address_size: only 64 is modelled, found {size}", cursor.line)
        elif not self.note():
            linkage = cursor.next().text if cursor.text in _LINKAGE else ""
            if cursor.text in (".entry", ".func"):
                self.function(cursor.next().text == ".entry")
            elif cursor.text in _SPACES:
                for variable in self.declaration(linkage == ".extern"):
                    self.out.variables[variable.name] = variable
            elif not cursor.accept(";"):
                raise PtxError(f"unknown directive {cursor.text!r}", cursor.line)

    def note(self) -> bool:
        """.file, .loc, .pragma, .section and .alias, which carry no code; False if there is none here."""
        cursor = self.cursor
        if cursor.accept(".file"):
            index = number(cursor)
            self.out.files[index] = cursor.kind("string", "a file name").text.strip('"')
            while cursor.accept(","):
                number(cursor)
        elif cursor.accept(".loc"):
            self.read_loc()
        elif cursor.accept(".pragma"):
            cursor.kind("string", "a string")
            while cursor.accept(","):
                cursor.kind("string", "a string")
            cursor.expect(";")
        elif cursor.accept(".section"):
            cursor.next()
            self.skip_braces()
        else:
            return False
        return True

    def read_loc(self) -> None:
        cursor = self.cursor
        file, line, _ = number(cursor), number(cursor), number(cursor)
        while cursor.accept(","):
            word = cursor.kind("name", "function_name or inlined_at").text
            if word == "function_name":
                cursor.next()
                if cursor.accept("+"):
                    number(cursor)
            elif word == "inlined_at":
                number(cursor), number(cursor), number(cursor)
            else:
                raise PtxError(f".loc: unknown attribute {word!r}", cursor.line)
        self.loc = Loc(self.out.files.get(file, f"file {file}"), line)

    def skip_braces(self) -> None:
        start = self.cursor.expect("{").line
        depth = 1
        while depth:
            token = self.cursor.next()
            if token.kind == "end":
                raise PtxError("a { that is never closed", start)
            depth += (token.text == "{") - (token.text == "}") if token.kind == "op" else 0

    def check_symbols(self) -> None:
        known = self.out.functions.keys() | self.out.variables.keys()
        for function in self.out.functions.values():
            for instruction in function.instructions:
                for operand in instruction.operands:
                    if isinstance(operand, Symbol) and operand.variable is None and operand.name not in known:
                        raise PtxError(f"{operand.name} is not declared", instruction.line)

    # functions

    def function(self, entry: bool) -> None:
        cursor = self.cursor
        returns: list[tuple[Variable, int]] = []
        self.scope = Scope(self.scope)
        made = Function("", entry, cursor.line)
        if cursor.text == "(":
            returns = self.parameters(made)
        name = cursor.kind("name", "a function name")
        made.name, made.line = name.text, name.line
        params = self.parameters(made) if cursor.text == "(" else []
        made.params = [v for v, _ in params]
        made.returns = [v for v, _ in returns]
        self.directives(made)
        known = self.out.functions.get(made.name)
        if known is not None and known.defined and cursor.text == "{":
            raise PtxError(f"{made.name} is defined twice", name.line)
        if cursor.text == "{":
            made.defined = True
            self.body(made)
        else:
            cursor.expect(";")
        if known is None or made.defined:
            self.out.functions[made.name] = made
        assert self.scope.parent is not None
        self.scope = self.scope.parent

    def directives(self, made: Function) -> None:
        cursor = self.cursor
        while cursor.token.kind == "dot":
            word = cursor.text
            if word in _NUMBERS:
                cursor.next()
                values = [number(cursor)]
                while len(values) < _NUMBERS[word] and cursor.accept(","):
                    values.append(number(cursor))
                made.directives[word[1:]] = tuple(values) + (1,) * (_NUMBERS[word] - len(values))
            elif word in _FLAGS:
                cursor.next()
                made.directives[word[1:]] = ()
            elif word in (".abi_preserve", ".abi_preserve_control"):
                cursor.next()
                number(cursor)
            elif not self.note():
                raise PtxError(f"unknown directive {word!r}", cursor.line)

    def parameters(self, made: Function) -> list[tuple[Variable, int]]:
        cursor = self.cursor
        cursor.expect("(")
        found: list[tuple[Variable, int]] = []
        while not cursor.accept(")"):
            if found:
                cursor.expect(",")
            line = cursor.line
            if cursor.accept(".reg"):
                kind = self.type_name()
                name = cursor.kind("name", "a name").text
                self.add_register(made, name, kind, line)
                found.append((Variable(name, "reg", kind, 1, SIZES[kind] // 8), line))
            else:
                cursor.expect(".param")
                variable = self.variable("param", line)
                self.scope.declare(variable.name, variable, line)
                found.append((variable, line))
        return found

    def body(self, made: Function) -> None:
        cursor = self.cursor
        opening = cursor.expect("{").line
        body = Body(cursor, made)
        depth = 1
        self.loc = None
        while depth:
            token = cursor.token
            if token.kind == "end":
                raise PtxError(f"{made.name}: a {{ that is never closed", opening)
            if cursor.accept("{"):
                depth += 1
                if depth > _MAX_SCOPES:
                    raise PtxError("scopes nested too deeply", token.line)
                self.scope = Scope(self.scope)
            elif cursor.accept("}"):
                depth -= 1
                if depth:
                    assert self.scope.parent is not None
                    self.scope = self.scope.parent
            elif token.kind == "dot":
                self.body_directive(made)
            else:
                body.statement(self.scope, self.loc)
        body.finish()

    def body_directive(self, made: Function) -> None:
        cursor = self.cursor
        if cursor.text == ".reg":
            self.registers(made)
        elif cursor.text in _SPACES:
            for variable in self.declaration(False):
                name = variable.name
                if any(v.name == name for v in (*made.params, *made.returns, *made.variables)):
                    # the name is another scope's too; frames know variables by name
                    variable = replace(variable, name=f"{name}@{len(made.variables)}")
                self.scope.declare(name, variable, cursor.line)
                made.variables.append(variable)
        elif not self.note():
            raise PtxError(f"unknown directive {cursor.text!r}", cursor.line)

    # declarations

    def type_name(self) -> str:
        token = self.cursor.kind("dot", "a type")
        if token.text[1:] not in SIZES:
            raise PtxError(f"unknown type {token.text}", token.line)
        return token.text[1:]

    def add_register(self, made: Function, name: str, kind: str, line: int) -> None:
        if len(made.registers) >= _MAX_REGISTERS:
            raise PtxError(f"more than {_MAX_REGISTERS} registers", line)
        register = Register(name, kind, len(made.registers))
        self.scope.declare(name, register, line)
        made.registers.append(register)

    def registers(self, made: Function) -> None:
        cursor = self.cursor
        line = cursor.next().line
        if cursor.text in (".v2", ".v4"):
            raise PtxError(f"vector registers ({cursor.text}) are not modelled", line)
        kind = self.type_name()
        while True:
            name = cursor.kind("name", "a register name").text
            if cursor.accept("<"):
                count = number(cursor)
                cursor.expect(">")
                if count > _MAX_REGISTERS:
                    raise PtxError(f"more than {_MAX_REGISTERS} registers", line)
                for i in range(count):
                    self.add_register(made, f"{name}{i}", kind, line)
            else:
                self.add_register(made, name, kind, line)
            if not cursor.accept(","):
                break
        cursor.expect(";")

    def declaration(self, extern: bool) -> list[Variable]:
        cursor = self.cursor
        token = cursor.next()
        found = [self.variable(token.text[1:], token.line, extern)]
        while cursor.accept(","):
            first = found[0]
            found.append(self.named(first.space, first.type, first.align, token.line, extern))
        cursor.expect(";")
        return found

    def variable(self, space: str, line: int, extern: bool = False) -> Variable:
        """After the state space: `[.align n] [.v2|.v4] .type [.ptr ...] name [dimensions] [= data]`."""
        cursor = self.cursor
        align, vector, kind = 0, 1, ""
        while cursor.token.kind == "dot":
            word = cursor.text
            if word == ".align":
                cursor.next()
                align = number(cursor)
                if align < 1 or align & (align - 1) or align > 1 << 20:
                    raise PtxError(f".align: expected a power of two, found {align}", line)
            elif word in (".v2", ".v4"):
                cursor.next()
                vector = int(word[2])
            elif word == ".attribute":
                raise PtxError("variable attributes are not modelled", line)
            elif word == ".ptr":
                self.pointer_attributes()
            else:
                kind = self.type_name()
        if not kind or kind == "pred":
            raise PtxError(f"a .{space} variable needs a type of 8 bits or more", line)
        return self.named(space, kind, align or vector * SIZES[kind] // 8, line, extern, vector)

    def pointer_attributes(self) -> None:
        cursor = self.cursor
        cursor.next()
        if cursor.text in (".const", ".global", ".local", ".shared"):
            cursor.next()
        if cursor.accept(".align"):
            number(cursor)

    def named(self, space: str, kind: str, align: int, line: int, extern: bool, vector: int = 1) -> Variable:
        cursor = self.cursor
        name = cursor.kind("name", "a variable name").text
        count, unsized = vector, False
        while cursor.accept("["):
            if cursor.accept("]"):
                unsized = True
                continue
            count *= whole(cursor)
            cursor.expect("]")
        if count < 1 or count * SIZES[kind] // 8 > _MAX_BYTES:
            raise PtxError(f"{name}: {count} elements", line)
        data: bytes | None = None
        relocations: tuple[tuple[int, str, int, bool], ...] = ()
        if cursor.accept("="):
            data, relocations = self.initialiser(kind, line)
            if unsized:
                count, unsized = len(data) * 8 // SIZES[kind], False
            size = count * SIZES[kind] // 8
            if len(data) > size:
                raise PtxError(f"{name}: {len(data)} bytes of data for {size}", line)
            data = data.ljust(size, b"\0")
        if unsized and not (extern or space == "param"):
            raise PtxError(f"{name}: only an extern array may have no size", line)
        return Variable(name, space, kind, 0 if unsized else count, align, data, extern, relocations)

    def initialiser(self, kind: str, line: int) -> tuple[bytes, tuple[tuple[int, str, int, bool], ...]]:
        cursor = self.cursor
        out = bytearray()
        relocations: list[tuple[int, str, int, bool]] = []
        depth = 0
        while True:
            if cursor.accept("{"):
                depth += 1
            elif cursor.accept("}"):
                depth -= 1
            elif cursor.token.kind == "name" and cursor.text != "WARP_SZ":
                relocations.append((len(out), *self.symbol_value()))
                out += bytes(SIZES[kind] // 8)
            else:
                out += to_bytes(constant(cursor), kind, SIZES[kind], line)
            if len(out) > _MAX_BYTES:
                raise PtxError("initialiser too large", line)
            if depth <= 0:
                break
            cursor.accept(",")
        return bytes(out), tuple(relocations)

    def symbol_value(self) -> tuple[str, int, bool]:
        cursor = self.cursor
        generic = cursor.accept("generic")
        if generic:
            cursor.expect("(")
        name = cursor.kind("name", "a symbol").text
        if generic:
            cursor.expect(")")
        addend = whole(cursor) if cursor.text in ("+", "-") else 0
        return name, addend, generic
