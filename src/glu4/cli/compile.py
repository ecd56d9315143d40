"""`glu4 compile`: build the Hopper kernels ahead of time, with no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glu4.cli.output import JsonOption, console, emit_json, progress


def command(
    arch: Annotated[str, typer.Option(metavar="NAME", help="Target architecture: sm_90a (Hopper).")] = "sm_90a",
    into_package: Annotated[
        bool, typer.Option("--into-package", help="Write into the package, so that a wheel built from it carries them.")
    ] = False,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Write into DIR instead of the cache.")] = None,
    json: JsonOption = False,
) -> None:
    """Compile every kernel that the dispatch can choose, where it is not compiled yet. Needs nvidia-cutlass-dsl.

    Exit code 0: all are there. 2: CuTe DSL is missing, a kernel does not compile, or there is nowhere to write.
    """
    from glu4.backends.hopper.spec import shipped
    from glu4.compiled import store
    from glu4.errors import UnsupportedError

    if arch != "sm_90a":
        raise UnsupportedError(f"arch: kernels exist for sm_90a, got {arch!r}")
    if into_package and output is not None:
        raise ValueError("--into-package and --output name two places; give one")
    target = store.packaged_directory() if into_package else output
    specs = shipped()
    with progress("compiling", total=len(specs)) as advance:
        count = store.compile_missing(specs, target, lambda name: advance(1, name))
    where = target or store.cache_directory()
    if json:
        emit_json({"arch": arch, "kernels": len(specs), "compiled": count, "directory": str(where)})
    else:
        console.print(f"{count} of {len(specs)} kernels compiled, the others were there: {where}", highlight=False)
