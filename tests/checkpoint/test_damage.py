"""Damaged, incomplete and contradictory files: one clear error each, naming the file or tensor and the remedy."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.directories import FORMATS, GATE, UP, ct_config, dense, mo_config, parts, standard, write
from glu4.checkpoint import load_gated_weights, open_checkpoint
from glu4.errors import CheckpointError
from operands import full_range

both = pytest.mark.parametrize("format", FORMATS)
MLP = "model.layers.0.mlp"


def raw_file(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


# ---- paths ----


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"nothing: no such file or directory; give a .safetensors file or a model directory"
    ):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds no .safetensors file; give the directory"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"expected a .safetensors file; .txt is not read here"):
        open_checkpoint(tmp_path / "model.txt")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"GGUF files such as model.gguf are another format"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "was unpickled",))

    torch.save({"w": Trap()}, tmp_path / name)
    with pytest.raises(
        CheckpointError, match=rf"only pickles such as {name}; a pickle can run code.*convert it to safetensors"
    ):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"a pickle can run code.*convert it to safetensors"):
        open_checkpoint(tmp_path / name)
    assert not (tmp_path / "was unpickled").exists()


# ---- safetensors ----

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = [
    ("huge length", {"a": ONE}, b"x" * 8, 2**63),
    ("length beyond the file", {"a": ONE}, b"x" * 8, 10**6),
    ("no JSON", b"{{{{", b"", None),
    ("empty", b"", b"", None),
    ("overlap", {"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, b"x" * 12, None),
    ("hole", {"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}}, b"x" * 20, None),
    ("backwards", {"a": {**ONE, "data_offsets": [8, 0]}}, b"x" * 8, None),
    ("offsets beyond the data", {"a": {**ONE, "data_offsets": [0, 8000]}}, b"x" * 8, None),
    ("size of another shape", {"a": {**ONE, "shape": [3]}}, b"x" * 8, None),
    ("overflowing shape", {"a": {**ONE, "shape": [2**40, 2**40]}}, b"x" * 8, None),
    ("negative shape", {"a": {**ONE, "shape": [-2]}}, b"x" * 8, None),
    ("unknown dtype", {"a": {**ONE, "dtype": "F7"}}, b"x" * 8, None),
    ("trailing bytes", {"a": ONE}, b"x" * 9, None),
    ("short data", {"a": ONE}, b"x" * 7, None),
]


@pytest.mark.parametrize(("header", "data", "length"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_lying_headers(tmp_path: Path, header: Any, data: bytes, length: int | None) -> None:
    file = raw_file(tmp_path / "model.safetensors", header, data, length)
    for path in (file, tmp_path):
        with pytest.raises(
            CheckpointError, match=r"model.safetensors: cannot be read as safetensors .*; download the file again"
        ):
            open_checkpoint(path)


def test_a_dtype_torch_lacks_names_its_tensor(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    tensors = write(tmp_path, dense("modelopt"), {}, mo_config())
    raw_file(tmp_path / "other.safetensors", header, b"xxx")
    with (
        open_checkpoint(tensors) as checkpoint,
        pytest.raises(CheckpointError, match=r"other.safetensors, tensor a: cannot be read as safetensors"),
    ):
        checkpoint.load_plain("a")


# ---- index ----


def index(root: Path, document: Any) -> None:
    (root / "model.safetensors.index.json").write_text(document if isinstance(document, str) else json.dumps(document))


@both
def test_index(tmp_path: Path, format: str) -> None:
    root = standard(tmp_path, format, shards=2)
    good = json.loads((root / "model.safetensors.index.json").read_text())
    name, shard = next(iter(good["weight_map"].items()))
    cases = [
        ("{", r"index.json: cannot be read as JSON .*; download it again"),
        ("[" * 10**5, "cannot be read as JSON"),
        ([], "expected a JSON object, found list"),
        ({}, "expected a non-empty weight_map"),
        ({"weight_map": {}}, "expected a non-empty weight_map"),
        ({"weight_map": {"a": 3}}, "expected a non-empty weight_map"),
        (
            {"weight_map": good["weight_map"] | {"b": "model-9.safetensors"}},
            r"names shard model-9.safetensors, which is not there",
        ),
        ({"weight_map": good["weight_map"] | {"b": shard}}, rf"puts tensor b in {shard}, which does not hold it"),
        ({"weight_map": good["weight_map"] | {"b": "../x.safetensors"}}, r"'../x.safetensors' lies outside the directory"),
        ({"weight_map": good["weight_map"] | {"b": "/etc/passwd"}}, "lies outside the directory"),
    ]
    for document, words in cases:
        index(root, document)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(root)
    index(root, {"weight_map": {n: s for n, s in good["weight_map"].items() if n != name}})
    with open_checkpoint(root) as checkpoint:
        assert any("are in the shards but not in" in o.text for o in checkpoint.oddities)


@both
def test_the_same_tensor_twice_without_index(tmp_path: Path, format: str) -> None:
    standard(tmp_path, format)
    (tmp_path / "zcopy.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"zcopy.safetensors: tensor .* is in model.safetensors too; remove the file"):
        open_checkpoint(tmp_path)


# ---- modules ----


@both
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_missing_companion(tmp_path: Path, format: str, missing: int) -> None:
    tensors = dense(format)
    suffixes = ("weight_packed", "weight_scale", "weight_global_scale")
    if format == "modelopt":
        suffixes = ("weight", "weight_scale", "weight_scale_2")
    tensors.pop(f"{GATE}.{suffixes[missing]}")
    with pytest.raises(CheckpointError, match=rf"tensor {GATE}.{suffixes[missing]} is missing \(the module holds .*incomplete"):
        load_gated_weights(standard(tmp_path, format, tensors), MLP)


@both
@pytest.mark.parametrize(
    ("part", "tensor", "words"),
    [
        ("codes", torch.zeros(8, 16), "codes: expected torch.uint8, got torch.float32"),
        ("codes", torch.zeros(8, 15, dtype=torch.uint8), "K must be a positive multiple of 16, got K = 30"),
        ("codes", torch.zeros(8, 32, dtype=torch.uint8), "block_scale: codes .8, 32. need .8, 4."),
        ("codes", torch.zeros(1, 8, 16, dtype=torch.uint8), "block_scale: codes .1, 8, 16. need"),
        ("codes", torch.zeros(256, dtype=torch.uint8), "codes: expected"),
        ("weight_scale", torch.zeros(8, 2, dtype=torch.uint8), "block_scale: expected torch.float8_e4m3fn, got torch.uint8"),
        ("weight_scale", torch.zeros(8, 3).to(torch.float8_e4m3fn), "block_scale: codes .8, 16. need .8, 2."),
        ("weight_scale", torch.full((8, 2), float("nan")).to(torch.float8_e4m3fn), "16 of 16 e4m3 scales are NaN"),
        ("weight_scale", torch.full((8, 2), -1.0).to(torch.float8_e4m3fn), "16 of 16 e4m3 scales have the sign bit set"),
        ("global", torch.ones(2), "expected one float32 value, got torch.float32 of shape .2."),
        ("global", torch.ones((), dtype=torch.float16), "expected one float32 value, got torch.float16"),
        ("input", torch.ones(8), "expected one float32 value, got torch.float32 of shape .8."),
        ("bias", torch.zeros(9), "expected a float bias of shape .8., got torch.float32 of shape .9."),
        ("bias", torch.zeros(8, dtype=torch.int32), "expected a float bias of shape .8., got torch.int32"),
    ],
)
def test_wrong_dtype_shape_or_value(tmp_path: Path, format: str, part: str, tensor: torch.Tensor, words: str) -> None:
    names = {"codes": "weight_packed", "global": "weight_global_scale", "input": "input_global_scale"}
    if format == "modelopt":
        names = {"codes": "weight", "global": "weight_scale_2", "input": "input_scale"}
    path = standard(tmp_path, format, dense(format) | {f"{GATE}.{names.get(part, part)}": tensor})
    with pytest.raises(CheckpointError, match=f"gate_proj.*{words}"):
        load_gated_weights(path, MLP)


@both
def test_swizzled_scales_on_disk(tmp_path: Path, format: str) -> None:
    swizzled = full_range(1, 128, 64).to_swizzled()
    tensors = parts(format, GATE, swizzled) | parts(format, UP, swizzled)
    with pytest.raises(CheckpointError, match=r"linear block scales \[N, K/16\], found .128, 32. and .1, 1, 32, 4, 4."):
        load_gated_weights(standard(tmp_path, format, tensors), MLP)


@both
def test_gate_and_up_of_different_shape(tmp_path: Path, format: str) -> None:
    tensors = parts(format, GATE, full_range(1, 8, 32)) | parts(format, UP, full_range(2, 8, 48))
    with pytest.raises(
        CheckpointError, match=r"gate_proj is .8, 32. and .*up_proj is .8, 48.; gate and up must have one shape"
    ):
        load_gated_weights(standard(tmp_path / "pair", format, tensors), MLP)
    fused = parts(format, "m.gate_up_proj", full_range(1, 7, 32))
    with pytest.raises(CheckpointError, match=r"m.gate_up_proj has 7 rows"):
        load_gated_weights(standard(tmp_path / "fused", format, fused), "m")
    experts = {}
    for e, n in ((0, 8), (1, 16)):
        for leaf in ("w1", "w3"):
            experts |= parts(format, f"m.experts.{e}.{leaf}", full_range(1, n, 32))
    with pytest.raises(CheckpointError, match=r"m.experts.1 is .16, 32., expert 0 is .8, 32.; experts of one stack"):
        load_gated_weights(standard(tmp_path / "experts", format, experts), "m")


# ---- configuration ----


@both
@pytest.mark.parametrize("text", ["", "{", "[]", "nul", "\xff", '{"quantization_config": 3}', '{"a":' * 10**5])
def test_bad_config_json(tmp_path: Path, format: str, text: str) -> None:
    standard(tmp_path, format)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config.json: "):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config_groups": []}, "config_groups must be dict, found list"),
        ({"config_groups": {"g": 3}}, "config group g must be an object, found int"),
        ({"config_groups": {"g": {"targets": "Linear"}}}, "targets must be list, found str"),
        ({"config_groups": {"g": {"targets": [3]}}}, "targets must list strings"),
        ({"config_groups": {"g": {"weights": []}}}, "weights must be dict, found list"),
        ({"ignore": {"a": 1}}, "ignore must be list, found dict"),
        ({"ignore": ["re:("]}, "ignore holds 're:.', no regular expression"),
        ({"format": 4}, "format must be str, found int"),
    ],
)
def test_bad_compressed_tensors_config(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {words}"):
        open_checkpoint(write(tmp_path, dense("compressed-tensors"), ct_config(**change)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_algo": 4}, "quant_algo must be str, found int"),
        ({"group_size": "16"}, "group_size must be int, found str"),
        ({"exclude_modules": "lm_head"}, "exclude_modules must be list, found str"),
        ({"exclude_modules": [1]}, "exclude_modules must list strings"),
        ({"quantized_layers": {"a": 1}}, "quantized_layers.'a'. must be an object"),
    ],
)
def test_bad_modelopt_config(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"hf_quant_config.json: {words}"):
        open_checkpoint(write(tmp_path, dense("modelopt"), {}, mo_config(**change)))


def test_contradictions(tmp_path: Path) -> None:
    """Divisors and multipliers have different names and must never be told apart by guessing."""
    with pytest.raises(CheckpointError, match=r"says modelopt, but the tensors are named as compressed-tensors names them"):
        open_checkpoint(write(tmp_path / "1", dense("compressed-tensors"), {}, mo_config()))
    with pytest.raises(CheckpointError, match=r"config.json says compressed-tensors, but the tensors are named as modelopt"):
        open_checkpoint(write(tmp_path / "2", dense("modelopt"), ct_config()))
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json says modelopt, .*config.json says compressed-tensors"):
        open_checkpoint(write(tmp_path / "3", dense("modelopt"), ct_config(), mo_config()))
    with pytest.raises(CheckpointError, match=r"holds names of both formats"):
        open_checkpoint(write(tmp_path / "4", parts("modelopt", GATE, full_range(1, 8, 32)) | dense("compressed-tensors")))
    mirror = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}}
    with pytest.raises(CheckpointError, match=r"says quant_algo NVFP4, .*config.json says NVFP4_AWQ; correct one"):
        open_checkpoint(write(tmp_path / "5", dense("modelopt"), mirror, mo_config()))
