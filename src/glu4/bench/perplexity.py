"""Perplexity of a causal language model on a text, and the tokens per second it took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Perplexity", "perplexity", "read_text", "token_windows"]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood of `predictions` tokens; `seconds` is the time in the model's forward."""

    perplexity: float
    predictions: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else math.inf


def read_text(source: str) -> str:
    """The text of a UTF-8 file, or for the word "topics" the standard library's `pydoc_data.topics`.

    The topics are joined by one line break, in the order of that module; they vary with the Python version. Raises ValueError
    for a file that does not exist or is not UTF-8.
    """
    if source == "topics":
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    path = Path(source)
    if not path.is_file():
        raise ValueError(f'text: {source} is not a file; give a UTF-8 text file, or the word "topics"')
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {source} is not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error


def token_windows(tokenizer: Any, text: str, count: int, length: int, longest: int | None = None) -> Tensor:
    """The first `count * length` tokens of `text` as int64 `[count, length]`, without special tokens.

    Raises ValueError for fewer than one window, windows of under two tokens or over the model's `longest`, or a text that is
    too short.
    """
    if count < 1:
        raise ValueError(f"windows: expected at least 1, got {count}")
    if length < 2 or (longest is not None and length > longest):
        limit = "" if longest is None else f" and at most the model's {longest} positions"
        raise ValueError(f"length: expected at least 2 tokens{limit}, got {length}")
    needed = count * length
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if ids.numel() < needed:
        raise ValueError(
            f"text: {ids.numel()} tokens are too few for {count} windows of {length}; give a longer text or ask for fewer"
        )
    return ids[:needed].view(count, length)


def perplexity(model: Any, windows: Iterable[Tensor], advance: Callable[[], None] | None = None) -> Perplexity:
    """Perplexity of `model` over token windows `[length]`, each on its own: every token but a window's first is predicted.

    Losses are float32, their sum float64. `advance` is called after each window. Raises ValueError for no window.
    """
    device = next(model.parameters()).device
    loss, predictions, tokens, seconds = 0.0, 0, 0, 0.0
    with torch.inference_mode():
        for window in windows:
            ids = window.to(device)
            start = time.perf_counter()
            logits = model(ids[None], use_cache=False).logits[0]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds += time.perf_counter() - start
            each = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
            loss += each.double().sum().item()
            predictions += each.numel()
            tokens += ids.numel()
            if advance is not None:
                advance()
    if predictions == 0:
        raise ValueError("windows: expected at least one window of two tokens")
    mean = loss / predictions
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, predictions, tokens, seconds)
