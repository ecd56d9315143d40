"""The epilogue of the Blackwell kernel: sums to C. Device code; needs nvidia-cutlass-dsl.

Warps 0 to 3 read tensor memory, a row of the tile for each thread. Global scales, biases and the activation are applied in
float32, and the result is rounded once.
"""

from typing import Any

import cutlass
import cutlass.utils.blackwell_helpers as sm100
from cutlass import cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.cutlass_dsl import T as MlirType
from cutlass.tensor_utils.layout import LayoutEnum

from glu4.backends.blackwell.config import Config
from glu4.backends.blackwell.instructions import EVICT_NORMAL, take_ticket, tanh_approx

Int32, Int64, Float32 = cutlass.Int32, cutlass.Int64, cutlass.Float32
# bits of `flags`
IDENTITY, A_SCALES, WEIGHT_SCALES, GATE_BIAS, UP_BIAS = 1, 2, 4, 8, 16
ROWS, BUFFERS, STAGED = 128, 2, 3  # rows of a CTA; buffers of TMA stores; their named barrier


class Epilogue:
    """Of one kernel: its Config, the type of C (CuTe DSL's), and whether there are two matrices or one."""

    def __init__(self, config: Config, out_type: Any, dual: bool) -> None:
        self.config, self.out_type, self.dual = config, out_type, dual

    # ---- C by TMA ----

    def tensor_copy(self, out: Any, strides: tuple, shape: tuple) -> tuple:
        """(copy, C's tensor, layout of the buffers in shared memory) of TMA stores; none where stores are direct."""
        c = self.config
        if c.store == "direct":
            return ()
        layout = sm100.make_smem_layout_epi(self.out_type, LayoutEnum.ROW_MAJOR, (ROWS, c.load_width), BUFFERS)
        whole = cute.make_tensor(out, cute.make_layout(shape, stride=(strides[0], 1, strides[1])))
        one = cute.slice_(layout, (None, None, 0))
        atom, tensor = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), whole, one, (ROWS, c.load_width))
        return atom, tensor, layout

    def staging(self, copy: tuple, buffers: Any) -> tuple:
        """(copy, source in shared memory, target in C, the buffers as rows and columns)."""
        if not copy:
            return ()
        atom, tensor, layout = copy
        rows = buffers.get_tensor(layout.outer, swizzle=layout.inner)
        tiles = cute.local_tile(tensor, (ROWS, self.config.load_width), (None, None, None))
        source, target = cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(rows, 0, 2), cute.group_modes(tiles, 0, 2)
        )
        return atom, source, target, rows

    @cute.jit
    def store_tensor(self, values, staging, tile_at, half, i, thread):
        """All threads: a piece of load_width columns to a buffer of shared memory, and from there to C by one thread."""
        c = self.config
        atom, source, target, rows = staging
        pieces = cutlass.const_expr(c.tile_n // c.load_width)
        buffer = i % BUFFERS
        if thread == 0:  # until the copy before has read this buffer
            cute.arch.cp_async_bulk_wait_group(1 if pieces > 1 else 0, read=True)
        cute.arch.barrier(barrier_id=STAGED, number_of_threads=ROWS)
        for j in cutlass.range_constexpr(c.load_width // 8):
            eight = cute.make_tensor(values.iterator + 8 * j, cute.make_layout(8))
            there = cute.local_tile(rows[(None, None, buffer)], (1, 8), (thread, j))
            cute.autovec_copy(eight, cute.make_tensor(there.iterator, cute.make_layout(8)))
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=STAGED, number_of_threads=ROWS)
        if thread == 0:
            at = (None, tile_at[0] * c.ctas + half, tile_at[1] * pieces + i, tile_at[2])
            cute.copy(atom, source[(None, buffer)], target[at], cache_policy=Int64(EVICT_NORMAL))
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def finish_stores(self, thread):
        """Shared memory must stay until the last copies have read it."""
        if cutlass.const_expr(self.config.store == "tma"):  # noqa: SIM102 - a choice at compile time, then a device branch
            if thread == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    # ---- a tile ----

    @cute.jit
    def write(self, context, tile_at, parts, state):
        """All of a thread's row of a tile, load_width columns at a time, by the last of those that have parts of it.

        out: C's pointer, row stride and batch stride, and the workspace; parts: of Tiles.parts.
        """
        c = self.config
        base, accumulator, done, out, staging, bias_pointers, global_scales, flags, constants, shape, half, thread, _ = context
        block_m, block_n, matrix = tile_at
        row = block_m * c.tile_m + half * ROWS + thread
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
        if cutlass.const_expr(c.shares_tiles):
            whole = parts[1] == 1
            writes = whole
            if not whole:
                writes = self.leave(context, parts, gate, up)
            if writes:
                for i in cutlass.range(pieces, unroll=1):
                    column = block_n * c.tile_n + i * c.load_width
                    if whole:
                        self.read(base, accumulator, 0, i, gate, thread)
                        if cutlass.const_expr(self.dual):
                            self.read(base, accumulator, 1, i, up, thread)
                        cute.arch.fence_view_async_tmem_load()
                    else:
                        self.add_up(context, parts, i, gate, up)
                    self.finish_gate(gate, factors[0], biases[0], flags, constants, n, column)
                    self.finish(gate, up, rounded, factors, biases, flags, constants, n, column)
                    self.put(rounded, staging, tile_at, half, i, thread, row, shape, start, column)
        elif cutlass.const_expr(c.gate_first > 0):
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
                self.finish(gate, up, rounded, factors, biases, flags, constants, shape[1], column)
                self.put(rounded, staging, tile_at, half, i, thread, row, shape, start, column)
        else:
            for i in cutlass.range(pieces, unroll=1):
                column = block_n * c.tile_n + i * c.load_width
                self.read(base, accumulator, 0, i, gate, thread)
                if cutlass.const_expr(self.dual):
                    self.read(base, accumulator, 1, i, up, thread)
                cute.arch.fence_view_async_tmem_load()
                self.finish_gate(gate, factors[0], biases[0], flags, constants, n, column)
                self.finish(gate, up, rounded, factors, biases, flags, constants, shape[1], column)
                self.put(rounded, staging, tile_at, half, i, thread, row, shape, start, column)
        for d in cutlass.range_constexpr(len(done)):
            done[d].consumer_release(state)
        state.advance()
        return state

    # ---- parts of K ----

    @cute.jit
    def sums(self, context, parts, s):
        """What part `s` of a tile left in the workspace: [rows, columns, gate and up] of this CTA's half."""
        c = self.config
        workspace, shape = context[3][3], context[9]
        tickets = cute.ceil_div(shape[0], c.tile_m) * cute.ceil_div(shape[1], c.tile_n) * shape[3] * c.ctas
        _, _, _, zeroth, first, apart = parts
        place = zeroth if s == 0 else first + s * apart
        size = cutlass.const_expr(ROWS * c.tile_n * (2 if self.dual else 1))
        start = cute.recast_ptr(workspace, dtype=Float32) + Int64(tickets) + Int64(place) * size
        return cute.make_tensor(start, cute.make_layout((ROWS, c.tile_n, 2 if self.dual else 1)))

    @cute.jit
    def leave(self, context, parts, gate, up):
        """This CTA's sums to the workspace; whether it was the last, and then sees those of all others."""
        c = self.config
        base, accumulator, thread, shared_ticket = context[0], context[1], context[11], context[12]
        own, count, number, _, _, _ = parts
        sums, ticket = self.sums(context, parts, own), context[3][3] + number
        for i in cutlass.range(c.tile_n // c.load_width, unroll=1):
            self.read(base, accumulator, 0, i, gate, thread)
            if cutlass.const_expr(self.dual):
                self.read(base, accumulator, 1, i, up, thread)
            cute.arch.fence_view_async_tmem_load()
            for j in cutlass.range_constexpr(c.load_width):
                sums[thread, i * c.load_width + j, 0] = gate[j]
                if cutlass.const_expr(self.dual):
                    sums[thread, i * c.load_width + j, 1] = up[j]
        cute.arch.barrier(barrier_id=STAGED, number_of_threads=ROWS)
        taken = cute.make_tensor(shared_ticket, cute.make_layout(1))
        if thread == 0:
            # release what the barrier has brought here from all threads, acquire what others have released
            taken[0] = take_ticket(ticket)
        cute.arch.barrier(barrier_id=STAGED, number_of_threads=ROWS)
        last = taken[0] == count - 1
        if last & (thread == 0):
            cute.make_tensor(ticket, cute.make_layout(1))[0] = Int32(0)  # for the next launch
        return last

    @cute.jit
    def add_up(self, context, parts, i, gate, up):
        """The sums of load_width columns: parts in the order of K, whichever came last."""
        c = self.config
        thread, sums = context[11], self.sums(context, parts, 0)
        for j in cutlass.range_constexpr(c.load_width):
            gate[j] = sums[thread, i * c.load_width + j, 0]
            if cutlass.const_expr(self.dual):
                up[j] = sums[thread, i * c.load_width + j, 1]
        for s in cutlass.range(1, parts[1], unroll=1):
            sums = self.sums(context, parts, s)
            for j in cutlass.range_constexpr(c.load_width):
                gate[j] = gate[j] + sums[thread, i * c.load_width + j, 0]
                if cutlass.const_expr(self.dual):
                    up[j] = up[j] + sums[thread, i * c.load_width + j, 1]

    # ---- values ----

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
    def finish(self, gate, up, rounded, factors, biases, flags, constants, n, column):
        """Sums of up, and the activation's values of gate, to values of C."""
        if cutlass.const_expr(self.dual):
            self.scale(up, factors[1], biases[1], (flags & UP_BIAS) != 0, n, column)
        for j in cutlass.range_constexpr(self.config.load_width):
            value = gate[j]
            if cutlass.const_expr(self.dual):
                value = self.gated(value, up[j], flags, *constants)
            rounded[j] = value.to(self.out_type)

    @cute.jit
    def put(self, rounded, staging, tile_at, half, i, thread, row, shape, start, column):
        """The i-th piece of a row to C."""
        if cutlass.const_expr(self.config.store == "tma"):
            self.store_tensor(rounded, staging, tile_at, half, i, thread)
        else:
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

        gate * sigmoid(t) is gate / (1 + exp(-t)), written with exp(-|t|), which cannot overflow where the result does not; or
        gate * (tanh(t / 2) + 1) / 2.
        """
        clamped = limit if gate > limit else gate
        t = alpha * clamped
        value = clamped
        if cutlass.const_expr(self.config.silu == "tanh"):
            value = clamped * (0.5 * tanh_approx(0.5 * t) + 0.5)
        else:
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
