"""GatedMLP and NVFP4Linear: right results by the checker, and good behaviour as torch modules."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fake_hopper import fake_hopper
from glu4 import dispatch, reference
from glu4.activation import SILU, Activation, clamped_silu
from glu4.backends.hopper.pack import pack_gated, pack_matrix
from glu4.nn import GatedExperts, GatedMLP, NVFP4ExpertsLinear, NVFP4Linear, free_originals, set_mode
from glu4.nvfp4 import NVFP4Tensor, quantize
from glu4.verify.cases import Case
from glu4.verify.checker import check
from glu4.weights import GatedWeights

N, K = 80, 48
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _matrix(gen: torch.Generator, rows: int, k: int, std: float) -> NVFP4Tensor:
    """All 16 codes, block scales from subnormal to 448; global scale for products of about `std` with unit activations."""
    codes = torch.randint(0, 256, (rows, k // 2), generator=gen, dtype=torch.uint8)
    scale = torch.randint(0, 0x7F, (rows, k // 16), generator=gen, dtype=torch.uint8).view(torch.float8_e4m3fn)
    raw = NVFP4Tensor(codes, scale, torch.tensor(1.0))
    return NVFP4Tensor(codes, scale, std / raw.decode().square().sum(-1).mean().sqrt())


def _weights(seed: int, *, bias: bool = False, input_scale: float | None = None) -> GatedWeights:
    gen = torch.Generator().manual_seed(seed)
    gate, up = _matrix(gen, N, K, 2.0), _matrix(gen, N, K, 0.7)
    biases = [torch.randn(N, generator=gen) if bias else None for _ in range(2)]
    return GatedWeights(gate, up, None if input_scale is None else torch.tensor(input_scale), *biases)


def _x(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _bare(weights: GatedWeights, **options: object) -> GatedMLP:
    """Without a down projection, so that its output is the gated product itself."""
    return GatedMLP(weights, nn.Identity(), **options)


def _case(x: Tensor | NVFP4Tensor, w: GatedWeights, dtype: torch.dtype, activation: Activation = SILU) -> Case:
    return Case("mlp", 0, x, w.gate, w.up, activation, w.gate_bias, w.up_bias, dtype)


# ---- right numbers ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_w4a16_is_right(dtype: torch.dtype, bias: bool) -> None:
    w, x = _weights(1, bias=bias), _x(2, 33, dtype=dtype)
    out = _bare(w)(x)
    assert out.dtype == dtype
    verdict = check(_case(x, w, dtype), out)
    assert verdict.ok, verdict.summary()


@pytest.mark.parametrize("dtype", DTYPES)
def test_w4a4_is_right_with_a_dynamic_scale(dtype: torch.dtype) -> None:
    w, x = _weights(3), _x(4, 33, dtype=dtype)
    out = _bare(w, mode="w4a4")(x)
    assert out.dtype == dtype
    verdict = check(_case(quantize(x), w, dtype), out)
    assert verdict.ok, verdict.summary()


def test_w4a4_uses_the_stored_input_scale() -> None:
    static, x = _weights(5, input_scale=0.004), _x(6, 20)
    out = _bare(static, mode="w4a4")(x)
    verdict = check(_case(quantize(x, 0.004), static, torch.float32), out)
    assert verdict.ok, verdict.summary()
    assert not torch.equal(out, _bare(_weights(5), mode="w4a4")(x))


def test_the_activation_is_used() -> None:
    w, x = _weights(7), _x(8, 20)
    activation = clamped_silu(0.5)
    out = _bare(w, activation=activation)(x)
    assert check(_case(x, w, torch.float32, activation), out).ok
    assert not check(_case(x, w, torch.float32), out, diagnose=False).ok


def test_a_shared_global_scale_would_be_noticed() -> None:
    w, x = _weights(9), _x(10, 20)
    mlp = _bare(w)
    mlp.weights = GatedWeights(w.gate, NVFP4Tensor(w.up.codes, w.up.block_scale, w.gate.global_scale))
    assert not check(_case(x, w, torch.float32), mlp(x), diagnose=False).ok


def launches(mode: str) -> int:
    """Of one call of a GatedMLP: two products, and for NVFP4 tokens of this K as many that decode ahead."""
    return 4 if mode == "w4a4" else 2


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0), (0,)])
@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_leading_dimensions(shape: tuple[int, ...], mode: str) -> None:
    w, x = _weights(11), _x(12, *shape)
    out = _bare(w, mode=mode)(x)
    assert out.shape == (*shape, N)
    assert torch.equal(out.reshape(-1, N), _bare(w, mode=mode)(x.reshape(-1, K)))
    linear = NVFP4Linear(w.gate, mode=mode)
    assert linear(x).shape == (*shape, N)


def test_down_projection_gets_the_product() -> None:
    w, x = _weights(13), _x(14, 5)
    down = nn.Linear(N, 16).requires_grad_(False)
    assert torch.equal(GatedMLP(w, down)(x), down(_bare(w)(x)))


def test_nan_and_infinity_reach_the_output_of_their_own_token_only() -> None:
    w, x = _weights(15), _x(16, 4)
    x[1, 3], x[2, 40] = torch.nan, torch.inf
    for mode in ("w4a16", "w4a4"):
        finite = _bare(w, mode=mode)(x).isfinite()
        assert finite[0].all()
        assert finite[3].all()
        assert not finite[1].any()
        assert not finite[2].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_linear_is_right(dtype: torch.dtype, mode: str) -> None:
    w, x = _weights(17, bias=True), _x(18, 21, dtype=dtype)
    out = NVFP4Linear(w.gate, w.gate_bias, mode=mode)(x)
    case = Case("linear", 0, quantize(x) if mode == "w4a4" else x, w.gate, None, SILU, w.gate_bias, None, dtype)
    verdict = check(case, out)
    assert verdict.ok, verdict.summary()


# ---- torch modules ----


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
def test_casting_a_model_leaves_codes_and_scales_alone(cast: str) -> None:
    w = _weights(20, bias=True, input_scale=0.0123)
    mlp = GatedMLP(w, NVFP4Linear(_matrix(torch.Generator().manual_seed(0), 16, N, 1.0)))
    before = {name: t.clone() for name, t in mlp.state_dict().items()}
    getattr(mlp, cast)()
    for name, t in mlp.state_dict().items():
        if name.endswith("_bias"):
            assert t.dtype == {"half": torch.float16, "double": torch.float64, "bfloat16": torch.bfloat16}[cast]
        else:
            assert t.dtype == before[name].dtype, name
            assert torch.equal(t.double(), before[name].double()), name


def test_state_dict_round_trip_replaces_weights_already_in_use() -> None:
    x = _x(21, 6)
    first, second = (_bare(_weights(s, bias=True, input_scale=0.01 * s), mode="w4a4") for s in (1, 2))
    assert first.state_dict().keys() == first.weights.state_dict().keys()
    a, b = first(x), second(x)
    assert not torch.equal(a, b)
    for assign in (False, True):
        target = copy.deepcopy(first)
        assert torch.equal(target(x), a)
        target.load_state_dict(copy.deepcopy(second.state_dict()), assign=assign)
        assert torch.equal(target(x), b)
    assert torch.equal(first(x), a)


def test_a_loaded_nan_scale_is_found_at_the_next_call() -> None:
    mlp, linear, x = _bare(_weights(22)), NVFP4Linear(_weights(22).gate), _x(23, 2)
    mlp(x)
    linear(x)
    for module, name in ((mlp, "up.block_scale"), (linear, "weight.block_scale")):
        state = copy.deepcopy(module.state_dict())
        state[name].view(torch.uint8)[3, 1] = 0x7F
        module.load_state_dict(state)
        with pytest.raises(ValueError, match="1 of 240 e4m3 scales are NaN"):
            module(x)


def test_moving_to_meta_and_back_to_memory() -> None:
    mlp, x = _bare(_weights(24)), _x(25, 3)
    want, state = mlp(x), copy.deepcopy(mlp.state_dict())
    mlp.to("meta")
    assert all(b.is_meta for b in mlp.buffers())
    mlp.to_empty(device="cpu")
    mlp.load_state_dict(state)
    assert torch.equal(mlp(x), want)


def test_compiles_without_a_graph_break() -> None:
    for mode in ("w4a16", "w4a4"):
        mlp, x = (
            GatedMLP(_weights(26), NVFP4Linear(_matrix(torch.Generator().manual_seed(1), 16, N, 1.0)), mode=mode),
            _x(27, 3),
        )
        want = mlp(x)
        with torch.no_grad():
            assert torch.equal(torch.compile(mlp, backend="eager", fullgraph=True)(x), want)


@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_a_module_never_called_before_compiles_and_exports(mode: str) -> None:
    x, down = _x(27, 3), _matrix(torch.Generator().manual_seed(1), 16, N, 1.0)

    def fresh() -> GatedMLP:
        return GatedMLP(_weights(26, input_scale=0.01), NVFP4Linear(down, mode=mode), mode=mode).eval()

    want = fresh()(x)
    with torch.no_grad():
        assert torch.equal(torch.compile(fresh(), backend="eager", fullgraph=True)(x), want)
        assert torch.equal(torch.export.export(fresh(), (x,)).module()(x), want)


def _saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("kind", [GatedMLP, NVFP4Linear])
def test_packed_weights_follow_what_the_buffers_hold(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
    """Packed when made, moved or loaded, so that a graph traced before the first call has them; and never stale."""

    def make(seed: int) -> GatedMLP | NVFP4Linear:
        return _bare(_weights(seed)) if kind is GatedMLP else NVFP4Linear(_weights(seed).gate)

    def expected(seed: int) -> Tensor:
        return pack_gated(_weights(seed).gate, _weights(seed).up) if kind is GatedMLP else pack_matrix(_weights(seed).gate)

    def packed(module: Any) -> Tensor:
        assert module._ready is not None
        assert module._ready.packed is not None
        found: Tensor = module._ready.packed
        return found

    with fake_hopper(monkeypatch) as cuda:
        module, other = make(1), make(2)
        assert torch.equal(packed(module), expected(1))
        module.load_state_dict(other.state_dict())
        assert torch.equal(packed(module), expected(2))
        if isinstance(module, GatedMLP):
            module.weights = _weights(3)
            assert torch.equal(packed(module), expected(3))
            module.weights = _weights(2)
        assert torch.equal(packed(module.half()), expected(2))
        empty = module.to("meta").to_empty(device="cpu")
        empty.load_state_dict(other.state_dict())
        assert torch.equal(packed(empty), expected(2))
        for copied in (copy.deepcopy(empty), _saved_and_loaded(empty)):
            assert torch.equal(packed(copied), expected(2))
        before = len(cuda.launches)
        assert torch.equal(empty(_x(4, 3).half()), other(_x(4, 3).half()))
        assert len(cuda.launches) == before + 2


def _held(model: nn.Module) -> int:
    """Bytes of memory behind the buffers of NVFP4 matrices."""
    parts = [b for name, b in model.named_buffers() if name.endswith(("codes", "block_scale"))]
    return sum({b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in parts}.values())


@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_the_packed_form_alone(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    with fake_hopper(monkeypatch) as cuda:
        down = NVFP4Linear(_matrix(torch.Generator().manual_seed(1), 16, N, 1.0), mode=mode)
        model = GatedMLP(_weights(1, input_scale=0.01), down, mode=mode)
        x, names, matrices = _x(2, 3).half(), list(model.state_dict()), (model.gate, model.up, down.weight)
        values = [m.tensor().dequantize() for m in matrices]
        want, held = model(x), _held(model)
        assert held > 10 * N
        assert free_originals(model) == 2
        assert free_originals(model) == 2
        assert _held(model) <= 6  # a byte for each
        assert model.weights.matrices is None
        cuda.launches.clear()
        assert torch.equal(model(x), want)
        assert len(cuda.launches) == launches(mode)
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), want)
        again = model.state_dict()
        assert _held(model) == held
        assert list(again) == names
        assert torch.equal(again["gate.codes"], model.gate.codes)
        assert all(torch.equal(m.tensor().dequantize(), v) for m, v in zip(matrices, values, strict=True))
        for change in (copy.deepcopy, _saved_and_loaded, nn.Module.eval, lambda m: m.to(torch.bfloat16).half()):
            assert free_originals(model) == 2
            assert torch.equal(change(model)(x), want)
        other = GatedMLP(_weights(5, input_scale=0.01), NVFP4Linear(_matrix(torch.Generator().manual_seed(2), 16, N, 1.0)))
        assert free_originals(model) == 2
        model.load_state_dict(other.state_dict())
        other.mode = other.down_proj.mode = mode  # type: ignore[assignment, union-attr]
        assert torch.equal(model(x), other(x))
        assert free_originals(model) == 2
        model.weights = _weights(1, input_scale=0.01)
        model.down_proj = down
        assert not torch.equal(model(x), other(x))


def test_nothing_is_freed_where_nothing_is_packed() -> None:
    model = _bare(_weights(1))
    held = _held(model)
    assert free_originals(nn.Sequential(model)) == 0
    assert _held(model) == held


def test_each_module_asks_for_kernels_of_its_own_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hopper(monkeypatch):
        asked: set[tuple[bool, bool]] = set()
        monkeypatch.setattr(dispatch, "packs", lambda device, dual, stacked=False: asked.add((dual, stacked)))
        _bare(_weights(1))
        assert asked == {(True, False)}
        asked.clear()
        NVFP4Linear(_weights(1).gate)
        assert asked == {(False, False)}
        asked.clear()
        gate = _weights(1).gate
        one = NVFP4Tensor(gate.codes[None], gate.block_scale[None], gate.global_scale[None])
        GatedExperts(GatedWeights(one, one), nn.Identity())
        assert asked == {(True, True)}
        asked.clear()
        NVFP4ExpertsLinear(one)
        assert asked == {(False, True)}


@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_modules_on_the_kernel(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Called, compiled before any call, and compiled after one: the same kernels, the same bits."""
    torch._dynamo.reset()
    with fake_hopper(monkeypatch) as cuda:

        def fresh() -> GatedMLP:
            down = NVFP4Linear(_matrix(torch.Generator().manual_seed(1), 16, N, 1.0), torch.ones(16).half(), mode=mode)
            return GatedMLP(_weights(26, bias=True, input_scale=0.01), down, mode=mode)

        for x in (_x(27, 3).half(), _x(27, 6).half().view(2, 3, K), _x(27, 1).half()[0]):
            want = fresh()(x)
            assert want.shape == (*x.shape[:-1], 16)
            assert len(cuda.launches) == launches(mode)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(torch.compile(fresh(), backend="eager", fullgraph=True)(x), want)
            assert len(cuda.launches) == 2 * launches(mode)
            cuda.launches.clear()


def test_on_the_meta_device_a_forward_gives_shapes() -> None:
    assert _bare(_weights(24)).to("meta")(_x(25, 3).to("meta")).shape == (3, N)


def test_set_mode_switches_every_layer() -> None:
    w, x = _weights(28), _x(29, 9)
    model = nn.Sequential(NVFP4Linear(_matrix(torch.Generator().manual_seed(2), K, K, 1.0)), _bare(w))
    a16 = model(x)
    assert set_mode(model, "w4a4") == 2
    assert {m.mode for m in model} == {"w4a4"}
    assert not torch.equal(model(x), a16)
    set_mode(model, "w4a16")
    assert torch.equal(model(x), a16)


# ---- errors ----


def test_errors() -> None:
    w = _weights(30)
    with pytest.raises(ValueError, match="mode: expected one of w4a16, w4a4, got 'w8a8'"):
        _bare(w, mode="w8a8")
    with pytest.raises(ValueError, match="mode: expected one of w4a16, w4a4, got 'fp4'"):
        NVFP4Linear(w.gate, mode="fp4")
    with pytest.raises(ValueError, match="mode: expected one of"):
        set_mode(_bare(w), "W4A16")
    with pytest.raises(ValueError, match="holds no GatedMLP and no NVFP4Linear"):
        set_mode(nn.Linear(2, 2), "w4a16")
    stack = quantize(torch.randn(2, 16, 32))
    with pytest.raises(ValueError, match=r"expected gate and up \[N, K\], got a stack \[2, 16, 32\]"):
        _bare(GatedWeights(stack, stack))
    with pytest.raises(ValueError, match=r"weight: expected \[N, K\], got shape \[2, 16, 32\]"):
        NVFP4Linear(stack)
    for module in (_bare(w), NVFP4Linear(w.gate), _bare(w, mode="w4a4"), NVFP4Linear(w.gate, mode="w4a4")):
        with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 48\], got shape \[\]"):
            module(torch.tensor(1.0))
        with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 48\], got shape \[3, 64\]"):
            module(torch.randn(3, 64))
        with pytest.raises(TypeError, match="expected float16, bfloat16 or float32"):
            module(_x(0, 3).double())
        with pytest.raises(ValueError, match="requires grad"):
            module(_x(0, 3).requires_grad_())


def test_specification_agrees_with_the_case() -> None:
    """The checker above is given the same operands that the specification sees."""
    w, x = _weights(31, bias=True), _x(32, 4)
    spec = reference.dual_gemm(x, w.gate, w.up, gate_bias=w.gate_bias, up_bias=w.up_bias, out_dtype=torch.float32)
    assert torch.equal(_case(x, w, torch.float32).expected(), spec)
