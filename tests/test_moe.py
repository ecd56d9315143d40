"""moe_gate_up and moe_combine against a plain loop over tokens and the specification."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glu4 import GatedWeights, NVFP4Tensor, grouped_dual_gemm, moe_combine, moe_gate_up, quantize, reference, swiglu_oai
from glu4.moe import Routing, sort_by_expert
from glu4.nvfp4 import gather_rows
from glu4.verify.case import Case
from glu4.verify.checker import check
from operands import full_range


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def experts(seed: int, e: int, n: int = 24, k: int = 64) -> GatedWeights:
    """Every expert with gate and up scales of its own, powers of ten apart."""
    scale = torch.logspace(-2, 0, max(2 * e, 1))[torch.randperm(2 * e, generator=torch.Generator().manual_seed(seed))]
    gate, up = (quantize(draw(seed + i, e, n, k) * scale[i * e : (i + 1) * e, None, None]) for i in range(2))
    return GatedWeights(gate, up)


def sorted_by_hand(ids: list[list[int]], count: int) -> tuple[list[int], list[int]]:
    """order and group_offsets by a plain loop."""
    flat = [i for row in ids for i in row]
    order = [p for e in range(count) for p, i in enumerate(flat) if i == e]
    offsets = [sum(0 <= i < e for i in flat) for e in range(count + 1)]
    return order + [p for p, i in enumerate(flat) if not 0 <= i < count], offsets


@given(
    ids=st.integers(1, 4).flatmap(lambda k: st.lists(st.lists(st.integers(-3, 9), min_size=k, max_size=k), max_size=12)),
    count=st.integers(0, 8),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=200, deadline=None)
def test_the_order_is_that_of_a_plain_loop(ids: list[list[int]], count: int, dtype: torch.dtype) -> None:
    width = len(ids[0]) if ids else 2
    routing = sort_by_expert(torch.tensor(ids, dtype=dtype).view(-1, width), count)
    order, offsets = sorted_by_hand(ids, count)
    assert (routing.order.tolist(), routing.group_offsets.tolist()) == (order, offsets)
    assert (routing.order.dtype, routing.group_offsets.dtype) == (torch.int64, torch.int32)
    assert routing.places is not None
    assert routing.places[routing.order].tolist() == list(range(len(order)))


@pytest.mark.parametrize("extreme", [2**31 - 1, -(2**31)])
def test_ids_at_the_ends_of_their_type_are_no_experts(extreme: int) -> None:
    ids = torch.tensor([[extreme, 1], [0, extreme]], dtype=torch.int32)
    for given_ids in (ids, ids.long()):
        routing = sort_by_expert(given_ids, 2)
        assert routing.order.tolist() == [2, 1, 0, 3]
        assert routing.group_offsets.tolist() == [0, 1, 2]
    assert sort_by_expert(torch.tensor([[2**63 - 1, -(2**63), 2**32]]), 2).group_offsets.tolist() == [0, 0, 0]


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 9),
    top_k=st.integers(1, 4),
    count=st.integers(1, 6),
    kind=st.sampled_from(["nvfp4", torch.float16, torch.bfloat16, torch.float32]),
    oai=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_choice_is_its_experts_result(
    seed: int, tokens: int, top_k: int, count: int, kind: str | torch.dtype, oai: bool
) -> None:
    weights = experts(seed, count)
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, count + 1, (tokens, top_k), generator=gen)
    x: torch.Tensor | NVFP4Tensor = draw(seed + 2, tokens, 64)
    x = quantize(x) if kind == "nvfp4" else x.to(kind)  # type: ignore[union-attr,arg-type]
    act = {"activation": swiglu_oai()} if oai else {}
    out = torch.full((tokens * top_k, 24), 7.0)
    hidden, routing = moe_gate_up(x, ids, weights, out=out, **act)
    assert hidden is out
    last = int(routing.group_offsets[-1])
    assert last == int(((ids >= 0) & (ids < count)).sum())
    assert (out[last:] == 7.0).all()
    for r in range(last):
        token, choice = divmod(int(routing.order[r]), top_k)
        e = int(ids[token, choice])
        row = x.narrow_rows(token, 1) if isinstance(x, NVFP4Tensor) else x[token : token + 1]
        case = Case("row", seed, row, weights.gate[e], weights.up[e], out_dtype=torch.float32, **act)
        verdict = check(case, out[r : r + 1], diagnose=False)
        assert verdict.ok, verdict.summary()


@pytest.mark.parametrize("fault", ["gate", "up", "both"])
def test_another_experts_scale_would_be_seen(fault: str) -> None:
    weights, ids = experts(3, 4), torch.arange(32).view(8, 4) % 4
    x = draw(4, 8, 64).half()
    scales = [
        w.global_scale.roll(1) if fault in (n, "both") else w.global_scale
        for n, w in (("gate", weights.gate), ("up", weights.up))
    ]
    wrong = GatedWeights(
        *(NVFP4Tensor(w.codes, w.block_scale, g) for w, g in zip((weights.gate, weights.up), scales, strict=True))
    )
    for used, right in ((weights, True), (wrong, False)):
        hidden, routing = moe_gate_up(x, ids, used)
        rows = x[routing.order // 4]
        case = Case("all", 0, rows, weights.gate, weights.up, group_offsets=routing.group_offsets)
        verdict = check(case, hidden)
        assert verdict.ok == right
        if fault == "both" and not right:
            causes = {(d.name, d.detail) for d in verdict.diagnosis}
            assert ("wrong expert's global scale", "of the previous expert") in causes, verdict.summary()


@pytest.mark.parametrize(("count", "top_k", "tokens"), [(512, 32, 40), (512, 1, 3), (1, 1, 5)])
def test_the_largest_and_the_smallest_routing(count: int, top_k: int, tokens: int) -> None:
    weights = experts(5, count, 8, 16)
    ids = torch.rand(tokens, count, generator=torch.Generator().manual_seed(6)).argsort(-1)[:, :top_k]
    x = quantize(draw(7, tokens, 16))
    hidden, routing = moe_gate_up(x, ids, weights, out_dtype=torch.float32)
    again, _ = moe_gate_up(x, ids.int(), weights, out_dtype=torch.float32)
    assert torch.equal(hidden, again)
    rows = gather_rows(x, routing.order.view(tokens, top_k))
    case = Case("all", 0, rows, weights.gate, weights.up, out_dtype=torch.float32, group_offsets=routing.group_offsets)
    verdict = check(case, hidden)
    assert verdict.ok, verdict.summary()


# ---- the whole layer ----


def test_combine_is_the_weighted_sum_of_a_plain_loop() -> None:
    ids = torch.tensor([[0, 2, -1], [1, 1, 0], [-1, -1, 3], [2, 0, 1]])
    router = draw(1, 4, 3)
    routing = sort_by_expert(ids, 3)
    y = torch.full((12, 5), torch.nan)
    last = int(routing.group_offsets[-1])
    y[:last] = draw(2, last, 5)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for r in range(last):
        token, choice = divmod(int(routing.order[r]), 3)
        expected[token] += router[token, choice].double() * y[r].double()
    got = moe_combine(y, routing, router)
    # three products and two sums of float32
    assert ((got.double() - expected).abs() <= 5 * 2.0**-23 * 12).all()
    assert (got[2] == 0).all()
    assert moe_combine(y.half(), routing, router.bfloat16()).dtype == torch.float16
    assert moe_combine(y, routing, router, out_dtype=torch.bfloat16).dtype == torch.bfloat16


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 8),
    top_k=st.integers(1, 5),
    count=st.integers(1, 6),
    width=st.integers(0, 9),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
@settings(max_examples=100, deadline=None)
def test_combine_of_any_routing(seed: int, tokens: int, top_k: int, count: int, width: int, dtype: torch.dtype) -> None:
    """Within what float32 may leave of the sums, and the same bits whatever lies in rows of no expert and under whatever order.

    top_k products and top_k sums of float32 err by at most (top_k + 1) u of the sum of magnitudes each, u = 2^-24; doubled for
    the terms of u^2.
    """
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, count + 2, (tokens, top_k), generator=gen)
    routing = sort_by_expert(ids, count)
    last = int(routing.group_offsets[-1])
    y = torch.randn(tokens * top_k, width, generator=gen).to(dtype)
    router = torch.randn(tokens, top_k, generator=gen)
    y[last:] = torch.nan
    got = moe_combine(y, routing, router, out_dtype=torch.float32)
    exact, magnitude = torch.zeros(tokens, width, dtype=torch.float64), torch.zeros(tokens, width, dtype=torch.float64)
    for r in range(last):
        token, choice = divmod(int(routing.order[r]), top_k)
        term = router[token, choice].double() * y[r].double()
        exact[token] += term
        magnitude[token] += term.abs()
    assert ((got.double() - exact).abs() <= 2 * (top_k + 1) * 2.0**-24 * magnitude).all()
    y[last:] = 3.0
    assert torch.equal(moe_combine(y, routing, router, out_dtype=torch.float32), got)
    assert torch.equal(moe_combine(y, routing, router), got.to(dtype))


def test_a_row_of_another_choice_would_be_seen() -> None:
    routing = sort_by_expert(torch.tensor([[1, 0], [0, 1]]), 2)
    y, router = draw(1, 4, 3), torch.tensor([[0.25, 1.0], [2.0, 0.5]])
    wrong = Routing(routing.order.flip(0), routing.group_offsets)
    assert not torch.allclose(moe_combine(y, wrong, router), moe_combine(y, routing, router))


def whole_layer(x: torch.Tensor, ids: torch.Tensor, router: torch.Tensor, w: GatedWeights) -> torch.Tensor:
    q = quantize(x, 0.01, nonfinite="propagate")
    hidden, routing = moe_gate_up(q, ids, w, out_dtype=torch.float16)
    return moe_combine(hidden, routing, router)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_layer_compiles_to_one_graph_for_any_routing(backend: str) -> None:
    w, x, router = experts(8, 5), draw(9, 6, 64).half(), torch.rand(6, 2)
    compiled = torch.compile(whole_layer, fullgraph=True, backend=backend)
    for seed in (0, 1):
        ids = torch.randint(-1, 5, (6, 2), generator=torch.Generator().manual_seed(seed))
        expected = whole_layer(x, ids, router, w)
        # a compiler may contract the float32 sums of moe_combine, which moves the result by one unit in the last place
        assert torch.allclose(compiled(x, ids, router, w), expected, rtol=2.0**-10, atol=2.0**-20)


def test_nothing_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a value was read, which would synchronise a device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    routing = sort_by_expert(torch.zeros(6, 2, dtype=torch.int64), 5)
    moe_combine(torch.zeros(12, 24), routing, torch.ones(6, 2))
    with torch._subclasses.FakeTensorMode():  # data-dependent shapes are an error there
        fake = sort_by_expert(torch.zeros(6, 2, dtype=torch.int64), 5)
        assert fake.group_offsets.shape == (6,)
        assert moe_combine(torch.zeros(12, 24), fake, torch.ones(6, 2)).shape == (6, 24)


W = experts(1, 3)
X = draw(2, 4, 64).half()
IDS = torch.zeros(4, 2, dtype=torch.int64)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: sort_by_expert(IDS, 3, backend="cuda"), ValueError, "backend: expected one of .*portable.* or None, got 'cuda'"),
    (
        lambda: moe_combine(torch.zeros(8, 4), sort_by_expert(IDS, 3), torch.ones(4, 2), backend="x"),
        ValueError,
        "backend: expected one of .*portable.* or None, got 'x'",
    ),
    (lambda: moe_gate_up(X, IDS.float(), W), TypeError, "topk_ids: expected int32 or int64, got torch.float32"),
    (lambda: moe_gate_up(X, [[0]], W), TypeError, "topk_ids: expected a torch.Tensor, got list"),  # type: ignore[arg-type]
    (lambda: moe_gate_up(X, IDS[0], W), ValueError, r"topk_ids: expected \[T, top_k\], got shape \[2\]"),
    (lambda: moe_gate_up(X, IDS[:3], W), ValueError, r"topk_ids: expected a row for each of the 4 tokens of x, got \[3, 2\]"),
    (lambda: moe_gate_up(X, IDS.to("meta"), W), ValueError, "topk_ids is on meta, x is on cpu"),
    (lambda: moe_gate_up(X[None], IDS, W), ValueError, r"x: expected \[T, K\], a row a token, got shape \[1, 4, 64\]"),
    (lambda: moe_gate_up("x", IDS, W), TypeError, "x: expected an NVFP4Tensor or a torch.Tensor, got str"),  # type: ignore[arg-type]
    (lambda: moe_gate_up(quantize(X, layout="swizzled"), IDS, W), ValueError, "grouped activations need linear block scales"),
    (
        lambda: moe_gate_up(X, IDS, GatedWeights(W.gate[0], W.up[0])),
        ValueError,
        r"weights: expected stacked GatedWeights \[E, N, K\], got \[24, 64\]",
    ),
    (lambda: moe_gate_up(X[:, :48], IDS, W), ValueError, "x has K = 48 and gate has K = 64: they must be equal"),
    (
        lambda: moe_combine(X, sort_by_expert(IDS, 3), torch.ones(4, 2)),
        ValueError,
        r"T \* top_k = 8, got \[4, 64\] and \[4, 2\]",
    ),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_refusals(index: int) -> None:
    call, error, message = BAD[index]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
def test_a_cuda_graph_serves_every_routing() -> None:
    ids, graph = torch.zeros(6, 2, dtype=torch.int64, device="cuda"), torch.cuda.CUDAGraph()
    sort_by_expert(ids, 5)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        routing: Routing = sort_by_expert(ids, 5)
    for seed in (0, 1):
        ids.copy_(torch.randint(-1, 6, (6, 2), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        expected = sort_by_expert(ids.cpu(), 5)
        assert torch.equal(routing.order.cpu(), expected.order)
        assert torch.equal(routing.group_offsets.cpu(), expected.group_offsets)


def test_it_is_the_grouped_operation_on_gathered_rows() -> None:
    q = full_range(11, 6, 64)
    ids = torch.tensor([[1, 0], [2, -1], [0, 0], [5, 2], [1, 1], [2, 0]])
    hidden, routing = moe_gate_up(q, ids, W)
    token = routing.order // 2
    rows = NVFP4Tensor(q.codes[token], q.block_scale.view(torch.uint8)[token].view(torch.float8_e4m3fn), q.global_scale)
    last = int(routing.group_offsets[-1])
    assert torch.equal(hidden[:last], grouped_dual_gemm(rows, W, routing.group_offsets)[:last])
    expected = reference.grouped_dual_gemm(rows, W.gate, W.up, routing.group_offsets, out_dtype=torch.bfloat16)
    assert expected.shape == (last, 24)
