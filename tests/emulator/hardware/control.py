"""Control flow, calls, barriers of a CTA, loads and stores in every space, special registers, fences and hints."""

from __future__ import annotations

from typing import Any

import numpy as np

from emulator.hardware.case import Case, Form, elementwise, forms, kernel, random_bytes

__all__ = ["cases"]

_BEGIN = ".reg .b32 %t, %x, %y, %z, %r; .reg .b64 %in, %out, %at; .reg .pred %p, %q; mov.u32 %t, %tid.x; ld.param.u64 %in, [pin]; ld.param.u64 %out, [pout]; mad.wide.u32 %at, %t, 4, %in; ld.global.b32 %x, [%at]; mov.u32 %r, 0;\n"
_END = "mad.wide.u32 %out, %t, 4, %out; st.global.b32 [%out], %r;"


def _case(name: str, body: str, threads: int = 128, *, top: str = "", directives: str = "", low: int = 0, high: int = 1 << 32,
          launch: dict[str, Any] | None = None) -> Case:  # fmt: skip
    """One word in (%x), one word out (%r) for each thread."""
    whole = {
        "grid": [1],
        "block": [threads],
        "buffers": {"out": {"dtype": "uint32", "shape": [threads]}},
        "params": [{"ptr": "in"}, {"ptr": "out"}],
        **(launch or {}),
    }

    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"in": rng.integers(low, high, threads, dtype=np.uint64).astype(np.uint32)}

    return Case(f"control/{name}", kernel(_BEGIN + body + _END, ("pin", "pout"), top=top, directives=directives), whole, make)


_FUNCTIONS = """
.func (.param .b32 back) twice (.param .b32 given) { .reg .b32 %a; ld.param.b32 %a, [given]; shl.b32 %a, %a, 1; st.param.b32 [back], %a; ret; }
.func (.param .align 8 .b8 back[16]) mix (.param .b32 one, .param .b64 two, .param .align 8 .b8 three[12])
{ .reg .b32 %a, %b, %c; .reg .b64 %w; .reg .pred %p; ld.param.b32 %a, [one]; ld.param.b64 %w, [two]; ld.param.b32 %b, [three+8]; ld.param.v2.b32 {%c, _}, [three];
add.u32 %a, %a, %b; setp.gt.u32 %p, %a, 0x80000000; @%p bra BIG; st.param.b64 [back+8], %w; st.param.v2.b32 [back], {%a, %c}; ret;
BIG: mov.b64 %w, {%c, %a}; st.param.b64 [back], %w; st.param.b64 [back+8], %w; ret; }
.func (.param .b32 back) outer (.param .b32 given)
{ .reg .b32 %a, %n; .reg .pred %p; ld.param.b32 %a, [given]; and.b32 %n, %a, 3;
AGAIN: { .param .b32 g; .param .b32 b; st.param.b32 [g], %a; call (b), twice, (g); ld.param.b32 %a, [b]; } add.u32 %a, %a, 1; setp.eq.u32 %p, %n, 0; @%p bra DONE; sub.u32 %n, %n, 1; bra AGAIN;
DONE: st.param.b32 [back], %a; ret; }
"""


def _flow() -> list[Case]:
    collatz = """and.b32 %x, %x, 0xfff; add.u32 %x, %x, 1; LOOP: setp.eq.u32 %p, %x, 1; @%p bra DONE; and.b32 %y, %x, 1; setp.eq.u32 %q, %y, 0; @%q bra EVEN;
mad.lo.u32 %x, %x, 3, 1; bra NEXT; EVEN: shr.u32 %x, %x, 1; NEXT: add.u32 %r, %r, 1; bra LOOP; DONE:"""
    nested = """and.b32 %y, %x, 7; mov.u32 %z, 0; OUTER: setp.ge.u32 %p, %z, %y; @%p bra DONE; { .reg .b32 %k; mov.u32 %k, %z; INNER: mad.lo.u32 %r, %r, 5, %k; setp.eq.u32 %q, %k, 3; @%q bra SKIP; add.u32 %k, %k, 1; setp.lt.u32 %q, %k, %y; @%q bra INNER; SKIP: }
add.u32 %z, %z, 1; bra.uni OUTER; DONE:"""
    table = """and.b32 %y, %x, 3; T: .branchtargets L0, L1, L2, L3; brx.idx %y, T; L0: add.u32 %r, %x, 10; bra OUT; L1: mul.lo.u32 %r, %x, 3; L2: xor.b32 %r, %r, 0x55; bra OUT; L3: not.b32 %r, %x; OUT:"""
    calls = """{ .param .b32 g; .param .b32 b; st.param.b32 [g], %x; call.uni (b), twice, (g); ld.param.b32 %y, [b]; }
{ .param .b32 one; .param .b64 two; .param .align 8 .b8 three[12]; .param .align 8 .b8 b[16]; st.param.b32 [one], %x; st.param.b64 [two], %at; mov.b64 %at, {%y, %x}; st.param.b64 [two], %at;
st.param.b64 [three], %at; st.param.b32 [three+8], %t; call (b), mix, (one, two, three); ld.param.v2.b32 {%z, %r}, [b]; mad.lo.u32 %r, %r, 7, %z; ld.param.b64 %at, [b+8]; mov.b64 {%z, %y}, %at; xor.b32 %r, %r, %z; mad.lo.u32 %r, %r, 5, %y; }
setp.gt.u32 %p, %r, 0x40000000; @%p bra OUT; { .param .b32 g; .param .b32 b; st.param.b32 [g], %r; call (b), outer, (g); ld.param.b32 %r, [b]; } OUT:"""
    early = "setp.lt.u32 %p, %x, 0x20000000; mov.u32 %r, 1; mad.wide.u32 %at, %t, 4, %out; st.global.b32 [%at], %r; @%p exit; setp.gt.u32 %p, %x, 0xe0000000; @%p ret; mov.u32 %r, 2;"
    return [
        _case("collatz", collatz),
        _case("nested-loops", nested),
        _case("branch-table", table),
        _case("calls", calls, top=_FUNCTIONS),
        _case("early-exit", early),
    ]


def _barriers() -> list[Case]:
    shared = ".shared .align 16 .b8 room[2048]; .reg .b32 %s, %o; mov.u32 %s, room; mad.lo.u32 %o, %t, 4, %s; "
    named = (
        shared
        + """st.shared.b32 [%o], %x; setp.ge.u32 %p, %t, 64; @%p bra OTHER; bar.sync 1, 64; xor.b32 %y, %t, 63; mad.lo.u32 %y, %y, 4, %s; ld.shared.b32 %r, [%y]; bar.arrive 3, 128; bra JOIN;
OTHER: barrier.cta.sync.aligned 2, 64; xor.b32 %y, %t, 33; mad.lo.u32 %y, %y, 4, %s; ld.shared.b32 %r, [%y]; bar.sync 3, 128; sub.u32 %y, %t, 64; mad.lo.u32 %y, %y, 4, %s; ld.shared.b32 %z, [%y]; add.u32 %r, %r, %z; JOIN:"""
    )
    reductions = "and.b32 %y, %x, 3; setp.eq.u32 %p, %y, 0; bar.red.popc.u32 %r, 0, %p; setp.lt.u32 %q, %t, 200; bar.red.and.pred %q, 0, %q; selp.u32 %z, 256, 0, %q; add.u32 %r, %r, %z; setp.eq.u32 %q, %t, 5; barrier.cta.red.or.aligned.pred %q, 4, 128, !%q; selp.u32 %z, 512, 0, %q; add.u32 %r, %r, %z; setp.eq.u32 %q, %t, 5; barrier.cta.red.and.aligned.pred %q, 4, 128, !%q; selp.u32 %z, 1024, 0, %q; add.u32 %r, %r, %z;"
    unaligned = (
        shared
        + "st.shared.b32 [%o], %x; and.b32 %y, %t, 1; setp.eq.u32 %p, %y, 0; @%p bra EVEN; barrier.cta.sync 5, 128; add.u32 %r, %r, 7; bra JOIN; EVEN: barrier.cta.sync 5, 128; JOIN: xor.b32 %y, %t, 1; mad.lo.u32 %y, %y, 4, %s; ld.shared.b32 %z, [%y]; add.u32 %r, %r, %z;"
    )
    pools = "setp.ge.u32 %p, %t, 128; @%p bra MORE; setmaxnreg.dec.sync.aligned.u32 40; mad.lo.u32 %r, %x, 3, 1; bra JOIN; MORE: setmaxnreg.inc.sync.aligned.u32 152; mad.lo.u32 %r, %x, 5, 2; JOIN: bar.sync 0;"
    warps = (
        shared
        + "st.shared.b32 [%o], %x; bar.warp.sync 0xffffffff; xor.b32 %y, %t, 17; mad.lo.u32 %y, %y, 4, %s; ld.shared.b32 %r, [%y]; bar.warp.sync -1; st.shared.b32 [%o], %r; bar.warp.sync -1; xor.b32 %y, %t, 6; mad.lo.u32 %y, %y, 4, %s; ld.shared.b32 %z, [%y]; mad.lo.u32 %r, %r, 3, %z;"
    )
    return [
        _case("named-barriers", named),
        _case("barrier-reductions", reductions),
        _case("unaligned-barrier", unaligned),
        _case("setmaxnreg", pools, 256, directives=".maxntid 256, 1, 1\n.maxnreg 96"),
        _case("warp-barrier", warps),
    ]


def _spaces() -> list[Case]:
    local = ".local .align 8 .b8 mine[64]; .reg .b64 %l, %m; mov.u64 %l, mine; " + "".join(
        f"add.u32 %y, %x, {i * 977}; st.local.b32 [%l+{4 * i}], %y; " for i in range(16)
    )
    local += "and.b32 %y, %x, 15; mad.wide.u32 %m, %y, 4, %l; ld.local.b32 %r, [%m]; cvta.local.u64 %m, %m; ld.b16 %z, [%m]; mad.lo.u32 %r, %r, 3, %z; st.b8 [%m], %t; ld.local.v2.b32 {%y, %z}, [%l+8]; add.u32 %r, %r, %y; xor.b32 %r, %r, %z; ld.s8 %y, [%m]; add.u32 %r, %r, %y;"
    constants = """.const .align 8 .b32 table[8] = { 3, 1, 4, 1, 5, 9, 2, 6 };\n.const .align 4 .f32 reals[3] = { 0f3F800000, 2.5, 0f40490FDB };
.const .align 1 .b8 bytes[4] = { 255, 128, 7, 1 };\n.global .align 4 .b32 shared_table[4] = { 10, 20, 30, 40 };\n.global .align 8 .u64 pointer = generic(shared_table);"""
    reads = ".reg .b64 %c; and.b32 %y, %x, 7; mov.u64 %c, table; mad.wide.u32 %c, %y, 4, %c; ld.const.b32 %r, [%c]; and.b32 %y, %x, 3; mov.u64 %c, bytes; cvt.u64.u32 %at, %y; add.u64 %c, %c, %at; ld.const.s8 %z, [%c]; mad.lo.u32 %r, %r, 1000, %z; ld.const.b32 %z, [reals+8]; xor.b32 %r, %r, %z; ld.const.v2.b32 {%y, %z}, [table+8]; mad.lo.u32 %r, %y, %z, %r; ld.global.b32 %z, [shared_table+4]; add.u32 %r, %r, %z; ld.global.u64 %c, [pointer]; ld.b32 %z, [%c+12]; add.u32 %r, %r, %z; mov.u64 %c, table; cvta.const.u64 %c, %c; ld.b32 %z, [%c+20]; mad.lo.u32 %r, %r, 3, %z;"
    spaces = "and.b32 %x, %x, 0xffff; .shared .align 4 .b8 here[16]; .local .align 4 .b8 mine[16]; .reg .b64 %a, %b; mov.u64 %a, here; cvta.shared.u64 %a, %a; mov.u64 %b, mine; cvta.local.u64 %b, %b; mov.u32 %r, %x;"
    for n, (space, register) in enumerate((s, r) for s in ("global", "shared", "local", "const") for r in ("%a", "%b", "%out")):
        spaces += f"isspacep.{space} %p, {register}; @%p add.u32 %r, %r, {1 << (16 + n)};"
    return [
        _case("local", local),
        _case("constants", reads, top=constants),
        _case("spaces", spaces),
    ]


_LOADS = [
    "ld.global.{t} %q, [%at];",
    "ld.global.nc.{t} %q, [%at];",
    "ld.volatile.global.{t} %q, [%at];",
    "ld.relaxed.gpu.global.{t} %q, [%at];",
]


def _loads() -> list[Case]:
    """Loads of all types and widths, extended to 64 bits; vectors; hints and orders."""
    code = [
        ".reg .b32 %t; .reg .b64 %in, %out, %at, %to, %q, %w<4>; .reg .b32 %v<8>; .reg .b16 %h<4>; mov.u32 %t, %tid.x; ld.param.u64 %in, [pin]; ld.param.u64 %out, [pout]; mad.wide.u32 %at, %t, 32, %in; mad.wide.u32 %to, %t, 512, %out;"
    ]
    place = 0
    for kind in ("u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32", "b32", "u64", "s64", "b64"):
        for text in _LOADS[: 4 if kind[0] == "u" else 1]:
            code.append(f"{text.format(t=kind)} st.global.b64 [%to+{place}], %q;")
            place += 8
    vectors = [
        "ld.global.v2.b32 {%v0, %v1}, [%at]; xor.b32 %v0, %v0, %v1;", "ld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%at+16]; sub.u32 %v0, %v3, %v1; add.u32 %v0, %v0, %v2;",
        "ld.global.v2.u8 {%h0, %h1}, [%at+2]; mov.b32 %v0, {%h1, %h0};", "ld.global.v4.s8 {%v0, %v1, %v2, %v3}, [%at+4]; mad.lo.u32 %v0, %v0, %v1, %v2; xor.b32 %v0, %v0, %v3;",
        "ld.global.v4.u16 {%h0, %h1, %h2, %h3}, [%at+8]; mov.b32 %v0, {%h2, %h1}; mov.b32 %v1, {%h0, %h3}; xor.b32 %v0, %v0, %v1;",
        "ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%v0, %v1, %v2, %v3}, [%at]; xor.b32 %v0, %v0, %v3;", "ld.global.L1::evict_last.L2::256B.b32 %v0, [%at];",
        "ld.global.ca.b32 %v0, [%at+4];", "ld.global.cg.b32 %v0, [%at+8];", "ld.global.cs.b32 %v0, [%at+12];", "ld.global.cv.b32 %v0, [%at+16];", "ldu.global.b32 %v0, [%at+20];",
        "ld.acquire.sys.global.b32 %v0, [%at+24];", "ld.acquire.gpu.b32 %v0, [%at+28];", "ld.mmio.relaxed.sys.global.b32 %v0, [%at];", "ld.weak.global.b32 %v0, [%at+4];",
        "ld.global.v2.b64 {%w0, %w1}, [%at+16]; xor.b64 %w0, %w0, %w1; cvt.u32.u64 %v0, %w0;", "{ .reg .b128 %k; ld.global.b128 %k, [%at]; mov.b128 {%w0, %w1}, %k; sub.u64 %w0, %w1, %w0; cvt.u32.u64 %v0, %w0; }",
        "createpolicy.fractional.L2::evict_first.L2::evict_unchanged.b64 %w3, 0.5; ld.global.L2::cache_hint.b32 %v0, [%at], %w3;",
    ]  # fmt: skip
    for text in vectors:
        code.append(f"{text} st.global.b32 [%to+{place}], %v0;")
        place += 4
    place = -(-place // 32) * 32
    stores = [
        "st.global.b8 [%to+{p}], %v0;", "st.global.v2.b8 [%to+{p}], {{%h0, %h1}};", "st.global.v4.b16 [%to+{p}], {{%h0, %h1, %h2, %h3}};", "st.global.v2.b64 [%to+{p}], {{%w0, %w1}};",
        "st.global.wt.b32 [%to+{p}], %v1;", "st.global.cs.v4.b32 [%to+{p}], {{%v0, %v1, %v2, %v3}};", "st.release.gpu.global.b32 [%to+{p}], %v2;", "st.relaxed.cluster.global.b64 [%to+{p}], %w1;",
        "st.volatile.global.b16 [%to+{p}], %h2;", "st.global.L1::no_allocate.b32 [%to+{p}], %v3;", "st.mmio.relaxed.sys.global.b32 [%to+{p}], %v0;", "st.weak.global.wb.b16 [%to+{p}], %v1;", "st.b32 [%to+{p}], %v2;",
    ]  # fmt: skip
    for text in stores:
        code.append(text.format(p=place))
        place += 16
    assert place <= 512
    launch = {
        "grid": [1],
        "block": [32],
        "buffers": {"out": {"dtype": "uint8", "shape": [32 * 512]}},
        "params": [{"ptr": "in"}, {"ptr": "out"}],
    }
    return [
        Case("control/loads", kernel("\n".join(code), ("pin", "pout")), launch, lambda rng: {"in": random_bytes(rng, 1024)})
    ]


def _hints() -> list[Case]:
    words = [
        "prefetch.global.L1 [%at];", "prefetch.global.L2 [%at];", "prefetch.global.L2::evict_last [%at];", "prefetch.L2 [%at];", "prefetchu.L1 [%at];", "applypriority.global.L2::evict_normal [%in], 128;",
        "nanosleep.u32 20;", "griddepcontrol.launch_dependents;", "griddepcontrol.wait;", "membar.cta;", "membar.gl;", "membar.sys;", "fence.sc.cta;", "fence.sc.gpu;", "fence.sc.cluster;", "fence.sc.sys;",
        "fence.acq_rel.cta;", "fence.acq_rel.cluster;", "fence.acq_rel.gpu;", "fence.acq_rel.sys;", "fence.acquire.gpu;", "fence.release.cluster;", "fence.proxy.alias;", "fence.proxy.async;",
        "fence.proxy.async.global;", "fence.proxy.async.shared::cta;", "fence.proxy.async.shared::cluster;", "fence.mbarrier_init.release.cluster;", "fence.proxy.tensormap::generic.release.gpu;",
        "fence.acquire.sync_restrict::shared::cluster.cluster;", "fence.release.sync_restrict::shared::cta.cluster;", "fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;",
        "fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster;", "fence.proxy.tensormap::generic.acquire.gpu [%in], 128;", "pmevent 3;",
    ]  # fmt: skip
    body = "".join(f"{word} mad.lo.u32 %r, %r, 3, %x;\n" for word in words)
    return [_case("hints", body)]


def _registers() -> list[Case]:
    names = [f"%{n}.{a}" for n in ("tid", "ntid", "ctaid", "nctaid", "cluster_ctaid") for a in "xyz"]
    names += [
        "%laneid",
        "%lanemask_eq",
        "%lanemask_le",
        "%lanemask_lt",
        "%lanemask_ge",
        "%lanemask_gt",
        "%dynamic_smem_size",
        "%cluster_nctarank",
    ]
    code = ".reg .b32 %t, %x, %y; .reg .b64 %out; .extern .shared .align 16 .b8 more[]; ld.param.u64 %out, [pout]; mov.u32 %t, 0; mov.u32 %x, %ctaid.z; mad.lo.u32 %t, %t, 2, %x; mov.u32 %x, %ctaid.y; mad.lo.u32 %t, %t, 3, %x; mov.u32 %x, %ctaid.x; mad.lo.u32 %t, %t, 2, %x; mov.u32 %x, %tid.z; mad.lo.u32 %t, %t, 2, %x; mov.u32 %x, %tid.y; mad.lo.u32 %t, %t, 5, %x; mov.u32 %x, %tid.x; mad.lo.u32 %t, %t, 7, %x;"
    size = 4 * len(names)
    code = code.replace(".extern .shared .align 16 .b8 more[];", "")
    code += f"mad.wide.u32 %out, %t, {size}, %out;" + "".join(
        f"mov.u32 %x, {n}; st.global.b32 [%out+{4 * i}], %x;" for i, n in enumerate(names)
    )
    launch = {
        "grid": [2, 3, 2],
        "block": [7, 5, 2],
        "dynamic_smem": 512,
        "buffers": {"out": {"dtype": "uint32", "shape": [12 * 70, len(names)]}},
        "params": [{"ptr": "out"}],
    }
    return [Case("control/special-registers", kernel(code), launch, lambda rng: {})]


def _moves() -> list[Form]:
    """Constants of every notation."""
    texts = ["mov.f32 %d, 0f3F9D70A4;", "mov.f32 %d, 1.5;", "mov.b32 %d, 0b1011;", "mov.b32 %d, 0777;", "mov.u32 %d, 0xFFFFFFFFU;", "mov.s32 %d, -7;",
             "add.u32 %d, %a, (3 + 4) * 5 - 2;", "{ .reg .f64 %w; mov.f64 %w, 0d3FF8000000000000; cvt.rn.f32.f64 %d, %w; }", "add.f32 %d, 1.0, %a;", "fma.rn.f32 %d, %a, 0f3F000000, 2.0;"]  # fmt: skip
    return forms("literals", texts, "32", "f32")


def cases() -> list[Case]:
    return [
        *_flow(),
        *_barriers(),
        *_spaces(),
        *_loads(),
        *_hints(),
        *_registers(),
        *elementwise("control", _moves(), count=256),
    ]
