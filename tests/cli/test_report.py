"""`glu4 report`: writes the page, and refuses what is no result with one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glu4.cli import app
from page_checks import requests_of, text_of

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "h100-bench.json"


def test_it_writes_the_page_and_says_where(tmp_path):
    output = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(RESULT), "-o", str(output)])
    assert result.exit_code == 0
    assert result.stdout.replace("\n", "").endswith("page.html: 1 run")
    found = output.read_text(encoding="utf-8")
    assert requests_of(found) == []
    assert "NVIDIA H100 80GB HBM3" in text_of(found)


def test_json_names_what_was_written(tmp_path):
    result = CliRunner().invoke(app, ["report", str(RESULT), str(RESULT), "-o", str(tmp_path / "p.html"), "--json"])
    assert json.loads(result.stdout) == {"output": str(tmp_path / "p.html"), "results": [str(RESULT)] * 2}


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        ('{"device": "x", "rows": [{}]}', "p.html", r"r.json is not a result of glu4 bench: rows[0].peer: missing"),
        ("{}", "p.pdf", "output: expected a file that ends in .html"),
        ("{}", "none/p.html", "is not a directory"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path, content, output, message):
    (tmp_path / "r.json").write_text(content)
    command = [sys.executable, "-m", "glu4", "report", "r.json", "-o", output]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("glu4: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.rglob("p.*"))
