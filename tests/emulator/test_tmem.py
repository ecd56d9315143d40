"""tmem.py against layouts of NVIDIA's layout library (fixtures/record_cute_layouts.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emulator.cute_layout import Layout, recorded
from glu4.emulator.tmem import (
    accumulator_cells,
    cp_cells,
    operand_cells,
    register_cells,
    scale_cells,
    shift_cells,
    split_address,
)


def name(case: dict[str, Any]) -> str:
    return " ".join(str(v) for k, v in case.items() if k in ("shape", "num", "packed", "cta_group", "m", "n", "block", "name"))


def cases(section: str) -> Any:
    return pytest.mark.parametrize("case", recorded(section), ids=name)


@cases("accumulator")
def test_accumulators_lie_where_cute_puts_them(case: dict[str, Any]) -> None:
    rows = case["m"] // case["cta_group"]
    layout = Layout(case["layout"])
    # mode 0 is (M, N), the first varying fastest; bits 16 and up of an offset are the lane
    m, n = np.arange(rows)[:, None], np.arange(case["n"])[None, :]
    offset = layout(m + rows * n, 0, 0)
    cells = accumulator_cells(0, case["m"], case["n"], case["cta_group"])
    lanes, columns = np.broadcast_arrays(cells.lanes, cells.columns)
    assert lanes.shape == (rows, case["n"])
    np.testing.assert_array_equal(lanes, offset >> 16)
    np.testing.assert_array_equal(columns, offset & 0xFFFF)
    assert len(np.unique(offset)) == offset.size


def test_accumulators_move_with_their_address() -> None:
    cells = accumulator_cells(16 << 16 | 100, 64, 8, 1)
    assert cells.lanes.ravel().tolist() == [32 * q + 16 + i for q in range(4) for i in range(16)]
    assert cells.columns.ravel().tolist() == list(range(100, 108))


@cases("tmem_operand")
def test_operand_a_lies_where_cute_puts_it(case: dict[str, Any]) -> None:
    layout = Layout(case["layout"])
    # offsets count 16-bit elements: a lane is 2^17 apart; 16 elements of K are 8 words
    for step in range(4):
        cells = operand_cells(8 * step, case["m"], case["cta_group"], 8)
        lanes, columns = np.broadcast_arrays(cells.lanes, cells.columns)
        m, k = np.arange(128)[:, None], np.arange(0, 16, 2)[None, :]
        offset = layout(m + 128 * k, 0, step)
        # CuTe names the rows of both copies of A as one mode of 128
        np.testing.assert_array_equal(lanes.reshape(128, 8), offset >> 17)
        np.testing.assert_array_equal(columns.reshape(128, 8), (offset & 0x1FFFF) // 2)


@cases("scales")
def test_scales_lie_where_cute_puts_them(case: dict[str, Any]) -> None:
    scales = 64 // case["block"]
    split = case["m"] == 128 and case["cta_group"] == 2
    for side in ("a", "b"):
        if split and side == "a":
            continue  # CuTe's tile has 128 rows there, of which a CTA has 64
        layout = Layout(case[f"tmem_{side}"])
        rows = 128 if side == "a" else case["n"]
        padded = layout.sizes()[0] // 64 // 4 * (2 if split else 1)
        for step in range(4):
            # mode 0 is ((rows, copies), (element, scale)); the four K steps of a tile share a column when a row has two
            column, byte = divmod(int(layout(0, 0, step)), 4)
            cells = scale_cells(column, rows // 2 if split else rows, scales, byte)
            for s in range(scales):
                for quarter in range(4):
                    row = np.arange(rows // 2 if split else rows)
                    half = quarter // 2
                    index = row + (rows // 2 * half + rows * (quarter % 2) if split else padded * quarter)
                    offset = layout(index + layout.sizes()[0] // scales * s, 0, step)
                    # offsets count bytes: a lane is 2^18 apart
                    np.testing.assert_array_equal(cells.lanes[quarter], offset >> 18)
                    np.testing.assert_array_equal(4 * cells.columns[quarter] + cells.byte + s, offset & 0x3FFFF)


def test_scale_addresses_may_name_their_byte() -> None:
    # CUTLASS keeps the scale id in the top two bits of an address
    assert scale_cells(0x80000010, 32, 2, 2).columns.min() == 16


@cases("registers")
def test_loads_and_stores_have_the_registers_of_cute(case: dict[str, Any]) -> None:
    count = case["num"] * {"16x128b": 2, "16x256b": 4}.get(case["shape"], 1)
    values = count * (2 if case["packed"] else 1)
    # offsets count lanes by columns, and 16-bit halves one a column
    columns_of_lane = 32 * values // (32 if case["shape"] == "32x32b" else 16)
    half = columns_of_lane // 2 if case["shape"] == "16x32bx2" else 0
    cells = register_cells(0, case["shape"], case["num"], packed=case["packed"], half_split=half)
    for layout in (Layout(case["load"]), Layout(case["store"])):
        assert layout.sizes() == [32, values]
        offset = layout(np.arange(32)[:, None], np.arange(values)[None, :])
        np.testing.assert_array_equal(cells.lanes.reshape(32, values), offset // columns_of_lane)
        np.testing.assert_array_equal(cells.columns.reshape(32, values), offset % columns_of_lane)


CP = {
    "Cp128x256b": ("128x256b", 128, 32),
    "Cp128x128b": ("128x128b", 128, 16),
    "Cp2x64x128b0213": ("64x128b warpx2::02_13", 64, 16),
    "Cp2x64x128b0123": ("64x128b warpx2::01_23", 64, 16),
    "Cp4x32x128b": ("32x128b warpx4", 32, 16),
}
# CUTLASS's ValID: what the logical bits mean in tensor memory, as (size, lanes, bits) from the fastest mode on
CP_TARGETS = {
    "Cp128x256b": [(128, 1, 0), (256, 0, 1)],
    "Cp128x128b": [(128, 1, 0), (128, 0, 1)],
    "Cp2x64x128b0213": [(64, 1, 0), (128, 0, 1), (2, 64, 0)],
    "Cp2x64x128b0123": [(32, 1, 0), (128, 0, 1), (2, 64, 0), (2, 32, 0)],
    "Cp4x32x128b": [(32, 1, 0), (128, 0, 1), (4, 32, 0)],
}


@cases("cp")
def test_cp_copies_to_the_lanes_of_cute(case: dict[str, Any]) -> None:
    shape, rows, row_bytes = CP[case["name"]]
    modes = CP_TARGETS[case["name"]]
    bits = np.arange(int(np.prod([size for size, _, _ in modes])))
    lanes, places, rest = np.zeros_like(bits), np.zeros_like(bits), bits
    for size, lane, place in modes:
        lanes, places, rest = lanes + rest % size * lane, places + rest % size * place, rest // size
    # the recorded source, in bytes: which of the logical bits are the same source bit
    source = Layout(case["source"])
    assert source.sizes()[1] * 8 == len(bits)
    cells = cp_cells(0, *shape.split())
    target = np.full((128, 64), -1)
    cell_lanes, cell_columns = np.broadcast_arrays(cells.lanes, cells.columns)
    word = np.arange(rows)[:, None] * row_bytes + 4 * np.arange(row_bytes // 4)[None, :]
    for byte in range(4):
        target[cell_lanes, 4 * cell_columns + byte] = word[None] + byte
    # source rows are the fastest mode of the logical bits; the second half of warpx2::01_23 are rows 32 to 63
    copy_rows = modes[0][0]
    row = bits % copy_rows + (32 * (bits // (copy_rows * 128) % 2) if "0123" in case["name"] else 0)
    expected = row * row_bytes + places // 8
    np.testing.assert_array_equal(target[lanes, places // 8], expected)
    assert (target >= 0).sum() == 128 * row_bytes
    # and bits of one source bit are those that the recorded layout calls the same
    first = source(np.zeros(len(bits) // 8, dtype=int), np.arange(len(bits) // 8))
    assert len(np.unique(first)) * 8 == rows * row_bytes * 8


@cases("scales")
def test_cp_carries_scales_from_shared_to_tensor_memory(case: dict[str, Any]) -> None:
    """The pair that every block-scaled kernel relies on: CuTe's shared layout, copied by 32x128b.warpx4, is its tensor layout."""
    if case["m"] == 128 and case["cta_group"] == 2:
        pytest.skip("2x2 accumulators need 64x128b.warpx2::02_13 for B")
    for side in ("a", "b"):
        shared, tmem = Layout(case[f"shared_{side}"]), Layout(case[f"tmem_{side}"])
        scales = 64 // case["block"]
        rows = shared.sizes()[0] // 64
        row, scale, step = (a.ravel() for a in np.meshgrid(np.arange(rows), np.arange(scales), np.arange(4), indexing="ij"))
        source = shared(row + rows * case["block"] * scale, 0, step)
        target = tmem(row + 4 * rows * case["block"] * scale, 0, step)
        for atom in range((int(source.max()) + 512) // 512):
            # atoms of 512 bytes follow each other in tensor memory as in shared memory, rows first; see where this one goes
            mine = source // 512 == atom
            first = int(target[mine].min()) // 4
            cells = cp_cells(first, "32x128b", "warpx4")
            got = {}
            for lane, column, r, w in zip(
                *(a.ravel() for a in np.broadcast_arrays(cells.lanes[0], cells.columns[0], *np.ogrid[:32, :4]))
            ):
                for byte in range(4):
                    got[16 * int(r) + 4 * int(w) + byte] = (int(lane) << 18) + 4 * int(column) + byte
            assert [got[int(s) % 512] for s in source[mine]] == target[mine].tolist()


def test_shift_moves_towards_lane_zero() -> None:
    source, target = shift_cells(32 << 16 | 4)
    assert source.lanes.ravel().tolist() == list(range(33, 64))
    assert target.lanes.ravel().tolist() == list(range(32, 63))
    assert target.columns[0].tolist() == list(range(4, 12))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_address(128 << 16), "lane 128, column 0 is not in 128 x 512"),
        (lambda: split_address(512), "column 512"),
        (lambda: accumulator_cells(1 << 16, 128, 8, 1), "M 128 of cta_group::1 lies at lane 0, given 1"),
        (lambda: accumulator_cells(8 << 16, 64, 8, 1), "M 64 lies at lane 0 or 16, given 8"),
        (lambda: accumulator_cells(400, 128, 128, 1), "accumulator: lane 127, column 527"),
        (lambda: scale_cells(1 << 16, 128, 4, 0), "scales: they lie at lane 0"),
        (lambda: cp_cells(0, "4x256b", "warpx4"), "tcgen05.cp: 4x256b.warpx4 is not modelled; modelled are 128x256b, "),
        (lambda: cp_cells(32 << 16, "4x256b"), "needs a lane below 32, given 32"),
        (lambda: accumulator_cells(16 << 16, 64, 64, 1, True), "D of .ws lies at lane 0, given 16"),
        (lambda: cp_cells(0, "64x128b"), "tcgen05.cp: 64x128b is not modelled"),
        (lambda: cp_cells(32 << 16, "128x128b"), "needs lane 0, given 32"),
        (lambda: register_cells(0, "8x32b", 1), "shape 8x32b is unknown"),
        (lambda: register_cells(0, "16x256b", 64), "16x256b.x64 does not exist"),
        (lambda: register_cells(0, "32x32b", 3), "32x32b.x3 does not exist"),
        (lambda: register_cells(16 << 16, "32x32b", 1), "32x32b cannot start at lane 16"),
        (lambda: register_cells(500, "32x32b", 16), "lane 31, column 515"),
        (lambda: shift_cells(16 << 16), "lane 16 is not a multiple of 32"),
    ],
)
def test_errors_say_where(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
