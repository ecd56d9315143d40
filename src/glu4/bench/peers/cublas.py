"""cuBLAS on weights decoded beforehand: one torch.mm with gate's and up's rows under one another, then silu * mul."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from glu4.bench.contender import Contender
from glu4.bench.operands import FORMATS, Operands
from glu4.bench.timing import copies

__all__ = ["PEERS"]


def _missing() -> str | None:
    return None if find_spec("triton") else "Triton is not installed; it comes with CUDA builds of torch"


def _prepare(operands: Operands, x_format: str) -> list[Callable[[], Tensor]]:
    from glu4.bench.peers.silu_mul import silu_mul

    dtype = FORMATS[x_format]
    decoded = torch.cat(operands.decoded(dtype))
    count = copies(decoded.nbytes + 2 * operands.m * operands.k)
    weights = [decoded.clone() for _ in range(count)]
    out = operands.out(x_format)
    both = torch.empty(operands.m, 2 * operands.n, dtype=dtype, device=out.device)

    def call_with(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            torch.mm(x, weight.t(), out=both)
            silu_mul(both, out)
            return out

        return call

    return [call_with(x, w) for x, w in zip(operands.x(x_format, count), weights) if isinstance(x, Tensor)]


PEERS = tuple(
    Contender(f"cublas_{short}", "16-bit", x_format, 3, partial(_prepare, x_format=x_format), _missing)
    for short, x_format in (("fp16", "float16"), ("bf16", "bfloat16"))
)
