"""Branches, loops, calls and the instructions of whole warps, with lanes apart and together."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.runner import kinds, run

SETUP = ".reg .b32 %t, %x, %y, %z; .reg .b64 %at; .reg .pred %p, %q; mov.u32 %t, %tid.x; mul.wide.u32 %at, %t, 4; add.u64 %at, %out, %at;\n"
STORE = "st.global.b32 [%at], %x;\n"
LANE = np.arange(32)
SCHEDULES = (("eager", 0), ("lazy", 0), ("random", 1), ("random", 2), ("random", 3))


def lanes(body: str, threads: int = 32, top: str = "", **options) -> np.ndarray:  # type: ignore[no-untyped-def]
    result = run(SETUP + body, {"out": np.zeros(threads, np.uint32)}, top=top, launch={"block": [threads]}, **options)
    assert result.report.clean, str(result.report)
    return result.buffers["out"]


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
def test_if_else_meets_again(name: str, seed: int) -> None:
    body = """and.b32 %y, %t, 1; setp.eq.u32 %p, %y, 0; @%p bra Even;
    mov.u32 %x, 100; bra Join; Even: mov.u32 %x, 200; Join: activemask.b32 %z; popc.b32 %z, %z; add.u32 %x, %x, %z;"""
    got = lanes(body + STORE, schedule_name=name, seed=seed)
    assert got.tolist() == [232 if i % 2 == 0 else 132 for i in range(32)]


@pytest.mark.parametrize("leave", ["ret", "exit"])
def test_roles_with_exits_of_their_own_meet_within(leave: str) -> None:
    """The second warp never reaches the last exit of the text; its branches still have a meeting place."""
    body = f"""setp.ge.u32 %p, %t, 32; @%p bra Role; mov.u32 %x, 1; bra Last;
    Role: and.b32 %y, %t, 1; setp.eq.u32 %q, %y, 0; @%q bra Even; mov.u32 %x, 100; bra Join; Even: mov.u32 %x, 200;
    Join: activemask.b32 %z; popc.b32 %z, %z; add.u32 %x, %x, %z; st.global.b32 [%at], %x; {leave};
    Last: """
    assert lanes(body + STORE, 64).tolist() == [1] * 32 + [232 if i % 2 == 0 else 132 for i in range(32)]


def test_loops_of_different_length() -> None:
    body = """mov.u32 %x, 0; mov.u32 %y, 0; Loop: add.u32 %x, %x, %y; add.u32 %y, %y, 1; setp.le.u32 %p, %y, %t; @%p bra Loop;
    bar.warp.sync 0xffffffff; vote.sync.ballot.b32 %z, 1, 0xffffffff; setp.ne.u32 %p, %z, 0xffffffff; @%p mov.u32 %x, 0;"""
    assert lanes(body + STORE).tolist() == [i * (i + 1) // 2 for i in range(32)]


def test_nested_branches_and_early_exit() -> None:
    body = """mov.u32 %x, 7; st.global.b32 [%at], %x; setp.lt.u32 %p, %t, 16; @%p bra Low;
    setp.gt.u32 %p, %t, 24; @%p exit; mov.u32 %x, 1; bra Out;
    Low: setp.lt.u32 %p, %t, 8; @%p bra Lower; mov.u32 %x, 2; bra Out; Lower: setp.eq.u32 %p, %t, 3; @%p exit; mov.u32 %x, 3;
    Out: activemask.b32 %y; popc.b32 %y, %y; mad.lo.u32 %x, %y, 10, %x;"""
    left = 32 - 7 - 1
    assert lanes(body + STORE).tolist() == [
        7 if i > 24 or i == 3 else 10 * left + (1 if i >= 16 else 2 if i >= 8 else 3) for i in range(32)
    ]


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
def test_lanes_that_spin_on_another_lane(name: str, seed: int) -> None:
    """Lane 5 sets what the others poll, after them in the text and behind the branch that parts them."""
    body = """.shared .b32 flag; setp.eq.u32 %p, %t, 5; @%p st.shared.b32 [flag], 0; bar.warp.sync -1;
    @%p bra Setter; Spin: ld.acquire.cta.shared.b32 %x, [flag]; setp.eq.u32 %q, %x, 0; @%q bra Spin; bra Join;
    Setter: mov.u32 %x, 9; st.release.cta.shared.b32 [flag], %x; Join:"""
    assert lanes(body + STORE, schedule_name=name, seed=seed).tolist() == [9] * 32


def test_a_lock_within_a_warp() -> None:
    body = """.shared .b32 lock, count; setp.eq.u32 %p, %t, 0; @%p st.shared.b32 [lock], 0; @%p st.shared.b32 [count], 0; bar.warp.sync -1;
    Try: atom.acquire.cta.shared.cas.b32 %y, [lock], 0, 1; setp.ne.u32 %p, %y, 0; @%p bra Try;
    ld.volatile.shared.b32 %x, [count]; add.u32 %y, %x, 1; st.volatile.shared.b32 [count], %y; atom.release.cta.shared.exch.b32 %y, [lock], 0;"""
    assert sorted(lanes(body + STORE).tolist()) == list(range(32))


def test_indexed_branches() -> None:
    body = """.reg .b32 %k; and.b32 %k, %t, 3; Table: .branchtargets A, B, C, A; brx.idx %k, Table;
    A: mov.u32 %x, 1; bra Join; B: mov.u32 %x, 2; bra Join; C: mov.u32 %x, 3; Join: activemask.b32 %y; popc.b32 %y, %y; mad.lo.u32 %x, %y, 10, %x;"""
    assert lanes(body + STORE).tolist() == [320 + (1, 2, 3, 1)[i % 4] for i in range(32)]


FUNCTIONS = """
.func (.param .b32 r) power (.param .b32 b, .param .b32 e)
{ .reg .b32 %b, %e, %v; .reg .pred %p; ld.param.b32 %b, [b]; ld.param.b32 %e, [e]; mov.u32 %v, 1;
  setp.eq.u32 %p, %e, 0; @%p st.param.b32 [r], %v; @%p ret;
  { .param .b32 x; .param .b32 y; .param .b32 z; sub.u32 %e, %e, 1; st.param.b32 [x], %b; st.param.b32 [y], %e; call.uni (z), power, (x, y); ld.param.b32 %v, [z]; }
  mul.lo.u32 %v, %v, %b; st.param.b32 [r], %v; ret; }
"""


def test_recursive_calls_with_lanes_of_different_depth() -> None:
    body = """and.b32 %y, %t, 7; { .param .b32 a; .param .b32 b; .param .b32 c; st.param.b32 [a], 3; st.param.b32 [b], %y;
    call.uni (c), power, (a, b); ld.param.b32 %x, [c]; } activemask.b32 %z; setp.ne.u32 %p, %z, -1; @%p mov.u32 %x, 0;"""
    assert lanes(body + STORE, top=FUNCTIONS).tolist() == [3 ** (i % 8) for i in range(32)]


def test_endless_recursion_is_reported() -> None:
    top = ".func f () { call.uni f; ret; }\n.func g ();"
    result = run("call.uni f; ret;", top=top)
    assert kinds(result) == ["stack overflow"]


def shuffled(mode: str, b: int, c: int) -> tuple[list[int], list[bool]]:
    """shfl by the pseudocode of PTX ISA 9.7.9.6, lane by lane."""
    values, inside = [], []
    for lane in range(32):
        segment, clamp = c >> 8 & 31, c & 31
        high = lane & segment | clamp & ~segment & 31
        low = lane & segment
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | b & ~segment & 31}[mode]
        ok = j >= high if mode == "up" else j <= high
        values.append(j if ok else lane)
        inside.append(ok)
    return values, inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    for b, c in ((1, 31), (5, 31), (0, 0), (3, 0x1807), (16, 0x101F), (31, 0x1C03), (2, 0)):
        c = 0 if mode == "up" and c == 31 else c
        body = f"shfl.sync.{mode}.b32 %x|%p, %t, {b}, {c}, -1; @!%p add.u32 %x, %x, 100;"
        values, inside = shuffled(mode, b, c)
        assert lanes(body + STORE).tolist() == [v if ok else v + 100 for v, ok in zip(values, inside)], (b, c)


def test_votes_matches_reductions() -> None:
    body = "setp.lt.u32 %p, %t, 9; vote.sync.ballot.b32 %x, %p, -1;"
    assert lanes(body + STORE).tolist() == [511] * 32
    body = "setp.lt.u32 %p, %t, 9; vote.sync.any.pred %q, %p, -1; selp.b32 %x, 1, 0, %q; vote.sync.all.pred %q, !%p, -1; @%q add.u32 %x, %x, 2; vote.sync.uni.pred %q, %q, -1; @%q add.u32 %x, %x, 4;"
    assert lanes(body + STORE).tolist() == [5] * 32
    body = "and.b32 %y, %t, 3; match.any.sync.b32 %x, %y, -1;"
    assert lanes(body + STORE).tolist() == [0x11111111 << i % 4 for i in range(32)]
    body = "mov.u32 %y, 6; match.all.sync.b32 %x|%p, %y, -1; @!%p mov.u32 %x, 0;"
    assert lanes(body + STORE).tolist() == [0xFFFFFFFF] * 32
    for word, kind, expected in (
        ("add", "u32", 496),
        ("max", "s32", 31),
        ("min", "u32", 0),
        ("xor", "b32", 0),
        ("or", "b32", 31),
        ("and", "b32", 0),
    ):
        assert lanes(f"redux.sync.{word}.{kind} %x, %t, -1;" + STORE).tolist() == [expected] * 32
    body = "cvt.rn.f32.u32 %f, %t; redux.sync.max.f32 %f, %f, -1; mov.b32 %x, %f;"
    assert lanes(".reg .f32 %f;" + body + STORE).view(np.float32).tolist() == [31.0] * 32
    body = "elect.sync %x|%p, -1; @%p add.u32 %x, %x, 50;"
    assert lanes(body + STORE).tolist() == [50] + [0] * 31


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
def test_halves_of_a_warp_meet_in_a_shuffle(name: str, seed: int) -> None:
    """The lanes come to one shfl.sync by different ways; it waits for all that its mask names."""
    body = """setp.lt.u32 %p, %t, 16; mov.u32 %y, %t; @%p add.u32 %y, %y, 100; @%p bra Go; add.u32 %y, %y, 200;
    Go: shfl.sync.bfly.b32 %x, %y, 16, 31, -1;"""
    assert lanes(body + STORE, schedule_name=name, seed=seed).tolist() == [
        (i ^ 16) + (100 if i >= 16 else 200) for i in range(32)
    ]


def test_partial_masks() -> None:
    body = """mov.u32 %x, 0; setp.ge.u32 %p, %t, 8; @%p bra Out; redux.sync.add.u32 %x, %t, 0xff; Out:"""
    assert lanes(body + STORE).tolist() == [28] * 8 + [0] * 24


def test_misused_masks_are_reported() -> None:
    result = run(
        "setp.lt.u32 %p, %t, 4; @%p bra L; ret; L: shfl.sync.idx.b32 %x, %t, 9, 31, 0xf;",
        declarations=".reg .pred %p; .reg .b32 %t, %x; mov.u32 %t, %tid.x;",
    )
    assert kinds(result) == ["divergent execution"]
    result = run(
        "mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 4; @!%p bra L; bar.sync 0; L: ret;",
        declarations=".reg .pred %p; .reg .b32 %t;",
    )
    assert kinds(result) == ["divergent execution"]


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
def test_named_barriers(name: str, seed: int) -> None:
    """Two warps produce, two consume; the last two meet on a barrier of their own."""
    body = """.shared .align 4 .b32 room[64]; .reg .b32 %a; and.b32 %y, %t, 63; shl.b32 %a, %y, 2; mov.u32 %z, room; add.u32 %a, %a, %z;
    setp.lt.u32 %p, %t, 64; @!%p bra Consume; mul.lo.u32 %y, %t, 3; st.shared.b32 [%a], %y; bar.arrive 1, 128; mov.u32 %x, 0; bra Out;
    Consume: bar.sync 1, 128; ld.shared.b32 %x, [%a]; barrier.cta.sync.aligned 2, 64; Out:"""
    assert lanes(body + STORE, 128, schedule_name=name, seed=seed).tolist() == [0] * 64 + [3 * i for i in range(64)]


def test_barrier_reductions() -> None:
    body = "setp.lt.u32 %p, %t, 40; bar.red.popc.u32 %x, 0, %p; bar.red.or.pred %q, 0, %p; @%q add.u32 %x, %x, 100; bar.red.and.pred %q, 0, %p; @%q add.u32 %x, %x, 1000;"
    assert lanes(body + STORE, 96).tolist() == [140] * 96


def test_a_barrier_does_not_wait_for_threads_that_have_exited() -> None:
    body = "setp.ge.u32 %p, %t, 70; @%p exit; bar.sync 0; mov.u32 %x, 1;"
    assert lanes(body + STORE, 80).tolist() == [1] * 70 + [0] * 10


def test_deadlocks_are_told_with_who_waits_for_what() -> None:
    result = run(
        "mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 32; @%p bar.sync 3, 64; ret;",
        declarations=".reg .pred %p; .reg .b32 %t;",
        launch={"block": [64]},
    )
    assert kinds(result) == ["deadlock"]
    assert "warp 0 at PTX line" in str(result.report)
    assert "waits for barrier 3" in str(result.report)
    result = run(
        "L: ld.volatile.shared.b32 %t, [flag]; bra L;",
        declarations=".reg .b32 %t; .shared .b32 flag;",
        hazards=False,
        max_instructions=3_000_000,
    )
    assert kinds(result) == ["deadlock"]
    assert "poll for what never comes" in str(result.report)


def test_special_registers() -> None:
    body = """.reg .b32 %a<6>; mov.u32 %a0, %tid.y; mov.u32 %a1, %ctaid.x; mov.u32 %a2, %ntid.x; mov.u32 %a3, %laneid; mov.u32 %a4, %warpid; mov.u32 %a5, %lanemask_lt;
    popc.b32 %a5, %a5; mov.u32 %x, %tid.x; mad.lo.u32 %x, %a0, %a2, %x; mad.lo.u32 %y, %a1, 40, %x; mul.wide.u32 %at, %y, 4; add.u64 %at, %out, %at;
    shl.b32 %a4, %a4, 8; shl.b32 %a5, %a5, 16; or.b32 %x, %a3, %a4; or.b32 %x, %x, %a5;"""
    result = run(SETUP + body + STORE, {"out": np.zeros(80, np.uint32)}, launch={"grid": [2], "block": [8, 5]})
    assert result.report.clean
    assert result.buffers["out"].tolist() == [i % 32 | (i // 32) << 8 | (i % 32) << 16 for i in range(40)] * 2
