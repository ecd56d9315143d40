"""Run mixtures of experts on a Blackwell device: one launch for all experts, nothing read back by the host.

Executed in emulation only so far: no such GPU was at hand. Before the kernel another one numbers its tiles and lays out the
tokens' scales (`moe_tile_tokens`; where it is not compiled, the torch operations of `moe_tokens`). CuTe DSL's host code of
`moe_gemm` passes, one after the other: both tiled MMAs (nothing in them), six tensor maps, extents of codes and scales of the
weights and of x, the table, C, its row stride, global scales, biases, flags, the activation's constants, N and K. Tests compare.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.backends.blackwell import launch
from glu4.backends.blackwell.arguments import _EMPTY, _MAP_BYTES, _U4, _U16, _encode, scale_box
from glu4.backends.blackwell.launch import _STREAM_AT, _Frame
from glu4.backends.blackwell.moe_config import MoeConfig, moe_candidates, moe_legal, most_tiles
from glu4.backends.blackwell.moe_spec import MoeSpec, TileSpec
from glu4.backends.blackwell.moe_tokens import RECORD, tile_table, tiled_scales
from glu4.compiled import store
from glu4.compiled.driver import Kernel
from glu4.errors import UnsupportedError
from glu4.nvfp4 import NVFP4Tensor, _unchecked
from glu4.problem import GroupedProblem
from glu4.scale_layout import ATOM_ROWS, SwizzledLayout

__all__ = [
    "ADDRESSES",
    "PARAMETERS",
    "TILE_PARAMETERS",
    "MoeChoice",
    "MoePlan",
    "MoeShape",
    "all_shipped",
    "available",
    "forget",
    "grouped",
    "load",
    "moe_parameters",
    "shipped",
    "shipped_tiles",
    "submit",
    "tiled",
]

_C = torch._C
ADDRESSES = (
    "gate", "scale_gate", "x", "scale_x", "up", "scale_up", "table", "out", "global_x", "global_gate", "global_up",
    "gate_bias", "up_bias",
)  # fmt: skip
TILE_PARAMETERS = ("Q", "Q", "Q", "Q", "q", "i", "i", "i", "i")  # of the kernel that numbers tiles, as `struct` packs them
PARAMETERS = (12, 12, *[_MAP_BYTES] * 6, 12, 12, 8, 8, *[8] * 8, *[4] * 6)  # bytes of each
_MAPS, _TABLE = 2, 12  # numbers of the first map and of the table among them
_ATOM_BYTES = 512  # of block scales (glu4.scale_layout)
_PLANS = 1 << 12
# means of rows over experts whose candidates are the kernels that are compiled ahead
_TYPICAL = (GroupedProblem(128, 128, 768, 2048), GroupedProblem(8192, 128, 768, 2048), GroupedProblem(32768, 128, 768, 2048))


class MoeShape(NamedTuple):
    """One launch: rows of x, experts, N, K (a multiple of 32), and C's row stride in elements."""

    rows: int
    experts: int
    n: int
    k: int
    stride: int


class MoeChoice(NamedTuple):
    """processors: of the device; tiler: what numbers the kernel's tiles, None where that is not compiled."""

    kernel: Kernel
    config: MoeConfig
    processors: int
    tiler: Kernel | None = None


# ---- kernels ----


def shipped(arch: str = "sm_100a") -> list[MoeSpec]:
    """Every kernel that multiplies and that the dispatch can choose on one architecture."""
    found: dict[MoeSpec, None] = {}
    for out in (torch.float16, torch.bfloat16):
        for typical in _TYPICAL:
            found |= dict.fromkeys(MoeSpec.of(c, out, arch) for c in moe_candidates(typical))
    return list(found)


def shipped_tiles(arch: str = "sm_100a") -> list[TileSpec]:
    """What numbers their tiles."""
    return [TileSpec(tile_n, arch) for tile_n in sorted({spec.config.tile_n for spec in shipped(arch)})]


def all_shipped(arch: str) -> list[store.Spec]:
    """Every Blackwell kernel that the dispatch can choose: those of `launch`, too."""
    return [*launch.shipped(arch=arch), *shipped(arch), *shipped_tiles(arch)]


@cache
def _kernel(spec: MoeSpec | TileSpec) -> Kernel | None:
    found = store.find(spec)
    return None if found is None else made_kernel(spec, *found)


def made_kernel(spec: MoeSpec | TileSpec, cubin: bytes, description: dict[str, Any]) -> Kernel:
    """The kernel of a cubin, as its builder described it."""
    if isinstance(spec, TileSpec):
        return Kernel(cubin, description, TILE_PARAMETERS)
    return Kernel(cubin, description, [f"{size}s" for size in PARAMETERS], cluster=(spec.config.ctas, 1, 1))


def available(out: torch.dtype, device: torch.device) -> bool:
    """Whether any kernel for that output type and device is packaged or cached."""
    arch = launch.architecture(device)
    specs = [] if arch is None else [s for s in shipped(arch) if s == MoeSpec.of(s.config, out, arch)]
    return any(_kernel(spec) is not None for spec in specs)


def load(weight: NVFP4Tensor) -> None:
    """Load every kernel onto the device of `weight`, so that no later call has to, nor a captured graph."""
    arch = launch.architecture(weight.device) or ""
    for spec in (*shipped(arch), *shipped_tiles(arch)):
        kernel = _kernel(spec)
        if kernel is not None:
            kernel.load(weight.codes.get_device())


def forget() -> None:
    """Look for kernels again at the next use, for those that were made since."""
    _kernel.cache_clear()
    _plans.clear()


def choice(problem: GroupedProblem, out: Tensor, config: MoeConfig | None = None) -> MoeChoice:
    """The best kernel that is packaged or cached for the device of `out`, or the one of `config`.

    Raises UnsupportedError for another architecture, a configuration or problem that is not legal, and without a kernel.
    """
    arch = launch.architecture(out.device)
    if arch is None:
        raise UnsupportedError(f"Blackwell kernels need a GPU of compute capability 10.0 or 10.3, and this is {out.device}")
    problem = replace(problem, k=-(-problem.k // 32) * 32)  # as `launch.aligned`
    reason = launch.refusal(problem, out.device) if config is None else moe_legal(config, problem)
    if reason is not None:
        raise UnsupportedError(f"no Blackwell kernel for this problem: {reason}")
    for own in moe_candidates(problem) if config is None else (config,):
        kernel = _kernel(MoeSpec.of(own, out.dtype, arch))
        if kernel is not None:
            return MoeChoice(kernel, own, launch._processors(out.get_device()), _kernel(TileSpec(own.tile_n, arch)))
    raise UnsupportedError(f"no compiled Blackwell kernel for this problem; run glu4 compile --arch {arch}")


# ---- parameters ----


def moe_parameters(
    config: MoeConfig, shape: MoeShape, addresses: dict[str, int], flags: int, constants: tuple[float, float, float]
) -> list[bytes]:
    """Every parameter; the maps are encoded by the driver.

    addresses  of `ADDRESSES`
    flags      the kernel's (glu4.backends.blackwell.epilogue): IDENTITY, GATE_BIAS, UP_BIAS
    constants  alpha, beta and limit of the activation
    """
    rows, experts, n, k, stride = shape
    atoms = (-(-n // 128), -(-k // 64))
    # x's scales are laid out tile by tile, in whole atoms
    tiled = -(-most_tiles(rows, experts, config.tile_n) * config.tile_n // 128)
    c = config.grouped.mma
    maps: list[bytes] = []
    for name in ("gate", "x", "up"):
        i = int(name == "x")
        box = (c.tile_k, (c.tile_n if i else c.tile_m) // c.ctas)
        boxes = (256, *scale_box(c, i))
        if i:
            maps.append(_encode(_U4, addresses[name], (k, rows), (k // 2,), box, c.tile_k // 2))
            strides: tuple[int, ...] = (_ATOM_BYTES, _ATOM_BYTES * atoms[1])
            maps.append(_encode(_U16, addresses["scale_x"], (256, atoms[1], tiled), strides, boxes, 16))
        else:
            strides = (k // 2, n * k // 2)
            maps.append(_encode(_U4, addresses[name], (k, n, experts), strides, (*box, 1), c.tile_k // 2))
            strides = (_ATOM_BYTES, _ATOM_BYTES * atoms[1], _ATOM_BYTES * atoms[0] * atoms[1])
            dims = (256, atoms[1], atoms[0], experts)
            maps.append(_encode(_U16, addresses[f"scale_{name}"], dims, strides, (*boxes, 1), 16))
    extents = [struct.pack("=3i", n, k, experts), struct.pack("=3i", *atoms, experts)]
    extents += [struct.pack("=2i", rows, k), struct.pack("=2i", tiled, atoms[1])]
    words = [addresses["table"], addresses["out"], stride, *(addresses[name] for name in ADDRESSES[8:])]
    numbers = struct.pack("=ifffii", flags, *constants, n, k)
    return [
        _EMPTY, _EMPTY, *maps, *extents, *(struct.pack("=Q", w) for w in words),
        *(numbers[i : i + 4] for i in range(0, len(numbers), 4)),
    ]  # fmt: skip


class MoePlan:
    """Launches of one kernel on one device that differ in addresses alone."""

    def __init__(self, chosen: MoeChoice, shape: MoeShape, flags: int, constants: tuple[float, float, float]) -> None:
        self._chosen, self._shape, self._flags, self._constants = chosen, shape, flags, constants
        self._grid = chosen.config.grid(shape.rows, shape.experts, shape.n, chosen.processors)
        self._frames: list[Any] = []
        self._places: tuple[int, ...] = ()

    def launch(self, index: int, stream: int, addresses: Sequence[int]) -> None:
        """One launch on device `index`; addresses: in the order of ADDRESSES."""
        try:
            frame = self._frames.pop()  # one operation of the interpreter: no two threads get the same
        except IndexError:
            named = dict(zip(ADDRESSES, addresses, strict=True))
            values = moe_parameters(self._chosen.config, self._shape, named, self._flags, self._constants)
            frame = _Frame(self._chosen, self._grid, values)  # type: ignore[arg-type] # of which it reads the kernel
            # a tensor map begins with its address; C's stride comes between C and the global scales
            order = (*range(_MAPS, _MAPS + 6), _TABLE, _TABLE + 1, *range(_TABLE + 3, _TABLE + 8))
            self._places = tuple(frame.starts[p] // 8 for p in order)
        words = frame.words
        for place, address in zip(self._places, addresses, strict=True):
            words[place] = address
        words[_STREAM_AT // 8] = stream
        kernel = self._chosen.kernel
        kernel.load(index)
        kernel.run(index, frame, self._frames)


_plans: dict[tuple[Any, ...], MoePlan] = {}


def _plan(chosen: MoeChoice, out: torch.dtype, index: int, shape: MoeShape, flags: int, activation: Activation) -> MoePlan:
    """The plan of such launches on device `index`, remembered."""
    key = (chosen.config, out, index, shape, flags, activation)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _PLANS:
            _plans.clear()
        constants = (activation.alpha, activation.beta, activation.limit)
        found = _plans[key] = MoePlan(chosen, shape, flags, constants)
    return found


# ---- launching ----


def tiled(tiler: Kernel | None, tile_n: int, offsets: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(`moe_tokens.tile_table`, `moe_tokens.tiled_scales`) of offsets int32 `[E + 1]` and block scales `[rows, K / 16]`, in
    the device's current stream: one launch, or without a kernel some operations of torch."""
    rows, columns = scales.shape
    if tiler is None:
        table = tile_table(offsets, rows, tile_n)
        return table, tiled_scales(scales, table, tile_n)
    offsets, scales = offsets.contiguous(), scales if scales.stride(1) == 1 else scales.contiguous()
    experts, index = offsets.shape[0] - 1, offsets.get_device()
    most = most_tiles(rows, experts, tile_n)
    table = torch.empty((1 + most, RECORD), dtype=torch.int32, device=offsets.device)
    layout = SwizzledLayout(most * tile_n, columns)
    placed = torch.empty(layout.storage_shape, dtype=torch.float8_e4m3fn, device=offsets.device)
    addresses = (offsets.data_ptr(), scales.data_ptr(), table.data_ptr(), placed.data_ptr())
    sizes = (scales.stride(0), rows, experts, most, columns)
    grid = (layout.rest_rows * ATOM_ROWS // tile_n, 1, 1)
    tiler.launch(index, _C._cuda_getCurrentRawStream(index), grid, None, (*addresses, *sizes))
    return table, placed


def submit(
    chosen: MoeChoice,
    out: Tensor,
    x: NVFP4Tensor,
    scale_x: Tensor,
    table: Tensor,
    weights: tuple[NVFP4Tensor, NVFP4Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
) -> None:
    """One launch in the device's current stream.

    out      `[rows, N]`, elements of a row side by side; rows of no expert are left as they are
    x        `[rows, K]`, codes in rows as `with_aligned_rows` has them, of which the block scales are not read
    scale_x  of `moe_tokens.tiled_scales`; table: of `moe_tokens.tile_table`
    weights  gate and up `[E, N, K]` as `launch.prepared` gives them, with a global scale of each expert `[E]`
    biases   float32 `[E, N]`, dense, or None
    """
    gate, up = weights
    index, (rows, n), experts = out.get_device(), out.shape, gate.shape[0]
    shape = MoeShape(rows, experts, n, 2 * x.row_bytes, out.stride(0))
    scales = [x.global_scale.contiguous(), *(w.global_scale.expand(experts).contiguous() for w in weights)]
    flags = launch.flags_of(activation, False, False, *biases)
    unread = scales[0].data_ptr()
    addresses = (
        gate.codes.data_ptr(), gate.block_scale.data_ptr(), x.codes.data_ptr(), scale_x.data_ptr(), up.codes.data_ptr(),
        up.block_scale.data_ptr(), table.data_ptr(), out.data_ptr(), *(s.data_ptr() for s in scales),
        *(unread if b is None else b.data_ptr() for b in biases),
    )  # fmt: skip
    stream = _C._cuda_getCurrentRawStream(index)
    _plan(chosen, out.dtype, index, shape, flags, activation).launch(index, stream, addresses)


def _rows(x: NVFP4Tensor) -> NVFP4Tensor:
    """`x` with codes as a tensor map addresses them; nothing is copied of what is so."""
    x = x.with_aligned_rows()
    codes = launch._addressable(x.codes, True)
    return x if codes is x.codes else _unchecked(codes, x.block_scale, x.global_scale).with_aligned_rows()


def grouped(
    out: Tensor,
    x: NVFP4Tensor,
    weights: tuple[NVFP4Tensor, NVFP4Tensor],
    offsets: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    problem: GroupedProblem,
    config: MoeConfig | None = None,
) -> None:
    """Fill the rows of `out [rows, N]` before the last offset from x `[rows, K]`, sorted by expert, with linear block scales.

    weights  gate and up `[E, N, K]`; biases: `[E, N]`, or None
    offsets  int32 `[E + 1]`, which the host does not read
    config   insists on one kernel

    Operands that are not in the kernel's form are copied. Raises UnsupportedError as `choice` does.
    """
    if out.numel() == 0 or weights[0].shape[0] == 0:
        return
    chosen = choice(problem, out, config)
    if out.stride(-1) != 1:
        dense_out = out.clone(memory_format=torch.contiguous_format)  # rows of no expert keep what they hold
        grouped(dense_out, x, weights, offsets, biases, activation, problem, config)
        out.copy_(dense_out)
        return
    table, scale_x = tiled(chosen.tiler, chosen.config.tile_n, offsets, x.block_scale)
    gate, up = (launch.prepared(w) for w in weights)
    gate_bias, up_bias = (None if b is None else b.to(torch.float32).contiguous() for b in biases)
    submit(chosen, out, _rows(x), scale_x, table, (gate, up), (gate_bias, up_bias), activation)
