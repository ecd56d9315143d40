"""Every shipped Hopper kernel against the specification, on a GPU: exact cases bit for bit, random ones through the checker."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace

import pytest
import torch

import glu4
from glu4 import GatedWeights, LinearWeight, NVFP4Tensor, UnsupportedError, dual_gemm, ops
from glu4.activation import SILU, clamped_silu, swiglu_oai
from glu4.backends.hopper import launch
from glu4.backends.hopper.config import SHIPPED, Config
from glu4.backends.hopper.pack import pack_gated, pack_matrix
from glu4.problem import dense_problem
from glu4.verify.cases import Case, exact_sum_case, full_range_case, one_hot_case
from glu4.verify.checker import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)), reason="needs a Hopper GPU"
    ),
]
FORMATS = ("nvfp4", "float16", "bfloat16")
OUT = (torch.float16, torch.bfloat16)


def on_gpu(case: Case, config: Config | None = None) -> torch.Tensor:
    """The case on the GPU; the output's memory is poisoned first."""
    case = case.to("cuda")
    kwargs = {"dual": case.up is not None, "activation": case.activation, "out_dtype": case.out_dtype, "has_bias": False}
    problem = dense_problem(case.x, case.gate, **kwargs)
    out = torch.full(case.out_shape, float("nan"), dtype=case.out_dtype, device="cuda")
    packed = pack_matrix(case.gate) if case.up is None else pack_gated(case.gate, case.up)
    scales = (case.gate.global_scale, case.gate.global_scale if case.up is None else case.up.global_scale)
    biases = (case.gate_bias, case.gate_bias if case.up is None else case.up_bias)
    launch.dense(out, case.x, packed, scales, biases, case.activation, problem, config, overlap=False)
    return out.cpu()


def assert_right(case: Case, config: Config | None = None) -> None:
    verdict = check(case, on_gpu(case, config), diagnose=True)
    assert verdict.ok, f"{config}: {case.name}: {verdict.summary()}"


@pytest.mark.parametrize("config", SHIPPED, ids=lambda c: c.name)
def test_every_kernel(config: Config) -> None:
    for i, x_format in enumerate(FORMATS):
        for out_dtype in OUT:
            for linear in (False, True):
                both = {"x_format": x_format, "out_dtype": out_dtype, "linear": linear}
                assert_right(one_hot_case(i, 48, 128, 16, **both), config)
                assert_right(exact_sum_case(i + 3, 37, 72, 208, **both), config)
                assert_right(full_range_case(i + 9, 70, 200, 336, bias=True, **both), config)
                for k in (64, 1088):  # with which kernels of small tiles decode tokens themselves
                    assert_right(exact_sum_case(i + 5, 11, 72, k, **both), config)


@pytest.mark.parametrize("activation", [SILU, clamped_silu(1.5), swiglu_oai()], ids=lambda a: a.name)
def test_activations(activation) -> None:  # type: ignore[no-untyped-def]
    for x_format in FORMATS:
        assert_right(full_range_case(5, 33, 64, 256, x_format=x_format, activation=activation, bias=True))


@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 15, 17, 31, 33, 63, 65, 100, 127, 129, 200, 255, 257, 300])
def test_tails_of_m(m: int) -> None:
    assert_right(full_range_case(m, m, 40, 80, x_format=FORMATS[m % 3]))


@pytest.mark.parametrize(
    ("n", "k"), [(8, 16), (24, 48), (72, 80), (136, 112), (264, 1040), (8, 7184), (8, 64), (72, 192), (40, 3328)]
)
def test_tails_of_n_and_k(n: int, k: int) -> None:
    for m in (3, 130):
        for x_format in FORMATS:
            assert_right(full_range_case(n + k, m, n, k, x_format=x_format))


def test_long_k() -> None:
    for config in SHIPPED:
        assert_right(full_range_case(1, 64, 96, 7168, x_format="bfloat16"), config)
        assert_right(full_range_case(2, 64, 96, 7168), config)


def test_extreme_global_scales() -> None:
    for gx, gw in ((1e30, 1e-30), (2.0**-126, 2.0**120), (1e-40, 1e38), (3e38, 1e-36), (1e-20, 1e-20)):
        base = full_range_case(3, 9, 40, 64, linear=True)
        x = type(base.x)(base.x.codes, base.x.block_scale, torch.tensor(gx))
        gate = type(base.gate)(base.gate.codes, base.gate.block_scale, torch.tensor(gw))
        case = Case("scales", 3, x, gate, None, base.activation, None, None, torch.bfloat16)
        assert_right(case)


def test_the_same_bits_fifty_times() -> None:
    case = full_range_case(4, 200, 264, 2064, x_format="float16")
    for config in SHIPPED:
        first = on_gpu(case, config)
        assert all(torch.equal(on_gpu(case, config), first) for _ in range(50))


def prepared(case: Case) -> GatedWeights:
    assert case.up is not None
    return GatedWeights(case.gate, case.up, gate_bias=case.gate_bias, up_bias=case.up_bias).prepare("cuda")


def test_prepared_weights() -> None:
    case = full_range_case(7, 37, 264, 208, x_format="bfloat16", out_dtype=torch.bfloat16, bias=True)
    x, weights = case.x.to("cuda"), prepared(case)
    assert weights.packed is not None
    out = dual_gemm(x, weights, backend="hopper")
    assert check(case, out).ok
    assert torch.equal(out, dual_gemm(x, weights))
    assert check(case, dual_gemm(x, weights, backend="portable")).ok
    three = dual_gemm(x.expand(2, *x.shape), weights)
    assert torch.equal(three[1], out)
    strided = torch.full((264, 37), 3.0, dtype=torch.bfloat16, device="cuda").t()
    assert torch.equal(dual_gemm(x, weights, out=strided), out)
    odd = torch.randn(37, 209, device="cuda").bfloat16()[:, 1:]  # rows that no tensor map can address
    assert torch.equal(dual_gemm(odd, weights), dual_gemm(odd.contiguous(), weights))


@pytest.mark.parametrize("k", [208, 192])
@pytest.mark.parametrize("x_format", FORMATS)
def test_every_form_of_weights_gives_the_same_bits(x_format: str, k: int) -> None:
    case = full_range_case(7, 37, 264, k, x_format=x_format)
    assert case.up is not None
    here = case.to("cuda")
    assert here.up is not None
    expected, one = dual_gemm(here.x, prepared(case)), LinearWeight(here.gate).prepare("cuda")
    forms = [GatedWeights(here.gate, here.up), (here.gate, here.up), prepared(case).prepare("cuda", free_original=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(torch.equal(dual_gemm(here.x, form), expected) for form in forms for _ in range(2))
        out = glu4.linear(here.x, one)
        both = (here.gate, LinearWeight(here.gate))
        assert all(torch.equal(glu4.linear(here.x, form), out) for form in both for _ in range(2))
    assert check(replace(case, up=None, out_dtype=out.dtype), out).ok


@pytest.mark.parametrize("k", [208, 192])
@pytest.mark.parametrize("x_format", FORMATS)
def test_the_operator_gives_the_same_bits(x_format: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = full_range_case(9, 37, 264, k, x_format=x_format, bias=True)
    x, weights = case.x.to("cuda"), prepared(case)
    expected = dual_gemm(x, weights)
    weights.direct = None
    assert torch.equal(dual_gemm(x, weights), expected)
    monkeypatch.setattr(ops, "ordinary", lambda tensors: False)
    assert torch.equal(dual_gemm(x, weights), expected)


@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("k", [144, 192])
def test_batches(x_format: str, linear: bool, k: int) -> None:
    case = full_range_case(3, 19, 72, k, batch=3, x_format=x_format, linear=linear, bias=True)
    here = case.to("cuda")
    if here.up is None:
        out = glu4.linear(here.x, LinearWeight(here.gate), bias=here.gate_bias, out_dtype=case.out_dtype, backend="hopper")
    else:
        weights = GatedWeights(here.gate, here.up, gate_bias=here.gate_bias, up_bias=here.up_bias)
        out = dual_gemm(here.x, weights, out_dtype=case.out_dtype, backend="hopper")
    assert check(case, out).ok


@pytest.mark.parametrize("k", [144, 192])
def test_matrices_of_tokens_with_a_global_scale_each(k: int) -> None:
    case = full_range_case(3, 19, 72, k, batch=3)
    assert case.up is not None
    assert isinstance(case.x, NVFP4Tensor)
    shared = replace(case, gate=case.gate[0], up=case.up[0])
    out = dual_gemm(case.x.to("cuda"), prepared(shared), out_dtype=case.out_dtype, backend="hopper")
    for i in range(3):
        assert check(replace(shared, x=case.x[i]), out[i]).ok


def test_a_new_thread_may_make_the_first_call() -> None:
    """Its context is not bound to it before some CUDA call of its own."""
    case = full_range_case(11, 9, 72, 80, x_format="float16")
    x, weights = case.x.to("cuda"), prepared(case)
    expected, out = dual_gemm(x, weights), torch.zeros(9, 72, dtype=torch.float16, device="cuda")
    failed: list[BaseException] = []

    def work() -> None:
        try:
            dual_gemm(x, weights, out=out)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not failed
    assert torch.equal(out, expected)


def test_packing_is_refused_while_a_graph_is_captured() -> None:
    case = full_range_case(12, 9, 72, 80, x_format="float16").to("cuda")
    assert case.up is not None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(UnsupportedError, match="a CUDA graph is being captured"), torch.cuda.graph(graph):
        dual_gemm(case.x, GatedWeights(case.gate, case.up))


def test_graphs_streams_and_compile() -> None:
    case = full_range_case(8, 20, 136, 128, x_format="float16")
    x, weights = case.x.to("cuda"), prepared(case)
    expected = dual_gemm(x, weights)
    out = torch.zeros_like(expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        dual_gemm(x, weights, out=out)
    stream.synchronize()
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dual_gemm(x, weights, out=out)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    compiled = torch.compile(lambda x: dual_gemm(x, weights), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
