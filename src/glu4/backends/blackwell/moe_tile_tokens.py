"""sm100_tile_tokens_nvfp4: number the tiles of a mixture of experts, and lay out its tokens' block scales by them.

Device code; needs nvidia-cutlass-dsl. It makes what `moe_tokens.tile_table` and `moe_tokens.tiled_scales` make, in one launch:
a CTA for each tile along tokens computes all experts' first tiles from the offsets, as every other does, finds its own expert
and copies the scales of its rows. A warp fills a column of atoms after the other; a lane has every 32nd row, whose scales lie
side by side in an atom (glu4.scale_layout).
"""

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import cute
from cutlass.memory import SmemAllocator

from glu4.scale_layout import ATOM_BYTES, ATOM_COLS, ATOM_ROWS

Int32, Int64, Uint8, Uint32 = cutlass.Int32, cutlass.Int64, cutlass.Uint8, cutlass.Uint32

_LANES, _WARPS = 32, 4
THREADS = _LANES * _WARPS
RECORD = 4  # numbers of a tile in the table, 16 bytes
SHARED_BYTES = 32


@cute.jit
def _there(element: cutlass.Constexpr, address, count: cutlass.Constexpr = 1):
    """`count` neighbours in global memory, aligned to as many bytes as they are."""
    align = element.width // 8 * count
    pointer = cute.make_ptr(element, address, cute.AddressSpace.gmem, assumed_align=align)
    return cute.make_tensor(pointer, cute.make_layout(count))


class TileTokens:
    """One kernel, for tiles of `tile_n` tokens: 32, 64 or 128.

    Arguments at launch, device pointers: offsets int32 [e + 1]; scales, e4m3 bytes [rows, columns], neighbours side by side;
    table int32 [1 + most, 4], 16-byte aligned; tiled, the scales in 128x4 layout of [most * tile_n, columns], 16-byte aligned.
    Then the row stride of scales in bytes; rows; experts, one at least; tiles along tokens that there are at most, below 2^30;
    columns.
    """

    def __init__(self, tile_n: int) -> None:
        self.tile_n, self.parts = tile_n, tile_n // _LANES

    @cute.jit
    def __call__(
        self, offsets: cute.Pointer, scales: cute.Pointer, table: cute.Pointer, tiled: cute.Pointer, stride: Int64,
        rows: Int32, experts: Int32, most: Int32, columns: Int32, stream: CUstream,
    ):  # fmt: skip
        each = cutlass.const_expr(ATOM_ROWS // self.tile_n)
        grid = (cute.ceil_div(most, each) * each, 1, 1)  # whole atoms: padding is written too
        self.kernel(offsets, scales, table, tiled, stride, rows, experts, most, columns).launch(
            grid=grid, block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self, offsets: cute.Pointer, scales: cute.Pointer, table: cute.Pointer, tiled: cute.Pointer, stride: Int64,
        rows: Int32, experts: Int32, most: Int32, columns: Int32,
    ):  # fmt: skip
        thread, _, _ = cute.arch.thread_idx()
        tile, _, _ = cute.arch.block_idx()
        lane, warp = thread % _LANES, cute.arch.make_warp_uniform(thread // _LANES)
        memory = SmemAllocator()
        record = memory.allocate_tensor(Int32, cute.make_layout(RECORD), byte_alignment=16)
        sums = memory.allocate_tensor(Int32, cute.make_layout(_WARPS), byte_alignment=16)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if thread < RECORD:
            record[thread] = 0
        count = self.find((offsets, rows, experts, most), record, sums, tile, lane, warp)
        four = cute.make_rmem_tensor((RECORD,), Int32)
        for i in cutlass.range_constexpr(RECORD):
            four[i] = record[i]
        if (thread == 0) & (tile < most):
            cute.autovec_copy(four, _there(Int32, (table + RECORD * (1 + tile)).toint(), RECORD))
        if (thread == 0) & (tile == 0):
            first = cute.make_rmem_tensor((RECORD,), Int32)
            for i in cutlass.range_constexpr(RECORD):
                first[i] = count if i == 0 else Int32(0)
            cute.autovec_copy(first, _there(Int32, table.toint(), RECORD))
        begin = four[2] + (tile - four[1]) * self.tile_n
        self.copy(scales.toint(), tiled.toint(), stride, columns, begin, four[3], tile, lane, warp)

    # ---- which expert ----

    @cute.jit
    def find(self, offsets, record, sums, tile, lane, warp):
        """How many tiles there are, at most `most`; the expert of this tile, its first tile, first row and the row after its
        last go to `record`, zeros where there is no such tile."""
        pointer, rows, experts, most = offsets
        limits = cute.make_tensor(pointer, cute.make_layout(experts + 1))
        total = Int32(0)
        for first in cutlass.range(0, experts, THREADS, unroll=1):
            expert = first + warp * _LANES + lane
            begin, end = Int32(0), Int32(0)
            if expert < experts:
                begin = self.clamped(limits[expert], rows)
                end = cutlass.max(begin, self.clamped(limits[expert + 1], rows))
            own = Int32((Uint32(end - begin) + (self.tile_n - 1)) // self.tile_n)
            upto = cutlass.min(own, most)
            for i in cutlass.range_constexpr(5):
                # where offsets are wrong there may be more tiles than 32 bits hold: every sum stops at `most`
                below = cute.arch.shuffle_sync_up(upto, 1 << i, mask_and_clamp=0)
                upto = cutlass.min(upto + below, most) if lane >= (1 << i) else upto
            beside = cute.arch.shuffle_sync_up(upto, 1, mask_and_clamp=0)
            if lane == _LANES - 1:
                sums[warp] = upto
            cute.arch.sync_threads()
            before = total
            for w in cutlass.range_constexpr(_WARPS):
                before = cutlass.min(before + sums[w], most) if w < warp else before
                total = cutlass.min(total + sums[w], most)
            start = cutlass.min(before + beside, most) if lane > 0 else before
            if (start <= tile) & (tile < cutlass.min(before + upto, most)):
                for i, value in enumerate((expert, start, begin, end)):
                    record[i] = value
            cute.arch.sync_threads()
        return total

    @cute.jit
    def clamped(self, offset, rows):
        return cutlass.min(cutlass.max(offset, 0), rows)

    # ---- scales ----

    @cute.jit
    def copy(self, scales, tiled, stride, columns, begin, end, tile, lane, warp):
        """The scales of rows `begin` to `end`, as far as this tile has them; zeros beside them."""
        atoms = cute.ceil_div(columns, ATOM_COLS)
        aligned = (((scales | stride) | Int64(columns)) & (ATOM_COLS - 1)) == 0
        row = Int64(tile) * self.tile_n
        target = tiled + row // ATOM_ROWS * atoms * ATOM_BYTES + row % ATOM_ROWS // _LANES * ATOM_COLS + lane * 16
        for atom in cutlass.range(warp, atoms, _WARPS, unroll=4):
            words = cute.make_rmem_tensor((self.parts,), Uint32)
            for part in cutlass.range_constexpr(self.parts):
                at = begin + part * _LANES + lane
                words[part] = self.four(scales + Int64(at) * stride, atom * ATOM_COLS, columns, at < end, aligned)
            cute.autovec_copy(words, _there(Uint32, target + Int64(atom) * ATOM_BYTES, self.parts))

    @cute.jit
    def four(self, row, column, columns, there, aligned):
        """Neighbours of a row in one word; zero where there are none."""
        found = Uint32(0)
        if there:
            if aligned:
                found = Uint32(_there(Uint32, row + column)[0])
            else:
                for i in cutlass.range_constexpr(ATOM_COLS):
                    if column + i < columns:
                        found = Uint32(found) | Uint32(Uint32(_there(Uint8, row + column + i)[0]) << (8 * i))
        return found
