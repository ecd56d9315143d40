"""matrix.py: fragments against NVIDIA's layout library, numbers against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.cute_layout import Layout, recorded
from glu4.emulator.formats import decode
from glu4.emulator.instruction_descriptor import decode_instruction
from glu4.emulator.matrix import (
    accumulation_bound,
    decode_operand,
    mma_sync_fragments,
    multiply,
    read_scales,
    storage_bits,
    tcgen05_multiply,
    wgmma_fragments,
)
from glu4.emulator.tmem import accumulator_cells, operand_cells, scale_cells

NVFP4 = 1 << 7 | 1 << 10 | 1 << 27


def check_fragment(fragment: Any, text: str, rows: int) -> None:
    layout = Layout(text)
    threads, values = layout.sizes()
    index = layout(np.arange(threads)[:, None], np.arange(values)[None, :])
    # an index counts down the columns of the tile
    np.testing.assert_array_equal(fragment.rows.reshape(threads, values), index % rows)
    np.testing.assert_array_equal(fragment.columns.reshape(threads, values), index // rows)


@pytest.mark.parametrize("case", recorded("fragments"), ids=lambda c: c["shape"])
def test_fragments_are_those_of_cute(case: dict[str, Any]) -> None:
    name, shape = case["shape"].split()
    _, n, k = (int(x) for x in shape.replace("n", " ").replace("k", " ").lstrip("m").split())
    if name == "wgmma":
        a, d = wgmma_fragments(n, "f32")
        check_fragment(a, case["a"], 64)
        check_fragment(d, case["d"], 64)
        return
    a, b, d = mma_sync_fragments(k, "f32")
    check_fragment(a, case["a"], 16)
    check_fragment(d, case["d"], 16)
    # CuTe names B's elements (n, k)
    layout = Layout(case["b"])
    index = layout(np.arange(32)[:, None], np.arange(k // 4)[None, :])
    np.testing.assert_array_equal(b.columns.reshape(32, -1), index % 8)
    np.testing.assert_array_equal(b.rows.reshape(32, -1), index // 8)


@pytest.mark.parametrize("n", [8, 24, 256])
def test_half_precision_results_hold_the_same_elements_in_pairs(n: int) -> None:
    _, wide = wgmma_fragments(n, "f32")
    _, narrow = wgmma_fragments(n, "f16")
    np.testing.assert_array_equal(wide.rows.reshape(128, -1), narrow.rows.reshape(128, -1))
    np.testing.assert_array_equal(wide.columns.reshape(128, -1), narrow.columns.reshape(128, -1))
    assert mma_sync_fragments(16, "f16")[2].rows.shape == (32, 2, 2)


def exact_rounding(total: Fraction, kind: type) -> float:
    """A rational to float32 or float16, to nearest even, through an odd-rounded float64 that decides ties."""
    near = kind(float(total))
    candidates = [near, np.nextafter(near, kind(np.inf)), np.nextafter(near, kind(-np.inf))]
    best = min(candidates, key=lambda c: (abs(Fraction(float(c)) - total), int(c.view(f"u{c.nbytes}")) & 1))
    return float(best)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["f32", "f16"]), st.booleans(), st.booleans())
def test_one_instruction_rounds_the_exact_sum_once(seed: int, d_type: str, accumulate: bool, negate: bool) -> None:
    rng = np.random.default_rng(seed)
    # significands of 8 bits in a range of exponents that float64 sums exactly
    a, b = (rng.integers(-255, 256, (3, 16)) * 2.0 ** rng.integers(-8, 3, (3, 16)) for _ in range(2))
    kind = np.float32 if d_type == "f32" else np.float16
    d = (rng.standard_normal((3, 3)) * 100).astype(kind) if accumulate else None
    got = multiply(a / 64, b / 64, d, d_type, negate_a=negate)
    assert got.dtype == kind
    for i, j in product(range(3), range(3)):
        total = sum(Fraction(x) * Fraction(y) for x, y in zip(a[i].tolist(), b[j].tolist())) / 4096
        total = (-total if negate else total) + (Fraction(float(d[i, j])) if d is not None else 0)
        assert float(got[i, j]) == exact_rounding(total, kind)


def test_two_negations_cancel_and_infinities_survive() -> None:
    a, b = np.array([[np.inf, 1.0]]), np.array([[1.0, 2.0], [-1.0, 0.0], [0.0, 1.0]])
    got = multiply(a, b, None, "f32", negate_a=True, negate_b=True)
    np.testing.assert_array_equal(got, np.float32([[np.inf, -np.inf, np.nan]]))
    assert multiply(np.array([[300.0]]), np.array([[300.0]]), None, "f16").tolist() == [[np.inf]]


@pytest.mark.parametrize("kind", ["f8f6f4", "mxf8f6f4"])
@pytest.mark.parametrize(("name", "bits"), [("e2m1", 4), ("e2m3", 6), ("e3m2", 6), ("e4m3", 8)])
def test_small_types_lie_packed_in_sixteens(kind: str, name: str, bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, 32))
    codes[codes == 0x7F] = 0
    codes[codes == 0xFF] = 0
    data = np.full((5, 32), 0xA5, dtype=np.uint8)  # padding is not looked at
    for row, chunk in product(range(5), range(2)):
        number = sum(int(c) << bits * i for i, c in enumerate(codes[row, 16 * chunk : 16 * chunk + 16]))
        data[row, 16 * chunk : 16 * chunk + 2 * bits] = list(number.to_bytes(2 * bits, "little"))
    assert storage_bits(kind, name) == 8
    np.testing.assert_array_equal(decode_operand(data, name, 8), decode(name, codes))


def test_operands_without_padding() -> None:
    data = np.array([[0x21, 0x93]], dtype=np.uint8)
    assert decode_operand(data, "e2m1", storage_bits("mxf4nvf4", "e2m1")).tolist() == [[0.5, 1.0, 1.5, -0.5]]
    assert decode_operand(np.array([[0x00, 0x3C, 0x00, 0xC0]], dtype=np.uint8), "f16", 16).tolist() == [[1.0, -2.0]]
    assert decode_operand(np.array([[0x80, 0x3F]], dtype=np.uint8), "bf16", storage_bits("f16", "bf16")).tolist() == [[1.0]]
    assert decode_operand(np.array([[0xFF, 0x1F, 0x80, 0x3F]], dtype=np.uint8), "tf32", 32).tolist() == [[1.0]]


def test_scales_are_bytes_of_words() -> None:
    words = np.array([[0x40383028, 0x7F]], dtype=np.uint32)
    assert read_scales(words, 0, 4, "ue4m3")[0, 0].tolist() == [0.25, 0.5, 1.0, 2.0]
    assert read_scales(words, 2, 2, "ue8m0")[0, 0].tolist() == [2.0**-71, 2.0**-63]
    assert np.isnan(read_scales(words, 0, 1, "ue4m3")[0, 1, 0])


CONFIGURATIONS = [
    # kind, vector, shape bits, cta_group, accumulator's lane
    ("mxf4nvf4", "block16", NVFP4, 1, 48),
    ("mxf4nvf4", "scale_vec::2X", NVFP4 | 1 << 23 | 2 << 29, 1, 40),
    ("mxf4nvf4", "block16", NVFP4 | 1 << 14, 2, 32),
    ("mxf4nvf4", "block16", NVFP4 ^ 3 << 27, 2, 64),
    ("mxf8f6f4", "block32", 1 << 23 | 5 << 7 | 1 << 27 | 3 << 29 | 1 << 4, 1, 8),
]


@pytest.mark.parametrize(("kind", "vector", "bits", "group", "n"), CONFIGURATIONS)
def test_block_scaled_products_through_tensor_memory(kind: str, vector: str, bits: int, group: int, n: int) -> None:
    """Each element from the scales that its own quarter of the lanes holds: all quarters hold different ones here."""
    i = decode_instruction(bits | n // 8 << 17, kind, group, vector)
    rng = np.random.default_rng(n)
    memory = rng.integers(0x28, 0x48, (128, 512, 4), dtype=np.uint8) if i.scale_type == "ue4m3" else None
    memory = rng.integers(120, 134, (128, 512, 4), dtype=np.uint8) if memory is None else memory
    words = memory.view("<u4")[:, :, 0]
    rows, split = i.m // group, i.m == 128 and group == 2
    codes_a, codes_b = rng.integers(0, 16, (rows, i.k)), rng.integers(0, 16, (n, i.k))
    a, b = decode(i.a_type, codes_a), decode(i.b_type, codes_b)
    d = rng.standard_normal((rows, n)).astype(np.float32)
    cells = [scale_cells(100, rows, i.scales, i.a_scale_id), scale_cells(120, n // 2 if split else n, i.scales, i.b_scale_id)]
    scales = [read_scales(words[c.lanes, c.columns], c.byte, c.scales, i.scale_type) for c in cells]
    where = accumulator_cells(0, i.m, n, group)
    got = tcgen05_multiply(i, where.lanes, a[None], b, d, *scales)
    lanes, columns = np.broadcast_arrays(where.lanes, where.columns)
    for m, j in [(0, 0), (rows - 1, n - 1), (33, 5), *rng.integers(0, [rows, n], (60, 2)).tolist()]:
        quarter = lanes[m, j] // 32
        total = Fraction(0)
        for k in range(i.k):
            s = k * i.scales // i.k
            byte_a = memory[32 * quarter + m % 32, 100 + m // 32, i.a_scale_id + s]
            # the columns of the upper half of a split accumulator start again at scale row 0
            byte_b = memory[32 * quarter + columns[m, j] % 32, 120 + columns[m, j] // 32, i.b_scale_id + s]
            scale = [Fraction(float(decode(i.scale_type, byte))) for byte in (byte_a, byte_b)]
            total += Fraction(float(a[m, k])) * scale[0] * Fraction(float(b[j, k])) * scale[1]
        total = (-total if i.negate_a != i.negate_b else total) + Fraction(float(d[m, j]))
        assert float(got[m, j]) == exact_rounding(total, np.float32)


def test_equal_quarters_take_the_short_way_to_the_same_result() -> None:
    i = decode_instruction(NVFP4 | 8 << 17, "mxf4nvf4", 1, "block16")
    rng = np.random.default_rng(1)
    a, b = (decode("e2m1", rng.integers(0, 16, (size, 64))) for size in (128, 64))
    scales = [np.broadcast_to(2.0 ** rng.integers(-3, 4, (1, size, 4)), (4, size, 4)).copy() for size in (128, 64)]
    lanes = accumulator_cells(0, 128, 64, 1).lanes
    short = tcgen05_multiply(i, lanes, a[None], b, None, *scales)
    scales[0][3, 0] = np.nextafter(scales[0][3, 0], 9)  # quarter 3 has no row 0: the result is the same
    np.testing.assert_array_equal(tcgen05_multiply(i, lanes, a[None], b, None, *scales), short)


def test_operand_a_twice_in_tensor_memory() -> None:
    i = decode_instruction(1 << 4 | 4 << 17 | 8 << 24, "f16", 2)
    rng = np.random.default_rng(2)
    cells = operand_cells(0, 128, 2, 8)
    assert np.broadcast_shapes(cells.lanes.shape, cells.columns.shape) == (2, 64, 8)
    a, b = rng.standard_normal((2, 64, 16)), rng.standard_normal((32, 16))
    got = tcgen05_multiply(i, accumulator_cells(0, 128, 32, 2).lanes, a, b, None)
    np.testing.assert_array_equal(got[:, :16], multiply(a[0], b[:16], None, "f32"))
    np.testing.assert_array_equal(got[:, 16:], multiply(a[1], b[16:], None, "f32"))


def test_the_accumulator_can_be_scaled_down() -> None:
    i = decode_instruction(1 << 4 | 1 << 17 | 4 << 24, "f16", 1)
    d = np.full((64, 8), 3.0, dtype=np.float32)
    got = tcgen05_multiply(i, accumulator_cells(0, 64, 8, 1).lanes, np.zeros((1, 64, 16)), np.zeros((8, 16)), d, scale_d=2)
    assert (got == 0.75).all()


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 300))
def test_any_float32_accumulation_stays_within_the_bound(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    terms = rng.standard_normal(count).astype(np.float32)
    exact = sum(Fraction(float(t)) for t in terms)
    total = np.float32(0)
    for t in terms:
        # the worst rounding: always towards zero
        wide = float(total) + float(t)
        near = np.float32(wide)
        total = np.nextafter(near, np.float32(0)) if abs(float(near)) > abs(wide) else near
    bound = float(accumulation_bound(float(np.abs(terms.astype(np.float64)).sum()), count))
    assert abs(Fraction(float(total)) - exact) <= Fraction(bound)
    assert bound < 2e-7 * count * float(np.abs(terms).sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wgmma_fragments(12, "f32"), "wgmma: N 12 is not possible"),
        (lambda: wgmma_fragments(8, "s64"), "wgmma: D type s64 is not modelled"),
        (lambda: mma_sync_fragments(32, "f32"), "mma.sync: K 32 is not modelled"),
        (lambda: mma_sync_fragments(16, "s64"), "mma.sync: D type s64"),
    ],
)
def test_unknown_shapes_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_scales_are_refused() -> None:
    i = decode_instruction(NVFP4 | 1 << 17, "mxf4nvf4", 1, "block16")
    lanes = accumulator_cells(0, 128, 8, 1).lanes
    with pytest.raises(ValueError, match="kind::mxf4nvf4 has 4 scales a row"):
        tcgen05_multiply(i, lanes, np.zeros((1, 128, 64)), np.zeros((8, 64)), None)
    with pytest.raises(ValueError, match="scale-input-d 1 is not possible for kind::mxf4nvf4"):
        tcgen05_multiply(i, lanes, np.zeros((1, 128, 64)), np.zeros((8, 64)), None, scale_d=1)
