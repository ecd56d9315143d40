"""load and save: NVFP4 checkpoint directories of whole models, in both formats, that generate text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glu4 import CheckpointError, UnsupportedError
from glu4.checkpoint import open_checkpoint, write_checkpoint
from glu4.nn import GatedMLP, NVFP4Linear, convert, load, save, set_mode
from glu4.nvfp4 import quantize

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
Make = Callable[..., Any]
FORMATS = ["modelopt", "compressed-tensors"]
FAMILIES = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}),
    ("Qwen2", {}),
    ("Qwen3", {}),
    ("Mistral", {}),
    ("Phi3", {}),
    ("Glm4", {}),
]


def _ids() -> Tensor:
    return torch.arange(3, 15)[None]


def _edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def stored(tiny_model: Make, tmp_path: Path) -> Path:
    model = tiny_model()
    convert(model, linears="all")
    return save(model, tmp_path / "stored", "modelopt")


# ---- round trips ----


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_saved_model_comes_back(tiny_model: Make, tmp_path: Path, family: str, settings: dict[str, Any], format: str) -> None:
    model = tiny_model(family, **settings)
    convert(model, linears="all")
    loaded = load(save(model, tmp_path / "m", format))
    kinds = [type(m) for m in loaded.modules()]
    assert kinds.count(GatedMLP) == 2
    assert kinds.count(NVFP4Linear) == sum(isinstance(m, NVFP4Linear) for m in model.modules()) > 0
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        if format == "compressed-tensors" and name.endswith("global_scale"):
            # the reciprocal of a reciprocal: the same value or a neighbour, see checkpoint.writer
            assert torch.nextafter(value, after[name]) == after[name], name
        else:
            assert torch.equal(value.float(), after[name].float()), name
    if format == "modelopt":
        assert torch.equal(loaded(_ids()).logits, model(_ids()).logits)
    out = loaded.generate(_ids(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (1, 17)
    assert not loaded.training


def test_w4a4_uses_stored_input_scales(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model()
    convert(model, linears="all")
    for i, m in enumerate(m for m in model.modules() if isinstance(m, (GatedMLP, NVFP4Linear))):
        m.input_scale = torch.tensor(0.001 * (i + 1))
    path = save(model, tmp_path / "m", "modelopt")
    loaded = load(path, mode="w4a4")
    for a, b in zip(model.modules(), loaded.modules(), strict=True):
        if isinstance(a, (GatedMLP, NVFP4Linear)):
            assert b.mode == "w4a4"
            assert torch.equal(a.input_scale, b.input_scale)
    set_mode(model, "w4a4")
    assert torch.equal(loaded(_ids()).logits, model(_ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_of_everything_that_is_not_nvfp4(stored: Path, dtype: torch.dtype) -> None:
    model = load(stored, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.model.layers[0].mlp.weights.gate.global_scale.dtype == torch.float32
    assert model(_ids()).logits.dtype == dtype


def test_layers_left_unquantised_stay_linear(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model()
    convert(model)
    want = model(_ids()).logits
    loaded = load(save(model, tmp_path / "m", "modelopt"))
    assert type(loaded.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert torch.equal(loaded(_ids()).logits, want)


def test_sharded_files(stored: Path, tmp_path: Path) -> None:
    source = open_checkpoint(stored)
    quantized = {name: source.load_matrix(name) for name in source.layers()}
    plain = {name: source.load_plain(name) for name in source.plain_names()}
    target = write_checkpoint(tmp_path / "sharded", "modelopt", quantized, plain, source.config, max_shard_bytes=20_000)
    assert len(list(target.glob("*.safetensors"))) > 2
    assert torch.equal(load(target)(_ids()).logits, load(stored)(_ids()).logits)


# ---- errors ----


def test_missing_and_left_over_tensors(stored: Path) -> None:
    _edit(stored, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"1 tensors of the model are missing: model\.norm\.weight"):
        load(stored)
    _edit(stored, lambda t: t.update({"model.norm.weight": torch.ones(64), "model.norm.scale": torch.ones(64)}))
    with pytest.raises(CheckpointError, match=r"have no place in LlamaForCausalLM: model\.norm\.scale"):
        load(stored)


def test_a_left_over_layer(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=3)
    convert(model, linears="all")
    path = save(model, tmp_path / "m", "modelopt")
    config = json.loads((path / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"have no place in LlamaForCausalLM: model\.layers\.2\."):
        load(path)


def test_wrong_shapes_and_dtypes(stored: Path) -> None:
    _edit(stored, lambda t: t.update({"model.norm.weight": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: the checkpoint has shape \[32\], the model needs \[64\]"):
        load(stored)
    _edit(stored, lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: the checkpoint has torch\.float8_e4m3fn"):
        load(stored)
    _edit(stored, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: the checkpoint has torch\.int64"):
        load(stored)


def test_tied_tensors_that_differ(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    convert(model, linears="all")
    path = save(model, tmp_path / "m", "modelopt")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    _edit(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = load(path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    _edit(path, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ, but config\.json ties"):
        load(path)


def test_cache_scales_are_named_and_not_used(stored: Path) -> None:
    _edit(stored, lambda t: t.update({"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.5)}))
    with pytest.warns(UserWarning, match="1 key/value cache scales are not used"):
        load(stored)


def test_a_stack_of_experts_that_the_model_has_no_place_for_is_refused(stored: Path, tmp_path: Path) -> None:
    source = open_checkpoint(stored)
    w = quantize(torch.randn(16, 64))
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj" for e in range(2) for p in ("gate", "up")]
    path = write_checkpoint(tmp_path / "moe", "modelopt", dict.fromkeys(names, (w, None)), {}, source.config)
    with pytest.raises(
        UnsupportedError, match=r"model\.layers\.0\.mlp: the checkpoint holds no NVFP4 gate and up of this name"
    ):
        load(path)


def test_bad_arguments(stored: Path, tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode: expected one of w4a16, w4a4, got 'w8a8'"):
        load(stored, mode="w8a8")
    with pytest.raises(ValueError, match=r"dtype: expected float16, bfloat16 or float32, got torch\.float64"):
        load(stored, dtype=torch.float64)
    with pytest.raises(CheckpointError, match="is a file; give the model's directory"):
        load(stored / "model.safetensors")
    with pytest.raises(ValueError, match="holds no GatedMLP, GatedExperts or NVFP4Linear"):
        save(tiny_model(), tmp_path / "none", "modelopt")
    assert not (tmp_path / "none").exists()
