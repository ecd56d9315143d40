"""Seeded faults in good kernels: each is found, by the class that names it, under every schedule tried."""

from __future__ import annotations

import json

import pytest

from emulator.mutations import record_sentryward, table
from emulator.mutations.edits import EditError, drop, field, replace
from emulator.mutations.faults import FAULTS, Fault
from emulator.mutations.judge import mutant, named
from emulator.mutations.kernels import kernel, names
from emulator.test_divergence import SCHEDULES

QUICK = SCHEDULES[:3]  # eager, lazy, one random


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.key)
def test_every_fault_is_found_by_the_class_that_names_it(fault: Fault) -> None:
    recorded = json.loads(table.RECORD.read_text())[fault.key]
    broken = mutant(fault)
    for schedule, seed in QUICK:
        found = named(fault, schedule, seed, broken)
        assert found, f"{schedule}, seed {seed}: none of {', '.join(fault.names)}"
        if schedule == "eager":
            assert found == recorded["eager 0"], "record again: tests/emulator/mutations/table.py"


def test_the_suite_covers_what_it_should() -> None:
    assert len({fault.key for fault in FAULTS}) == len(FAULTS) >= 40
    assert {fault.kernel for fault in FAULTS} <= set(names())
    assert len({fault.kernel for fault in FAULTS}) >= 4
    text = "\n".join(fault.name for fault in FAULTS)
    for word in ("wait::ld", "wait::st", "wait_group", "griddepcontrol.wait", "commit", "fence.proxy.async", "before_thread_sync",
                 "after_thread_sync", "fence.mbarrier_init", "wgmma.fence", "no arrival", "cluster.arrive", "half the bytes",
                 "twice the bytes", "parity", "swizzle", "scale column", "N halved", "M 128", "scale factor id", "stride offset",
                 "leading offset", "overlap", "dealloc", "initialised twice", "early store", "multicast mask", "swapped",
                 "fewer columns", "wrong mbarrier"):  # fmt: skip
        assert word in text, word


def test_the_record_and_the_table_are_current() -> None:
    recorded = json.loads(table.RECORD.read_text())
    assert list(recorded) == [fault.key for fault in FAULTS]
    schedules = [f"{name} {seed}" for name, seed in table.SCHEDULES]
    for fault in FAULTS:
        assert list(recorded[fault.key]) == schedules
        assert all(set(found) <= set(fault.names) for found in recorded[fault.key].values())
        assert any(recorded[fault.key].values())
    verdicts = json.loads(table.VERDICTS.read_text())
    assert list(verdicts["faults"]) == list(recorded)
    assert set(verdicts["kernels"]) == {fault.kernel for fault in FAULTS}
    text = table.DOCUMENT.read_text()
    assert table.document(text) == text, "write it: python tests/emulator/mutations/table.py --write"


def test_a_good_kernel_is_right_and_a_wrong_result_is_not() -> None:
    good = kernel("triton_gemm_specialized")
    result = good.run()
    assert result.report.clean
    assert good.right(result.buffers)
    tile = result.buffers["C"]
    tile[-1, -1] *= -1
    assert not good.right(result.buffers)
    tile[-1, -1] *= -1
    assert good.right(result.buffers)
    tile[0, 0] = 0  # outside the cluster's tile
    assert not good.right(result.buffers)


def test_the_input_of_the_static_verifier_says_what_the_launch_says() -> None:
    described = record_sentryward.describe(kernel("cute_gemm_pair"))
    assert described["entry"] == "block_scaled_gemm_pair"
    assert described["launch"]["grid_dim"] == described["launch"]["cluster_dim"] == [2, 1, 1]
    assert [d["object"] for d in described["tma_descriptors"]] == ["A", "SCALE_A", "B", "SCALE_B"]
    assert described["tma_descriptors"][0]["swizzle"] == "128B"
    assert [d["object"] for d in described["declarations"]] == ["C"]
    values = {a["parameter"]: (a["type"], a["value"]) for a in described["arguments"]}
    assert values["block_scaled_gemm_pair_param_15"] == ("u32", 768)
    assert "block_scaled_gemm_pair_param_0" not in values  # a structure


def test_edits_that_do_not_fit_are_errors() -> None:
    with pytest.raises(EditError, match="matches 0 times, expected 1"):
        replace("absent", "new")("text")
    with pytest.raises(EditError, match="matches 2 times, expected 1"):
        replace("a", "b")("a a")
    with pytest.raises(EditError, match="changes nothing"):
        replace("a", "a")("a")
    assert replace("a", "b", 1, 2)("a a") == "a b"
    assert replace("a", "b", None, 2)("a a") == "b b"
    assert drop(r"bar\.sync")("@%p1 bar.sync 0, 64; ret;") == " ret;"
    launch = {"params": [{"u32": 1}]}
    with pytest.raises(EditError, match="is 1, expected 2"):
        field(("params", 0, "u32"), 2, 3)(launch)
    with pytest.raises(EditError, match="there is no 'tensor_map'"):
        field(("params", 0, "tensor_map", "swizzle"), 2, 3)(launch)
    field(("params", 0, "u32"), 1, 3)(launch)
    assert launch == {"params": [{"u32": 3}]}
