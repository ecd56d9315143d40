"""What a recording holds: the same causes whatever the schedule, and nothing where it is off."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from emulator.runner import run
from glu4.emulator.launch import Result
from glu4.emulator.recording import CLASSES, Recording

SCHEDULES = [("eager", 0), ("lazy", 0), *(("random", seed) for seed in range(8))]

# warp 0 copies 2 KiB into each of the stages in turn; warp 1 waits, works and gives the stage back
PIPELINE = """
.reg .b32 %i, %warp, %full, %empty, %data, %t, %stage, %parity, %n; .reg .b64 %from; .reg .pred %p, %q;
.reg .f32 %f;
mov.u32 %i, %tid.x; shr.u32 %warp, %i, 5; mov.u32 %t, bars; mov.u32 %data, stages;
setp.ne.u32 %p, %i, 0;
@%p bra READY;
mov.u32 %n, 0;
INIT:
mad.lo.u32 %full, %n, 16, %t;
mbarrier.init.shared::cta.b64 [%full], 1; mbarrier.init.shared::cta.b64 [%full+8], 1;
add.u32 %n, %n, 1; setp.lt.u32 %q, %n, STAGES; @%q bra INIT;
fence.mbarrier_init.release.cluster;
READY:
bar.sync 0;
and.b32 %i, %i, 31; setp.ne.u32 %p, %i, 0;
@%p exit;
mov.u32 %n, 0; mov.u32 %stage, 0; mov.u32 %parity, 0; mov.b64 %from, %A;
mad.lo.u32 %full, %stage, 16, %t;
setp.ne.u32 %p, %warp, 0;
@%p bra CONSUME;
LOAD:
mad.lo.u32 %full, %stage, 16, %t; mad.lo.u32 %data, %stage, 2048, stages;
xor.b32 %empty, %parity, 1;
FREE: mbarrier.try_wait.parity.shared::cta.b64 %p, [%full+8], %empty; @!%p bra FREE;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%full], 2048;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%data], [%from], 2048, [%full];
add.u64 %from, %from, 2048;
add.u32 %stage, %stage, 1; setp.eq.u32 %p, %stage, STAGES; selp.u32 %stage, 0, %stage, %p; @%p xor.b32 %parity, %parity, 1;
add.u32 %n, %n, 1; setp.lt.u32 %q, %n, 6; @%q bra LOAD;
exit;
CONSUME:
mad.lo.u32 %full, %stage, 16, %t;
FILLED: mbarrier.test_wait.parity.shared::cta.b64 %p, [%full], %parity; @!%p bra FILLED;
mov.u32 %i, 0;
WORK: ex2.approx.f32 %f, 0f3f800000; add.u32 %i, %i, 1; setp.lt.u32 %q, %i, 40; @%q bra WORK;
mbarrier.arrive.shared::cta.b64 _, [%full+8];
add.u32 %stage, %stage, 1; setp.eq.u32 %p, %stage, STAGES; selp.u32 %stage, 0, %stage, %p; @%p xor.b32 %parity, %parity, 1;
add.u32 %n, %n, 1; setp.lt.u32 %q, %n, 6; @%q bra CONSUME;
exit;
"""


def pipeline(stages: int, **options: Any) -> Result:
    """Six copies of 2 KiB through a ring of stages; the consumer works for 40 ex2 on each."""
    top = f".shared .align 16 .b8 bars[{16 * stages}];\n.shared .align 128 .b8 stages[{2048 * stages}];"
    body = PIPELINE.replace("STAGES", str(stages))
    return run(body, {"A": np.zeros(6 * 2048, np.uint8)}, top=top, launch={"block": [64]}, **options)


def recorded(stages: int = 2, **options: Any) -> Recording:
    result = pipeline(stages, record=True, **options)
    assert result.recording is not None
    return result.recording


def causes(recording: Recording) -> Any:
    """For each warp, what it did in order, without how its lanes came together."""
    found: dict[Any, list[Any]] = {}
    for trace in sorted(recording.traces, key=lambda t: (t.cta, t.warp)):
        nodes = [n for n in trace.nodes if n.kind not in ("fork", "join", "end")]
        key = (trace.cta, trace.warp)
        found.setdefault(key, []).extend((n.kind, n.line, [(s.kind, s.name, s.phase) for s in n.needs]) for n in nodes)
    return {key: sorted(nodes, key=str) for key, nodes in found.items()}


def instructions(recording: Recording) -> dict[Any, list[int]]:
    """Instructions of each warp by class."""
    found: dict[Any, list[int]] = {}
    for trace in recording.traces:
        sums = found.setdefault((trace.cta, trace.warp), [0] * len(CLASSES))
        for node in trace.nodes:
            sums[:] = [a + b for a, b in zip(sums, node.counts)]
    return found


def test_off_nothing_is_kept() -> None:
    result = pipeline(2)
    assert result.report.clean, str(result.report)
    assert result.recording is None
    assert result.machine.recorder is None


def test_on_changes_no_result() -> None:
    for schedule, seed in SCHEDULES:
        plain, watched = (pipeline(2, schedule_name=schedule, seed=seed, record=on) for on in (False, True))
        assert plain.report.instructions == watched.report.instructions
        assert watched.report.clean, str(watched.report)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_causes_and_counts_do_not_depend_on_the_schedule(stages: int) -> None:
    """Warp 1 polls with test_wait: how often it fails differs from schedule to schedule and is no part of its work."""
    first = recorded(stages)
    spins = set()
    for schedule, seed in SCHEDULES:
        result = pipeline(stages, schedule_name=schedule, seed=seed, record=True)
        assert result.recording is not None
        spins.add(result.report.instructions)
        assert causes(result.recording) == causes(first), (schedule, seed)
        assert instructions(result.recording) == instructions(first), (schedule, seed)
    assert len(spins) > 1


def test_instructions_have_their_class() -> None:
    counts = instructions(recorded())
    assert counts[(0, 0, 0), 1][CLASSES.index("special")] == 6 * 40
    assert counts[(0, 0, 0), 0][CLASSES.index("special")] == 0


def test_phases_and_operations() -> None:
    recording = recorded(2)
    assert [(u.engine, u.bytes) for u in recording.units] == [("bulk copies", 2048)] * 6
    waits = [
        n.needs[0] for t in recording.traces if t.warp == 1 for n in t.nodes if n.kind == "wait" and n.needs[0].kind == "phase"
    ]
    assert [(s.name, s.phase) for s in waits] == [
        (f"mbarrier at shared[0, 0, 0]+{at}", p) for p in range(3) for at in at_stages(recording)
    ]
    for signal in waits:
        assert signal.parts == 2  # the expected bytes with their arrival, and the bytes
    assert [u.gives[0] for u in recording.units] == waits


def at_stages(recording: Recording) -> list[int]:
    names = dict.fromkeys(u.gives[0].name for u in recording.units)
    return [int(name.rpartition("+")[2]) for name in names]


def test_a_hazard_is_where_it_was_found() -> None:
    body = ".reg .b32 %v; .reg .b64 %x; add.u64 %x, %A, 4096;\nld.global.b32 %v, [%x];\nadd.u32 %v, %v, 1; exit;"
    recording = run(body, {"A": np.zeros(8, np.uint32)}, record=True).recording
    assert recording is not None
    (node,) = [n for t in recording.traces for n in t.nodes if n.kind == "hazard"]
    assert node.text.startswith("out of bounds")
    assert sum(node.counts) == 2  # ld.param and add in front of it
    assert len(recording.hazards) == 1


def test_a_deadlock_is_stuck_where_it_waits() -> None:
    body = """.reg .b32 %b; .reg .pred %p; mov.u32 %b, bar;
    .reg .b32 %i; mov.u32 %i, %tid.x; setp.eq.u32 %p, %i, 0; @%p mbarrier.init.shared::cta.b64 [%b], 2; bar.sync 0;
    AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p, [%b], 0; @!%p bra AGAIN; exit;"""
    result = run(body, {}, top=".shared .align 8 .b8 bar[8];", record=True)
    assert result.recording is not None
    (node,) = [n for t in result.recording.traces for n in t.nodes if n.kind == "stuck"]
    assert "waits for mbarrier at shared[0, 0, 0]+0 (phase 0, 2 of 2 arrivals" in node.text


def test_the_emulator_needs_no_jinja2() -> None:
    code = "import sys; sys.modules['jinja2'] = None; import glu4.emulator.launch, glu4.emulator.replay, glu4.emulator.timeline"
    subprocess.run([sys.executable, "-c", code], check=True)
