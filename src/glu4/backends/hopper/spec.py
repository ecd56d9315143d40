"""What identifies a kernel: its operation, types and configuration, and a hash of the sources it is made from.

`KernelSpec` multiplies, `GroupedSpec` does so for a mixture of experts, `DecodeSpec` decodes NVFP4 tokens for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from glu4.backends.hopper.config import SHIPPED, Config
from glu4.backends.hopper.grouped_config import GATHER_CONFIGS, GROUPED_SHIPPED, GroupedConfig
from glu4.compiled.sources import kernel_key

__all__ = ["DecodeSpec", "GroupedSpec", "KernelSpec", "Spec", "gathering", "shipped", "shipped_grouped", "spec_from_dict"]

SOURCES = tuple(
    f"backends/hopper/{name}.py" for name in ("config", "pack", "instructions", "dual_gemm", "decode_tokens", "build")
)
_GROUPED_SOURCES = (
    *SOURCES,
    *(f"backends/hopper/{name}.py" for name in ("grouped_config", "grouped_schedule", "grouped_gemm", "grouped_build")),
)
_BUILDER = "glu4.backends.hopper.build"  # the module that compiles these, run in a process of its own
_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class KernelSpec:
    """One Hopper kernel. x: "f16", "bf16" or "nvfp4"; out: "f16" or "bf16"; dual: gate and up, or one matrix."""

    config: Config
    x: str
    out: str
    dual: bool
    arch: str = "sm_90a"

    builder: ClassVar[str] = _BUILDER

    @classmethod
    def of(cls, config: Config, x: torch.dtype, out: torch.dtype, dual: bool, nvfp4: bool = False) -> KernelSpec:
        return cls(config, "nvfp4" if nvfp4 else _TYPES[x], _TYPES[out], dual)

    @property
    def nvfp4(self) -> bool:
        """Whether it decodes NVFP4 tokens itself."""
        return self.x == "nvfp4"

    @property
    def name(self) -> str:
        """As DESIGN has it: architecture, operation, operand types; then output type and configuration."""
        operation = "dual_gemm" if self.dual else "linear"
        operands = "w4a4" if self.nvfp4 else f"w4a16_{self.x}"
        return f"sm90_{operation}_{operands}_{self.out}_{self.config.name}"

    @property
    def key(self) -> str:
        """Sources, configuration, architecture and tool version, as 16 hexadecimal digits."""
        return kernel_key(self.name, self.arch, SOURCES)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> KernelSpec:
        return cls(**{**d, "config": Config(**d["config"])})


@dataclass(frozen=True)
class DecodeSpec:
    """The kernel that decodes NVFP4 tokens to fp16; gather: of the rows that an index asks for."""

    arch: str = "sm_90a"
    gather: bool = False

    builder: ClassVar[str] = _BUILDER

    @property
    def name(self) -> str:
        """As `KernelSpec.name`."""
        return f"sm90_{'gather' if self.gather else 'decode'}_tokens_nvfp4_f16"

    @property
    def key(self) -> str:
        """As `KernelSpec.key`."""
        return kernel_key(self.name, self.arch, SOURCES)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GroupedSpec:
    """One grouped Hopper kernel. x, out: "f16" or "bf16"; dual: gate and up, or one matrix."""

    config: GroupedConfig
    x: str
    out: str
    dual: bool = True
    arch: str = "sm_90a"

    builder: ClassVar[str] = _BUILDER

    @classmethod
    def of(cls, config: GroupedConfig, x: torch.dtype, out: torch.dtype, dual: bool = True) -> GroupedSpec:
        return cls(config, _TYPES[x], _TYPES[out], dual)

    @property
    def name(self) -> str:
        """As `KernelSpec.name`."""
        operation = "dual_gemm" if self.dual else "linear"
        return f"sm90_grouped_{operation}_w4a16_{self.x}_{self.out}_{self.config.name}"

    @property
    def key(self) -> str:
        """As `KernelSpec.key`; the configuration in full, because its name only counts widths."""
        return kernel_key(f"{self.name} {self.config}", self.arch, _GROUPED_SOURCES)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kind": "grouped"}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> GroupedSpec:
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in d["config"].items()}
        return cls(GroupedConfig(**fields), d["x"], d["out"], d["dual"], d["arch"])


Spec = KernelSpec | GroupedSpec | DecodeSpec


def spec_from_dict(d: dict[str, Any]) -> Spec:
    """What any kind's `to_dict` wrote."""
    if d.get("kind") == "grouped":
        return GroupedSpec.from_dict(d)
    return KernelSpec.from_dict(d) if "config" in d else DecodeSpec(**d)


def shipped_grouped(dual: bool | None = None) -> list[Spec]:
    """Every kernel for mixtures of experts that the dispatch can choose, of one operation only if `dual` says which, and what
    decodes tokens for them."""
    types = ("f16", "bf16")
    operations = (True, False) if dual is None else (dual,)
    kernels = [GroupedSpec(c, x, out, d) for d in operations for x in types for out in types for c in GROUPED_SHIPPED]
    return [*kernels, *(gathering() if True in operations else ()), DecodeSpec()]  # of one matrix, rows come sorted


def gathering() -> list[Spec]:
    """Those of them that find tokens by an index."""
    types = ("f16", "bf16")
    return [*(GroupedSpec(c, x, out) for x in types for out in types for c in GATHER_CONFIGS), DecodeSpec(gather=True)]


def shipped(dual: bool | None = None) -> list[Spec]:
    """Every kernel that the dispatch can choose; of one dense operation only, if `dual` says which."""
    types = ("f16", "bf16")
    operations = (True, False) if dual is None else (dual,)
    kernels = [KernelSpec(c, x, out, d) for d in operations for x in types for out in types for c in SHIPPED]
    kernels += [KernelSpec(c, "nvfp4", out, d) for d in operations for out in types for c in SHIPPED if c.takes_nvfp4]
    grouped = shipped_grouped()[:-1] if dual is None else []
    return [*kernels, *grouped, DecodeSpec()]
