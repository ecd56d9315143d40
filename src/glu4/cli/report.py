"""`glu4 report`: one HTML page of recorded bench runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glu4.cli.output import JsonOption, console, emit_json

__all__ = ["command"]

ResultsArgument = Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="Files that glu4 bench --output wrote.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")]


def command(results: ResultsArgument, output: OutputOption = Path("report.html"), json: JsonOption = False) -> None:
    """Write one self-contained HTML page of recorded bench runs: several are compared side by side.

    Exit code 0: written. 2: a file cannot be read or is not a result of glu4 bench.
    """
    from glu4.pages.bench import write

    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"output: expected a file that ends in .html, got {output}")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"output: {output.parent} is not a directory")
    write(results, output)
    if json:
        emit_json({"output": str(output), "results": [str(path) for path in results]})
    else:
        console.print(f"{output}: {len(results)} run{'s' if len(results) > 1 else ''}", highlight=False, markup=False)
