"""Configurations: what fits the machine, the refusals, and the order."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glu4 import Problem
from glu4.backends.hopper.config import (
    DECODE_AHEAD,
    DECODE_WARPS,
    DECODER_REGISTERS,
    PRODUCER_REGISTERS,
    SHIPPED,
    STAGED_ROW,
    TILE_K,
    Config,
    candidates,
    legal,
)


def problem(m: int, n: int = 4096, k: int = 7168, **kwargs: object) -> Problem:
    return Problem(m, n, k, **{"x_format": "float16", **kwargs})  # type: ignore[arg-type]


KERNELS = [(c, nvfp4) for c in SHIPPED for nvfp4 in (False, True)[: 1 + c.takes_nvfp4]]


@pytest.mark.parametrize(("config", "nvfp4"), KERNELS, ids=lambda v: v.name if isinstance(v, Config) else "w4a4" * v)
def test_shipped_configurations_fit_an_sm(config: Config, nvfp4: bool) -> None:
    threads, launched = config.cta_threads(nvfp4), config.launch_registers(nvfp4)
    assert threads == 128 * (config.consumers + 1 + nvfp4) <= 1024
    assert config.shared_bytes(nvfp4) <= 227 * 1024
    assert launched * threads <= 65536
    # setmaxnreg only moves registers that the CTA had at launch; asking for more would wait for ever
    own = config.consumer_registers(nvfp4)
    moved = own * config.consumers * 128 + PRODUCER_REGISTERS * 128 + nvfp4 * DECODER_REGISTERS * 128
    assert moved <= launched * threads
    assert own % 8 == launched % 8 == DECODER_REGISTERS % 8 == PRODUCER_REGISTERS % 8 == 0  # PTX ISA, setmaxnreg
    # accumulators, one or two fragments of 16, a unit's 6 words, and some for addresses
    needed = config.tokens // 2 + 16 * config.fragment_sets + 6
    assert needed < own
    assert legal(config, problem(1)) is None


def test_what_decodes_tokens_itself() -> None:
    """Each warp that decodes has stages of its own, and its staged rows fit beside all of them."""
    assert [c.name for c in SHIPPED if c.takes_nvfp4] == ["t8r1g3f1u2"]
    some = [Config(8, rows, groups, 1, 2) for rows in (1, 2, 3) for groups in (1, 2, 3, 4, 5, 6) if rows * groups <= 6]
    for config in some:
        assert config.takes_nvfp4 == (config.stages % DECODE_WARPS == 0)
    assert not any(c.takes_nvfp4 for c in (Config(16, 1, 3, 1, 2), Config(8, 1, 3, 1, 1), Config(16, 1, 2, 1, 2, splits=2)))
    config = SHIPPED[0]
    assert STAGED_ROW == 2 * TILE_K // 2 + 2 * TILE_K // 16  # codes and scales of a row in a stage
    assert config.staging_bytes == DECODE_WARPS * DECODE_AHEAD * config.tokens * STAGED_ROW
    assert config.shared_bytes(True) == config.shared_bytes(False) + config.staging_bytes


def test_refusals() -> None:
    config = Config(128, 2, 1)
    assert "TF32" in str(legal(config, problem(1, x_format="float32")))
    assert "float32 output" in str(legal(config, problem(1, out_dtype=torch.float32)))
    assert "sums and outputs take" in str(legal(Config(256, 2, 3, 1, 1), problem(1)))


def test_switches_that_no_shipped_kernel_has() -> None:
    plain = Config(128, 2)
    assert (plain.store, plain.producers) == ("threads", "warps")
    bulk, alone = replace(plain, store="bulk"), replace(plain, producers="none")
    assert [c.name.removeprefix(plain.name) for c in (bulk, alone, replace(alone, store="bulk"))] == ["b", "n", "bn"]
    assert legal(alone, problem(1)) is None
    assert (plain.cta_threads(False), alone.cta_threads(False)) == (384, 256)
    assert alone.launch_registers(False) == 240
    assert not Config(8, 1, 1, 1, 2, producers="none").takes_nvfp4, "its tokens are decoded ahead"
    for fields, message in (
        ({"store": "tma"}, "store: expected threads or bulk, got 'tma'"),
        ({"producers": "two"}, "producers: expected warps or none, got 'two'"),
        ({"producers": "none", "k_groups": 2}, "producers: without them one group uses every stage, and k_groups is 2"),
        ({"producers": "none", "splits": 2}, "producers: without them a CTA copies for itself alone"),
        ({"producers": "none", "cluster": 2}, "producers: without them a CTA copies for itself alone"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(128, 2, **fields)


def test_each_group_sees_every_phase_of_its_barriers() -> None:
    """A stage that several groups share lets one of them take a phase's parity for that of two phases before."""
    made = 0
    for tokens, rows, groups, units in itertools.product((8, 16, 64, 128, 256), (1, 2, 3), (1, 2, 3, 4), (1, 2)):
        if rows * groups > 6:
            continue
        config = Config(tokens, rows, groups, 1, units)
        assert config.stages % groups == 0
        assert config.stages // groups % config.unroll == 0
        made += 1
    assert made > 60


@given(m=st.integers(1, 5000), n=st.integers(1, 600).map(lambda i: 8 * i), config=st.sampled_from(SHIPPED))
def test_the_grid_covers_every_tile_once(m: int, n: int, config: Config) -> None:
    x, y, z = config.grid(m, n, dual=True)
    assert y % config.cluster == 0
    assert z % config.splits == 0
    tiles = sorted(
        (outer * config.token_group + token, row)
        for outer in range(z // config.splits)
        for token in range(x)
        for row in range(y)
    )
    assert len(set(tiles)) == len(tiles)
    needed = {(t, r) for t in range(-(-m // config.tokens)) for r in range(-(-n // (32 * config.rows)))}
    assert needed <= set(tiles)
    assert len(tiles) <= len(needed) + config.token_group * y + config.cluster * x * z  # few that store nothing


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(48), "tokens: expected one of"),
        (lambda: Config(64, 4, 2), "rows x k_groups: expected 1 to 6 warpgroups, got 4 x 2"),
        (lambda: Config(64, fragment_sets=3), "fragment_sets: expected 1, or 2 with two stage_units, got 3"),
        (lambda: Config(64, stage_units=3), "stage_units: expected 1 or 2, got 3"),
        (lambda: Config(64, stage_units=1), "fragment_sets: expected 1, or 2 with two stage_units, got 2"),
        (lambda: Config(64, cluster=3), "cluster: expected 1 or 2 CTAs"),
        (lambda: Config(8, splits=2), "splits: expected 1, 2 or 4 of at least 8 tokens, got 2 for 8 tokens"),
        (lambda: Config(64, cluster=2, splits=2), "cluster, splits: expected one of them to be 1"),
    ],
)
def test_bad_configurations(make, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_the_order_follows_the_measurements() -> None:
    """First choices that the recorded H100 run found best or within 3 % of it."""
    first = {m: next(candidates(problem(m))).name for m in (1, 16, 64, 128, 256, 512, 4096)}
    assert first[1] == "t8r1g3f1u2"
    assert first[16] == "t16r1g4f1u2"
    assert first[64] == "t64r1g3f1u2"
    assert first[128] == "t128r2g1f2u2s2"
    assert first[256] == "t256r2g1f2u2s2"
    assert first[512] == "t256r2g1f2u2"
    assert first[4096] == "t256r2g1f2u2c2"
    assert next(candidates(problem(256, 3072, 4096))).name == "t128r3g1f1u2s2"
    assert next(candidates(problem(512, 3072))).name == "t128r3g1f1u2"
