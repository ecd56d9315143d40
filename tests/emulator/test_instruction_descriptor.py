"""instruction_descriptor.py against the descriptors that NVIDIA's compiler puts into kernels."""

from __future__ import annotations

from typing import Any

import pytest

from emulator.cute_layout import recorded
from glu4.emulator.instruction_descriptor import InstructionDescriptor, decode_instruction

TYPES = {
    "Float16": "f16",
    "BFloat16": "bf16",
    "TFloat32": "tf32",
    "Float8E4M3FN": "e4m3",
    "Float8E5M2": "e5m2",
    "Float4E2M1FN": "e2m1",
    "Float32": "f32",
}
SCALES = {"": "", "Float8E8M0FNU": "ue8m0", "Float8E4M3FN": "ue4m3"}
DEPTH = {"f16": 16, "tf32": 8, "f8f6f4": 32, "mxf8f6f4": 32, "mxf4": 64, "mxf4nvf4": 64}
NVFP4 = 1 << 7 | 1 << 10 | 16 << 17 | 1 << 27  # 128 x 128, ue4m3
F16 = 1 << 4 | 16 << 17 | 8 << 24  # 128 x 128, float32 accumulation
I8 = 2 << 4 | 1 << 7 | 16 << 17 | 8 << 24  # 128 x 128, s8 by u8


@pytest.mark.parametrize(
    "case", recorded("instructions"), ids=lambda c: f"{c['kind']} {c['m']}x{c['n']} {c['dtype']} {c['scale']}"
)
def test_the_compilers_descriptors(case: dict[str, Any]) -> None:
    vector = next((q for q in case["qualifiers"].split(".") if q.startswith("block") and q != "block_scale"), "")
    d = decode_instruction(case["descriptor"], case["kind"], case["cta_group"], vector)
    kind = TYPES[case["dtype"]]
    majors = tuple("K" if letter == "K" else "MN" for letter in case["majors"])
    scales = DEPTH[case["kind"]] // case["block"] if case["block"] else 0
    assert d == InstructionDescriptor(
        case["kind"],
        case["m"],
        case["n"],
        DEPTH[case["kind"]],
        kind,
        kind,
        TYPES[case["accumulator"]],
        *majors,  # type: ignore[arg-type]
        False,
        False,
        scales,
        SCALES[case["scale"]],
    )
    assert d.scale_block == case["block"]


@pytest.mark.parametrize(
    ("bits", "kind", "vector", "expected"),
    [
        (NVFP4 | 1 << 13, "mxf4nvf4", "block16", {"negate_a": True}),
        (NVFP4 | 1 << 14, "mxf4nvf4", "scale_vec::4X", {"negate_b": True, "scales": 4}),
        (NVFP4 | 1 << 23 | 2 << 29, "mxf4", "", {"a_scale_id": 2, "scales": 2, "scale_type": "ue8m0"}),
        (NVFP4 | 1 << 23 | 2 << 4, "mxf4nvf4", "scale_vec::2X", {"b_scale_id": 2, "scale_block": 32}),
        (5 << 7 | 3 << 10 | 4 << 17 | 1 << 23 | 1 << 27 | 3 << 29 | 1 << 4, "mxf8f6f4", "", {"a_scale_id": 3, "b_scale_id": 1}),
        (5 << 7 | 4 << 10 | 1 << 4 | 2 << 17 | 4 << 24, "f8f6f4", "", {"a_type": "e2m1", "b_type": "e3m2", "m": 64, "n": 16}),
    ],
)
def test_fields(bits: int, kind: str, vector: str, expected: dict[str, Any]) -> None:
    d = decode_instruction(bits, kind, 1, vector)
    assert {key: getattr(d, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("bits", "kind", "group", "vector", "message"),
    [
        (0, "i4", 1, "", "kind::i4 is not modelled"),
        (I8 | 1 << 13, "i8", 1, "", r"negation \(bits 13-14\) is 1"),
        (I8 ^ 2 << 4, "i8", 1, "", "D type 0 is not possible for s8 and u8"),
        (I8 | 1 << 17, "i8", 1, "", "N 136 is not possible for cta_group::1; it is 16 to 256 in steps of 16"),
        (I8 | 2 << 17, "i8", 2, "", "N 144 is not possible for cta_group::2; it is 32 to 256 in steps of 32"),
        (F16, "f16", 3, "", "cta_group 3 is not 1 or 2"),
        (1 << 32, "f16", 1, "", "is 32 bits"),
        (F16 | 4, "f16", 1, "", r"instruction descriptor 0x08200014 of kind::f16: sparse matrices \(bit 2\)"),
        (F16 | 8, "f16", 1, "", r"saturate \(bit 3\) is 1, which must be 0"),
        (F16 | 1 << 6, "f16", 1, "", r"reserved \(bit 6\) is 1"),
        (F16 | 2 << 30, "f16", 1, "", r"maximum shift \(bits 30-31\) is 2"),
        (F16 | 3 << 7, "f16", 1, "", "A type 3 is unknown; known are 0 f16, 1 bf16"),
        (F16 | 2 << 10, "f16", 1, "", "B type 2 is unknown"),
        (F16 ^ 1 << 4 | 1 << 7, "f16", 1, "", "D type 0 is not possible for bf16 and f16"),
        (F16 | 2 << 7 | 2 << 10, "f16", 1, "", "A type 2"),
        (F16 | 2 << 4, "f16", 1, "", "D type 3 is not possible"),
        (F16 ^ 16 << 17, "f16", 1, "", "N 0 is not possible for cta_group::1; it is 8 to 256 in steps of 8"),
        (F16 | 1 << 17, "f16", 2, "", "N 136 is not possible for cta_group::2; it is 16 to 256 in steps of 16"),
        (F16 | 63 << 17, "f16", 1, "", "N 504 is not possible"),
        (F16 | 8 << 24 | 8 << 25, "f16", 1, "", "M 384 is not possible for cta_group::1; possible are 64, 128"),
        (F16, "f16", 1, "block16", "scale vector size 'block16' is given, but this kind has no scales"),
        (
            1 << 4 | 1 << 16 | 3 << 17 | 8 << 24,
            "f8f6f4",
            1,
            "",
            "N 24 is not possible for cta_group::1; it is 16 to 256 in steps of 16",
        ),
        (
            5 << 7 | 1 << 4 | 1 << 15 | 2 << 17 | 8 << 24,
            "f8f6f4",
            1,
            "",
            r"transpose A \(bit 15\) is set, which e2m1 does not allow",
        ),
        (NVFP4 | 1 << 16, "mxf4nvf4", 1, "block16", r"transpose B \(bit 16\) is set"),
        (NVFP4 | 1 << 31, "mxf4nvf4", 1, "block16", r"K = 96 \(bit 31\) exists on sm_103a only"),
        (NVFP4 | 1 << 12, "mxf4nvf4", 1, "block16", r"reserved \(bit 12\) is 1"),
        (NVFP4 | 1 << 25, "mxf4nvf4", 1, "block16", r"reserved \(bits 24-26\) is 2"),
        (NVFP4, "mxf4nvf4", 1, "", "scale vector size 'none' is not possible"),
        (NVFP4, "mxf4", 1, "block16", "scale vector size 'block16' is not possible; possible are scale_vec::2X, block32"),
        (NVFP4, "mxf4", 1, "", r"scale type ue4m3 \(bit 23\) is not possible with 2 scales a row"),
        (NVFP4 | 2 << 4, "mxf4nvf4", 1, "block16", "scale factor B id 2 is not possible with 4 scales a row"),
        (NVFP4 | 1 << 29 | 1 << 23, "mxf4", 1, "", "scale factor A id 1 is not possible with 2 scales a row"),
        (NVFP4 ^ 3 << 27, "mxf4nvf4", 1, "block16", "M 256 is not possible for cta_group::1; possible are 128"),
        (NVFP4 | 1 << 8, "mxf4nvf4", 1, "block16", "A type 3 is unknown; known are 1 e2m1"),
    ],
)
def test_malformed_descriptors_name_the_field(bits: int, kind: str, group: int, vector: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_instruction(bits, kind, group, vector)


def test_integers() -> None:
    for n in (8, 16, 24, 32, 48, 256):
        d = decode_instruction(I8 & ~(63 << 17) | n // 8 << 17 | 8, "i8", 1)
        assert (d.a_type, d.b_type, d.d_type, d.k, d.n, d.saturate) == ("s8", "u8", "s32", 32, n, True)


def test_weight_stationary_shapes() -> None:
    for m in (32, 64, 128):
        d = decode_instruction(1 << 4 | 8 << 17 | m // 16 << 24, "f16", 1, stationary=True)
        assert (d.m, d.n, d.stationary) == (m, 64, True)
    with pytest.raises(ValueError, match=r"N 96 is not possible for \.ws; possible are 64, 128, 256"):
        decode_instruction(1 << 4 | 12 << 17 | 4 << 24, "f16", 1, stationary=True)
    with pytest.raises(ValueError, match=r"M 16 is not possible for \.ws"):
        decode_instruction(1 << 4 | 8 << 17 | 1 << 24, "f16", 1, stationary=True)
