"""cvt in every rounding, between integers, floats and the small formats."""

from __future__ import annotations

from itertools import product

from emulator.hardware.case import Case, Form, elementwise, forms

__all__ = ["cases"]

_INTEGERS = tuple(f"{s}{b}" for b in (8, 16, 32, 64) for s in "us")
_BITS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
MODES = ("rn", "rz", "rm", "rp")


def _bits(kind: str) -> int:
    return _BITS.get(kind) or max(int(kind[1:]), 16)


def _kind(kind: str) -> str:
    return kind if kind in _BITS else f"i{_bits(kind)}"


def _integers() -> list[Form]:
    found: list[Form] = []
    for to, kind in product(_INTEGERS, _INTEGERS):
        if to != kind:
            sat = f" cvt.sat.{to}.{kind}" if _overflows(to, kind) else ""
            found += forms(f"from-{kind}", f"cvt.{to}.{kind}{sat}", str(_bits(to)), _kind(kind))
    return found


def _overflows(to: str, kind: str) -> bool:
    """Whether some value of a type is not one of another: only then is .sat legal."""
    room = int(to[1:]) - (to[0] == "s")
    return int(kind[1:]) - (kind[0] == "s") > room or (kind[0] == "s" and to[0] == "u")


def _to_integer() -> list[Form]:
    found: list[Form] = []
    for kind, to in product(("f16", "f32", "f64", "bf16"), _INTEGERS):
        if kind == "bf16" and to.endswith("8"):
            continue
        sats, flushes = ("",) if kind == "bf16" else ("", ".sat"), ("", ".ftz") if kind == "f32" else ("",)
        words = [f"cvt.{m}i{f}{s}.{to}.{kind}" for m in MODES for f in flushes for s in sats]
        found += forms(f"{kind}-to-integer", words, str(_bits(to)), kind)
    return found


def _from_integer() -> list[Form]:
    found: list[Form] = []
    for kind, to in product(_INTEGERS, ("f16", "f32", "f64", "bf16")):
        if to == "bf16" and kind.endswith("8"):
            continue
        words = [f"cvt.{m}{s}.{to}.{kind}" for m in MODES for s in (("",) if to == "bf16" else ("", ".sat"))]
        found += forms(f"to-{to}", words, str(_bits(to)), _kind(kind))
    return found


def _floats() -> list[Form]:
    found: list[Form] = []
    for to, kind, ftz in (("f32", "f64", True), ("f16", "f64", False), ("f16", "f32", True), ("bf16", "f64", False)):
        words = [f"cvt.{m}{f}{s}.{to}.{kind}" for m in MODES for f in (("", ".ftz") if ftz else ("",))
                 for s in (("", ".sat") if to != "bf16" else ("",))]  # fmt: skip
        found += forms("narrow", words, str(_bits(to)), kind)
    found += forms("narrow", [f"cvt.{m}.bf16.f32" for m in MODES], "16", "f32")
    found += forms("narrow", "cvt.rn.relu.f16.f32 cvt.rz.relu.f16.f32 cvt.rn.relu.bf16.f32 cvt.rz.relu.bf16.f32", "16", "f32")
    found += forms("narrow", "cvt.rn.satfinite.f16.f32 cvt.rn.satfinite.bf16.f32 cvt.rn.relu.satfinite.f16.f32", "16", "f32")
    for m in MODES:
        found += forms("same", f"cvt.{m}.bf16.f16", "16", "f16")
        found += forms("same", f"cvt.{m}.f16.bf16", "16", "bf16")
    found += forms("widen", "cvt.f32.f16 cvt.ftz.f32.f16 cvt.sat.f32.f16", "32", "f16")
    found += forms("widen", "cvt.f64.f16", "64", "f16") + forms("widen", "cvt.f32.bf16 cvt.ftz.f32.bf16", "32", "bf16")
    found += forms("widen", "cvt.f64.bf16", "64", "bf16") + forms(
        "widen", "cvt.f64.f32 cvt.ftz.f64.f32 cvt.sat.f64.f32", "64", "f32"
    )
    rounds = [f"cvt.{m}i{f}{s}" for m in MODES for f in ("", ".ftz") for s in ("", ".sat")]
    found += forms("whole", [f"{r}.f32.f32" for r in rounds], "32", "f32")
    found += forms("whole", [f"{r}.f64.f64" for r in rounds if "ftz" not in r], "64", "f64")
    found += forms("whole", [f"{r}.f16.f16" for r in rounds if "ftz" not in r], "16", "f16")
    return found + forms(
        "tf32", "cvt.rna.tf32.f32 cvt.rn.tf32.f32 cvt.rz.tf32.f32 cvt.rn.relu.tf32.f32 cvt.rz.relu.tf32.f32", "32", "f32"
    )


def _packed() -> list[Form]:
    found: list[Form] = []
    for kind in ("f16x2", "bf16x2"):
        words = [f"cvt.{m}{r}.{kind}.f32" for m in ("rn", "rz") for r in ("", ".relu", ".satfinite", ".relu.satfinite")]
        found += forms("packed", words, "32", "f32 f32")
    for kind in ("e4m3x2", "e5m2x2"):
        found += forms("packed-8", f"cvt.rn.satfinite.{kind}.f32 cvt.rn.satfinite.relu.{kind}.f32", "16", "f32 f32")
        found += forms("packed-8", f"cvt.rn.satfinite.{kind}.f16x2 cvt.rn.satfinite.relu.{kind}.f16x2", "16", "f16x2")
        found += forms("unpacked-8", f"cvt.rn.f16x2.{kind} cvt.rn.relu.f16x2.{kind}", "32", "b16")
    found += forms("pack", "cvt.pack.sat.u16.s32 cvt.pack.sat.s16.s32", "32", "i32 i32")
    small = [f"cvt.pack.sat.{t}.s32.b32" for t in ("u8", "s8", "u4", "s4", "u2", "s2")]
    return found + forms("pack", small, "32", "i32 i32 i32")


def cases() -> list[Case]:
    return elementwise("convert", [*_integers(), *_to_integer(), *_from_integer(), *_floats(), *_packed()])
