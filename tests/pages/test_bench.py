"""The page of bench results: what the files say is on it, escaped, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glu4.pages.bench import _size, page, write
from glu4.pages.recorded import load
from glu4.pages.template import clean
from page_checks import broken, requests_of, tags_of, text_of, unreadable

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def row(**changes: Any) -> dict[str, Any]:
    return {
        "peer": "glu4",
        "m": 64,
        "n": 4096,
        "k": 7168,
        "us": 20.0,
        "us_min": 18.0,
        "chosen": True,
        "limit_us": 10.0,
        **changes,
    }


def made(path: Path, **changes: Any) -> str:
    """The page of a result with one shape, glu4 and a peer."""
    peer = row(peer="cublas_fp16", us=30.0, us_min=29.0, chosen=False)
    content = {"device": "NVIDIA H100 80GB HBM3", "method": "graphs", "rows": [row(), peer], "commit": "abc1234", **changes}
    path.write_text(json.dumps(content), encoding="utf-8")
    return page([load(path)])


@pytest.mark.parametrize("names", [["h100-peers"], ["h100-bench", "h100-w4a4", "h200-dense-second"]], ids=len)
def test_the_page_of_recorded_runs_is_one_sound_file_that_asks_for_nothing(tmp_path, names):
    write([RESULTS / f"{name}.json" for name in names], tmp_path / "x.html")
    found = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert requests_of(found) == []
    assert broken(found) == []
    assert unreadable(found) == []
    assert all(name in text_of(found) for name in names if len(names) > 1)


def test_every_number_of_the_table_is_the_files(tmp_path):
    text = text_of(made(tmp_path / "a.json"))
    # 4MNK / 20 us = 375.8 TFLOP/s; 10 / 20 of the limit; 30 / 20
    assert "64, 4096, 7168 20.0 18.0 376 10.0 50 % cublas_fp16 30.0 1.50x" in text
    assert (
        "glu4 is faster than the fastest peer at 1 of 1 shapes, 1.50x in the geometric mean; it reaches 50 % to 50 % of the limit."
        in text
    )


def test_the_plots_say_their_numbers(tmp_path):
    pictures = [a["aria-label"] for t, a in tags_of(made(tmp_path / "a.json")) if t == "svg" and a.get("role") == "img"]
    assert pictures[0] == (
        "Roofline of NVIDIA H100 80GB HBM3 with 2 measured points. glu4 reaches 50 % to 50 % of the limit. "
        "The numbers are in the table above."
    )
    assert pictures[2] == "Time of each peer over glu4's. Against the fastest peer: 1.50x to 1.50x."
    assert pictures[4] == "Time of glu4 over the floor: 2.00x to 2.00x."


def test_the_setting_is_shown_with_the_range_of_clocks_and_what_was_left_out(tmp_path):
    clocks = [{"when": "before", "clocks.sm": "990 MHz"}, {"when": "after", "clocks.sm": "1980 MHz"}]
    setting = {"driver_version": "580.1", "torch": "2.11", "clocks": clocks, "left_out": {"quack": "not installed"}}
    text = text_of(made(tmp_path / "a.json", **setting))
    for words in (
        "Driver 580.1",
        "PyTorch 2.11",
        "Commit abc1234",
        "SM clock 990 MHz to 1980 MHz (2 readings)",
        "quack left out not installed",
        "graphs",
    ):
        assert words in text


def test_what_failed_is_said_once_with_its_shapes(tmp_path):
    failed = [row(peer="humming", us=None, us_min=None, m=m, note="failed: no kernel") for m in (1, 2)]
    text = text_of(made(tmp_path / "a.json", rows=[row(), *failed]))
    assert "humming failed: no kernel (at 1, 4096, 7168; 2, 4096, 7168)" in text


def test_an_unknown_device_without_roofs_has_no_roofline_and_says_why(tmp_path):
    rows = [row(limit_us=None)]
    text = text_of(made(tmp_path / "a.json", device="a toaster", rows=rows))
    assert "No roofline: no rates are known of a toaster" in text
    assert "No peer was timed in this run." in text


def test_a_run_that_timed_nothing_is_still_a_page(tmp_path):
    found = made(tmp_path / "a.json", rows=[row(us=None, us_min=None, note="wrong result")])
    assert "glu4 was not timed in this run." in text_of(found)
    assert "No roofline: the run timed nothing." in text_of(found)
    assert broken(found) == []


def test_files_side_by_side_keep_apart_shapes_that_only_one_has(tmp_path):
    paths = []
    for i, (us, m) in enumerate(((20.0, 64), (25.0, 64), (5.0, 1))):
        folder = tmp_path / str(i)
        folder.mkdir()
        paths.append(folder / "run.json")
        made(paths[-1], rows=[row(us=us, m=m)])
    text = text_of(page([load(p) for p in paths]))
    assert "run (1), µs % of limit run (2), µs % of limit run (3), µs" in text
    assert "64, 4096, 7168 20.0 50 % 25.0 40 % - -" in text
    assert "1, 4096, 7168 - - - - 5.00 200 %" in text


_TEXTS = st.one_of(
    st.text(max_size=25), st.sampled_from(["<script>x</script>", '" onload="x', "</style><b>", "{{ 1 }}", "\ud800", "&lt;"])
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(_TEXTS.filter(bool), _TEXTS.filter(lambda t: t not in ("", "glu4")), _TEXTS, _TEXTS.filter(bool))
def test_no_text_of_a_file_becomes_markup(tmp_path, device, peer, method, note):
    rows = [row(), row(peer=peer, us=30.0, chosen=False, note=note, config=method)]
    found = made(
        tmp_path / "a.json",
        device=device,
        method=method,
        rows=rows,
        lost=note,
        left_out={peer: note},
        roofs={"bandwidth": 1e12, "flops": 1e14},
    )
    found.encode("utf-8")
    assert (requests_of(found), broken(found)) == ([], [])
    text = text_of(found)
    for said in (device, peer, method, note):
        assert " ".join(clean(said).split()) in text


def test_a_grouped_case_goes_by_its_name():
    assert _size((8, 64, 128)) == "8, 64, 128"
    assert _size((8, 64, 128, "E4 x2 N64 K128")) == "E4 x2 N64 K128"
