"""`glu4 verify`: exit codes 0, 1 and 2, the sentence that goes with each, and the JSON, for submissions and backends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import glu4
from glu4.cli import app
from glu4.verify import checker, contest, submission
from glu4.verify.contest import DualShape, GroupShape

RUNNER = CliRunner()
EXAMPLE = Path(__file__).parents[2] / "examples" / "submission_torch.py"


@pytest.fixture(autouse=True)
def no_diagnosis(monkeypatch):
    """The real check without its search for a cause, which takes seconds and has its own tests."""
    for module in (submission, checker):
        monkeypatch.setattr(
            module, "check", lambda *args, diagnose=False, right=checker.check, **kw: right(*args, diagnose=False, **kw)
        )


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """One small shape instead of the listed ones, which tests/verify runs."""
    monkeypatch.setattr(contest, "DUAL_TESTS", (DualShape(128, 128, 256),))
    monkeypatch.setattr(contest, "GROUP_TESTS", (GroupShape(((40, 128, 256), (136, 72, 320))),))


def verify(*arguments: str | Path):
    return RUNNER.invoke(app, ["verify", *map(str, arguments)])


def spoiled(tmp_path: Path, old: str, new: str) -> Path:
    """The example with one fault."""
    text = EXAMPLE.read_text()
    assert text.count(old) == 1
    file = tmp_path / "spoiled.py"
    file.write_text(text.replace(old, new))
    return file


# ---- submissions ----


def test_a_right_submission_is_exit_code_0():
    result = verify("--submission", EXAMPLE, "--seed", "5")
    assert result.exit_code == 0, result.output
    assert "submission_torch.py: dual_gemm on " in result.stdout
    assert "seed 5" in result.stdout
    assert "right on all 4 cases" in result.stdout
    assert "WRONG" not in result.stdout


def test_a_wrong_submission_is_exit_code_1_and_says_what_is_wrong(tmp_path):
    result = verify("--submission", spoiled(tmp_path, "up = x @ decode(b2, sfb2).mT", "up = gate"), "--quick", "--seed", "5")
    assert result.exit_code == 1
    assert "WRONG on 4 of 4 cases" in result.stdout
    assert "WRONG 128,128,256, public data, seed 1111: " in result.stdout


def test_json_of_a_wrong_submission_holds_every_case_and_finding(tmp_path):
    file = spoiled(tmp_path, "packed & 0xF, packed >> 4", "packed & 0xB, packed >> 4 & 0xB")
    result = verify("--submission", file, "--json", "--seed", "9")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["status"], document["problem"], document["seed"]) == ("wrong", "dual_gemm", 9)
    public, full, reuse, exact = document["cases"]
    assert (public["data"], public["right"], public["findings"], public["seed"]) == ("public", True, [], 1111)
    assert reuse["reused_buffers"]
    assert [case["right"] for case in (full, reuse, exact)] == [False] * 3
    assert all(case["findings"] for case in (full, reuse, exact))


def test_the_group_problem_can_be_asked_for(tmp_path):
    file = tmp_path / "group.py"
    file.write_text("def custom_kernel(data):\n    return [c for _, _, c in data[0]]\n")
    result = verify("--submission", file, "--problem", "group_gemm")
    assert result.exit_code == 1
    assert "group 1 (m 136, n 72, k 320): c came back as it was passed" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        ("raise ValueError('no')", [], "s.py raised ValueError at line 1 while it was imported: no; --log FILE keeps"),
        ("while True: pass", ["--timeout", "1"], "s.py ran longer than 1 s while it was imported and was stopped"),
        ("x = 1", [], "s.py defines no function custom_kernel(data)"),
        ("x = 1", ["--problem", "gemv"], "problem: expected one of dual_gemm, group_gemm, got 'gemv'"),
        ("x = 1", ["--timeout", "-1"], "timeout: expected a positive number of seconds, got -1.0"),
        ("x = 1", ["--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        ("x = 1", ["--cases", "3"], "--cases is for this machine's backends; leave it out"),
    ],
)
def test_what_cannot_run_is_exit_code_2_and_one_line(tmp_path, body, options, message):
    (tmp_path / "s.py").write_text(body + "\n")
    result = verify("--submission", tmp_path / "s.py", *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("glu4: error: ")]
    assert message in line


def test_what_cannot_run_is_json_too(tmp_path):
    result = verify("--submission", tmp_path / "absent.py", "--json")
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert document["status"] == "could not run"
    assert "absent.py: cannot be read" in document["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_asking_for_cuda_where_there_is_none_is_exit_code_2():
    result = verify("--submission", EXAMPLE, "--device", "cuda")
    assert result.exit_code == 2
    assert "torch finds no CUDA device here" in result.stderr


# ---- backends ----


def test_this_machines_backends_are_right():
    result = verify("--cases", "8", "--seed", "1", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "backends on cpu, seed 1" in result.stdout
    assert "right on all 8 cases" in result.stdout


@pytest.mark.parametrize("option", ["--problem", "--log"])
def test_options_of_submissions_are_not_dropped_without_one(option):
    result = verify(option, "x")
    assert result.exit_code == 2
    assert f"--problem, --log are for a submission; add --submission FILE; got {option}" in result.stderr


def test_a_wrong_backend_is_exit_code_1(monkeypatch):
    def scaled(right):
        return lambda *args, out, **options: right(*args, out=out, **options).mul_(1.01)

    for name in ("dual_gemm", "linear", "grouped_dual_gemm"):
        monkeypatch.setattr(glu4, name, scaled(getattr(glu4, name)))
    result = verify("--cases", "4", "--seed", "1", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["status"] == "wrong"
    assert len(document["wrong"]) >= 2  # an empty case has nothing to be wrong
    assert all(entry["summary"].startswith("wrong: ") for entry in document["wrong"])


def test_a_backend_that_leaves_rows_unwritten_is_wrong(monkeypatch):
    right = glu4.dual_gemm

    def partial(*args, out, **options):
        result = right(*args, **options, out_dtype=out.dtype)
        out[..., 1:, :] = result[..., 1:, :]
        return out

    monkeypatch.setattr(glu4, "dual_gemm", partial)
    result = verify("--cases", "8", "--seed", "1", "--json")
    assert result.exit_code == 1
    groups = json.loads(result.stdout)["groups"]
    assert any(g["cases"].startswith("dual_gemm") and not g["right"] for g in groups)
    assert all(g["right"] for g in groups if not g["cases"].startswith("dual_gemm"))


def test_an_unseeded_run_prints_the_seed_that_repeats_it():
    first, second = (json.loads(verify("--cases", "1", "--json").stdout)["seed"] for _ in range(2))
    assert first != second
