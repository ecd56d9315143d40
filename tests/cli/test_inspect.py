"""`glu4 inspect`: exit codes, tables, JSON, and one line for every oddity."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.directories import FORMATS, GATE, UP, ct_config, dense, mo_config, parts, standard, write
from glu4 import NVFP4Tensor
from glu4.cli import main
from operands import full_range

both = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(path: Path, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["glu4", "inspect", str(path), *options])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def experts(format: str, count: int = 3, **kwargs: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for e in range(count):
        for i, leaf in enumerate(("w1", "w3")):
            module = f"model.layers.1.mlp.experts.{e}.{leaf}"
            tensors |= parts(
                format, module, full_range(2 * e + i, 8, 32), **{"stored": 1000.0 if format == FORMATS[0] else 0.001} | kwargs
            )
    return tensors


def sane(format: str, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Gate and up whose weights have the size of weights: multipliers 0.001 and 0.0005."""
    stored = (1000.0, 2000.0) if format == "compressed-tensors" else (0.001, 0.0005)
    up = parts(format, UP, full_range(2, 8, 32), stored[1], **kwargs)
    return parts(format, GATE, full_range(1, 8, 32), stored[0], **kwargs) | up


@both
def test_a_sound_checkpoint(tmp_path: Path, format: str, inspect: Any) -> None:
    plain = {"model.norm.weight": torch.ones(4)}
    code, out, _ = inspect(standard(tmp_path, format, sane(format) | experts(format) | plain, shards=2))
    assert code == 0
    assert f"{format}, 8 NVFP4 layers in 33 tensors" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip().startswith("model.")}
    assert "8 x 32" in rows[GATE]
    assert "0.001" in rows[GATE]
    assert "x3" in rows["model.layers.1.mlp.experts.*.w1"]  # experts in one row
    assert "3 x 8 x 32" in rows["model.layers.1.mlp.experts"]
    assert " 2 " in rows["model.layers.0.mlp"]  # gate / up global scale
    assert "differ in 1 of 4 pairs" in out
    assert "no oddities" in out


@both
def test_json_and_the_numbers_in_it(tmp_path: Path, format: str, inspect: Any) -> None:
    scale = torch.tensor([[0x00, 0x03], [0x38, 0x7E], [0x08, 0x38], [0x38, 0x38]], dtype=torch.uint8)
    matrix = NVFP4Tensor(full_range(1, 4, 32).codes, scale.view(torch.float8_e4m3fn), torch.ones(()))
    stored = 512.0 if format == "compressed-tensors" else 2.0**-9
    tensors = parts(format, GATE, matrix, stored, input_stored=4.0) | parts(format, UP, matrix, stored, input_stored=4.0)
    code, out, _ = inspect(standard(tmp_path, format, tensors), "--json")
    document = json.loads(out)
    assert code == 0
    assert document["format"] == format
    assert document["usable"] is True
    layer = document["layers"][0]
    assert layer["name"] == GATE
    assert layer["shape"] == [4, 32]
    assert (layer["block_scale_min"], layer["block_scale_max"]) == (3 * 2.0**-9, 448.0)
    assert (layer["zero_share"], layer["subnormal_share"]) == (1 / 8, 1 / 8)
    assert layer["global_scale"] == 2.0**-9
    assert layer["input_scale"] == (0.25 if format == "compressed-tensors" else 4.0)
    assert layer["scheme"]["name"] == "NVFP4"
    assert document["gated"] == [
        {
            "prefix": "model.layers.0.mlp",
            "experts": None,
            "shape": [4, 32],
            "ratio_min": 1.0,
            "ratio_max": 1.0,
            "pairs": 1,
            "differing": 0,
            "input_scale": "static",
            "error": "",
        }
    ]


@both
def test_ratios_on_both_sides_of_one(tmp_path: Path, format: str, inspect: Any) -> None:
    tensors = {}
    for e, (gate, up) in enumerate(((4.0, 1.0), (1.0, 8.0), (2.0, 2.0))):
        for leaf, g in (("w1", gate), ("w3", up)):
            stored = 1024 / g if format == "compressed-tensors" else g / 1024
            tensors |= parts(format, f"m.experts.{e}.{leaf}", full_range(e, 8, 32), stored)
    gated = json.loads(inspect(standard(tmp_path, format, tensors), "--json")[1])["gated"][0]
    assert (gated["ratio_min"], gated["ratio_max"], gated["pairs"], gated["differing"]) == (0.125, 4.0, 3, 2)
    assert gated["shape"] == [3, 8, 32]


@both
def test_layer_pattern(tmp_path: Path, format: str, inspect: Any) -> None:
    path = standard(tmp_path, format, sane(format) | experts(format, 11))

    def layers(pattern: str) -> list[str]:
        code, out, _ = inspect(path, "--json", "--layer", pattern)
        assert code == 0
        return [layer["name"] for layer in json.loads(out)["layers"]]

    assert layers("model.layers.0") == [GATE, UP]
    assert layers("*.experts.1?.w1") == ["model.layers.1.mlp.experts.10.w1"]
    assert layers(GATE) == [GATE]
    assert layers("*.w3")[-2:] == ["model.layers.1.mlp.experts.9.w3", "model.layers.1.mlp.experts.10.w3"]  # by number
    assert "model.layers.1.mlp.experts.2.w1 " in inspect(path, "--layer", "model.layers.1")[1]  # one row each
    code, _, err = inspect(path, "--layer", "nothing")
    assert code == 2
    assert "'nothing' matches none of the 24 NVFP4 layers" in err


def test_unreadable_is_exit_2(tmp_path: Path, inspect: Any) -> None:
    for make, words in (
        (lambda: tmp_path / "nothing", "no such file or directory"),
        (lambda: write(tmp_path / "plain", {"a.weight": torch.ones(2, 2)}), "holds no NVFP4 layer"),
        (lambda: write(tmp_path / "both", dense("modelopt"), ct_config()), "config.json says compressed-tensors"),
    ):
        code, out, err = inspect(make())
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1


def oddities(inspect: Any, path: Path) -> tuple[int, list[dict[str, Any]], str]:
    """(exit code, oddities of the JSON form, text form); both forms exit alike."""
    code, out, _ = inspect(path, "--json")
    text_code, text, _ = inspect(path)
    assert code == text_code
    return code, json.loads(out)["oddities"], text


@both
@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("weight_scale", lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype), "16 of 16 e4m3 scales are NaN"),
        ("weight_scale", lambda t: (t.view(torch.uint8) | 0x80).view(t.dtype), "have the sign bit set"),
        ("global", torch.zeros_like, "expected a positive finite"),
        ("pre_quant_scale", lambda _: torch.full((32,), 2.0), "with pre_quant_scale is not supported"),
    ],
)
def test_unusable_is_exit_1(tmp_path: Path, format: str, inspect: Any, part: str, change: Any, words: str) -> None:
    part = {"global": "weight_global_scale" if format == "compressed-tensors" else "weight_scale_2"}.get(part, part)
    tensors = sane(format)
    tensors[f"{UP}.{part}"] = change(tensors.get(f"{UP}.{part}"))
    code, found, text = oddities(inspect, standard(tmp_path, format, tensors))
    assert code == 1
    # once, for the layer; its gated MLP does not repeat it
    assert [(o["where"], o["unusable"]) for o in found] == [(UP, True)]
    assert words in found[0]["text"]
    assert f"UNUSABLE: {UP}: " in text
    assert "1 oddities, 1 of them" in text


@both
def test_gated_errors_that_no_layer_has(tmp_path: Path, format: str, inspect: Any) -> None:
    tensors = {name: t for name, t in experts(format, 4).items() if ".experts.2." not in name}
    tensors |= {f"{GATE}.weight": torch.ones(8, 32)} | parts(format, UP, full_range(2, 8, 32), sane_scale(format))
    code, found, text = oddities(inspect, standard(tmp_path, format, tensors))
    assert code == 1
    assert {o["where"] for o in found} == {"model.layers.0.mlp", "model.layers.1.mlp.experts"}
    assert all(o["unusable"] for o in found)
    assert "lacks experts 2 (it holds 0-1, 3)" in text
    assert f"no NVFP4 matrix at '{GATE}', which is unquantized" in text


def sane_scale(format: str) -> float:
    return 1000.0 if format == "compressed-tensors" else 0.001


@both
def test_other_schemes_and_layouts(tmp_path: Path, format: str, inspect: Any) -> None:
    other = {"lm_head.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn), "lm_head.weight_scale": torch.ones(())}
    other |= {
        "m.experts.gate_up_proj": torch.zeros(2, 4, 8, dtype=torch.uint8),
        "m.experts.gate_up_proj_weight_scale": torch.ones(2),
    }
    other |= {"model.router.logit_scale": torch.ones(())}
    code, found, _ = oddities(inspect, standard(tmp_path, format, sane(format) | other))
    assert code == 1
    by_name = {o["where"]: o for o in found}
    assert by_name["lm_head"]["unusable"]
    assert "quantised as FP8" in by_name["lm_head"]["text"]
    assert by_name["m.experts.gate_up_proj_weight_scale"]["unusable"]
    assert not by_name["model.router.logit_scale"]["unusable"]


@both
def test_notes_do_not_make_it_unusable(tmp_path: Path, format: str, inspect: Any) -> None:
    tensors = sane(format) | experts(format, 4, input_stored=4.0)
    name = "input_global_scale" if format == "compressed-tensors" else "input_scale"
    for leaf in ("w1", "w3"):
        tensors.pop(f"model.layers.1.mlp.experts.2.{leaf}.{name}")
    tensors[f"{GATE}.{name}"] = torch.full_like(tensors[f"{GATE}.{name}"], 1.0)
    code, found, text = oddities(inspect, standard(tmp_path, format, tensors))
    assert code == 0
    assert not any(o["unusable"] for o in found)
    for words in (
        "missing although the configuration says static",
        "experts 2 have no usable input scale; the whole stack is quantised dynamically",
        "input scale is exactly 1.0",
        "the larger serves both",
    ):
        assert words in text
    assert "w1 and 1 more like it: " in text
    assert re.search(r"model\.layers\.1\.mlp\.experts +4 x 8 x 32 +1 +dynamic", text)


@both
def test_reciprocal_global_scales_are_noticed(tmp_path: Path, format: str, inspect: Any) -> None:
    """Trap 1: a file of multipliers under divisor names, or the reverse."""
    wrong = 0.001 if format == "compressed-tensors" else 1000.0
    tensors = parts(format, GATE, full_range(1, 8, 32), wrong) | parts(format, UP, full_range(2, 8, 32), wrong)
    code, found, text = oddities(inspect, standard(tmp_path, format, tensors))
    assert code == 0
    assert sum("looks reciprocal" in o["text"] for o in found) == 2
    assert text.count("looks reciprocal") == 1  # lines that differ in numbers only are one line, with a count


def test_zero_matrix_and_uncalibrated_divisor(tmp_path: Path, inspect: Any) -> None:
    zero = NVFP4Tensor(torch.zeros(8, 16, dtype=torch.uint8), torch.zeros(8, 2).to(torch.float8_e4m3fn), torch.ones(()))
    tensors = sane("compressed-tensors") | parts("compressed-tensors", GATE, zero, float("inf"))
    code, found, _ = oddities(inspect, standard(tmp_path, "compressed-tensors", tensors))
    assert code == 0
    texts = [o["text"] for o in found if o["where"] == GATE]
    assert any("weight_global_scale is inf on an all-zero matrix; read as 1.0" in t for t in texts)
    assert any("every block scale is 0" in t for t in texts)


def test_weight_only_and_excluded(tmp_path: Path, inspect: Any) -> None:
    own = mo_config("W4A16_NVFP4", exclude_modules=["*.gate*"])
    code, found, text = oddities(inspect, write(tmp_path, sane("modelopt", input_stored=None), {}, own))
    assert code == 0
    assert [o["where"] for o in found] == [GATE]
    assert "the configuration excludes it (*.gate*)" in found[0]["text"]
    assert "W4A16_NVFP4" in text
    assert "none" in text


def test_names_cannot_command_the_terminal(tmp_path: Path, inspect: Any) -> None:
    name = "\x1b[31mred[bold]\n.gate_proj"
    tensors = sane("modelopt") | parts("modelopt", name, full_range(1, 8, 32), 0.0)
    code, out, _ = inspect(standard(tmp_path, "modelopt", tensors))
    assert code == 1
    assert "\x1b" not in out
    assert "\\x1b[31mred[bold]\\n.gate_proj" in out
