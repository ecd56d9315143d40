"""`glu4 roofline`: the least time each shape can take on a device; on a B200 beside public results and predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from glu4.cli.output import JsonOption, console, emit_json

if TYPE_CHECKING:
    from glu4.bench.devices import Device
    from glu4.bench.roofline import Limit

__all__ = ["command"]

DeviceOption = Annotated[str, typer.Option("--device", metavar="NAME", help="b200-contest, h100 or h200: whose rates to use.")]
SuiteOption = Annotated[
    str | None,
    typer.Option(
        "--suite",
        metavar="NAME",
        help="seed, decode or group. Without it: the public benchmark shapes, and decode (h100, h200) or group (b200-contest).",
    ),
]
XOption = Annotated[
    str | None,
    typer.Option("--x", metavar="FORMAT", help="Activations: nvfp4 or float16. Without it: what the device multiplies."),
]


def command(
    device: DeviceOption = "b200-contest",
    suite: SuiteOption = None,
    m: Annotated[int | None, typer.Option("--m", metavar="M", help="Tokens of one shape of your own.")] = None,
    n: Annotated[int | None, typer.Option("--n", metavar="N", help="Rows of gate, and of up.")] = None,
    k: Annotated[int | None, typer.Option("--k", metavar="K", help="Shared dimension, a multiple of 16.")] = None,
    x: XOption = None,
    json: JsonOption = False,
) -> None:
    """Print the least time each shape can take: max(bytes / bandwidth, flops / rate).

    On b200-contest with nvfp4 activations also the best public result, and what a model predicts for glu4's kernel there.
    """
    from glu4.bench.devices import device as find

    chosen = find(device)
    rows = _rows(chosen, suite, (m, n, k), x)
    beside = [_beside(chosen.name, x_format, shape) for _, x_format, shape, _ in rows]
    if json:
        emit_json(
            {"device": chosen.name, "bandwidth": chosen.bandwidth, "flops": chosen.flops, "source": chosen.source}
            | {"rows": [_document(*row) | found for row, found in zip(rows, beside)]}
        )
        return
    for operation in dict.fromkeys(row[0] for row in rows):
        _print(operation, [(shape, limit) for op, _, shape, limit in rows if op == operation], rows[0][1])
    if any(beside):
        _print_beside([(shape, limit, found) for (_, _, shape, limit), found in zip(rows, beside)])
    console.print(f"{chosen.name}: {chosen.bandwidth / 1e12:g} TB/s, {chosen.flops / 1e12:g} TFLOP/s. {chosen.source}")


def _rows(
    device: Device, suite: str | None, own: tuple[int | None, int | None, int | None], x: str | None
) -> list[tuple[str, str, Any, Limit]]:
    """(operation, activations, shape, limit) of every line."""
    from glu4.bench.roofline import limit
    from glu4.bench.suites import DECODE, SUITES, dual_problem, group_problems
    from glu4.bench.suites import suite as find
    from glu4.verify.contest import DUAL_BENCHMARKS, DualShape

    x_format = device.x_format if x is None else x
    if x_format not in ("nvfp4", "float16"):
        raise ValueError(f"--x: expected nvfp4 or float16, got {x_format!r}")
    given = [size for size in own if size is not None]
    if given and (len(given) < 3 or min(given) < 1):
        raise ValueError(f"--m, --n, --k: give all three, each at least 1, got {', '.join(map(str, own))}")
    if given and suite is not None:
        raise ValueError("--suite and --m, --n, --k: give one or the other")
    if given:
        shapes: tuple[Any, ...] = (DualShape(*given),)
    elif suite is not None:
        shapes = find(suite)
    else:
        shapes = (*DUAL_BENCHMARKS, *(SUITES["group"] if device.name == "b200-contest" else DECODE))
    rows: list[tuple[str, str, Any, Limit]] = []
    for shape in shapes:
        if isinstance(shape, DualShape):
            rows.append(("dual_gemm", x_format, shape, limit(dual_problem(shape, x_format), device)))
        else:
            rows.append(("group_gemm", x_format, shape, limit(group_problems(shape, x_format), device)))
    return rows


def _document(operation: str, x_format: str, shape: Any, limit: Limit) -> dict[str, Any]:
    sizes = getattr(shape, "sizes", None) or ((shape.m, shape.n, shape.k),)
    return {
        "operation": operation,
        "x_format": x_format,
        "m": [size[0] for size in sizes] if operation == "group_gemm" else sizes[0][0],
        "n": [size[1] for size in sizes] if operation == "group_gemm" else sizes[0][1],
        "k": [size[2] for size in sizes] if operation == "group_gemm" else sizes[0][2],
        "bytes": limit.bytes,
        "flops": limit.flops,
        "memory_us": limit.memory_s * 1e6,
        "compute_us": limit.compute_s * 1e6,
        "limit_us": limit.time_s * 1e6,
        "bound": limit.bound,
    }


def _beside(device: str, x_format: str, shape: Any) -> dict[str, Any]:
    """Best public time and prediction, None where there is none; nothing for other devices and formats."""
    if (device, x_format) != ("b200-contest", "nvfp4"):
        return {}
    from glu4.bench.published_sm100 import best_public, prediction
    from glu4.errors import UnsupportedError

    best = best_public(shape)
    found: dict[str, Any] = {"best_public_us": best and best[0], "best_public": best and best[1], "prediction": None}
    try:
        predicted, config = prediction(shape)
    except UnsupportedError:
        return found
    whole = {"us": predicted.us, "bound_by": predicted.bound_by, "config": config, "breakdown": predicted.breakdown}
    return found | {"prediction": whole}


def _print_beside(lines: list[tuple[Any, Limit, dict[str, Any]]]) -> None:
    title = "limit, best public time and prediction on a B200; us"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("M,N,K (groups)", no_wrap=True)
    for name in ("limit", "best public", "bound by", "prediction"):
        table.add_column(name, justify="right", no_wrap=True)
    for shape, limit, found in lines:
        public, predicted = found["best_public_us"], found["prediction"]
        cells = [f"{limit.time_s * 1e6:.3f}", f"{public:g}" if public else "-"]
        cells += [predicted["bound_by"], f"{predicted['us']:.1f}"] if predicted else ["-", "-"]
        table.add_row(_label(shape), *cells)
    console.print(table)
    console.print("A prediction is a model's, of a kernel that has never run on a GPU.")
    console.print("The model knows no grouped kernel: a group stands for the linear one. docs/model-sm100.md")


def _print(operation: str, lines: list[tuple[Any, Limit]], x_format: str) -> None:
    what = "dual GEMM" if operation == "dual_gemm" else "grouped GEMM"
    formats = "W4A4" if x_format == "nvfp4" else "W4A16"
    table = Table(title=f"{what}, {formats}, fp16 output; times in us", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("M,N,K" if operation == "dual_gemm" else "sum M,N,K (groups)", no_wrap=True)
    for name in ("bytes", "GFLOP", "memory", "compute", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for shape, limit in lines:
        times = (limit.memory_s, limit.compute_s, limit.time_s)
        table.add_row(
            _label(shape),
            f"{limit.bytes:,}",
            f"{limit.flops / 1e9:.3f}",
            *(f"{t * 1e6:.3f}" for t in times),
            limit.bound,
        )
    console.print(table)


def _label(shape: Any) -> str:
    sizes = getattr(shape, "sizes", None)
    if sizes is None:
        return str(shape)
    # every listed group benchmark has one N and one K
    return f"{sum(size[0] for size in sizes)},{sizes[0][1]},{sizes[0][2]} ({len(sizes)})"
