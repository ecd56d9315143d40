"""Test cases: one call each, with operands that can show a fault, and the values it must give.

Random cases draw all 16 codes (negative zero too) and all 127 block scales (subnormals, zero blocks, 448), and distinct
global scales so that at least 95 % of the outputs are finite and non-zero; where asked (`active`), so that the gate's standard
deviation is 0.5 to 4, since SiLU hides errors of gates far from there. Draws that miss this are drawn again.
Exact cases have one right answer, bit for bit (the sign of a zero aside), whatever the order of the additions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from glu4.activation import IDENTITY, SILU, Activation, clamped_silu, swiglu_oai
from glu4.nvfp4 import BLOCK, NVFP4Tensor, pack_codes
from glu4.verify.case import Case, take_rows

__all__ = [
    "Case",
    "exact_sum_case",
    "full_range_case",
    "gate_std",
    "one_hot_case",
    "random_cases",
    "saturated_exact_case",
    "usable_fraction",
]

_ONE = 2  # the code of 1.0
HEAVY = 9  # exponent of the scales of an exact case's heavy pair
_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def _sample_indices(count: int, most: int, gen: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=gen)[:most].sort().values


def _sampled(case: Case) -> Case:
    gen = torch.Generator().manual_seed(case.seed)
    return case.sample(_sample_indices(case.x.shape[-2], 64, gen), _sample_indices(case.gate.rows, 64, gen))


def usable_fraction(case: Case) -> float:
    """Fraction of the outputs (of at most 64 x 64 sampled ones a matrix) that are finite and not zero in `out_dtype`."""
    out = _sampled(case).expected()
    return float((out.isfinite() & (out != 0)).double().mean()) if out.numel() else 1.0


def gate_std(case: Case) -> float:
    """Standard deviation of the gate's pre-activations, of the same sampled outputs; NaN for fewer than two of them."""
    values = [block.preactivations()[0].flatten() for block in _sampled(case).blocks()]
    return float(torch.cat(values).std()) if values else float("nan")


# ---- random cases ----

# inclusive ranges of block-scale bytes: everything; subnormal and small; around one; large
_PROFILES = ((0x01, 0x7E), (0x01, 0x17), (0x30, 0x40), (0x60, 0x7E))


@dataclass(frozen=True)
class _Draw:
    """One attempt at a random case: a generator and what is drawn from it."""

    gen: torch.Generator

    def integer(self, low: int, high: int) -> int:
        """low <= i < high."""
        return int(torch.randint(low, high, (), generator=self.gen))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.gen, dtype=torch.float64))

    def matrix(self, batch: Sequence[int], rows: int, k: int) -> NVFP4Tensor:
        """All 16 codes; block scales of one profile, 1 % of them zero; global scale 1; either scale layout."""
        low, high = _PROFILES[self.integer(0, len(_PROFILES))]
        codes = torch.randint(0, 256, (*batch, rows, k // 2), generator=self.gen, dtype=torch.uint8)
        shape = (*batch, rows, k // BLOCK)
        scale = torch.randint(low, high + 1, shape, generator=self.gen, dtype=torch.uint8)
        scale[torch.rand(shape, generator=self.gen) < 0.01] = 0
        return NVFP4Tensor(codes, scale.view(torch.float8_e4m3fn), torch.ones(batch))

    def x(self, batch: Sequence[int], rows: int, k: int, x_format: str) -> NVFP4Tensor | Tensor:
        """Tokens: an NVFP4 matrix, or normal values of a random size with zeros of both signs among them."""
        if x_format == "nvfp4":
            t = self.matrix(batch, rows, k)
            return replace(t, global_scale=2.0 ** (torch.rand(batch, generator=self.gen) * 16 - 12))
        x = torch.randn((*batch, rows, k), generator=self.gen) * 2.0 ** self.uniform(-4, 4)
        zero = torch.rand(x.shape, generator=self.gen) < 0.01
        return torch.where(zero, torch.copysign(torch.zeros(()), x), x).to(_FLOATS[x_format])

    def scaled(self, x: NVFP4Tensor | Tensor, w: NVFP4Tensor, std: float | Tensor) -> NVFP4Tensor:
        """`w` with global scales that give its products with x the standard deviation `std` (`[]` or one a matrix)."""
        values = x.dequantize() if isinstance(x, NVFP4Tensor) else x.float()
        values = values[..., _sample_indices(values.shape[-2], 64, self.gen), :]
        rows = _sample_indices(w.rows, 64, self.gen)
        products = values @ take_rows(w, rows).decode().mT
        raw = products.flatten(-2).std(-1, correction=0).reshape(w.shape[:-2]) if products.numel() else torch.ones(w.shape[:-2])
        return replace(w, global_scale=std / torch.where(raw > 0, raw, 1.0))

    def weights(
        self, x: NVFP4Tensor | Tensor, batch: Sequence[int], n: int, std: float, unit_global_scale: bool
    ) -> tuple[NVFP4Tensor | Tensor, NVFP4Tensor, NVFP4Tensor]:
        """x, and gate and up with global scales at least 5 % apart that give the gate the standard deviation `std`."""
        gate, up = (self.matrix(batch, n, x.shape[-1]) for _ in range(2))
        if unit_global_scale:
            return self.unit_scales(x, gate, up, std)
        gate = self.scaled(x, gate, std)
        up = self.scaled(x, up, std * 2.0 ** (torch.rand(batch, generator=self.gen) * 3 - 1.5))
        near = (up.global_scale / gate.global_scale - 1).abs() < 0.1
        return x, gate, replace(up, global_scale=torch.where(near, up.global_scale * 1.3, up.global_scale))

    def biases(self, shape: Sequence[int], std: float) -> tuple[Tensor, Tensor]:
        """Gate and up bias of half the standard deviation, float32 or bfloat16."""
        gate, up = (torch.randn(shape, generator=self.gen) * std * 0.5 for _ in range(2))
        return (gate.to(torch.bfloat16), up.to(torch.bfloat16)) if self.integer(0, 2) else (gate, up)

    def unit_scales(
        self, x: NVFP4Tensor | Tensor, gate: NVFP4Tensor, up: NVFP4Tensor, std: float
    ) -> tuple[NVFP4Tensor, NVFP4Tensor, NVFP4Tensor]:
        """The operands with global scales 1 and block scales that give the gate about the standard deviation `std`.

        A product of a token's and a weight's block scale is about 2^(2 * half). Within that, tokens' scales rise, by a
        random power of two for each block column, where the weights' fall, so that both run over the format.
        """
        assert isinstance(x, NVFP4Tensor)

        def with_scales(t: NVFP4Tensor, exponent: Tensor) -> NVFP4Tensor:
            spread = torch.rand(t.linear_block_scale().shape, generator=self.gen) * 1.5 - 0.75
            scale = (2.0 ** (exponent + spread)).clamp(2.0**-9, 448.0)
            scale[torch.rand(scale.shape, generator=self.gen) < 0.01] = 0
            return NVFP4Tensor(t.codes, scale.to(torch.float8_e4m3fn), torch.ones_like(t.global_scale))

        # the mean square of e2m1 over its 16 codes is 8.6; scales about 2^half keep both operands in range
        half = 0.5 * math.log2(std / (8.6 * math.sqrt(x.k)))
        rise = (torch.rand(x.k // BLOCK, generator=self.gen) * 2 - 1) * max(1.0, 8 + half)
        x = with_scales(x, half + rise)
        gate, up = (with_scales(w, half - rise) for w in (gate, up))
        return x, gate, up


def _offsets(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)


def full_range_case(
    seed: int,
    m: int,
    n: int,
    k: int,
    *,
    batch: int | None = None,
    group_sizes: Sequence[int] | None = None,
    x_format: str = "nvfp4",
    out_dtype: torch.dtype = torch.float16,
    activation: Activation = SILU,
    linear: bool = False,
    bias: bool = False,
    active: bool = True,
    unit_global_scale: bool = False,
) -> Case:
    """Random operands over the whole format, the same for the same arguments.

    batch              L matrices of x `[m, k]` with L gate and up matrices
    group_sizes        rows of each expert (empty ones allowed); m must be their sum
    x_format           "nvfp4", "float16", "bfloat16" or "float32"
    linear             one weight matrix, no activation
    active             gate standard deviation 0.5 to 4; otherwise 2^-5 to 0.5 or 4 to 8
    unit_global_scale  every global scale 1, as in the GPU MODE contract: the scales' range is then what makes outputs finite

    Draws until 95 % of the outputs are finite and non-zero and the gate is as asked; RuntimeError if 200 draws do not
    give that. ValueError for sizes that do not fit together.
    """
    if group_sizes is not None and (sum(group_sizes) != m or batch is not None):
        raise ValueError(f"group_sizes: expected sizes that sum to m = {m}, without batch, got {list(group_sizes)}")
    if min(m, n) < 0 or k <= 0 or k % BLOCK:
        raise ValueError(f"m, n, k: expected non-negative m and n and a positive k that {BLOCK} divides, got {m}, {n}, {k}")
    if unit_global_scale and x_format != "nvfp4":
        raise ValueError(f'unit_global_scale: needs x_format "nvfp4", got {x_format!r}')
    for attempt in range(200):
        draw = _Draw(torch.Generator().manual_seed(seed * 1000 + attempt))
        x_batch = () if batch is None else (batch,)
        w_batch = x_batch if group_sizes is None else (len(group_sizes),)
        target = 2.0 ** (
            draw.uniform(-0.8, 1.8) if active else draw.uniform(-5, -1) if draw.integer(0, 2) else draw.uniform(2, 3)
        )
        x = draw.x(x_batch, m, k, x_format)
        x, gate, up = draw.weights(x, w_batch, n, target, unit_global_scale)
        biases = draw.biases((*w_batch, n), target) if bias else (None, None)
        case = Case(
            name=f"full_range {m}x{n}x{k} {x_format}",
            seed=seed,
            x=x.to_swizzled() if isinstance(x, NVFP4Tensor) and group_sizes is None and draw.integer(0, 2) else x,
            gate=gate.to_swizzled() if draw.integer(0, 2) else gate,
            up=None if linear else up.to_swizzled() if draw.integer(0, 2) else up,
            activation=IDENTITY if linear else activation,
            gate_bias=biases[0],
            up_bias=None if linear else biases[1],
            out_dtype=out_dtype,
            group_offsets=None if group_sizes is None else _offsets(group_sizes),
        )
        if m * n == 0 or _usable(case, active and not linear):
            return case
    raise RuntimeError(f"no usable case in 200 draws of seed {seed} for {m} x {n} x {k}")


def _usable(case: Case, active: bool) -> bool:
    if usable_fraction(case) < 0.95:
        return False
    return not active or case.x.shape[-2] * case.gate.rows < 2 or 0.5 <= gate_std(case) <= 4


def random_cases(seed: int, count: int) -> Iterator[Case]:
    """`count` small random cases of every kind: dense, batched, grouped, linear, grouped linear; W4A4 and W4A16; biases; all
    activations.

    Every other one has the gate's standard deviation in 0.5 to 4.
    """
    activations = (SILU, clamped_silu(2.5), clamped_silu(10.0), swiglu_oai(), IDENTITY)
    draw = _Draw(torch.Generator().manual_seed(seed))
    for i in range(count):
        m, n, k = draw.integer(1, 49), draw.integer(1, 49), BLOCK * int(2.0 ** draw.uniform(0, 5.5))
        shape = draw.integer(0, 4)
        sizes = [draw.integer(0, 17) * draw.integer(0, 3) for _ in range(draw.integer(1, 6))]
        yield full_range_case(
            seed * 100_003 + i,
            sum(sizes) if shape == 1 else m,
            n,
            k,
            batch=draw.integer(1, 4) if shape == 2 else None,
            group_sizes=sizes if shape == 1 else None,
            x_format=("nvfp4", "nvfp4", "float16", "bfloat16")[draw.integer(0, 4)],
            out_dtype=(torch.float16, torch.bfloat16)[draw.integer(0, 2)],
            activation=activations[draw.integer(0, len(activations))],
            linear=(shape == 3 and draw.integer(0, 2) == 1) or (shape == 1 and i % 3 == 0),
            bias=draw.integer(0, 2) == 1,
            active=i % 2 == 0,
        )


# ---- exact cases ----


def _scale(exponents: Tensor) -> Tensor:
    """Block scales 2^e, float8_e4m3fn; e from -9 to 8."""
    return (2.0 ** exponents.double()).to(torch.float8_e4m3fn)


def _as_format(x: NVFP4Tensor, x_format: str) -> NVFP4Tensor | Tensor:
    """x itself, or its exact values in a float type; the values are then taken without the global scale."""
    return x if x_format == "nvfp4" else x.decode(_FLOATS[x_format])


def one_hot_case(
    seed: int,
    m: int = 16,
    n: int = 128,
    k: int = 16,
    *,
    which: Literal["gate", "up"] = "gate",
    x_format: str = "nvfp4",
    out_dtype: torch.dtype = torch.float16,
    linear: bool = False,
) -> Case:
    """Rows of x are one-hot and the other matrix is all ones, so that the output is the decoded weight, bit for bit.

    Row i picks k = i modulo K. Blocks run through all 127 block scales and each holds all 16 codes in a random order,
    so that n * k / 16 >= 127 and m >= k show every decoded value, both signs. Global scales are powers of two whose
    product lies between 2^-4 and 2^4, where every decoded value is exact in float16 (knowledge: 6 significant bits,
    2^-10 to 2688; 2^5 overflows); 6 bits are exact in bfloat16 at any scale.
    """
    draw = _Draw(torch.Generator().manual_seed(seed))
    one = NVFP4Tensor(
        torch.full((n, k // 2), _ONE * 0x11, dtype=torch.uint8), _scale(torch.zeros(n, k // BLOCK)), torch.tensor(1.0)
    )
    hot = torch.arange(m) % k
    codes = torch.zeros((m, k), dtype=torch.uint8).scatter_(1, hot[:, None], _ONE)
    x = NVFP4Tensor(pack_codes(codes), _scale(torch.zeros(m, k // BLOCK)), torch.tensor(1.0))
    order = torch.rand((n, k // BLOCK, BLOCK), generator=draw.gen).argsort(-1).to(torch.uint8)
    raw = (torch.arange(n * (k // BLOCK)) + draw.integer(0, 127)).remainder(127).to(torch.uint8).view(n, -1)
    shown = NVFP4Tensor(pack_codes(order.flatten(-2)), raw.view(torch.float8_e4m3fn), torch.tensor(1.0))
    total = draw.integer(-4, 5)
    x_exp, one_exp = (draw.integer(-3, 4), draw.integer(-3, 4)) if x_format == "nvfp4" else (0, draw.integer(-3, 4))
    x = replace(x, global_scale=torch.tensor(2.0**x_exp))
    if linear:
        shown, one_exp, uses = replace(shown, global_scale=torch.tensor(2.0 ** (total - x_exp))), 0, 1
    else:
        uses = 2
        shown = replace(shown, global_scale=torch.tensor(2.0 ** (total - uses * x_exp - one_exp)))
    one = replace(one, global_scale=torch.tensor(2.0**one_exp))
    gate, up = (shown, one) if which == "gate" or linear else (one, shown)
    return Case(
        name=f"one_hot {which} {x_format}",
        seed=seed,
        x=_as_format(x, x_format),
        gate=gate,
        up=None if linear else up,
        activation=IDENTITY,
        out_dtype=out_dtype,
        kind="one_hot",
        exact=True,
    )


@dataclass(frozen=True)
class _Operands:
    """Operands of an exact case in blocks of 16: codes `[..., rows, K/16, 16]` and exponents of their block scales.

    `roles` is a random order of the block columns; cancelling pairs take the last `2 * pairs` of it. The weights of a
    pair's second block are the first's with the signs flipped and x is the same in both, so that a pair adds nothing to the
    result while its large addends pass through every accumulator: one that keeps too few bits, or a kernel that drops or
    repeats a block, cannot return the exact sum.
    """

    roles: Tensor
    pairs: int
    x: Tensor
    x_exponents: Tensor
    weights: tuple[Tensor, Tensor]
    exponents: Tensor  # [K/16], of both weights

    @classmethod
    def draw(cls, draw: _Draw, x_shape: tuple[int, ...], w_shape: tuple[int, ...], blocks: int, own: int) -> _Operands:
        """Zeros of both signs, block exponents p for x and -p for the weights, and the cancelling pairs; at least
        `own` block columns are left to the caller.

        Every addend is a multiple of q = 2^-2. One heavy pair multiplies codes of 4 and 6 under scales of 2^9, so that
        a partial sum between its blocks is about 16 * 100 * 2^9 q = 2^19.6 q; the others have random codes and the scales
        2^e that keep all magnitudes together below (2^24 - 2^13) q, two bits for the row shifts of exact_sum included.
        Every partial sum is then exact in float32, and in an accumulator that aligns addends to 24 bits, in any order.
        """
        pairs = max(0, min(blocks // 4, (blocks - own) // 2, 128))
        roles = torch.randperm(blocks, generator=draw.gen)
        rise = torch.randint(-8, 7, (blocks,), generator=draw.gen)
        x, gate, up = (
            torch.randint(0, 2, (*shape, blocks, BLOCK), generator=draw.gen, dtype=torch.uint8) * 8
            for shape in (x_shape, w_shape, w_shape)
        )
        fall = -rise
        if pairs:
            first, second = roles[-2 * pairs : -pairs], roles[-pairs:]
            # 144 q is the largest product of two codes
            left = 2**24 - 2**13 - 4 * 2 * BLOCK * 144 * 2**HEAVY
            top = int(math.log2(left / (4 * 2 * BLOCK * 144 * max(1, pairs - 1))))
            for i, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
                e = HEAVY if i == 0 else min(HEAVY, top if draw.integer(0, 2) else draw.integer(0, top + 1))
                rise[a] = rise[b] = draw.integer(e - 8, 7)
                fall[a] = fall[b] = e - int(rise[a])
            for t, sign in ((x, 0), (gate, 8), (up, 8)):
                codes = torch.randint(0, 16, (*t.shape[:-2], pairs, BLOCK), generator=draw.gen, dtype=torch.uint8)
                codes[..., 0, :] = codes[..., 0, :] % 2 + 6
                t[..., first, :] = codes
                t[..., second, :] = codes ^ sign
        return cls(roles, pairs, x, rise.expand(*x_shape, blocks).clone(), (gate, up), fall)

    @property
    def free(self) -> Tensor:
        """The block columns left to the caller."""
        return self.roles[: self.roles.numel() - 2 * self.pairs]

    def sparse_rows(self, draw: _Draw, columns: Tensor, most: Tensor) -> Tensor:
        """True `[..., rows, len(columns), 16]` at `most` `[..., rows]` random places of each row of x (fewer if there are)."""
        rank = torch.rand((*self.x.shape[:-2], columns.numel() * BLOCK), generator=draw.gen).argsort(-1).argsort(-1)
        return (rank < most.unsqueeze(-1)).view(*self.x.shape[:-2], -1, BLOCK)

    def tensors(self, global_scales: tuple[Tensor, Tensor, Tensor]) -> tuple[NVFP4Tensor, NVFP4Tensor, NVFP4Tensor]:
        """x, gate and up with these global scales, each `[]` or the leading dimensions."""
        exponents = (self.x_exponents, *(self.exponents.expand(w.shape[:-1]) for w in self.weights))
        x, gate, up = (
            NVFP4Tensor(pack_codes(codes.flatten(-2)), _scale(e), g)
            for codes, e, g in zip((self.x, *self.weights), exponents, global_scales, strict=True)
        )
        return x, gate, up


def exact_sum_case(
    seed: int,
    m: int,
    n: int,
    k: int,
    *,
    batch: int | None = None,
    group_sizes: Sequence[int] | None = None,
    x_format: str = "nvfp4",
    out_dtype: torch.dtype = torch.float16,
    linear: bool = False,
    unit_global_scale: bool = False,
) -> Case:
    """Operands whose partial sums are all exact in float32 in any order, so that one result is right, bit for bit.

    Every addend is a multiple of q = 2^-2, and sum|a*b| <= 2^24 q (see `_Operands.draw`). A row of x has at most
    28 * 2^-r non-zeros outside the cancelling blocks, shifted left by r = 0, 1 or 2, so that a sum is at most
    28 * 144 q: 12 bits. Activation is identity and the global scales are powers of two (different for gate and up, and
    for each matrix), so the product of gate and up has 24 bits, exact in float32, and the output rounding is the only
    one. The product of all global scales is 2^-5, which keeps the result within float16's normal range.
    """
    draw = _Draw(torch.Generator().manual_seed(seed))
    x_batch = () if batch is None else (batch,)
    w_batch = x_batch if group_sizes is None else (len(group_sizes),)
    ops = _Operands.draw(draw, (*x_batch, m), (*w_batch, n), k // BLOCK, own=1)
    shift = torch.randint(0, 3, (*x_batch, m), generator=draw.gen)
    ops.x_exponents.add_(shift.unsqueeze(-1))
    free = ops.free
    place = ops.sparse_rows(draw, free, 28 // 2**shift)
    codes = torch.randint(1, 8, place.shape, generator=draw.gen, dtype=torch.uint8)
    ops.x[..., free, :] |= torch.where(place, codes, torch.zeros_like(codes))
    for w in ops.weights:
        w[..., free, :] = torch.randint(0, 16, (*w.shape[:-2], free.numel(), BLOCK), generator=draw.gen, dtype=torch.uint8)
    x_exp = draw.integer(-2, 3) if x_format == "nvfp4" else 0
    gate_exp = draw.integer(-3, 4) + torch.arange(torch.Size(w_batch).numel()).reshape(w_batch) % 2
    # -5 - 2 x_exp - gate_exp is gate_exp only for an odd sum of 5: never, so the two always differ
    up_exp = -5 - 2 * x_exp - gate_exp
    scales = [2.0 ** torch.as_tensor(e).float() for e in (torch.full(x_batch, x_exp), gate_exp, up_exp)]
    if unit_global_scale:
        scales = [torch.ones_like(g) for g in scales]
    x, gate, up = ops.tensors((scales[0], scales[1], scales[2]))
    return Case(
        name=f"exact_sum {m}x{n}x{k} {x_format}",
        seed=seed,
        x=_as_format(x, x_format),
        gate=gate,
        up=None if linear else up,
        activation=IDENTITY,
        out_dtype=out_dtype,
        group_offsets=None if group_sizes is None else _offsets(group_sizes),
        kind="exact_sum",
        exact=True,
    )


def saturated_exact_case(
    seed: int, m: int, n: int, k: int, *, batch: int | None = None, out_dtype: torch.dtype = torch.float16
) -> Case:
    """The exact-sum case for a contract that fixes SiLU and has no global scales.

    One block column gives every gate sum 48 (and nothing to up); the others add integers of at most 15 to either, so
    the gate is an integer from 33 to 63 and up one from -15 to 15. 1 - sigmoid(33) is under 2^-47, so silu(g) = g to far below
    half an ulp, and the product has at most 10 bits: exact in float16, whatever the last bits of the sigmoid. Raises
    ValueError for k < 32 and for an output type of fewer than 11 bits.
    """
    if k < 2 * BLOCK or out_dtype == torch.bfloat16:
        raise ValueError(f"k, out_dtype: expected k >= 32 and float16 or float32, got {k}, {out_dtype}")
    draw = _Draw(torch.Generator().manual_seed(seed))
    lead = () if batch is None else (batch,)
    ops = _Operands.draw(draw, (*lead, m), (*lead, n), k // BLOCK, own=2)
    anchor, free = int(ops.free[0]), ops.free[1:]
    ops.x_exponents[..., anchor] = 0
    ops.exponents[anchor] = 3
    hot = torch.randint(0, BLOCK, (*lead, m, 1), generator=draw.gen)
    ops.x[..., anchor, :].scatter_(-1, hot, _ONE)
    ops.weights[0][..., anchor, :] = 7  # 6 * 2^3 = 48
    # magnitudes 2^t in x meet 2^-t in the weights; their codes are 1, 2, 4 for 1/2, 1, 2
    t = torch.randint(0, 3, (free.numel(), BLOCK), generator=draw.gen)
    power = torch.tensor([1, 2, 4], dtype=torch.uint8)
    place = ops.sparse_rows(draw, free, torch.full((*lead, m), 15))
    ops.x[..., free, :] |= torch.where(place, power[t], 0).to(torch.uint8)
    for w in ops.weights:
        kept = torch.rand((*w.shape[:-2], free.numel(), BLOCK), generator=draw.gen) < 0.75
        w[..., free, :] |= torch.where(kept, power[2 - t], 0).to(torch.uint8)
    one = torch.ones(lead)
    x, gate, up = ops.tensors((one, one, one))
    name = f"saturated {m}x{n}x{k}"
    return Case(name=name, seed=seed, x=x, gate=gate, up=up, out_dtype=out_dtype, kind="exact_sum", exact=True)
