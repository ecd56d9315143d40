"""The recorded digests: inputs are the same bits on every machine, outputs on a Hopper GPU those that were recorded."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from glu4.backends.hopper.config import SHIPPED
from glu4.backends.hopper.spec import SOURCES
from glu4.compiled.sources import source_hash
from gpu.harness import Target

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def digests() -> ModuleType:
    spec = importlib.util.spec_from_file_location("glu4_benchmarks_digests", ROOT / "benchmarks" / "digests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_inputs_are_the_recorded_ones(digests: ModuleType) -> None:
    recorded = json.loads((RESULTS / "digest-inputs.json").read_text())
    assert recorded.keys() == {case.name for case in digests.CASES}
    for case in digests.CASES:
        if case.m * case.k < 300_000:  # the large ones are compared on the GPU machine
            assert digests.inputs(case).digest == recorded[case.name], case.name


def test_any_bit_of_an_input_changes_its_digest(digests: ModuleType) -> None:
    made = digests.inputs(digests.Case(9, 136, 1040, "nvfp4", "float16"))
    parts = [p for t in (made.x, made.gate, made.up) for p in digests._parts(t)]
    before = digests.digest(*parts)
    for part in parts:
        raw = part.reshape(-1).view(torch.uint8)
        raw[-1] ^= 1
        assert digests.digest(*parts) != before
        raw[-1] ^= 1
    assert digests.digest(*parts) == before


def test_inputs_hold_the_whole_format(digests: ModuleType) -> None:
    made = digests.inputs(digests.Case(37, 264, 528, "bfloat16", "bfloat16"))
    assert set(made.gate.codes.flatten().tolist()) == set(range(256))
    assert set(made.gate.block_scale.view(torch.uint8).flatten().tolist()) == set(range(127))
    assert float(made.gate.global_scale) != float(made.up.global_scale)
    assert 2.0**-6 <= float(made.x.abs().min()) < float(made.x.abs().max()) < 4
    assert 0.4 < float((made.x < 0).float().mean()) < 0.6


def document(**changes: Any) -> dict[str, Any]:
    row = {"case": "c", "operation": "linear", "config": "t8", "finite": True, "sha256": "1"}
    return {"inputs": {"c": "a"}, "rows": [{**row, **changes}]}


def test_differences_are_named(digests: ModuleType) -> None:
    same, other = document(), document(sha256="2")
    assert digests.differences(same, document()) == []
    assert digests.differences(same, other) == ["c linear t8: 1 recorded, 2 found"]
    assert digests.differences(same, document(config="t16")) == [
        "c linear t16: nothing recorded, 1 found",
        "c linear t8: 1 recorded, nothing found",
    ]
    other = {**document(), "inputs": {"c": "b"}}
    assert digests.differences(same, other) == ["inputs of c: a recorded, b found"]


def test_every_configuration_is_recorded(digests: ModuleType) -> None:
    run = {config for case in digests.CASES for config in digests.runnable(case)}
    assert run == set(SHIPPED)


def test_outputs_are_the_recorded_ones(hopper: Target, digests: ModuleType) -> None:
    file = RESULTS / "h100-digests.json"
    if not file.exists():
        pytest.skip(f"{file.name} is not recorded yet")
    recorded = json.loads(file.read_text())
    if recorded["kernel_sources"] != source_hash(SOURCES)[:16]:
        pytest.skip(f"{file.name} was recorded for other kernel sources; run benchmarks/digests.py --output again")
    assert digests.differences(recorded, digests.document(hopper.device, "")) == []


def test_a_row_has_the_same_bits_alone(hopper: Target, digests: ModuleType) -> None:
    assert digests.rows_alone(hopper.device) == dict.fromkeys((c.name for c in SHIPPED), True)
