"""sm90_grouped_dual_gemm: the gated product of a mixture of experts in one launch, for sm_90a in CuTe DSL. Device code.

Built of the dense kernel's parts (`dual_gemm`). What is new:

CTAs stay. Each goes through its pieces of all experts' work, and its producers run ahead across pieces, so that memory is busy
while a tile is finished.

Tiles fit. An expert's tokens are divided evenly into as few tiles as may be, and each product is as wide as the tile asks for,
in steps of `widths`: a wgmma takes time for every column of B, whether a token is there or not.

Work fits. The schedule follows from `offsets` alone, on the device (`grouped_schedule`): whole tiles as long as many are left,
then equal parts of what remains, cut along K too. Who begins a tile leaves float32 sums in `partials` and raises a flag in
`ready`; who ends it adds them in a fixed order, from the end of K to its beginning, and puts the flag back.

Work begins early. Before the kernel in front has ended, which may write the offsets, those that lie in memory are taken for its
own: the schedule is computed, weights are sent for, and once it has ended tokens. Then the offsets are read again, past L1.
Where they have changed, what was sent is passed by unread, and all is done again.

Rows beyond offsets[experts] are not written, and wrong offsets lead to no access outside x and out: each is clamped
to [0, rows].

With `gather` tokens lie in x as they came, and the warps that load them find each row of the work in `order`, as the sort by
expert left it: an index a lane, handed round by shuffles, and pieces of 16 bytes by cp.async, which arrive at a barrier
once they are there. The consumers fence proxies, since cp.async is not of the async proxy that wgmma reads through (PTX ISA).
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
from glu4.backends.hopper.grouped_schedule import PLAN_WORDS, Schedule
from glu4.backends.hopper.instructions import (
    arrive_if,
    await_flag,
    copy_async,
    multiply_by_width,
    raise_flag,
    store_16_bytes,
    store_transposed,
)
from glu4.backends.hopper.pack import UNIT_WORDS

Boolean, Int32, Int64 = cutlass.Boolean, cutlass.Int32, cutlass.Int64
Uint32, Float32 = cutlass.Uint32, cutlass.Float32


class GroupedGemm(DualGemm):
    """Arguments at launch, besides the dense kernel's: weights int32 [experts, tiles, units, 576], offsets int32 [experts + 1],
    gate_scale and up_scale float32 [experts], biases float32 [experts, n]; partials float32 [ctas, rows x 64 x tokens], ready
    int32 [ctas, rows], zero before and after; `ctas`, how many of them stay; with `gather` order int64 [T, top_k] of x [T, k]:
    row r of the work, and of out [T * top_k, n], is x's row order[r] / top_k."""

    def __init__(self, config: GroupedConfig, x_type: Any, out_type: Any, dual: bool = True) -> None:
        super().__init__(config.tile, x_type, out_type, dual)
        self.outputs = 32 if dual else 64  # of a row group
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
        partials: cute.Tensor,
        ready: cute.Tensor,
        ctas: Int32,
        order: cute.Tensor | None,
        stream: CUstream,
    ):
        g, c = self.grouped, self.config
        units = cutlass.const_expr(g.stages * c.stage_units)
        boxes = self.token_layout(g.box, units * (c.tokens // g.box))
        load_x, tokens = None, x
        if cutlass.const_expr(not g.gather):
            one_box = cute.slice_(boxes, (None, None, 0))
            load_x, tokens = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), x, one_box, (g.box, TILE_K))

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, g.stages * 2]
            tokens: cute.struct.Align[cute.struct.MemRange[self.x_type, cute.cosize(boxes)], 1024]
            weights: cute.struct.Align[cute.struct.MemRange[Uint32, g.stages * c.stage_units * c.rows * UNIT_WORDS], 128]
            staging: cute.struct.Align[cute.struct.MemRange[Uint32, g.staging_bytes // 4], 16]
            starts: cute.struct.MemRange[Int32, g.max_experts + 1]
            costs: cute.struct.MemRange[Int32, g.max_experts + 1]
            order: cute.struct.MemRange[Int32, g.max_experts]
            bounds: cute.struct.MemRange[Int32, g.max_experts + 1]
            plan: cute.struct.MemRange[Int32, PLAN_WORDS]
            kept: cute.struct.Align[cute.struct.MemRange[Int32, 4 * 4 * c.rows], 16]

        self.shared = Shared
        self.kernel(
            load_x, tokens, weights, offsets, gate_scale, up_scale, x_scale, gate_bias, up_bias, flags, alpha, beta, limit, out,
            partials, ready, boxes, order,
        ).launch(grid=(ctas, 1, 1), block=(g.threads, 1, 1), stream=stream, min_blocks_per_mp=1)  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        load_x: cute.CopyAtom,  # None with `gather`
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
        partials: cute.Tensor,
        ready: cute.Tensor,
        boxes: cute.ComposedLayout,
        tokens_of: cute.Tensor | None,
    ):
        g, c = self.grouped, self.config
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)

        # ---- shared memory and barriers ----
        if cutlass.const_expr(not g.gather):
            if warp == 0:
                cpasync.prefetch_descriptor(load_x)
        shared = SmemAllocator().allocate(self.shared)
        pipe = pipeline.PipelineTmaAsync.create(
            barrier_storage=shared.barriers.data_ptr(),
            num_stages=g.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, g.producers),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * c.rows),
            tx_count=g.weight_bytes if g.gather else c.stage_bytes,
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        )
        stage_words = UNIT_WORDS * c.stage_units
        s_weights = shared.weights.get_tensor(
            cute.make_layout((stage_words, c.rows, g.stages), stride=(1, stage_words, c.rows * stage_words))
        )

        # ---- the schedule ----
        starts = shared.starts.get_tensor(cute.make_layout(g.max_experts + 1))
        costs = shared.costs.get_tensor(cute.make_layout(g.max_experts + 1))
        order = shared.order.get_tensor(cute.make_layout(g.max_experts))
        bounds = shared.bounds.get_tensor(cute.make_layout(g.max_experts + 1))
        plan = shared.plan.get_tensor(cute.make_layout(PLAN_WORDS))
        # notes of the warps lie where outputs will be staged
        notes = cute.make_tensor(
            cute.recast_ptr(shared.staging.data_ptr(), dtype=Int32), cute.make_layout((g.notes, g.threads // 32))
        )
        rows = cute.size(tokens_of) if cutlass.const_expr(g.gather) else x.shape[0]
        experts = weights.shape[0]
        outputs = cute.ceil_div(out.shape[1], self.outputs)
        row_tiles = cute.ceil_div(out.shape[1], c.rows * self.outputs)
        steps = (weights.shape[2] + c.stage_units - 1) // c.stage_units
        # all follows from the offsets, which the kernel in front may write: what they are now is taken for what they will be,
        # and once that kernel has ended all is done again if they have changed
        self.schedule.assume(plan, thread)
        own = self.schedule.read(offsets, thread)
        ahead, stale, looks = Int32(0), Boolean(False), Int32(0)
        while (looks == 0) | ((looks == 1) & stale):
            self.schedule.fill(own, experts, rows, starts, costs, order, bounds, plan, notes, outputs, row_tiles, steps, thread)
            if looks == 0:
                tile, first_step = Int32(0), Int32(0)
                if cutlass.const_expr(not g.gather):
                    ahead, tile, first_step = self.schedule.ahead(plan, steps, g.stages)
                    if (warp == 4 * c.consumers) & (ahead > 0):
                        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, g.stages)
                        at = self.located(starts, order, bounds, plan, experts, row_tiles, tile)
                        self.send_weights(weights, s_weights, pipe, state, plan, at, first_step, first_step + ahead)
                cute.arch.griddepcontrol_wait()
                cute.arch.griddepcontrol_launch_dependents()
                if cutlass.const_expr(not g.gather):
                    for u in cutlass.range_constexpr(c.stage_units):
                        if (warp == 4 * c.consumers + 1 + u) & (ahead > 0):
                            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, g.stages)
                            at = self.located(starts, order, bounds, plan, experts, row_tiles, tile)
                            s_boxes = shared.tokens.get_tensor(boxes.outer, swizzle=boxes.inner)
                            self.send_tokens(load_x, x, s_boxes, pipe, state, at, first_step, first_step + ahead, u)
                stale, own = self.schedule.changed(offsets, plan, own, thread)
            looks += 1
        turns = self.schedule.turns(plan)

        if group == c.consumers:
            # ---- producers: weights, and tokens ----
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            all_filled = ahead >= g.stages
            state = pipeline.PipelineState(
                g.stages, ahead, Int32(0) if all_filled else ahead, Int32(0) if all_filled else Int32(1)
            )
            sent = Int32(0) if stale else ahead  # of the first piece
            if warp == 4 * c.consumers:
                for turn in cutlass.range(turns, unroll=1):
                    tile, first_step, end_step = self.schedule.piece(plan, turn, steps)
                    if first_step < end_step:
                        at = self.located(starts, order, bounds, plan, experts, row_tiles, tile)
                        state = self.send_weights(weights, s_weights, pipe, state, plan, at, first_step + sent, end_step)
                        sent = Int32(0)
                pipe.producer_tail(state)
            # a warp for each unit of a stage: one alone takes as long to issue copies as the products take
            for u in cutlass.range_constexpr(c.stage_units):
                if cutlass.const_expr(g.gather):
                    if warp == 4 * c.consumers + 1 + u:
                        self.gather(
                            x, tokens_of, shared.tokens.data_ptr().toint(), pipe, state, starts, order, bounds, plan, experts,
                            row_tiles, steps, turns, u,
                        )  # fmt: skip
                elif warp == 4 * c.consumers + 1 + u:
                    s_boxes = shared.tokens.get_tensor(boxes.outer, swizzle=boxes.inner)
                    for turn in cutlass.range(turns, unroll=1):
                        tile, first_step, end_step = self.schedule.piece(plan, turn, steps)
                        if first_step < end_step:
                            at = self.located(starts, order, bounds, plan, experts, row_tiles, tile)
                            state = self.send_tokens(load_x, x, s_boxes, pipe, state, at, first_step + sent, end_step, u)
                            sent = Int32(0)
        if group < c.consumers:
            # ---- consumers: one row group each ----
            cute.arch.setmaxregister_increase(g.consumer_registers)
            lane = thread % WARPGROUP
            tokens = shared.tokens.data_ptr().toint()
            staging = shared.staging.data_ptr().toint() + group * (g.staging_bytes // c.rows)
            cta, _, _ = cute.arch.block_idx()
            stage, phase = Int32(0), Int32(0)
            if cutlass.const_expr(not g.gather):
                if stale:  # what is on its way is of no tile
                    stage, phase = self.pass_by(pipe, stage, phase, ahead, lane)
            for turn in cutlass.range(turns, unroll=1):
                tile, first_step, end_step = self.schedule.piece(plan, turn, steps)
                mine = first_step < end_step
                if cutlass.const_expr(g.fit):
                    if group >= self.schedule.groups(plan):
                        mine = False
                        stage, phase = self.pass_by(pipe, stage, phase, end_step - first_step, lane)
                if mine:
                    at = self.located(starts, order, bounds, plan, experts, row_tiles, tile)
                    width = cute.arch.make_warp_uniform(at[4])  # products branch by it
                    # the rest is not needed before the products are done, and registers are few
                    note = cute.make_tensor(
                        cute.make_ptr(
                            Int32, shared.kept.data_ptr().toint() + warp * 16, cute.AddressSpace.smem, assumed_align=16
                        ),
                        cute.make_layout(4),
                    )
                    cute.arch.sync_warp()  # all lanes have read that of the tile before
                    if lane % 32 == 0:
                        for i in cutlass.range_constexpr(4):
                            note[i] = at[i]
                    sums = cute.make_rmem_tensor((c.tokens // 2,), Float32)
                    sums.fill(0.0)
                    before = stage
                    for k in cutlass.range(end_step - first_step, unroll=1):
                        self.multiply_stage(width, pipe, s_weights, tokens, stage, phase, before, k > 0, group, lane, sums)
                        before = stage
                        stage += 1
                        if stage >= g.stages:
                            stage = Int32(0)
                            phase ^= 1
                    warpgroup.wait_group(0)
                    self.release(pipe, before, lane)
                    if end_step < steps:
                        self.leave(sums, partials, ready, cta, width, group, lane)
                    else:
                        tile, first_step, _ = self.schedule.piece(plan, turn, steps)
                        part, open_steps = cta, first_step
                        while open_steps > 0:
                            part -= 1
                            its_tile, its_step = self.schedule.cut(starts, costs, order, experts, row_tiles, steps, part)
                            its_step = its_step if its_tile == tile else Int32(0)
                            if its_step < open_steps:  # its piece is not empty
                                self.collect(sums, partials, ready, part, width, group, lane)
                            open_steps = its_step
                        cute.arch.sync_warp()
                        expert, row_tile, first, end = note[0], note[1], note[2], note[3]
                        own_out = cute.make_tensor(out.iterator, cute.make_layout((end, out.shape[1]), stride=out.stride))
                        own_gate = cute.make_tensor(gate_bias[(expert, None)].iterator, cute.make_layout(out.shape[1]))
                        own_up = cute.make_tensor(up_bias[(expert, None)].iterator, cute.make_layout(out.shape[1]))
                        gate_factors = self.scales(gate_scale[expert], x_scale, flags)
                        up_factors = self.scales(up_scale[expert], x_scale, flags)
                        self.finish(
                            width, sums, gate_factors, up_factors, own_gate, own_up, flags, alpha, beta, limit, own_out,
                            staging, first, (row_tile if g.fit else row_tile * c.rows) + group, group, lane,
                        )  # fmt: skip

    @cute.jit
    def located(self, starts, order, bounds, plan, experts, row_tiles, tile):
        """(expert, row tile or, where tiles fit, first row group, first token, end of tokens, width, row groups) of a tile."""
        if cutlass.const_expr(self.grouped.fit):
            at = self.schedule.locate(starts, order, bounds, plan, experts, row_tiles, tile)
        else:
            at = (*self.schedule.locate_whole(starts, order, bounds, experts, row_tiles, tile), self.config.rows)
        return at

    # ---- main loop ----

    @cute.jit
    def multiply_stage(self, width, pipe, s_weights, tokens, stage, phase, before, any_before, group, lane, sums):
        """Decode and multiply one stage; release the stage before it once its products are done."""
        g, c = self.grouped, self.config
        even, odd = (cute.make_rmem_tensor((4 * g.steps,), Uint32) for _ in range(2))
        pipe.sync_object_full.wait(stage, phase)
        if cutlass.const_expr(g.gather):
            cute.arch.fence_proxy("async.shared", space="cta")
        for u in cutlass.range_constexpr(c.stage_units):
            codes, scales = self.load_unit(s_weights, stage, group, lane, u)
            for part in cutlass.range_constexpr(0, 4, g.steps):
                fragment = even if cutlass.const_expr(g.sets == 1 or (4 * u + part) // g.steps % 2 == 0) else odd
                if cutlass.const_expr(g.sets == 1):
                    warpgroup.wait_group(0)
                    if cutlass.const_expr(u == 0 and part == 0):
                        self.release_if(pipe, before, lane, any_before)
                self.decode(codes, scales, fragment, part, g.steps)
                changed = multiply_by_width(
                    [sums[i] for i in range(c.tokens // 2)], [fragment[i] for i in range(4 * g.steps)],
                    tokens + (stage * c.stage_units + u) * (c.tokens * 128) + part * 32, width, g.widths, self.kind,
                )  # fmt: skip
                for i in cutlass.range_constexpr(c.tokens // 2):
                    sums[i] = changed[i]
                # all but the products just started: the other fragment and the stage before are free
                if cutlass.const_expr(g.sets == 2):
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(u == 0 and part == 0):
                        self.release_if(pipe, before, lane, any_before)

    @cute.jit
    def release_if(self, pipe, stage, lane, condition):
        """`release` where `condition` holds."""
        cute.arch.sync_warp()
        arriving = Int32(1) if condition & (lane % 32 == 0) else Int32(0)
        arrive_if(pipe.sync_object_empty.get_barrier(stage).toint(), arriving)

    @cute.jit
    def pass_by(self, pipe, stage, phase, count, lane):
        """Release `count` stages unread; (stage, phase) after them."""
        for _ in cutlass.range(count, unroll=1):
            pipe.sync_object_full.wait(stage, phase)
            self.release(pipe, stage, lane)
            stage += 1
            if stage >= self.grouped.stages:
                stage = Int32(0)
                phase ^= 1
        return stage, phase

    # ---- copies ----

    @cute.jit
    def send_weights(self, weights, s_weights, pipe, state, plan, at, first_step, end_step):
        """Announce steps of the tile at `at`, and start the copies of its weights; the state after them."""
        g, c = self.grouped, self.config
        expert, row_tile, width = at[0], at[1], at[4]
        from_group = Int32(0)
        if cutlass.const_expr(g.fit):
            from_group, row_tile = row_tile, Int32(0)
        own = cute.make_tensor(
            weights[(expert, from_group, 0, None)].iterator,
            cute.make_layout((weights.shape[1] - from_group, *weights.shape[2:]), stride=weights.stride[1:]),
        )
        expected, groups = Int32(g.weight_bytes), None
        if cutlass.const_expr(g.fit):
            groups = self.schedule.groups(plan)
            expected = groups * (g.weight_bytes // c.rows)
        if cutlass.const_expr(not g.gather):
            expected += c.stage_units * self.boxes(width) * g.box_bytes
        for k in cutlass.range(first_step, end_step, unroll=1):
            pipe.sync_object_empty.wait(state.index, state.phase)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(pipe.producer_get_barrier(state), expected)
            self.load_weights(own, s_weights, pipe, state, row_tile, k, groups)
            state.advance()
        return state

    @cute.jit
    def send_tokens(self, load_x, x, s_boxes, pipe, state, at, first_step, end_step, unit: cutlass.Constexpr):
        """Start the copies of a tile's tokens, of one unit of each step; the state after them."""
        g = self.grouped
        first, width = at[2], at[4]
        g_tokens = cute.local_tile(cute.domain_offset((first, 0), x), (g.box, TILE_K), (None, None))
        to_shared, from_global = cpasync.tma_partition(
            load_x, 0, cute.make_layout(1), cute.group_modes(s_boxes, 0, 2), cute.group_modes(g_tokens, 0, 2)
        )
        count = self.boxes(width)
        for k in cutlass.range(first_step, end_step, unroll=1):
            pipe.sync_object_empty.wait(state.index, state.phase)
            self.load_boxes(load_x, from_global, to_shared, pipe, state, k, unit, count)
            state.advance()
        return state

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

    @cute.jit
    def gather(
        self, x, tokens_of, tokens, pipe, state, starts, order, bounds, plan, experts, row_tiles, steps, turns,
        unit: cutlass.Constexpr,
    ):  # fmt: skip
        """What one warp does for the tokens of a unit of every stage; `tokens`: address of the first."""
        c = self.config
        lane = cute.arch.lane_idx()
        chunk, row = lane % 8, lane // 8
        # of a lane's piece in rows `row` and 4 + `row` of eight
        places = [(half + row) * 128 + (chunk ^ (half + row)) * 16 for half in (0, 4)]
        for turn in cutlass.range(turns, unroll=1):
            tile, first_step, end_step = self.schedule.piece(plan, turn, steps)
            if first_step < end_step:
                at = self.located(starts, order, bounds, plan, experts, row_tiles, tile)
                first, end, width = at[2], at[3], at[4]
                # where the tile's rows begin in x, in pieces; the columns behind the last repeat it
                begins = cute.make_rmem_tensor((c.tokens // 32,), Uint32)
                for i in cutlass.range_constexpr(c.tokens // 32):
                    choice = Uint32(tokens_of.iterator[cutlass.min(first + 32 * i + lane, end - 1)])
                    begins[i] = choice // Uint32(tokens_of.shape[1]) * Uint32(x.stride[0] // 8)
                for k in cutlass.range(first_step, end_step, unroll=1):
                    pipe.sync_object_empty.wait(state.index, state.phase)
                    place = tokens + (state.index * c.stage_units + unit) * (c.tokens * 128)
                    self.copy_rows(x, begins, place, k * c.stage_units + unit, width, places, lane)
                    # one arrival for each thread, when what it has copied so far is there
                    cute.arch.cp_async_mbarrier_arrive_noinc(pipe.producer_get_barrier(state))
                    state.advance()
        cute.arch.cp_async_commit_group()
        cute.arch.cp_async_wait_group(0)

    @cute.jit
    def copy_rows(self, x, begins, place, unit, width, places, lane):
        """Start the copies of 64 of K of a tile's rows, swizzled as wgmma's 128-byte mode has them: eight lanes to a row."""
        column = unit * 8 + lane % 8
        there = column * 8 < x.shape[1]  # zeros beyond K
        size = Uint32(16) if there else Uint32(0)
        column = column if there else 0
        targets = [place + offset for offset in places]
        grain = cutlass.const_expr(self.grouped.grain)
        for first in cutlass.range_constexpr(0, self.config.tokens, grain):
            if first < width:
                for row in cutlass.range_constexpr(first, first + grain, 4):
                    begin = cute.arch.shuffle_sync(begins[row // 32], row % 32 + lane // 8)
                    source = x.iterator.toint() + Int64(Uint32(begin + column)) * 16
                    copy_async(targets[row // 4 % 2] + row // 8 * 1024, source, 16, size)

    # ---- sums of a tile that several CTAs share ----

    @cute.jit
    def place(self, partials, part, row, lane):
        """Address of a thread's first four sums of CTA `part`; the next lie after those of all threads."""
        c = self.config
        return partials.iterator.toint() + (part * c.rows + row).to(Int64) * (256 * c.tokens) + lane * 16

    @cute.jit
    def leave(self, sums, partials, ready, cta, width, row, lane):
        """One warpgroup's sums for another CTA."""
        c = self.config
        address = self.place(partials, cta, row, lane)
        words = cute.recast_tensor(sums, Uint32)
        at_once = cutlass.const_expr(min(c.tokens, 64 if c.rows == 2 else 32))  # as `collect` reads them
        for token in cutlass.range_constexpr(0, c.tokens, at_once):
            if token < width:
                for i in cutlass.range_constexpr(token // 2, (token + at_once) // 2, 4):
                    store_16_bytes(address + i * (WARPGROUP * 4), [words[i + e] for e in range(4)])
        cute.arch.barrier(barrier_id=2 + row, number_of_threads=WARPGROUP)
        if lane == 0:
            raise_flag(ready.iterator.toint() + (cta * c.rows + row) * 4)

    @cute.jit
    def collect(self, sums, partials, ready, part, width, row, lane):
        """Add what CTA `part` left."""
        c = self.config
        await_flag(ready.iterator.toint() + (part * c.rows + row) * 4)
        cute.arch.barrier(barrier_id=2 + row, number_of_threads=WARPGROUP)
        if lane == 0:
            ready[part * c.rows + row] = 0  # for the next launch
        address = self.place(partials, part, row, lane)
        at_once = cutlass.const_expr(min(c.tokens, 64 if c.rows == 2 else 32))  # as many loads as registers are free
        for token in cutlass.range_constexpr(0, c.tokens, at_once):
            if token < width:
                cute.arch.sync_warp()  # or the compiler would start the next loads too, for which there are no registers
                theirs = cute.make_rmem_tensor((at_once // 2,), Float32)
                for i in cutlass.range_constexpr(0, at_once // 2, 4):
                    start = address + (token // 2 + i) * (WARPGROUP * 4)
                    there = cute.make_ptr(Float32, start, cute.AddressSpace.gmem, assumed_align=16)
                    cute.autovec_copy(
                        cute.make_tensor(there, cute.make_layout(4)),
                        cute.make_tensor(theirs.iterator + i, cute.make_layout(4)),
                    )
                for i in cutlass.range_constexpr(at_once // 2):
                    sums[token // 2 + i] = sums[token // 2 + i] + theirs[i]

    # ---- epilogue ----

    @cute.jit
    def finish(
        self, width, sums, gate_factors, up_factors, gate_bias, up_bias, flags, alpha, beta, limit, out, staging, first, row,
        group, lane,
    ):  # fmt: skip
        """Outputs of one warpgroup's tile, a few tokens at a time, through shared memory, so that all of a token's are stored
        side by side. With 128 tokens and four row groups it takes two thirds of what 16 bytes of each by themselves took.

        A token's outputs are staged in `chunks` of 16 bytes, of which exclusive or with the token's number makes the places in
        128 bytes, which eight lanes write or read at once, distinct.
        """
        staged = cutlass.const_expr(self.grouped.staged_tokens(self.dual))
        chunks = cutlass.const_expr(self.outputs // 8)
        w, in_warp = lane // 32, lane % 32
        tokens, n = out.shape
        start = out.iterator.toint()
        # this lane's row of a matrix of 8 tokens by 8 columns; of one matrix's outputs two of them lie side by side
        if cutlass.const_expr(self.dual):
            row_of, written = in_warp % staged, w
        else:
            row_of, written = (in_warp // 16 * 8 + in_warp % 8) % staged, 2 * w + in_warp // 8 % 2
        target = staging + self.staged(row_of, written)
        token_of, chunk = lane // chunks, lane % chunks
        source = staging + self.staged(token_of, chunk)
        column = row * self.outputs + chunk * 8
        aligned = (((start | (Int64(out.stride[0]) * 2)) & 15) == 0) & (column + 8 <= n)
        for token in cutlass.range_constexpr(0, self.config.tokens, staged):
            if token < width:
                values = self.epilogue(
                    sums, gate_factors, up_factors, gate_bias, up_bias, flags, alpha, beta, limit, n, row, lane,
                    token // 8, staged // 8,
                )  # fmt: skip
                words = cute.recast_tensor(values, Uint32)
                cute.arch.barrier(barrier_id=2 + group, number_of_threads=WARPGROUP)  # what was staged before has been read
                store_transposed(target, *[words[i] for i in range(cute.size(words))])
                cute.arch.barrier(barrier_id=2 + group, number_of_threads=WARPGROUP)
                at = first + token + token_of
                if (token_of < staged) & (at < tokens) & (column < n):
                    there = cute.make_ptr(Uint32, source, cute.AddressSpace.smem, assumed_align=16)
                    four = cute.make_rmem_tensor((4,), Uint32)
                    cute.autovec_copy(cute.make_tensor(there, cute.make_layout(4)), four)
                    if aligned:
                        store_16_bytes(start + (Int64(at) * Int64(out.stride[0]) + column) * 2, four)
                    else:
                        elements = cute.recast_tensor(four, self.out_type)
                        for e in cutlass.range_constexpr(8):
                            if column + e < n:
                                out[at, column + e] = elements[e]

    @cute.jit
    def staged(self, token, chunk):
        """Bytes from where outputs are staged to 16 of a token."""
        chunks = cutlass.const_expr(self.outputs // 8)
        return token * (chunks * 16) + (chunk ^ token // (8 // chunks) % chunks) * 16
