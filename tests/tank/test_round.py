"""Round files: what they say, and every wrong one refused with file, line and field."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glu4.tank.kernels import config_of, refusal
from glu4.tank.round import RoundError, find, parse, read, shipped

GOOD = """\
title = "Tiles"
device = "h100"
shapes = [[256, 4096, 7168], [1, 64, 128]]

[baseline]
config = { tokens = 128, rows = 2 }

[[entries]]
name = "a"
hypothesis = "h"
claimed_speedup = 1.5
config = { tokens = 64 }

[[entries]]
name = "b"
hypothesis = "h"
[entries.config]
rows = 1
"""


def test_a_round_says_what_is_run():
    r = parse(GOOD, Path("x/tiles.toml"))
    assert (r.name, r.device, r.backend, r.x_format) == ("tiles", "h100", "hopper", "float16")
    assert r.shapes == ((256, 4096, 7168), (1, 64, 128))
    assert dict(r.entries[0].whole.fields) == {"tokens": 64, "rows": 2}
    assert dict(r.entries[1].whole.fields) == {"tokens": 128, "rows": 1}
    assert str(r.entries[0].change) == "tokens = 64"
    assert r.entries[0].claimed_speedup == 1.5
    assert [p.m for p in r.problems()] == [256, 1]
    assert parse(GOOD + "\n", Path("x/tiles.toml")).digest != r.digest


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "Tiles"', "title = ", r"x\.toml, line 1: not TOML"),
        ('title = "Tiles"\n', "", r"line 1: title: missing"),
        ('title = "Tiles"', "title = 3", r"line 1: title: expected text, got a whole number"),
        ('device = "h100"', 'device = "h900"', r"line 2: device: expected one of cpu, h100, h200, b200, got 'h900'"),
        ("shapes = [[256", 'suite = "seed"\nshapes = [[256', r"line 3: suite: expected one of suite and shapes"),
        ("shapes = [[256, 4096, 7168], [1, 64, 128]]", 'suite = "none"', r"line 3: suite: expected one of seed, decode"),
        ("[1, 64, 128]]", "[1, 64, 127]]", r"line 3: shapes\[1\]: .*127"),
        ("[1, 64, 128]]", "[1, 64]]", r"line 3: shapes\[1\]: expected \[M, N, K\]"),
        ("[[256, 4096, 7168], [1, 64, 128]]", "[]", r"line 3: shapes: expected at least one"),
        ('device = "h100"', 'device = "h100"\nspeed = 1', r"line 3: speed: unknown; known: name, title"),
        ('device = "h100"', 'device = "h100"\npairs = 1', r"line 3: pairs: expected a whole number from 5"),
        ('device = "h100"', 'device = "h100"\ntime_limit = -1', r"line 3: time_limit: expected a positive number"),
        ('device = "h100"', 'device = "h100"\nmemory_gib = true', r"line 3: memory_gib: expected a positive number"),
        ("[baseline]\nconfig", "[baselines]\nconfig", r"line 5: baselines: unknown"),
        ("rows = 2 }", "rows = 9 }", r"line 6: baseline.config: rows x k_groups"),
        ("tokens = 128, ", "", r"line 6: baseline.config: tokens: missing"),
        ("claimed_speedup = 1.5", "claimed_speedup = 0", r"line 11: entries\[0\].claimed_speedup: expected a positive"),
        ("claimed_speedup = 1.5", "claimed_speedup = inf", r"line 11: entries\[0\].claimed_speedup: expected a positive"),
        ("tokens = 64", "tile = 64", r"line 12: entries\[0\].config.tile: no field of the hopper Config; known: tokens"),
        ("tokens = 64", 'tokens = "64"', r"line 12: entries\[0\].config.tokens: expected a whole number, got text"),
        ("rows = 1", "rows = 1.5", r"line 18: entries\[1\].config.rows: expected a whole number, got a number"),
        ('name = "b"', 'name = "a"', r"line 15: entries\[1\].name: 'a' is the name of an entry before it"),
        ('name = "b"', 'name = " "', r"line 15: entries\[1\].name: expected some text"),
        ("config = { tokens = 64 }", "", r"line 8: entries\[0\]: expected one of config, kernel, submission, got none"),
        ("config = { tokens = 64 }", 'kernel = "no.py"', r"line 12: entries\[0\].kernel: no.py: cannot be read"),
        ("config = { tokens = 64 }", 'submission = "no.py"', r"line 12: entries\[0\].submission: .*must be \"nvfp4\""),
    ],
)
def test_a_wrong_round_is_refused_with_line_and_field(old, new, message):
    assert GOOD.count(old) == 1
    with pytest.raises(RoundError, match=message):
        parse(GOOD.replace(old, new), Path("x.toml"))


def test_a_round_without_entries_and_a_file_that_is_none_are_refused(tmp_path):
    head = GOOD.partition("[[entries]]")[0]
    with pytest.raises(RoundError, match=r"entries: missing"):
        parse(head, Path("x.toml"))
    with pytest.raises(RoundError, match=r"entries: expected at least one"):
        parse("entries = []\n" + head, Path("x.toml"))
    (tmp_path / "x.toml").write_bytes(b"\xff")
    with pytest.raises(RoundError, match=r"x\.toml: cannot be read \(it is not UTF-8"):
        read(tmp_path / "x.toml")
    with pytest.raises(RoundError, match=r"nothing: no such round file; .*stages-hopper"):
        find("nothing")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_cut_out_the_file_is_read_or_refused_by_name(data):
    start = data.draw(st.integers(0, len(GOOD)))
    end = data.draw(st.integers(start, min(len(GOOD), start + 40)))
    try:
        parse(GOOD[:start] + data.draw(st.text(max_size=3)) + GOOD[end:], Path("cut.toml"))
    except RoundError as error:
        assert str(error).startswith("cut.toml, line ")


@pytest.mark.parametrize("name", shipped())
def test_shipped_rounds_are_read_and_only_known_entries_break_a_rule(name):
    r = read(find(name))
    broken = set()
    for entry in r.entries:
        if entry.whole.kind == "config":
            try:
                reason = refusal(config_of(r.backend, entry.whole.fields), r.problems())
            except ValueError as error:
                reason = str(error)
            broken |= {entry.name} if reason else set()
    expected = {"stages-hopper": {"1 stage"}, "tiles-hopper": {"48 tokens"}, "tiles-blackwell": {"(64, 128, 256)"}}
    assert broken == expected.get(name, set())
