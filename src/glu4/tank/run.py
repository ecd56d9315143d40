"""Running a round into a ledger: begin it or go on with one that was interrupted, judge what has no verdict, replay."""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import glu4
from glu4.bench import machine
from glu4.bench.timing import REPLAY_MS
from glu4.compiled import store
from glu4.tank import clock
from glu4.tank.judge import judge, where
from glu4.tank.ledger import EntryRecord, Environment, Ledger, LedgerError, RoundRecord, Verdict, new_run
from glu4.tank.round import Round, RoundError, find, parse, read

__all__ = ["METHOD", "Told", "again", "compile_round", "environment", "run_round", "source_hash"]

METHOD = (
    "Each entry in a process of its own. A full-range case is checked first, then baseline and entry at every shape, before "
    "and after timing. Both share their operands, in copies of 200 MB and more, so that L2 is cold, and are captured as CUDA "
    f"graphs of about {REPLAY_MS:g} ms. A pair is one replay of each in an order drawn by lot, after {clock.WARM_UPS} that do "
    "not count; their number is fixed in the round file. The 95 % interval is Student's t over the logarithms of their ratios."
)
Told = Callable[[Verdict], None]


def _silent(_: Verdict) -> None:
    return None


@cache
def source_hash() -> str:
    """SHA-256 of every Python file of glu4, 16 digits: a run is not continued by other code."""
    root, digest = Path(glu4.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def environment(r: Round, at: str) -> Environment:
    """What the round runs on: device, driver, clocks, versions, and what the sources are."""
    details: dict[str, Any] = {"sources": source_hash(), "commit": machine.commit(), "method": METHOD}
    if at == "cuda":
        found = machine.environment()
        return Environment(found["device"], {**found, "clocks": machine.clocks(), **details})
    details |= {"glu4": glu4.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    if at == "cpu":
        return Environment(f"CPU, {platform.machine()}, {torch.get_num_threads()} threads", details)
    details["method"] = "No device of this kind: kernels run in the project's emulator; times, where given, are the model's."
    return Environment(f"{r.device} (emulator)", {**details, "CuTe DSL": store.installed_dsl() or ""})


@dataclass(frozen=True)
class _Started:
    run: str
    resumed: bool


def run_round(r: Round, ledger: Ledger, tell: Told = _silent, replay_of: str | None = None) -> str:
    """Judge every entry that has no verdict, and return the run's identifier.

    A run of the same file, sources and device that has entries without a verdict is continued, by any number of processes at
    once; where all have one nothing is judged. With `replay_of` a new run begins.
    """
    at = where(r)
    settings = environment(r, at)
    begun = _open_run(r, ledger, settings) if replay_of is None else None
    run = begun or _begin(r, ledger, settings, replay_of)
    for entry in r.entries:
        with ledger.judging(run, entry.name) as mine:
            if mine:
                judged = judge(r, entry, run, at)
                ledger.add(judged.verdict, judged.shapes, judged.samples)
                tell(judged.verdict)
    return run


def _open_run(r: Round, ledger: Ledger, settings: Environment) -> str | None:
    """The newest run of the same file, sources and device."""
    for record in reversed(ledger.rounds(r.name)):
        same = record.digest == r.digest and record.environment.device == settings.device
        if same and record.environment.details.get("sources") == source_hash():
            return record.run
    return None


def _begin(r: Round, ledger: Ledger, settings: Environment, replay_of: str | None) -> str:
    run, started = new_run()
    record = RoundRecord(run, r.name, r.title, r.device, r.text, r.digest, r.seed, started, replay_of, settings)
    entries = [EntryRecord(run, e.name, i, e.hypothesis, e.claimed_speedup, str(e.change)) for i, e in enumerate(r.entries)]
    ledger.begin(record, entries, r.files)
    return run


def again(name: str, ledger: Ledger, tell: Told = _silent) -> str:
    """Judge a recorded round once more, from the text and files that the ledger holds; returns the new run.

    name: of a round, whose newest run is repeated, or the identifier of a run. Raises LedgerError where there is none.
    """
    records = ledger.rounds()
    found = next((x for x in reversed(records) if name in (x.name, x.run)), None)
    if found is None:
        known = ", ".join(dict.fromkeys(x.name for x in records)) or "none"
        raise LedgerError(f"{name}: the ledger holds no such round or run; its rounds: {known}")
    with tempfile.TemporaryDirectory(prefix="glu4-replay-") as scratch:
        for file, text in ledger.files(found.run).items():
            target = (Path(scratch) / file).resolve()
            if not target.is_relative_to(Path(scratch).resolve()):
                raise RoundError(f"{found.name}: {file}: a file outside the round's folder cannot be replayed")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        return run_round(parse(found.definition, Path(scratch) / f"{found.name}.toml"), ledger, tell, found.run)


def compile_round(names: list[str], directory: Path | None, on_done: Callable[[str], None] = lambda _: None) -> int:
    """Compile the kernels of rounds ahead of time, into a directory or the cache; returns how many were made.

    Configurations that may not run are passed over: they are verdicts. Raises UnsupportedError as store.compile_missing.
    """
    from glu4.tank.kernels import config_of, refusal, specs_of

    made, specs = 0, dict[tuple[str, str], store.Spec]()
    for name in names:
        r = read(find(name))
        for change in (r.baseline, *(e.whole for e in r.entries)):
            if change.kind == "config":
                try:
                    config = config_of(r.backend, change.fields)
                except (ValueError, TypeError):
                    continue
                if refusal(config, r.problems()) is None:
                    specs |= {(spec.builder, spec.key): spec for spec in specs_of(config, r.x_format)}
    for builder in dict.fromkeys(b for b, _ in specs):
        made += store.compile_missing([s for (b, _), s in specs.items() if b == builder], directory, on_done)
    return made
