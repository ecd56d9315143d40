"""Constants and constant expressions (PTX ISA 4.5)."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from glu4.emulator.errors import PtxError
from glu4.emulator.ptx.lexer import Token
from glu4.emulator.ptx.module import Immediate

__all__ = ["Cursor", "constant", "number", "to_bytes", "whole"]

_MAX_DEPTH = 64
_MAX_DIGITS = 80
# binary operators from loosest to tightest
_LEVELS = (
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<", "<=", ">", ">="), ("<<", ">>"), ("+", "-"), ("*", "/", "%"),
)  # fmt: skip
_MASK = (1 << 64) - 1


def _divide(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


_BINARY: dict[str, Callable[[int, int], int]] = {
    "||": lambda a, b: int(bool(a or b)),
    "&&": lambda a, b: int(bool(a and b)),
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
    "&": lambda a, b: a & b,
    "==": lambda a, b: int(a == b),
    "!=": lambda a, b: int(a != b),
    "<": lambda a, b: int(a < b),
    "<=": lambda a, b: int(a <= b),
    ">": lambda a, b: int(a > b),
    ">=": lambda a, b: int(a >= b),
    "<<": lambda a, b: (a << (b & 63)) & _MASK,
    ">>": lambda a, b: a >> (b & 63),
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": _divide,
    "%": lambda a, b: a - b * _divide(a, b),
}


class Cursor:
    """A place in a list of tokens."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    @property
    def text(self) -> str:
        return self.tokens[self.at].text

    @property
    def line(self) -> int:
        return self.tokens[self.at].line

    def peek(self) -> Token:
        return self.tokens[min(self.at + 1, len(self.tokens) - 1)]

    def next(self) -> Token:
        token = self.tokens[self.at]
        if token.kind != "end":
            self.at += 1
        return token

    def accept(self, text: str) -> bool:
        token = self.tokens[self.at]
        if token.text == text and token.kind != "string":
            self.at += token.kind != "end"
            return True
        return False

    def expect(self, text: str) -> Token:
        token = self.token
        if not self.accept(text):
            raise PtxError(f"expected {text!r}, found {token.text!r}", token.line)
        return token

    def kind(self, kind: str, what: str) -> Token:
        token = self.token
        if token.kind != kind:
            raise PtxError(f"expected {what}, found {token.text!r}", token.line)
        return self.next()


def number(cursor: Cursor) -> int:
    """An integer token."""
    return _integer(cursor.kind("int", "an integer"))


def whole(cursor: Cursor) -> int:
    """An integer constant expression, as a signed 64-bit number."""
    line, value = cursor.line, constant(cursor)
    if value.kind != "int":
        raise PtxError("expected an integer constant", line)
    bits = int(value.value) & _MASK
    return bits - (1 << 64) if bits >> 63 else bits


def _integer(token: Token) -> int:
    value = _digits(token.text.rstrip("U")) if len(token.text) <= _MAX_DIGITS else _MASK + 1
    if value > _MASK:
        raise PtxError(f"integer {token.text[:_MAX_DIGITS]} does not fit 64 bits", token.line)
    return value


def _digits(digits: str) -> int:
    if digits[:2] in ("0x", "0X"):
        return int(digits, 16)
    if digits[:2] in ("0b", "0B"):
        return int(digits, 2)
    try:
        return int(digits, 8 if len(digits) > 1 and digits[0] == "0" else 10)
    except ValueError:
        return int(digits, 10)


def _float(text: str) -> Immediate:
    if text[:2] in ("0f", "0F"):
        return Immediate("f32", int(text[2:], 16))
    if text[:2] in ("0d", "0D"):
        return Immediate("f64", int(text[2:], 16))
    return Immediate("decimal", float(text))


def constant(cursor: Cursor) -> Immediate:
    """A constant expression; floats stand alone or after a sign. Raises PtxError."""
    negative = False
    start = cursor.at
    while cursor.text in ("-", "+") and cursor.token.kind == "op":
        negative ^= cursor.next().text == "-"
    if cursor.token.kind == "float":
        value = _float(cursor.next().text)
        if not negative:
            return value
        if value.kind == "decimal":
            return Immediate("decimal", -float(value.value))
        return Immediate(value.kind, int(value.value) ^ (1 << (31 if value.kind == "f32" else 63)))
    cursor.at = start
    result = _ternary(cursor, 0)
    return Immediate("int", result if -(1 << 63) <= result <= _MASK else result & _MASK)


def _ternary(cursor: Cursor, depth: int) -> int:
    if depth > _MAX_DEPTH:
        raise PtxError("constant expression nested too deeply", cursor.line)
    condition = _level(cursor, 0, depth)
    if not cursor.accept("?"):
        return condition
    yes = _ternary(cursor, depth + 1)
    cursor.expect(":")
    no = _ternary(cursor, depth + 1)
    return yes if condition else no


def _level(cursor: Cursor, level: int, depth: int) -> int:
    if level == len(_LEVELS):
        return _unary(cursor, depth)
    left = _level(cursor, level + 1, depth)
    while cursor.token.kind == "op" and cursor.text in _LEVELS[level]:
        line, symbol = cursor.line, cursor.next().text
        right = _level(cursor, level + 1, depth)
        if symbol in ("/", "%") and right == 0:
            raise PtxError("division by zero in a constant expression", line)
        left = _BINARY[symbol](left, right)
    return left


def _unary(cursor: Cursor, depth: int) -> int:
    if depth > _MAX_DEPTH:
        raise PtxError("constant expression nested too deeply", cursor.line)
    token = cursor.token
    if token.kind == "int":
        return _integer(cursor.next())
    if cursor.accept("-"):
        return -_unary(cursor, depth + 1)
    if cursor.accept("+"):
        return _unary(cursor, depth + 1)
    if cursor.accept("~"):
        return ~_unary(cursor, depth + 1)
    if cursor.accept("!"):
        return int(not _unary(cursor, depth + 1))
    if cursor.accept("WARP_SZ"):
        return 32
    if cursor.accept("("):
        if cursor.token.kind == "dot" and cursor.text in (".s64", ".u64"):
            signed = cursor.next().text == ".s64"
            cursor.expect(")")
            value = _unary(cursor, depth + 1) & _MASK
            return value - (1 << 64) if signed and value >> 63 else value
        value = _ternary(cursor, depth + 1)
        cursor.expect(")")
        return value
    raise PtxError(f"expected a constant, found {token.text!r}", token.line)


def to_bytes(value: Immediate, kind: str, bits: int, line: int = 0) -> bytes:
    """A constant as an element of an array of that type: kind is its first letter or "bf16". Little endian."""
    if kind.startswith("f") and bits in (16, 32, 64):
        if value.kind == "decimal" or (value.kind == "int" and kind.startswith("f")):
            return _pack_float(float(value.value), bits)
        if bits == {"f32": 32, "f64": 64}.get(value.kind):
            return int(value.value).to_bytes(bits // 8, "little")
        widened = struct.unpack(
            "<f" if value.kind == "f32" else "<d", int(value.value).to_bytes(4 if value.kind == "f32" else 8, "little")
        )
        return _pack_float(widened[0], bits)
    if value.kind == "decimal" and not math.isfinite(value.value):
        raise PtxError(f"{value.value} in an array of integers", line)
    return (int(value.value) & ((1 << bits) - 1)).to_bytes(bits // 8, "little")


def _pack_float(value: float, bits: int) -> bytes:
    try:
        return struct.pack({16: "<e", 32: "<f", 64: "<d"}[bits], value)
    except OverflowError:
        return struct.pack({16: "<e", 32: "<f", 64: "<d"}[bits], float("inf") if value > 0 else float("-inf"))
