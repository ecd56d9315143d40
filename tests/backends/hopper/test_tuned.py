"""Measured tables: they speak for exactly what was measured, and nothing that is wrong with one stops a call."""

from __future__ import annotations

import json
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glu4.backends.hopper import tuned
from glu4.backends.hopper.config import SHIPPED, candidates, legal
from glu4.problem import Problem

DEVICE = "NVIDIA H200"
NAMES = [c.name for c in SHIPPED]


def problem(m: int, n: int = 4096, k: int = 7168, **kwargs: Any) -> Problem:
    return Problem(m, n, k, **{"x_format": "float16", **kwargs})


def entry(ms: list[int], names: list[str], **kwargs: Any) -> dict[str, Any]:
    return {"operation": "dual_gemm", "n": 4096, "k": 7168, "x_format": "float16", "m": ms, "config": names} | kwargs


def table(*entries: Any, **kwargs: Any) -> str:
    return json.dumps({"format": 1, "device": DEVICE, "entries": list(entries)} | kwargs)


@pytest.fixture(autouse=True)
def directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """(packaged, user's) directories of tables, both empty."""
    packaged, cache = tmp_path / "packaged", tmp_path / "cache"
    packaged.mkdir()
    (cache / "tuned").mkdir(parents=True)
    monkeypatch.setattr(tuned, "packaged_directory", lambda: packaged)
    monkeypatch.setenv("GLU4_CACHE_DIR", str(cache))
    tuned.forget()
    return packaged, cache / "tuned"


def put(directory: Path, text: str) -> None:
    (directory / tuned.file_name(DEVICE)).write_text(text)
    tuned.forget()


def test_an_entry_speaks_for_what_was_measured_and_between_two_that_agree(directories: tuple[Path, Path]) -> None:
    put(directories[0], table(entry([4, 16, 64, 128], [NAMES[0], NAMES[1], NAMES[2], NAMES[2]])))
    assert SHIPPED[2].tokens == 32
    found = {m: tuned.best(problem(m), DEVICE) for m in (3, 4, 5, 16, 17, 64, 65, 96, 97, 128, 129, 4096)}
    assert found == {
        3: None, 4: SHIPPED[0], 5: None, 16: SHIPPED[1], 17: None, 64: SHIPPED[2], 65: None, 96: None, 97: SHIPPED[2],
        128: SHIPPED[2], 129: None, 4096: None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("other", "device"),
    [
        (problem(16, n=4064), DEVICE),
        (problem(16, k=7184), DEVICE),
        (problem(16, x_format="bfloat16"), DEVICE),
        (problem(16, x_format="nvfp4"), DEVICE),
        (problem(16, operation="linear"), DEVICE),
        (problem(16, batched=True), DEVICE),
        (problem(16), "NVIDIA H200 NVL"),
        (problem(16), "NVIDIA H100 80GB HBM3"),
        (problem(16, out_dtype=torch.float32), DEVICE),  # which the kernel may not run at all
    ],
    ids=str,
)
def test_and_for_nothing_else(directories: tuple[Path, Path], other: Problem, device: str) -> None:
    put(directories[0], table(entry([16], NAMES[:1])))
    assert tuned.best(problem(16), DEVICE) == SHIPPED[0]
    assert tuned.best(other, device) is None


def test_the_users_table_overrides_shape_by_shape(directories: tuple[Path, Path]) -> None:
    put(directories[0], table(entry([16], NAMES[:1]), entry([16], NAMES[:1], n=64)))
    put(directories[1], table(entry([32], [NAMES[4]])))
    assert tuned.best(problem(32), DEVICE) == SHIPPED[4]
    assert tuned.best(problem(16), DEVICE) is None
    assert tuned.best(problem(16, n=64), DEVICE) == SHIPPED[0]


def test_without_a_cache_there_is_no_table_of_the_users(
    directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(directories[1], table(entry([16], NAMES[:1])))
    monkeypatch.setenv("GLU4_CACHE_DIR", "off")
    assert tuned.user_directory() is None
    assert tuned.best(problem(16), DEVICE) is None


def test_configurations_of_another_version_are_passed_over(directories: tuple[Path, Path]) -> None:
    put(directories[0], table(entry([1, 16], ["t7r7g7f7u7", NAMES[1]])))
    assert tuned.best(problem(1), DEVICE) is None
    assert tuned.best(problem(2), DEVICE) is None
    assert tuned.best(problem(16), DEVICE) == SHIPPED[1]
    assert tuned.refusals(DEVICE) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a table of format 1"),
        (table(format=2), "expected a table of format 1"),
        (table(device="NVIDIA L4"), "a table of 'NVIDIA L4', not of 'NVIDIA H200'"),
        (table(entries=3), "entries: expected a list"),
        (table([]), r"entries\[0\]: expected an object, got list"),
        (table(entry([1], NAMES[:1]), entry([1], NAMES[:1], n="64")), r"entries\[1\]: expected operation and x_format"),
        (table(entry([1], NAMES[:1], k=-16)), "n and k as positive integers"),
        (table(entry([1], NAMES[:1], x_format=None)), "x_format as strings"),
        (table(entry([], [])), r"entries\[0\].m: expected ascending positive integers"),
        (table(entry([2, 2], NAMES[:2])), "ascending"),
        (table(entry([2, 1], NAMES[:2])), "ascending"),
        (table(entry([0, 1], NAMES[:2])), "positive"),
        (table(entry([1.5], NAMES[:1])), "integers"),
        (table(entry([True], NAMES[:1])), "integers"),
        (table(entry([1, 2], NAMES[:1])), r"entries\[0\].config: expected one name for each m"),
        (table(entry([1], [None])), "one name for each m"),
    ],
)
def test_a_damaged_table_is_refused_with_one_warning(directories: tuple[Path, Path], text: str, message: str) -> None:
    put(directories[0], table(entry([16], NAMES[:1])))
    put(directories[1], text)
    with pytest.warns(RuntimeWarning, match="tuning table refused") as caught:
        assert tuned.best(problem(16), DEVICE) == SHIPPED[0]  # the packaged one still speaks
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.best(problem(16), DEVICE) == SHIPPED[0]
        (refusal,) = tuned.refusals(DEVICE)
    assert "nvidia-h200.json" in refusal
    assert "measure again with glu4 tune, or delete it" in refusal
    with pytest.raises(ValueError, match=message):
        tuned.parse(text, DEVICE)


def test_bytes_that_are_no_text_are_refused_too(directories: tuple[Path, Path]) -> None:
    (directories[1] / tuned.file_name(DEVICE)).write_bytes(b"\xff\xfe{}")
    with pytest.warns(RuntimeWarning, match="refused"):
        assert tuned.best(problem(16), DEVICE) is None


def test_the_measured_one_comes_first_and_the_model_orders_the_rest(directories: tuple[Path, Path]) -> None:
    ranked = list(candidates(problem(16), 132))
    assert list(tuned.ordered(problem(16), DEVICE, 132)) == ranked
    put(directories[0], table(entry([16], [ranked[3].name])))
    found = list(tuned.ordered(problem(16), DEVICE, 132))
    assert found == [ranked[3], *(c for c in ranked if c != ranked[3])]


ENTRIES = st.lists(
    st.tuples(st.integers(1, 9000), st.sampled_from([*NAMES, "gone"])), min_size=1, max_size=20, unique_by=lambda e: e[0]
)


@given(ENTRIES, st.integers(1, 10000), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_the_answer_is_that_of_a_measured_m_or_of_two_that_agree(
    measured: list[tuple[int, str]], m: int, out_dtype: torch.dtype
) -> None:
    ordered = sorted(measured)
    entries = tuned.parse(table(entry([at for at, _ in ordered], [name for _, name in ordered])), DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "_tables", lambda device: (entries, ()))
        asked = problem(m, out_dtype=out_dtype)
        found = tuned.best(asked, DEVICE)
    below, above = [name for at, name in ordered if at < m], [name for at, name in ordered if at >= m]
    exact = dict(ordered).get(m)
    between = above[0] if below and above and below[-1] == above[0] else None
    known = {c.name: c for c in SHIPPED}
    if between in known:
        upper, tokens = min(at for at, _ in ordered if at >= m), known[between].tokens
        between = between if -(-m // tokens) == -(-upper // tokens) else None
    expected = known.get(exact or between or "")
    assert found == (expected if expected is not None and legal(expected, asked) is None else None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5000) | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["format", "device", "entries", "operation", "n", "k", "x_format", "m", "config"]), inner
        )
    ),
    max_leaves=20,
)


@given(JSON, st.sampled_from(["whole", "entries", "entry"]))
def test_any_content_is_a_table_or_a_value_error(content: Any, where: str) -> None:
    document = {
        "whole": content,
        "entries": {"format": 1, "device": DEVICE, "entries": content},
        "entry": {"format": 1, "device": DEVICE, "entries": [content]},
    }[where]
    try:
        found = tuned.parse(json.dumps(document), DEVICE)
    except ValueError:
        return
    assert all(isinstance(e, tuned.Entry) and len(e.m) == len(e.configs) for e in found.values())


@pytest.mark.parametrize("path", sorted((Path(tuned.__file__).parent / "tables").glob("*.json")), ids=lambda p: p.stem)
def test_packaged_tables_are_whole(path: Path) -> None:
    device = json.loads(path.read_text())["device"]
    assert path.name == tuned.file_name(device)
    entries = tuned.parse(path.read_text(), device)
    assert entries
    assert all(config is not None for e in entries.values() for config in e.configs), "it names configurations that are gone"


def test_the_h100s_table_is_that_of_the_recorded_trials() -> None:
    spec = spec_from_file_location("h100_table", Path(__file__).parents[3] / "benchmarks" / "h100_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.table()
    committed = Path(tuned.__file__).parent / "tables" / tuned.file_name(made["device"])
    assert json.loads(committed.read_text()) == made
