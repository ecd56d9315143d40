"""The kernels that sort and combine, compiled here, and runs of them in the emulator as the package's own code launches them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from filelock import FileLock
from torch import Tensor

from backends.blackwell.exported import ExportedKernel
from backends.blackwell.grouped import recording
from glu4.backends.blackwell.emulation import export
from glu4.backends.tokens import launch
from glu4.backends.tokens.spec import shipped
from glu4.emulator.capture import CapturedLaunch, describe
from glu4.emulator.launch import Result, emulate
from glu4.emulator.program import Program


def compiled(directory: Path, arch: str) -> dict[str, ExportedKernel]:
    """By name without the architecture; once for all workers of a parallel run, and for later runs of the same sources."""
    specs = shipped(arch)
    place = directory / "-".join(spec.key for spec in specs)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            export(specs, place)  # type: ignore[arg-type] # of which it reads builder, arch and name
    return {spec.name.split("_", 1)[1]: ExportedKernel(spec, place) for spec in specs}


@contextmanager
def device(kernels: dict[str, ExportedKernel]) -> Iterator[Any]:
    """The CPU as a device whose kernels are these, and a driver that records."""
    with recording() as recorder:
        made = {}
        for one in kernels.values():
            recorder.remember(one.cubin, one.ptx)
            made[one.spec] = launch.made_kernel(one.spec, one.cubin, one.description)
        (arch,) = {one.spec.arch for one in kernels.values()}
        with (
            patch.object(launch, "architecture", lambda device: arch),
            patch.object(launch, "_kernel", made.get),
            patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True),
        ):
            yield recorder


def run(
    made: ExportedKernel, launched: CapturedLaunch, memory: dict[str, Tensor], program: Program | None = None, **options: Any
) -> tuple[Result, dict[str, Tensor]]:
    """(result, the buffers afterwards); the kernel in front in the stream may still write all of them."""
    buffers = {name: (t.data_ptr(), t.numel() * t.element_size()) for name, t in memory.items()}
    description = describe(launched, buffers) | {"dependent": list(buffers)}
    # by their integers: numpy has no bfloat16
    arrays = {n: t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy() for n, t in memory.items()}
    result = emulate(program or made.program, description, arrays, **options)
    found = {n: torch.from_numpy(result.buffers[n]) for n in memory}
    return result, {n: found[n].view(t.dtype) for n, t in memory.items()}
