"""What explain says."""

from __future__ import annotations

import pytest
import torch

from glu4 import GroupedProblem, Problem, UnsupportedError, dispatch, dual_gemm, explain
from operands import full_range


def test_explain_names_the_backend_and_the_reason() -> None:
    e = explain(Problem(1, 8, 16), "cpu")
    assert e.chosen == "portable"
    assert str(e).splitlines()[0] == "dual_gemm on cpu: portable"
    assert "torch.matmul" in str(e)
    assert "hopper: no, needs a GPU of compute capability 9.0" in str(e)


def test_insisting_on_a_backend_that_cannot_run() -> None:
    gate = full_range(1, 8, 16)
    with pytest.raises(UnsupportedError, match="backend hopper: needs a GPU of compute capability"):
        dual_gemm(torch.zeros(1, 16).half(), (gate, gate), backend="hopper")


def test_a_hopper_gpu_without_compiled_kernels_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(dispatch.hopper, "available", lambda problem: False)
    assert "hopper: no, its kernels are not compiled here; run glu4 compile" in str(explain(Problem(1, 8, 16), "cuda"))
    monkeypatch.setattr(dispatch.hopper, "available", lambda problem: True)
    assert explain(Problem(1, 8, 16), "cuda").chosen == "hopper"
    refused = explain(Problem(1, 8, 16, x_format="float32"), "cuda")
    assert refused.chosen == "portable"
    assert "wgmma would round them to TF32" in str(refused)


def test_other_devices_fall_back() -> None:
    assert "fallback on every device: decodes exactly" in str(explain(Problem(1, 8, 16), torch.device("mps")))
    grouped = explain(GroupedProblem(1, 2, 8, 16), "cuda")
    assert grouped.chosen == "portable"
    assert "cannot be captured in a CUDA graph" in str(grouped)


def test_what_is_not_a_problem() -> None:
    with pytest.raises(TypeError, match=r"problem: expected a glu4.Problem or glu4.GroupedProblem, got str"):
        explain("x")  # type: ignore[arg-type]
