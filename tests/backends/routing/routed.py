"""The kernels that sort and combine, compiled here, and runs of them in the emulator as the package's own code launches them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from filelock import FileLock
from torch import Tensor

from backends.blackwell.grouped import recording
from glu4.backends.blackwell.emulation import export
from glu4.backends.routing import launch
from glu4.backends.routing.spec import CombineSpec, SortSpec, shipped
from glu4.emulator.capture import CapturedLaunch, describe
from glu4.emulator.launch import Result, emulate, load
from glu4.emulator.program import Program

Spec = SortSpec | CombineSpec


@dataclass(frozen=True)
class Made:
    """A kernel as `build --export` wrote it."""

    spec: Spec
    directory: Path

    def file(self, suffix: str) -> Path:
        return self.directory / f"{self.spec.name}{suffix}"

    @cached_property
    def ptx(self) -> str:
        return self.file(".ptx").read_text()

    @cached_property
    def program(self) -> Program:
        return load(self.ptx)

    @cached_property
    def description(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file(".json").read_text())
        return found


def compiled(directory: Path, arch: str) -> dict[str, Made]:
    """By name without the architecture; once for all workers of a parallel run, and for later runs of the same sources."""
    specs = shipped(arch)
    place = directory / "-".join(spec.key for spec in specs)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            export(specs, place)  # type: ignore[arg-type] # of which it reads builder, arch and name
    return {spec.name.split("_", 1)[1]: Made(spec, place) for spec in specs}


@contextmanager
def device(kernels: dict[str, Made]) -> Iterator[Any]:
    """The CPU as a device whose kernels are these, and a driver that records."""
    with recording() as recorder:
        made = {}
        for one in kernels.values():
            cubin = one.file(".cubin").read_bytes()
            recorder.remember(cubin, one.ptx)
            made[one.spec] = launch.made_kernel(one.spec, cubin, one.description)
        (arch,) = {one.spec.arch for one in kernels.values()}
        with (
            patch.object(launch, "architecture", lambda device: arch),
            patch.object(launch, "_kernel", made.get),
            patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True),
        ):
            yield recorder


def run(
    made: Made, launched: CapturedLaunch, memory: dict[str, Tensor], program: Program | None = None, **options: Any
) -> tuple[Result, dict[str, Tensor]]:
    """(result, the buffers afterwards); the kernel in front in the stream may still write all of them."""
    buffers = {name: (t.data_ptr(), t.numel() * t.element_size()) for name, t in memory.items()}
    description = describe(launched, buffers) | {"dependent": list(buffers)}
    # by their integers: numpy has no bfloat16
    arrays = {n: t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy() for n, t in memory.items()}
    result = emulate(program or made.program, description, arrays, **options)
    found = {n: torch.from_numpy(result.buffers[n]) for n in memory}
    return result, {n: found[n].view(t.dtype) for n, t in memory.items()}
