"""`glu4 eval`: perplexity and tokens per second of a model as it is and converted to NVFP4."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glu4.cli.output import JsonOption, console, emit_json, progress

if TYPE_CHECKING:
    from glu4.bench.models import OpenedModel
    from glu4.bench.perplexity import Perplexity

__all__ = ["command", "quiet_transformers"]

_MODES = ("base", "w4a16", "w4a4")

ModelArgument = Annotated[
    str, typer.Argument(help='A model directory, a .gguf file, an NVFP4 checkpoint directory, or the word "smollm2".')
]
TextOption = Annotated[str, typer.Option(help='A UTF-8 text file, or "topics": the text of pydoc_data.topics.')]
WindowsOption = Annotated[int, typer.Option(help="How many windows of the text, from its beginning.")]
LengthOption = Annotated[int, typer.Option(help="Tokens per window.")]
ModeOption = Annotated[
    list[str] | None, typer.Option(help="base, w4a16 or w4a4; repeat for several. By default all that apply.")
]
CheckpointOption = Annotated[
    str | None, typer.Option(help="Take gate and up from this NVFP4 checkpoint instead of quantising MODEL's own.")
]
TokenizerOption = Annotated[
    str | None, typer.Option(help='Directory or .gguf file with the tokenizer, or "smollm2"; by default beside MODEL.')
]


def command(
    model: ModelArgument,
    text: TextOption = "topics",
    windows: WindowsOption = 4,
    length: LengthOption = 512,
    mode: ModeOption = None,
    checkpoint: CheckpointOption = None,
    tokenizer: TokenizerOption = None,
    json: JsonOption = False,
) -> None:
    """Perplexity and tokens per second of a model as it is and with NVFP4 gated MLPs.

    An NVFP4 checkpoint directory is evaluated as it is stored, so "base" does not apply to it. Exit codes: 0 done,
    2 could not run.
    """
    from glu4.bench.models import open_model
    from glu4.bench.perplexity import read_text, token_windows

    asked = _modes(mode)
    content = read_text(text)
    quiet_transformers()
    with progress(f"loading {model}"):
        opened = open_model(model, tokenizer=tokenizer)
    if opened.kind == "nvfp4":
        asked = _without_base(asked, explicit=mode is not None, checkpoint=checkpoint)
    longest = getattr(opened.model.config, "max_position_embeddings", None)
    tokens = token_windows(opened.tokenizer, content, windows, length, longest)
    results = _measure(opened, tokens, asked, checkpoint)
    if json:
        emit_json(_document(model, text, opened, results))
    else:
        _print(model, text, opened, results)


def quiet_transformers() -> None:
    """Leave the terminal to this program's own progress bar, for the rest of the process."""
    try:
        from transformers import modeling_gguf_pytorch_utils as gguf
        from transformers.utils import logging
    except ImportError:  # open_model says what is missing
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if hasattr(gguf, "tqdm"):  # this bar listens to no setting
        gguf.tqdm = partial(gguf.tqdm, disable=True)


def _modes(given: list[str] | None) -> list[str]:
    wrong = [m for m in given or () if m not in _MODES]
    if wrong:
        raise ValueError(f"mode: expected {', '.join(_MODES)}, got {wrong[0]!r}")
    # base first: converting replaces the weights that base needs
    return [m for m in _MODES if not given or m in given]


def _without_base(asked: list[str], *, explicit: bool, checkpoint: str | None) -> list[str]:
    if checkpoint is not None:
        raise ValueError(
            "checkpoint: MODEL is an NVFP4 checkpoint already; give the model it was made from, or leave the option out"
        )
    if explicit and "base" in asked:
        raise ValueError("mode: an NVFP4 checkpoint holds no unquantised weights to take as base; ask for w4a16 or w4a4")
    return [m for m in asked if m != "base"]


def _measure(opened: OpenedModel, tokens: Any, asked: list[str], checkpoint: str | None) -> list[tuple[str, Perplexity]]:
    from glu4.bench.perplexity import perplexity
    from glu4.nn import convert, set_mode

    results = []
    converted = opened.kind == "nvfp4"
    with progress("evaluating", total=len(asked) * len(tokens)) as advance:
        for name in asked:
            if name in ("w4a16", "w4a4"):
                if not converted:
                    advance(0, "converting")
                    convert(opened.model, checkpoint=checkpoint)
                    converted = True
                set_mode(opened.model, "w4a16" if name == "w4a16" else "w4a4")
            advance(0, name)
            results.append((name, perplexity(opened.model, tokens, lambda name=name: advance(1, name))))  # type: ignore[misc]
    return results


def _document(model: str, text: str, opened: OpenedModel, results: list[tuple[str, Perplexity]]) -> dict[str, Any]:
    rows = [
        {
            "mode": name,
            "perplexity": r.perplexity,
            "predictions": r.predictions,
            "tokens": r.tokens,
            "tokens_per_second": r.tokens_per_second,
        }
        for name, r in results
    ]
    return {"model": model, "kind": opened.kind, "text": text, "results": rows, "note": opened.note}


def _print(model: str, text: str, opened: OpenedModel, results: list[tuple[str, Perplexity]]) -> None:
    from rich.table import Table

    table = Table(title=f"{model} on {text}, {results[0][1].predictions} predictions")
    for heading, justify in (("mode", "left"), ("perplexity", "right"), ("tokens/s", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for name, r in results:
        table.add_row(name, f"{r.perplexity:.3f}", f"{r.tokens_per_second:.0f}")
    console.print(table)
    if opened.note:
        console.print(f"Note: {opened.note}.")
