"""Write NVFP4 checkpoints in either format: what the tests read back, and the second half of a converter.

    ckpt = open_checkpoint(source)
    quantized = {name: ckpt.load_matrix(name) for name in ckpt.layers()}
    plain = {name: ckpt.load_plain(name) for name in ckpt.plain_names()}
    activations = ckpt.scheme_of(next(iter(quantized))).activations
    write_checkpoint(target, "modelopt", quantized, plain, ckpt.config, activations=activations)

Codes and block scales are kept bit for bit. compressed-tensors stores the global scale as a divisor, which costs one
rounding: with x = m * 2^e, 1 <= m < 2, the divisor d = fl(1/x) is within 2^-25 * 2^-e of 1/x, so 1/d is within
m^2 * 2^-25 * 2^e of x. Below m = sqrt(2) that is less than half an ulp, and fl(1/d) = x; above it is less than one ulp, so
a reader gets x or a neighbour. (Where 1/x is subnormal, x > 2^126, the bound does not hold; such scales are refused.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from glu4.nvfp4 import BLOCK, NVFP4Tensor

__all__ = ["write_checkpoint"]

CheckpointFormat = Literal["compressed-tensors", "modelopt"]
Activations = Literal["static", "dynamic", "none"]
Quantized = Mapping[str, tuple[NVFP4Tensor, Tensor | None]]

_LARGEST_GLOBAL_SCALE = 2.0**126  # its reciprocal is the smallest normal float32


def write_checkpoint(
    directory: str | Path,
    format: CheckpointFormat,
    quantized: Quantized,
    plain: Mapping[str, Tensor],
    config: Mapping[str, Any],
    max_shard_bytes: int = 2**30,
    *,
    activations: Activations | None = None,
) -> Path:
    """Write a checkpoint directory and return its path.

    quantized        module name ("model.layers.0.mlp.gate_proj") -> (matrix [N, K], input scale multiplier or None)
    plain            tensor name ("model.norm.weight", "...gate_proj.bias") -> tensor, written as it is
    config           the model's own config.json; its quantization_config, if any, is replaced
    max_shard_bytes  a shard is closed before it would grow beyond this; a single larger tensor gets a shard of its own
    activations      "static" (W4A4 with stored input scales), "dynamic" (W4A4) or "none" (W4A16); by default "static"
                     when any input scale is given, else "none"

    Raises ValueError for an unknown format, names that collide, a stack of matrices, a global or input scale that has no
    float32 reciprocal, or a directory that already holds safetensors files; it writes nothing then.
    """
    if format not in ("compressed-tensors", "modelopt"):
        raise ValueError(f'format: expected "compressed-tensors" or "modelopt", got {format!r}')
    if activations not in (None, "static", "dynamic", "none"):
        raise ValueError(f'activations: expected "static", "dynamic" or "none", got {activations!r}')
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected a positive number of bytes, got {max_shard_bytes}")
    root = Path(directory)
    if root.is_dir() and any(root.glob("*.safetensors*")):
        raise ValueError(f"directory: {root} already holds safetensors files; give a new or empty directory")
    tensors = _tensors(format, quantized, plain)
    kind = activations or ("static" if any(scale is not None for _, scale in quantized.values()) else "none")
    root.mkdir(parents=True, exist_ok=True)
    _write_shards(root, tensors, max_shard_bytes)
    skipped = _unquantized_modules(plain)
    document = deepcopy(dict(config))
    if format == "compressed-tensors":
        document["quantization_config"] = _compressed_tensors_config(kind, skipped)
    else:
        document["quantization_config"], own = _modelopt_configs(kind, skipped)
        _write_json(root / "hf_quant_config.json", own)
    _write_json(root / "config.json", document)
    return root


# ---- tensors ----


def _tensors(format: CheckpointFormat, quantized: Quantized, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for module, (matrix, input_scale) in quantized.items():
        if matrix.ndim != 2:
            raise ValueError(f"quantized[{module!r}]: expected a matrix [N, K], got {list(matrix.shape)}; name each expert")
        matrix = matrix.to("cpu").to_linear()
        scale = None if input_scale is None else _scalar(f"input scale of {module}", input_scale)
        g = _scalar(f"global scale of {module}", matrix.global_scale)
        if format == "compressed-tensors":
            out[f"{module}.weight_packed"] = matrix.codes
            out[f"{module}.weight_global_scale"] = (1.0 / g).reshape(1)
            if scale is not None:
                out[f"{module}.input_global_scale"] = (1.0 / scale).reshape(1)
        else:
            out[f"{module}.weight"] = matrix.codes
            out[f"{module}.weight_scale_2"] = g
            if scale is not None:
                out[f"{module}.input_scale"] = scale
        out[f"{module}.weight_scale"] = matrix.block_scale
    for name, tensor in plain.items():
        owner = name.rpartition(".")[0]
        if name in out or (owner in quantized and name != f"{owner}.bias"):
            raise ValueError(f"plain[{name!r}]: module {owner} is quantized, so only its bias may be given as a plain tensor")
        out[name] = tensor
    # a copy each: safetensors refuses tensors that share memory, as views of one parameter do
    return {name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in out.items()}


def _scalar(what: str, value: Tensor) -> Tensor:
    if value.numel() != 1 or value.dtype != torch.float32:
        raise ValueError(f"{what}: expected one float32 value, got {value.dtype} of shape {list(value.shape)}")
    scalar = value.detach().to("cpu").reshape(())
    if not 0.0 < float(scalar) <= _LARGEST_GLOBAL_SCALE or not bool(torch.isfinite(1.0 / scalar)):
        raise ValueError(f"{what}: {float(scalar)} has no normal float32 reciprocal, so it cannot be stored as a divisor")
    return scalar


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _write_shards(root: Path, tensors: Mapping[str, Tensor], max_bytes: int) -> None:
    from safetensors.torch import save_file

    shards = list(_shards(tensors, max_bytes))
    if len(shards) == 1:
        save_file(shards[0], root / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, root / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for t in tensors.values())
    _write_json(root / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


# ---- configurations ----


def _unquantized_modules(plain: Mapping[str, Tensor]) -> list[str]:
    """Modules that hold a plain matrix: loaders skip these by name when they replace every Linear."""
    return sorted(name.removesuffix(".weight") for name, t in plain.items() if name.endswith(".weight") and t.ndim == 2)


def _compressed_tensors_config(activations: Activations, skipped: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": BLOCK,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    inputs = None if activations == "none" else {**weights, "dynamic": "local" if activations == "static" else True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": "nvfp4-pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": skipped,
        "kv_cache_scheme": None,
    }


def _modelopt_configs(activations: Activations, skipped: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(quantization_config of config.json, hf_quant_config.json)."""
    algorithm = "W4A16_NVFP4" if activations == "none" else "NVFP4"
    producer = {"name": "modelopt"}
    own = {
        "producer": producer,
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": None,
            "group_size": BLOCK,
            "exclude_modules": skipped,
        },
    }
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    group: dict[str, Any] = {"weights": weights, "targets": ["Linear"]}
    if activations != "none":
        group["input_activations"] = {**weights, "dynamic": activations == "dynamic"}
    mirror = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "producer": producer,
        "config_groups": {"group_0": group},
        "ignore": skipped,
    }
    return mirror, own
