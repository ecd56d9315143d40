"""The roofline of a recorded run: a PNG, or one HTML page with nothing outside it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from glu4.bench.contender import Row
from glu4.bench.devices import Device
from glu4.bench.machine import device_of, slug
from glu4.bench.report import Recorded, lines, off_reference

__all__ = ["draw", "figure", "intensity", "page"]

# what an element is drawn with: by its name in the page's style sheet, and as a colour where there is none
_COLOURS = {
    "ink": "#1b1f24", "soft": "#57606a", "grid": "#d5dae0", "c0": "#0b69c7", "c1": "#b35900", "c2": "#1a7f37",
    "c3": "#8250df", "c4": "#c2255c", "c5": "#6e7781", "c6": "#9a6700", "c7": "#0a7ea4",
}  # fmt: skip
# stand-ins that the SVG is drawn with, no two alike, which the page's own colours replace
_STAND_INS = {name: f"#0102{i:02x}" for i, name in enumerate(_COLOURS, 3)}
_MARKERS = "osD^vPX*"


def intensity(row: Row) -> float:
    """Floating-point operations a byte that must move, with NVFP4 weights: the same for everybody who solves the problem."""
    return row.problem.flops / row.problem.bytes


def _rates(found: Recorded) -> Device:
    """The roofs to draw: measured in the run itself, else those the project has for the device; ValueError for neither."""
    if found.roofs is not None:
        return Device(slug(found.device), found.roofs["bandwidth"], found.roofs["flops"], "float16", "Measured in this run.")
    known = device_of(found.device, None)
    if known is None:
        raise ValueError(f"{found.device}: no roofs were measured in this run; run glu4 bench with --rooflines")
    return known


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The timed rows of each contender, glu4 first; of glu4 those that a user gets."""
    timed = [r for r in rows if r.us and (r.peer != "glu4" or r.chosen)]
    names = sorted({r.peer for r in timed}, key=lambda name: (name != "glu4", name != "cublas_fp16", name))
    return {name: [r for r in timed if r.peer == name] for name in names}


def figure(found: Recorded, colours: dict[str, str] = _COLOURS) -> Any:
    """The matplotlib Figure. Raises ValueError when nothing was timed, ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "glu4[report]"') from error
    series, rates = _series(found.rows), _rates(found)
    if not series:
        raise ValueError("this run timed nothing, so there is nothing to draw")
    made = Figure(figsize=(8.6, 5.4), layout="constrained")
    axes = made.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must move (NVFP4 weights)", color=colours["ink"])
    axes.set_ylabel("TFLOP/s", color=colours["ink"])
    title = f"{found.device}: higher is faster, the line is the limit"
    axes.set_title(title, color=colours["ink"], fontsize=11, loc="left")
    axes.tick_params(which="both", colors=colours["ink"])
    axes.grid(True, color=colours["grid"], linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_color(colours["grid"])
        spine.set_visible(side in ("left", "bottom"))
    _roofs(axes, series, rates, colours)
    for i, (name, rows) in enumerate(series.items()):
        points = sorted((intensity(r), r.tflops) for r in rows)
        style = {"markersize": 9} if i == 0 else {"markersize": 6, "markerfacecolor": "none"}
        colour = colours[f"c{min(i, 7)}"]
        axes.plot(*zip(*points), _MARKERS[i % 8], color=colour, label=name, markeredgecolor=colour, **style)
    _label_tokens(axes, next(iter(series.values())), colours)
    axes.legend(frameon=False, labelcolor=colours["ink"], fontsize=9, loc="lower right")
    return made


def _roofs(axes: Any, series: dict[str, list[Row]], rates: Device, colours: dict[str, str]) -> None:
    """The two measured roofs over the range of the points, with what they are written along them."""
    at = [intensity(r) for rows in series.values() for r in rows]
    ridge = rates.flops / rates.bandwidth
    left, right = min(*at, ridge) / 2, max(*at, ridge) * 2
    top = rates.flops / 1e12
    axes.plot((left, ridge, right), (left * rates.bandwidth / 1e12, top, top), color=colours["ink"], linewidth=1.6)
    axes.set_xlim(left, right)
    lowest = min(r.tflops or 0.0 for rows in series.values() for r in rows)
    axes.set_ylim(min(lowest, left * rates.bandwidth / 1e12) / 1.4, top * 1.9)
    text = {"color": colours["soft"], "fontsize": 9}
    axes.text(ridge * 1.05, top * 1.07, f"matrix products: {top:.0f} TFLOP/s", va="bottom", **text)
    middle = (left * ridge) ** 0.5
    axes.text(
        middle,
        middle * rates.bandwidth / 1e12 * 1.15,
        f"memory: {rates.bandwidth / 1e12:.2f} TB/s",
        ha="right",
        va="bottom",
        **text,
    )


def _label_tokens(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """M beside the points of the first series, where no other label is near."""
    placed: list[float] = []
    for row in rows:
        x = intensity(row)
        if all(not 0.9 < x / other < 1.1 for other in placed):
            placed.append(x)
            axes.annotate(f"M {row.m}", (x, row.tflops), (7, -11), textcoords="offset points", fontsize=8, color=colours["ink"])


def _svg(found: Recorded) -> str:
    """The figure as SVG text whose colours are the page's variables."""
    import matplotlib

    made = figure(found, _STAND_INS)
    made.patch.set_alpha(0)
    made.axes[0].patch.set_alpha(0)
    text = io.StringIO()
    # text stays text; a fixed salt keeps ids, and so the file, the same from run to run
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "roofline", "font.family": "sans-serif"}):
        made.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for name, colour in _STAND_INS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg", '<svg role="img" aria-label="Roofline of the measured run"', 1)


def page(found: Recorded) -> str:
    """The HTML page. Raises ImportError without jinja2 or matplotlib, saying what to install."""
    svg = _svg(found)
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError('the page needs jinja2: pip install "glu4[report]"') from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("glu4.bench") / "picture.html.j2").read_text(encoding="utf-8"))
    setting = {k: v for k, v in found.setting.items() if isinstance(v, (str, int)) and v != "" and k != "method"}
    return template.render(
        device=found.device,
        rates=_rates(found),
        svg=svg,
        lines=[line for line in lines(found.rows) if line.ours is not None],
        off=off_reference(found.rows, slug(found.device)),
        setting=setting,
        method=found.setting.get("method", ""),
    )


def draw(found: Recorded, path: Path) -> None:
    """Write the picture of a run: a page for .html, else a PNG. The same run gives the same file."""
    if path.suffix == ".html":
        path.write_text(page(found), encoding="utf-8")
    else:
        figure(found).savefig(path, format="png", dpi=150, metadata={"Software": None}, facecolor="white")
