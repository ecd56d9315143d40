"""Writing both formats: what is read back is what was written, within the one rounding that a divisor costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoint.directories import FORMATS, GATE, UP
from glu4 import NVFP4Tensor
from glu4.checkpoint import open_checkpoint, write_checkpoint
from operands import full_range

both = pytest.mark.parametrize("format", FORMATS)


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance in units of the last place of positive float32 numbers."""
    return (a.view(torch.int32) - b.view(torch.int32)).abs()


def test_a_divisor_costs_one_ulp_and_below_sqrt_two_nothing() -> None:
    """The writer's docstring, for every significand: x in [1, 2) covers all, as scaling by powers of two is exact."""
    worst = 0
    for start in range(0, 2**23, 2**21):
        x = torch.arange(start, start + 2**21, dtype=torch.int32).add(0x3F800000).view(torch.float32)
        distance = ulps(1.0 / (1.0 / x), x)
        assert not distance[x < 2**0.5].any()
        worst = max(worst, int(distance.max()))
    assert worst == 1


@both
def test_round_trip(tmp_path: Path, format: str) -> None:
    generator = torch.Generator().manual_seed(7)
    quantized: dict[str, tuple[NVFP4Tensor, torch.Tensor | None]] = {}
    for i in range(40):
        t = full_range(i, 8, 32)
        # global and input scales over the whole range that quantize makes
        g, s = torch.exp2(torch.rand(2, generator=generator) * 230 - 115)
        name = f"model.layers.{i // 2}.mlp.{('gate_proj', 'up_proj')[i % 2]}"
        quantized[name] = (NVFP4Tensor(t.codes, t.block_scale, g), s)
    plain = {"lm_head.weight": torch.randn(8, 16).to(torch.bfloat16), f"{GATE}.bias": torch.randn(8)}
    write_checkpoint(tmp_path / "out", format, quantized, plain, {"model_type": "llama"}, max_shard_bytes=2000)
    allowed = 1 if format == "compressed-tensors" else 0
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.format == format
        assert sorted(checkpoint.layers()) == sorted(quantized)
        assert checkpoint.config["model_type"] == "llama"
        for name, (matrix, scale) in quantized.items():
            back, back_scale = checkpoint.load_matrix(name)
            assert torch.equal(back.codes, matrix.codes)
            assert torch.equal(back.block_scale.view(torch.uint8), matrix.block_scale.view(torch.uint8))
            assert back_scale is not None
            assert scale is not None
            assert ulps(back.global_scale, matrix.global_scale) <= allowed
            assert ulps(back_scale, scale) <= allowed
            # one ulp of the global scale is at most 2^-23 of every value
            bound = matrix.dequantize(torch.float64).abs() * 2.0**-23 * allowed
            assert bool(((back.dequantize(torch.float64) - matrix.dequantize(torch.float64)).abs() <= bound).all())
        for name, tensor in plain.items():
            assert torch.equal(checkpoint.load_plain(name), tensor)
        assert checkpoint.oddities == ()
        assert torch.equal(checkpoint.load_gated("model.layers.0.mlp").gate_bias, plain[f"{GATE}.bias"])


@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
def test_the_documented_converter(tmp_path: Path, activations: str) -> None:
    """ModelOpt to compressed-tensors and back, as the docstring of writer.py shows; the second crossing is exact."""
    scale = torch.tensor(0.3) if activations == "static" else None
    quantized = {name: (full_range(i, 8, 32), scale) for i, name in enumerate((GATE, UP))}
    norm = {"model.norm.weight": torch.randn(8)}
    write_checkpoint(tmp_path / "0", "modelopt", quantized, norm, {"model_type": "llama"}, activations=activations)
    for step, format in enumerate(("compressed-tensors", "modelopt", "compressed-tensors")):
        with open_checkpoint(tmp_path / str(step)) as checkpoint:
            layers = {name: checkpoint.load_matrix(name) for name in checkpoint.layers()}
            plain = {name: checkpoint.load_plain(name) for name in checkpoint.plain_names()}
            kind = checkpoint.scheme_of(next(iter(layers))).activations
            assert kind == activations
            write_checkpoint(tmp_path / str(step + 1), format, layers, plain, checkpoint.config, activations=kind)
    first, second = load_file(tmp_path / "1" / "model.safetensors"), load_file(tmp_path / "3" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


@both
@pytest.mark.parametrize(
    ("activations", "scale"), [("static", 0.5), ("dynamic", None), ("none", None), (None, 0.5), (None, None)]
)
def test_activations(tmp_path: Path, format: str, activations: str | None, scale: float | None) -> None:
    quantized = {GATE: (full_range(1, 8, 32), None if scale is None else torch.tensor(scale))}
    write_checkpoint(tmp_path / "out", format, quantized, {}, {}, activations=activations)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        expected = activations or ("none" if scale is None else "static")
        assert checkpoint.scheme_of(GATE).activations == expected
        assert (checkpoint.load_matrix(GATE)[1] is not None) == (expected == "static")


@both
def test_names_and_divisors_on_disk(tmp_path: Path, format: str) -> None:
    """What other readers rely on, spelled out."""
    t = full_range(1, 8, 32)
    quantized = {GATE: (NVFP4Tensor(t.codes, t.block_scale, torch.tensor(0.25)), torch.tensor(4.0))}
    write_checkpoint(tmp_path / "out", format, quantized, {"lm_head.weight": torch.randn(4, 8)}, {"quantization_config": 1})
    held = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert held.pop("lm_head.weight").shape == (4, 8)
    kinds = {name.removeprefix(f"{GATE}."): (str(v.dtype), list(v.shape)) for name, v in held.items()}
    packed, scale = ("torch.uint8", [8, 16]), ("torch.float8_e4m3fn", [8, 2])
    if format == "compressed-tensors":
        one = ("torch.float32", [1])
        assert kinds == {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": one, "input_global_scale": one}
        assert float(held[f"{GATE}.weight_global_scale"]) == 4.0
        assert float(held[f"{GATE}.input_global_scale"]) == 0.25
        assert config["quant_method"] == "compressed-tensors"
        assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local"
        assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    else:
        one = ("torch.float32", [])
        assert kinds == {"weight": packed, "weight_scale": scale, "weight_scale_2": one, "input_scale": one}
        assert float(held[f"{GATE}.weight_scale_2"]) == 0.25
        own = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
        assert own["producer"]["name"] == config["quant_method"] == "modelopt"
        assert own["quantization"]["quant_algo"] == config["quant_algo"] == "NVFP4"
        assert own["quantization"]["exclude_modules"] == ["lm_head"]


@both
@pytest.mark.parametrize("limit", [1, 300, 1000, 10**6])
def test_shards(tmp_path: Path, format: str, limit: int) -> None:
    quantized = {f"m.{i}": (full_range(i, 8, 32), None) for i in range(5)}
    write_checkpoint(tmp_path / "out", format, quantized, {}, {}, max_shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    for file in files:
        with safe_open(file, "pt") as f:
            tensors = [f.get_tensor(name) for name in f.keys()]  # noqa: SIM118
        assert sum(t.nbytes for t in tensors) <= limit or len(tensors) == 1
    if len(files) > 1:
        document = json.loads(index.read_text())
        assert set(document["weight_map"].values()) == {file.name for file in files}
        assert document["metadata"]["total_size"] == 5 * (8 * 16 + 8 * 2 + 4)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert len(checkpoint.layers()) == 5


@both
def test_swizzled_and_shared_memory(tmp_path: Path, format: str) -> None:
    t = full_range(1, 130, 48)
    shared = torch.randn(4, 4)
    plain = {"a.weight": shared, "b.weight": shared.t()}
    write_checkpoint(tmp_path / "out", format, {GATE: (t.to_swizzled(), None), UP: (t, None)}, plain, {})
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert torch.equal(checkpoint.load_matrix(GATE)[0].block_scale.view(torch.uint8), t.block_scale.view(torch.uint8))
        assert torch.equal(checkpoint.load_plain("b.weight"), shared.t())


def test_refused_input(tmp_path: Path) -> None:
    one = full_range(1, 8, 32)
    huge = NVFP4Tensor(one.codes, one.block_scale, torch.tensor(2.0**127))
    cases: list[tuple[dict[str, object], str]] = [
        ({"format": "gguf"}, 'format: expected "compressed-tensors" or "modelopt", got \'gguf\''),
        ({"activations": "local"}, 'activations: expected "static", "dynamic" or "none"'),
        ({"max_shard_bytes": 0}, "max_shard_bytes: expected a positive number"),
        (
            {"quantized": {GATE: (full_range(1, 2, 8, 32), None)}},
            r"expected a matrix \[N, K\], got \[2, 8, 32\]; name each expert",
        ),
        ({"quantized": {GATE: (huge, None)}}, "global scale of .*gate_proj: .* has no normal float32 reciprocal"),
        ({"quantized": {GATE: (one, torch.tensor(0.0))}}, "input scale of .*gate_proj: 0.0 has no normal float32 reciprocal"),
        ({"quantized": {GATE: (one, torch.tensor(float("nan")))}}, "input scale of .*: nan has no normal"),
        ({"quantized": {GATE: (one, torch.ones(3))}}, "input scale of .*: expected one float32 value"),
        ({"plain": {f"{GATE}.weight": torch.ones(2)}}, "is quantized, so only its bias may be given"),
        ({"plain": {f"{GATE}.input_scale": torch.ones(2)}}, "is quantized, so only its bias may be given"),
    ]
    good = {"format": "modelopt", "quantized": {GATE: (one, None)}, "plain": {}, "config": {}}
    for change, words in cases:
        with pytest.raises(ValueError, match=words):
            write_checkpoint(tmp_path / "out", **{**good, **change})  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
    write_checkpoint(tmp_path / "out", **good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="already holds safetensors files; give a new or empty directory"):
        write_checkpoint(tmp_path / "out", **good)  # type: ignore[arg-type]
