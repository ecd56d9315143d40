"""What identifies a kernel for mixtures of experts, and a hash of the sources it is made from.

`MoeSpec` multiplies, `TileSpec` numbers its tiles and lays out its tokens' scales.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from glu4.backends.blackwell import grouped_spec
from glu4.backends.blackwell.moe_config import MoeConfig
from glu4.compiled.sources import kernel_key

__all__ = ["MoeSpec", "TileSpec", "spec_from_dict"]

_FILES = ("moe_config", "moe_epilogue", "moe_gemm", "moe_build")
_SOURCES = (*grouped_spec.SOURCES, *(f"backends/blackwell/{name}.py" for name in _FILES))
_TILE_FILES = ("moe_tile_tokens", "moe_build")
_TILE_SOURCES = ("compiled/building.py", "scale_layout.py", *(f"backends/blackwell/{name}.py" for name in _TILE_FILES))
_BUILDER = "glu4.backends.blackwell.moe_build"  # the module that compiles these, run in a process of its own
_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class MoeSpec:
    """One kernel. out: "f16" or "bf16"; arch: "sm_100a" or "sm_103a"."""

    config: MoeConfig
    out: str = "f16"
    arch: str = "sm_100a"

    builder: ClassVar[str] = _BUILDER

    @classmethod
    def of(cls, config: MoeConfig, out: torch.dtype, arch: str = "sm_100a") -> MoeSpec:
        return cls(config, _TYPES[out], arch)

    @property
    def name(self) -> str:
        """As DESIGN has it: architecture, operation, operand types; then output type and configuration."""
        operation = "grouped_dual_gemm" if self.config.gated else "grouped_linear"
        return f"{self.arch.rstrip('a').replace('_', '')}_{operation}_w4a4_{self.out}_{self.config.name}"

    @property
    def key(self) -> str:
        """Sources, configuration, architecture and tool version, as 16 hexadecimal digits."""
        return kernel_key(self.name, self.arch, _SOURCES)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> MoeSpec:
        """What `to_dict` wrote."""
        return cls(**{**d, "config": MoeConfig(**d["config"])})


@dataclass(frozen=True)
class TileSpec:
    """The kernel that makes what `moe_tokens` makes, for tiles of `tile_n` tokens. arch: "sm_100a" or "sm_103a"; gather: of
    tokens that an index names."""

    tile_n: int
    arch: str = "sm_100a"
    gather: bool = False

    builder: ClassVar[str] = _BUILDER

    @property
    def name(self) -> str:
        """As `MoeSpec.name`."""
        return f"{self.arch.rstrip('a').replace('_', '')}_{'gather' if self.gather else 'tile'}_tokens_nvfp4_n{self.tile_n}"

    @property
    def key(self) -> str:
        """As `MoeSpec.key`."""
        return kernel_key(self.name, self.arch, _TILE_SOURCES)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spec_from_dict(d: dict[str, Any]) -> MoeSpec | TileSpec:
    """What either kind's `to_dict` wrote."""
    return MoeSpec.from_dict(d) if "config" in d else TileSpec(**d)
