"""Shared memory: ldmatrix, stmatrix, cp.async, bulk copies and reductions, and mbarriers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emulator.hardware.case import WAIT, Case, copy_in, dump, fill, kernel, random_bytes

__all__ = ["cases"]

_ROOM = ".shared .align 128 .b8 room[{size}]; .shared .align 8 .b64 bar; .reg .b32 %t, %ok; .reg .b64 %in, %out; .reg .pred %first; mov.u32 %t, %tid.x; setp.eq.u32 %first, %t, 0;\n"
_POINTERS = "ld.param.u64 %in, [pin]; ld.param.u64 %out, [pout];\n"
_OPEN = (
    "@%first mbarrier.init.shared.b64 [bar], 1; @%first fence.mbarrier_init.release.cluster; fence.proxy.async; bar.sync 0;\n"
)
Inputs = Callable[[np.random.Generator], dict[str, np.ndarray]]


def _launch(threads: int, out: int, names: tuple[str, ...] = ("in", "out"), **more: object) -> dict[str, object]:
    buffers = {"out": {"dtype": "uint8", "shape": [out]}}
    return {"grid": [1], "block": [threads], "buffers": buffers, "params": [{"ptr": n} for n in names], **more}


# ldmatrix and stmatrix


def _matrices() -> list[Case]:
    found = []
    for count in (1, 2, 4):
        for trans in ("", ".trans"):
            registers = ", ".join(f"%r{i}" for i in range(count))
            rows = "ld.global.u32 %row, [%at]; shl.b32 %row, %row, 4; mov.u32 %x, room; add.u32 %row, %row, %x;"
            head = (
                _ROOM.format(size=1024)
                + _POINTERS
                + ".reg .b32 %row, %x, %r<4>; .reg .b64 %at; ld.param.u64 %at, [prows]; mad.wide.u32 %at, %t, 4, %at;\n"
                + rows
            )
            place = "mad.wide.u32 %at, %t, 16, %out;"
            store = "".join(f"st.global.b32 [%at+{4 * i}], %r{i};" for i in range(count))
            body = f"{head}{copy_in(1024, 32)} bar.sync 0; ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%row]; {place} {store}"
            found.append(_matrix_case(f"shared/ldmatrix-x{count}{trans}", body, 512))
            load = "mad.wide.u32 %at, %t, 16, %in;" + "".join(f"ld.global.b32 %r{i}, [%at+{4 * i}];" for i in range(count))
            body = f"{head}{fill(1024, 32)} {load} bar.sync 0; stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%row], {{{registers}}}; bar.sync 0; {dump(1024, 32)}"
            found.append(_matrix_case(f"shared/stmatrix-x{count}{trans}", body, 1024))
    return found


def _matrix_case(name: str, body: str, out: int) -> Case:
    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"in": random_bytes(rng, 1024), "rows": rng.permutation(64)[:32].astype(np.uint32)}

    return Case(name, kernel(body, ("pin", "pout", "prows")), _launch(32, out, ("in", "out", "rows")), make)


# cp.async


def _async_copies() -> list[Case]:
    found = []
    copies = {
        "ca-4": (4, "cp.async.ca.shared.global [%to], [%from], 4;"),
        "ca-8": (8, "cp.async.ca.shared.global.L2::128B [%to], [%from], 8;"),
        "ca-16": (16, "cp.async.ca.shared.global [%to], [%from], 16;"),
        "cg-16": (16, "cp.async.cg.shared.global.L2::64B [%to], [%from], 16;"),
        "ca-4-size": (4, "cp.async.ca.shared.global [%to], [%from], 4, %n;"),
        "ca-8-size": (8, "cp.async.ca.shared.global [%to], [%from], 8, %n;"),
        "cg-16-size": (16, "cp.async.cg.shared.global [%to], [%from], 16, %n;"),
        "ca-16-ignore": (16, "cp.async.ca.shared.global [%to], [%from], 16, %odd;"),
        "ca-4-ignore": (4, "cp.async.ca.shared.global [%to], [%from], 4, %odd;"),
    }
    waits = {
        "group": "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;",
        "all": "cp.async.wait_all; bar.sync 0;",
        "noinc": f"cp.async.mbarrier.arrive.noinc.shared.b64 [bar]; {WAIT.format(bar='bar', phase=0)}",
        "inc": f"cp.async.mbarrier.arrive.shared.b64 [bar]; mbarrier.arrive.shared.b64 _, [bar]; {WAIT.format(bar='bar', phase=0)}",
    }
    for n, (name, (size, copy)) in enumerate(copies.items()):
        for wait, code in waits.items() if n < 2 else [list(waits.items())[n % 2]]:
            body = _ROOM.format(size=2048) + _POINTERS + ".reg .b32 %to, %n, %x; .reg .b64 %from; .reg .pred %odd;\n"
            body += "@%first mbarrier.init.shared.b64 [bar], 64;" + fill(2048, 64) + "bar.sync 0;\n"
            body += f"mov.u32 %to, room; mad.lo.u32 %to, %t, {size}, %to; xor.b32 %x, %t, 21; mad.wide.u32 %from, %x, {size}, %in; rem.u32 %n, %t, {size + 1}; and.b32 %x, %t, 2; setp.ne.u32 %odd, %x, 0;\n"
            body += f"{copy} {code} bar.sync 0; {dump(2048, 64)}"
            found.append(Case(f"shared/cp-async-{name}-{wait}", kernel(body, ("pin", "pout")), _launch(64, 2048), _bytes(2048)))
    body = (
        _ROOM.format(size=4096)
        + _POINTERS
        + ".reg .b32 %to, %n; .reg .b64 %from;\n"
        + fill(4096, 64)
        + "bar.sync 0; mov.u32 %to, room; mad.lo.u32 %to, %t, 16, %to; mad.wide.u32 %from, %t, 16, %in;\n"
    )
    body += "".join(
        f"cp.async.cg.shared.global [%to+{k * 1024}], [%from+{k * 1024}], 16; cp.async.commit_group;" for k in range(4)
    )
    body += "cp.async.wait_group 2; ld.shared.b32 %n, [%to]; mad.wide.u32 %from, %t, 4, %out; st.global.b32 [%from+4096], %n;"
    body += f"cp.async.wait_group 0; bar.sync 0; {dump(4096, 64)}"
    found.append(Case("shared/cp-async-groups", kernel(body, ("pin", "pout")), _launch(64, 4096 + 256), _bytes(4096)))
    return found


def _bytes(size: int, **more: int) -> Inputs:
    return lambda rng: {"in": random_bytes(rng, size), **{n: random_bytes(rng, k) for n, k in more.items()}}


# bulk copies

_REDUCTIONS = [
    *(f"{op}.{t}" for op in ("add", "min", "max") for t in ("u32", "s32", "u64")), "min.s64", "max.s64", "inc.u32", "dec.u32",
    *(f"{op}.{t}" for op in ("and", "or", "xor") for t in ("b32", "b64")), "add.f32", "add.f64",
    *(f"{op}.{t}" for op in ("add.noftz", "min", "max") for t in ("f16", "bf16")),
]  # fmt: skip


def _bulk() -> list[Case]:
    found = []
    for size in (16, 48, 1024, 4080):
        load = f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%to], [%in], {size}, [bar];"
        body = (
            _ROOM.format(size=4096)
            + _POINTERS
            + fill(4096, 64)
            + _OPEN
            + ".reg .b32 %to, %x; mov.u32 %to, room; add.u32 %to, %to, 16;\n"
        )
        body += f"@!%first bra WAITING; mbarrier.arrive.expect_tx.shared.b64 _, [bar], {size}; {load} WAITING: {WAIT.format(bar='bar', phase=0)} {dump(4096, 64)}"
        found.append(Case(f"shared/bulk-load-{size}", kernel(body, ("pin", "pout")), _launch(64, 4096), _bytes(4096)))
        for read in ("", ".read"):
            store = f"cp.async.bulk.global.shared::cta.bulk_group [%out], [%to], {size}; cp.async.bulk.commit_group; cp.async.bulk.wait_group{read} 0;"
            body = (
                _ROOM.format(size=4096)
                + _POINTERS
                + copy_in(4096, 64)
                + _OPEN
                + f".reg .b32 %to; mov.u32 %to, room; add.u32 %to, %to, 16; @!%first bra DONE; {store} DONE: bar.sync 0;"
            )
            found.append(
                Case(f"shared/bulk-store{read}-{size}", kernel(body, ("pin", "pout")), _launch(64, 4096), _bytes(4096))
            )
    hints = "cp.async.bulk.prefetch.L2.global [%in], 256; createpolicy.fractional.L2::evict_first.b64 %pol, 1.0; @%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [room], [%in], 256, [bar], %pol; @%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [room+512], [%in+512], 512, [bar];"
    body = (
        _ROOM.format(size=1024)
        + _POINTERS
        + ".reg .b64 %pol;"
        + fill(1024, 64)
        + _OPEN
        + f"@%first mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], 768; {hints} @%first mbarrier.arrive.shared.b64 _, [bar]; {WAIT.format(bar='bar', phase=0)} {dump(1024, 64)}"
    )
    found.append(Case("shared/bulk-load-hints", kernel(body, ("pin", "pout")), _launch(64, 1024), _bytes(1024)))
    return [*found, *map(_bulk_reduction, _REDUCTIONS)]


def _bulk_reduction(word: str) -> Case:
    op = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{word} [%out], [room], 1024; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"
    body = _ROOM.format(size=1024) + _POINTERS + copy_in(1024, 64) + _OPEN + f"@!%first bra DONE; {op} DONE: bar.sync 0;"
    return Case(
        f"shared/bulk-{word}", kernel(body, ("pin", "pout")), _launch(64, 1024), lambda rng: reduction_operands(word, 1024, rng)
    )


def reduction_operands(word: str, size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Bytes to reduce, and what is there before: floats without NaN most of the time, integers near their limits."""
    from emulator.hardware.case import values

    kind = word.rpartition(".")[2]
    kind = kind if "f" in kind else f"i{kind[1:]}"
    width = {"f16": 2, "bf16": 2}.get(kind, int(kind.lstrip("bfi")) // 8)
    a, b = values((kind, kind), size // width, rng)
    return {"in": a.view(np.uint8), "out": b.view(np.uint8)}


# mbarriers


def _script(lines: list[str]) -> str:
    """Statements of thread 0; `emit` of a 32-bit register or `test` of a predicate stores the next result."""
    code = [
        _ROOM.format(size=16)
        + "ld.param.u64 %out, [pout]; .reg .b64 %s<8>; .reg .pred %p; .reg .b32 %d, %n; @!%first bra DONE;"
    ]
    place = 0
    for line in lines:
        what, _, rest = line.partition(" ")
        if what == "count":
            code.append(f"mbarrier.pending_count.b64 %d, {rest}; st.global.b32 [%out+{4 * place}], %d;")
        elif what == "test":
            code.append(f"{rest} selp.u32 %d, 1, 0, %p; st.global.b32 [%out+{4 * place}], %d;")
        else:
            code.append(line)
            continue
        place += 1
    code.append("DONE: bar.sync 0;")
    return kernel("\n".join(code))


def _state(operand: str) -> str:
    return f"test mbarrier.test_wait.shared.b64 %p, [bar], {operand};"


def _parity(value: int, word: str = "test_wait") -> str:
    return f"test mbarrier.{word}.parity.shared.b64 %p, [bar], {value};"


_SCRIPTS: dict[str, list[str]] = {
    "counts": [
        "mbarrier.init.shared.b64 [bar], 5;", "mbarrier.arrive.shared.b64 %s0, [bar];", "count %s0", "mbarrier.arrive.shared.b64 %s1, [bar], 2;",
        "count %s1", "mbarrier.arrive.noComplete.shared.b64 %s2, [bar], 1;", "count %s2", _state("%s2"), _parity(0), _parity(1),
        "mbarrier.arrive.shared.b64 %s3, [bar];", "count %s3", _state("%s3"), _state("%s0"), _parity(0), _parity(1),
        "mbarrier.arrive.shared.b64 %s4, [bar], 5;", "count %s4", _state("%s4"), _parity(0), _parity(1),
    ],
    "phases": [
        "mbarrier.init.shared.b64 [bar], 1;", _parity(0), _parity(1),
        *(line for phase in range(5) for line in (
            "mbarrier.arrive.shared.b64 %s0, [bar];", "count %s0", _state("%s0"), _parity(0), _parity(1), _parity(phase % 2, "try_wait"),
        )),
    ],
    "transactions": [
        "mbarrier.init.shared.b64 [bar], 2;", "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], 48;", "mbarrier.arrive.shared.b64 %s0, [bar];", "count %s0",
        "mbarrier.arrive.expect_tx.shared.b64 %s1, [bar], 16;", "count %s1", _parity(0), _state("%s1"),
        "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], 60;", _parity(0), "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], 4;",
        _parity(0), _state("%s1"), "mbarrier.arrive.shared.b64 %s2, [bar];", "count %s2", "mbarrier.arrive.release.cta.shared::cta.b64 %s3, [bar];", "count %s3", _parity(1),
    ],
    "drops": [
        "mbarrier.init.shared.b64 [bar], 4;", "mbarrier.arrive_drop.shared.b64 %s0, [bar];", "count %s0", "mbarrier.arrive.shared.b64 %s1, [bar], 3;", "count %s1",
        _parity(0), "mbarrier.arrive.shared.b64 %s2, [bar];", "count %s2", "mbarrier.arrive_drop.noComplete.shared.b64 %s3, [bar], 1;", "count %s3", _parity(1),
        "mbarrier.arrive.shared.b64 %s4, [bar];", "count %s4", _parity(1), "mbarrier.arrive_drop.expect_tx.shared.b64 %s5, [bar], 32;", "count %s5",
        "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], 32;", _parity(0), "mbarrier.arrive.shared.b64 %s6, [bar];", "count %s6", _parity(0),
    ],
    "lives": [
        "mbarrier.init.shared.b64 [bar], 1;", "mbarrier.arrive.shared.b64 _, [bar];", _parity(0), "mbarrier.inval.shared.b64 [bar];",
        "mbarrier.init.shared.b64 [bar], 1048575;", _parity(0), "mbarrier.arrive.shared.b64 %s0, [bar], 1048574;", "count %s0", _parity(0),
        "mbarrier.arrive.shared.b64 %s1, [bar];", "count %s1", _parity(0), "mbarrier.arrive.shared.b64 %s2, [bar];", "count %s2",
    ],
}  # fmt: skip


def _barriers() -> list[Case]:
    launch = {"grid": [1], "block": [32], "buffers": {"out": {"dtype": "uint32", "shape": [64]}}, "params": [{"ptr": "out"}]}
    found = [Case(f"shared/mbarrier-{name}", _script(lines), launch, lambda rng: {}) for name, lines in _SCRIPTS.items()]
    # producers and consumers over many phases: each warp adds what the others stored in the phase before
    ring = (
        _ROOM.format(size=1024)
        + """ld.param.u64 %out, [pout]; .reg .b32 %k, %x, %y, %sum, %ph, %to, %from; .reg .pred %p;
@%first mbarrier.init.shared.b64 [bar], 128; mov.u32 %to, room; mad.lo.u32 %to, %t, 4, %to; xor.b32 %from, %t, 65; mov.u32 %x, room; mad.lo.u32 %from, %from, 4, %x; mov.u32 %sum, %t; mov.u32 %k, 0; bar.sync 0;
LOOP: and.b32 %ph, %k, 1; shl.b32 %y, %ph, 9; add.u32 %x, %to, %y; st.shared.b32 [%x], %sum; mbarrier.arrive.shared.b64 _, [bar];
"""
        + WAIT.format(bar="bar", phase="%ph")
        + """ add.u32 %x, %from, %y; ld.shared.b32 %x, [%x]; mad.lo.u32 %sum, %sum, 3, %x; add.u32 %sum, %sum, %ok; add.u32 %k, %k, 1; setp.lt.u32 %p, %k, 12; @%p bra LOOP;
mad.wide.u32 %out, %t, 4, %out; st.global.b32 [%out], %sum;"""
    )
    found.append(
        Case(
            "shared/mbarrier-ring",
            kernel(ring),
            {**launch, "block": [128], "buffers": {"out": {"dtype": "uint32", "shape": [128]}}},
            lambda rng: {},
        )
    )
    return found


def cases() -> list[Case]:
    return [*_matrices(), *_async_copies(), *_bulk(), *_barriers()]
