"""The schedule of the grouped Hopper kernel in plain Python: what `grouped_schedule` computes on the device."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from glu4.backends.hopper.grouped_config import FINISH_STEPS, FIT_EXPERTS, STEP_COST, GroupedConfig


class Tile(NamedTuple):
    """Rows `first` to `end` of x, multiplied `width` wide, by one row tile of an expert."""

    expert: int
    row_tile: int
    first: int
    end: int
    width: int


class Fitted(NamedTuple):
    """Rows `first` to `end` of x, multiplied `width` wide, by row groups of an expert from `group` on."""

    expert: int
    group: int
    first: int
    end: int
    width: int
    groups: int


class Piece(NamedTuple):
    """Steps `first` to `end` along K of one tile."""

    tile: int
    first: int
    end: int


def clamped_counts(offsets: list[int], rows: int) -> tuple[list[int], list[int]]:
    """(first row, tokens) of each expert; no row outside x, whatever the offsets say."""
    inside = [min(max(o, 0), rows) for o in offsets]
    return inside[:-1], [max(b - a, 0) for a, b in itertools.pairwise(inside)]


def share(count: int, config: GroupedConfig) -> list[int]:
    """Widths of an expert's tiles: as few as hold its tokens, in grains that are shared out evenly, wider ones first."""
    tiles, grains = -(-count // config.tokens), -(-count // config.grain)
    return [(grains + tiles - 1 - t) // tiles * config.grain for t in range(tiles)]


def plan(offsets: list[int], rows: int, row_tiles: int, config: GroupedConfig) -> tuple[list[Tile], list[int]]:
    """(all tiles in the order of work, cost of a step of each in tokens: that of its expert's widest tile)."""
    begins, counts = clamped_counts(offsets, rows)
    widths = [share(c, config) for c in counts]
    found, costs = [], []
    for e in sorted(range(len(counts)), key=lambda e: -max(widths[e], default=0)):  # stable: by index among equals
        for row_tile in range(row_tiles):
            first = begins[e]
            for width in widths[e]:
                found.append(Tile(e, row_tile, first, min(begins[e] + counts[e], first + width), width))
                costs.append(max(widths[e]) + STEP_COST)
                first += width
    return found, costs


def bands(count: int, narrow: int, wide: int, tall_tiles: int, low_tiles: int) -> tuple[int, int]:
    """(tiles of 2 row groups and up to `wide` tokens beside each other, of 3 and up to `narrow`), in the fewest CTAs."""
    ways = [(-(-max(count - tall * narrow, 0) // wide), tall) for tall in range(5)]
    return min(ways, key=lambda way: way[0] * low_tiles + way[1] * tall_tiles)


def fit(offsets: list[int], rows: int, groups: int, ctas: int, config: GroupedConfig) -> list[Fitted | None] | None:
    """Each CTA's tile where all work fits into one round of them; None where it does not."""
    begins, counts = clamped_counts(offsets, rows)
    tall_tiles, low_tiles = -(-groups // 3), -(-groups // 2)
    step = -(-3 * (STEP_COST + config.tokens) // 32)
    for limit in range(step, 33 * step, step):
        narrow, wide = (min(limit // r - STEP_COST, config.tokens) // config.grain * config.grain for r in (3, 2))
        if narrow <= 0 or len(counts) > FIT_EXPERTS:
            continue
        chosen = [bands(count, narrow, wide, tall_tiles, low_tiles) for count in counts]
        if sum(low * low_tiles + tall * tall_tiles for low, tall in chosen) > ctas:
            continue
        found: list[Fitted | None] = []
        for e, (low, tall) in enumerate(chosen):
            of_low = min(-(-max(counts[e] - tall * narrow, 0) // config.grain) * config.grain, counts[e])
            for r, number, tiles, begin, end in ((2, low, low_tiles, 0, of_low), (3, tall, tall_tiles, of_low, counts[e])):
                for row_tile, band in itertools.product(range(tiles), range(number)):
                    grains = -(-(end - begin) // config.grain)
                    widths = [grains // number + (b < grains % number) for b in range(number)]
                    first, width = begin + sum(widths[:band]) * config.grain, widths[band] * config.grain
                    a, b = begins[e] + first, begins[e] + min(first + width, end)
                    found.append(Fitted(e, row_tile * r, a, b, width, r) if width else None)
        return found + [None] * (ctas - len(found))
    return None


def cuts(costs: list[int], steps: int, ctas: int, config: GroupedConfig) -> tuple[int, list[tuple[int, int]]]:
    """(rounds of whole tiles, where each CTA's part of the rest begins, and the end)."""
    tiles = len(costs)
    rounds = -(-tiles // ctas)
    whole = max(rounds - 2, 0)
    rest = costs[whole * ctas :]
    longest = (rest[0] if rest else 0) + (rest[-1] if len(rest) > ctas else 0)
    if (longest * ctas - sum(rest)) * steps <= config.share // config.rows * ctas:
        return rounds, [(tiles, 0)] * (ctas + 1)
    parts = min(ctas, max(len(rest) * steps // config.least, 1))
    found = []
    for cta in range(ctas + 1):
        left = sum(rest) * cta  # cost, times parts
        tile = whole * ctas
        while tile < tiles and left >= costs[tile] * parts:
            left -= costs[tile] * parts
            tile += 1
        step = 0 if tile == tiles else left * (steps + FINISH_STEPS) // (costs[tile] * parts)
        late = step > max(steps - config.least, steps // 2)
        tile, step = (tile + 1, 0) if late else (tile, 0 if step < config.least else step)
        found.append((tile, step) if tile < tiles and cta < parts else (tiles, 0))
    return whole, found


def pieces(cta: int, ctas: int, tiles: int, steps: int, rounds: int, found: list[tuple[int, int]]) -> list[Piece]:
    """What a CTA computes, in order: the beginning of a tile that another ends; whole ones; the end of one that others began."""
    (tile, step), (last, end) = found[cta : cta + 2]
    mine = [Piece(last, step if tile == last else 0, end)]
    mine += [Piece(turn * ctas + (ctas - 1 - cta if turn % 2 else cta), 0, steps) for turn in range(rounds)]
    mine += [Piece(t, step if t == tile else 0, steps) for t in range(last - 1, tile - 1, -1)]
    return [p for p in mine if p.tile < tiles and p.first < p.end]
