"""What can be tuned in the Hopper kernel, which configurations may run a problem, and their order.

A CTA computes `rows` x 64 packed weight rows (gate and up interleaved in eights: 32 outputs for each 64) by `tokens`
tokens. `rows` x `k_groups` consumer warpgroups share the work, each decoding its own weights: k_groups > 1 lets several of
them take turns along K, so that one decodes while another multiplies; their sums are added in a fixed order. One further
warpgroup issues the copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from glu4.problem import GroupedProblem, Problem

__all__ = ["SHIPPED", "Config", "candidates", "cost", "legal"]

WARPGROUP = 128
UNIT_BYTES = 2304  # one packed unit, 64 rows x 64 of K: 2048 bytes of codes and 256 of scales
TILE_K = 64
_SHARED_BYTES = 227 * 1024  # a CTA's most on sm_90 (CUDA programming guide, table of technical specifications)
_REGISTERS = 65536
_PRODUCER_REGISTERS = 24
_MAX_STAGES = 24
# rows of A, columns of B: wgmma takes 64 by 8 to 256 in steps of 8 (PTX ISA, wgmma.mma_async)
_TOKEN_TILES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Config:
    """One kernel. tokens: 8 to 256; rows, k_groups: warpgroups; fragment_sets: 2 decodes ahead of the running product;
    stage_units: steps of 64 along K that one stage holds, so that the producer issues fewer, larger copies."""

    tokens: int
    rows: int = 2
    k_groups: int = 1
    fragment_sets: int = 2
    stage_units: int = 1

    def __post_init__(self) -> None:
        if self.tokens not in _TOKEN_TILES:
            raise ValueError(f"tokens: expected one of {_TOKEN_TILES}, got {self.tokens}")
        if not 1 <= self.rows * self.k_groups <= 6:
            raise ValueError(f"rows x k_groups: expected 1 to 6 warpgroups, got {self.rows} x {self.k_groups}")
        if self.fragment_sets not in (1, 2):
            raise ValueError(f"fragment_sets: expected 1 or 2, got {self.fragment_sets}")
        if self.stage_units not in (1, 2):  # packed weights are followed by one spare unit, which a last stage may read
            raise ValueError(f"stage_units: expected 1 or 2, got {self.stage_units}")

    @property
    def name(self) -> str:
        return f"t{self.tokens}r{self.rows}g{self.k_groups}f{self.fragment_sets}u{self.stage_units}"

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return self.rows * self.k_groups

    @property
    def threads(self) -> int:
        return (self.consumers + 1) * WARPGROUP

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: tokens in 16 bits and packed weights, 64 of K a unit."""
        return self.stage_units * (self.tokens * TILE_K * 2 + self.rows * UNIT_BYTES)

    @property
    def stages(self) -> int:
        return min(_MAX_STAGES, (_SHARED_BYTES - 1024) // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        """Barriers, padded so that the tokens start at a swizzle atom, then the stages."""
        return 1024 + self.stages * self.stage_bytes

    @property
    def launch_registers(self) -> int:
        """Registers a thread at launch; setmaxnreg then moves them from the producer to the consumers."""
        return min(240, _REGISTERS // self.threads // 8 * 8)

    @property
    def consumer_registers(self) -> int:
        pool = self.launch_registers * self.threads - _PRODUCER_REGISTERS * WARPGROUP
        return min(240, pool // (self.consumers * WARPGROUP) // 8 * 8)

    @property
    def producer_registers(self) -> int:
        return _PRODUCER_REGISTERS


# what the dispatch can choose, measured best somewhere (docs/notebook-hopper.md)
SHIPPED = (
    Config(8, 1, 3, 1, 2),
    Config(16, 1, 4, 1, 2),
    Config(32, 1, 2, 2, 2),
    Config(64, 1, 2, 2, 2),
    Config(64, 3, 1, 2, 2),
    Config(128, 1, 4, 1, 1),
    Config(128, 2, 2, 1, 2),
    Config(128, 3, 1, 2, 2),
    Config(256, 2, 1, 2, 2),
)


def legal(config: Config, problem: Problem | GroupedProblem) -> str | None:
    """Why `config` may not run `problem`, in one sentence; None when it may."""
    if isinstance(problem, GroupedProblem):
        return "grouped problems have no Hopper kernel yet"
    if problem.x_format == "float32":
        return "float32 activations: wgmma would round them to TF32, which is not exact"
    if problem.out_dtype.itemsize != 2:
        return "float32 output: the kernel writes float16 or bfloat16"
    if config.stages < 2 * config.k_groups:
        return f"{config.stages} stages do not give each of {config.k_groups} groups two"
    partial = (config.k_groups - 1) * config.rows * 64 * config.tokens * 4
    if partial > config.stages * config.stage_units * config.tokens * TILE_K * 2:
        return f"the partial sums of {config.k_groups} groups, {partial} bytes, do not fit where the tokens were"
    return None


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def cost(config: Config, problem: Problem, processors: int = 132) -> float:
    """Predicted cycles, to order configurations by; fitted to one H200 (docs/notebook-hopper.md).

    A step of 64 along K takes the decode's and the products' issue time of all warpgroups, or the latency of one, whichever
    is longer; a wave has a fixed cost.
    """
    outputs = config.rows * (32 if problem.operation == "dual_gemm" else 64)
    tiles = problem.batch * _ceil_div(problem.n, outputs) * _ceil_div(problem.m, config.tokens)
    step = max(config.rows * (60 + 1.97 * config.tokens), 195 + 1.8 * config.tokens)
    return _ceil_div(tiles, processors) * (_ceil_div(problem.k, TILE_K) * step + 6000)


def candidates(problem: Problem, processors: int = 132) -> Iterator[Config]:
    """The shipped configurations that may run `problem`, best first."""
    runnable = [c for c in SHIPPED if legal(c, problem) is None]
    return iter(sorted(runnable, key=lambda c: cost(c, problem, processors)))
