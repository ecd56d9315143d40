"""Named mistakes: what would have been computed instead, as a changed case, a changed output or changed values.

A hypothesis yields variants. Most change operands or the activation of the case, so that the specification computes
what the mistake would give and the ordinary limits say whether the output agrees with that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from glu4.activation import IDENTITY, SILU, Activation
from glu4.nvfp4 import BLOCK, NVFP4Tensor
from glu4.reference import round_once
from glu4.scale_layout import SwizzledLayout
from glu4.verify.case import Block, Case
from glu4.verify.metrics import relative_error

__all__ = ["HYPOTHESES", "Hypothesis", "Probe", "Variant", "k_range", "pick", "same_operands"]

OperandName = Literal["x", "gate", "up"]


@dataclass(frozen=True, eq=False)
class Probe:
    """A wrong result, and the rows and columns of it that are looked at.

    whole, whole_output   the case and the output `[..., M, N]` on the CPU
    case, output          the same at the sampled `rows` and `cols`
    worst                 a few of the most wrong of them: indices into the sampled rows and columns
    """

    whole: Case
    whole_output: Tensor
    rows: Tensor
    cols: Tensor
    worst: tuple[Tensor, Tensor]
    case: Case
    output: Tensor

    @classmethod
    def at(cls, whole: Case, output: Tensor, rows: Tensor, cols: Tensor, worst: tuple[Tensor, Tensor] | None = None) -> Probe:
        """A probe at these rows and columns, all of them the worst unless told which are."""
        worst = worst or (torch.arange(rows.numel()), torch.arange(cols.numel()))
        return cls(whole, output, rows, cols, worst, whole.sample(rows, cols), pick(output, rows, cols))

    @property
    def few(self) -> Probe:
        """The most wrong places alone."""
        return Probe.at(self.whole, self.whole_output, self.rows[self.worst[0]], self.cols[self.worst[1]])


@dataclass(frozen=True, eq=False)
class Variant:
    """What one form of a mistake would give at the sampled places.

    case    its specified result is what the mistake computes
    output  the output put back in place, where the mistake moved it
    values  float64 values before the output rounding, where no case has them (a rounding in between)
    """

    detail: str
    case: Case
    output: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Hypothesis:
    """A named mistake; `sentence` follows "the output is what comes out when"."""

    name: str
    sentence: str
    variants: Callable[[Probe], Iterator[Variant]]


def pick(t: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Rows and columns of every matrix `[..., M, N]`."""
    return t.index_select(-2, rows).index_select(-1, cols)


# ---- changes of operands ----


def _operands(case: Case) -> dict[OperandName, NVFP4Tensor]:
    named: dict[OperandName, NVFP4Tensor | Tensor | None] = {"x": case.x, "gate": case.gate, "up": case.up}
    return {name: t for name, t in named.items() if isinstance(t, NVFP4Tensor)}


def same_operands(a: Case, b: Case) -> bool:
    """Whether two variants of one case hold the same bytes: a change may have no effect on an operand."""

    def equal(s: NVFP4Tensor, t: NVFP4Tensor) -> bool:
        scales = (s.linear_block_scale().view(torch.uint8), t.linear_block_scale().view(torch.uint8))
        return torch.equal(s.codes, t.codes) and torch.equal(*scales) and torch.equal(s.global_scale, t.global_scale)

    mine, other = _operands(a), _operands(b)
    return mine.keys() == other.keys() and all(equal(mine[name], other[name]) for name in mine)


def _with(case: Case, changed: dict[OperandName, NVFP4Tensor]) -> Case:
    return replace(case, x=changed.get("x", case.x), gate=changed.get("gate", case.gate), up=changed.get("up", case.up))


def _on_operands(case: Case, change: Callable[[NVFP4Tensor], NVFP4Tensor]) -> Iterator[tuple[str, Case]]:
    """The case with `change` made to x, to gate, to up, to both weights, to all."""
    changed = {name: change(t) for name, t in _operands(case).items()}
    subsets: list[tuple[str, tuple[OperandName, ...]]] = [("x", ("x",)), ("gate", ("gate",)), ("up", ("up",))]
    subsets += [("gate and up", ("gate", "up")), ("x, gate and up", ("x", "gate", "up"))]
    if case.up is None:
        subsets = [("x", ("x",)), ("weight", ("gate",)), ("x and weight", ("x", "gate"))]
    for detail, names in subsets:
        if all(name in changed for name in names):
            yield detail, _with(case, {name: changed[name] for name in names})


def _local(change: Callable[[NVFP4Tensor], NVFP4Tensor], note: str = "") -> Callable[[Probe], Iterator[Variant]]:
    """Variants of a change that treats each row by itself, so that sampled rows are enough."""

    def variants(probe: Probe) -> Iterator[Variant]:
        for detail, case in _on_operands(probe.case, change):
            yield Variant(f"{note}{detail}", case)

    return variants


def _each(*parts: Callable[[Probe], Iterator[Variant]]) -> Callable[[Probe], Iterator[Variant]]:
    def variants(probe: Probe) -> Iterator[Variant]:
        for part in parts:
            yield from part(probe)

    return variants


def _map_scale(t: NVFP4Tensor, change: Callable[[Tensor], Tensor]) -> NVFP4Tensor:
    """`t` with float32 block-scale values changed; they stay e4m3 values."""
    return NVFP4Tensor(t.codes, change(t.linear_block_scale().float()).to(torch.float8_e4m3fn), t.global_scale)


def _nibbles(t: NVFP4Tensor) -> NVFP4Tensor:
    return replace(t, codes=(t.codes << 4) | (t.codes >> 4))


def _flush(threshold: float) -> Callable[[NVFP4Tensor], NVFP4Tensor]:
    return lambda t: _map_scale(t, lambda s: torch.where(s < threshold, 0.0, s))


def _flushes(probe: Probe) -> Iterator[Variant]:
    for e in range(-8, -1):
        yield from _local(_flush(2.0**e), f"scales below 2^{e} of ")(probe)


def _pair(first: int) -> Callable[[NVFP4Tensor], NVFP4Tensor]:
    def change(t: NVFP4Tensor) -> NVFP4Tensor:
        blocks = torch.arange(t.k // BLOCK)
        index = (blocks - blocks % 2 + first).clamp(max=t.k // BLOCK - 1)
        return _map_scale(t, lambda s: s[..., index])

    return change


def _half_index(t: NVFP4Tensor) -> NVFP4Tensor:
    return _map_scale(t, lambda s: s[..., torch.arange(t.k // BLOCK) // 2])


def _divisor(t: NVFP4Tensor) -> NVFP4Tensor:
    # up to 2^-128 the inverse is no float32, where a kernel with this mistake has infinity
    return replace(t, global_scale=(1 / t.global_scale).clamp(max=torch.finfo(torch.float32).max))


# ---- block-scale layouts: every row matters, so the whole operand is changed and then sampled ----


def _storage_as_linear(padded_stride: bool) -> Callable[[NVFP4Tensor], NVFP4Tensor]:
    def change(t: NVFP4Tensor) -> NVFP4Tensor:
        layout = SwizzledLayout(t.rows, t.k // BLOCK)
        scale = t.linear_block_scale()
        memory = layout.store(scale).view(torch.uint8).flatten(-5)
        stride = layout.rest_cols * 4 if padded_stride else layout.cols
        read = memory[..., : t.rows * stride].reshape(*scale.shape[:-2], t.rows, stride)[..., : layout.cols]
        return NVFP4Tensor(t.codes, read.contiguous().view(torch.float8_e4m3fn), t.global_scale)

    return change


def _linear_as_storage(t: NVFP4Tensor) -> NVFP4Tensor:
    """Bytes beyond the end of the linear scales are taken as zero."""
    layout = SwizzledLayout(t.rows, t.k // BLOCK)
    scale = t.linear_block_scale().view(torch.uint8)
    memory = torch.zeros((*scale.shape[:-2], layout.nbytes), dtype=torch.uint8)
    memory[..., : t.rows * layout.cols] = scale.flatten(-2)
    read = layout.load(memory.view(*scale.shape[:-2], *layout.storage_shape))
    return NVFP4Tensor(t.codes, read.view(torch.float8_e4m3fn), t.global_scale)


def _whole(change: Callable[[NVFP4Tensor], NVFP4Tensor]) -> Callable[[Probe], Iterator[Variant]]:
    def variants(probe: Probe) -> Iterator[Variant]:
        for detail, case in _on_operands(probe.whole, change):
            yield Variant(detail, case.sample(probe.rows, probe.cols))

    return variants


# ---- the formula ----


def _only_one(probe: Probe) -> Iterator[Variant]:
    case = probe.case
    if case.up is None:
        return
    yield Variant("gate", replace(case, up=None, up_bias=None, activation=IDENTITY))
    up = replace(case, gate=case.up, gate_bias=case.up_bias, up=None, up_bias=None, activation=IDENTITY)
    yield Variant("up", up)


def _no_activation(probe: Probe) -> Iterator[Variant]:
    if probe.case.activation.kind != "identity":
        yield Variant("", replace(probe.case, activation=IDENTITY))


def _swapped(case: Case) -> Case:
    assert case.up is not None
    return replace(case, gate=case.up, up=case.gate, gate_bias=case.up_bias, up_bias=case.gate_bias)


def _wrong_operand(probe: Probe) -> Iterator[Variant]:
    if probe.case.up is not None and probe.case.activation.kind != "identity":
        yield Variant("", _swapped(probe.case))


def _matrices_swapped(probe: Probe) -> Iterator[Variant]:
    case = probe.case
    if case.up is None:
        return
    gate = replace(case.up, global_scale=case.gate.global_scale)
    up = replace(case.gate, global_scale=case.up.global_scale)
    yield Variant("with each other's global scale", replace(case, gate=gate, up=up))
    if case.gate_bias is not None or case.up_bias is not None:
        yield Variant("biases in place", replace(case, gate=case.up, up=case.gate))


def _ones(case: Case) -> Case:
    """The case with up' + beta = 1: zero weights and a bias of 1 - beta."""
    assert case.up is not None
    zero = replace(case.up, codes=torch.zeros_like(case.up.codes))
    bias = torch.full(case.up.shape[:-1], 1 - case.activation.beta)
    return replace(case, up=zero, up_bias=bias)


def _product_missing(probe: Probe) -> Iterator[Variant]:
    case = probe.case
    if case.up is None or case.activation.kind == "identity":
        return
    yield Variant("act(gate)", _ones(case))
    yield Variant("act(up)", _ones(_swapped(case)))


def _constants_dropped(probe: Probe) -> Iterator[Variant]:
    a = probe.case.activation
    changes: dict[str, Activation] = {
        "limit": replace(a, limit=math.inf),
        "alpha": a if a.kind == "identity" else replace(a, alpha=1.0),
        "beta": a if a.kind == "identity" else replace(a, beta=0.0),
        "alpha, beta and limit": a if a.kind == "identity" else replace(a, alpha=1.0, beta=0.0, limit=math.inf),
    }
    tried = {a}
    for detail, changed in changes.items():
        if changed not in tried:
            tried.add(changed)
            yield Variant(detail, replace(probe.case, activation=changed))


def _bias_dropped(probe: Probe) -> Iterator[Variant]:
    case = probe.case
    if case.gate_bias is not None:
        yield Variant("gate" if case.up is not None else "", replace(case, gate_bias=None))
    if case.up_bias is not None:
        yield Variant("up", replace(case, up_bias=None))
    if case.gate_bias is not None and case.up_bias is not None:
        yield Variant("gate and up", replace(case, gate_bias=None, up_bias=None))


# ---- global scales ----


def _shared_global(probe: Probe) -> Iterator[Variant]:
    case = probe.case
    if case.up is None or torch.equal(case.gate.global_scale, case.up.global_scale):
        return
    g, u = case.gate.global_scale, case.up.global_scale
    for detail, scale in (("the gate's", g), ("up's", u), ("the larger", torch.maximum(g, u))):
        yield Variant(
            detail, _with(case, {"gate": replace(case.gate, global_scale=scale), "up": replace(case.up, global_scale=scale)})
        )


# ---- experts and batches ----


def _reindexed(t: NVFP4Tensor, index: Tensor, *, codes: bool, block: bool, scale: bool) -> NVFP4Tensor:
    raw = t.linear_block_scale().view(torch.uint8)
    return NVFP4Tensor(
        t.codes[index] if codes else t.codes,
        (raw[index] if block else raw).view(torch.float8_e4m3fn),
        t.global_scale[index] if scale and t.global_scale.ndim else t.global_scale,
    )


def _other_index(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Ways to take another expert's (or batch entry's) data: `[E]` int64 each."""
    count = case.gate.shape[0]
    own = torch.arange(count)
    kind = "batch entry" if case.group_offsets is None else "expert"
    ways = {f"the next {kind}": own.roll(-1), f"the previous {kind}": own.roll(1), f"{kind} 0": torch.zeros_like(own)}
    if case.group_offsets is not None:
        filled = case.group_offsets.diff() > 0
        ways["the experts counted without the empty ones"] = (filled.long().cumsum(0) - 1).clamp(min=0)
    for detail, index in ways.items():
        if not torch.equal(index, own):
            yield detail, index


def _other_expert(*, codes: bool, block: bool, scale: bool) -> Callable[[Probe], Iterator[Variant]]:
    def variants(probe: Probe) -> Iterator[Variant]:
        case = probe.whole
        if case.gate.ndim != 3:
            return
        sampled = probe.case
        for detail, index in _other_index(case):
            weights: dict[OperandName, NVFP4Tensor] = {
                name: _reindexed(t, index, codes=codes, block=block, scale=scale)
                for name, t in _operands(sampled).items()
                if name != "x"
            }
            other = _with(sampled, weights)
            if codes:
                gate_bias, up_bias = (b if b is None else b[index] for b in (sampled.gate_bias, sampled.up_bias))
                other = replace(other, gate_bias=gate_bias, up_bias=up_bias)
            yield Variant(f"of {detail}", other)

    return variants


def _shifted_offsets(probe: Probe) -> Iterator[Variant]:
    offsets = probe.whole.group_offsets
    if offsets is None:
        return
    for by in (-1, 1):
        moved = offsets.clone()
        moved[1:-1] = (offsets[1:-1] + by).clamp(int(offsets[0]), int(offsets[-1]))
        if not torch.equal(moved, offsets):
            where = "early" if by < 0 else "late"
            yield Variant(f"one row {where}", replace(probe.whole, group_offsets=moved).sample(probe.rows, probe.cols))


# ---- places and roundings ----


def _transposed(probe: Probe) -> Iterator[Variant]:
    out = probe.whole_output
    m, n = out.shape[-2:]
    if m > 1 and n > 1:
        back = out.reshape(*out.shape[:-2], n, m).mT
        yield Variant("", probe.case, output=pick(back, probe.rows, probe.cols))


def _sixteen_bits(probe: Probe) -> Iterator[Variant]:
    case = probe.case
    parts = [(block, *block.preactivations()) for block in case.blocks()]

    def values(change: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        out = torch.zeros(probe.output.reshape(-1, probe.output.shape[-1]).shape, dtype=torch.float64)
        for block, g, u in parts:
            out[block.rows, block.cols] = change(g, u)
        return out

    for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
        short = _rounding(dtype)
        yield Variant(f"gate and up in {name}", case, values=values(_rounded_before(case.activation, short)))
        if case.up is not None and case.activation == SILU:
            yield Variant(f"silu(gate) in {name}", case, values=values(_rounded_silu(lambda t: t, short)))
            yield Variant(f"gate, up and silu(gate) in {name}", case, values=values(_rounded_silu(short, short)))


def _rounding(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda t: round_once(t, dtype).double()


def _rounded_before(act: Activation, short: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda g, u: short(g) if u is None else act(short(g), short(u))


def _rounded_silu(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor | None], Tensor]:
    def change(g: Tensor, u: Tensor | None) -> Tensor:
        assert u is not None
        g, u = before(g), before(u)
        return after(g * torch.sigmoid(g)) * u

    return change


# ---- parts of K ----

K_WIDTHS = (1, 2, 4, 8, 16)  # blocks of 16: 16 to 256 values


def k_range(probe: Probe) -> Iterator[Variant]:
    """The likeliest ranges of K left out, of both products or of one.

    Of a few wrong elements every block's part of both sums is taken off in turn (aligned ranges of 16 to 256, and every
    tail), and the ranges that come closest to the output are yielded to be checked.
    """
    few = probe.few
    case = few.case
    block, out = _most_wrong(case, few.output.double().reshape(-1, few.output.shape[-1]))
    sides = [_running_sums(block.x, w) for w in (block.gate, block.up) if w is not None]
    g, u = block.preactivations()
    starts, ends = _candidate_ranges(case.k // BLOCK)
    missing = [s[ends] - s[starts] for s in sides]
    names: list[tuple[str, tuple[bool, bool]]] = [("", (True, True))]
    if u is not None:
        names += [(" of the gate product", (True, False)), (" of the up product", (False, True))]
    for name, (in_gate, in_up) in names:
        short_g = g - missing[0] * in_gate
        value = short_g if u is None else case.activation(short_g, u - missing[1] * in_up)
        score = (value - out).abs().flatten(1).sum(1).nan_to_num(nan=math.inf)
        for i in score.argsort()[:2].tolist():
            k0, k1 = int(starts[i]) * BLOCK, int(ends[i]) * BLOCK
            kind = "the tail of K, " if k1 == case.k else ""
            yield Variant(f"{kind}k = {k0}..{k1 - 1}{name}", _without_k(probe.case, k0, k1, in_gate, in_up))


def _most_wrong(case: Case, out: Tensor) -> tuple[Block, Tensor]:
    """The matrix or group whose part of `out` `[R, N]` is farthest from the specification, and that part."""
    expected = case.expected64().reshape(out.shape)
    blocks = list(case.blocks())
    worst = max(blocks, key=lambda b: relative_error(out[b.rows, b.cols], expected[b.rows, b.cols]))
    return worst, out[worst.rows, worst.cols]


def _running_sums(x: Tensor | NVFP4Tensor, w: NVFP4Tensor) -> Tensor:
    """The scaled product over the first b blocks, for b = 0 to K/16: float64 `[K/16 + 1, r, c]`."""
    a = x.dequantize(torch.float64) if isinstance(x, NVFP4Tensor) else x.double()
    b = w.dequantize(torch.float64)
    parts = torch.einsum("rbk,cbk->brc", a.reshape(a.shape[0], -1, BLOCK), b.reshape(b.shape[0], -1, BLOCK))
    return torch.cat((torch.zeros_like(parts[:1]), parts.cumsum(0)))


def _candidate_ranges(blocks: int) -> tuple[Tensor, Tensor]:
    """Starts and ends, in blocks, of every aligned range of the usual widths and of every tail; never all of K."""
    ranges = {(s, min(s + w, blocks)) for w in K_WIDTHS for s in range(0, blocks, w)}
    ranges |= {(s, blocks) for s in range(1, blocks)}
    ranges.discard((0, blocks))
    found = sorted(ranges) or [(0, 0)]
    return torch.tensor([s for s, _ in found]), torch.tensor([e for _, e in found])


def _without_k(case: Case, k0: int, k1: int, in_gate: bool, in_up: bool) -> Case:
    def cut(w: NVFP4Tensor) -> NVFP4Tensor:
        codes = w.codes.clone()
        codes[..., k0 // 2 : k1 // 2] = 0
        return replace(w, codes=codes)

    return replace(
        case, gate=cut(case.gate) if in_gate else case.gate, up=cut(case.up) if in_up and case.up is not None else case.up
    )


def _constant(t: NVFP4Tensor) -> NVFP4Tensor:
    return _map_scale(t, torch.ones_like)


HYPOTHESES: tuple[Hypothesis, ...] = (
    Hypothesis("one product", "only one of the two products is computed", _only_one),
    Hypothesis("no activation", "the activation is left out: gate * up", _no_activation),
    Hypothesis("activation on the wrong operand", "the activation is applied to up instead of gate", _wrong_operand),
    Hypothesis("gate and up swapped", "the gate and up matrices are exchanged", _matrices_swapped),
    Hypothesis("product missing", "the activated matrix is not multiplied by the other", _product_missing),
    Hypothesis("activation constants dropped", "the activation's constants are ignored", _constants_dropped),
    Hypothesis("bias dropped", "a bias is not added", _bias_dropped),
    Hypothesis("nibbles swapped", "the two codes of a byte are exchanged", _local(_nibbles)),
    Hypothesis("block scales ignored", "block scales are taken as 1", _local(_constant)),
    Hypothesis(
        "swizzled scales read as linear",
        "block scales in the 128x4 layout are read row by row",
        _each(_whole(_storage_as_linear(False)), _whole(_storage_as_linear(True))),
    ),
    Hypothesis(
        "linear scales read as swizzled", "row-by-row block scales are read in the 128x4 layout", _whole(_linear_as_storage)
    ),
    Hypothesis("shared global scale", "gate and up are given one global scale", _shared_global),
    Hypothesis("divisor as multiplier", "a global scale is inverted", _local(_divisor)),
    Hypothesis(
        "global scale ignored",
        "a global scale is taken as 1",
        _local(lambda t: replace(t, global_scale=torch.ones_like(t.global_scale))),
    ),
    Hypothesis(
        "group of 32",
        "one block scale is used for 32 values",
        _each(
            _local(_pair(0), "the first scale of each two, of "),
            _local(_pair(1), "the second scale of each two, of "),
            _local(_half_index, "scale k // 32, of "),
        ),
    ),
    # every e4m3fnuz value is half the e4m3fn value of the same byte
    Hypothesis(
        "e4m3fnuz decode",
        "block scales are decoded as e4m3fnuz, which halves them",
        _local(lambda t: replace(t, global_scale=t.global_scale * 0.5)),
    ),
    Hypothesis("small scales flushed", "small block scales become zero", _flushes),
    Hypothesis("K range dropped", "part of K is left out", k_range),
    Hypothesis("output transposed", "the output is stored transposed", _transposed),
    Hypothesis("wrong expert", "whole weights are those", _other_expert(codes=True, block=True, scale=True)),
    Hypothesis("wrong expert's global scale", "global scales are those", _other_expert(codes=False, block=False, scale=True)),
    Hypothesis("wrong expert's block scales", "block scales are those", _other_expert(codes=False, block=True, scale=False)),
    Hypothesis("group offsets shifted", "rows next to a group's end go to its neighbour", _shifted_offsets),
    Hypothesis("16-bit intermediate", "values are rounded to 16 bits in between", _sixteen_bits),
)
