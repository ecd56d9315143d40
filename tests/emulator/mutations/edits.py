"""Precise edits of PTX text and of launch descriptions: an edit that does not match exactly what it names is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Edit", "EditError", "LaunchEdit", "chain", "drop", "field", "replace"]

Edit = Callable[[str], str]
LaunchEdit = Callable[[dict[str, Any]], None]


class EditError(Exception):
    """The text is not the one that the edit was written for, or the edit changes nothing."""


def replace(pattern: str, new: str, which: int | None = 0, of: int = 1) -> Edit:
    """Replace match `which` (None: every one) of a regular expression that must match `of` times.

    ^ and $ are those of lines; `new` may use groups. The edit raises EditError for any other number of matches, and where
    the text stays as it was.
    """

    def edit(text: str) -> str:
        found = list(re.finditer(pattern, text, re.MULTILINE))
        if len(found) != of:
            raise EditError(f"{pattern!r} matches {len(found)} times, expected {of}")
        chosen = found if which is None else [found[which]]
        out, at = [], 0
        for match in chosen:
            out += [text[at : match.start()], match.expand(new)]
            at = match.end()
        result = "".join(out) + text[at:]
        if result == text:
            raise EditError(f"{pattern!r} -> {new!r} changes nothing")
        return result

    return edit


def drop(instruction: str, which: int | None = 0, of: int = 1) -> Edit:
    """Take out an instruction, with its guard: `instruction` is a regular expression for its start."""
    return replace(rf"(?:@!?%?\w+\s+)?{instruction}[^;]*;", "", which, of)


def chain(*edits: Edit) -> Edit:
    """One edit after the other."""

    def edit(text: str) -> str:
        for one in edits:
            text = one(text)
        return text

    return edit


def field(path: tuple[Any, ...], old: Any, new: Any) -> LaunchEdit:
    """Set a field of a launch description, reached by keys and indices, that must hold `old` now."""

    def edit(launch: dict[str, Any]) -> None:
        at: Any = launch
        for key in path[:-1]:
            if not (isinstance(at, list) and isinstance(key, int)) and not (isinstance(at, Mapping) and key in at):
                raise EditError(f"there is no {key!r} on the way to {path}")
            at = at[key]
        if at[path[-1]] != old or old == new:
            raise EditError(f"{path} is {at[path[-1]]!r}, expected {old!r}")
        at[path[-1]] = new

    return edit
