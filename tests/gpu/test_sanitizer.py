"""compute-sanitizer finds nothing in the shipped kernels, and something in a planted fault."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glu4.backends.hopper.config import SHIPPED
from gpu.harness import Target
from gpu.sanitized import TYPES, problem

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards? displayed \((\d+) errors?, (\d+) warnings?\))")


def sanitizer() -> str | None:
    """compute-sanitizer of PATH, of the CUDA toolkit, or of the wheel nvidia-cuda-sanitizer-api."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        places += [str(p) for p in sorted(Path(root).glob("*/bin/compute-sanitizer"))]
    return next((p for p in places if p is not None and Path(p).is_file()), None)


def errors_in(report: str) -> int:
    """How many errors (for racecheck: hazards, warnings too) a report counts; raises ValueError for one with no summary."""
    found = _SUMMARY.search(report)
    if found is None:
        raise ValueError(f"compute-sanitizer gave no summary: {report[-500:]}")
    return int(found.group(1))


def run_under(tool: str, root: Path, *arguments: str) -> tuple[int, str]:
    """(the program's exit code, compute-sanitizer's report with the program's output)."""
    program = sanitizer()
    if program is None:
        pytest.skip("needs compute-sanitizer: on PATH, in /usr/local/cuda, or pip install nvidia-cuda-sanitizer-api")
    command = [program, "--tool", tool, "--report-api-errors", "no", "--launch-timeout", "120", "--print-limit", "20"]
    command += [sys.executable, "-m", "gpu.sanitized", *arguments]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=root / "tests", env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(300, method="thread")
@pytest.mark.parametrize(
    "tool",
    [
        pytest.param(tool, marks=pytest.mark.xfail(reason="reports a stage's next bulk copy after the mbarrier that orders it"))
        if tool == "racecheck"
        else tool
        for tool in TOOLS
    ],
)
def test_the_shipped_kernels_are_clean(hopper: Target, pytestconfig: pytest.Config, tool: str) -> None:
    code, report = run_under(tool, pytestconfig.rootpath)
    assert errors_in(report) == 0, report[-4000:]
    assert code == 0, report[-4000:]
    assert report.count(": right") == len(SHIPPED) * 2 * len(TYPES)


@pytest.mark.timeout(300, method="thread")
def test_a_write_past_the_output_is_found(hopper: Target, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--planted", default=False):
        pytest.skip("writes past an allocation; asked for with --planted")
    _, report = run_under("memcheck", pytestconfig.rootpath, "--planted")
    assert errors_in(report) > 0, report[-4000:]
    assert "Invalid __global__ write" in report, report[-4000:]


# ---- on any machine ----


@pytest.mark.parametrize(
    ("report", "count"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ write of size 2 bytes\n========= ERROR SUMMARY: 1 error\n", 1),
        ("========= ERROR SUMMARY: 48 errors\n========= ERROR SUMMARY: 28 errors were not printed.", 48),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n", 3),
    ],
)
def test_a_report_is_read(report: str, count: int) -> None:
    assert errors_in(report) == count


def test_a_report_without_a_summary_is_an_error() -> None:
    with pytest.raises(ValueError, match="gave no summary: ========= Error: Target application terminated"):
        errors_in("========= Error: Target application terminated before first instrumented API call\n")


@pytest.mark.parametrize("config", SHIPPED, ids=lambda c: c.name)
def test_the_problems_fill_tiles_in_part_and_use_every_stage_again(config) -> None:  # type: ignore[no-untyped-def]
    for linear in (False, True):
        case = problem(config, linear, *TYPES[0])
        m, n = case.out_shape
        assert config.tokens < m < 2 * config.tokens or config.tokens == 8
        assert config.grid(m, n, not linear)[0] >= 2
        assert config.grid(m, n, not linear)[1] >= 2
        assert -(-case.k // 64) > config.stages * config.stage_units * config.splits
        assert case.k % 64
