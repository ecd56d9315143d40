"""Run a kernel: PTX text, a launch description and buffers in; buffers and a report out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.description import (
    Buffer,
    check_memory,
    dependent,
    launch_of,
    parameters,
    read_buffers,
    read_entry,
)
from glu4.emulator.errors import LaunchError
from glu4.emulator.hazards import Access, Hazard, Monitor
from glu4.emulator.machine import Machine
from glu4.emulator.memory import Block
from glu4.emulator.program import Program
from glu4.emulator.ptx import parse
from glu4.emulator.ptx.module import Module
from glu4.emulator.recording import Recorder, Recording
from glu4.emulator.scheduler import schedule

__all__ = ["Report", "Result", "emulate", "hazard_to_dict", "load"]

_UNWRITTEN = 0xD7  # each byte of a buffer that nothing wrote
MEMORY_LIMIT = 8 << 30


@dataclass(frozen=True)
class Report:
    """What a run found. schedule: name and seed, which repeat it; instructions: of warps; seconds: of this machine."""

    schedule: str
    seed: int
    hazards: tuple[Hazard, ...]
    instructions: int
    seconds: float

    @property
    def clean(self) -> bool:
        return not self.hazards

    def to_dict(self) -> dict[str, Any]:
        """For JSON; hazards as `hazard_to_dict`."""
        whole = {"schedule": self.schedule, "seed": self.seed, "clean": self.clean}
        whole |= {"instructions": self.instructions, "seconds": self.seconds}
        return whole | {"hazards": [hazard_to_dict(h) for h in self.hazards]}

    def __str__(self) -> str:
        head = f"schedule {self.schedule}, seed {self.seed}: {self.instructions} warp instructions in {self.seconds:.2f} s"
        return "\n".join([head, *(f"{h}{f' ({h.count} times)' if h.count > 1 else ''}" for h in self.hazards)])


def hazard_to_dict(hazard: Hazard) -> dict[str, Any]:
    """For JSON; the fields of its first access stand beside its class."""
    sides = [asdict(a) if a else None for a in (hazard.access, hazard.other)]
    access = sides[0] or {f.name: None for f in fields(Access)}
    return {"class": hazard.kind, "message": hazard.message, "count": hazard.count, **access, "other": sides[1]}


@dataclass(frozen=True)
class Result:
    """Buffers after the run, by name, in their shapes and types, and the report; a recording where one was asked for.

    Types that NumPy lacks come back as unsigned integers of their size: bfloat16 as uint16, 8-bit floats as uint8.
    """

    buffers: dict[str, NDArray[Any]]
    report: Report
    machine: Machine = field(repr=False)
    recording: Recording | None = field(default=None, repr=False)


def load(text: str) -> Program:
    """PTX text made ready to run. Raises PtxError naming line and opcode for anything that is not modelled."""
    return Program(parse(text))


def emulate(kernel: str | Module | Program, launch: Mapping[str, Any], buffers: Mapping[str, Any] | None = None, *,
            schedule_name: str = "eager", seed: int = 0, hazards: bool = True, max_instructions: int = 200_000_000,
            time_limit: float | None = None, memory_limit: int = MEMORY_LIMIT, resident: int = 4,
            record: bool = False, before: Mapping[str, Any] | None = None) -> Result:  # fmt: skip
    """Run one launch.

    launch: {"entry", "grid", "block", "cluster", "dynamic_smem", "buffers", "params", "ctas", "dependent"}, whose fields
    docs/emulator.md explains. buffers: name to array (NumPy, CPU torch tensors of any type, or what np.asarray takes); they are
    copied. A buffer of the description that is not among them starts unwritten, and reading it is a hazard.

    hazards: False tracks no accesses, which is faster. max_instructions: of warps; time_limit: seconds; a run that reaches one
    of them ends with a "time limit" hazard. memory_limit: bytes, for what the launch describes (more is a LaunchError) and for
    the record of accesses (a "memory limit" hazard). resident: clusters that run at a time. record: keep what
    glu4.emulator.timeline draws. before: what buffers of `dependent` hold until the grid in front ends, which leaves `buffers`:
    the first griddepcontrol.wait does that. Raises PtxError and LaunchError.
    """
    program = kernel if isinstance(kernel, Program) else Program(kernel) if isinstance(kernel, Module) else load(kernel)
    entry = read_entry(program, launch)
    shape = launch_of(entry, launch)
    described = read_buffers(launch, buffers or {})
    check_memory(program, entry, shape, described, hazards, resident, memory_limit)
    monitor = Monitor(hazards)
    try:
        machine = Machine(program, entry, shape, schedule(schedule_name, seed), monitor, max_instructions, resident)
        blocks = {name: _place(machine, name, buffer) for name, buffer in described.items()}
        for block in dependent(launch, blocks):
            monitor.depends(block)
        for name, earlier in _earlier(launch, described, before or {}).items():
            written = blocks[name].data[: described[name].nbytes]
            machine.written_in_front.append((blocks[name], written.copy()))
            written[:] = earlier
        machine.set_params(parameters(entry, launch, blocks))
        recorder = machine.recorder = Recorder(machine) if record else None
        start = time.perf_counter()
        machine.limit(time_limit, memory_limit)
        machine.run()
        seconds = time.perf_counter() - start
    except MemoryError:
        raise LaunchError("memory: this machine has too little of it for the launch") from None
    report = Report(schedule_name, seed, tuple(monitor.hazards.values()), machine.executed, seconds)
    outputs = {name: blocks[name].data[: b.nbytes].view(b.dtype).reshape(b.shape).copy() for name, b in described.items()}
    return Result(outputs, report, machine, recorder.finish() if recorder else None)


def _earlier(
    launch: Mapping[str, Any], described: Mapping[str, Buffer], before: Mapping[str, Any]
) -> dict[str, NDArray[np.uint8]]:
    """The bytes of buffers until the grid in front ends."""
    found = {}
    for name, buffer in read_buffers({}, before).items():
        if name not in launch.get("dependent", ()):
            raise LaunchError(f"before: {name!r} is not among the buffers of the grid in front, which `dependent` names")
        wanted = described[name]
        if (wanted.dtype, wanted.shape) != (buffer.dtype, buffer.shape):
            raise LaunchError(f"before: {name} is given as {buffer}, and is {wanted}")
        assert buffer.data is not None
        found[name] = np.frombuffer(buffer.data.tobytes(), np.uint8)
    return found


def _place(machine: Machine, name: str, buffer: Buffer) -> Block:
    """Put a buffer into global memory."""
    if buffer.data is None:
        data = np.full(buffer.nbytes, _UNWRITTEN, np.uint8)
    else:
        data = np.frombuffer(buffer.data.tobytes(), np.uint8).copy()
    block = machine.memory.add(name, "global", data)
    if machine.monitor.enabled:
        block.shadow(buffer.data is not None)
    return block
