"""No alarm and right numbers on any good kernel, whatever the schedule: one cluster of each kernel under many random ones."""

from __future__ import annotations

import pytest

from emulator.mutations.kernels import kernel, names

SEEDS = 200  # of each kernel
IN_CI = 25
BLOCK = 25  # seeds of one test, so that workers share a kernel's
FIRST = [pytest.param(i, marks=[] if i <= IN_CI else pytest.mark.long) for i in range(1, SEEDS + 1, BLOCK)]


def run_seeds(name: str, seeds: range) -> None:
    good = kernel(name)
    for seed in seeds:
        result = good.run(schedule_name="random", seed=seed)
        assert result.report.clean, str(result.report)
        assert good.right(result.buffers), f"seed {seed}: wrong numbers"


@pytest.mark.parametrize("name", names())
def test_no_alarm_under_a_few_schedules(name: str) -> None:
    run_seeds(name, range(SEEDS + 1, SEEDS + 4))


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("name", names())
def test_no_alarm_under_many_schedules(name: str, first: int) -> None:
    run_seeds(name, range(first, first + BLOCK))
