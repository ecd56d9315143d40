"""Round files: TOML that says what is proposed, against what, on which shapes and device; and the rounds that come with glu4.

    title = "Wider tiles"                    what people read
    device = "h100"                          cpu, h100, h200 or b200
    suite = "decode"                         of glu4.bench.suites; or shapes = [[256, 4096, 7168], ...], M, N, K each
    x_format = "float16"                     activations; without it nvfp4 on a b200 and float16 elsewhere

    [baseline]                               one of config, kernel and submission
    config = { tokens = 128 }

    [[entries]]
    name = "tokens 256"
    hypothesis = "weights are decoded half as often"
    claimed_speedup = 1.2                    2 is twice as fast; may be left out
    config = { tokens = 256 }                one of config (over the baseline's), kernel and submission

`docs/shark-tank.md` explains kernels and submissions. Optional: name, seed, pairs, emulate, time_limit, memory_gib.
"""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

from glu4.bench.suites import SUITES
from glu4.problem import Problem
from glu4.tank.kernels import BACKENDS, config_type
from glu4.verify.contest import DualShape

__all__ = ["DEVICES", "Change", "Entry", "Round", "RoundError", "find", "parse", "read", "shipped"]

DEVICES = tuple(BACKENDS)
_KINDS = ("config", "kernel", "submission")
_X_FORMATS = ("nvfp4", "float16", "bfloat16")
_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a table"}
_EMULATED = {"hopper": (20, 80, 208), "blackwell": (136, 72, 544), "portable": (20, 80, 208)}  # tails in M, N and K


class RoundError(ValueError):
    """A round file cannot be used; the message names the file, the line where there is one, and the field."""


@dataclass(frozen=True)
class Change:
    """What is run. kind: "config", with the fields of the backend's Config; "kernel" or "submission", with a Python file."""

    kind: Literal["config", "kernel", "submission"]
    fields: Mapping[str, int | str | bool] = field(default_factory=dict)
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"{self.kind} {self.path.name}"
        return ", ".join(f"{k} = {v}" for k, v in self.fields.items()) or "nothing"


@dataclass(frozen=True)
class Entry:
    """One proposal. change: as the file has it; whole: with the baseline's configuration under it."""

    name: str
    hypothesis: str
    claimed_speedup: float | None
    change: Change
    whole: Change


@dataclass(frozen=True)
class Round:
    """A round as its file says it.

    shapes       (M, N, K); emulated: of the case that is run where the device is not
    pairs        timed pairs of each shape, neither more nor fewer: the rule by which measuring stops
    time_limit   seconds of one entry, all of it; memory_gib: of its process
    text         of the file; files: text of the Python files it names, by name
    """

    name: str
    title: str
    device: str
    shapes: tuple[tuple[int, int, int], ...]
    x_format: str
    baseline: Change
    entries: tuple[Entry, ...]
    seed: int
    pairs: int
    emulated: tuple[int, int, int]
    time_limit: float
    memory_gib: float
    text: str
    files: Mapping[str, str]

    @property
    def backend(self) -> str:
        """Whose Config the fields are: portable, hopper or blackwell."""
        return BACKENDS[self.device]

    @property
    def digest(self) -> str:
        """SHA-256 of the round file and of every file that it names."""
        digest = hashlib.sha256(self.text.encode())
        for name, text in sorted(self.files.items()):
            digest.update(f"\0{name}\0{text}".encode())
        return digest.hexdigest()

    def problems(self) -> list[Problem]:
        """One Problem a shape, from which limits and floors come too."""
        return [Problem(m, n, k, x_format=self.x_format) for m, n, k in self.shapes]


# ---- finding ----


def shipped() -> dict[str, Path]:
    """The rounds that come with glu4, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "rounds").glob("*.toml"))}


def find(name: str) -> Path:
    """The file of a round: a path, or the name of one that comes with glu4; raises RoundError naming those there are."""
    known = shipped()
    if name in known:
        return known[name]
    path = Path(name)
    if not path.is_file():
        raise RoundError(f"{name}: no such round file; the rounds that come with glu4 are {', '.join(known)}")
    return path


def read(path: Path) -> Round:
    """The round of a file; raises RoundError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RoundError(f"{path}: cannot be read ({reason})") from None
    return parse(text, path)


def parse(text: str, path: Path) -> Round:
    """The round of a text; files that it names lie beside `path`. Raises RoundError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        line = f", line {at[1]}" if at else f", line {text.count(chr(10)) + 1}"
        raise RoundError(f"{path}{line}: not TOML ({error})") from None
    return _Reader(text, path).round(document)


# ---- reading ----


class _Reader:
    """Checks a document; every refusal names file, line and field."""

    def __init__(self, text: str, path: Path) -> None:
        self.lines = text.splitlines()
        self.text, self.path = text, path
        self.files: dict[str, str] = {}

    def round(self, d: dict[str, Any]) -> Round:
        known = (
            "name",
            "title",
            "device",
            "suite",
            "shapes",
            "x_format",
            "seed",
            "pairs",
            "emulate",
            "time_limit",
            "memory_gib",
        )
        self._only(d, "", (*known, "baseline", "entries"))
        device = self._choice(d, "device", DEVICES)
        backend = BACKENDS[device]
        x_format = self._choice(d, "x_format", _X_FORMATS, "nvfp4" if device == "b200" else "float16")
        table = self._value(d, "", "baseline", dict)
        baseline = self._change(table, "baseline", backend, x_format)
        self._only(table, "baseline", _KINDS)
        self._constructed(baseline, backend)
        shapes = self._shapes(d, x_format)
        return Round(
            name=self._name(d, "", "name", self.path.stem),
            title=self._name(d, "", "title"),
            device=device,
            shapes=shapes,
            x_format=x_format,
            baseline=baseline,
            entries=self._entries(d, baseline, backend, x_format),
            seed=self._number(d, "seed", 0, 0, 2**31 - 1),
            pairs=self._number(d, "pairs", 30, 5, 10_000),
            emulated=self._emulated(d, backend, x_format),
            time_limit=self._positive(d, "time_limit", 600.0),
            memory_gib=self._positive(d, "memory_gib", 16.0),
            text=self.text,
            files=self.files,
        )

    def _entries(self, d: dict[str, Any], baseline: Change, backend: str, x_format: str) -> tuple[Entry, ...]:
        tables = self._value(d, "", "entries", list)
        if not tables:
            self._refuse("entries", "expected at least one [[entries]]")
        found: list[Entry] = []
        for i, table in enumerate(tables):
            where = f"entries[{i}]"
            if not isinstance(table, dict):
                self._refuse(where, f"expected a table, got {_kind(table)}")
            self._only(table, where, ("name", "hypothesis", "claimed_speedup", *_KINDS))
            name = self._name(table, where, "name")
            if name in {e.name for e in found}:
                self._refuse(f"{where}.name", f"{name!r} is the name of an entry before it")
            claimed = table.get("claimed_speedup")
            if claimed is not None and not (_is_number(claimed) and 0 < claimed < math.inf):
                self._refuse(f"{where}.claimed_speedup", f"expected a positive number, got {claimed!r}")
            change = self._change(table, where, backend, x_format)
            whole = change
            if change.kind == "config" and baseline.kind == "config":
                whole = Change("config", {**baseline.fields, **change.fields})
            hypothesis = self._name(table, where, "hypothesis")
            found.append(Entry(name, hypothesis, None if claimed is None else float(claimed), change, whole))
        return tuple(found)

    def _change(self, table: dict[str, Any], where: str, backend: str, x_format: str) -> Change:
        given = [kind for kind in _KINDS if kind in table]
        if len(given) != 1:
            self._refuse(where, f"expected one of {', '.join(_KINDS)}, got {' and '.join(given) or 'none'}")
        kind = given[0]
        if kind == "config":
            fields = self._value(table, where, "config", dict)
            self._fields(fields, f"{where}.config", backend)
            return Change("config", fields)
        if kind == "submission" and x_format != "nvfp4":
            self._refuse(f"{where}.submission", 'a submission takes NVFP4 tokens: x_format must be "nvfp4"')
        name = self._value(table, where, kind, str)
        path = self.path.parent / name
        try:
            self.files[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            self._refuse(f"{where}.{kind}", f"{name}: cannot be read ({reason})")
        return Change("kernel" if kind == "kernel" else "submission", {}, path)

    def _fields(self, fields: dict[str, Any], where: str, backend: str) -> None:
        """Names and types; what values a kernel may have is for the judge to say."""
        types = config_type(backend)
        for name, value in fields.items():
            if name not in types:
                known = f"known: {', '.join(types)}" if types else "it has none"
                self._refuse(f"{where}.{name}", f"no field of the {backend} Config; {known}")
            if type(value) is not types[name]:
                self._refuse(f"{where}.{name}", f"expected {_NAMES[types[name]]}, got {_kind(value)}")

    def _constructed(self, baseline: Change, backend: str) -> None:
        from glu4.tank.kernels import config_of

        if baseline.kind == "config":
            try:
                config_of(backend, baseline.fields)
            except (ValueError, TypeError) as error:
                self._refuse("baseline.config", str(error))

    def _shapes(self, d: dict[str, Any], x_format: str) -> tuple[tuple[int, int, int], ...]:
        if ("suite" in d) == ("shapes" in d):
            self._refuse("suite" if "suite" in d else "shapes", "expected one of suite and shapes")
        if "suite" in d:
            dual = {name: s for name, s in SUITES.items() if all(isinstance(shape, DualShape) for shape in s)}
            name = self._choice(d, "suite", tuple(dual))
            return tuple((s.m, s.n, s.k) for s in dual[name] if isinstance(s, DualShape))
        listed = self._value(d, "", "shapes", list)
        if not listed:
            self._refuse("shapes", "expected at least one shape")
        return tuple(self._shape(s, f"shapes[{i}]", x_format) for i, s in enumerate(listed))

    def _emulated(self, d: dict[str, Any], backend: str, x_format: str) -> tuple[int, int, int]:
        return self._shape(d["emulate"], "emulate", x_format) if "emulate" in d else _EMULATED[backend]

    def _shape(self, value: Any, where: str, x_format: str) -> tuple[int, int, int]:
        whole = isinstance(value, list) and len(value) == 3 and all(type(v) is int and v > 0 for v in value)
        if not whole:
            self._refuse(where, f"expected [M, N, K], three positive whole numbers, got {value!r}")
        m, n, k = value
        try:
            Problem(m, n, k, x_format=x_format)
        except ValueError as error:
            self._refuse(where, str(error))
        return m, n, k

    # fields

    def _only(self, table: dict[str, Any], where: str, known: Sequence[str]) -> None:
        for name in table:
            if name not in known:
                self._refuse(f"{where}.{name}" if where else name, f"unknown; known: {', '.join(known)}")

    def _value(self, table: dict[str, Any], where: str, name: str, kind: type) -> Any:
        full = f"{where}.{name}" if where else name
        if name not in table:
            self._refuse(full, "missing")
        if type(table[name]) is not kind:
            self._refuse(full, f"expected {_NAMES[kind]}, got {_kind(table[name])}")
        return table[name]

    def _name(self, table: dict[str, Any], where: str, name: str, default: str | None = None) -> str:
        if default is not None and name not in table:
            return default
        found = " ".join(self._value(table, where, name, str).split())
        if not found:
            self._refuse(f"{where}.{name}" if where else name, "expected some text")
        return found

    def _choice(self, d: dict[str, Any], name: str, known: tuple[str, ...], default: str | None = None) -> str:
        value = d.get(name, default) if default is not None else self._value(d, "", name, str)
        if value not in known:
            self._refuse(name, f"expected one of {', '.join(known)}, got {value!r}")
        return str(value)

    def _number(self, d: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
        value = d.get(name, default)
        if type(value) is not int or not low <= value <= high:
            self._refuse(name, f"expected a whole number from {low} to {high}, got {value!r}")
        return int(value)

    def _positive(self, d: dict[str, Any], name: str, default: float) -> float:
        value = d.get(name, default)
        if not _is_number(value) or not 0 < value < math.inf:
            self._refuse(name, f"expected a positive number, got {value!r}")
        return float(value)

    def _refuse(self, where: str, why: str) -> NoReturn:
        raise RoundError(f"{self.path}, line {_line(self.lines, where)}: {where}: {why}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _kind(value: Any) -> str:
    return next((name for kind, name in _NAMES.items() if type(value) is kind), type(value).__name__)


def _line(lines: Sequence[str], where: str) -> int:
    """The line of a field such as entries[1].config.tokens: its own, else that of the table it belongs to, else the first."""
    first, _, rest = where.partition(".")
    name, index = first[:-1].split("[") if first.endswith("]") else (first, "0")
    start, end = 0, len(lines)
    headers = [i for i, line in enumerate(lines) if re.match(rf"\s*\[\[?\s*{re.escape(name)}\s*\]\]?", line)]
    found = 0
    if headers:
        start = headers[min(int(index), len(headers) - 1)]
        later = [i for i in range(start + 1, len(lines)) if re.match(rf"\s*\[\[?\s*(?!{re.escape(name)}\s*\.)", lines[i])]
        end, found = (later[0] if later else len(lines)), start
    else:
        rest = where.replace("[", ".").replace("]", "")
        end = next((i for i, line in enumerate(lines) if re.match(r"\s*\[", line)), len(lines))
    for key in filter(None, rest.split(".")):
        pattern = rf"(?:^|[{{,\[.\s])\s*['\"]?{re.escape(key)}['\"]?\s*(?:=|\])"
        hit = next((i for i in range(start, end) if re.search(pattern, _code(lines[i]))), None)
        if hit is not None:
            start = found = hit
    return found + 1


@cache
def _code(line: str) -> str:
    """A line without what stands in quotes after an equals sign, nor its comment."""
    return re.sub(r"=\s*(\"[^\"]*\"|'[^']*')", "= ''", line).partition("#")[0]
