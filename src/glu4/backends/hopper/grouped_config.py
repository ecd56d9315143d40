"""What can be tuned in the grouped Hopper kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from glu4.backends.hopper.config import MULTIPROCESSORS, TILE_K, UNIT_BYTES, WARPGROUP, Config
from glu4.problem import GroupedProblem

__all__ = ["GATHER_CONFIGS", "GROUPED_SHIPPED", "MAX_EXPERTS", "GroupedConfig", "grouped_candidates", "grouped_legal"]

MAX_EXPERTS = 512
# costs in tokens of one step along K
STEP_COST = 27  # of a step beside its products: decoding (as `config.cost` has it)
FINISH_STEPS = 2  # what finishing a tile costs, in its steps; an estimate
PRODUCER_REGISTERS = 32
FIT_EXPERTS = 8  # up to which `fit` looks at the tiles of all
_SHARED_BYTES = 227 * 1024
_MAX_STAGES = 24


@dataclass(frozen=True)
class GroupedConfig:
    """Tiles of up to `tokens` tokens by `rows` x 64 packed weight rows, a warpgroup for each 64.

    grain    products are as many tokens wide as a tile has, rounded up to a multiple of this
    box      tokens that one tensor copy fetches: fewer read less that no product needs, but take longer to issue
    steps    of 16 along K that are decoded into one fragment
    sets     fragments: with 2 a warpgroup decodes one while the products of the other run; with 1, where registers are
             few, those of other warpgroups run meanwhile
    least    no tile is cut within so many stages along K of its begin or end
    share    tiles are shared where a CTA of one row group gains more than that many tokens of one stage along K; above what
             the exchange of sums takes, as shared tiles cost clock (docs/notebook-hopper.md, section 7)
    fit      work of few experts that fits into one round is cut into tiles of 2 or 3 row groups of about one cost
    gather   rows of x are found by an index and copied in pieces of 16 bytes, instead of boxes of rows sorted by expert
    """

    tokens: int = 128
    rows: int = 3
    box: int = 32
    grain: int = 8
    steps: int = 4
    least: int = 4
    share: int = 6000
    fit: bool = False
    sets: int = 2
    gather: bool = False

    def __post_init__(self) -> None:
        if self.grain < 8 or self.grain % 8 or self.tokens % self.grain:
            raise ValueError(f"grain: expected a multiple of 8 that divides {self.tokens}, got {self.grain}")
        if self.box < 8 or self.box % 8 or self.tokens % self.box:
            raise ValueError(f"box: expected a multiple of 8 that divides {self.tokens}, got {self.box}")
        if len(self.widths) > 31:
            raise ValueError(f"grain: at most 31 widths of products, a lane for each, got {len(self.widths)}")
        if self.steps not in (1, 2, 4):
            raise ValueError(f"steps: expected 1, 2 or 4, got {self.steps}")
        if self.sets not in (1, 2):
            raise ValueError(f"sets: expected 1 or 2, got {self.sets}")
        if self.least < 1:
            raise ValueError(f"least: expected 1 or more stages, got {self.least}")
        if not 0 <= self.share < 1 << 20:
            raise ValueError(f"share: expected 0 to 2^20, got {self.share}")
        if self.fit and self.rows != 3:
            raise ValueError(f"fit: tiles have 2 or 3 row groups, and rows is {self.rows}")
        if self.gather and self.tokens % 32:
            raise ValueError(f"gather: a warp holds an index a lane, and tokens is no multiple of 32 but {self.tokens}")

    @property
    def tile(self) -> Config:
        """The dense kernel's configuration that computes the largest tile."""
        return Config(self.tokens, self.rows, 1, 1, 2)

    @property
    def name(self) -> str:
        least = "" if (self.least, self.share) == (4, 6000) else f"l{self.least}s{self.share}"
        one_set = "o" * (self.sets == 1)
        tile = f"t{self.tokens}r{self.rows}d{self.steps}{one_set}b{self.box}w{self.grain}"
        return f"{tile}{least}{'f' * self.fit}{'i' * self.gather}"

    @property
    def widths(self) -> range:
        """Of products."""
        return range(self.grain, self.tokens + 1, self.grain)

    @property
    def threads(self) -> int:
        """Of a CTA: a warpgroup for each 64 packed rows, and one that issues copies."""
        return self.tile.cta_threads(False)

    @property
    def max_experts(self) -> int:
        """The schedule is computed by one thread an expert, and what it needs lies beside the stages."""
        return min(MAX_EXPERTS, self.threads) if self.tokens < 256 else 160

    @property
    def weight_bytes(self) -> int:
        """Packed weights of one stage."""
        return self.tile.stage_units * self.rows * UNIT_BYTES

    @property
    def box_bytes(self) -> int:
        """What one tensor copy brings."""
        return self.box * TILE_K * 2

    @property
    def producers(self) -> int:
        """Arrivals that fill a stage: of who announces its bytes, and with `gather` of every thread that copies tokens."""
        return 1 + self.gather * self.tile.stage_units * 32

    def staged_tokens(self, dual: bool) -> int:
        """Tokens whose outputs a warpgroup transposes at once."""
        return min(32 if dual else 16, self.tokens)

    @property
    def staging_bytes(self) -> int:
        """Shared memory of outputs on their way, beside the stages, which the next tile fills meanwhile."""
        return self.rows * max(self.staged_tokens(True) * 64, self.staged_tokens(False) * 128)

    @property
    def notes(self) -> int:
        """Words that a warp leaves for the others while the schedule is computed."""
        return max(len(self.widths) + 1, 2)

    @property
    def _beside_stages(self) -> int:
        kept = 4 * 4 * self.rows * 4  # what each warp keeps of its tile until it is done
        return self.staging_bytes + kept + 4 * (4 * self.max_experts + 3 + 5) + 256

    @property
    def stages(self) -> int:
        """As many as fit."""
        return min(_MAX_STAGES, (_SHARED_BYTES - 1024 - self._beside_stages) // self.tile.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        """What a launch asks for."""
        return 1024 + self.stages * self.tile.stage_bytes + self._beside_stages

    @property
    def launch_registers(self) -> int:
        """Registers a thread at launch."""
        return self.tile.launch_registers(False)

    @property
    def consumer_registers(self) -> int:
        """What the producers leave."""
        pool = self.launch_registers * self.threads - PRODUCER_REGISTERS * WARPGROUP
        return min(240, pool // (self.rows * WARPGROUP) // 8 * 8)


_FEW = GroupedConfig(64, 4, 32, 8, 4)
_MANY = GroupedConfig(128, 4, 32, 8, 4, sets=1)
_WIDE = GroupedConfig(192, 3, 32, 8, 4, fit=True)
_WIDEST = GroupedConfig(256, 2, 32, 16, 4)
GROUPED_SHIPPED = (_FEW, _MANY, _WIDE, _WIDEST)
# the same bits, of tokens that lie unsorted
GATHER_CONFIGS = tuple(replace(c, gather=True) for c in (_FEW, _MANY, _WIDE))


def grouped_legal(config: GroupedConfig, problem: GroupedProblem) -> str | None:
    """Why `config` may not run `problem`, in one sentence; None when it may."""
    if problem.x_format == "float32":
        return "float32 activations: wgmma would round them to TF32, which is not exact"
    if problem.out_dtype.itemsize != 2:
        return "float32 output: the kernel writes float16 or bfloat16"
    if problem.experts > config.max_experts:
        return f"{problem.experts} experts: the kernel's schedule holds up to {config.max_experts}"
    return None


def grouped_candidates(
    problem: GroupedProblem, gather: bool = False, processors: int = MULTIPROCESSORS
) -> Iterator[GroupedConfig]:
    """The shipped configurations that may run `problem`, best first; with `gather` those that find rows by an index.

    The host knows the mean of an expert's tokens alone; tiles follow each expert's own count on the device. Bounds between the
    measured points of benchmarks/results/h200-grouped-points.json.
    """
    mean = problem.rows / max(1, problem.experts)
    if mean <= 24:
        order = (_FEW, _MANY, _WIDE, _WIDEST)
    elif 176 < mean <= 240 and not _one_round(problem, processors):
        order = (_WIDEST, _WIDE, _MANY, _FEW)
    elif mean > (112 if problem.experts <= 16 else 128) or (mean > 64 and _one_round(problem, processors)):
        order = (_WIDE, _WIDEST, _MANY, _FEW)
    else:
        order = (_MANY, _WIDE, _WIDEST, _FEW)
    configs = (replace(c, gather=True) for c in order if c is not _WIDEST) if gather else iter(order)
    return (c for c in configs if grouped_legal(c, problem) is None)


def _one_round(problem: GroupedProblem, processors: int) -> bool:
    """Whether tiles of _WIDE surely find a CTA each, however the tokens are shared out."""
    bands = (problem.rows + problem.experts * (_WIDE.tokens - 1)) // _WIDE.tokens
    row_groups = -(-problem.n // (32 if problem.operation == "grouped_dual_gemm" else 64))
    return problem.experts <= FIT_EXPERTS and bands * -(-row_groups // _WIDE.rows) <= processors
