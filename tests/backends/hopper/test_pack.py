"""The packed weights: pack and unpack are inverse, every bit is where the kernel's decode looks for it, and the size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glu4.backends.hopper.pack import SCALE_BIAS, UNIT_WORDS, pack_gated, pack_matrix, unpack_gated, unpack_matrix
from glu4.nvfp4 import NVFP4Tensor, unpack_codes
from operands import full_range


def assert_same_but_zero_blocks(a: NVFP4Tensor, b: NVFP4Tensor) -> None:
    assert torch.equal(a.block_scale.view(torch.uint8), b.block_scale.view(torch.uint8))
    zero = (a.block_scale.view(torch.uint8) == 0).repeat_interleave(16, -1)
    assert torch.equal(unpack_codes(a.codes).masked_fill(zero, 0), unpack_codes(b.codes))
    assert torch.equal(a.global_scale, b.global_scale)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 150), blocks=st.integers(1, 13))
@settings(max_examples=60, deadline=None)
def test_unpack_inverts_pack(seed: int, n: int, blocks: int) -> None:
    k = 16 * blocks
    gate, up = full_range(seed, n, k), full_range(seed + 1, n, k)
    packed = pack_gated(gate, up)
    assert packed.shape == (-(-n // 32), -(-k // 64), UNIT_WORDS)
    for a, b in zip((gate, up), unpack_gated(packed, n, k, gate.global_scale, up.global_scale), strict=True):
        assert_same_but_zero_blocks(a, b)
    assert_same_but_zero_blocks(gate, unpack_matrix(pack_matrix(gate), n, k, gate.global_scale))


def decode_fp16(word: int, scales: int, s: int, j: int) -> tuple[float, float]:
    """Register j of step s as the kernel decodes it, low and high half: shifts, masks and one product."""
    magnitude_shift, sign_shift = ((0, 0), (3, 3), (6, 1), (9, 2))[j]
    bits = ((word << magnitude_shift) & 0x0E000E00) | ((word << sign_shift) & 0x80008000)
    scale = ((scales << 7) if s % 2 == 0 else (scales >> 1)) & 0x7F807F80
    scale = (scale >> 16 if j % 2 else scale) & 0xFFFF

    def half(b: int) -> float:
        return torch.tensor([b if b < 0x8000 else b - 0x10000], dtype=torch.int16).view(torch.float16).item()

    return half(bits & 0xFFFF) * half(scale), half(bits >> 16) * half(scale)


def decode_bf16(word: int, scales: int, s: int, j: int) -> tuple[float, float]:
    """The bf16 twin: the field lands three bits lower, and a constant lifts the scale's exponent."""
    magnitude, sign_shift = ((word >> 3, 0), (word, 3), (word << 3, 1), (word << 6, 2))[j]
    bits = (magnitude & 0x01C001C0) | ((word << sign_shift) & 0x80008000)
    scale = (((scales << 4) if s % 2 == 0 else (scales >> 4)) & 0x0FF00FF0) + 0x6F806F80
    scale = (scale >> 16 if j % 2 else scale) & 0xFFFF

    def brain(b: int) -> float:
        return torch.tensor([b if b < 0x8000 else b - 0x10000], dtype=torch.int16).view(torch.bfloat16).item()

    return brain(bits & 0xFFFF) * brain(scale), brain(bits >> 16) * brain(scale)


@pytest.mark.parametrize(("decode", "bias"), [(decode_fp16, SCALE_BIAS - 14), (decode_bf16, -8)])
def test_every_bit_is_where_the_kernel_looks(decode, bias: int) -> None:  # type: ignore[no-untyped-def]
    n, k = 40, 128
    gate, up = full_range(1, n, k), full_range(2, n, k)
    words = pack_gated(gate, up).to(torch.int64) & 0xFFFFFFFF
    values = [torch.nn.functional.pad(w.decode(torch.float64), (0, 0, 0, 24)) for w in (gate, up)]
    for tile, unit, thread in ((0, 0, 0), (0, 1, 77), (1, 0, 5), (1, 1, 127), (0, 0, 126), (0, 1, 34)):
        w, g, q = thread // 32, thread % 32 // 4, thread % 4
        for s in range(4):
            word = int(words[tile, unit, 4 * thread + s])
            scales = int(words[tile, unit, 512 + 2 * (8 * w + g) + s // 2])
            for j in range(4):
                low, high = decode(word, scales, s, j)
                row, col = tile * 32 + 8 * w + g, unit * 64 + 16 * s + 8 * (j // 2) + 2 * q
                expected = values[j % 2][row, col : col + 2] * 2.0**bias
                assert [low, high] == expected.tolist()


def test_packed_size_is_that_of_nvfp4() -> None:
    gate, up = full_range(1, 128, 256), full_range(2, 128, 256)
    nvfp4 = 2 * (128 * 128 + 128 * 16)
    assert pack_gated(gate, up).numel() * 4 == nvfp4
    assert pack_gated(gate, up).untyped_storage().nbytes() <= nvfp4 + UNIT_WORDS * 4
