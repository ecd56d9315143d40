"""A persistent matrix product for sm_100a in CuTe DSL, compiled by compile_cute.py: tiles by cluster launch control.

C = A @ B^T. Warps 0 to 3 read the accumulators, warp 4 issues the MMAs, warp 5 loads by TMA, warp 6 of the cluster's first CTA asks
for the next tile: the launch has a cluster for each, of which few start. A pair of CTAs multiplies together.
"""

import cutlass
import cutlass.utils.blackwell_helpers as sm100
from cuda.bindings.driver import CUstream
from cutlass import cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import SmemAllocator, TmemAllocator
from cutlass.utils import LayoutEnum

F32 = cutlass.Float32
MMA_WARP, TMA_WARP, CLC_WARP = 4, 5, 6
THREADS = 224
WIDTH = 32  # columns of the accumulator that the epilogue takes at once


class DenseGemm:
    """tile: (M, N) of a CTA or a pair. majors: K or MN of A and B in memory. load: operation that reads tensor memory."""

    def __init__(self, cta_group, tile, element, out, stages, majors=("K", "K"), load=None) -> None:
        self.pair = cta_group == 2
        self.group = tcgen05.CtaGroup.TWO if self.pair else tcgen05.CtaGroup.ONE
        self.element = element
        self.out = out
        self.tile = (*tile, 128 * 8 // element.width)
        self.stages = stages
        self.majors = tuple(OperandMajorMode.K if m == "K" else OperandMajorMode.MN for m in majors)
        self.load = load
        self.columns = max(32, 1 << (tile[1] - 1).bit_length())

    @cute.jit
    def __call__(
        self, a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, m: cutlass.Int32, n: cutlass.Int32, k: cutlass.Int32,
        stream: CUstream,
    ):  # fmt: skip
        """Pointers to A [m, k], B [n, k] (or [k, m], [k, n] where they are not K-major) and C [m, n]."""
        mma = sm100.make_trivial_tiled_mma(self.element, self.element, *self.majors, F32, self.group, self.tile[:2])
        shape = (2, 1, 1) if self.pair else (1, 1, 1)
        cluster = cute.tiled_divide(cute.make_layout(shape), (mma.thr_id.shape,))
        layouts = (
            sm100.make_smem_layout_a(mma, self.tile, self.element, self.stages),
            sm100.make_smem_layout_b(mma, self.tile, self.element, self.stages),
        )
        stage = [cute.slice_(layout, (None, None, None, 0)) for layout in layouts]
        self.bytes = sum(cute.size_in_bytes(self.element, s) for s in stage) * (2 if self.pair else 1)
        load = cpasync.CopyBulkTensorTileG2SOp(self.group)
        copied = F32 if self.element is cutlass.TFloat32 else self.element
        orders = [(1, 0, 2) if major == OperandMajorMode.K else (0, 1, 2) for major in self.majors]
        rows = cute.make_tensor(a, cute.make_ordered_layout((m, k, 1), order=orders[0]))
        columns = cute.make_tensor(b, cute.make_ordered_layout((n, k, 1), order=orders[1]))
        a_atom, a_tensor = cute.nvgpu.make_tiled_tma_atom_A(
            load, rows, stage[0], self.tile, mma, cluster.shape, internal_type=copied
        )
        b_atom, b_tensor = cute.nvgpu.make_tiled_tma_atom_B(
            load, columns, stage[1], self.tile, mma, cluster.shape, internal_type=copied
        )
        self.kernel(mma, (a_atom, b_atom), (a_tensor, b_tensor), layouts, cluster, c, (m, n, k)).launch(
            grid=(cute.ceil_div(m, self.tile[0]) * shape[0], cute.ceil_div(n, self.tile[1]), 1),
            block=(THREADS, 1, 1), cluster=shape if self.pair else None, stream=stream,
        )  # fmt: skip

    def storage(self, layouts: tuple):
        @cute.struct
        class Storage:
            filled: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            done: cute.struct.MemRange[cutlass.Int64, 2]
            next: cute.struct.MemRange[cutlass.Int64, 2]
            freed: cutlass.Int64
            address: cutlass.Int32
            answer: cute.struct.Align[cute.struct.MemRange[cutlass.Int32, 4], 16]
            a: cute.struct.Align[cute.struct.MemRange[self.element, cute.cosize(layouts[0].outer)], 1024]
            b: cute.struct.Align[cute.struct.MemRange[self.element, cute.cosize(layouts[1].outer)], 1024]

        return Storage

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        atoms: tuple,
        tensors: tuple,
        layouts: tuple,
        cluster: cute.Layout,
        c: cute.Pointer,
        shape: tuple,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        thread, _, _ = cute.arch.thread_idx()
        x, y, _ = cute.arch.block_idx()
        ctas = 2 if self.pair else 1
        half = x % ctas
        leader = half == 0
        valid = cutlass.Int32(1)

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
        following = pipeline.PipelineClcFetchAsync.create(
            barrier_storage=storage.next.data_ptr(), num_stages=1, producer_group=one, tx_count=16,
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 32 * (1 + 6 * ctas)),
            cta_layout_vmnk=cluster, defer_sync=True,
        )  # fmt: skip
        tmem = TmemAllocator(
            storage.address.ptr, barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=2, num_threads=160),
            allocator_warp_id=0, is_two_cta=self.pair, two_cta_tmem_dealloc_mbar_ptr=storage.freed.ptr,
        )  # fmt: skip
        cluster_mn = (2, 1) if self.pair else (1, 1)
        pipeline.pipeline_init_arrive(cluster_shape_mn=cluster_mn, is_relaxed=True)

        part = mma.get_slice(half)
        shared = [storage.a.get_tensor(layouts[0].outer, swizzle=layouts[0].inner),
                  storage.b.get_tensor(layouts[1].outer, swizzle=layouts[1].inner)]  # fmt: skip
        copies = []
        for i in cutlass.range_constexpr(2):
            tiler = cute.slice_(self.tile, (None, 0, None) if i == 0 else (0, None, None))
            tiled = cute.local_tile(tensors[i], tiler, (None, None, None))
            mine = part.partition_A(tiled) if cutlass.const_expr(i == 0) else part.partition_B(tiled)
            copies.append(
                cpasync.tma_partition(
                    atoms[i], 0, cute.make_layout(1), cute.group_modes(shared[i], 0, 3), cute.group_modes(mine, 0, 3)
                )
            )
        fragment_layout = mma.make_fragment_C(mma.partition_shape_C(self.tile[:2])).layout
        steps = cute.ceil_div(shape[2], self.tile[2])
        answer = storage.answer.data_ptr()
        seen = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        pipeline.pipeline_init_wait(cluster_shape_mn=cluster_mn)

        if warp == TMA_WARP:
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
            while valid != 0:
                for step in cutlass.range(steps, unroll=1):
                    filled.producer_acquire(state)
                    barrier = filled.producer_get_barrier(state)
                    for i in cutlass.range_constexpr(2):
                        to, source = copies[i]
                        tile = x // ctas if cutlass.const_expr(i == 0) else y
                        cute.copy(atoms[i], source[(None, tile, step, 0)], to[(None, state.index)], tma_bar_ptr=barrier)
                    state.advance()
                x, y, valid, seen = self.proceed(following, seen, answer, half)
            filled.producer_tail(state)

        if warp == CLC_WARP and leader:
            asked = pipeline.make_pipeline_state(pipeline.PipelineUserType.ProducerConsumer, 1)
            while valid != 0:
                following.producer_acquire(asked)
                with cute.arch.elect_one():
                    cute.arch.issue_clc_query(following.producer_get_barrier(asked), answer)
                asked.advance()
                x, y, valid, seen = self.proceed(following, seen, answer, half)
            following.producer_tail(asked)

        if warp == MMA_WARP:
            tmem.wait_for_alloc()
            base = tmem.retrieve_ptr(F32)
            a, b = mma.make_fragment_A(shared[0]), mma.make_fragment_B(shared[1])
            result = cute.make_tensor(base, fragment_layout)
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
            result_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
            while valid != 0:
                if leader:
                    done.producer_acquire(result_state)
                for step in cutlass.range(steps, unroll=1):
                    if leader:
                        filled.consumer_wait(state)
                        mma.set(tcgen05.Field.ACCUMULATE, step != 0)
                        now = (None, None, None, state.index)
                        cute.gemm(mma, result, a[now], b[now], result)
                        filled.consumer_release(state)
                    state.advance()
                if leader:
                    done.producer_commit(result_state)
                result_state.advance()
                x, y, valid, seen = self.proceed(following, seen, answer, half)
            if leader:
                done.producer_tail(result_state)

        if warp < MMA_WARP:
            tmem.allocate(self.columns)
            tmem.wait_for_alloc()
            base = tmem.retrieve_ptr(F32)
            out = cute.make_tensor(c, cute.make_ordered_layout((shape[0], shape[1]), order=(1, 0)))
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
            while valid != 0:
                tile = part.partition_C(cute.local_tile(out, self.tile[:2], (x // ctas, y)))
                done.consumer_wait(state)
                self.write(base, fragment_layout, tile, thread)
                done.consumer_release(state)
                state.advance()
                x, y, valid, seen = self.proceed(following, seen, answer, half)
            tmem.relinquish_alloc_permit()
            cute.arch.barrier(barrier_id=1, number_of_threads=128)
            tmem.free(base)

    @cute.jit
    def proceed(self, following, seen, answer, half):
        """The next tile's CTA, and whether there is one."""
        following.consumer_wait(seen)
        x, y, _, valid = cute.arch.clc_response(answer)
        cute.arch.fence_proxy("async.shared", space="cta")
        following.consumer_release(seen)
        seen.advance()
        return x + half, y, valid, seen

    @cute.jit
    def write(self, base, fragment_layout, tile, thread):
        """From the accumulator to C, some columns at a time."""
        rows = self.tile[0] // (2 if self.pair else 1)
        # the accumulator of M 128 for a pair has each half of N in lanes of its own
        halves = 2 if rows == 64 and self.pair else 1
        piece = (rows, cute.make_layout((WIDTH // halves, halves), stride=(1, self.tile[1] // halves)))
        atom = (
            sm100.get_tmem_load_op(
                (rows, self.tile[1], self.tile[2]), LayoutEnum.ROW_MAJOR, self.out, F32, (rows, WIDTH), self.pair
            )
            if cutlass.const_expr(self.load is None)
            else cute.make_copy_atom(self.load, F32)
        )
        result = cute.make_tensor(base, fragment_layout)
        source = cute.flat_divide(result[((None, None), 0, 0)], piece)
        copy = tcgen05.make_tmem_copy(atom, source[(None, None, 0, 0)]).get_slice(thread)
        to = copy.partition_D(cute.flat_divide(tile[((None, None), 0, 0)], piece))
        values = cute.make_rmem_tensor(to[(None, None, None, 0, 0)].shape, F32)
        rounded = cute.make_rmem_tensor(values.shape, self.out)
        parts = copy.partition_S(source)
        for i in cutlass.range_constexpr(self.tile[1] // WIDTH):
            cute.copy(atom, parts[(None, None, None, 0, i)], values)
            cute.arch.fence_view_async_tmem_load()
            rounded.store(values.load().to(self.out))
            cute.autovec_copy(rounded, to[(None, None, None, 0, i)])
