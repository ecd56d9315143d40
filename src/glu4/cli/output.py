"""What every command prints with: tables and progress for people, JSON for machines, one line for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["JsonOption", "console", "emit_json", "error_line", "progress"]

console = Console()
_stderr = Console(stderr=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def emit_json(document: dict[str, Any]) -> None:
    """Print one JSON document on stdout; NaN and infinity become null, which JSON has no number for."""
    sys.stdout.write(json.dumps(_plain(document), indent=2) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def error_line(error: BaseException) -> None:
    """The message of an error as one line on stderr."""
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"glu4: error: {text}", file=sys.stderr)


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Any]:
    """A progress bar on stderr, so that stdout stays clean; call the yielded function to advance (steps, description)."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # not on a terminal there is nothing to draw on, and rich would leave an empty line in the log
    with Progress(*columns, console=_stderr, transient=True, disable=not _stderr.is_terminal) as bar:
        task = bar.add_task(description, total=total)

        def advance(steps: int = 1, text: str | None = None) -> None:
            bar.update(task, advance=steps, description=text if text is not None else description)

        yield advance
