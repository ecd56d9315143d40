"""The operators as torch sees them: opcheck, torch.compile, out=, strides, empty sizes, and every refusal's message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import glu4
from glu4 import (
    SILU,
    GatedWeights,
    LinearWeight,
    NVFP4Tensor,
    dual_gemm,
    group_gemm,
    grouped_dual_gemm,
    grouped_linear,
    linear,
    quantize,
    reference,
)
from operands import full_range

OFFSETS = torch.tensor([0, 2, 2, 7], dtype=torch.int32)


def halves(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def pair(seed: int, *shape: int) -> GatedWeights:
    """Weights whose results stay in the range of fp16."""
    gen = torch.Generator().manual_seed(seed)
    return GatedWeights(*(quantize(torch.randn(shape, generator=gen) * s) for s in (0.3, 0.7)))


def spec(x: torch.Tensor | NVFP4Tensor, w: GatedWeights, dtype: torch.dtype = torch.float16, **kwargs: Any) -> torch.Tensor:
    return reference.dual_gemm(x, w.gate, w.up, gate_bias=w.gate_bias, up_bias=w.up_bias, out_dtype=dtype, **kwargs)


def assert_within_one_ulp(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32 sums err by far less than half an ulp of 16 bits, so a right result is the rounded value or its neighbour."""
    assert got.dtype == expected.dtype
    ulp = (torch.nextafter(expected.abs(), torch.full_like(expected, torch.inf)) - expected.abs()).double()
    # cancellation leaves an absolute error that is many ulps of a tiny result
    slack = expected.double().abs().mean() * 2.0**-17
    assert ((got.double() - expected.double()).abs() <= ulp + slack).all()


# ---- what torch asks of an operator ----


def parts(t: NVFP4Tensor) -> list[torch.Tensor]:
    return [t.codes, t.block_scale.view(torch.uint8), t.global_scale]


SILU_ARGS = ("swish", [1.0, 0.0, float("inf")], "portable")


@pytest.mark.parametrize("quantized", [False, True])
def test_opcheck(quantized: bool) -> None:
    x = halves(0, 7, 64)
    xs = parts(quantize(x)) if quantized else [x]
    w, stacked = pair(1, 24, 64), pair(2, 3, 24, 64)
    out = torch.empty(7, 24, dtype=torch.float16)
    bias = torch.randn(24)
    calls = [
        (torch.ops.glu4.dual_gemm, (out, xs, parts(w.gate), parts(w.up), None, bias, None, *SILU_ARGS)),
        (torch.ops.glu4.linear, (out, xs, parts(w.gate), None, bias, "portable")),
        (
            torch.ops.glu4.grouped_dual_gemm,
            (out, xs, parts(stacked.gate), parts(stacked.up), None, OFFSETS, None, None, *SILU_ARGS[:2], True, "portable"),
        ),
        (torch.ops.glu4.grouped_linear, (out, xs, parts(stacked.up), None, OFFSETS, torch.randn(3, 24), False, "portable")),
    ]
    for op, args in calls:
        results = torch.library.opcheck(op, args)
        assert set(results.values()) == {"SUCCESS"}


def quantize_and_run(x: torch.Tensor, w: GatedWeights) -> torch.Tensor:
    return dual_gemm(quantize(x, nonfinite="propagate"), w, out_dtype=torch.float16) + 1


COMPILED: dict[str, Callable[..., torch.Tensor]] = {
    "float": lambda x, w: dual_gemm(x, w) * 2,
    "quantized": quantize_and_run,
    "linear": lambda x, w: linear(x.relu(), w.gate, bias=w.gate_bias),
    "out": lambda x, w: dual_gemm(x, w, out=torch.zeros(x.shape[0], 24, dtype=x.dtype)) + 1,
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph(name: str) -> None:
    function = COMPILED[name]
    w = GatedWeights(pair(1, 24, 64).gate, pair(1, 24, 64).up, gate_bias=torch.randn(24))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (7, 12):
        x = halves(m, m, 64)
        assert torch.equal(compiled(x, w), function(x, w))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_nvfp4_activations_and_experts_compile_to_one_graph(backend: str) -> None:
    w, stacked, x = pair(1, 24, 64), pair(2, 3, 24, 64), quantize(halves(0, 7, 64))

    def both(x: NVFP4Tensor, w: GatedWeights, stacked: GatedWeights, offsets: torch.Tensor) -> list[torch.Tensor]:
        out = torch.zeros(7, 24, dtype=torch.float16)
        dense, plain = dual_gemm(x, w), grouped_linear(x, stacked.up, offsets)
        return [dense, plain, grouped_dual_gemm(x, stacked, offsets), grouped_dual_gemm(x, stacked, offsets, out=out)]

    got = torch.compile(both, fullgraph=True, backend=backend)(x, w, stacked, OFFSETS)
    assert all(torch.equal(a, b) for a, b in zip(got, both(x, w, stacked, OFFSETS), strict=True))


def test_compiles_with_inductor() -> None:
    w = pair(1, 24, 64)
    x = halves(0, 7, 64)
    compiled = torch.compile(lambda x: dual_gemm(x, w), fullgraph=True)
    assert torch.equal(compiled(x), dual_gemm(x, w))


# ---- shapes and strides ----


@given(
    seed=st.integers(0, 2**31),
    m=st.integers(0, 9),
    n=st.integers(1, 40),
    blocks=st.integers(1, 9),
    quantized=st.booleans(),
    batch=st.integers(0, 3),
    swizzled=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_any_shape(seed: int, m: int, n: int, blocks: int, quantized: bool, batch: int, swizzled: bool) -> None:
    shape = ((batch,) if batch else (), blocks * 16)
    w = pair(seed, *shape[0], n, shape[1])
    x: torch.Tensor | NVFP4Tensor = halves(seed + 1, *shape[0], m, shape[1])
    x = quantize(x) if quantized else x  # type: ignore[arg-type]
    expected = spec(x, w)
    if swizzled:
        w = GatedWeights(w.gate.to_swizzled(), w.up.to_swizzled())
        x = x.to_swizzled() if isinstance(x, NVFP4Tensor) else x
    got = dual_gemm(x, w, out_dtype=torch.float16)
    assert got.shape == expected.shape
    if got.numel():
        assert_within_one_ulp(got, expected)


@pytest.mark.parametrize("k", range(16, 400, 16))
def test_every_k_that_is_a_multiple_of_16(k: int) -> None:
    x, w = halves(k, 3, k), pair(k, 8, k)
    assert_within_one_ulp(dual_gemm(x, w), spec(x, w))


def test_leading_dimensions_of_x_are_rows() -> None:
    x, w = halves(0, 2, 3, 5, 64), pair(1, 24, 64)
    flat = dual_gemm(x.view(30, 64), w)
    assert torch.equal(dual_gemm(x, w), flat.view(2, 3, 5, 24))
    assert torch.equal(linear(x, w.gate), linear(x.view(30, 64), w.gate).view(2, 3, 5, 24))


@pytest.mark.parametrize("swizzled", [False, True])
def test_each_quantized_matrix_keeps_its_global_scale(swizzled: bool) -> None:
    w = pair(1, 24, 64)
    x = halves(0, 3, 5, 64) * torch.tensor([1.0, 8.0, 0.1]).half().view(3, 1, 1)
    q = quantize(x, layout="swizzled" if swizzled else "linear")
    got = dual_gemm(q, w, out_dtype=torch.float16)
    for i in range(3):
        assert torch.equal(got[i], dual_gemm(q[i], w, out_dtype=torch.float16))


def test_non_contiguous_input_and_output() -> None:
    w = pair(1, 24, 64)
    x = halves(0, 64, 14).t()[::2]
    expected = dual_gemm(x.contiguous(), w)
    assert torch.equal(dual_gemm(x, w), expected)
    out = torch.full((24, 14), 5.0).half().t()
    assert dual_gemm(x, w, out=out[::2]).data_ptr() == out.data_ptr()
    assert torch.equal(out[::2], expected)
    assert (out[1::2] == 5).all()
    three = torch.zeros(24, 7, 2).half().permute(2, 1, 0)
    dual_gemm(x.expand(2, 7, 64), w, out=three)
    assert torch.equal(three[1], expected)
    q = quantize(x)
    columns = NVFP4Tensor(q.codes.t().contiguous().t(), q.block_scale, q.global_scale)
    assert torch.equal(dual_gemm(columns, w), dual_gemm(q, w))


def test_grouped_output_of_any_strides_keeps_rows_beyond_the_last_expert() -> None:
    x, w = halves(0, 9, 64), pair(1, 3, 24, 64)
    out = torch.full((24, 18), 5.0).half().t()[::2]
    assert grouped_dual_gemm(x, w, OFFSETS, out=out) is out
    assert torch.equal(out[:7], grouped_dual_gemm(x, w, OFFSETS)[:7])
    assert (out[7:] == 5).all()


def test_an_output_beside_x_in_one_buffer_is_fine_and_one_over_x_is_not() -> None:
    buffer = torch.zeros(5, 100).half()
    x, w = buffer[:, :64].copy_(halves(0, 5, 64)), pair(1, 24, 64)
    expected = dual_gemm(x.clone(), w)
    for beside in (buffer[:, 64:88], buffer[:, 76:]):
        assert torch.equal(dual_gemm(x, w, out=beside), expected)
    square, stacked = pair(1, 64, 64), pair(2, 3, 64, 64)
    for over in (lambda: dual_gemm(x, w, out=buffer[:, 40:64]), lambda: linear(x, w.gate, out=buffer[:, 63:87])):
        with pytest.raises(ValueError, match="out overlaps x in memory"):
            over()
    dense = halves(0, 7, 64)
    for itself in (lambda: dual_gemm(dense, square, out=dense), lambda: grouped_dual_gemm(dense, stacked, OFFSETS, out=dense)):
        with pytest.raises(ValueError, match="out overlaps x in memory"):
            itself()


def test_a_call_reads_no_value_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = halves(0, 5, 64), GatedWeights(pair(1, 24, 64).gate, pair(1, 24, 64).up, torch.tensor(0.1)).prepare("cpu")
    q, stacked = quantize(x), pair(2, 3, 24, 64).to("meta")

    def read(*_: object) -> None:
        raise AssertionError("a value was read, which would synchronise a device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    for operand in (x, q):
        dual_gemm(operand, w)
        linear(operand, w.gate)
    # the portable grouped operator must read the offsets; what is before it, on any device, reads nothing
    assert grouped_dual_gemm(x.to("meta"), stacked, OFFSETS.to("meta")).shape == (5, 24)
    assert grouped_linear(x.to("meta"), stacked.up, OFFSETS.to("meta")).shape == (5, 24)


def test_bias_and_activations() -> None:
    x = halves(0, 9, 64)
    w = pair(1, 24, 64)
    biased = GatedWeights(w.gate, w.up, gate_bias=torch.randn(24), up_bias=torch.randn(24).bfloat16())
    for act in (SILU, glu4.clamped_silu(0.5), glu4.swiglu_oai(), glu4.IDENTITY):
        assert_within_one_ulp(dual_gemm(x, biased, activation=act), spec(x, biased, activation=act))
    stacked = GatedWeights(*(full_range(s, 3, 24, 64) for s in (1, 2)), gate_bias=torch.randn(3, 24))
    q = quantize(halves(3, 7, 64))
    expected = reference.grouped_dual_gemm(
        q, stacked.gate, stacked.up, OFFSETS, gate_bias=stacked.gate_bias, out_dtype=torch.bfloat16
    )
    assert_within_one_ulp(grouped_dual_gemm(q, stacked, OFFSETS), expected)


def test_output_types() -> None:
    x, w = halves(0, 3, 64), pair(1, 24, 64)
    assert dual_gemm(x, w).dtype == torch.float16
    assert dual_gemm(x.bfloat16(), w).dtype == torch.bfloat16
    assert dual_gemm(x.float(), w).dtype == torch.float32
    assert dual_gemm(quantize(x), w).dtype == torch.bfloat16
    assert dual_gemm(quantize(x), w, out=torch.empty(3, 24).half()).dtype == torch.float16
    assert dual_gemm(x, w, out_dtype=torch.float32).dtype == torch.float32


# ---- groups ----


@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(0, 9), max_size=5),
    n=st.integers(1, 40),
    blocks=st.integers(1, 5),
    quantized=st.booleans(),
    bias=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_grouped_linear_of_any_sizes(seed: int, sizes: list[int], n: int, blocks: int, quantized: bool, bias: bool) -> None:
    rows, k = sum(sizes) + 2, 16 * blocks
    x, weight = halves(seed, rows, k), pair(seed + 1, len(sizes), n, k).up
    operand = quantize(x) if quantized else x
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
    added = torch.randn(len(sizes), n, generator=torch.Generator().manual_seed(seed)) if bias else None
    out = torch.full((rows, n), 7.0).half()
    assert grouped_linear(operand, LinearWeight(weight), offsets, bias=added, out=out) is out
    expected = reference.grouped_linear(operand, weight, offsets, bias=added)
    if expected.numel():
        assert_within_one_ulp(out[: offsets[-1]], expected)
    assert (out[offsets[-1] :] == 7).all()


@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 24), st.integers(1, 5)), max_size=4),
    quantized=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_group_gemm_of_groups_of_any_size(seed: int, sizes: list[tuple[int, int, int]], quantized: bool) -> None:
    floats = [halves(seed + g, m, 16 * b) for g, (m, _, b) in enumerate(sizes)]
    xs = [quantize(x) if quantized else x for x in floats]
    weights = [quantize(halves(seed + 10 + g, n, 16 * b).float()) for g, (_, n, b) in enumerate(sizes)]
    expected = reference.group_gemm(list(zip(xs, weights, strict=True)))
    out = [torch.full((m, n), 7.0).half() for m, n, _ in sizes]
    got = group_gemm(xs, [LinearWeight(w) if g % 2 else w for g, w in enumerate(weights)], out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    for result, right in zip(got, expected, strict=True):
        if right.numel():
            assert_within_one_ulp(result, right)


# ---- refusals ----

W = pair(1, 24, 64)
X = halves(0, 5, 64)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: dual_gemm(X[:, :48], W), ValueError, "x has K = 48 and gate has K = 64: they must be equal"),
    (lambda: dual_gemm(X.double(), W), TypeError, "x: expected float16, bfloat16 or float32, or an NVFP4Tensor"),
    (lambda: dual_gemm(X[0], W), ValueError, r"x: expected \[..., M, K\], got shape \[64\]"),
    (lambda: dual_gemm("x", W), TypeError, "x: expected an NVFP4Tensor or a torch.Tensor, got str"),  # type: ignore[arg-type]
    (lambda: dual_gemm(X.float().requires_grad_(), W), ValueError, "x requires grad, and glu4 has no backward pass yet"),
    (lambda: dual_gemm(X.to("meta"), W), ValueError, "gate is on cpu, x is on meta"),
    (
        lambda: dual_gemm(X, (W.gate, pair(2, 16, 64).up)),
        ValueError,
        r"gate and up must have one shape, got \[24, 64\] and \[16, 64\]",
    ),
    (lambda: dual_gemm(X, W.gate), TypeError, "weights: expected GatedWeights or a"),  # type: ignore[arg-type]
    (lambda: dual_gemm(X, W, activation="silu"), TypeError, "activation: expected a glu4.Activation such as glu4.SILU"),  # type: ignore[arg-type]
    (
        lambda: dual_gemm(X, W, out_dtype=torch.int8),
        TypeError,
        "out_dtype: expected float16, bfloat16 or float32, got torch.int8",
    ),
    (lambda: dual_gemm(X, W, out=torch.empty(5, 25).half()), ValueError, r"out: expected shape \[5, 24\], got \[5, 25\]"),
    (
        lambda: dual_gemm(X, W, out=torch.empty(5, 24), out_dtype=torch.float16),
        TypeError,
        "out: expected torch.float16, got torch.float32",
    ),
    (
        lambda: dual_gemm(X, W, backend="fastest"),
        ValueError,
        "backend: expected one of hopper, blackwell, portable or None, got 'fastest'",
    ),
    (lambda: dual_gemm(X, pair(1, 2, 24, 64)), ValueError, r"gate \[2, 24, 64\] needs x \[2, M, 64\], got \[5, 64\]"),
    (lambda: linear(X, W.gate, bias=torch.zeros(3)), ValueError, r"bias: expected shape \[24\], got \[3\]"),
    (
        lambda: linear(X, W.gate, bias=torch.zeros(24, dtype=torch.int32)),
        TypeError,
        "bias: expected float16, bfloat16 or float32",
    ),
    (lambda: dual_gemm(X.to_sparse(), W), TypeError, r"x: expected a dense tensor, got torch.sparse_coo; x.to_dense\(\)"),
    (lambda: dual_gemm(X, W, out=[0.0]), TypeError, "out: expected a torch.Tensor, got list"),  # type: ignore[arg-type]
    (
        lambda: dual_gemm(X, W, out=torch.empty(1, 24).half().expand(5, 24)),
        ValueError,
        r"out: several of its elements are one in memory \(it is expanded\)",
    ),
    (lambda: linear(X, W.gate, bias=[0.0]), TypeError, "bias: expected a torch.Tensor, got list"),  # type: ignore[arg-type]
    (
        lambda: grouped_dual_gemm(X, pair(1, 3, 24, 64), [0, 2, 2, 7]),  # type: ignore[arg-type]
        TypeError,
        "group_offsets: expected a torch.Tensor, got list",
    ),
    (
        lambda: grouped_dual_gemm(X, pair(1, 3, 24, 64), OFFSETS.to("meta")),
        ValueError,
        "group_offsets is on meta, x is on cpu",
    ),
    (lambda: linear(X, W.gate.codes), TypeError, "weight: expected an NVFP4Tensor, got Tensor"),  # type: ignore[arg-type]
    (lambda: grouped_dual_gemm(X, W, OFFSETS), ValueError, r"gate, up: expected stacked \[E, N, K\]"),
    (lambda: grouped_linear(X, W.gate, OFFSETS), ValueError, r"weight: expected stacked \[E, N, K\], got shape \[24, 64\]"),
    (
        lambda: grouped_linear(X[:, :48], pair(1, 3, 24, 64).up, OFFSETS),
        ValueError,
        "x has K = 48 and weight has K = 64: they must be equal",
    ),
    (
        lambda: grouped_linear(X, pair(1, 3, 24, 64).up, OFFSETS, bias=torch.zeros(24)),
        ValueError,
        r"bias: expected shape \[3, 24\], got \[24\]",
    ),
    (lambda: group_gemm([X, X], [W.gate]), ValueError, "weights: expected an entry for each of the 2 groups of x, got 1"),
    (lambda: group_gemm(X, [W.gate]), TypeError, "x: expected a list with an entry a group, got Tensor"),  # type: ignore[arg-type]
    (lambda: group_gemm([X, X[:, :48]], [W.gate, W.up]), ValueError, "group 1: x has K = 48 and weight has K = 64"),
    (lambda: group_gemm([X], [W.gate], out=[torch.empty(5, 25).half()]), ValueError, r"group 0: out: expected shape \[5, 24\]"),
    (
        lambda: grouped_dual_gemm(X, pair(1, 3, 24, 64), OFFSETS.long()),
        ValueError,
        r"group_offsets: expected int32 of shape \[4\]",
    ),
    (lambda: grouped_dual_gemm(X[None], pair(1, 3, 24, 64), OFFSETS), ValueError, r"x: expected \[rows, K\], sorted by expert"),
    (
        lambda: grouped_dual_gemm(quantize(X, layout="swizzled"), pair(1, 3, 24, 64), OFFSETS),
        ValueError,
        "grouped activations need linear block scales",
    ),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_refusals(index: int) -> None:
    call, error, message = BAD[index]
    with pytest.raises(error, match=message):
        call()


def test_an_x_that_requires_grad_is_fine_without_grad_mode() -> None:
    with torch.no_grad():
        dual_gemm(X.float().requires_grad_(), W)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_fuzzed_arguments_give_the_right_result_or_one_clear_error(data: st.DataObject) -> None:
    dims = st.integers(0, 3)
    x_shape = [*data.draw(st.lists(dims, max_size=3)), 16 * data.draw(st.integers(0, 3))]
    w_shape = [*data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)), 16 * data.draw(st.integers(1, 3))]
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32, torch.float64, torch.int8]))
    x = torch.ones(x_shape, dtype=dtype)
    w = pair(3, *w_shape)
    try:
        got = dual_gemm(x, w)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(("x", "gate"))
        return
    assert got.shape == (*x_shape[:-1], w_shape[-2])
    if got.numel():
        assert_within_one_ulp(got.half(), spec(x, w))


@given(
    offsets=st.lists(st.integers(-1, 9), min_size=0, max_size=5),
    rows=st.integers(0, 8),
    experts=st.integers(0, 4),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    quantized=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_fuzzed_group_offsets_give_the_right_result_or_one_clear_error(
    offsets: list[int], rows: int, experts: int, dtype: torch.dtype, quantized: bool
) -> None:
    x, w = halves(1, rows, 32), pair(2, experts, 8, 32)
    operand = quantize(x) if quantized else x
    given_offsets = torch.tensor(offsets, dtype=dtype)
    out = torch.full((rows, 8), 7.0).half()
    try:
        grouped_dual_gemm(operand, w, given_offsets, out=out, check_offsets=True)
    except ValueError as error:
        assert str(error).startswith("group_offsets: expected")
        in_order = offsets == sorted(offsets) and offsets[:1] == [0] and offsets[-1] <= rows
        assert not (dtype == torch.int32 and len(offsets) == experts + 1 and in_order)
        return
    expected = reference.grouped_dual_gemm(operand, w.gate, w.up, given_offsets, out_dtype=torch.float16)
    if expected.numel():
        assert_within_one_ulp(out[: offsets[-1]], expected)
    assert (out[offsets[-1] :] == 7).all()


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_fuzzed_linear_gives_the_right_result_or_one_clear_error(data: st.DataObject) -> None:
    dims = st.lists(st.integers(0, 3), max_size=2)
    x_shape = [*data.draw(dims), data.draw(st.integers(0, 3)), 16 * data.draw(st.integers(1, 3))]
    w = full_range(4, *data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)), 16 * data.draw(st.integers(1, 3)))
    bias = data.draw(st.sampled_from([None, torch.ones(w.shape[:-1]), torch.ones(7)]))
    x = torch.randn(x_shape, generator=torch.Generator().manual_seed(5))
    try:
        got = linear(x, w, bias=bias, out_dtype=torch.bfloat16)
    except ValueError as error:
        assert str(error).startswith(("x", "weight", "bias"))
        return
    expected = reference.linear(x, w, bias=bias, out_dtype=torch.bfloat16)
    assert got.shape == expected.shape
    if got.numel():
        assert_within_one_ulp(got, expected)
