"""atom and red on global and shared memory, of every type: what they return and what they leave."""

from __future__ import annotations

import numpy as np

from emulator.hardware.case import Case, Form, elementwise, kernel

__all__ = ["cases"]

_INTEGER = {
    **{f"{op}.{t}": t for op in ("min", "max") for t in ("u32", "s32", "u64", "s64")},
    **{f"{op}.{t}": t for op in ("and", "or", "xor") for t in ("b32", "b64")},
    "add.u32": "u32", "add.s32": "s32", "add.u64": "u64", "inc.u32": "u32", "dec.u32": "u32",
}  # fmt: skip
_FLOAT = {"add.f32": "f32", "add.f64": "f64", "add.noftz.f16": "f16", "add.noftz.f16x2": "f16x2", "add.noftz.bf16": "bf16",
          "add.noftz.bf16x2": "bf16x2"}  # fmt: skip
_EXCHANGES = ("b32", "b64")


def _bits(kind: str) -> int:
    return 32 if kind.endswith("x2") else int(kind.lstrip("busf"))


def _operand(kind: str) -> str:
    return kind if "f" in kind else f"i{_bits(kind)}"


def _spot(space: str) -> str:
    return "%ss" if space.startswith("shared") else "%sc"


def _forms() -> list[Form]:
    found = []
    for space in ("global", "shared", ""):
        dot, spot = f".{space}" if space else "", _spot(space)
        store, load = ("st.shared", "ld.shared") if space == "shared" else ("st.global", "ld.global")
        for word, kind in {**_INTEGER, **_FLOAT}.items():
            bits = _bits(kind)
            ins = (_operand(kind),) * 2
            label = f"{space or 'generic'}-{'float' if 'f' in kind else 'integer'}"
            start = f"{store}.b{bits} [{spot}], %a;"
            found.append(Form(label, f"{{ {start} atom{dot}.{word} %d, [{spot}], %b; }}", str(bits), ins))
            found.append(
                Form(label, f"{{ {start} red{dot}.{word} [{spot}], %b; {load}.b{bits} %d, [{spot}]; }}", str(bits), ins)
            )
            both = f"{{ .reg .b{bits} %x; {start} atom{dot}.{word} %x, [{spot}], %b; {load}.b{bits} %d, [{spot}]; xor.b{bits} %d, %d, %x; }}"
            found.append(Form(label, both, str(bits), ins))
        for kind in _EXCHANGES:
            bits = _bits(kind)
            text = f"{{ .reg .b{bits} %x; {store}.b{bits} [{spot}], %a; atom{dot}.exch.{kind} %x, [{spot}], %b; {load}.b{bits} %d, [{spot}]; xor.b{bits} %d, %d, %x; }}"
            found.append(Form(f"{space or 'generic'}-integer", text, str(bits), (f"i{bits}",) * 2))
        for bits in (16, 32, 64):
            # compare with the value itself, and with another
            for compare in ("%a", "%b"):
                text = f"{{ .reg .b{bits} %x; {store}.b{bits} [{spot}], %a; atom{dot}.cas.b{bits} %x, [{spot}], {compare}, %c; {load}.b{bits} %d, [{spot}]; xor.b{bits} %d, %d, %x; }}"
                found.append(Form(f"{space or 'generic'}-cas", text, str(bits), (f"i{bits}",) * 3))
    return found + _wide() + _vectors() + _scopes()


def _wide() -> list[Form]:
    """128-bit exchange and compare-and-swap."""
    found = []
    for space in ("global", "shared"):
        spot = _spot(space)
        head = f"{{ .reg .b128 %p, %q, %r; .reg .b64 %x, %y; mov.b128 %p, {{%a, %b}}; mov.b128 %q, {{%c, %a}}; st.{space}.b128 [{spot}], %p;"
        for op in (
            f"atom.{space}.exch.b128 %r, [{spot}], %q;",
            f"atom.{space}.cas.b128 %r, [{spot}], %p, %q;",
            f"atom.{space}.cas.b128 %r, [{spot}], %q, %p;",
        ):
            tail = f"mov.b128 {{%x, %y}}, %r; xor.b64 %d, %x, %y; ld.{space}.b128 %r, [{spot}]; mov.b128 {{%x, %y}}, %r; shl.b64 %y, %y, 1; xor.b64 %d, %d, %y; xor.b64 %d, %d, %x; }}"
            found.append(Form("wide", f"{head} {op} {tail}", "64", ("i64",) * 3))
    return found


def _vectors() -> list[Form]:
    """atom.global.v2.f32 and packed halves: the sum of what is returned and what is left, as bits."""
    found = []
    for op, kind in (("add", "f32"),):
        for sign in ("atom", "red"):
            old = "{%u, %v}, " if sign == "atom" else ""
            text = f"{{ .reg .b32 %u, %v; mov.b32 %u, 0; mov.b32 %v, 0; st.global.v2.b32 [%sc], {{%a, %b}}; {sign}.global.{op}.v2.{kind} {old}[%sc], {{%b, %c}}; xor.b32 %d, %u, %v; ld.global.v2.b32 {{%u, %v}}, [%sc]; xor.b32 %d, %d, %u; shl.b32 %v, %v, 1; xor.b32 %d, %d, %v; }}"
            found.append(Form("vector", text, "32", (kind,) * 3))
    for op in ("add", "min", "max"):
        for kind in ("f16x2", "bf16x2"):
            text = f"{{ .reg .b32 %u, %v; st.global.v2.b32 [%sc], {{%a, %b}}; atom.global.{op}.noftz.v2.{kind} {{%u, %v}}, [%sc], {{%b, %c}}; xor.b32 %d, %u, %v; ld.global.v2.b32 {{%u, %v}}, [%sc]; xor.b32 %d, %d, %u; shl.b32 %v, %v, 1; xor.b32 %d, %d, %v; }}"
            found.append(Form("vector", text, "32", (kind,) * 3))
        for kind in ("f16", "bf16"):
            text = f"{{ .reg .b16 %u, %v; st.global.v2.b16 [%sc], {{%a, %b}}; red.global.{op}.noftz.v2.{kind} [%sc], {{%b, %c}}; ld.global.b32 %d, [%sc]; }}"
            found.append(Form("vector", text, "32", (kind,) * 3))
    return found


def _scopes() -> list[Form]:
    """Orders and scopes are accepted and change nothing here."""
    texts = [f"{{ st.global.b32 [%sc], %a; atom{order}{scope}.global.add.u32 %d, [%sc], %b; }}"
             for order in ("", ".relaxed", ".acquire", ".release", ".acq_rel") for scope in ("", ".cta", ".cluster", ".gpu", ".sys")]  # fmt: skip
    return [Form("scopes", text, "32", ("i32", "i32")) for text in texts]


def _contended() -> list[Case]:
    """All threads of several CTAs update the same few places: the totals."""
    operations = ("add.u32", "add.u64", "min.s32", "max.u32", "and.b32", "or.b32", "xor.b32", "inc.u32", "add.f32", "max.s64")
    code = [".reg .b32 %i, %x, %f; .reg .b64 %o, %y; ld.param.u64 %o, [pout]; mov.u32 %i, %tid.x; mov.u32 %x, %ctaid.x;"]
    code.append(
        "mad.lo.u32 %i, %x, 96, %i; mul.lo.u32 %x, %i, 0x9E3779B1; cvt.u64.u32 %y, %x; and.b32 %f, %i, 15; cvt.rn.f32.u32 %f, %f;"
    )
    for n, word in enumerate(operations):
        kind = word.partition(".")[2]
        value = (
            "%f" if kind == "f32" else "%y" if kind.endswith("64") else "%x" if kind != "u32" or "inc" not in word else "100"
        )
        code.append(f"red.global.{word} [%o+{8 * n}], {value};")
    code.append(
        ".reg .b32 %r; atom.global.add.u32 %r, [%o+128], 1; and.b32 %r, %r, 7; mad.wide.u32 %o, %r, 4, %o; red.global.add.u32 [%o+136], 1;"
    )
    launch = {"grid": [4], "block": [96], "params": [{"ptr": "out"}]}
    return [Case("atomic/contended", kernel("\n".join(code)), launch, lambda rng: {"out": np.zeros(64, np.uint32)})]


def cases() -> list[Case]:
    return [*elementwise("atomic", _forms(), count=512, memory=True), *_contended()]
