"""Does a module's own forward do what the module in its place would do? Found out by running it on a few made-up tokens."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from glu4.activation import Activation

__all__ = ["Skip", "check_experts", "check_mlp"]

_PROBE_ROWS = 4
_PROBE_EXPERTS, _PROBE_SIZE = 3, 16


class Skip(Exception):
    """Why one module stays as it is."""


class _Stub(nn.Module):
    """Stands in for a linear layer: remembers its input and returns a given tensor."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.answer


def check_mlp(module: nn.Module, inputs: list[str], sizes: tuple[int, int], activation: Activation) -> None:
    """Skip a module whose forward is not down_proj(activation(gate(x), up(x))), by running it with stubs for its linears.

    Only a shallow copy is touched, and no weight is needed. Gate values reach from -30 to 100, beyond any clamp in use, and
    stay where sigmoid is a normal number: there float32 SiLU and product make at most eight errors of 2^-23 relative.
    """
    n, k = sizes
    draw = torch.Generator().manual_seed(0)
    x, down = torch.randn(_PROBE_ROWS, k, generator=draw), torch.randn(_PROBE_ROWS, k, generator=draw)
    gate = torch.rand(_PROBE_ROWS, n, generator=draw) * 130 - 30
    up = torch.rand(_PROBE_ROWS, n, generator=draw) * 200 - 100
    fused = len(inputs) == 1
    stubs = [_Stub(torch.cat((gate, up), -1))] if fused else [_Stub(gate), _Stub(up)]
    last = _Stub(down)
    clone = copy(module)
    clone._modules = {**module._modules, **dict(zip(inputs, stubs, strict=True)), "down_proj": last}
    try:
        with torch.no_grad():
            out = type(module).forward(clone, x)
    except Exception as error:
        raise Skip(f"its forward cannot be run on random tokens: {type(error).__name__}: {error}") from error
    want = activation(gate.double(), up.double())
    plain = all(s.seen is not None and torch.equal(s.seen, x) for s in stubs)
    hidden = last.seen is not None and last.seen.shape == want.shape
    if hidden and last.seen is not None:
        hidden = bool(((last.seen.double() - want).abs() <= 8 * 2.0**-23 * want.abs()).all())
    if not (plain and hidden and isinstance(out, Tensor) and torch.equal(out, down)):
        dropout = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in module.modules())
        hint = "; its dropout is active: call model.eval() first" if dropout else ""
        raise Skip(f"its forward is not down_proj({activation.name}(gate) * up){hint}")


def check_experts(module: nn.Module, activation: Activation) -> None:
    """Skip a stack of experts whose forward(x, ids, weights) is not the weighted sum, over each token's choices, of
    down_proj(activation(gate(x), up(x))), by running it with small parameters in place of its own.

    gate, up and down are diagonal powers of two, so that every product is exact but those of the activation and the router's
    weights: at most ten errors of 2^-23 relative in each of the two terms of a sum.
    """
    e, n = _PROBE_EXPERTS, _PROBE_SIZE
    draw = torch.Generator().manual_seed(0)
    powers = 2.0 ** torch.randint(-2, 3, (3, e, n), generator=draw)
    gate, up, down = (torch.diag_embed(p) for p in powers)
    clone = copy(module)
    clone._parameters = {"gate_up_proj": nn.Parameter(torch.cat((gate, up), 1)), "down_proj": nn.Parameter(down)}
    setattr(clone, "num_experts", e)  # noqa: B010
    for name in ("hidden_dim", "hidden_size", "intermediate_dim", "intermediate_size", "expert_dim"):
        if name in vars(clone):
            setattr(clone, name, n)
    config: Any = copy(getattr(module, "config", None))
    if config is not None:  # its own loop, not a kernel that wants a device or a type
        config._experts_implementation = "eager"
        clone.config = config
    x = torch.rand(_PROBE_ROWS, n, generator=draw) * 32.5 - 7.5  # gates from -30 to 100
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1]])
    router = torch.rand(_PROBE_ROWS, 2, generator=draw)
    try:
        with torch.no_grad():
            out = type(module).forward(clone, x, ids, router)
    except Exception as error:
        raise Skip(f"its forward cannot be run on random tokens: {type(error).__name__}: {error}") from error
    wide = x.double().unsqueeze(1) * powers.double()[:, ids]
    terms = activation(wide[0], wide[1]) * powers[2].double()[ids] * router.double().unsqueeze(-1)
    close = isinstance(out, Tensor) and out.shape == x.shape
    if not (close and bool(((out.double() - terms.sum(1)).abs() <= 10 * 2.0**-23 * terms.abs().sum(1)).all())):
        raise Skip(f"its forward is not the weighted sum of its experts' down_proj({activation.name}(gate) * up)")
