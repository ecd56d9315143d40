"""Public times: where they stand, what the model is fitted to, and how well it orders the others."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glu4.backends.blackwell.config import legal
from glu4.bench.devices import device
from glu4.bench.model_sm100 import RATES
from glu4.bench.published_sm100 import (
    ABLATIONS,
    CALIBRATION,
    HELD_OUT,
    TEMPLATE_US,
    Agreement,
    best_public,
    calibrate,
    evaluate,
    prediction,
    spearman,
)
from glu4.bench.roofline import limit
from glu4.bench.suites import dual_problem, group_problems
from glu4.verify.contest import DUAL_BENCHMARKS, GROUP_BENCHMARKS, DualShape

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "model-sm100.json"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "model_sm100.py"
DOCUMENT = Path(__file__).parents[2] / "docs" / "model-sm100.md"


def script() -> Any:
    """benchmarks/model_sm100.py, which records and writes the tables."""
    spec = importlib.util.spec_from_file_location("record_model_sm100", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def agreement() -> Agreement:
    return evaluate()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def test_best_public_times_are_the_fastest_of_each_shape() -> None:
    assert [best_public(s) for s in DUAL_BENCHMARKS] == [
        (12.4, "gau-nernst v2"), (15.3, "guaguabear"), (9.43, "gau-nernst v2"), (14.4, "guaguabear"),
    ]  # fmt: skip
    assert [best_public(s) for s in GROUP_BENCHMARKS] == [(us, "gau-nernst group v6b") for us in (27.9, 19.4, 8.48, 6.43)]
    assert best_public(DualShape(1, 4096, 7168)) is None


@pytest.mark.parametrize("kernel", [*CALIBRATION, *HELD_OUT, *ABLATIONS], ids=lambda k: k.name)
def test_every_public_kernel_is_a_legal_configuration_and_slower_than_the_limit(kernel: Any) -> None:
    for i, (us, config) in enumerate(zip(kernel.us, kernel.configs, strict=True)):
        problems = kernel.problems(i)
        assert all(legal(config, p) is None for p in problems)
        assert us > limit(problems, device("b200-contest")).time_s * 1e6
        listed = dual_problem(DUAL_BENCHMARKS[i]), *group_problems(GROUP_BENCHMARKS[i])
        work = sum(p.flops for p in (listed[1:] if kernel.group else listed[:1]))
        assert sum(p.flops for p in problems) == work, "exchanged or not, a kernel's problem is the listed one"


def test_nothing_held_out_is_calibrated_on() -> None:
    assert not {k.name for k in CALIBRATION} & {k.name for k in HELD_OUT}
    assert not {k.us for k in CALIBRATION} & {k.us for k in HELD_OUT}


def test_calibrated_rates_are_the_fit() -> None:
    rates, template = calibrate()
    assert rates.launch_us == pytest.approx(RATES.launch_us, rel=2e-3)
    assert rates.latency_us == pytest.approx(RATES.latency_us, rel=2e-3)
    assert template == pytest.approx(TEMPLATE_US, rel=2e-3)


def test_rank_correlation_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(1 - 6 * 2 / (3 * 8))
    assert spearman([1, 1, 2], [5, 6, 7]) == pytest.approx(np.corrcoef([0.5, 0.5, 2], [0, 1, 2])[0, 1])
    with pytest.raises(ValueError, match="at least two different values"):
        spearman([1, 1], [1, 2])


def test_the_recorded_agreement_is_what_the_model_gives(agreement: Agreement, record: dict[str, Any]) -> None:
    found = record["held_out"]
    assert found["rho"] == pytest.approx(agreement.rho, abs=5e-4)
    assert (found["ordered"], found["pairs"]) == (agreement.ordered, agreement.pairs)
    assert (found["ordered_of_shape"], found["pairs_of_shape"]) == (agreement.ordered_of_shape, agreement.pairs_of_shape)
    recorded = {(p["kernel"], p["shape"]): p["predicted_us"] for p in found["points"]}
    assert recorded == pytest.approx({p[:2]: p[3] for p in agreement.points}, abs=6e-3)


def test_the_document_has_the_recorded_numbers(record: dict[str, Any]) -> None:
    text = DOCUMENT.read_text()
    for name, table in script().tables(record).items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        assert text.split(begin)[1].split(end)[0] == table


def test_the_recorded_sensitivity_is_what_the_model_gives(record: dict[str, Any]) -> None:
    """A rate that is wrong on purpose: most show as pairs out of order, the tensor core's being too fast and the launch do not."""
    rows = {row["rates"]: row for row in record["sensitivity"]}
    assert script().sensitivity() == list(rows.values())
    right = rows.pop("as calibrated")
    unseen = {name for name, row in rows.items() if row["ordered"] >= right["ordered"]}
    assert unseen == {"tensor core twice as fast", "launches for nothing"}
    assert all(row["mean_error"] > right["mean_error"] for row in rows.values())


def test_predictions_of_benchmark_shapes_name_their_configuration() -> None:
    found, name = prediction(DUAL_BENCHMARKS[0])
    assert name == "c2m256n64k256s7isl32g3ae"
    assert found.us > 4.708
    group, name = prediction(GROUP_BENCHMARKS[0])
    assert name.startswith("c2m256n128")
    assert group.us > 18.833
