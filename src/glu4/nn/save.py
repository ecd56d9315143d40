"""Write a converted model as an NVFP4 checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from glu4.nn.experts import GatedExperts, NVFP4ExpertsLinear
from glu4.nn.modules import GatedMLP, NVFP4Linear
from glu4.nvfp4 import NVFP4Tensor

__all__ = ["save"]


def save(model: Any, directory: str | Path, format: Literal["compressed-tensors", "modelopt"]) -> Path:
    """Write a Hugging Face model that holds NVFP4 modules of glu4; `load` reads it back. Returns the directory.

    Gate and up are written as gate_proj and up_proj, also where the model fused them: a fused matrix has one global scale.
    Codes and block scales are kept bit for bit; ModelOpt keeps global scales too, a compressed-tensors divisor may move
    them by one unit in the last place. Experts are written one by one, as `...experts.<index>.gate_proj` and so on, for Mixtral
    too. The tokenizer is not written. Raises ValueError for a model without NVFP4 modules,
    and as `glu4.checkpoint.write_checkpoint` does.
    """
    from glu4.checkpoint import write_checkpoint

    quantized: dict[str, tuple[NVFP4Tensor, Tensor | None]] = {}
    biases: dict[str, Tensor | None] = {}
    plain_down: dict[str, Tensor] = {}
    own: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, GatedMLP):
            w = module.weights
            quantized |= {f"{name}.gate_proj": (w.gate, w.input_scale), f"{name}.up_proj": (w.up, w.input_scale)}
            biases |= {f"{name}.gate_proj.bias": w.gate_bias, f"{name}.up_proj.bias": w.up_bias}
            own |= {f"{name}.{key}" for key in module.state_dict() if not key.startswith("down_proj.")}
        elif isinstance(module, GatedExperts):
            _add_experts(name, module, quantized, plain_down)
            own |= {f"{name}.{key}" for key in module.state_dict()}
        elif isinstance(module, NVFP4Linear):
            quantized[name] = (module.matrix, module.input_scale)
            biases[f"{name}.bias"] = module.bias
            own |= {f"{name}.{key}" for key in module.state_dict()}
    if not quantized:
        raise ValueError("model: holds no GatedMLP, GatedExperts or NVFP4Linear; convert it with glu4.nn.convert first")
    tied = set(getattr(model, "all_tied_weights_keys", {}))  # their values are written under another name
    plain = {name: t for name, t in model.state_dict().items() if name not in own and name not in tied}
    plain |= plain_down | {name: t for name, t in biases.items() if t is not None}
    path = write_checkpoint(directory, format, quantized, plain, model.config.to_dict())
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(path)
    return path


def _add_experts(
    name: str, experts: GatedExperts, quantized: dict[str, tuple[NVFP4Tensor, Tensor | None]], plain: dict[str, Tensor]
) -> None:
    """Gate, up and down of every expert by a name of its own."""
    weights, down = experts.weights, experts.down_proj

    def scale(input_scale: Tensor | None, e: int) -> Tensor | None:
        return input_scale[e] if input_scale is not None and input_scale.ndim else input_scale

    for e in range(experts.num_experts):
        prefix = f"{name}.{e}"
        quantized[f"{prefix}.gate_proj"] = weights.gate[e], scale(weights.input_scale, e)
        quantized[f"{prefix}.up_proj"] = weights.up[e], scale(weights.input_scale, e)
        if isinstance(down, NVFP4ExpertsLinear):
            quantized[f"{prefix}.down_proj"] = down.matrix[e], scale(down.input_scale, e)
        else:
            plain[f"{prefix}.down_proj.weight"] = down.get_parameter("weight").detach()[e]
