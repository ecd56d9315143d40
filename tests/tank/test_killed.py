"""A whole `glu4 tank run`, killed with its process group at moments drawn by a seed: nothing reported is lost, the file is sound,
and the round goes on and completes without a duplicate. Planted faults show that each of these checks can fail."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from glu4.tank.ledger import Ledger, Verdict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PAIRS = 5
WORDS = ("faster", "slower", "no difference", "wrong result")
KERNELS = {
    "right": """
import glu4
def prepare(x, gate, up, out):
    weights = glu4.GatedWeights(gate, up)
    return lambda: glu4.dual_gemm(x, weights, out=out, backend="portable")
""",
    "wrong": "def prepare(x, gate, up, out):\n    return lambda: out.fill_(1.0)\n",
}
# a run is continued by the same sources only, and someone may be editing them while this runs
RUN = "import glu4.tank.run as run\nrun.source_hash = lambda: 'pinned'\n"
MAIN = "from glu4.cli import main\nmain()\n"
FAULTS = {
    "commits when the process ends": """
import atexit
from glu4.tank.ledger import Ledger
add = Ledger.add
Ledger.add = lambda *args: atexit.register(add, *args)
""",
    "commits a verdict before its samples": """
import time
from contextlib import contextmanager
from glu4.tank import ledger
insert = ledger._insert
def slowly(db, table, records):
    insert(db, table, records)
    if table == "verdicts":
        time.sleep(2)
@contextmanager
def loose(self):
    with self._open() as db:
        yield db
ledger._insert, ledger.Ledger._transaction = slowly, loose
""",
    "begins anew": "run._open_run = lambda *_: None\n",
}


@dataclass
class Killed:
    """A round file, its ledger, and what runs of it reported before they were killed."""

    folder: Path
    names: list[str]
    program: str = RUN + MAIN
    reported: set[str] = field(default_factory=set)
    kept: dict[str, Verdict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = f'title = "t"\ndevice = "cpu"\nshapes = [[8, 32, 64]]\npairs = {PAIRS}\n[baseline]\nconfig = {{}}\n'
        for name in self.names:
            text += f'[[entries]]\nname = "{name}"\nhypothesis = "h"\nkernel = "{name[:5]}.py"\n'
        for name, code in KERNELS.items():
            (self.folder / f"{name}.py").write_text(code)
        (self.folder / "r.toml").write_text(text)
        (self.folder / "scratch").mkdir()

    @property
    def path(self) -> Path:
        return self.folder / "ledger"

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", self.program, "tank", "run", "r.toml", "--ledger", str(self.path)]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "TMPDIR": str(self.folder / "scratch")},
        )  # fmt: skip

    def kill(self, moment: str, delay: float) -> None:
        """Kill a run `delay` seconds after `moment`, and take down what it reported."""
        process = self.start()
        assert process.stdout is not None
        said = process.stdout.readline() if moment == "reported" else ""
        while process.poll() is None and not MOMENTS[moment](self):
            time.sleep(0.0002)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        said += process.stdout.read()
        process.wait()
        self.reported |= {line.partition(": ")[0] for line in said.splitlines() if line.partition(": ")[2].startswith(WORDS)}

    def check(self) -> None:
        """Everything reported is in a sound ledger, whole, and what was found before is unchanged."""
        ledger = Ledger(self.path)
        assert ledger.check() == []
        found = {v.entry: v for r in ledger.rounds() for v in ledger.verdicts(r.run)}
        assert self.reported <= set(found), "a reported verdict is lost"
        assert self.kept.items() <= found.items()
        self.kept = found
        for v in found.values():
            shapes = int(v.basis == "measured" and v.outcome != "wrong result")
            sizes = (len(ledger.shapes(v.run, v.entry)), len(ledger.samples(v.run, v.entry)))
            assert sizes == (shapes, shapes * PAIRS), "a verdict without what it rests on"

    def complete(self) -> set[str]:
        """Run to the end; returns what this last run reported, which is what had no verdict."""
        before = set(self.kept)
        process = self.start()
        said, _ = process.communicate()
        assert process.returncode == 0
        now = {line.partition(": ")[0] for line in said.splitlines() if line.partition(": ")[2].startswith(WORDS)}
        self.reported |= now
        self.check()
        runs = [r.run for r in Ledger(self.path).rounds()]
        assert len(runs) == 1, "the round began anew"
        assert [v.entry for v in sorted(self.kept.values(), key=lambda v: self.names.index(v.entry))] == self.names
        assert [v.run for v in self.kept.values()] == runs * len(self.names)
        assert now == set(self.names) - before, "an entry was judged twice"
        return now

    def workers(self) -> list[str]:
        """Processes of entries that still live."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes()
            except OSError:
                continue
            if str(self.folder / "scratch").encode() in line:
                found.append(line.decode(errors="replace"))
        return found


def _writing(k: Killed) -> bool:
    """Pages of a transaction are in the log, which goes once they are in the file."""
    try:
        return k.path.with_name("ledger-wal").stat().st_size > 0
    except OSError:
        return False


def _holds(k: Killed, table: str) -> bool:
    if not k.path.is_file():
        return False
    with closing(sqlite3.connect(k.path)) as db, suppress(sqlite3.OperationalError):  # not yet made
        return bool(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    return False


MOMENTS: dict[str, Callable[[Killed], bool]] = {
    "started": lambda k: True,
    "reported": lambda k: True,  # its line has been read
    "begun": lambda k: _holds(k, "rounds"),
    "judging": lambda k: any((k.folder / "scratch").glob("glu4-tank-*/request.json")),
    "writing": _writing,
    "half written": lambda k: _writing(k) and _holds(k, "verdicts"),
}


# seconds after each moment within which the kill comes: a write takes milliseconds, an entry seconds
SPANS = {"started": 4.0, "begun": 0.5, "judging": 4.0, "writing": 0.004, "reported": 0.3}


# one seed in CI: each of its runs is a fresh process of several seconds
@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.long) for s in (2, 3, 4, 5))])
def test_a_killed_round_loses_nothing_and_goes_on(tmp_path, seed):
    coin = random.Random(seed)
    round_ = Killed(tmp_path, ["right 1", "wrong 1", "right 2", "wrong 2"])
    for moment in coin.sample(list(SPANS), len(SPANS)):
        round_.kill(moment, coin.random() * SPANS[moment])
        round_.check()
    assert round_.reported, "no kill came after a verdict"
    assert round_.complete(), "nothing was left for the last run"
    deadline = time.monotonic() + 10
    while round_.workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert round_.workers() == []


def test_a_ledger_that_does_not_commit_is_found(tmp_path):
    round_ = Killed(tmp_path, ["wrong 1", "right 1"], RUN + FAULTS["commits when the process ends"] + MAIN)
    round_.kill("reported", 0.0)
    assert round_.reported == {"wrong 1"}
    with pytest.raises(AssertionError, match="a reported verdict is lost"):
        round_.check()


def test_a_verdict_that_is_committed_in_parts_is_found(tmp_path):
    round_ = Killed(tmp_path, ["right 1"], RUN + FAULTS["commits a verdict before its samples"] + MAIN)
    round_.kill("half written", 0.0)
    with pytest.raises(AssertionError, match="without what it rests on"):
        round_.check()


@pytest.mark.long
def test_a_round_that_begins_anew_is_found(tmp_path):
    round_ = Killed(tmp_path, ["wrong 1"], RUN + FAULTS["begins anew"] + MAIN)
    round_.kill("begun", 0.0)
    round_.check()
    with pytest.raises(AssertionError, match="the round began anew"):
        round_.complete()
