"""`glu4 emulate --kernel` of the kernels for mixtures of experts."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from glu4.cli import app, experts

RUNNER = CliRunner()
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None or shutil.which("cc") is None, reason="needs CuTe DSL and a C compiler"
)
GATED, LINEAR = "sm100_grouped_dual_gemm_w4a4", "sm100_grouped_linear_w4a4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", GATED], "--shape: expected ROWS,N,K,EXPERTS, positive, got None"),
        (["--kernel", GATED, "--shape", "60,200,288"], "--shape: expected ROWS,N,K,EXPERTS, positive, got '60,200,288'"),
        (["--kernel", LINEAR, "--shape", "60,200,288,0"], "--shape: expected ROWS,N,K,EXPERTS, positive, got '60,200,288,0'"),
        (["--kernel", LINEAR, "--shape", "60,200,x,3"], "--shape: expected ROWS,N,K,EXPERTS, positive, got '60,200,x,3'"),
        (["--kernel", GATED, "--shape", "6,200,288,3", "--config", "schedule=one_wave"],
         "schedule: expected one of static, launch_control, got one_wave"),
        (["--kernel", GATED, "--shape", "6,200,288,3", "--config", "tile_m=64,ctas=1"],
         "--config: tile_m 64: a block-scaled MMA of one CTA has 128 rows"),
        (["--kernel", LINEAR, "--shape", "6,200,288,3", "--config", "gated=true"],
         "--config: grouped_linear: the kernel multiplies by gate and up"),
        (["--kernel", GATED, "--shape", "6,200,288,3", "--config", "groups=3"], "--config: expected field=value with one of ctas, "),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(arguments: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["emulate", *arguments])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


@pytest.mark.parametrize("dual", [True, False])
def test_every_expert_has_scales_and_biases_of_its_own(dual: bool) -> None:
    case = experts._case(3, (40, 24, 64, 6), dual)
    assert (case.up is None) is not dual
    assert case.group_offsets is not None
    assert case.group_offsets.tolist()[-1] == 40
    assert len(set(case.gate.global_scale.tolist())) > 1
    assert case.gate_bias is not None
    assert torch.equal(experts._case(3, (40, 24, 64, 6), dual).group_offsets, case.group_offsets)  # type: ignore[arg-type]
    assert not torch.equal(experts._case(4, (40, 24, 64, 6), dual).group_offsets, case.group_offsets)  # type: ignore[arg-type]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "config"),
    [(GATED, "ctas=1,tile_m=128,stages=2"), (LINEAR, "schedule=launch_control,tile_n=64,stages=2,pdl=true")],
)
def test_a_kernel_is_compiled_emulated_and_checked(kernel: str, config: str) -> None:
    arguments = ["emulate", "--kernel", kernel, "--shape", "45,200,272,6", "--config", config]
    result = RUNNER.invoke(app, [*arguments, "--schedule", "random", "--seed", "5", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["clean"] is True
    assert document["shape"] == [45, 200, 272, 6]
    assert document["kernel"].startswith(kernel)
    assert document["config"]["gated"] is (kernel == GATED)
    assert [row["tile"] for row in document["tiles"]] == ["tiles numbered", "45 rows of 6 of 6 experts"]


@pytest.mark.slow
@needs_compiler
def test_a_wrong_kernel_is_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: of two experts that have rows, each is checked against the other's global scale."""
    from glu4.verify import checker

    check = checker.check

    def exchanged(case: Any, out: torch.Tensor) -> Any:
        gate = replace(case.gate, global_scale=case.gate.global_scale.roll(1))
        return check(replace(case, gate=gate), out)

    monkeypatch.setattr(checker, "check", exchanged)
    arguments = ["emulate", "--kernel", LINEAR, "--shape", "9,40,64,2", "--schedules", "1"]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 3, result.output
    assert "WRONG" in result.stdout
