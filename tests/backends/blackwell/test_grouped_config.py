"""Configurations of the grouped Blackwell kernel: what may run, what is refused and why, and which one is the default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from glu4.backends.blackwell.config import Config
from glu4.backends.blackwell.grouped_config import (
    GroupConfig,
    Size,
    candidates,
    cost,
    grouped_legal,
    most_groups,
    tiles,
)
from glu4.backends.blackwell.grouped_launch import grouped_sizes
from glu4.backends.blackwell.grouped_spec import GroupSpec
from glu4.verify.contest import GROUP_BENCHMARKS, GROUP_TESTS

SIZES: list[Size] = [(130, 136, 288), (40, 260, 544)]


def test_fields_that_are_refused() -> None:
    for fields, message in (
        ({"groups": 0}, "groups: expected a positive number, got 0"),
        ({"groups": 2, "schedule": "stream_k"}, "schedule: expected one of static, launch_control, one_wave, got stream_k"),
        ({"groups": 2, "store": "tma"}, "store: expected one of direct, shared, got tma"),
        ({"groups": 2, "ctas": 3}, "ctas: expected 1 or a pair, 2, got 3"),
        ({"groups": 2, "load_width": 4}, "load_width: expected one of 8, 16, 32, 64, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            GroupConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "sizes", "reason"),
    [
        ({}, SIZES, None),
        ({"ctas": 2, "tile_m": 256}, SIZES, None),
        ({}, [(0, 7, 32), (1, 1, 7168)], None),
        ({}, SIZES[:1], "groups 2: the kernel is compiled for a number of groups, and there are 1"),
        ({"groups": 99}, SIZES[:1] * 99,
         "groups 99: 544 bytes of parameters each, and a kernel has 32764, enough for 60 (PTX ISA)"),
        ({}, [(1, 1, 32), (1, 1, 48)],
         "group 1: K 48: tensor copies need rows of a multiple of 16 bytes, so K must be a multiple of 32"),
        ({}, [(1, 1, 32), (1, 1, 40)],
         "group 1: K 40: tensor copies need rows of a multiple of 16 bytes, so K must be a multiple of 32"),
        ({}, [(-1, 1, 32), (1, 1, 32)], "group 0: expected M and N of 0 or more and a positive K, got -1, 1, 32"),
        ({"tile_m": 64}, SIZES, "tile_m 64: a block-scaled MMA of one CTA has 128 rows (PTX ISA, tcgen05.mma, shapes)"),
        ({"stages": 7}, SIZES, "7 stages take 275456 bytes of shared memory; a CTA has 232448, enough for 5"),
        ({"groups": 60, "gated": True}, SIZES[:1] * 60,
         "groups 60: 800 bytes of parameters each, and a kernel has 32764, enough for 40 (PTX ISA)"),
        ({"gated": True, "tile_n": 128}, SIZES, "4 stages take 238592 bytes of shared memory; a CTA has 232448, enough for 3"),
        ({"gated": True, "tile_n": 256, "stages": 2}, SIZES,
         "2 accumulators of 256 columns and 64 of scales exceed the 512 columns of tensor memory"),
        ({"tile_n": 16}, SIZES,
         "tile_n 16: block scales come in atoms of 128 rows, 32 to a column of tensor memory, so a tile has 32, 64 or whole atoms"),
    ],
)  # fmt: skip
def test_what_is_legal(fields: dict[str, Any], sizes: list[Size], reason: str | None) -> None:
    assert grouped_legal(GroupConfig(**{"groups": 2, **fields}), sizes) == reason


@pytest.mark.parametrize("gated", [False, True])
def test_parameters_of_the_most_groups_fit(gated: bool) -> None:
    end = 0
    for size in grouped_sizes(GroupConfig(most_groups(gated), gated)):
        align = 64 if size == 128 else 4 if size in (12, 4) else 8
        end += -end % align + size
    assert end <= 32764
    assert most_groups(gated) == (40 if gated else 60)


def test_names_tell_configurations_apart() -> None:
    base = GroupConfig(2, stages=2)
    other: list[dict[str, Any]] = [
        {"groups": 3}, {"ctas": 2, "tile_m": 256}, {"tile_n": 64}, {"tile_k": 128}, {"stages": 1}, {"load_width": 8},
        {"schedule": "launch_control"}, {"schedule": "one_wave"}, {"store": "direct"}, {"evict_first": True}, {"pdl": True},
    ]  # fmt: skip
    names = {replace(base, **fields).name for fields in other} | {base.name}
    assert len(names) == len(other) + 1
    assert GroupSpec(base).name == "sm100_group_gemm_w4a4_f16_g2c1m128n128k256s2ijl32g0to"
    assert GroupSpec(replace(base, gated=True)).name == "sm100_group_dual_gemm_w4a4_f16_g2c1m128n128k256s2ijl32g0to"
    assert len({GroupSpec(base).key, GroupSpec(base, "bf16").key, GroupSpec(base, arch="sm_103a").key}) == 3
    assert GroupSpec.from_dict(GroupSpec(base).to_dict()) == GroupSpec(base)


def test_tiles_follow_each_other_group_by_group() -> None:
    c = GroupConfig(3, tile_n=64)
    assert tiles(c, [(65, 129, 32), (0, 500, 32), (1, 1, 32)]) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (2, 0, 0)]
    assert c.grid([(65, 129, 32), (0, 500, 32), (1, 1, 32)], 2) == (2, 1, 1)
    assert replace(c, schedule="one_wave").grid([(65, 129, 32), (0, 500, 32), (1, 1, 32)], 2) == (5, 1, 1)
    assert replace(c, ctas=2, tile_m=256).grid([(65, 129, 32), (0, 500, 32), (1, 1, 32)], 5) == (4, 1, 1)
    assert c.grid([(0, 8, 32)] * 3) == (1, 1, 1), "a launch needs a CTA"


def test_cost_is_of_the_cta_that_loads_most() -> None:
    c = GroupConfig(2)
    assert cost(c, [(128, 128, 512), (128, 256, 256)], 148) == 2 * c.stage_bytes
    assert cost(c, [(128, 128, 512), (128, 256, 256)], 2) == 3 * c.stage_bytes
    assert cost(c, [(128, 128, 512), (128, 256, 256)], 1) == 4 * c.stage_bytes


@pytest.mark.parametrize("shape", [*GROUP_BENCHMARKS, *GROUP_TESTS], ids=str)
def test_defaults_are_legal_and_fill_shared_memory(shape: Any) -> None:
    narrow = {(2, 128), (2, 64), (1, 128), (1, 64), (1, 32)}
    for gated in (False, True):
        found = list(candidates(shape.sizes, gated=gated))
        assert {(c.ctas, c.tile_n) for c in found} == narrow | (set() if gated else {(2, 256), (1, 256)})
        for c in found:
            assert grouped_legal(c, shape.sizes) is None
            assert c.stages == c.most_stages > 1
        assert cost(found[0], shape.sizes) == min(cost(c, shape.sizes) for c in found)


def test_shared_memory_is_the_dense_kernels() -> None:
    c = GroupConfig(2, stages=3, load_width=16)
    assert c.mma == Config(1, 128, 128, 256, 3, load_width=16, schedule="static", store="tma")
    assert (c.stage_bytes, c.shared_bytes, c.columns) == (c.mma.stage_bytes(1), c.mma.shared_bytes(1), c.mma.columns(1))
    assert c.mma.store_bytes == 2 * 4 * 32 * 16 * 2, "two buffers of 32 columns and load_width rows for each of four warps"
