"""Which tokens a kernel decodes, which are decoded ahead of it and by what, and what a launch reads them from; with a Hopper device
made of Python (`fake_hopper`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fake_hopper import FakeCuda, description, fake_hopper
from glu4 import GatedWeights, LinearWeight, NVFP4Tensor, dual_gemm, linear, quantize, reference
from glu4.backends.hopper import launch, tokens
from glu4.backends.hopper.config import DECODE_MANY, DECODE_THREADS, DECODE_WORDS, SHIPPED, Config
from glu4.backends.hopper.spec import DecodeSpec, KernelSpec, Spec
from glu4.backends.hopper.tokens import DECODED, NVFP4, decode, format_of, prepared, source
from glu4.compiled import store
from glu4.nvfp4 import _unchecked
from operands import full_range

PLAIN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_hopper(monkeypatch) as fake:
        yield fake


def moved(t: Tensor, offset: int) -> Tensor:
    """The same values `offset` bytes past an address that is a multiple of 64."""
    raw = t.contiguous().view(torch.uint8).flatten()
    buffer = torch.zeros(raw.numel() + 64 + offset, dtype=torch.uint8)
    assert buffer.data_ptr() % 64 == 0
    return buffer[offset : offset + raw.numel()].copy_(raw).view(t.dtype).view(t.shape)


def apart(t: Tensor) -> Tensor:
    """The same values, rows apart in memory."""
    return torch.cat((t, t), -1)[..., : t.shape[-1]]


def by_kernel(x: NVFP4Tensor) -> bool:
    """Whether sm90_decode_tokens takes x, whose parts are contiguous: codes are in whole words."""
    return x.codes.data_ptr() % 4 == 0


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


# ---- the format ----


def test_the_format_of_floats_is_their_type() -> None:
    assert format_of(torch.zeros(1, 16).half()) is torch.float16
    assert format_of(torch.zeros(1, 16).bfloat16()) is torch.bfloat16


CONDITIONS: list[tuple[Callable[[NVFP4Tensor], NVFP4Tensor], str]] = [
    (lambda x: x, NVFP4),
    (lambda x: x.to_swizzled(), DECODED),
    (lambda x: _unchecked(moved(x.codes, 8), x.block_scale, x.global_scale), NVFP4),
    (lambda x: _unchecked(moved(x.codes, 4), x.block_scale, x.global_scale), DECODED),
    (lambda x: _unchecked(moved(x.codes, 1), x.block_scale, x.global_scale), DECODED),
    (lambda x: _unchecked(x.codes, moved(x.block_scale, 4), x.global_scale), NVFP4),
    (lambda x: _unchecked(x.codes, moved(x.block_scale, 2), x.global_scale), DECODED),
    (lambda x: _unchecked(x.codes, moved(x.block_scale, 1), x.global_scale), DECODED),
    (lambda x: _unchecked(apart(x.codes), x.block_scale, x.global_scale), DECODED),
    (lambda x: _unchecked(x.codes, apart(x.block_scale), x.global_scale), DECODED),
    (lambda x: x.narrow_rows(1, 2), NVFP4),
    (lambda x: replace(x, global_scale=torch.tensor(3.0)), NVFP4),
]


@pytest.mark.parametrize("index", range(len(CONDITIONS)))
def test_each_condition_of_a_kernel_that_decodes(index: int) -> None:
    change, expected = CONDITIONS[index]
    assert format_of(change(full_range(1, 5, 128))) == expected


@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 24),
    lead=st.integers(0, 3),
    swizzled=st.booleans(),
    codes_at=st.integers(0, 16),
    scales_at=st.integers(0, 16),
    codes_apart=st.booleans(),
    scales_apart=st.booleans(),
)
@PLAIN
def test_the_format_follows_from_layout_alignment_and_k(rows: int, blocks: int, lead: int, swizzled: bool, codes_at: int,
                                                        scales_at: int, codes_apart: bool, scales_apart: bool) -> None:  # fmt: skip
    shape = (*(lead,) * (lead > 0), rows, 16 * blocks)
    x = full_range(1, *shape)
    x = x.to_swizzled() if swizzled else x
    codes, scales = moved(x.codes, codes_at), moved(x.block_scale, scales_at)
    codes = apart(codes) if codes_apart else codes
    scales = apart(scales) if scales_apart and not swizzled else scales
    readable = not swizzled and codes.is_contiguous() and scales.is_contiguous()
    aligned = codes.data_ptr() % 8 == scales.data_ptr() % 4 == blocks % 4 == 0
    x = _unchecked(codes, scales, x.global_scale)
    assert format_of(x) == (NVFP4 if readable and aligned else DECODED)
    if format_of(x) == NVFP4:  # then every matrix of a batch is aligned too, which its own launch reads
        for i in range(lead):
            part = source(x, i)
            assert part.params[0] % 8 == part.params[4] % 4 == 0


# ---- what a launch reads ----


@given(rows=st.integers(1, 9), units=st.integers(1, 5), lead=st.integers(1, 3))
@PLAIN
def test_the_source_of_nvfp4_tokens_is_where_they_lie(rows: int, units: int, lead: int) -> None:
    x, k = full_range(1, lead, rows, 64 * units), 64 * units
    blocks = k // 16
    whole = source(x)
    assert (whole.m, whole.k, whole.matrix) == (lead * rows, k, None)
    assert whole.params == (
        x.codes.data_ptr(),
        lead * rows,
        blocks,
        blocks,
        x.block_scale.data_ptr(),
        lead * rows,
        blocks,
        blocks,
    )
    for i in range(lead):
        at = (x.codes[i].data_ptr(), rows, blocks, blocks, x.block_scale[i].data_ptr(), rows, blocks, blocks)
        assert source(x, i)[:4] == (rows, k, None, at)


def test_the_source_of_floats() -> None:
    x = torch.randn(3, 5, 96).half()
    whole, item = source(x), source(x, 1)
    assert whole[:4] == (15, 96, (x.data_ptr(), 15, 96, 192), (15, 96))
    assert item[:4] == (5, 96, (x[1].data_ptr(), 5, 96, 192), (5, 96))
    wide = source(x[:, :, :80], 1)
    assert wide[:4] == (5, 80, (x[1].data_ptr(), 5, 80, 192), (5, 80))
    copied = source(x[:, :, 1:81], 1)  # no tensor map can address it
    assert copied.matrix == (copied.held.data_ptr(), 5, 80, 160)
    assert torch.equal(copied.held, x[1, :, 1:81])


def test_what_is_prepared() -> None:
    x, floats = full_range(1, 5, 128), torch.zeros(5, 128).half()
    assert prepared(x, True, -1) is x
    assert prepared(floats, False, -1) is prepared(floats, True, -1) is floats


# ---- decoded ahead ----


@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 300),
    blocks=st.integers(1, 13),
    lead=st.integers(0, 3),
    swizzled=st.booleans(),
    codes_at=st.sampled_from([0, 1, 2, 4, 8]),
    scales_at=st.sampled_from([0, 1, 4]),
)
@PLAIN
def test_decoding_ahead_is_one_launch_and_exact(cuda: FakeCuda, seed: int, rows: int, blocks: int, lead: int, swizzled: bool,
                                                codes_at: int, scales_at: int) -> None:  # fmt: skip
    x = full_range(seed, *(lead,) * (lead > 0), rows, 16 * blocks)
    want = x.decode(torch.float16)
    x = x.to_swizzled() if swizzled else x
    x = _unchecked(moved(x.codes, codes_at), moved(x.block_scale, scales_at), x.global_scale)
    before = len(cuda.launches)
    got = prepared(x, False, -1)
    assert isinstance(got, Tensor)
    assert same(got, want)
    made = cuda.launches[before:]
    assert [e.spec for e in made] == [DecodeSpec()] * by_kernel(x)
    if made:
        words = x.codes.numel() // 4
        (one,) = made
        assert one.grid[0] * DECODE_THREADS >= words > (one.grid[0] - 1) * DECODE_THREADS
        assert one.parameters[:2] == (x.codes.data_ptr(), words)
        if not (swizzled and lead):  # whose scales are copied
            assert one.parameters[2:4] == (x.block_scale.data_ptr(), x.block_scale.numel())
        assert one.parameters[6] == (2 * blocks if swizzled and not lead else 0)
        assert one.stream == cuda.stream


@pytest.mark.parametrize(
    ("codes", "scales"), [(apart, lambda t: t), (lambda t: t, apart), (lambda t: t[:1].expand(5, -1), lambda t: t)],
    ids=["codes apart", "scales apart", "codes expanded"],
)  # fmt: skip
def test_parts_that_are_not_dense_are_decoded_by_torch(
    cuda: FakeCuda, codes: Callable[[Tensor], Tensor], scales: Callable[[Tensor], Tensor]
) -> None:
    x = full_range(1, 5, 64)
    x = _unchecked(codes(x.codes), scales(x.block_scale.view(torch.uint8)).view(torch.float8_e4m3fn), x.global_scale)
    assert not (x.codes.is_contiguous() and x.block_scale.is_contiguous())
    got = prepared(x, False, -1)
    assert isinstance(got, Tensor)
    assert same(got, x.decode(torch.float16))
    assert not cuda.launches


def test_what_32_bit_indices_cannot_reach_is_decoded_by_torch(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output has as many words as there are bytes of codes; swizzled scales of few rows may have more bytes than that."""
    assert tokens._INDICES == 2**31
    monkeypatch.setattr(tokens, "_INDICES", 1024)
    for x, launches in (
        (full_range(1, 4, 496), 1),
        (full_range(1, 4, 512), 0),
        (full_range(1, 1, 64).to_swizzled(), 1),
        (full_range(1, 1, 80).to_swizzled(), 0),
    ):
        cuda.launches.clear()
        got = prepared(x, False, -1)
        assert isinstance(got, Tensor)
        assert same(got, x.decode(torch.float16))
        assert len(cuda.launches) == launches, x


def test_the_largest_sizes_that_are_launched_fit_their_parameters() -> None:
    """Of the kernel's parameters, sizes are 32 bits with a sign."""
    words = (tokens._INDICES - 1) // 4
    assert 4 * words < 2**31 <= 4 * (words + 1)
    assert DECODE_WORDS * (words + DECODE_THREADS) < 2**31  # the index of a thread past the end


@pytest.mark.parametrize(("words", "ctas"), [(DECODE_MANY - 2, DECODE_MANY // 128), (DECODE_MANY, DECODE_MANY // 256)])
def test_threads_take_more_words_where_there_are_many(cuda: FakeCuda, words: int, ctas: int) -> None:
    x = full_range(1, words // 2, 16)
    assert same(prepared(x, False, -1), x.decode(torch.float16))  # type: ignore[arg-type]
    (one,) = cuda.launches
    assert one.grid == (ctas, 1, 1)


def test_torch_decodes_where_the_kernel_is_not_compiled(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    find = store.find
    monkeypatch.setattr(store, "find", lambda spec: None if isinstance(spec, DecodeSpec) else find(spec))
    launch.forget()
    x, w = full_range(1, 20, 80), weights(80)
    assert same(prepared(x, False, -1), x.decode(torch.float16))  # type: ignore[arg-type]
    assert tokens.decoder() is None
    assert torch.equal(dual_gemm(x, w), expected(x, w))
    assert [kind(e.spec) for e in cuda.launches] == ["f16"]
    monkeypatch.setattr(store, "find", find)
    assert tokens.decoder() is None
    launch.forget()
    assert tokens.decoder() is not None
    dual_gemm(x, w)
    assert [kind(e.spec) for e in cuda.launches[1:]] == ["decode", "f16"]


def test_exact_values_of_tokens(cuda: FakeCuda) -> None:
    """decode's table against the format's own, every code under every scale; a NaN scale makes NaN of its block."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 32, 8).expand(128, 32, 8).reshape(128, 256)
    scales = torch.arange(128, dtype=torch.uint8).view(128, 1).expand(128, 32).contiguous().view(torch.float8_e4m3fn)
    x = _unchecked(codes, scales, torch.tensor(1.0))
    want = x.decode(torch.float16)
    assert bool(want[:127].isfinite().all())
    assert bool(want[127].isnan().all())
    for given_, right in ((x, want), (x.to_swizzled(), want)):
        got = decode(given_)
        assert same(got[:127], right[:127])
        assert bool(got[127].isnan().all())
    for shape in ((70, 96), (3, 5, 32)):
        x = full_range(1, *shape)
        assert same(decode(x), x.decode(torch.float16))
        assert same(decode(x.to_swizzled()), x.decode(torch.float16))


# ---- calls ----


WIDE = 4224  # weight rows for which tiles of 8 tokens are too slow from 9 tokens on


def weights(k: int, n: int = 40) -> GatedWeights:
    return GatedWeights(full_range(11, n, k), full_range(12, n, k)).prepare("cpu")


def expected(x: NVFP4Tensor, w: GatedWeights) -> Tensor:
    return reference.dual_gemm(x, w.gate, w.up, out_dtype=torch.bfloat16)


def kind(spec: Spec) -> str:
    return "decode" if isinstance(spec, DecodeSpec) else spec.x


@pytest.mark.parametrize("way", ["short", "operator"])
@pytest.mark.parametrize(
    ("shape", "change", "launches"),
    [
        ((1, 128), lambda x: x, ["nvfp4"]),
        ((8, 64), lambda x: x, ["nvfp4"]),
        ((2, 3, 64), lambda x: x, ["nvfp4"]),
        ((8, 80), lambda x: x, ["decode", "f16"]),
        ((8, 64), lambda x: x.to_swizzled(), ["decode", "f16"]),
        ((8, 64), lambda x: _unchecked(moved(x.codes, 4), x.block_scale, x.global_scale), ["decode", "f16"]),
        ((8, 64), lambda x: _unchecked(x.codes, moved(x.block_scale, 1), x.global_scale), ["decode", "f16"]),
        ((8, 64), lambda x: _unchecked(moved(x.codes, 1), x.block_scale, x.global_scale), ["f16"]),
        ((8, 64), lambda x: _unchecked(apart(x.codes), x.block_scale, x.global_scale), ["f16"]),
        ((20, 64), lambda x: x, ["decode", "f16"]),
        ((2, 10, 64), lambda x: x, ["decode", "f16"]),
        ((2, 10, 64), lambda x: x.to_swizzled(), ["decode", "f16"]),
    ],
    ids=lambda v: str(v) if isinstance(v, (tuple, list)) else "",
)
def test_the_way_of_a_call(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, way: str, shape: tuple[int, ...],
                           change: Callable[[NVFP4Tensor], NVFP4Tensor], launches: list[str]) -> None:  # fmt: skip
    x = full_range(1, *shape)
    x = change(replace(x, global_scale=torch.tensor(0.0123)))
    w = weights(shape[-1], 40 if x.codes.numel() < 20 * 32 else WIDE)
    if way == "operator":
        monkeypatch.setattr(w, "direct", None)
    want = expected(x, w)
    assert torch.equal(dual_gemm(x, w), want)
    assert [kind(e.spec) for e in cuda.launches] == launches
    one = linear(x, LinearWeight(w.gate).prepare("cpu"))
    assert torch.equal(one, reference.linear(x, w.gate, out_dtype=torch.bfloat16))
    assert [kind(e.spec) for e in cuda.launches[len(launches) :]] == launches


@pytest.mark.parametrize(("k", "m", "swizzled", "launches"), [
    (64, 5, False, ["nvfp4"] * 3),
    (64, 5, True, ["decode", *["f16"] * 3]),
    (80, 5, False, ["decode", *["f16"] * 3]),
    (80, 5, True, ["decode", *["f16"] * 3]),
    (64, 20, False, ["decode", *["f16"] * 3]),
])  # fmt: skip
def test_a_batch_is_decoded_at_once(cuda: FakeCuda, k: int, m: int, swizzled: bool, launches: list[str]) -> None:
    n = 40 if m == 5 else WIDE
    gate, up = full_range(1, 3, n, k), full_range(2, 3, n, k)
    x = full_range(3, 3, m, k)
    x = x.to_swizzled() if swizzled else x
    assert torch.equal(dual_gemm(x, GatedWeights(gate, up)), reference.dual_gemm(x, gate, up, out_dtype=torch.bfloat16))
    assert [kind(e.spec) for e in cuda.launches] == launches


def test_work_that_writes_weights_is_waited_for_behind_the_decoder_too(cuda: FakeCuda) -> None:
    """The decoder waits for it, so that it may overlap; the kernel that reads weights early may not."""
    x, gate, up = full_range(1, 5, 80), full_range(2, 40, 80), full_range(3, 40, 80)
    dual_gemm(x, weights(80))
    with pytest.warns(UserWarning, match="packed"):
        dual_gemm(x, (gate, up))
    overlap = [6 in e.attributes for e in cuda.launches]
    assert [kind(e.spec) for e in cuda.launches] == ["decode", "f16"] * 2
    assert overlap == [True, True, True, False]


def test_without_the_kernel_that_decodes_itself_another_runs(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    find = store.find
    monkeypatch.setattr(store, "find", lambda s: None if isinstance(s, KernelSpec) and s.nvfp4 else find(s))
    launch.forget()
    x, w = full_range(1, 4, 64), weights(64)
    assert torch.equal(dual_gemm(x, w), expected(x, w))
    assert [kind(e.spec) for e in cuda.launches] == ["decode", "f16"]


def test_kernels_that_decode_alone_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot take swizzled scales, say."""
    with fake_hopper(monkeypatch, compiled=False):
        monkeypatch.setattr(store, "find", only(lambda s: isinstance(s, DecodeSpec) or s.nvfp4))
        launch.forget()
        assert not launch.available(True, NVFP4, torch.float16)
        monkeypatch.setattr(store, "find", only(lambda s: isinstance(s, KernelSpec) and s.x == "f16"))
        launch.forget()
        assert launch.available(True, NVFP4, torch.float16)
        assert launch.available(True, DECODED, torch.float16)


def only(there: Callable[[Any], bool]) -> Callable[[Spec], tuple[bytes, dict[str, Any]] | None]:
    return lambda s: (json.dumps(s.to_dict()).encode(), description(s)) if there(s) else None


def test_every_kernel_of_tokens_is_loaded_beforehand(cuda: FakeCuda) -> None:
    """So that no call has to, nor a captured graph."""
    w = weights(64)
    del cuda.calls[:]
    for x in (full_range(1, 4, 64), full_range(1, 4, 64).to_swizzled(), full_range(1, 300, 64)):
        dual_gemm(x, w)
    assert set(cuda.calls) == {"cuLaunchKernelEx", "cuTensorMapEncodeTiled"}


@pytest.mark.parametrize("config", SHIPPED, ids=lambda c: c.name)
def test_a_chosen_configuration_decodes_if_it_can(cuda: FakeCuda, config: Config) -> None:
    x, w = full_range(1, 9, 128), weights(128)
    assert launch._choice(config, 9, 40, NVFP4, torch.float16, True) is not None
    for given_, nvfp4 in ((x, config.takes_nvfp4), (x.to_swizzled(), False)):
        chosen = launch._choice(config, 9, 40, format_of(given_), torch.float16, True)
        assert chosen is not None
        assert chosen.nvfp4 is nvfp4
        assert chosen.kernel.mapped is not nvfp4
    assert w.packed is not None


@pytest.mark.parametrize("m", [4, 20])
@pytest.mark.parametrize("way", ["short", "operator"])
def test_an_output_in_the_memory_of_the_tokens_is_refused(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, way: str, m: int
) -> None:
    """A kernel that decodes reads codes while others write."""
    w = weights(64)
    if way == "operator":
        monkeypatch.setattr(w, "direct", None)
    x = quantize(torch.randn(m, 64))
    memory = torch.zeros(m * 40 + 4 * m * 64, dtype=torch.float16)
    raw = memory.view(torch.uint8)
    codes = raw[: m * 32].view(m, 32).copy_(x.codes)
    scales = raw[m * 40 : m * 44].view(m, 4).copy_(x.block_scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    x = NVFP4Tensor(codes, scales, x.global_scale)
    want = expected(x, w)
    for out in (memory[: m * 40].view(m, 40), memory[m * 21 : m * 61].view(m, 40)):
        with pytest.raises(ValueError, match="out overlaps x in memory"):
            dual_gemm(x, w, out=out)
    assert not cuda.launches
    beside = memory[m * 24 : m * 64].view(torch.bfloat16).view(m, 40)
    assert torch.equal(dual_gemm(x, w, out=beside), want)
