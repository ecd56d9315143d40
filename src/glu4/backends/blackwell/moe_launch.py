"""Run mixtures of experts on a Blackwell device: one launch for all experts, nothing read back by the host.

Executed in emulation only so far: no such GPU was at hand. Before the kernel another one numbers its tiles and lays out the
tokens' scales (`moe_tile_tokens`; where it is not compiled, the torch operations of `moe_tokens`). CuTe DSL's host code of
`moe_gemm` passes, one after the other: both tiled MMAs (nothing in them), six tensor maps, or four of one matrix an expert;
extents of codes and scales of the weights and of x; the table, C, its row stride, global scales, biases; flags, constants of
the activation, N and K. Tests compare.
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
from glu4.nvfp4 import NVFP4Tensor, _unchecked, gather_rows
from glu4.problem import GroupedProblem
from glu4.scale_layout import ATOM_ROWS, SwizzledLayout

__all__ = [
    "GATHER_PARAMETERS",
    "TILE_PARAMETERS",
    "MoeChoice",
    "MoePlan",
    "MoeShape",
    "addresses_of",
    "all_shipped",
    "available",
    "forget",
    "grouped",
    "load",
    "moe_parameters",
    "parameters_of",
    "shipped",
    "shipped_tiles",
    "submit",
    "tiled",
]

_C = torch._C
_ADDRESSES = (
    "gate", "scale_gate", "x", "scale_x", "up", "scale_up", "table", "out", "global_x", "global_gate", "global_up",
    "gate_bias", "up_bias",
)  # fmt: skip
_OF_UP = ("up", "scale_up", "global_up", "up_bias")
# of the kernel that numbers tiles, as `struct` packs them; then of the one that gathers, too
TILE_PARAMETERS = ("Q", "Q", "Q", "Q", "q", "i", "i", "i", "i")
GATHER_PARAMETERS = (*TILE_PARAMETERS, "Q", "Q", "Q", "i", "i")
_MAPS, _EXTENTS = 2, 4  # number of the first map among the parameters; extents behind the maps
_ATOM_BYTES = 512  # of block scales (glu4.scale_layout)
_PLANS = 1 << 12
# means of rows over experts whose candidates are the kernels that are compiled ahead
_TYPICAL = (GroupedProblem(128, 128, 768, 2048), GroupedProblem(8192, 128, 768, 2048), GroupedProblem(32768, 128, 768, 2048))


def addresses_of(config: MoeConfig) -> tuple[str, ...]:
    """What a launch reads and writes, in the order of its parameters; of one matrix an expert, it is called gate."""
    return tuple(name for name in _ADDRESSES if config.gated or name not in _OF_UP)


def parameters_of(config: MoeConfig) -> tuple[int, ...]:
    """Bytes of each parameter: MMAs, maps, extents, addresses with C's stride among them, and numbers."""
    names = addresses_of(config)
    maps = names.index("table")
    return (12, 12, *[_MAP_BYTES] * maps, 12, 12, 8, 8, *[8] * (len(names) - maps + 1), *[4] * 6)


class MoeShape(NamedTuple):
    """One launch: rows of x, experts, N, K (a multiple of 32), and C's row stride in elements."""

    rows: int
    experts: int
    n: int
    k: int
    stride: int


class MoeChoice(NamedTuple):
    """processors: of the device; tiler: what numbers the kernel's tiles, gatherer: what gathers too, None if not compiled."""

    kernel: Kernel
    config: MoeConfig
    processors: int
    tiler: Kernel | None = None
    gatherer: Kernel | None = None


# ---- kernels ----


def shipped(arch: str = "sm_100a", gated: bool | None = None) -> list[MoeSpec]:
    """Every kernel that multiplies and that the dispatch can choose on one architecture; of one operation if `gated` says."""
    found: dict[MoeSpec, None] = {}
    for own in (True, False) if gated is None else (gated,):
        for out in (torch.float16, torch.bfloat16):
            for typical in _TYPICAL:
                problem = replace(typical, operation="grouped_dual_gemm" if own else "grouped_linear")
                found |= dict.fromkeys(MoeSpec.of(c, out, arch) for c in moe_candidates(problem))
    return list(found)


def shipped_tiles(arch: str = "sm_100a") -> list[TileSpec]:
    """What numbers their tiles."""
    sizes = sorted({spec.config.tile_n for spec in shipped(arch)})
    return [TileSpec(tile_n, arch, gather) for gather in (False, True) for tile_n in sizes]


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
        return Kernel(cubin, description, GATHER_PARAMETERS if spec.gather else TILE_PARAMETERS)
    return Kernel(cubin, description, [f"{size}s" for size in parameters_of(spec.config)], cluster=(spec.config.ctas, 1, 1))


def available(out: torch.dtype, device: torch.device, gated: bool = True) -> bool:
    """Whether any kernel for that output type, operation and device is packaged or cached."""
    arch = launch.architecture(device)
    specs = [] if arch is None else [s for s in shipped(arch, gated) if s == MoeSpec.of(s.config, out, arch)]
    return any(_kernel(spec) is not None for spec in specs)


def load(weight: NVFP4Tensor, gated: bool = True) -> None:
    """Load every kernel of an operation onto the device of `weight`, so that no later call has to, nor a captured graph."""
    arch = launch.architecture(weight.device) or ""
    for spec in (*shipped(arch, gated), *shipped_tiles(arch)):
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
            tilers = [_kernel(TileSpec(own.tile_n, arch, gather)) for gather in (False, True)]
            return MoeChoice(kernel, own, launch._processors(out.get_device()), *tilers)
    raise UnsupportedError(f"no compiled Blackwell kernel for this problem; run glu4 compile --arch {arch}")


# ---- parameters ----


def moe_parameters(
    config: MoeConfig, shape: MoeShape, addresses: dict[str, int], flags: int, constants: tuple[float, float, float]
) -> list[bytes]:
    """Every parameter; the maps are encoded by the driver.

    addresses  of `addresses_of`
    flags      the kernel's (glu4.backends.blackwell.epilogue): IDENTITY, GATE_BIAS, UP_BIAS
    constants  alpha, beta and limit of the activation
    """
    rows, experts, n, k, stride = shape
    atoms = (-(-n // 128), -(-k // 64))
    # x's scales are laid out tile by tile, in whole atoms
    tiled = -(-most_tiles(rows, experts, config.tile_n) * config.tile_n // 128)
    c = config.grouped.mma
    maps: list[bytes] = []
    for name in ("gate", "x", "up")[: 2 + config.gated]:
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
    rest = addresses_of(config)[len(maps) :]  # the table and C come first
    words = [addresses[name] for name in rest]
    words.insert(2, stride)
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
        """One launch on device `index`; addresses: in the order of `addresses_of`."""
        try:
            frame = self._frames.pop()  # one operation of the interpreter: no two threads get the same
        except IndexError:
            names = addresses_of(self._chosen.config)
            named = dict(zip(names, addresses, strict=True))
            values = moe_parameters(self._chosen.config, self._shape, named, self._flags, self._constants)
            frame = _Frame(self._chosen, self._grid, values)  # type: ignore[arg-type] # of which it reads the kernel
            # a tensor map begins with its address; C's stride comes between C and the global scales
            maps = names.index("table")
            table = _MAPS + maps + _EXTENTS
            order = (*range(_MAPS, _MAPS + maps), table, table + 1, *range(table + 3, table + 1 + len(names) - maps))
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


def tiled(
    tiler: Kernel | None, tile_n: int, offsets: Tensor, scales: Tensor, unsorted: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(`moe_tokens.tile_table`, `moe_tokens.tiled_scales`) of offsets int32 `[E + 1]` and block scales `[rows, K / 16]`, in
    the device's current stream: one launch, or without a kernel some operations of torch.

    unsorted  (order int64 `[T, top_k]`, codes `[T, bytes]`, found `[rows, bytes]`), for a kernel that gathers: scales are
              `[T, K / 16]`, and found is filled with the codes of row order[r] // top_k; bytes are a multiple of 16
    """
    rows, columns = scales.shape if unsorted is None else (unsorted[0].numel(), scales.shape[1])
    if tiler is None:
        assert unsorted is None
        table = tile_table(offsets, rows, tile_n)
        return table, tiled_scales(scales, table, tile_n)
    offsets, scales = offsets.contiguous(), scales if scales.stride(1) == 1 else scales.contiguous()
    experts, index = offsets.shape[0] - 1, offsets.get_device()
    most = most_tiles(rows, experts, tile_n)
    table = torch.empty((1 + most, RECORD), dtype=torch.int32, device=offsets.device)
    layout = SwizzledLayout(most * tile_n, columns)
    placed = torch.empty(layout.storage_shape, dtype=torch.float8_e4m3fn, device=offsets.device)
    addresses = (offsets.data_ptr(), scales.data_ptr(), table.data_ptr(), placed.data_ptr())
    sizes = [scales.stride(0), rows, experts, most, columns]
    if unsorted is not None:
        sizes += [*(t.data_ptr() for t in unsorted), unsorted[0].shape[1], unsorted[1].shape[1]]
    grid = (layout.rest_rows * ATOM_ROWS // tile_n, 1, 1)
    tiler.launch(index, _C._cuda_getCurrentRawStream(index), grid, None, (*addresses, *sizes))
    return table, placed


def submit(
    chosen: MoeChoice,
    out: Tensor,
    x: NVFP4Tensor,
    scale_x: Tensor,
    table: Tensor,
    weights: tuple[NVFP4Tensor, ...],
    biases: tuple[Tensor | None, ...],
    activation: Activation,
) -> None:
    """One launch in the device's current stream.

    out      `[rows, N]`, elements of a row side by side; rows of no expert are left as they are
    x        `[rows, K]`, codes in rows as `with_aligned_rows` has them, of which the block scales are not read
    scale_x  of `moe_tokens.tiled_scales`; table: of `moe_tokens.tile_table`
    weights  gate and up, or one, `[E, N, K]` as `launch.prepared` gives them, with a global scale of each expert `[E]`
    biases   of each float32 `[E, N]`, dense, or None
    """
    index, (rows, n), experts = out.get_device(), out.shape, weights[0].shape[0]
    shape = MoeShape(rows, experts, n, 2 * x.row_bytes, out.stride(0))
    scales = [x.global_scale.contiguous(), *(w.global_scale.expand(experts).contiguous() for w in weights)]
    flags = launch.flags_of(activation, False, False, *biases, *[None] * (2 - len(biases)))
    unread = scales[0].data_ptr()
    gate, *up = ((w.codes.data_ptr(), w.block_scale.data_ptr()) for w in weights)
    addresses = (
        *gate, x.codes.data_ptr(), scale_x.data_ptr(), *(a for pair in up for a in pair), table.data_ptr(), out.data_ptr(),
        *(s.data_ptr() for s in scales), *(unread if b is None else b.data_ptr() for b in biases),
    )  # fmt: skip
    stream = _C._cuda_getCurrentRawStream(index)
    _plan(chosen, out.dtype, index, shape, flags, activation).launch(index, stream, addresses)


def _rows(x: NVFP4Tensor) -> NVFP4Tensor:
    """`x` with codes as a tensor map addresses them; nothing is copied of what is so."""
    x = x.with_aligned_rows()
    codes = launch._addressable(x.codes, True)
    return x if codes is x.codes else _unchecked(codes, x.block_scale, x.global_scale).with_aligned_rows()


def _arranged(chosen: MoeChoice, x: NVFP4Tensor, offsets: Tensor, order: Tensor | None) -> tuple[NVFP4Tensor, Tensor, Tensor]:
    """(tokens by expert, whose scales are not read, their tiles, their scales by tiles); order: as for `grouped`."""
    tile_n = chosen.config.tile_n
    if order is None or chosen.gatherer is None:
        if order is not None:
            gathered = gather_rows(x, order)
            assert isinstance(gathered, NVFP4Tensor)
            x = gathered
        return _rows(x), *tiled(chosen.tiler, tile_n, offsets, x.block_scale)
    x, order, used = _rows(x), order.contiguous(), x.k // 2
    whole = x.codes.as_strided((x.shape[0], x.row_bytes), (x.row_bytes, 1))
    found = whole.new_empty((order.numel(), x.row_bytes))
    table, scales = tiled(chosen.gatherer, tile_n, offsets, x.block_scale, (order, whole, found))
    return _unchecked(found[:, :used], x.block_scale, x.global_scale), table, scales


def grouped(
    out: Tensor,
    x: NVFP4Tensor,
    weights: tuple[NVFP4Tensor, ...],
    offsets: Tensor,
    biases: tuple[Tensor | None, ...],
    activation: Activation,
    problem: GroupedProblem,
    config: MoeConfig | None = None,
    order: Tensor | None = None,
) -> None:
    """Fill the rows of `out [rows, N]` before the last offset from x `[rows, K]`, sorted by expert, with linear block scales.

    weights  gate and up, or one matrix, `[E, N, K]`; biases: of each `[E, N]`, or None
    offsets  int32 `[E + 1]`, which the host does not read
    config   insists on one kernel
    order    int64 `[T, top_k]`: x is `[T, K]`, and row r of the work is its row order[r] // top_k

    Operands that are not in the kernel's form are copied. Raises UnsupportedError as `choice` does.
    """
    if out.numel() == 0 or weights[0].shape[0] == 0:
        return
    chosen = choice(problem, out, config)
    if out.stride(-1) != 1:
        dense_out = out.clone(memory_format=torch.contiguous_format)  # rows of no expert keep what they hold
        grouped(dense_out, x, weights, offsets, biases, activation, problem, config, order)
        out.copy_(dense_out)
        return
    x, table, scale_x = _arranged(chosen, x, offsets, order)
    floats = tuple(None if b is None else b.to(torch.float32).contiguous() for b in biases)
    submit(chosen, out, x, scale_x, table, tuple(launch.prepared(w) for w in weights), floats, activation)
