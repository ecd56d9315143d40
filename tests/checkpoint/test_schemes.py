"""Schemes that change the arithmetic: computed where that is exact, refused by name where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.directories import FORMATS, GATE, UP, ct_config, dense, mo_config, parts, standard, write
from glu4.checkpoint import load_gated_weights, open_checkpoint
from glu4.errors import CheckpointError, UnsupportedError
from operands import full_range

both = pytest.mark.parametrize("format", FORMATS)
MLP = "model.layers.0.mlp"


def refused(path: Path, words: str) -> None:
    """Every way to the weights is closed by an UnsupportedError that says `words`; the scheme says so too."""
    with open_checkpoint(path) as checkpoint:
        assert not checkpoint.scheme_of(GATE).supported
        for load in (checkpoint.load_matrix, checkpoint.load_gated):
            with pytest.raises(UnsupportedError, match=words):
                load(GATE if load == checkpoint.load_matrix else MLP)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"group_size": 32}, "scheme MXFP4 is not supported: group_size 32"),
        ({"group_size": 128}, "FP4 group 128"),
        ({"num_bits": 8}, "scheme FLOAT8"),
        ({"type": "int"}, "scheme INT4"),
        ({"strategy": "group"}, "strategy group; NVFP4 is tensor_group"),
        ({"symmetric": False}, "zero points"),
        ({"actorder": "group"}, "actorder group permutes"),
        ({"scale_dtype": "torch.uint8"}, "block scales are float8_e4m3fn"),
    ],
)
def test_compressed_tensors_weight_arguments(tmp_path: Path, weights: dict[str, Any], words: str) -> None:
    write(tmp_path, dense("compressed-tensors"), ct_config(weights))
    refused(tmp_path, words)


@pytest.mark.parametrize("format", ["mxfp4-pack-quantized", "float-quantized", "pack-quantized", "naive-quantized"])
def test_compressed_tensors_formats(tmp_path: Path, format: str) -> None:
    write(tmp_path, dense("compressed-tensors"), ct_config(format=format))
    refused(tmp_path, f"format {format}; glu4 reads nvfp4-pack-quantized")


def test_compressed_tensors_activations(tmp_path: Path) -> None:
    write(tmp_path / "w4a8", dense("compressed-tensors"), ct_config(inputs={"num_bits": 8, "type": "float", "dynamic": True}))
    refused(tmp_path / "w4a8", "scheme W4A8 is not supported")
    config = ct_config()
    config["quantization_config"]["config_groups"]["group_0"]["output_activations"] = {"num_bits": 8}
    write(tmp_path / "outputs", dense("compressed-tensors"), config)
    refused(tmp_path / "outputs", "quantised outputs")


def test_transforms(tmp_path: Path) -> None:
    transforms = {"config_groups": {"R4": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
    write(tmp_path / "yes", dense("compressed-tensors"), ct_config(transform_config=transforms))
    refused(tmp_path / "yes", "with transforms is not supported: .*Hadamard")
    for name, empty in (("null", None), ("object", {}), ("groups", {"config_groups": {}})):
        write(tmp_path / name, dense("compressed-tensors"), ct_config(transform_config=empty))
        load_gated_weights(tmp_path / name, MLP)


def test_sparsity(tmp_path: Path) -> None:
    write(tmp_path / "yes", dense("compressed-tensors"), ct_config(sparsity_config={"format": "sparse-24-bitmask"}))
    refused(tmp_path / "yes", "sparse-24-bitmask")
    write(tmp_path / "no", dense("compressed-tensors"), ct_config(sparsity_config={"format": "dense"}))
    load_gated_weights(tmp_path / "no", MLP)


def test_groups_apply_by_name_then_pattern_then_class(tmp_path: Path) -> None:
    config = ct_config()
    groups = config["quantization_config"]["config_groups"]
    fp4, fp8 = groups.pop("group_0"), {"weights": {"num_bits": 8, "type": "float"}, "format": "float-quantized"}
    groups |= {"a": {**fp8, "targets": ["Linear"]}, "b": {**fp8, "targets": ["re:.*gate_proj$"]}}
    groups |= {"c": {**fp4, "targets": ["re:.*up_proj$"]}, "d": {**fp4, "targets": [GATE]}}
    config["quantization_config"]["format"] = "mixed-precision"
    for group in ("c", "d"):
        groups[group]["format"] = "nvfp4-pack-quantized"
    write(tmp_path / "named", dense("compressed-tensors"), config)
    load_gated_weights(tmp_path / "named", MLP)
    groups.pop("d")
    write(tmp_path / "unnamed", dense("compressed-tensors"), config)
    with pytest.raises(UnsupportedError, match="gate_proj: scheme FP8"):
        load_gated_weights(tmp_path / "unnamed", MLP)
    groups.pop("b")
    groups["a"]["targets"] = ["re:.*attn.*"]
    write(tmp_path / "untargeted", dense("compressed-tensors"), config)
    with pytest.raises(UnsupportedError, match=r"gate_proj: scheme unknown .* no config group targets it"):
        load_gated_weights(tmp_path / "untargeted", MLP)


def test_preset_groups(tmp_path: Path) -> None:
    config = ct_config()
    config["quantization_config"]["config_groups"] = {"NVFP4A16": ["Linear"]}
    write(tmp_path / "known", dense("compressed-tensors", input_stored=None), config)
    with open_checkpoint(tmp_path / "known") as checkpoint:
        checkpoint.load_gated(MLP)
        assert checkpoint.scheme_of(GATE).activations == "none"
    config["quantization_config"]["config_groups"] = {"W8A8": ["Linear"]}
    write(tmp_path / "other", dense("compressed-tensors"), config)
    refused(tmp_path / "other", "scheme W8A8")


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4", "NVFP4_AWQ"])
def test_modelopt_supported(tmp_path: Path, algorithm: str) -> None:
    write(tmp_path, dense("modelopt"), {}, mo_config(algorithm))
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.load_gated(MLP)
        assert checkpoint.scheme_of(UP).name == algorithm


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("NVFP4_SVD", "scheme NVFP4_SVD is not supported: adds a low-rank"),
        ("W4A8_NVFP4_FP8", "scheme W4A8_NVFP4_FP8 is not supported: quantises activations to FP8"),
        ("FP8", "scheme FP8 is not supported: glu4 reads NVFP4, W4A16_NVFP4 and NVFP4_AWQ"),
        ("NVFP5", "scheme NVFP5"),
    ],
)
@pytest.mark.parametrize("where", ["own", "mirror"])
def test_modelopt_refused(tmp_path: Path, algorithm: str, words: str, where: str) -> None:
    mirror = {"quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm}}
    write(tmp_path, dense("modelopt"), mirror if where == "mirror" else {}, mo_config(algorithm) if where == "own" else None)
    refused(tmp_path, words)


def test_modelopt_group_size(tmp_path: Path) -> None:
    write(tmp_path, dense("modelopt"), {}, mo_config(group_size=32))
    refused(tmp_path, "scheme NVFP4 group 32")


def test_mixed_precision(tmp_path: Path) -> None:
    layers = {GATE: {"quant_algo": "NVFP4", "group_size": 16}, UP: {"quant_algo": "NVFP4", "group_size": 16}}
    layers |= {"model.layers.1.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16}, "lm_head": {"quant_algo": "FP8"}}
    experts = {}
    for leaf in ("gate_proj", "up_proj"):
        experts |= parts("modelopt", f"model.layers.1.mlp.experts.0.{leaf}", full_range(3, 8, 32))
        experts |= parts("modelopt", f"model.layers.2.mlp.{leaf}", full_range(4, 8, 32))
    fp8 = {"lm_head.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn), "lm_head.weight_scale": torch.ones(())}
    write(tmp_path, dense("modelopt") | experts | fp8, {}, mo_config("MIXED_PRECISION", quantized_layers=layers))
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.load_gated(MLP)
        checkpoint.load_gated("model.layers.1.mlp")
        assert checkpoint.scheme_of("lm_head").name == "FP8"
        assert "lm_head" not in checkpoint.layers()
        with pytest.raises(CheckpointError, match="no NVFP4 matrix at 'lm_head', which is FP8"):
            checkpoint.load_matrix("lm_head")
        with pytest.raises(UnsupportedError, match=r"layers.2.*MIXED_PRECISION.*quantized_layers does not list it"):
            checkpoint.load_gated("model.layers.2.mlp")


@both
def test_pre_quant_scale(tmp_path: Path, format: str) -> None:
    ones = {f"{m}.pre_quant_scale": torch.ones(32, dtype=torch.bfloat16) for m in (GATE, UP)}
    load_gated_weights(standard(tmp_path / "ones", format, dense(format) | ones), MLP)
    ones[f"{GATE}.pre_quant_scale"][7] = 1.5
    refused(
        standard(tmp_path / "other", format, dense(format) | ones),
        "with pre_quant_scale is not supported: it scales every input channel",
    )


@both
@pytest.mark.parametrize(
    ("extra", "tensor"),
    [
        ("pre_quant_scale", torch.ones(32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
        ("weight_g_idx", torch.arange(32)),
        ("weight_zero_point", torch.ones(8, 2)),
        ("weight_quantizer._svdquant_lora_a", torch.zeros(4, 32)),
        ("lora_A.weight", torch.zeros(4, 32)),
        ("output_scale", torch.ones(())),
        ("weight_scale_inv", torch.ones(8, 2)),
    ],
)
def test_companions_that_change_the_result(tmp_path: Path, format: str, extra: str, tensor: torch.Tensor) -> None:
    refused(standard(tmp_path, format, dense(format) | {f"{GATE}.{extra}": tensor}), rf"with {extra} is not supported")


@both
def test_harmless_companions(tmp_path: Path, format: str) -> None:
    attention = "model.layers.0.self_attn.k_proj"
    more = {f"{GATE}.weight_shape": torch.tensor([8, 32]), f"{GATE}.weight_zero_point": torch.zeros(8, 2)}
    more |= parts(format, attention, full_range(3, 8, 32)) | {
        f"{attention}.k_scale": torch.ones(()),
        f"{attention}.output_scale": torch.ones(()),
    }
    with open_checkpoint(standard(tmp_path / "known", format, dense(format) | more)) as checkpoint:
        checkpoint.load_gated(MLP)
        checkpoint.load_matrix(attention)
        assert checkpoint.oddities == ()
    with open_checkpoint(
        standard(tmp_path / "unknown", format, dense(format) | {f"{UP}.colour": torch.ones(())})
    ) as checkpoint:
        checkpoint.load_gated(MLP)
        assert [str(o) for o in checkpoint.oddities] == [f"{UP}: tensor colour is not understood and not used"]


def test_excluded_but_quantised_is_told(tmp_path: Path) -> None:
    """A glob meant for a router, mlp.gate*, catches gate_proj too: the tensors decide."""
    write(tmp_path / "mo", dense("modelopt"), {}, mo_config(exclude_modules=["lm_head", "model.layers.0.mlp.gate*"]))
    write(tmp_path / "ct", dense("compressed-tensors"), ct_config(ignore=["re:.*mlp.gate"]))
    for name, pattern in (("mo", "model.layers.0.mlp.gate*"), ("ct", "re:.*mlp.gate")):
        with open_checkpoint(tmp_path / name) as checkpoint:
            checkpoint.load_gated(MLP)
            assert [str(o) for o in checkpoint.oddities] == [
                f"{GATE}: the configuration excludes it ({pattern}), but it holds NVFP4 tensors; read as NVFP4"
            ]


@both
def test_excluded_and_unquantised_is_plain(tmp_path: Path, format: str) -> None:
    head = torch.randn(4, 8)
    with open_checkpoint(standard(tmp_path, format, dense(format) | {"lm_head.weight": head})) as checkpoint:
        assert checkpoint.scheme_of("lm_head").name == "unquantized"
        assert torch.equal(checkpoint.load_plain("lm_head.weight"), head)
        assert checkpoint.oddities == ()


@both
def test_gate_quantised_and_up_not(tmp_path: Path, format: str) -> None:
    tensors = parts(format, GATE, full_range(1, 8, 32)) | {f"{UP}.weight": torch.randn(8, 32)}
    with pytest.raises(CheckpointError, match=r"no NVFP4 matrix at 'model.layers.0.mlp.up_proj', which is unquantized"):
        load_gated_weights(standard(tmp_path, format, tensors), MLP)


# ---- nothing here to read ----


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(())}, "quantised as FP8"),
        (
            {"a.weight_packed": torch.zeros(4, 8, dtype=torch.int32), "a.weight_scale": torch.ones(4, 1)},
            "quantised as I32 weights with F32 scales",
        ),
        (
            {"a.weight_packed": torch.zeros(4, 16, dtype=torch.uint8), "a.weight_scale": torch.zeros(4, 1, dtype=torch.uint8)},
            "quantised as MXFP4",
        ),
        (
            {
                "m.experts.gate_up_proj_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8),
                "m.experts.gate_up_proj_scales": torch.zeros(2, 4, 1, dtype=torch.uint8),
            },
            r"quantised as MXFP4 \(blocks of 32\)",
        ),
    ],
)
def test_other_schemes_only(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        open_checkpoint(write(tmp_path, tensors))


def test_no_nvfp4_layer(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds no NVFP4 layer .its weights are not quantised.; give an NVFP4 checkpoint"
    ):
        open_checkpoint(write(tmp_path / "plain", {"a.weight": torch.randn(4, 4)}))
    with pytest.raises(CheckpointError, match="its quant_method is awq"):
        open_checkpoint(
            write(tmp_path / "awq", {"a.qweight": torch.zeros(4)}, {"quantization_config": {"quant_method": "awq"}})
        )
