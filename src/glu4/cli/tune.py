"""`glu4 tune`: measure which kernel is fastest on this GPU, and remember it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glu4.cli.output import JsonOption, console, emit_json, progress

if TYPE_CHECKING:
    from glu4.bench.contender import Row

__all__ = ["command"]

WeightsOption = Annotated[
    list[str] | None,
    typer.Option("--weights", metavar="N,K", help="Rows of gate, shared dimension; repeat it. Default: the benchmark shapes."),
]
TokensOption = Annotated[
    str | None, typer.Option("--m", metavar="LIST", help="Numbers of tokens, with commas. Default: 19 from 1 to 4096.")
]
FormatsOption = Annotated[
    str, typer.Option("--activation-format", metavar="NAMES", help="float16, bfloat16, nvfp4; several with commas.")
]
OutputOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write the table into DIR instead of the user's cache directory.")
]


def command(
    weights: WeightsOption = None,
    m: TokensOption = None,
    activation_format: FormatsOption = "float16,bfloat16",
    output: OutputOption = None,
    commit: Annotated[str, typer.Option(help="Recorded with the table where there is no git.")] = "",
    json: JsonOption = False,
) -> None:
    """Measure every kernel that may run each shape and write the fastest into this device's table, which the dispatch reads.

    The table in the user's cache directory overrides the one that comes with glu4, shape by shape. It is written after every
    N and K, so that stopping loses one of them at most. Exit code 0: done. 1: a kernel gave a wrong result or failed, and is
    not in the table. 2: could not run.
    """
    from glu4.backends.hopper import tuned
    from glu4.bench.tune import LADDER
    from glu4.verify.contest import DUAL_BENCHMARKS

    sizes = [_pair(text) for text in weights] if weights else list(dict.fromkeys((s.n, s.k) for s in DUAL_BENCHMARKS))
    ladder = LADDER if m is None else _tokens(m)
    formats = [name.strip() for name in activation_format.split(",")]
    directory = output or tuned.user_directory()
    if directory is None:
        raise ValueError("GLU4_CACHE_DIR is off, so there is nowhere to put a table; give --output DIR")
    path, rows = _measure(sizes, ladder, formats, directory, commit)
    failed = [f"{r.config} at {r.m},{r.n},{r.k} {r.x_format} {r.note}" for r in rows if r.note]
    timed = sum(r.us is not None for r in rows)
    if json:
        emit_json({"table": str(path), "measured": timed, "failed": failed})
    else:
        slower = len(rows) - len(failed) - timed
        console.print(f"{timed} times measured, {slower} kernels slower at a first look: {path}", highlight=False)
        for line in failed:
            console.print(line, highlight=False, markup=False)
    if failed:
        raise typer.Exit(1)


def _pair(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(p.strip().isdigit() and int(p) > 0 for p in parts) or int(parts[1]) % 16:
        raise ValueError(f"weights: expected N,K, K a multiple of 16, got {text!r}")
    return int(parts[0]), int(parts[1])


def _tokens(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"m: expected positive numbers with commas, got {text!r}")
    return tuple(sorted({int(p) for p in parts}))


def _measure(
    sizes: list[tuple[int, int]], ladder: tuple[int, ...], formats: list[str], directory: Path, commit: str
) -> tuple[Path, list[Row]]:
    """Where the table was written, and every row. Raises UnsupportedError without a Hopper GPU and compiled kernels."""
    import torch

    from glu4.backends.hopper import launch, tuned
    from glu4.bench import machine
    from glu4.bench.operands import draw
    from glu4.bench.run import METHOD, Settings, measure_shape
    from glu4.bench.timing import Cuda
    from glu4.bench.tune import MARGIN, contenders, entries, write
    from glu4.errors import UnsupportedError

    settings = [Settings([(m, n, k) for m in ladder], x_format) for n, k in sizes for x_format in formats]
    if not (torch.cuda.is_available() and launch.is_hopper(torch.device("cuda", torch.cuda.current_device()))):
        raise UnsupportedError("tune measures the Hopper kernels, and there is no GPU of compute capability 9.0")
    environment = machine.environment() | {"commit": commit or machine.commit(), "method": METHOD}
    device = environment["device"]
    rates = machine.device_of(device, None) or machine.device_of(device, machine.measured_roofs(Cuda()))
    assert rates is not None
    recorder = Cuda()
    path = directory / tuned.file_name(device)
    rows: list[Row] = []
    with progress("measuring", total=len(settings) * len(ladder)) as advance:
        for setting in settings:
            found: list[Row] = []
            for m, n, k in setting.shapes:
                operands = draw(m, n, k, "cuda")
                found += measure_shape(operands, contenders(operands, setting.x_format), recorder, setting, rates, MARGIN)
                advance(1, f"measured {m},{n},{k} {setting.x_format}")
            path = write(directory, device, entries(found), environment | {"clocks": machine.clocks()})
            rows += found
    return path, rows
