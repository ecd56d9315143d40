"""clusterlaunchcontrol: every cluster's work is done once, whoever does it (PTX ISA 9.7.13.17 and 9.7.13.18)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emulator.runner import kinds, run
from emulator.test_divergence import SCHEDULES
from glu4.emulator.errors import PtxError

# the loop of the ISA's example: add 1 to out[x, y, z] for each cluster's CTAs, and keep who did it
DECLARE = """.shared .align 16 .b8 answer[16]; .shared .align 8 .b64 bar; .reg .pred %p, %lead, %one, %wait; .reg .b32 %x, %y, %z, %n, %i, %phase, %rank, %r0, %r1, %r2;
.reg .b64 %at, %o, %lo, %hi; .reg .b128 %handle; .reg .b32 %abar, %aanswer; .reg .b64 %state;
"""
START = """mov.u32 %abar, bar; mov.u32 %aanswer, answer; mov.u32 %x, %ctaid.x; mov.u32 %y, %ctaid.y; mov.u32 %z, %ctaid.z; mov.u32 %phase, 0;
mov.u32 %rank, %cluster_ctarank; mov.u32 %i, %tid.x; setp.eq.u32 %one, %i, 0; setp.eq.and.u32 %lead, %rank, 0, %one;
@%one mbarrier.init.shared::cta.b64 [%abar], 1; @%one fence.mbarrier_init.release.cluster; barrier.cluster.arrive; barrier.cluster.wait;
"""
ASK = """Again: @%one mbarrier.arrive.expect_tx.relaxed.cluster.shared::cta.b64 %state, [%abar], 16;
@%lead clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.multicast::cluster::all.b128 [%aanswer], [%abar];
"""
WORK = """mov.u32 %r0, %nctaid.x; mov.u32 %r1, %nctaid.y; mad.lo.u32 %n, %z, %r1, %y; mad.lo.u32 %n, %n, %r0, %x;
mul.wide.u32 %o, %n, 4; add.u64 %at, %out, %o; @%one red.global.add.u32 [%at], 1;
add.u64 %at, %who, %o; mov.u32 %r0, %clusterid.x; @%one st.global.u32 [%at], %r0;
"""
WAIT = """Wait: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %wait, [%abar], %phase; @!%wait bra Wait; xor.b32 %phase, %phase, 1;
ld.shared.b128 %handle, [%aanswer]; clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p, %handle; @!%p bra Done;
clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%x, %y, %z, _}, %handle; clusterlaunchcontrol.query_cancel.get_first_ctaid::y.b32.b128 %r1, %handle;
mov.u32 %r0, %cluster_ctaid.x; add.u32 %x, %x, %r0; mov.u32 %y, %r1;
fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster; barrier.cluster.arrive; barrier.cluster.wait;
fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster; bra Again;
Done: ret;
"""
GOOD = START + ASK + WORK + WAIT


def launch(body: str, grid: list[int], cluster: int, **options: Any) -> Any:
    cells = int(np.prod(grid))
    buffers = {"out": np.zeros(cells, np.uint32), "who": np.full(cells, 999, np.uint32)}
    return run(body, buffers, declarations=DECLARE, launch={"grid": grid, "block": [32], "cluster": [cluster]}, **options)


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
@pytest.mark.parametrize(("grid", "cluster"), [([12, 3, 2], 1), ([12, 3, 2], 2), ([3], 1), ([2], 2)])
def test_every_cta_is_worked_on_once(name: str, seed: int, grid: list[int], cluster: int) -> None:
    r = launch(GOOD, grid, cluster, schedule_name=name, seed=seed)
    assert r.report.clean, str(r.report)
    assert (r.buffers["out"] == 1).all()


def test_generic_addresses_and_single_coordinates() -> None:
    ask = "clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.multicast::cluster::all.b128 [%aanswer], [%abar]"
    generic = """.reg .b64 %ga, %gb; cvt.u64.u32 %ga, %aanswer; cvta.shared.u64 %ga, %ga; cvt.u64.u32 %gb, %abar; cvta.shared.u64 %gb, %gb;
    @%lead clusterlaunchcontrol.try_cancel.async.mbarrier::complete_tx::bytes.multicast::cluster::all.b128 [%ga], [%gb]"""
    each = " ".join(f"clusterlaunchcontrol.query_cancel.get_first_ctaid::{axis}.b32.b128 %{axis}, %handle;" for axis in "xyz")
    four = "clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%x, %y, %z, _}, %handle;"
    assert ask in GOOD
    assert four in GOOD
    r = launch(GOOD.replace("@%lead " + ask, generic).replace(four, each), [6, 2, 3], 2)
    assert r.report.clean, str(r.report)
    assert (r.buffers["out"] == 1).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clusterlaunchcontrol.try_cancel.async.shared::cta.b128 [%x], [%y];", "expected .mbarrier::complete_tx::bytes"),
        ("clusterlaunchcontrol.try_cancel.mbarrier::complete_tx::bytes.b128 [%x], [%y];", "is not modelled"),
        ("clusterlaunchcontrol.query_cancel.get_first_ctaid.b32.b128 %x, %handle;", "is not modelled"),
        ("clusterlaunchcontrol.query_cancel.get_first_ctaid::w.b32.b128 %x, %handle;", "expected one of .get_first_ctaid::x"),
        ("clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p, %lo;", "expected 128 bits"),
    ],
)
def test_malformed_ones_are_refused(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(DECLARE + text)


def test_the_first_clusters_take_over_the_others() -> None:
    """Four clusters run from the start; under eager completion they do everything."""
    r = launch(GOOD, [24], 2)
    assert set(r.buffers["who"].tolist()) == {0, 1, 2, 3}
    # a smaller machine: all by one cluster
    assert set(launch(GOOD, [24], 2, resident=1).buffers["who"].tolist()) == {0}


def test_a_schedule_may_refuse() -> None:
    """Then the clusters that are left are launched after all."""
    found = [launch(GOOD, [40], 1, schedule_name="random", seed=seed) for seed in range(4)]
    assert all(r.report.clean and (r.buffers["out"] == 1).all() for r in found)
    assert any(r.buffers["who"].max() >= 4 for r in found)


def test_chosen_ctas_are_the_only_ones_to_take() -> None:
    cells = {"out": np.zeros(12, np.uint32), "who": np.zeros(12, np.uint32)}
    chosen = {"grid": [12], "block": [32], "cluster": [1], "ctas": [[2], [5], [7]]}
    r = run(GOOD, cells, declarations=DECLARE, launch=chosen, resident=1)
    assert r.report.clean, str(r.report)
    assert np.flatnonzero(r.buffers["out"]).tolist() == [2, 5, 7]


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("[%abar], 16;", "[%abar], 8;", ("mbarrier misuse",)),
        ("[%abar], 16;", "[%abar], 32;", ("deadlock",)),
        ("mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %wait, [%abar], %phase; @!%wait bra Wait;", "", ("data race", "uninitialised read")),
        (".multicast::cluster::all", "", ("deadlock",)),
        ("@!%p bra Done;", "@!%p bra Once; bra More; Once: setp.eq.u32 %p, %phase, 7; More:", ("cluster launch control",)),
        ("mov.u32 %aanswer, answer;", "mov.u32 %aanswer, answer; add.u32 %aanswer, %aanswer, 8;", ("misaligned address",)),
        ("Wait: mbarrier", "bra Done; Wait: mbarrier", ("exit with work outstanding", "cluster lifetime")),
        ("ld.shared.b128 %handle, [%aanswer];", "mov.b128 %handle, {%out, %who};", ("cluster launch control",)),
    ],
)  # fmt: skip
def test_faults_are_found(old: str, new: str, kind: tuple[str, ...]) -> None:
    assert old in GOOD
    for name, seed in SCHEDULES:
        r = launch(GOOD.replace(old, new), [8], 2, schedule_name=name, seed=seed, max_instructions=5_000)
        assert {*kind} & {*kinds(r)}, (name, str(r.report))
