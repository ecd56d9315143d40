"""What both readers produce: the scheme of a module, the names of its tensors, and oddities worth telling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from glu4.errors import CheckpointError

__all__ = ["NVFP4", "UNQUANTIZED", "Activations", "CheckpointFormat", "Config", "Names", "Oddity", "Scheme", "refused"]

CheckpointFormat = Literal["compressed-tensors", "modelopt"]
Activations = Literal["static", "dynamic", "none"]


@dataclass(frozen=True)
class Names:
    """Last parts of the names of one NVFP4 module's tensors, and whether its float32 scales are stored as divisors."""

    codes: str
    block_scale: str
    global_scale: str
    input_scale: str
    divisors: bool

    @property
    def all(self) -> tuple[str, ...]:
        return (self.codes, self.block_scale, self.global_scale, self.input_scale)


@dataclass(frozen=True)
class Scheme:
    """How one module is quantised.

    name         the format's own name for it: "NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "FP8", ...; "unquantized" for none
    supported    whether glu4 computes it exactly as stored
    activations  how inputs are meant to be quantised: "static" (a stored input scale), "dynamic", or "none" (16 bits)
    reason       why it is refused; empty when supported
    """

    name: str
    supported: bool
    activations: Activations = "none"
    reason: str = ""


NVFP4 = "NVFP4"
UNQUANTIZED = Scheme("unquantized", True)


def refused(name: str, reason: str) -> Scheme:
    """A scheme that glu4 names and does not read."""
    return Scheme(name, False, reason=reason)


@dataclass(frozen=True)
class Oddity:
    """One line about a module or file that a careful reader wants to know; `unusable` when it cannot be loaded."""

    where: str
    text: str
    unusable: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


class Config(Protocol):
    """What a checkpoint's configuration files say, in either format."""

    def scheme(self, module: str) -> Scheme | None:
        """What is said about a module whose tensors are quantised; None when nothing is."""

    def ignored_by(self, module: str) -> str | None:
        """The pattern that lists this module as not quantised, if one does."""


# ---- fields of JSON documents, checked ----


def field(document: dict[str, Any], key: str, kind: type | tuple[type, ...], file: Path, default: Any = None) -> Any:
    """document[key], checked; `default` when absent or null. Raises CheckpointError for another type."""
    value = document.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        accepted = " or ".join(k.__name__ for k in kinds)
        raise CheckpointError(f"{file}: {key} must be {accepted}, found {type(value).__name__}; correct the file")
    return value


def strings(values: Iterable[Any], key: str, file: Path) -> tuple[str, ...]:
    """A list of strings, checked. Raises CheckpointError for anything else in it."""
    out = tuple(values)
    if not all(isinstance(v, str) for v in out):
        raise CheckpointError(f"{file}: {key} must list strings; correct the file")
    return out
