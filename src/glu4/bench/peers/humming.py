"""humming (humming-kernels): W4A16 compiled by NVRTC or nvcc on first use, and a kernel of its own for silu * mul.

Its NVFP4 checkpoint form has one second scale for the matrix, so the global scales of gate and up must be equal. It is handed
the tuning interval of the M at hand alone, or it would compile a kernel for every interval.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from glu4.bench.contender import Contender
from glu4.bench.operands import FORMATS, Operands, replica
from glu4.bench.peers import not_usable
from glu4.bench.timing import copies

__all__ = ["PEERS"]


def _compiler() -> None:
    """Raises where humming finds neither NVRTC with its headers nor nvcc: it compiles every kernel on first use."""
    compiler = import_module("humming.jit.runtime").KernelRuntime._get_compiler()
    compiler.signature()
    import_module("humming.utils.cuda").filter_cuda_paths(required_headers=["cuda_runtime.h"])


_MODULES = ("humming.layer", "humming.tune", "humming.forward")
_missing = partial(not_usable, "humming-kernels", "0.1.19", _MODULES, _compiler)


def _layer(operands: Operands, dtype: torch.dtype) -> Any:
    make = import_module("humming.layer").HummingLayer
    layer = make(
        shape_n=2 * operands.n,
        shape_k=operands.k,
        weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
        pad_n_to_multiple=256,
        pad_k_to_multiple=128,
        torch_dtype=dtype,
    ).cuda()
    codes, scales = operands.stacked()
    second = operands.gate.global_scale.view(1)
    layer.load_from_tensors({"weight": codes, "weight_scale": scales, "weight_scale_2": second})
    layer.transform()
    return layer


def _prepare(operands: Operands, x_format: str) -> list[Callable[[], Tensor]]:
    from glu4.bench.peers.silu_mul import silu_mul

    layer = _layer(operands, FORMATS[x_format])
    heuristics = import_module("humming.tune").get_heuristics_config
    intervals = heuristics(layer_config=layer.humming_config, device=operands.gate.device)
    tuning = [entry for entry in intervals if entry[0] < operands.m <= entry[1]]
    config, forward = layer.humming_config, import_module("humming.forward").humming_forward
    out = operands.out(x_format)
    names = ("weight", "weight_scale", "weight_scale_2")
    weights = {name: t for name in names if (t := getattr(layer, name, None)) is not None}
    nbytes = sum(t.nbytes for t in weights.values())

    def call_with(x: Tensor, held: dict[str, Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            products = forward(config, inputs=x, **held, locks=layer.locks, compute_config={}, tuning_config=tuning)
            silu_mul(products, out)
            return out

        return call

    tokens = operands.x(x_format, copies(nbytes + 2 * operands.m * operands.k))
    # a parameter's copy is a plain tensor
    return [call_with(x, {k: replica(t.detach()) for k, t in weights.items()}) for x in tokens if isinstance(x, Tensor)]


PEERS = tuple(
    Contender(f"humming_{short}", "nvfp4", x_format, 3, partial(_prepare, x_format=x_format), _missing)
    for short, x_format in (("fp16", "float16"), ("bf16", "bfloat16"))
)
