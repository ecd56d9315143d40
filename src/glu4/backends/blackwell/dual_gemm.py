"""sm100_dual_gemm_w4a4: C = act(A GATE^T) * (A UP^T), or A GATE^T alone, from NVFP4 operands, for sm_100a in CuTe DSL.

Device code; needs nvidia-cutlass-dsl. Read `config` for what can be chosen. A is loaded once for each step along K and
multiplied by both weights, which lie apart as checkpoints have them. Warps 0 to 3 read the accumulators and write C
(`epilogue`), warp 4 issues the MMAs, warp 5 the copies; or warp 4 does both. The second CTA of a pair loads its half of A and
of the weights and reads its half of the accumulators; the first issues for both.

Block scales are in the 128x4 layout (glu4.scale_layout) and go through shared memory to tensor memory (tcgen05.cp), where 32
rows share a column. A tile of 32 or 64 columns of C uses a part of an atom's four columns, so its scales start at an offset.

Exactness. e2m1 * e4m3 products and their sums over a block are exact in float32; the order and rounding of longer sums are the
tensor core's. Global scales and the activation are applied in float32, and the result is rounded once.
"""

from functools import partial
from typing import Any

import cutlass
import cutlass.utils.blackwell_helpers as sm100
import cutlass.utils.blockscaled_layout as blockscaled
from cuda.bindings.driver import CUstream
from cutlass import cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import SmemAllocator, TmemAllocator

from glu4.backends.blackwell.config import MMA_K, Config
from glu4.backends.blackwell.dual_loads import GATE, UP, A, Loads
from glu4.backends.blackwell.dual_tiles import RESPONSES, Tiles
from glu4.backends.blackwell.epilogue import Epilogue
from glu4.backends.blackwell.instructions import block_scaled_mma, instruction_descriptor

Int32, Int64, Float32 = cutlass.Int32, cutlass.Int64, cutlass.Float32
E2M1, E4M3 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN
BLOCK = 16
EPILOGUE_WARPS, MMA_WARP = 4, 4
ALLOCATED, STORED = 2, 1  # named barriers: tensor memory's address is there; it is not needed any more


class DualGemm(Loads, Tiles):
    """One kernel: a Config, the type of the output (CuTe DSL's), and whether there are two matrices (`dual`) or one.

    Arguments at launch, device pointers: codes of A [l, m, k / 2], gate and up [l, n, k / 2] (16-byte aligned, contiguous),
    their block scales in 128x4 layout (16-byte aligned); float32 global scales of A, gate and up, one each or, by `flags`, one
    for each of the l matrices; float32 biases of gate and up [l, n], read if `flags` say so; C [l, m, n], 2-byte aligned, and
    16 for TMA stores; a workspace (Config.workspace_bytes), 4-byte aligned. Then C's row and batch strides in elements; flags;
    alpha, beta and limit of the activation; processors that a persistent kernel may fill; l, m, n, k, a multiple of 32.
    """

    def __init__(self, config: Config, out_type: Any, dual: bool) -> None:
        self.config, self.epilogue = config, Epilogue(config, out_type, dual)
        self.weights = 2 if dual else 1
        self.pair = config.ctas == 2
        self.group = tcgen05.CtaGroup.TWO if self.pair else tcgen05.CtaGroup.ONE
        self.tile = (config.tile_m, config.tile_n, config.tile_k)
        # scales of the weights: every row in both CTAs of a pair, as for an MMA of one CTA
        self.scale_tile = (128, config.scale_rows, config.tile_k)
        self.cluster_shape = (config.ctas, 1, 1)
        # tiles that share an atom of the weights' scales, and columns of tensor memory from one to the next
        self.sharing, self.shift = config.scale_rows // config.tile_n, config.tile_n // 32

    def make_mma(self, group: tcgen05.CtaGroup, shape: tuple[int, int]) -> cute.TiledMma:
        k_major = OperandMajorMode.K
        return sm100.make_blockscaled_trivial_tiled_mma(E2M1, E2M1, k_major, k_major, E4M3, BLOCK, group, shape)

    @cute.jit
    def __call__(
        self, a: cute.Pointer, scale_a: cute.Pointer, gate: cute.Pointer, scale_gate: cute.Pointer, up: cute.Pointer,
        scale_up: cute.Pointer, global_a: cute.Pointer, global_gate: cute.Pointer, global_up: cute.Pointer,
        gate_bias: cute.Pointer, up_bias: cute.Pointer, out: cute.Pointer, workspace: cute.Pointer, row_stride: Int64,
        batch_stride: Int64, flags: Int32, alpha: Float32, beta: Float32, limit: Float32, processors: Int32, batch: Int32,
        m: Int32, n: Int32, k: Int32, stream: CUstream,
    ):  # fmt: skip
        c = self.config
        mma = self.make_mma(self.group, self.tile[:2])
        mma_one = self.make_mma(tcgen05.CtaGroup.ONE, self.scale_tile[:2])
        cluster = cute.tiled_divide(cute.make_layout(self.cluster_shape), (mma.thr_id.shape,))
        cluster_one = cute.tiled_divide(cute.make_layout(self.cluster_shape), (mma_one.thr_id.shape,))
        layouts = (
            sm100.make_smem_layout_a(mma, self.tile, E2M1, c.stages),
            blockscaled.make_smem_layout_sfa(mma, self.tile, BLOCK, c.stages),
            sm100.make_smem_layout_b(mma, self.tile, E2M1, c.stages),
            blockscaled.make_smem_layout_sfb(mma, self.tile, BLOCK, c.stages),
        )
        operands = ((a, scale_a, m), (gate, scale_gate, n), (up, scale_up, n))[: 1 + self.weights]
        atoms, tensors = self.copy_atoms(operands, k, batch, layouts, (mma, mma_one), (cluster, cluster_one))
        across, down = cute.ceil_div(m, c.tile_m), cute.ceil_div(n, c.tile_n)
        grid = (across * c.ctas, down, batch * c.split)
        if cutlass.const_expr(c.schedule == "stream_k"):
            grid = (processors // c.ctas * c.ctas, 1, 1)
        elif cutlass.const_expr(c.schedule == "static"):
            grid = (cutlass.min(processors // c.ctas, across * down * batch) * c.ctas, 1, 1)
        self.kernel(
            (mma, mma_one), atoms, tensors, layouts, (cluster, cluster_one), (out, row_stride, batch_stride, workspace),
            self.epilogue.tensor_copy(out, (row_stride, batch_stride), (m, n, batch)),
            (global_a, global_gate, global_up), (gate_bias, up_bias), flags, (alpha, beta, limit), (m, n, k, batch),
        ).launch(
            grid=grid, block=(c.threads, 1, 1), cluster=self.cluster_shape if self.pair else None, stream=stream, use_pdl=c.pdl,
            min_blocks_per_mp=1,  # without it ptxas may spill where it has registers left
        )  # fmt: skip

    def copy_atoms(self, operands: tuple, k: Any, batch: Any, layouts: tuple, mmas: tuple, clusters: tuple) -> tuple:
        """Tensor copies, and the tensors they read, of codes and scales of A, gate and up."""
        stage = [cute.slice_(layout, (None, None, None, 0)) for layout in layouts]
        load = cpasync.CopyBulkTensorTileG2SOp(self.group)
        load_all = cpasync.CopyBulkTensorTileG2SMulticastOp(self.group) if self.pair else load
        atoms, tensors = [], []
        for i, (codes, scales, rows) in enumerate(operands):
            matrix = cute.make_tensor(codes, cute.make_layout((rows, k, batch), stride=(Int64(k), 1, Int64(rows) * k)))
            blocks = cute.make_tensor(scales, blockscaled.tile_atom_to_shape_SF(matrix.shape, BLOCK))
            make = cute.nvgpu.make_tiled_tma_atom_B if i else cute.nvgpu.make_tiled_tma_atom_A
            spread = 1 if i else 0  # every row of a weight's scales goes to both CTAs of a pair
            own = make(load, matrix, stage[2 if i else 0], self.tile, mmas[0], clusters[0].shape)
            own_scales = make(
                load_all if i else load, blocks, stage[3 if i else 1], self.scale_tile if i else self.tile, mmas[spread],
                clusters[spread].shape, internal_type=cutlass.Int16,  # scales are copied as 16-bit elements
            )  # fmt: skip
            atoms += [own[0], own_scales[0]]
            tensors += [own[1], own_scales[1]]
        return tuple(atoms), tuple(tensors)

    def storage(self, layouts: tuple) -> Any:
        stages, stores = self.config.stages, self.config.store_bytes

        @cute.struct
        class Storage:
            filled: cute.struct.MemRange[cutlass.Int64, 2 * stages]
            filled_up: cute.struct.MemRange[cutlass.Int64, 2 * stages]
            done: cute.struct.MemRange[cutlass.Int64, 4]
            freed: cutlass.Int64
            address: cutlass.Int32
            ticket: cutlass.Int32
            answered: cute.struct.MemRange[cutlass.Int64, 2 * RESPONSES]
            responses: cute.struct.Align[cute.struct.MemRange[cutlass.Int32, 4 * RESPONSES], 16]
            a: cute.struct.Align[cute.struct.MemRange[E2M1, cute.cosize(layouts[0].outer)], 1024]
            weights: cute.struct.Align[cute.struct.MemRange[E2M1, self.weights * cute.cosize(layouts[2].outer)], 1024]
            a_scales: cute.struct.Align[cute.struct.MemRange[E4M3, cute.cosize(layouts[1])], 1024]
            weight_scales: cute.struct.Align[cute.struct.MemRange[E4M3, self.weights * cute.cosize(layouts[3])], 1024]
            staged: cute.struct.Align[cute.struct.MemRange[self.epilogue.out_type, stores // 2], 1024 if stores else 16]

        return Storage

    @cute.kernel
    def kernel(
        self, mmas: tuple, atoms: tuple, tensors: tuple, layouts: tuple, clusters: tuple, out: tuple, store: tuple,
        global_scales: tuple, biases: tuple, flags: Int32, constants: tuple, shape: tuple,
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
        work = self.work(shape, control, half == 0)
        pipeline.pipeline_init_wait(cluster_shape_mn=self.cluster_shape[:2])

        # ---- the roles ----
        if warp == c.copy_warp:
            copies = self.partitions(atoms, tensors, shared, mmas, clusters, half, rank)
            mask = None
            if cutlass.const_expr(self.pair):
                mask = cpasync.create_tma_multicast_mask(clusters[1], clusters[1].get_flat_coord(rank), mcast_mode=1)
            loads = (atoms, copies, pipes, mask)
            if cutlass.const_expr(c.warps == "specialised"):
                self.load_tiles(loads, work)
            else:
                tmem.wait_for_alloc()
                products = (mmas[0], tmem.retrieve_ptr(Float32), accumulator, shared, layouts, pipes, done, half == 0)
                self.load_and_multiply_tiles(loads, products, work)
        if cutlass.const_expr(c.warps == "specialised"):
            if warp == MMA_WARP:
                tmem.wait_for_alloc()
                products = (mmas[0], tmem.retrieve_ptr(Float32), accumulator, shared, layouts, pipes, done, half == 0)
                self.multiply_tiles(products, work)
        if warp < EPILOGUE_WARPS:
            tmem.allocate(c.columns(self.weights))
            tmem.wait_for_alloc()
            base = tmem.retrieve_ptr(Float32)
            staging = self.epilogue.staging(store, storage.staged)
            context = (
                base, accumulator, done, out, staging, biases, global_scales, flags, constants, shape, half, thread,
                storage.ticket.ptr,
            )  # fmt: skip
            self.write_tiles(context, work)
            tmem.relinquish_alloc_permit()
            cute.arch.barrier(barrier_id=STORED, number_of_threads=32 * EPILOGUE_WARPS)
            tmem.free(base)

    # ---- tiles ----

    @cute.jit
    def multiply_tiles(self, context, work):
        """The warp of products."""
        used = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.config.stages)
        summed = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
        used, summed = self.each(work, partial(self.multiply_tile, context), (used, summed))
        self.end_products(context, summed)

    @cute.jit
    def multiply_tile(self, context, piece, states):
        used, summed, _ = self.multiply(context, None, piece, *states, None)
        return used, summed

    @cute.jit
    def load_and_multiply_tiles(self, loads, products, work):
        """One warp for both: copies run `ahead` steps ahead of the products."""
        used = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.config.stages)
        summed = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
        loaded, begin = self.begin_loads(loads, work)
        body = partial(self.load_and_multiply_tile, loads, products)
        loaded, begin, used, summed = self.each(work, body, (loaded, begin, used, summed), asks=True)
        self.end_loads(loads, loaded)
        self.end_products(products, summed)

    @cute.jit
    def load_and_multiply_tile(self, loads, products, piece, states):
        loaded, begin, used, summed = states
        loaded = self.load(loads, piece, begin, cutlass.min(piece[2], self.ahead), loaded)
        used, summed, loaded = self.multiply(products, loads, piece, used, summed, loaded)
        return loaded, Int32(0), used, summed

    @cute.jit
    def end_products(self, context, summed):
        """The leading CTA stays until its last sums are read: both CTAs signal its barriers."""
        done, leader = context[6], context[7]
        if leader:
            for d in cutlass.range_constexpr(len(done)):
                done[d].producer_tail(summed.clone() if cutlass.const_expr(d + 1 < len(done)) else summed)

    @cute.jit
    def write_tiles(self, context, work):
        """Warps 0 to 3."""
        if cutlass.const_expr(self.config.pdl):
            cute.arch.griddepcontrol_wait()
        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        self.each(work, partial(self.write_tile, context, work), (read,))
        self.epilogue.finish_stores(context[11])

    @cute.jit
    def write_tile(self, context, work, piece, states):
        parts = self.parts(work, piece, context[10])
        return (self.epilogue.write(context, piece[0], parts, states[0]),)

    # ---- set up ----

    def pipelines(self, storage: Any, cluster: cute.Layout) -> list:
        """One of the stages of all operands, or one of A's and gate's and one of up's."""
        c = self.config
        one = pipeline.CooperativeGroup(pipeline.Agent.Thread)
        sizes = [c.a_bytes + c.weight_bytes, c.weight_bytes] if c.barriers == "separate" else [c.stage_bytes(self.weights)]
        return [
            pipeline.PipelineTmaUmma.create(
                barrier_storage=barriers.data_ptr(), num_stages=c.stages, producer_group=one, consumer_group=one,
                tx_count=size * c.ctas, cta_layout_vmnk=cluster, defer_sync=True,
            )
            for barriers, size in zip((storage.filled, storage.filled_up), sizes)
        ]  # fmt: skip

    def done(self, storage: Any, cluster: cute.Layout) -> list:
        """One for both sums, or one for each where gate's are done first."""
        return [
            pipeline.PipelineUmmaAsync.create(
                barrier_storage=storage.done.data_ptr() + 2 * i, num_stages=1,
                producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
                consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 32 * EPILOGUE_WARPS * self.config.ctas),
                cta_layout_vmnk=cluster, defer_sync=True,
            )
            for i in range(2 if self.config.gate_first else 1)
        ]  # fmt: skip

    def shared_operands(self, storage: Any, layouts: tuple) -> list:
        """Codes and scales of A, gate and up in shared memory, with stages."""
        a, a_scales, weight, weight_scales = layouts
        found = [storage.a.get_tensor(a.outer, swizzle=a.inner), storage.a_scales.get_tensor(a_scales)]
        for w in range(self.weights):
            codes = cute.recast_ptr(storage.weights.data_ptr() + w * cute.cosize(weight.outer), weight.inner, dtype=E2M1)
            found.append(cute.make_tensor(codes, weight.outer))
            scales = storage.weight_scales.data_ptr() + w * cute.cosize(weight_scales)
            found.append(cute.make_tensor(scales, weight_scales))
        return found

    def partitions(
        self, atoms: tuple, tensors: tuple, shared: list, mmas: tuple, clusters: tuple, half: Any, rank: Any
    ) -> list:
        """(global, shared) of each copy: [elements, tile, step along K, batch] and [elements, stage]."""
        found = []
        for i, (atom, tensor, target) in enumerate(zip(atoms, tensors, shared)):
            is_a, is_scale = i < GATE, i % 2 == 1
            spread = 1 if is_scale and not is_a else 0
            tiler = cute.slice_(self.scale_tile if spread else self.tile, (None, 0, None) if is_a else (0, None, None))
            tiled = cute.local_tile(tensor, tiler, (None, None, None))
            part = mmas[spread].get_slice(half)
            mine = part.partition_A(tiled) if is_a else part.partition_B(tiled)
            place = clusters[1].get_flat_coord(rank)[1] if spread else 0
            ctas = cute.slice_(clusters[1], (0, None, 0, 0)).shape if spread else 1
            to, source = cpasync.tma_partition(
                atom, place, cute.make_layout(ctas), cute.group_modes(target, 0, 3), cute.group_modes(mine, 0, 3)
            )
            # the 16 elements of a block share a scale: a mode of stride 0, which is not copied
            found.append((cute.filter_zeros(source), cute.filter_zeros(to)) if is_scale else (source, to))
        return found

    def scale_sets(self, base: Any, layouts: tuple, mma: cute.TiledMma, shared: list, shift: Any) -> list:
        """(copy, source in shared memory, target in tensor memory, the MMA's operand) for A, gate and up."""
        c = self.config
        found, column = [], self.weights * c.tile_n
        for i in range(1 + self.weights):
            make = blockscaled.make_tmem_layout_sfb if i else blockscaled.make_tmem_layout_sfa
            layout = make(mma, self.tile, BLOCK, cute.slice_(layouts[3 if i else 1], (None, None, None, 0)))
            whole = cute.make_tensor(cute.recast_ptr(base + column, dtype=E4M3), layout)
            source, target = cute.filter_zeros(shared[1 + 2 * i]), cute.filter_zeros(whole)
            copy = tcgen05.make_s2t_copy(cute.make_copy_atom(tcgen05.Cp4x32x128bOp(self.group), E4M3), target)
            lane = copy.get_slice(0)
            described = tcgen05.get_s2t_smem_desc_tensor(copy, lane.partition_S(source))
            operand = whole
            if i and self.sharing > 1:
                operand = cute.make_tensor(cute.recast_ptr(base + column + shift, dtype=E4M3), layout)
            found.append((copy, described, lane.partition_D(target), operand))
            column += c.weight_scale_columns if i else c.a_scale_columns
        return found

    # ---- multiply ----

    @cute.jit
    def multiply(self, context, loads, piece, state, done_state, loaded):
        """Scales to tensor memory and the products of every step of a tile, issued by the leading CTA of a pair.

        loads: where this warp copies operands too, what `load` needs; loaded: its state.
        """
        c = self.config
        mma, base, accumulator, shared, layouts, pipes, done, leader = context
        tile_at, _, steps = piece
        shift = tile_at[1] % self.sharing * self.shift
        scales = self.scale_sets(base, layouts, mma, shared, shift)
        operands = (
            mma.make_fragment_A(shared[A]), [mma.make_fragment_B(shared[i]) for i in (GATE, UP)[: self.weights]],
            [cute.make_tensor(base + w * c.tile_n, accumulator) for w in range(self.weights)], base.toint(), shift,
        )  # fmt: skip
        last = steps
        if cutlass.const_expr(c.gate_first > 0):
            last = cutlass.max(steps - c.gate_first, 0)
        if leader:
            for d in cutlass.range_constexpr(len(done)):
                done[d].producer_acquire(done_state)
        for step in cutlass.range(last, unroll=1):
            if leader:
                self.step(operands, scales, pipes, state, step)
                for p in cutlass.range_constexpr(len(pipes)):
                    pipes[p].consumer_release(state)
            state.advance()
            loaded = self.load_next(loads, piece, step, loaded)
        if cutlass.const_expr(c.gate_first > 0):
            state, loaded = self.end(operands, scales, pipes, done, done_state, state, last, loads, piece, loaded, leader)
        if leader:
            done[len(done) - 1].producer_commit(done_state)
        done_state.advance()
        return state, done_state, loaded

    @cute.jit
    def load_next(self, loads, piece, step, loaded):
        """Where this warp copies operands too, those of the step that comes `ahead` later."""
        if cutlass.const_expr(self.config.warps == "single"):
            later = step + self.ahead
            loaded = self.load(loads, piece, later, cutlass.min(later + 1, piece[2]), loaded)
        return loaded

    @cute.jit
    def step(self, operands, scales, pipes, state, step):
        """The products of one stage."""
        c = self.config
        pipes[0].consumer_wait(state)
        self.copy_scales(scales[0], state)
        self.copy_scales(scales[1], state)
        if cutlass.const_expr(self.weights == 1):
            self.products(operands, scales, (0,), state, step)
        elif cutlass.const_expr(c.order == "interleaved"):
            if cutlass.const_expr(len(pipes) == 2):
                pipes[1].consumer_wait(state)
            self.copy_scales(scales[2], state)
            self.products(operands, scales, (0, 1), state, step)
        else:
            self.products(operands, scales, (0,), state, step)
            if cutlass.const_expr(len(pipes) == 2):
                pipes[1].consumer_wait(state)
            self.copy_scales(scales[2], state)
            self.products(operands, scales, (1,), state, step)

    @cute.jit
    def end(self, operands, scales, pipes, done, done_state, state, first, loads, piece, loaded, leader):
        """The last steps: gate's products of all, then up's; their stages are released after the second."""
        steps, again = piece[2], state.clone()
        for step in cutlass.range(first, steps, unroll=1):
            if leader:
                pipes[0].consumer_wait(state)
                self.copy_scales(scales[0], state)
                self.copy_scales(scales[1], state)
                self.products(operands, scales, (0,), state, step)
            state.advance()
            loaded = self.load_next(loads, piece, step, loaded)
        if leader:
            done[0].producer_commit(done_state)
        for step in cutlass.range(first, steps, unroll=1):
            if leader:
                if cutlass.const_expr(len(pipes) == 2):
                    pipes[1].consumer_wait(again)
                self.copy_scales(scales[0], again)
                self.copy_scales(scales[2], again)
                self.products(operands, scales, (1,), again, step)
                for p in cutlass.range_constexpr(len(pipes)):
                    pipes[p].consumer_release(again)
            again.advance()
        return again, loaded

    @cute.jit
    def copy_scales(self, scales, state):
        """One operand's scales of a stage to tensor memory; the MMAs after it need not wait (PTX ISA, tcgen05 memory model)."""
        copy, source, target, _ = scales
        cute.copy(copy, source[(None, None, None, None, state.index)], target)

    @cute.jit
    def products(self, operands, scales, which: cutlass.Constexpr, state, step):
        """All MMAs of a stage for gate (0), up (1) or both by turns; with both, A may stay in the collector buffer."""
        c = self.config
        if cutlass.const_expr(c.collector):
            keep = cutlass.const_expr(("fill", "lastuse") if len(which) == 2 else ("discard", "discard"))
            with cute.arch.elect_one():
                for block in cutlass.range_constexpr(c.tile_k // MMA_K):
                    for w in cutlass.range_constexpr(len(which)):
                        self.hinted_product(operands, which[w], state, block, step, keep[w])
        else:
            for block in cutlass.range_constexpr(c.tile_k // MMA_K):
                for w in cutlass.range_constexpr(len(which)):
                    self.product(operands, scales, which[w], state, block, step)

    @cute.jit
    def product(self, operands, scales, w: cutlass.Constexpr, state, block: cutlass.Constexpr, step):
        """64 of K of gate's (w 0) or up's product; the first of all overwrites the accumulator."""
        a, weights, sums, _, _ = operands
        now, here = (None, None, block, state.index), (None, None, block)
        mma = self.make_mma(self.group, self.tile[:2])  # its own: what is set inside a loop is not known after it
        mma.set(tcgen05.Field.ACCUMULATE, True if cutlass.const_expr(block > 0) else step != 0)
        cute.gemm(mma, sums[w], [a[now], scales[0][3][here]], [weights[w][now], scales[1 + w][3][here]], sums[w])

    @cute.jit
    def hinted_product(
        self, operands, w: cutlass.Constexpr, state, block: cutlass.Constexpr, step, keep: cutlass.Constexpr
    ):  # fmt: skip
        """As `product`, with a hint for A, by one thread."""
        c = self.config
        a, weights, _, base, shift = operands
        now = (None, None, block, state.index)
        columns = 2 * c.tile_n + block * 4
        own = columns + c.a_scale_columns + w * c.weight_scale_columns
        block_scaled_mma(
            c.ctas, keep, instruction_descriptor(c.tile_m, c.tile_n), base + w * c.tile_n, a[now], weights[w][now],
            base + columns, base + own + shift, True if cutlass.const_expr(block > 0) else step != 0,
        )  # fmt: skip
