"""Tensor memory: allocation, loads and stores, ordering; products are in test_compiled_kernels.py. And mma.sync."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.runner import kinds, run
from emulator.test_divergence import SCHEDULES

SETUP = """.shared .align 16 .b32 place; .reg .b32 %t, %w, %d, %x, %y, %s; .reg .b64 %at, %o; .reg .pred %p, %first; mov.u32 %t, %tid.x; mov.u32 %s, place; setp.lt.u32 %first, %t, 32;
shr.u32 %w, %t, 5; shl.b32 %w, %w, 21;
"""
ALLOC = "@%first tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%s], 64; @%first tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned; bar.sync 0; ld.shared.b32 %d, [%s];\n"
FREE = "bar.sync 0; @%first tcgen05.dealloc.cta_group::1.sync.aligned.b32 %d, 64;\n"
STORE = "add.u32 %x, %d, %w; mad.lo.u32 %y, %t, 3, 1; tcgen05.st.sync.aligned.32x32b.x2.b32 [%x+5], {%t, %y};\n"
WAIT_ST, WAIT_LD = "tcgen05.wait::st.sync.aligned;\n", "tcgen05.wait::ld.sync.aligned;\n"
LOAD = ".reg .b32 %l<2>; tcgen05.ld.sync.aligned.32x32b.x2.b32 {%l0, %l1}, [%x+5];\n"
OUT = "mul.wide.u32 %o, %t, 8; add.u64 %at, %out, %o; st.global.v2.b32 [%at], {%l0, %l1};\n"
GOOD = SETUP + ALLOC + STORE + WAIT_ST + LOAD + WAIT_LD + OUT + FREE


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
def test_values_go_through_tensor_memory(name: str, seed: int) -> None:
    r = run(GOOD, {"out": np.zeros((128, 2), np.uint32)}, launch={"block": [128]}, schedule_name=name, seed=seed)
    assert r.report.clean, str(r.report)
    assert r.buffers["out"].tolist() == [[t, 3 * t + 1] for t in range(128)]


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (WAIT_ST, "", "missing wait"),
        (WAIT_LD, "", "missing wait"),
        (FREE, "", "tensor memory lifetime"),
        ("%d, 64;", "%d, 32;", "tensor memory lifetime"),
        ("bar.sync 0; @%first tcgen05.dealloc", "@%first tcgen05.dealloc", ("data race", "tensor memory lifetime")),
        (STORE, "add.u32 %x, %d, %w;", "uninitialised read"),
        ("add.u32 %x, %d, %w;", "mov.u32 %x, %d;", "tensor memory misuse"),
        ("[%x+5], {%t, %y}", "[%x+64], {%t, %y}", "tensor memory lifetime"),
        ("[%x+5], {%t, %y}", "[%x+511], {%t, %y}", "tensor memory misuse"),
        ("[%s], 64;", "[%s], 48;", "tensor memory misuse"),
        (ALLOC, ALLOC.replace("; bar.sync 0;", "; @%first tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%s], 32; bar.sync 0;"), "tensor memory misuse"),
        ("; bar.sync 0; ld.shared.b32 %d", "; ld.shared.b32 %d", "data race"),
    ],
)  # fmt: skip
def test_faults_are_found_under_every_schedule(old: str, new: str, kind: str | tuple[str, ...]) -> None:
    assert old in GOOD
    for name, seed in SCHEDULES:
        r = run(
            GOOD.replace(old, new),
            {"out": np.zeros((128, 2), np.uint32)},
            launch={"block": [128]},
            schedule_name=name,
            seed=seed,
        )
        assert {*kind} & {*kinds(r)} if isinstance(kind, tuple) else kind in kinds(r), (name, str(r.report))


def test_fences_are_needed_where_a_kernel_uses_them() -> None:
    """One warpgroup stores, another loads after a barrier."""
    hand = WAIT_ST + "tcgen05.fence::before_thread_sync; Skip: bar.sync 0; tcgen05.fence::after_thread_sync;\n"
    body = SETUP.replace("shl.b32 %w, %w, 21;", "and.b32 %w, %w, 3; shl.b32 %w, %w, 21;")
    body += ALLOC + "add.u32 %x, %d, %w; setp.ge.u32 %p, %t, 128; @%p bra Skip;" + STORE + hand + LOAD + WAIT_LD + OUT + FREE
    for name, seed in SCHEDULES:
        options = {"launch": {"block": [256]}, "schedule_name": name, "seed": seed}
        out = {"out": np.zeros((256, 2), np.uint32)}
        r = run(body, out, **options)
        assert r.report.clean, str(r.report)
        assert r.buffers["out"].tolist() == [[t % 128, 3 * (t % 128) + 1] for t in range(256)]
        assert "missing tcgen05.fence" in kinds(run(body.replace("tcgen05.fence::after_thread_sync;", ""), out, **options))
        assert "missing tcgen05.fence" in kinds(run(body.replace("tcgen05.fence::before_thread_sync;", ""), out, **options))
        bare = body.replace("tcgen05.fence::before_thread_sync;", "").replace("tcgen05.fence::after_thread_sync;", "")
        assert run(bare, out, **options).report.clean


def test_a_register_dependency_on_a_load_is_respected() -> None:
    """The load's value is used before the wait (PTX ISA 9.7.16.6.4.5)."""
    body = GOOD.replace(LOAD + WAIT_LD + OUT, LOAD + OUT + WAIT_LD)
    for name, seed in SCHEDULES:
        r = run(body, {"out": np.zeros((128, 2), np.uint32)}, launch={"block": [128]}, schedule_name=name, seed=seed)
        assert r.report.clean, str(r.report)
        assert r.buffers["out"].tolist() == [[t, 3 * t + 1] for t in range(128)]


def test_allocations_wait_for_columns() -> None:
    """Two warps of 512 columns each take turns."""
    body = (
        SETUP
        + """.reg .b32 %slot; and.b32 %slot, %t, 0x60; shr.u32 %slot, %slot, 5; .shared .b32 rooms[2]; mov.u32 %s, rooms; mad.lo.u32 %s, %slot, 4, %s;
    tcgen05.alloc.cta_group::1.sync.aligned.b32 [%g], 512; bar.warp.sync -1; ld.shared.b32 %d, [%s]; tcgen05.dealloc.cta_group::1.sync.aligned.b32 %d, 512;"""
    )
    body = body.replace(
        "tcgen05.alloc.cta_group::1.sync.aligned.b32 [%g]",
        ".reg .b64 %g; cvt.u64.u32 %g, %s; cvta.shared.u64 %g, %g; tcgen05.alloc.cta_group::1.sync.aligned.b32 [%g]",
    )
    for name, seed in SCHEDULES:
        r = run(body, launch={"block": [64]}, schedule_name=name, seed=seed)
        assert r.report.clean, str(r.report)


def test_pairs_allocate_together() -> None:
    body = (GOOD.replace("cta_group::1", "cta_group::2") + "barrier.cluster.arrive; barrier.cluster.wait;").replace(
        "mul.wide.u32 %o, %t, 8;", "mov.u32 %y, %ctaid.x; mad.lo.u32 %y, %y, 128, %t; mul.wide.u32 %o, %y, 8;"
    )
    for name, seed in SCHEDULES:
        options = {"schedule_name": name, "seed": seed}
        r = run(body, {"out": np.zeros((256, 2), np.uint32)}, launch={"block": [128], "grid": [2], "cluster": [2]}, **options)
        assert r.report.clean, str(r.report)
        assert r.buffers["out"].tolist() == [[t, 3 * t + 1] for t in range(128)] * 2
        alone = body.replace(
            "@%first tcgen05.alloc", "mov.u32 %y, %ctaid.x; setp.eq.and.u32 %p, %y, 0, %first; @%p tcgen05.alloc"
        )
        assert "deadlock" in kinds(
            run(alone, {"out": np.zeros((256, 2), np.uint32)}, launch={"block": [128], "grid": [2], "cluster": [2]}, **options)
        )


@pytest.mark.parametrize("shape", ["16x64b.x4", "16x128b.x2", "16x256b.x1", "32x32b.x4"])
def test_shapes_come_back_as_they_went(shape: str) -> None:
    count = 4
    regs = ", ".join(f"%v{i}" for i in range(count))
    body = (
        SETUP
        + ALLOC
        + f".reg .b32 %v<{count}>; add.u32 %x, %d, %w;"
        + "".join(f"mad.lo.u32 %v{i}, %t, 16, {i};" for i in range(count))
    )
    body += f"tcgen05.st.sync.aligned.{shape}.b32 [%x], {{{regs}}}; tcgen05.wait::st.sync.aligned;" + "".join(
        f"mov.u32 %v{i}, 0;" for i in range(count)
    )
    body += (
        f"tcgen05.ld.sync.aligned.{shape}.b32 {{{regs}}}, [%x]; tcgen05.wait::ld.sync.aligned; mul.wide.u32 %o, %t, 16; add.u64 %at, %out, %o; st.global.v4.b32 [%at], {{{regs}}};"
        + FREE
    )
    r = run(body, {"out": np.zeros((128, 4), np.uint32)}, launch={"block": [128]})
    assert r.report.clean, str(r.report)
    assert r.buffers["out"].tolist() == [[16 * t + i for i in range(4)] for t in range(128)]


@pytest.mark.parametrize(("k", "d_type"), [(8, "f32"), (16, "f32"), (16, "f16")])
def test_mma_sync(k: int, d_type: str) -> None:
    """Fragments as PTX ISA 9.7.14.5.8 words them: groups of four lanes hold rows g and g + 8."""
    rng = np.random.default_rng(k)
    a, b = rng.integers(-4, 5, (16, k)).astype(np.float16), rng.integers(-4, 5, (k, 8)).astype(np.float16)
    c = rng.integers(-9, 10, (16, 8)).astype(np.float32 if d_type == "f32" else np.float16)
    lanes = [(t // 4, t % 4) for t in range(32)]
    a_regs = np.array(
        [[[a[g + 8 * (r % 2), 2 * q + h + 8 * (r // 2)] for h in (0, 1)] for r in range(k // 4)] for g, q in lanes], np.float16
    )
    b_regs = np.array([[[b[2 * q + h + 8 * r, g] for h in (0, 1)] for r in range(k // 8)] for g, q in lanes], np.float16)
    pairs = np.array([[[c[g + 8 * r, 2 * q + h] for h in (0, 1)] for r in (0, 1)] for g, q in lanes], c.dtype)
    count = 4 if d_type == "f32" else 2
    body = ".reg .b32 %t, %ra<4>, %rb<2>, %rc<4>; .reg .b64 %o, %at; mov.u32 %t, %tid.x;"
    for name, size in (("a", k // 4), ("b", k // 8), ("c", count)):
        body += f"mul.wide.u32 %o, %t, {4 * size}; add.u64 %at, %{name}, %o;" + "".join(
            f"ld.global.b32 %r{name}{i}, [%at+{4 * i}];" for i in range(size)
        )
    vector = lambda name, size: "{" + ", ".join(f"%r{name}{i}" for i in range(size)) + "}"  # noqa: E731
    body += f"mma.sync.aligned.m16n8k{k}.row.col.{d_type}.f16.f16.{d_type} {vector('c', count)}, {vector('a', k // 4)}, {vector('b', k // 8)}, {vector('c', count)};"
    body += f"mul.wide.u32 %o, %t, {4 * count}; add.u64 %at, %out, %o;" + "".join(
        f"st.global.b32 [%at+{4 * i}], %rc{i};" for i in range(count)
    )
    r = run(body, {"a": a_regs, "b": b_regs, "c": pairs, "out": np.zeros_like(pairs)})
    assert r.report.clean
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    for t, (g, q) in enumerate(lanes):
        for row in (0, 1):
            assert r.buffers["out"][t, row].tolist() == exact[g + 8 * row, 2 * q : 2 * q + 2].tolist()
