"""Where the gated MLPs of a checkpoint are, found from module names alone.

Names in use: gate_proj / up_proj (Llama, Qwen, DeepSeek), w1 / w3 (Mixtral and DeepSeek-V4: w1 gate, w3 up, w2 down), and
gate_up_proj (Phi, GLM4: gate rows first, then up rows, one global scale). Experts are `<stack>.<index>.<name>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["GatedSite", "find_gated"]

_PAIRS = {"gate_proj": "up_proj", "w1": "w3"}
_GATES = {up: gate for gate, up in _PAIRS.items()}
_FUSED = "gate_up_proj"
_DOWN = {"gate_proj": "down_proj", "w1": "w2", _FUSED: "down_proj"}
_EXPERT = re.compile(r"(?P<stack>.*\bexperts)\.(?P<index>0|[1-9][0-9]{0,5})")


@dataclass(frozen=True)
class GatedSite:
    """One dense gated MLP, or one stack of experts.

    prefix   module that holds the projections, or (for a stack) the expert indices
    gate     name of the gate projection, or of the fused one
    up       name of the up projection; None when fused
    experts  the indices found, ascending; None for a dense MLP
    """

    prefix: str
    gate: str
    up: str | None
    experts: tuple[int, ...] | None = None

    @property
    def down(self) -> str:
        """Name of the projection that follows."""
        return _DOWN[self.gate]

    def modules(self, expert: int | None = None) -> tuple[str, str | None]:
        """Module names of the gate (or fused) and the up projection, of one expert or of a dense MLP."""
        base = self.prefix if expert is None else f"{self.prefix}.{expert}"
        return f"{base}.{self.gate}", None if self.up is None else f"{base}.{self.up}"


def find_gated(quantized: Iterable[str], modules: frozenset[str]) -> dict[str, GatedSite]:
    """Sites by prefix. `quantized` are the modules that hold NVFP4 weights, `modules` all that hold any tensor.

    An up projection with no gate anywhere belongs to an MLP that is not gated; a gate_proj with no up projection is a
    site all the same, which cannot be loaded. A lone w1 says nothing.
    """
    names: dict[str, tuple[str, str | None]] = {}
    for module in quantized:
        base, _, leaf = module.rpartition(".")
        gate = _GATES.get(leaf, leaf)
        if leaf == _FUSED:
            names[base] = (_FUSED, None)
        elif gate in _PAIRS and f"{base}.{gate}" in modules and (gate != "w1" or f"{base}.w3" in modules):
            names.setdefault(base, (gate, _PAIRS[gate]))
    sites: dict[str, GatedSite] = {}
    stacks: dict[str, dict[int, tuple[str, str | None]]] = {}
    for base, pair in names.items():
        expert = _EXPERT.fullmatch(base)
        if expert is None:
            sites[base] = GatedSite(base, *pair)
        else:
            stacks.setdefault(expert["stack"], {})[int(expert["index"])] = pair
    for stack, experts in stacks.items():
        indices = tuple(sorted(experts))
        sites[stack] = GatedSite(stack, *experts[indices[0]], indices)
    return sites
