"""Kernels that tests have compiled and exported, for the emulator."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from filelock import FileLock

from glu4.backends.blackwell.emulation import export
from glu4.backends.blackwell.grouped_spec import GroupSpec
from glu4.backends.blackwell.moe_spec import MoeSpec, TileSpec
from glu4.backends.tokens.spec import Spec
from glu4.emulator.launch import load
from glu4.emulator.program import Program

K = TypeVar("K")


@dataclass(frozen=True, eq=False)
class ExportedKernel:
    """A kernel as a builder's --export wrote it."""

    spec: GroupSpec | MoeSpec | TileSpec | Spec
    directory: Path

    def file(self, suffix: str) -> Path:
        return self.directory / f"{self.spec.name}{suffix}"

    @cached_property
    def ptx(self) -> str:
        return self.file(".ptx").read_text()

    @cached_property
    def cubin(self) -> bytes:
        return self.file(".cubin").read_bytes()

    @cached_property
    def description(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file(".json").read_text())
        return found

    @cached_property
    def program(self) -> Program:
        return load(self.ptx)


class ExportedMapping(Mapping[str, K]):
    """Kernels by name, compiled at their first use, a few in one process; once for all workers of a parallel run.

    They stay in `directory`, from where a later run takes those whose sources are the same.

    suffixes  of the files that are exported
    together  kernels that one process compiles
    """

    suffixes: ClassVar[tuple[str, ...]] = (".ptx", ".cubin", ".json")
    together: ClassVar[int] = 4

    def __init__(self, specs: Mapping[str, Any], directory: Path) -> None:
        self._specs, self._directory = specs, directory
        self._made: dict[str, K] = {}

    def kernel(self, spec: Any, place: Path) -> K:
        """Of the files in `place`."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> K:
        spec, names = self._specs[name], list(self._specs)
        start = names.index(name) // self.together * self.together
        batch = {self._specs[n].key: self._specs[n] for n in names[start : start + self.together]}
        place = self._directory / spec.key
        if not place.exists():
            with FileLock(self._directory / f"{next(iter(batch))}.lock"):
                missing = {key: s for key, s in batch.items() if not (self._directory / key).exists()}
                made = self._directory / f"{spec.key}.making"
                if missing:
                    export(list(missing.values()), made)  # type: ignore[arg-type] # of which it reads builder, arch and name
                for key, s in missing.items():
                    own = made / key
                    own.mkdir()
                    for suffix in self.suffixes:
                        (made / f"{s.name}{suffix}").rename(own / f"{s.name}{suffix}")
                    own.rename(self._directory / key)
        return self._made.setdefault(name, self.kernel(spec, place))

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


class ExportedKernels(ExportedMapping[ExportedKernel]):
    """Of kernels that the package's own host code launches."""

    def kernel(self, spec: Any, place: Path) -> ExportedKernel:
        return ExportedKernel(spec, place)
