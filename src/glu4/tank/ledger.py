"""The ledger: what rounds were run, where, what was measured and what was found. One SQLite file, append-only.

A run is one execution of a round file. A verdict is written in one transaction with its shapes and samples, so that a process
killed at any moment leaves whole verdicts or none. Triggers refuse every UPDATE and DELETE; keys refuse a second verdict of
the same entry. Two processes may write at once (WAL, and a lock file for each entry that is being judged).
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

__all__ = [
    "BASES",
    "OUTCOMES",
    "EntryRecord",
    "Environment",
    "Ledger",
    "LedgerError",
    "RoundRecord",
    "Sample",
    "ShapeResult",
    "Verdict",
    "default_path",
    "new_run",
]

SCHEMA = 1
# of a verdict: a time decides the first three; "correct" has no time; the others put the entry out
OUTCOMES = (
    "faster",
    "slower",
    "no difference",
    "correct",
    "wrong result",
    "does not compile",
    "crashed",
    "hung",
    "out of memory",
    "changed global state",
    "not run",
)
# what a verdict rests on: times of the device; the kernel's PTX in the emulator; a model of the device; nothing was run
BASES = ("measured", "emulated", "predicted", "none")
_LOCK_SECONDS = 60.0


class LedgerError(RuntimeError):
    """The ledger cannot be used, or already holds what was to be written; the message says which."""


@dataclass(frozen=True)
class Environment:
    """Where a run took place. `details` holds driver, clocks, versions, source hashes and commit, by name."""

    device: str
    details: dict[str, Any]


@dataclass(frozen=True)
class RoundRecord:
    """One run of a round file.

    run         identifies the run in every ledger
    definition  the round file's text; digest: SHA-256 of all that the round is judged from, kernel files included
    device      as the round file names it; seed: of the operands; started: seconds since 1970
    replay_of   the run that this one repeats, or None
    """

    run: str
    name: str
    title: str
    device: str
    definition: str
    digest: str
    seed: int
    started: float
    replay_of: str | None
    environment: Environment


@dataclass(frozen=True)
class EntryRecord:
    """One proposal of a run, in the order of the file; `change` says in one line what it changes."""

    run: str
    entry: str
    position: int
    hypothesis: str
    claimed_speedup: float | None
    change: str


@dataclass(frozen=True)
class Verdict:
    """What was found of one entry.

    outcome   one of OUTCOMES; basis: one of BASES; sentence: why, for people
    speedup   geometric mean over the shapes of baseline time / entry time, with its 95 % interval low to high; None: no times
    finished  seconds since 1970
    """

    run: str
    entry: str
    outcome: str
    basis: str
    sentence: str
    speedup: float | None
    low: float | None
    high: float | None
    finished: float


@dataclass(frozen=True)
class ShapeResult:
    """One shape of a verdict: median microseconds of both, their ratio (above 1 the entry is faster) with its 95 % interval,
    and the shape's floor on this device in microseconds, None where no roofline is known."""

    run: str
    entry: str
    shape: str
    outcome: str
    speedup: float
    low: float
    high: float
    baseline_us: float
    entry_us: float
    floor_us: float | None


@dataclass(frozen=True)
class Sample:
    """One timed pair of a shape: microseconds of both, and whether the entry ran first."""

    run: str
    entry: str
    shape: str
    position: int
    baseline_us: float
    entry_us: float
    entry_first: int


_SCRIPT = """
CREATE TABLE IF NOT EXISTS rounds (run TEXT PRIMARY KEY, name TEXT NOT NULL, title TEXT NOT NULL, device TEXT NOT NULL,
  definition TEXT NOT NULL, digest TEXT NOT NULL, seed INTEGER NOT NULL, started REAL NOT NULL, replay_of TEXT,
  environment TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS entries (run TEXT NOT NULL REFERENCES rounds, entry TEXT NOT NULL, position INTEGER NOT NULL,
  hypothesis TEXT NOT NULL, claimed_speedup REAL, change TEXT NOT NULL, PRIMARY KEY (run, entry));
CREATE TABLE IF NOT EXISTS files (run TEXT NOT NULL REFERENCES rounds, name TEXT NOT NULL, content TEXT NOT NULL,
  PRIMARY KEY (run, name));
CREATE TABLE IF NOT EXISTS verdicts (run TEXT NOT NULL, entry TEXT NOT NULL, outcome TEXT NOT NULL, basis TEXT NOT NULL,
  sentence TEXT NOT NULL, speedup REAL, low REAL, high REAL, finished REAL NOT NULL, PRIMARY KEY (run, entry),
  FOREIGN KEY (run, entry) REFERENCES entries);
CREATE TABLE IF NOT EXISTS shapes (run TEXT NOT NULL, entry TEXT NOT NULL, shape TEXT NOT NULL, outcome TEXT NOT NULL,
  speedup REAL NOT NULL, low REAL NOT NULL, high REAL NOT NULL, baseline_us REAL NOT NULL, entry_us REAL NOT NULL,
  floor_us REAL, PRIMARY KEY (run, entry, shape), FOREIGN KEY (run, entry) REFERENCES verdicts);
CREATE TABLE IF NOT EXISTS samples (run TEXT NOT NULL, entry TEXT NOT NULL, shape TEXT NOT NULL, position INTEGER NOT NULL,
  baseline_us REAL NOT NULL, entry_us REAL NOT NULL, entry_first INTEGER NOT NULL, PRIMARY KEY (run, entry, shape, position),
  FOREIGN KEY (run, entry, shape) REFERENCES shapes);
"""
_TABLES = ("rounds", "entries", "files", "verdicts", "shapes", "samples")
_Record = TypeVar("_Record", EntryRecord, Verdict, ShapeResult, Sample)


def default_path() -> Path:
    """The user's ledger: $XDG_DATA_HOME/glu4/tank.sqlite, else ~/.local/share/glu4/tank.sqlite (XDG base directories)."""
    base = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local" / "share") / "glu4" / "tank.sqlite"


class Ledger:
    """One ledger file, made where there is none unless `create` is False. Raises LedgerError for a file that is none."""

    def __init__(self, path: str | Path, create: bool = True) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise LedgerError(f"{path}: no such ledger; glu4 tank run makes one")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._open() as db:
                self._prepare(db)
        except sqlite3.Error as error:
            raise LedgerError(f"{path}: not a usable ledger ({error})") from None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=_LOCK_SECONDS, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")  # a verdict that was reported survives a loss of power too
            db.execute("PRAGMA foreign_keys=ON")
            yield db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _prepare(self, db: sqlite3.Connection) -> None:
        found = int(db.execute("PRAGMA user_version").fetchone()[0])
        if found not in (0, SCHEMA):
            raise LedgerError(f"{self.path}: a ledger of format {found}, and this glu4 reads format {SCHEMA}")
        if found == SCHEMA:
            return
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] and not self._is_partial(db):
            raise LedgerError(f"{self.path}: a database of something else")
        refusals = "".join(
            f"CREATE TRIGGER IF NOT EXISTS {t}_{verb} BEFORE {verb} ON {t} "
            f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;\n"
            for t in _TABLES
            for verb in ("UPDATE", "DELETE")
        )
        db.executescript(f"BEGIN IMMEDIATE;\n{_SCRIPT}{refusals}PRAGMA user_version={SCHEMA};\nCOMMIT;")

    def _is_partial(self, db: sqlite3.Connection) -> bool:
        """Whether another process has just made this ledger."""
        names = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")}
        return names == set(_TABLES)

    # ---- writing ----

    def begin(self, record: RoundRecord, entries: Sequence[EntryRecord], files: Mapping[str, str] | None = None) -> None:
        """Record a run and its entries, before any is judged; files: text of what the round file names, by name."""
        row = _round_row(record)
        with self._transaction() as db:
            db.execute("INSERT INTO rounds VALUES (?,?,?,?,?,?,?,?,?,?)", row)
            _insert(db, "entries", entries)
            db.executemany("INSERT INTO files VALUES (?,?,?)", [(record.run, *item) for item in (files or {}).items()])

    def add(self, verdict: Verdict, shapes: Sequence[ShapeResult] = (), samples: Sequence[Sample] = ()) -> None:
        """Record a verdict with all it rests on; raises LedgerError when the entry has one, ValueError for unknown words."""
        if verdict.outcome not in OUTCOMES or verdict.basis not in BASES:
            raise ValueError(f"verdict: unknown outcome or basis, {verdict.outcome!r} and {verdict.basis!r}")
        try:
            with self._transaction() as db:
                _insert(db, "verdicts", [verdict])
                _insert(db, "shapes", shapes)
                _insert(db, "samples", samples)
        except sqlite3.IntegrityError as error:
            raise LedgerError(f"{verdict.entry}: not recorded, a result is never overwritten ({error})") from None

    def merge(self, other: Ledger) -> int:
        """Add every run and verdict of another ledger that this one has not; returns how many verdicts were added."""
        known, added = {r.run for r in self.rounds()}, 0
        for record in other.rounds():
            if record.run not in known:
                self.begin(record, other.entries(record.run), other.files(record.run))
            here = {v.entry for v in self.verdicts(record.run)}
            for verdict in other.verdicts(record.run):
                if verdict.entry not in here:
                    of = (record.run, verdict.entry)
                    self.add(verdict, other.shapes(*of), other.samples(*of))
                    added += 1
        return added

    @contextmanager
    def judging(self, run: str, entry: str) -> Iterator[bool]:
        """Whether this process is to judge the entry: no other does, and it has no verdict. The claim ends with the process."""
        tag = hashlib.sha256(f"{run}\0{entry}".encode()).hexdigest()[:16]
        lock = FileLock(self.path.with_name(f"{self.path.name}.{tag}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield self.verdict(run, entry) is None
        finally:
            lock.release()

    def absorb(self, other: str | Path) -> int:
        """Add every finished or begun run of another ledger that this one lacks; returns how many verdicts are new."""
        source = Ledger(other, create=False)
        with self._open() as db:
            db.execute("ATTACH ? AS other", (str(source.path),))
            db.execute("BEGIN IMMEDIATE")
            before = int(db.execute("SELECT count(*) FROM main.verdicts").fetchone()[0])
            # what hangs on a verdict comes with a new one only, so that two ledgers' samples never mix
            db.execute(
                "CREATE TEMP TABLE new AS SELECT run, entry FROM other.verdicts EXCEPT SELECT run, entry FROM main.verdicts"
            )
            for table in _TABLES:
                only = (
                    " WHERE (run, entry) IN (SELECT run, entry FROM new)" if table in ("verdicts", "shapes", "samples") else ""
                )
                db.execute(f"INSERT OR IGNORE INTO main.{table} SELECT * FROM other.{table}{only}")
            after = int(db.execute("SELECT count(*) FROM main.verdicts").fetchone()[0])
            db.execute("COMMIT")
        return after - before

    def export(self, path: str | Path) -> None:
        """Write a whole, consistent copy to a file that must not exist."""
        if Path(path).exists():
            raise LedgerError(f"{path}: exists already, and an export never overwrites")
        with self._open() as db:
            db.execute("VACUUM INTO ?", (str(path),))

    # ---- reading ----

    def rounds(self, name: str | None = None) -> list[RoundRecord]:
        """Runs, oldest first; of one round only, if named."""
        with self._open() as db:
            rows = db.execute("SELECT * FROM rounds WHERE ? IS NULL OR name = ? ORDER BY started, run", (name, name)).fetchall()
        return [RoundRecord(*(*row[:9], Environment(**json.loads(row[9])))) for row in rows]

    def entries(self, run: str) -> list[EntryRecord]:
        """A run's entries in the order of the file."""
        return self._read(EntryRecord, "entries", "position", run)

    def files(self, run: str) -> dict[str, str]:
        """The files that a run's round file names, by name."""
        with self._open() as db:
            return dict(db.execute("SELECT name, content FROM files WHERE run = ?", (run,)).fetchall())

    def verdicts(self, run: str) -> list[Verdict]:
        """A run's verdicts in the order in which they were found."""
        return self._read(Verdict, "verdicts", "finished", run)

    def verdict(self, run: str, entry: str) -> Verdict | None:
        """The verdict of one entry; None while it has none."""
        return next(iter(self._read(Verdict, "verdicts", "finished", run, entry)), None)

    def shapes(self, run: str, entry: str | None = None) -> list[ShapeResult]:
        """Results shape by shape, of one run or of one entry of it."""
        return self._read(ShapeResult, "shapes", "rowid", run, entry)

    def samples(self, run: str, entry: str | None = None) -> list[Sample]:
        """Every timed pair, of one run or of one entry of it."""
        return self._read(Sample, "samples", "rowid", run, entry)

    def check(self) -> list[str]:
        """What SQLite finds wrong with the file: nothing in a sound one."""
        with self._open() as db:
            found = [str(row[0]) for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
            return found + [f"dangling reference in {row[0]}" for row in db.execute("PRAGMA foreign_key_check")]

    def _read(self, kind: type[_Record], table: str, order: str, run: str, entry: str | None = None) -> list[_Record]:
        columns = ", ".join(f.name for f in fields(kind))
        where = "run = ? AND (? IS NULL OR entry = ?)"
        with self._open() as db:
            rows = db.execute(f"SELECT {columns} FROM {table} WHERE {where} ORDER BY {order}", (run, entry, entry)).fetchall()
        return [kind(*row) for row in rows]


def _round_row(record: RoundRecord) -> tuple[Any, ...]:
    """A run as its row, the environment as JSON."""
    plain = [getattr(record, f.name) for f in fields(record)]
    environment = {"device": record.environment.device, "details": record.environment.details}
    return (*plain[:-1], json.dumps(environment, sort_keys=True))


def _insert(db: sqlite3.Connection, table: str, records: Sequence[EntryRecord | Verdict | ShapeResult | Sample]) -> None:
    if records:
        marks = ",".join("?" * len(fields(records[0])))
        db.executemany(f"INSERT INTO {table} VALUES ({marks})", [astuple(r) for r in records])


def new_run() -> tuple[str, float]:
    """(an identifier that no other run has, the time now)."""
    return uuid.uuid4().hex[:16], time.time()
