"""Flags by which the CTAs of one launch wait for each other: int32, zero when a launch begins, and left zero by it.

Launches that may run at once must not share any. So each stream has its own, and has others in each CUDA graph, because
graphs that were captured in one stream may be replayed in several.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glu4.compiled.driver import Relaxed, capture_id

__all__ = ["FLAGS", "forget", "reserve", "take"]

FLAGS = 1024  # of one launch
_OWNERS = 256  # that one allocation serves
_Owner = tuple[int, int, int]  # device, stream, graph

_pages: dict[int, list[Tensor]] = {}
_used: dict[int, int] = {}
_owned: dict[_Owner, int] = {}


def reserve(index: int) -> None:
    """Allocate for the first launches on device `index`, so that none of them has to."""
    if index not in _pages:
        _pages[index] = [_zeros(index)]


def take(index: int, stream: int) -> int:
    """Address of a launch's flags on device `index`, in its current stream, which is `stream`."""
    owner = index, stream, capture_id(stream) if _capturing() else 0
    address = _owned.get(owner)
    if address is None:
        address = _owned[owner] = _more(index)
    return address


def forget() -> None:
    """All of it; only while nothing runs and no graph is left that was captured."""
    for kept in (_pages, _used, _owned):
        kept.clear()


def _more(index: int) -> int:
    reserve(index)
    number = _used.get(index, 0)
    _used[index] = number + 1
    pages = _pages[index]
    if number >= _OWNERS * len(pages):
        pages.append(_zeros(index))
    return pages[number // _OWNERS].data_ptr() + number % _OWNERS * FLAGS * 4


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _zeros(index: int) -> Tensor:
    """Outside of any graph that is being captured, and complete: a stream of its own is waited for, no other."""
    with torch.cuda.device(index), Relaxed():
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            made = torch.zeros(_OWNERS * FLAGS, dtype=torch.int32, device=f"cuda:{index}")
        stream.synchronize()
    return made
