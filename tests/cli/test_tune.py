"""`glu4 tune`: what it measures, where the table goes, and what it says of kernels that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.fake_gpu import FakeGpu, contender, right
from glu4.backends.hopper import tuned
from glu4.backends.hopper.config import SHIPPED
from glu4.bench import operands as operands_module
from glu4.cli import app
from glu4.problem import Problem

RUNNER = CliRunner()
DEVICE = "NVIDIA H200"
FIRST, SECOND = SHIPPED[0].name, SHIPPED[1].name


def invoke(*arguments: str) -> Any:
    return RUNNER.invoke(app, ["tune", *arguments])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    """A machine that looks as if it had an H200; the first kernel is faster for one token, the second for more."""
    from glu4.backends.hopper import launch
    from glu4.bench import machine, timing, tune

    made = FakeGpu()
    draw = operands_module.draw
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "is_hopper", lambda device: True)
    monkeypatch.setattr(machine, "environment", lambda: {"device": DEVICE})
    monkeypatch.setattr(machine, "clocks", dict)
    monkeypatch.setattr(timing, "Cuda", lambda: made)
    monkeypatch.setattr(operands_module, "draw", lambda m, n, k, device: draw(m, n, k, "cpu"))

    def contenders(operands: object, x_format: str) -> list[object]:
        m = operands.m  # type: ignore[attr-defined]
        times = {FIRST: 1.0 if m == 1 else 2.4, SECOND: 2.0}
        return [contender("glu4", made, ms, config=name, chosen=False, specified=True) for name, ms in times.items()]

    monkeypatch.setattr(tune, "contenders", contenders)
    monkeypatch.setattr(tuned, "packaged_directory", lambda: tmp_path / "packaged")
    monkeypatch.setenv("GLU4_CACHE_DIR", str(tmp_path / "cache"))
    tuned.forget()
    return made


def test_the_table_in_the_cache_is_what_the_dispatch_reads(gpu: FakeGpu, tmp_path: Path) -> None:
    result = invoke(
        "--weights", "64,128", "--weights", "32,64", "--m", "4,1", "--activation-format", "float16", "--commit", "abc"
    )
    assert result.exit_code == 0, result.output
    path = tmp_path / "cache" / "tuned" / "nvidia-h200.json"
    assert "6 times measured, 2 kernels slower at a first look:" in result.stdout
    document = json.loads(path.read_text())
    assert [(e["n"], e["k"], e["m"], e["config"]) for e in document["entries"]] == [
        (32, 64, [1, 4], [FIRST, SECOND]),
        (64, 128, [1, 4], [FIRST, SECOND]),
    ]
    assert document["entries"][0]["us"][1] == {SECOND: pytest.approx(2000), FIRST: pytest.approx(2400)}
    assert document["entries"][0]["us"][0] == {FIRST: pytest.approx(1000)}
    assert document["entries"][0]["measured"]["commit"] == "abc"
    chosen = [tuned.best(Problem(m, 64, 128, x_format="float16"), DEVICE) for m in (1, 3, 4)]
    assert chosen == [SHIPPED[0], None, SHIPPED[1]]  # none at 3: its neighbours differ


def test_output_chooses_the_directory(gpu: FakeGpu, tmp_path: Path) -> None:
    result = invoke(
        "--weights", "64,128", "--m", "1", "--activation-format", "float16", "--output", str(tmp_path / "t"), "--json"
    )
    assert json.loads(result.stdout) == {"table": str(tmp_path / "t" / "nvidia-h200.json"), "measured": 1, "failed": []}
    assert not (tmp_path / "cache").exists()


def test_a_kernel_that_is_wrong_is_told_and_left_out(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = contender("glu4", gpu, 0.1, lambda o: right(o, "float16") * 2, config=FIRST, chosen=False, specified=True)
    good = contender("glu4", gpu, 0.2, config=SECOND, chosen=False, specified=True)
    monkeypatch.setattr("glu4.bench.tune.contenders", lambda operands, x_format: [wrong, good])
    result = invoke("--weights", "64,128", "--m", "1", "--activation-format", "float16")
    assert result.exit_code == 1
    assert f"{FIRST} at 1,64,128 float16 wrong, so not timed" in result.stdout
    (entry,) = json.loads((tmp_path / "cache" / "tuned" / "nvidia-h200.json").read_text())["entries"]
    assert entry["config"] == [SECOND]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "64"], "weights: expected N,K, K a multiple of 16, got '64'"),
        (["--weights", "64,100"], "weights: expected N,K, K a multiple of 16, got '64,100'"),
        (["--m", "1,x"], "m: expected positive numbers with commas, got '1,x'"),
        (["--m", "0"], "m: expected positive numbers with commas, got '0'"),
        (["--activation-format", "float16,fp8"], "activation-format: expected one of float16, bfloat16, nvfp4, got 'fp8'"),
    ],
)
def test_bad_options_are_one_line(gpu: FakeGpu, arguments: list[str], message: str) -> None:
    assert message in str(invoke(*arguments).exception)
    assert gpu.now == 0


def test_without_a_place_or_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no GPU of compute capability 9.0" in str(invoke("--m", "1").exception)
    monkeypatch.setenv("GLU4_CACHE_DIR", "off")
    assert "GLU4_CACHE_DIR is off, so there is nowhere to put a table; give --output DIR" in str(invoke().exception)
