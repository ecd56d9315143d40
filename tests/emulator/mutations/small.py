"""Small good kernels by hand, for what the compiled ones do not use: named barriers, fences between threads, multicast, wgmma.

Each is PTX text, a launch, inputs, and a check that knows the exact result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from emulator.runner import module
from emulator.test_wgmma import FILL

if TYPE_CHECKING:
    from emulator.mutations.kernels import Kernel

__all__ = ["KERNELS"]


def _make(name: str, body: str, buffers: dict[str, np.ndarray], right: Callable[[Mapping[str, np.ndarray]], bool],
          launch: dict[str, Any]) -> Kernel:  # fmt: skip
    """A kernel whose parameters are pointers to the buffers, in registers %NAME."""
    from emulator.mutations.kernels import Kernel

    params = ", ".join(f".param .u64 p_{buffer}" for buffer in buffers)
    loads = "".join(f".reg .b64 %{buffer}; ld.param.b64 %{buffer}, [p_{buffer}];\n" for buffer in buffers)
    whole = {"grid": [1], "params": [{"ptr": buffer} for buffer in buffers], **launch}
    return Kernel(name, module(loads + body + "ret;", params), whole, buffers, right)


_BULK = """.shared .align 128 .b8 room[1024]; .shared .align 8 .b64 full; .reg .b32 %t, %x, %y, %i, %parity, %bar, %s;
.reg .b64 %from, %to; .reg .pred %one, %p;
mov.u32 %t, %tid.x; mov.u32 %bar, full; mov.u32 %s, room; setp.eq.u32 %one, %t, 0;
@%one mbarrier.init.shared.b64 [%bar], 1;
bar.sync 0;
mov.u64 %from, %a; mov.u64 %to, %out; mov.u32 %i, 0; mov.u32 %parity, 0;
mad.lo.u32 %y, %t, 4, %s;
griddepcontrol.wait;
Next:
@%one mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;
@%one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%from], 256, [%bar];
Full: mbarrier.try_wait.parity.shared.b64 %p, [%bar], %parity;
@!%p bra Full;
ld.shared.b32 %x, [%y];
mul.lo.u32 %x, %x, 3;
st.shared.b32 [%y+512], %x;
fence.proxy.async.shared::cta;
bar.sync 0;
@%one cp.async.bulk.global.shared::cta.bulk_group [%to], [%s+512], 256;
@%one cp.async.bulk.commit_group;
@%one cp.async.bulk.wait_group.read 0;
bar.sync 0;
xor.b32 %parity, %parity, 1; add.u64 %from, %from, 256; add.u64 %to, %to, 256; add.u32 %i, %i, 1;
setp.lt.u32 %p, %i, 3; @%p bra Next;
griddepcontrol.launch_dependents;
"""


def bulk_store() -> Kernel:
    """Three rounds through one buffer by bulk copies in and out; the input is the output of the grid in front."""
    a = np.arange(192, dtype=np.uint32)
    return _make("bulk_store", _BULK, {"a": a, "out": np.zeros_like(a)}, lambda b: bool((b["out"] == 3 * a).all()),
                 {"block": [64], "dependent": ["a"]})  # fmt: skip


_FENCES = """.shared .align 16 .b32 place; .shared .align 8 .b64 bars[2]; .reg .b32 %t, %q, %d, %x, %v, %l<2>, %bar, %s;
.reg .b64 %at, %o; .reg .pred %p, %first, %one, %second;
mov.u32 %t, %tid.x; mov.u32 %s, place; mov.u32 %bar, bars; setp.lt.u32 %first, %t, 32; setp.eq.u32 %one, %t, 0; setp.ge.u32 %second, %t, 128;
@%one mbarrier.init.shared.b64 [%bar], 128;
@%one mbarrier.init.shared.b64 [%bar+8], 128;
@%first tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%s], 64;
@%first tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
bar.sync 0;
ld.shared.b32 %d, [%s];
shr.u32 %q, %t, 5; and.b32 %q, %q, 3; shl.b32 %q, %q, 21; add.u32 %x, %d, %q;
@%second bra Second;
mul.lo.u32 %v, %t, 5;
tcgen05.st.sync.aligned.32x32b.x2.b32 [%x], {%t, %v};
tcgen05.wait::st.sync.aligned;
tcgen05.fence::before_thread_sync;
mbarrier.arrive.shared.b64 _, [%bar];
Back: mbarrier.try_wait.parity.relaxed.cluster.shared.b64 %p, [%bar+8], 0;
@!%p bra Back;
tcgen05.fence::after_thread_sync;
tcgen05.st.sync.aligned.32x32b.x2.b32 [%x], {%v, %t};
tcgen05.wait::st.sync.aligned;
tcgen05.ld.sync.aligned.32x32b.x2.b32 {%l0, %l1}, [%x];
tcgen05.wait::ld.sync.aligned;
bra Store;
Second:
There: mbarrier.try_wait.parity.shared.b64 %p, [%bar], 0;
@!%p bra There;
tcgen05.fence::after_thread_sync;
tcgen05.ld.sync.aligned.32x32b.x2.b32 {%l0, %l1}, [%x];
tcgen05.wait::ld.sync.aligned;
tcgen05.fence::before_thread_sync;
mbarrier.arrive.relaxed.cluster.shared.b64 _, [%bar+8];
Store: mul.wide.u32 %o, %t, 8; add.u64 %at, %out, %o; st.global.v2.b32 [%at], {%l0, %l1};
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
@%first tcgen05.dealloc.cta_group::1.sync.aligned.b32 %d, 64;
"""


def tensor_memory_fences() -> Kernel:
    """Tensor memory goes from one warpgroup to another and back, by mbarriers with tcgen05.fence; the way back is relaxed."""
    t = np.arange(128, dtype=np.uint32)
    out = np.concatenate((np.stack((5 * t, t), 1), np.stack((t, 5 * t), 1)))
    return _make("tensor_memory_fences", _FENCES, {"out": np.zeros_like(out)}, lambda b: bool((b["out"] == out).all()),
                 {"block": [256]})  # fmt: skip


_MULTICAST = """.shared .align 128 .b8 room[512]; .shared .align 8 .b64 bars[2]; .reg .b32 %t, %x, %y, %r, %bar, %far, %s, %z;
.reg .b64 %at, %o; .reg .b16 %mask; .reg .pred %one, %lead, %p;
mov.u32 %t, %tid.x; mov.u32 %r, %cluster_ctarank; mov.u32 %bar, bars; mov.u32 %s, room; setp.eq.u32 %one, %t, 0;
@%one mbarrier.init.shared.b64 [%bar], 1;
@%one mbarrier.init.shared.b64 [%bar+8], 32;
fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.relaxed.aligned;
barrier.cluster.wait.aligned;
setp.eq.and.u32 %lead, %r, 0, %one;
mov.b16 %mask, 3;
@%one mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 128;
@%lead cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%s], [%a], 128, [%bar], %mask;
Full: mbarrier.try_wait.parity.shared.b64 %p, [%bar], 0;
@!%p bra Full;
mad.lo.u32 %y, %t, 4, %s;
ld.shared.b32 %x, [%y];
mad.lo.u32 %x, %x, 10, %r;
xor.b32 %z, %r, 1;
mapa.shared::cluster.u32 %far, %y, %z;
st.shared::cluster.b32 [%far+256], %x;
mapa.shared::cluster.u32 %far, %bar, %z;
mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%far+8];
Peer: mbarrier.try_wait.parity.acquire.cluster.shared.b64 %p, [%bar+8], 0;
@!%p bra Peer;
ld.shared.b32 %x, [%y+256];
mad.lo.u32 %z, %r, 32, %t; mul.wide.u32 %o, %z, 4; add.u64 %at, %out, %o; st.global.b32 [%at], %x;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
"""


def multicast() -> Kernel:
    """One copy to both CTAs of a cluster, stores into the peer's shared memory and arrivals on its mbarrier."""
    a = np.arange(32, dtype=np.uint32) + 7
    out = np.concatenate((10 * a + 1, 10 * a))
    return _make("multicast", _MULTICAST, {"a": a, "out": np.zeros_like(out)}, lambda b: bool((b["out"] == out).all()),
                 {"block": [32], "grid": [2], "cluster": [2]})  # fmt: skip


_NAMED = """.shared .align 16 .b32 room[32]; .reg .b32 %t, %l, %x, %y, %i, %s; .reg .b64 %at, %o; .reg .pred %p, %consumer;
mov.u32 %t, %tid.x; and.b32 %l, %t, 31; mov.u32 %s, room; mad.lo.u32 %y, %l, 4, %s; mov.u32 %i, 0; setp.ge.u32 %consumer, %t, 32;
@%consumer bra Consume;
Produce: mad.lo.u32 %x, %i, 100, %l;
st.shared.b32 [%y], %x;
bar.arrive 1, 64;
bar.sync 2, 64;
add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 4; @%p bra Produce;
exit;
Consume: xor.b32 %x, %y, 64;
bar.sync 1, 64;
ld.shared.b32 %x, [%x];
bar.arrive 2, 64;
mad.lo.u32 %l, %i, 32, %t; sub.u32 %l, %l, 32; mul.wide.u32 %o, %l, 4; add.u64 %at, %out, %o; st.global.b32 [%at], %x;
add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 4; @%p bra Consume;
"""


def named_barriers() -> Kernel:
    """A producer and a consumer warp take turns by two named barriers, each arriving on one and waiting at the other."""
    lanes = np.arange(32, dtype=np.uint32) ^ 16
    out = np.concatenate([100 * i + lanes for i in range(4)])
    return _make("named_barriers", _NAMED, {"out": np.zeros_like(out)}, lambda b: bool((b["out"] == out).all()),
                 {"block": [64]})  # fmt: skip


_COLUMNS = 32  # of D


def _wgmma_body() -> str:
    count = _COLUMNS // 2
    registers = ", ".join(f"%d{i}" for i in range(count))
    shape = f"wgmma.mma_async.sync.aligned.m64n{_COLUMNS}k16.f32.f16.f16 {{{registers}}}, %da, %db, %keep, 1, 1, 0, 0;\n"
    body = FILL.replace("COUNT", str((64 + _COLUMNS) * 8)).replace("FENCE", "fence.proxy.async;")
    body += f".reg .b32 %d<{count}>; setp.ne.u32 %keep, 0, 0;\n" + "".join(f"mov.b32 %d{i}, 0;" for i in range(count))
    body += f"\nwgmma.fence.sync.aligned;\n{shape}setp.eq.u32 %keep, 0, 0;\n{shape}"
    body += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    body += f"mul.wide.u32 %o, %t, {4 * count}; add.u64 %at, %out, %o;\n"
    return body + "".join(f"st.global.b32 [%at+{4 * i}], %d{i};\n" for i in range(count))


def wgmma() -> Kernel:
    """Twice A B^T of small integers by a Hopper warpgroup from shared memory, which float16 and float32 hold exactly."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-4, 5, (rows, 16)).astype(np.float16) for rows in (64, _COLUMNS))
    exact = 2 * (a.astype(np.float64) @ b.astype(np.float64).T)
    t, i = np.arange(128)[:, None], np.arange(_COLUMNS // 2)[None, :]
    # the accumulator fragment (PTX ISA 9.7.15.5.1.1.1): lane groups of four hold rows g and g + 8
    rows, columns = 16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (t % 4) + i % 2
    buffers = {"a": np.concatenate((a, b)), "out": np.zeros((128, _COLUMNS // 2), np.uint32)}
    return _make("wgmma", _wgmma_body(), buffers, lambda r: bool((r["out"].view(np.float32) == exact[rows, columns]).all()),
                 {"block": [128]})  # fmt: skip


def fenced_gemm() -> Kernel:
    """The compiled kernel cute_gemm_narrow with tcgen05.fence around every meeting of threads, as hand-written kernels have it."""
    from emulator.mutations.edits import replace
    from emulator.mutations.kernels import Kernel, kernel

    good = kernel("cute_gemm_narrow")
    before, after = "tcgen05.fence::before_thread_sync;", "tcgen05.fence::after_thread_sync;"
    text = good.text
    for pattern, new, of in (
        (r"^\s*DONE: *\n\s*\}", rf"\g<0>\n\t{after}", 8),
        (r"^\s*bar\.sync[^;]*;", rf"\t{before}\n\g<0>\n\t{after}", 4),
        (r"^\s*mbarrier\.arrive\.shared[^;]*;", rf"\t{before}\n\g<0>", 1),
    ):
        text = replace(pattern, new, None, of)(text)
    return Kernel("fenced_gemm", text, good.launch, good.buffers, good.right)


KERNELS: dict[str, Callable[[], Kernel]] = {
    "bulk_store": bulk_store,
    "tensor_memory_fences": tensor_memory_fences,
    "multicast": multicast,
    "named_barriers": named_barriers,
    "wgmma": wgmma,
    "fenced_gemm": fenced_gemm,
}
