"""What can be tuned in the Blackwell kernel of mixtures of experts, and which configurations may run a problem.

As in `grouped_config`, weights are the MMA's M and tokens its N, so `tile_m` counts weights and `tile_n` tokens. How many
tokens an expert has only the device knows; the host knows the rows of x, and so the most tiles that there can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from glu4.backends.blackwell.grouped_config import GroupConfig, grouped_legal
from glu4.problem import GroupedProblem

__all__ = ["MoeConfig", "moe_candidates", "moe_legal", "moe_refusal", "most_tiles"]

_SCHEDULES = ("static", "launch_control")
_MOST_TILES = (1 << 30) - 1  # two counts of tiles are added in 32 bits with a sign


@dataclass(frozen=True)
class MoeConfig:
    """One kernel, for any number of experts. Fields: `grouped_config.GroupConfig`.

    gated     gate and up, and the activation; otherwise one matrix an expert
    schedule  "static" or "launch_control", whose grid has a CTA or pair for each tile that there is at most
    """

    ctas: int = 1
    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 256
    stages: int = 2
    load_width: int = 32
    schedule: str = "static"
    store: str = "shared"
    evict_first: bool = False
    pdl: bool = False
    gated: bool = True

    def __post_init__(self) -> None:
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(_SCHEDULES)}, got {self.schedule}")
        _ = self.grouped.name  # whose fields are checked

    @cached_property
    def grouped(self) -> GroupConfig:
        """The grouped kernel's configuration for one group, whose loads, products and shared memory are the same."""
        return GroupConfig(
            1, self.gated, self.ctas, self.tile_m, self.tile_n, self.tile_k, self.stages, self.load_width, self.schedule,
            self.store, self.evict_first, self.pdl,
        )  # fmt: skip

    @property
    def name(self) -> str:
        return self.grouped.mma.name

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one CTA."""
        return self.grouped.shared_bytes

    def grid(self, rows: int, experts: int, n: int, processors: int = 148) -> tuple[int, int, int]:
        """CTAs, which do not depend on how the rows are spread over experts; one CTA or pair where there are no tiles."""
        count = most_tiles(rows, experts, self.tile_n) * -(-n // self.tile_m)
        if self.schedule == "static":
            count = min(processors // self.ctas, count)
        return max(1, count) * self.ctas, 1, 1


def most_tiles(rows: int, experts: int, tile_n: int) -> int:
    """Tiles along tokens that `rows` rows in `experts` experts have at most, if no row has two experts.

    Each expert with rows has at most tile_n - 1 rows less than its tiles take.
    """
    return (rows + (tile_n - 1) * min(rows, experts)) // tile_n


def moe_legal(config: MoeConfig, problem: GroupedProblem) -> str | None:
    """Why `config` may not run `problem`, in one sentence; None when it may."""
    if (problem.operation == "grouped_dual_gemm") != config.gated:
        return f"{problem.operation}: the kernel multiplies by {'gate and up' if config.gated else 'one matrix an expert'}"
    if problem.x_format != "nvfp4":
        return f"{problem.x_format} activations: the block-scaled MMA takes 4-bit operands on both sides; quantize them first"
    if problem.out_dtype.itemsize != 2:
        return "float32 output: the kernel writes float16 or bfloat16"
    reason = grouped_legal(config.grouped, [(problem.rows, problem.n, problem.k)])
    if reason is not None:
        return reason.removeprefix("group 0: ")
    if most_tiles(problem.rows, problem.experts, config.tile_n) * -(-problem.n // config.tile_m) > _MOST_TILES:
        return f"rows {problem.rows}, N {problem.n}: more tiles than {_MOST_TILES}"
    return None


# tokens an expert up to which a tile is the best known guess; CTAs, weights and tokens of the tile. None was measured
_CHOICE = ((48, (2, 256, 32)), (96, (2, 256, 64)), (None, (2, 256, 128)))


def moe_candidates(problem: GroupedProblem) -> Iterator[MoeConfig]:
    """Configurations that may run `problem`, by the mean of rows over experts; the first is the default.

    A tile is as narrow as most experts fill: narrower, and an expert's weights are read again for its second tile; wider, and
    the tensor core multiplies by tokens that are not there.
    """
    mean = problem.rows / max(problem.experts, 1)
    first = next(i for i, (most, _) in enumerate(_CHOICE) if most is None or mean <= most)
    for _, tile in (*_CHOICE[first:], *reversed(_CHOICE[:first])):
        config = MoeConfig(*tile, stages=1, evict_first=True, gated=problem.operation == "grouped_dual_gemm")
        config = replace(config, stages=max(1, config.grouped.most_stages))
        if moe_legal(config, problem) is None:
            yield config


def moe_refusal(problem: GroupedProblem) -> str | None:
    """Why no configuration may run `problem`; None when one may."""
    return (
        None
        if next(moe_candidates(problem), None) is not None
        else moe_legal(MoeConfig(gated=problem.operation == "grouped_dual_gemm"), problem)
    )
