"""The report as one HTML file with nothing outside it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.resources import files
from statistics import median

import torch

import glu4
from glu4.demo import figures
from glu4.demo.measure import DemoResult

__all__ = ["Setting", "render"]


@dataclass(frozen=True)
class Setting:
    """What the report says about where its numbers come from; `text_sha256` is of the UTF-8 text."""

    model: str
    note: str
    windows: int
    length: int
    characters: int
    text_sha256: str

    def lines(self) -> dict[str, str]:
        """Label to value, for the table at the end of the report."""
        return {
            "Model": self.model,
            "Text": f"pydoc_data.topics, {self.characters:,} characters, SHA-256 {self.text_sha256[:16]}…",
            "Tokens": f"the first {self.windows} x {self.length}, each window on its own, without special tokens",
            "Software": f"glu4 {glu4.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
            "Machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }


def render(result: DemoResult, setting: Setting) -> str:
    """The page. Raises ImportError without jinja2 or matplotlib, saying what to install."""
    try:
        from jinja2 import Environment, StrictUndefined

        pictures = {
            "perplexity": figures.perplexity_bars(result),
            "ratios": figures.scale_ratios(result),
            "weights": figures.weight_errors(result),
            "specification": figures.specification_errors(result),
        }
    except ImportError as error:
        raise ImportError('the report needs jinja2 and matplotlib: pip install "glu4[report]"') from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("glu4.demo") / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(result=result, setting=setting, pictures=pictures, ratios=_ratios(result.scale_ratios))


def _ratios(ratios: list[float]) -> dict[str, float]:
    return {"low": min(ratios), "median": median(ratios), "high": max(ratios)}
