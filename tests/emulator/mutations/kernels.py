"""The good kernels that faults are planted in: PTX, launch, inputs, and what tells right numbers from wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from emulator.kernels import launches
from emulator.mutations import small
from glu4.emulator.launch import Result, emulate, load
from glu4.emulator.program import Program

__all__ = ["Kernel", "kernel", "names"]

Buffers = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Kernel:
    """launch: a description as `emulate` takes it; right: whether the buffers after a run are those of a right kernel."""

    name: str
    text: str
    launch: dict[str, Any]
    buffers: dict[str, np.ndarray]
    right: Callable[[Buffers], bool]

    @cached_property
    def program(self) -> Program:
        return load(self.text)

    def run(self, **options: Any) -> Result:
        """Emulate the kernel; options: those of `emulate`."""
        return emulate(self.program, self.launch, self.buffers, **options)


@cache
def kernel(name: str) -> Kernel:
    """A kernel of tests/emulator/kernels, of which the last cluster of the grid runs, or one of small.py."""
    return small.KERNELS[name]() if name in small.KERNELS else _corpus(name)


def names() -> list[str]:
    """All of them."""
    return [*launches.names(), *small.KERNELS]


def _corpus(name: str) -> Kernel:
    text, launch, problem = launches.load(name)
    launch = {**launch, "ctas": [[size - 1 for size in launch["grid"]]]}
    inputs = launches.make_inputs(problem)
    exact, bound = launches.expect(problem, inputs)
    first = emulate(text, launch, inputs)
    shape = launch["buffers"]["C"]["shape"]
    block = next(b for b in first.machine.memory.blocks if b.name == "C")
    # the cluster's tile: what the good kernel writes; the rest of C has to stay as it was
    tile = block.writes.reshape(*shape, -1)[:, :, 0] != 0

    def right(buffers: Buffers) -> bool:
        stored = buffers["C"]
        with np.errstate(invalid="ignore"):  # infinities and NaN are wrong
            error = np.abs(launches.read_out(problem, stored)[tile] - exact[tile])
        return bool((error <= bound[tile]).all() and (stored[~tile].view(np.uint8) == 0xD7).all())

    if not tile.any():
        raise ValueError(f"{name}: the kernel writes nothing")
    return Kernel(name, text, launch, inputs, right)
