"""Timing: how often and in which order graphs are replayed, and what a contender that fails does to the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.fake_gpu import FakeGpu
from glu4.bench.timing import (
    COLD_BYTES,
    LOOKS,
    REPLAY_MS,
    REST_S,
    TIMED,
    TURNS,
    WARM_UPS,
    Cuda,
    Failure,
    Slower,
    Timing,
    copies,
    describe,
    interleaved,
    listed,
)


class Contender:
    """A call of `ms`, which may change from replay to replay, that logs its name when it runs."""

    def __init__(self, name: str, gpu: FakeGpu, ms: float, log: list[str]) -> None:
        self.name, self.gpu, self.ms, self.log = name, gpu, ms, log

    def __call__(self) -> None:
        self.log.append(self.name)
        self.gpu.spend(self.ms)


def test_a_replay_lasts_about_eight_milliseconds_and_a_call_gets_its_share() -> None:
    gpu, log = FakeGpu(), []
    call = Contender("a", gpu, 0.05, log)
    found = interleaved({"a": [call] * 4}, gpu)["a"]
    assert isinstance(found, Timing)
    assert found.us == pytest.approx(50)
    assert found.us_min == pytest.approx(50)
    assert found.samples == TURNS * TIMED
    # one round to capture and two to see how long it takes, one capture of 40 rounds, then the replays
    rounds = round(REPLAY_MS / (4 * 0.05))
    assert len(log) == 4 * (3 + rounds * (1 + TURNS * (WARM_UPS + TIMED)))


def test_contenders_take_turns() -> None:
    gpu, log = FakeGpu(), []
    # each call is as long as a replay shall be, so that a replay is one call
    found = interleaved({name: [Contender(name, gpu, REPLAY_MS, log)] for name in "abc"}, gpu)
    assert list(found) == ["a", "b", "c"]
    turn = WARM_UPS + TIMED
    assert log[-3 * TURNS * turn :] == (["a"] * turn + ["b"] * turn + ["c"] * turn) * TURNS
    assert gpu.rests == [REST_S] * 3 * TURNS


def test_a_first_look_spares_the_turns_of_the_slow() -> None:
    gpu, log = FakeGpu(), []
    times = {"a": 8.0, "b": 9.9, "c": 10.1, "d": 80.0}
    found = interleaved({name: [Contender(name, gpu, ms, log)] for name, ms in times.items()}, gpu, margin=0.25)
    assert [type(found[name]) for name in "abcd"] == [Timing, Timing, Slower, Slower]
    assert [getattr(found[name], "us", None) for name in "abcd"] == [pytest.approx(1e3 * ms) for ms in times.values()]
    turn = WARM_UPS + TIMED
    assert log[-2 * TURNS * turn :] == (["a"] * turn + ["b"] * turn) * TURNS
    look = 2 + LOOKS
    assert log[: -2 * TURNS * turn][-4 * look :] == ["a"] * look + ["b"] * look + ["c"] * look + ["d"] * look
    assert gpu.rests == [REST_S] * 2 * TURNS
    assert isinstance(found["a"], Timing)
    assert found["a"].samples == TURNS * TIMED, "the look's replays are not among them"


def test_a_first_look_at_one_that_fails_or_is_alone() -> None:
    gpu, log = FakeGpu(), []
    calls = iter(range(100))

    def failing() -> None:
        if next(calls) > 4:
            raise RuntimeError("no more")
        gpu.spend(8.0)

    found = interleaved({"a": [failing], "b": [Contender("b", gpu, 90.0, log)]}, gpu, margin=0.25)
    assert isinstance(found["a"], Failure)
    assert isinstance(found["b"], Timing), "nothing is left that is faster"
    assert isinstance(interleaved({"b": [Contender("b", gpu, 90.0, log)]}, gpu, margin=0.25)["b"], Timing)


def test_warm_ups_do_not_count_and_the_median_and_minimum_are_of_the_rest() -> None:
    gpu = FakeGpu()
    # capturing and estimating take three calls
    lengths = iter([8.0] * 3 + ([100.0] * WARM_UPS + [8.0 + i * i / 10 for i in range(TIMED)]) * TURNS)
    found = interleaved({"a": [lambda: gpu.spend(next(lengths))]}, gpu)["a"]
    assert isinstance(found, Timing)
    assert found.us == pytest.approx(48000)  # i = 20
    assert found.us_min == pytest.approx(8000)


@pytest.mark.parametrize("at", [0, 2, 3, 7, 12])
def test_one_that_raises_leaves_the_others_alone(at: int) -> None:
    gpu = FakeGpu()
    calls = 0

    def failing() -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            raise RuntimeError("no\nkernel here")
        gpu.spend(REPLAY_MS)

    found = interleaved({"bad": [failing], "good": [lambda: gpu.spend(REPLAY_MS)]}, gpu)
    assert found["bad"] == Failure("RuntimeError: no kernel here")
    assert found["good"] == Timing(pytest.approx(8000), pytest.approx(8000), TURNS * TIMED)


def test_a_lost_device_ends_it_and_what_was_timed_stays() -> None:
    gpu = FakeGpu()
    calls = 0

    def hanging() -> None:
        nonlocal calls
        calls += 1
        if calls == 3 + WARM_UPS + 5:
            gpu.lost = True
            raise TimeoutError("the kernel did not end within 20 s")
        gpu.spend(REPLAY_MS)

    found = interleaved({"good": [lambda: gpu.spend(REPLAY_MS)], "bad": [hanging]}, gpu)
    assert found["bad"] == Failure("TimeoutError: the kernel did not end within 20 s", fatal=True)
    assert found["good"] == Timing(pytest.approx(8000), pytest.approx(8000), TIMED)


def test_a_device_lost_at_the_start_leaves_no_times() -> None:
    gpu = FakeGpu()

    def losing() -> None:
        gpu.lost = True
        raise RuntimeError("illegal memory access")

    found = interleaved({"bad": [losing], "later": [lambda: gpu.spend(1)]}, gpu)
    assert found["bad"] == Failure("RuntimeError: illegal memory access", fatal=True)
    assert found["later"] == Failure("not timed: the device was lost before", fatal=True)


@given(st.integers(0, 1 << 40))
def test_copies_are_two_at_least_and_leave_nothing_in_l2(nbytes: int) -> None:
    count = copies(nbytes)
    assert count >= 2
    assert count * max(1, nbytes) >= COLD_BYTES
    assert count == 2 or (count - 1) * nbytes < COLD_BYTES


def test_a_description_is_one_short_line() -> None:
    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    assert len(describe(ValueError("x" * 1000))) == 300


@pytest.mark.gpu
def test_a_gpu_is_timed_and_a_hang_noticed() -> None:
    x = torch.zeros(1 << 20, device="cuda")
    cuda = Cuda()
    found = interleaved({"add": [lambda: x.add_(1.0)] * 3, "sync": [torch.cuda.synchronize]}, cuda)
    assert isinstance(found["add"], Timing)
    assert 0.5 < found["add"].us_min <= found["add"].us < 1000
    # what may not be captured is a failure that the device survives
    assert isinstance(found["sync"], Failure)
    assert not found["sync"].fatal
    impatient = Cuda(hang_s=0.01)
    with pytest.raises(TimeoutError, match=r"did not end within 0\.01 s"):
        impatient.elapsed(lambda: torch.cuda._sleep(500_000_000))
    assert not impatient.alive()
    torch.cuda.synchronize()
    assert cuda.alive()


def test_trials_list_a_time_or_why_there_is_none() -> None:
    assert listed(Timing(2.5, 2.0, 9)) == [2.5, 2.0]
    assert "out of memory" in listed(Failure("out of memory"))
    assert "7.0" in listed(Slower(7.0))
