"""Loads, stores, atomics, copies and address arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.runner import kinds, op, run
from emulator.test_divergence import SCHEDULES

SETUP = ".reg .b32 %t, %x, %y, %z, %w; .reg .b64 %at, %o, %rd<4>; .reg .pred %p; mov.u32 %t, %tid.x;\n"


def test_widths_and_extension() -> None:
    data = np.arange(256, dtype=np.uint8) ^ 0x85
    for kind, size in (("u8", 1), ("s8", 1), ("u16", 2), ("s16", 2), ("b32", 4)):
        body = f"mul.wide.u32 %o, %t, {size}; add.u64 %at, %a, %o; ld.global.{kind} %x, [%at+{size}]; mul.wide.u32 %o, %t, 4; add.u64 %at, %out, %o; st.global.b32 [%at], %x;"
        r = run(SETUP + body, {"a": data, "out": np.zeros(32, np.uint32)})
        expected = (
            data.view({"u8": "u1", "s8": "i1", "u16": "u2", "s16": "i2", "b32": "u4"}[kind])[1:33].astype(np.int64) & 0xFFFFFFFF
        )
        assert r.report.clean
        assert r.buffers["out"].tolist() == expected.tolist(), kind


@pytest.mark.parametrize(
    ("vector", "kind"), [("v2", "b32"), ("v4", "b32"), ("v8", "b32"), ("v2", "b64"), ("v4", "b64"), ("v4", "u8"), ("v2", "f32")]
)
def test_vectors(vector: str, kind: str) -> None:
    count, bits = int(vector[1]), int(kind[1:])
    registers = ", ".join(f"%v{i}" for i in range(count))
    turned = ", ".join(f"%v{i}" for i in reversed(range(count)))
    size = count * bits // 8
    body = f""".reg .b{max(bits, 16)} %v<{count}>; mul.wide.u32 %o, %t, {size}; add.u64 %at, %a, %o; ld.global.L1::no_allocate.{vector}.{kind} {{{registers}}}, [%at];
    add.u64 %at, %out, %o; st.global.wt.{vector}.{kind} [%at], {{{turned}}};"""
    a = np.random.default_rng(0).integers(0, 256, 32 * size, dtype=np.uint8)
    r = run(SETUP + body, {"a": a, "out": np.zeros_like(a)})
    assert r.report.clean
    assert (r.buffers["out"].reshape(32, count, -1) == a.reshape(32, count, -1)[:, ::-1]).all()


def test_spaces_and_generic_addresses() -> None:
    top = ".const .align 4 .u32 numbers[4] = {10, 20, 30, 40}; .global .u32 counter = 5; .shared .align 16 .b32 room[32];"
    body = """.local .align 8 .b32 own[4]; mov.u64 %rd0, own; cvta.local.u64 %rd0, %rd0; st.b32 [%rd0+8], %t; ld.local.b32 %x, [own+8];
    and.b32 %y, %t, 3; mul.wide.u32 %o, %y, 4; mov.u64 %rd1, numbers; add.u64 %rd1, %rd1, %o; ld.const.b32 %y, [%rd1]; add.u32 %x, %x, %y;
    cvta.const.u64 %rd1, %rd1; ld.b32 %y, [%rd1]; add.u32 %x, %x, %y; ld.global.b32 %y, [counter]; add.u32 %x, %x, %y;
    mul.wide.u32 %o, %t, 4; mov.u64 %rd2, room; add.u64 %rd2, %rd2, %o; cvta.shared.u64 %rd3, %rd2; st.b32 [%rd3], %x; cvta.to.shared.u64 %rd3, %rd3; ld.shared.b32 %z, [%rd3];
    isspacep.shared %p, %rd2; @%p mov.u32 %z, 0; cvta.shared.u64 %rd3, %rd2; isspacep.shared %p, %rd3; @!%p mov.u32 %z, 1; isspacep.global %p, %out; @!%p mov.u32 %z, 2;
    add.u64 %at, %out, %o; st.b32 [%at], %z;"""
    r = run(SETUP + body, {"out": np.zeros(32, np.uint32)}, top=top)
    assert r.report.clean, str(r.report)
    assert r.buffers["out"].tolist() == [i + 2 * (10, 20, 30, 40)[i % 4] + 5 for i in range(32)]


ATOMIC = {
    "add": lambda a, b: a + b,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(
    ("word", "kind"),
    [("add", "u32"), ("add", "u64"), ("min", "s32"), ("max", "u32"), ("and", "b32"), ("or", "b64"), ("xor", "b32")],
)
def test_atomics(space: str, word: str, kind: str) -> None:
    """128 threads on four places: the last value by Python; the values returned are those before some order."""
    bits = int(kind[1:])
    start = {"and": (1 << bits) - 1, "min": 1 << 20}.get(word, 0)
    body = f""".shared .align 8 .b{bits} room[4]; .reg .b{bits} %v, %r; .reg .b32 %s; mov.u32 %s, room; and.b32 %y, %t, 3; mad.lo.u32 %s, %y, {bits // 8}, %s;
    mul.lo.u32 %z, %t, 37; cvt.u{bits}.u32 %v, %z; mul.wide.u32 %o, %y, {bits // 8}; add.u64 %at, %acc, %o;
    setp.lt.u32 %p, %t, 4; @%p ld.global.b{bits} %r, [%at]; @%p st.shared.b{bits} [%s], %r; bar.sync 0;
    atom.{space}.{word}.{kind} %r, [{"%at" if space == "global" else "%s"}], %v; bar.sync 0; @%p ld.{space}.b{bits} %v, [{"%at" if space == "global" else "%s"}]; @%p st.global.b{bits} [%at], %v;
    mul.wide.u32 %o, %t, {bits // 8}; add.u64 %at, %old, %o; st.global.b{bits} [%at], %r;"""
    acc = np.full(4, start, dtype=f"u{bits // 8}")
    for name, seed in SCHEDULES[:4]:
        r = run(
            SETUP + body, {"acc": acc, "old": np.zeros(128, acc.dtype)}, launch={"block": [128]}, schedule_name=name, seed=seed
        )
        assert r.report.clean, str(r.report)
        for place in range(4):
            value = start
            for t in range(place, 128, 4):
                value = ATOMIC[word](value, 37 * t)
            assert int(r.buffers["acc"][place]) == value & (1 << bits) - 1
        if word == "add":
            olds = sorted(r.buffers["old"][0::4].tolist())
            assert olds[0] == 0
            assert len(set(olds)) == 32 or 0 in olds


def test_more_atomics() -> None:
    old = [7, 0, 9, 3]
    assert op("atom.global.inc.u32 %d, [%a__], %b; mov.u32 %d, %d;", "b32", ("b32", old), ("b32", [7] * 4)).tolist() == [
        7,
        0,
        1,
        2,
    ]
    for text, start, expected in (
        ("red.global.add.noftz.f16x2 [%out], %x;", 0x3C00_4000, 0x4000_4200),
        ("atom.global.add.f32 %y, [%out], 0f40000000;", 0x3F800000, 0x40400000),
        ("atom.global.cas.b32 %y, [%out], 5, 8;", 5, 8),
        ("atom.global.cas.b32 %y, [%out], 6, 8;", 5, 5),
        ("atom.global.exch.b32 %y, [%out], 11;", 5, 11),
        ("atom.global.dec.u32 %y, [%out], 4;", 0, 4),
        ("red.release.gpu.global.max.s32 [%out], 2;", 0xFFFFFFFF, 2),
    ):
        r = run(SETUP + "setp.eq.u32 %p, %t, 0; mov.b32 %x, 0x3c003c00; @%p " + text, {"out": np.array([start], np.uint32)})
        assert r.report.clean
        assert int(r.buffers["out"][0]) == expected, text
    r = run(
        SETUP
        + ".reg .f32 %f<4>; mov.f32 %f0, 0f3F800000; setp.eq.u32 %p, %t, 0; @%p red.global.add.v4.f32 [%out], {%f0, %f0, %f0, %f0};",
        {"out": np.arange(4, dtype=np.float32)},
    )
    assert r.buffers["out"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("operation", "start", "flushed", "kept"),
    [
        ("add.f32 {at}, 0f00000001;", 0x1, 0x0, 0x2),
        ("add.f32 {at}, 0f80400000;", 0x80400000, 0x80000000, 0x80800000),
        ("add.f32 {at}, 0f3F800000;", 0xFFC12345, 0x7FFFFFFF, 0x7FFFFFFF),
        ("min.noftz.f16x2 {at}, %x;", 0x7C018000, 0x3C008000, 0x3C008000),
        ("max.noftz.f16x2 {at}, %x;", 0x7C018000, 0x3C000000, 0x3C000000),
    ],
)
def test_floating_atomics(operation: str, start: int, flushed: int, kept: int) -> None:
    """Only in global memory float32 is flushed, also by a generic address; a number goes before a NaN, -0 before +0."""
    body = (
        SETUP
        + f""".shared .align 4 .b32 room; .reg .b64 %g; setp.eq.u32 %p, %t, 0; @!%p exit; mov.b32 %x, 0x3c000000;
    ld.global.b32 %y, [%out]; st.shared.b32 [room], %y; red.global.{operation.format(at="[%out]")} red.shared.{operation.format(at="[room]")}
    ld.shared.b32 %z, [room]; st.global.b32 [%out+8], %z; mov.u64 %g, room; cvta.shared.u64 %g, %g; st.b32 [%g], %y;
    red.{operation.format(at="[%g]")} ld.b32 %z, [%g]; st.global.b32 [%out+12], %z; red.{operation.format(at="[%out+4]")}"""
    )
    r = run(body, {"out": np.array([start, start, 0, 0], np.uint32)})
    assert r.report.clean, str(r.report)
    assert r.buffers["out"].tolist() == [flushed, flushed, kept, kept]


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
def test_cp_async(name: str, seed: int) -> None:
    """Two groups, the second of shorter sources that are filled with zeros."""
    body = """.shared .align 16 .b8 room[1024]; .reg .b32 %s; mov.u32 %s, room; mad.lo.u32 %s, %t, 16, %s; mul.wide.u32 %o, %t, 16; add.u64 %at, %a, %o;
    cp.async.cg.shared.global.L2::128B [%s], [%at], 16; cp.async.commit_group; and.b32 %y, %t, 7; cp.async.ca.shared.global [%s+512], [%at+512], 8, %y; cp.async.ca.shared.global [%s+520], [%at+520], 8, 0;
    cp.async.commit_group; cp.async.wait_group 1; ld.shared.v4.b32 {%x, %y, %z, %w}, [%s]; add.u64 %at, %out, %o; st.global.v4.b32 [%at], {%x, %y, %z, %w};
    cp.async.wait_all; ld.shared.v4.b32 {%x, %y, %z, %w}, [%s+512]; st.global.v4.b32 [%at+512], {%x, %y, %z, %w};"""
    body = body.replace("8, %y;", "8, %k;").replace("and.b32 %y, %t, 7;", ".reg .b32 %k; and.b32 %k, %t, 1; shl.b32 %k, %k, 3;")
    a = np.random.default_rng(0).integers(0, 256, 1024, dtype=np.uint8)
    r = run(SETUP + body, {"a": a, "out": np.zeros_like(a)}, schedule_name=name, seed=seed)
    assert r.report.clean, str(r.report)
    expected = a.reshape(2, 32, 16).copy()
    expected[1, :, 8:] = 0
    expected[1, ::2, :8] = 0
    assert (r.buffers["out"].reshape(2, 32, 16) == expected).all()


def test_a_missing_wait_for_cp_async_is_found_under_every_schedule() -> None:
    body = """.shared .align 16 .b8 room[512]; .reg .b32 %s; mov.u32 %s, room; mad.lo.u32 %s, %t, 16, %s; mul.wide.u32 %o, %t, 16; add.u64 %at, %a, %o;
    cp.async.cg.shared.global [%s], [%at], 16; cp.async.commit_group; ld.shared.b32 %x, [%s]; cp.async.wait_all;"""
    for name, seed in SCHEDULES:
        r = run(SETUP + body, {"a": np.zeros(512, np.uint8)}, schedule_name=name, seed=seed)
        assert "missing wait" in kinds(r), name


def matrices(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 16, (4, 8, 8), dtype=np.uint16)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(count: int, trans: str) -> None:
    """Thread t holds elements 2 (t mod 4) and the next of row t / 4 (PTX ISA 9.7.14.5.15)."""
    names = ", ".join(f"%m{i}" for i in range(count))
    vector = f"{{{names}}}"
    body = f""".shared .align 16 .b8 room[1024]; .reg .b32 %s, %m<4>; mov.u32 %s, room; mad.lo.u32 %s, %t, 16, %s; mul.wide.u32 %o, %t, 16; add.u64 %at, %a, %o;
    ld.global.v4.b32 {{%x, %y, %z, %w}}, [%at]; st.shared.v4.b32 [%s], {{%x, %y, %z, %w}}; bar.warp.sync -1; ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {vector}, [%s];
    mul.wide.u32 %o, %t, 4; add.u64 %at, %out, %o;""" + "".join(f"st.global.b32 [%at+{128 * i}], %m{i};" for i in range(count))
    body += f"""stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%s+512], {vector}; bar.warp.sync -1; mul.wide.u32 %o, %t, 16; add.u64 %at, %back, %o; setp.lt.u32 %p, %t, {8 * count};
    @%p ld.shared.v4.b32 {{%x, %y, %z, %w}}, [%s+512]; @%p st.global.v4.b32 [%at], {{%x, %y, %z, %w}};"""
    a = matrices(count)
    r = run(SETUP + body, {"a": a, "out": np.zeros((4, 32), np.uint32), "back": np.zeros_like(a)})
    assert r.report.clean, str(r.report)
    source = a.transpose(0, 2, 1) if trans else a
    for i in range(count):
        expected = [int(source[i, t // 4, 2 * (t % 4)]) | int(source[i, t // 4, 2 * (t % 4) + 1]) << 16 for t in range(32)]
        assert r.buffers["out"][i].tolist() == expected
    assert (r.buffers["back"][:count] == source[:count]).all()


def test_movmatrix() -> None:
    a = matrices(9)[0]
    got = op("movmatrix.sync.aligned.m8n8.trans.b16 %d, %a;", "b32", ("b32", a.view(np.uint32).ravel()))
    assert (got.view(np.uint16).reshape(8, 8) == a.T).all()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("ld.global.b32 %x, [%a+128];", "out of bounds"),
        ("ld.global.b32 %x, [%a+-4];", "out of bounds"),
        ("ld.global.b32 %x, [%a+2];", "misaligned address"),
        ("ld.global.v4.b32 {%x, %y, %z, %w}, [%a+8];", "misaligned address"),
        ("ld.shared.b32 %x, [5000];", "out of bounds"),
        ("st.global.b32 [16], %t;", "out of bounds"),
        (".local .b32 own[2]; ld.local.b32 %x, [own+16];", "out of bounds"),
        (".local .b32 own[2]; ld.local.b32 %x, [own];", "uninitialised read"),
        (".shared .b32 room[2]; ld.shared.b32 %x, [room];", "uninitialised read"),
        ("st.global.b32 [%a], %t;", "data race"),
        (
            ".shared .b32 room[32]; .reg .b32 %s; mov.u32 %s, room; mad.lo.u32 %s, %t, 4, %s; st.shared.b32 [%s], %t; ld.shared.b32 %x, [room+4];",
            "data race",
        ),
    ],
)
def test_faulty_accesses_are_reported_with_their_address(body: str, kind: str) -> None:
    r = run(SETUP + body, {"a": np.zeros(32, np.uint32)})
    assert kinds(r) == [kind], str(r.report)
    access = next(iter(r.report.hazards)).access
    assert access is not None
    assert access.address


def test_races_between_warps_and_their_absence() -> None:
    write = ".shared .b32 room[64]; .reg .b32 %s; mov.u32 %s, room; mad.lo.u32 %s, %t, 4, %s; st.shared.b32 [%s], %t; "
    read = "xor.b32 %y, %t, 32; mov.u32 %s, room; mad.lo.u32 %s, %y, 4, %s; ld.shared.b32 %x, [%s];"
    for name, seed in SCHEDULES:
        r = run(SETUP + write + "bar.sync 0;" + read, launch={"block": [64]}, schedule_name=name, seed=seed)
        assert r.report.clean, str(r.report)
        r = run(SETUP + write + read, launch={"block": [64]}, schedule_name=name, seed=seed)
        assert set(kinds(r)) <= {"data race", "uninitialised read"}
        assert "data race" in kinds(r)
        hazard = next(h for h in r.report.hazards if h.kind == "data race")
        assert hazard.access is not None
        assert hazard.other is not None
        assert {hazard.access.warp, hazard.other.warp} == {0, 1}


def test_release_and_acquire_order_between_ctas() -> None:
    """The first CTA writes and releases a flag, the second polls it; without the order it is a race."""
    body = """mov.u32 %x, %ctaid.x; setp.ne.u32 %p, %x, 0; @%p bra Reader; mul.wide.u32 %o, %t, 4; add.u64 %at, %data, %o; st.global.b32 [%at], 7; bar.sync 0;
    setp.ne.u32 %p, %t, 0; @%p exit; RELEASE exit; Reader: setp.ne.u32 %p, %t, 0; @%p bra Meet; Poll: ld.acquire.gpu.global.b32 %y, [%flag]; setp.eq.u32 %p, %y, 0; @%p bra Poll;
    Meet: bar.sync 0; mul.wide.u32 %o, %t, 4; add.u64 %at, %data, %o; ld.global.b32 %z, [%at]; add.u64 %at, %out, %o; st.global.b32 [%at], %z;"""
    for release, good in (("st.release.gpu.global.b32 [%flag], 1;", True), ("fence.acq_rel.gpu; st.relaxed.gpu.global.b32 [%flag], 1;", True),
                          ("red.release.gpu.global.add.u32 [%flag], 1;", True), ("st.relaxed.gpu.global.b32 [%flag], 1;", False)):  # fmt: skip
        for name, seed in SCHEDULES:
            buffers = {"data": np.zeros(64, np.uint32), "flag": np.zeros(1, np.uint32), "out": np.zeros(64, np.uint32)}
            r = run(
                SETUP + body.replace("RELEASE", release),
                buffers,
                launch={"grid": [2], "block": [64]},
                schedule_name=name,
                seed=seed,
            )
            assert kinds(r) == ([] if good else ["data race"]), str(r.report)
            assert (r.buffers["out"] == 7).all()


def test_an_address_in_no_cta_is_reported_where_it_is_used() -> None:
    body = (
        SETUP
        + """.shared .b32 room; .reg .b32 %s, %far; mov.u32 %s, room; mapa.shared::cluster.u32 %far, %s, %t; setp.eq.u32 %p, %t, LANE;
    @%p st.shared::cluster.b32 [%far], %t; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    )
    for lane, found in (("1", []), ("2", ["out of bounds"]), ("31", ["out of bounds"])):
        r = run(
            body.replace("LANE", lane), {"out": np.zeros(1, np.uint32)}, launch={"cluster": [2], "grid": [2], "ctas": [[0]]}
        )
        assert set(kinds(r)) - {"data race"} == set(found), str(r.report)


def test_clusters_reach_each_other() -> None:
    body = """.shared .b32 room[32]; .reg .b32 %s, %far, %rank; mov.u32 %s, room; mad.lo.u32 %s, %t, 4, %s; mov.u32 %rank, %cluster_ctarank; mad.lo.u32 %x, %rank, 100, %t; st.shared.b32 [%s], %x;
    BARRIER xor.b32 %y, %rank, 1; mapa.shared::cluster.u32 %far, %s, %y; ld.shared::cluster.b32 %x, [%far]; getctarank.shared::cluster.u32 %z, %far; mad.lo.u32 %x, %z, 1000, %x;
    mov.u32 %y, %ctaid.x; mad.lo.u32 %y, %y, 32, %t; mul.wide.u32 %o, %y, 4; add.u64 %at, %out, %o; st.global.b32 [%at], %x; barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"""
    for barrier, good in (("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", True), ("fence.acq_rel.cluster; barrier.cluster.arrive.relaxed; barrier.cluster.wait;", True),
                          ("barrier.cluster.arrive.relaxed; barrier.cluster.wait;", False), ("bar.sync 0;", False)):  # fmt: skip
        for name, seed in SCHEDULES:
            r = run(
                SETUP + body.replace("BARRIER", barrier),
                {"out": np.zeros(128, np.uint32)},
                launch={"grid": [4], "cluster": [2]},
                schedule_name=name,
                seed=seed,
            )
            if good:
                assert r.report.clean, str(r.report)
                assert r.buffers["out"].tolist() == [1100 * (c & 1 ^ 1) + t for c in range(4) for t in range(32)]
            else:
                assert {"data race", "uninitialised read"} & set(kinds(r)), (barrier, name)
