"""Integer arithmetic, logic, shifts and bit fields."""

from __future__ import annotations

from emulator.hardware.case import Case, Form, elementwise, forms

__all__ = ["cases"]


def _arithmetic() -> list[Form]:
    found: list[Form] = []
    for bits in ("16", "32", "64"):
        two, three = f"i{bits} i{bits}", f"i{bits} i{bits} i{bits}"
        for t in (f"u{bits}", f"s{bits}"):
            found += forms("add", f"add.{t} sub.{t}", bits, two)
            found += forms("mul", f"mul.lo.{t} mul.hi.{t}", bits, two)
            found += forms("extreme", f"min.{t} max.{t}", bits, two)
            found += forms("divide", f"div.{t} rem.{t}", bits, f"i{bits} n{bits}")
            found += forms("mad", f"mad.lo.{t} mad.hi.{t}", bits, three)
            found += forms("sad", f"sad.{t}", bits, three)
            if bits != "64":
                wide = str(2 * int(bits))
                found += forms("mul-wide", f"mul.wide.{t}", wide, two)
                found += forms("mad-wide", f"mad.wide.{t}", wide, f"{two} i{wide}")
        found += forms("sign", f"abs.s{bits} neg.s{bits}", bits, f"i{bits}")
    found += forms("add", "add.sat.s32 sub.sat.s32", "32", "i32 i32")
    found += forms("mad", "mad.hi.sat.s32", "32", "i32 i32 i32")
    found += forms("mul24", "mul24.lo.u32 mul24.hi.u32 mul24.lo.s32 mul24.hi.s32", "32", "i32 i32")
    found += forms("mad24", "mad24.lo.u32 mad24.hi.u32 mad24.lo.s32 mad24.hi.s32 mad24.hi.sat.s32", "32", "i32 i32 i32")
    pairs = "add.u16x2 add.s16x2 min.u16x2 max.u16x2 min.s16x2 max.s16x2 min.relu.s16x2 max.relu.s16x2"
    found += forms("packed", f"{pairs} min.relu.s32 max.relu.s32", "32", "i32 i32")
    dots = [f"dp4a.{a}.{b}" for a in ("u32", "s32") for b in ("u32", "s32")]
    dots += [f"dp2a.{part}.{a}.{b}" for part in ("lo", "hi") for a in ("u32", "s32") for b in ("u32", "s32")]
    return found + forms("dot", dots, "32", "i32 i32 i32")


def _carries() -> list[Form]:
    """Two-word sums and products, whose carry goes through CC.CF."""
    found = []
    for bits in ("32", "64"):
        u = f"u{bits}"
        four = (f"i{bits}",) * 4
        for name, text in (
            ("add-high", f"add.cc.{u} %x, %a, %b; addc.{u} %d, %c, %e;"),
            ("add-three", f"add.cc.{u} %x, %a, %b; addc.cc.{u} %x, %c, %e; addc.{u} %d, %a, %c;"),
            ("sub-high", f"sub.cc.{u} %x, %a, %b; subc.{u} %d, %c, %e;"),
            ("sub-three", f"sub.cc.{u} %x, %a, %b; subc.cc.{u} %x, %c, %e; subc.{u} %d, %a, %c;"),
            ("mad-low", f"mad.lo.cc.{u} %x, %a, %b, %c; addc.{u} %d, %e, 0;"),
            ("mad-high", f"mad.hi.cc.{u} %x, %a, %b, %c; addc.{u} %d, %e, 0;"),
            ("madc-low", f"add.cc.{u} %x, %a, %b; madc.lo.{u} %d, %a, %c, %e;"),
            ("madc-high", f"add.cc.{u} %x, %a, %b; madc.hi.{u} %d, %a, %c, %e;"),
            ("madc-chain", f"add.cc.{u} %x, %a, %b; madc.lo.cc.{u} %x, %a, %c, %e; madc.hi.{u} %d, %a, %c, 0;"),
            ("signed-chain", f"mad.lo.cc.s{bits} %x, %a, %b, %c; madc.hi.s{bits} %d, %a, %b, %e;"),
        ):
            found.append(Form(f"carry{bits}", f"{{ .reg .b{bits} %x; {text} }}", bits, four, name))
    return found


def _bits() -> list[Form]:
    found: list[Form] = []
    for bits in ("16", "32", "64"):
        found += forms("logic", [f"{op}.b{bits}" for op in ("and", "or", "xor")], bits, f"i{bits} i{bits}")
        found += forms("not", f"not.b{bits} cnot.b{bits}", bits, f"i{bits}")
        shifts = [f"shl.b{bits}", f"shr.b{bits}", f"shr.u{bits}", f"shr.s{bits}"]
        found += forms("shift", shifts, bits, f"i{bits} c32")
    for bits in ("32", "64"):
        found += forms("count", f"popc.b{bits} clz.b{bits}", "32", f"i{bits}")
        found += forms("find", [f"bfind{s}.{t}{bits}" for s in ("", ".shiftamt") for t in "us"], "32", f"i{bits}")
        found += forms("reverse", f"brev.b{bits}", bits, f"i{bits}")
        found += forms("extract", f"bfe.u{bits} bfe.s{bits}", bits, f"i{bits} c32 c32")
        found += forms("insert", f"bfi.b{bits}", bits, f"i{bits} i{bits} c32 c32")
    found += forms("funnel", [f"shf.{d}.{m}.b32" for d in "lr" for m in ("wrap", "clamp")], "32", "i32 i32 c32")
    modes = ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16")
    found += forms("permute", [f"prmt.b32{m}" for m in modes], "32", "i32 i32 i32")
    tables = (0x00, 0x01, 0x17, 0x2D, 0x6A, 0x80, 0x96, 0xC0, 0xCA, 0xE8, 0xEA, 0xF8, 0xFE, 0xFF)
    found += forms("lop3", [f"lop3.b32 %d, %a, %b, %c, {table:#x};" for table in tables], "32", "i32 i32 i32")
    found += [
        Form("lop3-bool", f"{{ .reg .b32 %x; .reg .pred %q; setp.lt.s32 %q, %a, %b; lop3.{op}.b32 %x|%d, %a, %b, %c, {t:#x}, %q; }}",
             "p", ("i32", "i32", "i32"))
        for op in ("or", "and") for t in (0x80, 0x96, 0x2D)
    ]  # fmt: skip
    found += forms("extend", [f"szext.{m}.{t}" for m in ("clamp", "wrap") for t in ("u32", "s32")], "32", "i32 c32")
    found += forms("mask", "bmsk.clamp.b32 bmsk.wrap.b32", "32", "c32 c32")
    return found


def _select() -> list[Form]:
    found: list[Form] = []
    for bits in ("16", "32", "64"):
        found += forms("selp", f"selp.b{bits}", bits, f"i{bits} i{bits} p")
        found += forms("slct", f"slct.b{bits}.s32", bits, f"i{bits} i{bits} i32")
        found += forms("slct", f"slct.b{bits}.f32 slct.ftz.b{bits}.f32", bits, f"i{bits} i{bits} f32")
    packs = [
        "{ .reg .b16 %x, %y; mov.b32 {%x, %y}, %a; mov.b32 %d, {%y, %x}; }",
        "{ .reg .b16 %x, %y; cvt.u16.u32 %x, %a; cvt.u16.u32 %y, %b; mov.b32 %d, {%x, %y}; }",
        "{ .reg .b64 %x; .reg .b32 %y; mov.b64 %x, {%a, %b}; shr.u64 %x, %x, 7; mov.b64 {%d, %y}, %x; }",
        "{ .reg .b64 %x, %y; .reg .b128 %q; cvt.u64.u32 %x, %a; cvt.s64.s32 %y, %b; mov.b128 %q, {%x, %y}; "
        "mov.b128 {%x, %y}, %q; shr.u64 %y, %y, 13; cvt.u32.u64 %d, %y; }",
    ]
    return found + forms("pack", packs, "32", "i32 i32")


def _find_nth() -> list[Form]:
    """fns with offsets of a few bits either way; base 0 to 31."""
    texts = [f"{{ .reg .b32 %x; and.b32 %x, %b, 31; fns.b32 %d, %a, %x, {offset}; }}" for offset in (-3, -1, 0, 1, 2, 5)]
    return forms("fns", texts, "32", "i32 i32")


def cases() -> list[Case]:
    return elementwise("integer", [*_arithmetic(), *_carries(), *_bits(), *_select(), *_find_nth()])
