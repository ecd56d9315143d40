"""A kernel that writes the grouped kernel's schedule down: `python grouped_schedule_dump.py CONFIG PTX_FILE`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from glu4.backends.hopper.grouped_config import GroupedConfig
from glu4.backends.hopper.grouped_schedule import Schedule

Int32 = cutlass.Int32


class Dump:
    """out [tiles, 6]: expert, row tile, first row, end, width and CTA of every tile."""

    def __init__(self, config: GroupedConfig) -> None:
        self.config, self.schedule = config, Schedule(config)

    @cute.jit
    def __call__(self, offsets: cute.Tensor, out: cute.Tensor, row_tiles: Int32, rows: Int32, ctas: Int32, stream: CUstream):
        c = self.config

        @cute.struct
        class Shared:
            starts: cute.struct.MemRange[Int32, c.max_experts + 1]
            order: cute.struct.MemRange[Int32, c.max_experts]
            scratch: cute.struct.MemRange[Int32, c.threads // 32 * c.notes]

        self.shared = Shared
        self.kernel(offsets, out, row_tiles, rows).launch(grid=(ctas, 1, 1), block=(c.threads, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, offsets: cute.Tensor, out: cute.Tensor, row_tiles: Int32, rows: Int32):
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        shared = SmemAllocator().allocate(self.shared)
        starts = shared.starts.get_tensor(cute.make_layout(c.max_experts + 1))
        order = shared.order.get_tensor(cute.make_layout(c.max_experts))
        scratch = shared.scratch.get_tensor(cute.make_layout((c.notes, c.threads // 32)))
        self.schedule.compute(offsets, rows, row_tiles, ctas, starts, order, scratch, thread)
        experts = offsets.shape[0] - 1
        tiles = starts[experts] * row_tiles
        if thread == 0:
            for turn in cutlass.range(cute.ceil_div(tiles, ctas), unroll=1):
                tile = self.schedule.tile(turn)
                if tile < tiles:
                    at = self.schedule.locate(starts, order, offsets, rows, experts, row_tiles, tile)
                    for i in cutlass.range_constexpr(5):
                        out[tile, i] = at[i]
                    out[tile, 5] = cta


def main() -> None:
    config: Any = eval(sys.argv[1])
    offsets = make_fake_tensor(Int32, (cute.sym_int(),), (1,), assumed_align=4)
    out = make_fake_tensor(Int32, (cute.sym_int(), 6), (6, 1), assumed_align=4)
    made = cute.compile(
        Dump(config), offsets, out, Int32(1), Int32(1), Int32(1), make_fake_stream(),
        options=f"--keep-ptx --dump-dir={Path(sys.argv[2]).parent}",
    )  # fmt: skip
    Path(sys.argv[2]).write_text(made.artifacts.PTX)


if __name__ == "__main__":
    main()
