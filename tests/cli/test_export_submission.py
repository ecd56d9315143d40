"""`glu4 export-submission`, `glu4 verify --emulate` and `glu4 emulate --kernel`: arguments, exit codes, what is printed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glu4.backends.blackwell.config import candidates
from glu4.cli import app, output
from glu4.cli.tiles import config_of, shape_of
from glu4.problem import Problem
from glu4.verify.export import export

RUNNER = CliRunner()
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None or shutil.which("cc") is None, reason="needs CuTe DSL and a C compiler"
)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.console, "width", 300)


# ---- export-submission ----


def test_the_file_is_written_and_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "submission.py"
    result = RUNNER.invoke(app, ["export-submission", "--problem", "dual_gemm", "--shape-table", "default", "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_text() == export()
    assert f"glu4 verify --submission {path} --emulate" in result.stdout
    again = RUNNER.invoke(app, ["export-submission", "-o", str(path)])
    assert str(again.exception) == f"{path}: exists; --force replaces it"
    document = json.loads(RUNNER.invoke(app, ["export-submission", "-o", str(path), "--force", "--json"]).stdout)
    assert document == {"file": str(path), "problem": "dual_gemm", "shape_table": "default", "lines": export().count("\n")}


def test_the_group_problem_is_written(tmp_path: Path) -> None:
    path = tmp_path / "submission.py"
    result = RUNNER.invoke(app, ["export-submission", "--problem", "group_gemm", "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_text() == export("group_gemm")
    assert f"lines for group_gemm\ncheck it with no GPU: glu4 verify --submission {path} --emulate" in result.stdout


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    path = tmp_path / "none" / "submission.py"
    assert str(RUNNER.invoke(app, ["export-submission", "-o", str(path)]).exception) == (
        f"{path}: cannot be written (No such file or directory)"
    )
    result = RUNNER.invoke(app, ["export-submission", "--problem", "gemm", "-o", str(tmp_path / "s.py")])
    assert str(result.exception) == "problem: expected one of dual_gemm, group_gemm, got 'gemm'"
    assert not (tmp_path / "s.py").exists()


# ---- verify --emulate ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--emulate"], "--emulate, --tiles are for a submission; add --submission FILE; got --emulate"),
        (["--submission", "x.py", "--tiles", "1"], "--tiles is for --emulate; got --tiles"),
        (["--submission", "x.py", "--emulate", "--device", "cpu"], "--device is not for --emulate, which runs on the CPU"),
        (
            ["--submission", "x.py", "--emulate", "--problem", "gemm"],
            "problem: expected one of dual_gemm, group_gemm, got 'gemm'",
        ),
        (["--submission", "x.py", "--emulate"], "x.py: cannot be read"),
    ],
)
def test_options_of_verify_that_do_not_fit(arguments: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["verify", *arguments])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.slow
@needs_compiler
def test_verify_emulates_a_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import glu4.verify.emulated as emulated
    from glu4.verify.contest import DualShape

    monkeypatch.setattr(emulated, "shapes", lambda quick, problem: [DualShape(256, 512, 256)])
    path = tmp_path / "submission.py"
    path.write_text(export())
    result = RUNNER.invoke(app, ["verify", "--submission", str(path), "--emulate", "--tiles", "1", "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert "right on 1 tiles of 1 launches, and no hazard" in result.stdout
    path.write_text(export().replace("b1.data_ptr(), sfb1.data_ptr()", "b1.data_ptr(), sfb2.data_ptr()"))
    wrong = RUNNER.invoke(app, ["verify", "--submission", str(path), "--emulate", "--tiles", "1", "--json"])
    assert wrong.exit_code == 1, wrong.output
    document = json.loads(wrong.stdout)
    assert document["status"] == "wrong"
    assert document["shapes"][0]["findings"][0].startswith("rows 0 to 255, columns 0 to 63: wrong: ")


@pytest.mark.slow
@needs_compiler
def test_verify_emulates_a_group_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says which problem it is for."""
    import glu4.verify.emulated as emulated
    from glu4.verify.contest import GroupShape

    monkeypatch.setattr(emulated, "shapes", lambda quick, problem: [GroupShape(((96, 128, 256), (128, 256, 512)))])
    path = tmp_path / "submission.py"
    path.write_text(export("group_gemm"))
    result = RUNNER.invoke(app, ["verify", "--submission", str(path), "--emulate", "--tiles", "1", "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert "2 groups m 96+128, n 128+256, k 256+512" in result.stdout
    assert "right on 1 tiles of 1 launches, and no hazard" in result.stdout


# ---- emulate --kernel ----


def test_shapes() -> None:
    assert shape_of("1,2,3") == (1, 2, 3, 1)
    assert shape_of("1,2,3,4") == (1, 2, 3, 4)
    for wrong in (None, "", "1,2", "1,2,x", "1,2,0", "1,2,3,4,5"):
        with pytest.raises(ValueError, match="--shape: expected M,N,K or M,N,K,L, positive, got"):
            shape_of(wrong)


def test_configurations_are_changes_of_the_default() -> None:
    base = next(candidates(Problem(256, 4096, 7168)))
    assert config_of(None, 256, 4096, 7168, True) == config_of("default", 256, 4096, 7168, True) == base
    changed = config_of("order=by_matrix, collector=false,evict_first=True", 256, 4096, 7168, True)
    assert (changed.order, changed.collector, changed.evict_first, changed.tile_n) == ("by_matrix", False, True, base.tile_n)
    wide = config_of("tile_n=128", 256, 4096, 7168, True)
    assert wide.stages == wide.most_stages() < base.stages, "as many as fit, where none are asked for"
    assert config_of("stages=1", 256, 4096, 7168, True).gate_first == 1
    for wrong, message in (
        ("tiles=3", "expected field=value with one of ctas, tile_m"),
        ("stages=x", "--config: stages: expected int, got 'x'"),
        ("pdl=maybe", "--config: pdl: expected bool, got 'maybe'"),
        ("order=none", "order: expected one of interleaved, by_matrix, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(wrong, 256, 4096, 7168, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "sm90", "--shape", "1,2,32"], "--kernel: expected one of sm100_dual_gemm_w4a4, sm100_linear_w4a4, "
         "sm100_grouped_dual_gemm_w4a4, sm100_grouped_linear_w4a4, got 'sm90'"),
        (["--kernel", "sm100_dual_gemm_w4a4"], "--shape: expected M,N,K or M,N,K,L, positive, got None"),
        (["--kernel", "sm100_dual_gemm_w4a4", "--shape", "1,8,32", "--config", "tile_m=64,ctas=1"],
         "--config: tile_m 64: a block-scaled MMA of one CTA has 128 rows (PTX ISA, tcgen05.mma, shapes)"),
        (["--kernel", "sm100_dual_gemm_w4a4", "--shape", "1,8,32", "--ctas", "0,0"], "--ctas: options of a PTX file"),
        (["--shape", "1,8,32"], "--shape: options of --kernel"),
    ],
)  # fmt: skip
def test_options_of_emulate_that_do_not_fit(arguments: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["emulate", *arguments])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("config", ["tile_n=64,stages=2,gate_first=1", "schedule=static,tile_n=64,stages=2,ctas=1,tile_m=128",
                                    "split=2,gate_first=0,tile_n=32,ctas=1,tile_m=128,stages=2"])  # fmt: skip
def test_a_kernel_is_compiled_emulated_and_checked(config: str) -> None:
    arguments = ["emulate", "--kernel", "sm100_dual_gemm_w4a4", "--shape", "130,72,528", "--config", config]
    result = RUNNER.invoke(app, [*arguments, "--schedule", "random", "--seed", "5", "--tiles", "1", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["clean"] is True
    assert document["shape"] == [130, 72, 528, 1]
    whole = "schedule=static" in config
    assert (document["tiles"][0]["tile"] == "rows 0 to 129, columns 0 to 71") is whole, "a persistent kernel is run whole"


@pytest.mark.slow
@needs_compiler
def test_a_wrong_kernel_is_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the checker sees gate and up exchanged."""
    from dataclasses import replace

    import glu4.verify.cases as cases

    right = cases.full_range_case
    calls: list[int] = []

    def exchanged(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return right(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(cases, "full_range_case", exchanged)
    import glu4.verify.tiles as tiles

    check = tiles.check_written
    monkeypatch.setattr(tiles, "check_written", lambda case, out: check(replace(case, gate=case.up, up=case.gate), out))
    arguments = ["emulate", "--kernel", "sm100_dual_gemm_w4a4", "--shape", "64,40,256", "--schedules", "1", "--tiles", "1"]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 3, result.output
    assert "WRONG" in result.stdout
    assert calls
