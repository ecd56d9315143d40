"""NVFP4 activations to fp16, exact, in three ways. Device code, in CuTe DSL.

`produce_tokens`: warps of the kernel that multiplies decode into its stages, where a tile has few tokens.
`DecodeTokens`: sm90_decode_tokens, a kernel of its own ahead of it, where decoding the same tokens in every CTA would cost
more. It waits for the kernel that writes the activations (griddepcontrol, PTX ISA), while the multiplying kernel behind it may
already fetch weights.
`GatherTokens`: the same of the rows that an index asks for, so that tokens sorted by expert never lie in memory as NVFP4.

A value is e2m1 * e4m3: six significand bits at most, from 2^-10 to 2688 in magnitude; fp16 holds it, and 2^-7 of it, exactly.
The tensor's global scale is not applied here; the multiplying kernel takes it into its float32 epilogue.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream

from glu4.backends.hopper.config import DECODE_AHEAD, DECODE_THREADS, DECODE_WARPS, DECODE_WORDS, STAGED_ROW, TILE_K
from glu4.backends.hopper.instructions import asm_u32, copy_async, load_shared, store_16_bytes, store_shared_16_bytes

Int32, Int64, Uint32, Uint64 = cutlass.Int32, cutlass.Int64, cutlass.Uint32, cutlass.Uint64

STAGE_BLOCKS = 2 * TILE_K // 16  # blocks of a row in a stage of two units
TOKEN_BIAS = 7  # produce_tokens leaves 2^-7 of each value
_SCALE = "{ .reg .b16 pair; cvt.u16.u32 pair, $1; cvt.rn.f16x2.e4m3x2 $0, pair; }"
_PRODUCT = "mul.rn.f16x2 $0, $1, $2;"
_PERMUTE = "prmt.b32 $0, $1, $2, %s;"
_TWO_TO_7 = 0x58005800  # fp16, twice


@cute.jit
def _factor(scale_byte):
    """An e4m3 scale times 2^7, twice in fp16."""
    return asm_u32(_PRODUCT, asm_u32(_SCALE, scale_byte | (scale_byte << 8), 0), _TWO_TO_7)


@cute.jit
def _decode(word, factor):
    """Eight codes, the lowest nibble first, times 2^-14 and `factor`: four words of two fp16 values.

    A code's sign and magnitude in bits 15 and 11..9 of fp16 are its value times 2^-14.
    """
    even = ((word << 4) & 0x80808080) | ((word << 1) & 0x0E0E0E0E)
    odd = (word & 0x80808080) | ((word >> 3) & 0x0E0E0E0E)
    values = cute.make_rmem_tensor((4,), Uint32)
    for half in cutlass.range_constexpr(2):
        both = asm_u32(_PERMUTE % ("0x5140", "0x7362")[half], even, odd)
        for pair in cutlass.range_constexpr(2):
            raw = asm_u32(_PERMUTE % ("0x1404", "0x3424")[pair], both, 0)
            values[2 * half + pair] = asm_u32(_PRODUCT, raw, factor)
    return values


@cute.jit
def produce_tokens(
    codes: cute.Tensor,
    block_scales: cute.Tensor,
    tokens: Int32,
    staging: Int32,
    pipe: Any,
    first_row: Int32,
    first_step: Int32,
    steps: Int32,
    warp: Int32,
    config: cutlass.Constexpr,
):
    """What one of DECODE_WARPS warps does for the token stages: it decodes every DECODE_WARPS-th, 2^-7 of each value.

    codes [M, K / 16], eight bytes a block; block_scales [M, K / 16], a byte each, rows and start aligned to 4; tokens: address
    of the first stage, 128 bytes a row of 64 values, 16-byte chunks swizzled as wgmma's 128-byte mode has them; staging: that
    of `config.staging_bytes`. Rows and blocks that do not exist are zero.

    Codes and scales come by cp.async, DECODE_AHEAD stages ahead. Loads into registers were tried: a wait for one of them waits
    for all that share its scoreboard, of which a warp has six. So were several warps to a stage: a warp's time is latency.
    """
    lane = cute.arch.lane_idx()
    slot_bytes = cutlass.const_expr(config.tokens * STAGED_ROW)
    staging += warp * (DECODE_AHEAD * slot_bytes)
    for i in cutlass.range(DECODE_AHEAD, unroll=1):
        step = first_step + warp + i * DECODE_WARPS
        _fetch(codes, block_scales, staging + i * slot_bytes, first_row, step, lane, config.tokens)
    slot, phase, ahead = Int32(warp), Int32(1), Int32(0)
    for step in cutlass.range(warp, steps, DECODE_WARPS, unroll=1):
        staged = staging + ahead * slot_bytes
        cute.arch.cp_async_wait_group(DECODE_AHEAD - 1)
        cute.arch.sync_warp()
        pipe.sync_object_empty.wait(slot, phase)
        _store(staged, tokens + slot * (2 * config.tokens * 128), lane, config.tokens)
        # the consumers fence proxies: here that would wait for what is under way
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(pipe.sync_object_full.get_barrier(slot))
        later = first_step + step + DECODE_AHEAD * DECODE_WARPS
        _fetch(codes, block_scales, staged, first_row, later, lane, config.tokens)
        ahead = 0 if ahead == DECODE_AHEAD - 1 else ahead + 1
        slot += DECODE_WARPS
        if slot >= config.stages:
            slot -= config.stages
            phase ^= 1
    cute.arch.cp_async_wait_group(0)


@cute.jit
def _fetch(codes, block_scales, staged, first_row, step, lane, tile: cutlass.Constexpr):
    """Start the copies of a lane's blocks of one stage, one group: eight lanes copy a row's 64 bytes side by side, and two of
    them its eight scales."""
    rows, blocks = codes.shape
    block = lane % STAGE_BLOCKS
    column = step * STAGE_BLOCKS + block
    for j in cutlass.range_constexpr(tile // 4):
        row = lane // STAGE_BLOCKS + 4 * j
        there = (column < blocks) & (first_row + row < rows)
        at = (first_row + row if there else 0, column if there else 0)  # some address that exists
        place = staged + row * STAGED_ROW
        size = Uint32(8) if there else Uint32(0)
        copy_async(place + block * 8, codes.iterator.toint() + 8 * cute.crd2idx(at, codes.layout), 8, size)
        if block % 4 == 0:
            copy_async(place + 64 + block, block_scales.iterator.toint() + cute.crd2idx(at, block_scales.layout), 4, size // 2)
    cute.arch.cp_async_commit_group()


@cute.jit
def _store(staged, start, lane, tile: cutlass.Constexpr):
    """Decode a lane's blocks of one stage into the stage at `start`."""
    block = lane % STAGE_BLOCKS
    unit = block // 4
    for j in cutlass.range_constexpr(tile // 4):
        row = lane // STAGE_BLOCKS + 4 * j
        place, there = staged + row * STAGED_ROW, start + (unit * tile + row) * 128
        factor = _factor(load_shared("u8", place + 64 + block))
        for turn in cutlass.range_constexpr(2):
            # lanes of the second unit begin with the high half, so that the eight lanes of a row write to all banks
            half = unit ^ turn
            word = load_shared("b32", place + block * 8 + half * 4)
            chunk = block % 4 * 2 + half
            store_shared_16_bytes(there + ((chunk ^ (row % 8)) * 16), _decode(word, factor))


class DecodeTokens:
    """Arguments at launch: codes as words of eight, row by row; scale bytes; out, four words for each word of codes;
    `swizzled`, 0 for linear scales, else the words of a row, with scales in the 128x4 layout. The grid has a thread for each
    DECODE_WORDS words, or for fewer."""

    @cute.jit
    def __call__(self, codes: cute.Tensor, scales: cute.Tensor, out: cute.Tensor, swizzled: Int32, stream: CUstream):
        grid = (cute.ceil_div(codes.shape[0], DECODE_THREADS * DECODE_WORDS), 1, 1)
        self.kernel(codes, scales, out, swizzled).launch(grid=grid, block=(DECODE_THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, codes: cute.Tensor, scales: cute.Tensor, out: cute.Tensor, swizzled: Int32):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        count = codes.shape[0]
        grid, _, _ = cute.arch.grid_dim()
        first = block * DECODE_THREADS + thread
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        words = cute.make_rmem_tensor((DECODE_WORDS,), Uint32)
        scale_bytes = cute.make_rmem_tensor((DECODE_WORDS,), Uint32)
        for i in cutlass.range_constexpr(DECODE_WORDS):
            word = first + i * (grid * DECODE_THREADS)
            if word < count:  # so that all loads start at once
                words[i] = codes[word]
                scale_bytes[i] = Uint32(scales[self.scale_index(word, swizzled)])
        for i in cutlass.range_constexpr(DECODE_WORDS):
            word = first + i * (grid * DECODE_THREADS)
            if word < count:
                values = _decode(words[i], _factor(scale_bytes[i]))
                for pair in cutlass.range_constexpr(4):
                    values[pair] = asm_u32(_PRODUCT, values[pair], _TWO_TO_7)
                store_16_bytes(out.iterator.toint() + Int64(word) * 16, values)

    @cute.jit
    def scale_index(self, word, swizzled):
        """Where the scale of a word's block lies; `glu4.scale_layout` describes both layouts."""
        index = Uint32(word) // 2
        if swizzled != 0:
            width = Uint32(swizzled)
            row, column = Uint32(word) // width, Uint32(word) % width // 2
            atoms = (width // 2 + 3) // 4
            index = ((row // 128) * atoms + column // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
        return index


class GatherTokens:
    """Arguments at launch: codes [T, words] of eight each and scale bytes [T, words / 2], rows dense or not; order int64
    [T, top_k]; out, four words for each word of codes, row by row: row r is of token order[r] / top_k. A CTA takes
    DECODE_THREADS words of one row."""

    @cute.jit
    def __call__(self, codes: cute.Tensor, scales: cute.Tensor, order: cute.Tensor, out: cute.Tensor, stream: CUstream):
        grid = (cute.size(order), cute.ceil_div(codes.shape[1], DECODE_THREADS), 1)
        self.kernel(codes, scales, order, out).launch(grid=grid, block=(DECODE_THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, codes: cute.Tensor, scales: cute.Tensor, order: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        row, part, _ = cute.arch.block_idx()
        words = codes.shape[1]
        word = part * DECODE_THREADS + thread
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if word < words:
            token = Int32(Uint32(order.iterator[row]) // Uint32(order.shape[1]))
            code, scale_byte = codes[token, word], Uint32(scales[token, word // 2])
            values = _decode(code, _factor(scale_byte))
            for pair in cutlass.range_constexpr(4):
                values[pair] = asm_u32(_PRODUCT, values[pair], _TWO_TO_7)
            store_16_bytes(out.iterator.toint() + (Int64(row) * words + word) * 16, values)
