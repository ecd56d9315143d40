"""The activations against their published definitions, and parameters that must never be dropped."""

from __future__ import annotations

import math

import pytest
import torch

from glu4 import IDENTITY, SILU, Activation, UnsupportedError, clamped_silu, swiglu_oai


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    v = torch.linspace(-30, 30, 241, dtype=torch.float64)
    return v.repeat(241), v.repeat_interleave(241)


def test_definitions() -> None:
    g, u = grid()
    expected_silu = torch.tensor([a / (1 + math.exp(-a)) * b for a, b in zip(g.tolist(), u.tolist(), strict=True)])
    torch.testing.assert_close(SILU(g, u), expected_silu.double(), rtol=1e-6, atol=0)
    assert torch.equal(IDENTITY(g, u), g * u)
    low = g.clamp(max=10)
    torch.testing.assert_close(clamped_silu(10)(g, u), low * torch.sigmoid(low) * u.clamp(-10, 10), rtol=1e-12, atol=0)
    low = g.clamp(max=7)
    oai = (u.clamp(-7, 7) + 1) * low * torch.sigmoid(1.702 * low)
    torch.testing.assert_close(swiglu_oai()(g, u), oai, rtol=1e-12, atol=0)


def test_nan_stays_nan() -> None:
    nan, one = torch.tensor(math.nan), torch.tensor(1.0)
    for act in (SILU, IDENTITY, clamped_silu(2), swiglu_oai()):
        assert act(nan, one).isnan()
        assert act(one, nan).isnan()


def test_names() -> None:
    names = [a.name for a in (SILU, IDENTITY, clamped_silu(10), swiglu_oai())]
    assert names == ["silu", "identity", "clamped_silu(10)", "swiglu_oai(1.702, 1, 7)"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_act": "silu"}, SILU),
        ({"hidden_act": "swish", "swiglu_limit": None}, SILU),
        ({}, SILU),
        ({"hidden_act": "silu", "swiglu_limit": 10.0}, clamped_silu(10)),
        ({"hidden_act": "silu", "swiglu_limit": 7.0, "model_type": "gpt_oss"}, swiglu_oai()),
        ({"swiglu_alpha": 1.5, "swiglu_beta": 1.0, "swiglu_limit": 5}, swiglu_oai(1.5, 1.0, 5.0)),
    ],
)
def test_from_config(config: dict[str, object], expected: Activation) -> None:
    assert Activation.from_config(config) == expected


def test_unknown_parameters_are_errors() -> None:
    with pytest.raises(UnsupportedError, match="activation parameter 'swiglu_shift' = 2 is not known"):
        Activation.from_config({"swiglu_shift": 2})
    with pytest.raises(UnsupportedError, match="hidden_act 'gelu' is not a SiLU-gated activation"):
        Activation.from_config({"hidden_act": "gelu"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Activation("relu"), "kind: expected one of swish, identity, got 'relu'"),
        (lambda: clamped_silu(0.0), "limit: expected a positive number, got 0.0"),
        (lambda: clamped_silu(math.nan), "limit: expected a positive number, got nan"),
        (lambda: clamped_silu(math.inf), "limit: expected a finite number"),
        (lambda: swiglu_oai(alpha=math.inf), "alpha, beta: expected finite numbers"),
        (lambda: Activation("identity", limit=3.0), "identity takes no alpha, beta or limit"),
    ],
)
def test_bad_constants(make, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
