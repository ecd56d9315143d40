"""What the demonstration measures: perplexities, the weights' quantisation error, and one layer against the specification."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from glu4 import ops
from glu4.bench.perplexity import Perplexity, perplexity
from glu4.nn import GatedMLP, convert, set_mode
from glu4.nvfp4 import BLOCK, NVFP4Tensor, quantize
from glu4.verify.cases import Case
from glu4.verify.checker import check
from glu4.weights import GatedWeights

__all__ = ["DemoResult", "Histogram", "LayerCheck", "Quality", "run", "share_gate_scale", "ulps"]

Step = Callable[[str, int], None]  # (what is being done, windows done since the last call)
_BINS = 64
ULP_RANGE = (-8.0, 8.0)  # log2; smaller and larger errors count in the end bins
_MISTAKE = "W4A16, gate's global scale used for up"


@dataclass(frozen=True)
class Quality:
    """One row of the table: the model in one form, and its perplexity."""

    name: str
    result: Perplexity


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins from `low` to `high`; `outside` counts the others, NaN among them."""

    low: float
    high: float
    counts: Tensor
    outside: int

    @classmethod
    def of(cls, values: Tensor, low: float, high: float) -> Histogram:
        counts = torch.histc(values.double().flatten(), _BINS, low, high)
        return cls(low, high, counts, values.numel() - int(counts.sum()))

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.low, self.high, self.counts + other.counts, self.outside + other.outside)


@dataclass(frozen=True)
class LayerCheck:
    """One layer's fp16 output on real activations against the specification.

    expected_ok  False for the planted mistake, which the checker must reject
    errors       log2 of |output - exact| in units of the last place of fp16; -1 is the rounding that nobody can avoid
    """

    name: str
    layer: str
    shape: tuple[int, int, int]
    ok: bool
    expected_ok: bool
    summary: str
    errors: Histogram
    largest: float

    @property
    def as_expected(self) -> bool:
        return self.ok == self.expected_ok


@dataclass
class DemoResult:
    """Everything the table and the report show."""

    qualities: list[Quality] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    scale_ratios: list[float] = field(default_factory=list)
    weight_errors: Histogram | None = None
    relative_error: float = float("nan")
    checks: list[LayerCheck] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def checked_ratio(self) -> float:
        """The larger over the smaller of the checked layer's two global scales."""
        ratio = self.scale_ratios[self.layers.index(self.checks[0].layer)]
        return max(ratio, 1 / ratio)

    @property
    def ok(self) -> bool:
        """Whether every right output was accepted and the planted mistake was not."""
        return bool(self.checks) and all(c.as_expected for c in self.checks)


def _nothing(text: str, windows: int) -> None:
    return None


def run(model: Any, windows: Tensor, on_step: Step = _nothing) -> DemoResult:
    """Convert `model` in place and measure it in four forms on token windows int64 `[count, length]`.

    Raises what `glu4.nn.convert` raises; the model is left converted, in W4A16 mode, without the planted mistake.
    """
    out = DemoResult()
    originals = _gate_and_up(model)
    caught = list(originals)[len(originals) // 2] if originals else ""
    with torch.inference_mode():
        model(windows[:1], use_cache=False)  # the first pass pays for allocations, and would be the slowest row of the table
    with _captured_input(model, caught) as inputs:
        _evaluate(out, "unchanged", model, windows, on_step)
    with _timed(out, "conversion"):
        on_step("converting to NVFP4", 0)
        convert(model)
        mlps = {name: m for name, m in model.named_modules() if isinstance(m, GatedMLP)}
        _describe_weights(out, originals, mlps)
    originals.clear()
    _evaluate(out, "W4A16", model, windows, on_step)
    set_mode(model, "w4a4")
    _evaluate(out, "W4A4", model, windows, on_step)
    set_mode(model, "w4a16")
    right = {name: m.weights for name, m in mlps.items()}
    for m in mlps.values():
        m.weights = share_gate_scale(m.weights)
    _evaluate(out, _MISTAKE, model, windows, on_step)
    for name, m in mlps.items():
        m.weights = right[name]
    with _timed(out, "check against the specification"):
        on_step("checking one layer", 0)
        layer = caught if caught in right else next(iter(right))
        out.checks = list(_check_layer(layer, right[layer], inputs[0]))
    return out


@contextmanager
def _timed(out: DemoResult, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    out.seconds[name] = time.perf_counter() - start


def _evaluate(out: DemoResult, name: str, model: Any, windows: Tensor, on_step: Step) -> None:
    with _timed(out, f"perplexity, {name}"):
        on_step(name, 0)
        out.qualities.append(Quality(name, perplexity(model, windows, lambda: on_step(name, 1))))


# ---- weights ----


def _gate_and_up(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The unquantised gate and up of each MLP that has them apart, by the MLP's name; no copies."""
    return {
        name: (m.gate_proj.weight.detach(), m.up_proj.weight.detach())
        for name, m in model.named_modules()
        if isinstance(getattr(m, "gate_proj", None), nn.Linear) and isinstance(getattr(m, "up_proj", None), nn.Linear)
    }


def share_gate_scale(weights: GatedWeights) -> GatedWeights:
    """The mistake: up's codes and block scales under gate's global scale."""
    up = NVFP4Tensor(weights.up.codes, weights.up.block_scale, weights.gate.global_scale)
    return GatedWeights(weights.gate, up, weights.input_scale, weights.gate_bias, weights.up_bias)


def _describe_weights(out: DemoResult, originals: dict[str, tuple[Tensor, Tensor]], mlps: dict[str, GatedMLP]) -> None:
    total: Histogram | None = None
    squares = torch.zeros(2, dtype=torch.float64)
    for name, mlp in mlps.items():
        weights = mlp.weights
        out.layers.append(name)
        out.scale_ratios.append(float(weights.gate.global_scale / weights.up.global_scale))
        for quantized, original in zip((weights.gate, weights.up), originals.get(name, ()), strict=False):
            error = quantized.dequantize() - original.float()
            squares += torch.stack((error.square().sum(), original.float().square().sum())).double()
            largest = original.float().view(-1, BLOCK).abs().amax(-1, keepdim=True)
            relative = error.view(-1, BLOCK) / largest.clamp(min=1e-30)  # 0 for a block of zeros
            part = Histogram.of(relative * 100, -20.0, 20.0)
            total = part if total is None else total + part
    out.weight_errors = total
    out.relative_error = float((squares[0] / squares[1]).sqrt())


# ---- one layer against the specification ----


@contextmanager
def _captured_input(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """The first input `[M, K]` that the module `name` receives while the context is open."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not seen:
            seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def ulps(output: Tensor, exact: Tensor) -> Tensor:
    """|output - exact| in units of the last place of fp16 at `exact` (float64, same shape)."""
    # frexp's mantissa lies in [0.5, 1), and its exponent of zero is 0
    exponent = torch.where(exact == 0, -13, torch.frexp(exact).exponent).clamp(min=-13) - 11
    return (output.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent)


def _check_layer(layer: str, weights: GatedWeights, x: Tensor) -> Iterator[LayerCheck]:
    """W4A16, W4A4 and the mistake of the layer `layer` on its real input `[M, K]`."""
    half = x.half()
    if not bool(half.isfinite().all()):
        raise ValueError(f"{layer}: its activations exceed fp16, in which this layer is checked")
    nvfp4 = quantize(x.float())
    wrong = share_gate_scale(weights)
    calls: tuple[tuple[str, Tensor | NVFP4Tensor, GatedWeights], ...] = (
        ("W4A16", half, weights),
        ("W4A4", nvfp4, weights),
        (_MISTAKE, half, wrong),
    )
    for name, operand, used in calls:
        output = ops.dual_gemm(operand, used, out_dtype=torch.float16)
        case = Case(f"{layer} {name}", 0, operand, weights.gate, weights.up, out_dtype=torch.float16)
        verdict = check(case, output)
        errors = ulps(output, case.expected64())
        yield LayerCheck(
            name=name,
            layer=layer,
            shape=(x.shape[0], *weights.shape),
            ok=verdict.ok,
            expected_ok=used is weights,
            summary=verdict.summary(),
            errors=Histogram.of(errors.log2().clamp(*ULP_RANGE), *ULP_RANGE),
            largest=float(errors.max()),
        )
