"""Mixtures of experts on a Hopper device made of Python: what is launched, from where, and that nothing reads the offsets."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import fake_hopper as fake
import glu4.weights
from fake_hopper import FakeCuda, fake_hopper
from glu4 import (
    GatedWeights,
    LinearWeight,
    NVFP4Tensor,
    UnsupportedError,
    dual_gemm,
    grouped_dual_gemm,
    grouped_linear,
    linear,
    quantize,
    reference,
)
from glu4.activation import Activation
from glu4.backends.hopper.grouped_config import (
    GATHER_CONFIGS,
    GROUPED_SHIPPED,
    GroupedConfig,
    grouped_candidates,
    grouped_legal,
)
from glu4.backends.hopper.spec import DecodeSpec, GroupedSpec, shipped_grouped, spec_from_dict
from glu4.problem import GroupedProblem
from operands import full_range

N, K, COUNTS = 40, 80, (3, 0, 5, 1)
CLAMPED = Activation("swish", 1.702, 1.0, 7.0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_hopper(monkeypatch) as fake:
        yield fake


def stack(seed: int, experts: int = len(COUNTS)) -> NVFP4Tensor:
    """Weights of full range; every expert's global scale is its own."""
    parts = [full_range(seed + e, N, K) for e in range(experts)]
    scales = torch.stack([p.block_scale.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn)
    return NVFP4Tensor(torch.stack([p.codes for p in parts]), scales, torch.rand(experts) * 1e-4 + 1e-5)


def weights(biased: bool = False) -> GatedWeights:
    biases = {name: torch.randn(len(COUNTS), N) for name in ("gate_bias", "up_bias")} if biased else {}
    return GatedWeights(stack(1), stack(50), **biases)


def offsets() -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(COUNTS).cumsum(0).tolist()], dtype=torch.int32)


def tokens(dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(sum(COUNTS) + 2, K).to(dtype)


def agree(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Both round once what differs by the order of sums alone."""
    rows = sum(COUNTS)
    a, b = got[:rows].double(), want[:rows].double()
    return bool(((a - b).abs() <= 2 * torch.finfo(got.dtype).eps * b.abs() + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["prepared", "freed", "object", "tensors"])
def test_one_launch_for_all_experts(hopper: FakeCuda, form: str, dtype: torch.dtype) -> None:
    w, x = weights(biased=form != "tensors"), tokens(dtype)
    want = grouped_dual_gemm(x, w, offsets(), activation=CLAMPED, backend="portable")
    given = {
        "prepared": lambda: copy.copy(w).prepare("cpu"),
        "freed": lambda: copy.copy(w).prepare("cpu", free_original=True),
        "object": lambda: w,
        "tensors": lambda: (w.gate, w.up),
    }[form]()
    before = len(hopper.launches)
    out = torch.full((x.shape[0], N), 7.0, dtype=dtype)
    grouped_dual_gemm(x, given, offsets(), activation=CLAMPED, out=out, backend="hopper")
    assert agree(out, want)
    assert (out[sum(COUNTS) :] == 7).all()
    assert [type(launched.spec) for launched in hopper.launches[before:]] == [GroupedSpec]


# what torch does on the host alone; any other operator is a launch on a GPU, between the caller's kernels and this one
_NO_LAUNCH = {"empty", "new_empty", "empty_strided", "view", "expand", "as_strided", "slice", "select", "alias", "detach"}


@pytest.mark.parametrize("x_format", ["float16", "nvfp4"])
@pytest.mark.parametrize("free_original", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize("operation", ["dual_gemm", "linear", "grouped_dual_gemm", "grouped_linear"])
def test_a_call_launches_its_kernels_alone(
    hopper: FakeCuda, operation: str, free_original: bool, x_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fill of one byte took 0.8 us of every call, and the overlap with the kernel before (H200)."""
    x = tokens() if x_format == "float16" else quantize(tokens().float())
    first = torch.zeros(len(COUNTS) + 1, dtype=torch.int32)
    one = full_range(1, N, K)
    prepare = partial(_prepare, free_original=free_original)
    run = {
        "dual_gemm": partial(dual_gemm, x, prepare(GatedWeights(one, full_range(2, N, K)))),
        "linear": partial(linear, x, prepare(LinearWeight(one))),
        "grouped_dual_gemm": partial(grouped_dual_gemm, x, prepare(weights()), first),
        "grouped_linear": partial(grouped_linear, x, prepare(LinearWeight(stack(1))), first),
    }[operation]
    for kernel in ("run", "run_grouped", "run_decoder"):  # which compute by torch
        monkeypatch.setattr(fake, kernel, lambda _: None)
    run()  # the first call of a process allocates
    before = len(hopper.launches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run()
    names = {e.name.removeprefix("aten::") for e in seen.events() if e.name.startswith("aten::")}
    assert names
    assert names <= _NO_LAUNCH
    assert len(hopper.launches) == before + (2 if x_format == "nvfp4" else 1)  # the decoder ahead


def _prepare(w: Any, *, free_original: bool) -> Any:
    return w.prepare("cpu", free_original=free_original)


@pytest.mark.parametrize("dual", [True, False])
def test_weights_that_this_call_packs_are_not_read_early(hopper: FakeCuda, dual: bool) -> None:
    """A kernel starts its copies of weights before the one in front has ended: not where that one makes them."""
    x, kept, bare = tokens(), _prepare(weights(), free_original=False), weights()
    before = len(hopper.launches)
    if dual:
        grouped_dual_gemm(x, kept, offsets())
        with pytest.warns(UserWarning, match="packed"):
            grouped_dual_gemm(x, (bare.gate, bare.up), offsets())
    else:
        grouped_linear(x, _prepare(LinearWeight(stack(1)), free_original=False), offsets())
        with pytest.warns(UserWarning, match="packed"):
            grouped_linear(x, stack(1), offsets())
    assert [6 in launched.attributes for launched in hopper.launches[before:]] == [True, False]


def test_only_the_packed_form_is_kept_and_unpacks_to_the_same_values(hopper: FakeCuda) -> None:
    w = weights()
    gate = w.gate.dequantize(torch.float32)
    freed = copy.copy(w).prepare("cpu", free_original=True)
    assert freed.matrices is None
    assert freed.shape == (len(COUNTS), N, K)
    assert torch.equal(freed.gate.dequantize(torch.float32), gate)
    x = tokens()
    assert agree(
        grouped_dual_gemm(x, freed, offsets(), backend="portable"), grouped_dual_gemm(x, w, offsets(), backend="portable")
    )


def test_nvfp4_tokens_are_decoded_by_a_kernel_ahead(hopper: FakeCuda) -> None:
    w, x = weights().prepare("cpu"), quantize(tokens().float())
    want = grouped_dual_gemm(x, w, offsets(), out_dtype=torch.float16, backend="portable")
    before = len(hopper.launches)
    assert agree(grouped_dual_gemm(x, w, offsets(), out_dtype=torch.float16), want)
    assert [type(launched.spec) for launched in hopper.launches[before:]] == [DecodeSpec, GroupedSpec]


def test_rows_that_are_not_dense_and_no_rows(hopper: FakeCuda) -> None:
    w, x = weights().prepare("cpu"), tokens()
    want = grouped_dual_gemm(x, w, offsets(), backend="portable")
    column_major = torch.full((N, x.shape[0]), 7.0).half().t()
    grouped_dual_gemm(x, w, offsets(), out=column_major)
    assert agree(column_major, want)
    assert (column_major[sum(COUNTS) :] == 7).all()
    before = len(hopper.launches)
    assert grouped_dual_gemm(x[:0], w, torch.zeros(len(COUNTS) + 1, dtype=torch.int32)).shape == (0, N)
    assert len(hopper.launches) == before


def test_what_the_kernel_does_not_do_goes_elsewhere(hopper: FakeCuda) -> None:
    w, one = weights().prepare("cpu"), LinearWeight(stack(1)).prepare("cpu")
    x = tokens()
    before = len(hopper.launches)
    assert grouped_linear(x, one, offsets(), out_dtype=torch.float32).shape == (x.shape[0], N)
    assert len(hopper.launches) == before
    for call in (lambda: grouped_dual_gemm(x.float(), w, offsets(), backend="hopper"),
                 lambda: grouped_linear(x.float(), one, offsets(), backend="hopper")):  # fmt: skip
        with pytest.raises(UnsupportedError, match="backend hopper: float32 activations"):
            call()


# ---- one matrix an expert ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["prepared", "freed", "object", "tensor"])
def test_one_matrix_an_expert(hopper: FakeCuda, form: str, dtype: torch.dtype) -> None:
    """As of gate and up, one launch; `object` is packed by its first call and keeps that."""
    matrix, x = stack(1), tokens(dtype)
    bias = torch.randn(len(COUNTS), N).to(dtype) if form != "tensor" else None
    want = reference.grouped_linear(x, matrix, offsets(), bias=bias, out_dtype=dtype)
    given = {
        "prepared": lambda: LinearWeight(matrix).prepare("cpu"),
        "freed": lambda: LinearWeight(matrix).prepare("cpu", free_original=True),
        "object": lambda: LinearWeight(matrix),
        "tensor": lambda: matrix,
    }[form]()
    before = len(hopper.launches)
    with warnings.catch_warnings():
        if form != "tensor":
            warnings.simplefilter("error")
        for _ in range(2):
            out = torch.full((x.shape[0], N), 7.0, dtype=dtype)
            grouped_linear(x, given, offsets(), bias=bias, out=out, backend="hopper")
            assert torch.equal(out[: sum(COUNTS)], want[: sum(COUNTS)])
            assert (out[sum(COUNTS) :] == 7).all()
    specs = [launched.spec for launched in hopper.launches[before:]]
    assert (
        [(type(s), s.dual) for s in specs if isinstance(s, GroupedSpec)]
        == [(GroupedSpec, False)] * 2
        == [(type(s), False) for s in specs]
    )
    assert isinstance(given, NVFP4Tensor) or given.packed is not None


def test_a_matrix_that_is_not_kept_is_packed_each_call_with_one_warning(hopper: FakeCuda) -> None:
    matrix, x = stack(1), tokens()
    with pytest.warns(UserWarning, match="packed again at every call; use .*LinearWeight\\(weight\\).prepare\\(device\\)"):
        grouped_linear(x, matrix, offsets())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grouped_linear(x, matrix, offsets())
    assert len(hopper.launches) == 2


def test_only_the_packed_form_serves_what_the_kernel_cannot(hopper: FakeCuda) -> None:
    matrix, x = stack(1), tokens()
    freed = LinearWeight(matrix).prepare("cpu", free_original=True)
    assert (freed.matrices, freed.shape) == (None, (len(COUNTS), N, K))
    with pytest.warns(UserWarning, match="are unpacked at every call that the Hopper kernel cannot run"):
        got = grouped_linear(x.float(), freed, offsets())
    assert torch.equal(got[: sum(COUNTS)], grouped_linear(x.float(), matrix, offsets())[: sum(COUNTS)])


def test_nvfp4_tokens_of_one_matrix_are_decoded_and_scaled(hopper: FakeCuda) -> None:
    weight, x = LinearWeight(stack(1)).prepare("cpu"), quantize(tokens().float() * 3)
    assert x.global_scale != 1
    want = reference.grouped_linear(x, weight.matrix, offsets(), out_dtype=torch.bfloat16)
    before = len(hopper.launches)
    assert torch.equal(grouped_linear(x, weight, offsets())[: sum(COUNTS)], want[: sum(COUNTS)])
    assert [type(launched.spec) for launched in hopper.launches[before:]] == [DecodeSpec, GroupedSpec]


def test_a_capture_needs_weights_that_are_packed(hopper: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared weights run, all kernels loaded before; others are refused, as each replay would pack them again."""
    weight, x, bounds = LinearWeight(stack(1)).prepare("cpu"), tokens(), offsets()
    loaded = hopper.calls.count("cuLibraryLoadData")
    monkeypatch.setattr(glu4.weights, "_capturing", lambda device: True)
    grouped_linear(x, weight, bounds)
    for given in (weight.matrix, LinearWeight(weight.matrix)):
        with pytest.raises(UnsupportedError, match="a CUDA graph is being captured, and these are not packed yet"):
            grouped_linear(x, given, bounds)
    assert hopper.calls.count("cuLibraryLoadData") == loaded


def test_rows_of_one_matrix_that_are_not_dense_and_no_rows(hopper: FakeCuda) -> None:
    weight, x = LinearWeight(stack(1)).prepare("cpu"), tokens()
    want = reference.grouped_linear(x, weight.matrix, offsets())
    column_major = torch.full((N, x.shape[0]), 7.0).half().t()
    grouped_linear(x, weight, offsets(), out=column_major)
    assert torch.equal(column_major[: sum(COUNTS)], want[: sum(COUNTS)])
    assert (column_major[sum(COUNTS) :] == 7).all()
    before = len(hopper.launches)
    assert grouped_linear(x[:0], weight, torch.zeros(len(COUNTS) + 1, dtype=torch.int32)).shape == (0, N)
    assert len(hopper.launches) == before


def test_one_matrix_in_a_compiled_graph(hopper: FakeCuda) -> None:
    weight, x = LinearWeight(stack(1)).prepare("cpu", free_original=True), tokens()

    def layer(x: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        return grouped_linear(x, weight, bounds) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, offsets())[: sum(COUNTS)], layer(x, offsets())[: sum(COUNTS)])
    assert len(hopper.launches) == 2


def test_specs_come_back_as_they_were_written() -> None:
    for spec in shipped_grouped():
        assert spec_from_dict(spec.to_dict()) == spec
    specs = [s for s in shipped_grouped() if isinstance(s, GroupedSpec)]
    assert len({s.name for s in specs}) == len(specs) == 4 * len((*GROUPED_SHIPPED, *GROUPED_SHIPPED, *GATHER_CONFIGS))
    one, other = (GroupedSpec(GroupedConfig(share=s), "f16", "f16") for s in (6000, 0))
    assert one.name != other.name
    assert one.key != other.key


def test_what_a_configuration_may_be() -> None:
    for config in GROUPED_SHIPPED:
        assert config.stages >= 2
        assert config.shared_bytes <= 227 * 1024
        assert config.consumer_registers * 128 * config.rows + 32 * 128 <= 65536
    for wrong, message in (
        ({"grain": 12}, "grain: expected a multiple of 8 that divides 128, got 12"),
        ({"grain": 48}, "grain: expected a multiple of 8 that divides 128, got 48"),
        ({"tokens": 256}, "grain: at most 31 widths of products, a lane for each, got 32"),
        ({"least": 0}, "least: expected 1 or more stages, got 0"),
        ({"share": -1}, "share: expected 0 to 2\\^20, got -1"),
        ({"rows": 4, "fit": True}, "fit: tiles have 2 or 3 row groups, and rows is 4"),
        ({"box": 48}, "box: expected a multiple of 8 that divides 128, got 48"),
        ({"sets": 3}, "sets: expected 1 or 2, got 3"),
        ({"steps": 3}, "steps: expected 1, 2 or 4, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            GroupedConfig(**wrong)  # type: ignore[arg-type]
    problem = GroupedProblem(4, 2, 8, 16, out_dtype=torch.float32)
    assert grouped_legal(GroupedConfig(), problem) == "float32 output: the kernel writes float16 or bfloat16"


@pytest.mark.parametrize(
    ("experts", "rows", "n", "best"),
    [
        (128, 512, 768, "t64r4d4b32w8"),
        (128, 24 * 128, 768, "t64r4d4b32w8"),
        (128, 64 * 128, 768, "t128r4d4ob32w8"),
        (32, 128 * 32, 2048, "t128r4d4ob32w8"),
        (8, 128 * 8, 14336, "t192r3d4b32w8f"),
        (32, 160 * 32, 2048, "t192r3d4b32w8f"),
        (32, 192 * 32, 2048, "t256r2d4b32w16"),
        (128, 256 * 128, 768, "t192r3d4b32w8f"),
        (2, 512, 3072, "t192r3d4b32w8f"),  # 4 bands by 32 row tiles of 192: 128 CTAs
        (2, 128, 3072, "t128r4d4ob32w8"),  # two bands, but of few tokens
    ],
)
def test_the_configuration_that_was_measured_fastest(experts: int, rows: int, n: int, best: str) -> None:
    """Near the points of benchmarks/results/h200-grouped-points.json."""
    problem = GroupedProblem(rows, experts, n, 4096)
    order = list(grouped_candidates(problem))
    assert order[0].name == best
    assert set(order) == set(GROUPED_SHIPPED) - ({GroupedConfig(256, 2, 32, 16, 4)} if experts > 160 else set())


def test_one_round_depends_on_the_operation_and_the_device() -> None:
    """512 tokens of two experts are at most four bands of 192: with 32 row tiles of gate and up 128 CTAs."""
    fits = GroupedProblem(512, 2, 3072, 4096)
    assert next(grouped_candidates(fits, processors=128)).fit
    assert next(grouped_candidates(replace(fits, rows=385), processors=96)).fit  # three bands
    assert next(grouped_candidates(replace(fits, rows=385), processors=95)).tokens == 256
    one = replace(fits, rows=385, operation="grouped_linear", n=6144)
    assert next(grouped_candidates(one, processors=96)).fit
