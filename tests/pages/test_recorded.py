"""Reading a result for a page: each kind of wrong file is one sentence with the file and the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glu4.bench.devices import device
from glu4.bench.roofline import limit
from glu4.pages.recorded import load
from glu4.problem import Problem

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def row(**changes: Any) -> dict[str, Any]:
    return {"peer": "glu4", "m": 1, "n": 64, "k": 64, "us": 2.0, "us_min": 1.5, "chosen": True, **changes}


def document(**changes: Any) -> dict[str, Any]:
    return {"device": "NVIDIA H100", "method": "how", "rows": [row()], **changes}


def loaded(tmp_path: Path, content: Any):
    path = tmp_path / "result.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ('{"device": "x", ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ([], "expected an object with device and rows, got a list"),
        ({"rows": [row()]}, "device: expected the device's name, got nothing"),
        (document(device=""), "device: expected the device's name, got an empty one"),
        (document(device=5), "device: expected the device's name, got 5"),
        (document(rows=None), "rows: expected a list of measurements, got null"),
        (document(rows=[]), "rows: expected a list of measurements, got an empty one"),
        (document(rows=[row(), 5]), r"rows\[1\]: expected an object, got a number"),
        (document(rows=[{"peer": "glu4"}]), r"rows\[0\]\.m: missing"),
        (document(rows=[row(us="fast")]), r"rows\[0\]\.us: expected a number or null, got text"),
        (document(rows=[row(us=True)]), r"rows\[0\]\.us: expected a number or null, got true or false"),
        (document(rows=[row(us=-1.0)]), r"rows\[0\]\.us: expected a finite number that is not negative, got -1\.0"),
        (document(rows=[row(us=float("nan"))]), r"rows\[0\]\.us: expected a finite number"),
        (document(rows=[row(limit_us=float("inf"))]), r"rows\[0\]\.limit_us: expected a finite number"),
        (document(rows=[row(m=0)]), r"rows\[0\]\.m: expected 1 to 2147483647, got 0"),
        (document(rows=[row(m=10**30)]), r"rows\[0\]\.m: expected 1 to 2147483647, got a number of 100 bits"),
        (document(rows=[row(m=1.5)]), r"rows\[0\]\.m: expected a whole number, got a number"),
        (document(rows=[row(k=17)]), r"rows\[0\]: .*16"),
        (document(rows=[row(x_format="int3")]), r"rows\[0\]: .*int3"),
        (document(rows=[row(config=7)]), r"rows\[0\]\.config: expected text, got a number"),
        (document(rows=[row(chosen="yes")]), r"rows\[0\]\.chosen: expected true or false, got text"),
        (document(roofs=[]), "roofs: expected an object with bandwidth and flops, got a list"),
        (document(roofs={"bandwidth": 1e12}), r"roofs\.flops: expected a positive number, got nothing"),
        (document(roofs={"bandwidth": 0, "flops": 1}), r"roofs\.bandwidth: expected a positive number, got 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_file_is_one_sentence_that_names_file_and_field(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"result\.json (is not a result of glu4 bench: )?{message}"):
        loaded(tmp_path, content)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.json cannot be read"):
        load(tmp_path / "binary.json")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["device", "rows", "us", "m", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*row(), "limit_us", "note", "device", "roofs", "rows", "method"]), _JSON)
def test_whatever_a_field_holds_the_file_is_read_or_refused_with_its_name(tmp_path, field, value):
    content = document(rows=[row() | {field: value}]) if field in (*row(), "limit_us", "note") else document(**{field: value})
    try:
        found = loaded(tmp_path, content)
    except ValueError as error:
        assert str(tmp_path / "result.json") in str(error)
        assert "is not a result of glu4 bench" in str(error)
    else:
        assert found.run.rows


def test_a_missing_limit_is_the_one_of_the_project(tmp_path):
    found = loaded(tmp_path, document(rows=[row(), row(limit_us=7.0)]))
    expected = limit(Problem(1, 64, 64, x_format="float16"), device("h100")).time_s * 1e6
    assert [r.limit_us for r in found.run.rows] == [expected, 7.0]
    assert loaded(tmp_path, document(device="a toaster")).run.rows[0].limit_us is None


def test_where_no_kernel_is_marked_the_fastest_of_each_shape_is_chosen_and_said(tmp_path):
    rows = [row(chosen=False, config=c, us=us) for c, us in (("a", 3.0), ("b", 2.0), ("c", None))] + [
        row(m=2, chosen=False, config="d")
    ]
    found = loaded(tmp_path, document(rows=rows))
    assert found.unchosen
    assert [r.config for r in found.run.rows if r.chosen] == ["b", "d"]
    assert not loaded(tmp_path, document()).unchosen


REPORTS = (
    "h100-bench", "h100-bench-2", "h100-decode-words", "h100-grouped", "h100-grouped-w4a4", "h100-peers", "h100-w4a4",
    "h100-w4a4-cluster",
)  # fmt: skip


@pytest.mark.parametrize("path", sorted(RESULTS.glob("h100-*.json")), ids=lambda p: p.stem)
def test_recorded_files_are_read_or_refused_by_name(path):
    if path.stem in REPORTS:
        assert load(path).run.rows
    else:
        with pytest.raises(ValueError, match=rf"{path.name} is not a result of glu4 bench: rows"):
            load(path)
