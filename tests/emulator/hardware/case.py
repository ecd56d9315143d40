"""What a hardware case is, and the kernels that apply one instruction to many operand values.

A case is a kernel, its launch in the format of docs/emulator.md, and inputs that depend on its name alone. Buffers that are not
among the inputs start as bytes 0xD7, on the GPU as in the emulator.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

__all__ = ["WAIT", "Case", "Form", "copy_in", "dump", "elementwise", "fill", "forms", "kernel", "random_bytes", "values"]

HEAD = """.version 8.6
.target sm_90a
.address_size 64
"""
COUNT = 1024  # operand tuples of an elementwise kernel
THREADS = 256


@dataclass(frozen=True)
class Case:
    """One kernel. make: inputs from a generator; outputs: buffers that are compared, rows of theirs named by `rows`.

    compare: "bits", "matrix" (within the bound of accumulation), "approximate" (within the documented error), "refused" (an
    illegal instruction, and a hazard here), or "probe" (recorded only: what hardware does is not modelled). full: keep every output byte in the recording, not its digest alone.
    """

    name: str
    ptx: str
    launch: dict[str, Any]
    make: Callable[[np.random.Generator], dict[str, np.ndarray]]
    outputs: tuple[str, ...] = ("out",)
    rows: tuple[str, ...] = ()
    compare: str = "bits"
    full: bool = False
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return self.make(np.random.default_rng(zlib.crc32(self.name.encode())))


# operand values

_F32 = [
    0x00000000, 0x00000001, 0x00000002, 0x00400000, 0x007FFFFF, 0x00800000, 0x00800001, 0x00FFFFFF, 0x33800000, 0x34000000,
    0x3EAAAAAB, 0x3F000000, 0x3F000001, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3FC00000, 0x40000000, 0x40200000, 0x40490FDB,
    0x43800000, 0x4B000001, 0x4B800000, 0x4F000000, 0x477FE000, 0x7E800000, 0x7F000000, 0x7F7FFFFF, 0x7F800000, 0x7F800001,
    0x7FC00000, 0x7FFFFFFF, 0x7FC12345,
]  # fmt: skip
_F64 = [
    0x0, 0x1, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x0010000000000001, 0x3690000000000000, 0x36A0000000000000, 0x3800000000000000,
    0x3810000000000000, 0x380FFFFFFFFFFFFF, 0x3CA0000000000000, 0x3CB0000000000000, 0x3FD5555555555555, 0x3FE0000000000000,
    0x3FEFFFFFFFFFFFFF, 0x3FF0000000000000, 0x3FF0000000000001, 0x3FF0000010000000, 0x3FF0000030000000, 0x3FF8000000000000,
    0x4000000000000000, 0x4004000000000000, 0x4330000000000001, 0x41DFFFFFFFC00000, 0x41E0000000000000, 0x43E0000000000000,
    0x47EFFFFFE0000000, 0x47EFFFFFF0000000, 0x7FE0000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0x7FF0000000000001,
    0x7FF8000000000000, 0x7FFFFFFFFFFFFFFF, 0x7FF8000012345678,
]  # fmt: skip
_F16 = [0x0000, 0x0001, 0x0002, 0x03FF, 0x0400, 0x0401, 0x1400, 0x1000, 0x3555, 0x3800, 0x3801, 0x3BFF, 0x3C00, 0x3C01, 0x3E00,
        0x4000, 0x4100, 0x4248, 0x5C00, 0x6400, 0x6401, 0x7800, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7FFF, 0x7E12]  # fmt: skip
_BF16 = [0x0000, 0x0001, 0x0002, 0x007F, 0x0080, 0x0081, 0x3B00, 0x3EAB, 0x3F00, 0x3F7F, 0x3F80, 0x3F81, 0x3FC0, 0x4000, 0x4020,
         0x4049, 0x4380, 0x4B00, 0x7E80, 0x7F00, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF, 0x7FC5]  # fmt: skip


def _integer_edges(bits: int) -> list[int]:
    top = 1 << bits
    near = [top // 2 + d for d in (-2, -1, 0, 1)] + [top + d for d in (-3, -2, -1)]
    powers = [top >> 4, (top >> 4) - 1, top >> (bits // 2), (top >> (bits // 2)) - 1]
    return [0, 1, 2, 3, 5, 7, 8, 31, 32, 33, 255, *powers, top // 3, 2 * (top // 3), *near]


def _float_edges(kind: str) -> list[int]:
    table = {"f32": _F32, "f64": _F64, "f16": _F16, "bf16": _BF16, "e4m3": [], "e5m2": []}[kind]
    sign = 1 << (width(kind) - 1)
    return [v ^ s for v in table for s in (0, sign)]


def width(kind: str) -> int:
    """Bits of a value kind: of its register."""
    if kind in ("c32", "n32", "p", "f32", "i32") or kind.endswith("x2"):
        return 32
    return {"bf16": 16, "f16": 16, "i16": 16, "n16": 16, "i8": 16, "b16": 16}.get(kind, 64)


def _random(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random bit patterns; of floats, half have moderate exponents."""
    raw = rng.integers(0, 1 << 64, count, dtype=np.uint64)
    if kind in ("f32", "f64", "f16", "bf16"):
        bits, mantissa, bias = {"f32": (32, 23, 127), "f64": (64, 52, 1023), "f16": (16, 10, 15), "bf16": (16, 7, 127)}[kind]
        spread = 4 if kind == "f16" else 20
        exponent = rng.integers(bias - spread, bias + spread, count).astype(np.uint64) << np.uint64(mantissa)
        low = raw & np.uint64((1 << mantissa) - 1)
        moderate = low | exponent | (raw >> np.uint64(63)) << np.uint64(bits - 1)
        return np.where(rng.random(count) < 0.5, moderate, raw & np.uint64((1 << bits) - 1))
    return raw & np.uint64((1 << width(kind)) - 1) if width(kind) < 64 else raw


def _edges(kind: str) -> np.ndarray:
    if kind in ("c32",):
        found = [*range(36), 47, 48, 63, 64, 65, 127, 128, 255, 256, 257, 0x1F00, 0x2001, 0x80000000, 0xFFFFFFFF]
    elif kind.lstrip("bf").isdigit() and kind[0] in "bf" and kind != "b16":
        found = _float_edges(kind)
    else:
        found = _integer_edges(width(kind))
    return np.array(found, dtype=np.uint64)


def values(kinds: Sequence[str], count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Operand tuples as unsigned integers of the registers' widths: pairs of edge values, then mixtures, then random bits.

    Kinds: i16 i32 i64; n16 n32 n64 are never zero; c32 counts; f16 bf16 f32 f64; f16x2 bf16x2 pairs; p 0 or 1.
    """
    found = []
    for place, kind in enumerate(kinds):
        if kind == "p":
            found.append(rng.integers(0, 2, count, dtype=np.uint64))
            continue
        if kind.endswith("16x2"):
            low, high = (_column(kind[:-2], 3 * place + k, count, rng) for k in range(2))
            found.append(low | high << np.uint64(16))
            continue
        column = _column("i" + kind[1:] if kind[0] == "n" else kind, place, count, rng)
        found.append(np.where(column == 0, np.uint64(7), column) if kind[0] == "n" else column)
    if len(kinds) == 3 and kinds[0] == kinds[1] == kinds[2] and kinds[0] in ("f32", "f64"):
        _cancel(found, kinds[0], rng)
    return [column.astype(f"u{width(kind) // 8}") for kind, column in zip(kinds, found)]


def _column(kind: str, place: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """The first operand cycles through the edges slowly, the second fast, so that they meet in pairs; a third is drawn."""
    edges = _edges(kind)
    index = np.arange(count)
    if place == 0:
        chosen = edges[index % edges.size]
    elif place == 1:
        chosen = edges[(index // edges.size + index) % edges.size]
    else:
        chosen = rng.choice(edges, count)
    random = _random(kind, count, rng)
    return np.where(rng.random(count) < 0.6, chosen, random)


def _cancel(found: list[np.ndarray], kind: str, rng: np.random.Generator) -> None:
    """A quarter of the third operands nearly cancel the product of the first two."""
    real, unsigned = (np.float32, np.uint32) if kind == "f32" else (np.float64, np.uint64)
    a, b = (column.astype(unsigned).view(real) for column in found[:2])
    with np.errstate(all="ignore"):
        product = (-(a * b)).view(unsigned).astype(np.uint64)
    chosen = (rng.random(product.size) < 0.25) & np.isfinite(product.astype(unsigned).view(real))
    found[2] = np.where(chosen, product ^ rng.integers(0, 2, product.size, dtype=np.uint64), found[2])


# elementwise kernels


@dataclass(frozen=True)
class Form:
    """An instruction on operands %a, %b, %c, %e with its result in %d, or a statement list if it ends in a semicolon.

    out: bits of the result, or "p" for a predicate; ins: kinds of the operands; label: forms of one label share kernels.
    """

    label: str
    text: str
    out: str
    ins: tuple[str, ...]
    extra: Any = None

    @property
    def code(self) -> str:
        if self.text.endswith((";", "}")):
            return self.text
        names = ["%d", *("%a", "%b", "%c", "%e")[: len(self.ins)]]
        return f"{self.text} {', '.join(names)};"


def forms(label: str, texts: str | Iterable[str], out: str, ins: str) -> list[Form]:
    """Forms of one signature, from a list of instructions separated by blanks."""
    split = texts.split() if isinstance(texts, str) else texts
    return [Form(label, text, out, tuple(ins.split())) for text in split]


_SLOTS = ".shared .align 16 .b8 slots[4096]; .reg .b64 %sc; .reg .b32 %ss;"


def elementwise(
    family: str, table: Iterable[Form], count: int = COUNT, compare: str = "bits", memory: bool = False
) -> list[Case]:
    """One case for each label and signature. memory: %sc and %ss address 16 bytes of each thread, in global and shared memory."""
    groups: dict[Any, list[Form]] = {}
    for form in table:
        groups.setdefault((form.label, form.out, form.ins), []).append(form)
    labels = [label for label, _, _ in groups]
    cases = []
    for (label, out, ins), members in groups.items():
        name = f"{family}/{label}" if labels.count(label) == 1 else f"{family}/{label}-{'-'.join(ins)}-{out}"
        cases.append(_elementwise(name, out, ins, members, count, compare, memory))
    return cases


def _elementwise(name: str, out: str, ins: tuple[str, ...], members: list[Form], count: int, compare: str,
                 memory: bool) -> Case:  # fmt: skip
    bits = 32 if out == "p" else int(out)
    names = "abce"[: len(ins)]
    code = [".reg .b32 %i, %ct; .reg .b64 %at, %to;", "mov.u32 %i, %tid.x; mov.u32 %ct, %ctaid.x;"]
    code.append(f"mad.lo.u32 %i, %ct, {THREADS}, %i;")
    for letter, kind in zip(names, ins):
        size = width(kind)
        register = f"%{letter}" if kind != "p" else f"%{letter}_"
        code.append(f".reg .b{size} {register}; ld.param.u64 %at, [p{letter}]; mad.wide.u32 %at, %i, {size // 8}, %at;")
        code.append(f"ld.global.b{size} {register}, [%at];")
        if kind == "p":
            code.append(f".reg .pred %{letter}; setp.ne.b32 %{letter}, {register}, 0;")
    code.append(f"ld.param.u64 %to, [pout]; mad.wide.u32 %to, %i, {bits // 8}, %to;")
    if memory:
        code.append(f"{_SLOTS} ld.param.u64 %sc, [pscratch]; mad.wide.u32 %sc, %i, 16, %sc;")
        code.append("mov.u32 %ss, slots; mov.u32 %ct, %tid.x; mad.lo.u32 %ss, %ct, 16, %ss;")
    for number, form in enumerate(members):
        if out == "p":
            head, tail, result = ".reg .pred %d; .reg .b32 %d_;", "selp.b32 %d_, 1, 0, %d;", "%d_"
        else:
            head, tail, result = f".reg .b{bits} %d;", "", "%d"
        code.append(f"{{ {head} {form.code} {tail} st.global.b{bits} [%to+{number * count * bits // 8}], {result}; }}")
    params = [*(f"p{n}" for n in names), "pout"]
    launch = {
        "grid": [count // min(count, THREADS)],
        "block": [min(count, THREADS)],
        "buffers": {"out": {"dtype": f"uint{bits}", "shape": [len(members), count]}},
        "params": [*({"ptr": n} for n in names), {"ptr": "out"}],
    }

    if memory:
        params.append("pscratch")
        launch["buffers"]["scratch"] = {"dtype": "uint8", "shape": [16 * count]}
        launch["params"].append({"ptr": "scratch"})

    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return dict(zip(names, values(ins, count, rng)))

    extra = {"forms": members}
    ptx = kernel("\n".join(code), params)
    rows = tuple(f.text for f in members)
    return Case(name, ptx, launch, make, rows=rows, compare=compare, full=compare != "bits", extra=extra)


# other kernels: %t is the thread, room the shared memory they work on


def fill(size: int, threads: int) -> str:
    """Shared memory `room` filled with a pattern that tells places apart."""
    return _loop("st.shared.v4.b32 [%lr], {%li, %lr, %li, 0xA5A5A5A5};", "", size, threads)


def copy_in(size: int, threads: int, pointer: str = "pin") -> str:
    """Bytes of a buffer into room."""
    return _loop(
        "ld.global.v4.b32 {%l0, %l1, %l2, %l3}, [%lg]; st.shared.v4.b32 [%lr], {%l0, %l1, %l2, %l3};", pointer, size, threads
    )


def dump(size: int, threads: int, pointer: str = "pout", offset: str = "0") -> str:
    """Bytes of room into a buffer, from byte `offset` (a register or a number) on."""
    text = "ld.shared.v4.b32 {%l0, %l1, %l2, %l3}, [%lr]; st.global.v4.b32 [%lg], {%l0, %l1, %l2, %l3};"
    return _loop(text, pointer, size, threads, offset)


def _loop(step: str, pointer: str, size: int, threads: int, offset: str = "0") -> str:
    """A step for every 16 bytes: %li its offset, %lr its place in room, %lg in the buffer."""
    where = f"ld.param.u64 %lb, [{pointer}]; add.u64 %lb, %lb, {offset};" if pointer else "mov.u64 %lb, 0;"
    return f"""{{ .reg .b32 %li, %lr, %ls, %l<4>; .reg .b64 %lb, %lg; .reg .pred %lp; mov.u32 %ls, room; {where}
mov.u32 %li, %tid.x; shl.b32 %li, %li, 4;
LL: setp.ge.u32 %lp, %li, {size}; @%lp bra LE; add.u32 %lr, %li, %ls; cvt.u64.u32 %lg, %li; add.u64 %lg, %lg, %lb;
{step} add.u32 %li, %li, {16 * threads}; bra LL; LE: }}"""


def kernel(
    body: str, pointers: Sequence[str] = ("pout",), *, maps: Sequence[str] = (), top: str = "", directives: str = ""
) -> str:
    """A module with one kernel k, its parameters pointers and then tensor maps."""
    params = [f".param .u64 {p}" for p in pointers] + [f".param .align 64 .b8 {m}[128]" for m in maps]
    return f"{HEAD}{top}\n.visible .entry k({', '.join(params)})\n{directives}\n{{\n{body}\n}}\n"


# waits for a phase of an mbarrier without hanging for ever: %ok is 1 if it completed
WAIT = """{{ .reg .pred %wp; .reg .b32 %wn; mov.u32 %wn, 0; mov.u32 %ok, 1;
WL: mbarrier.try_wait.parity.shared::cta.b64 %wp, [{bar}], {phase}, 2000; @%wp bra WD;
add.u32 %wn, %wn, 1; setp.lt.u32 %wp, %wn, 2000; @%wp bra WL; mov.u32 %ok, 0; WD: }}"""


def random_bytes(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(0, 256, size, dtype=np.uint8)
