"""What identifies a kernel: its operation, types and configuration, and a hash of the sources it is made from."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

import torch

from glu4.backends.hopper.config import SHIPPED, Config
from glu4.compiled.store import DSL_VERSION

__all__ = ["KernelSpec", "shipped"]

_SOURCES = ("backends/hopper/config.py", "backends/hopper/pack.py", "backends/hopper/dual_gemm.py", "backends/hopper/build.py")
_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class KernelSpec:
    """One Hopper kernel. x, out: "f16" or "bf16"; dual: gate and up, or one matrix."""

    config: Config
    x: str
    out: str
    dual: bool
    arch: str = "sm_90a"

    # the module that compiles these, run in a process of its own
    builder: ClassVar[str] = "glu4.backends.hopper.build"

    @classmethod
    def of(cls, config: Config, x: torch.dtype, out: torch.dtype, dual: bool) -> KernelSpec:
        return cls(config, _TYPES[x], _TYPES[out], dual)

    @property
    def name(self) -> str:
        """As DESIGN has it: architecture, operation, operand types; then output type and configuration."""
        operation = "dual_gemm" if self.dual else "linear"
        return f"sm90_{operation}_w4a16_{self.x}_{self.out}_{self.config.name}"

    @property
    def key(self) -> str:
        """Sources, configuration, architecture and tool version, as 16 hexadecimal digits."""
        text = f"{_source_hash()} {self.name} {self.arch} nvidia-cutlass-dsl {DSL_VERSION}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> KernelSpec:
        return cls(**{**d, "config": Config(**d["config"])})


@cache
def _source_hash() -> str:
    root = files("glu4")
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(name.encode() + b"\0" + root.joinpath(name).read_bytes() + b"\0")
    return digest.hexdigest()


def shipped() -> list[KernelSpec]:
    """Every kernel that the dispatch can choose."""
    types = ("f16", "bf16")
    return [KernelSpec(c, x, out, dual) for dual in (True, False) for x in types for out in types for c in SHIPPED]
