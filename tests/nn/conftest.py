"""Tiny random models: two layers, hidden size 64, made fresh from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """tiny_model("Llama", seed=0, mlp_bias=True, ...): a causal language model of that family in eval mode."""
    transformers = pytest.importorskip("transformers")

    def make(family: str = "Llama", *, seed: int = 0, **settings: Any) -> Any:
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**{**_SIZES, **settings})
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("bias"):  # transformers starts biases at zero, which would hide a lost one
                    p.normal_(0.0, 0.1)
                # gate and up of different size, so that their global scales differ
                if "up_proj" in name and "gate_up" not in name:
                    p.mul_(1.7)
        return model.requires_grad_(False)

    return make
