"""sm90_dual_gemm: C = act(x W_gate^T) * (x W_up^T), or x W^T, for sm_90a in CuTe DSL. Device code; needs nvidia-cutlass-dsl.

Weights are wgmma's matrix A, decoded in registers; tokens are its matrix B, in shared memory: C^T = W x^T. Read
`pack` for the order of the weights and `config` for what can be chosen. Sections of the kernel, in order: shared memory and
barriers, the producer, the consumers' main loop (decode, products), the sum over k_groups, the epilogue.

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
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.memory import SmemAllocator

from glu4.backends.hopper.config import TILE_K, UNIT_BYTES, WARPGROUP, Config
from glu4.backends.hopper.pack import CODE_WORDS, UNIT_WORDS

Int32, Uint32, Float32 = cutlass.Int32, cutlass.Uint32, cutlass.Float32

# bits of `flags`
X_SCALE, GATE_BIAS, UP_BIAS, IDENTITY = 1, 2, 4, 8


@dsl_user_op
def _asm_u32(code: str, a: Any, b: Any, *, loc: Any = None, ip: Any = None) -> Any:
    values = [Uint32(v).ir_value(loc=loc, ip=ip) for v in (a, b)]
    result = llvm.inline_asm(
        MlirType.i32(), values, code, "=r,r,r", has_side_effects=False, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return Uint32(result)


def _scaled(values: Any, scales: Any, half: int, kind: str) -> Any:
    """Two values times one half of `scales`; ptxas makes the broadcast part of the multiply."""
    name = ("lo", "hi")[half]
    code = (
        f"{{ .reg .b16 lo, hi; .reg .b32 t; mov.b32 {{lo, hi}}, $2; mov.b32 t, {{{name}, {name}}}; mul.rn.{kind} $0, $1, t; }}"
    )
    return _asm_u32(code, values, scales)


class DualGemm:
    """One kernel: a Config, 16-bit types of tokens and output, and whether there are two matrices or one.

    Arguments at launch: x [m, k] (row stride a multiple of 8 elements, 16-byte aligned); packed weights int32
    [tiles, units, 576]; float32 global scales of gate (or the one matrix), up and x; float32 biases [n]; `flags`, which says
    which of these are used; the activation's constants; out [m, n].
    """

    def __init__(self, config: Config, x_type: Any, out_type: Any, dual: bool) -> None:
        self.config, self.x_type, self.out_type, self.dual = config, x_type, out_type, dual
        self.brain = x_type is cutlass.BFloat16
        # what the decode leaves: fp16 values are 2^-7 times the weight (2^-14 from the field, 2^7 in the scale), bf16 2^-8
        self.exponent_bias = 8 if self.brain else 7

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
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
            utils.LayoutEnum.from_tensor(x), (64, c.tokens, TILE_K), self.x_type, c.stages * c.stage_units
        )
        one_stage = cute.slice_(layout, (None, None, 0))
        op = cpasync.CopyBulkTensorTileG2SOp()
        load_x, x_coords = cpasync.make_tiled_tma_atom(op, x, one_stage, (c.tokens, TILE_K))

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, c.stages * 2]
            tokens: cute.struct.Align[cute.struct.MemRange[self.x_type, cute.cosize(layout)], 1024]
            weights: cute.struct.Align[cute.struct.MemRange[Uint32, c.stages * c.stage_units * c.rows * UNIT_WORDS], 128]

        self.shared = Shared
        outputs = c.rows * (32 if self.dual else 64)
        grid = (cute.ceil_div(out.shape[0], c.tokens), cute.ceil_div(out.shape[1], outputs), 1)
        self.kernel(
            load_x, x_coords, weights, gate_scale, up_scale, x_scale, gate_bias, up_bias, flags, alpha, beta, limit, out, mma,
            layout,
        ).launch(grid=grid, block=(c.threads, 1, 1), cluster=(1, 1, 1), stream=stream, min_blocks_per_mp=1)  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        load_x: cute.CopyAtom,
        x: cute.Tensor,
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
        token_tile, row_tile, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)

        # ---- shared memory and barriers ----
        if warp == 0:
            cpasync.prefetch_descriptor(load_x)
        shared = SmemAllocator().allocate(self.shared)
        pipe = pipeline.PipelineTmaAsync.create(
            barrier_storage=shared.barriers.data_ptr(),
            num_stages=c.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * c.rows),
            tx_count=c.stage_bytes,
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        )
        s_tokens = shared.tokens.get_tensor(layout.outer, swizzle=layout.inner)
        stage_words = UNIT_WORDS * c.stage_units
        s_weights = shared.weights.get_tensor(
            cute.make_layout((stage_words, c.rows, c.stages), stride=(1, stage_words, c.rows * stage_words))
        )
        steps = (weights.shape[1] + c.stage_units - 1) // c.stage_units

        if group == c.consumers:
            # ---- producer: one warp of the last warpgroup ----
            cute.arch.setmaxregister_decrease(c.producer_registers)
            if warp == 4 * c.consumers:
                g_tokens = cute.local_tile(x, (c.tokens, TILE_K), (token_tile, None))
                to_shared, from_global = cpasync.tma_partition(
                    load_x, 0, cute.make_layout(1), cute.group_modes(s_tokens, 0, 2), cute.group_modes(g_tokens, 0, 2)
                )
                copy_unit = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Uint32)
                last_tile = weights.shape[0] - 1
                state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, c.stages)
                for k in cutlass.range(steps, unroll=1):
                    pipe.producer_acquire(state)
                    barrier = pipe.producer_get_barrier(state)
                    with cute.arch.elect_one():
                        for i in cutlass.range_constexpr(c.rows):
                            # the last tile of a ragged grid reads a tile that exists and stores nothing
                            tile = cutlass.min(row_tile * c.rows + i, last_tile)
                            # units lie one after the other; past the last one come others or the spare one, times zero
                            first = weights[(tile, k * c.stage_units, None)].iterator
                            source = cute.make_tensor(first, cute.make_layout(stage_words))
                            cute.copy(copy_unit, source, s_weights[(None, i, state.index)], mbar_ptr=barrier)
                    for u in cutlass.range_constexpr(c.stage_units):
                        unit, slot = k * c.stage_units + u, state.index * c.stage_units + u
                        cute.copy(load_x, from_global[(None, unit)], to_shared[(None, slot)], tma_bar_ptr=barrier)
                    state.advance()
                pipe.producer_tail(state)
        else:
            # ---- consumers ----
            cute.arch.setmaxregister_increase(c.consumer_registers)
            row, k_group = group % c.rows, group // c.rows
            lane = thread % WARPGROUP
            sums = cute.make_rmem_tensor(mma.partition_shape_C((64, c.tokens)), Float32)
            self.main_loop(mma, pipe, s_tokens, s_weights, steps, row, k_group, lane, sums)
            partial = cute.make_tensor(
                cute.recast_ptr(shared.tokens.data_ptr(), dtype=Float32),
                cute.make_layout((WARPGROUP, 64 * c.tokens // WARPGROUP, c.rows, max(1, c.k_groups - 1))),
            )
            self.add_groups(sums, partial, row, k_group, lane)
            if k_group == 0:
                gate_factors = self.scales(gate_scale[0], x_scale, flags)
                up_factors = self.scales(up_scale[0], x_scale, flags)
                self.epilogue(
                    sums, gate_factors, up_factors, gate_bias, up_bias, flags, alpha, beta, limit, out, token_tile,
                    row_tile * c.rows + row, lane,
                )  # fmt: skip

    # ---- main loop ----

    @cute.jit
    def main_loop(self, mma, pipe, s_tokens, s_weights, steps, row, k_group, lane, sums):
        """Products of this warpgroup's rows with the tokens, for stages k_group, k_group + k_groups, ... of K."""
        c = self.config
        thr = mma.get_slice(lane)
        tokens = mma.make_fragment_B(thr.partition_B(s_tokens))
        sums.fill(0.0)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        shape = mma.partition_shape_A((64, TILE_K))
        even = mma.make_fragment_A(shape)
        odd = mma.make_fragment_A(shape) if cutlass.const_expr(c.fragment_sets == 2) else even
        ready = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, c.stages)
        free = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, c.stages)
        for _ in cutlass.range(k_group, unroll=1):
            ready.advance()
            free.advance()
        mine = (steps - k_group + c.k_groups - 1) // c.k_groups
        if cutlass.const_expr(c.stage_units == 2):
            for k in cutlass.range(mine, unroll=1):
                pipe.consumer_wait(ready)
                for u in cutlass.range_constexpr(2):
                    fragment = even if cutlass.const_expr(u == 0) else odd
                    codes, scales = self.load_unit(s_weights, ready.index, row, lane, u)
                    if cutlass.const_expr(c.fragment_sets == 1):
                        warpgroup.wait_group(0)
                    self.decode(codes, scales, fragment)
                    self.multiply(mma, sums, fragment, tokens, ready.index * 2 + u)
                    if cutlass.const_expr(c.fragment_sets == 2):
                        warpgroup.wait_group(1)
                    if cutlass.const_expr(u == 0):
                        if k > 0:  # all products of the stage before are done
                            pipe.consumer_release(free)
                            for _ in cutlass.range_constexpr(c.k_groups):
                                free.advance()
                for _ in cutlass.range_constexpr(c.k_groups):
                    ready.advance()
        elif cutlass.const_expr(c.fragment_sets == 1):
            for k in cutlass.range(mine, unroll=1):
                pipe.consumer_wait(ready)
                codes, scales = self.load_unit(s_weights, ready.index, row, lane)
                warpgroup.wait_group(0)  # the fragment's registers are free, and so is the stage before
                if k > 0:
                    pipe.consumer_release(free)
                    for _ in cutlass.range_constexpr(c.k_groups):
                        free.advance()
                self.decode(codes, scales, even)
                self.multiply(mma, sums, even, tokens, ready.index)
                for _ in cutlass.range_constexpr(c.k_groups):
                    ready.advance()
        else:
            for k in cutlass.range(mine // 2, unroll=1):
                pipe.consumer_wait(ready)
                codes, scales = self.load_unit(s_weights, ready.index, row, lane)
                self.decode(codes, scales, even)
                self.multiply(mma, sums, even, tokens, ready.index)
                warpgroup.wait_group(1)  # all but the products just issued: the other fragment is free
                if k > 0:
                    pipe.consumer_release(free)
                    for _ in cutlass.range_constexpr(c.k_groups):
                        free.advance()
                for _ in cutlass.range_constexpr(c.k_groups):
                    ready.advance()
                pipe.consumer_wait(ready)
                codes, scales = self.load_unit(s_weights, ready.index, row, lane)
                self.decode(codes, scales, odd)
                self.multiply(mma, sums, odd, tokens, ready.index)
                warpgroup.wait_group(1)
                pipe.consumer_release(free)
                for _ in cutlass.range_constexpr(c.k_groups):
                    free.advance()
                    ready.advance()
            if mine % 2 != 0:
                pipe.consumer_wait(ready)
                codes, scales = self.load_unit(s_weights, ready.index, row, lane)
                self.decode(codes, scales, even)
                self.multiply(mma, sums, even, tokens, ready.index)
                warpgroup.wait_group(1)
                if mine > 1:
                    pipe.consumer_release(free)
                    for _ in cutlass.range_constexpr(c.k_groups):
                        free.advance()
        warpgroup.wait_group(0)
        if mine > 0:
            pipe.consumer_release(free)  # every stage, or the producer waits for ever

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
    def decode(self, codes, scales, fragment):
        """One unit into the 16 registers of a fragment; fields and scale bytes as `pack` lays them out."""
        registers = cute.recast_tensor(fragment, Uint32)
        for s in cutlass.range_constexpr(4):
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
                registers[4 * s + j] = _scaled(value, both, j % 2, kind)

    @cute.jit
    def multiply(self, mma, sums, fragment, tokens, stage):
        """Issue one unit's four products."""
        warpgroup.fence()
        for s in cutlass.range_constexpr(4):
            cute.gemm(mma, sums, fragment[(None, None, s)], tokens[(None, None, s, stage)], sums)
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
        """(m, e) with value = m * 2^e, 1 <= m < 2, of a positive float32, subnormal ones included."""
        bits = llvm.bitcast(MlirType.i32(), value.ir_value())
        raw = Int32(bits)
        lifted = Int32(llvm.bitcast(MlirType.i32(), (value * 16777216.0).ir_value()))
        small = raw < 0x00800000
        raw = lifted if small else raw
        exponent = (raw >> 23) - 127
        exponent = exponent - 24 if small else exponent
        mantissa = (raw & 0x007FFFFF) | 0x3F800000
        return Float32(llvm.bitcast(MlirType.f32(), Int32(mantissa).ir_value())), exponent

    @cute.jit
    def power_of_two(self, exponent):
        clamped = cutlass.min(cutlass.max(exponent, -126), 127)
        return Float32(llvm.bitcast(MlirType.f32(), Int32((clamped + 127) << 23).ir_value()))

    @cute.jit
    def epilogue(
        self, sums, gate_factors, up_factors, gate_bias, up_bias, flags, alpha, beta, limit, out, token_tile, row_tile, lane
    ):
        """Scales, bias and activation in float32, one rounding, stores within [m, n].

        Registers 4 j + p and 4 j + 2 + p are rows g and g + 8 of token 8 j + 2 q + p (PTX ISA, wgmma, matrix D).
        """
        c = self.config
        tokens, n = out.shape
        w, g, q = lane // 32, lane % 32 // 4, lane % 4
        if cutlass.const_expr(self.dual):
            column = row_tile * 32 + w * 8 + g
        else:
            column = row_tile * 64 + w * 16 + g
        gate_extra, up_extra = Float32(0.0), Float32(0.0)
        if (flags & GATE_BIAS) != 0:
            if column < n:
                gate_extra = gate_bias[column]
        if (flags & UP_BIAS) != 0:
            if cutlass.const_expr(self.dual):
                if column < n:
                    up_extra = up_bias[column]
            else:
                if column + 8 < n:
                    up_extra = up_bias[column + 8]
        for j in cutlass.range_constexpr(c.tokens // 8):
            for p in cutlass.range_constexpr(2):
                token = token_tile * c.tokens + 8 * j + 2 * q + p
                gate = sums[4 * j + p] * gate_factors[0] * gate_factors[1] + gate_extra
                up = sums[4 * j + 2 + p] * up_factors[0] * up_factors[1] + up_extra
                if cutlass.const_expr(self.dual):
                    value = self.activate(gate, up, flags, alpha, beta, limit)
                    if (token < tokens) & (column < n):
                        out[token, column] = value.to(self.out_type)
                else:
                    if token < tokens:
                        if column < n:
                            out[token, column] = gate.to(self.out_type)
                        if column + 8 < n:
                            out[token, column + 8] = up.to(self.out_type)

    @cute.jit
    def activate(self, gate, up, flags, alpha, beta, limit):
        """glu4.activation's formula; comparisons, not min and max, so that NaN stays NaN."""
        gate_clamped = limit if gate > limit else gate
        up_clamped = limit if up > limit else up
        up_clamped = -limit if up_clamped < -limit else up_clamped
        sigmoid = cute.arch.rcp_approx(1.0 + cute.math.exp(-(alpha * gate_clamped)))
        value = gate_clamped * sigmoid * (up_clamped + beta)
        return gate * up if (flags & IDENTITY) != 0 else value


assert UNIT_BYTES == 4 * UNIT_WORDS
