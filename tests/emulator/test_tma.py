"""Bulk copies, plain and of tensors: where bytes go, how completion is seen, and what happens without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emulator.runner import kinds, module, run
from emulator.test_divergence import SCHEDULES
from glu4.emulator.launch import Result, emulate

SETUP = """.shared .align 1024 .b8 room[8192]; .shared .align 8 .b64 bar; .reg .b32 %t, %x, %y, %z, %w, %b, %s, %far; .reg .b64 %at, %o, %m; .reg .pred %p, %one; .reg .b16 %h;
mov.u32 %t, %tid.x; mov.u32 %b, bar; mov.u32 %s, room; setp.eq.u32 %one, %t, 0; @%one mbarrier.init.shared.b64 [%b], 1; fence.mbarrier_init.release.cluster; SYNC
"""
SYNC = "bar.sync 0;"
CLUSTER = "barrier.cluster.arrive; barrier.cluster.wait;"
WAIT = "{ W: mbarrier.try_wait.parity.shared.b64 %p, [%b], 0; @!%p bra W; }\n"
DUMP = """{ .reg .b32 %i; mov.u32 %i, %t; D: shl.b32 %x, %i, 2; add.u32 %y, %s, %x; ld.shared.b32 %z, [%y]; cvt.u64.u32 %o, %x; add.u64 %at, %out, %o; st.global.b32 [%at], %z;
add.u32 %i, %i, 32; setp.lt.u32 %p, %i, COUNT; @%p bra D; }"""


def tensor_map(**fields: Any) -> dict[str, Any]:
    return {"tensor_map": {"buffer": "a", "element_type": "u8", **fields}}


def with_map(body: str, buffers: dict[str, Any], described: dict[str, Any], cluster: int = 1, **options: Any) -> Result:
    params = ".param .align 64 .b8 map[128]" + "".join(f", .param .u64 p_{n}" for n in buffers)
    loads = (
        "".join(f".reg .b64 %{n}; ld.param.b64 %{n}, [p_{n}];\n" for n in buffers)
        + ".reg .b64 %map; mov.b64 %map, map; cvta.param.u64 %map, %map;\n"
    )
    text = module(loads + body, params)
    launch = {"grid": [cluster], "block": [32], "cluster": [cluster], "params": [described, *({"ptr": n} for n in buffers)]}
    return emulate(text, launch, buffers, **options)


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
def test_plain_copies_both_ways(name: str, seed: int) -> None:
    body = (
        SETUP.replace("SYNC", SYNC)
        + "@%one mbarrier.arrive.expect_tx.shared.b64 _, [%b], 512; @%one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%a], 512, [%b];"
        + WAIT
        + """mad.lo.u32 %y, %t, 16, %s; ld.shared.b32 %x, [%y]; add.u32 %x, %x, 1; st.shared.b32 [%y], %x; fence.proxy.async.shared::cta; bar.sync 0;
    @%one cp.async.bulk.global.shared::cta.bulk_group [%out], [%s], 512; @%one cp.async.bulk.commit_group; @%one cp.async.bulk.wait_group.read 0;"""
    )
    a = np.arange(128, dtype=np.uint32)
    r = run(body, {"a": a, "out": np.zeros_like(a)}, schedule_name=name, seed=seed)
    assert r.report.clean, str(r.report)
    assert (r.buffers["out"] == a + (a % 4 == 0)).all()
    faults = {
        "fence.proxy.async.shared::cta;": "missing proxy fence",
        "@%one cp.async.bulk.wait_group.read 0;": "exit with work outstanding",
        "@%one cp.async.bulk.commit_group;": "exit with work outstanding",
        WAIT: "missing wait",
        "@%one mbarrier.arrive.expect_tx.shared.b64 _, [%b], 512;": "deadlock",
    }
    for text, kind in faults.items():
        assert kind in kinds(run(body.replace(text, ""), {"a": a, "out": np.zeros_like(a)}, schedule_name=name, seed=seed)), (
            text
        )
    assert "deadlock" in kinds(
        run(body.replace("_, [%b], 512", "_, [%b], 1024"), {"a": a, "out": a}, schedule_name=name, seed=seed)
    )
    wrong = run(body.replace("_, [%b], 512", "_, [%b], 256"), {"a": a, "out": a}, schedule_name=name, seed=seed)
    assert "mbarrier misuse" in kinds(wrong)
    # a store to the source before it has been read
    early = body.replace(
        "@%one cp.async.bulk.wait_group.read 0;", "@%one st.shared.b32 [%s], %t; @%one cp.async.bulk.wait_group.read 0;"
    )
    assert kinds(run(early, {"a": a, "out": a}, schedule_name=name, seed=seed)) == ["missing wait"]


SWIZZLES = {"none": 0, "32B": 1, "64B": 3, "128B": 7}


@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_tensor_loads_of_every_swizzle(swizzle: str) -> None:
    """A 2-D box that reaches over two edges of its tensor: zeros there, rows swizzled by the address."""
    inner = {"none": 64, "32B": 32, "64B": 64, "128B": 128}[swizzle]
    rng = np.random.default_rng(0)
    a = rng.integers(1, 256, (20, 160), dtype=np.uint8)
    described = tensor_map(global_shape=[150, 20], global_strides_bytes=[160], box_shape=[inner, 16], swizzle=swizzle)
    size = inner * 16
    body = (
        SETUP.replace("SYNC", SYNC)
        + f"@%one mbarrier.arrive.expect_tx.shared.b64 _, [%b], {size}; mov.u32 %x, 96; mov.u32 %y, -3; @%one cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%s], [%map, {{%x, %y}}], [%b];"
        + WAIT
        + DUMP.replace("COUNT", str(size // 4))
    )
    box = np.zeros((16, inner), dtype=np.uint8)
    for row in range(16):
        for column in range(inner):
            if 0 <= row - 3 < 20 and 96 + column < 150:
                box[row, column] = a[row - 3, 96 + column]
    memory = np.zeros(size, dtype=np.uint8)
    for i, byte in enumerate(box.ravel().tolist()):
        memory[i ^ (i >> 7 & SWIZZLES[swizzle]) << 4] = byte
    for name, seed in SCHEDULES[:3]:
        r = with_map(body, {"a": a, "out": np.zeros(size, np.uint8)}, described, schedule_name=name, seed=seed)
        assert r.report.clean, str(r.report)
        assert (r.buffers["out"] == memory).all()


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_tensor_stores_and_reductions_of_every_rank(rank: int) -> None:
    shape = (32, 3, 4, 2, 3)[:rank]
    box = (16, 2, 2, 2, 2)[:rank]
    start = (16, 1, 2, 0, 1)[:rank]
    target = np.arange(int(np.prod(shape)), dtype=np.uint32).reshape(shape[::-1])
    strides = [int(s) for s in np.cumprod((4, *shape))[1:rank]]
    described = tensor_map(element_type="u32", global_shape=list(shape), global_strides_bytes=strides, box_shape=list(box))
    count = int(np.prod(box))
    coordinates = "".join(f"mov.u32 %c{i}, {v};" for i, v in enumerate(start))
    names = ", ".join(f"%c{i}" for i in range(rank))
    for word, function in (
        ("cp.async.bulk.tensor", lambda old, new: new),
        ("cp.reduce.async.bulk.tensor", lambda old, new: old + new),
    ):
        add = ".add" if "reduce" in word else ""
        body = (
            SETUP.replace("SYNC", SYNC)
            + f".reg .b32 %c<5>; {coordinates} {{ .reg .b32 %i; mov.u32 %i, %t; F: shl.b32 %x, %i, 2; add.u32 %y, %s, %x; mad.lo.u32 %x, %i, 7, 5; st.shared.b32 [%y], %x; add.u32 %i, %i, 32; setp.lt.u32 %p, %i, {count}; @%p bra F; }}"
            + f"fence.proxy.async; bar.sync 0; @%one {word}.{rank}d.global.shared::cta{add}.tile.bulk_group [%map, {{{names}}}], [%s]; @%one cp.async.bulk.commit_group; @%one cp.async.bulk.wait_group 0;"
        )
        # `count` may be below 32: the first pass stores 32 words, which only lie behind the box
        expected = target.copy()
        window = tuple(slice(s, s + b) for s, b in zip(start[::-1], box[::-1]))
        new = (np.arange(count, dtype=np.uint32) * 7 + 5).reshape(box[::-1])
        part = expected[window]
        expected[window] = function(part, new[tuple(slice(0, n) for n in part.shape)])
        for name, seed in SCHEDULES[:3]:
            r = with_map(body, {"a": target}, described, schedule_name=name, seed=seed)
            assert r.report.clean, str(r.report)
            assert (r.buffers["a"] == expected).all(), word


def test_stores_write_whole_pieces_of_sixteen_bytes() -> None:
    """A store whose row ends within 16 bytes reaches over its end, and so may leave the buffer; a reduction does not."""
    body = (
        SETUP.replace("SYNC", SYNC)
        + "mul.lo.u32 %x, %t, 3; add.u32 %x, %x, 1; shl.b32 %y, %t, 2; add.u32 %y, %s, %y; st.shared.b32 [%y], %x; mov.u32 %x, 4; mov.u32 %y, 0; fence.proxy.async; bar.sync 0;"
        + "@%one cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%map, {%x, %y}], [%s]; @%one cp.async.bulk.commit_group; @%one cp.async.bulk.wait_group 0;"
    )
    added = body.replace("cp.async", "cp.reduce.async", 1).replace("shared::cta.tile", "shared::cta.add.tile")
    new = (np.arange(16, dtype=np.uint32) * 3 + 1).reshape(2, 8)
    described = tensor_map(element_type="u32", global_shape=[9, 2], global_strides_bytes=[64], box_shape=[8, 2])
    for text, end in ((body, 12), (added, 9)):
        expected = np.zeros((2, 16), np.uint32)
        expected[:, 4:end] = new[:, : end - 4]
        r = with_map(text, {"a": np.zeros((2, 16), np.uint32)}, described)
        assert r.report.clean, str(r.report)
        assert (r.buffers["a"] == expected).all()
        r = with_map(text, {"a": np.zeros(16 + 9, np.uint32)}, described)
        assert ("the tensor map reaches outside a (100 bytes)" in str(r.report)) == (text is body)


def test_multicast() -> None:
    """Each CTA of a pair loads half and sends it to both."""
    a = np.random.default_rng(1).integers(0, 256, (16, 64), dtype=np.uint8)
    described = tensor_map(global_shape=[64, 16], global_strides_bytes=[64], box_shape=[64, 8])
    body = (
        SETUP.replace("SYNC", CLUSTER)
        + """@%one mbarrier.arrive.expect_tx.shared.b64 _, [%b], 1024; mov.u32 %x, 0; mov.u32 %y, %cluster_ctarank; shl.b32 %y, %y, 3; mov.u16 %h, MASK; shl.b32 %z, %y, 6; add.u32 %w, %s, %z;
    @%one cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%w], [%map, {%x, %y}], [%b], %h;"""
        + WAIT
        + "mov.u32 %x, %ctaid.x; mul.wide.u32 %o, %x, 1024; add.u64 %out, %out, %o;"
        + DUMP.replace("COUNT", "256")
        + CLUSTER
    )
    for name, seed in SCHEDULES:
        buffers = {"a": a, "out": np.zeros((2, 16, 64), np.uint8)}
        r = with_map(body.replace("MASK", "3"), buffers, described, 2, schedule_name=name, seed=seed)
        assert r.report.clean, str(r.report)
        assert (r.buffers["out"] == a).all()
        assert {"deadlock"} <= set(
            kinds(with_map(body.replace("MASK", "1"), buffers, described, 2, schedule_name=name, seed=seed))
        )
        assert "multicast" in kinds(with_map(body.replace("MASK", "7"), buffers, described, 2, schedule_name=name, seed=seed))


def test_malformed_copies_are_reported() -> None:
    a = np.zeros((16, 64), np.uint8)
    described = tensor_map(global_shape=[64, 16], global_strides_bytes=[64], box_shape=[64, 8])
    copy = "mov.u32 %x, 0; @%one cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%s{}], [%map{}, {{%x, %x}}], [%b];"
    for at, where, kind in (("+64", "", "tensor copy"), ("", "+32", "tensor map"), ("+7936", "", "out of bounds")):
        r = with_map(SETUP.replace("SYNC", SYNC) + copy.format(at, where), {"a": a}, described)
        assert kind in kinds(r), (kind, str(r.report))
    wide = tensor_map(global_shape=[64, 32], global_strides_bytes=[64], box_shape=[64, 32])
    assert "tensor copy" in kinds(with_map(SETUP.replace("SYNC", SYNC) + copy.format("", ""), {"a": a}, wide))
    for size, kind in ((24, "bulk copy"), (4096, "out of bounds")):
        r = run(
            SETUP.replace("SYNC", SYNC)
            + f"@%one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%a], {size}, [%b];",
            {"a": np.zeros(1024, np.uint8)},
        )
        assert kind in kinds(r)
