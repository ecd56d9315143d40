"""What explain says."""

from __future__ import annotations

import torch

from glu4 import GroupedProblem, Problem, explain


def test_explain_names_the_backend_and_the_reason() -> None:
    e = explain(Problem(1, 8, 16), "cpu")
    assert e.chosen == "portable"
    assert str(e).splitlines()[0] == "dual_gemm on cpu: portable"
    assert "torch.matmul" in str(e)


def test_other_devices_fall_back() -> None:
    assert "fallback: there is no compiled kernel for this device yet" in str(explain(Problem(1, 8, 16), torch.device("mps")))
    grouped = explain(GroupedProblem(1, 2, 8, 16), "cuda")
    assert grouped.chosen == "portable"
    assert "cannot be captured in a CUDA graph" in str(grouped)
