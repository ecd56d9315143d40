"""`glu4 roofline`: the tables print the listed numbers, the JSON holds them, and bad options are one line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from glu4.cli import app

RUNNER = CliRunner()


def invoke(*arguments: str):
    return RUNNER.invoke(app, ["roofline", *arguments])


def test_the_contest_table_prints_all_eight_numbers_with_bytes_flops_and_bound():
    result = invoke()
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if "memory" in line or "compute" in line]
    rows = [row for row in rows if row[-1] in ("memory", "compute")]
    assert [row[-2] for row in rows] == ["4.708", "8.714", "2.125", "6.535", "18.833", "10.667", "2.406", "1.525"]
    assert rows[0] == ["256,4096,7168", "36,159,488", "30.065", "4.708", "4.357", "4.708", "memory"]
    assert rows[4] == ["1024,4096,7168", "(8)", "144,637,952", "60.130", "18.833", "8.714", "18.833", "memory"]
    assert all(len(line) <= 80 for line in result.stdout.splitlines()), "a table must fit a terminal of 80 columns"


def test_limit_best_public_time_and_prediction_stand_side_by_side():
    lines = invoke().stdout.splitlines()
    table = [line.split() for line in lines[next(i for i, line in enumerate(lines) if "best public time" in line) :]]
    first = next(row for row in table if row and row[0] == "256,4096,7168")
    assert first[1:3] == ["4.708", "12.4"]
    assert 4.708 < float(first[-1]) < 50
    assert "A prediction is a model's, of a kernel that has never run on a GPU." in lines
    assert "best public" in lines[next(i for i, line in enumerate(lines) if "prediction" in line and "bound by" in line)]


def test_a_shape_without_public_result_or_kernel_has_none():
    own = json.loads(invoke("--m", "64", "--n", "4096", "--k", "7168", "--json").stdout)["rows"][0]
    assert own["best_public_us"] is None
    assert own["prediction"]["config"].startswith("c")
    odd, even = (json.loads(invoke("--m", "64", "--n", "4096", "--k", k, "--json").stdout)["rows"][0] for k in ("48", "64"))
    assert odd["limit_us"] < even["limit_us"]
    assert odd["prediction"] == even["prediction"], "K is padded to a multiple of 32"
    assert "prediction" not in json.loads(invoke("--device", "h100", "--json").stdout)["rows"][0]
    assert "prediction" not in json.loads(invoke("--x", "float16", "--json").stdout)["rows"][0]


@pytest.mark.parametrize(("device", "first"), [("h100", "37.675"), ("h200", "38.057")])
def test_hopper_tables_have_ten_w4a16_shapes(device, first):
    result = invoke("--device", device)
    assert result.exit_code == 0
    assert "W4A16" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().endswith(("memory", "compute"))]
    assert len(rows) == 10
    assert rows[0][-2] == first


def test_json_holds_the_same_numbers():
    document = json.loads(invoke("--json").stdout)
    assert document["device"] == "b200-contest"
    assert [round(row["limit_us"], 3) for row in document["rows"]] == [4.708, 8.714, 2.125, 6.535, 18.833, 10.667, 2.406, 1.525]
    first = document["rows"][0]
    assert (first.pop("best_public_us"), first.pop("best_public")) == (12.4, "gau-nernst v2")
    predicted = first.pop("prediction")
    assert predicted["us"] > first["limit_us"]
    assert sum(predicted["breakdown"].values()) == pytest.approx(predicted["us"])
    assert first | {"memory_us": 0, "compute_us": 0, "limit_us": 0} == {
        "operation": "dual_gemm",
        "x_format": "nvfp4",
        "m": 256,
        "n": 4096,
        "k": 7168,
        "bytes": 36_159_488,
        "flops": 30_064_771_072,
        "memory_us": 0,
        "compute_us": 0,
        "limit_us": 0,
        "bound": "memory",
    }
    assert document["rows"][7]["m"] == [128, 384]


def test_a_shape_of_ones_own_and_a_suite():
    document = json.loads(invoke("--device", "h100", "--m", "1", "--n", "32", "--k", "48", "--x", "nvfp4", "--json").stdout)
    assert [(row["m"], row["n"], row["k"], row["x_format"]) for row in document["rows"]] == [(1, 32, 48, "nvfp4")]
    assert document["rows"][0]["bytes"] == 24 + 3 + 2 * 32 * 27 + 64
    assert len(json.loads(invoke("--suite", "seed", "--json").stdout)["rows"]) == 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "device: expected one of b200-contest, h100, h200, got 'tpu'"),
        (["--suite", "all"], "suite: expected one of seed, decode, group, got 'all'"),
        (["--m", "4"], "--m, --n, --k: give all three, each at least 1, got 4, None, None"),
        (["--m", "4", "--n", "0", "--k", "16"], "give all three, each at least 1, got 4, 0, 16"),
        (["--m", "4", "--n", "8", "--k", "17"], "k: expected a positive multiple of 16, got 17"),
        (["--m", "4", "--n", "8", "--k", "16", "--suite", "seed"], "--suite and --m, --n, --k: give one or the other"),
        (["--x", "int8"], "--x: expected nvfp4 or float16, got 'int8'"),
    ],
)
def test_bad_options_are_a_value_error_that_main_prints_as_one_line(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
