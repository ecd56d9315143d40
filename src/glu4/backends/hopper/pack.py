"""The packed weights of the Hopper kernel: NVFP4 in the order in which its threads want it.

A unit is 64 packed rows by 64 of K, 576 words of 4 bytes: 512 of codes, then 64 of scales; units lie along K, then along rows.

Packed rows. Rows 16 w + 0..7 of a unit are gate and 16 w + 8..15 up (w = 0..3, one warp each) of outputs 8 w + 0..7, so that
the two rows of a thread's accumulator fragment (PTX ISA, wgmma.mma_async, matrix D: rows g and g + 8) belong to one output.
For one matrix alone they are its own rows in order.

Codes. Word 4 t + s is what thread t = 32 w + 4 g + q feeds to step s (16 of K) as its matrix A fragment: registers j = 0..3 for
rows g, g + 8 (j % 2) and k = 8 (j // 2) + 2 q + h, h = 0, 1 in the low and high half. In each half:

    bits 15, 11..9  j = 0, in place: sign and magnitude where fp16 has its sign and lowest exponents
    bits 12, 8..6   j = 1, one shift by 3
    bits 14, 5..3   j = 2, shifts by 1 and 6
    bits 13, 2..0   j = 3, shifts by 2 and 9

Scales. Word 2 (8 w + g) + s // 2 holds bytes (row g, even s), (row g, odd s), (row g + 8, even s), (row g + 8, odd s). A byte
is bits 14..7 of fp16(scale * 128): every e4m3 scale is a normal fp16 number of three mantissa bits there, or zero.

Codes of blocks with scale zero are packed as zero: the bf16 path adds a constant to the scale's exponent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glu4.nvfp4 import BLOCK, NVFP4Tensor, _unchecked, pack_codes, unpack_codes

__all__ = ["CODE_WORDS", "SCALE_BIAS", "UNIT_WORDS", "pack_gated", "pack_matrix", "unpack_gated", "unpack_matrix"]

CODE_WORDS = 512
SCALE_WORDS = 64
UNIT_WORDS = CODE_WORDS + SCALE_WORDS
SCALE_BIAS = 7  # scales are stored times 2^7
# (lowest magnitude bit, sign bit) of fragment register j in each half of a code word
_FIELDS = ((9, 15), (6, 12), (3, 14), (0, 13))


def _padded(w: NVFP4Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Codes `[R, K]` one a byte and scale bytes `[R, K/16]`, zero-padded to a multiple of `rows` rows and of 64 of K."""
    codes = unpack_codes(w.codes)
    scale = w.linear_block_scale()
    codes = codes.masked_fill((scale.view(torch.uint8) == 0).repeat_interleave(BLOCK, -1), 0)
    stored = ((scale.to(torch.float32) * 2.0**SCALE_BIAS).half().view(torch.int16) >> 7).to(torch.uint8)
    r, k = codes.shape
    pad_r, pad_k = -r % rows, -k % 64
    pad = torch.nn.functional.pad
    return pad(codes, (0, pad_k, 0, pad_r)), pad(stored, (0, pad_k // BLOCK, 0, pad_r))


def _pack(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Units of two row sets `[T * 32, K]`: `first` in the slots of rows g, `second` in those of g + 8."""
    (codes1, scale1), (codes2, scale2) = first, second
    tiles, k = codes1.shape[0] // 32, codes1.shape[1]
    both = torch.stack((codes1.view(tiles, 4, 8, k), codes2.view(tiles, 4, 8, k)), 2)
    # tile w row_set g unit_k s k_half q h
    split = both.view(tiles, 4, 2, 8, k // 64, 4, 2, 4, 2)
    fields = split.permute(0, 4, 1, 3, 7, 5, 8, 6, 2).to(torch.int32)  # tile unit_k w g q s | h k_half row_set
    word = torch.zeros(fields.shape[:-3], dtype=torch.int32, device=codes1.device)
    for h in range(2):
        for j, (low, sign) in enumerate(_FIELDS):
            code = fields[..., h, j // 2, j % 2]
            word |= ((code & 7) << (low + 16 * h)) | ((code >> 3) << (sign + 16 * h))
    scales = torch.stack((scale1.view(tiles, 4, 8, k // 64, 2, 2), scale2.view(tiles, 4, 8, k // 64, 2, 2)), -2)
    scale_bytes = scales.permute(0, 3, 1, 2, 4, 5, 6).contiguous()  # tile unit_k w g s//2 row_set s%2
    scale_words = scale_bytes.view(tiles, k // 64, 4 * SCALE_WORDS).view(torch.int32)
    return torch.cat((word.view(tiles, k // 64, CODE_WORDS), scale_words), -1)


def _unpack(packed: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The inverse of `_pack`: (codes one a byte, float8 scales) of both row sets."""
    tiles, units_k = packed.shape[:2]
    word = packed[..., :CODE_WORDS].reshape(tiles, units_k, 4, 8, 4, 4)
    fields = torch.empty((*word.shape, 2, 2, 2), dtype=torch.uint8, device=packed.device)
    for h in range(2):
        for j, (low, sign) in enumerate(_FIELDS):
            code = ((word >> (low + 16 * h)) & 7) | (((word >> (sign + 16 * h)) & 1) << 3)
            fields[..., h, j // 2, j % 2] = code.to(torch.uint8)
    # tile unit_k w g q s h k_half row_set -> row_set tile w g unit_k s k_half q h
    codes = fields.permute(8, 0, 2, 3, 1, 5, 7, 4, 6).reshape(2, tiles * 32, units_k * 64)
    raw = packed[..., CODE_WORDS:].contiguous().view(torch.uint8).view(tiles, units_k, 4, 8, 2, 2, 2)
    half = (raw.permute(5, 0, 2, 3, 1, 4, 6).reshape(2, tiles * 32, units_k * 4).to(torch.int16) << 7).view(torch.float16)
    scales = (half.to(torch.float32) * 2.0**-SCALE_BIAS).to(torch.float8_e4m3fn)
    return (codes[0], scales[0]), (codes[1], scales[1])


def _with_spare_unit(packed: Tensor) -> Tensor:
    """`packed` as a view of a buffer that is zero for one unit more: a copy of whole stages may run past the end."""
    buffer = torch.zeros(packed.numel() + UNIT_WORDS, dtype=torch.int32, device=packed.device)
    buffer[: packed.numel()] = packed.flatten()
    return buffer[: packed.numel()].view(packed.shape)


def pack_gated(gate: NVFP4Tensor, up: NVFP4Tensor) -> Tensor:
    """Gate and up `[N, K]` as int32 `[ceil(N / 32), ceil(K / 64), 576]`; N and K are padded with zeros."""
    return _with_spare_unit(_pack(_padded(gate, 32), _padded(up, 32)))


def pack_matrix(weight: NVFP4Tensor) -> Tensor:
    """One matrix `[N, K]` as int32 `[ceil(N / 64), ceil(K / 64), 576]`."""
    codes, scale = (t.view(-1, 2, 8, t.shape[-1]) for t in _padded(weight, 64))
    first, second = ((codes[:, i].reshape(-1, codes.shape[-1]), scale[:, i].reshape(-1, scale.shape[-1])) for i in (0, 1))
    return _with_spare_unit(_pack(first, second))


def _tensor(codes: Tensor, scale: Tensor, n: int, k: int, global_scale: Tensor) -> NVFP4Tensor:
    return _unchecked(pack_codes(codes[:n, :k].contiguous()), scale[:n, : k // BLOCK].contiguous(), global_scale)


def unpack_gated(packed: Tensor, n: int, k: int, gate_scale: Tensor, up_scale: Tensor) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """The inverse of `pack_gated`, given the sizes and global scales; codes of zero-scale blocks come back as zero."""
    first, second = _unpack(packed)
    return _tensor(*first, n, k, gate_scale), _tensor(*second, n, k, up_scale)


def unpack_matrix(packed: Tensor, n: int, k: int, global_scale: Tensor) -> NVFP4Tensor:
    """The inverse of `pack_matrix`."""
    (codes1, scale1), (codes2, scale2) = _unpack(packed)
    codes = torch.stack((codes1.view(-1, 8, codes1.shape[-1]), codes2.view(-1, 8, codes2.shape[-1])), 1).flatten(0, 2)
    scale = torch.stack((scale1.view(-1, 8, scale1.shape[-1]), scale2.view(-1, 8, scale2.shape[-1])), 1).flatten(0, 2)
    return _tensor(codes, scale, n, k, global_scale)
