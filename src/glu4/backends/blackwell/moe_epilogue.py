"""The epilogue of the Blackwell kernel for mixtures of experts: sums to C. Device code; needs nvidia-cutlass-dsl.

A thread has a column of C and so one global scale and one bias of gate and of up, or of the one matrix, for all of a tile.
"""

from typing import Any

import cutlass
from cutlass import cute

from glu4.backends.blackwell.epilogue import BUFFERS, GATE_BIAS, ROWS, UP_BIAS
from glu4.backends.blackwell.grouped_epilogue import GroupEpilogue

Int32, Int64, Float32 = cutlass.Int32, cutlass.Int64, cutlass.Float32


@cute.jit
def element(pointer, index):
    """One value in global memory."""
    return cute.make_tensor(pointer + index, cute.make_layout(1))[0]


class MoeEpilogue(GroupEpilogue):
    """Of one kernel."""

    @cute.jit
    def write(self, context, piece, state):
        """All of a tile, load_width tokens at a time; rows of other experts and weights beyond N are not written."""
        c = self.config
        base, accumulator, done, out, stride, n, global_scales, biases, activation, staged, half, thread = context
        x, tile, expert, first, begin, end = piece[0]
        # tokens are counted from the expert's first
        m = end - begin
        rows_of_expert = out.toint() + Int64(begin) * stride * 2
        a, *scales = (element(p, expert if i else Int32(0)) for i, p in enumerate(global_scales))
        factors = [self.factors(a, scale) for scale in scales]
        first_row = x * c.tile_m + half * ROWS
        column = first_row + thread
        added = [self.bias(p, activation[0], bit, expert, column, n) for p, bit in zip(biases, (GATE_BIAS, UP_BIAS))]
        gate = cute.make_rmem_tensor((c.load_width,), Float32)
        up = cute.make_rmem_tensor((c.load_width if self.two else 1,), Float32)
        rounded = cute.make_rmem_tensor((c.load_width,), self.out_type)
        done[0].consumer_wait(state)
        if cutlass.const_expr(self.turned):
            cute.arch.sync_warp()  # the last piece of the tile before may have used the first buffer
        for i in cutlass.range(c.tile_n // c.load_width, unroll=1):
            token = (tile - first) * c.tile_n + i * c.load_width
            if token < m:
                self.read(base, accumulator, 0, i, gate, thread)
                if cutlass.const_expr(self.two):
                    self.read(base, accumulator, 1, i, up, thread)
                cute.arch.fence_view_async_tmem_load()
                for j in cutlass.range_constexpr(c.load_width):
                    value = gate[j] * factors[0][0] * factors[0][1] + added[0]
                    if cutlass.const_expr(self.two):
                        value = self.activate(value, *activation)
                        value = self.gated(value, up[j] * factors[1][0] * factors[1][1] + added[1], *activation)
                    rounded[j] = value.to(self.out_type)
                if cutlass.const_expr(self.turned):
                    self.store_turned(rounded, staged, i % BUFFERS, rows_of_expert, stride, token, first_row, m, n, thread)
                else:
                    self.store_column(rounded, rows_of_expert, stride, token, column, m, n)
        done[0].consumer_release(state)
        state.advance()
        return state

    @cute.jit
    def bias(self, pointer: Any, flags, bit: cutlass.Constexpr, expert, column, n):
        """Of this thread's column; zero where there is none, which changes no sum but a negative zero's sign."""
        found = Float32(0.0)
        if ((flags & bit) != 0) & (column < n):
            found = element(pointer, Int64(expert) * n + column)
        return found
