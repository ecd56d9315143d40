"""The grouped kernel's schedule, compiled and run in the emulator, against its twin in plain Python."""

from __future__ import annotations

import itertools
import struct
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from emulator.dsl import compile_for_hopper
from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED, GroupedConfig
from glu4.emulator.launch import emulate, load
from grouped_twin import cuts, fit, pieces, plan

CONFIG = GroupedConfig(32, 4, 8, 8, 2, least=2, share=160)
WHOLE, FIT = (GroupedConfig(32, 3, 8, 8, 2, least=2, share=160, fit=fits) for fits in (False, True))


@cache
def ptx(config: GroupedConfig, *fault: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "schedule.ptx")
        program = Path(__file__).with_name("grouped_schedule_dump.py")
        compile_for_hopper([str(program), repr(config), str(path), *fault], scratch, 300)
        return path.read_text()


@cache
def drawn(seed: int, experts: int) -> list[int]:
    """Offsets of a mixture: many experts with none or few tokens, some with many."""
    rng = np.random.default_rng(seed)
    counts = np.where(rng.random(experts) < 0.4, 0, rng.geometric(0.08, experts))
    return [0, *itertools.accumulate(int(c) for c in counts)]


@pytest.mark.parametrize(
    ("offsets", "rows", "row_tiles", "ctas", "steps"),
    [
        ([0, 3, 3, 12, 13, 30], 32, 3, 4, 7),
        ([0, 0, 0], 5, 2, 3, 4),
        ([0, 33, 97], 97, 1, 2, 12),
        ([0, 33, 97], 97, 1, 11, 12),
        ([4, 90, -3, 12, 7], 40, 2, 3, 1),
        ([0, 30, 60, 61, 90], 90, 7, 5, 9),
        pytest.param(drawn(1, 37), drawn(1, 37)[-1], 2, 5, 6, marks=pytest.mark.slow),
        pytest.param(drawn(1, 37), drawn(1, 37)[-1], 3, 9, 17, marks=pytest.mark.slow),
        pytest.param(drawn(2, 512), drawn(2, 512)[-1] + 1, 1, 2, 5, marks=pytest.mark.slow),
    ],
    ids=lambda v: str(len(v)) if isinstance(v, list) else str(v),
)
def test_the_device_has_the_twins_schedule(offsets: list[int], rows: int, row_tiles: int, ctas: int, steps: int) -> None:
    tiles, costs = plan(offsets, rows, row_tiles, CONFIG)
    rounds, found = cuts(costs, steps, ctas, CONFIG)
    want = [pieces(cta, ctas, len(tiles), steps, rounds, found) for cta in range(ctas)]
    for own, got in zip(want, dump(CONFIG, offsets, rows, row_tiles, ctas, steps), strict=True):
        assert [tuple(row[:3]) for row in got] == [tuple(p) for p in own]
        assert [tuple(row[3:8]) for row in got] == [tuple(tiles[p.tile]) for p in own]


def marks(config: GroupedConfig) -> list[pytest.MarkDecorator]:
    """Quick is the one with most widths; the next is in CI, the others are of `make prove-all`."""
    more = sum(len(c.widths) > len(config.widths) for c in GROUPED_SHIPPED)
    return [pytest.mark.slow, pytest.mark.long][: min(more, 2)]


@pytest.mark.parametrize("config", [pytest.param(c, marks=marks(c), id=c.name) for c in GROUPED_SHIPPED])
def test_experts_of_every_width_and_of_no_tokens(config: GroupedConfig) -> None:
    """More than a warp of experts, whose order is counted across warps: each width a product can have, among empty ones."""
    widths = list(config.widths)
    counts = [0, *widths, 0, 3, 2 * config.tokens, *reversed(widths), 0, 0, *[1] * (30 - len(widths))]
    assert len(counts) > 32
    offsets = [0, *itertools.accumulate(counts)]
    launch = config, offsets, offsets[-1], 2, 3, 5
    assert [[tuple(row[:8]) for row in own] for own in dump(*launch)] == expected(*launch)


def expected(
    config: GroupedConfig, offsets: list[int], rows: int, row_tiles: int, ctas: int, steps: int
) -> list[list[tuple[int, ...]]]:
    """What the twin says that each CTA computes, as `dump` has it."""
    fitted = fit(offsets, rows, config.rows * row_tiles, ctas, config) if config.fit else None
    if fitted is not None:
        return [[(0, 0, steps, *t)] if t else [] for t in fitted]
    tiles, costs = plan(offsets, rows, row_tiles, config)
    rounds, found = cuts(costs, steps, ctas, config)
    groups = config.rows if config.fit else 1  # of a row tile, as it is written down
    own = [pieces(cta, ctas, len(tiles), steps, rounds, found) for cta in range(ctas)]
    return [[(*p, *tiles[p.tile]._replace(row_tile=tiles[p.tile].row_tile * groups)) for p in o] for o in own]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [pytest.param(i, marks=pytest.mark.long if i >= 4 else ()) for i in range(12)])
@pytest.mark.parametrize("config", GROUPED_SHIPPED, ids=lambda c: c.name)
def test_random_mixtures(config: GroupedConfig, seed: int) -> None:
    """Experts on both sides of a warp's lanes; counts of none, of few, on and beside whole tiles; offsets that are wrong."""
    rng = np.random.default_rng(1000 + seed)
    experts = int(rng.choice([1, 2, 7, 8, 9, 31, 32, 33, 64, 100, 160, config.max_experts]))
    edges = config.tokens * rng.integers(1, 4, experts) + rng.integers(-1, 2, experts)
    kinds = [np.zeros(experts, int), rng.integers(0, 9, experts), rng.integers(0, 3 * config.tokens, experts), edges]
    counts = np.choose(rng.choice(4, experts, p=rng.dirichlet([1, 1, 1, 1])), kinds)
    offsets = [0, *itertools.accumulate(int(c) for c in counts)]
    rows = offsets[-1] + int(rng.integers(0, 3))
    if seed % 4 == 3:
        offsets[int(rng.integers(0, experts + 1))] += int(rng.integers(-500, 500))
    row_tiles, ctas, steps = (int(rng.integers(1, most)) for most in (6, 12, 20))
    got = dump(config, offsets, rows, row_tiles, ctas, steps)
    for own, want in zip(got, expected(config, offsets, rows, row_tiles, ctas, steps), strict=True):
        assert [tuple(row[: len(w)]) for row, w in zip(own, want, strict=True)] == want


def dump(config: GroupedConfig, offsets: list[int], rows: int, row_tiles: int, ctas: int, steps: int) -> list[list[list[int]]]:
    """What each CTA computes, in order: tile, steps, expert, row tile or group, rows of x, width, row groups."""
    return written(
        config, offsets, rows, row_tiles, ctas, steps, 2 * -(-len(plan(offsets, rows, row_tiles, config)[0]) // ctas) + 4
    )


def strays(config: GroupedConfig, rows: int, *fault: str) -> tuple[int, list[list[int]]]:
    """(pieces, those of what there is not) of 12 experts with whatever offsets: steps, experts, row tiles, rows or widths."""
    rng, row_tiles, steps = np.random.default_rng(4), 6, 5
    kinds = (rng.integers(-(1 << 31), 1 << 31, 13), np.arange(13) % 2 * rows, rng.integers(-rows, 2 * rows, 13))
    groups = config.rows if config.fit else 1
    seen, found = 0, []
    for offsets in kinds:
        for piece in itertools.chain(*written(config, offsets.tolist(), rows, row_tiles, 3, steps, 3, *fault)):
            _, first, end, expert, row_tile, begin, last, width, high = piece
            here = 0 <= first < end <= steps and 0 <= expert < 12 and 0 <= row_tile < row_tiles * groups
            if not (here and 0 <= begin <= last <= rows and 0 <= width <= config.tokens and high in (2, 3, config.rows)):
                found.append(piece)
            seen += 1
    return seen, found


@pytest.mark.parametrize("rows", [60, 1 << 22])
@pytest.mark.parametrize("config", [CONFIG, pytest.param(FIT, marks=pytest.mark.slow)], ids=lambda c: c.name)
def test_whatever_lies_where_offsets_will_be(config: GroupedConfig, rows: int) -> None:
    """No piece is of what there is not."""
    seen, found = strays(config, rows)
    assert seen
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("rows", [60, 1 << 22])
def test_offsets_that_are_not_clamped_are_found(rows: int) -> None:
    assert strays(CONFIG, rows, "unclamped")[1]


def written(
    config: GroupedConfig, offsets: list[int], rows: int, row_tiles: int, ctas: int, steps: int, turns: int, *fault: str
) -> list[list[list[int]]]:
    """The first `turns` turns of it."""
    launch = {
        "grid": [ctas], "block": [config.threads], "dynamic_smem": 16384,
        "params": [
            {"pack": [{"ptr": "offsets"}, {"bytes": struct.pack("<i4x", len(offsets)).hex()}]},
            {"pack": [{"ptr": "out"}, {"bytes": struct.pack("<iii4x", ctas, turns, turns * 9).hex()}]},
            {"i32": row_tiles}, {"i32": rows}, {"i32": steps},
        ],
    }  # fmt: skip
    buffers = {"offsets": np.array(offsets, np.int32), "out": np.full((ctas, turns, 9), -7, np.int32)}
    result = emulate(load(ptx(config, *fault)), launch, buffers)
    assert result.report.clean, str(result.report)
    return [[row for row in rows_of if row[0] != -7] for rows_of in result.buffers["out"].tolist()]


@pytest.mark.parametrize(
    ("offsets", "row_tiles", "ctas", "fits"),
    [
        ([0, 24, 64], 4, 17, True),
        ([0, 24, 64], 4, 60, True),
        ([0, 24, 64], 4, 11, False),
        ([0, 33, 33, 97], 2, 23, True),
        ([4, 90, -3, 12, 7], 3, 40, True),
        ([0, 0, 0], 2, 3, True),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], 1, 8, True),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 1, 12, False),
        ([0, 130, 131, 149], 3, 48, True),
    ],
    ids=lambda v: str(len(v)) if isinstance(v, list) else str(v),
)
def test_the_device_fits_tiles_as_the_twin_does(offsets: list[int], row_tiles: int, ctas: int, fits: bool) -> None:
    rows, steps = max(offsets[-1] + 1, 9), 5
    want = fit(offsets, rows, 3 * row_tiles, ctas, FIT)
    got = dump(FIT, offsets, rows, row_tiles, ctas, steps)
    assert (want is not None) == fits
    if want is None:
        tiles, costs = plan(offsets, rows, row_tiles, WHOLE)
        rounds, found = cuts(costs, steps, ctas, WHOLE)
        whole = [pieces(cta, ctas, len(tiles), steps, rounds, found) for cta in range(ctas)]
        assert [[tuple(row[:3]) for row in own] for own in got] == [[tuple(p) for p in own] for own in whole]
        parts = [[(e, 3 * r, a, b, w, 3) for e, r, a, b, w in (tiles[p.tile] for p in own)] for own in whole]
        assert [[tuple(row[3:]) for row in own] for own in got] == parts
    else:
        assert [[tuple(row) for row in own] for own in got] == [[(0, 0, steps, *t)] if t else [] for t in want]


def test_some_of_these_are_shared_and_some_are_not() -> None:
    def shared(offsets: list[int], row_tiles: int, ctas: int, steps: int) -> bool:
        _, found = cuts(plan(offsets, offsets[-1], row_tiles, CONFIG)[1], steps, ctas, CONFIG)
        return any(step for _, step in found)

    assert shared([0, 33, 97], 1, 11, 12)
    assert shared([0, 30, 60, 61, 90], 7, 5, 9)
    assert not shared([0, 33, 97], 1, 2, 1)
