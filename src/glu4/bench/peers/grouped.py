"""Peers of the grouped operation: 16-bit weights decoded beforehand by torch, cuBLAS and QuACK, and humming's NVFP4 kernel.

All take tokens sorted by expert; those that take offsets take them on the device. `cublas_loop` has the sizes on the host,
which a real layer would have to wait for. humming's adapter was written from its 0.1.19 sources without a GPU at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from glu4.bench.contender import Contender
from glu4.bench.grouped import GroupedOperands
from glu4.bench.operands import Operands, replica
from glu4.bench.peers import humming, quack
from glu4.bench.timing import copies

__all__ = ["PEERS"]

Calls = list[Callable[[], Tensor]]


def _grouped(operands: Operands) -> GroupedOperands:
    assert isinstance(operands, GroupedOperands)
    return operands


def _no_triton() -> str | None:
    return None if find_spec("triton") else "Triton is not installed; it comes with CUDA builds of torch"


def _no_grouped_mm() -> str | None:
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no _grouped_mm"
    return _no_triton()


def _buffers(operands: GroupedOperands, x_format: str) -> tuple[Tensor, Tensor]:
    """An output `[m, n]` full of NaN, and both products `[m, 2n]`."""
    out = operands.out(x_format)
    return out, out.new_empty(operands.m, 2 * operands.n)


def _weights(operands: GroupedOperands, dtype: torch.dtype) -> Tensor:
    """`[E, 2n, k]`, gate's rows first."""
    return torch.cat(operands.decoded(dtype), 1)


def _count(operands: GroupedOperands, weight: Tensor) -> int:
    """Copies for a cold L2: weights of experts without tokens are never read."""
    return copies(weight.nbytes * operands.active // len(operands.sizes) + 2 * operands.m * operands.k)


def _torch_grouped(given: Operands) -> Calls:
    from glu4.bench.peers.silu_mul import silu_mul

    operands = _grouped(given)
    out, _ = _buffers(operands, "bfloat16")
    weight = _weights(operands, torch.bfloat16)
    count = _count(operands, weight)
    held = [weight, *(weight.clone() for _ in range(count - 1))]
    ends = operands.offsets[1:].clone()  # a pointer of its own, aligned
    grouped_mm: Any = torch._grouped_mm

    def call_with(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            silu_mul(grouped_mm(x, w.transpose(1, 2), offs=ends), out)
            return out

        return call

    return [call_with(x, w) for x, w in zip(operands.x("bfloat16", count), held) if isinstance(x, Tensor)]


def _cublas_loop(given: Operands) -> Calls:
    from glu4.bench.peers.silu_mul import silu_mul

    operands = _grouped(given)
    out, both = _buffers(operands, "bfloat16")
    weight = _weights(operands, torch.bfloat16)
    count = _count(operands, weight)
    held = [weight, *(weight.clone() for _ in range(count - 1))]
    spans = list(operands.spans())

    def call_with(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            for e, rows in spans:
                torch.mm(x[rows], w[e].t(), out=both[rows])
            silu_mul(both, out)
            return out

        return call

    return [call_with(x, w) for x, w in zip(operands.x("bfloat16", count), held) if isinstance(x, Tensor)]


def _quack_varlen(given: Operands) -> Calls:
    operands = _grouped(given)
    interface = import_module("quack.gemm_interface")
    gate, up = operands.decoded(torch.bfloat16)
    weight = torch.stack((gate, up), 2).flatten(1, 2)  # [E, 2n, k], rows of gate and up alternate
    del gate, up
    count = _count(operands, weight)
    held = [weight, *(weight.clone() for _ in range(count - 1))]
    offsets = operands.offsets

    def call_with(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            out = interface.gemm_gated(
                x, w.transpose(1, 2), activation="swiglu", cu_seqlens_m=offsets, store_preact=False, tuned=False
            )[1]
            assert isinstance(out, Tensor)
            return out

        return call

    return [call_with(x, w) for x, w in zip(operands.x("bfloat16", count), held) if isinstance(x, Tensor)]


def _humming_moe(given: Operands) -> Calls:
    from glu4.bench.peers.silu_mul import silu_mul

    operands = _grouped(given)
    experts = len(operands.sizes)
    layer = (
        import_module("humming.layer")
        .HummingLayer(
            shape_n=2 * operands.n,
            shape_k=operands.k,
            weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
            num_experts=experts,
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            torch_dtype=torch.bfloat16,
        )
        .cuda()
    )
    codes, scales = operands.stacked()
    second = operands.smaller_scales()
    layer.load_from_tensors({"weight": codes, "weight_scale": scales, "weight_scale_2": second})
    layer.transform()
    config, forward = layer.humming_config, import_module("humming.forward").humming_forward
    kind = {"gemm_type": "grouped_contiguous"}
    tuning = import_module("humming.tune").get_heuristics_config(
        layer_config=config, shape_m=operands.m, device=codes.device, **kind
    )
    out, _ = _buffers(operands, "bfloat16")
    names = ("weight", "weight_scale", "weight_scale_2")
    weights = {name: t for name in names if (t := getattr(layer, name, None)) is not None}
    nbytes = sum(t.nbytes for t in weights.values()) * operands.active // experts

    def call_with(x: Tensor, held: dict[str, Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            products = forward(
                config,
                inputs=x,
                **held,
                locks=layer.locks,
                expert_layout=operands.offsets,
                valid_shape_m=operands.m,
                compute_config=kind,
                tuning_config=tuning,
            )
            silu_mul(products, out)
            return out

        return call

    tokens = operands.x("bfloat16", copies(nbytes + 2 * operands.m * operands.k))
    # a parameter's copy is a plain tensor
    return [call_with(x, {k: replica(t.detach()) for k, t in weights.items()}) for x in tokens if isinstance(x, Tensor)]


PEERS = (
    Contender("torch_grouped_mm_bf16", "16-bit", "bfloat16", 3, _torch_grouped, _no_grouped_mm),
    Contender("cublas_loop_bf16", "16-bit", "bfloat16", 3, _cublas_loop, _no_triton),
    Contender("quack_gated_varlen_bf16", "16-bit", "bfloat16", 1, _quack_varlen, quack.PEERS[0].missing),
    Contender("humming_moe_bf16", "nvfp4", "bfloat16", 3, _humming_moe, humming.PEERS[0].missing),
)
