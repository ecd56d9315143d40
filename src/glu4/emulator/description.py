"""What a launch description says: sizes, arrays and the bytes of parameters, all checked.

Every fault is a LaunchError that names its field.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.errors import LaunchError
from glu4.emulator.machine import Launch, Triple
from glu4.emulator.memory import Block
from glu4.emulator.program import Program
from glu4.emulator.ptx.module import Function
from glu4.emulator.tensor_map import TensorMap, encode

__all__ = ["Buffer", "check_memory", "dependent", "launch_of", "parameters", "read_buffers", "read_entry"]

_KEYS = ("entry", "grid", "block", "cluster", "dynamic_smem", "buffers", "params", "ctas", "dependent")
_SCALARS = {
    "u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q",
    "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q",
    "f32": "<f", "f64": "<d",
}  # fmt: skip
_KINDS = ("ptr", "bytes", "pack", "tensor_map", *_SCALARS)
_TENSOR_MAP = (
    "buffer", "offset", "element_type", "global_shape", "global_strides_bytes", "box_shape", "element_strides",
    "swizzle", "interleave", "oob_fill",
)  # fmt: skip
_MAX_THREADS = 1024
_MAX_CLUSTER = 16
# CUDA programming guide, compute capabilities: most CTAs and threads along x, y, z
_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_BLOCK = (1024, 1024, 64)
# types that NumPy lacks, by what they are kept as
_STORED = {"bfloat16": "uint16", "float4_e2m1fn_x2": "uint8"} | dict.fromkeys(
    ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), "uint8"
)
_SHADOW = 9  # bytes for each byte of memory whose accesses are tracked
_ROW_OBJECTS = 400  # bytes of Python objects for each register of a warp


@dataclass(frozen=True)
class Buffer:
    """A buffer of a launch. data: its values, None where it starts unwritten."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data: NDArray[Any] | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_entry(program: Program, launch: Mapping[str, Any]) -> Function:
    """The kernel to run, after a check of the description's fields."""
    if not isinstance(launch, Mapping):
        raise LaunchError(f"launch: expected an object with {', '.join(_KEYS)}, got {type(launch).__name__}")
    unknown = [k for k in launch if k not in _KEYS]
    if unknown:
        raise LaunchError(f"launch: unknown field {unknown[0]}; known are {', '.join(_KEYS)}")
    try:
        return program.module.entry(launch.get("entry"))
    except KeyError as error:
        raise LaunchError(str(error.args[0])) from None


# sizes


def _integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _triple(launch: Mapping[str, Any], key: str, default: Triple | None = None) -> Triple:
    value = launch.get(key)
    if value is None and default is None:
        raise LaunchError(f"{key}: missing")
    value = default if value is None else value
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str) or not all(map(_integer, value)):
        raise LaunchError(f"{key}: expected up to three integers, got {value!r}")
    numbers = [int(v) for v in value]
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise LaunchError(f"{key}: expected up to three positive integers, got {value!r}")
    x, y, z = (*numbers, 1, 1)[:3]
    return x, y, z


def launch_of(entry: Function, launch: Mapping[str, Any]) -> Launch:
    """Grid, block, cluster, shared memory and the chosen CTAs, held to the kernel's directives and the device's limits."""
    grid, block = _triple(launch, "grid"), _triple(launch, "block")
    if any(g > most for g, most in zip(grid, _MAX_GRID)):
        raise LaunchError(f"grid: {grid} is more than the device allows, {_MAX_GRID}")
    required = entry.directives.get("reqntid")
    if required and tuple(required) != block:
        raise LaunchError(f"block: the kernel needs {tuple(required)} (.reqntid), got {block}")
    limit = entry.directives.get("maxntid")
    threads = math.prod(block)
    if threads > _MAX_THREADS or any(b > most for b, most in zip(block, _MAX_BLOCK)) or (limit and threads > math.prod(limit)):
        raise LaunchError(f"block: {threads} threads, more than the kernel or the device allows")
    fixed = entry.directives.get("reqnctapercluster")
    given = launch.get("cluster")
    cluster = _triple(launch, "cluster", (fixed[0], fixed[1], fixed[2]) if fixed else (1, 1, 1))
    if fixed and tuple(fixed) != cluster:
        raise LaunchError(f"cluster: the kernel needs {tuple(fixed)} (.reqnctapercluster), got {cluster}")
    if any(g % c for g, c in zip(grid, cluster)) or math.prod(cluster) > _MAX_CLUSTER:
        raise LaunchError(f"cluster: {cluster} does not divide the grid {grid}, or has more than {_MAX_CLUSTER} CTAs")
    shared = launch.get("dynamic_smem", 0)
    if not _integer(shared) or shared < 0:
        raise LaunchError(f"dynamic_smem: expected a number of bytes, got {shared!r}")
    return Launch(grid, block, cluster, int(shared), bool(fixed or given), _ctas(launch.get("ctas"), grid))


def _ctas(value: Any, grid: Triple) -> tuple[Triple, ...] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise LaunchError(f"ctas: expected a list of indices such as [[0, 0], [3, 1]], got {value!r}")
    found = []
    for c in value:
        if not isinstance(c, Sequence) or isinstance(c, str) or not 1 <= len(c) <= 3 or not all(map(_integer, c)):
            raise LaunchError(f"ctas: expected up to three integers for each CTA, got {c!r}")
        x, y, z = (*(int(v) for v in c), 0, 0)[:3]
        if any(not 0 <= v < g for v, g in zip((x, y, z), grid)):
            raise LaunchError(f"ctas: {(x, y, z)} is outside the grid {grid}")
        found.append((x, y, z))
    return tuple(found)


# buffers


def read_buffers(launch: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Buffer]:
    """Every buffer that is described or given, by name; what is both has to agree."""
    described = launch.get("buffers", {})
    if not isinstance(described, Mapping):
        raise LaunchError(f"buffers: expected an object with a dtype and a shape for each name, got {described!r}")
    if not isinstance(given, Mapping):
        raise LaunchError(f"buffers: expected arrays by name, got {type(given).__name__}")
    found: dict[str, Buffer] = {}
    for name, what in described.items():
        found[name] = _described(name, what)
    for name, value in given.items():
        array = _array(name, value)
        buffer = Buffer(array.dtype, array.shape, array)
        wanted = found.get(name)
        if wanted is not None and (wanted.dtype, wanted.shape) != (buffer.dtype, buffer.shape):
            raise LaunchError(f"buffers: {name} is given as {buffer}, and described as {wanted}")
        found[name] = buffer
    return found


def _described(name: str, described: Any) -> Buffer:
    try:
        word, shape = described["dtype"], tuple(described["shape"])
        dtype = _plain(np.dtype(_STORED.get(word, word)))
    except (KeyError, TypeError, ValueError) as error:
        raise LaunchError(f"buffers: {name} needs a dtype and a shape ({error})") from None
    if not all(_integer(n) and n >= 0 for n in shape) or len(shape) > 32:
        raise LaunchError(f"buffers: {name}: shape: expected up to 32 sizes, got {described['shape']!r}")
    return Buffer(dtype, shape, None)


def _plain(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which a buffer is kept. Raises ValueError for what is not plain numbers in this machine's byte order."""
    if dtype.kind == "V" and dtype.fields is None and dtype.subdtype is None and dtype.itemsize in (1, 2, 4, 8):
        return np.dtype(f"u{dtype.itemsize}")  # bfloat16 and its kin of other packages
    if dtype.kind not in "biufc" or not dtype.isnative:
        raise ValueError(f"{dtype} is not a type of plain numbers in native byte order")
    return dtype


def _array(name: str, value: Any) -> NDArray[Any]:
    try:
        if hasattr(value, "detach") and hasattr(value, "data_ptr"):
            value = _of_tensor(value)
        array = np.asarray(value, order="C")
        return array.view(_plain(array.dtype))
    except (TypeError, ValueError, RuntimeError) as error:
        raise LaunchError(f"buffers: {name} cannot be used: {' '.join(str(error).split())}") from None


def _of_tensor(tensor: Any) -> NDArray[Any]:
    """The values of a torch tensor; types that NumPy lacks as unsigned integers."""
    import torch

    if tensor.device.type != "cpu":
        raise ValueError(f"it is on {tensor.device}; give a CPU tensor")
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    stored = _STORED.get(str(tensor.dtype).removeprefix("torch."))
    return np.asarray((tensor if stored is None else tensor.view(getattr(torch, stored))).numpy())


def dependent(launch: Mapping[str, Any], blocks: Mapping[str, Block]) -> list[Block]:
    """Buffers of the grid in front."""
    names = launch.get("dependent", ())
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise LaunchError(f"dependent: expected a list of buffers' names, got {names!r}")
    for name in names:
        if not isinstance(name, str) or name not in blocks:
            raise LaunchError(f"dependent: there is no buffer {name!r}; known are {', '.join(blocks)}")
    return [blocks[name] for name in names]


# memory


def check_memory(
    program: Program, entry: Function, launch: Launch, buffers: Mapping[str, Buffer], tracked: bool, resident: int, limit: int
) -> None:
    """Refuse a launch whose memory would be more than `limit` bytes, before any of it is there."""
    per_byte = _SHADOW if tracked else 1
    kept = sum(b.nbytes for b in buffers.values()) * (per_byte + 2)
    module = program.module
    variables = [*module.variables.values(), *(v for f in module.functions.values() for v in f.variables)]
    kept += sum(v.size for v in variables if v.space in ("global", "const")) * (per_byte + 2)
    code = program.functions[entry.name]
    warps = -(-math.prod(launch.block) // 32)
    rows = sum(_ROW_OBJECTS + 32 * max(1, bits // 8) for bits in code.bits)
    static = sum(v.size for v in variables if v.space == "shared")
    cta = (static + launch.dynamic_shared) * per_byte + warps * (rows + code.local_size * 32 * per_byte)
    ctas = math.prod(launch.cluster) * min(resident, math.prod(launch.grid) // math.prod(launch.cluster))
    need = kept + cta * ctas
    if need > limit:
        parts = f"{need / 2**30:.3g} GiB would be needed, {kept / 2**30:.3g} of it for buffers"
        raise LaunchError(f"memory: about {parts}; the limit is {limit / 2**30:.3g}")


# parameters


def parameters(entry: Function, launch: Mapping[str, Any], blocks: Mapping[str, Block]) -> list[bytes]:
    """Bytes of each kernel parameter, in order."""
    params = launch.get("params", [])
    if not isinstance(params, Sequence) or isinstance(params, str) or len(params) != len(entry.params):
        count = len(params) if isinstance(params, Sequence) else 0
        raise LaunchError(f"params: {entry.name} takes {len(entry.params)}, got {count}")
    return [_parameter(p, blocks, i) for i, p in enumerate(params)]


def _parameter(described: Any, blocks: Mapping[str, Block], index: int, packed: bool = False) -> bytes:
    if isinstance(described, bytes):
        return described
    if not isinstance(described, Mapping) or not described:
        raise LaunchError(f"params[{index}]: expected an object, got {described!r}")
    kinds = [k for k in described if k != "offset" or "ptr" not in described]
    kind, value = kinds[0], described[kinds[0]]
    if len(kinds) > 1:
        raise LaunchError(f"params[{index}]: {kind} and {kinds[1]} in one; a parameter has one kind")
    if kind == "pack" and not packed:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise LaunchError(f"params[{index}]: pack: expected a list of parameters, got {value!r}")
        return b"".join(_parameter(part, blocks, index, True) for part in value)
    if kind == "ptr":
        address = _block(blocks, value, index).base + _offset(described, index)
        return (address & (1 << 64) - 1).to_bytes(8, "little")
    if kind == "bytes":
        try:
            return bytes.fromhex(value)
        except (TypeError, ValueError):
            raise LaunchError(f"params[{index}]: bytes are hexadecimal digits, got {value!r}") from None
    if kind == "tensor_map":
        return _tensor_map(value, blocks, index)
    if kind not in _SCALARS:
        raise LaunchError(f"params[{index}]: unknown kind {kind}; known are {', '.join(_KINDS)}")
    try:
        return struct.pack(_SCALARS[kind], value)
    except (struct.error, OverflowError):
        raise LaunchError(f"params[{index}]: {value!r} is not a {kind}") from None


def _offset(described: Mapping[str, Any], index: int) -> int:
    value = described.get("offset", 0)
    if not _integer(value):
        raise LaunchError(f"params[{index}]: offset: expected a number of bytes, got {value!r}")
    return int(value)


def _block(blocks: Mapping[str, Block], name: Any, index: int) -> Block:
    if not isinstance(name, str) or name not in blocks:
        raise LaunchError(f"params[{index}]: there is no buffer {name!r}; known are {', '.join(blocks)}")
    return blocks[name]


def _tensor_map(described: Any, blocks: Mapping[str, Block], index: int) -> bytes:
    if not isinstance(described, Mapping):
        raise LaunchError(f"params[{index}]: tensor_map: expected an object, got {described!r}")
    unknown = [k for k in described if k not in _TENSOR_MAP]
    if unknown:
        raise LaunchError(f"params[{index}]: tensor_map: unknown field {unknown[0]}; known are {', '.join(_TENSOR_MAP)}")
    missing = [k for k in ("buffer", "element_type", "global_shape", "box_shape") if k not in described]
    if missing:
        raise LaunchError(f"params[{index}]: tensor_map: missing {missing[0]}")
    base = _block(blocks, described["buffer"], index).base + _offset(described, index)

    def sizes(key: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        value = described.get(key, default)
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(map(_integer, value)):
            raise LaunchError(f"params[{index}]: tensor_map: {key}: expected a list of integers, got {value!r}")
        return tuple(int(v) for v in value)

    def word(key: str, default: str = "") -> str:
        value = described.get(key, default)
        if not isinstance(value, str):
            raise LaunchError(f"params[{index}]: tensor_map: {key}: expected a name, got {value!r}")
        return value

    shape = sizes("global_shape")
    strides, box = sizes("global_strides_bytes"), sizes("box_shape")
    steps = sizes("element_strides", (1,) * len(shape))
    try:
        made = TensorMap(
            base, word("element_type"), shape, strides, box, steps, word("swizzle", "none"), word("interleave", "none"),
            word("oob_fill", "zero"),
        )  # fmt: skip
        return encode(made)
    except LaunchError:
        raise
    except (ValueError, OverflowError) as error:
        raise LaunchError(f"params[{index}]: {error}") from None
