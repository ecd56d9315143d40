"""The grouped operators against dense calls, bit for bit; the public group problem's sizes; offsets checked in compiled graphs."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glu4 import (
    GatedWeights,
    NVFP4Tensor,
    UnsupportedError,
    dual_gemm,
    group_gemm,
    grouped_dual_gemm,
    grouped_linear,
    linear,
    ops,
    quantize,
    swiglu_oai,
)
from glu4.verify import Case, check, contest
from operands import full_range

BAD = torch.tensor([0, 5, 3], dtype=torch.int32)


def stacked(seed: int, e: int, n: int, k: int) -> GatedWeights:
    return GatedWeights(full_range(seed, e, n, k), full_range(seed + 1, e, n, k))


def tokens(seed: int, rows: int, k: int) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).half()


@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    n=st.integers(1, 40),
    blocks=st.integers(1, 5),
    quantized=st.booleans(),
    out_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
@settings(max_examples=20, deadline=None)
def test_each_experts_rows_are_its_dense_call_bit_for_bit(
    seed: int, sizes: list[int], n: int, blocks: int, quantized: bool, out_dtype: torch.dtype
) -> None:
    weights, values = stacked(seed, len(sizes), n, 16 * blocks), tokens(seed, sum(sizes), 16 * blocks)
    x = quantize(values) if quantized else values
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    offsets = torch.tensor(ends, dtype=torch.int32)
    both = grouped_dual_gemm(x, weights, offsets, activation=swiglu_oai(), out_dtype=out_dtype)
    one = grouped_linear(x, weights.up, offsets, out_dtype=out_dtype)
    for e, (start, end) in enumerate(pairwise(ends)):
        rows = x.narrow_rows(start, end - start) if isinstance(x, NVFP4Tensor) else x[start:end]
        pair = GatedWeights(weights.gate[e], weights.up[e])
        dense = dual_gemm(rows, pair, activation=swiglu_oai(), out_dtype=out_dtype)
        assert torch.equal(both[start:end].nan_to_num(7.0), dense.nan_to_num(7.0))
        assert torch.equal(one[start:end].nan_to_num(7.0), linear(rows, weights.up[e], out_dtype=out_dtype).nan_to_num(7.0))


# ---- groups with sizes of their own ----


def checked_groups(data: contest.GroupData, out: list[torch.Tensor]) -> list[bool]:
    """What the checker says of each group's output."""
    cases = (Case(f"group {g}", 0, a[0], b[0], None, out_dtype=torch.float16) for g, (a, b, _) in enumerate(data.groups))
    return [check(case, result, diagnose=False).ok for case, result in zip(cases, out, strict=True)]


def run_groups(data: contest.GroupData) -> list[torch.Tensor]:
    out = [c[0].clone() for _, _, c in data.groups]
    got = group_gemm([a[0] for a, _, _ in data.groups], [b[0] for _, b, _ in data.groups], out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    return out


@pytest.mark.parametrize("make", [contest.full_range_group, contest.exact_group, contest.public_group])
def test_group_gemm_of_the_public_problem(make) -> None:  # type: ignore[no-untyped-def]
    shape = contest.GROUP_TESTS[4]
    data = make(shape, 3)
    assert len(set(shape.sizes)) == len(shape.sizes) == 3
    assert checked_groups(data, run_groups(data)) == [True] * 3


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(contest.GROUP_TESTS)))
def test_group_gemm_of_every_listed_test(index: int) -> None:
    for make in (contest.full_range_group, contest.exact_group):
        data = make(contest.GROUP_TESTS[index], 5)
        assert all(checked_groups(data, run_groups(data)))


def test_one_groups_weights_or_scale_for_anothers_would_be_seen() -> None:
    shape = contest.GroupShape(((8, 24, 64), (8, 24, 64), (8, 24, 64)))
    data = contest.full_range_group(shape, 3)
    (a0, b0, c0), (a1, b1, c1), third = data.groups
    exchanged = contest.GroupData(((a0, b1, c0), (a1, b0, c1), third), data.padding)
    assert checked_groups(data, run_groups(exchanged)) == [False, False, True]
    scaled = [NVFP4Tensor(b[0].codes, b[0].block_scale, torch.tensor(s)) for (_, b, _), s in zip(data.groups, (0.5, 1.5, 3.0))]
    xs = [a[0] for a, _, _ in data.groups]
    turned = [NVFP4Tensor(w.codes, w.block_scale, scaled[g - 1].global_scale) for g, w in enumerate(scaled)]
    for weights, right in ((scaled, True), (turned, False)):
        for g, out in enumerate(group_gemm(xs, weights, out_dtype=torch.float16)):
            case = Case("group", 0, xs[g], scaled[g], None, out_dtype=torch.float16)
            assert check(case, out, diagnose=False).ok == right


def test_a_group_that_its_backend_cannot_run_is_named() -> None:
    x, w = tokens(1, 3, 32), full_range(1, 8, 32)
    with pytest.raises(UnsupportedError, match=r"group 0: backend hopper: needs a GPU of compute capability 9\.0"):
        group_gemm([x, x], [w, w], backend="hopper")
    with pytest.raises(ValueError, match=r"group 0: backend: expected one of .*, got 'fast'"):
        group_gemm([x, x], [w, w], backend="fast")


def test_group_gemm_compiles_to_one_graph() -> None:
    xs, weights = [tokens(1, 3, 32), quantize(tokens(2, 5, 64))], [full_range(1, 8, 32), full_range(2, 24, 64)]
    compiled = torch.compile(lambda: group_gemm(xs, weights, out_dtype=torch.float16), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(), group_gemm(xs, weights, out_dtype=torch.float16), strict=True))


# ---- offsets ----


@pytest.mark.parametrize("by_variable", [False, True])
def test_offsets_are_checked_when_a_compiled_graph_runs(by_variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = stacked(1, 2, 8, 32), tokens(1, 6, 32)

    def layer(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        hidden = grouped_dual_gemm(x, weights, offsets, check_offsets=not by_variable)
        return hidden + grouped_linear(x, weights.up, offsets)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    good = torch.tensor([0, 3, 6], dtype=torch.int32)
    assert torch.equal(compiled(x, good), layer(x, good))
    monkeypatch.setenv("GLU4_DEBUG", "1" if by_variable else "0")
    assert torch.equal(compiled(x, good), layer(x, good))
    with pytest.raises(ValueError, match=r"group_offsets: .*got \[0, 5, 3\]: \[2\] = 3 is below \[1\] = 5"):
        compiled(x, BAD)


def test_offsets_are_not_read_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    # a stand-in that has nothing to be read
    offsets = SimpleNamespace(is_meta=False, device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match="check_offsets: the offsets cannot be read while a CUDA graph is captured"):
        ops._debug_offsets(offsets, 6, True)  # type: ignore[arg-type]
    monkeypatch.setenv("GLU4_DEBUG", "1")
    ops._debug_offsets(offsets, 6, False)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(AttributeError, match="tolist"):
        ops._debug_offsets(offsets, 6, False)  # type: ignore[arg-type]
