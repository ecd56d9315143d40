"""`glu4 bench`: glu4 and its peers on this GPU, in one run, or the report and picture of a recorded run."""

from __future__ import annotations

import json as json_module
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glu4.cli.output import JsonOption, console, emit_json, error_line, progress

if TYPE_CHECKING:
    from glu4.bench.contender import Row, Shape
    from glu4.bench.grouped import GroupedShape
    from glu4.bench.report import Line, Recorded
    from glu4.bench.run import Settings

__all__ = ["command"]

_NARROW, _WIDE = 15, 26  # columns of M,N,K and of a grouped case's name

SuiteOption = Annotated[
    str, typer.Option("--suite", metavar="NAMES", help="seed, decode, all (both), grouped-seed or moe; several with commas.")
]
ShapeOption = Annotated[
    list[str] | None, typer.Option("--shape", metavar="M,N,K", help="A shape of your own instead of a suite; repeat it.")
]
ConfigsOption = Annotated[
    str, typer.Option("--configs", metavar="NAME", help="glu4's kernels: best (what a user gets), all, or one besides it.")
]
PeersOption = Annotated[
    str,
    typer.Option("--peers", metavar="NAMES", help="auto (all installed), none (cuBLAS fp16 alone), or names with commas."),
]
FormatOption = Annotated[
    str, typer.Option("--activation-format", metavar="NAME", help="glu4's activations: float16, bfloat16, or nvfp4 (W4A4).")
]
OutputOption = Annotated[Path | None, typer.Option(help="Write the JSON document here: a file, or a directory to name one in.")]
FromOption = Annotated[
    list[Path] | None,
    typer.Option("--from", metavar="FILE", help="Report a recorded run, or several of one device."),
]
PictureOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw the roofline: .png or .html (one page with nothing outside it).")
]


def command(
    suite: SuiteOption = "all",
    shape: ShapeOption = None,
    configs: ConfigsOption = "best",
    peers: PeersOption = "auto",
    activation_format: FormatOption = "float16",
    output: OutputOption = None,
    rooflines: Annotated[
        bool, typer.Option("--rooflines", help="Measure copy bandwidth and the bf16 matmul rate in this run too.")
    ] = False,
    commit: Annotated[str, typer.Option(help="Recorded with the result where there is no git.")] = "",
    variant: Annotated[str, typer.Option(help="Recorded with glu4's rows: what is special about this run.")] = "",
    seed: Annotated[int, typer.Option(help="Of the operands.")] = 0,
    recorded: FromOption = None,
    picture: PictureOption = None,
    details: Annotated[bool, typer.Option("--details", help="Print every contender, not only a line a shape.")] = False,
    json: JsonOption = False,
) -> None:
    """Time glu4 and its peers on this GPU in one run, by the method of docs/benchmarks.md.

    Exit code 0: everything that ran was right. 1: a contender gave a wrong result, failed, or took the device with it; what
    was measured is written all the same. 2: could not run.
    """
    from glu4.bench import machine
    from glu4.bench.picture import draw
    from glu4.bench.report import joined, read
    from glu4.bench.run import Settings

    if picture is not None and picture.suffix not in (".png", ".html"):
        raise ValueError(f"picture: expected a file that ends in .png or .html, got {picture}")
    if recorded:
        found = joined([read(path) for path in recorded])
        good, lost = _report(found, details, json), False
    else:
        shapes, cases = ([_shape(text) for text in shape], []) if shape else _suites(suite)
        settings = Settings(shapes, activation_format, configs, commit or machine.commit(), variant, seed, cases)
        found, good, lost = _measure(settings, peers, output, rooflines, details, json)
    if picture is not None:
        draw(found, picture)
    if lost:
        sys.stdout.flush()
        os._exit(1)  # an orderly end would wait for the device
    if not good:
        raise typer.Exit(1)


def _suites(names: str) -> tuple[list[tuple[int, int, int]], list[GroupedShape]]:
    """The dense shapes and the grouped cases of suites by name, each once."""
    from glu4.bench.suites import GROUPED_SUITES, SUITES
    from glu4.verify.contest import DualShape

    dense = {"seed": ("seed",), "decode": ("decode",), "all": ("seed", "decode")}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in dense and name not in GROUPED_SUITES:
            raise ValueError(f"suite: expected {', '.join((*dense, *GROUPED_SUITES))}, or several with commas, got {name!r}")
    parts = [part for name in wanted for part in dense.get(name, ())]
    listed = [s for part in parts for s in SUITES[part] if isinstance(s, DualShape)]
    cases = [case for name in wanted for case in GROUPED_SUITES.get(name, ())]
    return list(dict.fromkeys((s.m, s.n, s.k) for s in listed)), list(dict.fromkeys(cases))


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts) or int(parts[2]) % 16:
        raise ValueError(f"shape: expected M,N,K, K a multiple of 16, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _measure(
    settings: Settings, peers: str, output: Path | None, rooflines: bool, details: bool, json: bool
) -> tuple[Recorded, bool, bool]:
    """The run, whether all was right in it, and whether the device was lost. Each line is printed as it comes and the document
    written after every shape, so that nothing measured is lost with it."""
    import torch

    from glu4.bench import machine, report
    from glu4.bench.peers import select
    from glu4.bench.run import METHOD, Lost, run
    from glu4.bench.timing import Cuda
    from glu4.errors import UnsupportedError

    if not torch.cuda.is_available():
        raise UnsupportedError("bench times kernels on a CUDA device, and there is none; --from reports a recorded run")
    others = select(peers) if settings.shapes else []
    of_groups = select(peers, grouped=True) if settings.grouped else []
    left_out = {peer.name: reason for peer in (*others, *of_groups) if (reason := peer.missing()) is not None}
    environment = machine.environment() | {"commit": settings.commit, "seed": settings.seed, "left_out": left_out}
    name = environment["device"]
    path = _file(output, machine.slug(name), settings)
    recorder = Cuda()
    known = machine.device_of(name, None)
    roofs = machine.measured_roofs(recorder) if rooflines or known is None else None
    device = known or machine.device_of(name, roofs)
    assert device is not None
    rows: list[Row] = []
    clocks: list[dict[str, Any]] = [{"when": "before", **machine.clocks()}]
    lost = ""

    def written() -> Recorded:
        document = report.document(environment, METHOD, rows, roofs=roofs, clocks=clocks, lost=lost)
        if path is not None:
            path.write_text(json_module.dumps(document, indent=1) + "\n", encoding="utf-8")
        return report.Recorded(name, rows, roofs, {k: v for k, v in document.items() if k not in ("rows", "roofs")})

    width = _WIDE if settings.grouped else _NARROW
    if not json:
        console.print(_header(width), highlight=False)
    try:
        with progress("measuring", total=len(settings.shapes) + len(settings.grouped)) as advance:
            here = [[p for p in some if p.name not in left_out] for some in (others, of_groups)]
            for found in run(settings, device, recorder, others=here[0], grouped_others=here[1]):
                rows += found
                clocks.append({"when": "after " + _size(found[0].shape), **machine.clocks()})
                written()
                if not json:
                    _print_lines(found, details, width)
                advance(1, "measured " + _size(found[0].shape))
    except Lost as error:
        rows += error.rows
        lost = str(error)
        error_line(RuntimeError(f"{lost}; nothing more can be measured in this process"))
    result = written()
    return result, _report(result, details=False, json=json, lines=False), bool(lost)


def _file(output: Path | None, device: str, settings: Settings) -> Path | None:
    if output is None:
        return None
    if output.is_dir():
        words = (device, "bench", settings.x_format, settings.variant, settings.commit)
        return output / ("-".join(word for word in words if word) + ".json")
    if not output.parent.is_dir():
        raise ValueError(f"output: {output.parent} is not a directory")
    return output


# ---- printing ----


def _size(shape: Shape) -> str:
    """M,N,K, or a grouped case's name."""
    return shape[3] if len(shape) == 4 else ",".join(map(str, shape))


def _report(found: Recorded, details: bool, json: bool, lines: bool = True) -> bool:
    """Print a run; whether everything that ran was right and nothing failed."""
    from glu4.bench.machine import slug
    from glu4.bench.report import off_reference

    bad = [row for row in found.rows if row.note]
    off = off_reference(found.rows, slug(found.device))
    if json:
        document = {**found.setting, "roofs": found.roofs, "off_reference": off, "rows": [row.to_dict() for row in found.rows]}
        emit_json(document)
        return not bad
    if lines:
        width = _WIDE if any(row.case for row in found.rows) else _NARROW
        console.print(_header(width), highlight=False)
        _print_lines(found.rows, details, width)
    console.print(f"{found.device}, driver {found.setting.get('driver_version', 'unknown')}", highlight=False)
    if found.roofs:
        bandwidth, flops = found.roofs["bandwidth"] / 1e12, found.roofs["flops"] / 1e12
        console.print(f"measured in this run: copy {bandwidth:.2f} TB/s, bf16 matmul {flops:.0f} TFLOP/s", highlight=False)
    for name, reason in found.setting.get("left_out", {}).items():
        console.print(f"{name} left out: {reason}", highlight=False, markup=False)
    for row in bad:
        console.print(f"{row.peer} {row.config} at {_size(row.shape)} {row.note}", highlight=False, markup=False)
    for sentence in off:
        console.print(sentence, highlight=False)
    return not bad


def _header(width: int) -> str:
    first = "M,N,K" if width == _NARROW else "case"
    return f"{first:>{width}} {'us (min)':>15} {'TFLOP/s':>8} {'GB/s':>6} {'% limit':>8}  x best peer"


def _print_lines(rows: list[Row], details: bool, width: int) -> None:
    from glu4.bench.report import lines

    for line in lines(rows):
        console.print(_line(line, width), highlight=False)
        if details:
            for row in (r for r in rows if r.shape == line.shape and r.us):
                name = row.peer + (f" {row.config}{' *' if row.chosen else ''}" if row.config else "")
                relative = "" if line.ours is None or not line.ours.us or not row.us else f"  x{row.us / line.ours.us:.2f} glu4"
                console.print(f"{'':{width}} {row.us:8.1f} ({row.us_min:.1f})  {name}{relative}", highlight=False, markup=False)


def _line(line: Line, width: int) -> str:
    row = line.ours
    if row is None or row.us is None or row.us_min is None:
        return f"{_size(line.shape):>{width}}  glu4 was not timed"
    times = f"{row.us:.1f} ({row.us_min:.1f})"
    gb_s = "" if row.gb_s is None else f"{row.gb_s:.0f}"
    percent = "" if row.percent_of_limit is None else f"{row.percent_of_limit:.0f}"
    peer = "no peer" if line.peer is None else f"{line.speed_up:.2f} {line.peer.peer}"
    return f"{_size(line.shape):>{width}} {times:>15} {row.tflops:8.1f} {gb_s:>6} {percent:>8}  {peer}"
