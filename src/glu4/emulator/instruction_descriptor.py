"""The 32-bit instruction descriptor of `tcgen05.mma`, dense matrices only.

Facts: PTX ISA 9.1, tables 42 to 44 (bits), 39 (shapes), 51, 52 and 54 (transposition), 56 and 57 (scale vectors).
"""

from __future__ import annotations

from dataclasses import dataclass

from glu4.emulator.descriptors import Major

__all__ = ["BLOCK_SCALED", "KINDS", "InstructionDescriptor", "decode_instruction"]

_F8F6F4 = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
# operand types by code, K of one instruction
KINDS: dict[str, tuple[dict[int, str], int]] = {
    "f16": ({0: "f16", 1: "bf16"}, 16),
    "tf32": ({2: "tf32"}, 8),
    "f8f6f4": (_F8F6F4, 32),
    "i8": ({0: "u8", 1: "s8"}, 32),
    "mxf8f6f4": (_F8F6F4, 32),
    "mxf4": ({1: "e2m1"}, 64),
    "mxf4nvf4": ({1: "e2m1"}, 64),
}
BLOCK_SCALED = ("mxf8f6f4", "mxf4", "mxf4nvf4")
# scale vector sizes an instruction may name, with the scales it holds for one row and K step
_SCALES = {"scale_vec::1X": 1, "scale_vec::2X": 2, "scale_vec::4X": 4}
_SCALE_VECTORS = {
    "mxf8f6f4": ("scale_vec::1X", "block32"),
    "mxf4": ("scale_vec::2X", "block32"),
    "mxf4nvf4": ("scale_vec::2X", "scale_vec::4X", "block16", "block32"),
}
_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "u8": 8, "s8": 8, "e4m3": 8, "e5m2": 8, "e2m3": 6, "e3m2": 6, "e2m1": 4}


@dataclass(frozen=True)
class InstructionDescriptor:
    """A decoded descriptor. `scales` (per row and instruction), `scale_type` and the ids are 0, "" and 0 without scaling.

    saturate: of kind::i8. stationary: weight-stationary, tcgen05.mma.ws.
    """

    kind: str
    m: int
    n: int
    k: int
    a_type: str
    b_type: str
    d_type: str
    a_major: Major
    b_major: Major
    negate_a: bool
    negate_b: bool
    scales: int = 0
    scale_type: str = ""
    a_scale_id: int = 0
    b_scale_id: int = 0
    saturate: bool = False
    stationary: bool = False

    @property
    def scale_block(self) -> int:
        """Elements along K that share a scale."""
        return self.k // self.scales if self.scales else 0


class _Reader:
    """Fields of one descriptor, with errors that show it whole."""

    def __init__(self, bits: int, kind: str) -> None:
        if not 0 <= bits < 1 << 32:
            raise ValueError(f"instruction descriptor: is 32 bits, given {bits:#x}")
        self.bits = bits
        self.kind = kind

    def field(self, low: int, width: int) -> int:
        return self.bits >> low & ((1 << width) - 1)

    def fail(self, what: str) -> ValueError:
        return ValueError(f"instruction descriptor {self.bits:#010x} of kind::{self.kind}: {what}")

    def zero(self, *spans: tuple[int, int, str]) -> None:
        for low, width, name in spans:
            if self.field(low, width):
                where = f"bit {low}" if width == 1 else f"bits {low}-{low + width - 1}"
                raise self.fail(f"{name} ({where}) is {self.field(low, width)}, which must be 0")


def _operands(r: _Reader, b_width: int) -> tuple[str, str]:
    types = KINDS[r.kind][0]
    names = []
    for name, low, width in (("A", 7, 3), ("B", 10, b_width)):
        code = r.field(low, width)
        if code not in types:
            raise r.fail(f"{name} type {code} is unknown; known are {', '.join(f'{c} {t}' for c, t in types.items())}")
        names.append(types[code])
    return names[0], names[1]


def _majors(r: _Reader, a: str, b: str) -> tuple[Major, Major]:
    majors: list[Major] = []
    for name, low, kind in (("A", 15, a), ("B", 16, b)):
        transposed = bool(r.field(low, 1))
        if transposed and (r.kind in ("mxf4", "mxf4nvf4") or _BITS[kind] < 8):
            raise r.fail(f"transpose {name} (bit {low}) is set, which {kind} does not allow")
        majors.append("MN" if transposed else "K")
    return majors[0], majors[1]


def _check_stationary(r: _Reader, m: int, n: int) -> None:
    for name, value, possible in (("M", m, (32, 64, 128)), ("N", n, (64, 128, 256))):
        if value not in possible:
            raise r.fail(f"{name} {value} is not possible for .ws; possible are {', '.join(map(str, possible))}")


def _check_shape(r: _Reader, m: int, n: int, b: str, b_major: Major, cta_group: int) -> None:
    scaled = r.kind in BLOCK_SCALED
    possible = {1: (128,) if scaled else (64, 128), 2: (128, 256)}[cta_group]
    if m not in possible:
        raise r.fail(f"M {m} is not possible for cta_group::{cta_group}; possible are {', '.join(map(str, possible))}")
    step = 8 * cta_group
    if r.kind == "i8" and (cta_group == 2 or n > 32):
        step *= 2
    if b_major == "MN" and _BITS[b] == 8:
        step = 16 * cta_group
    if n % step or not step <= n <= 256:
        raise r.fail(f"N {n} is not possible for cta_group::{cta_group}; it is {step} to 256 in steps of {step}")


def _scale_vector(r: _Reader, scale_vector: str) -> int:
    """Scales of one row for one instruction; the default is that of kind::mxf4 and kind::mxf8f6f4."""
    given = scale_vector or ("" if r.kind == "mxf4nvf4" else "block32")
    if given not in _SCALE_VECTORS[r.kind]:
        raise r.fail(f"scale vector size {given or 'none'!r} is not possible; possible are {', '.join(_SCALE_VECTORS[r.kind])}")
    if given.startswith("block"):
        return KINDS[r.kind][1] // int(given.removeprefix("block"))
    return _SCALES[given]


def decode_instruction(
    bits: int, kind: str, cta_group: int, scale_vector: str = "", stationary: bool = False
) -> InstructionDescriptor:
    """The descriptor of a dense `tcgen05.mma{.ws}.cta_group::G.kind::KIND`, with the scale vector qualifier, if any.

    `scale_vector` is "block16", "block32" or "scale_vec::NX". `stationary`: .ws. Raises ValueError naming the field for a
    malformed descriptor and for what is not modelled: sparse matrices, K = 96, the shift of .ws.
    """
    if kind not in KINDS:
        raise ValueError(f"instruction descriptor: kind::{kind} is not modelled; modelled are {', '.join(KINDS)}")
    if cta_group not in (1, 2):
        raise ValueError(f"instruction descriptor: cta_group {cta_group} is not 1 or 2")
    r = _Reader(bits, kind)
    if r.field(2, 1):
        raise r.fail("sparse matrices (bit 2) are not modelled")
    if kind in BLOCK_SCALED:
        return _decode_scaled(r, cta_group, scale_vector)
    if scale_vector:
        raise r.fail(f"scale vector size {scale_vector!r} is given, but this kind has no scales")
    integer = kind == "i8"
    r.zero((0, 2, "sparsity selector"), (6, 1, "reserved"), (23, 1, "reserved"), (29, 1, "reserved"), (30, 2, "maximum shift"))
    r.zero((13, 2, "negation")) if integer else r.zero((3, 1, "saturate"))
    a, b = _operands(r, 3)
    code = r.field(4, 2)
    if (code != 2) if integer else code > 1 or (code == 0 and (kind == "tf32" or "bf16" in (a, b))):
        raise r.fail(f"D type {code} is not possible for {a} and {b}")
    a_major, b_major = _majors(r, a, b)
    m, n = 16 * r.field(24, 5), 8 * r.field(17, 6)
    if stationary:
        _check_stationary(r, m, n)
    else:
        _check_shape(r, m, n, b, b_major, cta_group)
    d = ("f16", "f32", "s32")[code]
    negate = bool(r.field(13, 1)), bool(r.field(14, 1))
    saturate = bool(r.field(3, 1))
    return InstructionDescriptor(
        kind, m, n, KINDS[kind][1], a, b, d, a_major, b_major, *negate, saturate=saturate, stationary=stationary
    )


def _decode_scaled(r: _Reader, cta_group: int, scale_vector: str) -> InstructionDescriptor:
    r.zero((0, 2, "reserved"), (3, 1, "reserved"), (6, 1, "reserved"), (24, 3, "reserved"))
    if r.kind == "mxf8f6f4":
        r.zero((31, 1, "reserved"))
    else:
        r.zero((12, 1, "reserved"))
        if r.field(31, 1):
            raise r.fail("K = 96 (bit 31) exists on sm_103a only")
    a, b = _operands(r, 3 if r.kind == "mxf8f6f4" else 2)
    a_major, b_major = _majors(r, a, b)
    m, n = 128 * r.field(27, 2), 8 * r.field(17, 6)
    _check_shape(r, m, n, b, b_major, cta_group)
    scales = _scale_vector(r, scale_vector)
    scale_type = "ue8m0" if r.field(23, 1) else "ue4m3"
    if scale_type == "ue4m3" and (r.kind != "mxf4nvf4" or scales != 4):
        raise r.fail(f"scale type ue4m3 (bit 23) is not possible with {scales} scales a row")
    ids = r.field(29, 2), r.field(4, 2)
    for name, value in zip("AB", ids):
        if value % scales:
            raise r.fail(f"scale factor {name} id {value} is not possible with {scales} scales a row")
    negate = bool(r.field(13, 1)), bool(r.field(14, 1))
    return InstructionDescriptor(
        r.kind, m, n, KINDS[r.kind][1], a, b, "f32", a_major, b_major, *negate, scales, scale_type, *ids
    )
