"""The schedule of the grouped Hopper kernel in plain Python: what `grouped_schedule` computes on the device."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from glu4.backends.hopper.grouped_config import GroupedConfig

TILE_COST = 40


class Tile(NamedTuple):
    """Rows `first` to `end` of x, multiplied `width` wide, by one row tile of an expert."""

    expert: int
    row_tile: int
    first: int
    end: int
    width: int


def clamped_counts(offsets: list[int], rows: int) -> tuple[list[int], list[int]]:
    """(first row, tokens) of each expert; no row outside x, whatever the offsets say."""
    inside = [min(max(o, 0), rows) for o in offsets]
    return inside[:-1], [max(b - a, 0) for a, b in itertools.pairwise(inside)]


def share(count: int, most: int, widths: tuple[int, ...]) -> tuple[int, int]:
    """(tiles, width): as few tiles as hold `count` tokens, `most` each, of the narrowest width that holds an even share."""
    tiles = -(-count // most)
    each = -(-count // tiles) if tiles else 0
    return tiles, next(w for w in (0, *widths) if w >= each)


def most_tokens(counts: list[int], row_tiles: int, ctas: int, config: GroupedConfig) -> int:
    """The choice with the fewest rounds times the mean tile's cost; the first of equals. In float32, as on the device."""
    costs = []
    for most in config.choices:
        shares = [share(c, most, config.widths) for c in counts]
        tiles, tokens = sum(t for t, _ in shares), sum(t * w for t, w in shares)
        rounds = -(-tiles * row_tiles // ctas)
        costs.append(np.float32(rounds) * (np.float32(tokens) / np.float32(max(tiles, 1)) + np.float32(TILE_COST)))
    return config.choices[int(np.argmin(costs))]


def plan(offsets: list[int], rows: int, row_tiles: int, ctas: int, config: GroupedConfig) -> list[Tile]:
    """All tiles in the order in which they are taken."""
    begins, counts = clamped_counts(offsets, rows)
    most = most_tokens(counts, row_tiles, ctas, config)
    shares = [share(c, most, config.widths) for c in counts]
    found = []
    for e in sorted(range(len(counts)), key=lambda e: -shares[e][1]):  # stable: by index among equals
        tiles, width = shares[e]
        for row_tile, t in itertools.product(range(row_tiles), range(tiles)):
            first = begins[e] + t * width
            found.append(Tile(e, row_tile, first, min(begins[e] + counts[e], first + width), width))
    return found


def of_cta(turn: int, cta: int, ctas: int) -> int:
    """Index of a CTA's tile in a round: first to last in even rounds, last to first in odd ones."""
    return turn * ctas + (ctas - 1 - cta if turn % 2 else cta)
