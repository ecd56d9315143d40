"""`glu4 tank`: judge rounds of proposed optimisations, and show what the ledger holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from glu4.cli.output import JsonOption, console, emit_json, progress

if TYPE_CHECKING:
    from glu4.tank.claims import Claim
    from glu4.tank.ledger import Ledger, Verdict

__all__ = ["app"]

app = typer.Typer(
    help="The Shark Tank: proposed optimisations, judged by the specification and the clock.", no_args_is_help=True
)

RoundsArgument = Annotated[
    list[str], typer.Argument(metavar="ROUND...", help="Round files, or names of rounds that come with glu4.")
]
LedgerOption = Annotated[
    Path | None, typer.Option("--ledger", metavar="FILE", help="The ledger; without it the user's own, ~/.local/share/glu4.")
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")]


def _ledger(path: Path | None, create: bool) -> Ledger:
    from glu4.tank.ledger import Ledger, default_path

    return Ledger(path or default_path(), create=create)


@app.command("rounds")
def rounds(json: JsonOption = False) -> None:
    """List the rounds that come with glu4, and whether this machine measures or emulates them."""
    from glu4.tank.judge import where
    from glu4.tank.round import read, shipped

    how = {"cuda": "measured", "cpu": "measured", "emulate": "emulated"}
    found = [(name, r, how[where(r)]) for name, path in shipped().items() for r in [read(path)]]
    if json:
        rows = [{"name": n, "title": r.title, "device": r.device, "entries": len(r.entries), "here": h} for n, r, h in found]
        emit_json({"rounds": rows})
        return
    table = Table("round", "device", "entries", "here", "title", box=SIMPLE, pad_edge=False)
    for name, r, here in found:
        table.add_row(name, r.device, str(len(r.entries)), here, escape(r.title))
    console.print(table)


@app.command("run")
def run(names: RoundsArgument, ledger: LedgerOption = None, json: JsonOption = False) -> None:
    """Judge the entries of rounds that have no verdict yet.

    Exit code 0: all have one, whatever it is. 2: a round file or the ledger cannot be used.
    """
    from glu4.tank.round import find, read
    from glu4.tank.run import run_round

    read_rounds = [read(find(name)) for name in names]  # all, before any of them runs
    book = _ledger(ledger, create=True)
    with progress("judging", total=sum(len(r.entries) for r in read_rounds)) as advance:
        runs = [run_round(r, book, lambda v: _tell(v, advance, json)) for r in read_rounds]
    _print(book, runs, json)


@app.command("replay")
def replay(
    name: Annotated[str, typer.Argument(metavar="ROUND", help="A recorded round's name, or a run's identifier.")],
    ledger: LedgerOption = None,
    json: JsonOption = False,
) -> None:
    """Judge a recorded round once more, from what the ledger holds of it; the first run stays as it is."""
    from glu4.tank.run import again

    book = _ledger(ledger, create=False)
    with progress("judging") as advance:
        _print(book, [again(name, book, lambda v: _tell(v, advance, json))], json)


@app.command("show")
def show(
    name: Annotated[str | None, typer.Argument(metavar="ROUND", help="Only this round, or this run.")] = None,
    ledger: LedgerOption = None,
    json: JsonOption = False,
) -> None:
    """Print every claim with the verdict that counts now; of one round, the sentences too."""
    from glu4.tank.claims import claims, read
    from glu4.tank.ledger import LedgerError

    book = _ledger(ledger, create=False)
    runs = [r for r in read(book) if name in (None, r.record.name, r.record.run)]
    if name is not None and not runs:
        raise LedgerError(f"{name}: the ledger holds no such round or run")
    found = claims(runs)
    if json:
        emit_json({"claims": [_row(c) for c in found]})
        return
    _table(found)
    if name is not None:
        for claim in found:
            if claim.verdict is not None:
                _say(f"{claim.entry.entry}: {claim.verdict.sentence}")


@app.command("report")
def report(output: OutputOption = Path("tank.html"), ledger: LedgerOption = None) -> None:
    """Write the ledger as one self-contained HTML page."""
    from glu4.tank.ledger import default_path
    from glu4.tank.report import write

    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"output: expected a file that ends in .html, got {output}")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"output: {output.parent} is not a directory")
    write(ledger or default_path(), output)
    _say(str(output))


@app.command("compile")
def compile_(
    names: RoundsArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Into DIR instead of the cache.")] = None,
    json: JsonOption = False,
) -> None:
    """Compile every kernel of rounds ahead of time, for a machine without CuTe DSL.

    Copy DIR there and set GLU4_CACHE_DIR to it.
    """
    from glu4.compiled import store
    from glu4.tank.run import compile_round

    with progress("compiling") as advance:
        count = compile_round(names, output, lambda name: advance(1, name))
    where = str(output or store.cache_directory())
    if json:
        emit_json({"compiled": count, "directory": where})
    else:
        _say(f"{count} kernels compiled, the others were there: {where}")


# ---- printing ----


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tell(verdict: Verdict, advance: Any, json: bool) -> None:
    advance(1)
    if not json:
        _say(f"{verdict.entry}: {verdict.outcome} ({verdict.basis}): {verdict.sentence}")


def _print(book: Ledger, wanted: list[str], json: bool) -> None:
    from glu4.tank.claims import read

    found = [claim for r in read(book) if r.record.run in wanted for claim in r.claims]
    if json:
        emit_json({"ledger": str(book.path), "runs": wanted, "claims": [_row(c) for c in found]})
        return
    _table(found)
    _say(f"ledger: {book.path}")


def _row(claim: Claim) -> dict[str, Any]:
    v = claim.verdict
    return {
        "round": claim.round.name, "run": claim.round.run, "entry": claim.entry.entry, "claimed": claim.entry.claimed_speedup,
        "outcome": v and v.outcome, "basis": v and v.basis, "speedup": v and v.speedup, "low": v and v.low,
        "high": v and v.high, "status": claim.status, "sentence": v and v.sentence,
    }  # fmt: skip


def _table(found: list[Claim]) -> None:
    from glu4.pages.numbers import interval, ratio

    table = Table("round", "entry", "claimed", "found", "95 %", "now", box=SIMPLE, pad_edge=False)
    for claim in found:
        v = claim.verdict
        speedup, spread = (v.speedup, interval(v.low, v.high)) if v is not None else (None, "")
        cells = (claim.round.name, claim.entry.entry, ratio(claim.entry.claimed_speedup), ratio(speedup), spread, claim.status)
        table.add_row(*map(escape, cells))
    console.print(table)
