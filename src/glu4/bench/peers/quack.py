"""QuACK (quack-kernels): W4A16 in bf16 with a kernel of its own for silu * mul, and the fused gated product of 16-bit weights.

One `tensor_scale` serves gate and up, so global scales must be equal. Its package folder must be called site-packages or
dist-packages: its cache key takes functions elsewhere for the user's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from glu4.bench.contender import Contender
from glu4.bench.operands import FORMATS, Operands, replica
from glu4.bench.peers import not_usable
from glu4.bench.timing import copies

__all__ = ["PEERS"]

_missing = partial(not_usable, "quack-kernels", "0.6.5", ("quack.gemm_w4", "quack.gemm_interface"))


def _w4a16(operands: Operands) -> list[Callable[[], Tensor]]:
    from glu4.bench.peers.silu_mul import silu_mul

    w4 = import_module("quack.gemm_w4")
    if operands.n % 64:
        raise ValueError(f"gemm_w4a16 takes 2N that is a multiple of 128, got N = {operands.n}")
    blob, scale = w4.prepare_w4_weight(*operands.stacked(), wformat="nvfp4")
    count = copies(blob.nbytes + scale.nbytes + 2 * operands.m * operands.k)
    out = operands.out("bfloat16")
    products = out.new_empty(operands.m, 2 * operands.n)

    def call_with(x: Tensor, blob: Tensor, scale: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            w4.gemm_w4a16(x, blob, scale, tensor_scale=1.0, out=products, wformat="nvfp4")
            silu_mul(products, out)
            return out

        return call

    tokens = operands.x("bfloat16", count)
    return [call_with(x, replica(blob), replica(scale)) for x in tokens if isinstance(x, Tensor)]


def _gated(operands: Operands, x_format: str) -> list[Callable[[], Tensor]]:
    interface = import_module("quack.gemm_interface")
    gate, up = operands.decoded(FORMATS[x_format])
    weight = torch.stack((gate, up), 1).flatten(0, 1)  # rows of gate and up alternate
    count = copies(weight.nbytes + 2 * operands.m * operands.k)

    def call_with(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            out = interface.gemm_gated(x, weight.t(), activation="swiglu", store_preact=False, tuned=False)[1]
            assert isinstance(out, Tensor)
            return out

        return call

    return [call_with(x, weight.clone()) for x in operands.x(x_format, count) if isinstance(x, Tensor)]


PEERS = (
    Contender("quack_w4a16", "nvfp4", "bfloat16", 3, _w4a16, _missing),
    Contender("quack_gated_fp16", "16-bit", "float16", 1, partial(_gated, x_format="float16"), _missing),
    Contender("quack_gated_bf16", "16-bit", "bfloat16", 1, partial(_gated, x_format="bfloat16"), _missing),
)
