"""PTX text to tokens."""

from __future__ import annotations

import re
from typing import NamedTuple

from glu4.emulator.errors import PtxError

__all__ = ["Token", "tokenize"]

# kinds: name (identifiers and registers), dot (.word, .a::b), float, int, string, op, end
_PATTERN = re.compile(
    r"""
    (?P<skip>[ \t\r\f\v]+|//[^\n]*|/\*.*?\*/)
  | (?P<newline>\n)
  | (?P<string>"[^"\n]*")
  | (?P<float>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)
  | (?P<int>0[xX][0-9a-fA-F]+U?\b|0[bB][01]+U?\b|\d+U?\b)
  | (?P<name>[A-Za-z][\w$]*|[_$%][\w$]+|_)
  | (?P<dot>\.\w+(?:::\w+)*)
  | (?P<op><<|>>|<=|>=|==|!=|&&|\|\||[{}()\[\]<>,;:|@!+\-*/%&^~?=])
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)


class Token(NamedTuple):
    kind: str
    text: str
    line: int


def tokenize(text: str) -> list[Token]:
    """Tokens of a PTX text, with one of kind "end" at the end. Raises PtxError at a character that starts none."""
    tokens: list[Token] = []
    line, position, size = 1, 0, len(text)
    match = _PATTERN.match
    while position < size:
        found = match(text, position)
        if found is None:
            raise PtxError(f"unexpected {text[position : position + 12]!r}", line)
        kind = found.lastgroup or ""
        position = found.end()
        if kind == "newline":
            line += 1
        elif kind == "skip":
            line += found.group().count("\n")
        else:
            tokens.append(Token(kind, found.group(), line))
    tokens.append(Token("end", "end of file", line))
    return tokens
