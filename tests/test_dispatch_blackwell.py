"""The operators on a Blackwell device made of Python: which backend runs, what prepare does, what explain and errors say."""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch

from fake_blackwell import FakeBlackwell, compiled, fake_blackwell
from glu4 import (
    GatedWeights,
    GroupedProblem,
    LinearWeight,
    NVFP4Tensor,
    Problem,
    UnsupportedError,
    clamped_silu,
    dual_gemm,
    explain,
    grouped_dual_gemm,
    grouped_linear,
    linear,
    moe_gate_up,
    quantize,
    reference,
)
from glu4.backends.blackwell import launch, moe_launch
from glu4.backends.blackwell.moe_spec import MoeSpec, TileSpec
from glu4.backends.tokens import spec as token_kernels
from glu4.compiled import store
from glu4.nn import GatedMLP, NVFP4Linear
from operands import full_range

F16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBlackwell]:
    with fake_blackwell(monkeypatch) as fake:
        yield fake


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBlackwell]:
    """Such a device with no kernel compiled, and no CuTe DSL."""
    with fake_blackwell(monkeypatch, found=lambda spec: None) as fake:
        monkeypatch.setattr(store, "installed_dsl", lambda: None)
        yield fake


def pair(*shape: int, **biases: torch.Tensor) -> GatedWeights:
    return GatedWeights(full_range(1, *shape), full_range(2, *shape), **biases)


def expected(x: Any, w: GatedWeights, dtype: torch.dtype, **kwargs: Any) -> torch.Tensor:
    return reference.dual_gemm(
        x, w.gate, w.up, gate_bias=w.gate_bias, up_bias=w.up_bias, out_dtype=dtype, **kwargs
    )  # fmt: skip


# ---- prepared weights ----


def test_prepare_arranges_weights_once(cuda: FakeBlackwell) -> None:
    w = pair(72, 48)
    p = w.prepare("cpu")
    assert p.packed is None
    for matrix, original in ((p.gate, w.gate), (p.up, w.up)):
        assert launch.is_prepared(matrix)
        assert launch.prepared(matrix) is matrix
        assert torch.equal(matrix.dequantize(), original.dequantize())
    assert not w.gate.is_swizzled, "the original stays as it is"
    assert cuda.calls.count("cuLibraryLoadData") == len(launch.shipped(True)), "every kernel is loaded, for CUDA graphs"


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("k", [96, 48])
def test_dual_gemm_runs_the_kernel(cuda: FakeBlackwell, dtype: torch.dtype, k: int) -> None:
    p, x = pair(72, k).prepare("cpu"), quantize(torch.randn(33, k), layout="swizzled")
    got = dual_gemm(x, p, out_dtype=dtype)
    assert torch.equal(got, expected(x, p, dtype))
    assert len(cuda.made) == 1
    assert torch.equal(dual_gemm(x, p, out_dtype=dtype, backend="blackwell"), got)
    assert torch.equal(dual_gemm(x.to_linear(), p, out_dtype=dtype), got)
    assert len(cuda.made) == 3
    out = torch.empty(33, 72, dtype=dtype)
    assert dual_gemm(x, p, out=out) is out
    assert torch.equal(out, got)


def test_activations_biases_and_leading_dimensions(cuda: FakeBlackwell) -> None:
    w = pair(72, 96, gate_bias=torch.randn(72).half(), up_bias=torch.randn(72).half()).prepare("cpu")
    x = quantize(torch.randn(2, 3, 5, 96))
    got = dual_gemm(x, w, activation=clamped_silu(1.5), out_dtype=F16)
    flat = NVFP4Tensor(x.codes.flatten(0, 2), x.block_scale.flatten(0, 2), x.global_scale.reshape(-1)[0])
    if x.global_scale.ndim == 0:
        assert torch.equal(got.view(30, 72), expected(flat, w, F16, activation=clamped_silu(1.5)))
    each = quantize(torch.randn(3, 5, 96), torch.tensor([0.5, 1.0, 2.0]))
    assert torch.equal(dual_gemm(each, w, out_dtype=F16), expected(each, w, F16))
    assert cuda.made


def test_stacks_pair_with_batches(cuda: FakeBlackwell) -> None:
    p, x = pair(3, 72, 96).prepare("cpu"), full_range(3, 3, 5, 96)
    assert launch.is_prepared(p.gate)
    assert torch.equal(dual_gemm(x, p, out_dtype=F16), expected(x, p, F16))
    assert len(cuda.made) == 1


def test_linear(cuda: FakeBlackwell) -> None:
    w, x, bias = full_range(1, 72, 96), full_range(3, 5, 96), torch.randn(72)
    p = LinearWeight(w).prepare("cpu")
    assert torch.equal(linear(x, p, out_dtype=F16), reference.linear(x, w, out_dtype=F16))
    assert torch.equal(linear(x, p, bias=bias, out_dtype=BF16), reference.linear(x, w, bias=bias, out_dtype=BF16))
    assert [made.spec.dual for made in cuda.made] == [False, False]


def test_the_operator_runs_it_too(cuda: FakeBlackwell) -> None:
    """As torch.compile and modes see it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    p, x = pair(72, 96).prepare("cpu"), launch.prepared(full_range(3, 5, 96))
    with Watch() as mode:
        got = dual_gemm(x, p, out_dtype=F16)
    assert "glu4.dual_gemm.default" in mode.seen
    assert torch.equal(got, expected(x, p, F16))
    assert len(cuda.made) == 1


def test_unprepared_weights_are_arranged_by_their_first_call_and_tuples_by_each(cuda: FakeBlackwell) -> None:
    w, x = pair(72, 96), full_range(3, 5, 96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dual_gemm(x, w)
    assert launch.is_prepared(w.gate)
    held = w.gate.block_scale.data_ptr()
    dual_gemm(x, w)
    assert w.gate.block_scale.data_ptr() == held
    other = pair(72, 96)
    with pytest.warns(UserWarning, match=r"packed again at every call; use GatedWeights\(gate, up\).prepare"):
        got = dual_gemm(x, (other.gate, other.up), out_dtype=F16)
    assert torch.equal(got, expected(x, other, F16))


def test_weights_are_not_arranged_while_a_graph_is_captured(cuda: FakeBlackwell, monkeypatch: pytest.MonkeyPatch) -> None:
    import glu4.weights

    monkeypatch.setattr(glu4.weights, "_capturing", lambda device: True)
    with pytest.raises(UnsupportedError, match="a CUDA graph is being captured, and these are not packed yet; prepare"):
        dual_gemm(full_range(3, 5, 96), pair(72, 96))


@pytest.mark.parametrize("k", [48, 96])
def test_what_else_is_done_with_prepared_weights(cuda: FakeBlackwell, k: int) -> None:
    """State, shards, copies and pickles hold the same values; files have linear scales and dense rows."""
    w = pair(64, k)
    p, x = w.prepare("cpu"), full_range(3, 5, k)
    state = p.state_dict()
    assert all(torch.equal(v.float(), w.state_dict()[key].float()) for key, v in state.items())
    assert all(v.is_contiguous() for v in state.values())
    assert torch.equal(GatedWeights.from_state_dict(state).gate.dequantize(), w.gate.dequantize())
    assert torch.equal(p.shard(1, 2).gate.dequantize(), w.shard(1, 2).gate.dequantize())
    for copied in (deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert torch.equal(dual_gemm(x, copied, out_dtype=F16), expected(x, w, F16))
    assert torch.equal(dual_gemm(x, p, backend="portable"), dual_gemm(x, w, backend="portable"))
    freed = w.prepare("cpu", free_original=True)
    assert torch.equal(dual_gemm(x, freed, out_dtype=F16), expected(x, p, F16))


def test_modules_are_prepared_when_they_are_made(cuda: FakeBlackwell) -> None:
    from glu4.nn import NVFP4Linear

    w, x = full_range(1, 72, 96), launch.prepared(full_range(3, 5, 96))
    module = NVFP4Linear(w)
    assert module._ready is not None
    assert launch.is_prepared(module._ready.matrix)
    assert torch.equal(module.state_dict()["weight.codes"], w.codes)
    assert torch.equal(linear(x, module._ready, out_dtype=F16), reference.linear(x, w, out_dtype=F16))


# ---- mixtures of experts ----


def test_grouped_dual_gemm_runs_the_kernel(cuda: FakeBlackwell) -> None:
    """Distinct global scales and biases of each expert; rows of nobody keep what they hold."""
    stack = pair(4, 72, 96, gate_bias=torch.randn(4, 72).half(), up_bias=torch.randn(4, 72)).prepare("cpu")
    assert len(set(stack.gate.global_scale.tolist())) == 4
    assert launch.is_prepared(stack.gate)
    x, offsets = full_range(3, 40, 96), torch.tensor([0, 3, 3, 36, 38], dtype=torch.int32)
    for dtype in (F16, BF16):
        out = torch.full((40, 72), 7.0, dtype=dtype)
        assert grouped_dual_gemm(x, stack, offsets, activation=clamped_silu(1.5), out=out) is out
        want = torch.full((40, 72), 7.0, dtype=dtype)
        for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
            assert stack.gate_bias is not None
            assert stack.up_bias is not None
            biases = {"gate_bias": stack.gate_bias[e], "up_bias": stack.up_bias[e]}
            rows = x.narrow_rows(begin, end - begin)
            want[begin:end] = reference.dual_gemm(
                rows, stack.gate[e], stack.up[e], activation=clamped_silu(1.5), out_dtype=dtype, **biases
            )
        assert torch.equal(out, want)
    assert [type(made.spec) for made in cuda.made] == [TileSpec, MoeSpec] * 2


def test_experts_are_loaded_by_prepare(cuda: FakeBlackwell) -> None:
    pair(2, 72, 48).prepare("cpu")
    loaded = len(launch.shipped(True)) + len(moe_launch.shipped(gated=True)) + len(moe_launch.shipped_tiles())
    assert cuda.calls.count("cuLibraryLoadData") == loaded, "every kernel is loaded, for CUDA graphs"


def test_grouped_linear_runs_the_kernel(cuda: FakeBlackwell) -> None:
    """Prepared or not, with a bias or without; float32 output is the portable backend's."""
    stack, x, offsets = full_range(2, 4, 72, 48), full_range(3, 40, 48), torch.tensor([0, 3, 3, 30, 37], dtype=torch.int32)
    generator = torch.Generator().manual_seed(7)
    bias = torch.randn(4, 72, generator=generator)
    for given in (None, bias):
        want = torch.full((40, 72), 7.0, dtype=F16)
        for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
            own = None if given is None else given[e]
            want[begin:end] = reference.linear(x.narrow_rows(begin, end - begin), stack[e], bias=own, out_dtype=F16)
        for weight in (LinearWeight(stack), LinearWeight(stack).prepare("cpu")):
            out = torch.full((40, 72), 7.0, dtype=F16)
            assert grouped_linear(x, weight, offsets, bias=given, out=out) is out
            assert torch.equal(out, want)
    assert [made.spec.config.gated for made in cuda.made if isinstance(made.spec, MoeSpec)] == [False] * 4
    assert "grouped_linear" in {made.spec.name.split("_w4a4")[0][6:] for made in cuda.made if isinstance(made.spec, MoeSpec)}
    with pytest.warns(UserWarning, match=r"packed again at every call"):
        again = grouped_linear(x, full_range(2, 4, 72, 48), offsets, out_dtype=F16)
    there = slice(0, 37)
    assert torch.equal(again[there], grouped_linear(x, LinearWeight(stack).prepare("cpu"), offsets, out_dtype=F16)[there])
    count = len(cuda.made)
    grouped_linear(x, LinearWeight(stack), offsets, out_dtype=torch.float32)
    assert len(cuda.made) == count


def test_experts_that_were_not_prepared(cuda: FakeBlackwell) -> None:
    stack, x, offsets = pair(2, 72, 48), full_range(3, 9, 48), torch.tensor([0, 3, 9], dtype=torch.int32)
    want = grouped_dual_gemm(x, stack, offsets, out_dtype=F16, backend="portable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = grouped_dual_gemm(x, stack, offsets, out_dtype=F16, backend="blackwell")
    assert launch.is_prepared(stack.gate)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)
    other = pair(2, 72, 48)
    with pytest.warns(UserWarning, match=r"packed again at every call; use GatedWeights\(gate, up\).prepare"):
        again = grouped_dual_gemm(x, (other.gate, other.up), offsets, out_dtype=F16)
    assert torch.equal(again, got)
    assert len(cuda.made) == 4


def test_moe_gate_up(cuda: FakeBlackwell) -> None:
    stack, tokens = pair(4, 72, 96).prepare("cpu"), full_range(3, 6, 96)
    ids = torch.tensor([[0, 2], [3, 2], [-1, 0], [2, 3], [3, 0], [0, 9]])
    got, routing = moe_gate_up(tokens, ids, stack, out_dtype=F16)
    want, _ = moe_gate_up(tokens, ids, stack, out_dtype=F16, backend="portable")
    there = int(routing.group_offsets[-1])
    assert there == 10
    torch.testing.assert_close(got[:there], want[:there], rtol=1e-3, atol=0)
    assert len(cuda.made) == 2


@pytest.mark.parametrize("k", [96, 48])
def test_moe_gate_up_gathers_in_the_launch_that_numbers_tiles(
    cuda: FakeBlackwell, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    """And by torch where that kernel is not compiled: the same bits."""
    stack, tokens = pair(4, 72, k).prepare("cpu"), full_range(3, 6, k)
    ids = torch.tensor([[0, 2], [3, 2], [-1, 0], [2, 3], [3, 0], [0, 9]])
    out = torch.full((12, 72), 3.0, dtype=F16)
    got, _ = moe_gate_up(tokens, ids, stack, out=out)
    assert [getattr(made.spec, "gather", None) for made in cuda.made] == [True, None]
    found = store.find
    monkeypatch.setattr(store, "find", lambda spec: None if getattr(spec, "gather", False) else found(spec))
    moe_launch.forget()
    again, _ = moe_gate_up(tokens, ids, stack, out=torch.full((12, 72), 3.0, dtype=F16))
    assert [getattr(made.spec, "gather", None) for made in cuda.made[2:]] == [False, None]
    assert torch.equal(again, got)


def test_experts_are_not_arranged_while_a_graph_is_captured(cuda: FakeBlackwell, monkeypatch: pytest.MonkeyPatch) -> None:
    import glu4.weights

    monkeypatch.setattr(glu4.weights, "_capturing", lambda device: True)
    with pytest.raises(UnsupportedError, match="a CUDA graph is being captured, and these are not packed yet; prepare"):
        grouped_dual_gemm(full_range(3, 5, 96), pair(2, 72, 96), torch.tensor([0, 3, 5], dtype=torch.int32))


# ---- what runs where ----


def test_explain(cuda: FakeBlackwell) -> None:
    e = explain(Problem(1, 8, 16), "cpu")
    assert e.chosen == "blackwell"
    assert "blackwell: yes, block-scaled tensor cores, weights as prepare arranges them; executed in emulation only" in str(e)
    assert "hopper: no, needs a GPU of compute capability 9.0" in str(e)
    for kind, reason in (
        (
            {"x_format": "float16"},
            "blackwell: no, float16 activations: the block-scaled MMA takes 4-bit operands on both sides",
        ),
        ({"out_dtype": torch.float32}, "blackwell: no, float32 output: the kernel writes float16 or bfloat16"),
    ):
        e = explain(Problem(1, 8, 16, **kind), "cpu")  # type: ignore[arg-type]
        assert e.chosen == "portable"
        assert reason in str(e)
    grouped = explain(GroupedProblem(1, 2, 8, 16), "cpu")
    assert grouped.chosen == "blackwell"
    assert "blackwell: yes, block-scaled tensor cores" in str(grouped)
    for fields, why in (
        ({"x_format": "bfloat16"}, "bfloat16 activations: the block-scaled MMA takes 4-bit operands on both sides"),
        ({"out_dtype": torch.float32}, "float32 output: the kernel writes float16 or bfloat16"),
    ):
        e = explain(GroupedProblem(1, 2, 8, 16, **fields), "cpu")  # type: ignore[arg-type]
        assert e.chosen == "portable"
        assert f"blackwell: no, {why}" in str(e)


def test_float_tokens_fall_to_the_portable_backend(cuda: FakeBlackwell) -> None:
    p, x = pair(72, 96).prepare("cpu"), torch.randn(5, 96, dtype=F16)
    assert torch.equal(dual_gemm(x, p), dual_gemm(x, p, backend="portable"))
    with pytest.raises(UnsupportedError, match="backend blackwell: float16 activations: the block-scaled MMA takes 4-bit"):
        dual_gemm(x, p, backend="blackwell")
    stack, offsets = pair(2, 72, 96).prepare("cpu"), torch.tensor([0, 2, 5], dtype=torch.int32)
    got = grouped_dual_gemm(x, stack, offsets)
    assert torch.equal(got, grouped_dual_gemm(x, stack, offsets, backend="portable"))
    one = grouped_linear(x, LinearWeight(stack.gate), offsets)
    assert torch.equal(one, grouped_linear(x, LinearWeight(stack.gate), offsets, backend="portable"))
    assert not cuda.made


def test_insisting_on_it_elsewhere() -> None:
    assert "blackwell: no, needs a GPU of compute capability 10.0 or 10.3" in str(explain(Problem(1, 8, 16), "cpu"))
    with pytest.raises(UnsupportedError, match=r"backend blackwell: needs a GPU of compute capability 10.0 or 10.3"):
        dual_gemm(full_range(3, 5, 16), pair(8, 16), backend="blackwell")


@pytest.mark.parametrize(("capability", "arch"), [((10, 0), "sm_100a"), ((10, 3), "sm_103a"), ((9, 0), None), ((12, 0), None)])
def test_devices_are_known_by_their_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arch: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_capability", lambda index: capability)
    assert launch.architecture(torch.device("cuda")) == arch
    assert launch.is_blackwell(torch.device("cuda", 1)) is (arch is not None)
    assert launch.architecture(torch.device("cpu")) is None


# ---- kernels that are missing ----


def test_without_kernels_it_says_what_to_do(bare: FakeBlackwell) -> None:
    missing = "its kernels are not compiled here; run glu4 compile --arch sm_100a"
    assert f"blackwell: no, {missing}" in str(explain(Problem(1, 8, 16), "cpu"))
    w, x = pair(8, 32), full_range(3, 5, 32)
    with pytest.warns(UserWarning, match=f"this is a Blackwell GPU, but the portable backend .* many times slower: {missing}"):
        p = w.prepare("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(dual_gemm(x, p, out_dtype=F16), dual_gemm(x, w, out_dtype=F16, backend="portable"))
    with pytest.raises(UnsupportedError, match=f"backend blackwell: {missing}"):
        dual_gemm(x, p, backend="blackwell")
    assert f"blackwell: no, {missing}" in str(explain(GroupedProblem(1, 2, 8, 16), "cpu"))
    with pytest.raises(UnsupportedError, match=f"backend blackwell: {missing}"):
        grouped_dual_gemm(x, pair(2, 8, 32), torch.tensor([0, 3, 5], dtype=torch.int32), backend="blackwell")


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_kernels_are_compiled_at_first_use_where_that_is_possible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arch: str
) -> None:
    made: list[store.Spec] = []

    def compile_missing(specs: Sequence[store.Spec], on_done: Callable[[str], None]) -> int:
        for spec in specs:
            on_done(spec.name)
        made.extend(specs)
        return len(specs)

    with fake_blackwell(monkeypatch, found=lambda spec: compiled(spec) if spec in made else None, arch=arch):
        monkeypatch.setattr(store, "installed_dsl", lambda: store.DSL_VERSION)
        monkeypatch.setattr(store, "compile_missing", compile_missing)
        assert "not compiled yet; the first call compiles them" in str(explain(Problem(1, 8, 16), "cpu"))
        w, x = pair(8, 32), full_range(3, 5, 32)
        assert torch.equal(dual_gemm(x, w, out_dtype=F16, backend="blackwell"), expected(x, w, F16))
        assert made == [*launch.shipped(True, arch), *token_kernels.quantizers(arch)]
        assert f"compiling {len(made)} dual_gemm kernels, once (glu4 compile --arch {arch} does it" in capsys.readouterr().err
        made.clear()
        assert "not compiled yet; the first call compiles them" in str(explain(GroupedProblem(5, 2, 8, 32), "cpu"))
        offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
        grouped_dual_gemm(x, pair(2, 8, 32), offsets, out_dtype=F16, backend="blackwell")
        assert made == [*moe_launch.shipped(arch, True), *moe_launch.shipped_tiles(arch), *token_kernels.shipped(arch)]
        told = f"compiling {len(made)} grouped_dual_gemm kernels, once (glu4 compile --arch {arch} does it"
        assert told in capsys.readouterr().err


def test_compiling_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, bare: FakeBlackwell) -> None:
    def fail(specs: object, on_done: object) -> int:
        raise UnsupportedError("GLU4_CACHE_DIR is off, so there is nowhere to put a compiled kernel")

    monkeypatch.setattr(store, "installed_dsl", lambda: store.DSL_VERSION)
    monkeypatch.setattr(store, "compile_missing", fail)
    with pytest.raises(
        UnsupportedError, match="backend blackwell: its kernels are not compiled here, and cannot be: GLU4_CACHE"
    ):
        dual_gemm(full_range(3, 5, 32), pair(8, 32), backend="blackwell")


@pytest.mark.parametrize("k", [96, 48])
def test_modules_quantize_into_the_form_that_the_kernel_takes(
    cuda: FakeBlackwell, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    """No call rearranges scales or copies rows of codes."""
    taken: list[NVFP4Tensor] = []

    def seen(*args: Any, **options: Any) -> NVFP4Tensor:
        taken.append(quantize(*args, **options))
        return taken[-1]

    monkeypatch.setattr("glu4.nn.modules.quantize", seen)
    w, x = pair(72, k), torch.randn(5, k, dtype=F16)
    module, linear_module = GatedMLP(w, torch.nn.Identity(), mode="w4a4"), NVFP4Linear(w.gate, mode="w4a4")
    assert module.weights.x_layout == "swizzled"
    assert torch.equal(module(x), expected(quantize(x), w, F16))
    linear_module(x)
    assert len(cuda.made) == 2
    assert [launch.is_prepared(t) for t in taken] == [True, True]
    assert w.x_layout == "linear", "not prepared"
