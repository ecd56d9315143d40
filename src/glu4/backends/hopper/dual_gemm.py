"""sm90_dual_gemm: C = act(x W_gate^T) * (x W_up^T), or x W^T, for sm_90a in CuTe DSL. Device code; needs nvidia-cutlass-dsl.

Weights are wgmma's matrix A, decoded in registers; tokens are its matrix B, in shared memory: C^T = W x^T. Read
`pack` for the order of the weights and `config` for what can be chosen. Sections of the kernel, in order: shared memory and
barriers, the producers, the consumers' main loop (decode, products), the sums over k_groups and splits, the epilogue.

Order between kernels of a stream (griddepcontrol, PTX ISA): copies of weights may start before the kernel in front has ended;
tokens, scales and biases are read, and the output is written, after it.

Exactness. A decoded fp16 value is e2m1 * e4m3 * 2^-7, a bf16 one * 2^-8, both exact; products are exact in float32, and only
the order and truncation of the tensor core's sums remain. Global scales are applied in float32, as `_scales` says.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as sm90
from cuda.bindings.driver import CUstream
from cutlass import pipeline
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cutlass_dsl import T as MlirType
from cutlass.memory import SmemAllocator

from glu4.backends.hopper.config import DECODER_REGISTERS, PRODUCER_REGISTERS, TILE_K, UNIT_BYTES, WARPGROUP, Config
from glu4.backends.hopper.decode_tokens import TOKEN_BIAS, produce_tokens
from glu4.backends.hopper.instructions import (
    asm_u32,
    bulk_store,
    store_16_bytes,
    store_remote,
    store_transposed,
)
from glu4.backends.hopper.pack import CODE_WORDS, UNIT_WORDS

Int32, Int64, Uint32, Float32 = cutlass.Int32, cutlass.Int64, cutlass.Uint32, cutlass.Float32

# bits of `flags`
X_SCALE, GATE_BIAS, UP_BIAS, IDENTITY = 1, 2, 4, 8


def _scaled(values: Any, scales: Any, half: int, kind: str) -> Any:
    """Two values times one half of `scales`; ptxas makes the broadcast part of the multiply."""
    name = ("lo", "hi")[half]
    code = (
        f"{{ .reg .b16 lo, hi; .reg .b32 t; mov.b32 {{lo, hi}}, $2; mov.b32 t, {{{name}, {name}}}; mul.rn.{kind} $0, $1, t; }}"
    )
    return asm_u32(code, values, scales)


class DualGemm:
    """One kernel: a Config, the types of tokens and output, and whether there are two matrices or one.

    Arguments at launch: x [m, k] in 16 bits (row stride a multiple of 8 elements, 16-byte aligned), or codes and block scales
    of NVFP4 tokens as `produce_tokens` reads them; packed weights int32
    [tiles, units, 576]; float32 global scales of gate (or the one matrix), up and x; float32 biases [n]; `flags`, which says
    which of these are used; the activation's constants; out [m, n].
    """

    def __init__(self, config: Config, x_type: Any, out_type: Any, dual: bool) -> None:
        """x_type, out_type: CuTe DSL's; x_type None for NVFP4 tokens."""
        self.config, self.out_type, self.dual = config, out_type, dual
        self.nvfp4 = x_type is None
        self.x_type = cutlass.Float16 if self.nvfp4 else x_type
        self.brain = x_type is cutlass.BFloat16
        # what the decode leaves: fp16 values are 2^-7 times the weight (2^-14 from the field, 2^7 in the scale), bf16 2^-8
        self.exponent_bias = 8 if self.brain else 7 + TOKEN_BIAS if self.nvfp4 else 7

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        block_scales: cute.Tensor | None,
        weights: cute.Tensor,
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
        stream: CUstream,
    ):
        c = self.config
        mma = sm90.make_trivial_tiled_mma(
            self.x_type, self.x_type, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1), (64, c.tokens),
            warpgroup.OperandSource.RMEM,
        )  # fmt: skip
        layout = sm90.make_smem_layout_b(
            utils.LayoutEnum.ROW_MAJOR, (64, c.tokens, TILE_K), self.x_type, c.stages * c.stage_units
        )
        load_x, tokens = None, x
        if cutlass.const_expr(not self.nvfp4):
            one_stage = cute.slice_(layout, (None, None, 0))
            op = cpasync.CopyBulkTensorTileG2SMulticastOp() if c.cluster > 1 else cpasync.CopyBulkTensorTileG2SOp()
            load_x, tokens = cpasync.make_tiled_tma_atom(op, x, one_stage, (c.tokens, TILE_K), num_multicast=c.cluster)

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, c.stages * 2]
            tokens: cute.struct.Align[cute.struct.MemRange[self.x_type, cute.cosize(layout)], 1024]
            weights: cute.struct.Align[cute.struct.MemRange[Uint32, c.stages * c.stage_units * c.rows * UNIT_WORDS], 128]
            staging: cute.struct.Align[cute.struct.MemRange[Uint32, c.staging_bytes // 4 if self.nvfp4 else 0], 8]

        self.shared = Shared
        outputs = c.rows * (32 if self.dual else 64)
        token_tiles, row_tiles = cute.ceil_div(out.shape[0], c.tokens), cute.ceil_div(out.shape[1], outputs)
        groups = cute.ceil_div(token_tiles, c.token_group)
        x_tiles = cutlass.min(token_tiles, c.token_group)
        grid = (x_tiles, cute.ceil_div(row_tiles, c.cluster) * c.cluster, groups * c.splits)
        self.kernel(
            load_x, tokens, block_scales, weights, gate_scale, up_scale, x_scale, gate_bias, up_bias, flags, alpha, beta,
            limit, out, mma, layout,
        ).launch(
            grid=grid, block=(c.cta_threads(self.nvfp4), 1, 1), cluster=(1, c.cluster, c.splits), stream=stream,
            min_blocks_per_mp=1,  # all registers, which setmaxnreg counts on
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        load_x: cute.CopyAtom | None,
        x: cute.Tensor,
        block_scales: cute.Tensor | None,
        weights: cute.Tensor,
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
        token_tile, row_tile, outer = cute.arch.block_idx()
        token_tile, split = token_tile + outer // c.splits * c.token_group, outer % c.splits
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)

        # ---- shared memory and barriers ----
        if cutlass.const_expr(not self.nvfp4):
            if warp == 0:
                cpasync.prefetch_descriptor(load_x)
        shared = SmemAllocator().allocate(self.shared)
        pipe = pipeline.PipelineTmaAsync.create(
            barrier_storage=shared.barriers.data_ptr(),
            num_stages=c.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1 + self.nvfp4),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * c.rows * c.cluster),
            tx_count=c.stage_units * c.rows * UNIT_BYTES if self.nvfp4 else c.stage_bytes,
            cta_layout_vmnk=cute.make_layout((1, 1, c.cluster, 1)),
        )
        s_tokens = shared.tokens.get_tensor(layout.outer, swizzle=layout.inner)
        stage_words = UNIT_WORDS * c.stage_units
        s_weights = shared.weights.get_tensor(
            cute.make_layout((stage_words, c.rows, c.stages), stride=(1, stage_words, c.rows * stage_words))
        )
        all_steps = (weights.shape[1] + c.stage_units - 1) // c.stage_units
        first_step = all_steps * split // c.splits
        steps = all_steps * (split + 1) // c.splits - first_step
        if token_tile * c.tokens >= out.shape[0]:  # beyond the last tile of the last group
            steps = 0

        if (group == c.consumers) & (c.producers == "warps"):
            # ---- producers: two warps of a warpgroup, each with half of the instructions ----
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, c.stages)
            if warp == 4 * c.consumers:
                # weights, and the stage's bytes; no other kernel writes weights, so none is waited for
                for k in cutlass.range(steps, unroll=1):
                    pipe.producer_acquire(state)
                    self.load_weights(weights, s_weights, pipe, state, row_tile, first_step + k)
                    state.advance()
                pipe.producer_tail(state)
            if cutlass.const_expr(not self.nvfp4):
                if warp == 4 * c.consumers + 1:
                    self.copy_tokens(load_x, x, s_tokens, pipe, state, token_tile, row_tile, first_step, steps)
        if cutlass.const_expr(self.nvfp4):
            if group == c.consumers + 1:
                # ---- a warpgroup that decodes tokens ----
                self.decode_tokens(
                    x, block_scales, shared.tokens.data_ptr(), shared.staging.data_ptr(), pipe, token_tile, first_step, steps,
                    warp,
                )  # fmt: skip
        if group < c.consumers:
            # ---- consumers ----
            if cutlass.const_expr(c.producers == "warps"):
                cute.arch.setmaxregister_increase(c.consumer_registers(self.nvfp4))
            row, k_group = group % c.rows, group // c.rows
            lane = thread % WARPGROUP
            sums = cute.make_rmem_tensor(mma.partition_shape_C((64, c.tokens)), Float32)
            copies = None
            if cutlass.const_expr(c.producers == "none"):
                from_global, to_shared = self.token_copies(load_x, x, s_tokens, token_tile, row_tile)
                copies = (load_x, from_global, to_shared, weights, row_tile, steps, warp)
                self.fill(copies, s_weights, pipe)
            self.main_loop(mma, pipe, s_tokens, s_weights, steps, row, k_group, lane, sums, copies)
            partial = cute.make_tensor(
                cute.recast_ptr(shared.tokens.data_ptr(), dtype=Float32),
                cute.make_layout((WARPGROUP, 64 * c.tokens // WARPGROUP, c.rows, max(1, c.k_groups - 1))),
            )
            self.add_groups(sums, partial, row, k_group, lane)
            if cutlass.const_expr(c.splits > 1):
                self.exchange(sums, shared.tokens.data_ptr(), split, row, k_group, lane)
            if k_group == 0:
                # x's scale is the kernel before's to write, and what this one stores may be its to read
                cute.arch.griddepcontrol_wait()
                gate_factors = self.scales(gate_scale[0], x_scale, flags)
                up_factors = self.scales(up_scale[0], x_scale, flags)
                staging = shared.tokens.data_ptr().toint() + c.reduction_bytes
                for part in cutlass.range_constexpr(c.splits):
                    if split == part:
                        values = self.epilogue(
                            sums, gate_factors, up_factors, gate_bias, up_bias, flags, alpha, beta, limit, out.shape[1],
                            row_tile * c.rows + row, lane, part * (c.tokens // 8 // c.splits), c.tokens // 8 // c.splits,
                        )  # fmt: skip
                        if cutlass.const_expr(c.k_groups == 1 and c.splits == 1):
                            # the tokens' memory is free once no product reads it any more
                            cute.arch.barrier(barrier_id=1, number_of_threads=c.consumers * WARPGROUP)
                        self.store(values, out, staging, row, token_tile * c.tokens + part * (c.tokens // c.splits),
                                   row_tile * c.rows + row, lane, c.tokens // c.splits)  # fmt: skip

    # ---- copies ----

    @cute.jit
    def load_weights(self, weights, s_weights, pipe, state, row_tile, k, groups=None):
        """Start the bulk copies of one stage's packed units, one for each row group; of the first `groups` alone, if given."""
        c = self.config
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(c.rows):
                if cutlass.const_expr(groups is not None):
                    if i < groups:
                        self.load_group(weights, s_weights, pipe, state, row_tile, k, i)
                else:
                    self.load_group(weights, s_weights, pipe, state, row_tile, k, i)

    @cute.jit
    def load_group(self, weights, s_weights, pipe, state, row_tile, k, i: cutlass.Constexpr):
        """Start one of them."""
        c = self.config
        stage_words = UNIT_WORDS * c.stage_units
        # the last tile of a ragged grid reads a tile that exists and stores nothing
        tile = cutlass.min(row_tile * c.rows + i, weights.shape[0] - 1)
        # units lie one after the other; past the last one come others or the spare one, times zero
        first = weights[(tile, k * c.stage_units, None)].iterator
        copy_units = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Uint32)
        source = cute.make_tensor(first, cute.make_layout(stage_words))
        cute.copy(copy_units, source, s_weights[(None, i, state.index)], mbar_ptr=pipe.producer_get_barrier(state))

    @cute.jit
    def decode_tokens(self, x, block_scales, tokens, staging, pipe, token_tile, first_step, steps, warp):
        """All token stages, from NVFP4."""
        c = self.config
        cute.arch.setmaxregister_decrease(DECODER_REGISTERS)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        produce_tokens(
            x, block_scales, tokens.toint(), staging.toint(), pipe, token_tile * c.tokens, first_step, steps,
            warp - 4 * (c.consumers + 1), c,
        )  # fmt: skip

    @cute.jit
    def copy_tokens(self, load_x, x, s_tokens, pipe, state, token_tile, row_tile, first_step, steps):
        """All token stages, which the kernel before this one may write; bytes may arrive before they are announced."""
        from_global, to_shared = self.token_copies(load_x, x, s_tokens, token_tile, row_tile)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        for k in cutlass.range(steps, unroll=1):
            pipe.sync_object_empty.wait(state.index, state.phase)
            self.load_tokens(load_x, from_global, to_shared, pipe, state, first_step + k)
            state.advance()

    @cute.jit
    def token_copies(self, load_x, x, s_tokens, token_tile, row_tile):
        """(global, shared) sides of the tensor copies of a tile's tokens, this CTA's share of them."""
        c = self.config
        g_tokens = cute.local_tile(x, (c.tokens, TILE_K), (token_tile, None))
        share = row_tile % c.cluster
        to_shared, from_global = cpasync.tma_partition(
            load_x, share, cute.make_layout(c.cluster), cute.group_modes(s_tokens, 0, 2),
            cute.group_modes(g_tokens, 0, 2),
        )  # fmt: skip
        return from_global, to_shared

    @cute.jit
    def load_tokens(self, load_x, from_global, to_shared, pipe, state, k):
        """Start the tensor copies of one stage's tokens, this CTA's share of them to every CTA of the cluster."""
        c = self.config
        barrier = pipe.producer_get_barrier(state)
        for u in cutlass.range_constexpr(c.stage_units):
            source = from_global[(None, k * c.stage_units + u)]
            target = to_shared[(None, state.index * c.stage_units + u)]
            if cutlass.const_expr(c.cluster > 1):
                cute.copy(load_x, source, target, tma_bar_ptr=barrier, mcast_mask=cutlass.Int16((1 << c.cluster) - 1))
            else:
                cute.copy(load_x, source, target, tma_bar_ptr=barrier)

    # ---- copies without producers: the first consumer warp fills all stages, then each again after its release ----

    @cute.jit
    def fill(self, copies, s_weights, pipe):
        """Start the copies of the first stages: weights at once, tokens after the kernel in front."""
        load_x, from_global, to_shared, weights, row_tile, steps, warp = copies
        first = cutlass.min(steps, self.config.stages)
        if warp == 0:
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.config.stages)
            for k in cutlass.range(first, unroll=1):
                pipe.producer_acquire(state)
                self.load_weights(weights, s_weights, pipe, state, row_tile, k)
                state.advance()
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.config.stages)
            for k in cutlass.range(first, unroll=1):
                self.load_tokens(load_x, from_global, to_shared, pipe, state, k)
                state.advance()

    @cute.jit
    def refill(self, copies, s_weights, pipe, stage, phase, before, any_before, step):
        """Start the copies of the step that comes `stages` after the one before `step`, once all have released its stage."""
        load_x, from_global, to_shared, weights, row_tile, steps, warp = copies
        ahead = step + (self.config.stages - 1)
        if (warp == 0) & any_before & (ahead < steps):
            # how often the stage was released so far: its phase, which turns with the ring
            released = phase ^ 1 if before > stage else phase
            state = pipeline.PipelineState(self.config.stages, Int32(0), before, released)
            pipe.producer_acquire(state)
            self.load_weights(weights, s_weights, pipe, state, row_tile, ahead)
            self.load_tokens(load_x, from_global, to_shared, pipe, state, ahead)

    # ---- main loop ----

    @cute.jit
    def main_loop(self, mma, pipe, s_tokens, s_weights, steps, row, k_group, lane, sums, copies):
        """Products of this warpgroup's rows with the tokens, for stages k_group, k_group + k_groups, ... of K."""
        c = self.config
        thr = mma.get_slice(lane)
        tokens = mma.make_fragment_B(thr.partition_B(s_tokens))
        sums.fill(0.0)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        shape = mma.partition_shape_A((64, TILE_K))
        even = mma.make_fragment_A(shape)
        odd = mma.make_fragment_A(shape) if cutlass.const_expr(c.fragment_sets == 2) else even
        mine = (steps - k_group + c.k_groups - 1) // c.k_groups
        stage, before, phase = Int32(k_group), Int32(0), Int32(0)
        passes = mine // c.unroll
        for i in cutlass.range(passes, unroll=1):
            for j in cutlass.range_constexpr(c.unroll):
                self.step(
                    mma, pipe, s_weights, tokens, sums, even, odd, row, lane, stage + j * c.k_groups, phase,
                    before if cutlass.const_expr(j == 0) else stage + (j - 1) * c.k_groups, (i > 0) | (j > 0),
                    copies, i * c.unroll + j,
                )  # fmt: skip
            before = stage + (c.unroll - 1) * c.k_groups
            stage += c.unroll * c.k_groups
            if stage >= c.stages:
                stage -= c.stages
                phase ^= 1
        for i in cutlass.range(passes * c.unroll, mine, unroll=1):
            self.step(mma, pipe, s_weights, tokens, sums, even, odd, row, lane, stage, phase, before, i > 0, copies, i)
            before = stage
            stage += c.k_groups
            if stage >= c.stages:
                stage -= c.stages
                phase ^= 1
        warpgroup.wait_group(0)
        if mine > 0:
            self.release(pipe, before, lane)  # every stage, or the producer waits for ever

    @cute.jit
    def step(self, mma, pipe, s_weights, tokens, sums, even, odd, row, lane, stage, phase, before, any_before,
             copies, number):  # fmt: skip
        """Decode and multiply one stage, step `number`; release the stage before it once its products are done."""
        c = self.config
        pipe.sync_object_full.wait(stage, phase)
        if cutlass.const_expr(self.nvfp4):  # warps wrote the tokens, and wgmma reads them through the async proxy
            cute.arch.fence_proxy("async.shared", space="cta")
        for u in cutlass.range_constexpr(c.stage_units):
            fragment = odd if cutlass.const_expr(u == 1) else even
            codes, scales = self.load_unit(s_weights, stage, row, lane, u)
            if cutlass.const_expr(c.fragment_sets == 1):
                warpgroup.wait_group(0)
                if cutlass.const_expr(u == 0):
                    if any_before:
                        self.release(pipe, before, lane)
            self.decode(codes, scales, fragment)
            self.multiply(mma, sums, fragment, tokens, stage * c.stage_units + u)
            if cutlass.const_expr(c.fragment_sets == 2):
                warpgroup.wait_group(1)  # all but the products just issued: the other fragment and the stage before are free
                if cutlass.const_expr(u == 0):
                    if any_before:
                        self.release(pipe, before, lane)
        if cutlass.const_expr(copies is not None):
            self.refill(copies, s_weights, pipe, stage, phase, before, any_before, number)

    @cute.jit
    def release(self, pipe, stage, lane):
        """A stage's memory is free for the next copies: one arrival a warp, at each CTA that copies into it."""
        cute.arch.sync_warp()  # the one lane's arrival then stands for the reads of all
        if lane % 32 < self.config.cluster:
            pipe.sync_object_empty.arrive(stage, pipe.consumer_mask)

    @cute.jit
    def load_unit(self, s_weights, stage, row, lane, unit: cutlass.Constexpr = 0):
        """This thread's words of one unit of a stage: 4 of codes, 2 of scales."""
        start = s_weights[(None, row, stage)].iterator + unit * UNIT_WORDS
        codes, scales = cute.make_rmem_tensor((4,), Uint32), cute.make_rmem_tensor((2,), Uint32)
        cute.autovec_copy(cute.make_tensor(start + lane * 4, cute.make_layout(4)), codes)
        pair = (lane // 32) * 8 + (lane % 32) // 4
        cute.autovec_copy(cute.make_tensor(start + CODE_WORDS + pair * 2, cute.make_layout(2)), scales)
        return codes, scales

    @cute.jit
    def decode(self, codes, scales, fragment, first: cutlass.Constexpr = 0, steps: cutlass.Constexpr = 4):
        """`steps` steps of 16 of one unit from `first` on into four registers each of a fragment; fields and scale bytes as
        `pack` lays them out."""
        registers = cute.recast_tensor(fragment, Uint32)
        for s in cutlass.range_constexpr(first, first + steps):
            x, w = codes[s], scales[s // 2]
            if cutlass.const_expr(self.brain):
                both = ((w << 4) if cutlass.const_expr(s % 2 == 0) else (w >> 4)) & 0x0FF00FF0
                both = both + 0x6F806F80
                magnitudes, mask, kind = (x >> 3, x, x << 3, x << 6), 0x01C001C0, "bf16x2"
            else:
                both = ((w << 7) if cutlass.const_expr(s % 2 == 0) else (w >> 1)) & 0x7F807F80
                magnitudes, mask, kind = (x, x << 3, x << 6, x << 9), 0x0E000E00, "f16x2"
            signs = (x, x << 3, x << 1, x << 2)
            for j in cutlass.range_constexpr(4):
                value = (magnitudes[j] & mask) | (signs[j] & 0x80008000)
                registers[4 * (s - first) + j] = _scaled(value, both, j % 2, kind)

    @cute.jit
    def multiply(self, mma, sums, fragment, tokens, unit):
        """Issue one unit's four products."""
        warpgroup.fence()
        for s in cutlass.range_constexpr(4):
            cute.gemm(mma, sums, fragment[(None, None, s)], tokens[(None, None, s, unit)], sums)
        warpgroup.commit_group()

    # ---- the sum over k_groups, in their order ----

    @cute.jit
    def add_groups(self, sums, partial, row, k_group, lane):
        c = self.config
        if cutlass.const_expr(c.k_groups > 1):
            count = cutlass.const_expr(64 * c.tokens // WARPGROUP)
            # all stages are consumed once every consumer is here, so their memory can hold the partial sums
            cute.arch.barrier(barrier_id=1, number_of_threads=c.consumers * WARPGROUP)
            if k_group > 0:
                for i in cutlass.range_constexpr(count):
                    partial[lane, i, row, k_group - 1] = sums[i]
            cute.arch.barrier(barrier_id=1, number_of_threads=c.consumers * WARPGROUP)
            if k_group == 0:
                for g in cutlass.range_constexpr(c.k_groups - 1):
                    for i in cutlass.range_constexpr(count):
                        sums[i] = sums[i] + partial[lane, i, row, g]

    # ---- the sum over splits, in their order: each CTA of the cluster receives its share of the tile from the others ----

    @cute.jit
    def exchange(self, sums, memory, split, row, k_group, lane):
        c = self.config
        count = cutlass.const_expr(64 * c.tokens // WARPGROUP // c.splits)
        # float32 [sender, row group, count / 4, thread, 4]
        received = cute.make_layout(
            ((4, count // 4), WARPGROUP, c.rows, c.splits - 1),
            stride=((1, 4 * WARPGROUP), 4, count * WARPGROUP, c.rows * count * WARPGROUP),
        )
        # every CTA is done with its stages, so their memory can take the sums of others
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        if k_group == 0:
            for part in cutlass.range_constexpr(c.splits):
                if split != part:
                    slot = split if split < part else split - 1
                    offset = 4 * received((0, lane, row, slot))
                    there = asm_u32("mapa.shared::cluster.u32 $0, $1, $2;", memory.toint() + offset, part)
                    for i in cutlass.range_constexpr(0, count, 4):
                        four = [sums[part * count + i + e] for e in range(4)]
                        store_remote(there + i * WARPGROUP * 4, *four)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        if k_group == 0:
            here = cute.make_tensor(cute.recast_ptr(memory, dtype=Float32), received)
            for part in cutlass.range_constexpr(c.splits):
                if split == part:
                    for i in cutlass.range_constexpr(count):
                        total = Float32(0.0)
                        for other in cutlass.range_constexpr(c.splits):
                            if cutlass.const_expr(other == part):
                                value = sums[part * count + i]
                            else:
                                value = here[i, lane, row, other - (other > part)]
                            total = value if cutlass.const_expr(other == 0) else total + value
                        sums[part * count + i] = total

    # ---- epilogue ----

    @cute.jit
    def scales(self, weight_scale, x_scale, flags):
        """Two float32 factors whose product is the global scales times 2^exponent_bias.

        The product itself may overflow or vanish where the result does not, so its exponent is shared out evenly.
        """
        m_w, e_w = self.split(weight_scale)
        m_x, e_x = Float32(1.0), Int32(0)
        if (flags & X_SCALE) != 0:
            m_x, e_x = self.split(x_scale[0])
        exponent = e_w + e_x + self.exponent_bias
        first = exponent >> 1
        return m_w * m_x * self.power_of_two(first), self.power_of_two(exponent - first)

    @cute.jit
    def split(self, value):
        """(m, e) with value = m * 2^e, 1/2 <= m < 1, of a positive float32, subnormal ones included.

        m < 1, so that no product of mantissas and a power of two is infinite, which would make NaN of a sum that is zero.
        """
        bits = llvm.bitcast(MlirType.i32(), value.ir_value())
        raw = Int32(bits)
        lifted = Int32(llvm.bitcast(MlirType.i32(), (value * 16777216.0).ir_value()))
        small = raw < 0x00800000
        raw = lifted if small else raw
        exponent = (raw >> 23) - 126
        exponent = exponent - 24 if small else exponent
        mantissa = (raw & 0x007FFFFF) | 0x3F000000
        return Float32(llvm.bitcast(MlirType.f32(), Int32(mantissa).ir_value())), exponent

    @cute.jit
    def power_of_two(self, exponent):
        clamped = cutlass.min(cutlass.max(exponent, -126), 127)
        return Float32(llvm.bitcast(MlirType.f32(), Int32((clamped + 127) << 23).ir_value()))

    @cute.jit
    def epilogue(
        self, sums, gate_factors, up_factors, gate_bias, up_bias, flags, alpha, beta, limit, n, row_tile, lane,
        start: cutlass.Constexpr, share: cutlass.Constexpr,
    ):  # fmt: skip
        """Scales, bias and activation in float32 and one rounding, for `share` times eight tokens of the tile from 8 `start`
        on; two tokens a register.

        Registers 4 j + p and 4 j + 2 + p are rows g and g + 8 of token 8 j + 2 q + p (PTX ISA, wgmma, matrix D).
        """
        each = cutlass.const_expr(1 if self.dual else 2)
        values = cute.make_rmem_tensor((share * each * 2,), self.out_type)
        gate_factor, up_factor = gate_factors[0] * gate_factors[1], up_factors[0] * up_factors[1]
        # a factor in this range is exact in one multiply
        plain = (flags & (GATE_BIAS | UP_BIAS | IDENTITY)) == 0
        for factor in (gate_factor, up_factor):
            plain = plain & (factor > 1e-37) & (factor < 1e38)
        if cutlass.const_expr(self.dual):
            plain = plain & (limit == float("inf")) & (beta == 0.0)
        if plain:
            slope = alpha * -1.4426950408889634  # log2(e)
            for j in cutlass.range_constexpr(share):
                for p in cutlass.range_constexpr(2):
                    gate = sums[4 * (start + j) + p] * gate_factor
                    up = sums[4 * (start + j) + 2 + p] * up_factor
                    if cutlass.const_expr(self.dual):
                        sigmoid = cute.arch.rcp_approx(1.0 + cute.arch.exp2(gate * slope))
                        values[2 * j + p] = (gate * sigmoid * up).to(self.out_type)
                    else:
                        values[4 * j + p] = gate.to(self.out_type)
                        values[4 * j + 2 + p] = up.to(self.out_type)
        else:
            gate_extra, up_extra = self.biases(gate_bias, up_bias, flags, n, row_tile, lane)
            for j in cutlass.range_constexpr(share):
                for p in cutlass.range_constexpr(2):
                    gate = sums[4 * (start + j) + p] * gate_factors[0] * gate_factors[1] + gate_extra
                    up = sums[4 * (start + j) + 2 + p] * up_factors[0] * up_factors[1] + up_extra
                    if cutlass.const_expr(self.dual):
                        values[2 * j + p] = self.activate(gate, up, flags, alpha, beta, limit).to(self.out_type)
                    else:
                        values[4 * j + p] = gate.to(self.out_type)
                        values[4 * j + 2 + p] = up.to(self.out_type)
        return values

    @cute.jit
    def biases(self, gate_bias, up_bias, flags, n, row_tile, lane):
        """What is added to this thread's two rows."""
        w, g = lane // 32, lane % 32 // 4
        column = row_tile * 32 + w * 8 + g
        second = column
        if cutlass.const_expr(not self.dual):
            column = row_tile * 64 + w * 16 + g
            second = column + 8
        gate_extra, up_extra = Float32(0.0), Float32(0.0)
        if (flags & GATE_BIAS) != 0:
            if column < n:
                gate_extra = gate_bias[column]
        if (flags & UP_BIAS) != 0:
            if second < n:
                up_extra = up_bias[second]
        return gate_extra, up_extra

    @cute.jit
    def activate(self, gate, up, flags, alpha, beta, limit):
        """glu4.activation's formula; comparisons, not min and max, so that NaN stays NaN."""
        gate_clamped = limit if gate > limit else gate
        up_clamped = limit if up > limit else up
        up_clamped = -limit if up_clamped < -limit else up_clamped
        sigmoid = cute.arch.rcp_approx(1.0 + cute.math.exp(-(alpha * gate_clamped)))
        value = gate_clamped * sigmoid * (up_clamped + beta)
        return gate * up if (flags & IDENTITY) != 0 else value

    @cute.jit
    def store(self, values, out, staging, row, first_token, row_tile, lane, count: cutlass.Constexpr):
        """Transpose `count` tokens through shared memory, one warpgroup for itself; 16 bytes a thread within [m, n]."""
        columns = cutlass.const_expr(32 if self.dual else 64)
        pitch = cutlass.const_expr(self.config.staging_pitch(self.dual))
        words = cute.recast_tensor(values, Uint32)
        matrices = cutlass.const_expr(cute.size(words))  # 8 x 8: all tokens of 8 columns, for one matrix those of 8 more
        base = staging + row * (count * pitch)
        w, in_warp = lane // 32, lane % 32
        batch = cutlass.const_expr(min(4, matrices))
        mine = in_warp // 8 % batch
        for i in cutlass.range_constexpr(0, matrices, batch):
            if cutlass.const_expr(self.dual):
                address = base + (8 * (i + mine) + in_warp % 8) * pitch + w * 16
            else:
                address = base + (8 * ((i + mine) // 2) + in_warp % 8) * pitch + w * 32 + (i + mine) % 2 * 16
            store_transposed(address, *[words[i + e] for e in range(batch)])
        if cutlass.const_expr(self.config.store == "bulk"):
            cute.arch.fence_proxy("async.shared", space="cta")  # what is staged is read through the async proxy
        cute.arch.barrier(barrier_id=2 + row, number_of_threads=WARPGROUP)
        tokens, n = out.shape
        start = out.iterator.toint()
        aligned = ((start | (Int64(out.stride[0]) * 2)) & 15) == 0
        chunks = cutlass.const_expr(columns // 8)
        items = count * chunks
        if cutlass.const_expr(self.config.store == "bulk"):
            bulk = aligned & (n % 8 == 0)
            if bulk:
                self.store_rows(out, base, pitch, first_token, row_tile * columns, lane, count, columns)
            items = 0 if bulk else items
        for i in cutlass.range_constexpr((count * chunks + WARPGROUP - 1) // WARPGROUP):
            item = i * WARPGROUP + lane
            token, column = item // chunks, row_tile * columns + item % chunks * 8
            if (item < items) & (first_token + token < tokens) & (column < n):
                staged = base + token * pitch + item % chunks * 16
                there = cute.make_ptr(Uint32, staged, cute.AddressSpace.smem, assumed_align=16)
                four = cute.make_rmem_tensor((4,), Uint32)
                cute.autovec_copy(cute.make_tensor(there, cute.make_layout(4)), four)
                if aligned & (column + 8 <= n):
                    offset = Int64(first_token + token) * Int64(out.stride[0]) + column
                    store_16_bytes(start + offset * 2, four)
                else:
                    elements = cute.recast_tensor(four, self.out_type)
                    for e in cutlass.range_constexpr(8):
                        if column + e < n:
                            out[first_token + token, column + e] = elements[e]

    @cute.jit
    def store_rows(
        self, out, base, pitch, first_token, first_column, lane, count: cutlass.Constexpr, columns: cutlass.Constexpr
    ):  # fmt: skip
        """A bulk copy for each token's staged outputs within [m, n], whose addresses and sizes are multiples of 16 bytes."""
        tokens, n = out.shape
        size = 2 * cutlass.min(columns, n - first_column)
        for i in cutlass.range_constexpr((count + WARPGROUP - 1) // WARPGROUP):
            token = i * WARPGROUP + lane
            if (token < count) & (first_token + token < tokens) & (size > 0):
                offset = Int64(first_token + token) * Int64(out.stride[0]) + first_column
                bulk_store(out.iterator.toint() + offset * 2, base + token * pitch, size)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # shared memory is the CTA's until then


assert UNIT_BYTES == 4 * UNIT_WORDS
