"""Run a kernel: PTX text, a launch description and buffers in; buffers and a report out."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.errors import LaunchError
from glu4.emulator.hazards import Hazard, Monitor
from glu4.emulator.machine import Launch, Machine
from glu4.emulator.memory import Block
from glu4.emulator.program import Program
from glu4.emulator.ptx import parse
from glu4.emulator.ptx.module import Function, Module
from glu4.emulator.scheduler import schedule
from glu4.emulator.tensor_map import TensorMap, encode

__all__ = ["Report", "Result", "emulate", "load"]

_KEYS = ("entry", "grid", "block", "cluster", "dynamic_smem", "buffers", "params", "ctas")
_SCALARS = {
    "u8": "<B",
    "u16": "<H",
    "u32": "<I",
    "u64": "<Q",
    "i8": "<b",
    "i16": "<h",
    "i32": "<i",
    "i64": "<q",
    "f32": "<f",
    "f64": "<d",
}
_MAX_THREADS = 1024


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

    def __str__(self) -> str:
        head = f"schedule {self.schedule}, seed {self.seed}: {self.instructions} warp instructions in {self.seconds:.2f} s"
        return "\n".join([head, *(f"{h}{f' ({h.count} times)' if h.count > 1 else ''}" for h in self.hazards)])


@dataclass(frozen=True)
class Result:
    """Buffers after the run, by name, in their shapes and types, and the report."""

    buffers: dict[str, NDArray[Any]]
    report: Report
    machine: Machine = field(repr=False)


def load(text: str) -> Program:
    """PTX text made ready to run. Raises PtxError naming line and opcode for anything that is not modelled."""
    return Program(parse(text))


def emulate(kernel: str | Module | Program, launch: Mapping[str, Any], buffers: Mapping[str, Any] | None = None, *,
            schedule_name: str = "eager", seed: int = 0, hazards: bool = True, max_instructions: int = 200_000_000,
            resident: int = 4) -> Result:  # fmt: skip
    """Run one launch.

    launch: {"entry", "grid", "block", "cluster", "dynamic_smem", "buffers", "params", "ctas"}; docs/emulator.md has the fields.
    buffers: name to array (NumPy, or anything that np.asarray takes, such as a CPU torch tensor); they are copied. A buffer of
    the description that is not among them starts unwritten, and reading it is a hazard. Raises PtxError and LaunchError.
    """
    program = kernel if isinstance(kernel, Program) else Program(kernel) if isinstance(kernel, Module) else load(kernel)
    unknown = [k for k in launch if k not in _KEYS]
    if unknown:
        raise LaunchError(f"launch: unknown field {unknown[0]}; known are {', '.join(_KEYS)}")
    try:
        entry = program.module.entry(launch.get("entry"))
    except KeyError as error:
        raise LaunchError(str(error.args[0])) from None
    shape = _shape(entry, launch)
    monitor = Monitor(hazards)
    machine = Machine(program, entry, shape, schedule(schedule_name, seed), monitor, max_instructions, resident)
    arrays, blocks = _buffers(machine, launch.get("buffers", {}), buffers or {})
    machine.set_params([_parameter(p, blocks, i) for i, p in enumerate(_params(entry, launch.get("params", [])))])
    start = time.perf_counter()
    machine.run()
    seconds = time.perf_counter() - start
    report = Report(schedule_name, seed, tuple(monitor.hazards.values()), machine.executed, seconds)
    outputs = {name: blocks[name].data[: a.nbytes].view(a.dtype).reshape(a.shape).copy() for name, a in arrays.items()}
    return Result(outputs, report, machine)


def _triple(launch: Mapping[str, Any], key: str, default: tuple[int, int, int] | None = None) -> tuple[int, int, int]:
    value = launch.get(key, default)
    if value is None:
        raise LaunchError(f"{key}: missing")
    try:
        numbers = [int(v) for v in value]
    except (TypeError, ValueError):
        raise LaunchError(f"{key}: expected up to three integers, got {value!r}") from None
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise LaunchError(f"{key}: expected up to three positive integers, got {value!r}")
    x, y, z = (*numbers, 1, 1)[:3]
    return x, y, z


def _shape(entry: Function, launch: Mapping[str, Any]) -> Launch:
    grid, block = _triple(launch, "grid"), _triple(launch, "block")
    required = entry.directives.get("reqntid")
    if required and tuple(required) != block:
        raise LaunchError(f"block: the kernel needs {tuple(required)} (.reqntid), got {block}")
    limit = entry.directives.get("maxntid")
    threads = block[0] * block[1] * block[2]
    if threads > _MAX_THREADS or (limit and threads > limit[0] * limit[1] * limit[2]):
        raise LaunchError(f"block: {threads} threads, more than the kernel or the device allows")
    fixed = entry.directives.get("reqnctapercluster")
    given = launch.get("cluster")
    cluster = _triple(launch, "cluster", (fixed[0], fixed[1], fixed[2]) if fixed else (1, 1, 1))
    if fixed and tuple(fixed) != cluster:
        raise LaunchError(f"cluster: the kernel needs {tuple(fixed)} (.reqnctapercluster), got {cluster}")
    if any(g % c for g, c in zip(grid, cluster)) or cluster[0] * cluster[1] * cluster[2] > 16:
        raise LaunchError(f"cluster: {cluster} does not divide the grid {grid}, or has more than 16 CTAs")
    ctas = launch.get("ctas")
    chosen = (
        None
        if ctas is None
        else tuple(_triple({"ctas": tuple(int(v) + 1 for v in c) + (1,) * (3 - len(c))}, "ctas") for c in ctas)
    )
    chosen = None if chosen is None else tuple((x - 1, y - 1, z - 1) for x, y, z in chosen)
    for c in chosen or ():
        if any(v >= g for v, g in zip(c, grid)):
            raise LaunchError(f"ctas: {c} is outside the grid {grid}")
    shared = launch.get("dynamic_smem", 0)
    if not isinstance(shared, int) or shared < 0:
        raise LaunchError(f"dynamic_smem: expected a number of bytes, got {shared!r}")
    return Launch(grid, block, cluster, shared, bool(fixed or given), chosen)


def _params(entry: Function, params: Any) -> list[Any]:
    if not isinstance(params, Sequence) or len(params) != len(entry.params):
        count = len(params) if isinstance(params, Sequence) else 0
        raise LaunchError(f"params: {entry.name} takes {len(entry.params)}, got {count}")
    return list(params)


def _buffers(
    machine: Machine, described: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, NDArray[Any]], dict[str, Block]]:
    """Put every buffer into global memory: (arrays by name, blocks by name)."""
    arrays: dict[str, NDArray[Any]] = {}
    blocks: dict[str, Block] = {}
    for name in [*described, *(n for n in given if n not in described)]:
        if name in given:
            array = np.ascontiguousarray(np.asarray(given[name]))
            written = True
        else:
            array, written = _poisoned(name, described[name]), False
        arrays[name] = array
        data = np.frombuffer(array.tobytes(), dtype=np.uint8).copy() if array.nbytes else np.zeros(0, np.uint8)
        block = machine.memory.add(name, "global", data)
        if machine.monitor.enabled:
            block.shadow(written)
        blocks[name] = block
    return arrays, blocks


def _poisoned(name: str, described: Any) -> NDArray[Any]:
    try:
        dtype, shape = np.dtype(described["dtype"]), tuple(int(n) for n in described["shape"])
        array = np.empty(shape, dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise LaunchError(f"buffers: {name} needs a dtype and a shape ({error})") from None
    array.reshape(-1).view(np.uint8)[:] = 0xD7
    return array


def _parameter(described: Any, blocks: Mapping[str, Block], index: int) -> bytes:
    """Bytes of one kernel parameter."""
    if isinstance(described, bytes):
        return described
    if not isinstance(described, Mapping) or not described:
        raise LaunchError(f"params[{index}]: expected an object, got {described!r}")
    kind, value = next(iter(described.items()))
    if kind == "pack":
        return b"".join(_parameter(part, blocks, index) for part in value)
    if kind == "ptr":
        return (_block(blocks, value, index).base + int(described.get("offset", 0))).to_bytes(8, "little")
    if kind == "bytes":
        try:
            return bytes.fromhex(value)
        except (TypeError, ValueError):
            raise LaunchError(f"params[{index}]: bytes are hexadecimal digits, got {value!r}") from None
    if kind == "tensor_map":
        return _tensor_map(value, blocks, index)
    if kind not in _SCALARS:
        raise LaunchError(f"params[{index}]: unknown kind {kind}; known are ptr, bytes, tensor_map, {', '.join(_SCALARS)}")
    try:
        return struct.pack(_SCALARS[kind], value)
    except struct.error:
        raise LaunchError(f"params[{index}]: {value!r} is not a {kind}") from None


def _block(blocks: Mapping[str, Block], name: Any, index: int) -> Block:
    if name not in blocks:
        raise LaunchError(f"params[{index}]: there is no buffer {name!r}; known are {', '.join(blocks)}")
    return blocks[name]


def _tensor_map(described: Any, blocks: Mapping[str, Block], index: int) -> bytes:
    try:
        rank = len(described["global_shape"])
        made = TensorMap(
            _block(blocks, described["buffer"], index).base + int(described.get("offset", 0)),
            described["element_type"],
            tuple(described["global_shape"]),
            tuple(described.get("global_strides_bytes", ())),
            tuple(described["box_shape"]),
            tuple(described.get("element_strides", (1,) * rank)),
            described.get("swizzle", "none"),
            described.get("interleave", "none"),
            described.get("oob_fill", "zero"),
        )
    except (KeyError, TypeError) as error:
        raise LaunchError(f"params[{index}]: tensor_map: missing or wrong field {error}") from None
    except ValueError as error:
        raise LaunchError(f"params[{index}]: {error}") from None
    return encode(made)
