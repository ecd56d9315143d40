"""`glu4 bench`: recorded runs without a GPU, a run on a stand-in for one, and what is written when something goes wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.fake_gpu import FakeGpu, contender, right
from glu4.bench import operands as operands_module
from glu4.bench.timing import TIMED, TURNS
from glu4.cli import app

RUNNER = CliRunner()
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SECOND = RESULTS / "h200-dense-second.json"


def invoke(*arguments: str) -> Any:
    return RUNNER.invoke(app, ["bench", *arguments])


# ---- recorded runs ----


def test_a_recorded_run_is_a_line_a_shape() -> None:
    result = invoke("--from", str(SECOND))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["M,N,K", "us", "(min)", "TFLOP/s", "GB/s", "%", "limit", "x", "best", "peer"]
    # 49.69 us of cuBLAS over 45.7 of glu4; 38.06 us is the limit
    assert lines[1].split() == ["256,4096,7168", "45.7", "(42.3)", "657.4", "83", "1.09", "cublas_fp16"]
    assert len(lines) == 12
    assert lines[-1] == "NVIDIA H200, driver unknown"
    assert all(len(line) <= 80 for line in lines)


def test_several_runs_of_one_device_are_reported_as_one(tmp_path: Path) -> None:
    first = RESULTS / "h200-dense-first.json"
    lines = invoke("--from", str(SECOND), "--from", str(first)).stdout.splitlines()
    assert len(lines) == 12
    other = tmp_path / "l4.json"
    other.write_text(SECOND.read_text().replace("NVIDIA H200", "NVIDIA L4"))
    error = invoke("--from", str(SECOND), "--from", str(other)).exception
    assert str(error) == "runs of several devices, NVIDIA H200 and NVIDIA L4; report each on its own"


def test_details_name_every_kernel() -> None:
    lines = invoke("--from", str(SECOND), "--details").stdout.splitlines()
    assert "x1.09 glu4" in lines[2]
    assert sum("glu4 t" in line for line in lines) == sum(r["peer"] == "glu4" for r in json.loads(SECOND.read_text())["rows"])
    assert sum(" * " in line for line in lines) == 10


def test_json_is_the_document_with_rates() -> None:
    document = json.loads(invoke("--from", str(SECOND), "--json").stdout)
    assert document["device"] == "NVIDIA H200"
    assert document["rows"][0]["tflops"] == 605.0
    assert document["off_reference"] == []


def test_pictures_are_drawn_from_a_recorded_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the report extra")
    for name, start in (("x.png", b"\x89PNG"), ("x.html", b"<!doctype html>")):
        assert invoke("--from", str(SECOND), "--picture", str(tmp_path / name)).exit_code == 0
        assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "absent.json"], "absent.json cannot be read"),
        (["--from", str(SECOND), "--picture", "x.svg"], "picture: expected a file that ends in .png or .html, got x.svg"),
        (["--shape", "1,64"], "shape: expected M,N,K, K a multiple of 16, got '1,64'"),
        (["--shape", "1,64,100"], "shape: expected M,N,K, K a multiple of 16, got '1,64,100'"),
        (["--shape", "0,64,16"], "shape: expected M,N,K, K a multiple of 16, got '0,64,16'"),
        (["--suite", "group"], "suite: expected seed, decode, all, grouped-seed, moe, or several with commas, got 'group'"),
        (["--activation-format", "fp8"], "activation-format: expected one of float16, bfloat16, nvfp4, got 'fp8'"),
        ([], "bench times kernels on a CUDA device, and there is none; --from reports a recorded run"),
    ],
)
def test_what_cannot_run_is_one_line(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke(*arguments)
    assert isinstance(result.exception, (ValueError, RuntimeError))
    assert message in str(result.exception)


# ---- a run ----


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A machine that looks as if it had an H100, with operands on the CPU and two small shapes."""
    from glu4.bench import machine, ours, peers, run, suites, timing
    from glu4.verify.contest import DualShape

    made = FakeGpu(tick=8.0)
    draw = operands_module.draw
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "environment", lambda: {"device": "NVIDIA H100 80GB HBM3", "driver_version": "580.1"})
    monkeypatch.setattr(machine, "clocks", lambda: {"clocks.sm": "1755 MHz"})
    monkeypatch.setattr(machine, "commit", lambda: "abc1234")
    monkeypatch.setattr(timing, "Cuda", lambda: made)
    monkeypatch.setattr(timing, "COLD_BYTES", 50_000)
    monkeypatch.setattr(run, "draw", lambda m, n, k, device, seed: draw(m, n, k, "cpu", seed))
    monkeypatch.setattr(
        suites, "SUITES", {"seed": (DualShape(8, 64, 64),), "decode": (DualShape(1, 64, 64), DualShape(8, 64, 64))}
    )
    monkeypatch.setattr(ours, "contenders", lambda o, f, c: [contender("glu4", made, 0.25, specified=True, config="t8")])
    monkeypatch.setattr(
        peers, "select", lambda names: [contender("quick", made, 0.5), contender("gone", made, missing=lambda: "not here")]
    )
    return made


def test_a_run_prints_and_writes_what_it_measured(gpu: FakeGpu, tmp_path: Path) -> None:
    result = invoke("--output", str(tmp_path), "--variant", "trial")
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    assert path.name == "h100-bench-float16-trial-abc1234.json"
    document = json.loads(path.read_text())
    assert document["device"] == "NVIDIA H100 80GB HBM3"
    assert document["commit"] == "abc1234"
    assert document["left_out"] == {"gone": "not here"}
    assert [c["when"] for c in document["clocks"]] == ["before", "after 8,64,64", "after 1,64,64"]
    assert "2 turns" in document["method"]
    assert [(r["peer"], r["m"], r["commit"]) for r in document["rows"]] == [
        ("glu4", 8, "abc1234"),
        ("quick", 8, "abc1234"),
        ("glu4", 1, "abc1234"),
        ("quick", 1, "abc1234"),
    ]
    assert all(r["us"] > 0 and r["samples"] == TIMED * TURNS for r in document["rows"])
    lines = result.stdout.splitlines()
    assert lines[1].split()[0] == "8,64,64"
    assert lines[1].endswith("quick")
    assert "gone left out: not here" in lines
    assert invoke("--from", str(path)).stdout.splitlines()[:3] == lines[:3]


def test_shapes_of_ones_own_take_the_suites_place(gpu: FakeGpu, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert invoke("--shape", "2,32,48", "--shape", "3,32,48", "--output", str(path)).exit_code == 0
    assert [(r["m"], r["n"], r["k"]) for r in json.loads(path.read_text())["rows"][::2]] == [(2, 32, 48), (3, 32, 48)]


def test_grouped_suites_beside_dense_ones(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run of what runs on the H100: glu4's own grouped call on the CPU, and peers by the kind of their operands."""
    from glu4.bench import grouped, peers, run, suites, timing

    for name, value in (("WARM_UPS", 1), ("TIMED", 2), ("COLD_BYTES", 5_000)):
        monkeypatch.setattr(timing, name, value)
    cases = (grouped.GroupedShape("E3 x2 N16 K32", 16, 32, (2, 0, 2)), grouped.GroupedShape("E3 zipf", 16, 32, None, 3, 4, 2))
    monkeypatch.setattr(suites, "GROUPED_SUITES", {"moe": cases, "grouped-seed": cases[:1]})
    drawn = grouped.draw_grouped
    monkeypatch.setattr(run, "draw_grouped", lambda shape, device, seed: drawn(shape, "cpu", seed))

    def select(names: str, grouped: bool = False) -> list[Any]:
        if not grouped:
            return [contender("quick", gpu, 0.5)]
        return [contender("loop", gpu, 2.0), contender("absent", gpu, missing=lambda: "no such library")]

    monkeypatch.setattr(peers, "select", select)
    path = tmp_path / "x.json"
    result = invoke("--suite", "moe,grouped-seed", "--output", str(path), "--activation-format", "nvfp4")
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    assert [(r["case"], r["peer"], r["m"], r["experts"]) for r in document["rows"]] == [
        ("E3 x2 N16 K32", "glu4", 4, 2),
        ("E3 x2 N16 K32", "loop", 4, 2),
        ("E3 zipf", "glu4", 8, 3),
        ("E3 zipf", "loop", 8, 3),
    ]
    assert document["rows"][0]["x_format"] == "nvfp4"
    assert document["left_out"] == {"absent": "no such library"}
    assert document["clocks"][-1]["when"] == "after E3 zipf"
    lines = result.stdout.splitlines()
    assert lines[0].split()[0] == "case"
    assert [line[:26].strip() for line in lines[1:3]] == ["E3 x2 N16 K32", "E3 zipf"]
    assert lines[1].endswith("loop")
    assert invoke("--from", str(path)).stdout.splitlines()[:3] == lines[:3]
    both = json.loads(invoke("--suite", "seed,moe", "--json").stdout)
    assert [(r["peer"], r.get("case", "")) for r in both["rows"]][:3] == [
        ("glu4", ""),
        ("quick", ""),
        ("glu4", "E3 x2 N16 K32"),
    ]


@pytest.mark.parametrize("form", ["png", "html"])
def test_pictures_of_grouped_cases(form: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the report extra")
    document = json.loads(SECOND.read_text())
    for row in document["rows"]:
        row |= {"case": f"E8 {row['m']}", "experts": 8}
    (tmp_path / "in.json").write_text(json.dumps(document))
    path = tmp_path / f"x.{form}"
    assert invoke("--from", str(tmp_path / "in.json"), "--picture", str(path)).exit_code == 0
    assert path.stat().st_size > 10_000
    if form == "html":
        assert "E8 256" in path.read_text()


def test_roofs_are_measured_on_demand(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glu4.bench.machine.measured_roofs", lambda recorder: {"bandwidth": 2e12, "flops": 7e14})
    result = invoke("--suite", "seed", "--rooflines", "--output", str(tmp_path / "x.json"))
    assert json.loads((tmp_path / "x.json").read_text())["roofs"] == {"bandwidth": 2e12, "flops": 7e14}
    assert "measured in this run: copy 2.00 TB/s, bf16 matmul 700 TFLOP/s" in result.stdout


def test_a_wrong_contender_is_exit_code_1_and_in_the_document(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = contender("glu4", gpu, output=lambda o: right(o, "float16") * 2, specified=True)
    monkeypatch.setattr("glu4.bench.ours.contenders", lambda o, f, c: [wrong])
    result = invoke("--suite", "seed", "--output", str(tmp_path / "x.json"))
    assert result.exit_code == 1
    assert "glu4 was not timed" in result.stdout
    assert "glu4  at 8,64,64 wrong, so not timed: relative error 1" in result.stdout
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert (rows[0]["us"], rows[1]["peer"], rows[1]["us"] > 0) == (None, "quick", True)


def test_a_lost_device_ends_the_process_after_writing(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loses(operands: object) -> torch.Tensor:
        gpu.lost = operands.m == 1  # type: ignore[attr-defined]
        if gpu.lost:
            raise RuntimeError("unspecified launch failure")
        return right(operands, "float16")  # type: ignore[arg-type]

    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("glu4.bench.peers.select", lambda names: [contender("bad", gpu, output=loses)])
    with pytest.raises(Left, match="1"):
        invoke("--output", str(tmp_path / "x.json"))
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["lost"] == "bad took the device with it: RuntimeError: unspecified launch failure"
    assert [(r["peer"], r["m"], r["us"] is not None) for r in document["rows"]] == [
        ("glu4", 8, True),
        ("bad", 8, True),
        ("glu4", 1, False),
        ("bad", 1, False),
    ]
    assert document["rows"][2]["note"] == "not timed: the device was lost"


def test_an_output_that_has_no_place_is_refused_before_anything_is_measured(gpu: FakeGpu, tmp_path: Path) -> None:
    result = invoke("--output", str(tmp_path / "absent" / "x.json"))
    assert "absent is not a directory" in str(result.exception)
    assert gpu.now == 0


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glu4.bench import suites
    from glu4.verify.contest import DualShape

    monkeypatch.setattr(suites, "SUITES", {"seed": (DualShape(40, 256, 512),), "decode": ()})
    result = invoke("--suite", "seed", "--peers", "none", "--configs", "all", "--output", str(tmp_path / "x.json"))
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert {r["peer"] for r in rows} == {"glu4", "cublas_fp16"}
    assert all(0.5 < r["us_min"] <= r["us"] < 5000 for r in rows)
