"""What explain says, which backend is chosen, and what happens on a Hopper GPU whose kernels are not compiled."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from fake_hopper import FakeCuda, description, fake_hopper
from glu4 import (
    GatedWeights,
    GroupedProblem,
    LinearWeight,
    Problem,
    UnsupportedError,
    dual_gemm,
    explain,
    grouped_linear,
    linear,
    quantize,
)
from glu4.backends.hopper.spec import DecodeSpec, GroupedSpec, KernelSpec, Spec, shipped, shipped_grouped
from glu4.backends.tokens import spec as token_kernels
from glu4.compiled import store
from operands import full_range


def test_explain_names_the_backend_and_the_reason() -> None:
    e = explain(Problem(1, 8, 16), "cpu")
    assert e.chosen == "portable"
    assert str(e).splitlines()[0] == "dual_gemm on cpu: portable"
    assert "torch.matmul" in str(e)
    assert "hopper: no, needs a GPU of compute capability 9.0" in str(e)


def test_insisting_on_a_backend_that_cannot_run() -> None:
    gate = full_range(1, 8, 16)
    with pytest.raises(UnsupportedError, match="backend hopper: needs a GPU of compute capability"):
        dual_gemm(torch.zeros(1, 16).half(), (gate, gate), backend="hopper")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A Hopper device with no kernel compiled, and no CuTe DSL."""
    with fake_hopper(monkeypatch, compiled=False) as fake:
        monkeypatch.setattr(store, "installed_dsl", lambda: None)
        yield fake


def test_explain_on_a_hopper_gpu(bare: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(1, 8, 16)
    assert "hopper: no, its kernels are not compiled here; run glu4 compile" in str(explain(problem, "cpu"))
    refused = explain(Problem(1, 8, 16, x_format="float32"), "cpu")
    assert refused.chosen == "portable"
    assert "wgmma would round them to TF32" in str(refused)
    monkeypatch.setattr(store, "installed_dsl", lambda: store.DSL_VERSION)
    assert "hopper: no, its kernels are not compiled yet; the first call compiles them" in str(explain(problem, "cpu"))
    monkeypatch.setattr(store, "installed_dsl", lambda: "1.0")
    assert "not compiled here; run glu4 compile" in str(explain(problem, "cpu"))
    with fake_hopper(monkeypatch):
        assert explain(problem, "cpu").chosen == "hopper"
        assert explain(GroupedProblem(1, 2, 8, 16), "cpu").chosen == "hopper"
        linear_problem = GroupedProblem(1, 2, 8, 16, operation="grouped_linear")
        assert explain(linear_problem, "cpu").chosen == "hopper"
        assert "emulation" not in str(explain(linear_problem, "cpu")).splitlines()[1]
        many = explain(GroupedProblem(1, 513, 8, 16), "cpu")
        assert many.chosen == "portable"
        assert "513 experts: the kernel's schedule holds up to" in str(many)


def test_without_kernels_a_hopper_gpu_says_once_what_to_do(bare: FakeCuda) -> None:
    """A slow fallback on such a GPU would be taken for the kernel's speed."""
    w, x = GatedWeights(full_range(1, 8, 16), full_range(2, 8, 16)), torch.ones(1, 16).half()
    with pytest.warns(UserWarning, match="the portable backend runs on it, many times slower: .* run glu4 compile"):
        prepared = w.prepare("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepared.packed is None
        want = dual_gemm(x, prepared)
        assert torch.equal(dual_gemm(x, (w.gate, w.up)), want)
        assert torch.equal(dual_gemm(x, w, backend="portable"), want)
    for weights in (prepared, (w.gate, w.up)):
        with pytest.raises(UnsupportedError, match="backend hopper: its kernels are not compiled here; run glu4 compile"):
            dual_gemm(x, weights, backend="hopper")
    assert not bare.launches


def test_kernels_are_compiled_at_first_use_where_that_is_possible(
    bare: FakeCuda, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def compile_missing(specs: Sequence[Spec], on_done: Callable[[str], None]) -> int:
        for spec in specs:
            on_done(spec.name)
        made.extend(spec.name for spec in specs)
        monkeypatch.setattr(
            store, "find", lambda s: (json.dumps(s.to_dict()).encode(), description(s)) if s.name in made else None
        )
        return len(specs)

    monkeypatch.setattr(store, "installed_dsl", lambda: store.DSL_VERSION)
    monkeypatch.setattr(store, "compile_missing", compile_missing)
    w = GatedWeights(full_range(1, 8, 16), full_range(2, 8, 16)).prepare("cpu")
    assert w.packed is not None
    quantizers = [s.name for s in token_kernels.quantizers("sm_90a")]
    dual = [s.name for s in shipped(dual=True)] + quantizers
    assert made == dual
    assert {s.dual for s in shipped(dual=True) if isinstance(s, KernelSpec)} == {True}
    assert (
        f"glu4: compiling {len(dual)} dual_gemm kernels, once (glu4 compile does it beforehand): {len(dual)}"
        in capsys.readouterr().err
    )
    dual_gemm(torch.ones(1, 16).half(), w, backend="hopper")
    linear(torch.ones(1, 16).half(), LinearWeight(w.gate))
    assert made == dual + [s.name for s in shipped(dual=False)] + quantizers  # what decodes or quantises tokens is of both
    of_experts = {s.name for s in shipped_grouped()} - {DecodeSpec().name}
    assert set(made) == {s.name for s in shipped()} - of_experts | set(quantizers)
    before = len(made)
    dual_gemm(quantize(torch.ones(1, 16)), w)
    assert len(made) == before
    # of a mixture of experts, one operation at a time too
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    stack = LinearWeight(full_range(1, 1, 8, 16))
    grouped_linear(torch.ones(1, 16).half(), stack, offsets)
    assert stack.packed is not None
    ones = [s.name for s in (*shipped_grouped(dual=False), *token_kernels.shipped("sm_90a"))]
    assert made[before:] == ones
    assert f"glu4: compiling {len(ones)} grouped_linear kernels, once" in capsys.readouterr().err
    assert [type(e.spec) for e in bare.launches] == [KernelSpec, KernelSpec, DecodeSpec, KernelSpec, GroupedSpec]


def test_compiling_that_fails_is_tried_once_and_told(bare: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def fail(specs: object, on_done: object) -> int:
        tries.append(1)
        raise UnsupportedError("GLU4_CACHE_DIR is off, so there is nowhere to put a compiled kernel")

    monkeypatch.setattr(store, "installed_dsl", lambda: store.DSL_VERSION)
    monkeypatch.setattr(store, "compile_missing", fail)
    w, x = GatedWeights(full_range(1, 8, 16), full_range(2, 8, 16)), torch.ones(1, 16).half()
    with pytest.warns(UserWarning, match="many times slower: its kernels are not compiled here, and cannot be: GLU4_CACHE_DIR"):
        dual_gemm(x, w)
    with pytest.raises(UnsupportedError, match="cannot be: GLU4_CACHE_DIR is off"):
        dual_gemm(x, w, backend="hopper")
    assert tries == [1]


def test_kernels_of_some_types_only(bare: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is used; the rest says that it is missing."""

    def find(spec: Spec) -> tuple[bytes, dict[str, object]] | None:
        there = isinstance(spec, KernelSpec) and (spec.x, spec.out) == ("f16", "f16")
        return (json.dumps(spec.to_dict()).encode(), description(spec)) if there else None

    monkeypatch.setattr(store, "find", find)
    w = GatedWeights(full_range(1, 8, 16), full_range(2, 8, 16)).prepare("cpu")
    assert w.packed is not None
    dual_gemm(torch.ones(1, 16).half(), w)
    assert len(bare.launches) == 1
    with pytest.warns(UserWarning, match="run glu4 compile"):
        dual_gemm(torch.ones(1, 16).bfloat16(), w)
    with pytest.raises(UnsupportedError, match="run glu4 compile"):
        dual_gemm(torch.ones(1, 16).bfloat16(), w, backend="hopper")
    assert len(bare.launches) == 1
    dual_gemm(quantize(torch.ones(1, 16)), w, out_dtype=torch.float16)  # torch decodes, and the kernel for fp16 multiplies
    assert len(bare.launches) == 2


def test_other_devices_fall_back() -> None:
    assert "fallback on every device: decodes exactly" in str(explain(Problem(1, 8, 16), torch.device("mps")))
    grouped = explain(GroupedProblem(1, 2, 8, 16), "cuda")
    assert grouped.chosen == "portable"
    assert "cannot be captured in a CUDA graph" in str(grouped)


def test_what_is_not_a_problem() -> None:
    with pytest.raises(TypeError, match=r"problem: expected a glu4.Problem or glu4.GroupedProblem, got str"):
        explain("x")  # type: ignore[arg-type]
