"""Replace the gated MLPs, and on request every linear layer, of a Hugging Face llama-like model in place.

A module counts as a gated MLP by its parts: gate_proj, up_proj and down_proj, or a fused gate_up_proj (gate rows first) and
down_proj, all of them torch.nn.Linear. Its own forward is then run on a few random tokens and must do what a GatedMLP does:
models exist that have the same parts and multiply, clamp or normalise in between, or fuse the rows the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from glu4.activation import Activation
from glu4.errors import UnsupportedError
from glu4.nn.modules import GatedMLP, Mode, NVFP4Linear, check_mode
from glu4.nvfp4 import BLOCK, Method, NVFP4Tensor, quantize
from glu4.weights import GatedWeights

if TYPE_CHECKING:
    from glu4.checkpoint import Checkpoint

__all__ = ["ConversionReport", "convert"]

_PROBE_ROWS = 4
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class ConversionReport:
    """What `convert` did, by module name: gated MLPs and linear layers replaced, and why others were not."""

    mlps: list[str] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{len(self.mlps)} gated MLPs and {len(self.linears)} linear layers replaced, {len(self.skipped)} skipped"


class _Skip(Exception):
    """Why one module stays as it is."""


def convert(
    model: nn.Module,
    *,
    mode: Mode = "w4a16",
    checkpoint: Checkpoint | str | Path | None = None,
    linears: Literal[False, "all"] = False,
    method: Method = "nearest",
) -> ConversionReport:
    """Replace the gated MLPs of `model` by GatedMLP, in place, one at a time.

    mode        "w4a16" or "w4a4"; `set_mode` switches later
    checkpoint  None: quantise the model's own weights by `method`. Or an NVFP4 checkpoint, opened or its path, whose
                gate and up are used instead; MLPs that are not NVFP4 there are skipped
    linears     "all": also replace every other torch.nn.Linear but the output head, down projections included;
                with a checkpoint, those that are NVFP4 there
    method      "nearest" or "four_over_six", as for glu4.quantize

    The activation comes from model.config. Raises UnsupportedError when that is not SiLU-gated, naming it, or when no
    gated MLP could be replaced, saying why; ValueError for an unknown mode, or for weights on the meta device or not finite
    (modules before that one are replaced by then). Write the result with `glu4.nn.save`: what the model's own
    save_pretrained writes, from_pretrained reads back with random gate and up weights.
    """
    check_mode(mode)
    if linears not in (False, "all"):
        raise ValueError(f'linears: expected False or "all", got {linears!r}')
    source = _Source(method, _opened(checkpoint))
    activation = _activation(model)
    report = ConversionReport()
    tied = _tied_parameters(model)
    made: dict[int, GatedMLP] = {}
    for name, module in _candidates(model):
        try:
            if id(module) not in made:
                made[id(module)] = _gated_mlp(name, module, activation, mode, source, tied)
        except _Skip as reason:
            report.skipped[name] = str(reason)
        else:
            model.set_submodule(name, made[id(module)])
            report.mlps.append(name)
    if linears == "all":
        _replace_linears(model, mode, source, tied, report)
    _check_something_done(model, report)
    return report


def _opened(checkpoint: Checkpoint | str | Path | None) -> Checkpoint | None:
    if not isinstance(checkpoint, (str, Path)):
        return checkpoint
    from glu4.checkpoint import open_checkpoint

    return open_checkpoint(checkpoint)


def _activation(model: nn.Module) -> Activation:
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError("model: has no config to take the activation from; build glu4.nn.GatedMLP modules directly")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return Activation.from_config(text.to_dict() if hasattr(text, "to_dict") else dict(text))


def _check_something_done(model: nn.Module, report: ConversionReport) -> None:
    if report.mlps or report.linears or any(isinstance(m, GatedMLP) for m in model.modules()):
        return
    if not report.skipped:
        raise UnsupportedError(
            f"model: {type(model).__name__} has no gated MLP: no module holds gate_proj, up_proj and down_proj, "
            "or gate_up_proj and down_proj"
        )
    name, reason = next(iter(report.skipped.items()))
    raise UnsupportedError(f"model: no gated MLP could be replaced; {name}: {reason}")


# ---- finding them ----


def _is_candidate(module: nn.Module) -> bool:
    return hasattr(module, "down_proj") and (
        hasattr(module, "gate_up_proj") or (hasattr(module, "gate_proj") and hasattr(module, "up_proj"))
    )


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    named = list(model.named_modules(remove_duplicate=False))
    return ((name, m) for name, m in named if isinstance(m, GatedMLP) or _is_candidate(m))


def _tied_parameters(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds: quantising one holder would untie it from the others."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(module))
    return {key for key, modules in holders.items() if len(modules) > 1}


def _linear_of(module: nn.Module, name: str, tied: set[int]) -> nn.Linear:
    linear = getattr(module, name)
    if type(linear) is not nn.Linear:
        raise _Skip(f"{name} is {type(linear).__name__}, not torch.nn.Linear")
    if id(linear.weight) in tied:
        raise _Skip(f"{name}.weight is tied to another module")
    return linear


def _check_k(name: str, k: int) -> None:
    if k % BLOCK:
        raise _Skip(f"{name} has K = {k}, which is not a multiple of {BLOCK}")


def _gated_mlp(name: str, module: nn.Module, activation: Activation, mode: Mode, source: _Source, tied: set[int]) -> GatedMLP:
    if isinstance(module, GatedMLP):
        raise _Skip("already a glu4.nn.GatedMLP")
    names = ["gate_up_proj"] if hasattr(module, "gate_up_proj") else ["gate_proj", "up_proj"]
    parts = [_linear_of(module, part, tied) for part in names]
    down = module.down_proj
    if not isinstance(down, nn.Module):
        raise _Skip(f"down_proj is {type(down).__name__}, not a module")
    _check_k(names[0], parts[0].in_features)
    _check_forward(module, names, (sum(p.out_features for p in parts) // 2, parts[0].in_features), activation)
    weights = source.gated(name, parts)
    made = GatedMLP(weights, down, activation=activation, mode=mode)
    made.training = module.training
    return made


def _replace_linears(model: nn.Module, mode: Mode, source: _Source, tied: set[int], report: ConversionReport) -> None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    made: dict[int, NVFP4Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Linear):
            continue
        try:
            if module is head and source.checkpoint is None:
                raise _Skip("the output head stays as it is")
            if id(module) not in made:
                parent, _, last = name.rpartition(".")
                linear = _linear_of(model.get_submodule(parent), last, tied)
                _check_k(name, linear.in_features)
                made[id(module)] = source.linear(name, linear, mode)
                made[id(module)].training = module.training
        except _Skip as reason:
            report.skipped[name] = str(reason)
        else:
            model.set_submodule(name, made[id(module)])
            report.linears.append(name)


# ---- does its forward do what a GatedMLP does? ----


class _Stub(nn.Module):
    """Stands in for a linear layer: remembers its input and returns a given tensor."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.answer


def _check_forward(module: nn.Module, inputs: list[str], sizes: tuple[int, int], activation: Activation) -> None:
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
        raise _Skip(f"its forward cannot be run on random tokens: {type(error).__name__}: {error}") from error
    want = activation(gate.double(), up.double())
    plain = all(s.seen is not None and torch.equal(s.seen, x) for s in stubs)
    hidden = last.seen is not None and last.seen.shape == want.shape
    if hidden and last.seen is not None:
        hidden = bool(((last.seen.double() - want).abs() <= 8 * 2.0**-23 * want.abs()).all())
    if not (plain and hidden and isinstance(out, Tensor) and torch.equal(out, down)):
        dropout = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in module.modules())
        hint = "; its dropout is active: call model.eval() first" if dropout else ""
        raise _Skip(f"its forward is not down_proj({activation.name}(gate) * up){hint}")


# ---- where the values come from ----


class _Source:
    """Quantises a model's own weights, or reads them from a checkpoint."""

    def __init__(self, method: Method, checkpoint: Checkpoint | None) -> None:
        self.method = method
        self.checkpoint = checkpoint
        self.layers = set() if checkpoint is None else set(checkpoint.layers())

    def _quantized(self, name: str, weight: Tensor) -> NVFP4Tensor:
        if weight.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values: load it first, or pass checkpoint=")
        if weight.dtype not in _FLOATS:
            raise _Skip(f"{name} is {weight.dtype}; float16, bfloat16 or float32 can be quantised")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity, which NVFP4 cannot represent; repair the model first")
        return quantize(weight.detach(), method=self.method)

    def gated(self, name: str, parts: list[nn.Linear]) -> GatedWeights:
        """Gate and up of the MLP `name`, held by two linears or by one fused one."""
        if self.checkpoint is not None:
            return self._stored(name, parts)
        # a fused matrix holds gate's rows first; `_check_forward` has made sure of it
        fused = len(parts) == 1
        gate, up = parts[0].weight.detach().chunk(2) if fused else (p.weight.detach() for p in parts)
        biases: tuple[Tensor | None, ...] = tuple(p.bias for p in parts)
        gate_bias, up_bias = biases if not fused else (None, None) if biases[0] is None else biases[0].detach().chunk(2)
        what = (f"gate of {name}", f"up of {name}")
        return GatedWeights(self._quantized(what[0], gate), self._quantized(what[1], up), None, gate_bias, up_bias)

    def _stored(self, name: str, parts: list[nn.Linear]) -> GatedWeights:
        assert self.checkpoint is not None
        if not {f"{name}.gate_proj", f"{name}.gate_up_proj"} & self.layers:
            raise _Skip("the checkpoint holds no NVFP4 gate and up of this name")
        weights = self.checkpoint.load_gated(name)
        shape = [sum(p.out_features for p in parts) // 2, parts[0].in_features]
        if list(weights.shape) != shape:
            raise ValueError(f"checkpoint: gate of {name} is {list(weights.shape)}, the model's is {shape}")
        has_bias = weights.gate_bias is not None or weights.up_bias is not None
        if has_bias != (parts[0].bias is not None):
            raise ValueError(f"checkpoint: {name} has {'a' if has_bias else 'no'} gate or up bias, unlike the model's")
        device = parts[0].weight.device
        return weights if device.type == "meta" else weights.to(device)

    def linear(self, name: str, linear: nn.Linear, mode: Mode) -> NVFP4Linear:
        """The counterpart of one linear layer."""
        if self.checkpoint is None:
            return NVFP4Linear(self._quantized(f"{name}.weight", linear.weight), linear.bias, mode=mode)
        if name not in self.layers:
            raise _Skip("not NVFP4 in the checkpoint")
        matrix, input_scale = self.checkpoint.load_matrix(name)
        shape = [linear.out_features, linear.in_features]
        if list(matrix.shape) != shape:
            raise ValueError(f"checkpoint: {name} is {list(matrix.shape)}, the model's is {shape}")
        bias: Tensor | None = linear.bias
        if bias is not None and f"{name}.bias" in self.checkpoint.plain_names():
            bias = self.checkpoint.load_plain(f"{name}.bias")
        made = NVFP4Linear(matrix, bias, input_scale=input_scale, mode=mode)
        return made if linear.weight.is_meta else made.to(linear.weight.device)
