"""The short way makes the long way's launch, gives up on everything else, and takes little time on the host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fake_blackwell import FakeBlackwell, compiled, fake_blackwell
from glu4 import NVFP4Tensor, quantize, reference
from glu4.activation import SILU, Activation, clamped_silu
from glu4.backends.blackwell import launch
from glu4.backends.blackwell.direct import Direct
from glu4.problem import Problem
from operands import full_range

NO_BIAS = (None, None)
F16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBlackwell]:
    with fake_blackwell(monkeypatch) as fake:
        yield fake


def pair(n: int = 72, k: int = 96) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    gate, up = (launch.prepared(full_range(i, n, k)) for i in (1, 2))
    return gate, up


def tokens(m: int = 33, k: int = 96, seed: int = 3) -> NVFP4Tensor:
    return launch.prepared(full_range(seed, m, k))


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("activation", [SILU, clamped_silu(1.5)], ids=lambda a: a.name)
def test_it_makes_the_launch_of_the_long_way(cuda: FakeBlackwell, dtype: torch.dtype, activation: Activation) -> None:
    weights, x = pair(), tokens()
    got = Direct(weights)(x, NO_BIAS, activation, dtype, None, None)
    out = torch.empty(33, 72, dtype=dtype)
    problem = Problem(33, 72, 96, out_dtype=dtype, activation=activation)
    launch.dense(out, x, weights, NO_BIAS, activation, problem)
    assert got is not None
    assert torch.equal(got, out)
    assert torch.equal(got, reference.dual_gemm(x, *weights, activation=activation, out_dtype=dtype))
    short, long = cuda.made
    assert (short.grid, short.spec, short.attributes) == (long.grid, long.spec, long.attributes)


def test_one_matrix(cuda: FakeBlackwell) -> None:
    gate, x = pair()[0], tokens()
    got = Direct((gate,))(x, NO_BIAS, SILU, F16, None, "blackwell")
    assert got is not None
    assert torch.equal(got, reference.linear(x, gate, out_dtype=F16))


def test_outputs(cuda: FakeBlackwell) -> None:
    """A dense one is filled; bfloat16 is the default, and otherwise a given one's type counts."""
    direct, x = Direct(pair()), tokens()
    assert direct(x, NO_BIAS, SILU, None, None, None).dtype is BF16  # type: ignore[union-attr]
    out = torch.full((33, 72), 3.0, dtype=F16)
    version = out._version
    assert direct(x, NO_BIAS, SILU, None, out, None) is out
    assert out._version > version, "autograd must see that it was written"
    assert torch.equal(out, reference.dual_gemm(x, *pair(), out_dtype=F16))


def test_new_values_and_tensors_are_seen(cuda: FakeBlackwell) -> None:
    """Nothing is remembered but numbers: the same shapes with other tokens, other values in place, another global scale."""
    weights = pair()
    direct = Direct(weights)
    for seed in (3, 4):
        x = tokens(seed=seed)
        assert torch.equal(direct(x, NO_BIAS, SILU, F16, None, None), reference.dual_gemm(x, *weights, out_dtype=F16))  # type: ignore[arg-type]
    weights[0].codes.copy_(weights[1].codes)
    weights[1].global_scale.mul_(2)
    assert torch.equal(direct(x, NO_BIAS, SILU, F16, None, None), reference.dual_gemm(x, *weights, out_dtype=F16))  # type: ignore[arg-type]


class Sub(torch.Tensor):
    pass


def odd_inputs() -> dict[str, dict[str, Any]]:
    x = tokens()
    shifted = torch.zeros(x.codes.numel() + 4, dtype=torch.uint8)[4:].view(x.codes.shape)
    wide = torch.empty(33, 80, dtype=F16)[:, :72]
    return {
        "float tokens": {"x": torch.randn(33, 96)},
        "linear scales": {"x": full_range(3, 33, 96)},
        "a batch": {"x": launch.prepared(full_range(3, 2, 33, 96))},
        "another K": {"x": tokens(k=128)},
        "no rows": {"x": NVFP4Tensor(x.codes[:0], x.block_scale[:0], x.global_scale)},
        "at an odd address": {"x": NVFP4Tensor.from_swizzled(shifted, x.block_scale, x.global_scale)},
        "a subclass of tensor": {"x": NVFP4Tensor(x.codes.as_subclass(Sub), x.block_scale, x.global_scale)},
        "gradients": {"x": NVFP4Tensor(x.codes, x.block_scale, x.global_scale.clone().requires_grad_())},
        "another backend": {"backend": "portable"},
        "a bias": {"biases": (torch.zeros(72), None)},
        "float32 output": {"out_dtype": torch.float32},
        "another type of out": {"out": torch.empty(33, 72, dtype=torch.float32)},
        "another shape of out": {"out": torch.empty(33, 80, dtype=F16)},
        "rows of out apart": {"out": wide},
        "out within x": {"out": x.codes.view(-1)[: 33 * 4].view(F16).view(33, 2), "x": x},
    }


@pytest.mark.parametrize("name", odd_inputs())
def test_what_is_out_of_the_ordinary_is_left_to_the_long_way(cuda: FakeBlackwell, name: str) -> None:
    given = {"x": tokens(), "biases": NO_BIAS, "activation": SILU, "out_dtype": None, "out": None, "backend": None}
    assert Direct(pair())(**{**given, **odd_inputs()[name]}) is None
    assert not cuda.made


def test_an_output_within_the_tokens_is_left_to_the_long_way(cuda: FakeBlackwell) -> None:
    x = tokens(m=33)
    memory = torch.zeros(33 * 72 * 2, dtype=torch.uint8)
    codes = memory[: 33 * 48].view(33, 48)
    codes.copy_(x.codes)
    inside = NVFP4Tensor(codes, x.block_scale, x.global_scale)
    direct = Direct(pair())
    assert direct(inside, NO_BIAS, SILU, F16, memory.view(F16).view(33, 72), None) is None
    assert direct(inside, NO_BIAS, SILU, F16, torch.empty(33, 72, dtype=F16), None) is not None


def test_without_kernels_and_with_odd_k_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_blackwell(monkeypatch, found=lambda spec: None):
        assert Direct(pair())(tokens(), NO_BIAS, SILU, F16, None, None) is None
    with fake_blackwell(monkeypatch):
        assert Direct(pair(k=48))(tokens(k=48), NO_BIAS, SILU, F16, None, None) is None


def test_a_mode_that_watches_is_left_to_the_operator(cuda: FakeBlackwell) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    direct, x = Direct(pair()), tokens()
    with Watch():
        assert direct(x, NO_BIAS, SILU, F16, None, None) is None


def test_tma_stores_only_where_rows_are_aligned(monkeypatch: pytest.MonkeyPatch, cuda: FakeBlackwell) -> None:
    best = launch.candidates(Problem(33, 72, 96, out_dtype=F16))
    copied = replace(next(best), stages=2, store="tma", gate_first=0)
    monkeypatch.setattr(launch, "candidates", lambda problem, processors=148: iter([copied]))
    launch.forget()
    direct, x = Direct(pair()), tokens()
    memory = torch.zeros(33 * 72 + 8, dtype=F16)
    assert direct(x, NO_BIAS, SILU, F16, memory[8:].view(33, 72), None) is not None
    assert direct(x, NO_BIAS, SILU, F16, memory[4:-4].view(33, 72), None) is None


def test_kernels_that_need_a_workspace_are_left_to_the_long_way(monkeypatch: pytest.MonkeyPatch, cuda: FakeBlackwell) -> None:
    shared = replace(next(launch.candidates(Problem(33, 72, 96, out_dtype=F16))), schedule="stream_k", gate_first=0)
    monkeypatch.setattr(launch, "candidates", lambda problem, processors=148: iter([shared]))
    launch.forget()
    assert Direct(pair())(tokens(), NO_BIAS, SILU, F16, None, None) is None


def test_host_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 20 us from call to cuLaunchKernelEx, which only counts, the output's allocation included; the least of many, since
    other programs share this machine."""
    with fake_blackwell(monkeypatch, found=compiled, compute=False) as cuda:
        cuda.cuLaunchKernelEx = lambda *_: 0  # type: ignore[method-assign]
        direct, x = Direct(pair()), quantize(torch.randn(33, 96), layout="swizzled")
        took = []
        for _ in range(100):
            start = time.perf_counter()
            for _ in range(50):
                direct(x, NO_BIAS, SILU, F16, None, None)
            took.append((time.perf_counter() - start) / 50)
        assert min(took) < 20e-6, f"{min(took) * 1e6:.1f} us"
