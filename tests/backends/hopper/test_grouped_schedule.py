"""The grouped kernel's schedule, by its twin in plain Python; tests/emulator/test_grouped_schedule.py compares the device's."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED, GroupedConfig
from grouped_twin import cuts, pieces, plan, share

counts = st.lists(st.one_of(st.just(0), st.integers(0, 600), st.integers(0, 9)), min_size=1, max_size=40)
configs = st.sampled_from(GROUPED_SHIPPED)
shares = st.sampled_from([0, 6000, (1 << 20) - 1])


@settings(max_examples=150, deadline=None)
@given(counts, st.integers(1, 9), configs)
def test_every_row_of_every_expert_once_in_every_row_tile(sizes: list[int], row_tiles: int, config: GroupedConfig) -> None:
    offsets = [0, *itertools.accumulate(sizes)]
    tiles, _ = plan(offsets, offsets[-1] + 2, row_tiles, config)
    seen = Counter((t.expert, t.row_tile, row) for t in tiles for row in range(t.first, t.end))
    spans = enumerate(itertools.pairwise(offsets))
    wanted = {(e, r, row) for e, (a, b) in spans for r in range(row_tiles) for row in range(a, b)}
    assert set(seen) == wanted
    assert set(seen.values()) <= {1}


@settings(max_examples=60, deadline=None)
@given(counts, configs)
def test_tiles_fit(sizes: list[int], config: GroupedConfig) -> None:
    offsets = [0, *itertools.accumulate(sizes)]
    tiles, costs = plan(offsets, offsets[-1], 3, config)
    assert all(t.width - config.grain < t.end - t.first <= t.width for t in tiles)
    assert {t.width for t in tiles} <= set(config.widths)
    assert costs == sorted(costs, reverse=True)


@settings(max_examples=200, deadline=None)
@given(counts, st.integers(1, 9), st.integers(1, 140), st.integers(1, 60), configs, shares)
def test_ctas_share_out_every_step_of_every_tile(
    sizes: list[int], row_tiles: int, ctas: int, steps: int, config: GroupedConfig, exchange: int
) -> None:
    config = replace(config, share=exchange)
    offsets = [0, *itertools.accumulate(sizes)]
    tiles, costs = plan(offsets, offsets[-1], row_tiles, config)
    rounds, found = cuts(costs, steps, ctas, config)
    assert found == sorted(found)
    mine = [pieces(cta, ctas, len(tiles), steps, rounds, found) for cta in range(ctas)]
    seen = Counter((p.tile, step) for own in mine for p in own for step in range(p.first, p.end))
    assert set(seen) == set(itertools.product(range(len(tiles)), range(steps)))
    assert set(seen.values()) <= {1}
    for own in mine:
        # one that another ends, and first of all, so that its sums lie ready
        assert all(p.end == steps for p in own[1:])
        assert all(min(p.end, steps - p.first) >= min(config.least, steps) for p in own)


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(1, 9), st.integers(8, 140), st.integers(40, 60), configs)
def test_shared_work_is_even(sizes: list[int], row_tiles: int, ctas: int, steps: int, config: GroupedConfig) -> None:
    """No CTA has more of it than an equal part, one short piece and rounding."""
    config = replace(config, share=0)
    offsets = [0, *itertools.accumulate(sizes)]
    tiles, costs = plan(offsets, offsets[-1], row_tiles, config)
    rounds, found = cuts(costs, steps, ctas, config)
    rest = costs[min(rounds, max(-(-len(costs) // ctas) - 2, 0)) * ctas :]
    for cta in range(ctas):
        own = pieces(cta, ctas, len(tiles), steps, 0, found)
        cost = sum(costs[p.tile] * (p.end - p.first) for p in own)
        widest = max(rest, default=0)
        assert cost <= sum(rest) * (steps + 2) / ctas + widest * (2 * config.least + 3)


@given(st.lists(st.integers(-50, 300), min_size=2, max_size=12), configs)
def test_wrong_offsets_stay_inside(offsets: list[int], config: GroupedConfig) -> None:
    assert all(0 <= t.first < t.end <= 100 for t in plan(offsets, 100, 2, config)[0])


def test_a_ragged_case_by_hand() -> None:
    """130 tokens are 17 grains, 9 and 8 of them; 40 are one tile; who has none has no tile."""
    got, costs = plan([0, 40, 40, 170], 170, 1, GroupedConfig())
    assert [tuple(t) for t in got] == [(2, 0, 40, 112, 72), (2, 0, 112, 170, 64), (0, 0, 0, 40, 40)]
    assert costs == [99, 99, 67]
    assert share(0, GroupedConfig()) == []


@pytest.mark.parametrize(("exchange", "rounds"), [(0, 0), ((1 << 20) - 1, 2)])
def test_three_tiles_of_two_ctas(exchange: int, rounds: int) -> None:
    """In equal parts the second tile is cut in half; whole, one CTA has two."""
    config = GroupedConfig(share=exchange)
    kept, found = cuts([100] * 3, 20, 2, config)
    assert kept == rounds
    own = [pieces(cta, 2, 3, 20, kept, found) for cta in range(2)]
    if exchange:
        assert own == [[(0, 0, 20)], [(1, 0, 20), (2, 0, 20)]]
    else:
        assert own == [[(1, 0, 11), (0, 0, 20)], [(2, 0, 20), (1, 11, 20)]]
