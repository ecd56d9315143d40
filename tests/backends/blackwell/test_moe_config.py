"""Which configurations of the Blackwell kernel for mixtures of experts there are, and which one a problem gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from glu4.backends.blackwell.moe_config import MoeConfig, moe_candidates, moe_legal, moe_refusal
from glu4.problem import GroupedProblem

PROBLEM = GroupedProblem(512, 128, 768, 2048)


@pytest.mark.parametrize(
    ("config", "problem", "reason"),
    [
        (MoeConfig(tile_n=256, stages=1), PROBLEM, "2 accumulators of 256 columns and 64 of scales exceed the 512 columns"),
        (MoeConfig(stages=4), PROBLEM, "4 stages take 238592 bytes of shared memory; a CTA has 232448, enough for 3"),
        (MoeConfig(tile_m=256), PROBLEM, "tile_m 256: a block-scaled MMA of one CTA has 128 rows"),
        (MoeConfig(tile_n=96), PROBLEM, "tile_n 96: block scales come in atoms of 128 rows, 32 to a column"),
        (MoeConfig(), replace(PROBLEM, k=2064), "K 2064: tensor copies need rows of a multiple of 16 bytes"),
        (MoeConfig(), replace(PROBLEM, x_format="float16"), "float16 activations: the block-scaled MMA takes 4-bit operands"),
        (MoeConfig(), replace(PROBLEM, out_dtype=torch.float32), "float32 output: the kernel writes float16 or bfloat16"),
        (MoeConfig(), replace(PROBLEM, operation="grouped_linear"), "grouped_linear: the kernel multiplies by gate and up"),
        (MoeConfig(gated=False), PROBLEM, "grouped_dual_gemm: the kernel multiplies by one matrix an expert"),
        (MoeConfig(tile_n=32), replace(PROBLEM, rows=1 << 30, n=1 << 14), "more tiles than 1073741823"),
    ],
)
def test_what_is_refused(config: MoeConfig, problem: GroupedProblem, reason: str) -> None:
    assert reason in str(moe_legal(config, problem))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"store": "tma"}, "store: expected one of direct, shared, got tma"),
        ({"load_width": 12}, "load_width: expected one of"),
        ({"schedule": "one_wave"}, "schedule: expected one of static, launch_control, got one_wave"),
    ],
)
def test_values_that_there_are_not(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeConfig(**fields)


@pytest.mark.parametrize("n", [1, 72, 101, 768])
@pytest.mark.parametrize(("rows", "experts", "tile_n"), [(1, 512, 32), (512, 128, 32), (8192, 128, 64), (65536, 128, 128)])
def test_the_default_follows_from_the_mean(rows: int, experts: int, tile_n: int, n: int) -> None:
    """All tiles are candidates, so that any kernel that is compiled runs any problem."""
    problem = GroupedProblem(rows, experts, n, 2048)
    found = list(moe_candidates(problem))
    assert found[0].tile_n == tile_n
    assert sorted(c.tile_n for c in found) == [32, 64, 128]
    assert all(moe_legal(c, problem) is None for c in found)
    assert moe_refusal(problem) is None


def test_the_grid_depends_on_nothing_that_the_host_does_not_know() -> None:
    c = MoeConfig(2, 256, 32)
    assert c.grid(512, 128, 768, 148) == (148, 1, 1)
    assert c.grid(3, 128, 300, 148) == (2 * 3 * 2, 1, 1), "three tokens are three tiles at most, of two columns"
    assert c.grid(0, 0, 300, 148) == (2, 1, 1)
    controlled = replace(c, schedule="launch_control")
    assert controlled.grid(512, 128, 768, 148) == (2 * (16 + 124) * 3, 1, 1), "one for each tile that there is at most"
    assert controlled.grid(0, 0, 300, 148) == (2, 1, 1)
