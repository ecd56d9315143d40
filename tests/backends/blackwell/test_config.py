"""Configurations: what fits the machine, and the refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glu4 import GroupedProblem, Problem
from glu4.backends.blackwell.config import Config, candidates, legal
from glu4.backends.blackwell.spec import KernelSpec

PROBLEM = Problem(256, 4096, 7168)
# (M, N, K) of the public contest's benchmarks
BENCHMARKS = ((256, 4096, 7168), (512, 4096, 7168), (256, 3072, 4096), (512, 3072, 7168))


@pytest.mark.parametrize("shape", BENCHMARKS)
def test_candidates_are_legal_and_fill_shared_memory(shape: tuple[int, int, int]) -> None:
    found = list(candidates(Problem(*shape)))
    assert found
    for config in found:
        assert legal(config, Problem(*shape)) is None
        assert config.shared_bytes() <= 227 * 1024 < config.shared_bytes() + config.stage_bytes()


@pytest.mark.parametrize(("shape", "tile_n"), list(zip(BENCHMARKS, (64, 128, 64, 128))))
def test_defaults_are_the_tiles_of_the_best_public_kernels(shape: tuple[int, int, int], tile_n: int) -> None:
    config = next(candidates(Problem(*shape)))
    assert (config.ctas, config.tile_m, config.tile_n, config.tile_k) == (2, 256, tile_n, 256)
    assert (config.stages, config.gate_first, config.collector) == ({64: 7, 128: 5}[tile_n], 3, True)


def test_stages_that_the_best_public_kernels_have() -> None:
    """7 of 256 x 64 and 5 of 256 x 128 for a pair, with K 256 a stage."""
    assert Config(2, 256, 64).most_stages() == 7
    assert Config(2, 256, 128).most_stages() == 5


@pytest.mark.parametrize(
    ("config", "weights", "used", "allocated"),
    [
        (Config(), 2, 256 + 16 + 2 * 16, 512),
        (Config(tile_n=64), 2, 128 + 16 + 2 * 16, 256),
        (Config(tile_n=32, tile_k=128), 2, 64 + 8 + 2 * 8, 128),
        (Config(tile_n=256), 1, 256 + 16 + 32, 512),
    ],
)
def test_columns_of_tensor_memory(config: Config, weights: int, used: int, allocated: int) -> None:
    assert (config.used_columns(weights), config.columns(weights)) == (used, allocated)


REFUSED = {
    "tile_m 64: a block-scaled MMA of one CTA has 128 rows": Config(tile_m=64),
    "tile_m 256: a block-scaled MMA of one CTA has 128 rows": Config(tile_m=256),
    "tile_m 128 of a pair: both CTAs read the scales of their 64 rows at one address of tensor memory": Config(2, 128),
    "tile_m 384: a block-scaled MMA of a pair has 128 or 256 rows": Config(2, 384),
    "tile_n 12: the MMA takes multiples of 8 up to 256": Config(tile_n=12),
    "tile_n 24: the MMA takes multiples of 16 up to 256": Config(2, 256, 24),
    "tile_n 512: the MMA takes multiples of 8 up to 256": Config(tile_n=512),
    "tile_n 16: block scales come in atoms of 128 rows": Config(tile_n=16),
    "tile_n 96: block scales come in atoms of 128 rows": Config(tile_n=96),
    "tile_n 192: block scales come in atoms of 128 rows": Config(tile_n=192),
    "2 accumulators of 256 columns and 80 of scales exceed the 512 columns of tensor memory": Config(tile_n=256, stages=1),
    "tile_k 512: a row of a stage is one swizzle span": Config(tile_k=512, stages=1),
    "load_width 64: an accumulator has 32 columns": Config(tile_n=32, load_width=64),
    "gate_first 3: these steps stay in shared memory until up's products, and there are 2 stages": Config(stages=2, gate_first=3),
    "collector: the buffer holds one A": Config(order="by_matrix", collector=True),
    "split 29: K has 28 steps of 256, and a part needs one": Config(split=29),
    "split 2, gate_first 1: the activation of a part of a sum means nothing": Config(split=2, gate_first=1),
    'split 2, schedule "static": the parts of a tile are CTAs of one wave': Config(split=2, schedule="static"),
    'split 2, schedule "launch_control": the parts of': Config(split=2, schedule="launch_control"),
    'split 2, schedule "stream_k": the parts of': Config(split=2, schedule="stream_k"),
    'schedule "stream_k", gate_first 1: the activation of a part of a sum means nothing': Config(schedule="stream_k", gate_first=1),
    "early_weights: what they come before is griddepcontrol.wait, which a kernel has with pdl": Config(early_weights=True),
    "4 stages take 238592 bytes of shared memory; a CTA has 232448, enough for 3": Config(store="tma"),
    "5 stages take 277504 bytes of shared memory; a CTA has 232448, enough for 4": Config(stages=5),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_configurations_that_the_hardware_refuses(reason: str) -> None:
    found = legal(REFUSED[reason], PROBLEM)
    assert found is not None
    assert found.startswith(reason)


def test_one_matrix() -> None:
    """Twice as wide a tile fits; what orders two products is refused."""
    problem = Problem(8, 256, 256, operation="linear")
    assert legal(Config(tile_n=256), problem) is None
    assert list(candidates(problem))
    for config in (Config(gate_first=1), Config(collector=True), Config(barriers="separate")):
        assert legal(config, problem) == 'gate_first, collector and barriers "separate" order two products, and linear has one'


def test_linear_has_no_silu() -> None:
    problem = Problem(8, 256, 256, operation="linear")
    assert legal(Config(silu="tanh"), problem) == 'silu "tanh": linear has no activation'


def test_tensor_stores_need_rows_of_16_bytes() -> None:
    config = Config(stages=3, store="tma")
    assert legal(config, Problem(8, 104, 256)) is None
    found = legal(config, Problem(8, 100, 256))
    assert found is not None
    assert found.startswith(
        'store "tma", N 100: tensor copies need rows of a multiple of 16 bytes, so N must be a multiple of 8'
    )


def test_narrow_tiles_are_legal() -> None:
    """N = 64 and 32 are: only M is fixed at 128."""
    assert legal(Config(tile_n=64), PROBLEM) is None
    assert legal(Config(tile_n=32), PROBLEM) is None


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (GroupedProblem(64, 4, 256, 256), "grouped problems have no Blackwell kernel yet"),
        (
            Problem(8, 256, 256, x_format="float16"),
            "float16 activations: the block-scaled MMA takes 4-bit operands on both sides",
        ),
        (Problem(8, 256, 256, out_dtype=torch.float32), "float32 output: the kernel writes float16 or bfloat16"),
        (Problem(8, 256, 272), "K 272: tensor copies need rows of a multiple of 16 bytes, so K must be a multiple of 32"),
    ],
)
def test_problems_that_are_refused(problem: Problem | GroupedProblem, reason: str) -> None:
    found = legal(Config(), problem)
    assert found is not None
    assert found.startswith(reason)
    assert list(candidates(problem)) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ctas", 3, "ctas: expected 1 or a pair, 2, got 3"),
        ("stages", 0, "stages: expected a positive number, got 0"),
        ("schedule", "clc", "schedule: expected one of one_wave, static, launch_control, stream_k, got clc"),
        ("gate_first", -1, "gate_first: expected a number of steps or 0, got -1"),
        ("order", "gate", "order: expected one of interleaved, by_matrix, got gate"),
        ("barriers", "none", "barriers: expected one of joint, separate, got none"),
        ("store", "st", "store: expected one of direct, tma, got st"),
        ("silu", "sin", "silu: expected one of exp, tanh, got sin"),
        ("warps", "two", "warps: expected one of specialised, single, got two"),
        ("load_width", 24, "load_width: expected one of 8, 16, 32, 64, got 24"),
    ],
)
def test_values_without_a_meaning(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(Config(), **{field: value})
    assert str(caught.value) == message


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([Config(), Config(tile_n=32), Config(2, 256, 64)]))
def test_the_grid_covers_the_output(m: int, n: int, config: Config) -> None:
    x, y, z = config.grid(m, n)
    assert x % config.ctas == 0
    assert z == 1
    tiles = x // config.ctas
    assert (tiles - 1) * config.tile_m < m <= tiles * config.tile_m
    assert (y - 1) * config.tile_n < n <= y * config.tile_n


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 3), st.integers(2, 148))
def test_a_persistent_grid_is_one_wave(m: int, n: int, batch: int, processors: int) -> None:
    config = Config(2, 256, 64, schedule="static")
    x, y, z = config.grid(m, n, batch, processors)
    whole = replace(config, schedule="one_wave").grid(m, n, batch)
    assert (y, z) == (1, 1)
    assert x % 2 == 0
    assert x == min(processors // 2 * 2, whole[0] * whole[1] * whole[2])


def test_names_and_keys_tell_kernels_apart() -> None:
    specs = [
        KernelSpec(replace(Config(), **{field: value}), out, dual, arch)
        for field, value in [
            ("stages", 4), ("stages", 3), ("tile_n", 64), ("tile_k", 128), ("order", "by_matrix"), ("barriers", "separate"), ("load_width", 8),
            ("gate_first", 1), ("collector", True), ("evict_first", True), ("pdl", True), ("schedule", "static"),
            ("early_weights", True), ("prefetch_scales", True), ("store", "tma"), ("silu", "tanh"), ("split", 2), ("schedule", "launch_control"),
            ("schedule", "stream_k"), ("warps", "single"),
        ]
        for out in ("f16", "bf16")
        for dual in (True, False)
        for arch in ("sm_100a", "sm_103a")
    ]  # fmt: skip
    assert len({s.name for s in specs}) == len({s.key for s in specs}) == len(specs)
    assert specs[0].name == "sm100_dual_gemm_w4a4_f16_c1m128n128k256s4ijl32g0"
    for spec in specs:
        assert KernelSpec.from_dict(spec.to_dict()) == spec
    assert KernelSpec.of(Config(), torch.bfloat16) == KernelSpec(Config(), "bf16")


def test_a_split_tile_has_more_ctas_and_a_workspace() -> None:
    """A ticket for each CTA's part of a tile; 32-bit sums of gate and up for each part of K."""
    config = Config(2, 256, 64, split=4)
    assert config.grid(300, 100, 3) == (4, 2, 12)
    tiles = 2 * 2 * 3
    assert config.workspace_bytes(300, 100, 3) == 4 * (tiles * 2 + tiles * 4 * 2 * 256 * 64)
    assert Config().workspace_bytes(300, 100, 3) == 4


def test_the_workspace_of_stream_k_goes_by_processors() -> None:
    """A CTA shares two tiles at most, the one that it ends and the one that it begins."""
    config = Config(2, 256, 64, schedule="stream_k")
    assert config.grid(300, 100, 3, 7) == (6, 1, 1)
    assert config.workspace_bytes(300, 100, 3, processors=7) == 4 * (2 * 2 * 3 * 2 + 6 * 2 * 2 * 128 * 64)
    assert config.shares_tiles


def test_a_single_warp_takes_the_place_of_two() -> None:
    assert (Config().threads, Config(warps="single").threads) == (192, 160)
    assert legal(Config(warps="single"), PROBLEM) is None
