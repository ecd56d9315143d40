"""What identifies a kernel of grouped products: output type and configuration, and a hash of the sources it is made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from glu4.backends.blackwell import spec
from glu4.backends.blackwell.grouped_config import GroupConfig
from glu4.compiled.sources import kernel_key

__all__ = ["GroupSpec"]

_FILES = ("grouped_config", "grouped_instructions", "grouped_epilogue", "grouped_gemm", "grouped_build")
SOURCES = (*spec.SOURCES, *(f"backends/blackwell/{name}.py" for name in _FILES))


@dataclass(frozen=True)
class GroupSpec:
    """One kernel. out: "f16" or "bf16"; arch: "sm_100a" or "sm_103a"."""

    config: GroupConfig
    out: str = "f16"
    arch: str = "sm_100a"

    builder: ClassVar[str] = "glu4.backends.blackwell.grouped_build"  # the module that compiles it, run in a process of its own

    @property
    def name(self) -> str:
        """As DESIGN has it: architecture, operation, operand types; then output type and configuration."""
        operation = "group_dual_gemm" if self.config.gated else "group_gemm"
        return f"{self.arch.rstrip('a').replace('_', '')}_{operation}_w4a4_{self.out}_{self.config.name}"

    @property
    def key(self) -> str:
        """Sources, configuration, architecture and tool version, as 16 hexadecimal digits."""
        return kernel_key(self.name, self.arch, SOURCES)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> GroupSpec:
        """What `to_dict` wrote."""
        return cls(**{**d, "config": GroupConfig(**d["config"])})
