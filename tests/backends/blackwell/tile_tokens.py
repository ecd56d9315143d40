"""The kernel that numbers the tiles of a mixture of experts, run in the emulator as the package's own code launches it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backends.blackwell.exported import ExportedKernel
from backends.blackwell.grouped import recording
from glu4.backends.blackwell import moe_launch
from glu4.backends.blackwell.moe_tokens import tile_table, tiled_scales
from glu4.emulator.capture import describe
from glu4.emulator.launch import Result, emulate
from glu4.emulator.program import Program

E4M3 = torch.float8_e4m3fn
UNWRITTEN = 0xA5


@dataclass(frozen=True, eq=False)
class TileCall:
    """One launch. offsets `[E + 1]`; scales `[rows, columns]`, any bytes, rows `stride` bytes apart from `start` on.

    unsorted  of a kernel that gathers: order int64 `[T, top_k]` and codes `[T, bytes]`; scales are `[T, columns]` then
    """

    kernel: ExportedKernel
    offsets: Sequence[int]
    scales: Tensor
    stride: int | None = None
    start: int = 0
    unsorted: tuple[Tensor, Tensor] | None = None

    @property
    def tile_n(self) -> int:
        return int(self.kernel.spec.tile_n)  # type: ignore[union-attr]

    @cached_property
    def memory(self) -> dict[str, Tensor]:
        rows, columns = self.scales.shape
        stride = self.stride or columns
        held = torch.full((self.start + rows * stride,), UNWRITTEN, dtype=torch.uint8)
        placed = held.as_strided((rows, columns), (stride, 1), self.start)
        placed.copy_(self.scales)
        found = {"offsets": torch.tensor(self.offsets, dtype=torch.int32), "scales": held, "rows": placed}
        if self.unsorted is not None:
            order, codes = self.unsorted
            found |= {"order": order, "codes": codes, "found": codes.new_empty((order.numel(), codes.shape[1]))}
        return found

    def run(
        self, program: Program | None = None, ctas: Sequence[int] | None = None, change: Any = lambda d: None, **options: Any
    ) -> tuple[Result, Tensor, Tensor]:
        """(result, table, scales in 128x4 layout), both UNWRITTEN where nothing was written."""
        memory = self.memory
        with recording() as recorder:
            recorder.remember(self.kernel.cubin, self.kernel.ptx)
            spec: Any = self.kernel.spec
            made = moe_launch.made_kernel(spec, self.kernel.cubin, self.kernel.description)
            with torch.no_grad(), _streams():
                index = None if self.unsorted is None else (memory["order"], memory["codes"], memory["found"])
                table, placed = moe_launch.tiled(made, self.tile_n, memory["offsets"], memory["rows"].view(E4M3), index)
        ((_, launched),) = recorder.launches
        written = {"table": table.fill_(UNWRITTEN), "tiled": placed.view(torch.uint8).fill_(UNWRITTEN)}
        if self.unsorted is not None:
            written["found"] = memory["found"].fill_(UNWRITTEN)
        held = {name: t for name, t in memory.items() if name not in ("rows", "found")} | written
        buffers = {name: (t.data_ptr(), t.numel() * t.element_size()) for name, t in held.items()}
        description = describe(launched, buffers) | {"dependent": list(buffers)}
        if ctas is not None:
            description["ctas"] = [[cta, 0, 0] for cta in ctas]
        change(description)
        result = emulate(program or self.kernel.program, description, {n: t.numpy() for n, t in held.items()}, **options)
        found = {name: torch.from_numpy(result.buffers[name]) for name in written}
        if self.unsorted is not None:
            memory["found"].copy_(found["found"])
        return result, found["table"], found["tiled"]

    def expected(self) -> tuple[Tensor, Tensor]:
        """By the torch twin."""
        scales = self.scales if self.unsorted is None else self.scales[self.sources]
        table = tile_table(self.memory["offsets"], scales.shape[0], self.tile_n)
        return table, tiled_scales(scales.view(E4M3), table, self.tile_n).view(torch.uint8)

    @property
    def sources(self) -> Tensor:
        """Which token each row of the work is."""
        assert self.unsorted is not None
        return self.unsorted[0].flatten() // self.unsorted[0].shape[1]

    def expected_codes(self) -> Tensor:
        """Rows of no expert, wherever they are, keep what they hold."""
        assert self.unsorted is not None
        rows = self.unsorted[0].numel()
        ends = [min(max(o, 0), rows) for o in self.offsets]
        found = torch.full((rows, self.unsorted[1].shape[1]), UNWRITTEN, dtype=torch.uint8)
        for begin, end in itertools.pairwise(ends):
            found[begin:end] = self.unsorted[1][self.sources[begin:end]]
        return found


def _streams() -> Any:
    """torch's current stream, on a machine without CUDA."""
    from unittest.mock import patch

    return patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True)
