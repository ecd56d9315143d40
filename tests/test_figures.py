"""The pictures of the documentation are drawn, the same every time, and show what the code computes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def figures() -> ModuleType:
    pytest.importorskip("matplotlib", reason="needs the report extra")
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drawing_is_reproducible(figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["figures.py", "--output", str(tmp_path / name)])
        figures.main()
        made.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert made[0] == made[1]
    # other pictures are of measurements, and of emulated runs (docs/timeline_figure.py, docs/blackwell_timeline.py)
    assert set(made[0]) == {p.name for p in (DOCS / "img").glob("*.svg")} - {"timeline.svg", "blackwell-timeline.svg"}


def test_the_numbers_come_from_the_layout(figures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts() -> set[str]:
        return {t.get_text() for ax in figures.swizzle().axes for t in ax.texts}

    assert {"1011", "12,3", "1536"} <= texts()  # offsets of (31, 7) and (128, 4), and the scale in byte 195
    # row 96's first scale lies at byte 12; a layout that says otherwise would be drawn otherwise
    monkeypatch.setattr(figures.SwizzledLayout, "offset", lambda self, i, j: i * self.cols + j)
    assert "1011" not in texts()
