"""tensor_map.py against maps made by an H100's driver, and its copies against element-by-element loops."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glu4.emulator.tensor_map import (
    ELEMENT_TYPES,
    INTERLEAVES,
    L2_PROMOTIONS,
    OOB_FILLS,
    SWIZZLES,
    TensorMap,
    decode,
    encode,
    load_box,
    store_box,
    swizzle_address,
)

# CUtensorMapDataType in its order
DRIVER_TYPES = [
    *("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f64", "bf16", "f32_ftz", "tf32", "tf32_ftz"),
    *("16u4_align8b", "16u4_align16b", "16u6_align16b"),
]
FIXTURE = Path(__file__).parent / "fixtures" / "tensor_maps_h100.json.xz"
PLAIN = TensorMap(0x10000, "f16", (256, 40), (512,), (64, 8), (1, 1), "128B")


def records() -> list[dict[str, Any]]:
    return list(json.loads(lzma.decompress(FIXTURE.read_bytes())))


def from_record(r: dict[str, Any]) -> TensorMap:
    return TensorMap(
        r["address"],
        DRIVER_TYPES[r["type"]],
        tuple(r["dims"]),
        tuple(r["strides"]),
        tuple(r["box"]),
        tuple(r["steps"]),
        list(SWIZZLES)[r["swizzle"]],
        INTERLEAVES[r["interleave"]],
        OOB_FILLS[r["fill"]],
        L2_PROMOTIONS[r["promotion"]],
    )


def test_every_map_of_the_driver_is_understood_and_made_again() -> None:
    accepted = [r for r in records() if r["map"] is not None]
    assert len(accepted) > 1000
    for record in accepted:
        tensor_map = from_record(record)
        assert encode(tensor_map)[:64].hex() == record["map"]
        # the driver leaves bytes of its own behind the first 64
        assert decode(bytes.fromhex(record["map"]) + bytes(range(64))) == tensor_map


def test_what_the_driver_refuses_is_refused() -> None:
    refused = [r for r in records() if r["map"] is None]
    # an H100 has neither the packed types nor the swizzles with larger atoms, which exist from sm_100 on
    refused = [r for r in refused if r["type"] < 13 and r["swizzle"] < 4]
    assert len(refused) > 100
    for record in refused:
        with pytest.raises(ValueError, match="tensor map: "):
            from_record(record)


def with_bits(data: bytes, low: int, value: int) -> bytes:
    return (int.from_bytes(data, "little") | value << low).to_bytes(128, "little")


def test_what_another_writer_puts_elsewhere_changes_nothing() -> None:
    # CuTe DSL writes tag 2, and bit 85 for large tensors
    assert decode(with_bits(with_bits(encode(PLAIN), 64, 2), 85, 1)) == PLAIN


@pytest.mark.parametrize(
    ("low", "value", "message"),
    [
        (64, 1, r"tag \(bits 64-67\) is 1"),
        (64, 4, r"tag \(bits 64-67\) is 4"),
        (68, 7, "rank is 8"),
        (71, 15, r"element_type \(bits 71-74\) 15"),
        (80, 1, "element_type .* 6 with tf32 bit 1"),
        (75, 3, "interleave .* is 3"),
        (86, 1, "reserved bits 86 to 95 are 0x1"),
        (240, 9, "reserved bits 240 to 255 are 0x9"),
        (480, 1, "reserved bits 480 to 511"),
    ],
)
def test_damaged_maps_name_the_field(low: int, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"tensor map: {message}"):
        decode(with_bits(encode(PLAIN), low, value))


def test_an_atom_without_its_swizzle_is_refused() -> None:
    with pytest.raises(ValueError, match=r"swizzle \(bits 77-78\) 2 cannot have atom \(bits 83-84\) 1"):
        decode(with_bits(encode(replace(PLAIN, swizzle="64B", box_shape=(32, 8))), 83, 1))
    with pytest.raises(ValueError, match="is 128 bytes, given 64"):
        decode(bytes(64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"element_type": "f8"}, "element_type 'f8' is unknown"),
        ({"swizzle": "96B"}, "swizzle '96B' is unknown"),
        ({"global_shape": ()}, "global_shape has rank 0"),
        ({"box_shape": (64,)}, "box_shape has 1 entries; rank 2 needs 2"),
        ({"global_strides": (520,)}, r"global_strides\[0\] 520 is not a multiple of 16"),
        ({"address": 0x10008}, "address 0x10008 is not a multiple of 16"),
        ({"global_shape": (0, 40)}, r"global_shape\[0\] 0 is not between"),
        ({"box_shape": (64, 257)}, r"box_shape\[1\] 257 is not between 1 and 256"),
        ({"box_shape": (128, 8)}, r"box_shape\[0\] is 256 bytes wide; swizzle 128B allows 128"),
        ({"box_shape": (20, 8)}, r"box_shape\[0\] 20 elements are 40 bytes, not a multiple of 16"),
        ({"element_strides": (1, 9)}, r"element_strides\[1\] 9 is not between 1 and 8"),
        ({"interleave": "16B"}, "interleave 16B needs rank 3"),
        ({"element_type": "u16", "oob_fill": "nan"}, "oob_fill nan needs a floating-point element type"),
        ({"element_type": "16u4_align16b", "global_shape": (192, 4)}, r"global_shape\[0\] 192 is not a multiple of 128"),
        ({"element_type": "16u4_align16b"}, r"box_shape\[0\] 64 must be 128 for 16u4_align16b"),
        ({"element_type": "16u4_align16b", "box_shape": (128, 8), "swizzle": "64B"}, r"box_shape\[0\] is 128 bytes wide"),
        (
            {"element_type": "16u4_align16b", "box_shape": (128, 8), "swizzle": "128B_atom_64B"},
            "swizzle 128B_atom_64B is not possible for 16u4_align16b",
        ),
    ],
)
def test_impossible_maps_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"tensor map: {message}"):
        replace(PLAIN, **change)


def test_a_box_beyond_shared_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="is 491520 bytes; shared memory has 233472"):
        replace(
            PLAIN, global_shape=(256, 256, 15), global_strides=(512, 1024), box_shape=(64, 256, 15), element_strides=(1, 1, 1)
        )


# PTX ISA 5.5.7: in line i of 128 bytes, place j holds this 16-byte piece
TABLES = {
    "32B": ["01234567", "10325476"],
    "64B": ["01234567", "10325476", "23016745", "32107654"],
    "128B": ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"],
    "128B_atom_32B": ["01234567", "23016745", "45670123", "67452301"],
    "128B_atom_64B": ["01234567", "45670123"],
}


@pytest.mark.parametrize("swizzle", TABLES)
def test_swizzles_are_the_tables_of_the_isa(swizzle: str) -> None:
    # 32B and 64B patterns cover two and four lines of 128 bytes
    table = TABLES[swizzle]
    for line, places in product(range(16), range(8)):
        piece = int(table[line % len(table)][places])
        source = np.array([line * 128 + piece * 16 + b for b in range(16)])
        expected = [line * 128 + places * 16 + b for b in range(16)]
        assert swizzle_address(swizzle, source).tolist() == expected


def test_the_flip_exchanges_eight_byte_halves_of_every_other_line() -> None:
    address = np.arange(2048)
    plain, flipped = (swizzle_address(s, address) for s in ("128B_atom_32B", "128B_atom_32B_flip_8B"))
    odd = (address // 128) % 2 == 1
    np.testing.assert_array_equal(flipped, np.where(odd, plain ^ 8, plain))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[TensorMap, list[int]]:
    kind = draw(st.sampled_from(["u8", "u16", "f16", "bf16", "f32", "u64", "16u4_align8b", "16u4_align16b"]))
    swizzle = draw(st.sampled_from(["none", "32B", "64B", "128B", "128B_atom_32B", "128B_atom_32B_flip_8B", "128B_atom_64B"]))
    bits = ELEMENT_TYPES[kind].bits
    if kind == "16u4_align16b":
        swizzle = draw(st.sampled_from(["none", "128B", "128B_atom_32B"]))
        inner, shape0 = 128, 128 * draw(st.integers(1, 3))
        x = 128 * draw(st.integers(-1, 3))
    else:
        span = SWIZZLES[swizzle][2] or 16 * draw(st.integers(1, 4))
        inner = draw(st.integers(1, span // 16)) * 128 // bits
        shape0 = draw(st.integers(1, 3 * inner // 2)) * (2 if bits == 4 else 1)
        x = draw(st.integers(-inner * bits // 128 - 1, shape0 * bits // 128)) * 128 // bits
    rank = draw(st.integers(1, 5))
    shape = [shape0, *(draw(st.integers(1, 9)) for _ in range(rank - 1))]
    box = [inner, *(draw(st.integers(1, 5)) for _ in range(rank - 1))]
    steps = [1, *(draw(st.integers(1, 3)) for _ in range(rank - 1))]
    pitch, strides = -(-shape0 * bits // 8 // 32) * 32 + 32, []
    for size in shape[1:]:
        strides.append(pitch)
        pitch *= size
    fill = draw(st.sampled_from(["zero", "nan"])) if ELEMENT_TYPES[kind].floating else "zero"
    tensor_map = TensorMap(
        64,
        kind,
        tuple(shape),
        tuple(strides),
        tuple(box),
        tuple(steps),
        swizzle,
        "none",
        fill,
        draw(st.sampled_from(L2_PROMOTIONS)),
    )
    return tensor_map, [x, *(draw(st.integers(-6, 9)) for _ in range(rank - 1))]


def elements(t: TensorMap, coordinates: list[int]) -> list[tuple[int, int | None]]:
    """(bit position in the unswizzled box, bit position in global memory or None) of each element of a box, by its definition."""
    out = []
    slot = 8 if t.element_type == "16u4_align16b" else t.bits
    span = 8 * SWIZZLES[t.swizzle][2]
    sizes = [-(-size // (step if i else 1)) for i, (size, step) in enumerate(zip(t.box_shape, t.element_strides))]
    for n, index in enumerate(product(*(range(size) for size in reversed(sizes)))):
        at = [c + i * (step if d else 1) for d, (c, i, step) in enumerate(zip(coordinates, reversed(index), t.element_strides))]
        inside = all(0 <= a < size for a, size in zip(at, t.global_shape))
        row, column = divmod(n, sizes[0])
        where = row * max(sizes[0] * slot, span) + column * slot  # a narrower row leaves the rest of the span alone
        if t.element_type == "16u4_align16b":  # sixteen packed, then 8 bytes of padding
            where = n // 16 * 128 + n % 16 * 4
        base = 8 * (t.address + sum(a * stride for a, stride in zip(at[1:], t.global_strides))) + at[0] * t.bits
        out.append((where, base if inside else None))
    return out


def nan_bits(kind: str) -> int:
    return {"f16": 0x7FF7, "bf16": 0x7FF7, "f32": 0x7FF77FF7}[kind]  # an H100's


@settings(max_examples=300, deadline=None)
@given(boxes(), st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_loads_equal_a_loop_over_elements(box: tuple[TensorMap, list[int]], place: int, seed: int) -> None:
    t, coordinates = box
    size = 64 + max([t.global_shape[0] * t.bits // 8, *(s * n for s, n in zip(t.global_strides, t.global_shape[1:]))]) + 64
    memory = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)

    def read(addresses: np.ndarray, count: int) -> np.ndarray:
        assert addresses.min() >= 64
        assert addresses.max() + count <= size
        return memory[addresses[:, None] + np.arange(count)]

    units = load_box(t, coordinates, 128 * place, read)
    shared = np.zeros(128 * place + t.shared_bytes + 1024, dtype=np.uint8)
    written = np.zeros(len(shared), dtype=bool)
    shared[units.addresses[:, None] + np.arange(8)] = units.data
    written[units.addresses[:, None] + np.arange(8)] = True
    assert written.sum() == units.data.size == units.transaction_bytes
    whole = int.from_bytes(memory.tobytes(), "little")
    for bit, source in elements(t, coordinates):
        byte = int(swizzle_address(t.swizzle, np.array(128 * place + bit // 8)))
        assert written[byte]
        expected = nan_bits(t.element_type) if t.oob_fill == "nan" else 0
        if source is not None:
            expected = whole >> source & ((1 << t.bits) - 1)
        got = int.from_bytes(shared[byte : byte + max(t.bits // 8, 1)].tobytes(), "little") >> bit % 8 & ((1 << t.bits) - 1)
        assert got == expected


@settings(max_examples=200, deadline=None)
@given(boxes().filter(lambda b: b[0].element_type != "16u4_align16b"), st.integers(0, 2**32 - 1), st.booleans())
def test_stores_equal_a_loop_over_elements(box: tuple[TensorMap, list[int]], seed: int, reduces: bool) -> None:
    """A store writes pieces of 16 bytes whole, as if the tensor's rows ended there; the elements of a reduction end with it."""
    t, coordinates = box
    coordinates = [max(c, 0) for c in coordinates]
    shared = np.random.default_rng(seed).integers(0, 256, t.shared_bytes + 1024, dtype=np.uint8)
    rows = store_box(t, coordinates, 0, lambda addresses: shared[addresses[:, None] + np.arange(8)], reduces)
    got = {}
    for address, row in zip(rows.addresses.tolist(), rows.data):
        got.update({address + i: value for i, value in enumerate(row.tolist())})
    expected: dict[int, int] = {}
    piece = 128 // t.bits
    written = t if reduces else replace(t, global_shape=(-(-t.global_shape[0] // piece) * piece, *t.global_shape[1:]))
    for bit, target in elements(written, coordinates):
        if target is not None:
            byte = int(swizzle_address(t.swizzle, np.array(bit // 8)))
            for i in range(max(t.bits // 8, 1)):
                expected[target // 8 + i] = int(shared[byte + i])
    assert got == expected


def test_nothing_is_read_where_no_element_is_inside() -> None:
    units = load_box(PLAIN, [0, 40], 0, lambda *_: pytest.fail("read"))
    assert not units.data.any()
    assert units.transaction_bytes == 1024
    assert (
        load_box(replace(PLAIN, oob_fill="nan"), [256, 0], 0, lambda *_: pytest.fail("read")).data.view(np.uint16).min()
        == 0x7FF7
    )


@pytest.mark.parametrize(
    ("tensor_map", "coordinates", "address", "message"),
    [
        (PLAIN, [0], 0, "coordinates: 1 given for a tensor map of rank 2"),
        (PLAIN, [0, 0], 64, "shared address: 0x40 is not a multiple of 128"),
        (PLAIN, [12, 0], 0, "the first is 12; f16 needs a multiple of 8"),
        (replace(PLAIN, element_type="f32", box_shape=(32, 8)), [-2, 0], 0, "the first is -2; f32 needs a multiple of 4"),
        (replace(PLAIN, element_type="tf32", box_shape=(32, 8)), [0, 0], 0, "copies of tf32 are not modelled"),
        (
            TensorMap(0, "f16", (8, 8, 8), (32, 256), (8, 8, 1), (1, 1, 1), interleave="16B"),
            [0, 0, 0],
            0,
            "interleave: 16B is not modelled",
        ),
        (
            replace(PLAIN, element_type="16u4_align8b", box_shape=(256, 8)),
            [3, 0],
            0,
            "is 3; 16u4_align8b needs a multiple of 32",
        ),
        (replace(PLAIN, element_type="16u4_align16b", box_shape=(128, 8)), [64, 0], 0, "needs a multiple of 128"),
    ],
)
def test_copies_refuse_what_the_instruction_may_not_have(
    tensor_map: TensorMap, coordinates: list[int], address: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_box(tensor_map, coordinates, address, lambda a, n: np.zeros((len(a), n), np.uint8))


@pytest.mark.parametrize("coordinates", [[-8, 0], [0, -1]])
def test_stores_refuse_negative_coordinates(coordinates: list[int]) -> None:
    units = load_box(PLAIN, coordinates, 0, lambda a, n: np.ones((len(a), n), np.uint8))  # loads may have them
    assert 0 < np.count_nonzero(units.data) < units.data.size
    with pytest.raises(ValueError, match=r"coordinates: \(-?\d, -?\d\) has a negative one; a store or reduction may not"):
        store_box(PLAIN, coordinates, 0, lambda a: np.zeros((len(a), 8), np.uint8))


def test_padded_elements_cannot_be_stored() -> None:
    padded = replace(PLAIN, element_type="16u4_align16b", box_shape=(128, 8))
    with pytest.raises(ValueError, match="16u4_align16b cannot be stored"):
        store_box(padded, [0, 0], 0, lambda a: np.zeros((len(a), 8), np.uint8))
    assert padded.shared_bytes == 1024
    assert padded.transaction_bytes == 512


def test_unknown_swizzles_are_refused() -> None:
    with pytest.raises(ValueError, match="swizzle: '96B' is unknown"):
        swizzle_address("96B", np.arange(4))
