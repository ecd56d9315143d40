"""A block-scaled matrix product for sm_100a in CuTe DSL, compiled by compile_cute.py: one or two CTAs, one or two weights.

C = A @ B^T, or silu(g1 * A @ GATE^T) * (g2 * A @ UP^T), from NVFP4, MXFP4 or MXFP8 operands with scales in 128x4 blocks. A tile
of C for each CTA or pair: warps 0 to 3 read the accumulators, warp 4 issues the MMAs, warp 5 loads by TMA. The second CTA of a
pair loads its half of A and of the weights and reads its half of the accumulators; the first issues for both.
"""

import cutlass
import cutlass.utils.blackwell_helpers as sm100
import cutlass.utils.blockscaled_layout as blockscaled
from cuda.bindings.driver import CUstream
from cutlass import cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import SmemAllocator, TmemAllocator

E2M1, E4M3, BF16, F32 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.BFloat16, cutlass.Float32
MMA_WARP, TMA_WARP = 4, 5
THREADS = 192


class BlockScaledGemm:
    """tile: (M, N) of a CTA or a pair, M 128 for each CTA, N 64 or a multiple of 128; `gated` for two weights.

    element, scale, block: types of the operands and of their scales, one for each `block` elements.

    Scales come in blocks of 128 rows, so two tiles of N 64 share one, and the odd one's scales start two columns later.
    """

    def __init__(
        self, cta_group: int, tile: tuple[int, int], stages: int, gated: bool, element=E2M1, scale=E4M3, block: int = 16
    ) -> None:
        self.element, self.scale, self.block = element, scale, block
        self.k_tile = 128 * 8 // element.width
        self.pair = cta_group == 2
        self.group = tcgen05.CtaGroup.TWO if self.pair else tcgen05.CtaGroup.ONE
        self.tile = (*tile, self.k_tile)
        # scales of the weights: all of N in both CTAs, as for an MMA of one CTA
        self.narrow = tile[1] == 64
        self.tile_b_scales = (128, max(tile[1], 128), self.k_tile)
        self.stages = stages
        self.gated = gated
        self.weights = 2 if gated else 1
        # columns of tensor memory: the accumulators, the scales of A, the scales of each weight
        self.scale_columns = tile[1] * self.weights
        used = self.scale_columns + 16 + self.weights * self.tile_b_scales[1] // 8
        self.columns = 512 if used > 256 else 256

    def make_mma(self, group: tcgen05.CtaGroup, shape: tuple[int, int]) -> cute.TiledMma:
        return sm100.make_blockscaled_trivial_tiled_mma(
            self.element, self.element, OperandMajorMode.K, OperandMajorMode.K, self.scale, self.block, group, shape
        )

    @cute.jit
    def __call__(
        self, a: cute.Pointer, b1: cute.Pointer, b2: cute.Pointer, scale_a: cute.Pointer, scale_b1: cute.Pointer,
        scale_b2: cute.Pointer, c: cute.Pointer, global_1: cutlass.Float32, global_2: cutlass.Float32,
        m: cutlass.Int32, n: cutlass.Int32, k: cutlass.Int32, stream: CUstream,
    ):  # fmt: skip
        """Pointers to A, the weights (b2 is not used unless gated), their scales and C."""
        weights, scales = (b1, b2)[: self.weights], (scale_b1, scale_b2)[: self.weights]
        mma = self.make_mma(self.group, self.tile[:2])
        mma_one = self.make_mma(tcgen05.CtaGroup.ONE, self.tile_b_scales[:2])
        cluster_shape = (2, 1, 1) if self.pair else (1, 1, 1)
        cluster = cute.tiled_divide(cute.make_layout(cluster_shape), (mma.thr_id.shape,))
        cluster_one = cute.tiled_divide(cute.make_layout(cluster_shape), (mma_one.thr_id.shape,))
        layouts = (
            sm100.make_smem_layout_a(mma, self.tile, self.element, self.stages),
            sm100.make_smem_layout_b(mma, self.tile, self.element, self.stages),
            blockscaled.make_smem_layout_sfa(mma, self.tile, self.block, self.stages),
            blockscaled.make_smem_layout_sfb(mma, self.tile, self.block, self.stages),
        )
        stage = [cute.slice_(layout, (None, None, None, 0)) for layout in layouts]
        each = [cute.size_in_bytes(t, s) for t, s in zip((self.element, self.element, self.scale, self.scale), stage)]
        self.bytes = (each[0] + each[2] + self.weights * (each[1] + each[3])) * (2 if self.pair else 1)

        rows = cute.make_tensor(a, cute.make_ordered_layout((m, k, 1), order=(1, 0, 2)))
        row_scales = cute.make_tensor(scale_a, blockscaled.tile_atom_to_shape_SF(rows.shape, self.block))
        load = cpasync.CopyBulkTensorTileG2SOp(self.group)
        load_all = cpasync.CopyBulkTensorTileG2SMulticastOp(self.group) if self.pair else load
        loads = [
            cute.nvgpu.make_tiled_tma_atom_A(load, rows, stage[0], self.tile, mma, cluster.shape),
            # scales are copied as 16-bit elements
            cute.nvgpu.make_tiled_tma_atom_A(
                load, row_scales, stage[2], self.tile, mma, cluster.shape, internal_type=cutlass.Int16
            ),
        ]
        for weight, scale in zip(weights, scales):
            columns = cute.make_tensor(weight, cute.make_ordered_layout((n, k, 1), order=(1, 0, 2)))
            column_scales = cute.make_tensor(scale, blockscaled.tile_atom_to_shape_SF(columns.shape, self.block))
            loads.append(cute.nvgpu.make_tiled_tma_atom_B(load, columns, stage[1], self.tile, mma, cluster.shape))
            loads.append(
                cute.nvgpu.make_tiled_tma_atom_B(
                    load_all, column_scales, stage[3], self.tile_b_scales, mma_one, cluster_one.shape,
                    internal_type=cutlass.Int16,
                )
            )  # fmt: skip
        self.kernel(
            mma, mma_one, tuple(load[0] for load in loads), tuple(load[1] for load in loads), layouts, cluster, cluster_one,
            c, (global_1, global_2), (m, n, k),
        ).launch(
            grid=(cute.ceil_div(m, self.tile[0]) * cluster_shape[0], cute.ceil_div(n, self.tile[1]), 1),
            block=(THREADS, 1, 1), cluster=cluster_shape if self.pair else None, stream=stream,
        )  # fmt: skip

    def storage(self, layouts: tuple):
        @cute.struct
        class Storage:
            filled: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            done: cute.struct.MemRange[cutlass.Int64, 2]
            freed: cutlass.Int64
            address: cutlass.Int32
            a: cute.struct.Align[cute.struct.MemRange[self.element, cute.cosize(layouts[0].outer)], 1024]
            b: cute.struct.Align[cute.struct.MemRange[self.element, self.weights * cute.cosize(layouts[1].outer)], 1024]
            scale_a: cute.struct.Align[cute.struct.MemRange[self.scale, cute.cosize(layouts[2])], 1024]
            scale_b: cute.struct.Align[cute.struct.MemRange[self.scale, self.weights * cute.cosize(layouts[3])], 1024]

        return Storage

    @cute.kernel
    def kernel(
        self, mma: cute.TiledMma, mma_one: cute.TiledMma, atoms: tuple, tensors: tuple, layouts: tuple,
        cluster: cute.Layout, cluster_one: cute.Layout, c: cute.Pointer, global_scales: tuple, shape: tuple,
    ):  # fmt: skip
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        thread, _, _ = cute.arch.thread_idx()
        block_x, block_n, _ = cute.arch.block_idx()
        ctas = 2 if self.pair else 1
        half = block_x % ctas
        block_m = block_x // ctas
        leader = half == 0
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())

        # shared memory and barriers
        storage = SmemAllocator().allocate(self.storage(layouts))
        one = pipeline.CooperativeGroup(pipeline.Agent.Thread)
        filled = pipeline.PipelineTmaUmma.create(
            barrier_storage=storage.filled.data_ptr(), num_stages=self.stages, producer_group=one, consumer_group=one,
            tx_count=self.bytes, cta_layout_vmnk=cluster, defer_sync=True,
        )  # fmt: skip
        done = pipeline.PipelineUmmaAsync.create(
            barrier_storage=storage.done.data_ptr(), num_stages=1, producer_group=one,
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 128 * ctas), cta_layout_vmnk=cluster,
            defer_sync=True,
        )  # fmt: skip
        tmem = TmemAllocator(
            storage.address.ptr, barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=2, num_threads=160),
            allocator_warp_id=0, is_two_cta=self.pair, two_cta_tmem_dealloc_mbar_ptr=storage.freed.ptr,
        )  # fmt: skip
        cluster_mn = (2, 1) if self.pair else (1, 1)
        pipeline.pipeline_init_arrive(cluster_shape_mn=cluster_mn, is_relaxed=True)

        # operands in shared memory, and this CTA's parts of the tensors in global memory
        part, part_one = mma.get_slice(half), mma_one.get_slice(half)
        shared = self.shared_operands(storage, layouts)
        copies = self.copies(atoms, tensors, shared, part, part_one, cluster, cluster_one, rank)
        mask = None
        if cutlass.const_expr(self.pair):
            mask = cpasync.create_tma_multicast_mask(cluster_one, cluster_one.get_flat_coord(rank), mcast_mode=1)
        fragment_layout = mma.make_fragment_C(mma.partition_shape_C(self.tile[:2])).layout
        steps = cute.ceil_div(shape[2], self.k_tile)
        pipeline.pipeline_init_wait(cluster_shape_mn=cluster_mn)

        # load
        if warp == TMA_WARP:
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
            for _ in cutlass.range(steps, unroll=1):
                filled.producer_acquire(state)
                barrier = filled.producer_get_barrier(state)
                for i in cutlass.range_constexpr(len(atoms)):
                    source, target = copies[i]
                    tile = block_m if cutlass.const_expr(i < 2) else block_n
                    if cutlass.const_expr(self.narrow and i >= 2 and i % 2 == 1):
                        tile = block_n // 2
                    multicast = mask if cutlass.const_expr(i >= 2 and i % 2 == 1) else None
                    cute.copy(
                        atoms[i], source[(None, tile, state.count, 0)], target[(None, state.index)],
                        tma_bar_ptr=barrier, mcast_mask=multicast,
                    )  # fmt: skip
                state.advance()
            filled.producer_tail(state)

        # multiply
        if warp == MMA_WARP:
            tmem.wait_for_alloc()
            base = tmem.retrieve_ptr(F32)
            a, bs = mma.make_fragment_A(shared[0]), [mma.make_fragment_B(shared[2 + 2 * w]) for w in range(self.weights)]
            results = [cute.make_tensor(base + w * self.tile[1], fragment_layout) for w in range(self.weights)]
            scale_sets = self.scale_sets(base, layouts, mma, shared, block_n % 2 * 2 if self.narrow else 0)
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
            result_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
            if leader:
                done.producer_acquire(result_state)
            for step in cutlass.range(steps, unroll=1):
                if leader:
                    filled.consumer_wait(state)
                    for copy, source, target, _ in scale_sets:
                        cute.copy(copy, source[(None, None, None, None, state.index)], target)
                    mma.set(tcgen05.Field.ACCUMULATE, step != 0)
                    now = (None, None, None, state.index)
                    for w in cutlass.range_constexpr(self.weights):
                        cute.gemm(mma, results[w], [a[now], scale_sets[0][3]], [bs[w][now], scale_sets[1 + w][3]], results[w])
                    filled.consumer_release(state)
                state.advance()
            if leader:
                done.producer_commit(result_state)
            result_state.advance()
            if leader:
                done.producer_tail(result_state)

        # write out
        if warp < MMA_WARP:
            tmem.allocate(self.columns)
            tmem.wait_for_alloc()
            base = tmem.retrieve_ptr(F32)
            out = cute.make_tensor(c, cute.make_ordered_layout((shape[0], shape[1]), order=(1, 0)))
            tile = part.partition_C(cute.local_tile(out, self.tile[:2], (block_m, block_n)))
            self.write(base, fragment_layout, tile, thread, done, global_scales)
            tmem.relinquish_alloc_permit()
            cute.arch.barrier(barrier_id=1, number_of_threads=128)
            tmem.free(base)

    @cute.jit
    def write(self, base, fragment_layout, tile, thread, done, global_scales):
        """From the accumulators to C, 32 columns at a time."""
        width = 32
        atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition.x32), F32)
        target = cute.flat_divide(tile[((None, None), 0, 0)], (128, width))
        pieces = []
        for w in cutlass.range_constexpr(self.weights):
            result = cute.make_tensor(base + w * self.tile[1], fragment_layout)
            pieces.append(cute.flat_divide(result[((None, None), 0, 0)], (128, width)))
        copy = tcgen05.make_tmem_copy(atom, pieces[0][(None, None, 0, 0)]).get_slice(thread)
        to = copy.partition_D(target)
        values = [cute.make_rmem_tensor(to[(None, None, None, 0, 0)].shape, F32) for _ in range(self.weights)]
        rounded = cute.make_rmem_tensor(values[0].shape, BF16)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        done.consumer_wait(state)
        for i in cutlass.range_constexpr(self.tile[1] // width):
            for w in cutlass.range_constexpr(self.weights):
                source = copy.partition_S(pieces[w])
                cute.copy(atom, source[(None, None, None, 0, i)], values[w])
            cute.arch.fence_view_async_tmem_load()
            if cutlass.const_expr(self.gated):
                gate, up = values[0].load() * global_scales[0], values[1].load() * global_scales[1]
                rounded.store((gate / (1.0 + cute.math.exp(-gate)) * up).to(BF16))
            else:
                rounded.store(values[0].load().to(BF16))
            cute.autovec_copy(rounded, to[(None, None, None, 0, i)])
        done.consumer_release(state)

    def shared_operands(self, storage, layouts):
        """A, its scales, then each weight and its scales, with stages."""
        a, b, scale_a, scale_b = layouts
        found = [storage.a.get_tensor(a.outer, swizzle=a.inner), storage.scale_a.get_tensor(scale_a)]
        for w in range(self.weights):
            weight = cute.recast_ptr(storage.b.data_ptr() + w * cute.cosize(b.outer), b.inner, dtype=self.element)
            found.append(cute.make_tensor(weight, b.outer))
            found.append(cute.make_tensor(storage.scale_b.data_ptr() + w * cute.cosize(scale_b), scale_b))
        return found

    def copies(self, atoms, tensors, shared, part, part_one, cluster, cluster_one, rank):
        """(global, shared) of each load, tiled: [elements, tile, K step, batch] and [elements, stage]."""
        found = []
        for i, (atom, tensor, target) in enumerate(zip(atoms, tensors, shared)):
            is_a, is_scale = i < 2, i % 2 == 1
            spread = not is_a and is_scale
            tiler = self.tile_b_scales if spread else self.tile
            tiled = cute.local_tile(
                tensor, cute.slice_(tiler, (None, 0, None) if is_a else (0, None, None)), (None, None, None)
            )
            mine = part.partition_A(tiled) if is_a else (part_one if spread else part).partition_B(tiled)
            place = cluster_one.get_flat_coord(rank)[1] if spread else 0
            ctas = cute.slice_(cluster_one, (0, None, 0, 0)).shape if spread else 1
            to, source = cpasync.tma_partition(
                atom, place, cute.make_layout(ctas), cute.group_modes(target, 0, 3), cute.group_modes(mine, 0, 3)
            )
            found.append((cute.filter_zeros(source), cute.filter_zeros(to)) if is_scale else (source, to))
        return found

    def scale_sets(self, base, layouts, mma, shared, shift):
        """(copy, shared source, tensor memory target, operand of the MMA) for A and each weight."""
        found, column = [], self.scale_columns
        for i in range(1 + self.weights):
            make = blockscaled.make_tmem_layout_sfb if i else blockscaled.make_tmem_layout_sfa
            layout = make(mma, self.tile, self.block, cute.slice_(layouts[3 if i else 2], (None, None, None, 0)))
            operand = cute.make_tensor(cute.recast_ptr(base + column, dtype=self.scale), layout)
            source, target = cute.filter_zeros(shared[1 + 2 * i]), cute.filter_zeros(operand)
            copy = tcgen05.make_s2t_copy(cute.make_copy_atom(tcgen05.Cp4x32x128bOp(self.group), self.scale), target)
            lane = copy.get_slice(0)
            described = tcgen05.get_s2t_smem_desc_tensor(copy, lane.partition_S(source))
            if i and self.narrow:
                operand = cute.make_tensor(cute.recast_ptr(base + column + shift, dtype=self.scale), layout)
            found.append((copy, described, lane.partition_D(target), operand))
            column += (self.tile_b_scales[1] if i else 128) // 32 * 4
        return found
