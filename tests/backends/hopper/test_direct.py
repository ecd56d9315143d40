"""The eager path with a Hopper device made of Python (`fake_hopper`): right results for every kind of call, the same bits as the
operator, the short way taken where it should be and only there, and the same refusals."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from backends.hopper.calls import Long, expected, pair, tokens
from fake_hopper import FakeCuda, Launch
from glu4 import (
    IDENTITY,
    SILU,
    Activation,
    GatedWeights,
    LinearWeight,
    NVFP4Tensor,
    clamped_silu,
    dual_gemm,
    linear,
    ops,
    quantize,
)
from glu4.backends.hopper import direct, launch
from glu4.backends.hopper.spec import DecodeSpec, KernelSpec
from operands import full_range

DTYPES = (torch.float16, torch.bfloat16)


# ---- results ----


@given(
    seed=st.integers(0, 2**20),
    lead=st.lists(st.integers(1, 3), max_size=2),
    m=st.integers(1, 70),
    n=st.integers(1, 100),
    blocks=st.integers(1, 9),
    kind=st.sampled_from(["float16", "bfloat16", "nvfp4"]),
    out_dtype=st.sampled_from([None, *DTYPES]),
    activation=st.sampled_from([SILU, IDENTITY, clamped_silu(0.5)]),
    bias=st.sampled_from([None, torch.float32, torch.bfloat16]),
    one=st.booleans(),
    free=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_plain_call_is_right_by_the_short_way(cuda: FakeCuda, short: None, seed: int, lead: list[int], m: int, n: int,
                                                  blocks: int, kind: str, out_dtype: torch.dtype | None, activation: Any,
                                                  bias: torch.dtype | None, one: bool, free: bool) -> None:  # fmt: skip
    k = 16 * blocks
    x = tokens(seed, *lead, m, k, kind=kind)
    if isinstance(x, NVFP4Tensor):
        x = NVFP4Tensor(x.codes, x.block_scale, torch.tensor(0.0123))
    vector = None if bias is None else torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(bias)
    dtype = out_dtype or (torch.bfloat16 if isinstance(x, NVFP4Tensor) else x.dtype)
    before = len(cuda.launches)
    if one:
        weight = full_range(seed, n, k)
        got = linear(x, LinearWeight(weight).prepare("cpu", free_original=free), bias=vector, out_dtype=out_dtype)
        want = expected(x, weight, dtype, bias=vector)
    else:
        w = pair(seed, n, k, gate_bias=vector)  # type: ignore[arg-type]
        got, want = None, expected(x, w, dtype, activation=activation)
        got = dual_gemm(x, w.prepare("cpu", free_original=free), activation=activation, out_dtype=out_dtype)
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.int16), want.view(torch.int16)) or torch.equal(got, want)
    *ahead, last = cuda.launches[before:]
    assert isinstance(last.spec, KernelSpec)
    assert last.spec.nvfp4 <= (kind == "nvfp4" and blocks % 4 == 0)
    assert [e.spec for e in ahead] == [DecodeSpec()] * (kind == "nvfp4" and not last.spec.nvfp4)
    assert all((e.device, e.stream) == (-1, cuda.stream) for e in (*ahead, last))


@pytest.mark.parametrize(("kind", "k"), [("float16", 80), ("nvfp4", 80), ("nvfp4", 128)])
def test_the_operator_gives_the_same_bits_and_launches_the_same(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, kind: str, k: int
) -> None:
    w = pair(1, 72, k, gate_bias=torch.randn(72), up_bias=torch.randn(72).half()).prepare("cpu")
    weight, x = LinearWeight(full_range(3, 72, k)).prepare("cpu"), tokens(2, 5, k, kind=kind)
    launches = []
    for call in (lambda: dual_gemm(x, w), lambda: linear(x, weight, bias=w.gate_bias)):
        results = []
        for way in ("short", "at once", "operator"):
            with monkeypatch.context() as patch:
                if way != "short":
                    patch.setattr(launch, "_C", launch._C)
                    for prepared in (w, weight):
                        patch.setattr(prepared, "direct", None)
                if way == "operator":
                    patch.setattr(ops, "ordinary", lambda *_: False)
                cuda.launches.clear()
                results.append(call())
                launches.append([told(e) for e in cuda.launches])
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
    assert launches[0] == launches[1] == launches[2]
    assert launches[3] == launches[4] == launches[5]
    assert [len(one) for one in launches] == [1 + (kind == "nvfp4" and k == 80)] * 6


def told(e: Launch) -> tuple[object, ...]:
    """All of a launch but for addresses."""
    return e.spec, e.grid, e.attributes, e.tensor_map[8:], tuple(p for p in e.parameters if p < 1 << 32)


def test_views_of_x(cuda: FakeCuda, short: None) -> None:
    w, wide = pair(1, 40, 80).prepare("cpu"), torch.randn(9, 96).half()
    for x in (wide[:, :80], wide[::2, 16:], wide[3:4, :80], wide[2:3, 16:]):
        assert torch.equal(dual_gemm(x, w), expected(x, w, torch.float16))
        row = cuda.launches[-1]
        assert row.parameters[0] == x.shape[0]


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 1:81],  # not at 16 bytes
        lambda t: t.flatten()[: 90 * 100].view(90, 100)[:, :80],  # rows not in steps of 16 bytes
        lambda t: t[:, 8:168:2],  # columns apart
        lambda t: t[:80].t(),
        lambda t: t[:1, :80].expand(5, 80),
        lambda t: t.flatten()[: 80 + 4 * 8].as_strided((5, 80), (8, 1)),  # rows that overlap
        lambda t: t[:8, :80].unflatten(0, (2, 4)),
    ],
)
def test_views_that_no_tensor_map_takes_are_copied(cuda: FakeCuda, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x, w = view(torch.randn(96, 192).half()), pair(1, 40, 80).prepare("cpu")
    assert torch.equal(dual_gemm(x, w), expected(x, w, torch.float16))
    assert len(cuda.launches) == 1


def test_out(cuda: FakeCuda, short: None) -> None:
    x, w = tokens(1, 2, 4, 80), pair(1, 40, 80).prepare("cpu")
    flat = x.view(8, 80)
    want = expected(x, w, torch.float16)
    whole, wide = torch.zeros(2, 4, 40).half(), torch.full((8, 50), 3.0).half()
    assert dual_gemm(x, w, out=whole) is whole
    assert torch.equal(whole, want)
    view = wide[:, 4:44]
    assert dual_gemm(flat, w, out=view) is view
    assert torch.equal(view, want.view(8, 40))
    assert (wide[:, :4] == 3).all()
    assert (wide[:, 44:] == 3).all()
    other = torch.zeros(8, 40).bfloat16()
    assert torch.equal(dual_gemm(flat, w, out=other), expected(flat, w, torch.bfloat16))
    version = other._version
    dual_gemm(flat, w, out=other)
    assert other._version == version + 1  # what autograd has saved of it is known to be overwritten
    buffer = torch.zeros(8, 128).half()
    buffer[:, :80] = flat
    beside = buffer[:, 88:]
    with pytest.raises(Long):  # x and out interleave in memory: the long way looks closer
        dual_gemm(buffer[:, :80], w, out=beside)


def test_out_of_any_strides(cuda: FakeCuda) -> None:
    x, w = tokens(1, 8, 80), pair(1, 40, 80).prepare("cpu")
    want = expected(x, w, torch.float16)
    for out in (torch.zeros(40, 8).half().t(), torch.zeros(8, 80).half()[:, ::2], torch.zeros(16, 40).half()[::2]):
        assert dual_gemm(x, w, out=out) is out
        assert torch.equal(out, want)
    apart = torch.zeros(40, 4, 2).half().permute(2, 1, 0)
    dual_gemm(x.view(2, 4, 80), w, out=apart)
    assert torch.equal(apart.flatten(0, 1), want)
    buffer = torch.zeros(8, 128).half()
    buffer[:, :80] = x
    assert torch.equal(dual_gemm(buffer[:, :80], w, out=buffer[:, 88:]), want)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "nvfp4"])
def test_batches_are_launched_one_by_one(cuda: FakeCuda, kind: str) -> None:
    w = pair(1, 3, 40, 80, gate_bias=torch.randn(3, 40))
    x = tokens(2, 3, 5, 80, kind=kind)
    want = expected(x, w, torch.float16)
    for _ in range(2):
        assert torch.equal(dual_gemm(x, w, out_dtype=torch.float16), want)
    # NVFP4 tokens of this K are decoded ahead, all at once
    once = [DecodeSpec] * (kind == "nvfp4") + [KernelSpec] * 3
    assert [type(e.spec) for e in cuda.launches] == 2 * once
    assert w.packed is not None
    stack = LinearWeight(full_range(4, 3, 40, 80))
    assert torch.equal(
        linear(x, stack, bias=w.gate_bias),
        expected(x, stack.matrix, torch.bfloat16 if kind == "nvfp4" else x.dtype, bias=w.gate_bias),
    )  # type: ignore[union-attr]
    out = torch.zeros(40, 5, 3).half().permute(2, 1, 0)
    assert torch.equal(dual_gemm(x, w, out=out), want)


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("lead", [(3,), (2, 2)])
def test_matrices_of_tokens_with_a_global_scale_each(cuda: FakeCuda, lead: tuple[int, ...], swizzled: bool) -> None:
    x = torch.randn(*lead, 5, 80, generator=torch.Generator().manual_seed(1))
    x *= torch.linspace(0.1, 9, x[..., 0, 0].numel()).view(*lead, 1, 1)
    q = quantize(x, layout="swizzled" if swizzled else "linear")
    assert q.global_scale.shape == lead
    w, out = pair(1, 40, 80).prepare("cpu"), torch.zeros(40, *lead, 5).bfloat16().movedim(0, -1)
    want = expected(q, w, torch.bfloat16)
    each = [DecodeSpec, *[KernelSpec] * q.global_scale.numel()]
    assert torch.equal(dual_gemm(q, w), want)
    assert [type(e.spec) for e in cuda.launches] == each
    assert torch.equal(dual_gemm(q, w, out=out), want)
    shared = NVFP4Tensor(q.codes, q.block_scale, torch.tensor(0.01))
    assert torch.equal(dual_gemm(shared, w), expected(shared, w, torch.bfloat16))
    assert [type(e.spec) for e in cuda.launches] == [*each, *each, DecodeSpec, KernelSpec]


def test_nothing_to_compute(cuda: FakeCuda) -> None:
    w, stack = pair(1, 40, 80).prepare("cpu"), pair(1, 0, 40, 80)
    assert dual_gemm(torch.zeros(0, 80).half(), w).shape == (0, 40)
    assert dual_gemm(torch.zeros(2, 0, 80).half(), w).shape == (2, 0, 40)
    assert dual_gemm(torch.zeros(0, 5, 80).half(), stack).shape == (0, 5, 40)
    assert dual_gemm(quantize(torch.zeros(0, 80)), w).shape == (0, 40)
    assert not cuda.launches


# ---- scales, biases and memory are looked at in each call ----


def test_values_that_change_in_place_count(cuda: FakeCuda, short: None) -> None:
    w = pair(1, 40, 80, gate_bias=torch.randn(40), up_bias=torch.randn(40).half()).prepare("cpu")
    x = tokens(1, 5, 80)
    for change in (
        lambda: w.gate.global_scale.mul_(2),
        lambda: w.gate_bias.add_(1),
        lambda: w.up_bias.add_(1),
        lambda: x.mul_(3),
    ):
        change()
        assert torch.equal(dual_gemm(x, w), expected(x, w, torch.float16))


def test_biases_of_any_strides(cuda: FakeCuda, short: None) -> None:
    x, wide = tokens(1, 5, 80), torch.randn(40, 2)
    w = pair(1, 40, 80, gate_bias=wide[:, 0], up_bias=wide[:, 1])
    assert torch.equal(dual_gemm(x, w.prepare("cpu")), expected(x, w, torch.float16))


def test_many_sizes_take_no_more_memory(cuda: FakeCuda, short: None) -> None:
    w, x = pair(1, 4096, 16).prepare("cpu"), torch.randn(600, 16).half()
    for m in (1, 600, 7, 300, 64, 65, 128, 129, 1, 20):
        assert torch.equal(dual_gemm(x[:m], w), expected(x[:m], w, torch.float16))
    kernels = {launch._kernel(spec) for spec in {e.spec for e in cuda.launches}}
    assert len(kernels) > 1
    assert all(len(k.frames) == 1 for k in kernels)  # type: ignore[union-attr]
    assert launch.choice.cache_info().maxsize == 1 << 14


def test_threads_that_call_with_one_weight_at_once(cuda: FakeCuda, short: None) -> None:
    """Launches wait before they read their memory, so that shared memory would be overwritten by then."""
    w = pair(1, 40, 80).prepare("cpu")
    x = [tokens(m, m, 80) for m in range(1, 9)]
    want = [expected(t, w, torch.float16) for t in x]
    dual_gemm(x[0], w)
    cuda.pause = 0.002
    with ThreadPoolExecutor(8) as pool:
        for i, got in enumerate(pool.map(lambda i: dual_gemm(x[i % 8], w), range(80))):
            assert torch.equal(got, want[i % 8]), i


# ---- calls like one before ----


@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from([(1,), (5,), (2, 3), (3, 2), (6,)]),
            st.sampled_from(DTYPES),
            st.sampled_from([None, *DTYPES]),
            st.sampled_from([SILU, IDENTITY, clamped_silu(0.5), clamped_silu(2.0)]),
            st.sampled_from(["none", "dense", "wide", "unaligned x", "strided x"]),
            st.integers(0, 2),
        ),
        min_size=2,
        max_size=8,
    )
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_call_of_many_is_right(cuda: FakeCuda, calls: list[Any]) -> None:
    """Calls that repeat a launch, each with its own tokens, weights, output and constants, and calls of other kinds between."""
    prepared = [pair(3 * i + 1, 40, 80).prepare("cpu") for i in range(3)]
    for i, (lead, dtype, out_dtype, activation, form, which) in enumerate(calls):
        x = torch.randn((*lead, 80), generator=torch.Generator().manual_seed(i)).to(dtype)
        if form == "unaligned x":
            x = torch.cat((torch.zeros(1, dtype=dtype), x.flatten()))[1:].view(x.shape)
        if form == "strided x":
            x = torch.cat((x, x), -1)[..., :80]
        if len(x.shape) == 1:
            x = x[None]
        w, shape = prepared[which], (*x.shape[:-1], 40)
        want = expected(x, w, out_dtype or dtype, activation=activation)
        out = None
        if form in ("dense", "wide"):
            out = torch.full(shape, float("nan"), dtype=want.dtype)
            out = out if form == "dense" else torch.cat((out, out), -1)[..., :40]
        got = dual_gemm(x, w, activation=activation, out_dtype=out_dtype, out=out)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
        assert out is None or got is out


def test_a_call_like_one_before_repeats_its_launch(cuda: FakeCuda, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair(1, 40, 80).prepare("cpu"), pair(7, 40, 80).prepare("cpu")
    dual_gemm(tokens(1, 5, 80), first)
    monkeypatch.setattr(direct, "submit", None)
    for w in (first, second):  # weights of one shape share what is remembered
        x = tokens(2, 5, 80)
        assert torch.equal(dual_gemm(x, w), expected(x, w, torch.float16))
        out = torch.zeros(5, 40).half()
        version = out._version
        assert torch.equal(dual_gemm(x, w, out=out), expected(x, w, torch.float16))
        assert out._version == version + 1
        w.gate.global_scale.mul_(2)  # values are read by each launch
        assert torch.equal(dual_gemm(x, w), expected(x, w, torch.float16))
    assert torch.equal(dual_gemm(x, w, activation=Activation()), expected(x, w, torch.float16))


def test_unusual_tokens_do_not_repeat_a_launch(cuda: FakeCuda, short: None) -> None:
    """All have the shape and type of a call before."""
    w, x = pair(1, 40, 80).prepare("cpu"), torch.randn(5, 80).half()
    dual_gemm(x, w)
    negated = torch._neg_view(x)
    assert (negated.is_neg(), negated.shape, negated.dtype) == (True, x.shape, x.dtype)
    row = torch.randn(402).half()[1:401].view(5, 80)
    assert row.data_ptr() % 16
    for unusual in (negated, torch._efficientzerotensor(5, 80, dtype=torch.float16), row, x.t().contiguous().t()):
        with pytest.raises(Long):
            dual_gemm(unusual, w)
    wants = x.clone().requires_grad_()
    with pytest.raises(Long):
        dual_gemm(wants, w)
    for out in (torch.zeros(5, 40), x.flatten()[200:].view(5, 40), torch.zeros(5, 40).half().requires_grad_()):
        with pytest.raises(Long):
            dual_gemm(x, w, out=out)
    assert len(cuda.launches) == 1


def test_what_is_remembered_is_bounded_and_can_be_forgotten(
    cuda: FakeCuda, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_PLANS", 3)
    w = pair(1, 40, 80).prepare("cpu")
    remembered = launch.plans(40, 80, True, -1)
    for m in range(1, 9):
        x = tokens(m, m, 80)
        for _ in range(2):
            assert torch.equal(dual_gemm(x, w), expected(x, w, torch.float16))
        assert 1 <= len(remembered) <= 3
    launch.forget()
    assert not remembered
    assert torch.equal(dual_gemm(x, w), expected(x, w, torch.float16))
    assert len(remembered) == 1


def test_forgetting_reads_measured_tables_again(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[bool] = []
    monkeypatch.setattr(launch.tuned, "forget", lambda: forgotten.append(True))
    launch.forget()
    assert forgotten


# ---- when the operator has to run ----


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_and_tracers_see_the_operator(cuda: FakeCuda) -> None:
    w, weight, x = pair(1, 40, 80).prepare("cpu"), LinearWeight(full_range(1, 40, 80)).prepare("cpu"), tokens(1, 5, 80)
    want = dual_gemm(x, w)
    with Watching() as mode:
        assert torch.equal(dual_gemm(x, w), want)
        linear(x, weight)
    assert [s for s in mode.seen if "glu4" in s] == ["glu4.dual_gemm.default", "glu4.linear.default"]
    with torch.device("cpu"):
        assert torch.equal(dual_gemm(x, w), want)
    launched = len(cuda.launches)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert dual_gemm(fake.from_tensor(x), w).shape == (5, 40)
    assert len(cuda.launches) == launched
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(lambda x: dual_gemm(x, w))(x)
    assert "glu4.dual_gemm" in traced.code
    assert torch.equal(traced(x), want)


def test_compiled_graphs(cuda: FakeCuda) -> None:
    w, weight, x = pair(1, 48, 80).prepare("cpu"), LinearWeight(full_range(1, 40, 48)).prepare("cpu"), tokens(1, 5, 80)
    freed = pair(1, 48, 80).prepare("cpu", free_original=True)
    for weights in (w, freed):

        def both(x: torch.Tensor, weights: GatedWeights = weights) -> torch.Tensor:
            return linear(dual_gemm(x, weights).relu(), weight, out_dtype=torch.bfloat16) + 1

        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), both(x))
    assert {e.spec.dual for e in cuda.launches} == {True, False}


def test_wrappers_and_subclasses_go_the_long_way(cuda: FakeCuda) -> None:
    class Subclass(torch.Tensor):
        pass

    w, x = pair(1, 40, 80).prepare("cpu"), tokens(1, 5, 80)
    assert isinstance(x, torch.Tensor)
    want = dual_gemm(x, w)
    assert torch.equal(dual_gemm(torch.nn.Parameter(x, requires_grad=False), w), want)
    assert torch.equal(dual_gemm(x.as_subclass(Subclass), w), want)  # type: ignore[arg-type]
    negated = torch.view_as_complex(torch.stack((x.float(), x.float()), -1)).conj().imag
    assert negated.is_neg()
    assert torch.equal(dual_gemm(negated, w, backend="portable"), dual_gemm(-x.float(), w, backend="portable"))
    with pytest.raises(TypeError, match=r"expected a dense tensor, got torch.sparse_coo"):
        dual_gemm(x.to_sparse(), w)


def test_inference_mode_and_autograd(cuda: FakeCuda) -> None:
    w, x = pair(1, 40, 80).prepare("cpu"), tokens(1, 5, 80)
    assert isinstance(x, torch.Tensor)
    want = dual_gemm(x, w)
    with torch.inference_mode():
        made = dual_gemm(x, w)
        assert made.is_inference()
        assert torch.equal(dual_gemm(x.clone(), w, out=made), want)
    wants = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="x requires grad, and glu4 has no backward pass yet"):
        dual_gemm(wants, w)
    with pytest.raises(ValueError, match="out requires grad"):
        dual_gemm(x, w, out=torch.zeros(5, 40).half().requires_grad_())
    with pytest.raises(ValueError, match="bias requires grad"):
        linear(x, LinearWeight(full_range(1, 40, 80)).prepare("cpu"), bias=torch.zeros(40, requires_grad=True))
    with torch.no_grad():
        assert torch.equal(dual_gemm(wants, w), want)


BAD: list[tuple[Callable[[torch.Tensor, GatedWeights, LinearWeight], object], type[Exception], str]] = [
    (lambda x, w, v: dual_gemm(x[:, :64], w), ValueError, "x has K = 64 and gate has K = 80"),
    (lambda x, w, v: dual_gemm(x[0], w), ValueError, r"x: expected \[..., M, K\], got shape \[80\]"),
    (lambda x, w, v: dual_gemm(quantize(x[:, :64]), w), ValueError, "x has K = 64 and gate has K = 80"),
    (
        lambda x, w, v: dual_gemm(x, GatedWeights(w.gate, w.up, None, torch.zeros(40).int(), None).prepare("cpu")),
        TypeError,
        "gate_bias: expected float16, bfloat16 or float32, got torch.int32",
    ),
    (
        lambda x, w, v: dual_gemm(x, GatedWeights(w.gate, w.up, None, None, torch.zeros(40).int()).prepare("cpu")),
        TypeError,
        "up_bias: expected float16, bfloat16 or float32, got torch.int32",
    ),
    (lambda x, w, v: dual_gemm(x.double(), w, out_dtype=torch.float16), TypeError, "x: expected float16, bfloat16 or float32"),
    (lambda x, w, v: dual_gemm(x.double(), w), TypeError, "x: expected float16, bfloat16 or float32"),
    (lambda x, w, v: dual_gemm("x", w), TypeError, "x: expected an NVFP4Tensor or a torch.Tensor, got str"),  # type: ignore[arg-type]
    (lambda x, w, v: dual_gemm(x.to("meta"), w), ValueError, "gate is on cpu, x is on meta"),
    (lambda x, w, v: dual_gemm(x, w, activation="silu"), TypeError, "activation: expected a glu4.Activation"),  # type: ignore[arg-type]
    (lambda x, w, v: dual_gemm(x, w, out_dtype=torch.int8), TypeError, "out_dtype: expected float16"),
    (lambda x, w, v: dual_gemm(x, w, out=[0.0]), TypeError, "out: expected a torch.Tensor, got list"),  # type: ignore[arg-type]
    (
        lambda x, w, v: dual_gemm(x, w, out=torch.zeros(5, 41).half()),
        ValueError,
        r"out: expected shape \[5, 40\], got \[5, 41\]",
    ),
    (lambda x, w, v: dual_gemm(x, w, out=torch.zeros(5, 40, device="meta").half()), ValueError, "out is on meta, x is on cpu"),
    (
        lambda x, w, v: dual_gemm(x, w, out=torch.zeros(1, 40).half().expand(5, 40)),
        ValueError,
        "several of its elements are one",
    ),
    (
        lambda x, w, v: dual_gemm(x, w, out=torch.zeros(5, 40), out_dtype=torch.float16),
        TypeError,
        "out: expected torch.float16, got torch.float32",
    ),
    (lambda x, w, v: dual_gemm(x, w, out=x[:, :40]), ValueError, "out overlaps x in memory"),
    (
        lambda x, w, v: dual_gemm(x, w, backend="fastest"),
        ValueError,
        "backend: expected one of hopper, blackwell, portable or None",
    ),
    (lambda x, w, v: linear(x, v, bias=torch.zeros(41)), ValueError, r"bias: expected shape \[40\], got \[41\]"),
    (lambda x, w, v: linear(x, v, bias=torch.zeros(40).int()), TypeError, "bias: expected float16, bfloat16 or float32"),
    (lambda x, w, v: linear(x, v, bias=[0.0] * 40), TypeError, "bias: expected a torch.Tensor, got list"),  # type: ignore[arg-type]
    (lambda x, w, v: linear(x, v, bias=torch.zeros(40, device="meta")), ValueError, "bias is on meta, x is on cpu"),
    (lambda x, w, v: linear(x, w), TypeError, "weight: expected an NVFP4Tensor, got GatedWeights"),  # type: ignore[arg-type]
    (lambda x, w, v: dual_gemm(x, v), TypeError, "weights: expected GatedWeights or a"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("before", [False, True], ids=["first call", "after others"])
@pytest.mark.parametrize("index", range(len(BAD)))
def test_the_same_refusals_for_prepared_weights(cuda: FakeCuda, index: int, before: bool) -> None:
    call, error, message = BAD[index]
    w, weight = pair(1, 40, 80).prepare("cpu"), LinearWeight(full_range(1, 40, 80)).prepare("cpu")
    if before:
        dual_gemm(torch.zeros(5, 80).half(), w)
        linear(torch.zeros(5, 80).half(), weight)
        cuda.launches.clear()
    with pytest.raises(error, match=message):
        call(torch.zeros(5, 80).half(), w, weight)
    assert not cuda.launches


def test_backends_by_name(cuda: FakeCuda) -> None:
    w, x = pair(1, 40, 80).prepare("cpu"), tokens(1, 5, 80)
    assert torch.equal(dual_gemm(x, w, backend="hopper"), expected(x, w, torch.float16))
    assert len(cuda.launches) == 1
    dual_gemm(x, w, backend="portable")
    dual_gemm(x.float(), w)  # type: ignore[union-attr]
    assert dual_gemm(x.float(), w, out_dtype=torch.float16).dtype == torch.float16  # type: ignore[union-attr]
    assert len(cuda.launches) == 1


def test_tokens_on_another_device_than_the_weights(cuda: FakeCuda) -> None:
    w, x = pair(1, 40, 80).prepare("cpu"), tokens(1, 5, 80)
    assert w.direct is not None
    w.direct._index = 5  # so that x is not where they are
    for operand in (x, quantize(x)):  # type: ignore[arg-type]
        dual_gemm(operand, w)
        assert cuda.launches[-1].device == -1


def test_the_current_device_may_be_another(cuda: FakeCuda) -> None:
    w, x = pair(1, 40, 80).prepare("cpu"), tokens(1, 5, 80)
    cuda.device = 3
    assert torch.equal(dual_gemm(x, w), expected(x, w, torch.float16))
    assert (cuda.launches[-1].device, cuda.device) == (-1, 3)
