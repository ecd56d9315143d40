"""Weights that were not prepared: packed once and remembered, or by each call, or held in their packed form alone."""

from __future__ import annotations

import pytest
import torch

from backends.hopper.calls import expected, pair, tokens
from fake_hopper import FakeCuda
from glu4 import (
    LinearWeight,
    NVFP4Tensor,
    UnsupportedError,
    dual_gemm,
    linear,
)
from glu4 import weights as weights_module
from glu4.backends.hopper import direct
from operands import full_range

DTYPES = (torch.float16, torch.bfloat16)


def test_unprepared_weights_are_packed_once_and_remembered(cuda: FakeCuda) -> None:
    w, weight, x = pair(1, 40, 80), LinearWeight(full_range(1, 40, 80)), tokens(1, 5, 80)
    assert w.packed is weight.packed is None
    assert torch.equal(dual_gemm(x, w), expected(x, w, torch.float16))
    assert torch.equal(linear(x, weight), expected(x, weight.matrix, torch.float16))
    packed = w.packed, weight.packed
    assert packed[0] is not None
    dual_gemm(x, w)
    linear(x, weight)
    assert (w.packed, weight.packed) == packed
    assert w.direct is not None
    assert len(cuda.launches) == 4
    assert all(6 in e.attributes for e in cuda.launches)
    other = pair(1, 40, 80)
    dual_gemm(x.float(), other)  # type: ignore[union-attr]
    dual_gemm(x, other, backend="portable")
    assert other.packed is None


def test_bare_tensors_are_packed_by_each_call_with_one_warning(cuda: FakeCuda) -> None:
    w, x = pair(1, 40, 80), tokens(1, 5, 80)
    with pytest.warns(UserWarning, match=r"packed again at every call; use GatedWeights\(gate, up\)\.prepare"):
        assert torch.equal(dual_gemm(x, (w.gate, w.up)), expected(x, w, torch.float16))
    assert torch.equal(linear(x, w.gate), expected(x, w.gate, torch.float16))
    assert len(cuda.launches) == 2
    # the kernel may read weights before the work ahead of it in the stream is done, and here that work packs them
    assert all(6 not in e.attributes for e in cuda.launches)


def _synchronise(_: object) -> None:
    raise AssertionError("scales were read on the host, which a capture does not survive")


def test_packing_needs_no_capture(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be packed once and for all while a graph is captured."""
    w, x = pair(1, 40, 80), tokens(1, 5, 80)
    monkeypatch.setattr(weights_module, "_capturing", lambda device: True)
    monkeypatch.setattr(NVFP4Tensor, "check_values", _synchronise)
    for weights in (w, (w.gate, w.up)):
        with pytest.raises(UnsupportedError, match="a CUDA graph is being captured, and these are not packed yet; prepare"):
            dual_gemm(x, weights)


def test_memory_that_runs_out_leaves_everything_usable(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = pair(1, 40, 80), tokens(1, 5, 80)
    want = expected(x, w, torch.float16)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "pack_gated", full)
        for call in (lambda: w.prepare("cpu", free_original=True), lambda: dual_gemm(x, w)):
            with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
                call()
    assert w.packed is None
    prepared = w.prepare("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(direct.torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            dual_gemm(x, prepared)
    assert torch.equal(dual_gemm(x, prepared), want)


def test_only_the_packed_form(cuda: FakeCuda) -> None:
    w, x = pair(1, 40, 80), tokens(1, 5, 80)
    want, wide = expected(x, w, torch.float16), dual_gemm(x.float(), w)  # type: ignore[union-attr]
    freed = w.prepare("cpu", free_original=True)
    assert freed.matrices is None
    assert torch.equal(dual_gemm(x, freed), want)
    assert torch.equal(dual_gemm(x.t().contiguous().t(), freed), want)  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="prepared with free_original=True are unpacked at every call"):
        assert torch.equal(dual_gemm(x.float(), freed), wide)  # type: ignore[union-attr]
    assert torch.equal(dual_gemm(x.float(), freed), wide)  # type: ignore[union-attr]
    assert freed.matrices is None


def test_a_clone_of_packed_weights_gets_its_spare_unit_back(cuda: FakeCuda) -> None:
    w, x, out = pair(1, 40, 80).prepare("cpu"), tokens(1, 5, 80), torch.zeros(5, 40).half()
    assert w.packed is not None
    gate, up = ([m.codes, m.block_scale.view(torch.uint8), m.global_scale] for m in (w.gate, w.up))
    torch.ops.glu4.dual_gemm(out, [x], gate, up, w.packed.clone(), None, None, "swish", [1.0, 0.0, float("inf")], "hopper")
    assert torch.equal(out, dual_gemm(x, w))
    assert cuda.launches[0].parameters[2] != w.packed.data_ptr()
    assert [6 in e.attributes for e in cuda.launches] == [False, True]
