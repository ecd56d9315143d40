"""The ledger: append-only, whole verdicts or none after kill -9, two processes at once, and merging."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from glu4.tank.ledger import (
    EntryRecord,
    Environment,
    Ledger,
    LedgerError,
    RoundRecord,
    Sample,
    ShapeResult,
    Verdict,
    default_path,
)

WRITER = """
import sys, time
from glu4.tank.ledger import *
from glu4.tank.ledger import RoundRecord, Environment
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
book = Ledger(path)
names = [f"e{i}" for i in range(count)]
known = [r.run for r in book.rounds()]
if name not in known:
    record = RoundRecord(name, "n", "t", "cpu", "x", "d", 0, time.time(), None, Environment("d", {}))
    book.begin(record, [EntryRecord(name, e, i, "h", None, "c") for i, e in enumerate(names)])
print("ready", flush=True)
for e in names:
    with book.judging(name, e) as mine:
        if mine:
            shapes = [ShapeResult(name, e, s, "faster", 1.1, 1.0, 1.2, 2.0, 1.0, None) for s in ("a", "b")]
            samples = [Sample(name, e, s, i, 2.0, 1.0, 0) for s in ("a", "b") for i in range(20)]
            book.add(Verdict(name, e, "faster", "measured", "s", 1.1, 1.0, 1.2, time.time()), shapes, samples)
            print(e, flush=True)
"""


def begun(path, run="r", entries=("a", "b")) -> Ledger:
    ledger = Ledger(path)
    record = RoundRecord(run, "n", "t", "cpu", "text", "d", 0, 1.0, None, Environment("d", {"x": [1]}))
    ledger.begin(record, [EntryRecord(run, e, i, "h", None, "c") for i, e in enumerate(entries)], {"k.py": "code"})
    return ledger


def verdict(run="r", entry="a", outcome="correct", basis="emulated") -> Verdict:
    return Verdict(run, entry, outcome, basis, "s", None, None, None, 2.0)


def writer(path, name, count) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(count)], stdout=subprocess.PIPE, text=True)


def whole(ledger: Ledger, run: str) -> list[str]:
    """Entries with a verdict, each of which has all it rests on."""
    found = [v.entry for v in ledger.verdicts(run)]
    for entry in found:
        assert len(ledger.shapes(run, entry)) == 2
        assert len(ledger.samples(run, entry)) == 40
    assert {s.entry for s in ledger.samples(run)} <= set(found)
    return found


def test_it_keeps_what_it_is_given(tmp_path):
    ledger = begun(tmp_path / "a" / "l.sqlite")
    ledger.add(verdict())
    assert ledger.verdict("r", "a") == verdict()
    assert ledger.verdict("r", "b") is None
    assert ledger.files("r") == {"k.py": "code"}
    assert ledger.rounds("n")[0].environment.details == {"x": [1]}
    assert ledger.rounds("other") == []
    assert ledger.check() == []


@pytest.mark.parametrize("table", ["rounds", "entries", "files", "verdicts"])
def test_nothing_is_changed_or_deleted(tmp_path, table):
    begun(tmp_path / "l").add(verdict())
    for statement in (f"UPDATE {table} SET run = 'x'", f"DELETE FROM {table}"):
        with sqlite3.connect(tmp_path / "l") as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)


def test_a_second_verdict_is_refused_and_leaves_the_first(tmp_path):
    ledger = begun(tmp_path / "l")
    ledger.add(verdict())
    with pytest.raises(LedgerError, match="a: not recorded, a result is never overwritten"):
        ledger.add(verdict(outcome="wrong result"))
    assert ledger.verdicts("r") == [verdict()]
    with pytest.raises(ValueError, match="unknown outcome or basis"):
        ledger.add(verdict(entry="b", outcome="fine"))


def test_what_is_no_ledger_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(LedgerError, match="a database of something else"):
        Ledger(tmp_path / "other")
    with sqlite3.connect(tmp_path / "new") as db:
        db.execute("PRAGMA user_version=9")
    with pytest.raises(LedgerError, match="format 9"):
        Ledger(tmp_path / "new")


def test_a_writer_killed_at_any_moment_loses_nothing_it_reported(tmp_path):
    path, coin = tmp_path / "l", random.Random(7)
    reported: set[str] = set()
    for _ in range(3):
        process = writer(path, "run", 60)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(coin.random() * 0.15)
        os.kill(process.pid, signal.SIGKILL)
        reported |= set(process.stdout.read().split())
        process.wait()
        ledger = Ledger(path)
        assert reported <= set(whole(ledger, "run"))
        assert ledger.check() == []
    writer(path, "run", 60).communicate()
    assert len(whole(Ledger(path), "run")) == 60


def test_two_processes_share_the_work_and_neither_does_it_twice(tmp_path):
    path = tmp_path / "l"
    begun(path, "run", [f"e{i}" for i in range(30)])
    both = [writer(path, "run", 30) for _ in range(2)]
    said = [p.communicate()[0].split()[1:] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert sorted(said[0] + said[1]) == sorted(f"e{i}" for i in range(30))
    assert len(whole(Ledger(path), "run")) == 30


def test_an_entry_that_is_being_judged_is_left_alone(tmp_path):
    ledger = begun(tmp_path / "l")
    with ledger.judging("r", "a") as mine, Ledger(tmp_path / "l").judging("r", "a") as other:
        assert (mine, other) == (True, False)
    ledger.add(verdict())
    with ledger.judging("r", "a") as mine:
        assert not mine


def test_ledgers_are_merged_once(tmp_path):
    one, two = begun(tmp_path / "1", "r"), begun(tmp_path / "2", "q")
    two.add(verdict("q"), [ShapeResult("q", "a", "s", "faster", 1, 1, 1, 1, 1, None)], [Sample("q", "a", "s", 0, 1, 1, 0)])
    assert (one.merge(two), one.merge(two)) == (1, 0)
    two.add(verdict("q", "b"))
    assert one.merge(two) == 1
    assert [r.run for r in one.rounds()] == ["q", "r"]
    assert one.samples("q") == two.samples("q")
    assert one.files("q") == {"k.py": "code"}


def test_the_users_own_ledger_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "glu4" / "tank.sqlite"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_path().parts[-4:] == (".local", "share", "glu4", "tank.sqlite")
