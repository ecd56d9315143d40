"""The epilogue of the Blackwell kernel: sums to C. Device code; needs nvidia-cutlass-dsl.

Warps 0 to 3 read tensor memory, a row of the tile for each thread. Global scales, biases and the activation are applied in
float32, and the result is rounded once.
"""

from typing import Any

import cutlass
from cutlass import cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import tcgen05
from cutlass.cutlass_dsl import T as MlirType

from glu4.backends.blackwell.config import Config

Int32, Int64, Float32 = cutlass.Int32, cutlass.Int64, cutlass.Float32
# bits of `flags`
IDENTITY, A_SCALES, WEIGHT_SCALES, GATE_BIAS, UP_BIAS = 1, 2, 4, 8, 16


class Epilogue:
    """Of one kernel: its Config, the type of C (CuTe DSL's), and whether there are two matrices or one."""

    def __init__(self, config: Config, out_type: Any, dual: bool) -> None:
        self.config, self.out_type, self.dual = config, out_type, dual

    @cute.jit
    def write(self, context, tile_at, state):
        """All of a thread's row of a tile, load_width columns at a time; out: C's pointer, row stride and batch stride."""
        c = self.config
        base, accumulator, done, out, bias_pointers, global_scales, flags, constants, shape, first_row, thread = context
        block_m, block_n, matrix = tile_at
        row = block_m * c.tile_m + first_row
        factors = self.all_factors(global_scales, flags, matrix)
        start = out[0] + Int64(matrix) * out[2] + Int64(row) * out[1]
        n = shape[1]
        biases = [cute.make_tensor(p + Int64(matrix) * n, cute.make_layout(n)) for p in bias_pointers]
        gate = cute.make_rmem_tensor((c.load_width,), Float32)
        up = cute.make_rmem_tensor((c.load_width if self.dual else 1,), Float32)
        rounded = cute.make_rmem_tensor((c.load_width,), self.out_type)
        kept = cute.make_rmem_tensor((c.tile_n if c.gate_first else 1,), Float32)
        done[0].consumer_wait(state)
        pieces = cutlass.const_expr(c.tile_n // c.load_width)
        if cutlass.const_expr(c.gate_first > 0):
            for i in cutlass.range_constexpr(pieces):
                self.read(base, accumulator, 0, i, gate, thread)
                cute.arch.fence_view_async_tmem_load()
                self.finish_gate(gate, factors[0], biases[0], flags, constants, n, block_n * c.tile_n + i * c.load_width)
                for j in cutlass.range_constexpr(c.load_width):
                    kept[i * c.load_width + j] = gate[j]
            done[1].consumer_wait(state)
            for i in cutlass.range_constexpr(pieces):
                self.read(base, accumulator, 1, i, up, thread)
                cute.arch.fence_view_async_tmem_load()
                for j in cutlass.range_constexpr(c.load_width):
                    gate[j] = kept[i * c.load_width + j]
                column = block_n * c.tile_n + i * c.load_width
                self.finish(gate, up, rounded, factors, biases, flags, constants, shape, row, start, column)
        else:
            for i in cutlass.range(pieces, unroll=1):
                column = block_n * c.tile_n + i * c.load_width
                self.read(base, accumulator, 0, i, gate, thread)
                if cutlass.const_expr(self.dual):
                    self.read(base, accumulator, 1, i, up, thread)
                cute.arch.fence_view_async_tmem_load()
                self.finish_gate(gate, factors[0], biases[0], flags, constants, n, column)
                self.finish(gate, up, rounded, factors, biases, flags, constants, shape, row, start, column)
        for d in cutlass.range_constexpr(len(done)):
            done[d].consumer_release(state)
        state.advance()
        return state

    @cute.jit
    def all_factors(self, global_scales, flags, matrix):
        """Factors of gate's and of up's sums, for one of the matrices."""
        own = [matrix if (flags & bit) != 0 else Int32(0) for bit in (A_SCALES, WEIGHT_SCALES)]
        a, gate, up = [
            cute.make_tensor(pointer + own[1 if i else 0], cute.make_layout(1))[0] for i, pointer in enumerate(global_scales)
        ]
        return self.factors(a, gate), self.factors(a, up)

    @cute.jit
    def finish_gate(self, gate, factors, bias, flags, constants, n, column):
        """Sums of gate to the activation's values, or of the one matrix to its products, in place."""
        self.scale(gate, factors, bias, (flags & GATE_BIAS) != 0, n, column)
        if cutlass.const_expr(self.dual):
            for j in cutlass.range_constexpr(self.config.load_width):
                gate[j] = self.activate(gate[j], flags, *constants)

    @cute.jit
    def finish(self, gate, up, rounded, factors, biases, flags, constants, shape, row, start, column):
        """Sums of up, and the activation's values of gate, to C."""
        if cutlass.const_expr(self.dual):
            self.scale(up, factors[1], biases[1], (flags & UP_BIAS) != 0, shape[1], column)
        for j in cutlass.range_constexpr(self.config.load_width):
            value = gate[j]
            if cutlass.const_expr(self.dual):
                value = self.gated(value, up[j], flags, *constants)
            rounded[j] = value.to(self.out_type)
        if row < shape[0]:
            self.store(rounded, start, shape[1], column)

    @cute.jit
    def scale(self, sums, factors, bias, has_bias, n, column):
        """Global scales, and a bias where there is one."""
        for j in cutlass.range_constexpr(self.config.load_width):
            sums[j] = sums[j] * factors[0] * factors[1]
        if has_bias:
            for j in cutlass.range_constexpr(self.config.load_width):
                if column + j < n:
                    sums[j] = sums[j] + bias[column + j]

    @cute.jit
    def read(self, base, accumulator, w: cutlass.Constexpr, i, values, thread):
        """Start reading load_width columns, the i-th, of gate's (w 0) or up's accumulator; a thread has one row."""
        c = self.config
        atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(c.load_width)), Float32)
        sums = cute.make_tensor(base + w * c.tile_n, accumulator)
        pieces = cute.flat_divide(sums[((None, None), 0, 0)], (128, c.load_width))
        source = tcgen05.make_tmem_copy(atom, pieces[(None, None, 0, 0)]).get_slice(thread).partition_S(pieces)
        registers = cute.make_tensor(values.iterator, cute.make_layout(((c.load_width, 1), 1, 1)))
        cute.copy(atom, source[(None, None, None, 0, i)], registers)

    @cute.jit
    def store(self, values, row_start, n, column):
        """load_width elements of a row, 16 bytes at a time where they are aligned and inside."""
        start = row_start + column
        aligned = (start.toint() & 15) == 0
        for j in cutlass.range_constexpr(0, self.config.load_width, 8):
            eight = cute.make_tensor(values.iterator + j, cute.make_layout(8))
            if aligned & (column + j + 8 <= n):
                there = cute.make_ptr(self.out_type, (start + j).toint(), cute.AddressSpace.gmem, assumed_align=16)
                cute.autovec_copy(eight, cute.make_tensor(there, cute.make_layout(8)))
            else:
                there = cute.make_tensor(start + j, cute.make_layout(8))
                for e in cutlass.range_constexpr(8):
                    if column + j + e < n:
                        there[e] = eight[e]

    @cute.jit
    def activate(self, gate, flags, alpha, beta, limit):
        """gate' * sigmoid(alpha * gate') of glu4.activation's formula; comparisons, not min and max, so that NaN stays NaN.

        gate * sigmoid(t) is gate / (1 + exp(-t)), written with exp(-|t|), which cannot overflow where the result does not.
        """
        clamped = limit if gate > limit else gate
        t = alpha * clamped
        e = cute.math.exp(t if t < 0.0 else -t)
        top = clamped * e if t < 0.0 else clamped
        value = top / (1.0 + e)
        return gate if (flags & IDENTITY) != 0 else value

    @cute.jit
    def gated(self, gate, up, flags, alpha, beta, limit):
        """What `activate` left times up' + beta."""
        clamped = limit if up > limit else up
        clamped = -limit if clamped < -limit else clamped
        return gate * (up if (flags & IDENTITY) != 0 else clamped + beta)

    @cute.jit
    def factors(self, first, second):
        """Two float32 factors whose product is first * second.

        The product itself may overflow or vanish where the result does not, so its exponent is shared out evenly.
        """
        mantissa_1, exponent_1 = self.split(first)
        mantissa_2, exponent_2 = self.split(second)
        exponent = exponent_1 + exponent_2
        half = exponent >> 1
        return mantissa_1 * mantissa_2 * self.power_of_two(half), self.power_of_two(exponent - half)

    @cute.jit
    def split(self, value):
        """(m, e) with value = m * 2^e, 1/2 <= m < 1, of a positive finite float32, subnormal ones included."""
        raw = Int32(llvm.bitcast(MlirType.i32(), value.ir_value()))
        lifted = Int32(llvm.bitcast(MlirType.i32(), (value * 16777216.0).ir_value()))
        small = raw < 0x00800000
        raw = lifted if small else raw
        exponent = (raw >> 23) - 126
        exponent = exponent - 24 if small else exponent
        mantissa = (raw & 0x007FFFFF) | 0x3F000000
        return Float32(llvm.bitcast(MlirType.f32(), Int32(mantissa).ir_value())), exponent

    @cute.jit
    def power_of_two(self, exponent):
        """2^exponent, or the nearest power of two that is a normal float32: scales beyond it leave only zero and infinity."""
        clamped = cutlass.min(cutlass.max(exponent, -126), 127)
        return Float32(llvm.bitcast(MlirType.f32(), Int32((clamped + 127) << 23).ir_value()))
