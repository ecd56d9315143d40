"""Configurations: what fits the machine, the refusals, and the order."""

from __future__ import annotations

import pytest
import torch

from glu4 import GroupedProblem, Problem
from glu4.backends.hopper.config import SHIPPED, Config, candidates, legal


def problem(m: int, n: int = 4096, k: int = 7168, **kwargs: object) -> Problem:
    return Problem(m, n, k, **{"x_format": "float16", **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize("config", SHIPPED, ids=lambda c: c.name)
def test_shipped_configurations_fit_an_sm(config: Config) -> None:
    assert config.shared_bytes <= 227 * 1024
    assert config.launch_registers * config.threads <= 65536
    # setmaxnreg only moves registers that the CTA had at launch; asking for more would wait for ever
    moved = config.consumer_registers * config.consumers * 128 + config.producer_registers * 128
    assert moved <= config.launch_registers * config.threads
    # accumulators, one or two fragments of 16, a unit's 6 words, and some for addresses
    needed = config.tokens // 2 + 16 * config.fragment_sets + 6
    assert needed < config.consumer_registers
    assert legal(config, problem(1)) is None


def test_refusals() -> None:
    config = Config(128, 2, 1)
    assert legal(config, GroupedProblem(4, 2, 8, 16)) == "grouped problems have no Hopper kernel yet"
    assert "TF32" in str(legal(config, problem(1, x_format="float32")))
    assert "float32 output" in str(legal(config, problem(1, out_dtype=torch.float32)))
    assert "partial sums of 3 groups" in str(legal(Config(256, 2, 3, 1), problem(1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(48), "tokens: expected one of"),
        (lambda: Config(64, 4, 2), "rows x k_groups: expected 1 to 6 warpgroups, got 4 x 2"),
        (lambda: Config(64, fragment_sets=3), "fragment_sets: expected 1 or 2, got 3"),
        (lambda: Config(64, stage_units=3), "stage_units: expected 1 or 2, got 3"),
    ],
)
def test_bad_configurations(make, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_the_order_follows_the_measurements() -> None:
    """First choices that the recorded H200 run found best or within 5 % of it."""
    first = {m: next(candidates(problem(m))).name for m in (1, 16, 64, 128, 256, 512)}
    assert first[1] == "t8r1g3f1u2"
    assert first[16] == "t16r1g4f1u2"
    assert first[64] == "t64r1g2f2u2"
    assert first[128] == "t128r1g4f1u1"
    assert first[256] == "t128r2g2f1u2"
    assert first[512] == "t256r2g1f2u2"
    assert next(candidates(problem(512, 3072))).name == "t128r3g1f2u2"
