"""The gated activations: one formula, whose three constants make every variant in use.

    gate' = min(gate, limit)        up' = clamp(up, -limit, limit)
    out   = gate' * sigmoid(alpha * gate') * (up' + beta)

    silu           alpha 1      beta 0   no limit
    clamped silu   alpha 1      beta 0   limit L       (DeepSeek-V4 config `swiglu_limit`)
    swiglu-oai     alpha 1.702  beta 1   limit 7       (gpt-oss reference `swiglu`, MiniMax-M3)

`identity` is gate * up with no activation: it makes a wrong weight visible as itself, for exactness tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glu4.errors import UnsupportedError

__all__ = ["IDENTITY", "SILU", "Activation", "clamped_silu", "swiglu_oai"]

_KINDS = ("swish", "identity")
_SILU_NAMES = ("silu", "swish", "swiglu")
# models whose code applies swiglu-oai while their configuration says "silu" and gives at most the limit
_OAI_MODEL_TYPES = ("gpt_oss", "minimax_m3")
# names under which model configurations carry these constants; none may be dropped silently
_CONFIG_PARAMETERS = {
    "swiglu_limit": "limit",
    "swiglu_alpha": "alpha",
    "swiglu_beta": "beta",
    "hidden_act_alpha": "alpha",
    "hidden_act_beta": "beta",
    "hidden_act_limit": "limit",
}


@dataclass(frozen=True)
class Activation:
    """A gated activation; make one with `SILU`, `clamped_silu`, `swiglu_oai`, `IDENTITY` or `from_config`.

    Raises ValueError for a kind that is not "swish" or "identity", a limit that is not positive, constants that
    are NaN or infinite (an infinite limit means no clamp), or constants given to "identity".
    """

    kind: str = "swish"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {self.kind!r}")
        if not (math.isfinite(self.alpha) and math.isfinite(self.beta)):
            raise ValueError(f"alpha, beta: expected finite numbers, got {self.alpha}, {self.beta}")
        if not self.limit > 0:
            raise ValueError(f"limit: expected a positive number, got {self.limit}")
        if self.kind == "identity" and (self.alpha, self.beta, self.limit) != (1.0, 0.0, math.inf):
            raise ValueError("identity takes no alpha, beta or limit")

    @property
    def name(self) -> str:
        """The common name: silu, clamped_silu(limit), swiglu_oai(alpha, beta, limit) or identity."""
        if self.kind == "identity":
            return "identity"
        if (self.alpha, self.beta) == (1.0, 0.0):
            return "silu" if math.isinf(self.limit) else f"clamped_silu({self.limit:g})"
        return f"swiglu_oai({self.alpha:g}, {self.beta:g}, {self.limit:g})"

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply to two tensors of one shape, in their own dtype; NaN stays NaN."""
        if self.kind == "identity":
            return gate * up
        if not math.isinf(self.limit):
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
        if self.beta != 0.0:
            up = up + self.beta
        return gate * torch.sigmoid(self.alpha * gate if self.alpha != 1.0 else gate) * up

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Activation:
        """The activation that a Hugging Face model configuration asks for.

        Reads `hidden_act` (or `hidden_activation`) and every known constant; raises UnsupportedError for another
        activation and for any `swiglu_*` or `hidden_act_*` key it does not know, rather than dropping it.
        """
        act = config.get("hidden_act") or config.get("hidden_activation") or "silu"
        given: dict[str, float] = {}
        for key, value in config.items():
            if value is None or not key.startswith(("swiglu_", "hidden_act_")):
                continue
            if key not in _CONFIG_PARAMETERS:
                known = ", ".join(sorted(_CONFIG_PARAMETERS))
                raise UnsupportedError(f"activation parameter {key!r} = {value!r} is not known; known are {known}")
            given[_CONFIG_PARAMETERS[key]] = float(value)
        if act not in _SILU_NAMES:
            raise UnsupportedError(f"hidden_act {act!r} is not a SiLU-gated activation; accepted: {', '.join(_SILU_NAMES)}")
        if config.get("model_type") in _OAI_MODEL_TYPES:
            return swiglu_oai(**given)
        return cls("swish", **given)


SILU = Activation()
IDENTITY = Activation("identity")


def clamped_silu(limit: float) -> Activation:
    """SiLU with gate clamped above at `limit` and up clamped to +-limit."""
    if math.isinf(limit):
        raise ValueError("limit: expected a finite number; SILU is the activation without a clamp")
    return Activation(limit=limit)


def swiglu_oai(alpha: float = 1.702, beta: float = 1.0, limit: float = 7.0) -> Activation:
    """The activation of gpt-oss: clamped, sigmoid of alpha * gate, and beta added to up."""
    return Activation(alpha=alpha, beta=beta, limit=limit)
