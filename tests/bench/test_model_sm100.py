"""The prediction of Blackwell times: its simulation by hand, its bounds, what it must be monotone in, and planted faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glu4.backends.blackwell.config import Config, candidates, legal
from glu4.bench.devices import device
from glu4.bench.model_sm100 import RATES, Prediction, Rates, Shared, predict, predict_launch, simulate
from glu4.bench.program_sm100 import LOAD, MMA, Op, Program, describe
from glu4.bench.roofline import limit
from glu4.errors import UnsupportedError
from glu4.problem import GroupedProblem, Problem

CONTEST = device("b200-contest")
BENCHMARK = Problem(256, 4096, 7168)


def default(problem: Problem) -> Config:
    return next(candidates(problem))


TILES = [(1, 128, n) for n in (32, 64, 128)] + [(2, 256, n) for n in (32, 64, 128)]


@st.composite
def cases(draw: Any) -> tuple[Problem, Config]:
    """A problem and a configuration that may run it."""
    problem = Problem(draw(st.integers(1, 1500)), 8 * draw(st.integers(1, 500)), 32 * draw(st.integers(1, 120)))
    tile = draw(st.sampled_from(TILES))
    config = Config(
        *tile,
        tile_k=draw(st.sampled_from((128, 256))),
        stages=draw(st.integers(1, 4)),
        order=draw(st.sampled_from(("interleaved", "by_matrix"))),
        barriers=draw(st.sampled_from(("joint", "separate"))),
        load_width=draw(st.sampled_from((8, 16, 32))),
        schedule=draw(st.sampled_from(("one_wave", "static"))),
        store=draw(st.sampled_from(("direct", "tma"))),
        silu=draw(st.sampled_from(("exp", "tanh"))),
    )
    config = replace(config, stages=min(config.stages, config.most_stages()))
    if draw(st.booleans()):
        config = replace(config, gate_first=draw(st.integers(1, config.stages)))
    if config.order == "interleaved" and draw(st.booleans()):
        config = replace(config, collector=True)
    if draw(st.booleans()):
        config = replace(config, pdl=True, early_weights=draw(st.booleans()))
    assert legal(config, problem) is None
    return problem, config


# ---- the simulation, by hand ----


def test_one_stage_is_a_chain_of_latencies() -> None:
    """load, wait, multiply, commit, again: each step takes what its parts take, one after the other."""
    rates = Rates(setup_us=0.0, latency_us=2.0, tensor_us=0.5, clock=1000.0)
    shared = Shared(loads=1000.0, macs=100.0)
    load, mma = Op("issue", ("filled",), LOAD, 3000), Op("issue", ("free",), MMA, 0, 400)
    ops: list[Op] = []
    for step in range(3):
        ops += [replace(load, signal=("filled", step)), Op("wait", ("filled", step)), replace(mma, signal=("x", step))]
        ops += [Op("issue", ("free", step), "commit"), Op("wait", ("free", step))]
    run = simulate([Program({"both": tuple(ops)}, 1, 3)], rates, shared)
    assert run.end == pytest.approx(3 * (3 + 2 + 4 + 0.5))
    assert (run.first_mma, run.last_mma) == pytest.approx((5.0, 2 * 9.5 + 9))
    assert dict(run.busy) == pytest.approx({LOAD: 9, MMA: 12})


def test_engines_serve_one_operation_at_a_time_and_roles_overlap() -> None:
    rates = Rates(setup_us=0.0, latency_us=0.0, clock=1000.0)
    shared = Shared(loads=1000.0, macs=100.0)
    loads = tuple(Op("issue", ("filled", i), LOAD, 2000) for i in range(4))
    uses = tuple(op for i in range(4) for op in (Op("wait", ("filled", i)), Op("issue", ("x", i), MMA, 0, 100)))
    uses += (Op("wait", ("x", 3)),)
    run = simulate([Program({"load": loads, "multiply": uses}, 1, 4)], rates, shared)
    assert run.end == pytest.approx(4 * 2 + 1), "four loads of 2 us, and the last product after them"
    twice = simulate([Program({"load": loads, "multiply": uses}, 1, 4)] * 2, rates, shared)
    assert twice.end == pytest.approx(2 * run.end), "a second CTA waits for the first"
    together = simulate([Program({"load": loads, "multiply": uses}, 1, 4)] * 2, rates, shared, resident=2)
    assert together.end == pytest.approx(8 * 2 + 1), "or shares its engines"


def test_a_program_that_waits_for_nothing_is_an_error() -> None:
    stuck = Program({"a": (Op("wait", ("x",)), Op("arrive", ("y",))), "b": (Op("wait", ("y",)), Op("arrive", ("x",)))}, 1, 1)
    with pytest.raises(RuntimeError, match="waits for what never comes"):
        simulate([stuck], RATES, Shared(1.0, 1.0))


def test_an_mma_takes_its_products_or_its_operands() -> None:
    """A of 128 x 64 is 4096 bytes: at N 64 shared memory is the slower, unless A stays in the collector."""
    shared = Shared(1.0, 16384 * RATES.clock)
    small = Op("issue", ("x",), MMA, 0, 128 * 64 * 64, 4096 + 2048)
    assert RATES.busy(small, shared) * RATES.clock == pytest.approx(6144 / 128)
    assert RATES.busy(replace(small, shared_bytes=2048), shared) * RATES.clock == pytest.approx(128 * 64 * 64 / 16384)


# ---- the prediction ----


def test_parts_sum_to_the_whole_and_a_prediction_repeats() -> None:
    found = predict(BENCHMARK, default(BENCHMARK))
    assert found == predict(BENCHMARK, default(BENCHMARK))
    assert sum(found.breakdown.values()) == pytest.approx(found.us)
    assert list(found.breakdown) == ["launch", "fill", "main loop", "epilogue"]
    assert all(0 <= share <= 4 for share in found.busy.values())


@pytest.mark.parametrize(
    ("problem", "config", "bound"),
    [
        (Problem(512, 37 * 128, 28672), Config(2, 256, 128, stages=5), "tensor core"),
        (BENCHMARK, Config(stages=1), "copy latency"),
        (Problem(1, 16384, 7168), Config(1, 128, 64, stages=5), "device memory"),
        (Problem(256, 512, 256), Config(stages=1), "fixed costs"),
    ],
)
def test_what_bounds_a_time(problem: Problem, config: Config, bound: str) -> None:
    assert predict(problem, config).bound_by == bound


def above_limit(problem: Problem, found: Prediction) -> None:
    assert found.us > limit(problem, CONTEST).time_s * 1e6


@given(cases())
@settings(max_examples=60, deadline=None)
def test_never_below_the_limit(case: tuple[Problem, Config]) -> None:
    above_limit(case[0], predict(*case))


@given(cases(), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_more_of_k_takes_no_less_time(case: tuple[Problem, Config], more: int) -> None:
    problem, config = case
    longer = replace(problem, k=problem.k + 32 * more)
    assert predict(longer, config).us >= predict(problem, config).us - 1e-9


@given(cases())
@settings(max_examples=40, deadline=None)
def test_one_more_stage_is_no_slower_where_as_many_ctas_fit(case: tuple[Problem, Config]) -> None:
    problem, config = case
    config = replace(config, stages=config.stages + 3)  # one CTA an SM with either
    more = replace(config, stages=config.stages + 1)
    if legal(more, problem) is None and 2 * config.shared_bytes() > 228 * 1024:
        assert predict(problem, more).us <= predict(problem, config).us + 1e-9


@given(cases())
@settings(max_examples=30, deadline=None)
def test_a_faster_device_is_no_slower(case: tuple[Problem, Config]) -> None:
    fast = replace(RATES, latency_us=RATES.latency_us / 2, memory=2 * RATES.memory, launch_us=RATES.launch_us / 2)
    assert predict(*case, fast).us <= predict(*case).us


@pytest.mark.parametrize(
    ("problem", "rates"),
    [
        (Problem(512, 37 * 128, 57344), replace(RATES, device_flops=2 * RATES.device_flops, flops=2 * RATES.flops)),
        (Problem(64, 148 * 128, 28672), replace(RATES, memory=2 * RATES.memory)),
    ],
)
def test_doubled_rates_are_found(problem: Problem, rates: Rates) -> None:
    config = default(problem)
    above_limit(problem, predict(problem, config))
    with pytest.raises(AssertionError):
        above_limit(problem, predict(problem, config, rates))


def test_waves_and_schedules() -> None:
    one, two = Problem(128, 148 * 128, 2048), Problem(128, 149 * 128, 2048)
    config = Config(stages=4)
    first, second = predict(one, config), predict(two, config)
    assert second.us > first.us + 0.8 * (first.us - first.breakdown["launch"]), "one CTA more is a second wave"
    persistent = predict(two, replace(config, schedule="static"))
    assert persistent.us < second.us, "a persistent CTA loads the next tile while it writes the last"


def test_a_dependent_launch_hides_part_of_the_launch() -> None:
    base = Config(1, 128, 64, stages=4)
    plain, dependent = predict(BENCHMARK, base), predict(BENCHMARK, replace(base, pdl=True))
    early = predict(BENCHMARK, replace(base, pdl=True, early_weights=True))
    assert dependent.us <= plain.us
    assert early.us < dependent.us


def test_sharing_a_tile_pays_where_processors_are_idle_and_costs_where_none_is() -> None:
    """The sums of parts go to L2 and back: a few microseconds, against half of a long K."""
    config = Config(tile_n=64, stages=4)
    idle, full = Problem(128, 4096, 28672), Problem(128, 148 * 64, 7168)
    for shared in (replace(config, split=2), replace(config, schedule="stream_k")):
        assert predict(idle, shared).us < 0.8 * predict(idle, config).us, "64 tiles on 148 processors"
        assert predict(full, shared).us >= predict(full, config).us, "a tile for each"
    uneven = Problem(128, 150 * 64, 7168)
    assert predict(uneven, replace(config, schedule="stream_k")).us < 0.9 * predict(uneven, config).us, "a wave of two CTAs"


def test_parts_of_k_are_ctas_too() -> None:
    """Twice as many CTAs with half the steps each: what one SM runs is no less where all are taken."""
    config, full = Config(tile_n=64, stages=4), Problem(128, 148 * 64, 7168)
    whole, halves = predict(full, config), predict(full, replace(config, split=2))
    assert halves.us > whole.us
    assert halves.breakdown["epilogue"] > whole.breakdown["epilogue"] + 2 * RATES.cache_us


@pytest.mark.parametrize("change", [{}, {"stages": 1}, {"order": "by_matrix"}, {"gate_first": 2}, {"schedule": "static"}])
def test_one_warp_for_copies_and_products_is_no_faster(change: dict[str, Any]) -> None:
    config = replace(Config(tile_n=64, stages=4), **change)
    assert predict(BENCHMARK, replace(config, warps="single")).us >= predict(BENCHMARK, config).us


def test_several_problems_in_one_launch() -> None:
    group = [Problem(m, 4096, 1536, operation="linear") for m in (128, 384)]
    config = Config(2, 256, 128, stages=8, schedule="static")
    together = predict_launch(group, config)
    assert together.us > max(predict(p, config).us for p in group)
    assert together.us < sum(predict(p, config).us for p in group)
    assert predict_launch(group, config, processors=8).us > together.us
    with pytest.raises(ValueError, match="one or more of one K and one operation, got 2 kinds"):
        predict_launch([group[0], replace(group[1], k=2048)], config)


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="tile_m 64: a block-scaled MMA of one CTA has 128 rows"):
        predict(BENCHMARK, Config(tile_m=64))
    with pytest.raises(UnsupportedError, match="float16 activations: the block-scaled MMA takes 4-bit operands"):
        predict(Problem(128, 128, 256, x_format="float16"), Config())
    with pytest.raises(UnsupportedError, match="grouped problems have no Blackwell kernel yet"):
        predict(GroupedProblem(64, 4, 128, 256), Config())


def test_no_rows_take_a_launch() -> None:
    assert predict(Problem(0, 128, 256), Config()).us == RATES.launch_us


def test_steps_share_what_they_load() -> None:
    """The same bytes by more CTAs: each SM gets its share of device memory as often as L2 can serve it again."""
    program = describe(Config(), BENCHMARK)
    assert sum(op.bytes for op in program.roles["load"]) == 28 * Config().stage_bytes()
