"""The faults: what is broken in which kernel, by which edit, and what has to name it."""

from __future__ import annotations

from dataclasses import dataclass

from emulator.mutations.edits import Edit, LaunchEdit, chain, drop, field, replace

__all__ = ["FAULTS", "NUMBERS", "Fault"]

NUMBERS = "numbers"  # no rule is broken, the result is wrong


@dataclass(frozen=True)
class Fault:
    """expected: classes of hazards, any of which names the fault, or NUMBERS. edit: of the PTX; launch: of its description."""

    kernel: str
    name: str
    expected: str | tuple[str, ...]
    edit: Edit | None = None
    launch: LaunchEdit | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.expected,) if isinstance(self.expected, str) else self.expected

    @property
    def key(self) -> str:
        return f"{self.kernel}: {self.name}"


RACE, WAIT, DEADLOCK = "data race", "missing wait", "deadlock"
MBARRIER, BARRIER = "mbarrier misuse", "barrier misuse"
LIFETIME, UNWRITTEN = "tensor memory lifetime", "uninitialised read"
OUTSTANDING, PROXY, FENCE = "exit with work outstanding", "missing proxy fence", "missing tcgen05.fence"
REGISTER, MALFORMED, BOUNDS = "register in flight", "malformed descriptor", "out of bounds"


def try_wait(barrier: str, which: int = 0, of: int = 1) -> Edit:
    """Go on as if the phase were complete."""
    return replace(rf"mbarrier\.try_wait\S+\s+(%?\w+), \[{barrier}\][^;]*;", r"setp.eq.u32 \1, 0, 0;", which, of)


def number(old: int, new: int, of: int = 1) -> Edit:
    """A constant, wherever it stands."""
    return replace(rf"(?<!\w){old}\b", str(new), None, of)


def _specialized() -> list[Fault]:
    """NVFP4 with TMA: a load warp, a tensor core warp and an epilogue, a ring of three stages."""

    def fault(name: str, expected: str | tuple[str, ...], edit: Edit | None = None, launch: LaunchEdit | None = None) -> Fault:
        return Fault("triton_gemm_specialized", name, expected, edit, launch)

    commit = r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one\.shared::cluster\.b64 "
    expect = r"(mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%r18\]), 36864;"
    mma = r"(tcgen05\.mma\.\S+ \[ %r2 \+ 0 \], )(%rd\d+), (%rd\d+), (%r\d+), \[ (%r\d+) \+ 0 \], \[ (%r\d+) \+ 0 \]"
    return [
        fault("no wait for the first stage", (WAIT, RACE, UNWRITTEN), try_wait("%r41")),
        fault("no wait for later stages", (WAIT, RACE), try_wait("%r79")),
        fault("no wait for a free stage", (WAIT, RACE), try_wait("%r17")),
        fault("no wait for the accumulator", WAIT, try_wait("%r118")),
        fault("no tcgen05.wait::ld", WAIT, drop(r"tcgen05\.wait::ld")),
        fault("no tcgen05.wait::st", WAIT, drop(r"tcgen05\.wait::st")),
        fault("no cp.async.bulk.wait_group", OUTSTANDING, drop(r"cp\.async\.bulk\.wait_group")),
        fault("no cp.async.bulk.commit_group", OUTSTANDING, drop(r"cp\.async\.bulk\.commit_group")),
        fault("no commit of a stage", DEADLOCK, drop(commit + r"\[%r67\]")),
        fault("no commit of the accumulator", DEADLOCK, drop(commit + r"\[%r115\]")),
        fault("commit on the wrong mbarrier", (WAIT, RACE), replace(f"({commit}" + r")\[%r67\]", r"\1[%r41]")),
        fault("no fence.proxy.async", PROXY, drop(r"fence\.proxy\.async")),
        fault("no expect_tx", DEADLOCK, drop(r"mbarrier\.arrive\.expect_tx")),
        fault("half the bytes expected", MBARRIER, replace(expect, r"\1, 18432;")),
        fault("twice the bytes expected", DEADLOCK, replace(expect, r"\1, 73728;")),
        fault("parity of the full stages flipped", (WAIT, RACE, UNWRITTEN, DEADLOCK),
              chain(replace(r"mov\.b32 \t%r42, 0;", "mov.b32 %r42, 1;"), replace(r"mov\.b32 \t%r498, 0;", "mov.b32 %r498, 1;"))),
        fault("parity of the free stages flipped", DEADLOCK, replace(r"mov\.b32 \t%r501, %r23;", "mov.b32 %r501, 1;")),
        fault("transaction on the wrong mbarrier", (MBARRIER, DEADLOCK),
              replace(r"(\[%r28\], \[%rd9, \{%r20, %r29\}\]), \[%r18\]", r"\1, [%r17]")),
        fault("mbarrier for one arrival more", DEADLOCK, replace(r"(mbarrier\.init\S+ \[%r118\]), 1;", r"\1, 2;")),
        fault("mbarrier initialised twice", MBARRIER, replace(r"^(.*mbarrier\.init\S+ \[%r118\], 1;)", r"\1\n\1")),
        fault("mbarrier not initialised", MBARRIER, drop(r"mbarrier\.init\.shared::cta\.b64 \[%r126\]")),
        fault("no bar.sync after tcgen05.alloc", RACE, drop(r"bar\.sync \t0(?=;)", 0, 2)),
        fault("early store: no bar.sync before it", (RACE, PROXY),
              replace(r"(fence\.proxy\.async\.shared::cta;)\s*bar\.sync \t0, 128;", r"\1")),
        fault("swizzle of the operands: 64B for 128B", NUMBERS, number(1073758272, -2147467200, 2)),
        fault("stride offset of the operands halved", NUMBERS, number(1073758272, 1073758240, 2)),
        fault("stride offset of the scales doubled", NUMBERS, number(16392, 16400, 2)),
        fault("swizzle of the tensor map: none", NUMBERS, None, field(("params", 0, "tensor_map", "swizzle"), "128B", "none")),
        fault("scale column one further", NUMBERS, replace(mma, r"\1\2, \3, \4, [ \5 + 1 ], [ \6 + 0 ]", 6, 8)),
        fault("scales of the next 64 elements", NUMBERS, replace(mma, r"\1\2, \3, \4, [ \5 + 0 ], [ %r66 + 0 ]", 5, 8)),
        fault("N halved", NUMBERS, number(136316032, 135267456, 2)),
        fault("M 256 of one CTA", MALFORMED, number(136316032, 270533760, 2)),
        fault("scales taken for ue8m0", NUMBERS, number(136316032, 144704640, 2)),
        fault("scale factor id 2", MALFORMED, number(136316032, 136316064, 2)),
        fault("operands swapped", NUMBERS, replace(mma, r"\1\3, \2, \4, [ \5 + 0 ], [ \6 + 0 ]", 4, 8)),
        fault("scales over the accumulator", (NUMBERS, RACE, WAIT), replace(r"add\.s32 \t%r63, %r2, 136;", "add.s32 %r63, %r2, 64;")),
        fault("fewer columns allocated", LIFETIME, replace(r"(tcgen05\.alloc\S+ \[%r8\]), 256;", r"\1, 128;")),
        fault("no dealloc", LIFETIME, chain(drop(r"tcgen05\.dealloc", 0, 2), drop(r"tcgen05\.dealloc"))),
        fault("dealloc of half", LIFETIME, replace(r"(tcgen05\.dealloc\S+ %r2), 256;", r"\1, 128;", None, 2)),
        fault("one tile row further", NUMBERS, replace(r"shl\.b32 \t%r29, %r27, 7;", "shl.b32 %r29, %r27, 6;")),
    ]  # fmt: skip


def _pair() -> list[Fault]:
    """NVFP4 by two CTAs together, scales of B by multicast."""

    def fault(name: str, expected: str | tuple[str, ...], edit: Edit | None = None, launch: LaunchEdit | None = None) -> Fault:
        return Fault("cute_gemm_pair", name, expected, edit, launch)

    return [
        fault("no fence.mbarrier_init", MBARRIER, chain(drop(r"fence\.mbarrier_init", 0, 2), drop(r"fence\.mbarrier_init"))),
        fault("no barrier.cluster.arrive", BARRIER, drop(r"barrier\.cluster\.arrive")),
        fault("no barrier.cluster.wait", MBARRIER, drop(r"barrier\.cluster\.wait")),
        fault("no wait for a full stage", (WAIT, RACE), try_wait("%r36")),
        fault("no wait for a free stage", (WAIT, RACE), try_wait("%r180")),
        fault("no wait for the accumulator", RACE, try_wait("%r209")),
        fault("no tcgen05.wait::ld", WAIT, drop(r"tcgen05\.wait::ld", 7, 8)),
        fault("multicast mask of the scales: one CTA", DEADLOCK, replace(r"mov\.b16 \t%rs11, 3;", "mov.b16 %rs11, 1;")),
        fault("multicast mask of the commit: one CTA", (DEADLOCK, MBARRIER), replace(r"mov\.b16 \t%rs7, 3;", "mov.b16 %rs7, 1;")),
        fault("multicast mask beyond the cluster", "multicast", replace(r"mov\.b16 \t%rs11, 3;", "mov.b16 %rs11, 7;")),
        fault("mbarrier of the own CTA, not the leader's", (MBARRIER, DEADLOCK), number(-16777224, -8)),
        fault("half of the scales to the wrong place", (NUMBERS, UNWRITTEN, RACE), replace(r"shl\.b32 \t%r19, %r10, 11;", "shl.b32 %r19, %r10, 10;")),
        fault("scales of B by the CTA's pair, not its rank", NUMBERS, replace(r"add\.s32 \t%r18, %r10, %r179;", "add.s32 %r18, %r179, 0;")),
        fault("no arrival on the leader's mbarrier", DEADLOCK, drop(r"mbarrier\.arrive\.shared::cluster\.b64 _, \[%r744\]")),
        fault("no arrival for the peer's dealloc", DEADLOCK, drop(r"mbarrier\.arrive\.shared::cluster\.b64 _, \[%r749\]")),
        fault("both CTAs expect the bytes", (MBARRIER, DEADLOCK), replace(r"@%p71 bra \t\$L__BB0_22;", "")),
        fault("half the bytes expected", MBARRIER, number(77824, 38912)),
        fault("twice the bytes expected", DEADLOCK, number(77824, 155648)),
        fault("M 128 of the pair", NUMBERS, number(272630912, 138413184)),
        fault("N halved", (NUMBERS, UNWRITTEN), number(272630912, 270533760)),
        fault("scale column of B one further", NUMBERS, replace(r"(tcgen05\.mma\.\S+ \[%r23\], %rd28, %rd27, %r159, \[%r26\], \[%r29)\]", r"\1+1]")),
        fault("one copy of scales left out", UNWRITTEN, drop(r"tcgen05\.cp\S+ \t\[%r28\]")),
        fault("cta_group::1 products", "tensor memory misuse", replace(r"tcgen05\.mma\.cta_group::2", "tcgen05.mma.cta_group::1", None, 4)),
        fault("no bar.sync after tcgen05.alloc", RACE, drop(r"bar\.sync \t2, 160", 0, 2)),
        fault("exit before the peer's last commit has arrived", "cluster lifetime", chain(try_wait("%r198"), try_wait("%r199"), try_wait("%r209"))),
    ]  # fmt: skip


def _dual() -> list[Fault]:
    """Two products and silu: by CuTe DSL with warp roles, by Triton without."""
    commit = r"tcgen05\.commit\S+ \t\[%r44\+16\];"
    commit_early = chain(replace(commit, ""), replace(r"^\s*tcgen05\.mma[^;]*;(?=\n\$L__BB0_73:)", "\ttcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r44+16];\n\\g<0>"))  # fmt: skip
    return [
        Fault("cute_dual", "gate and up exchanged", NUMBERS, None, field(("params", 4, "tensor_map", "buffer"), "GATE", "UP")),
        Fault("cute_dual", "accumulators overlap", (NUMBERS, RACE), replace(r"add\.s32 \t%r15, %r14, 128;", "add.s32 %r15, %r14, 64;")),
        Fault("cute_dual", "no named barrier before the address is read", RACE, drop(r"bar\.sync \t2, 160", 0, 2)),
        Fault("cute_dual", "wrong number of threads at a named barrier", (BARRIER, DEADLOCK), replace(r"bar\.sync \t2, 160;", "bar.sync 2, 192;", 0, 2)),
        Fault("cute_dual", "wrong named barrier", DEADLOCK, replace(r"bar\.sync \t2, 160;", "bar.sync 3, 160;", 0, 2)),
        Fault("cute_dual", "no wait for a full stage", (WAIT, RACE), try_wait("%r44")),
        Fault("cute_dual", "no wait for a free stage", (WAIT, RACE), try_wait("%r196")),
        Fault("cute_dual", "no wait for the accumulators", (WAIT, RACE, UNWRITTEN), try_wait("%r224")),
        Fault("cute_dual", "no tcgen05.wait::ld", WAIT, drop(r"tcgen05\.wait::ld", 3, 4)),
        Fault("cute_dual", "no expect_tx", DEADLOCK, drop(r"mbarrier\.arrive\.expect_tx")),
        Fault("cute_dual", "half the bytes expected", (MBARRIER, DEADLOCK), number(55296, 27648)),
        Fault("cute_dual", "no dealloc", LIFETIME, drop(r"tcgen05\.dealloc")),
        Fault("cute_dual", "mbarrier initialised twice", MBARRIER, replace(r"^(\s*mbarrier\.init\S+ \t\[%r224\], %r78;)", r"\1\n\1")),
        Fault("cute_dual", "scales of gate for up", NUMBERS, replace(r"(tcgen05\.mma\S+ \[%r15\], %rd41, %rd40, %r173, \[%r22\], )\[%r20\]", r"\1[%r21]")),
        Fault("cute_dual", "no bar.sync after mbarrier.init", MBARRIER, drop(r"bar\.sync \t0(?=;)")),
        Fault("cute_dual", "accumulator never cleared", UNWRITTEN, replace(r"setp\.ne\.b32 \t%p45, %r2300, 0;", "setp.eq.b32 %p45, 0, 0;")),
        Fault("cute_dual", "no commit of a stage", DEADLOCK, drop(r"tcgen05\.commit\S+ \t\[%r44\+16\]")),
        Fault("cute_dual", "commit before the last product", (WAIT, RACE), commit_early),
        Fault("cute_dual", "a tile of the tensor map too narrow", (DEADLOCK, MBARRIER), None, field(("params", 4, "tensor_map", "box_shape", 1), 128, 64)),
        Fault("triton_dual_blocked", "no wait for the scales", (WAIT, RACE), try_wait("%r20")),
        Fault("triton_dual_blocked", "no wait for the second product", WAIT, try_wait("%r1471")),
        Fault("triton_dual_blocked", "transaction on the wrong mbarrier", (MBARRIER, DEADLOCK), replace(r"(\{%r1470, %r1470, %r112, %r27, %r1470\}\]), \[%r113\]", r"\1, [%r115]")),
        Fault("triton_dual_blocked", "the second product in the first's columns", NUMBERS, replace(r"(tcgen05\.mma\S+ \[ )%r85( \+ 0 \], %rd28,)", r"\1%r466\2")),
        Fault("triton_dual_blocked", "no fence.proxy.async", PROXY, drop(r"fence\.proxy\.async")),
        Fault("triton_dual_blocked", "mbarrier.inval while in use", (MBARRIER, RACE, WAIT), replace(r"^(\s*@%p13 mbarrier\.arrive\.expect_tx\S+ _, \[%r19\], 2048;)", r"\1\n@%p13 mbarrier.inval.shared::cta.b64 [%r19];")),
    ]  # fmt: skip


def _others() -> list[Fault]:
    """cp.async, plain products, and the kernels by hand."""
    return [
        Fault("triton_gemm_pointers", "no cp.async.wait_group", WAIT, drop(r"cp\.async\.wait_group", 0, 2)),
        Fault("triton_gemm_pointers", "cp.async.wait_group leaves one", WAIT, replace(r"cp\.async\.wait_group \t0;", "cp.async.wait_group 1;", 0, 2)),
        Fault("triton_gemm_pointers", "no fence.proxy.async", PROXY, drop(r"fence\.proxy\.async")),
        Fault("triton_gemm_pointers", "no tcgen05.wait::st of the scales", WAIT, drop(r"tcgen05\.wait::st", 1, 2)),
        Fault("triton_gemm_bf16", "operands taken for f16", NUMBERS, number(136316048, 136314880 + 16, 2)),
        Fault("triton_gemm_bf16", "B taken for transposed", (NUMBERS, BOUNDS), number(136316048, 136381584, 2)),
        Fault("triton_gemm_bf16", "a product by all threads", "tensor core misuse", replace(r"@%p25 (tcgen05\.mma)", r"\1", 0, 4)),
        Fault("triton_gemm_bf16", "A negated", NUMBERS, number(136316048, 136324240, 2)),
        Fault("bulk_store", "no griddepcontrol.wait", RACE, drop(r"griddepcontrol\.wait")),
        Fault("bulk_store", "no wait_group.read", WAIT, drop(r"cp\.async\.bulk\.wait_group")),
        Fault("bulk_store", "no wait for the copy", WAIT, try_wait("%bar")),
        Fault("bulk_store", "parity that never changes", (WAIT, RACE), drop(r"xor\.b32 %parity")),
        Fault("bulk_store", "store before the values are there", (RACE, PROXY),
              chain(drop(r"@%one cp\.async\.bulk\.global"), replace(r"^st\.shared", "@%one cp.async.bulk.global.shared::cta.bulk_group [%to], [%s+512], 256;\nst.shared"))),
        Fault("tensor_memory_fences", "no tcgen05.fence::before_thread_sync", FENCE, drop(r"tcgen05\.fence::before_thread_sync", 0, 3)),
        Fault("tensor_memory_fences", "no tcgen05.fence::after_thread_sync", FENCE, drop(r"tcgen05\.fence::after_thread_sync", 1, 3)),
        Fault("tensor_memory_fences", "no fence before a relaxed arrival", (FENCE, RACE), drop(r"tcgen05\.fence::before_thread_sync", 1, 3)),
        Fault("tensor_memory_fences", "no fence after a relaxed wait", (FENCE, RACE), drop(r"tcgen05\.fence::after_thread_sync", 0, 3)),
        Fault("tensor_memory_fences", "no tcgen05.wait::ld before a relaxed arrival", (WAIT, RACE), drop(r"tcgen05\.wait::ld", 1, 2)),
        Fault("tensor_memory_fences", "register overwritten before tcgen05.wait::ld", REGISTER,
              replace(r"(\{%l0, %l1\}, \[%x\];)\n(tcgen05\.wait::ld)", r"\1\nmov.u32 %l1, 0;\n\2", 0, 2)),
        Fault("fenced_gemm", "no tcgen05.fence after the accumulator's wait", FENCE,
              replace(r"(\[%r183\], 0, 10000000; \n[^;]*;[^;]*; *\n\s*DONE: *\n\s*\})\n\ttcgen05\.fence::after_thread_sync;", r"\1")),
        Fault("multicast", "no fence.mbarrier_init", MBARRIER, drop(r"fence\.mbarrier_init")),
        Fault("multicast", "no barrier.cluster.arrive", BARRIER, drop(r"barrier\.cluster\.arrive", 0, 2)),
        Fault("multicast", "multicast mask of one CTA", DEADLOCK, replace(r"mov\.b16 %mask, 3;", "mov.b16 %mask, 1;")),
        Fault("multicast", "no arrival at the peer", DEADLOCK, drop(r"mbarrier\.arrive\.release")),
        Fault("multicast", "arrival at the own mbarrier", RACE, replace(r"mapa(\S+) %far, %bar, %z;", r"mapa\1 %far, %bar, %r;")),
        Fault("multicast", "relaxed arrival at the peer", RACE, replace(r"mbarrier\.arrive\.release\.cluster", "mbarrier.arrive.relaxed.cluster")),
        Fault("named_barriers", "no bar.arrive", DEADLOCK, drop(r"bar\.arrive 1, 64")),
        Fault("named_barriers", "no bar.sync of the producer", (RACE, DEADLOCK), drop(r"bar\.sync 2, 64")),
        Fault("named_barriers", "no bar.sync of the consumer", (RACE, BARRIER), drop(r"bar\.sync 1, 64")),
        Fault("named_barriers", "thread counts that differ", (BARRIER, DEADLOCK), replace(r"bar\.arrive 1, 64", "bar.arrive 1, 96")),
        Fault("wgmma", "no wgmma.fence", "missing wgmma.fence", drop(r"wgmma\.fence")),
        Fault("wgmma", "no wgmma.commit_group", REGISTER, drop(r"wgmma\.commit_group")),
        Fault("wgmma", "no wgmma.wait_group", REGISTER, drop(r"wgmma\.wait_group")),
        Fault("wgmma", "no fence.proxy.async", PROXY, drop(r"fence\.proxy\.async")),
        Fault("wgmma", "leading offset doubled", NUMBERS, replace(r"0x1000080000", "0x1000100000")),
        Fault("wgmma", "stride offset halved", NUMBERS, replace(r"0x1000080000", "0x800080000")),
        Fault("wgmma", "the second product does not accumulate", NUMBERS, replace(r"^setp\.eq\.u32 %keep, 0, 0;", "setp.ne.u32 %keep, 0, 0;")),
    ]  # fmt: skip


FAULTS = [*_specialized(), *_pair(), *_dual(), *_others()]
