"""The packaged model: known perplexities, and NVFP4 directories in both formats that generate the same text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from glu4.bench.models import OpenedModel, open_model
from glu4.bench.perplexity import perplexity, read_text, token_windows
from glu4.demo.measure import share_gate_scale
from glu4.nn import GatedMLP, NVFP4Linear, convert, load, save

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# the topics text of Python 3.11.7, and the perplexity of its first 512 tokens with the model's weights in float64
TOPICS_SHA256 = "2a95af4ac93f5b719944030ce3769070ddf827d847cba42192afa8da989e5dc4"
FIRST_WINDOW = 17.47306


@pytest.fixture(scope="module")
def opened() -> Iterator[OpenedModel]:
    try:
        model = open_model("smollm2")
    except ImportError as error:
        pytest.skip(str(error))
    with torch.inference_mode():
        yield model


def test_conversion_costs_little_and_a_shared_scale_much(opened: OpenedModel) -> None:
    """One window, so the numbers are rougher than the demo's; the order is not in doubt."""
    text = read_text("topics")
    windows = token_windows(opened.tokenizer, text, 1, 512)
    model: Any = opened.model
    base = perplexity(model, windows).perplexity
    assert len(convert(model).mlps) == 30
    converted = perplexity(model, windows).perplexity
    mlps = [m for m in model.modules() if isinstance(m, GatedMLP)]
    right = [m.weights for m in mlps]
    for m in mlps:
        m.weights = share_gate_scale(m.weights)
    mistaken = perplexity(model, windows).perplexity
    for m, weights in zip(mlps, right, strict=True):
        m.weights = weights
    assert base < converted < 1.15 * base
    assert mistaken > 2 * converted
    if hashlib.sha256(text.encode()).hexdigest() == TOPICS_SHA256:
        assert base == pytest.approx(FIRST_WINDOW, rel=1e-4)  # float32 gives 17.47291


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_a_directory_of_the_whole_model_generates_the_same_text(opened: OpenedModel, tmp_path: Path, format: str) -> None:
    model: Any = opened.model
    if type(model.model.layers[0].self_attn.q_proj) is nn.Linear:
        convert(model, linears="all")
    loaded = load(save(model, tmp_path / "m", format))
    counts = [sum(isinstance(m, kind) for m in loaded.modules()) for kind in (GatedMLP, NVFP4Linear)]
    assert counts == [30, 30 * 5]
    prompt = torch.tensor([opened.tokenizer("The capital of France is")["input_ids"]])
    want = model.generate(prompt, max_new_tokens=6, do_sample=False)
    got = loaded.generate(prompt, max_new_tokens=6, do_sample=False)
    assert opened.tokenizer.decode(got[0]) == opened.tokenizer.decode(want[0])
    if format == "modelopt":  # every scale is kept bit for bit
        assert torch.equal(loaded(prompt).logits, model(prompt).logits)
