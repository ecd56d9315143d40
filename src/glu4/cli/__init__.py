"""The `glu4` command: one file per command, each importing what it needs only when it runs.

Exit codes: 0 done (and what was checked is right), 1 something checked is wrong or unusable, 2 could not run: unusable
arguments or input, a missing package or device, a time limit; 3 from `emulate`: a hazard was found; 141 whoever read the output
has closed it (`glu4 ... | head`), as for any program that a shell ends so.
"""

from __future__ import annotations

import os
import sys

import typer

from glu4.cli import bench, demo, doctor, emulate, evaluate, export_submission, inspect, report, roofline, tank, tune, verify
from glu4.cli import compile as compile_command
from glu4.cli.output import error_line

__all__ = ["app", "main"]

_CLOSED_PIPE = 141  # 128 + SIGPIPE

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
app.command("report")(report.command)
app.command("tune")(tune.command)
app.command("emulate")(emulate.command)
app.add_typer(tank.app, name="tank")
app.command("export-submission")(export_submission.command)


def main() -> None:
    """Run the command line; an expected error is one line on stderr and exit code 2, a closed output nothing and 141."""
    before = _stdout()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be told from other errors
    except BrokenPipeError:
        _leave()
    except SystemExit:
        # rich and typer exit with 1 when they meet a closed pipe: one leaves stdout on /dev/null, the other wrapped
        if _stdout() != before or type(sys.stdout).__name__ == "PacifyFlushWrapper":
            _leave()
        raise
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        error_line(error)
        sys.exit(2)


def _stdout() -> tuple[int, int] | None:
    """Which file stdout is."""
    try:
        found = os.fstat(1)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _leave() -> None:
    """Exit without a word: what is still buffered goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(_CLOSED_PIPE)
