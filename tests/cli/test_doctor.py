"""`glu4 doctor`: it reports what is there, and its self-test can fail."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from typer.testing import CliRunner

import glu4
from glu4.cli import app, doctor
from glu4.nvfp4 import NVFP4Tensor

RUNNER = CliRunner()


def test_a_healthy_machine_is_exit_code_0_with_versions_devices_and_backends():
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for text in (
        platform.python_version(),
        torch.__version__,
        "cpu: ",
        "portable runs",
        "self-test: right",
        "kernel cache: none",
    ):
        assert text in result.stdout


def test_json_is_one_document_with_the_reason_for_each_backend():
    result = RUNNER.invoke(app, ["doctor", "--json"])
    document = json.loads(result.stdout)
    assert document["status"] == "right"
    assert document["versions"]["torch"] == torch.__version__
    cpu = document["devices"][0]
    assert (cpu["device"], cpu["faults"]) == ("cpu", [])
    assert cpu["backends"]["dual_gemm W4A4"]["chosen"] == "portable"
    assert cpu["backends"]["grouped_dual_gemm W4A16"]["candidates"]["portable"]["reason"]


def test_a_wrong_decode_is_found_and_exit_code_1(monkeypatch):
    right = NVFP4Tensor.decode

    def saturating(self: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return right(self, dtype).clamp(-2600, 2600)

    monkeypatch.setattr(NVFP4Tensor, "decode", saturating)
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "decoding e2m1 x e4m3 gives wrong values" in result.stdout


def test_a_wrong_product_is_found_and_exit_code_1(monkeypatch):
    right = glu4.dual_gemm
    monkeypatch.setattr(glu4, "dual_gemm", lambda *args, **options: right(*args, **options).mul_(1.001))
    result = RUNNER.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["status"] == "wrong"
    assert document["devices"][0]["faults"] == ["dual_gemm of exact operands differs from the specification"]


def test_a_device_that_cannot_run_the_self_test_is_a_fault(monkeypatch):
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(glu4, "dual_gemm", broken)
    assert doctor._faults(torch.device("cpu")) == ["the self-test cannot run: no kernel image is available"]


def test_missing_packages_and_an_old_torch_become_hints(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    hints = doctor._hints(dict.fromkeys(doctor._PACKAGES), ["cpu"])
    assert "gguf is not installed: for demo: pip install 'glu4[hf]'" in hints
    assert any(hint.startswith("torch 2.9.1+cpu is older than 2.11") for hint in hints)
    assert any(hint.startswith("glu4 runs from a source tree") for hint in hints)
    assert not any("triton" in hint for hint in hints)


@pytest.mark.parametrize(("built", "words"), [("12.8", "is built for CUDA 12.8 but sees no device"), (None, "CPU")])
def test_a_machine_without_a_visible_gpu_gets_one_hint_why(monkeypatch, built, words):
    monkeypatch.setattr(torch.version, "cuda", built)
    hints = doctor._hints(dict.fromkeys(doctor._PACKAGES, "1.0"), ["cpu"])
    assert len(hints) == 1
    assert words in hints[0]
    assert doctor._hints(dict.fromkeys(doctor._PACKAGES, "1.0"), ["cpu", "cuda:0"]) == []


@pytest.mark.parametrize(
    ("version", "older"), [("2.10.0", True), ("2.11.0+cu130", False), ("2.13.0a0+git1", False), ("3.0", False)]
)
def test_versions_are_compared_as_numbers(version, older):
    assert doctor._older(version) is older
