"""compute-sanitizer finds nothing in the shipped kernels, and something in planted faults.

What racecheck says of kernels whose order is known (`racecheck_control`) tells what to make of its reports: release 2025.3 takes
an mbarrier's order for none at times (release notes 2025.4, 2026.1 and 2026.3: "fixed ... false positives in racecheck ...
mbarrier"). A release that reports an ordered copy into a stage may report the same of ours, and nothing else.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glu4.backends.hopper.config import SHIPPED
from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED
from glu4.backends.hopper.tokens import NVFP4, format_of
from glu4.emulator.launch import emulate
from gpu import sanitized_grouped, sanitized_tokens
from gpu.harness import Target
from gpu.racecheck_control import CONTROLS, READERS, expected, ptx, source
from gpu.sanitized import OWN, problem, types
from grouped_twin import cuts, plan

TOOLS = ("memcheck", "synccheck", "initcheck")
ORDERED_COPIES = [name for name, control in CONTROLS.items() if control.ordered and control.copies]
RUNS = 2 * sum(len(types(config)) for config in SHIPPED)
WARPGROUP = 128
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


_THREAD = r"=+\s+(Read|Write) Thread \((\d+),\s*\d+,\s*\d+\) at (\S.*)"
_HAZARD = re.compile(r"Potential (\w+) hazard detected at __shared__[^\n]*\n" + _THREAD + r"\n" + _THREAD)


@dataclass(frozen=True)
class Hazard:
    """kind: "RAW", "WAR" or "WAW"; of the reading and the writing thread (None without one): index in the CTA, and where."""

    kind: str
    reader: int | None
    writer: int | None
    where: frozenset[str]

    @property
    def refills(self) -> bool:
        """Whether a thread of a later warpgroup, as the producers are, overwrites what a consumer has read."""
        if self.kind != "WAR" or self.reader is None or self.writer is None:
            return False
        return self.writer // WARPGROUP > self.reader // WARPGROUP


def hazards_in(report: str) -> list[Hazard]:
    """The hazards that `--racecheck-report all` prints; raises ValueError for one that is not understood."""
    found = []
    for match in _HAZARD.finditer(report):
        kind, first, one, here, second, other, there = match.groups()
        threads = {first: int(one), second: int(other)} if first != second else {}
        found.append(Hazard(kind, threads.get("Read"), threads.get("Write"), frozenset((here.strip(), there.strip()))))
    said = report.count(" hazard detected at ")
    if said != len(found):
        raise ValueError(f"compute-sanitizer reports {said} hazards, of which {len(found)} are understood: {report[-2000:]}")
    return found


def run_under(
    tool: str, root: Path, *arguments: str, program_module: str = "gpu.sanitized", options: Sequence[str] = ()
) -> tuple[int, str]:
    """(the program's exit code, compute-sanitizer's report with the program's output)."""
    program = sanitizer()
    if program is None:
        pytest.skip("needs compute-sanitizer: on PATH, in /usr/local/cuda, or pip install nvidia-cuda-sanitizer-api")
    limit = [] if "--print-limit" in options else ["--print-limit", "20"]  # given twice it is refused
    command = [program, "--tool", tool, "--report-api-errors", "no", "--launch-timeout", "120", *limit]
    command += [*options, sys.executable, "-m", program_module, *arguments]
    # torch's threads on the CPU, one a core, keep each other waiting under compute-sanitizer
    environment = {"OMP_NUM_THREADS": "4", **os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=root / "tests", env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    return done.returncode, done.stdout + done.stderr


def racecheck(root: Path, *arguments: str, program_module: str = "gpu.sanitized") -> tuple[str, list[Hazard]]:
    """(racecheck's report of a program that says that all is right, the hazards in it)."""
    options = ("--racecheck-report", "all", "--print-limit", "5000")
    code, report = run_under("racecheck", root, *arguments, program_module=program_module, options=options)
    assert code == 0, report[-4000:]
    hazards = hazards_in(report)
    assert bool(hazards) == (errors_in(report) > 0), report[-4000:]
    return report, hazards


@pytest.mark.timeout(300, method="thread")
@pytest.mark.parametrize("tool", TOOLS)
def test_the_shipped_kernels_are_clean(hopper: Target, pytestconfig: pytest.Config, tool: str) -> None:
    code, report = run_under(tool, pytestconfig.rootpath)
    assert errors_in(report) == 0, report[-4000:]
    assert code == 0, report[-4000:]
    assert report.count(": right") == RUNS


@pytest.mark.timeout(600, method="thread")
@pytest.mark.parametrize("program", [sanitized_grouped, sanitized_tokens], ids=lambda module: module.__name__)
@pytest.mark.parametrize("tool", TOOLS)
def test_the_kernels_of_experts_are_clean_whatever_the_offsets(
    hopper: Target, pytestconfig: pytest.Config, tool: str, program: Any
) -> None:
    code, report = run_under(tool, pytestconfig.rootpath, program_module=program.__name__)
    assert errors_in(report) == 0, report[-4000:]
    assert code == 0, report[-4000:]
    assert report.count(": right") == program.RIGHT
    assert report.count(": right") + report.count(": ran") == program.RUNS


@pytest.mark.timeout(300, method="thread")
def test_racecheck_says_nothing_of_the_shipped_kernels_but_what_it_says_of_ordered_copies(
    hopper: Target, pytestconfig: pytest.Config
) -> None:
    report, hazards = racecheck(pytestconfig.rootpath)
    assert report.count(": right") == RUNS
    if hazards:
        root, control = pytestconfig.rootpath, "gpu.racecheck_control"
        alarms = [h for name in ORDERED_COPIES for h in racecheck(root, name, program_module=control)[1]]
        assert alarms, f"racecheck knows the order of mbarriers, and reports {hazards[:5]}"
        assert all(h.refills for h in alarms), alarms[:5]
        others = [h for h in hazards if not h.refills]
        assert not others, others[:5]


@pytest.mark.timeout(120, method="thread")
@pytest.mark.parametrize("name", [name for name, control in CONTROLS.items() if not control.ordered])
def test_racecheck_finds_a_planted_race(hopper: Target, pytestconfig: pytest.Config, name: str) -> None:
    report, hazards = racecheck(pytestconfig.rootpath, name, program_module="gpu.racecheck_control")
    assert any(h.kind == "WAR" for h in hazards), report[-4000:]


@pytest.mark.timeout(300, method="thread")
@pytest.mark.parametrize("program", ["gpu.sanitized", "gpu.sanitized_grouped", "gpu.sanitized_tokens"])
def test_a_write_past_the_output_is_found(hopper: Target, pytestconfig: pytest.Config, program: str) -> None:
    if not pytestconfig.getoption("--planted", default=False):
        pytest.skip("writes past an allocation; asked for with --planted")
    _, report = run_under("memcheck", pytestconfig.rootpath, "--planted", program_module=program)
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


READ_THEN_WRITE = """========= Error: Potential WAR hazard detected at __shared__ 0x{at:x} in block (0,0,0) :
=========     Read Thread ({reader},0,0) at k+0x860
=========     Write Thread ({writer}, 0, 0) at k+0x9d0 in file.cu:3
=========     Current Value : 0, Incoming Value : 181
=========
"""


def test_hazards_are_read_and_refills_told_from_the_rest() -> None:
    refill = READ_THEN_WRITE.format(at=16, reader=127, writer=128)
    assert [h.refills for h in hazards_in(refill)] == [True]
    assert hazards_in(refill)[0].where == {"k+0x860", "k+0x9d0 in file.cu:3"}
    for other in (
        READ_THEN_WRITE.format(at=16, reader=1, writer=127),  # of one warpgroup
        READ_THEN_WRITE.format(at=16, reader=130, writer=3),
        refill.replace("WAR", "RAW"),
        refill.replace("WAR", "WAW").replace("Read", "Write"),
    ):
        assert [h.refills for h in hazards_in(refill + other)] == [True, False]
    assert hazards_in("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n") == []
    with pytest.raises(ValueError, match="reports 2 hazards, of which 1 are understood"):
        hazards_in(refill + "========= Error: Potential XYZ hazard detected at __shared__ 0x1\n=========  by nobody\n")


@pytest.mark.parametrize("name", CONTROLS)
def test_the_controls_are_what_they_claim(name: str) -> None:
    """By the emulator, which knows mbarriers, bulk copies and their order."""
    given, taken = np.array(source(), dtype=np.uint32), np.zeros(READERS, dtype=np.uint32)
    form = {"grid": [1], "block": [READERS + 32], "params": [{"ptr": "source"}, {"ptr": "output"}]}
    result = emulate(ptx(CONTROLS[name], "sm_100a"), form, {"source": given, "output": taken})
    assert result.report.clean == CONTROLS[name].ordered, str(result.report)
    assert not CONTROLS[name].ordered or result.buffers["output"].tolist() == expected()


@pytest.mark.parametrize("config", SHIPPED, ids=lambda c: c.name)
def test_the_problems_fill_tiles_in_part_and_use_every_stage_again(config) -> None:  # type: ignore[no-untyped-def]
    for linear, (x_format, out) in itertools.product((False, True), types(config)):
        case = problem(config, linear, x_format, out)
        m, n = case.out_shape
        assert config.tokens < m < 2 * config.tokens or config.tokens == 8
        assert config.grid(m, n, not linear)[0] >= 2
        assert config.grid(m, n, not linear)[1] >= 2
        assert -(-case.k // 64) > config.stages * config.stage_units * config.splits
        assert case.k % (64 * config.stage_units)
        assert (format_of(case.x) == NVFP4) == (x_format == OWN)


@pytest.mark.parametrize("outputs", [32, 64])  # of a row group: of gate and up, and of one matrix
@pytest.mark.parametrize("config", GROUPED_SHIPPED, ids=lambda c: c.name)
def test_the_grouped_problem_shares_tiles_and_fills_them_in_part(config, outputs: int) -> None:  # type: ignore[no-untyped-def]
    sizes, n, k = sanitized_grouped.SIZES, sanitized_grouped.N, sanitized_grouped.K
    offsets = [0, *itertools.accumulate(sizes)]
    tiles, costs = plan(offsets, offsets[-1], -(-n // (outputs * config.rows)), config)
    _, found = cuts(costs, -(-k // (64 * config.tile.stage_units)), 132, config)
    assert any(step for _, step in found)
    assert n % outputs
    assert k % 64
    assert any(t.end - t.first < t.width for t in tiles)
    assert 0 in sizes
    assert 1 in sizes
