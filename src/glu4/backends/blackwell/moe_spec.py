"""What identifies a kernel for mixtures of experts: output type, configuration, and a hash of the sources it is made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from glu4.backends.blackwell import grouped_spec
from glu4.backends.blackwell.moe_config import MoeConfig
from glu4.compiled.sources import kernel_key

__all__ = ["MoeSpec"]

_FILES = ("moe_config", "moe_epilogue", "moe_gemm", "moe_build")
SOURCES = (*grouped_spec.SOURCES, *(f"backends/blackwell/{name}.py" for name in _FILES))
_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class MoeSpec:
    """One kernel. out: "f16" or "bf16"; arch: "sm_100a" or "sm_103a"."""

    config: MoeConfig
    out: str = "f16"
    arch: str = "sm_100a"

    builder: ClassVar[str] = "glu4.backends.blackwell.moe_build"  # the module that compiles it, run in a process of its own

    @classmethod
    def of(cls, config: MoeConfig, out: torch.dtype, arch: str = "sm_100a") -> MoeSpec:
        return cls(config, _TYPES[out], arch)

    @property
    def name(self) -> str:
        """As DESIGN has it: architecture, operation, operand types; then output type and configuration."""
        return f"{self.arch.rstrip('a').replace('_', '')}_grouped_dual_gemm_w4a4_{self.out}_{self.config.name}"

    @property
    def key(self) -> str:
        """Sources, configuration, architecture and tool version, as 16 hexadecimal digits."""
        return kernel_key(self.name, self.arch, SOURCES)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> MoeSpec:
        """What `to_dict` wrote."""
        return cls(**{**d, "config": MoeConfig(**d["config"])})
