"""`glu4 inspect PATH`: what an NVFP4 checkpoint holds, and everything in it that is odd or unusable."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

import typer

from glu4.cli.output import JsonOption, console, emit_json, progress

if TYPE_CHECKING:
    from rich.table import Table

    from glu4.checkpoint.checkpoint import Checkpoint
    from glu4.checkpoint.common import Oddity
    from glu4.checkpoint.report import GatedReport, LayerReport, Survey

__all__ = ["command"]

_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")


def command(
    path: Annotated[str, typer.Argument(help="A .safetensors file, or the directory of a model.")],
    json: JsonOption = False,
    layer: Annotated[
        str, typer.Option("--layer", metavar="PATTERN", help="Only layers under this name, or matching this glob (*, ?, [..]).")
    ] = "",
) -> None:
    """Print the layers, shapes, scales, gate/up scale ratios and every oddity of an NVFP4 checkpoint.

    Exit codes: 0 all of it is usable, 1 something in it is not, 2 it cannot be read at all.
    """
    from glu4.checkpoint import open_checkpoint
    from glu4.checkpoint.report import survey

    with open_checkpoint(path) as checkpoint:
        wanted = _selection(layer)
        steps = sum(wanted(name) for name in [*checkpoint.layers(), *checkpoint.gated_mlps()])
        if not steps:
            raise ValueError(
                f"--layer: {layer!r} matches none of the {len(checkpoint.layers())} NVFP4 layers; leave it out to list them"
            )
        with progress("reading scales", total=steps) as advance:
            result = survey(checkpoint, wanted, lambda n, text: advance(n, _safe(text)))
        if json:
            emit_json(
                {"path": str(path), "format": checkpoint.format, "tensors": len(checkpoint.tensor_names()), **result.to_dict()}
            )
        else:
            _print(checkpoint, result, collapse=not layer)
    raise typer.Exit(1 if result.unusable else 0)


def _selection(pattern: str) -> Callable[[str], bool]:
    return lambda name: not pattern or fnmatchcase(name, pattern) or name == pattern or name.startswith(f"{pattern}.")


def _safe(text: str) -> str:
    """A name from a file, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ---- tables ----


def _print(checkpoint: Checkpoint, result: Survey, collapse: bool) -> None:
    names = len(checkpoint.tensor_names())
    _line(f"{checkpoint.path}: {checkpoint.format}, {len(checkpoint.layers())} NVFP4 layers in {names} tensors")
    if result.layers:
        _show(_layer_table(result.layers, collapse))
    if result.gated:
        _show(_gated_table(result.gated))
        pairs, differing = sum(g.pairs for g in result.gated), sum(g.differing for g in result.gated)
        _line(f"gate and up global scales differ in {differing} of {pairs} pairs; glu4 keeps each its own")
    lines = _oddity_lines(result.oddities)
    for line in lines:
        _line(line)
    unusable = sum(o.unusable for o in result.oddities)
    _line(f"{len(result.oddities)} oddities, {unusable} of them make something unusable" if lines else "no oddities")


def _line(text: str) -> None:
    console.print(_safe(text), markup=False, highlight=False, soft_wrap=True)


def _layer_table(layers: Iterable[LayerReport], collapse: bool) -> Table:
    table = _table(
        "NVFP4 layers", "layer", "shape [N, K]", "scheme", "block scales", "zero", "subn.", "global scale", "input scale"
    )
    groups: dict[tuple[str, tuple[int, int] | None, str], list[LayerReport]] = {}
    for layer in layers:
        name = _EXPERT.sub("*", layer.name) if collapse else layer.name
        groups.setdefault((name, layer.shape, layer.scheme.name), []).append(layer)
    for (name, shape, scheme), group in groups.items():
        good = [g for g in group if not g.error]
        count = f" x{len(group)}" if len(group) > 1 else ""
        if not good:
            table.add_row(_safe(f"{name}{count}"), "-", _safe(scheme), "unusable", "", "", "", "")
            continue
        extremes = [s for g in good for s in (g.block_scale_min, g.block_scale_max)]
        table.add_row(
            _safe(f"{name}{count}"),
            _shape(shape),
            _safe(scheme),
            _span(extremes, "all 0"),
            f"{sum(g.zero_share for g in good) / len(good):.2%}",
            f"{sum(g.subnormal_share for g in good) / len(good):.2%}",
            _span([g.global_scale for g in good], "-"),
            _span([g.input_scale for g in good], "-"),
        )
    return table


def _gated_table(gated: Iterable[GatedReport]) -> Table:
    table = _table("Gated MLPs", "prefix", "shape", "gate/up global scale", "input scale")
    for g in gated:
        ratio = _span([g.ratio_min, g.ratio_max], "-")
        table.add_row(_safe(g.prefix), _shape(g.shape), ratio, "unusable" if g.error else g.input_scale)
    return table


def _shape(shape: tuple[int, ...] | None) -> str:
    return " x ".join(str(n) for n in shape) if shape else "-"


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="left" if i == 0 else "right", min_width=24 if i == 0 else None)
    return table


def _show(table: Table) -> None:
    """As wide as the terminal, or as wide as it takes where the output goes to a file or pipe."""
    from rich.console import Console

    if console.is_terminal:
        console.print(table)
    else:
        wide = console.measure(table, options=console.options.update(max_width=1000)).maximum
        Console(file=console.file, width=wide).print(table)


def _span(values: Iterable[float | None], none: str) -> str:
    given = [v for v in values if v is not None]
    if not given:
        return none
    low, high = min(given), max(given)
    return f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"


def _oddity_lines(oddities: Iterable[Oddity]) -> list[str]:
    """One line for each; those that differ in numbers only share one, with a count. Unusable ones come last."""
    groups: dict[tuple[bool, str], list[Oddity]] = {}
    for oddity in oddities:
        groups.setdefault((oddity.unusable, _NUMBER.sub("#", oddity.text)), []).append(oddity)
    lines = []
    for (unusable, _), group in sorted(groups.items(), key=lambda item: item[0][0]):
        others = f" and {len(group) - 1} more like it" if len(group) > 1 else ""
        lines.append(f"{'UNUSABLE' if unusable else 'note'}: {group[0].where}{others}: {group[0].text}")
    return lines
