"""Tiles and block scales of mixtures of experts, made from offsets as the device does, against plain Python."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from glu4.backends.blackwell.moe_config import most_tiles
from glu4.backends.blackwell.moe_tokens import tile_table, tiled_scales
from glu4.scale_layout import SwizzledLayout

E4M3 = torch.float8_e4m3fn


def experts_of(offsets: list[int], rows: int) -> list[tuple[int, int]]:
    """(begin, end) of each expert: the rule of the portable backend."""
    ends = [min(max(end, 0), rows) for end in offsets]
    return [(start, max(start, end)) for start, end in itertools.pairwise(ends)]


def plain_table(offsets: list[int], rows: int, tile_n: int) -> list[tuple[int, int, int, int]]:
    found: list[tuple[int, int, int, int]] = []
    for e, (begin, end) in enumerate(experts_of(offsets, rows)):
        first = len(found)
        found += [(e, first, begin, end)] * -(-(end - begin) // tile_n)
    return found


def routing(seed: int, experts: int, rows: int) -> list[int]:
    """Offsets of random sizes, with empty experts and experts of one token."""
    draw = random.Random(seed)
    sizes = [draw.choice((0, 1, draw.randrange(200))) for _ in range(experts)]
    while sum(sizes) > rows:
        sizes[draw.randrange(experts)] //= 2
    return [0, *itertools.accumulate(sizes)]


CASES = [
    *((routing(seed, experts, 700), 700) for seed, experts in enumerate((1, 2, 7, 64, 512))),
    ([0, *range(1, 513)], 512),
    ([0, 0, 0, 0], 5),
    ([0] * 512 + [40], 40),
    # wrong ones
    ([0, 3, 1, 12], 12),
    ([0, 99, 100, 101], 14),
    ([-5, 2, 4, 9], 14),
    ([4, 3, 2, 1], 14),
    ([2**31 - 1, -(2**31), 2**31 - 1, 0], 300),
    ([0, 300] * 40, 300),
]


@pytest.mark.parametrize("tile_n", [32, 64, 128])
@pytest.mark.parametrize(("offsets", "rows"), CASES, ids=str)
def test_tiles(offsets: list[int], rows: int, tile_n: int) -> None:
    table = tile_table(torch.tensor(offsets, dtype=torch.int32), rows, tile_n)
    most = most_tiles(rows, len(offsets) - 1, tile_n)
    assert (table.dtype, table.shape, table.is_contiguous()) == (torch.int32, (1 + most, 4), True)
    plain = plain_table(offsets, rows, tile_n)
    assert table[0].tolist() == [min(len(plain), most), 0, 0, 0]
    assert [tuple(t) for t in table[1:].tolist()][: len(plain)] == plain[:most]
    # whatever a kernel reads is in range
    rest = table[1:]
    assert ((rest[:, 0] >= 0) & (rest[:, 0] < len(offsets) - 1)).all()
    assert ((rest[:, 2:] >= 0) & (rest[:, 2:] <= rows)).all()


@pytest.mark.parametrize("tile_n", [32, 64, 128])
def test_right_offsets_never_have_too_many_tiles(tile_n: int) -> None:
    """And some have as many as are reckoned with."""
    for seed in range(200):
        experts = seed % 40 + 1
        offsets = routing(seed, experts, 500)
        assert len(plain_table(offsets, 500, tile_n)) <= most_tiles(500, experts, tile_n)
    for experts, rows in ((5, 4 + 3 * tile_n + 1), (1, 1), (7, 3), (512, 512)):
        sizes = [1] * min(experts, rows)
        sizes[-1] += rows - len(sizes)
        worst = [0, *itertools.accumulate(sizes + [0] * (experts - len(sizes)))]
        assert len(plain_table(worst, rows, tile_n)) == most_tiles(rows, experts, tile_n)


def plain_scales(scales: Tensor, offsets: list[int], tile_n: int) -> Tensor:
    """Row by row: `[most_tiles * tile_n, K / 16]` bytes."""
    rows = scales.shape[0]
    most = most_tiles(rows, len(offsets) - 1, tile_n)
    found = torch.zeros((most * tile_n, scales.shape[1]), dtype=torch.uint8)
    for t, (_, first, begin, end) in enumerate(plain_table(offsets, rows, tile_n)[:most]):
        for i in range(tile_n):
            row = begin + (t - first) * tile_n + i
            if row < end:
                found[t * tile_n + i] = scales[row].view(torch.uint8)
    return found


@pytest.mark.parametrize("tile_n", [32, 64, 128])
@pytest.mark.parametrize(("offsets", "rows"), CASES, ids=str)
def test_scales(offsets: list[int], rows: int, tile_n: int) -> None:
    """All bytes there are, NaN among them, so that one from a row that a tile does not have is seen."""
    generator = torch.Generator().manual_seed(rows)
    scales = torch.randint(1, 256, (rows, 6), dtype=torch.uint8, generator=generator).view(E4M3)
    table = tile_table(torch.tensor(offsets, dtype=torch.int32), rows, tile_n)
    found = tiled_scales(scales, table, tile_n)
    layout = SwizzledLayout(most_tiles(rows, len(offsets) - 1, tile_n) * tile_n, 6)
    assert found.shape == layout.storage_shape
    assert found.is_contiguous()
    assert torch.equal(layout.load(found).view(torch.uint8), plain_scales(scales, offsets, tile_n))
    assert int(found.view(torch.uint8).count_nonzero()) == int(layout.load(found).view(torch.uint8).count_nonzero())


def test_nothing_depends_on_values_but_values() -> None:
    """Meta tensors have none: what reads one on the host raises."""
    table = tile_table(torch.empty(9, dtype=torch.int32, device="meta"), 100, 32)
    scales = tiled_scales(torch.empty((100, 8), dtype=E4M3, device="meta"), table, 32)
    assert table.shape == (1 + most_tiles(100, 8, 32), 4)
    assert scales.shape == SwizzledLayout((table.shape[0] - 1) * 32, 8).storage_shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        table[0, 0].item()
