"""Replace the gated MLPs and stacks of experts, and on request every linear layer, of a Hugging Face model in place.

A module counts as a gated MLP by its parts: gate_proj, up_proj and down_proj, or a fused gate_up_proj (gate rows first) and
down_proj, all of them torch.nn.Linear. It counts as a stack of experts by parameters gate_up_proj `[E, 2N, K]` and down_proj
`[E, K, N]`, as transformers has them since its release 5 (experts in a ModuleList are gated MLPs, one by one). Its own forward
is then run on a few random tokens and must do what its replacement does: models exist that have the same parts and multiply,
clamp or normalise in between, or fuse the rows the other way round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from glu4.activation import Activation
from glu4.errors import UnsupportedError
from glu4.nn.experts import ExpertsLinear, GatedExperts, NVFP4ExpertsLinear
from glu4.nn.modules import GatedMLP, Mode, NVFP4Linear, check_mode
from glu4.nn.probe import Skip, check_experts, check_mlp
from glu4.nvfp4 import BLOCK, Method, NVFP4Tensor, _unchecked, quantize
from glu4.weights import GatedWeights

if TYPE_CHECKING:
    from glu4.checkpoint import Checkpoint

__all__ = ["ConversionReport", "convert", "stored_name"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class ConversionReport:
    """What `convert` did, by module name: gated MLPs, linear layers and stacks of experts replaced, and why others were not."""

    mlps: list[str] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        done = f"{len(self.mlps)} gated MLPs and {len(self.linears)} linear layers"
        stacks = f"{len(self.experts)} stacks of experts, " if self.experts else ""
        return f"{stacks}{done} replaced, {len(self.skipped)} skipped"


def convert(
    model: nn.Module,
    *,
    mode: Mode = "w4a16",
    checkpoint: Checkpoint | str | Path | None = None,
    linears: Literal[False, "all"] = False,
    method: Method = "nearest",
) -> ConversionReport:
    """Replace the gated MLPs of `model` by GatedMLP and its stacks of experts by GatedExperts, in place, one at a time.

    mode        "w4a16" or "w4a4"; `set_mode` switches later
    checkpoint  None: quantise the model's own weights by `method`. Or an NVFP4 checkpoint, opened or its path, whose
                gate and up are used instead; MLPs that are not NVFP4 there are skipped
    linears     "all": also replace every other torch.nn.Linear but the output head, down projections included, those of experts
                too; with a checkpoint, those that are NVFP4 there. Without, down projections stay as they are
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
    made: dict[int, GatedMLP | GatedExperts] = {}
    for name, module in _candidates(model):
        stack = isinstance(module, GatedExperts) or _is_stack(module)
        try:
            if id(module) not in made and stack:
                made[id(module)] = _gated_experts(name, module, activation, mode, source, tied, linears == "all")
            elif id(module) not in made:
                made[id(module)] = _gated_mlp(name, module, activation, mode, source, tied)
        except Skip as reason:
            report.skipped[name] = str(reason)
        else:
            model.set_submodule(name, made[id(module)])
            (report.experts if stack else report.mlps).append(name)
    if linears == "all":
        _replace_linears(model, mode, source, tied, report)
    _check_something_done(model, report)
    return report


def stored_name(name: str, stored: Collection[str]) -> str | None:
    """What a checkpoint calls a module or tensor of a model: Mixtral's files keep the block's first name; None for unknown."""
    return next((n for n in (name, name.replace(".mlp.", ".block_sparse_moe.")) if n in stored), None)


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
    if report.mlps or report.linears or report.experts:
        return
    if any(isinstance(m, (GatedMLP, GatedExperts)) for m in model.modules()):
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
    return ((name, m) for name, m in named if isinstance(m, (GatedMLP, GatedExperts)) or _is_candidate(m))


def _is_stack(module: nn.Module) -> bool:
    """Whether `module` holds parameters gate_up_proj and down_proj of three dimensions."""
    parts = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(p, Tensor) and p.ndim == 3 for p in parts)


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
        raise Skip(f"{name} is {type(linear).__name__}, not torch.nn.Linear")
    if id(linear.weight) in tied:
        raise Skip(f"{name}.weight is tied to another module")
    return linear


def _check_k(name: str, k: int) -> None:
    if k % BLOCK:
        raise Skip(f"{name} has K = {k}, which is not a multiple of {BLOCK}")


def _gated_mlp(name: str, module: nn.Module, activation: Activation, mode: Mode, source: _Source, tied: set[int]) -> GatedMLP:
    if isinstance(module, GatedMLP):
        raise Skip("already a glu4.nn.GatedMLP")
    names = ["gate_up_proj"] if hasattr(module, "gate_up_proj") else ["gate_proj", "up_proj"]
    parts = [_linear_of(module, part, tied) for part in names]
    down = module.down_proj
    if not isinstance(down, nn.Module):
        raise Skip(f"down_proj is {type(down).__name__}, not a module")
    _check_k(names[0], parts[0].in_features)
    check_mlp(module, names, (sum(p.out_features for p in parts) // 2, parts[0].in_features), activation)
    weights = source.gated(name, parts)
    made = GatedMLP(weights, down, activation=activation, mode=mode)
    made.training = module.training
    return made


def _gated_experts(
    name: str, module: nn.Module, activation: Activation, mode: Mode, source: _Source, tied: set[int], down_too: bool
) -> GatedExperts:
    if isinstance(module, GatedExperts):
        raise Skip("already a glu4.nn.GatedExperts")
    gate_up, down = module.gate_up_proj, module.down_proj
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    e, rows, k = gate_up.shape
    if rows % 2 or tuple(down.shape) != (e, k, rows // 2):
        raise Skip(f"gate_up_proj {list(gate_up.shape)} and down_proj {list(down.shape)} are not [E, 2N, K] and [E, K, N]")
    for part, parameter in (("gate_up_proj", gate_up), ("down_proj", down)):
        if id(parameter) in tied:
            raise Skip(f"{part} is tied to another module")
    _check_k("gate_up_proj", k)
    check_experts(module, activation)
    weights, down_proj = source.experts(name, gate_up, down, mode, down_too)
    made = GatedExperts(weights, down_proj, activation=activation, mode=mode)
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
                raise Skip("the output head stays as it is")
            if id(module) not in made:
                parent, _, last = name.rpartition(".")
                linear = _linear_of(model.get_submodule(parent), last, tied)
                _check_k(name, linear.in_features)
                made[id(module)] = source.linear(name, linear, mode)
                made[id(module)].training = module.training
        except Skip as reason:
            report.skipped[name] = str(reason)
        else:
            model.set_submodule(name, made[id(module)])
            report.linears.append(name)


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
            raise Skip(f"{name} is {weight.dtype}; float16, bfloat16 or float32 can be quantised")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity, which NVFP4 cannot represent; repair the model first")
        return quantize(weight.detach(), method=self.method)

    def gated(self, name: str, parts: list[nn.Linear]) -> GatedWeights:
        """Gate and up of the MLP `name`, held by two linears or by one fused one."""
        if self.checkpoint is not None:
            return self._stored(name, parts)
        # a fused matrix holds gate's rows first; `check_mlp` has made sure of it
        fused = len(parts) == 1
        gate, up = parts[0].weight.detach().chunk(2) if fused else (p.weight.detach() for p in parts)
        biases: tuple[Tensor | None, ...] = tuple(p.bias for p in parts)
        gate_bias, up_bias = biases if not fused else (None, None) if biases[0] is None else biases[0].detach().chunk(2)
        what = (f"gate of {name}", f"up of {name}")
        return GatedWeights(self._quantized(what[0], gate), self._quantized(what[1], up), None, gate_bias, up_bias)

    def _stored(self, name: str, parts: list[nn.Linear]) -> GatedWeights:
        assert self.checkpoint is not None
        if not {f"{name}.gate_proj", f"{name}.gate_up_proj"} & self.layers:
            raise Skip("the checkpoint holds no NVFP4 gate and up of this name")
        weights = self.checkpoint.load_gated(name)
        shape = [sum(p.out_features for p in parts) // 2, parts[0].in_features]
        if list(weights.shape) != shape:
            raise ValueError(f"checkpoint: gate of {name} is {list(weights.shape)}, the model's is {shape}")
        has_bias = weights.gate_bias is not None or weights.up_bias is not None
        if has_bias != (parts[0].bias is not None):
            raise ValueError(f"checkpoint: {name} has {'a' if has_bias else 'no'} gate or up bias, unlike the model's")
        device = parts[0].weight.device
        return weights if device.type == "meta" else weights.to(device)

    def experts(
        self, name: str, gate_up: Tensor, down: Tensor, mode: Mode, down_too: bool
    ) -> tuple[GatedWeights, ExpertsLinear | NVFP4ExpertsLinear]:
        """Gate and up, and the down projection, of a stack of experts."""
        if self.checkpoint is not None:
            return self._stored_experts(name, gate_up, down, mode)
        n = gate_up.shape[1] // 2
        gate, up = (
            self._quantized_stack(f"{what} of {name}", w) for what, w in (("gate", gate_up[:, :n]), ("up", gate_up[:, n:]))
        )
        if not down_too:
            return GatedWeights(gate, up), ExpertsLinear(down.detach())
        _check_k("down_proj", n)
        matrix = self._quantized_stack(f"{name}.down_proj", down)
        return GatedWeights(gate, up), NVFP4ExpertsLinear(matrix, mode=mode)

    def _quantized_stack(self, name: str, weight: Tensor) -> NVFP4Tensor:
        """Each expert on its own, so that no copy of the whole is made on the way."""
        parts: list[Tensor] = []
        for e in range(weight.shape[0]):
            one = self._quantized(f"expert {e}'s {name}", weight[e])
            if e == 0:
                parts = [p.new_empty((weight.shape[0], *p.shape)) for p in (one.codes, one.block_scale, one.global_scale)]
            for part, value in zip(parts, (one.codes, one.block_scale, one.global_scale)):
                part[e] = value
        return _unchecked(*parts)

    def _stored_experts(
        self, name: str, gate_up: Tensor, down: Tensor, mode: Mode
    ) -> tuple[GatedWeights, ExpertsLinear | NVFP4ExpertsLinear]:
        assert self.checkpoint is not None
        prefix = stored_name(name, self.checkpoint.gated_mlps())
        if prefix is None or self.checkpoint.gated_site(prefix).experts is None:
            raise Skip("the checkpoint holds no NVFP4 experts of this name")
        e, rows, k = gate_up.shape
        weights = self.checkpoint.load_gated(prefix)
        if list(weights.shape) != [e, rows // 2, k]:
            raise ValueError(f"checkpoint: gate of {name} is {list(weights.shape)}, the model's is {[e, rows // 2, k]}")
        if weights.gate_bias is not None or weights.up_bias is not None:
            raise ValueError(f"checkpoint: {name} has a gate or up bias, unlike the model's")
        matrix, input_scale = self.checkpoint.load_down(prefix)
        if list(matrix.shape) != list(down.shape):
            raise ValueError(f"checkpoint: down of {name} is {list(matrix.shape)}, the model's is {list(down.shape)}")
        if not gate_up.is_meta:
            weights = weights.to(gate_up.device)
        if isinstance(matrix, NVFP4Tensor):
            made = NVFP4ExpertsLinear(matrix, input_scale=input_scale, mode=mode)
            return weights, made if down.is_meta else made.to(down.device)
        return weights, ExpertsLinear(matrix.to(down.dtype if down.is_meta else down))

    def linear(self, name: str, linear: nn.Linear, mode: Mode) -> NVFP4Linear:
        """The counterpart of one linear layer."""
        if self.checkpoint is None:
            return NVFP4Linear(self._quantized(f"{name}.weight", linear.weight), linear.bias, mode=mode)
        if name not in self.layers:
            raise Skip("not NVFP4 in the checkpoint")
        matrix, input_scale = self.checkpoint.load_matrix(name)
        shape = [linear.out_features, linear.in_features]
        if list(matrix.shape) != shape:
            raise ValueError(f"checkpoint: {name} is {list(matrix.shape)}, the model's is {shape}")
        bias: Tensor | None = linear.bias
        if bias is not None and f"{name}.bias" in self.checkpoint.plain_names():
            bias = self.checkpoint.load_plain(f"{name}.bias")
        made = NVFP4Linear(matrix, bias, input_scale=input_scale, mode=mode)
        return made if linear.weight.is_meta else made.to(linear.weight.device)
