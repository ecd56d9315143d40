"""`glu4 tank`: rounds, show, report, and one-line refusals."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from glu4.cli import app
from glu4.tank.ledger import EntryRecord, Environment, Ledger, RoundRecord, Verdict
from page_checks import requests_of, text_of


@pytest.fixture
def book(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    record = RoundRecord("r1", "n", "t", "h100", "x", "d", 0, 1.0, None, Environment("NVIDIA H100", {}))
    ledger.begin(record, [EntryRecord("r1", "e", 0, "why", 1.5, "c")])
    ledger.add(Verdict("r1", "e", "slower", "measured", "slower by half", 0.5, 0.4, 0.6, 2.0))
    return str(ledger.path)


def run(*args):
    return CliRunner().invoke(app, ["tank", *args])


def test_rounds_lists_what_comes_with_glu4():
    found = {r["name"]: r for r in json.loads(run("rounds", "--json").stdout)["rounds"]}
    assert found["stages-hopper"]["entries"] == 4
    assert len(found) == 13
    assert "stages-blackwell" in run("rounds").stdout


def test_show_prints_claims_and_of_one_round_the_sentences(book):
    (claim,) = json.loads(run("show", "--ledger", book, "--json").stdout)["claims"]
    assert (claim["status"], claim["claimed"], claim["speedup"]) == ("refuted on H100", 1.5, 0.5)
    assert "e: slower by half" in run("show", "n", "--ledger", book).stdout


def test_report_writes_the_page(book, tmp_path):
    page = tmp_path / "p.html"
    assert run("report", "--ledger", book, "-o", str(page)).exit_code == 0
    assert "refuted on H100" in text_of(page.read_text())
    assert requests_of(page.read_text()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("show", "x"), "x: the ledger holds no such round or run"),
        (("replay", "x"), "x: the ledger holds no such round or run; its rounds: n"),
        (("run", "x"), "x: no such round file"),
        (("report", "-o", "p.pdf"), "expected a file that ends in .html"),
    ],
)
def test_what_cannot_be_done_is_said(book, args, message):
    result = run(*args, "--ledger", book)
    assert message in str(result.exception)
