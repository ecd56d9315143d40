"""The grouped kernel's schedule, by its twin in plain Python; tests/emulator/test_grouped_schedule.py compares the device's."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED, GroupedConfig
from grouped_twin import of_cta, plan

counts = st.lists(st.one_of(st.just(0), st.integers(0, 600), st.integers(0, 9)), min_size=1, max_size=40)
configs = st.sampled_from(GROUPED_SHIPPED)


@settings(max_examples=150, deadline=None)
@given(counts, st.integers(1, 9), st.integers(1, 140), configs)
def test_every_row_of_every_expert_once_in_every_row_tile(
    sizes: list[int], row_tiles: int, ctas: int, config: GroupedConfig
) -> None:
    offsets = [0, *itertools.accumulate(sizes)]
    seen = Counter(
        (t.expert, t.row_tile, row)
        for t in plan(offsets, offsets[-1] + 2, row_tiles, ctas, config)
        for row in range(t.first, t.end)
    )
    spans = enumerate(itertools.pairwise(offsets))
    wanted = {(e, r, row) for e, (a, b) in spans for r in range(row_tiles) for row in range(a, b)}
    assert set(seen) == wanted
    assert set(seen.values()) <= {1}


@settings(max_examples=60, deadline=None)
@given(counts, configs)
def test_tiles_fit(sizes: list[int], config: GroupedConfig) -> None:
    offsets = [0, *itertools.accumulate(sizes)]
    tiles = plan(offsets, offsets[-1], 3, 132, config)
    assert all(0 < t.end - t.first <= t.width for t in tiles)
    assert {t.width for t in tiles} <= set(config.widths)
    assert [t.width for t in tiles] == sorted((t.width for t in tiles), reverse=True)


@given(st.lists(st.integers(-50, 300), min_size=2, max_size=12), configs)
def test_wrong_offsets_stay_inside(offsets: list[int], config: GroupedConfig) -> None:
    assert all(0 <= t.first < t.end <= 100 for t in plan(offsets, 100, 2, 5, config))


@pytest.mark.parametrize("ctas", [1, 3, 132])
def test_ctas_share_out_all_tiles(ctas: int) -> None:
    rounds = 4
    assert sorted(of_cta(t, c, ctas) for t in range(rounds) for c in range(ctas)) == list(range(rounds * ctas))


def test_a_ragged_case_by_hand() -> None:
    """130 tokens are two tiles of 65, so 80 wide; 40 are one of 48; who has none has no tile."""
    got = plan([0, 40, 40, 170], 170, 1, 8, GroupedConfig(choices=(128,)))
    assert [tuple(t) for t in got] == [(2, 0, 40, 120, 80), (2, 0, 120, 170, 80), (0, 0, 0, 40, 48)]
