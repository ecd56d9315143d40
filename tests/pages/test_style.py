"""The style sheet: its colours can be read on its backgrounds (WCAG 2.2: 4.5 to 1 for text, 3 to 1 for marks)."""

from __future__ import annotations

import re

import pytest

from glu4.pages.template import render
from page_checks import requests_of


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours, #rrggbb."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def schemes() -> list[dict[str, str]]:
    blocks = re.findall(r":root \{([^}]*)\}", render("style.css.j2"))
    return [dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", block)) for block in blocks]


def test_the_formula_gives_known_ratios():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(scheme):
    light, dark = schemes()
    assert light.keys() == dark.keys()
    colours = (light, dark)[scheme]
    for background in ("page", "panel"):
        for name, least in [("ink", 4.5), ("soft", 4.5), ("good", 4.5), ("bad", 4.5), *((f"c{i}", 3.0) for i in range(8))]:
            assert contrast(colours[name], colours[background]) >= least, (name, background)


def test_the_style_sheet_fetches_nothing():
    assert requests_of(f"<style>{render('style.css.j2')}</style>") == []
    assert requests_of("<style>a { background: url(x) }</style>") == ["style sheet"], "the check itself can fail"
