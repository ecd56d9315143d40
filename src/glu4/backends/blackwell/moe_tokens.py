"""Tokens of a mixture of experts as the Blackwell kernel reads them, made on the device from offsets that the host never reads.

Tiles along tokens are numbered through all experts, those of an expert one after the other. The MMA reads block scales in atoms
of 128 rows, of which a tile of 32 or 64 tokens has a part, while experts begin at any row of x. So scales are laid out anew:
row i of tile t is row t * tile_n + i of a matrix in 128x4 layout. Codes stay where they are.

Where it is compiled a kernel does this in one launch (`moe_tile_tokens`); here are the same results from operations of torch.
They have shapes that follow from the host's numbers alone, so a captured graph serves every routing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glu4.backends.blackwell.moe_config import most_tiles
from glu4.scale_layout import SwizzledLayout

__all__ = ["RECORD", "tile_table", "tiled_scales"]

RECORD = 4  # numbers of a tile
FIRST, BEGIN, END = 1, 2, 3  # columns of a tile's row, after its expert


def tile_table(offsets: Tensor, rows: int, tile_n: int) -> Tensor:
    """int32 `[1 + most_tiles, 4]`, 16 bytes a row. Row 0: how many tiles there are, then three zeros. Row 1 + t, of tile t
    along tokens: its expert, that expert's first tile, its first row of x, and the row after its last.

    offsets  int32 `[E + 1]`, any values: each counts as the nearest in [0, rows], and an end before its start as an empty
             expert. Where so many overlap that there are more than `most_tiles` tiles, those after them are left out. Rows of
             tiles that are not there hold an expert that is, and rows in [0, rows].
    """
    count, experts = most_tiles(rows, offsets.shape[0] - 1, tile_n), offsets.shape[0] - 1
    ends = offsets.clamp(0, rows)
    begin = ends[:-1]
    end = torch.maximum(begin, ends[1:])
    # int64 sums: 2^31 tiles are not possible, but 512 experts of all rows each may have more
    tiles = torch.div(end - begin + (tile_n - 1), tile_n, rounding_mode="floor").cumsum(0).clamp(max=count)
    number = torch.arange(count, device=offsets.device)
    expert = torch.searchsorted(tiles, number, right=True).clamp(max=experts - 1)
    first = torch.cat((tiles.new_zeros(1), tiles[:-1]))
    table = torch.stack((expert, first[expert], begin[expert], end[expert]), 1)
    return torch.cat((torch.nn.functional.pad(tiles[-1:], (0, 3)).unsqueeze(0), table)).to(torch.int32)


def tiled_scales(scales: Tensor, table: Tensor, tile_n: int) -> Tensor:
    """Block scales e4m3 `[rows, K / 16]` as the tiles of `table` read them: 128x4 layout of `[most_tiles * tile_n, K / 16]`.

    Zero where a tile's expert has no row: what the MMA multiplies there is stored nowhere, and zeros are not NaN.
    """
    rows, columns = scales.shape
    tiles, inside = table[1:], torch.arange(tile_n, device=scales.device)
    number = torch.arange(tiles.shape[0], device=scales.device)
    row = ((number - tiles[:, FIRST]) * tile_n + tiles[:, BEGIN]).unsqueeze(1) + inside
    there = (row < tiles[:, END, None]).view(-1, 1)
    found = scales.view(torch.uint8).index_select(0, row.flatten().clamp(max=max(rows - 1, 0)))
    found = found * there  # of bytes: a NaN scale of a row that is not there becomes zero
    return SwizzledLayout(found.shape[0], columns).store(found).view(torch.float8_e4m3fn)
