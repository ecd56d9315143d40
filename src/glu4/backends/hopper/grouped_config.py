"""What can be tuned in the grouped Hopper kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from glu4.backends.hopper.config import TILE_K, UNIT_BYTES, WARPGROUP, Config
from glu4.problem import GroupedProblem

__all__ = ["GROUPED_SHIPPED", "MAX_EXPERTS", "GroupedConfig", "grouped_candidates", "grouped_legal"]

MAX_EXPERTS = 512
PRODUCER_REGISTERS = 32
_SHARED_BYTES = 227 * 1024
_MAX_STAGES = 24


@dataclass(frozen=True)
class GroupedConfig:
    """Tiles of up to `tokens` tokens by `rows` x 64 packed weight rows, a warpgroup for each 64.

    widths   tokens that one product can take, ascending; an expert's tiles have the narrowest that holds its tokens
    choices  the most tokens a tile may have: the kernel takes the one with the shortest predicted schedule
    box      tokens that one tensor copy fetches: fewer read less that no product needs, but take longer to issue
    steps    of 16 along K that are decoded, while the products of as many run, in one fragment of two
    """

    tokens: int = 128
    rows: int = 3
    box: int = 32
    widths: tuple[int, ...] = (8, 16, 32, 48, 64, 80, 96, 112, 128)
    choices: tuple[int, ...] = (128, 112, 96, 80, 64)
    steps: int = 4

    def __post_init__(self) -> None:
        if tuple(sorted(self.widths)) != self.widths or self.widths[-1:] != (self.tokens,):
            raise ValueError(f"widths: expected ascending ones that end with {self.tokens}, got {self.widths}")
        if any(w < 8 or w % 8 for w in self.widths):
            raise ValueError(f"widths: expected multiples of 8, got {self.widths}")
        if self.box < 8 or self.box % 8 or self.tokens % self.box:
            raise ValueError(f"box: expected a multiple of 8 that divides {self.tokens}, got {self.box}")
        if not self.choices or not set(self.choices) <= set(self.widths):
            raise ValueError(f"choices: expected some of {self.widths}, got {self.choices}")
        if self.steps not in (1, 2, 4):
            raise ValueError(f"steps: expected 1, 2 or 4, got {self.steps}")

    @property
    def tile(self) -> Config:
        """The dense kernel's configuration that computes the largest tile."""
        return Config(self.tokens, self.rows, 1, 1, 2)

    @property
    def name(self) -> str:
        return f"t{self.tokens}r{self.rows}d{self.steps}b{self.box}w{len(self.widths)}c{len(self.choices)}"

    @property
    def threads(self) -> int:
        """Of a CTA: a warpgroup for each 64 packed rows, and one that issues copies."""
        return self.tile.cta_threads(False)

    @property
    def max_experts(self) -> int:
        """The schedule is computed by one thread an expert."""
        return min(MAX_EXPERTS, self.threads)

    @property
    def weight_bytes(self) -> int:
        """Packed weights of one stage."""
        return self.tile.stage_units * self.rows * UNIT_BYTES

    @property
    def box_bytes(self) -> int:
        """What one tensor copy brings."""
        return self.box * TILE_K * 2

    @property
    def staged_tokens(self) -> int:
        """Tokens whose outputs a warpgroup transposes at once."""
        return 16 if self.tokens == 256 else min(32, self.tokens)

    @property
    def staging_bytes(self) -> int:
        """Shared memory of outputs on their way, beside the stages, which the next tile fills meanwhile."""
        return self.rows * self.staged_tokens * self.tile.staging_pitch(True)

    @property
    def notes(self) -> int:
        """Words that a warp leaves for the others while the schedule is computed."""
        return max(len(self.widths) + 1, 2 * len(self.choices))

    @property
    def _beside_stages(self) -> int:
        schedule = 2 * self.max_experts + 1 + self.threads // 32 * self.notes
        return self.staging_bytes + 4 * schedule + 256

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


_WIDE = (8, 16, 32, 64, 96, 128, 160, 192, 224, 256)
# what the dispatch can choose, by the mean tokens of an expert up to which each is best (docs/notebook-hopper.md, section 7)
_BY_MEAN = (
    (8, GroupedConfig(16, 4, 16, (8, 16), (16,), 2)),
    (96, GroupedConfig()),
    (192, GroupedConfig(256, 2, 32, _WIDE, (256, 224, 192, 160, 128), 4)),
    (1 << 31, GroupedConfig(rows=4, steps=2)),
)
GROUPED_SHIPPED = tuple(config for _, config in _BY_MEAN)


def grouped_legal(config: GroupedConfig, problem: GroupedProblem) -> str | None:
    """Why `config` may not run `problem`, in one sentence; None when it may."""
    if problem.operation == "grouped_linear":
        return "grouped_linear: the grouped Hopper kernel takes gate and up"
    if problem.x_format == "float32":
        return "float32 activations: wgmma would round them to TF32, which is not exact"
    if problem.out_dtype.itemsize != 2:
        return "float32 output: the kernel writes float16 or bfloat16"
    if problem.experts > config.max_experts:
        return f"{problem.experts} experts: the kernel's schedule holds up to {config.max_experts}"
    return None


def grouped_candidates(problem: GroupedProblem) -> Iterator[GroupedConfig]:
    """The shipped configurations that may run `problem`, best first.

    The host knows the mean of an expert's tokens alone; tiles follow each expert's own count on the device.
    """
    mean = problem.rows / max(1, problem.experts)
    place = next(i for i, (limit, _) in enumerate(_BY_MEAN) if mean <= limit)
    order = sorted(range(len(_BY_MEAN)), key=lambda i: (abs(i - place), -i))
    return (GROUPED_SHIPPED[i] for i in order if grouped_legal(GROUPED_SHIPPED[i], problem) is None)
