"""Quantise on any device: by one kernel on a Hopper or Blackwell GPU, by torch elsewhere, to the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from glu4 import dispatch, nvfp4
from glu4.backends.tokens import launch
from glu4.eager import ordinary
from glu4.nvfp4 import BLOCK, Layout, Method, NonFinite, NVFP4Tensor
from glu4.scale_layout import SwizzledLayout

__all__ = ["quantize"]

_HALVES = (torch.float16, torch.bfloat16)


def quantize(
    x: Tensor,
    global_scale: Tensor | float | None = None,
    method: Method = "nearest",
    *,
    layout: Layout = "linear",
    nonfinite: NonFinite = "error",
    backend: str | None = None,
) -> NVFP4Tensor:
    """Quantise `x` (fp16, bf16 or float32, `[..., rows, K]`) to NVFP4.

    global_scale  multiplier; by default amax / (6 * 448) of each matrix (four_over_six: amax / (6 * 256)), so leading
                  dimensions get one each. A given one may be a float, or a float32 tensor `[]` or the leading dims;
                  values beyond its range saturate.
    method        "nearest": block scale e4m3(block_amax / (6 g)); codes nearest, ties to even.
                  "four_over_six" (arXiv 2512.02010): per block the better, in squared error, of mapping the block's
                  maximum to 6 or to 4; the format is unchanged.
    layout        "linear" or "swizzled" block scales. With "swizzled", what Blackwell's tensor cores take, rows of codes lie a
                  multiple of 16 bytes apart too (`NVFP4Tensor.with_aligned_rows`), so that no call has to copy them.
    nonfinite     "error": NaN or infinity raises ValueError (a check that synchronises a GPU, and that a compiled graph
                  cannot hold). "propagate": no check; a block that holds one gets a NaN scale, so that every result
                  which depends on it is NaN.
    backend       "portable" for torch's operations alone. Without it a kernel quantises fp16 and bf16 on a Hopper or Blackwell
                  GPU, "nearest", to the same bits; a default global scale and the check of "error" are torch's there too.

    `glu4.nvfp4.quantize` is the specification: the order of its float32 operations, zeros and their signs. No gradient flows
    back to x. Raises TypeError for another dtype and ValueError for K not a multiple of 16, a bad global scale, or another
    method, layout, nonfinite or backend.
    """
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(dispatch.BACKENDS)} or None, got {backend!r}")
    given = nvfp4.checked_global_scale(x, global_scale, method, layout, nonfinite)
    if method != "nearest" or backend == "portable":
        return nvfp4.quantized(x, given, method, layout, nonfinite)
    x = x.detach()
    at_once = ordinary((x,) if given is None else (x, given))
    # what a tracer sees depends on nothing that only this machine has
    if not (launch.quantizes(x) if at_once else x.device.type == "cuda" and x.dtype in _HALVES):
        return nvfp4.quantized(x, given, method, layout, nonfinite)
    if nonfinite == "error":
        largest = torch.maximum(x.amax((-2, -1)), -x.amin((-2, -1))).float()  # NaN where x has one
        nvfp4.refuse_nonfinite(torch.isfinite(largest))
        given = nvfp4.global_scale_of(largest, method) if given is None else given
    elif given is None:
        given = nvfp4.default_global_scale(torch.where(torch.isfinite(x), x, 0.0).float(), method)
    codes, scales = _empty(x, layout)
    (_fill if at_once else _operator)(codes, scales, x, given)
    return nvfp4._unchecked(codes, scales.view(torch.float8_e4m3fn), given)


def _empty(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Codes and, as bytes, block scales of x."""
    *lead, rows, k = x.shape
    if layout == "linear":
        return x.new_empty((*lead, rows, k // 2), dtype=torch.uint8), x.new_empty((*lead, rows, k // BLOCK), dtype=torch.uint8)
    scales = x.new_empty((*lead, *SwizzledLayout(rows, k // BLOCK).storage_shape), dtype=torch.uint8)
    if k // 2 == (pitch := nvfp4.row_bytes(k)):
        return x.new_empty((*lead, rows, k // 2), dtype=torch.uint8), scales
    return x.new_zeros((*lead, rows, pitch), dtype=torch.uint8).narrow(-1, 0, k // 2), scales


def _fill(codes: Tensor, scales: Tensor, x: Tensor, global_scale: Tensor) -> None:
    """Quantise x into `_empty`'s tensors, marking what is not finite."""
    if launch.quantizes(x):
        launch.quantize(x, global_scale, codes, scales)
        return
    layout: Layout = "swizzled" if scales.ndim > codes.ndim else "linear"
    made = nvfp4.quantized(x, global_scale, "nearest", layout, "propagate")
    codes.copy_(made.codes)
    scales.copy_(made.block_scale.view(torch.uint8))


def _fills(*_: object) -> None:
    """The fake of the operator, which writes tensors whose metadata the caller already knows."""


_operator = torch.library.custom_op("glu4::quantize", _fill, mutates_args=("codes", "scales"))
_operator.register_fake(_fills)
