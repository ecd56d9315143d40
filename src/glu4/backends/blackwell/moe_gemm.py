"""sm100_grouped_dual_gemm_w4a4: C = act(X GATE[e]^T) * (X UP[e]^T) for the rows of each expert e, from NVFP4 operands.
sm100_grouped_linear_w4a4: C = X W[e]^T.

Device code for sm_100a; needs nvidia-cutlass-dsl. Read `moe_config` for what can be chosen. Products, tensor memory and their
barriers are the grouped kernel's (`grouped_gemm`): weights as the MMA's M, gate's and up's stages one behind the other, tokens
as its N. What is different: how many rows an expert has is known on the device only, and operands have one tensor map each.

A table in memory (`moe_tokens.tile_table`) says of every tile along tokens which expert it belongs to and which rows that has.
Experts are the last dimension of the weights' maps. A tile of tokens begins at any row of x, which a tensor copy allows; rows
behind the expert's last are multiplied and not stored. Their scales lie tile by tile (`moe_tokens.tiled_scales`).
"""

from typing import Any

import cutlass
import cutlass.utils.blackwell_helpers as sm100
import cutlass.utils.blockscaled_layout as blockscaled
from cuda.bindings.driver import CUstream
from cutlass import cute, pipeline
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.memory import SmemAllocator, TmemAllocator

from glu4.backends.blackwell.dual_gemm import ALLOCATED, BLOCK, E2M1, EPILOGUE_WARPS, MMA_WARP, STORED
from glu4.backends.blackwell.dual_loads import GATE, SCALE_GATE, UP
from glu4.backends.blackwell.dual_tiles import RESPONSES
from glu4.backends.blackwell.grouped_gemm import GroupGemm
from glu4.backends.blackwell.instructions import EVICT_FIRST, EVICT_NORMAL
from glu4.backends.blackwell.moe_config import MoeConfig
from glu4.backends.blackwell.moe_epilogue import MoeEpilogue

Int32, Int64, Float32 = cutlass.Int32, cutlass.Int64, cutlass.Float32
RECORD = 4  # numbers of a tile in the table, 16 bytes


class MoeGemm(GroupGemm):
    """One kernel: a MoeConfig and the type of the output (CuTe DSL's).

    Arguments at launch, device pointers: codes of gate [e, n, k / 2], of x [rows, k / 2] and of up (16-byte aligned,
    contiguous), each with its block scales in 128x4 layout (16-byte aligned), those of x as `moe_tokens.tiled_scales` makes
    them; the table of tiles, 16-byte aligned; float32 global scales of x [1], gate and up [e]; float32 biases of gate and up
    [e, n], read if `flags` say so; C [rows, n], 2-byte aligned. Then C's row stride in elements; flags (epilogue.IDENTITY,
    GATE_BIAS, UP_BIAS); alpha, beta and limit of the activation; processors to fill; rows, tiles along tokens that there are at
    most, n, k, a multiple of 32, and experts. Of one matrix an expert it is in gate's place, and whatever is up's is None.
    """

    def __init__(self, config: MoeConfig, out_type: Any) -> None:
        super().__init__(config.grouped, out_type)
        self.epilogue = MoeEpilogue(config.grouped, out_type)

    @cute.jit
    def __call__(
        self, gate: cute.Pointer, scale_gate: cute.Pointer, x: cute.Pointer, scale_x: cute.Pointer, up: cute.Pointer | None,
        scale_up: cute.Pointer | None, table: cute.Pointer, global_x: cute.Pointer, global_gate: cute.Pointer,
        global_up: cute.Pointer | None, gate_bias: cute.Pointer, up_bias: cute.Pointer | None, out: cute.Pointer, stride: Int64,
        flags: Int32, alpha: Float32, beta: Float32, limit: Float32, processors: Int32, rows: Int32, most: Int32, n: Int32,
        k: Int32, experts: Int32, stream: CUstream,
    ):  # fmt: skip
        c = self.config
        mma = self.make_mma(self.group, self.tile[:2])
        mma_one = self.make_mma(tcgen05.CtaGroup.ONE, self.scale_tile[:2])
        cluster = cute.tiled_divide(cute.make_layout(self.cluster_shape), (mma.thr_id.shape,))
        cluster_one = cute.tiled_divide(cute.make_layout(self.cluster_shape), (mma_one.thr_id.shape,))
        layouts = (
            sm100.make_smem_layout_a(mma, self.tile, E2M1, c.stages + self.behind),
            blockscaled.make_smem_layout_sfa(mma, self.tile, BLOCK, c.stages + self.behind),
            sm100.make_smem_layout_b(mma, self.tile, E2M1, c.stages),
            blockscaled.make_smem_layout_sfb(mma, self.tile, BLOCK, c.stages),
        )
        of = (layouts, (mma, mma_one), (cluster, cluster_one))
        weights = self.copy_atoms(((gate, scale_gate, n),), k, experts, *of)
        behind, global_scales, biases = ((),), (global_x, global_gate), (gate_bias,)
        if cutlass.const_expr(self.behind > 0):
            behind = self.copy_atoms(((up, scale_up, n),), k, experts, *of)
            global_scales, biases = (global_x, global_gate, global_up), (gate_bias, up_bias)
        tokens = self.token_atoms((x, scale_x), (rows, most * c.tile_n), k, *of)
        count = most * cute.ceil_div(n, c.tile_m)
        if cutlass.const_expr(c.schedule == "static"):
            count = cutlass.min(processors // c.ctas, count)
        grid = (cutlass.max(count, 1) * c.ctas, 1, 1)
        self.moe_kernel(
            (mma, mma_one), (*weights[0], *tokens[0], *behind[0]), (*weights[1], *tokens[1]), layouts, (cluster, cluster_one),
            table, out, stride, global_scales, biases, (flags, alpha, beta, limit), n, k,
        ).launch(
            grid=grid, block=(c.threads, 1, 1), cluster=self.cluster_shape if self.pair else None, stream=stream, use_pdl=c.pdl,
            min_blocks_per_mp=1,  # as for the dense kernel
        )  # fmt: skip

    def token_atoms(self, pointers: tuple, rows: tuple, k: Any, layouts: tuple, mmas: tuple, clusters: tuple) -> tuple:
        """As `copy_atoms` of the second operand, whose scales have other rows than its codes."""
        found = []
        for own in rows:
            first = (*pointers, own)
            found.append([part[GATE:] for part in self.copy_atoms((first, first), k, 1, layouts, mmas, clusters)])
        return tuple((codes[0], scales[1]) for codes, scales in zip(*found))

    @cute.kernel
    def moe_kernel(
        self, mmas: tuple, atoms: tuple, tensors: tuple, layouts: tuple, clusters: tuple, table: cute.Pointer,
        out: cute.Pointer, stride: Int64, global_scales: tuple, biases: tuple, activation: tuple, n: Int32, k: Int32,
    ):  # fmt: skip
        c = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        thread, _, _ = cute.arch.thread_idx()
        half = cute.arch.block_idx()[0] % c.ctas
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())

        # ---- shared memory and barriers ----
        storage = SmemAllocator().allocate(self.storage(layouts))
        if warp == c.copy_warp:
            for atom in atoms:
                cpasync.prefetch_descriptor(atom)
        pipes = self.pipelines(storage, clusters[0])
        done = self.done(storage, clusters[0])
        control = self.control(storage, clusters[0])
        tmem = TmemAllocator(
            storage.address.ptr,
            barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=ALLOCATED, num_threads=32 * (EPILOGUE_WARPS + 1)),
            allocator_warp_id=0, is_two_cta=self.pair, two_cta_tmem_dealloc_mbar_ptr=storage.freed.ptr,
        )  # fmt: skip
        pipeline.pipeline_init_arrive(cluster_shape_mn=self.cluster_shape[:2], is_relaxed=True)
        shared = self.shared_operands(storage, layouts)
        accumulator = mmas[0].make_fragment_C(mmas[0].partition_shape_C(self.tile[:2])).layout
        work = (table, cute.ceil_div(n, c.tile_m), cute.ceil_div(k, c.tile_k), control, half == 0)
        pipeline.pipeline_init_wait(cluster_shape_mn=self.cluster_shape[:2])

        # ---- the roles ----
        if warp == c.copy_warp:
            mask = None
            if cutlass.const_expr(self.pair):
                mask = cpasync.create_tma_multicast_mask(clusters[1], clusters[1].get_flat_coord(rank), mcast_mode=1)
            self.load_tiles((atoms, (tensors, shared, mmas, clusters, half, rank), pipes, mask), work)
        if warp == MMA_WARP:
            tmem.wait_for_alloc()
            products = (mmas[0], tmem.retrieve_ptr(Float32), accumulator, shared, layouts, pipes, done, half == 0)
            if cutlass.const_expr(c.pdl):
                cute.arch.griddepcontrol_wait()  # the kernel in front may make the table
            self.multiply_tiles(products, work)
        if warp < EPILOGUE_WARPS:
            tmem.allocate(self.grouped.columns)
            tmem.wait_for_alloc()
            base = tmem.retrieve_ptr(Float32)
            staged = storage.staged.data_ptr()
            context = (base, accumulator, done, out, stride, n, global_scales, biases, activation, staged, half, thread)
            self.write_tiles(context, work)
            tmem.relinquish_alloc_permit()
            cute.arch.barrier(barrier_id=STORED, number_of_threads=32 * EPILOGUE_WARPS)
            tmem.free(base)

    # ---- tiles ----

    @cute.jit
    def record(self, table, number):
        """A row of the table in one load, the same of all threads."""
        there = cute.make_ptr(Int32, (table + number * RECORD).toint(), cute.AddressSpace.gmem, assumed_align=16)
        four = cute.make_rmem_tensor((RECORD,), Int32)
        cute.autovec_copy(cute.make_tensor(there, cute.make_layout(RECORD)), four)
        return tuple(cute.arch.make_warp_uniform(four[i]) for i in range(RECORD))

    @cute.jit
    def each(self, work, body: cutlass.Constexpr, states, asks: cutlass.Constexpr = False):
        """Every tile of this CTA or pair in its order: `states = body(piece, states)`.

        An expert's tiles of the same weights follow each other. All tiles before those of expert e are `across` times e's first
        tile along tokens, so number // across is a tile of the right expert.
        """
        c = self.config
        table, across, _, control, leader = work
        count, _, _, _ = self.record(table, Int32(0))
        own = self.own()[0]
        if cutlass.const_expr(c.schedule == "static"):
            for index in cutlass.range(own, count * across, cute.arch.grid_dim()[0] // c.ctas, unroll=1):
                states = body(self.piece_of(index, count, work), states)
        else:
            asked = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, RESPONSES)
            heard = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, RESPONSES)
            index, more = own, Int32(1)
            while more != 0:
                if cutlass.const_expr(asks):
                    if leader:
                        self.ask(control, asked)
                    asked.advance()
                # the grid is of the most tiles that there could be: whoever has one that is not there asks on
                if index < count * across:
                    states = body(self.piece_of(index, count, work), states)
                index, _, _, more = self.next_tile(control, heard)
                heard.advance()
            if cutlass.const_expr(asks):
                if leader:
                    self.all_heard(control, asked)
        return states

    @cute.jit
    def piece_of(self, index, count, work):
        """((tile along weights, along tokens, expert, its first tile, first row, row after the last), first step, steps)."""
        table, across, steps, _, _ = work
        expert, first, begin, end = self.record(table, 1 + index // across)
        down = cutlass.min(cute.ceil_div(end - begin, self.config.tile_n), count - first)
        rest = index - first * across
        return (rest // down, first + rest % down, expert, first, begin, end), Int32(0), steps

    # ---- loads ----

    @cute.jit
    def load_tile(self, context, piece, states):
        """All of a tile: tokens from its first row of x on."""
        atoms, (tensors, *rest), pipes, mask = context
        _, tile, _, first, begin, _ = piece[0]
        row = begin + (tile - first) * self.config.tile_n
        moved = (*tensors[:GATE], cute.domain_offset((row, 0, 0), tensors[GATE]), tensors[SCALE_GATE])
        copies = self.partitions(atoms[:UP], moved, *rest)
        loaded, begin = states
        loaded = self.load((atoms, copies, pipes, mask), piece, begin, piece[2], loaded)
        return loaded, Int32(0)

    @cute.jit
    def copy(self, context, p: cutlass.Constexpr, which: cutlass.Constexpr, piece, step, state):
        """Start the copies of a step of a tile: gate and its scales, tokens and theirs, up as gate, to another stage."""
        c = self.config
        atoms, copies, pipes, mask = context
        x, tile, expert, _, _, _ = piece[0]
        barrier = pipes[p].producer_get_barrier(state)
        for i in cutlass.range_constexpr(len(atoms)):
            own = cutlass.const_expr(i % UP)
            source, target = copies[own]
            at = (None, x, step, expert)
            if cutlass.const_expr(own == GATE):
                at = (None, 0, step, 0)
            if cutlass.const_expr(own == SCALE_GATE):
                at = (None, tile // self.sharing, step, 0)
            stage = state.index + (self.behind if cutlass.const_expr(i >= UP) else 0)
            multicast = mask if cutlass.const_expr(i == SCALE_GATE) else None
            policy = Int64(EVICT_FIRST if c.evict_first and own < GATE else EVICT_NORMAL)
            cute.copy(
                atoms[i], source[at], target[(None, stage)], tma_bar_ptr=barrier, mcast_mask=multicast, cache_policy=policy
            )  # fmt: skip
