"""tile::gather4 and tile::scatter4: four rows of a tensor, each by its own coordinate (PTX ISA 5.5.3.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emulator.runner import kinds
from emulator.test_divergence import SCHEDULES
from emulator.test_tma import DUMP, SETUP, SYNC, WAIT, tensor_map, with_map
from glu4.emulator.errors import PtxError
from glu4.emulator.tensor_map import TensorMap, four_rows

ROWS = [13, 2, 15, 40]  # the last is out of bounds
COLUMN = 64


def described(swizzle: str) -> dict[str, Any]:
    return tensor_map(global_shape=[160, 16], global_strides_bytes=[192], box_shape=[128, 1], swizzle=swizzle)


def swizzled(rows: np.ndarray, swizzle: str) -> np.ndarray:
    """[4, 128] bytes as they lie from a multiple of 1024 on: the tables of PTX ISA 5.5.7 in 16-byte chunks."""
    if swizzle == "none":
        return rows
    out = np.empty_like(rows)
    for row in range(4):
        for chunk in range(8):
            out[row, 16 * (chunk ^ row) :][:16] = rows[row, 16 * chunk :][:16]
    return out


COORDINATES = "mov.u32 %x, 64; .reg .b32 %r<4>; " + " ".join(f"mov.u32 %r{i}, {row};" for i, row in enumerate(ROWS))
GATHER = (
    SETUP.replace("SYNC", SYNC)
    + COORDINATES
    + """@%one mbarrier.arrive.expect_tx.shared.b64 _, [%b], 512;
@%one cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes [%s], [%map, {%x, %r0, %r1, %r2, %r3}], [%b];
"""
    + WAIT
    + DUMP.replace("COUNT", "128")
)


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
@pytest.mark.parametrize("swizzle", ["none", "128B"])
def test_gather(swizzle: str, name: str, seed: int) -> None:
    a = np.random.default_rng(0).integers(1, 256, (16, 192), dtype=np.uint8)
    rows = np.zeros((4, 128), np.uint8)
    for i, row in enumerate(ROWS[:3]):
        rows[i, :96] = a[row, COLUMN:160]  # the tensor is 160 wide
    r = with_map(GATHER, {"a": a, "out": np.zeros((4, 128), np.uint8)}, described(swizzle), schedule_name=name, seed=seed)
    assert r.report.clean, str(r.report)
    np.testing.assert_array_equal(r.buffers["out"], swizzled(rows, swizzle))


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
def test_scatter(name: str, seed: int) -> None:
    a = np.zeros((16, 192), np.uint8)
    body = (
        SETUP.replace("SYNC", SYNC)
        + COORDINATES
        + """{ .reg .b32 %i, %j; mov.u32 %i, %t; F: shl.b32 %j, %i, 2; add.u32 %y, %s, %j; mad.lo.u32 %z, %i, 77, 5; st.shared.b32 [%y], %z; add.u32 %i, %i, 32;
        setp.lt.u32 %p, %i, 128; @%p bra F; } fence.proxy.async; bar.sync 0;
        @%one cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group [%map, {%x, %r0, %r1, %r2, %r3}], [%s];
        @%one cp.async.bulk.commit_group; @%one cp.async.bulk.wait_group 0;"""
    )
    source = (np.arange(128, dtype=np.uint32) * 77 + 5).view(np.uint8).reshape(4, 128)
    expected = a.copy()
    for i, row in enumerate(ROWS[:3]):
        expected[row, COLUMN:160] = source[i, :96]
    r = with_map(body, {"a": a}, described("none"), schedule_name=name, seed=seed)
    assert r.report.clean, str(r.report)
    np.testing.assert_array_equal(r.buffers["a"], expected)
    assert "missing proxy fence" in kinds(with_map(body.replace("fence.proxy.async;", ""), {"a": a}, described("none")))


def test_boxes_are_one_row() -> None:
    two = tensor_map(global_shape=[160, 16], global_strides_bytes=[192], box_shape=[128, 2])
    r = with_map(GATHER, {"a": np.zeros((16, 192), np.uint8), "out": np.zeros((4, 128), np.uint8)}, two)
    assert "tensor map" in kinds(r)
    assert "box_shape[1] is 2; four rows need 1" in str(r.report)
    with pytest.raises(ValueError, match="has rank 3"):
        four_rows(TensorMap(0, "u8", (16, 1, 1), (16, 16), (16, 1, 1), (1, 1, 1)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2d.shared", "3d.shared", "is not modelled"),
        ("%r2, %r3}", "%r2}", "expected a vector of 5"),
        ("tile::gather4", "tile::scatter4", r"\.tile::scatter4 is not"),
        ("tile::gather4", "im2col", r"\.im2col is not"),
    ],
)
def test_malformed_ones_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        with_map(
            GATHER.replace(old, new),
            {"a": np.zeros((16, 192), np.uint8), "out": np.zeros((4, 128), np.uint8)},
            described("none"),
        )
