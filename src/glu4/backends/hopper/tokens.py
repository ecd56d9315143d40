"""Tokens as a kernel takes them: a matrix in 16 bits, or NVFP4 that it decodes itself, or that is decoded ahead of it."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from glu4.backends.hopper.config import DECODE_MANY, DECODE_THREADS, DECODE_WORDS
from glu4.backends.hopper.spec import DecodeSpec
from glu4.compiled import store
from glu4.compiled.driver import Kernel, Matrix
from glu4.nvfp4 import BLOCK, E2M1_VALUES, NVFP4Tensor

__all__ = [
    "DECODED",
    "NVFP4",
    "Format",
    "Source",
    "decode",
    "decoder",
    "forget",
    "format_of",
    "gathered",
    "gatherer",
    "prepared",
    "row_stride",
    "source",
]

_C = torch._C
NVFP4, DECODED = "nvfp4", "nvfp4, decoded"  # NVFP4 that a kernel can read as it lies in memory, and any other
Format = torch.dtype | str  # of x: its dtype, or one of these
# of sm90_decode_tokens: codes, scales and output with their sizes, and the words of a row where scales are swizzled
_DECODER_PARAMETERS = ("Qi4x", "Qi4x", "Qi4x", "i")
# of sm90_gather_tokens: codes and scales with their rows, the index, the output
_GATHERER_PARAMETERS = ("Qiiq", "Qiiq", "Qiiq", "Qi4x")
_INDICES = 1 << 31  # of words and bytes, which the kernel counts in 32 bits with a sign
_UNIT = 64  # of K: scales come to the kernel four at a time


class Source(NamedTuple):
    """What a launch reads its tokens from, `[M, K]`.

    matrix   what the tensor map covers; None where the kernel decodes
    params   the parameters up to the weights
    held     memory that the launch reads
    """

    m: int
    k: int
    matrix: Matrix | None
    params: tuple[int, ...]
    held: Tensor


def format_of(x: Tensor | NVFP4Tensor) -> Format:
    """What decides which kernels can take x."""
    if not isinstance(x, NVFP4Tensor):
        return x.dtype
    codes, scales = x.codes, x.block_scale
    readable = not x.is_swizzled and codes.is_contiguous() and scales.is_contiguous()
    aligned = codes.shape[-1] * 2 % _UNIT == 0 and codes.data_ptr() % 8 == 0 and scales.data_ptr() % 4 == 0
    return NVFP4 if readable and aligned else DECODED


def prepared(x: Tensor | NVFP4Tensor, as_nvfp4: bool, index: int) -> Tensor | NVFP4Tensor:
    """x `[..., M, K]` on device `index`, decoded to fp16 if it is NVFP4 and the kernel does not decode it (`as_nvfp4`)."""
    return _decoded(x, index) if isinstance(x, NVFP4Tensor) and not as_nvfp4 else x


def source(x: Tensor | NVFP4Tensor, item: int | None = None) -> Source:
    """Of what `prepared` gives, matrix `item`, or all `[..., M, K]` as one matrix; copied if a tensor map cannot address it."""
    if not isinstance(x, NVFP4Tensor):
        x = x if item is None else x[item]
        row = row_stride(x)
        if row is None:
            x, row = x.clone(memory_format=torch.contiguous_format), x.shape[-1]
        k = x.shape[-1]
        m = x.numel() // k
        return Source(m, k, (x.data_ptr(), m, k, 2 * row), (m, k), x)
    codes, scales = (t if item is None else t[item] for t in (x.codes, x.block_scale))
    k = codes.shape[-1] * 2
    m = codes.numel() * 2 // k
    blocks = k // BLOCK
    shape = (m, blocks, blocks)
    return Source(m, k, None, (codes.data_ptr(), *shape, scales.data_ptr(), *shape), codes)


def row_stride(x: Tensor) -> int | None:
    """The stride in elements of x's rows `[..., K]`, if a tensor map can address them: steps of 16 bytes, none overlapping."""
    if x.data_ptr() % 16:
        return None
    if x.is_contiguous():
        return x.shape[-1]
    if x.ndim != 2 or x.stride(1) != 1:
        return None
    rows, k = x.shape
    row = k if rows == 1 else x.stride(0)
    return row if row % 8 == 0 and k <= row < 1 << 35 else None


# ---- decoded ahead ----


@cache
def decoder() -> Kernel | None:
    """The kernel that decodes, if it is packaged or cached."""
    found = store.find(DecodeSpec())
    return None if found is None else Kernel(*found, _DECODER_PARAMETERS)


@cache
def gatherer() -> Kernel | None:
    """The kernel that decodes rows by an index, if it is packaged or cached."""
    found = store.find(DecodeSpec(gather=True))
    return None if found is None else Kernel(*found, _GATHERER_PARAMETERS)


def forget() -> None:
    """Look for the kernels again at the next use."""
    decoder.cache_clear()
    gatherer.cache_clear()


def _decoded(x: NVFP4Tensor, index: int) -> Tensor:
    """`decode`, by a kernel where there is one that can."""
    if x.is_swizzled and x.ndim > 2:  # the kernel knows swizzled scales of one matrix
        x = x.to_linear()
    codes, scales = x.codes, x.block_scale
    if x.has_aligned_rows:
        codes = codes.contiguous()  # without the padding that `quantize` leaves between rows for Blackwell
    kernel, words = decoder(), codes.numel() // 4
    plain = codes.is_contiguous() and scales.is_contiguous() and codes.data_ptr() % 4 == 0
    large = max(4 * words, scales.numel()) >= _INDICES
    if kernel is None or not plain or large:
        return decode(x)
    k = codes.shape[-1] * 2
    out = torch.empty((*codes.shape[:-1], k), dtype=torch.float16, device=codes.device)
    each = DECODE_WORDS if words >= DECODE_MANY else 1
    grid = (-(-words // (DECODE_THREADS * each)), 1, 1)
    row_words = k // 8 if x.is_swizzled else 0
    params = (codes.data_ptr(), words, scales.data_ptr(), scales.numel(), out.data_ptr(), 4 * words, row_words)
    kernel.launch(index, _C._cuda_getCurrentRawStream(index), grid, None, params)
    return out


def gathered(x: NVFP4Tensor, order: Tensor, index: int) -> Tensor | None:
    """Rows order // top_k of x `[T, K]` decoded to fp16 `[T * top_k, K]` on device `index`, by one kernel; None where there is
    none that can. order: int64 `[T, top_k]`, dense."""
    kernel, codes, scales = gatherer(), x.codes, x.block_scale
    rows, (tokens, top_k) = order.numel(), order.shape
    words, blocks = codes.shape[1] // 4, scales.shape[1]
    plain = codes.stride(1) == scales.stride(1) == 1 and codes.data_ptr() % 4 == codes.stride(0) % 4 == 0
    if kernel is None or x.is_swizzled or not plain or 4 * rows * words >= _INDICES:
        return None
    out = torch.empty((rows, 8 * words), dtype=torch.float16, device=codes.device)
    params = (
        codes.data_ptr(), tokens, words, codes.stride(0) // 4, scales.data_ptr(), tokens, blocks, scales.stride(0),
        order.data_ptr(), tokens, top_k, top_k, out.data_ptr(), 4 * rows * words,
    )  # fmt: skip
    grid = (rows, -(-words // DECODE_THREADS), 1)
    kernel.launch(index, _C._cuda_getCurrentRawStream(index), grid, None, params)
    return out


@cache
def _pairs(device: torch.device) -> Tensor:
    """For each packed byte its two values in fp16, side by side as one int32."""
    values = torch.tensor(E2M1_VALUES, dtype=torch.float16)
    byte = torch.arange(256)
    return torch.stack((values[byte & 0xF], values[byte >> 4]), -1).view(torch.int32).flatten().to(device)


def decode(x: NVFP4Tensor) -> Tensor:
    """e2m1 * e4m3 of `[..., rows, K]` in fp16, exact, without the global scale; by torch."""
    codes = x.codes
    values = torch.index_select(_pairs(codes.device), 0, codes.flatten().int()).view(torch.float16)
    scale = x.linear_block_scale() if x.is_swizzled else x.block_scale
    blocks = values.view(*codes.shape[:-1], -1, BLOCK)
    return blocks.mul_(scale.half().unsqueeze(-1)).view(*codes.shape[:-1], -1)
