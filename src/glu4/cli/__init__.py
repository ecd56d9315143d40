"""The `glu4` command: one file per command, each importing what it needs only when it runs.

Exit codes: 0 done (and what was checked is right), 1 something checked is wrong or unusable, 2 could not run: unusable
arguments or input, a missing package or device, a time limit.
"""

from __future__ import annotations

import sys

import typer

from glu4.cli import bench, demo, doctor, evaluate, inspect, roofline, tune, verify
from glu4.cli import compile as compile_command
from glu4.cli.output import error_line

__all__ = ["app", "main"]

app = typer.Typer(
    name="glu4",
    help="NVFP4 gated MLPs: C = silu(A @ B1^T) * (A @ B2^T), exact and checked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("doctor")(doctor.command)
app.command("demo")(demo.command)
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("roofline")(roofline.command)
app.command("eval")(evaluate.command)
app.command("compile")(compile_command.command)
app.command("bench")(bench.command)
app.command("tune")(tune.command)


def main() -> None:
    """Run the command line; an expected error is one line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        error_line(error)
        sys.exit(2)
