"""What the lanes of a warp do together: shfl, vote, match, redux, elect, activemask, movmatrix."""

from __future__ import annotations

from emulator.hardware.case import Case, Form, elementwise, forms

__all__ = ["cases"]

_MASKS = (0xFFFFFFFF, 0x0F0F0F0F, 0x80000001, 0x00FFFF00)


def _member(mask: int, text: str, out: str = "b32") -> str:
    """A statement for the lanes of a member mask alone; the others keep their operand."""
    set_up = f"mov.u32 %l, %laneid; shr.u32 %l, {mask:#x}, %l; and.b32 %l, %l, 1; setp.ne.u32 %m, %l, 0;"
    return f"{{ .reg .b32 %l; .reg .pred %m, %q; {set_up} mov.{out} %d, 0; {text} }}"


def _shuffles() -> list[Form]:
    found = []
    for mode in ("up", "down", "bfly", "idx"):
        for limit in (0x00, 0x1F, 0x07, 0x1800, 0x181F, 0x101F, 0x1C03, 0x1E1F, 0x0F1F):
            text = f"{{ .reg .b32 %x, %y; .reg .pred %q; shfl.sync.{mode}.b32 %x|%q, %a, %b, {limit:#x}, -1; selp.u32 %y, 1, 0, %q; mov.b64 %d, {{%x, %y}}; }}"
            found.append(Form("shfl", text, "64", ("i32", "c32")))
    # per-lane limits, and members that are part of the warp and read each other only
    for mode in ("up", "down", "bfly", "idx"):
        text = f"{{ .reg .b32 %x; and.b32 %x, %b, 0x1f1f; shfl.sync.{mode}.b32 %d, %a, 3, %x, -1; }}"
        found.append(Form("shfl-limits", text, "32", ("i32", "i32")))
    text = "@%m shfl.sync.idx.b32 %d, %a, %l, 0x1f, 0x80000001; sub.u32 %l, 1, %l;"
    found.append(Form("shfl-limits", _member(0x80000001, text.replace("%l,", "0,", 1)), "32", ("i32", "i32")))
    found.append(
        Form("shfl-limits", _member(0x0F0F0F0F, "@%m shfl.sync.bfly.b32 %d, %a, 3, 0x1f, 0x0F0F0F0F;"), "32", ("i32", "i32"))
    )
    return found


def _votes() -> list[Form]:
    found = []
    for members in _MASKS:
        for low in (0, 1, 0xF, 0xFF, 0xFFFFFFFF):
            test = f".reg .b32 %x; and.b32 %x, %a, {low:#x}; setp.eq.u32 %q, %x, 0;"
            for mode in ("all", "any", "uni"):
                text = f"{test} @%m vote.sync.{mode}.pred %q, %q, {members:#x}; @%m selp.u32 %d, 1, 0, %q;"
                found.append(Form("vote", _member(members, text), "32", ("i32",)))
            text = f"{test} @%m vote.sync.ballot.b32 %d, !%q, {members:#x};"
            found.append(Form("vote", _member(members, text), "32", ("i32",)))
    return found


def _matches() -> list[Form]:
    found = []
    for members in _MASKS:
        for low in (0, 1, 7, 0xFFFF):
            masked = f".reg .b32 %x; .reg .b64 %y; and.b32 %x, %a, {low:#x}; mov.b64 %y, {{%x, %x}};"
            for kind, source in (("b32", "%x"), ("b64", "%y")):
                text = f"{masked} @%m match.any.sync.{kind} %d, {source}, {members:#x};"
                found.append(Form("match", _member(members, text), "32", ("i32",)))
                text = f"{masked} @%m match.all.sync.{kind} %d|%q, {source}, {members:#x}; @%m selp.u32 %x, 0x100, 0, %q; @%m xor.b32 %d, %d, %x;"
                found.append(Form("match", _member(members, text), "32", ("i32",)))
    return found


def _reductions() -> list[Form]:
    kinds = [f"{op}.{t}" for op in ("add", "min", "max") for t in ("u32", "s32")] + [f"{op}.b32" for op in ("and", "or", "xor")]
    return [
        Form("redux", _member(members, f"@%m redux.sync.{kind} %d, %a, {members:#x};"), "32", ("i32",))
        for members in _MASKS for kind in kinds
    ]  # fmt: skip


def _others() -> list[Form]:
    found = [
        Form("elect", _member(members, f"@%m elect.sync %d|%q, {members:#x}; @%m selp.u32 %l, 0x100, 0, %q; @%m xor.b32 %d, %d, %l;"),
             "32", ("i32",))
        for members in _MASKS
    ]  # fmt: skip
    found += forms("activemask", ["activemask.b32 %d;"], "32", "i32")
    branch = "{ .reg .pred %q; .reg .b32 %x; mov.u32 %d, 0; mov.u32 %x, %laneid; setp.lt.u32 %q, %x, 11; @%q bra OUT; activemask.b32 %d; bar.warp.sync 0xfffff800; OUT: bar.warp.sync -1; }"
    found += forms("activemask", [branch], "32", "i32")
    both = """{ .reg .pred %q; .reg .b32 %x, %y; mov.u32 %x, %laneid; and.b32 %y, %x, 1; setp.eq.u32 %q, %y, 0; @%q bra EVEN;
shfl.sync.bfly.b32 %d, %a, 2, 0x1f, 0xAAAAAAAA; redux.sync.add.u32 %d, %d, 0xAAAAAAAA; bra JOIN;
EVEN: shfl.sync.bfly.b32 %d, %a, 4, 0x1f, 0x55555555; redux.sync.max.u32 %d, %d, 0x55555555; JOIN: bar.warp.sync -1; }"""
    found += forms("halves", [" ".join(both.split())], "32", "i32")
    return found + forms("movmatrix", "movmatrix.sync.aligned.m8n8.trans.b16", "32", "i32")


def cases() -> list[Case]:
    return elementwise("warp", [*_shuffles(), *_votes(), *_matches(), *_reductions(), *_others()], count=256)
