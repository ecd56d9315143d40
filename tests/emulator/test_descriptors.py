"""descriptors.py: shared-memory layouts and descriptors as NVIDIA's library and compiler make them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.cute_layout import Layout, recorded
from glu4.emulator.descriptors import SharedDescriptor, chunk_addresses, decode_tcgen05, decode_wgmma, read_operand

DECODE = {"wgmma": decode_wgmma, "tcgen05": decode_tcgen05}
PLAIN = 1 << 46 | 64 << 32 | 1 << 16 | 2 << 61  # tcgen05, 128B, groups of rows 1024 bytes apart


def name(case: dict[str, Any]) -> str:
    return f"{case['operation']}-{case['bits']}-{case['major']}-{case['swizzle']}"


def filled(case: dict[str, Any], base: int) -> tuple[np.ndarray, np.ndarray]:
    """(shared memory, operand as bytes [rows, 128]): a random operand stored as CuTe's layout says, `base` bytes in."""
    layout, rows, bits = Layout(case["layout"]), case["rows"], case["bits"]
    depth = 1024 // bits
    operand = np.random.default_rng(bits).integers(0, 256, (rows, 128), dtype=np.uint8)
    shared = np.random.default_rng(7).integers(0, 256, 1 << 17, dtype=np.uint8)
    element_bytes = max(bits // 8, 1)
    k = np.arange(0, depth, 8 * element_bytes // bits)[None, :]
    m = np.arange(rows)[:, None]
    if case["operation"] == "wgmma":
        offset = layout(m, k, 0)
    else:
        inner = 256 // bits
        offset = layout(m + rows * (k % inner), 0, k // inner)
    address = layout.swizzled(base + offset * bits // 8)
    values = operand.reshape(rows, -1, element_bytes)
    shared[address[:, :, None] + np.arange(element_bytes)] = values
    return shared, operand


@pytest.mark.parametrize("base", [0, 5 * 1024])
@pytest.mark.parametrize("case", recorded("shared"), ids=name)
def test_operands_are_read_from_cutes_layouts_through_its_descriptors(case: dict[str, Any], base: int) -> None:
    shared, operand = filled(case, base)
    steps = Layout(case["steps"])
    inner = 256 // case["bits"]
    for step in range(1024 // case["bits"] // inner):
        advance = int(steps(0, 0, step, *[0] * (len(steps.sizes()) - 3)))
        descriptor = DECODE[case["operation"]](case["descriptor"] + base // 16 + advance)
        got = read_operand(
            descriptor, case["major"], case["rows"], inner, case["bits"], lambda a: shared[a[..., None] + np.arange(16)]
        )
        np.testing.assert_array_equal(got, operand[:, 32 * step : 32 * step + 32])


@pytest.mark.parametrize("case", recorded("shared"), ids=name)
def test_descriptors_decode_to_their_swizzle(case: dict[str, Any]) -> None:
    expected = {"INTER": "none", "SW32": "32B", "SW64": "64B", "SW128": "128B", "SW128_32B": "128B_atom_32B"}
    descriptor = DECODE[case["operation"]](case["descriptor"])
    assert descriptor.swizzle == expected[case["swizzle"]]
    assert descriptor.start == 0


# the examples of PTX ISA 9.7.16.3.3: canonical layout with element strides, LBO, SBO in elements
EXAMPLES = [
    ("K", "none", 32, "((8,2),(4,4)):((4,32),(1,64))", 64, 32, (0, 4, 3)),
    ("K", "32B", 32, "((8,2),(4,2)):((8,64),(1,4))", 0, 64, (1, 4, 3)),
    ("MN", "none", 16, "((8,1,2),(8,2)):((1,8,64),(8,128))", 128, 64, (0, 4, 3)),
    ("MN", "32B", 16, "((8,2,2),(8,2)):((1,8,128),(16,256))", 128, 256, (1, 4, 3)),
    ("MN", "64B", 16, "((8,4,2),(8,2)):((1,8,256),(32,512))", 256, 512, (2, 4, 3)),
    # not in the ISA: the canonical layout of cute/arch/mma_sm100_desc.hpp, ((T,8,m),(4,k)):((1,T,LBO),(8T,SBO))
    ("MN", "128B_atom_32B", 32, "((4,8,2),(4,2)):((1,4,2048),(32,512))", 2048, 512, (2, 5, 2)),
]


@pytest.mark.parametrize(("major", "swizzle", "bits", "text", "leading", "stride", "bits_of_swizzle"), EXAMPLES)
def test_the_examples_of_the_isa(
    major: str, swizzle: str, bits: int, text: str, leading: int, stride: int, bits_of_swizzle: tuple[int, int, int]
) -> None:
    layout = Layout(text)
    layout.swizzle = bits_of_swizzle
    rows, depth = layout.sizes()
    descriptor = SharedDescriptor(0, leading * bits // 8, stride * bits // 8, swizzle)
    got = chunk_addresses(descriptor, major, rows, depth, bits)  # type: ignore[arg-type]
    first = np.arange(0, depth if major == "K" else rows, 128 // bits)[None, :]
    line = np.arange(rows if major == "K" else depth)[:, None]
    offset = layout(line, first) if major == "K" else layout(first, line)
    np.testing.assert_array_equal(got, layout.swizzled(offset * bits // 8))


@given(st.integers(0, 0x3FFF), st.integers(0, 0x3FFF), st.integers(0, 0x3FFF), st.sampled_from([0, 1, 2, 4, 6]))
def test_fields_are_where_the_isa_puts_them(start: int, leading: int, stride: int, swizzle: int) -> None:
    d = decode_tcgen05(start | leading << 16 | stride << 32 | 1 << 46 | swizzle << 61)
    names = {0: "none", 1: "128B_atom_32B", 2: "128B", 4: "64B", 6: "32B"}
    assert d == SharedDescriptor(16 * start, 16 * leading, 16 * stride, names[swizzle])
    if swizzle != 1:
        w = decode_wgmma(start | leading << 16 | stride << 32 | swizzle >> 1 << 62)
        assert w == d


@pytest.mark.parametrize(
    ("decode", "bits", "message"),
    [
        (decode_tcgen05, PLAIN | 1 << 14, r"tcgen05 descriptor 0x\w+: bits 14-15 are 0x1, not zero"),
        (decode_tcgen05, PLAIN | 1 << 31, "bits 30-31 are 0x2"),
        (decode_tcgen05, PLAIN | 1 << 60, "bits 53-60 are 0x80"),
        (decode_tcgen05, PLAIN ^ 1 << 46, r"version \(bits 46-48\) is 0, not 1"),
        (decode_tcgen05, PLAIN | 3 << 49, "base offset 3 is not modelled"),
        (decode_tcgen05, PLAIN | 1 << 52, r"absolute leading addresses \(bit 52\) exist on sm_103a only"),
        (decode_tcgen05, PLAIN | 1 << 61, r"swizzle \(bits 61-63\) 3 is not possible"),
        (decode_tcgen05, 1 << 64, "is 64 bits"),
        (decode_wgmma, 1 << 46, "wgmma descriptor .* bits 46-48 are 0x1"),
        (decode_wgmma, 1 << 61, "bits 52-61 are 0x200"),
        (decode_wgmma, 1 << 49, "base offset 1 is not modelled"),
    ],
)
def test_malformed_descriptors_name_the_field(decode: Any, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(bits)


@pytest.mark.parametrize(
    ("swizzle", "start", "major", "depth", "bits", "message"),
    [
        ("128B_atom_32B", 0, "K", 16, 16, "K-major matrices have no swizzle with 32-byte atoms"),
        ("128B", 112, "K", 16, 16, "16 elements from byte 112 on leave a row of the 128B swizzle"),
        ("32B", 0, "K", 12, 16, "12 elements of 16 bits are not whole 16-byte chunks along K"),
        ("128B", 0, "MN", 64, 4, "elements of 4 bits cannot be MN-major"),
    ],
)
def test_impossible_operands_are_refused(swizzle: str, start: int, major: str, depth: int, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunk_addresses(SharedDescriptor(start, 16, 1024, swizzle), major, 64, depth, bits)  # type: ignore[arg-type]
