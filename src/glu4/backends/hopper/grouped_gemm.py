"""sm90_grouped_dual_gemm: the gated product of a mixture of experts in one launch, for sm_90a in CuTe DSL. Device code.

Built of the dense kernel's parts (`dual_gemm`). What is new: CTAs stay. Each goes through every grid-th tile of all experts'
tiles, and its producers run ahead across tiles, so that memory is busy while a tile is finished. Which expert a tile belongs to
follows from `offsets` alone, on the device: every CTA counts each expert's token tiles and sums the counts up, and each warp
finds its tile's expert by bisection. Tiles of an expert lie row tile by row tile, the token tiles of one beside each other, so
that weights come from DRAM once.

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
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator

from glu4.backends.hopper.config import PRODUCER_REGISTERS, TILE_K, WARPGROUP
from glu4.backends.hopper.dual_gemm import DualGemm
from glu4.backends.hopper.grouped_config import MAX_EXPERTS, GroupedConfig
from glu4.backends.hopper.pack import UNIT_WORDS

Int32, Uint32, Float32 = cutlass.Int32, cutlass.Uint32, cutlass.Float32

_SEARCH_STEPS = MAX_EXPERTS.bit_length() - 1


class GroupedGemm(DualGemm):
    """Arguments at launch, besides the dense kernel's: weights int32 [experts, tiles, units, 576], offsets int32 [experts + 1],
    gate_scale and up_scale float32 [experts], biases float32 [experts, n], and `ctas`, how many of them stay."""

    def __init__(self, config: GroupedConfig, x_type: Any, out_type: Any) -> None:
        super().__init__(config.tile, x_type, out_type, dual=True)
        self.stages, self.staging_bytes = config.stages, config.staging_bytes

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
        c = self.config
        mma = sm90.make_trivial_tiled_mma(
            self.x_type, self.x_type, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1), (64, c.tokens),
            warpgroup.OperandSource.RMEM,
        )  # fmt: skip
        layout = sm90.make_smem_layout_b(
            utils.LayoutEnum.ROW_MAJOR, (64, c.tokens, TILE_K), self.x_type, self.stages * c.stage_units
        )
        one_stage = cute.slice_(layout, (None, None, 0))
        load_x, tokens = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), x, one_stage, (c.tokens, TILE_K))

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, self.stages * 2]
            tokens: cute.struct.Align[cute.struct.MemRange[self.x_type, cute.cosize(layout)], 1024]
            weights: cute.struct.Align[cute.struct.MemRange[Uint32, self.stages * c.stage_units * c.rows * UNIT_WORDS], 128]
            staging: cute.struct.Align[cute.struct.MemRange[Uint32, self.staging_bytes // 4], 16]
            starts: cute.struct.MemRange[Int32, MAX_EXPERTS + 1]
            sums: cute.struct.MemRange[Int32, 32]

        self.shared = Shared
        self.kernel(
            load_x, tokens, weights, offsets, gate_scale, up_scale, x_scale, gate_bias, up_bias, flags, alpha, beta, limit, out,
            mma, layout,
        ).launch(grid=(ctas, 1, 1), block=(c.cta_threads(False), 1, 1), stream=stream, min_blocks_per_mp=1)  # fmt: skip

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
        mma: cute.TiledMma,
        layout: cute.ComposedLayout,
    ):
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        first_tile, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        if warp == 0:
            cpasync.prefetch_descriptor(load_x)
        shared = SmemAllocator().allocate(self.shared)
        pipe = pipeline.PipelineTmaAsync.create(
            barrier_storage=shared.barriers.data_ptr(),
            num_stages=self.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * c.rows),
            tx_count=c.stage_bytes,
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        )
        s_tokens = shared.tokens.get_tensor(layout.outer, swizzle=layout.inner)
        stage_words = UNIT_WORDS * c.stage_units
        s_weights = shared.weights.get_tensor(
            cute.make_layout((stage_words, c.rows, self.stages), stride=(1, stage_words, c.rows * stage_words))
        )
        starts = shared.starts.get_tensor(cute.make_layout(MAX_EXPERTS + 1))
        totals = shared.sums.get_tensor(cute.make_layout(32))
        # everything follows from the offsets, which the kernel before this one may write
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        self.count_tiles(offsets, x.shape[0], starts, totals, thread)
        row_tiles = cute.ceil_div(out.shape[1], c.rows * 32)
        experts = weights.shape[0]
        tiles = starts[experts] * row_tiles
        steps = (weights.shape[2] + c.stage_units - 1) // c.stage_units

        if group == c.consumers:
            # ---- producers: weights, and tokens ----
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
            if warp == 4 * c.consumers:
                for tile in cutlass.range(first_tile, tiles, ctas, unroll=1):
                    expert, row_tile, _ = self.locate(starts, experts, row_tiles, tile)
                    own = cute.make_tensor(
                        weights[(expert, 0, 0, None)].iterator,
                        cute.make_layout(weights.shape[1:], stride=weights.stride[1:]),
                    )
                    for k in cutlass.range(steps, unroll=1):
                        pipe.producer_acquire(state)
                        self.load_weights(own, s_weights, pipe, state, row_tile, k)
                        state.advance()
                pipe.producer_tail(state)
            if warp == 4 * c.consumers + 1:
                for tile in cutlass.range(first_tile, tiles, ctas, unroll=1):
                    expert, _, token_tile = self.locate(starts, experts, row_tiles, tile)
                    row = self.clamped(offsets[expert], x.shape[0]) + token_tile * c.tokens
                    g_tokens = cute.local_tile(cute.domain_offset((row, 0), x), (c.tokens, TILE_K), (0, None))
                    to_shared, from_global = cpasync.tma_partition(
                        load_x, 0, cute.make_layout(1), cute.group_modes(s_tokens, 0, 2), cute.group_modes(g_tokens, 0, 2)
                    )
                    for k in cutlass.range(steps, unroll=1):
                        pipe.sync_object_empty.wait(state.index, state.phase)
                        self.load_tokens(load_x, from_global, to_shared, pipe, state, k)
                        state.advance()
        if group < c.consumers:
            # ---- consumers: one row group each ----
            cute.arch.setmaxregister_increase(c.consumer_registers(False))
            lane = thread % WARPGROUP
            sums = cute.make_rmem_tensor(mma.partition_shape_C((64, c.tokens)), Float32)
            tokens = mma.make_fragment_B(mma.get_slice(lane).partition_B(s_tokens))
            mma.set(warpgroup.Field.ACCUMULATE, True)
            shape = mma.partition_shape_A((64, TILE_K))
            even = mma.make_fragment_A(shape)
            odd = mma.make_fragment_A(shape) if cutlass.const_expr(c.fragment_sets == 2) else even
            stage, phase = Int32(0), Int32(0)
            n = out.shape[1]
            for tile in cutlass.range(first_tile, tiles, ctas, unroll=1):
                expert, row_tile, token_tile = self.locate(starts, experts, row_tiles, tile)
                sums.fill(0.0)
                before = Int32(0)
                for k in cutlass.range(steps, unroll=1):
                    self.step(mma, pipe, s_weights, tokens, sums, even, odd, group, lane, stage, phase, before, k > 0)
                    before = stage
                    stage += 1
                    if stage >= self.stages:
                        stage = Int32(0)
                        phase ^= 1
                warpgroup.wait_group(0)
                self.release(pipe, before, lane)
                start = self.clamped(offsets[expert], x.shape[0])
                end = self.clamped(offsets[expert + 1], x.shape[0])
                own_out = cute.make_tensor(out.iterator, cute.make_layout((end, n), stride=(out.stride[0], 1)))
                own_gate = cute.make_tensor(gate_bias[(expert, None)].iterator, cute.make_layout(n))
                own_up = cute.make_tensor(up_bias[(expert, None)].iterator, cute.make_layout(n))
                values = self.epilogue(
                    sums, self.scales(gate_scale[expert], x_scale, flags), self.scales(up_scale[expert], x_scale, flags),
                    own_gate, own_up, flags, alpha, beta, limit, n, row_tile * c.rows + group, lane, 0,
                )  # fmt: skip
                self.store(
                    values, own_out, shared.staging.data_ptr().toint(), group, start + token_tile * c.tokens,
                    row_tile * c.rows + group, lane,
                )  # fmt: skip

    # ---- the schedule ----

    @cute.jit
    def clamped(self, offset, rows):
        return cutlass.min(cutlass.max(offset, 0), rows)

    @cute.jit
    def count_tiles(self, offsets, rows, starts, totals, thread):
        """starts[e]: token tiles of all experts before e; each thread counts two experts."""
        experts = offsets.shape[0] - 1
        counts = cute.make_rmem_tensor((2,), Int32)
        for i in cutlass.range_constexpr(2):
            counts[i] = 0
            expert = 2 * thread + i
            if expert < experts:
                first, end = self.clamped(offsets[expert], rows), self.clamped(offsets[expert + 1], rows)
                counts[i] = (cutlass.max(end - first, 0) + self.config.tokens - 1) // self.config.tokens
        lane, warp = thread % 32, thread // 32
        total = counts[0] + counts[1]
        for i in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(total, 1 << i)
            total = total + below if lane >= (1 << i) else total
        if lane == 31:
            totals[warp] = total
        cute.arch.sync_threads()
        base = total - counts[0] - counts[1]
        for w in cutlass.range_constexpr(self.config.cta_threads(False) // 32):
            base = base + totals[w] if w < warp else base
        if 2 * thread <= experts:
            starts[2 * thread] = base
        if 2 * thread + 1 <= experts:
            starts[2 * thread + 1] = base + counts[0]
        cute.arch.sync_threads()

    @cute.jit
    def locate(self, starts, experts, row_tiles, tile):
        """(expert, row tile, token tile): the last expert with a token tile at or before this one's."""
        at = tile // row_tiles
        low, high = Int32(0), Int32(experts)
        for _ in cutlass.range_constexpr(_SEARCH_STEPS):
            middle = (low + high) // 2
            below = starts[middle] <= at
            low, high = middle if below else low, high if below else middle
        first = starts[low]
        inside, count = tile - first * row_tiles, starts[low + 1] - first
        return low, inside // count, inside % count
