"""What identifies the kernels that quantise tokens, sort a router's choices and combine results, and their sources' hash."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from glu4.compiled.sources import kernel_key

__all__ = [
    "CLUSTER",
    "MAX_KEYS",
    "WARPS",
    "CombineSpec",
    "QuantizeSpec",
    "SortSpec",
    "Spec",
    "quantizers",
    "shipped",
    "spec_from_dict",
]

WARPS = 32
MAX_KEYS = 1024  # experts, and one more for choices of none: a thread each
CLUSTER = 8  # CTAs that sort many choices together: as many as any device of these takes
_FILES = ("quantize_tokens", "sort_tokens", "combine_tokens", "spec", "build")
_SOURCES = ("compiled/building.py", *(f"backends/tokens/{name}.py" for name in _FILES))
_BUILDER = "glu4.backends.tokens.build"  # the module that compiles these, run in a process of its own


@dataclass(frozen=True)
class SortSpec:
    """A kernel that sorts. arch: "sm_90a", "sm_100a" or "sm_103a"; ctas, of one cluster, that sort together."""

    arch: str
    ctas: int = 1

    builder: ClassVar[str] = _BUILDER

    @property
    def name(self) -> str:
        """As DESIGN has it: architecture, then what it does."""
        return f"{self.arch.rstrip('a').replace('_', '')}_sort_tokens" + f"_c{self.ctas}" * (self.ctas > 1)

    @property
    def shared_bytes(self) -> int:
        """A table of counts, a row a warp; sums of the warps; and what the other CTAs of a cluster read."""
        return 4 * WARPS * (MAX_KEYS + 1) + 4 * MAX_KEYS * (self.ctas > 1)

    @property
    def key(self) -> str:
        """Sources, architecture and tool version, as 16 hexadecimal digits."""
        return kernel_key(self.name, self.arch, _SOURCES)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _OfOneType:
    """A kernel for one type of tokens. dtype: "f16" or "bf16"; arch: as of SortSpec."""

    dtype: str
    arch: str

    builder: ClassVar[str] = _BUILDER
    operation: ClassVar[str]

    @property
    def name(self) -> str:
        """As `SortSpec.name`, and the type."""
        return f"{self.arch.rstrip('a').replace('_', '')}_{self.operation}_{self.dtype}"

    @property
    def key(self) -> str:
        """As `SortSpec.key`."""
        return kernel_key(self.name, self.arch, _SOURCES)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "operation": self.operation}


class CombineSpec(_OfOneType):
    """The kernel that combines rows."""

    operation = "combine_tokens"


class QuantizeSpec(_OfOneType):
    """The kernel that quantises tokens to NVFP4."""

    operation = "quantize_tokens"


def spec_from_dict(d: dict[str, Any]) -> Spec:
    """What any kind's `to_dict` wrote."""
    for kind in (CombineSpec, QuantizeSpec):
        if d.get("operation") == kind.operation:
            return kind(d["dtype"], d["arch"])
    return SortSpec(**d)


Spec = SortSpec | CombineSpec | QuantizeSpec


def quantizers(arch: str) -> list[QuantizeSpec]:
    """The kernels of an architecture that quantise."""
    return [QuantizeSpec("f16", arch), QuantizeSpec("bf16", arch)]


def shipped(arch: str) -> list[Spec]:
    """Every kernel of an architecture."""
    around: list[Spec] = [SortSpec(arch), SortSpec(arch, CLUSTER), CombineSpec("f16", arch), CombineSpec("bf16", arch)]
    return [*around, *quantizers(arch)]
