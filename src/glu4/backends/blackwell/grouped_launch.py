"""Launches of the Blackwell kernel of grouped products: parameters as the driver takes them, and plans that patch addresses.

Executed in emulation only so far: no such GPU was at hand. CuTe DSL's host code of `grouped_gemm` passes, one after the other:
both tiled MMAs (nothing in them), four tensor maps of each group, the extents of the first group's codes and scales, C of each
group, row strides, sizes, and global scales. Tests compare.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from glu4.backends.blackwell.arguments import _EMPTY, _MAP_BYTES, _U4, _U16, _encode, scale_box
from glu4.backends.blackwell.grouped_config import GroupConfig, Size
from glu4.backends.blackwell.launch import _STREAM_AT, _Frame
from glu4.compiled.driver import Kernel

__all__ = ["MATRICES", "GroupChoice", "GroupPlan", "grouped_parameters", "grouped_sizes"]

MATRICES = 5  # addresses of each group: codes of B, its scales, codes of A, its scales, C
_MAPS = 4
_ATOM_BYTES = 512  # of block scales (glu4.scale_layout)


class GroupChoice(NamedTuple):
    """processors: of the device, for a persistent kernel."""

    kernel: Kernel
    config: GroupConfig
    processors: int


def grouped_sizes(config: GroupConfig) -> list[int]:
    """Bytes of every parameter."""
    g = config.groups
    return [12, 12, *[_MAP_BYTES] * (_MAPS * g), 8, 8, 8, 8, *[8] * g, *[8] * g, *[4] * (3 * g), 8, 8]


def grouped_parameters(
    config: GroupConfig, sizes: Sequence[Size], strides: Sequence[int], addresses: Sequence[int]
) -> list[bytes]:
    """Every parameter; the maps are encoded by the driver.

    sizes      (M, N, K) of each group, K a multiple of 32
    strides    of each group's C, in elements from row to row
    addresses  MATRICES of each group, then of float32 global scales `[groups]` of A and of B
    """
    maps: list[bytes] = []
    for group, (m, n, k) in enumerate(sizes):
        b, scale_b, a, scale_a, _ = addresses[MATRICES * group : MATRICES * (group + 1)]
        for i, (codes, scales, rows) in enumerate(((b, scale_b, n), (a, scale_a, m))):
            # of an empty group, whose maps nobody reads, as if there were a row
            maps += [_codes(config, i, codes, max(rows, 1), k), _scales(config, i, scales, max(rows, 1), k)]
    m, n, k = sizes[0]
    extents = [v for rows in (n, m) for v in ((rows, k), (-(-rows // 128), -(-k // 64)))]
    outs = [struct.pack("=Q", a) for a in addresses[MATRICES - 1 : MATRICES * len(sizes) : MATRICES]]
    return [
        _EMPTY, _EMPTY, *maps, *(struct.pack("=2i", *v) for v in extents), *outs, *(struct.pack("=q", s) for s in strides),
        *(struct.pack("=i", v) for size in sizes for v in size), *(struct.pack("=Q", a) for a in addresses[-2:]),
    ]  # fmt: skip


def _codes(config: GroupConfig, i: int, address: int, rows: int, k: int) -> bytes:
    """Of codes of B (i 0) or A: K, rows; one box is a stage's part of one CTA."""
    c = config.mma
    box = (c.tile_k, (c.tile_n if i else c.tile_m) // c.ctas)
    return _encode(_U4, address, (k, rows), (k // 2,), box, c.tile_k // 2)


def _scales(config: GroupConfig, i: int, address: int, rows: int, k: int) -> bytes:
    """Of scales of B or A, 16 bits at a time: a 512-byte atom, atoms along K, along rows."""
    along_k, along_rows = -(-k // 64), -(-rows // 128)
    box = (256, *scale_box(config.mma, i))
    return _encode(_U16, address, (256, along_k, along_rows), (_ATOM_BYTES, _ATOM_BYTES * along_k), box, 16)


class GroupPlan:
    """Launches of one kernel on one device that differ in addresses alone."""

    def __init__(self, chosen: GroupChoice, sizes: Sequence[Size], strides: Sequence[int]) -> None:
        self._chosen, self._sizes, self._strides = chosen, tuple(sizes), tuple(strides)
        self._grid = chosen.config.grid(sizes, chosen.processors)
        self._frames: list[Any] = []
        self._places: tuple[int, ...] = ()

    def launch(self, index: int, stream: int, addresses: Sequence[int]) -> None:
        """One launch on device `index`; addresses: as for `grouped_parameters`."""
        try:
            frame = self._frames.pop()  # one operation of the interpreter: no two threads get the same
        except IndexError:
            frame = self._frame(addresses)
        words = frame.words
        for place, address in zip(self._places, addresses):
            words[place] = address
        words[_STREAM_AT // 8] = stream
        kernel = self._chosen.kernel
        kernel.load(index)
        kernel.run(index, frame, self._frames)

    def _frame(self, addresses: Sequence[int]) -> Any:
        """The memory of a launch, and where the words are that change: a tensor map begins with its address."""
        groups, chosen = len(self._sizes), self._chosen
        values = grouped_parameters(chosen.config, self._sizes, self._strides, addresses)
        frame = _Frame(chosen, self._grid, values)  # type: ignore[arg-type] # of which it reads the kernel
        outs = 2 + _MAPS * groups + _MAPS
        order = [p for g in range(groups) for p in (*range(2 + _MAPS * g, 2 + _MAPS * (g + 1)), outs + g)]
        self._places = tuple(frame.starts[p] // 8 for p in (*order, len(values) - 2, len(values) - 1))
        return frame
