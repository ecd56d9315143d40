"""What a run says: the fastest peer, the rows off what was measured before, and files read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glu4.bench.contender import Row
from glu4.bench.report import best_peer, chosen, document, lines, off_reference, read, reference

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SHAPE = (256, 4096, 7168)


def row(peer: str, us: float | None, **kwargs: object) -> Row:
    return Row(peer, *SHAPE, us=us, us_min=us, **kwargs)  # type: ignore[arg-type]


def test_a_line_compares_what_a_user_gets_with_the_fastest_peer() -> None:
    rows = [
        row("glu4", 40.0, chosen=True),
        row("glu4", 30.0, config="t8", chosen=False),
        row("slow", 60.0),
        row("fast", 50.0),
        row("failed", None, note="failed: x"),
    ]
    (line,) = lines(rows)
    assert line.ours == chosen(rows, SHAPE) == rows[0]
    assert line.peer == best_peer(rows, SHAPE) == rows[3]
    assert line.speed_up == 1.25


def test_lines_without_a_time_compare_nothing() -> None:
    (line,) = lines([row("glu4", None, chosen=True), row("fast", 50.0)])
    assert (line.ours, line.speed_up) == (None, None)
    assert lines([row("glu4", 4.0, chosen=True)])[0].speed_up is None


def test_the_reference_is_the_measured_one() -> None:
    known = reference("h100")
    assert len(known) == 150
    assert known["cublas_fp16", 256, 4096, 7168] == 50.993
    assert known["quack_gated_fp16", 512, 3072, 7168] == 62.331
    assert not any(peer == "gemlite_fp16" for peer, *_ in known)  # it ran on no shape
    assert reference("h200") == {}


def test_peers_more_than_five_percent_off_are_named() -> None:
    before = 50.993
    rows = [row("cublas_fp16", before * f) for f in (0.94, 0.951, 1.0, 1.049, 1.06)]
    rows += [row("glu4", 1.0, chosen=True), row("cublas_fp16", None)]
    assert off_reference(rows, "h100") == [
        "cublas_fp16 at 256,4096,7168: 47.9 us, 6.0 % below the reference 51.0 us",
        "cublas_fp16 at 256,4096,7168: 54.1 us, 6.0 % above the reference 51.0 us",
    ]
    assert off_reference(rows, "h200") == []


def test_a_document_holds_no_number_that_json_has_not() -> None:
    wrong = row("bad", None, note="wrong", max_rel_err=float("nan"), fro_rel_err=float("inf"))
    assert json.dumps(wrong.to_dict(), allow_nan=False)


def test_a_document_is_read_back(tmp_path: Path) -> None:
    rows = [row("glu4", 40.0, chosen=True, weights="nvfp4", limit_us=20.0), row("bad", None, note="failed: x")]
    roofs = {"bandwidth": 3e12, "flops": 8e14}
    written = document({"device": "NVIDIA H100", "commit": "abc"}, "how", rows, roofs=roofs, clocks=[])
    assert written["rows"][0] | {"peer": "glu4", "m": 256, "n": 4096, "k": 7168, "us": 40.0} == written["rows"][0]
    assert written["rows"][0]["percent_of_limit"] == 50.0
    assert written["rows"][1]["us"] is None
    path = tmp_path / "h100.json"
    path.write_text(json.dumps(written))
    found = read(path)
    assert found.rows == rows
    assert (found.device, found.roofs, found.setting["method"]) == ("NVIDIA H100", roofs, "how")


@pytest.mark.parametrize("name", ["h200-dense-first.json", "h200-dense-second.json"])
def test_runs_recorded_before_this_form_are_read(name: str) -> None:
    found = read(RESULTS / name)
    assert len(lines(found.rows)) == 10
    assert all(line.speed_up for line in lines(found.rows))
    assert found.rows[0].gb_s is None  # it does not say what it held


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a recorded run of glu4 bench"),
        ("[]", "is not a recorded run"),
        ('{"device": "x"}', "is not a recorded run of glu4 bench: 'rows'"),
        ('{"device": "x", "rows": [{"peer": "a"}]}', "expected peer, m, n, k, us and us_min in each, got {'peer': 'a'}"),
        ('{"device": "x", "rows": [3]}', "expected peer, m, n, k, us and us_min in each, got 3"),
        ('{"device": "x", "rows": [{"peer": "a", "m": 1, "n": 8, "k": 16, "us": "7", "us_min": 7}]}', "us_min in each, got"),
        ('{"device": "x", "rows": [{"peer": "a", "m": 1, "n": 8, "k": 17, "us": 7, "us_min": 7}]}', "multiple of 16, got 17"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)
    with pytest.raises(ValueError, match=r"absent.json cannot be read: .*No such file"):
        read(tmp_path / "absent.json")
