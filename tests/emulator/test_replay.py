"""Times of a recording: exact on small ones, and the same whatever schedule ran."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.kernels import launches
from emulator.test_recording import SCHEDULES, pipeline, recorded
from glu4.emulator.launch import emulate, load
from glu4.emulator.recording import Node, Recording, Signal, Trace, Unit
from glu4.emulator.replay import ENGINES, Event, Lane, Rates, Timeline, replay

CTA = (0, 0, 0)
EXACT = Rates(
    instruction={"alu": 1, "special": 8, "memory": 4, "product": 16},
    bytes=dict.fromkeys(ENGINES, 64.0),
    macs={"f16": 1000.0},
    latency=dict.fromkeys(ENGINES, 100.0),
)


def lane(name: str, cta: tuple[int, int, int] = CTA) -> Lane:
    return Lane(0, cta, name)


def trace(warp: int, *nodes: Node, start: Signal | None = None) -> Trace:
    return Trace(0, CTA, warp, start, list(nodes))


def node(kind: str, *counts: int, needs: tuple[Signal, ...] = (), gives: Signal | None = None) -> Node:
    if gives is not None:
        gives.parts += 1
    return Node(kind, (*counts, *(0,) * (4 - len(counts))), 1, 1, 1, "", needs, gives)


def unit(engine: str, size: int = 0, macs: int = 0, ctas: Any = ((0, CTA),), product: str = "f16") -> Unit:
    return Unit("an operation", engine, ctas, 0, 1, "", Signal("issue"), Signal("operation", parts=1), size, macs, product)


def kinds(timeline: Timeline, name: str) -> list[tuple[str, float, float]]:
    return [(e.kind, e.start, e.end) for e in timeline.events if e.lane.name == name]


def test_a_wait_ends_with_the_last_arrival() -> None:
    phase = Signal("phase", "bar", 0)
    timeline = replay(
        Recording(
            (
                trace(0, node("arrive", 10, gives=phase)),
                trace(1, node("arrive", 2, 3, gives=phase), node("end", 1)),
                trace(2, node("wait", 5, needs=(phase,)), node("end", 1, 0, 2)),
            ),
            (),
        ),
        EXACT,
    )
    assert kinds(timeline, "warp 0") == [("run", 0, 10), ("arrive", 10, 10)]
    assert kinds(timeline, "warp 1") == [("run", 0, 26), ("arrive", 26, 26), ("run", 26, 27)]
    assert kinds(timeline, "warp 2") == [("run", 0, 5), ("wait", 5, 26), ("run", 26, 35)]
    assert [(link.start.name, link.end.name, link.time) for link in timeline.links] == [("warp 1", "warp 2", 26)]
    assert (timeline.total, timeline.busy("warp 2"), timeline.waits("warp 2")) == (35, 14, 21)
    wait = next(e for e in timeline.events if e.kind == "wait")
    assert (wait.barrier, wait.phase) == ("bar", 0)


def test_a_phase_that_is_complete_costs_nothing() -> None:
    phase = Signal("phase", "bar", 0)
    timeline = replay(
        Recording((trace(0, node("arrive", 3, gives=phase)), trace(1, node("wait", 9, needs=(phase,)))), ()), EXACT
    )
    assert kinds(timeline, "warp 1") == [("run", 0, 9)]
    assert not timeline.links


def test_an_engine_takes_one_operation_after_the_other_and_latency_overlaps() -> None:
    a, b = unit("TMA loads", 640), unit("TMA loads", 1280)
    timeline = replay(
        Recording(
            (trace(0, node("issue", 4, gives=a.starts), node("issue", 1, gives=b.starts), node("wait", needs=(b.done,))),),
            (a, b),
        ),
        EXACT,
    )
    found = [(e.start, e.busy, e.end) for e in timeline.events if e.lane.name == "TMA loads"]
    assert found == [(4, 10, 114), (14, 20, 134)]
    assert timeline.total == 134
    assert timeline.busy("TMA loads") == (640 + 1280) / 64


def test_operations_that_need_others_wait_for_their_completion() -> None:
    a, b = unit("tcgen05.cp", 64), unit("MMA (tcgen05)", macs=5000)
    b.needs.append(a.done)
    timeline = replay(Recording((trace(0, node("issue", gives=a.starts), node("issue", 1, gives=b.starts)),), (b, a)), EXACT)
    (product,) = [e for e in timeline.events if e.lane.name == "MMA (tcgen05)"]
    assert (product.start, product.busy, product.end) == (101, 5, 206)


def test_a_pair_occupies_both_engines_with_half_each() -> None:
    other = (1, 0, 0)
    first, both = unit("MMA (tcgen05)", macs=3000), unit("MMA (tcgen05)", macs=8000, ctas=((0, CTA), (0, other)))
    timeline = replay(
        Recording((trace(0, node("issue", gives=first.starts), node("issue", gives=both.starts)),), (first, both)), EXACT
    )
    found = sorted((e.lane.cta, e.start, e.busy, e.macs) for e in timeline.events if e.lane.is_engine)
    assert found == [(CTA, 0, 3, 3000), (CTA, 3, 4, 4000), (other, 3, 4, 4000)]
    assert timeline.busy("MMA (tcgen05)", other) == 4
    assert timeline.busy("MMA (tcgen05)") == 11


def test_lanes_that_branch_run_side_by_side_and_meet_at_the_later() -> None:
    branch, meet = Signal("branch"), Signal("branch")
    child = trace(0, node("end", 50, gives=meet), start=branch)
    parent = trace(0, node("fork", 10, gives=branch), node("join", 5, needs=(meet,)), node("end", 1))
    timeline = replay(Recording((parent, child), ()), EXACT)
    assert timeline.total == 61


def test_a_cause_that_is_not_recorded_is_counted_not_waited_for() -> None:
    never = Signal("phase", "bar", 0, parts=1)
    timeline = replay(Recording((trace(0, node("wait", 5, needs=(never,)), node("end", 2)),), ()), EXACT)
    assert (timeline.unresolved, timeline.total) == (1, 7)


def test_stuck_warps_reach_past_the_end() -> None:
    timeline = replay(Recording((trace(0, node("stuck", 5)), trace(1, node("end", 40))), ()), EXACT)
    assert kinds(timeline, "warp 0") == [("run", 0, 5), ("stuck", 5, 42)]
    assert [(m.lane.name, m.time) for m in timeline.hazards] == [("warp 0", 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": {"alu": 1}}, "instruction: special needs a number of ticks"),
        ({"bytes": {"TMA loads": 0}}, "bytes: the rate of TMA loads must be positive, got 0"),
        ({"macs": {"f16": -1}}, "macs: the rate of f16 must be positive, got -1"),
        ({"latency": {"TMA loads": -1}}, "latency: negative"),
    ],
)
def test_rates_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(EXACT, **change)


def test_a_rate_that_is_missing_is_named() -> None:
    one = unit("MMA (tcgen05)", macs=1, product="mxf4")
    recording = Recording((trace(0, node("issue", gives=one.starts)),), (one,))
    with pytest.raises(ValueError, match="macs: there is no rate for mxf4"):
        replay(recording, EXACT)


@st.composite
def recordings(draw: Any) -> Recording:
    """Warps that run, issue, arrive at phases in turn, and wait for phases that are complete by then in some order of all."""
    warps = draw(st.integers(1, 4))
    nodes: list[list[Node]] = [[] for _ in range(warps)]
    units, signals = [], []
    for _ in range(draw(st.integers(1, 25))):
        own = nodes[draw(st.integers(0, warps - 1))]
        cost = draw(st.tuples(st.integers(0, 20), st.integers(0, 3)))
        action = draw(st.sampled_from(("issue", "arrive", "wait")))
        if action == "issue":
            one = unit(draw(st.sampled_from(("TMA loads", "tcgen05.cp"))), draw(st.integers(0, 5000)))
            own.append(node("issue", *cost, gives=one.starts))
            units.append(one)
            signals.append(one.done)
        elif action == "arrive" or not signals:
            phase = Signal("phase", "bar", len(signals))
            own.append(node("arrive", *cost, gives=phase))
            signals.append(phase)
        else:
            own.append(node("wait", *cost, needs=(draw(st.sampled_from(signals)),)))
    return Recording(tuple(trace(i, *n) for i, n in enumerate(nodes)), tuple(units))


def alone(events: list[Event]) -> None:
    """Bars of a lane do not overlap, but for what an engine has in flight."""
    drawn = [e for e in events if e.busy or not e.lane.is_engine]
    for a, b in pairwise(drawn):
        assert a.start + (a.busy if a.lane.is_engine else a.end - a.start) <= b.start


@settings(max_examples=200, deadline=None)
@given(recordings())
def test_time_is_consistent(recording: Recording) -> None:
    timeline = recording.timed(EXACT)
    assert timeline.unresolved == 0
    for one in timeline.lanes:
        alone([e for e in timeline.events if e.lane == one])
        assert timeline.busy(one.name) <= timeline.total
    for link in timeline.links:
        assert any(e.kind == "wait" and e.lane == link.end and e.end == link.time for e in timeline.events)
        assert any(e.lane == link.start and e.end == link.time for e in timeline.events)
    busy = sum(u.bytes for u in recording.units) / 64
    assert sum(timeline.busy(e) for e in ENGINES) == pytest.approx(busy)
    counts = [sum(n.counts) for t in recording.traces for n in t.nodes]
    assert sum(e.instructions for e in timeline.events) == sum(counts)


@settings(max_examples=50, deadline=None)
@given(recordings(), st.integers(2, 5))
def test_time_scales_with_all_rates(recording: Recording, factor: int) -> None:
    slower = Rates(
        instruction={k: v * factor for k, v in EXACT.instruction.items()},
        bytes={k: v / factor for k, v in EXACT.bytes.items()},
        macs=EXACT.macs,
        latency={k: v * factor for k, v in EXACT.latency.items()},
    )
    assert recording.timed(slower).total == pytest.approx(factor * recording.timed(EXACT).total)


# kernels


def whole(timeline: Timeline) -> list[Any]:
    """Waits and operations, which no schedule may change."""
    return sorted((e.lane, e.start, e.end, e.kind, e.line) for e in timeline.events if e.lane.is_engine or e.kind == "wait")


def test_stages_overlap_copies_with_work() -> None:
    """More stages hide the copies behind the work: the picture shows it, in order of magnitude as arithmetic says."""
    totals = {stages: recorded(stages).timed(EXACT).total for stages in (1, 2, 6)}
    copy, work = 2048 / 64 + 100, 40 * (8 + 3)
    assert totals[1] == pytest.approx(6 * (copy + work), rel=0.1)
    assert totals[6] == pytest.approx(copy + 6 * work, rel=0.1)
    assert totals[2] == pytest.approx(totals[6], rel=0.02)  # two stages are enough; six take longer to set up
    assert totals[1] - totals[2] == pytest.approx(5 * copy, rel=0.1)


@pytest.mark.parametrize("stages", [1, 2])
def test_no_trace_of_the_schedule_in_a_pipeline(stages: int) -> None:
    first = whole(recorded(stages).timed())
    for schedule, seed in SCHEDULES:
        assert whole(recorded(stages, schedule_name=schedule, seed=seed).timed()) == first


@pytest.mark.parametrize("name", ["cute_gemm_narrow", "triton_gemm_specialized"])
def test_no_trace_of_the_schedule_in_a_kernel(name: str) -> None:
    ptx, launch, problem = launches.load(name)
    program, inputs = load(ptx), launches.make_inputs(problem)
    launch["ctas"] = [[0, 0, 0]]
    found = []
    for schedule, seed in (("eager", 0), ("lazy", 0), ("random", 1), ("random", 5)):
        recording = emulate(program, launch, inputs, schedule_name=schedule, seed=seed, record=True).recording
        assert recording is not None
        timeline = recording.timed()
        assert timeline.unresolved == 0
        found.append(whole(timeline))
    assert all(f == found[0] for f in found[1:])


def test_a_kernel_s_engines_do_its_work() -> None:
    """One CTA of a product: products, and bytes of both operands and their scales, follow from its sizes."""
    ptx, launch, problem = launches.load("cute_dual")
    launch["ctas"] = [[0, 0, 0]]
    recording = emulate(ptx, launch, launches.make_inputs(problem), record=True).recording
    assert recording is not None
    events = recording.events
    assert sum(e.macs for e in events) == 2 * 128 * 128 * problem.k
    bytes_of_a_row = problem.k // 2 + problem.k // 16
    assert sum(e.bytes for e in events if e.lane.name == "TMA loads") == 3 * 128 * bytes_of_a_row
    timeline = recording.timed()
    assert timeline.busy("MMA (tcgen05)") == 2 * 128 * 128 * problem.k / timeline.rates.macs["mxf4nvf4"]
    assert sum(e.bytes for e in events if e.kind == "tcgen05.ld") == 2 * 128 * 128 * 4


def test_slower_engines_take_longer() -> None:
    recording = pipeline(2, record=True).recording
    assert recording is not None
    slow = replace(Rates(), bytes={**Rates().bytes, "bulk copies": 1.0})
    timeline = recording.timed(slow)
    assert timeline.busy("bulk copies") == 6 * 2048
    assert timeline.total > recording.timed().total
    assert timeline.waits("warp 1") > recording.timed().waits("warp 1")


def test_commits_and_copies_come_after_what_they_follow() -> None:
    """The epilogue begins with the last product's end; products begin when their scales are in tensor memory."""
    ptx, launch, problem = launches.load("cute_dual")
    launch["ctas"] = [[0, 0, 0]]
    recording = emulate(ptx, launch, launches.make_inputs(problem), record=True).recording
    assert recording is not None
    for latency in (32, 500):
        check_order(recording.timed(replace(Rates(), latency={**Rates().latency, "tcgen05.cp": latency})))


def check_order(timeline: Timeline) -> None:
    products = [e for e in timeline.events if e.kind == "tcgen05.mma"]
    copies = [e for e in timeline.events if e.kind == "tcgen05.cp"]
    ended = [link for link in timeline.links if link.start.name == "MMA (tcgen05)" and link.end.name == "warp 0"]
    assert [link.time for link in ended] == [max(e.end for e in products)]
    assert len(copies) == 36
    for tile in range(3):  # the twelve copies of a tile of K, and its four steps of two products
        scales, steps = copies[12 * tile : 12 * tile + 12], products[8 * tile : 8 * tile + 8]
        assert min(e.start for e in steps) >= min(e.end for e in scales)
        assert max(e.start for e in scales) < max(e.end for e in steps)


def test_a_store_is_written_after_it_is_read() -> None:
    ptx, launch, problem = launches.load("triton_gemm_bf16")
    launch["ctas"] = [[0, 0, 0]]
    for schedule in ("eager", "lazy"):
        result = emulate(ptx, launch, launches.make_inputs(problem), schedule_name=schedule, record=True)
        assert result.recording is not None
        stores = [e for e in result.recording.events if e.lane.name == "TMA stores"]
        reads, writes = ([e for e in stores if e.kind.endswith(half)] for half in (": read", ": write"))
        assert len(reads) == len(writes) > 0
        for read, write in zip(reads, writes):
            assert write.start == read.end == read.start + read.busy
            assert write.end == read.end + Rates().latency["TMA stores"]
