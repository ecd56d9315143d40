"""Tokens that lie unsorted on a Hopper device made of Python: the ways to the products, which launches they are, the same results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from backends.hopper.test_grouped_launch import COUNTS, K, N, agree, weights
from fake_hopper import FakeCuda, fake_hopper
from glu4 import NVFP4Tensor, moe_gate_up, quantize
from glu4.backends.hopper import grouped_launch
from glu4.backends.hopper.grouped_config import GATHER_CONFIGS, GROUPED_SHIPPED, GroupedConfig, grouped_candidates
from glu4.backends.hopper.spec import DecodeSpec, GroupedSpec, gathering, shipped, spec_from_dict
from glu4.compiled import store
from glu4.nvfp4 import gather_rows
from glu4.problem import GroupedProblem

T, TOP_K, E = 7, 3, len(COUNTS)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_hopper(monkeypatch) as fake:
        yield fake


def routed(kind: str) -> tuple[torch.Tensor | NVFP4Tensor, torch.Tensor]:
    """(tokens, choices), some of which are of no expert."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(T, K, generator=g)
    ids = torch.randint(-1, E + 1, (T, TOP_K), generator=g)
    assert not ((ids >= 0) & (ids < E)).all()
    return quantize(x) if kind == "nvfp4" else x.to(getattr(torch, kind)), ids


def told(fake: FakeCuda, before: int) -> list[str]:
    """What ran, in short."""
    names = []
    for launched in fake.launches[before:]:
        spec = launched.spec
        assert isinstance(spec, (DecodeSpec, GroupedSpec))
        gathers = spec.gather if isinstance(spec, DecodeSpec) else spec.config.gather
        names.append(("decode" if isinstance(spec, DecodeSpec) else "multiply") + "+gather" * gathers)
    return names


@pytest.mark.parametrize(
    ("kind", "how", "expected"),
    [
        ("float16", "", ["multiply+gather"]),
        ("float16", "copy", ["multiply"]),
        ("float16", "decode", ["multiply"]),
        ("float16", "load", ["multiply+gather"]),
        ("bfloat16", "load", ["multiply+gather"]),
        ("nvfp4", "", ["decode+gather", "multiply"]),
        ("nvfp4", "copy", ["decode", "multiply"]),
        ("nvfp4", "decode", ["decode+gather", "multiply"]),
        ("nvfp4", "load", ["decode", "multiply+gather"]),
    ],
)
def test_every_way_gives_the_same(
    hopper: FakeCuda, monkeypatch: pytest.MonkeyPatch, kind: str, how: str, expected: list[str]
) -> None:
    (x, ids), w = routed(kind), weights(biased=True)
    want, routing = moe_gate_up(x, ids, w, out_dtype=torch.float16, backend="portable")
    monkeypatch.setenv("GLU4_GATHER", how)
    ready = w.prepare("cpu")
    before = len(hopper.launches)
    out = torch.full((T * TOP_K, N), 7.0, dtype=torch.float16)
    got, again = moe_gate_up(x, ids, ready, out_dtype=torch.float16, out=out)
    assert got is out
    assert told(hopper, before) == expected
    last = int(routing.group_offsets[-1])
    assert last < T * TOP_K
    assert torch.equal(again.order, routing.order)
    assert agree(out[:last], want[:last])
    assert (out[last:] == 7).all()


def test_a_wrong_index_would_be_seen(hopper: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    (x, ids), w = routed("float16"), weights()
    want, routing = moe_gate_up(x, ids, w, backend="portable")
    monkeypatch.setenv("GLU4_GATHER", "load")
    submit = grouped_launch.submit
    monkeypatch.setattr(grouped_launch, "submit", lambda *args: submit(*args[:-2], args[-2].flip(0), args[-1]))
    last = int(routing.group_offsets[-1])
    assert not agree(moe_gate_up(x, ids, w.prepare("cpu"))[0][:last], want[:last])


def test_rows_that_the_loads_cannot_address_are_copied(hopper: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start or a row that is no multiple of 16 bytes, columns that do not lie side by side."""
    monkeypatch.setenv("GLU4_GATHER", "load")
    (x, ids), w = routed("float16"), weights().prepare("cpu")
    assert isinstance(x, torch.Tensor)
    want = moe_gate_up(x, ids, w)[0]
    shifted = torch.empty(T * K + 1, dtype=x.dtype)[1:].view(T, K)
    odd = torch.empty(T, K + 3, dtype=x.dtype)[:, :K]
    across = torch.empty(K, T, dtype=x.dtype).t()
    wide = torch.empty(T, K + 8, dtype=x.dtype)[:, :K]
    for other, expected in ((shifted, "multiply"), (odd, "multiply"), (across, "multiply"), (wide, "multiply+gather")):
        before = len(hopper.launches)
        last = int(moe_gate_up(other.copy_(x), ids, w)[1].group_offsets[-1])
        assert told(hopper, before) == [expected]
        assert torch.equal(moe_gate_up(other, ids, w)[0][:last], want[:last])


def test_nvfp4_rows_with_padding_between_them(hopper: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLU4_GATHER", "decode")
    (x, ids), w = routed("nvfp4"), weights().prepare("cpu")
    assert isinstance(x, NVFP4Tensor)
    want, routing = moe_gate_up(x, ids, w)
    codes = torch.zeros(T, K // 2 + 12, dtype=torch.uint8)[:, : K // 2].copy_(x.codes)
    scales = torch.zeros(T, K // 16 + 3, dtype=torch.uint8)[:, : K // 16].copy_(x.block_scale.view(torch.uint8))
    padded = NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), x.global_scale)
    before = len(hopper.launches)
    got = moe_gate_up(padded, ids, w)[0]
    assert told(hopper, before) == ["decode+gather", "multiply"]
    last = int(routing.group_offsets[-1])
    assert torch.equal(got[:last], want[:last])


@pytest.mark.parametrize(("kind", "how"), [("float16", "load"), ("nvfp4", "load"), ("nvfp4", "decode")])
def test_without_their_kernels_rows_are_copied(hopper: FakeCuda, monkeypatch: pytest.MonkeyPatch, kind: str, how: str) -> None:
    monkeypatch.setenv("GLU4_GATHER", how)
    find, missing = store.find, {spec.name for spec in gathering()}
    monkeypatch.setattr(store, "find", lambda spec: None if spec.name in missing else find(spec))
    (x, ids), w = routed(kind), weights().prepare("cpu")
    before = len(hopper.launches)
    out, routing = moe_gate_up(x, ids, w, out_dtype=torch.float16)
    assert "gather" not in "".join(told(hopper, before))
    last = int(routing.group_offsets[-1])
    assert agree(out[:last], moe_gate_up(x, ids, w, out_dtype=torch.float16, backend="portable")[0][:last])


def test_no_tokens_and_no_choices(hopper: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLU4_GATHER", "load")
    w = weights().prepare("cpu")
    before = len(hopper.launches)
    for tokens, top_k in ((0, 2), (3, 0)):
        out, _ = moe_gate_up(torch.zeros(tokens, K).half(), torch.zeros(tokens, top_k, dtype=torch.int64), w)
        assert out.shape == (0, N)
    assert len(hopper.launches) == before


def test_an_unknown_way_is_refused(hopper: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLU4_GATHER", "tma")
    (x, ids), w = routed("float16"), weights().prepare("cpu")
    with pytest.raises(ValueError, match="GLU4_GATHER: expected one of copy, decode, load, got 'tma'"):
        moe_gate_up(x, ids, w)


def test_gathered_rows_of_torch() -> None:
    order = torch.tensor([[3, 0], [5, 1], [2, 4]])
    x = torch.arange(12.0).view(3, 4)
    assert gather_rows(x, order)[:, 0].tolist() == [4.0, 0.0, 8.0, 0.0, 4.0, 8.0]


def test_configurations_and_specs() -> None:
    sorted_too = [c for c in GROUPED_SHIPPED if c.tokens < 256]
    assert [c.name for c in GATHER_CONFIGS] == [c.name + "i" for c in sorted_too]
    for config, sorted_config in zip(GATHER_CONFIGS, sorted_too, strict=True):
        assert (config.stages, config.shared_bytes) == (sorted_config.stages, sorted_config.shared_bytes)
    with pytest.raises(ValueError, match="gather: a warp holds an index a lane, and tokens is no multiple of 32 but 16"):
        GroupedConfig(16, 4, 16, gather=True)
    for rows in (8, 64, 4096):
        problem = GroupedProblem(rows, 4, 8, 16)
        plain, gathers = (list(grouped_candidates(problem, gather=g)) for g in (False, True))
        assert [c.name + "i" for c in plain if c.tokens < 256] == [c.name for c in gathers]
    for spec in gathering():
        assert spec_from_dict(spec.to_dict()) == spec
    everything = shipped()
    assert set(gathering()) <= set(everything)
    assert len({s.name for s in everything}) == len({s.key for s in everything}) == len(everything)


@pytest.mark.parametrize(
    ("n", "rows", "of_16_bits", "of_nvfp4"),
    [(768, 512, "load", "decode"), (768, 8192, "load", "load"), (2048, 512, "load", "decode"), (2048, 8192, "copy", "decode")],
)
def test_the_way_that_was_measured_fastest(
    monkeypatch: pytest.MonkeyPatch, n: int, rows: int, of_16_bits: str, of_nvfp4: str
) -> None:
    """Experts as in benchmarks/results/h200-gather-3.json, 4 tokens to each or 64."""
    monkeypatch.delenv("GLU4_GATHER", raising=False)
    for x_format, way in (("bfloat16", of_16_bits), ("nvfp4", of_nvfp4)):
        assert grouped_launch.gather_of(GroupedProblem(rows, 128, n, 2048, x_format=x_format)) == way
