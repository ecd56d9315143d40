"""mbarriers: counts, phases, transaction bytes, and their misuse."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.runner import kinds, run
from emulator.test_divergence import SCHEDULES

SETUP = """.shared .align 8 .b64 bar[4]; .shared .align 16 .b32 room[256]; .reg .b32 %t, %x, %y, %b, %s, %far; .reg .b64 %at, %o, %st; .reg .pred %p, %q, %one;
mov.u32 %t, %tid.x; mov.u32 %b, bar; setp.eq.u32 %one, %t, 0;
"""
WAIT = "{{ W: mbarrier.try_wait.parity.shared.b64 %p, [%b{0}], {1}; @!%p bra W; }}"


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
def test_phases_carry_data_between_warps(name: str, seed: int) -> None:
    """Warp 1 fills a buffer eight times, warp 0 empties it; full and empty barriers take turns."""
    body = (
        SETUP
        + """@%one mbarrier.init.shared::cta.b64 [%b], 32; @%one mbarrier.init.shared::cta.b64 [%b+8], 32; bar.sync 0; and.b32 %x, %t, 31; mov.u32 %s, room; mad.lo.u32 %s, %x, 4, %s;
    .reg .b32 %i, %phase, %sum, %v; mov.u32 %i, 0; mov.u32 %phase, 0; mov.u32 %sum, 0; setp.ge.u32 %q, %t, 32; @%q bra Produce;
    Consume:"""
        + WAIT.format("", "%phase")
        + """ld.shared.b32 %v, [%s]; add.u32 %sum, %sum, %v; mbarrier.arrive.shared::cta.b64 _, [%b+8]; xor.b32 %phase, %phase, 1; add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 8; @%p bra Consume;
    mul.wide.u32 %o, %t, 4; add.u64 %at, %out, %o; st.global.b32 [%at], %sum; ret;
    Produce: xor.b32 %y, %phase, 1;"""
        + WAIT.format("+8", "%y")
        + """mad.lo.u32 %v, %i, 100, %x; st.shared.b32 [%s], %v; mbarrier.arrive.shared::cta.b64 %st, [%b]; xor.b32 %phase, %phase, 1; add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 8; @%p bra Produce;"""
    )
    r = run(body, {"out": np.zeros(32, np.uint32)}, launch={"block": [64]}, schedule_name=name, seed=seed)
    assert r.report.clean, str(r.report)
    assert r.buffers["out"].tolist() == [2800 + 8 * i for i in range(32)]


def test_states_counts_and_drops() -> None:
    body = (
        SETUP
        + """.reg .b32 %c; @!%one exit; mbarrier.init.shared.b64 [%b], 3; mbarrier.arrive.shared.b64 %st, [%b]; mbarrier.pending_count.b64 %c, %st; st.global.b32 [%out], %c;
    mbarrier.test_wait.shared.b64 %p, [%b], %st; selp.b32 %x, 1, 0, %p; st.global.b32 [%out+4], %x; mbarrier.arrive_drop.shared.b64 %st, [%b]; mbarrier.arrive.shared.b64 _, [%b];
    mbarrier.test_wait.shared.b64 %p, [%b], %st; selp.b32 %x, 1, 0, %p; st.global.b32 [%out+8], %x; mbarrier.arrive.shared.b64 %st, [%b], 2; mbarrier.test_wait.parity.shared.b64 %p, [%b], 1;
    selp.b32 %x, 1, 0, %p; st.global.b32 [%out+12], %x; mbarrier.inval.shared.b64 [%b]; mbarrier.init.shared.b64 [%b], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%b], 64;
    mbarrier.test_wait.parity.shared.b64 %p, [%b], 0; selp.b32 %x, 1, 0, %p; st.global.b32 [%out+16], %x; mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%b], 64;
    mbarrier.test_wait.parity.acquire.cta.shared.b64 %p, [%b], 0; selp.b32 %x, 1, 0, %p; st.global.b32 [%out+20], %x;"""
    )
    r = run(body, {"out": np.zeros(6, np.uint32)})
    assert r.report.clean, str(r.report)
    assert r.buffers["out"].tolist() == [3, 0, 1, 1, 0, 1]


def test_try_wait_may_be_a_peek() -> None:
    """A failed try_wait that is not looped on gives false, and the kernel goes on."""
    body = (
        SETUP
        + """@!%one exit; mbarrier.init.shared.b64 [%b], 1; mbarrier.try_wait.parity.shared.b64 %p, [%b], 0; selp.b32 %x, 1, 2, %p; st.global.b32 [%out], %x;"""
    )
    for name, seed in SCHEDULES:
        r = run(body, {"out": np.zeros(1, np.uint32)}, schedule_name=name, seed=seed)
        assert r.report.clean
        assert r.buffers["out"].tolist() == [2]


def test_remote_arrivals() -> None:
    body = (
        SETUP
        + """mov.u32 %y, %cluster_ctarank; @%one mbarrier.init.shared.b64 [%b], 32; fence.mbarrier_init.release.cluster; barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;
    xor.b32 %x, %y, 1; mapa.shared::cluster.u32 %far, %b, %x; mov.u32 %s, room; mad.lo.u32 %s, %t, 4, %s; mapa.shared::cluster.u32 %s, %s, %x; st.shared::cluster.b32 [%s], %y;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%far];"""
        + WAIT.format("", "0").replace("parity.", "parity.acquire.cluster.")
        + """mov.u32 %s, room; mad.lo.u32 %s, %t, 4, %s; ld.shared.b32 %x, [%s]; mad.lo.u32 %y, %y, 32, %t; mul.wide.u32 %o, %y, 4; add.u64 %at, %out, %o; st.global.b32 [%at], %x;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    )
    for name, seed in SCHEDULES:
        good = run(body, {"out": np.zeros(64, np.uint32)}, launch={"grid": [2], "cluster": [2]}, schedule_name=name, seed=seed)
        assert good.report.clean, str(good.report)
        assert good.buffers["out"].tolist() == [1] * 32 + [0] * 32
        bad = run(
            body.replace("fence.mbarrier_init.release.cluster;", ""),
            {"out": np.zeros(64, np.uint32)},
            launch={"grid": [2], "cluster": [2]},
            schedule_name=name,
            seed=seed,
        )
        assert kinds(bad) == ["mbarrier misuse"]
        bad = run(
            body.replace("arrive.release.cluster", "arrive.relaxed.cluster"),
            {"out": np.zeros(64, np.uint32)},
            launch={"grid": [2], "cluster": [2]},
            schedule_name=name,
            seed=seed,
        )
        assert kinds(bad) == ["data race"]


def test_asynchronous_stores_complete_on_the_far_barrier() -> None:
    body = (
        SETUP
        + """mov.u32 %y, %cluster_ctarank; @%one mbarrier.init.shared.b64 [%b], 1; @%one mbarrier.arrive.expect_tx.shared.b64 _, [%b], 256; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    xor.b32 %x, %y, 1; mapa.shared::cluster.u32 %far, %b, %x; mov.u32 %s, room; mad.lo.u32 %s, %t, 8, %s; mapa.shared::cluster.u32 %s, %s, %x; mad.lo.u32 %x, %y, 1000, %t;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%s], {%x, %t}, [%far];"""
        + WAIT.format("", "0")
        + """mov.u32 %s, room; mad.lo.u32 %s, %t, 8, %s; ld.shared.b32 %x, [%s]; mad.lo.u32 %y, %y, 32, %t; mul.wide.u32 %o, %y, 4; add.u64 %at, %out, %o; st.global.b32 [%at], %x; barrier.cluster.arrive; barrier.cluster.wait;"""
    )
    for name, seed in SCHEDULES:
        r = run(body, {"out": np.zeros(64, np.uint32)}, launch={"grid": [2], "cluster": [2]}, schedule_name=name, seed=seed)
        assert r.report.clean, str(r.report)
        assert r.buffers["out"].tolist() == [1000 + i for i in range(32)] + list(range(32))


def test_cp_async_arrives_when_its_copies_are_done() -> None:
    body = (
        SETUP
        + """@%one mbarrier.init.shared.b64 [%b], 32; bar.sync 0; mov.u32 %s, room; mad.lo.u32 %s, %t, 4, %s; mul.wide.u32 %o, %t, 4; add.u64 %at, %a, %o; setp.ge.u32 %q, %t, 32; @%q bra Read;
    cp.async.ca.shared.global [%s], [%at], 4; cp.async.mbarrier.arrive.noinc.shared.b64 [%b]; cp.async.wait_all; ret; Read:"""
        + WAIT.format("", "0")
        + """sub.u32 %x, %t, 32; mov.u32 %s, room; mad.lo.u32 %s, %x, 4, %s; ld.shared.b32 %y, [%s]; mul.wide.u32 %o, %x, 4; add.u64 %at, %out, %o; st.global.b32 [%at], %y;"""
    )
    a = np.arange(32, dtype=np.uint32) * 3
    for name, seed in SCHEDULES:
        r = run(body, {"a": a, "out": np.zeros(32, np.uint32)}, launch={"block": [64]}, schedule_name=name, seed=seed)
        assert r.report.clean, str(r.report)
        assert (r.buffers["out"] == a).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mbarrier.arrive.shared.b64 _, [%b];", "there is no initialised mbarrier here"),
        ("mbarrier.init.shared.b64 [%b], 1; mbarrier.arrive.shared.b64 _, [%b], 2;", "2 arrivals where 1 are expected"),
        ("mbarrier.init.shared.b64 [%b], 0;", "count 0 is outside 1 to"),
        ("mbarrier.init.shared.b64 [%b], 1; mbarrier.init.shared.b64 [%b], 1;", "initialised again without mbarrier.inval"),
        ("mbarrier.init.shared.b64 [%b], 1; mbarrier.expect_tx.relaxed.cta.shared.b64 [%b], 16; mbarrier.inval.shared.b64 [%b];", "invalidated while in use"),
        ("mbarrier.init.shared.b64 [%b], 2; mbarrier.arrive.expect_tx.shared.b64 _, [%b], 16;", "16 transaction bytes outstanding"),
        ("mbarrier.init.shared.b64 [%b], 1; mbarrier.complete_tx.relaxed.cta.shared.b64 [%b], 16; mbarrier.arrive.shared.b64 _, [%b];", "16 bytes more were transferred than expected"),
        ("mbarrier.init.shared.b64 [%b+4], 1;", "misaligned"),
        ("mbarrier.init.shared.b64 [%b], 1; mbarrier.expect_tx.relaxed.cta.shared.b64 [%b], 0x200000;", "leaves its range"),
    ],
)  # fmt: skip
def test_misuse(body: str, message: str) -> None:
    r = run(SETUP + "@!%one exit;" + body)
    assert message in str(r.report)


def test_use_before_the_initialisation_is_ordered() -> None:
    body = SETUP + "@%one mbarrier.init.shared.b64 [%b], 64; ORDER mbarrier.arrive.shared.b64 _, [%b];"
    for name, seed in SCHEDULES:
        assert run(body.replace("ORDER", "bar.sync 0;"), launch={"block": [64]}, schedule_name=name, seed=seed).report.clean
        bad = run(body.replace("ORDER", ""), launch={"block": [64]}, schedule_name=name, seed=seed)
        assert kinds(bad) == ["mbarrier misuse"], name


def test_a_wait_for_a_phase_that_never_completes_is_a_deadlock() -> None:
    body = SETUP + "@!%one exit; mbarrier.init.shared.b64 [%b], 2; mbarrier.arrive.shared.b64 _, [%b];" + WAIT.format("", "0")
    for name, seed in SCHEDULES:
        r = run(body, schedule_name=name, seed=seed)
        assert kinds(r) == ["deadlock"]
        assert "phase 0, 1 of 2 arrivals and 0 bytes outstanding; waits for parity 0" in str(r.report)


HANDOVER = (
    SETUP
    + """.reg .b32 %u; and.b32 %u, %t, 31; @%one mbarrier.init.shared.b64 [%b], 32; bar.sync 0; mov.u32 %s, room; mad.lo.u32 %s, %u, 4, %s; setp.ge.u32 %q, %t, 32; @%q bra Read;
st.shared.b32 [%s], %t; ORDER ret; Read: mov.u32 %s, room; mad.lo.u32 %s, %u, 8, %s;"""
)
READ = "ld.shared.v2.b32 {%x, %y}, [%s]; mul.wide.u32 %o, %u, 8; add.u64 %at, %out, %o; st.global.v2.b32 [%at], {%x, %y};"
ARRIVE = "mbarrier.arrive.shared.b64 _, [%b];"


def test_what_one_lane_acquires_the_others_know_after_they_meet() -> None:
    """Lane 0 waits in a branch of its own; the others read after the branch."""
    body = (
        HANDOVER.replace("ORDER", "st.shared.b32 [%s+128], 5;" + ARRIVE)
        + "setp.ne.u32 %q, %u, 0; @%q bra Meet;"
        + WAIT.format("", "0")
        + "Meet:"
        + READ
    )
    for name, seed in SCHEDULES:
        r = run(body, {"out": np.zeros((32, 2), np.uint32)}, launch={"block": [64]}, schedule_name=name, seed=seed)
        assert r.report.clean, str(r.report)
        assert r.buffers["out"].ravel().tolist() == list(range(32)) + [5] * 32


def test_what_is_written_after_the_arrival_is_not_handed_over() -> None:
    """One load reads words of before and of after the arrival."""
    for order, good in (
        ("st.shared.b32 [%s+4], 5;" + ARRIVE, True),
        (ARRIVE + "setp.eq.u32 %p, %t, 31; @%p st.shared.b32 [%s+4], 5;", False),
    ):
        body = (
            HANDOVER.replace("st.shared.b32 [%s], %t;", "mad.lo.u32 %s, %u, 4, %s; st.shared.b32 [%s], %t;").replace(
                "ORDER", order
            )
            + WAIT.format("", "0")
            + READ
        )
        for name, seed in SCHEDULES:
            r = run(body, {"out": np.zeros((32, 2), np.uint32)}, launch={"block": [64]}, schedule_name=name, seed=seed)
            assert ("data race" in kinds(r)) != good, str(r.report)
