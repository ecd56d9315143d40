"""Every shipped kernel where only one result is right: bit for bit, at every tail."""

from __future__ import annotations

import pytest

from gpu import proofs
from gpu.harness import FORMATS, Target


@pytest.mark.parametrize("x_format", FORMATS)
def test_one_hot_tokens_show_every_decoded_weight(target: Target, x_format: str) -> None:
    proofs.decodes_every_weight(target, target.configs, x_format)


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
@pytest.mark.parametrize("x_format", FORMATS)
def test_exact_sums_for_every_m(target: Target, x_format: str, linear: bool) -> None:
    proofs.exact_for_every_m(target, target.configs, x_format, linear, target.some(range(1, 301), 5), 208)


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
def test_exact_sums_for_lengths_of_k(target: Target, linear: bool) -> None:
    ks = range(16, 2064, 16) if target.full else (16, 64, 80, 1040)
    for i, k in enumerate((*ks, 7168, 14336) if target.full else ks):
        proofs.exact_for_every_m(target, target.configs, FORMATS[i % 3], linear, (1, 66), k)
