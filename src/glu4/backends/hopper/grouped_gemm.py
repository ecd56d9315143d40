"""sm90_grouped_dual_gemm: the gated product of a mixture of experts in one launch, for sm_90a in CuTe DSL. Device code.

Built of the dense kernel's parts (`dual_gemm`). What is new:

CTAs stay. Each goes through its share of all experts' tiles, and its producers run ahead across tiles, so that memory is busy
while a tile is finished.

Tiles fit. An expert's tokens are divided evenly into as few tiles as may be, and each product is as wide as the tile asks for,
in steps of `widths`: a wgmma takes time for every column of B, whether a token is there or not.

The schedule follows from `offsets` alone, on the device: every CTA computes the same one (`Schedule`). Experts are sorted by
the width of their tiles, widest first, and CTAs take turns at them in alternating order, so that who had a wide tile gets a
narrow one next. Tiles of an expert lie row tile by row tile, the token tiles of one beside each other: weights come from DRAM
once.

Rows beyond offsets[experts] are not written, and wrong offsets lead to no access outside x and out: each is clamped
to [0, rows].
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as sm90
from cuda.bindings.driver import CUstream
from cutlass import pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator

from glu4.backends.hopper.config import TILE_K, WARPGROUP
from glu4.backends.hopper.dual_gemm import DualGemm
from glu4.backends.hopper.grouped_config import PRODUCER_REGISTERS, GroupedConfig
from glu4.backends.hopper.grouped_schedule import Schedule
from glu4.backends.hopper.instructions import arrive_if, multiply_by_width
from glu4.backends.hopper.pack import UNIT_WORDS

Int32, Uint32, Float32 = cutlass.Int32, cutlass.Uint32, cutlass.Float32


class GroupedGemm(DualGemm):
    """Arguments at launch, besides the dense kernel's: weights int32 [experts, tiles, units, 576], offsets int32 [experts + 1],
    gate_scale and up_scale float32 [experts], biases float32 [experts, n], and `ctas`, how many of them stay."""

    def __init__(self, config: GroupedConfig, x_type: Any, out_type: Any) -> None:
        super().__init__(config.tile, x_type, out_type, dual=True)
        self.grouped = config
        self.schedule = Schedule(config)
        self.kind = "bf16" if self.brain else "f16"

    def token_layout(self, rows: int, count: int) -> Any:
        """Shared memory of `count` blocks of `rows` tokens by 64 of K, as wgmma reads them."""
        return sm90.make_smem_layout_b(utils.LayoutEnum.ROW_MAJOR, (64, rows, TILE_K), self.x_type, count)

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        weights: cute.Tensor,
        offsets: cute.Tensor,
        gate_scale: cute.Tensor,
        up_scale: cute.Tensor,
        x_scale: cute.Tensor,
        gate_bias: cute.Tensor,
        up_bias: cute.Tensor,
        flags: Int32,
        alpha: Float32,
        beta: Float32,
        limit: Float32,
        out: cute.Tensor,
        ctas: Int32,
        stream: CUstream,
    ):
        g, c = self.grouped, self.config
        units = cutlass.const_expr(g.stages * c.stage_units)
        boxes = self.token_layout(g.box, units * (c.tokens // g.box))
        one_box = cute.slice_(boxes, (None, None, 0))
        load_x, tokens = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), x, one_box, (g.box, TILE_K))

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, g.stages * 2]
            tokens: cute.struct.Align[cute.struct.MemRange[self.x_type, cute.cosize(boxes)], 1024]
            weights: cute.struct.Align[cute.struct.MemRange[Uint32, g.stages * c.stage_units * c.rows * UNIT_WORDS], 128]
            staging: cute.struct.Align[cute.struct.MemRange[Uint32, g.staging_bytes // 4], 16]
            starts: cute.struct.MemRange[Int32, g.max_experts + 1]
            order: cute.struct.MemRange[Int32, g.max_experts]
            scratch: cute.struct.MemRange[Int32, g.threads // 32 * g.notes]

        self.shared = Shared
        self.kernel(
            load_x, tokens, weights, offsets, gate_scale, up_scale, x_scale, gate_bias, up_bias, flags, alpha, beta, limit, out,
            boxes,
        ).launch(grid=(ctas, 1, 1), block=(g.threads, 1, 1), stream=stream, min_blocks_per_mp=1)  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        load_x: cute.CopyAtom,
        x: cute.Tensor,
        weights: cute.Tensor,
        offsets: cute.Tensor,
        gate_scale: cute.Tensor,
        up_scale: cute.Tensor,
        x_scale: cute.Tensor,
        gate_bias: cute.Tensor,
        up_bias: cute.Tensor,
        flags: Int32,
        alpha: Float32,
        beta: Float32,
        limit: Float32,
        out: cute.Tensor,
        boxes: cute.ComposedLayout,
    ):
        g, c = self.grouped, self.config
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)

        # ---- shared memory and barriers ----
        if warp == 0:
            cpasync.prefetch_descriptor(load_x)
        shared = SmemAllocator().allocate(self.shared)
        pipe = pipeline.PipelineTmaAsync.create(
            barrier_storage=shared.barriers.data_ptr(),
            num_stages=g.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * c.rows),
            tx_count=c.stage_bytes,
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        )
        stage_words = UNIT_WORDS * c.stage_units
        s_weights = shared.weights.get_tensor(
            cute.make_layout((stage_words, c.rows, g.stages), stride=(1, stage_words, c.rows * stage_words))
        )

        # ---- the schedule ----
        starts = shared.starts.get_tensor(cute.make_layout(g.max_experts + 1))
        order = shared.order.get_tensor(cute.make_layout(g.max_experts))
        scratch = shared.scratch.get_tensor(cute.make_layout((g.notes, g.threads // 32)))
        # everything follows from the offsets, which the kernel before this one may write
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        rows, experts = x.shape[0], weights.shape[0]
        row_tiles = cute.ceil_div(out.shape[1], c.rows * 32)
        ctas, _, _ = cute.arch.grid_dim()
        self.schedule.compute(offsets, rows, row_tiles, ctas, starts, order, scratch, thread)
        tiles = starts[experts] * row_tiles
        rounds = cute.ceil_div(tiles, ctas)
        steps = (weights.shape[2] + c.stage_units - 1) // c.stage_units

        if group == c.consumers:
            # ---- producers: weights, and tokens ----
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, g.stages)
            if warp == 4 * c.consumers:
                for turn in cutlass.range(rounds, unroll=1):
                    tile = self.schedule.tile(turn)
                    if tile < tiles:
                        at = self.schedule.locate(starts, order, offsets, rows, experts, row_tiles, tile)
                        expert, row_tile, width = at[0], at[1], at[4]
                        own = cute.make_tensor(
                            weights[(expert, 0, 0, None)].iterator,
                            cute.make_layout(weights.shape[1:], stride=weights.stride[1:]),
                        )
                        expected = g.weight_bytes + c.stage_units * self.boxes(width) * g.box_bytes
                        for k in cutlass.range(steps, unroll=1):
                            pipe.sync_object_empty.wait(state.index, state.phase)
                            with cute.arch.elect_one():
                                cute.arch.mbarrier_arrive_and_expect_tx(pipe.producer_get_barrier(state), expected)
                            self.load_weights(own, s_weights, pipe, state, row_tile, k)
                            state.advance()
                pipe.producer_tail(state)
            # a warp for each unit of a stage: one alone takes as long to issue copies as the products take
            for u in cutlass.range_constexpr(c.stage_units):
                if warp == 4 * c.consumers + 1 + u:
                    s_boxes = shared.tokens.get_tensor(boxes.outer, swizzle=boxes.inner)
                    for turn in cutlass.range(rounds, unroll=1):
                        tile = self.schedule.tile(turn)
                        if tile < tiles:
                            at = self.schedule.locate(starts, order, offsets, rows, experts, row_tiles, tile)
                            first, width = at[2], at[4]
                            g_tokens = cute.local_tile(cute.domain_offset((first, 0), x), (g.box, TILE_K), (None, None))
                            to_shared, from_global = cpasync.tma_partition(
                                load_x, 0, cute.make_layout(1), cute.group_modes(s_boxes, 0, 2),
                                cute.group_modes(g_tokens, 0, 2),
                            )  # fmt: skip
                            count = self.boxes(width)
                            for k in cutlass.range(steps, unroll=1):
                                pipe.sync_object_empty.wait(state.index, state.phase)
                                self.load_boxes(load_x, from_global, to_shared, pipe, state, k, u, count)
                                state.advance()
        if group < c.consumers:
            # ---- consumers: one row group each ----
            cute.arch.setmaxregister_increase(g.consumer_registers)
            lane = thread % WARPGROUP
            tokens = shared.tokens.data_ptr().toint()
            staging = shared.staging.data_ptr().toint()
            stage, phase = Int32(0), Int32(0)
            for turn in cutlass.range(rounds, unroll=1):
                tile = self.schedule.tile(turn)
                if tile < tiles:
                    at = self.schedule.locate(starts, order, offsets, rows, experts, row_tiles, tile)
                    expert, row_tile, first, end, width = at
                    own_out = cute.make_tensor(out.iterator, cute.make_layout((end, out.shape[1]), stride=out.stride))
                    own_gate = cute.make_tensor(gate_bias[(expert, None)].iterator, cute.make_layout(out.shape[1]))
                    own_up = cute.make_tensor(up_bias[(expert, None)].iterator, cute.make_layout(out.shape[1]))
                    row = row_tile * c.rows + group
                    sums = cute.make_rmem_tensor((c.tokens // 2,), Float32)
                    sums.fill(0.0)
                    before = stage
                    for k in cutlass.range(steps, unroll=1):
                        self.multiply_stage(width, pipe, s_weights, tokens, stage, phase, before, k > 0, group, lane, sums)
                        before = stage
                        stage += 1
                        if stage >= g.stages:
                            stage = Int32(0)
                            phase ^= 1
                    warpgroup.wait_group(0)
                    self.release(pipe, before, lane)
                    gate_factors = self.scales(gate_scale[expert], x_scale, flags)
                    up_factors = self.scales(up_scale[expert], x_scale, flags)
                    self.finish(
                        width, sums, gate_factors, up_factors, own_gate, own_up, flags, alpha, beta, limit, own_out, staging,
                        first, row, group, lane,
                    )  # fmt: skip

    # ---- main loop ----

    @cute.jit
    def multiply_stage(self, width, pipe, s_weights, tokens, stage, phase, before, any_before, group, lane, sums):
        """Decode and multiply one stage; release the stage before it once its products are done."""
        g, c = self.grouped, self.config
        even, odd = (cute.make_rmem_tensor((4 * g.steps,), Uint32) for _ in range(2))
        pipe.sync_object_full.wait(stage, phase)
        for u in cutlass.range_constexpr(c.stage_units):
            codes, scales = self.load_unit(s_weights, stage, group, lane, u)
            for part in cutlass.range_constexpr(0, 4, g.steps):
                fragment = even if cutlass.const_expr((4 * u + part) // g.steps % 2 == 0) else odd
                self.decode(codes, scales, fragment, part, g.steps)
                changed = multiply_by_width(
                    [sums[i] for i in range(c.tokens // 2)], [fragment[i] for i in range(4 * g.steps)],
                    tokens + (stage * c.stage_units + u) * (c.tokens * 128) + part * 32, width, g.widths, self.kind,
                )  # fmt: skip
                for i in cutlass.range_constexpr(c.tokens // 2):
                    sums[i] = changed[i]
                # all but the products just started: the other fragment and the stage before are free
                warpgroup.wait_group(1)
                if cutlass.const_expr(u == 0 and part == 0):
                    self.release_if(pipe, before, lane, any_before)

    @cute.jit
    def release_if(self, pipe, stage, lane, condition):
        """`release` where `condition` holds."""
        cute.arch.sync_warp()
        arriving = Int32(1) if condition & (lane % 32 == 0) else Int32(0)
        arrive_if(pipe.sync_object_empty.get_barrier(stage).toint(), arriving)

    # ---- copies ----

    @cute.jit
    def boxes(self, width):
        """How many tensor copies a tile of `width` tokens takes, for each 64 of K."""
        return (width + (self.grouped.box - 1)) // self.grouped.box

    @cute.jit
    def load_boxes(self, load_x, from_global, to_shared, pipe, state, k, unit: cutlass.Constexpr, count):
        """Start the tensor copies of the tokens of one unit of a stage."""
        g, c = self.grouped, self.config
        barrier = pipe.producer_get_barrier(state)
        first = (state.index * c.stage_units + unit) * (c.tokens // g.box)
        for i in cutlass.range_constexpr(c.tokens // g.box):
            if i < count:
                source = from_global[(None, i, k * c.stage_units + unit)]
                cute.copy(load_x, source, to_shared[(None, first + i)], tma_bar_ptr=barrier)

    # ---- epilogue ----

    @cute.jit
    def finish(
        self, width, sums, gate_factors, up_factors, gate_bias, up_bias, flags, alpha, beta, limit, out, staging, first, row,
        group, lane,
    ):  # fmt: skip
        """Outputs of one warpgroup's tile, a few tokens at a time."""
        staged = cutlass.const_expr(self.grouped.staged_tokens)
        for token in cutlass.range_constexpr(0, self.config.tokens, staged):
            if token < width:
                values = self.epilogue(
                    sums, gate_factors, up_factors, gate_bias, up_bias, flags, alpha, beta, limit, out.shape[1], row, lane,
                    token // 8, staged // 8,
                )  # fmt: skip
                # the warpgroup has read what it staged before
                cute.arch.barrier(barrier_id=2 + group, number_of_threads=WARPGROUP)
                self.store(values, out, staging, group, first + token, row, lane, staged)
