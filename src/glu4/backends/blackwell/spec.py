"""What identifies a kernel: output type and configuration, and a hash of the sources it is made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from glu4.backends.blackwell.config import Config
from glu4.compiled.sources import kernel_key

__all__ = ["KernelSpec"]

_FILES = ("config", "instructions", "epilogue", "dual_tiles", "dual_loads", "dual_gemm", "build")
SOURCES = ("compiled/building.py", *(f"backends/blackwell/{name}.py" for name in _FILES))
_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class KernelSpec:
    """One Blackwell kernel. out: "f16" or "bf16"; dual: gate and up, or one matrix; arch: "sm_100a" or "sm_103a"."""

    config: Config
    out: str
    dual: bool = True
    arch: str = "sm_100a"

    builder: ClassVar[str] = "glu4.backends.blackwell.build"  # the module that compiles it, run in a process of its own

    @classmethod
    def of(cls, config: Config, out: torch.dtype, dual: bool = True, arch: str = "sm_100a") -> KernelSpec:
        return cls(config, _TYPES[out], dual, arch)

    @property
    def weights(self) -> int:
        """Matrices."""
        return 2 if self.dual else 1

    @property
    def name(self) -> str:
        """As DESIGN has it: architecture, operation, operand types; then output type and configuration."""
        operation = "dual_gemm" if self.dual else "linear"
        return f"{self.arch.rstrip('a').replace('_', '')}_{operation}_w4a4_{self.out}_{self.config.name}"

    @property
    def key(self) -> str:
        """Sources, configuration, architecture and tool version, as 16 hexadecimal digits."""
        return kernel_key(self.name, self.arch, SOURCES)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> KernelSpec:
        """What `to_dict` wrote."""
        return cls(**{**d, "config": Config(**d["config"])})
