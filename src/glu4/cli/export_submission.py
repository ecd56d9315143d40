"""`glu4 export-submission`: one self-contained file for a public kernel problem of GPU MODE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glu4.cli.output import JsonOption, console, emit_json

__all__ = ["command"]


def command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")],
    problem: Annotated[str, typer.Option(metavar="NAME", help="dual_gemm or group_gemm.")] = "dual_gemm",
    shape_table: Annotated[
        str, typer.Option(metavar="NAME", help="Which configuration runs which shape: default, what the dispatch would choose.")
    ] = "default",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Write the Blackwell kernel with its host code as one file that imports torch and CuTe DSL only.

    Exit code 0: written. 2: a problem or table that is not known, or a file that cannot be written.
    """
    from glu4.verify.export import export

    text = export(problem, shape_table)
    if output.exists() and not force:
        raise ValueError(f"{output}: exists; --force replaces it")
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error.strerror})") from None
    if json:
        emit_json({"file": str(output), "problem": problem, "shape_table": shape_table, "lines": text.count("\n")})
        return
    console.print(f"wrote {output}, {text.count(chr(10))} lines for {problem}", highlight=False, soft_wrap=True)
    console.print(f"check it with no GPU: glu4 verify --submission {output} --emulate", highlight=False, soft_wrap=True)
