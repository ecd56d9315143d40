"""sm100_tile_tokens_nvfp4: number the tiles of a mixture of experts, and lay out its tokens' block scales by them.

Device code; needs nvidia-cutlass-dsl. It makes what `moe_tokens.tile_table` and `moe_tokens.tiled_scales` make, in one launch:
a CTA for each tile along tokens computes all experts' first tiles from the offsets, as every other does, finds its own expert
and copies the scales of its rows. A warp fills a column of atoms after the other; a lane has every 32nd row, whose scales lie
side by side in an atom (glu4.scale_layout).

sm100_gather_tokens_nvfp4 does so with tokens that lie unsorted: it finds each by the sort's index and copies its codes, too.
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
_PIECE = 16  # bytes of codes that a lane copies at once


@cute.jit
def _there(element: cutlass.Constexpr, address, count: cutlass.Constexpr = 1):
    """`count` neighbours in global memory, aligned to as many bytes as they are."""
    align = element.width // 8 * count
    pointer = cute.make_ptr(element, address, cute.AddressSpace.gmem, assumed_align=align)
    return cute.make_tensor(pointer, cute.make_layout(count))


class TileTokens:
    """One kernel, for tiles of `tile_n` tokens: 32, 64 or 128; gather: of rows that an index names.

    Arguments at launch, device pointers: offsets int32 [e + 1]; scales, e4m3 bytes [rows, columns], neighbours side by side;
    table int32 [1 + most, 4], 16-byte aligned; tiled, the scales in 128x4 layout of [most * tile_n, columns], 16-byte aligned.
    Then the row stride of scales in bytes; rows; experts, one at least; tiles along tokens that there are at most, below 2^30;
    columns. With `gather` also: order int64 [rows], where row r is row order[r] // top_k of `scales` and of `codes`, bytes
    [.., row_bytes], 16-byte aligned; found, as codes, [rows, row_bytes], of which rows of no expert are not written; top_k; and
    row_bytes, a multiple of 16. Without, pointers are None and the numbers not read.
    """

    def __init__(self, tile_n: int, gather: bool = False) -> None:
        self.tile_n, self.parts, self.gather = tile_n, tile_n // _LANES, gather

    @cute.jit
    def __call__(
        self, offsets: cute.Pointer, scales: cute.Pointer, table: cute.Pointer, tiled: cute.Pointer, stride: Int64,
        rows: Int32, experts: Int32, most: Int32, columns: Int32, order: cute.Pointer | None, codes: cute.Pointer | None,
        found: cute.Pointer | None, top_k: Int32, row_bytes: Int32, stream: CUstream,
    ):  # fmt: skip
        each = cutlass.const_expr(ATOM_ROWS // self.tile_n)
        grid = (cute.ceil_div(most, each) * each, 1, 1)  # whole atoms: padding is written too
        index = ()
        if cutlass.const_expr(self.gather):
            index = (order, codes, found, top_k, row_bytes)
        self.kernel(offsets, scales, table, tiled, stride, rows, experts, most, columns, index).launch(
            grid=grid, block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self, offsets: cute.Pointer, scales: cute.Pointer, table: cute.Pointer, tiled: cute.Pointer, stride: Int64,
        rows: Int32, experts: Int32, most: Int32, columns: Int32, index: tuple,
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
        self.copy(scales.toint(), tiled.toint(), stride, columns, begin, four[3], tile, lane, warp, index)
        if cutlass.const_expr(self.gather):
            self.copy_codes(index, begin, four[3], lane, warp)

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
    def copy(self, scales, tiled, stride, columns, begin, end, tile, lane, warp, index):
        """The scales of rows `begin` to `end`, as far as this tile has them; zeros beside them."""
        atoms = cute.ceil_div(columns, ATOM_COLS)
        aligned = (((scales | stride) | Int64(columns)) & (ATOM_COLS - 1)) == 0
        row = Int64(tile) * self.tile_n
        target = tiled + row // ATOM_ROWS * atoms * ATOM_BYTES + row % ATOM_ROWS // _LANES * ATOM_COLS + lane * 16
        sources = cute.make_rmem_tensor((self.parts,), Int64)
        for part in cutlass.range_constexpr(self.parts):
            at = begin + part * _LANES + lane
            sources[part] = scales + self.source(index, at, at < end) * stride
        for atom in cutlass.range(warp, atoms, _WARPS, unroll=4):
            words = cute.make_rmem_tensor((self.parts,), Uint32)
            for part in cutlass.range_constexpr(self.parts):
                there = begin + part * _LANES + lane < end
                words[part] = self.four(sources[part], atom * ATOM_COLS, columns, there, aligned)
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

    # ---- the gather ----

    @cute.jit
    def source(self, index, row, there):
        """Which row of the tokens a row of the work is."""
        found = Int64(row)
        if cutlass.const_expr(self.gather):
            order, _, _, top_k, _ = index
            if there:
                found = cute.make_tensor(order + row, cute.make_layout(1))[0] // Int64(top_k)
        return found

    @cute.jit
    def copy_codes(self, index, begin, end, lane, warp):
        """The codes of this tile's rows, one row a warp at a time."""
        _, codes, target, _, row_bytes = index
        last = cutlass.min(end, begin + self.tile_n)
        for row in cutlass.range(begin + warp, last, _WARPS, unroll=1):
            start = codes.toint() + self.source(index, row, row < last) * row_bytes
            there = target.toint() + Int64(row) * row_bytes
            for piece in cutlass.range(lane, row_bytes // _PIECE, _LANES, unroll=4):
                words = cute.make_rmem_tensor((_PIECE // 4,), Uint32)
                cute.autovec_copy(_there(Uint32, start + Int64(piece) * _PIECE, _PIECE // 4), words)
                cute.autovec_copy(words, _there(Uint32, there + Int64(piece) * _PIECE, _PIECE // 4))
