"""Checkpoint directories made by hand: names and configurations as the two formats define them, not as our writer does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from glu4 import NVFP4Tensor
from operands import full_range

FORMATS = ("compressed-tensors", "modelopt")
GATE, UP = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"


def ct_config(weights: dict[str, Any] | None = None, inputs: Any = "local", **top: Any) -> dict[str, Any]:
    """A config.json of compressed-tensors: `weights` overrides, `inputs` is "local", True, False, a dict or None."""
    base = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": False}
    activations = inputs if isinstance(inputs, dict) or inputs is None else {**base, "dynamic": inputs}
    group = {"targets": ["Linear"], "weights": {**base, **(weights or {})}, "input_activations": activations}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return {"model_type": "llama", "quantization_config": {**quantization, **top}}


def mo_config(quant_algo: str | None = "NVFP4", **quantization: Any) -> dict[str, Any]:
    """A hf_quant_config.json of ModelOpt."""
    body = {"quant_algo": quant_algo, "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    return {"producer": {"name": "modelopt", "version": "0.37.0"}, "quantization": {**body, **quantization}}


def parts(
    format: str, module: str, matrix: NVFP4Tensor, stored: float = 0.01, input_stored: float | None = 0.5
) -> dict[str, Tensor]:
    """The tensors of one module. `stored` and `input_stored` go into the file as they are: divisor or multiplier."""
    if format == "compressed-tensors":
        out = {"weight_packed": matrix.codes, "weight_scale": matrix.block_scale, "weight_global_scale": torch.tensor([stored])}
        if input_stored is not None:
            out["input_global_scale"] = torch.tensor([input_stored])
    else:
        out = {"weight": matrix.codes, "weight_scale": matrix.block_scale, "weight_scale_2": torch.tensor(stored)}
        if input_stored is not None:
            out["input_scale"] = torch.tensor(input_stored)
    return {f"{module}.{part}": tensor for part, tensor in out.items()}


def dense(format: str, n: int = 8, k: int = 32, seed: int = 1, **kwargs: Any) -> dict[str, Tensor]:
    """Gate and up of layer 0, full-range codes and scales."""
    gate = parts(format, GATE, full_range(seed, n, k), **kwargs)
    return {**gate, **parts(format, UP, full_range(seed + 1, n, k), **kwargs)}


def write(
    root: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any] | None = None,
    own: dict[str, Any] | None = None,
    shards: int = 0,
) -> Path:
    """Write a directory: one file, or `shards` files with an index."""
    root.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.clone().contiguous() for name, t in tensors.items()}
    if not shards:
        save_file(tensors, root / "model.safetensors")
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            held = {name: t for j, (name, t) in enumerate(tensors.items()) if j % shards == i}
            save_file(held, root / file)
            weight_map.update(dict.fromkeys(held, file))
        (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config is not None:
        (root / "config.json").write_text(json.dumps(config))
    if own is not None:
        (root / "hf_quant_config.json").write_text(json.dumps(own))
    return root


def standard(root: Path, format: str, tensors: dict[str, Tensor] | None = None, shards: int = 0) -> Path:
    """A directory with the usual static configuration of its format."""
    tensors = dense(format) if tensors is None else tensors
    if format == "compressed-tensors":
        return write(root, tensors, ct_config(), shards=shards)
    return write(root, tensors, {"model_type": "llama"}, mo_config(), shards=shards)
