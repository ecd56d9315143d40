"""silu(gate) * up of two halves of a row, for peers that leave it to a kernel of its own. Imports Triton."""

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

__all__ = ["silu_mul"]

BLOCK = 1024


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _kernel(both, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + row * 2 * n + col, mask=col < n).to(tl.float32)
    up = tl.load(both + row * 2 * n + n + col, mask=col < n).to(tl.float32)
    tl.store(out + row * n + col, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=col < n)


def silu_mul(both: Tensor, out: Tensor) -> None:
    """Fill `out [M, N]` from `both [M, 2N]`, gate's columns first; float32 inside. Both contiguous, fp16 or bf16."""
    m, n = out.shape
    _kernel[(m, triton.cdiv(n, BLOCK))](both, out, n, BLOCK)
