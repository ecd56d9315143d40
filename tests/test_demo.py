"""The demonstration on a tiny model: what it measures, what the report holds, and that it fails when the operator is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from glu4 import ops
from glu4.cli import app
from glu4.demo import DemoResult, measure, run
from glu4.demo.measure import Histogram, share_gate_scale, ulps
from glu4.nn import GatedMLP
from glu4.nvfp4 import quantize
from glu4.weights import GatedWeights

transformers = pytest.importorskip("transformers")


def _model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 1.7  # gate and up scales that differ
    return model


def _windows() -> torch.Tensor:
    return torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def result() -> DemoResult:
    return run(_model(), _windows())


# ---- what it measures ----


def test_four_forms_and_the_mistake_undone() -> None:
    model = _model()
    steps: list[tuple[str, int]] = []
    out = run(model, _windows(), lambda text, n: steps.append((text, n)))
    assert [q.name for q in out.qualities] == ["unchanged", "W4A16", "W4A4", "W4A16, gate's global scale used for up"]
    assert len({q.result.perplexity for q in out.qualities}) == 4
    assert sum(n for _, n in steps) == 8
    mlps = [m for m in model.modules() if isinstance(m, GatedMLP)]
    assert [m.mode for m in mlps] == ["w4a16"] * 3
    for ratio, m in zip(out.scale_ratios, mlps, strict=True):
        assert ratio == float(m.weights.gate.global_scale / m.weights.up.global_scale) != 1.0
    assert out.layers == [f"model.layers.{i}.mlp" for i in range(3)]
    assert out.checked_ratio >= 1.0


def test_weight_errors_are_those_of_the_quantiser(result: DemoResult) -> None:
    model = _model()
    weights = [w for layer in model.model.layers for w in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)]
    error = sum(float((quantize(w).dequantize() - w).double().square().sum()) for w in weights)
    total = sum(float(w.double().square().sum()) for w in weights)
    assert result.relative_error == pytest.approx((error / total) ** 0.5, rel=1e-5)  # float32 sums there
    assert result.weight_errors is not None
    assert result.weight_errors.counts.sum() + result.weight_errors.outside == sum(w.numel() for w in weights)
    # half the widest e2m1 step is a sixth of the largest code; rounding the scale to e4m3 adds up to 1/16 of the maximum
    assert result.weight_errors.outside == 0


def test_the_right_calls_are_accepted_and_the_mistake_is_named(result: DemoResult) -> None:
    assert [(c.name, c.ok, c.expected_ok) for c in result.checks] == [
        ("W4A16", True, True),
        ("W4A4", True, True),
        ("W4A16, gate's global scale used for up", False, False),
    ]
    assert result.ok
    assert result.checks[0].layer == "model.layers.1.mlp"
    assert result.checks[0].shape == (32, 96, 64)
    assert "one global scale" in result.checks[2].summary


def test_a_wrong_operator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.dual_gemm

    def swapped(x: Any, weights: GatedWeights, **options: Any) -> torch.Tensor:
        return right(x, (weights.up, weights.gate), **options)

    monkeypatch.setattr(ops, "dual_gemm", swapped)
    out = run(_model(), _windows())
    assert not out.ok
    assert not out.checks[0].as_expected


def test_a_checker_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    always = SimpleNamespace(ok=True, summary=lambda: "right")
    monkeypatch.setattr(measure, "check", lambda case, output: always)
    assert not run(_model(), _windows()).ok


def test_sharing_the_scale_changes_nothing_else() -> None:
    gate, up = quantize(torch.randn(16, 32)), quantize(3 * torch.randn(16, 32))
    wrong = share_gate_scale(GatedWeights(gate, up, torch.tensor(0.5)))
    assert wrong.gate is gate
    assert wrong.up.codes is up.codes
    assert wrong.up.block_scale is up.block_scale
    assert wrong.up.global_scale is gate.global_scale
    assert wrong.input_scale == 0.5


def test_units_in_the_last_place() -> None:
    exact = torch.tensor([1.0, 1.0, 1.999, -4.0, 2.0**-14, 2.0**-20, 0.0], dtype=torch.float64)
    steps = [2.0**-10, -(2.0**-11), 2.0**-10, 2.0**-8, 2.0**-24, 2.0**-24, 2.0**-24]
    assert ulps(exact + torch.tensor(steps, dtype=torch.float64), exact).tolist() == pytest.approx([1, 0.5, 1, 1, 1, 1, 1])
    # against torch's own neighbours of every finite positive fp16
    value = torch.arange(0x7BFF, dtype=torch.int16).view(torch.float16)
    above = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    assert torch.equal(ulps(above, value.double()), torch.ones(0x7BFF, dtype=torch.float64))


def test_histograms_count_everything() -> None:
    h = Histogram.of(torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0, torch.nan]), 0.0, 1.0)
    assert (h.counts.sum(), h.outside) == (3, 3)
    assert ((h + h).counts.sum(), (h + h).outside) == (6, 6)


# ---- the report ----


class _Page(HTMLParser):
    """Collects addresses, open tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def _report(result: DemoResult) -> str:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from glu4.demo.report import Setting, render

    return render(result, Setting("tiny <model>", "a & b", 2, 32, 100, "ab" * 32))


def test_the_report_is_one_file(result: DemoResult) -> None:
    text = _report(result)
    page = _Page(text)
    assert page.tags.count("svg") == 4
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    words = " ".join(" ".join(page.words).split())
    for q in result.qualities:
        assert f"{q.result.perplexity:.2f}" in words
    assert "tiny <model>" in words  # escaped, so that the parser sees text
    assert "Note: a & b." in words
    assert "prefers-color-scheme: dark" in text
    assert "#010203" not in text  # every stand-in colour became the page's own


def test_the_report_is_the_same_for_the_same_numbers(result: DemoResult) -> None:
    assert _report(result) == _report(result)


# ---- the command ----


def test_command_line_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output: .*absent is not a directory"):
        CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "absent" / "r.html")], catch_exceptions=False)
    with pytest.raises(ValueError, match=r"output: .* is a directory; give the name of a file to write"):
        CliRunner().invoke(app, ["demo", "--output", str(tmp_path)], catch_exceptions=False)


def test_exit_code_says_what_the_checker_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: DemoResult) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from glu4.demo.report import Setting

    setting = Setting("tiny", "note", 2, 32, 100, "ab" * 32)
    wrong = replace(result, checks=[replace(result.checks[0], ok=False), *result.checks[1:]])
    for given, code in ((result, 0), (wrong, 1)):
        monkeypatch.setattr("glu4.cli.demo._run", lambda windows, length, given=given: (given, setting))
        answer = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "r.html")], catch_exceptions=False)
        assert answer.exit_code == code
        assert ("NOT AS IT SHOULD BE" in answer.stdout) == bool(code)
        assert f"{result.qualities[1].result.perplexity:.2f}" in answer.stdout
        assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
        answer = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "r.html"), "--json"], catch_exceptions=False)
        assert answer.exit_code == code
        document = json.loads(answer.stdout)
        assert (document["ok"], document["report"]) == (code == 0, str(tmp_path / "r.html"))
        assert [r["perplexity"] for r in document["results"]] == [q.result.perplexity for q in given.qualities]
