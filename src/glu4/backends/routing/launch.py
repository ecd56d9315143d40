"""Sort a router's choices and combine its experts' results on a GPU, a launch each; nothing is read back by the host."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from glu4.backends.routing.spec import CLUSTER, MAX_KEYS, CombineSpec, SortSpec, shipped
from glu4.compiled import store
from glu4.compiled.driver import Kernel

__all__ = ["ALONE", "MOST_CHOICES", "architecture", "combine", "combines", "forget", "load", "made_kernel", "sort", "sorts"]

_C = torch._C
# of sort: ids, order, places, offsets; how many, 32-bit words of each, experts
# of combine: y, places, weights, how many rows experts have, out; top_k, columns
_PARAMETERS = {SortSpec: ("Q", "Q", "Q", "Q", "i", "i", "i"), CombineSpec: ("Q", "Q", "Q", "Q", "Q", "i", "i")}
_TARGETS = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}
_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}
_COLUMNS = 1024  # of combine's CTA
MOST_CHOICES = 1 << 17  # twice as fast as torch there, level at twice as many (benchmarks/results/h200-sorts.json)
ALONE = 1536  # choices that one CTA sorts; a cluster is faster from between 1024 and 2048 on


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def architecture(device: torch.device) -> str | None:
    """The target whose kernels run on `device`, None where there are none."""
    return _TARGETS.get(_capability(device.index or 0)) if device.type == "cuda" else None


@cache
def _kernel(spec: SortSpec | CombineSpec) -> Kernel | None:
    """A kernel that is packaged or cached."""
    found = store.find(spec)
    return None if found is None else made_kernel(spec, *found)


def made_kernel(spec: SortSpec | CombineSpec, cubin: bytes, description: dict[str, object]) -> Kernel:
    """The kernel of a cubin, as its builder described it."""
    cluster = (spec.ctas, 1, 1) if isinstance(spec, SortSpec) else (1, 1, 1)
    return Kernel(cubin, description, _PARAMETERS[type(spec)], cluster=cluster)


def load(device: torch.device) -> None:
    """Load the kernels onto `device`, so that no later call has to, nor a captured graph."""
    arch = architecture(device)
    for spec in () if arch is None else shipped(arch):
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


def _launch(spec: SortSpec | CombineSpec, index: int, grid: tuple[int, int, int], params: tuple[int, ...]) -> None:
    kernel = _kernel(spec)
    assert kernel is not None
    kernel.launch(index, _C._cuda_getCurrentRawStream(index), grid, None, params)
