"""A kernel that writes the grouped kernel's schedule down: `python grouped_schedule_dump.py CONFIG PTX_FILE [unclamped]`, the
last with a planted fault: offsets as they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from glu4.backends.hopper import grouped_schedule
from glu4.backends.hopper.grouped_config import GroupedConfig
from glu4.backends.hopper.grouped_schedule import PLAN_WORDS, Schedule

Int32 = cutlass.Int32


class Unclamped(grouped_schedule.Schedule):
    """A planted fault."""

    @cute.jit
    def clamped(self, offset, rows):
        return offset


class Dump:
    """out [ctas, turns, 9]: tile, first step, end, expert, row tile or row group, first row, end, width and row groups of every
    piece of every CTA."""

    def __init__(self, config: GroupedConfig) -> None:
        self.config, self.schedule = config, Unclamped(config) if "unclamped" in sys.argv[3:] else Schedule(config)

    @cute.jit
    def __call__(self, offsets: cute.Tensor, out: cute.Tensor, row_tiles: Int32, rows: Int32, steps: Int32, stream: CUstream):
        c = self.config

        @cute.struct
        class Shared:
            starts: cute.struct.MemRange[Int32, c.max_experts + 1]
            costs: cute.struct.MemRange[Int32, c.max_experts + 1]
            order: cute.struct.MemRange[Int32, c.max_experts]
            bounds: cute.struct.MemRange[Int32, c.max_experts + 1]
            plan: cute.struct.MemRange[Int32, PLAN_WORDS]
            scratch: cute.struct.MemRange[Int32, c.threads // 32 * c.notes]

        self.shared = Shared
        grid = (out.shape[0], 1, 1)
        self.kernel(offsets, out, row_tiles, rows, steps).launch(grid=grid, block=(c.threads, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, offsets: cute.Tensor, out: cute.Tensor, row_tiles: Int32, rows: Int32, steps: Int32):
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        shared = SmemAllocator().allocate(self.shared)
        starts = shared.starts.get_tensor(cute.make_layout(c.max_experts + 1))
        costs = shared.costs.get_tensor(cute.make_layout(c.max_experts + 1))
        order = shared.order.get_tensor(cute.make_layout(c.max_experts))
        bounds = shared.bounds.get_tensor(cute.make_layout(c.max_experts + 1))
        plan = shared.plan.get_tensor(cute.make_layout(PLAN_WORDS))
        scratch = shared.scratch.get_tensor(cute.make_layout((c.notes, c.threads // 32)))
        experts = offsets.shape[0] - 1
        outputs = row_tiles * c.rows
        own = self.schedule.read(offsets, thread)
        self.schedule.fill(own, experts, rows, starts, costs, order, bounds, plan, scratch, outputs, row_tiles, steps, thread)
        if thread < 32:
            for turn in cutlass.range(cutlass.min(self.schedule.turns(plan), out.shape[1]), unroll=1):
                tile, first, end = self.schedule.piece(plan, turn, steps)
                if first < end:
                    if cutlass.const_expr(c.fit):
                        at = self.schedule.locate(starts, order, bounds, plan, experts, row_tiles, tile)
                    else:
                        at = (*self.schedule.locate_whole(starts, order, bounds, experts, row_tiles, tile), Int32(c.rows))
                    if thread == 0:
                        out[cta, turn, 0] = tile
                        out[cta, turn, 1] = first
                        out[cta, turn, 2] = end
                        for i in cutlass.range_constexpr(6):
                            out[cta, turn, 3 + i] = at[i]


def main() -> None:
    config: Any = eval(sys.argv[1])
    offsets = make_fake_tensor(Int32, (cute.sym_int(),), (1,), assumed_align=4)
    out = make_fake_tensor(Int32, (cute.sym_int(), cute.sym_int(), 9), (cute.sym_int(), 9, 1), assumed_align=4)
    made = cute.compile(
        Dump(config), offsets, out, Int32(1), Int32(1), Int32(1), make_fake_stream(),
        options=f"--keep-ptx --dump-dir={Path(sys.argv[2]).parent}",
    )  # fmt: skip
    Path(sys.argv[2]).write_text(made.artifacts.PTX)


if __name__ == "__main__":
    main()
