"""sm100_group_gemm_w4a4: C = A B^T for several groups, each of its own M, N, K, from NVFP4 operands, for sm_100a in CuTe DSL.
sm100_group_dual_gemm_w4a4: C = act(A GATE^T) * (A UP^T).

Device code; needs nvidia-cutlass-dsl. Read `grouped_config` for what can be chosen. Loads, products and their barriers are the
dense kernel's for one matrix (`dual_gemm`), with weights B in the place of its A and tokens A in that of its weights. What is
different: which group a tile belongs to is computed from the groups' sizes; each group's four tensor maps are parameters, among
which the warp of copies selects addresses; and the epilogue writes columns of C.

Of two weights, gate is in B's place. Up lies behind it: in shared memory as further stages, in tensor memory its sums behind
gate's, its scales behind the tokens'. Both products of a step come one after the other, with the same tokens.
"""

from functools import partial
from typing import Any

import cutlass
import cutlass.utils.blackwell_helpers as sm100
import cutlass.utils.blockscaled_layout as blockscaled
from cuda.bindings.driver import CUstream
from cutlass import cute, pipeline
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.memory import SmemAllocator, TmemAllocator

from glu4.backends.blackwell.config import MMA_K
from glu4.backends.blackwell.dual_gemm import ALLOCATED, BLOCK, E2M1, EPILOGUE_WARPS, MMA_WARP, STORED, DualGemm
from glu4.backends.blackwell.dual_loads import SCALE_GATE, UP
from glu4.backends.blackwell.dual_tiles import RESPONSES
from glu4.backends.blackwell.grouped_config import GroupConfig
from glu4.backends.blackwell.grouped_epilogue import GroupEpilogue, pick
from glu4.backends.blackwell.grouped_instructions import tensor_map_address, tensor_map_pointer
from glu4.backends.blackwell.instructions import EVICT_FIRST, EVICT_NORMAL

Int32, Int64, Float32 = cutlass.Int32, cutlass.Int64, cutlass.Float32


class GroupGemm(DualGemm):
    """One kernel: a GroupConfig and the type of the output (CuTe DSL's).

    Arguments at launch, for each group: device pointers of codes of B [n, k / 2] and A [m, k / 2] (16-byte aligned,
    contiguous), their block scales in 128x4 layout (16-byte aligned), C [m, n], 2-byte aligned, its row stride in elements, and
    m, n, k, a multiple of 32. Then, one float32 for each group, global scales of A and of B; and processors that a persistent
    kernel may fill. Of two weights, the pointers of gate are in B's place, those of up after A's, and behind the global scales
    of gate those of up; then come flags (epilogue.IDENTITY), alpha, beta and limit of the activation.
    """

    def __init__(self, config: GroupConfig, out_type: Any) -> None:
        super().__init__(config.mma, out_type, dual=False)
        self.grouped, self.epilogue = config, GroupEpilogue(config, out_type)
        self.behind = config.stages if config.gated else 0  # where up's stages begin

    @cute.jit
    def __call__(
        self, operands: tuple, outs: tuple, strides: tuple, sizes: tuple, global_scales: tuple, activation: tuple,
        processors: Int32, stream: CUstream,
    ):  # fmt: skip
        """operands: of each group (codes of B, its scales, codes of A, its scales), then up's; sizes: (m, n, k).

        activation: (flags, alpha, beta, limit), or nothing.
        """
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
        maps, tensors = [], []
        for (b, scale_b, a, scale_a, *up), (m, n, k) in zip(operands, sizes):
            of = (layouts, (mma, mma_one), (cluster, cluster_one))
            atoms, own = self.copy_atoms(((b, scale_b, n), (a, scale_a, m)), k, 1, *of)
            if cutlass.const_expr(self.behind > 0):
                atoms = (*atoms, *self.copy_atoms(((*up, n),), k, 1, *of)[0])  # as the first operand, which B is
            maps.append(atoms)
            tensors.append(own)
        count = self.count(sizes)
        grid = (cutlass.max(count, 1) * c.ctas, 1, 1)
        if cutlass.const_expr(c.schedule == "static"):
            grid = (cutlass.max(cutlass.min(processors // c.ctas, count), 1) * c.ctas, 1, 1)
        # coordinates of tiles are the same in all groups' tensors, so those of the first do for all
        self.kernel(
            (mma, mma_one), tuple(maps), tensors[0], layouts, (cluster, cluster_one), outs, strides, sizes, global_scales,
            activation,
        ).launch(
            grid=grid, block=(c.threads, 1, 1), cluster=self.cluster_shape if self.pair else None, stream=stream, use_pdl=c.pdl,
            min_blocks_per_mp=1,  # as for the dense kernel
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, mmas: tuple, maps: tuple, tensors: tuple, layouts: tuple, clusters: tuple, outs: tuple, strides: tuple,
        sizes: tuple, global_scales: tuple, activation: tuple,
    ):  # fmt: skip
        c = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        thread, _, _ = cute.arch.thread_idx()
        half = cute.arch.block_idx()[0] % c.ctas
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())

        # ---- shared memory and barriers ----
        storage = SmemAllocator().allocate(self.storage(layouts))
        if warp == c.copy_warp:
            for atoms in maps:
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
        work = (sizes, control, half == 0)
        pipeline.pipeline_init_wait(cluster_shape_mn=self.cluster_shape[:2])

        # ---- the roles ----
        if warp == c.copy_warp:
            copies = self.partitions(maps[0][:UP], tensors, shared, mmas, clusters, half, rank)
            mask = None
            if cutlass.const_expr(self.pair):
                mask = cpasync.create_tma_multicast_mask(clusters[1], clusters[1].get_flat_coord(rank), mcast_mode=1)
            addresses = [[tensor_map_address(atoms[i]) for atoms in maps] for i in range(len(maps[0]))]
            self.load_tiles((maps[0], (copies, addresses), pipes, mask), work)
        if warp == MMA_WARP:
            tmem.wait_for_alloc()
            products = (mmas[0], tmem.retrieve_ptr(Float32), accumulator, shared, layouts, pipes, done, half == 0)
            self.multiply_tiles(products, work)
        if warp < EPILOGUE_WARPS:
            tmem.allocate(self.grouped.columns)
            tmem.wait_for_alloc()
            base = tmem.retrieve_ptr(Float32)
            staged = storage.staged.data_ptr()
            context = (base, accumulator, done, outs, strides, sizes, global_scales, activation, staged, half, thread)
            self.write_tiles(context, work)
            tmem.relinquish_alloc_permit()
            cute.arch.barrier(barrier_id=STORED, number_of_threads=32 * EPILOGUE_WARPS)
            tmem.free(base)

    # ---- tiles ----

    def down(self, size: tuple) -> Any:
        """Tiles along a group's tokens."""
        return cute.ceil_div(size[0], self.config.tile_n)

    def count(self, sizes: tuple) -> Any:
        """Tiles of groups."""
        found = Int32(0)
        for size in sizes:
            found += cute.ceil_div(size[1], self.config.tile_m) * self.down(size)
        return found

    @cute.jit
    def piece(self, index, sizes):
        """((tile along weights, along tokens, 0, group), first step along K, steps) of a tile's number in all groups."""
        group, rest = Int32(0), index
        for g in cutlass.range_constexpr(len(sizes) - 1):
            count = self.count((sizes[g],))
            beyond = (group == g) & (rest >= count)
            rest = rest - count if beyond else rest
            group = Int32(g + 1) if beyond else group
        down = pick([self.down(size) for size in sizes], group)
        steps = pick([cute.ceil_div(size[2], self.config.tile_k) for size in sizes], group)
        return (rest // down, rest % down, Int32(0), group), Int32(0), steps

    @cute.jit
    def each(self, work, body: cutlass.Constexpr, states, asks: cutlass.Constexpr = False):
        """Every tile of this CTA or pair in its order: `states = body(piece, states)`; asks: as in Tiles.each."""
        c = self.config
        sizes, control, leader = work
        own, count = self.own()[0], self.count(sizes)
        if cutlass.const_expr(c.schedule == "static"):
            for index in cutlass.range(own, count, cute.arch.grid_dim()[0] // c.ctas, unroll=1):
                states = body(self.piece(index, sizes), states)
        elif cutlass.const_expr(c.schedule == "launch_control"):
            asked = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, RESPONSES)
            heard = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, RESPONSES)
            index, more = own, Int32(count > 0)
            while more != 0:
                if cutlass.const_expr(asks):
                    if leader:
                        self.ask(control, asked)
                    asked.advance()
                states = body(self.piece(index, sizes), states)
                index, _, _, more = self.next_tile(control, heard)
                heard.advance()
            if cutlass.const_expr(asks):
                if leader:
                    self.all_heard(control, asked)
        else:
            if own < count:
                states = body(self.piece(own, sizes), states)
        return states

    # ---- loads ----

    @cute.jit
    def load_tile(self, context, piece, states):
        """All of a tile, by the tensor maps of its group."""
        atoms, (copies, addresses), pipes, mask = context
        chosen = [pick(found, piece[0][3]) for found in addresses]
        loaded, begin = states
        loaded = self.load((atoms, (copies, chosen), pipes, mask), piece, begin, piece[2], loaded)
        return loaded, Int32(0)

    @cute.jit
    def copy(self, context, p: cutlass.Constexpr, which: cutlass.Constexpr, piece, step, state):
        """Start the copies of a step of a tile: weights and their scales, tokens and theirs."""
        c = self.config
        atoms, (copies, addresses), pipes, mask = context
        barrier = pipes[p].producer_get_barrier(state)
        for i in cutlass.range_constexpr(len(addresses)):
            own = cutlass.const_expr(i % UP)  # of up as of B, by another map and to another stage
            source, target = copies[own]
            stage = state.index + (self.behind if cutlass.const_expr(i >= UP) else 0)
            multicast = mask if cutlass.const_expr(i == SCALE_GATE) else None
            policy = Int64(EVICT_FIRST if c.evict_first and own < 2 else EVICT_NORMAL)
            cute.copy(
                atoms[own], source[(None, self.tile_of(own, piece[0]), piece[1] + step, 0)], target[(None, stage)],
                tma_bar_ptr=barrier, mcast_mask=multicast, cache_policy=policy, tma_desc_ptr=tensor_map_pointer(addresses[i]),
            )  # fmt: skip

    def pipelines(self, storage: Any, cluster: cute.Layout) -> list:
        """One, of the stages of all operands."""
        c = self.config
        one = pipeline.CooperativeGroup(pipeline.Agent.Thread)
        return [
            pipeline.PipelineTmaUmma.create(
                barrier_storage=storage.filled.data_ptr(), num_stages=c.stages, producer_group=one, consumer_group=one,
                tx_count=self.grouped.stage_bytes * c.ctas, cta_layout_vmnk=cluster, defer_sync=True,
            )
        ]  # fmt: skip

    # ---- products of two weights ----

    def scale_sets(self, base: Any, layouts: tuple, mma: cute.TiledMma, shared: list, shift: Any) -> list:
        """As the dense kernel's; then up's."""
        if not self.behind:
            return super().scale_sets(base, layouts, mma, shared, shift)
        c = self.config
        after = c.tile_n + c.a_scale_columns + c.weight_scale_columns
        found = super().scale_sets(base + c.tile_n, layouts, mma, shared, shift)
        return [*found, super().scale_sets(base + after, layouts, mma, shared, shift)[0]]

    @cute.jit
    def step(self, operands, scales, pipes, state, step):
        """The products of one stage."""
        pipes[0].consumer_wait(state)
        self.copy_scales(scales[0], state)
        self.copy_scales(scales[1], state)
        if cutlass.const_expr(self.behind > 0):
            copy, source, target, _ = scales[2]
            cute.copy(copy, source[(None, None, None, None, state.index + self.behind)], target)
        for block in cutlass.range_constexpr(self.config.tile_k // MMA_K):
            self.product(operands, scales, 0, state, block, step)
            if cutlass.const_expr(self.behind > 0):
                self.up_product(operands, scales, state, block, step)

    @cute.jit
    def up_product(self, operands, scales, state, block: cutlass.Constexpr, step):
        """As `product`, of up."""
        a, tokens, sums, _, _ = operands
        here = (None, None, block)
        up = cute.make_tensor(sums[0].iterator + self.config.tile_n, sums[0].layout)
        mma = self.make_mma(self.group, self.tile[:2])
        mma.set(tcgen05.Field.ACCUMULATE, True if cutlass.const_expr(block > 0) else step != 0)
        weights = a[(None, None, block, state.index + self.behind)]
        cute.gemm(mma, up, [weights, scales[2][3][here]], [tokens[0][(*here, state.index)], scales[1][3][here]], up)

    # ---- results ----

    @cute.jit
    def write_tiles(self, context, work):
        """Warps 0 to 3."""
        if cutlass.const_expr(self.config.pdl):
            cute.arch.griddepcontrol_wait()
        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        self.each(work, partial(self.write_tile, context), (read,))

    @cute.jit
    def write_tile(self, context, piece, states):
        return (self.epilogue.write(context, piece, states[0]),)
