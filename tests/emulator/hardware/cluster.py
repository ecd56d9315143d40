"""Clusters: distributed shared memory, remote mbarriers, asynchronous stores, multicast, and the cluster's barrier."""

from __future__ import annotations

from typing import Any

import numpy as np

from emulator.hardware.case import WAIT, Case, dump, fill, kernel, random_bytes
from emulator.hardware.tensor import tensor_bytes, tensor_map

__all__ = ["cases"]

_SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;\n"
_WAIT = WAIT.replace("try_wait.parity.shared", "try_wait.parity.acquire.cluster.shared")


def _head(size: int) -> str:
    return (
        f".shared .align 1024 .b8 room[{size}]; .shared .align 8 .b64 bar; .reg .b32 %t, %ok, %rank, %count, %peer, %here, %there, %rbar, %x, %y, %z; "
        ".reg .b64 %out, %in, %at, %u, %v; .reg .pred %first, %p; mov.u32 %t, %tid.x; setp.eq.u32 %first, %t, 0; mov.u32 %rank, %cluster_ctarank; "
        "mov.u32 %count, %cluster_nctarank; add.u32 %peer, %rank, 1; rem.u32 %peer, %peer, %count; mov.u32 %here, room; mapa.shared::cluster.u32 %there, %here, %peer; "
        "mov.u32 %x, bar; mapa.shared::cluster.u32 %rbar, %x, %peer; ld.param.u64 %out, [pout];\n"
    )


def _case(name: str, body: str, out: int, cluster: tuple[int, ...] = (2, 1, 1), grid: tuple[int, ...] | None = None, threads: int = 64,
          given: dict[str, int] | None = None, maps: tuple[dict[str, Any], ...] = ()) -> Case:  # fmt: skip
    """out: bytes of the result, of all CTAs; given: sizes of input buffers, whose parameters precede it."""
    given = given or {}
    directive = f".reqnctapercluster {', '.join(map(str, cluster))}"
    launch = {
        "grid": list(grid or cluster),
        "block": [threads],
        "cluster": list(cluster),
        "buffers": {"out": {"dtype": "uint8", "shape": [out]}},
        "params": [*({"ptr": n} for n in given), {"ptr": "out"}, *({"tensor_map": m} for m in maps)],
    }
    ptx = kernel(body, (*(f"p{n}" for n in given), "pout"), maps=("pmap",) * len(maps), directives=directive)

    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        found = {n: random_bytes(rng, size) for n, size in given.items()}
        return {**found, **{m["buffer"]: random_bytes(rng, tensor_bytes(m)) for m in maps}}

    return Case(f"cluster/{name}", ptx, launch, make)


def _registers() -> list[Case]:
    names = [
        f"%{n}.{a}" for n in ("ctaid", "nctaid", "clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid") for a in "xyz"
    ]
    names += ["%cluster_ctarank", "%cluster_nctarank", "%tid.x", "%ntid.x"]
    body = (
        _head(16)
        + ".reg .b32 %i; mov.u32 %x, %ctaid.x; mov.u32 %y, %ctaid.y; mov.u32 %i, %nctaid.x; mad.lo.u32 %x, %y, %i, %x; mov.u32 %y, %ctaid.z; mov.u32 %i, %nctaid.x; mov.u32 %z, %nctaid.y; mul.lo.u32 %i, %i, %z; mad.lo.u32 %x, %y, %i, %x; mad.lo.u32 %x, %x, 2, %t;"
    )
    size = 4 * (len(names) + 1)
    body += f"mad.wide.u32 %out, %x, {size}, %out;" + "".join(
        f"mov.u32 %x, {n}; st.global.b32 [%out+{4 * i}], %x;" for i, n in enumerate(names)
    )
    body += f"mov.pred %p, %is_explicit_cluster; selp.u32 %x, 1, 0, %p; st.global.b32 [%out+{size - 4}], %x;"
    found = []
    for cluster, grid in (((2, 1, 1), (4, 2, 1)), ((2, 2, 1), (4, 2, 1)), ((1, 2, 2), (2, 2, 4)), ((4, 1, 1), (8, 1, 1))):
        out = size * 2 * grid[0] * grid[1] * grid[2]
        found.append(_case(f"registers-{'x'.join(map(str, cluster))}", body, out, cluster, grid, 2))
    return found


def _where(size: int) -> str:
    """%out moved to this CTA's part of the result."""
    return f"mov.u32 %x, %ctaid.x; mul.wide.u32 %at, %x, {size}; add.u64 %out, %out, %at;\n"


def _tail(size: int, threads: int = 64) -> str:
    """Dump this CTA's shared memory behind the results of one word per thread."""
    return f"mov.u32 %x, %ctaid.x; mul.wide.u32 %at, %x, {size + 4 * threads}; mad.wide.u32 %u, %t, 4, %out; add.u64 %u, %u, %at; st.global.b32 [%u], %ok; add.u64 %at, %at, {4 * threads}; {dump(size, threads, offset='%at')}"


def _distributed() -> list[Case]:
    found = []
    for count in (2, 4):
        out = count * (1024 + 256)
        cluster = (count, 1, 1)
        read = "mov.u32 %ok, 0;" + "".join(
            f"mapa.shared::cluster.u32 %y, %here, {r}; mad.lo.u32 %y, %t, 4, %y; ld.shared::cluster.b32 %z, [%y]; mad.lo.u32 %ok, %ok, 31, %z;"
            for r in range(count)
        )
        own = "mad.lo.u32 %x, %rank, 1000, %t; mad.lo.u32 %y, %t, 4, %here; st.shared.b32 [%y], %x;"
        body = _head(1024) + fill(1024, 64) + "bar.sync 0;" + own + _SYNC + read + _SYNC
        body += (
            "mad.lo.u32 %y, %t, 8, %there; mad.lo.u32 %x, %rank, 77, %t; st.shared::cluster.v2.b32 [%y+256], {%x, %ok};"
            + _SYNC
            + _tail(1024)
        )
        found.append(_case(f"shared-{count}", body, out, cluster))
        generic = "cvta.shared.u64 %u, %at; mapa.u64 %v, %u, %peer; getctarank.u64 %y, %v; getctarank.shared::cluster.u32 %z, %there; mad.lo.u32 %ok, %y, 16, %z;"
        generic += "isspacep.shared::cluster %p, %v; @%p add.u32 %ok, %ok, 256; isspacep.shared::cta %p, %v; @%p add.u32 %ok, %ok, 512; isspacep.shared::cta %p, %u; @%p add.u32 %ok, %ok, 1024; isspacep.global %p, %out; @%p add.u32 %ok, %ok, 2048;"
        generic += "mad.wide.u32 %v, %t, 4, %v; ld.b32 %x, [%v]; add.u32 %x, %x, 5; st.b32 [%v+512], %x;"
        body = (
            _head(1024)
            + fill(1024, 64)
            + "bar.sync 0;"
            + own
            + _SYNC
            + "cvt.u64.u32 %at, %here;"
            + generic
            + _SYNC
            + _tail(1024)
        )
        found.append(_case(f"generic-{count}", body, out, cluster))
        atomics = "and.b32 %x, %t, 3; mad.lo.u32 %y, %x, 4, %there; atom.shared::cluster.add.u32 %ok, [%y], %t; red.shared::cluster.max.s32 [%y+16], %t; red.release.cluster.shared::cluster.xor.b32 [%y+32], %t; mov.u32 %ok, 1;"
        body = _head(1024) + fill(1024, 64) + _SYNC + atomics + _SYNC + _tail(1024)
        found.append(_case(f"atomics-{count}", body, out, cluster))
        remote = "@%first mbarrier.init.shared.b64 [bar], 64; @%first fence.mbarrier_init.release.cluster;" + _SYNC
        remote += "mad.lo.u32 %y, %t, 4, %there; mad.lo.u32 %x, %rank, 77, %t; st.shared::cluster.b32 [%y], %x; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%rbar];"
        remote += (
            _WAIT.format(bar="bar", phase=0)
            + "xor.b32 %x, %t, 33; mad.lo.u32 %y, %x, 4, %here; ld.shared.b32 %z, [%y]; add.u32 %ok, %ok, %z;"
        )
        body = _head(1024) + fill(1024, 64) + "bar.sync 0;" + remote + _SYNC + _tail(1024)
        found.append(_case(f"arrive-{count}", body, out, cluster))
    return found


def _asynchronous() -> list[Case]:
    found = []
    stores = {
        "b32": (4, "%x"),
        "b64": (8, "%u"),
        "v2.b32": (8, "{%x, %y}"),
        "v4.b32": (16, "{%x, %y, %t, %rank}"),
        "v2.b64": (16, "{%u, %v}"),
        "f32": (4, "%x"),
    }
    for kind, (size, value) in stores.items():
        tx = f"mad.lo.u32 %z, %t, {size}, %there; mad.lo.u32 %x, %rank, 77, %t; not.b32 %y, %x; mov.b64 %u, {{%x, %y}}; not.b64 %v, %u;"
        tx += f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.{kind} [%z], {value}, [%rbar];"
        found.append(_remote(f"st-async-{kind}", tx, 64 * size))
    for word in (
        "add.u32",
        "add.s32",
        "add.u64",
        "min.u32",
        "max.s32",
        "min.s32",
        "max.u32",
        "inc.u32",
        "dec.u32",
        "and.b32",
        "or.b32",
        "xor.b32",
    ):
        size = int(word[-2:]) // 8
        value = "%u" if size == 8 else "%x"
        # all threads of the peer update eight places
        tx = f"and.b32 %y, %t, 7; mad.lo.u32 %z, %y, {size}, %there; mad.lo.u32 %x, %rank, 77, %t; mul.lo.u32 %x, %x, {3 if word[:3] in ('inc', 'dec') else 0x9E3779B1}; mov.b64 %u, {{%x, %t}};"
        if word[:3] in ("inc", "dec"):
            tx += "mov.u32 %x, 0x7000;"
        tx += f"red.async.relaxed.cluster.global.shared::cluster.mbarrier::complete_tx::bytes.{word} [%z], {value}, [%rbar];".replace(
            ".global", ""
        )
        found.append(_remote(f"red-async-{word}", tx, 64 * size))
    bulk = "@%first fence.proxy.async; @%first cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%there], [%y], 256, [%rbar];"
    copy = (
        "mad.lo.u32 %y, %t, 4, %here; mad.lo.u32 %x, %rank, 77, %t; st.shared.b32 [%y+512], %x; fence.proxy.async; bar.sync 0; add.u32 %y, %here, 512;"
        + bulk
    )
    found.append(_remote("bulk-copy", copy, 256))
    return found


def _remote(name: str, text: str, size: int) -> Case:
    """Each CTA sends to the next, which waits for the bytes on its own mbarrier."""
    body = (
        _head(1024)
        + fill(1024, 64)
        + "@%first mbarrier.init.shared.b64 [bar], 1; @%first fence.mbarrier_init.release.cluster; fence.proxy.async;"
        + _SYNC
    )
    body += f"@%first mbarrier.arrive.expect_tx.shared.b64 _, [bar], {size}; {text} {_WAIT.format(bar='bar', phase=0)} {_SYNC} {_tail(1024)}"
    return _case(name, body, 2 * (1024 + 256))


def _multicast() -> list[Case]:
    found = []
    for count, mask in ((2, 0b11), (2, 0b10), (4, 0b1111), (4, 0b1010), (4, 0b0110)):
        described = tensor_map("f16", (100, 40), (32, 16), swizzle="64B")
        expect = "mov.u32 %x, 1; shl.b32 %x, %x, %rank; and.b32 %x, %x, {mask}; setp.ne.u32 %p, %x, 0; selp.u32 %y, {size}, 0, %p; @%first mbarrier.arrive.expect_tx.shared.b64 _, [bar], %y;"
        opened = (
            "@%first mbarrier.init.shared.b64 [bar], 1; @%first fence.mbarrier_init.release.cluster; fence.proxy.async;" + _SYNC
        )
        # the first CTA sends one box to all of the mask
        send = f"setp.eq.u32 %p, %rank, 0; and.pred %p, %p, %first; .reg .b16 %mask; mov.b16 %mask, {mask}; .reg .b32 %cx, %cy; mov.s32 %cx, 40; mov.s32 %cy, -3; mov.u64 %u, pmap; cvta.param.u64 %u, %u;"
        send += "@%p cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%here], [%u, {%cx, %cy}], [bar], %mask;"
        body = (
            _head(2048)
            + fill(2048, 64)
            + opened
            + expect.format(mask=mask, size=1024)
            + _SYNC
            + send
            + _WAIT.format(bar="bar", phase=0)
            + _SYNC
            + _tail(2048)
        )
        found.append(_case(f"multicast-tensor-{count}-{mask:x}", body, count * (2048 + 256), (count, 1, 1), maps=(described,)))
        # each CTA sends its own part to all of the mask
        send = f"setp.eq.u32 %p, %t, 0; .reg .b16 %mask; mov.b16 %mask, {mask}; ld.param.u64 %in, [pin]; mad.wide.u32 %in, %rank, 256, %in; mad.lo.u32 %x, %rank, 256, %here;"
        send += "@%p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%x], [%in], 256, [bar], %mask;"
        body = (
            _head(2048)
            + fill(2048, 64)
            + opened
            + expect.format(mask=mask, size=256 * count)
            + _SYNC
            + send
            + _WAIT.format(bar="bar", phase=0)
            + _SYNC
            + _tail(2048)
        )
        found.append(_case(f"multicast-bulk-{count}-{mask:x}", body, count * (2048 + 256), (count, 1, 1), given={"in": 1024}))
    return found


def _barriers() -> list[Case]:
    """Values passed round a cluster of 4 over several phases, by the barrier's forms in turn."""
    forms = [
        "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;",
        "barrier.cluster.arrive; barrier.cluster.wait;",
        "fence.acq_rel.cluster; barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;",
        "barrier.cluster.arrive.release.aligned; add.u32 %z, %z, 1; barrier.cluster.wait.acquire.aligned;",
    ]
    body = _head(1024) + fill(1024, 64) + "bar.sync 0; mad.lo.u32 %ok, %rank, 100, %t; mov.u32 %z, 0;" + _SYNC
    for n, form in enumerate(forms * 2):
        place = 256 * (n % 2)
        body += f"mad.lo.u32 %y, %t, 4, %there; st.shared::cluster.b32 [%y+{place}], %ok; {form} mad.lo.u32 %y, %t, 4, %here; ld.shared.b32 %x, [%y+{place}]; mad.lo.u32 %ok, %ok, 3, %x; add.u32 %ok, %ok, %z;\n"
    return [_case("barrier-forms", body + _SYNC + _tail(1024), 4 * (1024 + 256), (4, 1, 1))]


def cases() -> list[Case]:
    return [*_registers(), *_distributed(), *_asynchronous(), *_multicast(), *_barriers()]
