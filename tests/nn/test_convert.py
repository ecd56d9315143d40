"""convert: which modules it replaces, with what values, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glu4 import UnsupportedError
from glu4.activation import clamped_silu
from glu4.nn import GatedMLP, NVFP4Linear, convert, save
from glu4.nvfp4 import NVFP4Tensor, quantize
from glu4.verify.cases import Case
from glu4.verify.checker import check

pytest.importorskip("transformers")
Make = Callable[..., Any]


def _same(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    return all(torch.equal(getattr(a, p).float(), getattr(b, p).float()) for p in ("codes", "block_scale", "global_scale"))


def _ids() -> Tensor:
    return torch.arange(3, 15)[None]


# ---- what it replaces ----


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("method", ["nearest", "four_over_six"])
def test_values_are_the_quantised_weights(tiny_model: Make, family: str, method: str) -> None:
    model = tiny_model(family)
    original = copy.deepcopy(model)
    report = convert(model, method=method)
    assert report.mlps == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert (report.linears, report.skipped) == ([], {})
    for new, old in zip(model.model.layers, original.model.layers, strict=True):
        assert _same(new.mlp.weights.gate, quantize(old.mlp.gate_proj.weight, method=method))
        assert _same(new.mlp.weights.up, quantize(old.mlp.up_proj.weight, method=method))
        assert new.mlp.weights.gate.global_scale != new.mlp.weights.up.global_scale
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight)
        assert not new.mlp.training
    assert model(_ids()).logits.isfinite().all()


@pytest.mark.parametrize("family", ["Phi3", "Glm4"])
def test_fused_gate_up_is_split_gate_first(tiny_model: Make, family: str) -> None:
    model = tiny_model(family)
    fused = model.model.layers[0].mlp.gate_up_proj.weight.clone()
    assert convert(model).mlps == ["model.layers.0.mlp", "model.layers.1.mlp"]
    weights = model.model.layers[0].mlp.weights
    assert _same(weights.gate, quantize(fused[:96]))
    assert _same(weights.up, quantize(fused[96:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_converted_layer_computes_the_models_own_mlp(tiny_model: Make, dtype: torch.dtype) -> None:
    """With weights that NVFP4 holds exactly, the new module's product is the old one's by the checker, biases included."""
    model = tiny_model(mlp_bias=True).to(dtype)
    mlp = model.model.layers[1].mlp
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    gate_bias, up_bias = mlp.gate_proj.bias.clone(), mlp.up_proj.bias.clone()
    q = [quantize(p.weight) for p in (mlp.gate_proj, mlp.up_proj)]
    convert(model)
    new = model.model.layers[1].mlp
    new.down_proj = nn.Identity()
    case = Case("layer", 0, x, *q, gate_bias=gate_bias, up_bias=up_bias, out_dtype=dtype)
    verdict = check(case, new(x))
    assert verdict.ok, verdict.summary()


def test_all_linears_but_the_head(tiny_model: Make) -> None:
    model = tiny_model("Qwen2")  # q, k and v have biases
    bias = model.model.layers[0].self_attn.q_proj.bias.clone()
    report = convert(model, linears="all", mode="w4a4")
    assert len(report.mlps) == 2
    assert len(report.linears) == 2 * 5  # q, k, v, o and down
    assert report.skipped == {"lm_head": "the output head stays as it is"}
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, bias)
    assert isinstance(model.model.layers[0].mlp.down_proj, NVFP4Linear)
    assert model.model.layers[0].mlp.down_proj.mode == "w4a4"
    assert isinstance(model.lm_head, nn.Linear)
    assert model(_ids()).logits.isfinite().all()


def test_converting_twice_changes_nothing(tiny_model: Make) -> None:
    model = tiny_model()
    convert(model)
    before = model(_ids()).logits
    report = convert(model)
    assert report.mlps == []
    assert set(report.skipped.values()) == {"already a glu4.nn.GatedMLP"}
    assert torch.equal(model(_ids()).logits, before)


def test_a_shared_mlp_stays_shared(tiny_model: Make) -> None:
    model = tiny_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert len(convert(model).mlps) == 2
    assert model.model.layers[1].mlp is model.model.layers[0].mlp
    assert isinstance(model.model.layers[0].mlp, GatedMLP)


def test_a_clamp_of_the_configuration_is_kept(tiny_model: Make) -> None:
    class Clamped(nn.Module):
        def __init__(self, old: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = old.gate_proj, old.up_proj, old.down_proj

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(clamped_silu(10.0)(self.gate_proj(x), self.up_proj(x)))

    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Clamped(layer.mlp)
    with pytest.raises(UnsupportedError, match=r"its forward is not down_proj\(silu\(gate\) \* up\)"):
        convert(model)  # the configuration says nothing of the clamp, the module's forward does
    model.config.swiglu_limit = 10.0
    convert(model)
    assert model.model.layers[0].mlp.activation == clamped_silu(10.0)


# ---- what it leaves alone, with the reason ----


class _Variant(nn.Module):
    """A gated MLP by its parts, with something else in its forward."""

    def __init__(self, old: Any, what: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = old.gate_proj, old.up_proj, old.down_proj
        self.what = what

    def forward(self, x: Tensor) -> Any:
        silu = nn.functional.silu
        gate, up = self.gate_proj(x if self.what != "scaled input" else 2 * x), self.up_proj(x)
        if self.what == "swapped":
            gate, up = up, gate
        hidden = silu(gate * 0.9 if self.what == "multiplier" else gate) * up
        if self.what == "gelu":
            hidden = nn.functional.gelu(gate) * up
        if self.what == "no product":
            hidden = silu(gate)
        out = self.down_proj(hidden)
        return (out, None) if self.what == "tuple" else out * 1.5 if self.what == "output multiplier" else out


@pytest.mark.parametrize("what", ["multiplier", "output multiplier", "swapped", "gelu", "no product", "scaled input", "tuple"])
def test_another_forward_is_noticed(tiny_model: Make, what: str) -> None:
    model = tiny_model()
    model.model.layers[1].mlp = _Variant(model.model.layers[1].mlp, what)
    report = convert(model)
    assert report.mlps == ["model.layers.0.mlp"]
    assert report.skipped == {"model.layers.1.mlp": "its forward is not down_proj(silu(gate) * up)"}


def test_the_forward_check_accepts_the_same_wrapper_without_a_fault(tiny_model: Make) -> None:
    model = tiny_model()
    model.model.layers[1].mlp = _Variant(model.model.layers[1].mlp, "nothing")
    assert len(convert(model).mlps) == 2


def test_active_dropout_is_named(tiny_model: Make) -> None:
    class Dropping(_Variant):
        def __init__(self, old: Any) -> None:
            super().__init__(old, "nothing")
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(super().forward(x))

    model = tiny_model()
    model.model.layers[0].mlp = Dropping(model.model.layers[0].mlp)
    assert convert(model).skipped["model.layers.0.mlp"].endswith("its dropout is active: call model.eval() first")
    model.eval()
    assert convert(model).mlps == ["model.layers.0.mlp"]


def test_fused_rows_up_first_are_noticed(tiny_model: Make) -> None:
    model = tiny_model("Phi3")
    mlp = type(model.model.layers[0].mlp)

    class UpFirst(mlp):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(up * self.activation_fn(gate))

    model.model.layers[0].mlp.__class__ = UpFirst
    report = convert(model)
    assert report.mlps == ["model.layers.1.mlp"]
    assert "its forward is not" in report.skipped["model.layers.0.mlp"]


def test_a_forward_that_raises_is_reported(tiny_model: Make) -> None:
    class Raises(_Variant):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("position_ids")

    model = tiny_model()
    model.model.layers[0].mlp = Raises(model.model.layers[0].mlp, "")
    assert "cannot be run on random tokens: KeyError: 'position_ids'" in convert(model).skipped["model.layers.0.mlp"]


def test_other_linear_classes_and_ties_and_odd_k_are_skipped(tiny_model: Make) -> None:
    class Linear8bit(nn.Linear):
        pass

    model = tiny_model(num_hidden_layers=4)
    layers = model.model.layers
    layers[0].mlp.gate_proj.__class__ = Linear8bit
    layers[1].mlp.up_proj.weight = layers[2].self_attn.q_proj.weight = nn.Parameter(torch.randn(96, 64), requires_grad=False)
    layers[2].mlp.gate_proj, layers[2].mlp.up_proj = nn.Linear(56, 96, bias=False), nn.Linear(56, 96, bias=False)
    report = convert(model)
    assert report.mlps == ["model.layers.3.mlp"]
    assert report.skipped == {
        "model.layers.0.mlp": "gate_proj is Linear8bit, not torch.nn.Linear",
        "model.layers.1.mlp": "up_proj.weight is tied to another module",
        "model.layers.2.mlp": "gate_proj has K = 56, which is not a multiple of 16",
    }


def test_a_tied_head_is_never_quantised(tiny_model: Make) -> None:
    model = tiny_model(tie_word_embeddings=True)
    convert(model, linears="all")
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- errors ----


def test_an_activation_that_is_not_silu_is_named(tiny_model: Make) -> None:
    with pytest.raises(UnsupportedError, match="hidden_act 'gelu_pytorch_tanh' is not a SiLU-gated activation"):
        convert(tiny_model(hidden_act="gelu_pytorch_tanh"))
    model = tiny_model()
    model.config.swiglu_offset = 1.0
    with pytest.raises(UnsupportedError, match=r"activation parameter 'swiglu_offset' = 1\.0 is not known"):
        convert(model)


def test_a_model_without_gated_mlps() -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, activation_function="silu")
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel has no gated MLP"):
        convert(transformers.GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match="has no config"):
        convert(nn.Linear(16, 16))


def test_meta_weights_and_bad_arguments(tiny_model: Make) -> None:
    with pytest.raises(ValueError, match=r"gate of model\.layers\.0\.mlp is on the meta device"):
        convert(tiny_model().to("meta"))
    damaged = tiny_model()
    with torch.no_grad():
        damaged.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"up of model\.layers\.1\.mlp holds NaN or infinity"):
        convert(damaged)
    with pytest.raises(ValueError, match="mode: expected one of"):
        convert(tiny_model(), mode="fp8")
    with pytest.raises(ValueError, match="linears: expected False or"):
        convert(tiny_model(), linears="attention")
    with pytest.raises(ValueError, match="method: expected one of"):
        convert(tiny_model(), method="best")


# ---- from a checkpoint ----


@pytest.fixture
def stored(tiny_model: Make, tmp_path: Path) -> tuple[Any, Path]:
    """(converted model, its directory)."""
    model = tiny_model(seed=5, mlp_bias=True)
    convert(model, linears="all")
    return model, save(model, tmp_path / "stored", "modelopt")


def test_gate_and_up_from_a_checkpoint(tiny_model: Make, stored: tuple[Any, Path]) -> None:
    source, path = stored
    model = tiny_model(seed=6, mlp_bias=True)
    down = model.model.layers[0].mlp.down_proj.weight.clone()
    report = convert(model, checkpoint=str(path))
    assert report.mlps == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for new, old in zip(model.model.layers, source.model.layers, strict=True):
        assert _same(new.mlp.weights.gate, old.mlp.weights.gate)
        assert _same(new.mlp.weights.up, old.mlp.weights.up)
        assert torch.equal(new.mlp.gate_bias, old.mlp.gate_bias)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, down)
    assert len(convert(tiny_model(mlp_bias=True), checkpoint=path, linears="all").linears) == 2 * 5


def test_a_checkpoint_that_does_not_fit(tiny_model: Make, stored: tuple[Any, Path]) -> None:
    _, path = stored
    with pytest.raises(ValueError, match=r"gate of model\.layers\.0\.mlp is \[96, 64\], the model's is \[128, 64\]"):
        convert(tiny_model(mlp_bias=True, intermediate_size=128), checkpoint=path)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp has a gate or up bias, unlike the model's"):
        convert(tiny_model(), checkpoint=path)
    report = convert(tiny_model(mlp_bias=True, num_hidden_layers=3), checkpoint=path)
    assert report.skipped == {"model.layers.2.mlp": "the checkpoint holds no NVFP4 gate and up of this name"}
