"""The data of two public kernel problems of GPU MODE, `nvfp4_dual_gemm` and `nvfp4_group_gemm`, and of cases beside it.

What a submission receives is stated by those problems (gpu-mode/reference-kernels, problems/nvidia); the forms are

    dual   (a, b1, b2, sfa, sfb1, sfb2, sfa_permuted, sfb1_permuted, sfb2_permuted, c), returns c = silu(a b1^T) * (a b2^T)
    group  ([(a, b, c), ..], [(sfa, sfb), ..], [(sfa_permuted, sfb_permuted), ..], [(m, n, k, l), ..]), returns [c, ..] with
           c = a b^T for every group, written in place

with, for a matrix of R rows (R = M or N):

    a, b       float4_e2m1fn_x2  (R, K/2, L)    strides (K/2, 1, R*K/2)
    sf         float8_e4m3fn     (R, K/16, L)   strides (K/16, 1, R*K/16); on the CPU in the group problem
    permuted   float8_e4m3fn     (32, 4, ceil(R/128), 4, ceil(K/64), L), in memory (L, ceil(R/128), ceil(K/64), 32, 4, 4)
    c          float16           (M, N, L)      strides (N, 1, M*N)

There is no global scale. `public_*` draws the numbers as the problem does, in its order, from a generator of the device:
on a CUDA device they are the problem's own numbers, on the CPU other numbers of the same distribution. That data never
contains the codes 4 to 7 nor a scale above 2, so `full_range_*` and `exact_*` hold what it leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glu4.nvfp4 import BLOCK, NVFP4Tensor
from glu4.scale_layout import SwizzledLayout

__all__ = [
    "DUAL_BENCHMARKS",
    "DUAL_TESTS",
    "GROUP_BENCHMARKS",
    "GROUP_TESTS",
    "SEED",
    "DualData",
    "DualShape",
    "GroupData",
    "GroupShape",
    "exact_dual",
    "exact_group",
    "full_range_dual",
    "full_range_group",
    "public_dual",
    "public_group",
    "public_mismatches",
]

SEED = 1111  # of every listed test and benchmark
# where the six axes of the stored swizzled scales, (L, R/128, K/64, 32, 4, 4), stand in the permuted tensor
_PERMUTED = (3, 4, 1, 5, 2, 0)
_STORED = (5, 2, 4, 0, 1, 3)


@dataclass(frozen=True)
class DualShape:
    """One shape of the dual problem: a `[batch, m, k]`, b1 and b2 `[batch, n, k]`."""

    m: int
    n: int
    k: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.m},{self.n},{self.k}" + (f" x{self.batch}" if self.batch != 1 else "")


@dataclass(frozen=True)
class GroupShape:
    """The (m, n, k) of every group of the group problem."""

    sizes: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        def column(i: int) -> str:
            values = [size[i] for size in self.sizes]
            return str(values[0]) if len(set(values)) == 1 else "+".join(map(str, values))

        return f"{len(self.sizes)} groups m {column(0)}, n {column(1)}, k {column(2)}"


def _groups(m: tuple[int, ...], n: tuple[int, ...], k: tuple[int, ...]) -> GroupShape:
    return GroupShape(tuple(zip(m, n, k, strict=True)))


DUAL_TESTS = (
    DualShape(1536, 512, 7168),
    DualShape(256, 512, 256),
    DualShape(1536, 512, 7168),
    DualShape(3072, 1024, 1536),
    DualShape(7168, 1024, 256),
    DualShape(7168, 2304, 2048),
    DualShape(4608, 384, 7168),
    DualShape(7168, 384, 2304),
    DualShape(512, 768, 7168),
    DualShape(4096, 768, 512),
)
DUAL_BENCHMARKS = (
    DualShape(256, 4096, 7168),
    DualShape(512, 4096, 7168),
    DualShape(256, 3072, 4096),
    DualShape(512, 3072, 7168),
)
GROUP_TESTS = (
    _groups((96, 128), (128, 256), (256, 512)),
    _groups((256, 72), (512, 384), (256, 256)),
    _groups((128, 128), (128, 256), (512, 256)),
    _groups((80, 128, 256), (384, 256, 128), (256, 512, 256)),
    _groups((64, 72, 96), (128, 384, 512), (512, 512, 256)),
    _groups((64, 256, 128), (768, 128, 256), (512, 256, 512)),
    _groups((128, 128, 64), (256, 512, 512), (768, 256, 768)),
    _groups((128,) * 4, (128,) * 4, (512, 256, 512, 256)),
    _groups((40, 56, 384, 512), (512, 384, 256, 128), (256,) * 4),
    _groups((512, 384, 256, 128), (256,) * 4, (512, 768, 512, 768)),
)
GROUP_BENCHMARKS = (
    _groups((80, 176, 128, 72, 64, 248, 96, 160), (4096,) * 8, (7168,) * 8),
    _groups((40, 76, 168, 72, 164, 148, 196, 160), (7168,) * 8, (2048,) * 8),
    _groups((192, 320), (3072,) * 2, (4096,) * 2),
    _groups((128, 384), (4096,) * 2, (1536,) * 2),
)


# ---- the two argument forms ----


@dataclass(frozen=True, eq=False)
class DualData:
    """The operands of one dual call: a `[L, M, K]`, b1 and b2 `[L, N, K]` with global scale 1, and c float16 `[L, M, N]`
    as it is before the call. All contiguous, scales linear."""

    a: NVFP4Tensor
    b1: NVFP4Tensor
    b2: NVFP4Tensor
    c: Tensor

    def __post_init__(self) -> None:
        for name, matrix in (("a", self.a), ("b1", self.b1), ("b2", self.b2)):
            _check_operand(name, matrix)

    def as_tuple(self) -> tuple[Tensor, ...]:
        """The 10-tuple that `custom_kernel` receives; the swizzled scales are new memory, the rest are views."""
        matrices = (self.a, self.b1, self.b2)
        codes, scales = zip(*(_views(matrix) for matrix in matrices), strict=True)
        permuted = (_permuted(matrix) for matrix in matrices)
        return (*codes, *scales, *permuted, self.c.permute(1, 2, 0))

    @classmethod
    def from_tuple(cls, data: tuple[Tensor, ...]) -> DualData:
        """The operands of a 10-tuple; the swizzled scales are not looked at. Raises ValueError for another length."""
        if len(data) != 10:
            raise ValueError(f"data: the dual problem passes 10 tensors, got {len(data)}")
        a, b1, b2 = (_matrix(codes, scale) for codes, scale in zip(data[:3], data[3:6], strict=True))
        return cls(a, b1, b2, data[9].permute(2, 0, 1).contiguous())


@dataclass(frozen=True, eq=False)
class GroupData:
    """The operands of one group call, a tuple a group: a `[1, M, K]`, b `[1, N, K]`, c float16 `[1, M, N]`.

    `padding` holds, for the a and b of each group, the swizzled scales `[1, ceil(R/128), ceil(K/64), 32, 4, 4]` whose bytes
    beyond the matrix fill the padding of the permuted scales.
    """

    groups: tuple[tuple[NVFP4Tensor, NVFP4Tensor, Tensor], ...]
    padding: tuple[tuple[Tensor, Tensor], ...]

    def __post_init__(self) -> None:
        for i, (a, b, _) in enumerate(self.groups):
            _check_operand(f"a of group {i}", a)
            _check_operand(f"b of group {i}", b)

    def as_tuple(self) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """The four lists that `custom_kernel` receives."""
        abc, scales, permuted, sizes = [], [], [], []
        for (a, b, c), (pad_a, pad_b) in zip(self.groups, self.padding, strict=True):
            (codes_a, scale_a), (codes_b, scale_b) = _views(a), _views(b)
            abc.append((codes_a, codes_b, c.permute(1, 2, 0)))
            scales.append((scale_a.cpu(), scale_b.cpu()))
            permuted.append((_permuted(a, pad_a), _permuted(b, pad_b)))
            sizes.append((a.rows, b.rows, a.k, 1))
        return abc, scales, permuted, sizes

    @classmethod
    def from_tuple(cls, data: tuple[list[Any], list[Any], list[Any], list[Any]]) -> GroupData:
        """The operands of the four lists. Raises ValueError for another number of lists."""
        if len(data) != 4:
            raise ValueError(f"data: the group problem passes 4 lists, got {len(data)}")
        groups = tuple(
            (_matrix(a, sfa.to(a.device)), _matrix(b, sfb.to(b.device)), c.permute(2, 0, 1).contiguous())
            for (a, b, c), (sfa, sfb) in zip(data[0], data[1], strict=True)
        )
        return cls(groups, tuple((a.permute(_STORED), b.permute(_STORED)) for a, b in data[2]))


def _check_operand(name: str, matrix: NVFP4Tensor) -> None:
    if matrix.ndim != 3 or matrix.is_swizzled:
        raise ValueError(f"{name}: expected [L, rows, K] with linear block scales, got {matrix}")
    if not bool((matrix.global_scale == 1).all()):
        raise ValueError(f"{name}: the contest's forms carry no global scale; it must be 1, got {matrix.global_scale.tolist()}")


def _views(matrix: NVFP4Tensor) -> tuple[Tensor, Tensor]:
    codes = matrix.codes.permute(1, 2, 0).view(torch.float4_e2m1fn_x2)
    return codes, matrix.block_scale.permute(1, 2, 0)


def _permuted(matrix: NVFP4Tensor, padding: Tensor | None = None) -> Tensor:
    layout = SwizzledLayout(matrix.rows, matrix.k // BLOCK)
    stored = layout.store(matrix.block_scale)
    if padding is not None:
        inside = layout.store(torch.ones_like(matrix.block_scale, dtype=torch.uint8)).bool()
        stored = torch.where(inside, stored.view(torch.uint8), padding.view(torch.uint8)).view(stored.dtype)
    return stored.permute(_PERMUTED)


def _matrix(codes: Tensor, scale: Tensor) -> NVFP4Tensor:
    one = torch.ones((), dtype=torch.float32, device=codes.device)
    raw = codes.view(torch.uint8).permute(2, 0, 1).contiguous()
    return NVFP4Tensor(raw, scale.permute(2, 0, 1).contiguous(), one)


def _nvfp4(codes: Tensor, scale: Tensor, device: torch.device | str) -> NVFP4Tensor:
    """One code a byte `[L, R, K]` and float32 scales `[L, R, K/16]` that e4m3 holds, as an operand."""
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return NVFP4Tensor(packed, scale.to(torch.float8_e4m3fn), torch.ones(())).to(device)


# ---- the public data ----


def _public_codes(rows: int, k: int, batch: int, generator: torch.Generator) -> Tensor:
    # 0xff is never drawn, and the mask leaves sign and two bits of each nibble: 0, 0.5, 1, 1.5 with either sign
    drawn = torch.randint(255, (batch, rows, k // 2), dtype=torch.uint8, device=generator.device, generator=generator)
    return drawn & 0b1011_1011


def _randn(m: int, n: int, batch: int, generator: torch.Generator) -> Tensor:
    return torch.randn((batch, m, n), dtype=torch.float16, device=generator.device, generator=generator)


def public_dual(shape: DualShape, seed: int = SEED, device: torch.device | str = "cpu") -> DualData:
    """The data of `nvfp4_dual_gemm` (as its generator is since 2025-12-23): bytes of a, b1, b2, then c, then the scales,
    which are uniform in [0, 1) before they are rounded to e4m3."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = (shape.m, shape.n, shape.n)
    codes = [_public_codes(r, shape.k, shape.batch, generator) for r in rows]
    c = _randn(shape.m, shape.n, shape.batch, generator)
    one = torch.ones((), device=generator.device)
    scales = [
        torch.rand((shape.batch, r, shape.k // BLOCK), device=generator.device, generator=generator).to(torch.float8_e4m3fn)
        for r in rows
    ]
    a, b1, b2 = (NVFP4Tensor(x, scale, one) for x, scale in zip(codes, scales, strict=True))
    return DualData(a, b1, b2, c)


def public_group(shape: GroupShape, seed: int = SEED, device: torch.device | str = "cpu") -> GroupData:
    """The data of `nvfp4_group_gemm`: per group bytes of a and b, then c, then scales that are 1 or 2 (drawn on the CPU),
    then the padding of the permuted scales, 1 or 2 as well."""
    on_device = torch.Generator(device).manual_seed(seed)
    on_cpu = on_device if on_device.device.type == "cpu" else torch.Generator().manual_seed(seed)
    groups, padding = [], []
    for m, n, k in shape.sizes:
        codes = [_public_codes(rows, k, 1, on_device) for rows in (m, n)]
        c = _randn(m, n, 1, on_device)
        one = torch.ones((), device=on_device.device)
        scales = [_one_or_two((1, rows, k // BLOCK), on_cpu).to(on_device.device) for rows in (m, n)]
        pads = [_one_or_two((1, *SwizzledLayout(rows, k // BLOCK).storage_shape), on_device) for rows in (m, n)]
        a, b = (NVFP4Tensor(x, scale, one) for x, scale in zip(codes, scales, strict=True))
        groups.append((a, b, c))
        padding.append((pads[0], pads[1]))
    return GroupData(tuple(groups), tuple(padding))


def _one_or_two(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn = torch.randint(1, 3, shape, dtype=torch.int8, device=generator.device, generator=generator)
    return drawn.to(torch.float8_e4m3fn)


def public_mismatches(output: Tensor, expected: Tensor) -> int:
    """How many elements of float16 `output` the public problems reject against `expected`: |difference| beyond
    1e-3 + 1e-3 * |expected|, both in float16, or NaN or infinity in one of the two only."""
    wrong = (output - expected).abs() > 1e-3 + 1e-3 * expected.abs()
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong |= test(output) ^ test(expected)
    return int(wrong.sum())


# ---- data beside it ----


def full_range_dual(shape: DualShape, seed: int, device: torch.device | str = "cpu") -> DualData:
    """All 16 codes, block scales from 0 and the subnormals to 448, c full of NaN; the same numbers on every device.

    Without a global scale the range has to cancel between the factors: the exponents of the scales of a and of b1, b2
    add up to one constant in every 16-block of K, and where one side is near 448 the other is subnormal and sparse. That
    keeps the standard deviation of both products near 2, where SiLU is far from linear, and C inside float16.
    """
    generator = torch.Generator().manual_seed(seed)
    a, b1, b2 = _full_range((shape.m, shape.n, shape.n), shape.k, shape.batch, generator)
    return _dual_data(shape, (a, b1, b2), device)


def full_range_group(shape: GroupShape, seed: int, device: torch.device | str = "cpu") -> GroupData:
    """`full_range_dual`'s operands for every group."""
    generator = torch.Generator().manual_seed(seed)
    operands = [_full_range((m, n), k, 1, generator) for m, n, k in shape.sizes]
    return _group_data(shape, operands, device)


def exact_dual(shape: DualShape, seed: int, device: torch.device | str = "cpu") -> DualData:
    """Operands whose result has one right bit pattern, however it is summed; c full of NaN.

    Every scale is a power of two and those of a and b cancel in each 16-block, so all terms are multiples of 2^-6 and all
    partial sums exact in float32. Every gate is an integer of magnitude 32 to 576, where sigmoid is 1 or 0 to float32, and
    |up| stays below 256: gate * up then needs at most 24 bits, and rounding it to float16 is the only rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    k, batch = shape.k, shape.batch
    exponent = torch.randint(-8, 5, (k // BLOCK,), generator=generator)
    integers = torch.tensor([2, 4, 5, 6, 7], dtype=torch.uint8)  # codes of 1, 2, 3, 4, 6
    a = integers[torch.randint(5, (batch, shape.m, k), generator=generator)]
    # 16 codes of 2 to 6 in each row of b1, all of one sign: with a >= 1 each gate is at least 32
    where = torch.rand((batch, shape.n, k), generator=generator).topk(min(16, k), dim=-1).indices
    large = torch.randint(4, 8, where.shape, generator=generator, dtype=torch.uint8)
    sign = (torch.rand((batch, shape.n, 1), generator=generator) < 0.125).to(torch.uint8) << 3
    b1 = torch.zeros((batch, shape.n, k), dtype=torch.uint8).scatter_(-1, where, large | sign)
    b2 = torch.randint(16, (batch, shape.n, k), generator=generator, dtype=torch.uint8)
    exponents = (exponent, -exponent, -exponent - 5)
    operands = [(codes, _power_scales(e, codes)) for codes, e in zip((a, b1, b2), exponents, strict=True)]
    return _dual_data(shape, operands, device)


def exact_group(shape: GroupShape, seed: int, device: torch.device | str = "cpu") -> GroupData:
    """All codes under power-of-two scales that cancel in each 16-block: sums of multiples of 1/4, exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    operands = []
    for m, n, k in shape.sizes:
        exponent = torch.randint(-8, 9, (k // BLOCK,), generator=generator)
        codes = [torch.randint(16, (1, rows, k), generator=generator, dtype=torch.uint8) for rows in (m, n)]
        exponents = (exponent, -exponent)
        operands.append([(x, _power_scales(e, x)) for x, e in zip(codes, exponents, strict=True)])
    return _group_data(shape, operands, device)


def _full_range(rows: Sequence[int], k: int, batch: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of the left operand (`rows[0]`) and of the right ones; K needs two 16-blocks or more."""
    blocks = k // BLOCK
    # two uniform e2m1 codes and two mantissas give a term's square the mean 8.56^2 * 2.1^2, about 323: times K, 1.5 squared
    shift = round(0.5 * math.log2(143 * k))
    exponent = torch.randint(-9, 10 - shift, (blocks,), generator=generator)
    left_wide, right_wide = torch.randperm(blocks, generator=generator)[:2].tolist()
    operands = []
    for i, r in enumerate(rows):
        wide, narrow, own = (left_wide, right_wide, exponent) if i == 0 else (right_wide, left_wide, -shift - exponent)
        codes = torch.randint(16, (batch, r, k), generator=generator, dtype=torch.uint8)
        mantissa = 1 + torch.randint(8, (batch, r, blocks), generator=generator) / 8
        scale = (mantissa * torch.exp2(own.float())).clamp(min=2.0**-9)
        scale[torch.rand(scale.shape, generator=generator) < 1 / 32] = 0.0
        scale[..., wide] = (
            torch.randint(0x50, 0x7F, (batch, r), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        )
        scale[:, 0, wide] = 448.0
        scale[..., narrow] = torch.randint(1, 8, (batch, r), generator=generator) * 2.0**-9
        sparse = codes[..., narrow * BLOCK : (narrow + 1) * BLOCK]
        keep = torch.rand(sparse.shape, generator=generator) < 1 / 32
        sparse.copy_((sparse & 8) | keep.to(torch.uint8))  # +-0.5 where kept, +-0 elsewhere
        operands.append((codes, scale))
    return operands


def _power_scales(exponent: Tensor, codes: Tensor) -> Tensor:
    return torch.exp2(exponent.float()).expand(*codes.shape[:-1], -1)


def _poison(m: int, n: int, batch: int) -> Tensor:
    return torch.full((batch, m, n), torch.nan, dtype=torch.float16)


def _dual_data(shape: DualShape, operands: Sequence[tuple[Tensor, Tensor]], device: torch.device | str) -> DualData:
    a, b1, b2 = (_nvfp4(codes, scale, device) for codes, scale in operands)
    return DualData(a, b1, b2, _poison(shape.m, shape.n, shape.batch).to(device))


def _group_data(
    shape: GroupShape, operands: Sequence[Sequence[tuple[Tensor, Tensor]]], device: torch.device | str
) -> GroupData:
    groups, padding = [], []
    for (m, n, k), (left, right) in zip(shape.sizes, operands, strict=True):
        groups.append((_nvfp4(*left, device), _nvfp4(*right, device), _poison(m, n, 1).to(device)))
        ones = [torch.ones((1, *SwizzledLayout(r, k // BLOCK).storage_shape), device=device) for r in (m, n)]
        padding.append((ones[0].to(torch.float8_e4m3fn), ones[1].to(torch.float8_e4m3fn)))
    return GroupData(tuple(groups), tuple(padding))
