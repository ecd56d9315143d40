"""What identifies a kernel: its operation, types and configuration, and a hash of the sources it is made from.

Two kinds: `KernelSpec` multiplies, `DecodeSpec` decodes NVFP4 tokens for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

import torch

from glu4.backends.hopper.config import SHIPPED, Config
from glu4.compiled.store import DSL_VERSION

__all__ = ["DecodeSpec", "KernelSpec", "Spec", "shipped", "spec_from_dict"]

_SOURCES = tuple(
    f"backends/hopper/{name}.py" for name in ("config", "pack", "instructions", "dual_gemm", "decode_tokens", "build")
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
        return _key(self.name, self.arch)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> KernelSpec:
        return cls(**{**d, "config": Config(**d["config"])})


@dataclass(frozen=True)
class DecodeSpec:
    """The kernel that decodes NVFP4 tokens to fp16."""

    arch: str = "sm_90a"

    builder: ClassVar[str] = _BUILDER
    name: ClassVar[str] = "sm90_decode_tokens_nvfp4_f16"

    @property
    def key(self) -> str:
        """As `KernelSpec.key`."""
        return _key(self.name, self.arch)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Spec = KernelSpec | DecodeSpec


def spec_from_dict(d: dict[str, Any]) -> Spec:
    """What either kind's `to_dict` wrote."""
    return KernelSpec.from_dict(d) if "config" in d else DecodeSpec(**d)


def _key(name: str, arch: str) -> str:
    text = f"{_source_hash()} {name} {arch} nvidia-cutlass-dsl {DSL_VERSION}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _source_hash() -> str:
    root = files("glu4")
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(name.encode() + b"\0" + root.joinpath(name).read_bytes() + b"\0")
    return digest.hexdigest()


def shipped(dual: bool | None = None) -> list[Spec]:
    """Every kernel that the dispatch can choose; of one operation only, if `dual` says which."""
    types = ("f16", "bf16")
    operations = (True, False) if dual is None else (dual,)
    kernels = [KernelSpec(c, x, out, d) for d in operations for x in types for out in types for c in SHIPPED]
    kernels += [KernelSpec(c, "nvfp4", out, d) for d in operations for out in types for c in SHIPPED if c.takes_nvfp4]
    return [*kernels, DecodeSpec()]
