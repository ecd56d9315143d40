"""The roofline formula against the numbers that others published, and against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glu4.bench.devices import DEVICES, Device, device
from glu4.bench.roofline import limit
from glu4.bench.suites import DECODE, SUITES, dual_problem, group_problems, suite
from glu4.problem import GroupedProblem, Problem
from glu4.verify.contest import DUAL_BENCHMARKS, DUAL_TESTS, GROUP_BENCHMARKS, DualShape, GroupShape

# speed of light in microseconds, as the two problems list it, shape by shape
LISTED_DUAL = ("4.708", "8.714", "2.125", "6.535")
LISTED_GROUP = ("18.833", "10.667", "2.406", "1.525")
# limits of an H100 with W4A16, microseconds to one digit, worked out apart from this code
H100 = {
    (256, 4096, 7168): "37.7",
    (512, 4096, 7168): "75.4",
    (256, 3072, 4096): "16.1",
    (512, 3072, 7168): "56.5",
    (1, 4096, 7168): "11.0",
    (16, 4096, 7168): "11.1",
    (64, 4096, 7168): "11.5",
    (128, 4096, 7168): "18.8",
    (1024, 4096, 7168): "150.7",
    (4096, 4096, 7168): "602.8",
}


@pytest.mark.parametrize(("shape", "listed"), list(zip(DUAL_BENCHMARKS, LISTED_DUAL)), ids=str)
def test_the_dual_speed_of_light_is_the_listed_one(shape, listed):
    assert f"{limit(dual_problem(shape), device('b200-contest')).time_s * 1e6:.3f}" == listed


@pytest.mark.parametrize(("shape", "listed"), list(zip(GROUP_BENCHMARKS, LISTED_GROUP)), ids=str)
def test_the_group_speed_of_light_is_the_listed_one(shape, listed):
    assert f"{limit(group_problems(shape), device('b200-contest')).time_s * 1e6:.3f}" == listed


def test_bytes_and_flops_are_those_counted_by_hand():
    # 256,4096,7168: codes 256*3584 + 2*4096*3584, scales 256*448 + 2*4096*448, output 2*256*4096
    dual = limit(dual_problem(DUAL_BENCHMARKS[0]), device("b200-contest"))
    assert dual.bytes == 917_504 + 29_360_128 + 114_688 + 3_670_016 + 2_097_152 == 36_159_488
    assert dual.flops == 4 * 256 * 4096 * 7168 == 30_064_771_072
    group = limit(group_problems(GROUP_BENCHMARKS[0]), device("b200-contest"))
    assert (group.bytes, group.flops) == (144_637_952, 60_129_542_144)
    bounds = [limit(dual_problem(s), device("b200-contest")).bound for s in DUAL_BENCHMARKS]
    assert bounds == ["memory", "compute", "memory", "compute"]


@pytest.mark.parametrize("size", list(H100), ids=str)
def test_the_h100_limits_are_the_stated_ones(size):
    found = limit(dual_problem(DualShape(*size), "float16"), device("h100"))
    assert f"{found.time_s * 1e6:.1f}" == H100[size]


def test_the_default_h100_table_has_exactly_these_shapes():
    assert [(s.m, s.n, s.k) for s in (*DUAL_BENCHMARKS, *DECODE)] == list(H100)


def test_w4a16_bytes_take_16_bit_activations():
    found = limit(dual_problem(DualShape(1, 4096, 7168), "float16"), device("h100"))
    assert found.bytes == 2 * 7168 + 2 * 4096 * (3584 + 448) + 2 * 4096


def test_h200_has_the_measured_rates():
    assert (device("h200").bandwidth, device("h200").flops) == (4.3e12, 790e12)


@given(
    m=st.integers(0, 1 << 16),
    n=st.integers(0, 1 << 16),
    k=st.integers(1, 1 << 12).map(lambda i: 16 * i),
    name=st.sampled_from([d.name for d in DEVICES]),
    x_format=st.sampled_from(["nvfp4", "float16"]),
)
def test_the_limit_is_the_larger_of_two_times_and_several_launches_add(m, n, k, name, x_format):
    rates = device(name)
    problem = Problem(m, n, k, x_format=x_format)
    found = limit(problem, rates)
    assert found.time_s >= problem.bytes / rates.bandwidth
    assert found.time_s >= problem.flops / rates.flops
    assert found.time_s in (found.memory_s, found.compute_s)
    assert found.bound == ("memory" if found.memory_s >= found.compute_s else "compute")
    three = limit([problem] * 3, rates)
    assert (three.bytes, three.flops) == (3 * found.bytes, 3 * found.flops)
    assert math.isclose(three.time_s, 3 * found.time_s)


def test_nothing_to_do_takes_no_time_and_experts_are_one_launch():
    assert limit([], device("h100")).time_s == 0
    moe = GroupedProblem(64, 8, 4096, 7168, x_format="float16")
    assert limit(moe, device("h100")).bytes == moe.bytes


def test_unknown_names_are_refused_by_naming_what_there_is():
    with pytest.raises(ValueError, match="device: expected one of b200-contest, h100, h200, got 'b300'"):
        device("b300")
    with pytest.raises(ValueError, match="suite: expected one of seed, decode, group, got 'all'"):
        suite("all")
    with pytest.raises(ValueError, match="expected positive rates, got 0 and 1"):
        Device("none", 0, 1, "nvfp4", "")


def test_suites_hold_each_shape_once():
    assert suite("seed")[:4] == DUAL_BENCHMARKS
    assert set(suite("seed")) == {*DUAL_BENCHMARKS, *DUAL_TESTS}
    assert all(len(set(shapes)) == len(shapes) for shapes in SUITES.values())
    assert all(isinstance(s, GroupShape) for s in suite("group"))
