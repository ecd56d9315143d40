"""How far from the specification a right result may be: a bound for each element, and an expected size for norms.

u = 2^-24 is the unit roundoff of float32. For one pre-activation p = sum(a_k b_k) * scales + bias let S = sum|a_k b_k|,
Q = sqrt(sum (a_k b_k)^2), both times the scales, and q the scaled sum without the bias. Products a_k b_k are exact in float32
(12 bits for NVFP4, 17 for fp16 or bf16 times a decoded weight; for float32 tokens each is rounded, which adds u S).

Bound of the accumulation, any order, the larger of
  - float32 additions rounded to nearest: gamma_{K-1} S, gamma_n = n u / (1 - n u)  (Higham, Accuracy and Stability, 4.2);
  - a tensor core that adds 16 products and the accumulator in one step, aligns the 17 addends to the largest and cuts them to
    at least 24 bits, then cuts the sum: 18 cuts of at most 2^-23 of the magnitudes so far, K/16 steps: 2.25 K u S.
    (Fasi, Higham, Mikaitis, Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"; Khattak and Mikaitis 2025, "Accurate
    models of NVIDIA tensor cores", for H100 and B200.) Longer steps cut less often.
Split-K adds at most K/16 - 1 roundings of parts; parts of at most K/2 products have at most half the bound, so it covers them.

Expected size of the accumulation error. In a random order the partial sums s_j form a Brownian bridge from 0 to q:
E s_j^2 = q^2 t^2 + Q^2 t (1 - t), t = j / K, with the mean over j  W^2 = q^2 / 3 + Q^2 / 6.
  - rounded to nearest: an error of at most u |s_j| / sqrt(3) RMS each time, independent: u W sqrt(K / 3);
  - tensor core, n = K / 16 steps: the cut of the sum is half a unit on average and always towards zero, 2^-24 W a step, and as
    much again for products that agree with the sum in sign; the 17 cuts of addends scatter by 2^-23 sqrt(17 / 12) of the
    largest addend, which is at most sqrt(q^2 + Q^2): together n 2^-23 W + sqrt(17 n / 12) 2^-23 sqrt(q^2 + Q^2).
The larger is taken. Scales: at most three roundings, 3 u |q|; the bias: one more, u |p|; both are common to many elements, so
their bounds serve as their sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.nvfp4 import NVFP4Tensor
from glu4.reference import round_once
from glu4.verify.case import Block, Case

__all__ = ["Measurement", "NormSums", "Terms", "block_terms", "measure", "norm_limit", "relative_error", "ulp"]

U = 2.0**-24
TINY = 2.0**-126  # float32 results below this may be flushed to zero
MMA_STEP = 16
# S is computed in float32, or coarser where the process allows torch.matmul that; S is a sum of positives, so 1/64 covers both
S_SLACK = 1 + 2.0**-6
# (1 + u)(1 + ...) products of the errors that the first-order bounds leave out
SECOND_ORDER = 1 + 2.0**-10

# float32 evaluation of gate' * sigmoid(t) * (up' + beta), t = alpha gate', in units of u, relative to the result. PTX ISA and
# CUDA programming guide: ex2.approx, __fdividef and expf within 2 ulp (5 u with the final half ulp), rcp.approx 1 ulp.
#   1 + e: 1   reciprocal or division: 5   times gate': 1   up' + beta: 1   product: 1   another order of these: 1
ACT_ULPS = 10.0
# exp(-t) itself enters with the weight d log sigmoid / d log e = 1 - sigmoid(t)
EXP_ULPS = 5.0
# and its argument with |t|: log2(e) rounded and multiplied; alpha rounded and multiplied too where it is not 1
ARGUMENT_ULPS = 2.0
ALPHA_ULPS = 2.0
# swish' (t) = sigmoid(t) + t sigmoid'(t) lies in [-0.0999, 1.0999], falls to the left of MINIMUM and rises from there to 0 on
# its left; |swish''| <= 1/2
SLOPE = 1.0999
SLOPE_MINIMUM = -2.4


@dataclass(frozen=True)
class Operand:
    """One pre-activation `[r, c]`, float64: its value, the error bound, and the RMS of the error to expect."""

    value: Tensor
    bound: Tensor
    rms: Tensor


@dataclass(frozen=True)
class Terms:
    """float64 `[r, c]`: the specified values and how far a float32 result may be (`bound`) and tends to be (`rms`) from
    them before the output rounding."""

    value: Tensor
    bound: Tensor
    rms: Tensor


def _sums(x: Tensor | NVFP4Tensor, w: NVFP4Tensor) -> tuple[Tensor, Tensor]:
    """S and Q `[r, c]`, float64, scales included."""
    a = (x.decode() if isinstance(x, NVFP4Tensor) else x.float()).abs()
    b = w.decode().abs()
    # rows brought to at most 1, so that no square overflows
    top = a.amax(-1, keepdim=True).clamp(min=TINY)
    a = a / top
    scale = top.double() * w.global_scale.double()
    if isinstance(x, NVFP4Tensor):
        scale = scale * x.global_scale.double()
    return (a @ b.mT).double() * scale * S_SLACK, ((a * a) @ (b * b).mT).double().sqrt() * scale * S_SLACK


def _operand(x: Tensor | NVFP4Tensor, w: NVFP4Tensor, value: Tensor, bias: Tensor | None) -> Operand:
    """The errors of one pre-activation, by the derivation at the top of this file."""
    k = w.k
    s, q2 = _sums(x, w)
    q = value if bias is None else value - bias.double()
    gamma = (k - 1) * U / (1 - (k - 1) * U)
    accumulation = max(gamma, 2.25 * k * U) + k * 2.0**-53
    if isinstance(x, Tensor) and x.dtype == torch.float32:
        accumulation += U
    fixed = 3 * U * q.abs() + (0 if bias is None else U * (value.abs() + q.abs())) + TINY
    w2 = q * q / 3 + q2 * q2 / 6
    steps = max(1.0, k / MMA_STEP)
    nearest = U * math.sqrt(k / 3) * w2.sqrt()
    cut = 2 * U * (steps * w2.sqrt() + math.sqrt(17 * steps / 12) * (q * q + q2 * q2).sqrt())
    return Operand(value, (accumulation * s + fixed) * SECOND_ORDER, (torch.maximum(nearest, cut) + fixed) * SECOND_ORDER)


def _swish(activation: Activation, gate: Tensor) -> Tensor:
    return gate * torch.sigmoid(activation.alpha * gate)


def _swish_error(activation: Activation, gate: Tensor, error: Tensor) -> Tensor:
    """A bound of |f(gate + d) - f(gate)| for |d| <= error, f(g) = g sigmoid(alpha g).

    The mean-value theorem with the largest slope nearby: swish' at the far end where it is monotonic (left of -2.4),
    elsewhere |swish'(t)| + |alpha| error / 2, at most 1.0999.
    """
    a = abs(activation.alpha)

    def slope(t: Tensor) -> Tensor:
        sigma = torch.sigmoid(t)
        return (sigma * (1 + t * (1 - sigma))).abs()

    t = activation.alpha * gate
    near = (slope(t) + 0.5 * a * error).clamp(max=SLOPE)
    right = t + a * error
    return torch.where(right < SLOPE_MINIMUM, slope(right), near) * error


def _clamp_error(value: Tensor, error: Tensor, low: float, high: float) -> Tensor:
    """How far clamp(value + d, low, high) may be from clamp(value, low, high), |d| <= error, with limits in float32."""
    ends = [(value + d).clamp(low, high) - value.clamp(low, high) for d in (error, -error)]
    rounding = max(abs(float(torch.tensor(v, dtype=torch.float32)) - v) for v in (low, high) if math.isfinite(v))
    return torch.maximum(ends[0].abs(), ends[1].abs()) + rounding


def _propagate(activation: Activation, gate: Tensor, up: Tensor, gate_error: Tensor, up_error: Tensor) -> Tensor:
    """|act(gate + d, up + e) - act(gate, up)| for |d| <= gate_error, |e| <= up_error, plus the float32 evaluation itself."""
    if activation.kind == "identity":
        moved = up.abs() * gate_error + gate.abs() * up_error + gate_error * up_error
        return moved + U * (gate * up).abs() + TINY
    limit = activation.limit
    if math.isfinite(limit):
        gate_error = _clamp_error(gate, gate_error, -math.inf, limit)
        up_error = _clamp_error(up, up_error, -limit, limit)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    # up' + beta: beta is rounded once, and so is the sum (in ACT_ULPS)
    v = up + activation.beta
    up_error = up_error + U * abs(activation.beta)
    f = _swish(activation, gate)
    f_error = _swish_error(activation, gate, gate_error)
    t = (activation.alpha * gate).abs()
    tail = torch.sigmoid(-activation.alpha * gate)
    argument = ARGUMENT_ULPS + (ALPHA_ULPS if activation.alpha != 1.0 else 0.0)
    evaluation = U * (ACT_ULPS + tail * (EXP_ULPS + argument * t))
    # where exp overflows or the sigmoid is below 2^-126 it may come out as zero
    flushed = TINY * (1 + (v.abs() + up_error) * (1 + gate.abs()))
    moved = v.abs() * f_error + f.abs() * up_error + f_error * up_error
    return moved + evaluation * (f.abs() + f_error) * (v.abs() + up_error) + flushed


def block_terms(block: Block, activation: Activation) -> Terms:
    """Values and errors of a part of a call, before the output rounding."""
    gate_value, up_value = block.preactivations()
    gate = _operand(block.x, block.gate, gate_value, block.gate_bias)
    if block.up is None or up_value is None:
        return Terms(gate.value, gate.bound, gate.rms)
    up = _operand(block.x, block.up, up_value, block.up_bias)
    value = activation(gate.value, up.value)
    bound, rms = (
        _propagate(activation, gate.value, up.value, g, e) * SECOND_ORDER + 2.0**-50 * value.abs()
        for g, e in ((gate.bound, up.bound), (gate.rms, up.rms))
    )
    return Terms(value, bound, rms)


# ---- norms ----


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at the finite float64 values `x` (of subnormals near zero), float64."""
    info = torch.finfo(dtype)
    smallest = math.log2(info.smallest_normal)
    # frexp gives zero the exponent 0
    exponent = torch.where(x == 0, smallest, torch.frexp(x).exponent.double() - 1)
    return torch.exp2(exponent.clamp(min=smallest)) * info.eps


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected|| in float64 over the elements where both are finite; 0 for two zeros."""
    out, expected = out.double(), expected.double()
    both = out.isfinite() & expected.isfinite()
    error = torch.where(both, out - expected, 0.0).norm()
    size = torch.where(both, expected, 0.0).norm()
    return float(error / size) if float(size) else (0.0 if float(error) == 0 else math.inf)


@dataclass
class NormSums:
    """The norm check: sums of squares over rows, columns and everything, against what a right result may reach.

    Each element counts with the weight 1 / (ulp + a)^2, so that every one has a say whatever its size (a plain Frobenius norm
    sees only the largest, where a wrong sigmoid is saturated; it is checked besides, weight 1).

    Limit. Let r be the output rounding error of the exact value, which is known, and e the element's error before the
    rounding, of RMS `rms`, a = 6 rms. The measured square is r^2 + x; x is 0 unless e moves the value past a rounding
    boundary. Over the position of the boundary E x = e^2; and x <= 2 ulp |e| + e^2, since past a boundary at a distance
    d <= |e| the square (ulp/2 - d)^2 becomes at most (ulp/2 + |e|)^2. With b = 2 ulp a + a^2: 0 <= x <= b and
    E x^2 <= b rms^2, so by Bernstein's inequality the sum of the squares exceeds

        sum r^2 + sum rms^2 + sqrt(2 t sum b rms^2) + t max b / 3

    with a probability of at most exp(-t), t = ln(1e12 * number of sums checked). Elements whose rounding may overflow are
    left out.
    """

    rows: Tensor  # [5, R]: measured, rounding, expected, variance, largest
    cols: Tensor  # [5, N]

    @classmethod
    def zeros(cls, rows: int, cols: int) -> NormSums:
        return cls(torch.zeros(5, rows, dtype=torch.float64), torch.zeros(5, cols, dtype=torch.float64))

    def add(self, block: Block, parts: Tensor) -> None:
        """Add a block's squares `[5, r, c]`."""
        for sums, where, dim in ((self.rows, block.rows, 2), (self.cols, block.cols, 1)):
            sums[:4, where] += parts[:4].sum(dim)
            sums[4, where] = torch.maximum(sums[4, where], parts[4].amax(dim - 1))

    @property
    def total(self) -> Tensor:
        """The same five over everything, `[5, 1]`."""
        largest = self.rows[4:].amax(1) if self.rows.shape[1] else torch.zeros(1, dtype=torch.float64)
        return torch.cat((self.rows[:4].sum(1), largest)).unsqueeze(1)


def _norm_parts(actual: Tensor, rounded: Tensor, terms: Terms, step: Tensor, weight: Tensor) -> Tensor:
    """`[5, r, c]`, what NormSums adds up; elements of weight 0 do not count."""
    a = 6 * terms.rms
    most = 2 * step * a + a * a
    rms2 = terms.rms.square()
    measured, rounding = (actual - terms.value).square(), (rounded - terms.value).square()
    parts = torch.stack((measured, rounding, rms2, most * rms2 * weight, most))
    return torch.where(weight > 0, parts * weight, 0.0)


@dataclass
class Measurement:
    """An output compared with a case, flattened to `[R, N]`: the elements that cannot be right, and the norms."""

    expected: Tensor  # float64, before rounding
    outside: Tensor  # bool: beyond the element's bound, or NaN or infinite where the value is not
    inexact: Tensor  # bool: not equal to the value rounded once
    frobenius: NormSums
    ulps: NormSums
    worst: float  # largest |error| / bound of the elements outside

    @property
    def norm_ratios(self) -> dict[str, float]:
        """Largest measured / limit of the root sums of squares, by norm and direction; above 1 is wrong."""
        ratios = {}
        for name, sums in (("frobenius", self.frobenius), ("ulp", self.ulps)):
            directions = (("", sums.total), (" row", sums.rows), (" column", sums.cols))
            for direction, part in directions[: 3 if name == "ulp" else 1]:
                limit = norm_limit(part)
                ratio = torch.where(part[0] > 0, (part[0] / limit).sqrt(), 0.0)
                ratios[name + direction] = float(ratio.amax()) if ratio.numel() else 0.0
        return ratios

    @property
    def agrees(self) -> bool:
        """No element outside its bound and no norm above its limit."""
        return not bool(self.outside.any()) and all(r <= 1 for r in self.norm_ratios.values())


def measure(case: Case, output: Tensor) -> Measurement:
    """Compare `output` (case.out_shape, case.out_dtype) with the specification, a part at a time."""
    shape = case.out_shape
    rows, cols = torch.Size(shape[:-1]).numel(), shape[-1]
    out = output.detach().cpu().reshape(rows, cols)
    expected = torch.zeros(rows, cols, dtype=torch.float64)
    outside, inexact = (torch.zeros(rows, cols, dtype=torch.bool) for _ in range(2))
    found = Measurement(expected, outside, inexact, NormSums.zeros(rows, cols), NormSums.zeros(rows, cols), 0.0)
    for block in case.blocks():
        where = (block.rows, block.cols)
        terms = block_terms(block, case.activation)
        actual = out[where].double()
        rounded, wrong, counted = _compare(actual, terms, case.out_dtype)
        expected[where] = terms.value
        outside[where] = wrong
        inexact[where] = (actual != rounded) & ~(actual.isnan() & rounded.isnan())
        excess = (actual - terms.value).abs() / terms.bound
        found.worst = max(found.worst, float(torch.where(wrong & excess.isfinite(), excess, 0.0).amax()))
        step = ulp(torch.where(counted, terms.value, 0.0), case.out_dtype)
        usable = Terms(*(torch.where(counted, t, 0.0) for t in (terms.value, terms.bound, terms.rms)))
        pair = (torch.where(counted, actual, 0.0), torch.where(counted, rounded, 0.0))
        found.frobenius.add(block, _norm_parts(*pair, usable, step, counted.double()))
        found.ulps.add(block, _norm_parts(*pair, usable, step, counted / (step + 6 * usable.rms).square()))
    return found


def _compare(actual: Tensor, terms: Terms, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(the value rounded once, elements outside their bound, elements whose norm can be taken), all `[r, c]`.

    Rounding is monotonic, so a right result lies between the roundings of value - bound and value + bound: this holds for
    subnormals, and where the value is near the overflow threshold it admits the largest number and infinity alike.
    """
    bound = terms.bound.nan_to_num(nan=math.inf)
    rounded, low, high = (round_once(v, dtype).double() for v in (terms.value, terms.value - bound, terms.value + bound))
    finite = terms.value.isfinite()
    same = (actual == terms.value) | (actual.isnan() & terms.value.isnan())
    wrong = ~torch.where(finite, (actual >= low) & (actual <= high), same)
    return rounded, wrong, finite & low.isfinite() & high.isfinite() & actual.isfinite()


def norm_limit(sums: Tensor) -> Tensor:
    """The largest sum of squares that a right result may have, for each column of `sums` `[5, count]`."""
    # rows: measured, rounding, expected, variance, largest
    t = math.log(1e12 * max(1, sums.shape[1]))
    return sums[1] + sums[2] + torch.sqrt(2 * t * sums[3]) + t / 3 * sums[4]
