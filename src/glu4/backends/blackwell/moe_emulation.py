"""Run the Blackwell kernels for mixtures of experts in the emulator, with the launches of CuTe DSL's own host code. No GPU is
needed; a C compiler is (`emulation`).

First what numbers tiles and lays out scales, then what multiplies, with the memory that the first has left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.backends.blackwell.emulation import _APART, _BASE, Exported, export
from glu4.backends.blackwell.launch import flags_of
from glu4.backends.blackwell.moe_config import MoeConfig, most_tiles
from glu4.backends.blackwell.moe_launch import addresses_of
from glu4.backends.blackwell.moe_spec import MoeSpec, TileSpec
from glu4.emulator.capture import capture, describe, pointer, scalar
from glu4.emulator.launch import Result, emulate
from glu4.nvfp4 import NVFP4Tensor
from glu4.scale_layout import SwizzledLayout

__all__ = ["ExpertCall", "ExportedExperts", "Ran"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class ExpertCall:
    """One call: tokens x `[rows, K]`, sorted by expert, with linear scales; weights gate and up, or one, `[E, N, K]`; K a
    multiple of 32; of each a bias `[E, N]` or None; offsets int32 `[E + 1]`."""

    x: NVFP4Tensor
    weights: tuple[NVFP4Tensor, ...]
    biases: tuple[Tensor | None, ...]
    offsets: Tensor
    activation: Activation


class Ran(NamedTuple):
    """What both kernels did. out: `[rows, N]`, with what it held where nothing was written."""

    tiles: Result
    products: Result
    out: Tensor


def _launch(made: Exported, arguments: list[Any], buffers: Mapping[str, Array], pdl: bool) -> dict[str, Any]:
    """The launch description; a string among the arguments is the buffer of that name."""
    places = {name: (_BASE + i * _APART, array.nbytes) for i, (name, array) in enumerate(buffers.items())}
    given = [pointer(places[a][0]) if isinstance(a, str) else a for a in arguments]
    (launch,) = capture(made._file(".o"), made.ptx, given)
    return describe(launch, places) | ({"dependent": list(buffers)} if pdl else {})


class ExportedExperts:
    """A kernel that multiplies and the one that numbers its tiles, compiled into `directory`.

    Raises UnsupportedError with the compiler's message.
    """

    def __init__(self, spec: MoeSpec, directory: Path) -> None:
        self.spec = spec
        found = export([spec, TileSpec(spec.config.tile_n, spec.arch)], directory)  # type: ignore[list-item] # names and builder
        self.kernel, self.tiler = found

    @property
    def config(self) -> MoeConfig:
        return self.spec.config

    def run(self, call: ExpertCall, out: Array, processors: int = 148, **options: Any) -> Ran:
        """out: uint16 `[rows, N]`; processors: that the device of a persistent kernel has; options: the emulator's."""
        rows, n = out.shape
        experts, k, most = call.offsets.numel() - 1, call.x.k, most_tiles(rows, call.offsets.numel() - 1, self.config.tile_n)
        columns = k // 16
        atoms = SwizzledLayout(most * self.config.tile_n, columns)
        first: dict[str, Array] = {
            "offsets": call.offsets.numpy(),
            "scales": call.x.block_scale.contiguous().view(torch.uint8).numpy(),
            "table": np.full((1 + most, 4), -1, np.int32),
            "tiled": np.full(atoms.nbytes, 0xFF, np.uint8),
        }
        # two numbers of a gather, which this kernel does not read
        numbers = [scalar("i64", columns), *(scalar("i32", v) for v in (rows, experts, most, columns, 0, 0)), pointer(0)]
        tiles = emulate(self.tiler.program, _launch(self.tiler, [*first, *numbers], first, True), first, **options)
        memory = self._memory(call, out) | {"table": tiles.buffers["table"], "scale_x": tiles.buffers["tiled"]}
        names = addresses_of(self.config)
        memory = {name: memory[name] for name in names}
        a = call.activation
        flags = flags_of(a, False, False, *call.biases, *[None] * (2 - len(call.biases)))
        arguments: list[Any] = [*(name for name in names if name != "out"), "out", scalar("i64", n), scalar("i32", flags)]
        arguments += [scalar("f32", v) for v in (a.alpha, a.beta, a.limit)]
        arguments += [scalar("i32", v) for v in (processors, rows, most, n, k, experts)] + [pointer(0)]
        launch = _launch(self.kernel, arguments, memory, self.config.pdl)
        products = emulate(self.kernel.program, launch, memory, **options)
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[self.spec.out]
        return Ran(tiles, products, torch.from_numpy(products.buffers["out"].view(np.int16)).view(dtype))

    def _memory(self, call: ExpertCall, out: Array) -> dict[str, Array]:
        """All but what the first kernel writes."""
        found: dict[str, Array] = {"x": call.x.codes.contiguous().numpy(), "out": out}
        found["global_x"] = call.x.global_scale.reshape(1).numpy()
        for name, weight, bias in zip(("gate", "up"), call.weights, call.biases):
            whole = weight.to_swizzled()
            found[name] = whole.codes.contiguous().numpy()
            found[f"scale_{name}"] = whole.block_scale.contiguous().view(torch.uint8).flatten().numpy()
            found[f"global_{name}"] = weight.global_scale.expand(weight.shape[0]).contiguous().numpy()
            found[f"{name}_bias"] = (torch.zeros(1) if bias is None else bias.float().contiguous()).numpy()
        return found
