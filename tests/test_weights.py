"""GatedWeights: consistency, prepare, tensor-parallel shards, and the state dict round trip."""

from __future__ import annotations

import pytest
import torch

from glu4 import GatedWeights, NVFP4Tensor, dual_gemm
from glu4.nvfp4 import _unchecked
from operands import full_range


def weights(*shape: int, **kwargs: torch.Tensor) -> GatedWeights:
    return GatedWeights(full_range(1, *shape), full_range(2, *shape), **kwargs)


def test_state_dict_round_trip() -> None:
    w = weights(3, 8, 32, input_scale=torch.rand(3) + 0.1, gate_bias=torch.randn(3, 8))
    back = GatedWeights.from_state_dict(w.state_dict())
    for key, value in w.state_dict().items():
        assert torch.equal(back.state_dict()[key].view(torch.uint8), value.view(torch.uint8))
    assert back.up_bias is None
    state = w.state_dict()
    state["gate.code"] = state.pop("gate.codes")
    with pytest.raises(ValueError, match=r"missing \['gate.codes'\], unknown \['gate.code'\]"):
        GatedWeights.from_state_dict(state)


@pytest.mark.parametrize("swizzled", [False, True])
def test_shards_concatenate_to_the_whole(swizzled: bool) -> None:
    w = weights(48, 64, gate_bias=torch.randn(48))
    if swizzled:
        w = GatedWeights(w.gate.to_swizzled(), w.up.to_swizzled(), gate_bias=w.gate_bias)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = [dual_gemm(x, w.shard(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat(parts, -1), dual_gemm(x, w))
    with pytest.raises(ValueError, match="world: N = 48 does not divide into 5 shards"):
        w.shard(0, 5)
    with pytest.raises(ValueError, match="rank: expected 0 <= rank < 3, got 3"):
        w.shard(3, 3)


def test_prepare_checks_values_and_can_free_the_original() -> None:
    w = weights(8, 32)
    prepared = w.prepare("cpu", free_original=True)
    assert prepared.shape == (8, 32)
    assert not hasattr(w, "gate")
    for use in (lambda: w.shape, lambda: repr(w), lambda: dual_gemm(torch.zeros(1, 32), w)):
        with pytest.raises(AttributeError, match=r"emptied by prepare\(free_original=True\); use the weights it returned"):
            use()
    t = full_range(1, 8, 32)
    bad = _unchecked(t.codes, t.block_scale.view(torch.uint8).fill_(0x7F).view(torch.float8_e4m3fn), t.global_scale)
    with pytest.raises(ValueError, match="16 of 16 e4m3 scales are NaN"):
        GatedWeights(full_range(2, 8, 32), bad).prepare("cpu")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GatedWeights(full_range(1, 8, 32), full_range(1, 8, 16)), ValueError, "gate and up must have one shape"),
        (lambda: GatedWeights(full_range(1, 8, 32), torch.zeros(8, 32)), TypeError, "up: expected an NVFP4Tensor, got Tensor"),
        (lambda: weights(8, 32, gate_bias=torch.zeros(9)), ValueError, r"gate_bias: expected shape \[8\], got \[9\]"),
        (lambda: weights(8, 32, up_bias=[0.0] * 8), TypeError, "up_bias: expected a torch.Tensor, got list"),
        (lambda: weights(8, 32, input_scale=0.5), TypeError, "input_scale: expected a torch.Tensor, got float"),
        (lambda: weights(8, 32, gate_bias=torch.zeros(8, device="meta")), ValueError, "gate_bias is on meta, gate is on cpu"),
        (
            lambda: weights(8, 32, input_scale=torch.tensor(0.0)),
            ValueError,
            "input_scale: expected positive finite multipliers",
        ),
        (
            lambda: weights(2, 8, 32, input_scale=torch.ones(3)),
            ValueError,
            r"input_scale: expected float32 of shape \[\] or \[2\]",
        ),
        (lambda: weights(2, 2, 8, 32), ValueError, r"gate, up: expected \[N, K\] or \[E, N, K\]"),
    ],
)
def test_bad_weights(make, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        make()


def test_repr_and_bytes() -> None:
    w = weights(8, 32)
    assert repr(w) == "GatedWeights(shape=[8, 32], input_scale=dynamic, device=cpu)"
    assert w.nbytes == 2 * (8 * 16 + 8 * 2 + 4)
    assert isinstance(w.to("cpu").gate, NVFP4Tensor)
