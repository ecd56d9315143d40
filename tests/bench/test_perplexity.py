"""Perplexity against what is known exactly, and the text and token windows it is taken over."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glu4.bench.perplexity import perplexity, read_text, token_windows


class _Model(nn.Module):
    """Logits by a table from the current token alone."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, ids: Tensor, use_cache: bool = True) -> Any:
        return SimpleNamespace(logits=self.table[ids])


class _Characters:
    """A tokenizer of one token a character, which starts with a special token unless told not to."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [99] * add_special_tokens + [ord(c) for c in text]}


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    result = perplexity(_Model(torch.zeros(37, 37)), torch.randint(0, 37, (3, 11)))
    assert result.perplexity == pytest.approx(37, rel=1e-6)  # float32 logarithms
    assert (result.predictions, result.tokens) == (30, 33)
    assert result.tokens_per_second == 33 / result.seconds


def test_a_model_that_is_certain_and_right_has_perplexity_one() -> None:
    follows = torch.full((10, 10), -1e4)
    follows[torch.arange(10), (torch.arange(10) + 1) % 10] = 0.0
    windows = torch.arange(8)[None]
    assert perplexity(_Model(follows), windows).perplexity == 1.0
    assert perplexity(_Model(follows), windows.flip(1)).perplexity == math.inf  # certain and wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_float64(dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(3)
    table = torch.randn(50, 50, generator=gen).to(dtype)
    windows = torch.randint(0, 50, (4, 20), generator=gen)
    steps: list[int] = []
    result = perplexity(_Model(table), windows, lambda: steps.append(1))
    log_p = table.double().log_softmax(-1)
    total = -sum(log_p[w[i], w[i + 1]] for w in windows for i in range(19))
    # each float32 loss is within a few units in the last place of values below 8: 4 * 2^-21
    assert math.log(result.perplexity) == pytest.approx(float(total) / 76, abs=4 * 2.0**-21)
    assert len(steps) == 4


def test_no_window_is_an_error() -> None:
    with pytest.raises(ValueError, match="windows: expected at least one window"):
        perplexity(_Model(torch.zeros(3, 3)), [])


def test_windows_are_the_first_tokens_without_special_ones() -> None:
    windows = token_windows(_Characters(), "abcdefgh", 2, 3)
    assert windows.tolist() == [[97, 98, 99], [100, 101, 102]]
    assert windows.dtype == torch.int64


def test_window_errors() -> None:
    with pytest.raises(ValueError, match="windows: expected at least 1, got 0"):
        token_windows(_Characters(), "abc", 0, 3)
    with pytest.raises(ValueError, match="length: expected at least 2 tokens, got 1"):
        token_windows(_Characters(), "abc", 1, 1)
    with pytest.raises(ValueError, match="length: expected at least 2 tokens and at most the model's 8 positions, got 9"):
        token_windows(_Characters(), "abc" * 9, 1, 9, longest=8)
    with pytest.raises(ValueError, match="text: 3 tokens are too few for 2 windows of 2; give a longer text or ask for fewer"):
        token_windows(_Characters(), "abc", 2, 2)


def test_texts(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    assert read_text("topics") == "\n".join(topics.values())
    file = tmp_path / "text.txt"
    file.write_bytes("grün\n".encode())
    assert read_text(str(file)) == "grün\n"
    with pytest.raises(ValueError, match='absent is not a file; give a UTF-8 text file, or the word "topics"'):
        read_text("absent")
    file.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"is not UTF-8 \(invalid start byte at byte 2\)"):
        read_text(str(file))
