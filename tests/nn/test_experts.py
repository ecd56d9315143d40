"""Stacks of experts of transformers models: converted, run, saved and loaded; against the specification and a plain loop."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fake_blackwell import fake_blackwell
from fake_hopper import fake_hopper
from glu4 import (
    GatedWeights,
    NVFP4Tensor,
    Routing,
    UnsupportedError,
    dual_gemm,
    grouped_linear,
    linear,
    moe_combine,
    moe_gate_up,
    quantize,
    reference,
)
from glu4.activation import SILU
from glu4.backends.hopper.spec import GroupedSpec
from glu4.nn import (
    ExpertsLinear,
    GatedExperts,
    GatedMLP,
    NVFP4ExpertsLinear,
    convert,
    free_originals,
    load,
    save,
    set_mode,
)
from glu4.nn.probe import Skip, check_experts
from glu4.verify.case import Block
from glu4.verify.metrics import block_terms
from operands import full_range

transformers = pytest.importorskip("transformers")
Make = Callable[..., Any]
MOE: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48},
    "Qwen2Moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
STACKS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
FORMATS = ["modelopt", "compressed-tensors"]


def quick(first: list[tuple[Any, ...]], *choices: Any) -> list[Any]:
    """All combinations of choices, of which those not in `first` are longer proofs."""
    every = itertools.product(*choices)
    return [pytest.param(*values, marks=[] if values in first else [pytest.mark.slow]) for values in every]


@pytest.fixture
def moe_model(tiny_model: Make) -> Make:
    """moe_model("Qwen3Moe"): weights and scales that differ from expert to expert, and gate from up."""

    def make(family: str, **settings: Any) -> Any:
        model = tiny_model(family, **MOE[family], **settings)
        gen = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                    p.normal_(0.0, 0.1, generator=gen)
                    p.mul_(1.5 ** torch.arange(p.shape[0], dtype=p.dtype)[:, None, None])
                if name.endswith("experts.gate_up_proj"):
                    p[:, : p.shape[1] // 2].mul_(1.7)
                if name.endswith("mlp.gate.weight"):  # routers start at zero or nearly so: every token would choose alike
                    p.normal_(0.0, 1.0, generator=gen)
        return model

    return make


def _ids() -> Tensor:
    return torch.arange(3, 15)[None]


def exact_and_bound(module: GatedExperts, x: Tensor, ids: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """The specification's float64 result for x `[T, K]` of 32 bits, W4A16, and what float32 may leave of it.

    Gate, up and activation err by at most b (`verify.metrics.block_terms`, and one rounding, u |h|). The down projection adds
    its own float32 sums: (N + 4) u sum |d| (|h| + b) for products, scale and any order. The weighted sum over top_k choices
    adds one product and top_k - 1 sums: (top_k + 1) u. u = 2^-24; u^2 terms are covered by doubling u.
    """
    u = 2.0**-23
    weights, down = module.weights, module.down_proj
    out, bound = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    for e in range(module.num_experts):
        t, choice = (ids == e).nonzero(as_tuple=True)
        if not len(t):
            continue
        block = Block(slice(0, len(t)), slice(0, weights.shape[1]), x[t], weights.gate[e], weights.up[e], None, None)
        terms = block_terms(block, module.activation)
        h, b = terms.value, terms.bound + u * terms.value.abs()
        d = down.matrix[e].dequantize(torch.float64) if isinstance(down, NVFP4ExpertsLinear) else down.weight[e].double()
        w, magnitude = router[t, choice].double().unsqueeze(-1), (h.abs() + b) @ d.t().abs()
        out.index_add_(0, t, w * (h @ d.t()))
        sums = (h.shape[1] + 4) * u * magnitude + b @ d.t().abs()
        bound.index_add_(0, t, w.abs() * (sums + (ids.shape[1] + 1) * u * magnitude))
    return out, bound


def watched(model: nn.Module) -> list[tuple[GatedExperts, tuple[Tensor, ...], Tensor]]:
    """(module, its inputs, its output) of every stack that the model's next calls run."""
    seen: list[tuple[GatedExperts, tuple[Tensor, ...], Tensor]] = []
    for m in model.modules():
        if isinstance(m, GatedExperts):
            m.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs, output)))
    return seen


# ---- conversion ----


@pytest.mark.parametrize(("family", "down"), quick([("Qwen3Moe", "all"), ("Mixtral", False)], MOE, [False, "all"]))
def test_a_converted_models_experts_are_right_wherever_it_calls_them(moe_model: Make, family: str, down: Any) -> None:
    model = moe_model(family)
    before = {name: model.get_submodule(name).gate_up_proj.detach().clone() for name in STACKS}
    report = convert(model, linears=down)
    assert report.experts == STACKS
    assert report.mlps == (
        ["model.layers.0.mlp.shared_expert", "model.layers.1.mlp.shared_expert"] if family == "Qwen2Moe" else []
    )
    assert str(report).startswith("2 stacks of experts, ")
    for name, old in before.items():
        new = model.get_submodule(name)
        n = old.shape[1] // 2
        for e in range(old.shape[0]):
            for matrix, rows in ((new.weights.gate, old[e, :n]), (new.weights.up, old[e, n:])):
                expected = quantize(rows)
                assert torch.equal(matrix[e].codes, expected.codes)
                assert matrix[e].global_scale == expected.global_scale
        assert isinstance(new.down_proj, NVFP4ExpertsLinear if down else ExpertsLinear)
    seen = watched(model)
    logits = model(_ids()).logits
    assert logits.isfinite().all()
    assert len(seen) == 2
    for module, (x, ids, router), out in seen:
        assert len(ids.unique()) > 1
        exact, bound = exact_and_bound(module, x, ids, router)
        assert ((out.double() - exact).abs() <= bound).all()
        assert bound.max() < 1e-3 * exact.abs().max()  # a bound that says something
    tokens = model.generate(_ids(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 15)


def dense_calls(module: GatedExperts, x: Tensor, ids: Tensor, router: Tensor) -> Tensor:
    """The module's result from dense calls, expert by expert, on the rows that chose it."""
    weights, down = module.weights, module.down_proj
    assert isinstance(down, NVFP4ExpertsLinear)
    narrow = module.mode == "w4a4"
    flat, top_k = ids.flatten(), ids.shape[1]
    positions = [(flat == e).nonzero().flatten() for e in range(module.num_experts)]
    order = torch.cat(positions)
    assert order.shape == flat.shape  # a router of transformers chooses no other
    operand = quantize(x) if narrow else x
    hidden = torch.cat([
        dual_gemm(_rows(operand, at // top_k), GatedWeights(weights.gate[e], weights.up[e]), out_dtype=x.dtype)
        for e, at in enumerate(positions)
    ])  # fmt: skip
    rows = quantize(hidden) if narrow else hidden
    ends = [0, *torch.tensor([len(at) for at in positions]).cumsum(0).tolist()]
    spans = [torch.arange(a, b) for a, b in itertools.pairwise(ends)]
    y = torch.cat([linear(_rows(rows, at), down.matrix[e], out_dtype=x.dtype) for e, at in enumerate(spans)])
    offsets = torch.tensor(ends, dtype=torch.int32)
    return moe_combine(y, Routing(order, offsets), router, out_dtype=x.dtype)


def _rows(x: Tensor | NVFP4Tensor, at: Tensor) -> Tensor | NVFP4Tensor:
    if isinstance(x, Tensor):
        return x[at]
    scale = x.block_scale.view(torch.uint8)[at].view(torch.float8_e4m3fn)
    return NVFP4Tensor(x.codes[at], scale, x.global_scale)


@pytest.mark.parametrize(("family", "mode"), quick([("Qwen3Moe", "w4a4"), ("Mixtral", "w4a16")], MOE, ["w4a16", "w4a4"]))
def test_experts_are_their_dense_calls_bit_for_bit(moe_model: Make, family: str, mode: Any) -> None:
    model = moe_model(family)
    convert(model, mode=mode, linears="all")
    seen = watched(model)
    model(_ids())
    for module, (x, ids, router), out in seen:
        assert torch.equal(out, dense_calls(module, x, ids, router))
    module, (x, ids, router), out = seen[0]
    module.up.global_scale.copy_(module.up.global_scale.roll(1))
    module._ready = None
    assert not torch.equal(out, dense_calls(module, x, ids, router))


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_another_experts_scale_would_be_seen(moe_model: Make, part: str) -> None:
    model = moe_model("Qwen3Moe")
    convert(model, linears="all")
    seen = watched(model)
    module = model.get_submodule(STACKS[1])
    right = copy.deepcopy(module)
    scale = (module.down_proj.weight if part == "down" else getattr(module, part)).global_scale
    scale.copy_(scale.roll(1))
    module._ready = None
    model(_ids())
    (_, (x, ids, router), out) = seen[1]
    exact, bound = exact_and_bound(right, x, ids, router)
    assert not ((out.double() - exact).abs() <= bound).all()


def test_the_dequantised_original_says_the_same(moe_model: Make) -> None:
    """The model's own loop over experts, on weights that hold the converted ones' values, chooses and answers alike."""
    model = moe_model("Qwen3Moe")
    original = copy.deepcopy(model)
    convert(model)
    for name in STACKS:
        w = model.get_submodule(name).weights
        both = torch.cat((w.gate.dequantize(), w.up.dequantize()), 1)
        original.get_submodule(name).gate_up_proj.data.copy_(both)
    original.set_experts_implementation("eager")
    seen = watched(model)
    model(_ids())
    for name, (module, (x, ids, router), out) in zip(STACKS, seen, strict=True):
        theirs = original.get_submodule(name)(x, ids, router)
        exact, bound = exact_and_bound(module, x, ids, router)
        # both are float32: each is within the bound of the exact result
        assert ((theirs.double() - exact).abs() <= bound).all()
        assert ((out.double() - theirs.double()).abs() <= 2 * bound).all()


def test_converting_twice_changes_nothing(moe_model: Make) -> None:
    model = moe_model("Mixtral")
    convert(model)
    before = model(_ids()).logits
    report = convert(model)
    assert report.skipped == dict.fromkeys(STACKS, "already a glu4.nn.GatedExperts")
    assert torch.equal(model(_ids()).logits, before)


def test_experts_in_a_module_list_are_gated_mlps_one_by_one(tiny_model: Make) -> None:
    class Experts(nn.Module):
        def __init__(self, mlps: list[nn.Module]) -> None:
            super().__init__()
            self.experts = nn.ModuleList(mlps)

        def forward(self, x: Tensor) -> Tensor:
            return sum(e(x) for e in self.experts)  # type: ignore[return-value]

    model = tiny_model("Llama")
    mlp = model.model.layers[0].mlp
    model.model.layers[0].mlp = Experts([mlp, copy.deepcopy(mlp)])
    assert convert(model).mlps[:2] == ["model.layers.0.mlp.experts.0", "model.layers.0.mlp.experts.1"]
    assert all(isinstance(e, GatedMLP) for e in model.model.layers[0].mlp.experts)


class Other(nn.Module):
    """Experts with the right parameters whose forward is not what it seems."""

    def __init__(self, forward: Callable[..., Tensor], k: int = 64, n: int = 32) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 2 * n, k))
        self.down_proj = nn.Parameter(torch.zeros(4, k, n))
        self._forward = forward

    def forward(self, x: Tensor, ids: Tensor, router: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t, (row, weights) in enumerate(zip(ids.tolist(), router, strict=True)):
            for e, w in zip(row, weights, strict=True):
                gate, up = (self.gate_up_proj[e] @ x[t]).chunk(2)
                out[t] += self._forward(gate, up, self.down_proj[e], w)
        return out


OTHERS: dict[str, Callable[..., Tensor]] = {
    "up is the gate": lambda g, u, d, w: w * (d @ (SILU(u, g))),
    "clamped": lambda g, u, d, w: w * (d @ SILU(g.clamp(max=7.0), u)),
    "no weights": lambda g, u, d, w: d @ SILU(g, u),
    "weights before the activation": lambda g, u, d, w: d @ SILU(w * g, u),
    "interleaved": lambda g, u, d, w: w * (d @ SILU(torch.cat((g, u))[0::2], torch.cat((g, u))[1::2])),
}


def test_the_probe_takes_the_loop_itself() -> None:
    check_experts(Other(lambda g, u, d, w: w * (d @ SILU(g, u))), SILU)


@pytest.mark.parametrize("name", OTHERS)
def test_a_forward_that_does_something_else_is_skipped(name: str) -> None:
    with pytest.raises(Skip, match=r"its forward is not the weighted sum of its experts' down_proj\(silu\(gate\) \* up\)"):
        check_experts(Other(OTHERS[name]), SILU)


def test_what_is_skipped_says_why(tiny_model: Make) -> None:
    model = tiny_model("Llama")
    layers = model.model.layers

    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("needs a device")

    layers[0].mlp = Other(broken)
    layers[1].mlp = Other(OTHERS["clamped"], k=40)
    with pytest.raises(UnsupportedError, match="its forward cannot be run on random tokens: RuntimeError: needs a device"):
        convert(model)
    del layers[0]
    with pytest.raises(UnsupportedError, match="gate_up_proj has K = 40, which is not a multiple of 16"):
        convert(model)
    layers[0].mlp = Other(OTHERS["clamped"])
    layers[0].mlp.down_proj = nn.Parameter(torch.zeros(4, 32, 64))
    with pytest.raises(UnsupportedError, match=r"down_proj \[4, 32, 64\] are not \[E, 2N, K\] and \[E, K, N\]"):
        convert(model)


# ---- the module ----


def stack(mode: str = "w4a16", n: int = 32, k: int = 64, e: int = 3, input_scale: Tensor | None = None) -> GatedExperts:
    gen = torch.Generator().manual_seed(1)
    gate, up = (quantize(torch.randn(e, n, k, generator=gen) * 0.2) for _ in range(2))
    down = quantize(torch.randn(e, k, n, generator=gen))
    weights = GatedWeights(gate, up, input_scale)
    return GatedExperts(weights, NVFP4ExpertsLinear(down, mode=mode), mode=mode)  # type: ignore[arg-type]


def test_w4a4_quantises_tokens_once_for_all_experts() -> None:
    scales = torch.tensor([0.001, 0.004, 0.002])
    module = stack("w4a4", input_scale=scales)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).half()
    ids = torch.tensor([[0, 1], [2, -1], [1, 3], [0, 2], [-1, -1]])
    router = torch.rand(5, 2)
    out = module(x, ids, router)
    # the largest scale for the tokens, and one dynamic scale over the rows that experts have
    hidden, routing = moe_gate_up(quantize(x, 0.004), ids, module.weights, out_dtype=torch.float16)
    last = int(routing.group_offsets[-1])
    assert last == 6
    y = torch.full((10, 64), torch.nan).half()
    y[:last] = grouped_linear(quantize(hidden[:last]), module.down_proj.matrix, routing.group_offsets, out_dtype=torch.float16)
    assert torch.equal(out, moe_combine(y, routing, router))
    assert (out[4] == 0).all()


def test_modes_moves_and_state() -> None:
    module = stack(input_scale=torch.tensor([0.001, 0.004, 0.002]))
    x, ids, router = torch.randn(4, 64), torch.tensor([[0, 1], [2, 0], [1, 1], [0, 5]]), torch.rand(4, 2)
    first = module(x, ids, router)
    assert set_mode(module, "w4a4") == 2
    assert not torch.equal(module(x, ids, router), first)
    set_mode(module, "w4a16")
    module.half().float()
    assert torch.equal(module(x, ids, router), first)
    other = stack(input_scale=torch.tensor([0.5, 0.5, 0.5]))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x, ids, router), first)
    assert "experts=3, in_features=64, gated_features=32, activation=silu, mode=w4a16" in repr(module)


@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_experts_on_the_kernel(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed at once, in one launch for all experts, the same bits with the packed form alone and after a save."""
    with fake_hopper(monkeypatch) as cuda:
        module = stack(mode, input_scale=torch.tensor([0.001, 0.004, 0.002]))
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).half()
        ids, router = torch.tensor([[0, 1], [2, -1], [1, 3], [0, 2], [-1, -1]]), torch.rand(5, 2)
        assert module.weights.packed is not None
        out = module(x, ids, router)
        # gate and up, then the down projection, and what decodes tokens for each
        kinds = [s.dual for s in (launch.spec for launch in cuda.launches) if isinstance(s, GroupedSpec)]
        assert kinds == [True, False]
        assert len(cuda.launches) == (4 if mode == "w4a4" else 2)
        assert free_originals(module) == 2
        assert module.down_proj.weight.codes.untyped_storage().nbytes() == 1
        assert torch.equal(module(x, ids, router), out)
        other = stack(mode, input_scale=torch.tensor([0.5, 0.5, 0.5]))
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x, ids, router), out)
        for w in (module.gate.global_scale, module.up.global_scale):
            w.copy_(w.roll(1))
        module._prepare_again()
        assert not torch.equal(module(x, ids, router), out)


def test_a_down_projection_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of the specification, before and after its NVFP4 form is freed, and that form again for files, moves, copies."""
    with fake_hopper(monkeypatch) as cuda:
        matrix, offsets = full_range(3, 3, 40, 64), torch.tensor([0, 4, 4, 7], dtype=torch.int32)
        x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2)).half()
        module = NVFP4ExpertsLinear(matrix)
        want = reference.grouped_linear(x, matrix, offsets)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(module(x, offsets)[:7], want)
            assert free_originals(module) == 1
            assert torch.equal(module(x, offsets)[:7], want)
            assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x, offsets)[:7], want)
        assert len(cuda.launches) == 3
        assert torch.equal(module.matrix.dequantize(), matrix.dequantize())
        assert "experts=3, in_features=64, out_features=40" in repr(module)
        names = ["input_scale", "weight.codes", "weight.block_scale", "weight.global_scale"]
        assert list(NVFP4ExpertsLinear(matrix, input_scale=torch.tensor(0.5)).state_dict()) == names
        other = NVFP4ExpertsLinear(full_range(4, 3, 40, 64))
        other.load_state_dict(module.state_dict())
        assert module.weight.codes.shape == matrix.codes.shape == module.weight.codes.clone().shape
        for changed in (other, module, copy.deepcopy(module), module.half()):
            assert free_originals(changed) == 1
            assert torch.equal(changed(x, offsets)[:7], want)


def test_a_down_projection_elsewhere_is_held_once() -> None:
    """The portable backend reads the buffers themselves, and what is written into them counts at once."""
    module, offsets = NVFP4ExpertsLinear(full_range(3, 3, 40, 64)), torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    x = torch.randn(7, 64)
    assert free_originals(module) == 0
    before = module(x, offsets)
    assert module._ready is None
    assert not module.matrix.is_swizzled
    module.weight.global_scale.mul_(2)
    assert torch.equal(module(x, offsets), before * 2)


def test_a_down_projection_on_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """W4A4 runs on the kernel, W4A16 on the portable backend, from the same arranged weights."""
    x, offsets = torch.randn(7, 64, dtype=torch.float16), torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    modules = [NVFP4ExpertsLinear(full_range(3, 3, 40, 64), mode=mode) for mode in ("w4a4", "w4a16")]  # type: ignore[arg-type]
    want = [module(x, offsets) for module in modules]
    with fake_blackwell(monkeypatch) as cuda:
        for module, before, launches in zip(modules, want, (2, 0)):
            module._prepare_again()
            cuda.made.clear()
            torch.testing.assert_close(module(x, offsets), before, rtol=2e-3, atol=0)
            assert len(cuda.made) == launches
            assert module.matrix.is_swizzled
            assert free_originals(module) == 0


def test_refusals_of_the_module() -> None:
    module = stack()
    with pytest.raises(ValueError, match="x requires grad, and glu4 has no backward pass yet"):
        module(torch.randn(1, 64, requires_grad=True), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    one = quantize(torch.randn(32, 64))
    with pytest.raises(ValueError, match=r"weights: expected a stack \[E, N, K\], got \[32, 64\]; see GatedMLP"):
        GatedExperts(GatedWeights(one, one), nn.Identity())
    with pytest.raises(ValueError, match=r"weight: expected \[E, N, K\], got shape \[32, 64\]"):
        NVFP4ExpertsLinear(one)
    with pytest.raises(ValueError, match="mode: expected one of w4a16, w4a4, got 'w8'"):
        GatedExperts(module.weights, nn.Identity(), mode="w8")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 8, 16), (3, 7, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_experts(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight, x = torch.randn(shape).to(dtype), torch.randn(9, shape[2]).to(dtype)
    offsets = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    out = ExpertsLinear(weight)(x, offsets)
    for start, end, e in ((0, 4, 0), (4, 7, 2)):
        assert torch.allclose(out[start:end], x[start:end] @ weight[e].t(), rtol=torch.finfo(dtype).eps * 4)


def test_a_layer_compiles_to_one_graph() -> None:
    module = stack()
    x, router = torch.randn(4, 64), torch.rand(4, 2)
    module(x, torch.zeros(4, 2, dtype=torch.int64), router)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        ids = torch.randint(-1, 3, (4, 2), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(compiled(x, ids, router), module(x, ids, router))


# ---- files ----


@pytest.mark.parametrize(
    ("family", "format", "down"),
    quick([("Qwen3Moe", "modelopt", "all"), ("Qwen2Moe", "compressed-tensors", False)], MOE, FORMATS, [False, "all"]),
)
def test_a_saved_model_comes_back(moe_model: Make, tmp_path: Path, family: str, format: str, down: Any) -> None:
    pytest.importorskip("accelerate")
    model = moe_model(family)
    convert(model, linears=down)
    loaded = load(save(model, tmp_path / "m", format))  # type: ignore[arg-type]
    for name in STACKS:
        mine, theirs = model.get_submodule(name), loaded.get_submodule(name)
        assert isinstance(theirs, GatedExperts)
        assert torch.equal(mine.weights.gate.codes, theirs.weights.gate.codes)
        assert type(mine.down_proj) is type(theirs.down_proj)
    if format == "modelopt":
        assert torch.equal(loaded(_ids()).logits, model(_ids()).logits)
    else:  # a divisor may move a global scale to its neighbour
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
            assert torch.equal(a.float(), b.float()) or torch.equal(torch.nextafter(a, b), b)
    assert loaded.generate(_ids(), max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 14)


def as_mixtral_stores_them(path: Path) -> None:
    """Rename a saved model's tensors to the names of Mixtral's own files."""
    from safetensors.torch import load_file, save_file

    names = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}
    tensors = load_file(path / "model.safetensors")
    renamed = {}
    for name, value in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("format",), quick([("modelopt",)], FORMATS))  # noqa: PT006
def test_mixtrals_own_names(moe_model: Make, tmp_path: Path, format: str) -> None:
    pytest.importorskip("accelerate")
    model = moe_model("Mixtral")
    convert(model, linears="all")
    path = save(model, tmp_path / "m", format)  # type: ignore[arg-type]
    expected = load(path)(_ids()).logits
    as_mixtral_stores_them(path)
    assert torch.equal(load(path)(_ids()).logits, expected)
    fresh = moe_model("Mixtral")
    assert convert(fresh, checkpoint=path).experts == STACKS
    kept = model.get_submodule(STACKS[0]).weights.gate
    assert isinstance(kept, NVFP4Tensor)
    assert torch.equal(fresh.get_submodule(STACKS[0]).weights.gate.codes, kept.codes)


def test_experts_that_a_checkpoint_lacks_or_has_in_another_shape(moe_model: Make, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = moe_model("Qwen3Moe")
    convert(model, linears="all")
    path = save(model, tmp_path / "m", "modelopt")
    wider = moe_model("Qwen3Moe")
    for name in STACKS:
        old = wider.get_submodule(name)
        old.gate_up_proj = nn.Parameter(torch.zeros(6, 192, 64))
        old.down_proj = nn.Parameter(torch.zeros(6, 64, 96))
    with pytest.raises(ValueError, match=r"checkpoint: gate of .*experts is \[6, 48, 64\], the model's is \[6, 96, 64\]"):
        convert(wider, checkpoint=path)
    dense = save_dense(tmp_path)
    with pytest.raises(UnsupportedError, match="the checkpoint holds no NVFP4 experts of this name"):
        convert(moe_model("Qwen3Moe"), checkpoint=dense)


def save_dense(tmp_path: Path) -> Path:
    from glu4.checkpoint import write_checkpoint

    w = quantize(torch.randn(16, 64))
    names = [f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up")]
    return write_checkpoint(tmp_path / "dense", "modelopt", dict.fromkeys(names, (w, None)), {}, {"model_type": "llama"})
