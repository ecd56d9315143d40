"""Reading whole checkpoints: names, global scales, input scales, experts, and what is read from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint.directories import FORMATS, GATE, UP, ct_config, dense, mo_config, parts, standard, write
from glu4 import NVFP4Tensor
from glu4.checkpoint import load_gated_weights, open_checkpoint
from glu4.checkpoint.files import TensorFiles
from glu4.errors import CheckpointError, UnsupportedError
from operands import full_range

both = pytest.mark.parametrize("format", FORMATS)


def same(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.block_scale.view(torch.uint8), b.block_scale.view(torch.uint8))


def stacked(
    format: str, experts: int, names: tuple[str, str] = ("gate_proj", "up_proj"), **kwargs: float
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for e in range(experts):
        for i, name in enumerate(names):
            stored = 100.0 + 10 * e + i
            module = f"model.layers.3.mlp.experts.{e}.{name}"
            tensors |= parts(format, module, full_range(100 * e + i, 8, 32), stored, **kwargs)
    return tensors


# ---- values ----


@both
@pytest.mark.parametrize("shards", [0, 3])
def test_dense_values(tmp_path: Path, format: str, shards: int) -> None:
    gate, up = full_range(5, 8, 48), full_range(6, 8, 48)
    tensors = parts(format, GATE, gate, stored=3.0) | parts(format, UP, up, stored=700.0, input_stored=6.0)
    with open_checkpoint(standard(tmp_path, format, tensors, shards)) as checkpoint:
        assert checkpoint.format == format
        assert sorted(checkpoint.layers()) == [GATE, UP]
        assert checkpoint.gated_mlps() == ["model.layers.0.mlp"]
        weights = checkpoint.load_gated("model.layers.0.mlp")
    assert same(weights.gate, gate)
    assert same(weights.up, up)
    # the definition: codes * block scale / divisor, or * multiplier, in exact arithmetic
    decoded = gate.decode(torch.float64)
    expected = decoded / 3.0 if format == "compressed-tensors" else decoded * 3.0
    torch.testing.assert_close(weights.gate.dequantize(torch.float64), expected, rtol=2**-24, atol=0)
    want = torch.tensor(1 / 700.0 if format == "compressed-tensors" else 700.0)
    assert torch.equal(weights.up.global_scale, want)


@both
def test_gate_and_up_keep_their_own_global_scale(tmp_path: Path, format: str) -> None:
    tensors = parts(format, GATE, full_range(1, 8, 32), 2.0) | parts(format, UP, full_range(2, 8, 32), 16.0)
    weights = load_gated_weights(standard(tmp_path, format, tensors), "model.layers.0.mlp")
    ratio = float(weights.gate.global_scale / weights.up.global_scale)
    assert ratio == (8.0 if format == "compressed-tensors" else 0.125)


@both
def test_a_single_file_without_configuration(tmp_path: Path, format: str) -> None:
    write(tmp_path, dense(format))
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert checkpoint.format == format
        assert checkpoint.load_gated("model.layers.0.mlp").input_scale is not None
        assert any("no quantization configuration" in o.text for o in checkpoint.oddities)


@both
def test_float4_storage(tmp_path: Path, format: str) -> None:
    gate = full_range(1, 8, 32)
    tensors = dense(format)
    codes = f"{GATE}.weight_packed" if format == "compressed-tensors" else f"{GATE}.weight"
    tensors[codes] = tensors[codes].view(torch.float4_e2m1fn_x2)
    assert same(open_checkpoint(standard(tmp_path, format, tensors)).load_matrix(GATE)[0], gate)


@both
def test_nibble_order_and_scale_sign(tmp_path: Path, format: str) -> None:
    true = full_range(1, 8, 32)
    swapped = (true.codes << 4) | (true.codes >> 4)
    flipped = NVFP4Tensor.from_packed(swapped, true.block_scale, true.global_scale)
    tensors = parts(format, GATE, flipped) | parts(format, UP, flipped)
    scale = tensors[f"{GATE}.weight_scale"].view(torch.uint8)
    tensors[f"{GATE}.weight_scale"] = (scale | 0x80).view(torch.float8_e4m3fn)
    path = standard(tmp_path, format, tensors)
    with pytest.raises(CheckpointError, match=r"gate_proj.*sign bit set.*scale_sign"):
        open_checkpoint(path).load_matrix(GATE)
    strip = open_checkpoint(path, nibble_order="high_first", scale_sign="strip").load_matrix(GATE)[0]
    assert same(strip, true)
    with pytest.raises(ValueError, match=r"^nibble_order: expected one of low_first, high_first, got 'big'"):
        open_checkpoint(path, nibble_order="big")
    with pytest.raises(ValueError, match=r"^scale_sign: expected one of reject, strip, fold, got 'drop'"):
        open_checkpoint(path, scale_sign="drop")
    fold = load_gated_weights(path, "model.layers.0.mlp", nibble_order="high_first", scale_sign="fold").gate
    assert torch.equal(fold.decode(), -true.decode())


@both
def test_loaded_tensors_outlive_the_checkpoint(tmp_path: Path, format: str) -> None:
    checkpoint = open_checkpoint(standard(tmp_path, format))
    matrix, _ = checkpoint.load_matrix(GATE)
    checkpoint.close()
    assert same(matrix, full_range(1, 8, 32))
    with pytest.raises(ValueError, match=r"this checkpoint is closed; open it again$"):
        checkpoint.load_matrix(UP)


# ---- names ----


@both
def test_w1_is_gate_and_w3_is_up(tmp_path: Path, format: str) -> None:
    gate, up, down = full_range(1, 8, 32), full_range(2, 8, 32), full_range(3, 32, 16)
    base = "model.layers.0.feed_forward"
    tensors = parts(format, f"{base}.w1", gate) | parts(format, f"{base}.w3", up) | parts(format, f"{base}.w2", down)
    weights = load_gated_weights(standard(tmp_path, format, tensors), base)
    assert same(weights.gate, gate)
    assert same(weights.up, up)


@both
def test_fused_rows_are_gate_then_up(tmp_path: Path, format: str) -> None:
    fused, bias = full_range(1, 12, 32), torch.randn(12)
    module = "model.layers.0.mlp.gate_up_proj"
    tensors = parts(format, module, fused, 4.0) | {f"{module}.bias": bias}
    with open_checkpoint(standard(tmp_path, format, tensors)) as checkpoint:
        assert checkpoint.gated_mlps() == ["model.layers.0.mlp"]
        weights = checkpoint.load_gated("model.layers.0.mlp")
    assert same(weights.gate, fused.narrow_rows(0, 6))
    assert same(weights.up, fused.narrow_rows(6, 6))
    assert torch.equal(weights.gate.global_scale, weights.up.global_scale)
    assert weights.gate_bias is not None
    assert weights.up_bias is not None
    assert torch.equal(torch.cat((weights.gate_bias, weights.up_bias)), bias)


@both
def test_a_bias_of_one_projection_only(tmp_path: Path, format: str) -> None:
    bias = torch.randn(8).to(torch.bfloat16)
    weights = load_gated_weights(standard(tmp_path, format, dense(format) | {f"{UP}.bias": bias}), "model.layers.0.mlp")
    assert weights.gate_bias is None
    assert weights.up_bias is not None
    assert torch.equal(weights.up_bias, bias)


def test_gpt_oss_row_order_is_refused(tmp_path: Path) -> None:
    tensors = parts("modelopt", "m.gate_up_proj", full_range(1, 12, 32))
    write(tmp_path, tensors, {"model_type": "gpt_oss"}, mo_config())
    with pytest.raises(UnsupportedError, match="interleaves gate and up rows"):
        load_gated_weights(tmp_path, "m")


@both
def test_an_mlp_without_gate_is_none(tmp_path: Path, format: str) -> None:
    with open_checkpoint(standard(tmp_path, format, parts(format, UP, full_range(1, 8, 32)))) as checkpoint:
        assert checkpoint.gated_mlps() == []
        with pytest.raises(CheckpointError, match=r"no NVFP4 gated MLP at 'model.layers.0.mlp'; the checkpoint holds none"):
            checkpoint.load_gated("model.layers.0.mlp")


@both
def test_plain_tensors(tmp_path: Path, format: str) -> None:
    norm = torch.randn(8)
    with open_checkpoint(standard(tmp_path, format, dense(format) | {"model.norm.weight": norm})) as checkpoint:
        assert checkpoint.plain_names() == ["model.norm.weight"]
        assert torch.equal(checkpoint.load_plain("model.norm.weight"), norm)
        assert checkpoint.scheme_of("model.norm").name == "unquantized"
        with pytest.raises(CheckpointError, match=r"part of an NVFP4 matrix; load_matrix\('model"):
            checkpoint.load_plain(f"{GATE}.weight_scale")
        with pytest.raises(CheckpointError, match=r"no tensor model.nothing"):
            checkpoint.load_plain("model.nothing")
        with pytest.raises(CheckpointError, match=r"no NVFP4 matrix at 'model.norm', which is unquantized"):
            checkpoint.load_matrix("model.norm")
        with pytest.raises(CheckpointError, match=r"no tensor belongs to a module 'model.nothing'"):
            checkpoint.scheme_of("model.nothing")


# ---- experts ----


@both
@pytest.mark.parametrize("names", [("gate_proj", "up_proj"), ("w1", "w3")])
def test_expert_stacks(tmp_path: Path, format: str, names: tuple[str, str]) -> None:
    path = standard(tmp_path, format, stacked(format, 11, names), shards=2)  # eleven: names sort as 0, 1, 10, 2
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.gated_mlps() == ["model.layers.3.mlp.experts"]
        weights = checkpoint.load_gated("model.layers.3.mlp")
        some = checkpoint.load_gated("model.layers.3.mlp.experts", experts=[10, 2])
        one = checkpoint.load_gated("model.layers.3.mlp.experts.10")
    assert list(weights.shape) == [11, 8, 32]
    for e in range(11):
        assert same(weights.gate[e], full_range(100 * e, 8, 32))
        assert same(weights.up[e], full_range(100 * e + 1, 8, 32))
        stored = torch.tensor(100.0 + 10 * e)
        assert torch.equal(weights.gate.global_scale[e], 1 / stored if format == "compressed-tensors" else stored)
    assert same(some.gate[0], weights.gate[10])
    assert same(some.up[1], weights.up[2])
    assert one.gate.ndim == 2
    assert same(one.gate, weights.gate[10])


@both
def test_one_shard_of_experts_reads_nothing_else(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(standard(tmp_path, format, stacked(format, 4)))
    seen: list[str] = []
    load = TensorFiles.load
    monkeypatch.setattr(TensorFiles, "load", lambda self, name: seen.append(name) or load(self, name))
    checkpoint.load_gated("model.layers.3.mlp", experts=range(2, 4))
    assert {name.split(".")[5] for name in seen} == {"2", "3"}
    assert len(seen) == len(set(seen)) == 2 * 2 * 4


@both
def test_expert_biases(tmp_path: Path, format: str) -> None:
    tensors = stacked(format, 2)
    biases = {f"model.layers.3.mlp.experts.{e}.gate_proj.bias": torch.randn(8) for e in range(2)}
    weights = load_gated_weights(standard(tmp_path / "all", format, tensors | biases), "model.layers.3.mlp")
    assert weights.gate_bias is not None
    assert torch.equal(weights.gate_bias, torch.stack(list(biases.values())))
    biases.pop("model.layers.3.mlp.experts.1.gate_proj.bias")
    with pytest.raises(CheckpointError, match="only 1 of 2 experts have a gate bias"):
        load_gated_weights(standard(tmp_path / "some", format, tensors | biases), "model.layers.3.mlp")


@both
def test_missing_experts(tmp_path: Path, format: str) -> None:
    tensors = {name: t for name, t in stacked(format, 5).items() if ".experts.2." not in name}
    with open_checkpoint(standard(tmp_path / "gap", format, tensors)) as checkpoint:
        with pytest.raises(CheckpointError, match=r"lacks experts 2 \(it holds 0-1, 3-4\)"):
            checkpoint.load_gated("model.layers.3.mlp")
        assert checkpoint.load_gated("model.layers.3.mlp", experts=[0, 1, 3, 4]).shape[0] == 4
        with pytest.raises(CheckpointError, match=r"experts 2, 7-8 are not there; it holds 0-1, 3-4"):
            checkpoint.load_gated("model.layers.3.mlp", experts=[1, 2, 7, 8])
        with pytest.raises(CheckpointError, match="no expert is asked for"):
            checkpoint.load_gated("model.layers.3.mlp", experts=[])
    own = mo_config() if format == "modelopt" else None
    config = {"num_local_experts": 8} | (ct_config() if format == "compressed-tensors" else {})
    write(tmp_path / "end", stacked(format, 5), config, own)
    with pytest.raises(CheckpointError, match="lacks experts 5-7"):
        load_gated_weights(tmp_path / "end", "model.layers.3.mlp")


@both
def test_experts_of_a_dense_mlp(tmp_path: Path, format: str) -> None:
    with pytest.raises(ValueError, match=r"experts: model.layers.0.mlp is a dense MLP"):
        load_gated_weights(standard(tmp_path, format), "model.layers.0.mlp", experts=[0])


# ---- input scales ----


@both
def test_the_larger_input_scale_serves_both(tmp_path: Path, format: str) -> None:
    tensors = parts(format, GATE, full_range(1, 8, 32), input_stored=2.0) | parts(
        format, UP, full_range(2, 8, 32), input_stored=8.0
    )
    with open_checkpoint(standard(tmp_path, format, tensors)) as checkpoint:
        weights = checkpoint.load_gated("model.layers.0.mlp")
        assert any("the larger serves both" in o.text for o in checkpoint.oddities)
        assert checkpoint.load_matrix(UP)[1] == (0.125 if format == "compressed-tensors" else 8.0)
    assert weights.input_scale is not None
    assert float(weights.input_scale) == (0.5 if format == "compressed-tensors" else 8.0)


@both
def test_one_input_scale_of_two_serves_both(tmp_path: Path, format: str) -> None:
    tensors = parts(format, GATE, full_range(1, 8, 32), input_stored=None) | parts(
        format, UP, full_range(2, 8, 32), input_stored=4.0
    )
    with open_checkpoint(standard(tmp_path, format, tensors)) as checkpoint:
        weights = checkpoint.load_gated("model.layers.0.mlp")
        assert any("it serves both" in o.text for o in checkpoint.oddities)
        assert any("missing although the configuration says static" in o.text for o in checkpoint.oddities)
    assert weights.input_scale is not None
    assert float(weights.input_scale) == (0.25 if format == "compressed-tensors" else 4.0)


@both
@pytest.mark.parametrize("stored", [None, 0.0, float("inf"), float("nan"), -1.0])
def test_a_stack_with_one_unusable_input_scale_is_dynamic(tmp_path: Path, format: str, stored: float | None) -> None:
    tensors = stacked(format, 3, input_stored=4.0)
    name = "input_global_scale" if format == "compressed-tensors" else "input_scale"
    for leaf in ("gate_proj", "up_proj"):
        key = f"model.layers.3.mlp.experts.1.{leaf}.{name}"
        if stored is None:
            tensors.pop(key)
        else:
            tensors[key] = torch.full_like(tensors[key], stored)
    with open_checkpoint(standard(tmp_path, format, tensors)) as checkpoint:
        weights = checkpoint.load_gated("model.layers.3.mlp")
        assert weights.input_scale is None
        assert any("experts 1 have no usable input scale; the whole stack" in o.text for o in checkpoint.oddities)
        others = checkpoint.load_gated("model.layers.3.mlp", experts=[0, 2])
    assert others.input_scale is not None
    assert others.input_scale.tolist() == [0.25 if format == "compressed-tensors" else 4.0] * 2


@pytest.mark.parametrize(("inputs", "kept"), [("local", True), (False, True), (True, False), (None, False)])
def test_compressed_tensors_activation_modes(tmp_path: Path, inputs: object, kept: bool) -> None:
    write(tmp_path, dense("compressed-tensors", input_stored=4.0), ct_config(inputs=inputs))
    with open_checkpoint(tmp_path) as checkpoint:
        weights = checkpoint.load_gated("model.layers.0.mlp")
        expected = "static" if kept else "none" if inputs is None else "dynamic"
        assert checkpoint.scheme_of(GATE).activations == expected
        assert (len(checkpoint.oddities) == 0) == kept
    assert (weights.input_scale is not None) == kept


def test_modelopt_dynamic_and_weight_only(tmp_path: Path) -> None:
    for name, own, expected in (
        ("dynamic", mo_config(activation_scheme="dynamic"), "dynamic"),
        ("w4a16", mo_config("W4A16_NVFP4"), "none"),
        ("lower case", mo_config("nvfp4"), "static"),
    ):
        write(tmp_path / name, dense("modelopt", input_stored=0.5 if expected == "static" else None), {}, own)
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert checkpoint.scheme_of(UP).activations == expected
            assert (checkpoint.load_gated("model.layers.0.mlp").input_scale is None) == (expected != "static")
            assert checkpoint.oddities == ()


# ---- global scales that are no numbers ----


@pytest.mark.parametrize("stored", [float("nan"), float("inf"), float("-inf")])
def test_uncalibrated_divisor_of_a_zero_matrix_reads_as_one(tmp_path: Path, stored: float) -> None:
    zero = NVFP4Tensor(torch.full((8, 16), 0x80, dtype=torch.uint8), full_range(1, 8, 32).block_scale, torch.ones(()))
    tensors = parts("compressed-tensors", GATE, zero, stored) | parts("compressed-tensors", UP, full_range(2, 8, 32))
    with open_checkpoint(standard(tmp_path, "compressed-tensors", tensors)) as checkpoint:
        matrix, _ = checkpoint.load_matrix(GATE)
        assert float(matrix.global_scale) == 1.0
        assert any("on an all-zero matrix; read as 1.0" in o.text for o in checkpoint.oddities)


@both
@pytest.mark.parametrize("stored", [float("nan"), float("inf"), 0.0, -2.0])
def test_bad_global_scale_of_a_real_matrix(tmp_path: Path, format: str, stored: float) -> None:
    tensors = parts(format, GATE, full_range(1, 8, 32), stored) | parts(format, UP, full_range(2, 8, 32))
    with pytest.raises(CheckpointError, match=r"model.safetensors, tensor .*gate_proj.*expected a positive finite"):
        load_gated_weights(standard(tmp_path, format, tensors), "model.layers.0.mlp")


def test_a_bad_divisor_of_a_matrix_of_a_wrong_dtype(tmp_path: Path) -> None:
    tensors = parts("compressed-tensors", GATE, full_range(1, 8, 32), float("inf")) | {f"{GATE}.weight_packed": torch.zeros(())}
    with pytest.raises(CheckpointError, match=r"tensor .*gate_proj.weight_global_scale: expected a positive finite divisor"):
        open_checkpoint(standard(tmp_path, "compressed-tensors", tensors)).load_matrix(GATE)
