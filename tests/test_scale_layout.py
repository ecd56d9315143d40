"""Both layouts: every offset against the formula, and the mapping in both directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glu4.scale_layout import LinearLayout, SwizzledLayout

sizes = {"rows": st.integers(1, 300), "cols": st.integers(1, 13)}


def numbered(rows: int, cols: int) -> torch.Tensor:
    return (torch.arange(rows * cols) % 251 + 1).to(torch.uint8).view(rows, cols)


@given(**sizes)
@settings(max_examples=40, deadline=None)
def test_storage_holds_each_scale_at_its_offset(rows: int, cols: int) -> None:
    scales = numbered(rows, cols)
    for layout in (LinearLayout(rows, cols), SwizzledLayout(rows, cols)):
        storage = layout.store(scales)
        assert tuple(storage.shape) == layout.storage_shape
        flat = storage.flatten()
        for i in range(0, rows, 17):
            for j in range(cols):
                assert flat[layout.offset(i, j)] == scales[i, j]
        assert torch.equal(layout.load(storage), scales)


@given(**sizes)
@settings(max_examples=40, deadline=None)
def test_coordinates_invert_offsets_and_the_rest_is_zero_padding(rows: int, cols: int) -> None:
    layout = SwizzledLayout(rows, cols)
    storage = layout.store(numbered(rows, cols)).flatten().tolist()
    seen = set()
    for offset, byte in enumerate(storage):
        at = layout.coordinates(offset)
        if at is None:
            assert byte == 0
        else:
            assert layout.offset(*at) == offset
            seen.add(at)
    assert len(seen) == rows * cols


def test_the_published_formulas_agree() -> None:
    """The reshape-and-permute form, and the logical 6-D view with its byte strides."""
    rows, cols = 256, 8
    layout = SwizzledLayout(rows, cols)
    scales = torch.arange(rows * cols).remainder(251).to(torch.uint8).view(rows, cols)
    storage = layout.store(scales)
    permuted = scales.view(rows // 128, 4, 32, cols // 4, 4).permute(0, 3, 2, 1, 4).contiguous()
    assert torch.equal(storage, permuted)
    strides = (16, 4, layout.rest_cols * 512, 1, 512, rows * cols)
    six = storage.flatten().as_strided((32, 4, 2, 4, 2, 1), strides)
    for i, j in ((0, 0), (31, 3), (37, 4), (127, 7), (128, 0), (255, 7)):
        assert six[i % 32, i % 128 // 32, i // 128, j % 4, j // 4, 0] == scales[i, j]


def test_batches_and_float8() -> None:
    scales = torch.randint(0, 127, (2, 3, 130, 5), dtype=torch.uint8).view(torch.float8_e4m3fn)
    layout = SwizzledLayout(130, 5)
    storage = layout.store(scales)
    assert tuple(storage.shape) == (2, 3, *layout.storage_shape)
    assert storage.dtype == torch.float8_e4m3fn
    assert torch.equal(layout.load(storage).view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(storage[1, 2].view(torch.uint8), layout.store(scales[1, 2]).view(torch.uint8))


def test_out_of_range() -> None:
    with pytest.raises(IndexError, match=r"scale \(4, 0\) is outside a matrix of 4 x 2 scales"):
        SwizzledLayout(4, 2).offset(4, 0)
    with pytest.raises(IndexError, match="offset 512 is outside a stored matrix of 512 bytes"):
        SwizzledLayout(4, 2).coordinates(512)
    with pytest.raises(IndexError, match="offset 8 is outside"):
        LinearLayout(4, 2).coordinates(8)
