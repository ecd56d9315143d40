"""The format: every code and scale, the quantisers against an independent scalar one, and what bad input says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scalar_nvfp4 as scalar
from glu4 import NVFP4Tensor, quantize
from glu4.nvfp4 import E2M1_VALUES, pack_codes, unpack_codes
from operands import full_range


def raw(t: NVFP4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return t.codes, t.block_scale.view(torch.uint8), t.global_scale


def same(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    return all(torch.equal(p, q) for p, q in zip(raw(a), raw(b), strict=True))


def all_products() -> NVFP4Tensor:
    """Row s: block scale byte s, its 16 codes in order."""
    codes = pack_codes(torch.arange(16, dtype=torch.uint8)).repeat(0x7F, 1)
    scale = torch.arange(0x7F, dtype=torch.uint8).view(-1, 1).view(torch.float8_e4m3fn)
    return NVFP4Tensor(codes, scale, torch.tensor(1.0))


def test_every_product_of_code_and_scale_is_exact_in_16_bits() -> None:
    t = all_products()
    for s, row in enumerate(t.decode(torch.float64)):
        for code, value in enumerate(row.tolist()):
            expected = scalar.E2M1[code & 7] * scalar.E4M3[s]
            assert abs(value) == expected
            assert np.signbit(value) == bool(code & 8)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(t.decode(dtype).double(), t.decode(torch.float64))
    magnitudes = t.decode(torch.float64).abs().unique()
    assert (len(magnitudes), magnitudes[1], magnitudes[-1]) == (238, 2.0**-10, 2688)


def test_even_k_lies_in_the_low_nibble() -> None:
    codes = torch.tensor([[0x21, 0x43]], dtype=torch.uint8)
    assert unpack_codes(codes).tolist() == [[1, 2, 3, 4]]
    assert torch.equal(pack_codes(unpack_codes(codes)), codes)


def finite_halves(order: str) -> np.ndarray:
    """All finite fp16 values, in an order that mixes magnitudes within blocks or keeps near ones together."""
    values = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    values = values[np.isfinite(values)]
    if order == "mixed":
        return np.random.default_rng(7).permutation(values)
    return values[np.argsort(np.abs(values), kind="stable")]


@pytest.mark.parametrize("method", ["nearest", "four_over_six"])
@pytest.mark.parametrize(("order", "g"), [("mixed", None), ("sorted", None), ("sorted", 2.0**-9), ("sorted", 0.0123)])
def test_all_halves_code_by_code(order: str, g: float | None, method: str) -> None:
    values = finite_halves(order)
    x = torch.from_numpy(values.reshape(-1, 16)).half()
    t = quantize(x, g, method)
    top = 6.0 * (448.0 if method == "nearest" else 256.0)
    scale_g = np.float32(g) if g is not None else np.float32(np.float32(np.abs(values).max()) / np.float32(top))
    assert t.global_scale.item() == scale_g
    codes, scales = unpack_codes(t.codes).numpy(), t.block_scale.view(torch.uint8).flatten().numpy()
    decoded = t.dequantize().numpy()
    for i, block in enumerate(values.reshape(-1, 16)):
        expected, expected_scale = scalar.quantize_block(block, scale_g, method == "four_over_six")
        assert scales[i] == expected_scale, (i, block)
        assert codes[i].tolist() == expected, (i, block)
        back = np.array([scalar.decode(c, expected_scale, scale_g) for c in expected], dtype=np.float32)
        assert back.tobytes() == decoded[i].tobytes()


def test_non_finite_halves() -> None:
    x = torch.zeros(2, 32, dtype=torch.float16)
    x[0, 3], x[1, 20] = float("nan"), float("-inf")
    x[0, 16] = 5.0
    with pytest.raises(ValueError, match="x: holds NaN or infinity"):
        quantize(x)
    t = quantize(x, nonfinite="propagate")
    values = t.dequantize()
    assert values[0, :16].isnan().all()
    assert values[1, 16:].isnan().all()
    assert values[0, 16] == 5.0
    assert torch.equal(values[1, :16], torch.zeros(16))


def test_zero_and_empty() -> None:
    zero = quantize(torch.zeros(2, 3, 32))
    assert zero.global_scale.tolist() == [1.0, 1.0]
    assert not zero.block_scale.view(torch.uint8).any()
    assert torch.equal(zero.dequantize(), torch.zeros(2, 3, 32))
    assert unpack_codes(quantize(torch.full((1, 16), -0.0)).codes).tolist() == [[8] * 16]
    empty = quantize(torch.empty(0, 32))
    assert empty.dequantize().shape == (0, 32)
    assert empty.global_scale.item() == 1.0


def test_block_scale_is_zero_only_for_zero_blocks() -> None:
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 16] = 1e-30, 1000.0
    assert quantize(x).block_scale.view(torch.uint8).tolist() == [[0x01, 0x7E, 0x00]]


def test_smallest_float32_values_do_not_divide_by_zero() -> None:
    x = torch.full((1, 16), 1e-45)
    assert quantize(x).dequantize().isfinite().all()


def test_given_global_scale_saturates() -> None:
    x = torch.tensor([[1e6] + [1.0] * 15])
    t = quantize(x, 1.0)
    assert t.dequantize()[0, 0] == 2688


def test_four_over_six_never_has_a_larger_squared_error_for_one_global_scale() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    g = (x.abs().max() / (6 * 256)).item()
    nearest, better = quantize(x, g), quantize(x, g, "four_over_six")

    def block_error(t: NVFP4Tensor) -> torch.Tensor:
        return ((t.dequantize(torch.float64) - x) ** 2).unflatten(-1, (-1, 16)).sum(-1)

    # float32 evaluation may misjudge blocks whose two errors agree to its precision
    assert (block_error(better) <= block_error(nearest) * (1 + 2.0**-18)).all()
    assert block_error(better).sum() < 0.9 * block_error(nearest).sum()


@given(seed=st.integers(0, 2**32), rows=st.integers(0, 300), blocks=st.integers(1, 9), batch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_layouts_and_slices_keep_every_value(seed: int, rows: int, blocks: int, batch: int) -> None:
    shape = (batch, rows, blocks * 16) if batch else (rows, blocks * 16)
    t = full_range(seed, *shape)
    swizzled = t.to_swizzled()
    assert swizzled.is_swizzled
    assert swizzled.to_swizzled() is swizzled
    assert same(swizzled.to_linear(), t)
    assert torch.equal(swizzled.dequantize(), t.dequantize())
    flat = NVFP4Tensor.from_swizzled(t.codes, swizzled.block_scale.flatten(), t.global_scale)
    assert same(flat, swizzled)
    if batch:
        assert torch.equal(swizzled[batch - 1].dequantize(), t.dequantize()[batch - 1])
    start = rows // 3
    assert torch.equal(swizzled.narrow_rows(start, rows - start).dequantize(), t.dequantize()[..., start:, :])


def test_quantize_straight_into_the_swizzled_layout() -> None:
    x = torch.randn(130, 80, generator=torch.Generator().manual_seed(0))
    assert same(quantize(x, layout="swizzled"), quantize(x).to_swizzled())


def test_quantizing_a_decoded_tensor_returns_its_values() -> None:
    t = full_range(5, 40, 256)
    again = quantize(t.dequantize(), t.global_scale)
    scale = t.linear_block_scale().float()
    block_top = t.decode().abs().unflatten(-1, (-1, 16)).amax(-1)
    full = (block_top == 6 * scale).unsqueeze(-1).expand(-1, -1, 16).flatten(-2)
    assert torch.equal(again.dequantize()[full], t.dequantize()[full])


def test_both_storage_types_of_packed_codes() -> None:
    t = full_range(1, 4, 32)
    assert same(NVFP4Tensor(t.codes.view(torch.float4_e2m1fn_x2), t.block_scale, t.global_scale), t)


def test_nibble_order_and_scale_signs() -> None:
    t = full_range(2, 8, 64)
    swapped = (t.codes << 4) | (t.codes >> 4)
    assert same(NVFP4Tensor.from_packed(swapped, t.block_scale, t.global_scale, nibble_order="high_first"), t)
    negative = (t.block_scale.view(torch.uint8) | 0x80).view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="32 of 32 e4m3 scales have the sign bit set"):
        NVFP4Tensor(t.codes, negative, t.global_scale)
    assert same(NVFP4Tensor.from_packed(t.codes, negative, t.global_scale, scale_sign="strip"), t)
    folded = NVFP4Tensor.from_packed(t.codes, negative, t.global_scale, scale_sign="fold")
    assert torch.equal(folded.dequantize(), -t.dequantize())
    with pytest.raises(ValueError, match="nibble_order: expected one of low_first, high_first, got 'big'"):
        NVFP4Tensor.from_packed(t.codes, t.block_scale, t.global_scale, nibble_order="big")  # type: ignore[arg-type]


def test_dequantize_is_one_float32_product() -> None:
    t = full_range(9, 16, 64)
    table = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    exact = table[unpack_codes(t.codes).long()] * t.block_scale.double().repeat_interleave(16, -1)
    assert torch.equal(t.dequantize(torch.float64), exact * t.global_scale.double())
    assert torch.equal(t.dequantize(), exact.float() * t.global_scale)
    assert torch.equal(t.dequantize(torch.bfloat16), (exact.float() * t.global_scale).bfloat16())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": torch.zeros(4, 16)}, TypeError, "codes: expected torch.uint8, got torch.float32"),
        ({"block_scale": torch.zeros(4, 2)}, TypeError, "block_scale: expected torch.float8_e4m3fn, got torch.float32"),
        (
            {"block_scale": torch.zeros(4, 2).to(torch.float8_e4m3fnuz)},
            TypeError,
            "e4m3fn even where a text says e4m3fnuz",
        ),
        ({"block_scale": torch.zeros(4, 3).to(torch.float8_e4m3fn)}, ValueError, r"need \[4, 2\] \(linear\)"),
        ({"codes": torch.zeros(4, 12, dtype=torch.uint8)}, ValueError, "positive multiple of 16, got K = 24"),
        ({"codes": torch.zeros(16, dtype=torch.uint8)}, ValueError, r"codes: expected \[..., rows, K/2\]"),
        ({"global_scale": torch.ones(3)}, ValueError, r"global_scale: expected shape \[\] or \[\], got \[3\]"),
        (
            {"global_scale": torch.tensor(float("nan"))},
            ValueError,
            "global_scale: expected positive finite multipliers, found nan",
        ),
        ({"global_scale": torch.tensor(float("inf"))}, ValueError, "found inf"),
        ({"global_scale": torch.tensor(0.0)}, ValueError, "found 0.0"),
        ({"global_scale": torch.tensor(-1.0)}, ValueError, "found -1.0"),
        ({"global_scale": torch.ones((), device="meta")}, ValueError, "global_scale is on meta, codes are on cpu"),
        ({"global_scale": 1.0}, TypeError, "global_scale: expected a torch.Tensor, got float"),
        (
            {"block_scale": torch.full((4, 2), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)},
            ValueError,
            r"8 of 8 e4m3 scales are NaN \(0x7F\)",
        ),
    ],
)
def test_bad_parts(change: dict[str, object], error: type[Exception], message: str) -> None:
    t = full_range(0, 4, 32)
    parts = {"codes": t.codes, "block_scale": t.block_scale, "global_scale": t.global_scale, **change}
    with pytest.raises(error, match=message):
        NVFP4Tensor(**parts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"x": torch.zeros(2, 24)}, ValueError, "K a positive multiple of 16"),
        ({"x": torch.zeros(2, 16, dtype=torch.float64)}, TypeError, "x: expected float16, bfloat16 or float32"),
        ({"x": torch.zeros(16)}, ValueError, r"expected \[..., rows, K\]"),
        ({"x": [[0.0] * 16]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"global_scale": 0.0}, ValueError, "global_scale: expected a positive finite float32 multiplier, got 0.0"),
        ({"global_scale": float("nan")}, ValueError, "got nan"),
        ({"global_scale": 1e-46}, ValueError, "float32 multiplier, got 1e-46"),  # zero in float32
        ({"global_scale": 1e39}, ValueError, r"float32 multiplier, got 1e\+39"),
        ({"global_scale": "1"}, TypeError, "global_scale: expected a float, a float32 tensor or None, got str"),
        ({"global_scale": torch.tensor(-2.0)}, ValueError, "expected positive finite multipliers, got -2.0"),
        ({"global_scale": torch.ones(2)}, ValueError, r"expected float32 of shape \[\] or \[\]"),
        ({"method": "best"}, ValueError, "method: expected one of nearest, four_over_six, got 'best'"),
        ({"layout": "tiled"}, ValueError, "layout: expected one of linear, swizzled, got 'tiled'"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite: expected one of error, propagate, got 'ignore'"),
    ],
)
def test_bad_quantize(kwargs: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(**{"x": torch.zeros(2, 16), **kwargs})  # type: ignore[arg-type]


def test_swizzled_bytes_must_be_those_of_the_padded_size() -> None:
    t = full_range(0, 4, 32)
    with pytest.raises(ValueError, match="take 512 bytes, padding to 128 rows x 4 scales included, got 8"):
        NVFP4Tensor.from_swizzled(t.codes, t.block_scale, t.global_scale)


def test_only_stacks_can_be_indexed() -> None:
    with pytest.raises(IndexError, match="only a batch or stack"):
        full_range(0, 4, 32)[0]
    for index in ((0, 1), None, True, torch.tensor([0, 2])):
        with pytest.raises(TypeError, match="index: expected one integer or slice, got "):
            full_range(0, 3, 4, 32)[index]  # type: ignore[index]


def test_a_cast_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cannot be cast to torch.float16; dequantize\(torch.float16\) gives its values"):
        full_range(0, 4, 32).to(torch.float16)  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [lambda t: pickle.loads(pickle.dumps(t)), copy.deepcopy, copy.copy])
def test_copies_and_pickles(copied: Callable[[NVFP4Tensor], NVFP4Tensor]) -> None:
    for t in (full_range(0, 2, 130, 80), full_range(0, 2, 130, 80).to_swizzled()):
        assert same(copied(t), t)


def test_on_the_meta_device_there_are_shapes_and_no_values() -> None:
    t = full_range(0, 2, 130, 80).to("meta")
    t.check_values()
    assert t.to_swizzled()[1:].shape == (1, 130, 80)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_quantize_never_returns_a_tensor_that_its_own_check_refuses(data: st.DataObject) -> None:
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    values = data.draw(st.lists(floats, min_size=32, max_size=32))
    t = quantize(torch.tensor(values).view(2, 16), method=data.draw(st.sampled_from(["nearest", "four_over_six"])))
    t.check_values()
    assert t.dequantize(torch.float64).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 48), (2, 5, 80), (1, 16), (2, 1, 3, 144)])
def test_aligned_rows_are_16_bytes_apart_and_zero_between(shape: tuple[int, ...]) -> None:
    t = full_range(3, *shape)
    assert not t.has_aligned_rows
    aligned = t.with_aligned_rows()
    assert same(aligned, t)
    assert aligned.has_aligned_rows
    assert aligned.row_bytes == shape[-1] // 2 + 8
    memory = torch.as_strided(aligned.codes, (*shape[:-1], aligned.row_bytes), (*aligned.codes.stride()[:-1], 1))
    assert not memory[..., shape[-1] // 2 :].any()
    assert aligned.with_aligned_rows() is aligned
    assert same(t.to_swizzled().with_aligned_rows(), t.to_swizzled())


def test_rows_that_are_aligned_already_are_not_copied() -> None:
    t = full_range(3, 2, 5, 96)
    assert t.row_bytes == 48
    assert t.with_aligned_rows() is t
    assert t[1].with_aligned_rows().codes.data_ptr() == t[1].codes.data_ptr()


def test_rows_with_other_gaps_or_without_the_last_padding_are_not_aligned() -> None:
    t = full_range(3, 4, 96)
    wide = torch.zeros(4, 64, dtype=torch.uint8)
    wide[:, :48] = t.codes
    apart = NVFP4Tensor(wide[:, :48], t.block_scale, t.global_scale)
    assert not apart.has_aligned_rows, "64 bytes apart, which no K says"
    assert apart.with_aligned_rows().codes.stride() == (48, 1)
    odd = full_range(3, 4, 48)
    short = torch.zeros(3 * 32 + 24, dtype=torch.uint8).as_strided((4, 24), (32, 1))
    assert not NVFP4Tensor(short, odd.block_scale, odd.global_scale).has_aligned_rows, "the last row ends with the memory"


@pytest.mark.parametrize("k", [48, 64])
def test_swizzled_quantize_aligns_rows(k: int) -> None:
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(2))
    assert quantize(x, layout="swizzled").has_aligned_rows
    assert same(quantize(x, layout="swizzled").to_linear(), quantize(x))


@pytest.mark.parametrize("shape", [(5, 48), (2, 130, 80), (130, 64)])
def test_padding_of_given_swizzled_scales_is_zero(shape: tuple[int, ...]) -> None:
    """Another tool may leave anything there, NaN too, and a tensor core would multiply it."""
    t = full_range(4, *shape)
    clean = t.to_swizzled().block_scale.view(torch.uint8)
    ours = t.to_swizzled().scale_layout.store(torch.ones_like(t.block_scale, dtype=torch.uint8)).bool()
    given = torch.where(ours, clean, 0x7F).view(torch.float8_e4m3fn)
    for made in (NVFP4Tensor.from_swizzled(t.codes, given, t.global_scale), NVFP4Tensor(t.codes, given, t.global_scale)):
        assert same(made.to_linear(), t)
        columns = made.block_scale.view(torch.uint8)[..., -1, :, :, :].flatten(0, -2)
        assert not columns[:, shape[-1] // 16 % 4 or 4 :].any()
    assert (NVFP4Tensor(t.codes, given, t.global_scale).block_scale.data_ptr() == given.data_ptr()) == (shape[-1] == 64)
