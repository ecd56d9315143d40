"""What can be tuned in the grouped Hopper kernel."""

from __future__ import annotations

from dataclasses import dataclass

from glu4.backends.hopper.config import Config

__all__ = ["MAX_EXPERTS", "GroupedConfig"]

MAX_EXPERTS = 512
_SHARED_BYTES = 227 * 1024
_MAX_STAGES = 24


@dataclass(frozen=True)
class GroupedConfig:
    """A tile of `tokens` by `rows` x 64 packed weight rows, a warpgroup for each 64; fragment_sets as in `Config`."""

    tokens: int
    rows: int = 2
    fragment_sets: int = 1

    @property
    def tile(self) -> Config:
        """The dense kernel's configuration that computes one tile."""
        return Config(self.tokens, self.rows, 1, self.fragment_sets, 2)

    @property
    def name(self) -> str:
        return f"t{self.tokens}r{self.rows}f{self.fragment_sets}"

    @property
    def staging_bytes(self) -> int:
        """Shared memory of the outputs of one tile, beside the stages, which the next tile fills meanwhile."""
        return self.rows * self.tokens * self.tile.staging_pitch(True)

    @property
    def stages(self) -> int:
        """As many as fit."""
        other = 1024 + self.staging_bytes + 4 * (MAX_EXPERTS + 1 + 32) + 128
        return min(_MAX_STAGES, (_SHARED_BYTES - other) // self.tile.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        """What a launch asks for."""
        other = self.staging_bytes + 4 * (MAX_EXPERTS + 1 + 32) + 128
        return 1024 + self.stages * self.tile.stage_bytes + other
