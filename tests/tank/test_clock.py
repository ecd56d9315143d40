"""The clock: what it says of equal and of different kernels, and its statistics against known values."""

from __future__ import annotations

import math
import random

import pytest

from glu4.tank.clock import Pair, Ratio, combined, outcome, pairs, ratio, t_quantile


class Noisy:
    """A device whose replays take what the calls say, times a lognormal factor, slower as it warms up."""

    def __init__(self, seed: int, drift: float = 0.0) -> None:
        self.random, self.drift, self.now, self.order = random.Random(seed), drift, 0.0, []

    def capture(self, work):
        return work

    def elapsed(self, work):
        self.now, start = 0.0, len(self.order)
        work()
        self.order = self.order[: start + 1]
        self.drift *= 1.0
        self.factor = math.exp(self.random.gauss(0, 0.01)) * (1 + self.drift * len(self.order))
        return self.now * self.factor

    def alive(self):
        return True

    def rest(self, seconds):
        pass

    def call(self, name, ms):
        def run():
            self.now += ms
            self.order.append(name)

        return run


def timed(seed: int, entry_ms: float, drift: float = 0.0):
    device = Noisy(seed, drift)
    return pairs([device.call("b", 1.0)] * 2, [device.call("e", entry_ms)] * 2, device, 30, seed), device


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 29, 99])
def test_quantiles_of_students_t(freedom):
    known = {1: 12.706205, 2: 4.302653, 4: 2.776445, 9: 2.262157, 29: 2.045230, 99: 1.984217}
    assert t_quantile(freedom) == pytest.approx(known[freedom], rel=1e-4)


def test_equal_kernels_are_rarely_told_apart_and_different_ones_always():
    apart = sum(outcome(ratio(timed(seed, 1.0)[0])) != "no difference" for seed in range(200))
    assert 1 <= apart <= 24, "5 % of 200 is 10; beyond 24 or at none the interval is wrong"
    assert all(outcome(ratio(timed(seed, 0.97)[0])) == "faster" for seed in range(20))
    assert all(outcome(ratio(timed(seed, 1.03)[0])) == "slower" for seed in range(20))


def test_a_device_that_gets_slower_does_not_favour_one_of_the_two():
    wrong = sum(outcome(ratio(timed(seed, 1.0, drift=0.002)[0])) != "no difference" for seed in range(100))
    assert wrong <= 14


def test_pairs_are_as_many_as_asked_for_in_an_order_drawn_by_lot():
    found, _ = timed(3, 1.0)
    again, _ = timed(3, 1.0)
    assert len(found) == 30
    assert found == again
    assert 5 < sum(p.entry_first for p in found) < 25
    assert found[0].baseline_us == pytest.approx(1000.0, rel=0.05)


def test_the_mean_over_shapes_is_geometric():
    one, two = ([Pair(s * (1 + i % 2 * 0.001), 1.0, False) for i in range(10)] for s in (2.0, 0.5))
    both = combined([one, two])
    assert both.value == pytest.approx(1.0, rel=1e-2)
    assert ratio(one).value == pytest.approx(2.001, rel=1e-3)
    assert both.low < both.value < both.high


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Ratio(1.1, 1.01, 1.2), "faster"),
        (Ratio(0.9, 0.8, 0.99), "slower"),
        (Ratio(1.1, 0.99, 1.2), "no difference"),
    ],
)
def test_the_interval_decides(found, expected):
    assert outcome(found) == expected
