"""The page: one file, well formed, with every lane, wait, link and hazard."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest

from emulator.kernels import launches
from emulator.runner import run
from emulator.test_compiled_kernels import FAULTS, without
from emulator.test_recording import recorded
from emulator.test_replay import CTA, node, trace
from glu4.emulator.launch import emulate
from glu4.emulator.recording import Recording, Signal
from glu4.emulator.timeline import picture, render

_VOID = {"meta", "br", "link", "img"}
pytest.importorskip("jinja2")


class Page(HTMLParser):
    """Counts elements and classes, and finds what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: dict[str, int] = {}
        self.attributes: list[tuple[str, str]] = []
        self.titles: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        for name, value in attrs:
            self.attributes.append((name, value or ""))
            for word in (value or "").split() if name == "class" else ():
                self.classes[word] = self.classes.get(word, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        (self.titles if self.open and self.open[-1] == "title" else self.text).append(data)


def kernel(name: str, fault: str | None = None, **options: Any) -> Recording:
    ptx, launch, problem = launches.load(name)
    if fault:
        ptx = without(FAULTS[fault][0], 0, FAULTS[fault][1])(ptx)
    recording = emulate(ptx, launch, launches.make_inputs(problem), record=True, **options).recording
    assert recording is not None
    return recording


def test_a_page_of_a_pair_of_ctas() -> None:
    recording = kernel("cute_gemm_pair", schedule_name="random", seed=3)
    text = render(recording, "a <pair> & more")
    page = Page(text)
    assert "a &lt;pair&gt; &amp; more" in text
    assert "<pair>" not in text
    for lane in ("TMA loads", "MMA (tcgen05)", "tcgen05.cp", "TMEM ld/st", "warp 0", "warp 5"):
        assert lane in page.text
    timeline = recording.timed()
    waits = [e for e in timeline.events if e.kind == "wait"]
    drawn = sum(1 for name, _ in page.attributes if name == "data-k")
    assert drawn == len(waits) + len(timeline.links)
    hovers = "\n".join(page.titles)
    for wait in waits:
        assert wait.text in hovers
    assert re.search(r"tcgen05\.mma mxf4nvf4 256x\d+x64, D in columns \d+ to \d+", hovers)
    assert "PTX lines" in hovers
    assert len(text) < 3e6


def test_a_page_holds_all_it_needs() -> None:
    text = render(recorded(), "pipeline")
    page = Page(text)
    assert not [value for name, value in page.attributes if name in ("src", "href", "srcset", "data")]
    assert not re.search(r"https?:|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)
    assert text.count("<script>") == 1
    assert "No hazard was found" in text


def test_the_first_cluster_is_open_and_the_others_are_folded() -> None:
    text = render(kernel("cute_gemm"), "four tiles", clusters=2)
    assert text.count('<details class="group" open>') == 1
    assert text.count('<details class="group">') == 1
    assert text.index('<details class="group" open>') < text.index('<details class="group">')
    assert "2 more clusters ran and are not drawn." in text


def test_a_deadlock_is_drawn() -> None:
    text = render(kernel("triton_gemm_specialized", "no commit"), "no commit")
    page = Page(text)
    assert page.classes["stuck"] >= 8 * 4 + 1  # every warp of four CTAs, and the legend
    assert page.classes["h"] >= 8 * 4
    assert "never goes on" in page.text
    assert any(t.startswith("deadlock: waits for mbarrier at shared[0, 0, 0]+") for t in page.titles)
    assert "1 hazard" in page.text


def test_a_race_is_marked_at_its_warp() -> None:
    body = """.reg .b32 %i, %a, %w; mov.u32 %i, %tid.x; mov.u32 %a, data;
    shr.u32 %w, %i, 5; st.shared.b32 [%a], %w; exit;"""
    recording = run(body, {}, top=".shared .align 4 .b8 data[4];", launch={"block": [64]}, record=True).recording
    assert recording is not None
    page = Page(render(recording, "race"))
    assert page.classes["h"] == len(recording.timed().hazards) > 0
    assert any(t.startswith("data race") for t in page.titles)


def test_small_bars_are_drawn_together() -> None:
    phases = [Signal("phase", "bar", i) for i in range(5000)]
    steps = [node("arrive", 2, gives=p) for p in phases]
    text = render(Recording((trace(0, *steps), trace(1, node("wait", 1, needs=(phases[-1],)))), ()), "many")
    assert len(text) < 1_000_000
    assert "10,000 instructions" in text  # all in the table or one bar


def test_nothing_at_all() -> None:
    text = render(Recording((), ()), "empty")
    assert "0 ticks" in text


def test_a_picture_is_a_file_of_its_own() -> None:
    text = picture(recorded())
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "<title" not in text
    assert "warp 1" in text
    assert str(CTA) in text


def test_without_jinja2_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'the timeline needs jinja2: pip install "glu4\[report\]"'):
        render(recorded(), "pipeline")
