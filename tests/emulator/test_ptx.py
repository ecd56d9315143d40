"""The PTX front end: what it reads, what it refuses and how, and that nothing makes it crash."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emulator.runner import HEAD, module
from glu4.emulator.errors import PtxError
from glu4.emulator.launch import load
from glu4.emulator.ptx import parse
from glu4.emulator.ptx.module import Address, Immediate, Label, Pair, Symbol, Vector

CORPUS = sorted((Path(__file__).parent / "kernels" / "ptx").glob("*.ptx")) + sorted(
    (Path(__file__).parent / "sources").glob("*.ptx")
)

TEXT = """
// a comment
.version 9.1
.target sm_100a, debug
.address_size 64
.file 1 "dir/kernel.py", 123, 456
.extern .shared .align 1024 .b8 pool[];
.visible .global .align 8 .u32 table[2][3] = {{1, 2, 3}, {0x10, 010, 0b11}};
.const .f32 half = 0.5;
.global .u64 where[2] = {generic(table)+4, table};
.func (.param .b32 out) twice (.param .b32 in)
{
  .reg .b32 %r<2>;
  ld.param.b32 %r0, [in];
  add.u32 %r1, %r0, %r0;
  st.param.b32 [out], %r1;
  ret;
}
.visible .entry k(.param .u64 .ptr .global .align 16 p, .param .align 64 .b8 map[128])
.reqntid 64, 1, 1
.minnctapersm 2
.reqnctapercluster 2, 1, 1
.pragma "nounroll";
{
  .reg .pred %p<3>; .reg .b32 %r<8>, %x; .reg .b64 %rd<4>; .reg .f32 %f1;
  .shared .align 16 .b8 mine[32];
  .loc 1 10 5
  ld.param.u64 %rd1, [p];
  /* many
     lines */
  mov.b32 %r1, (1 << 4) | 3;
  mov.f32 %f1, 0f3F800000;
  mov.u64 %rd2, mine+8;
Top:
  @!%p1 bra Done;
  .loc 1 11 1, function_name $name, inlined_at 1 3 2
  ld.shared.v2.b32 {%r2, %r3}, [mine+16];
  ld.shared.b32 %r4, [%r2+-4];
  setp.lt.and.s32 %p1|%p2, %r1, -5, !%p0;
  { .reg .pred %p1; Top: setp.eq.u32 %p1, %x, 1; @%p1 bra Top; }
  { .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call.uni (b), twice, (a); ld.param.b32 %r5, [b]; }
  cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd3, {%r2, %r3}], [%r4];
  bra.uni Top;
Done:
  ret;
}
.section .debug_str { .b8 1, 2 $x: .b8 3 }
"""


def test_reading() -> None:
    m = parse(TEXT)
    assert m.version == (9, 1)
    assert m.target == ("sm_100a", "debug")
    assert m.variables["table"].data == b"".join(n.to_bytes(4, "little") for n in (1, 2, 3, 16, 8, 3))
    assert m.variables["half"].data == b"\0\0\0\x3f"
    assert m.variables["where"].relocations == ((0, "table", 4, True), (8, "table", 0, False))
    assert m.variables["pool"].count == 0
    k = m.entry("k")
    assert k.directives == {"reqntid": (64, 1, 1), "minnctapersm": (2,), "reqnctapercluster": (2, 1, 1)}
    assert [(p.name, p.size, p.align) for p in k.params] == [("p", 8, 8), ("map", 128, 64)]
    code = {i.name: i for i in k.instructions}
    assert code["mov.b32"].operands[1] == Immediate("int", 19)
    assert code["mov.f32"].operands[1] == Immediate("f32", 0x3F800000)
    address = code["mov.u64"].operands[1]
    assert isinstance(address, Symbol)
    assert (address.name, address.offset) == ("mine", 8)
    assert code["ld.shared.b32"].operands[1].offset == -4  # type: ignore[union-attr]
    assert str(code["ld.param.u64"].loc) == "dir/kernel.py:10"
    assert str(code["ld.shared.b32"].loc) == "dir/kernel.py:11"
    assert isinstance(code["setp.lt.and.s32"].operands[0], Pair)
    tensor = next(i for i in k.instructions if i.opcode == "cp")
    assert isinstance(tensor.operands[1], Address)
    assert isinstance(tensor.operands[1].rest[0], Vector)


def test_scopes_hide_registers_and_labels() -> None:
    k = parse(TEXT).entry()
    inner = next(i for i in k.instructions if i.name == "setp.eq.u32")
    outer = next(i for i in k.instructions if i.name == "setp.lt.and.s32")
    assert inner.operands[0].index != outer.operands[0].first.index  # type: ignore[union-attr]
    labels = [i.operands[0] for i in k.instructions if i.opcode == "bra"]
    assert all(isinstance(label, Label) for label in labels)
    assert [label.target for label in labels] == [len(k.instructions) - 1, k.instructions.index(inner), 4]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no .version"),
        (".version 7.8", r"PTX line 1: .version: expected 8.0 to 9.5, found 7.8"),
        (".version 9.6", "expected 8.0 to 9.5"),
        (".version 8.0\n.address_size 32", "only 64 is modelled"),
        (".version 8.0\n.texref t;", r"line 2: unknown directive '.texref'"),
        (".version 8.0\n$", r"line 2: unexpected '\$'"),
        (module("add.u32 %x, %x, %x;"), r"%x is not a declared register"),
        (module("", declarations=".reg .v4 .f32 %v;"), "vector registers"),
        (module("mov.u64 %f, f;", declarations=".reg .b64 %f;", top=".func f() { ret; }"), "line 9: f is a function, and only direct calls"),
        (module("p: .callprototype _ (); call %f, p;", declarations=".reg .b64 %f;"), "only direct calls are modelled"),
        (module(".reg .b32 %a; .reg .b32 %a;"), "%a is declared twice"),
        (module("L: L: ret;"), "label L is defined twice"),
        (module("bra Nowhere;"), "Nowhere is not declared"),
        (module("call.uni nothing;"), "nothing is not declared"),
        (module("{ ret;"), "never closed"),
        (module(".reg .b32 %a; mov.b32 %a, 1/0;"), "division by zero"),
        (module("frobnicate.b32 %a;", declarations=".reg .b32 %a;"), r"line 9: instruction frobnicate.b32 is not modelled"),
        (module("tex.2d.v4.f32.s32 {%a,%a,%a,%a}, [t, {%a,%a}];", declarations=".reg .b32 %a;"), "tex.2d.v4.f32.s32 is not modelled"),
        (module("mov.b64 %a, 1;", declarations=".reg .b32 %a;"), "register %a is .b32, expected 64 bits"),
        (module("add.u32 %a, %a;", declarations=".reg .b32 %a;"), "expected 3 operands, found 2"),
        (module("st.const.b32 [0], %a;", declarations=".reg .b32 %a;"), "cannot be stored to"),
        (module("mov.u32 %a, %nothing;", declarations=".reg .b32 %a;"), "special register %nothing"),
    ],
)  # fmt: skip
def test_refusals_name_the_line(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        load(text)


def test_every_kernel_of_the_corpus_loads() -> None:
    assert CORPUS
    for path in CORPUS:
        assert load(path.read_text()).module.entry().instructions


def refused_or_loaded(text: str) -> None:
    try:
        load(text)
    except PtxError as error:
        assert str(error)


WORDS = re.compile(r"\S+|\s+")
SMALL = (TEXT, module("add.u32 %r1, %r1, 7; @%p bra L; L: ld.global.v4.b32 {%r1,%r1,%r1,%r1}, [%d+16]; bar.sync 0; ret;",
                      declarations=".reg .b32 %r1; .reg .pred %p; .reg .b64 %d;"))  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_text_is_refused_in_order(data: st.DataObject) -> None:
    """Words deleted, doubled, exchanged and replaced."""
    words = WORDS.findall(data.draw(st.sampled_from(SMALL)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(words) - 1))
        other = data.draw(st.integers(0, len(words) - 1))
        change = data.draw(st.integers(0, 4))
        if change == 0:
            words[at] = ""
        elif change == 1:
            words[at] = words[other]
        elif change == 2:
            words.insert(at, words[other])
        elif change == 3:
            words[at] = words[at][: len(words[at]) // 2]
        else:
            words[at] = data.draw(st.text('{}[]().,;:@!|+-<>%_$abrtu0123456789 \n"', max_size=8))
    refused_or_loaded("".join(words))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CORPUS), st.data())
def test_real_kernels_with_lost_or_changed_lines(path: Path, data: st.DataObject) -> None:
    lines = path.read_text().splitlines()[:400]
    for _ in range(3):
        at = data.draw(st.integers(0, len(lines) - 1))
        cut = data.draw(st.integers(0, 20))
        lines[at] = data.draw(st.sampled_from(("", lines[at][:cut], lines[at][cut:], lines[at] * 2)))
    refused_or_loaded("\n".join(lines))


@pytest.mark.parametrize("text", ["{" * 5000, "(" * 5000, "mov.b32 %a, " + "(" * 5000, "mov.b32 %a, " + "-" * 5000 + "1;",
                                  ".reg .b32 %a<999999999>;", ".shared .b8 x[99999999999];", ".shared .b32 y[4] = {1,2,3,4,5};"])  # fmt: skip
def test_deep_and_large_texts_are_refused(text: str) -> None:
    with pytest.raises(PtxError):
        load(f"{HEAD}.visible .entry k() {{ {text} }}")
