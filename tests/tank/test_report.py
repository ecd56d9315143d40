"""The Shark Tank's page: everything in it comes from the ledger, escaped; and the documentation's table."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glu4.pages.template import clean
from glu4.tank.ledger import EntryRecord, Environment, Ledger, LedgerError, RoundRecord, Sample, ShapeResult, Verdict
from glu4.tank.report import outcomes, page, write
from page_checks import broken, requests_of, tags_of, text_of, unreadable

H100 = Environment("NVIDIA H100 80GB HBM3", {"driver": "580.1", "clocks": {"sm": "1980 MHz"}, "versions": {"torch": "2.11"}})
MODEL = Environment("sm100 emulated", {"commit": "abc1234"})


def record(run: str, name: str, environment: Environment, started: float, title: str = "") -> RoundRecord:
    return RoundRecord(run, name, title, "h100", 'name = "x"\n', "d" * 64, 7, started, None, environment)


def verdict(run: str, entry: str, outcome: str, basis: str, speedup: float | None, at: float, sentence: str = "") -> Verdict:
    low, high = (None, None) if speedup is None else (speedup * 0.98, speedup * 1.02)
    return Verdict(run, entry, outcome, basis, sentence or f"{entry} is {outcome}", speedup, low, high, at)


def shape(run: str, entry: str, size: str, speedup: float, floor: float | None = 100.0) -> ShapeResult:
    outcome = "faster" if speedup > 1 else "slower"
    return ShapeResult(run, entry, size, outcome, speedup, speedup * 0.98, speedup * 1.02, 150.0, 150.0 / speedup, floor)


def filled(path: Path) -> Ledger:
    """A ledger with a measured round that has every kind of outcome, a predicted one, and an entry without a verdict."""
    ledger = Ledger(path)
    entries = [
        EntryRecord("r1", "stages 3", 0, "more stages hide the latency of loads", 1.5, "stages = 3"),
        EntryRecord("r1", "stages 2", 1, "two stages are enough", 1.1, "stages = 2"),
        EntryRecord("r1", "tile 64", 2, "smaller tiles, more CTAs", 2.5, "tile = (64, 128, 256)"),
        EntryRecord("r1", "single product", 3, "is the kernel correct?", None, "kernel = single.py"),
    ]
    ledger.begin(record("r1", "stages", H100, 1.7e9, "More stages"), entries)
    one = verdict("r1", "stages 3", "slower", "measured", 0.75, 1.7e9 + 10, "slower at every shape")
    ledger.add(
        one, [shape("r1", "stages 3", "256, 4096, 7168", 0.75)], [Sample("r1", "stages 3", "256, 4096, 7168", 0, 150, 200, 1)]
    )
    two = [shape("r1", "stages 2", "256, 4096, 7168", 1.25), shape("r1", "stages 2", "1, 4096, 7168", 0.98)]
    ledger.add(verdict("r1", "stages 2", "faster", "measured", 1.1068, 1.7e9 + 20), two)
    tile = "expects the M-mode to be 128, but got 64: a tcgen05.mma of one CTA has M 64 or 128"
    ledger.add(verdict("r1", "tile 64", "does not compile", "none", None, 1.7e9 + 30, tile))
    single = "computes A@B1 only: second product, SiLU and multiply are missing"
    ledger.add(verdict("r1", "single product", "wrong result", "measured", None, 1.7e9 + 40, single))
    ledger.begin(
        record("r2", "stores", MODEL, 1.7e9 + 90000, "TMA-store epilogue"),
        [
            EntryRecord("r2", "tma store", 0, "fewer instructions", 1.07, "store = tma"),
            EntryRecord("r2", "late", 1, "?", 1.2, "-"),
        ],
    )
    ledger.add(
        verdict("r2", "tma store", "faster", "predicted", 1.03, 1.7e9 + 90010),
        [shape("r2", "tma store", "1, 4096, 7168", 1.03)],
    )
    return ledger


@pytest.fixture
def written(tmp_path: Path) -> str:
    filled(tmp_path / "tank.sqlite")
    write(tmp_path / "tank.sqlite", tmp_path / "tank.html")
    return (tmp_path / "tank.html").read_text(encoding="utf-8")


def test_the_page_is_one_sound_file_that_asks_for_nothing(written):
    assert requests_of(written) == []
    assert broken(written) == []
    assert unreadable(written) == []


def test_it_says_what_the_ledger_holds(written):
    text = text_of(written)
    for words in (
        "2 rounds in 2 runs, 6 claims",
        "more stages hide the latency of loads",
        "slower at every shape",
        "expects the M-mode to be 128, but got 64",
        "computes A@B1 only: second product, SiLU and multiply are missing",
        "1.50x claimed, 0.75x (0.73 to 0.77) measured",
        "refuted on H100",
        "predicted only",
        "not judged yet",
        "stages 2 depends on the shape: faster at 256, 4096, 7168, slower at 1, 4096, 7168.",
        "clocks sm 1980 MHz",
        "2023-11-14 22:13 UTC",
        "of 1 timed pair, measured",
    ):
        assert words in text, words


def test_both_plots_are_drawn_for_wide_and_narrow_screens_and_read_out(written):
    pictures = [a for t, a in tags_of(written) if t == "svg" and a.get("role") == "img"]
    assert [a["class"] for a in pictures] == ["plot wide", "plot narrow"] * 2
    # stages 3 0.75 < 1.5; stages 2 1.1068 > 1.1; tma store 1.03 < 1.07
    assert pictures[0]["aria-label"] == "Claimed and measured speedups. 2 of 3 claims that have both lie above what was found."
    # baselines: 150 / 100; stages 2: the mean of 120 and 150 / 0.98 over 100
    assert "H100, 256, 4096, 7168: 1.50x; H100, 2 shapes (1, 4096, 7168, …): 1.36x" in (pictures[2]["aria-label"] or "")


def test_an_empty_ledger_makes_a_page_that_says_so(tmp_path):
    Ledger(tmp_path / "tank.sqlite")
    write(tmp_path / "tank.sqlite", tmp_path / "tank.html")
    made = (tmp_path / "tank.html").read_text(encoding="utf-8")
    assert "This ledger holds no round yet." in text_of(made)
    assert (requests_of(made), broken(made)) == ([], [])


def test_what_is_no_ledger_is_one_error_that_names_the_file(tmp_path):
    with pytest.raises(LedgerError, match=r"missing\.sqlite: no such ledger"):
        write(tmp_path / "missing.sqlite", tmp_path / "x.html")
    (tmp_path / "text.sqlite").write_text("not a database " * 100)
    with pytest.raises(LedgerError, match=r"text\.sqlite: not a usable ledger"):
        write(tmp_path / "text.sqlite", tmp_path / "x.html")
    filled(tmp_path / "odd.sqlite")
    with sqlite3.connect(tmp_path / "odd.sqlite") as db:
        db.execute("INSERT INTO rounds VALUES ('r9','n','t','d','x','x',0,0,NULL,'[not json')")
    with pytest.raises(LedgerError, match=r"odd\.sqlite: not a readable ledger"):
        write(tmp_path / "odd.sqlite", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


_TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</svg></table>", "{{ 7*7 }}", "]]>", "&amp;&lt;", "\x00\x1b[31m"]),
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(_TEXTS, _TEXTS, _TEXTS, _TEXTS, _TEXTS)
def test_no_text_of_a_ledger_becomes_markup(name, hypothesis, change, sentence, shape_name):
    from glu4.tank.claims import Claim, Run

    environment = Environment(name or "d", {hypothesis: sentence})
    of_run = RoundRecord(change, name, hypothesis, shape_name, sentence, change, 1, 1.0, name, environment)
    entry = EntryRecord(change, name, 0, hypothesis, 1.5, change)
    found = Verdict(change, name, "faster", "measured", sentence, 1.2, 1.1, 1.3, 5.0)
    sizes = [ShapeResult(change, name, shape_name, "faster", 1.2, 1.1, 1.3, 12.0, 10.0, 8.0)]
    made = page([Run(of_run, [Claim(of_run, entry, found, sizes, 3)])])
    assert (requests_of(made), broken(made)) == ([], [])
    made.encode("utf-8")
    text = text_of(made)
    for said in (name, hypothesis, change, sentence, shape_name):
        assert " ".join(clean(said).split()) in text


# ---- the table of the documentation ----

_DOCS = Path(__file__).parents[2] / "docs" / "shark-tank.md"
_LEDGER = Path(__file__).parents[2] / "benchmarks" / "results" / "tank.sqlite"


def test_the_table_has_a_line_for_each_claim(tmp_path):
    filled(tmp_path / "tank.sqlite")
    table = outcomes(tmp_path / "tank.sqlite").splitlines()
    assert len(table) == 2 + 6
    assert table[2] == "| stages | stages 3 | 1.50x | 0.75x | 0.73 to 0.77 | refuted on H100 |"
    assert table[5] == "| stages | single product | - | - |  | wrong result |"


def test_text_cannot_leave_its_cell(tmp_path):
    ledger = Ledger(tmp_path / "tank.sqlite")
    ledger.begin(record("r", "a|b\nc", MODEL, 0.0), [EntryRecord("r", "<b>`x`</b> | *", 0, "", None, "")])
    line = outcomes(tmp_path / "tank.sqlite").splitlines()[2]
    assert line.startswith("| a\\|b c | &lt;b&gt;\\`x\\`&lt;/b&gt; \\| \\* |")


def test_the_documentation_names_commands_that_exist():
    tank = pytest.importorskip("glu4.cli.tank")
    from typer.main import get_command

    from glu4.cli import app

    assert tank
    group = get_command(app)
    commands = group.commands["tank"]
    named = set(re.findall(r"`glu4 tank (\w+)", _DOCS.read_text(encoding="utf-8")))
    assert named
    assert named <= set(commands.commands)
