"""Measured tables: which configuration was fastest on this very device, for the shapes that `glu4 tune` measured.

A table belongs to one device by its full name and holds, for one operation, N, K and activation format, the fastest
configuration at each measured M. It speaks for exactly those, and between two that agree where that configuration has as many
token tiles as at the larger, so that it does the same work. Where neighbours differ the change may lie anywhere between them,
and with a tile less another may be faster: there, beyond the largest, and for every other shape, the cost model orders
(`config.candidates`).

Where: `tables/` beside this file, then the user's own in the cache directory (`tuned/`), whose entries override. Configurations
that a table names and this version does not have are passed over. A table that cannot be read is refused as a whole, with one
warning; `refusals` says why.
"""

from __future__ import annotations

import json
import re
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from glu4.backends.hopper.config import SHIPPED, Config, candidates, legal
from glu4.compiled import store
from glu4.problem import Problem

__all__ = ["FORMAT", "best", "file_name", "forget", "ordered", "packaged_directory", "parse", "refusals", "user_directory"]

FORMAT = 1
Key = tuple[str, int, int, str]  # operation, N, K, activation format


@dataclass(frozen=True)
class Entry:
    """The measured M, ascending, and the fastest configuration at each, None where it is not one of this version's."""

    m: tuple[int, ...]
    configs: tuple[Config | None, ...]


def packaged_directory() -> Path:
    """Tables that come with glu4."""
    return Path(__file__).parent / "tables"


def user_directory() -> Path | None:
    """Where `glu4 tune` writes; None when the cache is turned off."""
    cache_directory = store.cache_directory()
    return None if cache_directory is None else cache_directory / "tuned"


def file_name(device: str) -> str:
    """The file of one device's table: its name in lower case, words joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", device.lower())) + ".json"


def parse(text: str, device: str) -> dict[Key, Entry]:
    """The entries of a table of `device`; raises ValueError saying what is wrong with it."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"expected a table of format {FORMAT}")
    if document.get("device") != device:
        raise ValueError(f"a table of {document.get('device')!r}, not of {device!r}")
    entries = document.get("entries")
    if not isinstance(entries, list):
        raise ValueError("entries: expected a list")
    return dict(_entry(i, entry) for i, entry in enumerate(entries))


def _entry(i: int, entry: Any) -> tuple[Key, Entry]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"entries[{i}]: expected an object, got {type(entry).__name__}")
    operation, n, k, x_format, ms, names = (entry.get(f) for f in ("operation", "n", "k", "x_format", "m", "config"))
    if not (isinstance(operation, str) and isinstance(x_format, str) and _sizes([n, k])):
        raise ValueError(f"entries[{i}]: expected operation and x_format as strings, n and k as positive integers")
    if not (isinstance(ms, list) and ms and _sizes(ms) and all(a < b for a, b in pairwise(ms))):
        raise ValueError(f"entries[{i}].m: expected ascending positive integers")
    if not (isinstance(names, list) and len(names) == len(ms) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"entries[{i}].config: expected one name for each m")
    known = {c.name: c for c in SHIPPED}
    assert isinstance(n, int)
    assert isinstance(k, int)
    return (operation, n, k, x_format), Entry(tuple(ms), tuple(known.get(name) for name in names))


def _sizes(values: list[Any]) -> bool:
    return all(type(v) is int and v > 0 for v in values)


@cache
def _tables(device: str) -> tuple[dict[Key, Entry], tuple[str, ...]]:
    """(entries of all tables of a device, why those that were refused were)."""
    entries: dict[Key, Entry] = {}
    refused = []
    for directory in (packaged_directory(), user_directory()):
        path = None if directory is None else directory / file_name(device)
        try:
            if path is not None and path.is_file():
                entries |= parse(path.read_text(encoding="utf-8"), device)
        except (OSError, ValueError) as error:
            refused.append(f"{path}: {error}; measure again with glu4 tune, or delete it")
            warnings.warn(f"glu4: tuning table refused: {refused[-1]}", RuntimeWarning, stacklevel=2)
    return entries, tuple(refused)


def forget() -> None:
    """Read the tables again at their next use, for one that was written since."""
    _tables.cache_clear()


def refusals(device: str) -> tuple[str, ...]:
    """Why tables of a device were refused, one sentence each with the file and what to do."""
    return _tables(device)[1]


def best(problem: Problem, device: str) -> Config | None:
    """The configuration measured fastest for `problem` on the device of that name; None when no measurement speaks for it."""
    entry = _tables(device)[0].get((problem.operation, problem.n, problem.k, problem.x_format))
    if entry is None or problem.batched:
        return None
    i = bisect_left(entry.m, problem.m)
    config = entry.configs[i] if i < len(entry.m) else None
    if config is None or legal(config, problem) is not None:
        return None
    if entry.m[i] != problem.m:
        agree = i > 0 and entry.configs[i - 1] == config
        if not agree or -(-problem.m // config.tokens) != -(-entry.m[i] // config.tokens):
            return None
    return config


def ordered(problem: Problem, device: str, processors: int) -> Iterator[Config]:
    """The configurations that may run `problem`, best first: the measured one where there is one, then as the model ranks."""
    measured = best(problem, device)
    if measured is not None:
        yield measured
    yield from (c for c in candidates(problem, processors) if c != measured)
