"""Launches of the Blackwell kernel of grouped products: parameters as the driver takes them, and plans that patch addresses.

Executed in emulation only so far: no such GPU was at hand. CuTe DSL's host code of `grouped_gemm` passes, one after the other:
both tiled MMAs (nothing in them), four or six tensor maps of each group, the extents of the first group's codes and scales, C
of every group, row strides, sizes, global scales, and of two weights the activation. Tests compare.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from glu4.backends.blackwell.arguments import _EMPTY, _MAP_BYTES, _U4, _U16, _encode, scale_box
from glu4.backends.blackwell.grouped_config import GroupConfig, Size
from glu4.backends.blackwell.launch import _STREAM_AT, _Frame
from glu4.compiled.driver import Kernel

__all__ = ["GroupChoice", "GroupPlan", "grouped_parameters", "grouped_sizes"]

Activation = tuple[int, float, float, float]  # flags (glu4.backends.blackwell.epilogue), alpha, beta, limit
_SILU = (0, 1.0, 0.0, float("inf"))
_ATOM_BYTES = 512  # of block scales (glu4.scale_layout)


class GroupChoice(NamedTuple):
    """processors: of the device, for a persistent kernel."""

    kernel: Kernel
    config: GroupConfig
    processors: int


def grouped_sizes(config: GroupConfig) -> list[int]:
    """Bytes of every parameter."""
    g, scales = config.groups, config.maps // 2
    return [
        12, 12, *[_MAP_BYTES] * (config.maps * g), 8, 8, 8, 8, *[8] * (2 * g), *[4] * (3 * g), *[8] * scales,
        *[4] * (4 * config.gated),
    ]  # fmt: skip


def grouped_parameters(
    config: GroupConfig,
    sizes: Sequence[Size],
    strides: Sequence[int],
    addresses: Sequence[int],
    activation: Activation = _SILU,
) -> list[bytes]:
    """Every parameter; the maps are encoded by the driver.

    sizes      (M, N, K) of each group, K a multiple of 32
    strides    of each group's C, in elements from row to row
    addresses  of each group: codes of B or gate, its scales, codes of A, its scales, codes of up, its scales, C; then of
               float32 global scales `[groups]` of A, of B or gate, and of up; without up where there is one weight
    """
    maps: list[bytes] = []
    each = config.maps + 1
    for group, (m, n, k) in enumerate(sizes):
        own = addresses[each * group : each * (group + 1)]
        for i in range(config.maps // 2):
            # of an empty group, whose maps nobody reads, as if there were a row
            rows, second = max(m if i == 1 else n, 1), int(i == 1)
            maps += [_codes(config, second, own[2 * i], rows, k), _scales(config, second, own[2 * i + 1], rows, k)]
    m, n, k = sizes[0]
    extents = [v for rows in (n, m) for v in ((rows, k), (-(-rows // 128), -(-k // 64)))]
    outs = [struct.pack("=Q", a) for a in addresses[each - 1 : each * len(sizes) : each]]
    numbers = [struct.pack("=i", activation[0]), *(struct.pack("=f", v) for v in activation[1:])] if config.gated else []
    return [
        _EMPTY, _EMPTY, *maps, *(struct.pack("=2i", *v) for v in extents), *outs, *(struct.pack("=q", s) for s in strides),
        *(struct.pack("=i", v) for size in sizes for v in size),
        *(struct.pack("=Q", a) for a in addresses[each * len(sizes) :]), *numbers,
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

    def __init__(
        self, chosen: GroupChoice, sizes: Sequence[Size], strides: Sequence[int], activation: Activation = _SILU
    ) -> None:
        self._chosen, self._sizes, self._strides, self._activation = chosen, tuple(sizes), tuple(strides), activation
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
        groups, chosen, maps = len(self._sizes), self._chosen, self._chosen.config.maps
        values = grouped_parameters(chosen.config, self._sizes, self._strides, addresses, self._activation)
        frame = _Frame(chosen, self._grid, values)  # type: ignore[arg-type] # of which it reads the kernel
        outs = 2 + maps * groups + 4
        order = [p for g in range(groups) for p in (*range(2 + maps * g, 2 + maps * (g + 1)), outs + g)]
        scales = outs + 5 * groups
        self._places = tuple(frame.starts[p] // 8 for p in (*order, *range(scales, scales + maps // 2)))
        return frame
