"""The epilogue of the grouped Blackwell kernel: sums to C. Device code; needs nvidia-cutlass-dsl.

Warps 0 to 3 read tensor memory, a row for each thread. A row of sums is a column of C, since weights are the MMA's M: the 32
threads of a warp have 32 neighbours of each row of C.
"""

from typing import Any

import cutlass
from cutlass import cute

from glu4.backends.blackwell.epilogue import BUFFERS, ROWS, Epilogue
from glu4.backends.blackwell.grouped_config import GroupConfig

Int32, Int64, Float32 = cutlass.Int32, cutlass.Int64, cutlass.Float32
LANES = 32  # of a warp


@cute.jit
def pick(values, group):
    """The group's own of `values`, one for each group."""
    found = values[0]
    for g in cutlass.range_constexpr(1, len(values)):
        found = values[g] if group == g else found
    return found


class GroupEpilogue(Epilogue):
    """Of one kernel: its GroupConfig and the type of C (CuTe DSL's)."""

    def __init__(self, config: GroupConfig, out_type: Any) -> None:
        super().__init__(config.mma, out_type, dual=False)
        self.turned, self.two = config.store == "shared", config.gated

    @cute.jit
    def write(self, context, piece, state):
        """All of a tile, load_width tokens at a time; tokens beyond M and weights beyond N are not written."""
        c = self.config
        base, accumulator, done, outs, strides, sizes, global_scales, activation, staged, half, thread = context
        x, y, _, group = piece[0]
        m, n = pick([s[0] for s in sizes], group), pick([s[1] for s in sizes], group)
        out, stride = pick([o.toint() for o in outs], group), pick(strides, group)
        scales = [cute.make_tensor(p + group, cute.make_layout(1))[0] for p in global_scales]
        factors = [self.factors(scales[0], scale) for scale in scales[1:]]
        first_row = x * c.tile_m + half * ROWS
        sums = cute.make_rmem_tensor((c.load_width,), Float32)
        up = cute.make_rmem_tensor((c.load_width if self.two else 1,), Float32)
        rounded = cute.make_rmem_tensor((c.load_width,), self.out_type)
        done[0].consumer_wait(state)
        if cutlass.const_expr(self.turned):
            cute.arch.sync_warp()  # the last piece of the tile before may have used the first buffer
        for i in cutlass.range(c.tile_n // c.load_width, unroll=1):
            token = y * c.tile_n + i * c.load_width
            if token < m:
                self.read(base, accumulator, 0, i, sums, thread)
                if cutlass.const_expr(self.two):
                    self.read(base, accumulator, 1, i, up, thread)
                cute.arch.fence_view_async_tmem_load()
                for j in cutlass.range_constexpr(c.load_width):
                    value = sums[j] * factors[0][0] * factors[0][1]
                    if cutlass.const_expr(self.two):
                        value = self.activate(value, *activation)
                        value = self.gated(value, up[j] * factors[1][0] * factors[1][1], *activation)
                    rounded[j] = value.to(self.out_type)
                if cutlass.const_expr(self.turned):
                    self.store_turned(rounded, staged, i % BUFFERS, out, stride, token, first_row, m, n, thread)
                else:
                    self.store_column(rounded, out, stride, token, first_row + thread, m, n)
        done[0].consumer_release(state)
        state.advance()
        return state

    @cute.jit
    def element(self, out, stride, token, column):
        """C's address of a token's column."""
        return out + (Int64(token) * stride + Int64(column)) * 2

    @cute.jit
    def store_column(self, values, out, stride, token, column, m, n):
        """A thread's own column of load_width rows of C."""
        for j in cutlass.range_constexpr(self.config.load_width):
            if (token + j < m) & (column < n):
                there = cute.make_ptr(self.out_type, self.element(out, stride, token + j, column), cute.AddressSpace.gmem)
                cute.make_tensor(there, cute.make_layout(1))[0] = values[j]

    @cute.jit
    def store_turned(self, values, staged, buffer, out, stride, token, first_column, m, n, thread):
        """A warp's 32 columns of load_width rows of C, by way of its own part of a buffer in shared memory, [rows, 32].

        A buffer is filled again two pieces later, when all lanes have passed the barrier of the piece between.
        """
        width = self.config.load_width
        warp, lane = thread // LANES, thread % LANES
        mine = staged + (buffer * (ROWS // LANES) + warp) * (width * LANES)
        turned = cute.make_tensor(mine, cute.make_layout((width, LANES), stride=(LANES, 1)))
        for j in cutlass.range_constexpr(width):
            turned[j, lane] = values[j]
        cute.arch.sync_warp()
        row, begin = lane // 4, lane % 4 * 8
        column = first_column + warp * LANES + begin
        for j in cutlass.range_constexpr(0, width, 8):
            here = cute.make_ptr(
                self.out_type, (mine + (j + row) * LANES + begin).toint(), cute.AddressSpace.smem, assumed_align=16
            )  # fmt: skip
            eight = cute.make_rmem_tensor((8,), self.out_type)
            cute.autovec_copy(cute.make_tensor(here, cute.make_layout(8)), eight)
            if token + j + row < m:
                self.store_eight(eight, self.element(out, stride, token + j + row, column), column, n)

    @cute.jit
    def store_eight(self, eight, address, column, n):
        """Eight neighbours of a row of C: 16 bytes at once where they are aligned and inside."""
        if ((address & 15) == 0) & (column + 8 <= n):
            there = cute.make_ptr(self.out_type, address, cute.AddressSpace.gmem, assumed_align=16)
            cute.autovec_copy(eight, cute.make_tensor(there, cute.make_layout(8)))
        else:
            there = cute.make_tensor(cute.make_ptr(self.out_type, address, cute.AddressSpace.gmem), cute.make_layout(8))
            for e in cutlass.range_constexpr(8):
                if column + e < n:
                    there[e] = eight[e]
