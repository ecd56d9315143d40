"""Block-scaled matrix products in Triton, compiled by compile_triton.py to PTX for sm_100a.

A is [M, K], B and the two B of the dual kernel [N, K], K contiguous; e2m1 elements are packed in pairs, and coordinates of
packed operands count bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gemm_pointers(
    a, b, scale_a, scale_b, c, k_size, n_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """NVFP4 from plain pointers, linear scales, C float16."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    pairs, blocks = tl.arange(0, BK // 2), tl.arange(0, BK // 16)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, k_size, BK):
        x = tl.load(a + rows[:, None] * (k_size // 2) + (k // 2 + pairs)[None, :])
        y = tl.load(b + columns[:, None] * (k_size // 2) + (k // 2 + pairs)[None, :])
        x_scale = tl.load(scale_a + rows[:, None] * (k_size // 16) + (k // 16 + blocks)[None, :])
        y_scale = tl.load(scale_b + columns[:, None] * (k_size // 16) + (k // 16 + blocks)[None, :])
        total = tl.dot_scaled(x, x_scale, "e2m1", y.T, y_scale, "e2m1", total)
    tl.store(c + rows[:, None] * n_size + columns[None, :], total.to(tl.float16))


@triton.jit
def gemm_descriptors(
    a, b, scale_a, scale_b, c, k_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """One element format for both operands, by tensor descriptors; linear scales by pointers; C float16."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    blocks = tl.arange(0, BK // BLOCK)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, k_size, BK):
        x, y = a.load([row, k // PACK]), b.load([column, k // PACK])
        x_scale = tl.load(scale_a + rows[:, None] * (k_size // BLOCK) + (k // BLOCK + blocks)[None, :])
        y_scale = tl.load(scale_b + columns[:, None] * (k_size // BLOCK) + (k // BLOCK + blocks)[None, :])
        total = tl.dot_scaled(x, x_scale, FORMAT, y.T, y_scale, FORMAT, total)
    c.store([row, column], total.to(tl.float16))


@triton.jit
def load_scales(scales, row, k, ROWS: tl.constexpr, BK: tl.constexpr):
    """[ROWS, BK / 16] of scales in 128x4 blocks, a tensor [1, rows / 128, K / 64, 2, 256]."""
    blocks = scales.load([0, row // 128, k // 64, 0, 0])
    return blocks.reshape(ROWS // 128, BK // 64, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(ROWS, BK // 16)


@triton.jit
def gemm_blocked_scales(
    a, b, scale_a, scale_b, c, k_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """NVFP4, everything by tensor descriptors, scales in 128x4 blocks; C float16."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in tl.range(0, k_size, BK, warp_specialize=SPECIALIZE):
        x, y = a.load([row, k // 2]), b.load([column, k // 2])
        x_scale, y_scale = load_scales(scale_a, row, k, BM, BK), load_scales(scale_b, column, k, BN, BK)
        total = tl.dot_scaled(x, x_scale, "e2m1", y.T, y_scale, "e2m1", total)
    c.store([row, column], total.to(tl.float16))


@triton.jit
def gated(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def dual_linear_scales(
    a, gate, up, scale_a, scale_gate, scale_up, c, global_gate, global_up, k_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """silu(A @ gate^T * global_gate) * (A @ up^T * global_up): NVFP4 by tensor descriptors, linear scales; C bfloat16."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    blocks = tl.arange(0, BK // 16)
    first, second = tl.zeros((BM, BN), dtype=tl.float32), tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, k_size, BK):
        x, y, z = a.load([row, k // 2]), gate.load([column, k // 2]), up.load([column, k // 2])
        x_scale = tl.load(scale_a + rows[:, None] * (k_size // 16) + (k // 16 + blocks)[None, :])
        y_scale = tl.load(scale_gate + columns[:, None] * (k_size // 16) + (k // 16 + blocks)[None, :])
        z_scale = tl.load(scale_up + columns[:, None] * (k_size // 16) + (k // 16 + blocks)[None, :])
        first = tl.dot_scaled(x, x_scale, "e2m1", y.T, y_scale, "e2m1", first)
        second = tl.dot_scaled(x, x_scale, "e2m1", z.T, z_scale, "e2m1", second)
    c.store([row, column], gated(first * global_gate, second * global_up).to(tl.bfloat16))


@triton.jit
def dual_blocked_scales(
    a, gate, up, scale_a, scale_gate, scale_up, c, global_gate, global_up, k_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same with scales in 128x4 blocks, by tensor descriptors."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    first, second = tl.zeros((BM, BN), dtype=tl.float32), tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, k_size, BK):
        x, y, z = a.load([row, k // 2]), gate.load([column, k // 2]), up.load([column, k // 2])
        x_scale = load_scales(scale_a, row, k, BM, BK)
        y_scale, z_scale = load_scales(scale_gate, column, k, BN, BK), load_scales(scale_up, column, k, BN, BK)
        first = tl.dot_scaled(x, x_scale, "e2m1", y.T, y_scale, "e2m1", first)
        second = tl.dot_scaled(x, x_scale, "e2m1", z.T, z_scale, "e2m1", second)
    c.store([row, column], gated(first * global_gate, second * global_up).to(tl.bfloat16))


@triton.jit
def gemm_unscaled(a, b, c, k_size, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One 16-bit or 8-bit type for both operands, by tensor descriptors; C float16."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, k_size, BK):
        x, y = a.load([row, k]), b.load([column, k])
        total = tl.dot(x, y.T, total)
    c.store([row, column], total.to(tl.float16))
