"""`glu4 compile`: build an architecture's kernels ahead of time, with no GPU; and list them with what they take of an SM."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from glu4.cli.output import JsonOption, console, emit_json, progress

if TYPE_CHECKING:
    from glu4.compiled.store import Spec

__all__ = ["command"]

_ARCHITECTURES = ("sm_90a", "sm_100a", "sm_103a")


def command(
    arch: Annotated[
        str, typer.Option(metavar="NAME", help="Target architecture: sm_90a (Hopper), sm_100a or sm_103a (Blackwell).")
    ] = "sm_90a",
    into_package: Annotated[
        bool, typer.Option("--into-package", help="Write into the package, so that a wheel built from it carries them.")
    ] = False,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Write into DIR instead of the cache.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes; by default one a core.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Compile nothing; list the kernels and their resources.")] = False,
    json: JsonOption = False,
) -> None:
    """Compile every kernel that the dispatch can choose, where it is not compiled yet. Needs nvidia-cutlass-dsl, and no GPU.

    Exit code 0: all are there, or listed. 2: CuTe DSL is missing, a kernel does not compile, or there is nowhere to write.
    """
    from glu4.compiled import store

    if arch not in _ARCHITECTURES:
        raise ValueError(f"--arch: kernels exist for {', '.join(_ARCHITECTURES)}, got {arch!r}")
    if into_package and output is not None:
        raise ValueError("--into-package and --output name two places; give one")
    target = store.packaged_directory() if into_package else output
    specs = _shipped(arch)
    if listing:
        _list([_row(spec, target) for spec in specs], arch, json)
        return
    with progress("compiling", total=len(specs)) as advance:
        count = store.compile_missing(specs, target, lambda name: advance(1, name), jobs, _say_waiting)
    where = target or store.cache_directory()
    if json:
        emit_json({"arch": arch, "kernels": len(specs), "compiled": count, "directory": str(where)})
        return
    console.print(f"{count} of {len(specs)} kernels compiled, the others were there: {where}", highlight=False, soft_wrap=True)
    if into_package:
        console.print("a wheel that is built now carries them: pip wheel . --no-deps")


def _shipped(arch: str) -> Sequence[Spec]:
    from glu4.dispatch import every_kernel

    return every_kernel(arch)


def _say_waiting() -> None:
    print("glu4: another process is compiling into the same directory; waiting for it", file=sys.stderr, flush=True)


def _row(spec: Spec, directory: Path | None) -> dict[str, Any]:
    """One kernel of the package and the cache, or of one directory: `place`, and unless it is missing its resources."""
    from glu4.compiled import store
    from glu4.compiled.cubin import resources

    if directory is None:
        found = store.inventory([spec])
        place = "packaged" if found.packaged else "cached" if found.cached else "missing"
        kernel = store.find(spec)
    else:
        kernel = store.read(store.file_of(directory, spec), spec)
        place = "missing" if kernel is None else "there"
    row: dict[str, Any] = {"name": spec.name, "place": place}
    if kernel is not None:
        cubin, description = kernel
        registers, stack = resources(cubin)
        row |= {"threads": description["threads"], "registers": registers, "stack_bytes": stack}
        row |= {"shared_bytes": description["shared_bytes"], "cubin_bytes": len(cubin)}
    return row


def _list(rows: Sequence[dict[str, Any]], arch: str, json: bool) -> None:
    from glu4.compiled.store import DSL_VERSION

    if json:
        emit_json({"arch": arch, "tool": f"nvidia-cutlass-dsl {DSL_VERSION}", "kernels": list(rows)})
        return
    columns = ("threads", "registers", "shared_bytes", "stack_bytes", "cubin_bytes")
    table = Table("kernel", "", *(c.replace("_", " ") for c in columns), box=SIMPLE, pad_edge=False)
    table.columns[0].overflow = "fold"
    for i in range(2, 2 + len(columns)):
        table.columns[i].justify = "right"
    for row in rows:
        table.add_row(row["name"], row["place"], *(str(row.get(c, "")) for c in columns))
    console.print(table)
    missing = sum(row["place"] == "missing" for row in rows)
    command = "glu4 compile" + ("" if arch == _ARCHITECTURES[0] else f" --arch {arch}")
    console.print(
        f"{len(rows) - missing} of {len(rows)} kernels are there" + (f"; {command} makes the others" if missing else "")
    )
