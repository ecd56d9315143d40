"""What hazards are called, whatever the schedule: missing waits, the grid in front, fences with relaxed meetings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emulator.mutations.faults import FAULTS
from emulator.mutations.judge import mutant
from emulator.mutations.kernels import kernel
from emulator.runner import kinds, run
from emulator.test_divergence import SCHEDULES
from glu4.emulator.errors import LaunchError
from glu4.emulator.launch import Result, emulate

EVERY = pytest.mark.parametrize(("name", "seed"), SCHEDULES)
SETUP = """.shared .align 128 .b8 room[256]; .shared .align 8 .b64 bar; .reg .b32 %t, %x, %s, %b, %y; .reg .b64 %at; .reg .pred %one, %p, %other;
mov.u32 %t, %tid.x; mov.u32 %s, room; mov.u32 %b, bar; setp.eq.u32 %one, %t, 0; setp.ge.u32 %other, %t, 32;
@%one mbarrier.init.shared.b64 [%b], 1; bar.sync 0;
"""
COPY = """@%one mbarrier.arrive.expect_tx.shared.b64 _, [%b], 256;
@%one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%a], 256, [%b];
"""
WAIT = "{ W: mbarrier.try_wait.parity.shared.b64 %p, [%b], 0; @!%p bra W; }\n"
READ = "mad.lo.u32 %y, %t, 4, %s; ld.shared.b32 %x, [%y]; mul.wide.u32 %at, %t, 4; add.u64 %at, %at, %out; st.global.b32 [%at], %x;\n"


def both(body: str, name: str, seed: int) -> list[str]:
    buffers = {"a": np.arange(64, dtype=np.uint32), "out": np.zeros(64, np.uint32)}
    return kinds(run(SETUP + body, buffers, launch={"block": [64]}, schedule_name=name, seed=seed))


@EVERY
def test_a_reader_after_the_issue_misses_a_wait_and_one_beside_it_races(name: str, seed: int) -> None:
    """The other warp knows of the copy by bar.sync, or does not; the first warp waits at the end in both cases."""
    assert both(COPY + WAIT + READ, name, seed) == []
    after = both(COPY + "bar.sync 0; @%other bra Read;" + WAIT + "Read:" + READ, name, seed)
    assert set(after) - {"uninitialised read"} == {"missing wait"}
    beside = both(COPY + "@%other bra Read;" + WAIT + "Read:" + READ, name, seed)
    assert set(beside) - {"uninitialised read"} == {"data race"}


@EVERY
def test_a_writer_after_the_issue_misses_a_wait(name: str, seed: int) -> None:
    """A bulk store reads shared memory; it is overwritten before wait_group, by the thread itself or after a barrier."""
    fill = "mad.lo.u32 %y, %t, 4, %s; st.shared.b32 [%y], %t; fence.proxy.async.shared::cta; bar.sync 0;\n"
    store = "@%one cp.async.bulk.global.shared::cta.bulk_group [%out], [%s], 256; @%one cp.async.bulk.commit_group;\n"
    wait = "@%one cp.async.bulk.wait_group.read 0;\n"
    assert both(fill + store + wait + "bar.sync 0; st.shared.b32 [%y], %x;", name, seed) == []
    assert both(fill + store + "bar.sync 0; st.shared.b32 [%y], %x;" + wait, name, seed) == ["missing wait"]
    assert both(fill + store + "@%one st.shared.b32 [%y], %x;" + wait, name, seed) == ["missing wait"]
    assert both(fill + store + "@%other st.shared.b32 [%y], %x;" + wait, name, seed) == ["data race"]


@EVERY
def test_the_grid_in_front(name: str, seed: int) -> None:
    body = ".reg .b32 %t, %x; .reg .b64 %at; mov.u32 %t, %tid.x; mul.wide.u32 %at, %t, 4; add.u64 %at, %at, %a; BEFORE griddepcontrol.wait; AFTER"
    load, store = "ld.global.b32 %x, [%at];", "st.global.b32 [%at], %t;"

    def found(before: str, after: str, dependent: list[str]) -> list[str]:
        return kinds(run(body.replace("BEFORE", before).replace("AFTER", after), {"a": np.zeros(32, np.uint32)},
                         launch={"dependent": dependent}, schedule_name=name, seed=seed))  # fmt: skip

    for access in (load, store):
        assert found("", access, ["a"]) == []
        assert found(access, "", []) == []
        assert found(access, "", ["a"]) == ["data race"]
    assert found("", load + store, ["a"]) == []


@EVERY
def test_values_of_the_grid_in_front_come_with_the_wait(name: str, seed: int) -> None:
    body = ".reg .b32 %t, %x, %y; .reg .b64 %at; mov.u32 %t, %tid.x; mul.wide.u32 %at, %t, 4; add.u64 %at, %at, %a; LOAD %x, [%at]; griddepcontrol.wait; LOAD %y, [%at]; shl.b32 %x, %x, 16; or.b32 %x, %x, %y; st.global.b32 [%at], %x;"
    old, new = np.arange(32, dtype=np.uint32), np.arange(32, dtype=np.uint32) + 100

    def found(load: str, **options: Any) -> Result:
        return run(
            body.replace("LOAD", load), {"a": new}, launch={"dependent": ["a"]}, schedule_name=name, seed=seed, **options
        )

    for load in ("ld.relaxed.gpu.global.b32", "ld.volatile.global.b32"):
        seen = found(load, before={"a": old})
        assert kinds(seen) == []
        assert (seen.buffers["a"] == old << 16 | new).all()
        assert (found(load).buffers["a"] == new << 16 | new).all()
    assert kinds(found("ld.global.b32", before={"a": old})) == ["data race"]


def test_what_was_before_is_of_the_grid_in_front() -> None:
    a = np.zeros(4, np.uint32)
    with pytest.raises(LaunchError, match="before: 'a' is not among the buffers of the grid in front"):
        run("ret;", {"a": a}, before={"a": a})
    with pytest.raises(LaunchError, match=r"before: a is given as uint32 \[3\], and is uint32 \[4\]"):
        run("ret;", {"a": a}, launch={"dependent": ["a"]}, before={"a": a[:3]})


def test_an_output_of_the_grid_in_front_is_not_overwritten_early() -> None:
    """A buffer that starts unwritten may be read by the grid in front, too."""
    text = kernel("bulk_store").text
    launch = {**kernel("bulk_store").launch, "dependent": ["out"], "buffers": {"out": {"dtype": "uint32", "shape": [192]}}}
    inputs = {"a": kernel("bulk_store").buffers["a"]}
    for name, seed in SCHEDULES:
        options = {"schedule_name": name, "seed": seed}
        assert emulate(text, launch, inputs, **options).report.clean
        assert kinds(emulate(text.replace("griddepcontrol.wait;", ""), launch, inputs, **options)) == ["data race"]


def test_dependent_names_buffers() -> None:
    with pytest.raises(LaunchError, match="dependent: there is no buffer 'b'; known are a"):
        run("ret;", {"a": np.zeros(1, np.uint32)}, launch={"dependent": ["b"]})


def test_a_tcgen05_fence_without_its_partner_orders_nothing() -> None:
    """The relaxed way back of tensor_memory_fences: both fences are needed, and an ordinary acquire is no substitute."""
    good = kernel("tensor_memory_fences")
    assert good.run().report.clean
    back = good.text.replace("try_wait.parity.relaxed.cluster", "try_wait.parity.acquire.cluster")
    back = back.replace("arrive.relaxed.cluster", "arrive.release.cluster")
    assert emulate(back, good.launch, good.buffers).report.clean
    first = back.index("tcgen05.fence::after_thread_sync;")
    without = back[:first] + back[first:].replace("tcgen05.fence::after_thread_sync;", "", 1)
    assert kinds(emulate(without, good.launch, good.buffers)) == ["missing tcgen05.fence"]


@EVERY
def test_a_signal_from_another_cta_comes_before_the_end_of_its_target(name: str, seed: int) -> None:
    """CTA 1 arrives on CTA 0's mbarrier. CTA 0 may wait for it there, or learn of it at a cluster barrier."""
    body = """.shared .align 8 .b64 bar; .reg .b32 %t, %r, %b, %far, %zero; .reg .pred %p, %mine; mov.u32 %t, %tid.x; mov.u32 %r, %cluster_ctarank; mov.u32 %b, bar;
setp.eq.u32 %p, %t, 0; @%p mbarrier.init.shared.b64 [%b], 32; fence.mbarrier_init.release.cluster; barrier.cluster.arrive.relaxed; barrier.cluster.wait;
mov.u32 %zero, 0; setp.eq.u32 %mine, %r, 0; mapa.shared::cluster.u32 %far, %b, %zero; @%mine bra Mine;
mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%far]; bra Last;
Mine: WAIT
Last: END"""
    wait = "W: mbarrier.try_wait.parity.acquire.cluster.shared.b64 %p, [%b], 0; @!%p bra W;"
    launch = {"grid": [2], "cluster": [2]}

    def found(wait: str, end: str) -> list[str]:
        return kinds(run(body.replace("WAIT", wait).replace("END", end), launch=launch, schedule_name=name, seed=seed))

    assert found(wait, "") == []
    assert found("", "barrier.cluster.arrive; barrier.cluster.wait;") == []
    assert found("", "") == ["cluster lifetime"]
    assert found("", "barrier.cluster.arrive.relaxed; barrier.cluster.wait;") == ["cluster lifetime"]


@pytest.mark.parametrize(
    ("fault", "wait"),
    [
        ("triton_gemm_specialized: no tcgen05.wait::ld", "tcgen05.wait::ld"),
        ("triton_gemm_specialized: no tcgen05.wait::st", "tcgen05.wait::st"),
        ("triton_gemm_specialized: no wait for the accumulator", "the mbarrier of a tcgen05.commit after it"),
        ("triton_gemm_pointers: no cp.async.wait_group", "cp.async.wait_group"),
        ("bulk_store: no wait_group.read", "cp.async.bulk.wait_group"),
        ("bulk_store: no wait for the copy", "its mbarrier"),
    ],
)
def test_the_report_says_what_would_wait(fault: str, wait: str) -> None:
    broken = mutant(next(f for f in FAULTS if f.key == fault))
    for schedule, seed in SCHEDULES[:2]:
        result = broken.run(schedule_name=schedule, seed=seed)
        messages = [h.message for h in result.report.hazards if h.kind == "missing wait"]
        assert any(f"with no wait ({wait}) between" in message for message in messages), result.report
