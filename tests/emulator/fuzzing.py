"""Damaged PTX texts and launch descriptions by seed, and what the emulator may make of them."""

from __future__ import annotations

import copy
import random
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from glu4.emulator.errors import LaunchError, PtxError
from glu4.emulator.launch import emulate, load

_TOKEN = re.compile(r'"[^"\n]*"|\.\w+(?:::\w+)*|[%\w$]+|[^\s\w]')
_WORD = re.compile(r"\.\w+(?:::\w+)*")
_NAME = re.compile(r"[%$]?[A-Za-z_][\w$]*")
_REGISTER = re.compile(r"%\w+")
_NUMBER = re.compile(r"(?<![\w.%$])\d\w*")
_NUMBERS = (
    "0", "1", "-1", "2", "3", "7", "31", "32", "33", "127", "255", "4096", "65535", "0x7fffffff", "0x80000000", "0xffffffff", "4294967296",
    "0x7fffffffffffffff", "0xffffffffffffffff", "18446744073709551616", "9" * 40, "0x", "0f3f800000", "0f7fc00000", "0d7ff0000000000000",
    "1.5", "1e400", "-0.0", "08", "(1<<70)", "(1/0)", "~0", "WARP_SZ",
)  # fmt: skip
_JUNK = (
    "{", "}", "(", ")", "[", "]", ";", ",", ":", "@", "@!", "|", "_", "%", ".", "::", "+", "-", "<", ">", '"', "'", "\\", "\0", "\x7f", "é", "/*", "//",
    ".reg .b32 %r0;", ".reg .b32 %z<70000>;", ".shared .align 16 .b8 big[300000];", ".local .b8 deep[100000000];", "L0:", "bra L0;", "ret;", "exit;", "trap;",
    "{" * 300, "(" * 300, "- " * 3000, ".v4", ".b128", ".pred", ".f64", ".func", ".entry", ".extern", ".param", "%tid.x", "%clock64", "%nosuch", "WARP_SZ", "1:",
)  # fmt: skip


def _spans(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    return [m.span() for m in pattern.finditer(text)]


def _put(text: str, span: tuple[int, int], new: str) -> str:
    return text[: span[0]] + new + text[span[1] :]


def _statements(text: str, rng: random.Random) -> str:
    """Delete, double, move or swap statements or lines."""
    cut = rng.choice(("(?<=;)", "(?<=;)", "(?<=[;{}])", "(?<=\n)"))
    parts = re.split(cut, text)
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    how = rng.randrange(5)
    if how == 0:
        del parts[i]
    elif how == 1:
        parts.insert(i, parts[i])
    elif how == 2:
        parts.insert(i, parts[j])
    elif how == 3:
        parts[i], parts[j] = parts[j], parts[i]
    else:
        del parts[i : i + rng.randrange(1, 9)]
    return "".join(parts)


def _alike(pattern: re.Pattern[str]) -> Callable[[str, random.Random], str]:
    """Put one word of a kind in the place of another, or take it out."""

    def change(text: str, rng: random.Random) -> str:
        spans = _spans(pattern, text)
        if not spans:
            return text
        a, b = rng.choice(spans), rng.choice(spans)
        return _put(text, a, text[b[0] : b[1]] if rng.random() < 0.8 else "")

    return change


def _numbers(text: str, rng: random.Random) -> str:
    spans = _spans(_NUMBER, text)
    if not spans:
        return text
    span = rng.choice(spans)
    old = text[span[0] : span[1]]
    if old.isdigit() and rng.random() < 0.5:
        value = int(old)
        return _put(text, span, str(rng.choice((value + 1, value - 1, value * 2, value // 2, value ^ 1 << rng.randrange(32)))))
    return _put(text, span, rng.choice(_NUMBERS))


def _junk(text: str, rng: random.Random) -> str:
    spans = _spans(_TOKEN, text)
    if not spans:
        return rng.choice(_JUNK)
    a, b = rng.choice(spans), rng.choice(spans)
    how = rng.randrange(6)
    if how == 0:
        return _put(text, (a[0], a[0]), f" {rng.choice(_JUNK)} ")
    if how == 1:
        return _put(text, a, rng.choice(_JUNK))
    if how == 2:
        return _put(text, a, text[b[0] : b[1]])
    if how == 3:
        return _put(text, a, "")
    if how == 4:
        return _put(text, (a[0], a[0] + 1), chr(rng.randrange(1, 256)))
    return text[: a[0]] if rng.random() < 0.3 else _put(text, a, text[a[0] : a[1]] * 2)


_CHANGES = (_statements, _alike(_WORD), _alike(_NAME), _alike(_REGISTER), _numbers, _junk)
_WEIGHTS = (7, 2, 1, 4, 4, 1)


def mutant(text: str, seed: int) -> str:
    """The text with one to four changes."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        text = rng.choices(_CHANGES, _WEIGHTS)[0](text, rng)
    return text


_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 7, 1 << 31, 1 << 40, 1 << 70, 0.5, 1e300, float("nan"), float("inf"), "", "A", "no such", "ptr", "u32", "é",
    [], [1], [0], [[]], [1, 2, 3, 4], {}, {"ptr": "A"}, {"u32": 1}, {"dtype": "uint8", "shape": [8]}, {"dtype": "object", "shape": [2]},
    {"dtype": "float32", "shape": [1 << 50]}, {"pack": [{"pack": []}]}, {"bytes": "00"}, {"tensor_map": {}},
)  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a description."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def damaged(launch: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A launch description with one or two values or fields changed."""
    rng = random.Random(seed)
    made: dict[str, Any] = copy.deepcopy(dict(launch))
    for _ in range(rng.choice((1, 1, 2))):
        container, key = rng.choice(list(_places(made)) or [(made, "grid")])
        how = rng.randrange(4)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[rng.choice(("entry", "ptr", "u8", "f32", "é", "offset", "shape"))] = container.pop(key)
        elif how == 2 and isinstance(container[key], int):
            container[key] = rng.choice((container[key] + 1, container[key] * 2, -container[key], container[key] << 33))
        else:
            container[key] = copy.deepcopy(rng.choice(_VALUES))
    return made


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread if the block takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(text: str, launch: Mapping[str, Any], buffers: Mapping[str, Any], seed: int, hang: int = 60) -> str:
    """What became of a text: "refused", "does not fit", "hazards" or "clean".

    Every other exception is let through, and a warning or a hang raises one.
    """
    with alarm(hang), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            program = load(text)
        except PtxError:
            return "refused"
        name = ("eager", "lazy", "random")[seed % 3]
        try:
            result = emulate(program, launch, buffers, schedule_name=name, seed=seed, max_instructions=20_000, time_limit=10.0)
        except LaunchError:
            return "does not fit"
    return "clean" if result.report.clean else "hazards"
