"""Build a Hugging Face model from an NVFP4 checkpoint directory: the skeleton without memory, then one tensor at a time."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glu4.errors import CheckpointError
from glu4.nn.convert import ConversionReport, convert, stored_name
from glu4.nn.modules import Mode, _ExactBuffers, check_mode

if TYPE_CHECKING:
    from glu4.checkpoint import Checkpoint

__all__ = ["load"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# scales for an FP8 key/value cache; the cache here keeps the model's dtype, so there is nothing to scale
_CACHE_SCALE = re.compile(r"\.(k_scale|v_scale|kv_scale)$")
_MLP_PARTS = ("gate_proj", "up_proj", "gate_up_proj")


def load(path: str | Path, *, mode: Mode = "w4a16", dtype: torch.dtype | None = None) -> Any:
    """The causal language model of an NVFP4 checkpoint directory, on the CPU, in eval mode, ready for generate().

    path   a directory with config.json and safetensors, compressed-tensors or ModelOpt
    mode   "w4a16" or "w4a4", for every NVFP4 layer; `set_mode` switches later
    dtype  of embeddings, norms and all that is not NVFP4: float16, bfloat16, float32; by default config.json's

    NVFP4 gate and up become GatedMLP, stacks of experts GatedExperts (read one expert at a time), every other NVFP4 layer
    NVFP4Linear. Raises CheckpointError for tensors that are
    missing, left over or of the wrong shape; ValueError for an unknown mode or dtype; UnsupportedError as `convert` does;
    ImportError without transformers and accelerate.
    """
    from glu4.checkpoint import open_checkpoint

    check_mode(mode)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype: expected float16, bfloat16 or float32, got {dtype}")
    if Path(path).is_file():
        raise CheckpointError(f"{path}: is a file; give the model's directory, which holds config.json too")
    checkpoint = open_checkpoint(path)
    model = _skeleton(Path(path), dtype)
    report = convert(model, mode=mode, checkpoint=checkpoint, linears="all")
    _fill(model, checkpoint, report)
    return model.eval()


def _skeleton(path: Path, dtype: torch.dtype | None) -> Any:
    """The model with its parameters on the meta device; buffers, such as rotary frequencies, are real."""
    try:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    except ImportError as error:
        raise ImportError('glu4.nn.load needs transformers and accelerate: pip install "glu4[hf]"') from error
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def _fill(model: Any, checkpoint: Checkpoint, report: ConversionReport) -> None:
    """Load what is not NVFP4, tie what is tied, and account for every tensor on both sides."""
    converted = set(report.linears) | {f"{name}.{part}" for name in report.mlps for part in _MLP_PARTS}
    of_experts = _expert_modules(checkpoint, report)
    used = {f"{name}.bias" for name in converted} | {f"{name}.weight" for name in of_experts}
    slots, files = _slots(model), set(checkpoint.plain_names())
    # by the model's names: Mixtral's files have others
    stored = {name: found for name in slots if (found := stored_name(name, files)) is not None}
    plain = (files - set(stored.values())) | stored.keys()
    for name in sorted(stored):
        _put(model, name, checkpoint.load_plain(stored[name]), slots[name])
    _check_tied(model, plain)
    model.tie_weights()
    empty = sorted(name for name, t in model.state_dict(keep_vars=True).items() if t.is_meta)
    if empty:
        raise CheckpointError(f"{checkpoint.path}: {len(empty)} tensors of the model are missing: {_some(empty)}")
    left = _unexpected(model, plain - slots.keys() - used)
    left += sorted(set(checkpoint.layers()) - converted - of_experts)
    if left:
        raise CheckpointError(
            f"{checkpoint.path}: {len(left)} tensors or NVFP4 layers have no place in {type(model).__name__}: {_some(left)}"
        )


def _expert_modules(checkpoint: Checkpoint, report: ConversionReport) -> set[str]:
    """The checkpoint's modules that became stacks: gate, up and down of every expert."""
    found = set()
    for name in report.experts:
        prefix = stored_name(name, checkpoint.gated_mlps())
        assert prefix is not None
        site = checkpoint.gated_site(prefix)
        for e in site.experts or ():
            found |= {part for part in (*site.modules(e), f"{prefix}.{e}.{site.down}") if part is not None}
    return found


def _slots(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, without those of the NVFP4 modules, which hold their values already."""
    own = {f"{prefix}.{name}" for prefix, m in model.named_modules() if isinstance(m, _ExactBuffers) for name in m._buffers}
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in own}


def _put(model: nn.Module, name: str, value: Tensor, slot: Tensor) -> None:
    if value.shape != slot.shape:
        raise CheckpointError(f"{name}: the checkpoint has shape {list(value.shape)}, the model needs {list(slot.shape)}")
    # an 8-bit float would need a scale that lies in another tensor
    if slot.is_floating_point() != value.is_floating_point() or (value.is_floating_point() and value.itemsize < 2):
        raise CheckpointError(f"{name}: the checkpoint has {value.dtype}, the model needs {slot.dtype}")
    value = value.to(slot.dtype)
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[last] = value


def _check_tied(model: Any, plain: set[str]) -> None:
    """Where a file holds both of two tied tensors they must agree: tying keeps only one."""
    state = model.state_dict()
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if name in plain and source in plain and not torch.equal(state[name], state[source]):
            raise CheckpointError(f"{name} and {source} differ, but config.json ties them (tie_word_embeddings)")


def _unexpected(model: Any, names: set[str]) -> list[str]:
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    names = {name for name in names if not any(p.search(name) for p in ignored)}
    scales = {name for name in names if _CACHE_SCALE.search(name)}
    if scales:
        warnings.warn(f"{len(scales)} key/value cache scales are not used: the cache keeps the model's dtype", stacklevel=4)
    return sorted(names - scales)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
