"""Quantise tokens, sort a router's choices and combine its experts' results on a GPU, a launch each; nothing is read back by
the host."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from glu4.backends.tokens.spec import CLUSTER, MAX_KEYS, CombineSpec, QuantizeSpec, SortSpec, Spec, quantizers, shipped
from glu4.compiled import store
from glu4.compiled.driver import Kernel
from glu4.nvfp4 import BLOCK
from glu4.scale_layout import SwizzledLayout

__all__ = [
    "ALONE",
    "MOST_CHOICES",
    "architecture",
    "combine",
    "combines",
    "forget",
    "load",
    "made_kernel",
    "quantize",
    "quantizes",
    "sort",
    "sorts",
]

_C = torch._C
# of sort: ids, order, places, offsets; how many, 32-bit words of each, experts
# of combine: y, places, weights, how many rows experts have, out; top_k, columns
# of quantize: x, global scales, codes, scales; matrices, rows, blocks, x's row, the codes' row, global scales' step, swizzled
_PARAMETERS = {
    SortSpec: ("Q", "Q", "Q", "Q", "i", "i", "i"),
    CombineSpec: ("Q", "Q", "Q", "Q", "Q", "i", "i"),
    QuantizeSpec: ("Q", "Q", "Q", "Q", "i", "i", "i", "i", "i", "i", "i"),
}
_TARGETS = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}
_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}
_COLUMNS = 1024  # of combine's CTA
_BLOCKS = 128  # of quantize's CTA
_MOST_SCALES = (1 << 31) - _BLOCKS  # which quantize counts in 32 bits with a sign
MOST_CHOICES = 1 << 17  # twice as fast as torch there, level at twice as many (benchmarks/results/h200-sorts.json)
ALONE = 1536  # choices that one CTA sorts; a cluster is faster from between 1024 and 2048 on


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def architecture(device: torch.device) -> str | None:
    """The target whose kernels run on `device`, None where there are none."""
    return _TARGETS.get(_capability(device.index or 0)) if device.type == "cuda" else None


@cache
def _kernel(spec: Spec) -> Kernel | None:
    """A kernel that is packaged or cached."""
    found = store.find(spec)
    return None if found is None else made_kernel(spec, *found)


def made_kernel(spec: Spec, cubin: bytes, description: dict[str, object]) -> Kernel:
    """The kernel of a cubin, as its builder described it."""
    cluster = (spec.ctas, 1, 1) if isinstance(spec, SortSpec) else (1, 1, 1)
    return Kernel(cubin, description, _PARAMETERS[type(spec)], cluster=cluster)


def load(device: torch.device, experts: bool = True) -> None:
    """Load the kernels onto `device`, so that no later call has to, nor a captured graph; without `experts` those alone that
    dense products want too."""
    arch = architecture(device)
    for spec in () if arch is None else shipped(arch) if experts else quantizers(arch):
        kernel = _kernel(spec)
        if kernel is not None:
            kernel.load(device.index or 0)


def forget() -> None:
    """Look for kernels again at the next use, for those that were made since."""
    _kernel.cache_clear()


def sorts(device: torch.device, choices: int, experts: int) -> bool:
    """Whether `sort` can do it and is expected to be faster than torch's sort."""
    arch = architecture(device)
    fits = 0 < choices <= MOST_CHOICES and experts < MAX_KEYS
    return fits and arch is not None and _kernel(_sorter(arch, choices)) is not None


def _sorter(arch: str, choices: int) -> SortSpec:
    return SortSpec(arch, 1 if choices <= ALONE else CLUSTER)


def sort(ids: Tensor, experts: int, order: Tensor, places: Tensor, offsets: Tensor) -> None:
    """Fill int64 order and places and int32 offsets `[experts + 1]` from ids, int32 or int64, as many; all dense, one device.

    order    positions of ids by expert, of equal ones in their order; ids outside 0 to experts - 1 last
    places   the inverse: places[order[r]] = r
    offsets  where each expert begins, and at last where those begin that are of none
    """
    addresses = [t.data_ptr() for t in (ids, order, places, offsets)]
    sizes = (ids.numel(), ids.element_size() // 4, experts)
    spec = _sorter(str(architecture(ids.device)), ids.numel())
    _launch(spec, ids.get_device(), (spec.ctas, 1, 1), (*addresses, *sizes))


def combines(y: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether `combine` can do it."""
    arch, dtype = architecture(y.device), _TYPES.get(y.dtype)
    if arch is None or dtype is None or out_dtype != y.dtype or not y.numel():
        return False
    return _kernel(CombineSpec(dtype, arch)) is not None


def combine(y: Tensor, places: Tensor, weights: Tensor, last: Tensor, out: Tensor) -> None:
    """Fill out `[T, H]` with the weighted sums of the rows of y `[T * top_k, H]` at places int64 `[T, top_k]`; all dense.

    weights  float32 `[T, top_k]`; last: int32, where rows of no expert begin, which count nothing
    """
    tokens, top_k = weights.shape
    columns = y.shape[1]
    spec = CombineSpec(_TYPES[y.dtype], str(architecture(y.device)))
    addresses = [t.data_ptr() for t in (y, places, weights, last, out)]
    _launch(spec, y.get_device(), (tokens, -(-columns // _COLUMNS), 1), (*addresses, top_k, columns))


def quantizes(x: Tensor) -> bool:
    """Whether `quantize` can do it, for x `[..., rows, K]`."""
    arch, dtype = architecture(x.device), _TYPES.get(x.dtype)
    if arch is None or dtype is None or not x.numel():
        return False
    padded = SwizzledLayout(x.shape[-2], x.shape[-1] // BLOCK).storage_shape
    if x.shape[:-2].numel() * torch.Size(padded).numel() > _MOST_SCALES:
        return False
    return _kernel(QuantizeSpec(dtype, arch)) is not None


def quantize(x: Tensor, global_scale: Tensor, codes: Tensor, block_scale: Tensor) -> None:
    """Fill codes and block scales of x `[..., rows, K]` under float32 global scales, one or one a matrix; all on one device.

    codes        uint8 `[..., rows, K/2]`, rows a multiple of 8 bytes apart, everything else dense
    block_scale  float8_e4m3fn, linear or swizzled as `glu4.scale_layout` has it, dense; padding is set to zero
    """
    rows, k = x.shape[-2:]
    lines, global_scale = _lines(x), global_scale.contiguous()
    addresses = [t.data_ptr() for t in (lines, global_scale, codes, block_scale)]
    step, swizzled = int(global_scale.numel() > 1), int(block_scale.ndim > codes.ndim)
    sizes = (x.shape[:-2].numel(), rows, k // BLOCK, lines.stride(0), codes.stride(-2) // 8, step, swizzled)
    spec = QuantizeSpec(_TYPES[x.dtype], str(architecture(x.device)))
    _launch(spec, x.get_device(), (-(-block_scale.numel() // _BLOCKS), 1, 1), (*addresses, *sizes))


def _lines(x: Tensor) -> Tensor:
    """x as one matrix `[rows, K]` whose rows a thread can load 16 bytes at a time; a copy if it does not lie so."""
    lines = x.reshape(-1, x.shape[-1])
    row = lines.stride(0)
    readable = lines.stride(1) == 1 and lines.data_ptr() % 16 == 0 and row % 8 == 0 and 0 <= row < 1 << 31
    return lines if readable else lines.clone(memory_format=torch.contiguous_format)


def _launch(spec: Spec, index: int, grid: tuple[int, int, int], params: tuple[int, ...]) -> None:
    kernel = _kernel(spec)
    assert kernel is not None
    kernel.launch(index, _C._cuda_getCurrentRawStream(index), grid, None, params)
