"""The report's figures, as SVG text that takes its colours from the page, so that light and dark both work."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from glu4.demo.measure import DemoResult, Histogram

__all__ = ["perplexity_bars", "scale_ratios", "specification_errors", "weight_errors"]

# stand-ins that matplotlib draws with; the page's own colours replace them in the SVG text
_INK, _GRID, _FIRST, _SECOND, _WRONG = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_VARIABLES = {_INK: "--ink", _GRID: "--grid", _FIRST: "--first", _SECOND: "--second", _WRONG: "--wrong"}
_SIZE = (4.6, 3.1)  # inches at 72 points: readable at the width of a phone


def _axes(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(xlabel, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.tick_params(colors=_INK)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_color(_GRID)
        spine.set_visible(side in ("left", "bottom"))
    axes.grid(True, color=_GRID, linewidth=0.6)
    return figure, axes


def _svg(figure: Any, description: str) -> str:
    import matplotlib

    text = io.StringIO()
    # text stays text, set in the page's font; a fixed salt keeps ids, and so the file, the same from run to run
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def _legend(axes: Any, **where: Any) -> None:
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9, **where)


def perplexity_bars(result: DemoResult) -> str:
    """Horizontal bars, one a form of the model; the mistake in its own colour."""
    figure, axes = _axes("perplexity (lower is better)", "")
    names = ["\n".join(q.name.replace(", ", "\n").split(" used ")).replace("\nfor", "\nused for") for q in result.qualities]
    values = [q.result.perplexity for q in result.qualities]
    colours = [_WRONG if i == len(values) - 1 else _FIRST for i in range(len(values))]
    bars = axes.barh(range(len(values)), values, color=colours, height=0.6)
    axes.bar_label(bars, [f"{v:.2f}" for v in values], padding=3, color=_INK)
    axes.set_yticks(range(len(values)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, max(values) * 1.18)
    return _svg(figure, "Perplexity of each form of the model")


def scale_ratios(result: DemoResult) -> str:
    """Gate's global scale over up's, by layer."""
    figure, axes = _axes("layer", "gate / up global scale")
    ratios = result.scale_ratios
    axes.axhline(1.0, color=_INK, linewidth=1)
    axes.vlines(range(len(ratios)), 1.0, ratios, color=_FIRST, linewidth=2)
    axes.plot(range(len(ratios)), ratios, "o", color=_FIRST, markersize=5)
    axes.set_yscale("log", base=2)
    span = max(1.0, *(abs(np.log2(r)) for r in ratios)) * 1.1
    axes.set_ylim(2**-span, 2**span)
    ticks = [t for t in (0.125, 0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0, 8.0) if 2**-span <= t <= 2**span]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    return _svg(figure, "Ratio of gate and up global scales in each layer")


def _steps(axes: Any, histogram: Histogram, colour: str, label: str | None, style: str = "-") -> None:
    counts = histogram.counts.numpy()
    edges = np.linspace(histogram.low, histogram.high, len(counts) + 1)
    total = max(1.0, float(counts.sum()) + histogram.outside)
    axes.stairs(counts / total * 100, edges, color=colour, label=label, linewidth=1.8, linestyle=style)


def weight_errors(result: DemoResult) -> str:
    """Quantisation error of all gate and up weights, relative to the largest weight of the block."""
    figure, axes = _axes("error, % of the block's largest weight", "% of weights")
    if result.weight_errors is not None:
        _steps(axes, result.weight_errors, _FIRST, None)
    return _svg(figure, "Histogram of the quantisation error of the weights")


def specification_errors(result: DemoResult) -> str:
    """The operator's error against the specification in fp16 units, for right results and for the mistake."""
    figure, axes = _axes("distance from the exact value, units in the last place", "% of outputs")
    styles = ((_FIRST, "-"), (_SECOND, "--"), (_WRONG, "-"))
    for check, (colour, style) in zip(result.checks, styles, strict=False):
        _steps(axes, check.errors, colour, check.name if check.expected_ok else "the mistake", style)
    axes.axvline(-1, color=_INK, linewidth=1, linestyle=":")
    ticks = (-7, -5, -3, -1, 1, 3, 5, 7)
    axes.set_xticks(ticks, [f"{2.0**t:g}" if t >= -1 else f"1/{2**-t}" for t in ticks])
    _legend(axes, loc="upper left")
    return _svg(figure, "Histogram of the distance from the specification")
