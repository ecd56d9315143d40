"""Operands of calls on the Hopper backend, what is specified of them, and a sign that one went the long way."""

from __future__ import annotations

from typing import Any

import torch

from glu4 import GatedWeights, NVFP4Tensor, quantize, reference
from operands import full_range

Operand = torch.Tensor | NVFP4Tensor


class Long(Exception):
    """The long way was taken."""


def tokens(seed: int, *shape: int, kind: str = "float16") -> Operand:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return quantize(x) if kind == "nvfp4" else x.to(getattr(torch, kind))


def pair(seed: int, *shape: int, **biases: torch.Tensor) -> GatedWeights:
    return GatedWeights(full_range(seed, *shape), full_range(seed + 1, *shape), **biases)


def expected(x: Operand, w: GatedWeights | NVFP4Tensor, dtype: torch.dtype, **kwargs: Any) -> torch.Tensor:
    if isinstance(w, NVFP4Tensor):
        return reference.linear(x, w, out_dtype=dtype, **kwargs)
    return reference.dual_gemm(x, w.gate, w.up, gate_bias=w.gate_bias, up_bias=w.up_bias, out_dtype=dtype, **kwargs)
