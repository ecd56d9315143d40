"""Tuning: which configurations are measured, what the table says of them, and that a written table is the one that is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glu4.backends.hopper import tuned
from glu4.backends.hopper.config import SHIPPED
from glu4.bench import tune
from glu4.bench.contender import Row
from glu4.bench.operands import draw
from glu4.problem import Problem

DEVICE = "NVIDIA H100 80GB HBM3"
FIRST, SECOND, THIRD = (c.name for c in SHIPPED[:3])


def row(config: str, us: float | None, m: int = 16, n: int = 64, k: int = 128, x_format: str = "float16") -> Row:
    return Row("glu4", m, n, k, us=us, us_min=us, config=config, x_format=x_format, note="" if us else "failed: x")


@pytest.fixture(autouse=True)
def _no_packaged_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuned, "packaged_directory", lambda: tmp_path / "packaged")
    monkeypatch.setenv("GLU4_CACHE_DIR", str(tmp_path / "cache"))
    tuned.forget()


def test_every_configuration_that_fits_is_measured() -> None:
    names = [c.config for c in tune.contenders(draw(16, 64, 128, "cpu"), "float16")]
    assert names == [c.name for c in SHIPPED if 8 * c.tokens >= 16 and c.tokens <= 32]
    assert tuple(sorted(set(tune.LADDER))) == tune.LADDER
    assert (tune.LADDER[0], tune.LADDER[-1]) == (1, 4096)


@pytest.mark.parametrize("m", tune.LADDER)
def test_something_fits_every_m(m: int) -> None:
    assert tune.contenders(draw(m, 8, 16, "cpu"), "bfloat16")


def test_the_fastest_by_median_is_chosen_and_every_median_kept() -> None:
    rows = [row(FIRST, 30.0), row(SECOND, 20.0), row(THIRD, None), row(FIRST, 10.0, m=1), row(SECOND, 11.0, m=1)]
    (entry,) = tune.entries([*rows, row(FIRST, None, m=64)])
    assert entry == {
        "operation": "dual_gemm",
        "n": 64,
        "k": 128,
        "x_format": "float16",
        "m": [1, 16],
        "config": [FIRST, SECOND],
        "us": [{FIRST: 10.0, SECOND: 11.0}, {SECOND: 20.0, FIRST: 30.0}],
    }


def test_shapes_and_formats_have_entries_of_their_own() -> None:
    rows = [row(FIRST, 1.0), row(SECOND, 1.0, n=72), row(THIRD, 1.0, x_format="bfloat16")]
    assert [(e["n"], e["x_format"], e["config"]) for e in tune.entries(rows)] == [
        (64, "float16", [FIRST]),
        (72, "float16", [SECOND]),
        (64, "bfloat16", [THIRD]),
    ]


def test_a_written_table_is_read_and_extended(tmp_path: Path) -> None:
    directory = tmp_path / "cache" / "tuned"
    path = tune.write(directory, DEVICE, tune.entries([row(FIRST, 1.0), row(FIRST, 1.0, n=72)]), {"commit": "old"})
    assert path == directory / "nvidia-h100-80gb-hbm3.json"
    problems = [Problem(16, n, 128, x_format="float16") for n in (64, 72)]
    assert [tuned.best(p, DEVICE) for p in problems] == [SHIPPED[0], SHIPPED[0]]
    tune.write(directory, DEVICE, tune.entries([row(SECOND, 1.0)]), {"commit": "new"})
    assert [tuned.best(p, DEVICE) for p in problems] == [SHIPPED[1], SHIPPED[0]]
    entries = json.loads(path.read_text())["entries"]
    assert [(e["n"], e["measured"]["commit"]) for e in entries] == [(64, "new"), (72, "old")]
    assert [p.name for p in directory.iterdir()] == [path.name]


def test_a_file_that_is_no_table_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / tuned.file_name(DEVICE)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"hbm3.json: expected a table of format 1; delete it to start a new one"):
        tune.write(tmp_path, DEVICE, [], {})
    assert path.read_text() == "{}"


@given(
    st.dictionaries(
        st.tuples(st.integers(1, 5000), st.sampled_from([FIRST, SECOND, THIRD])),
        st.floats(0.5, 1e4, allow_nan=False),
        min_size=1,
        max_size=12,
    )
)
def test_what_is_read_back_is_the_fastest_of_what_was_measured(times: dict[tuple[int, str], float]) -> None:
    document = tune.merged(None, DEVICE, tune.entries([row(c, us, m=m) for (m, c), us in times.items()]), {})
    entries = tuned.parse(json.dumps(document), DEVICE)
    entry = entries["dual_gemm", 64, 128, "float16"]
    assert list(entry.m) == sorted({m for m, _ in times})
    for m, config in zip(entry.m, entry.configs):
        assert config is not None
        assert times[m, config.name] == min(us for (at, _), us in times.items() if at == m)
