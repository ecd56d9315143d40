"""The emulator against an H100: each case of tests/emulator/hardware gives the outputs that were recorded there."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emulator.hardware.approximations import measure
from emulator.hardware.case import Case
from emulator.hardware.cases import CASES
from emulator.hardware.document import DOCUMENT, approximations, families, section
from emulator.hardware.fixture import Recording, fingerprint, rows_of, save
from glu4.emulator.launch import Result, emulate
from glu4.emulator.matrix import accumulation_bound

FIXTURE = Path(__file__).with_name("hardware") / "hardware_h100.npz"
needs_recording = pytest.mark.skipif(not FIXTURE.exists(), reason="no recording")


@cache
def recording() -> Recording:
    return Recording(FIXTURE)


def run(case: Case, ptx: str = "", **changed: np.ndarray) -> Result:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        return emulate(ptx or case.ptx, case.launch, {**case.inputs, **changed})


def named(compare: str) -> Any:
    return pytest.mark.parametrize("name", [c.name for c in CASES.values() if c.compare == compare])


@needs_recording
def test_every_case_was_recorded_as_it_is_now() -> None:
    failures = recording().failures
    assert failures.keys() == {c.name for c in CASES.values() if c.compare == "refused"}
    assert all("ILLEGAL_INSTRUCTION" in why for why in failures.values())
    assert "H100" in recording().meta["device"]
    assert recording().fingerprints == {name: fingerprint(case) for name, case in CASES.items()}


@needs_recording
@named("bits")
def test_bits(name: str) -> None:
    case = CASES[name]
    result = run(case)
    assert result.report.clean, str(result.report)
    wrong = [line for buffer in case.outputs for line in recording().differences(case, buffer, result.buffers[buffer])]
    assert not wrong, "\n".join(wrong)


@named("refused")
def test_what_hardware_refuses_is_reported(name: str) -> None:
    hazards = run(CASES[name]).report.hazards
    assert hazards[0].kind == "tensor copy"
    assert hazards[0].message.startswith("coordinates: ")


def magnitudes(case: Case) -> np.ndarray:
    """Sums of absolute values: the same products of operands without their signs."""
    found = {}
    for name, array in case.inputs.items():
        bits = array.view(f"u{array.itemsize}")
        found[name] = (bits & bits.dtype.type((1 << 8 * array.itemsize - 1) - 1)).view(array.dtype)
    return run(case, **found).buffers["out"].astype(np.float64)


@needs_recording
@named("matrix")
def test_products(name: str) -> None:
    case = CASES[name]
    result = run(case)
    assert result.report.clean, str(result.report)
    got = result.buffers["out"]
    hardware = recording().whole(name, "out").view(got.dtype).reshape(got.shape)
    assert (np.abs(hardware.astype(np.float64) - got.astype(np.float64)) <= bound(case)).all()


def bound(case: Case) -> np.ndarray:
    """How far two results may be apart, the emulator's being exact but for its last rounding."""
    size = magnitudes(case)
    limit = accumulation_bound(size, case.extra["additions"])
    if case.extra["d_type"] == "f16":
        # D is rounded to float16 after each instruction of K: half a unit in the last place, on both sides
        limit = limit + case.extra["roundings"] * 2 * np.maximum(size * 2.0**-11, 2.0**-25)
    return limit + size * 2.0**-24


@needs_recording
@named("approximate")
def test_approximations(name: str) -> None:
    """Hardware and emulator within the documented error; equal where the result is special."""
    case = CASES[name]
    result = run(case)
    assert result.report.clean, str(result.report)
    rows = rows_of(case, result.buffers["out"])
    hardware = recording().whole(name, "out")
    for i, text in enumerate(case.rows):
        ours, theirs = measure(case, i, rows[i]), measure(case, i, hardware[i])
        for limit, worst in (*ours.errors, *theirs.errors):
            assert worst <= limit.bound, (text, limit.where, worst)
        width = f"u{rows.nbytes // rows.shape[0] // ours.special.size}"
        mine, other = rows[i].view(width)[ours.special], hardware[i].view(width)[ours.special]
        assert mine.tolist() == other.tolist(), text


@needs_recording
def test_the_document_has_its_tables() -> None:
    text = DOCUMENT.read_text()
    with np.errstate(all="ignore"):
        tables = {"families": families(), "approximations": approximations(lambda c: recording().whole(c.name, "out"))}
    for name, table in tables.items():
        start, stop = section(text, name)
        assert text[start:stop] == table, f"{name}: run tests/emulator/hardware/document.py"


# the comparison itself


def stored(tmp_path: Path, case: Case, outputs: dict[str, np.ndarray]) -> Recording:
    path = tmp_path / "recording.npz"
    save(path, {"device": "none"}, CASES, {case.name: outputs}, {})
    return Recording(path)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("float/fma-f32-f32-f32-32", "fma.rz.f32", "fma.rn.f32"),
        ("integer/shift-i32-c32-32", "shr.s32", "shr.u32"),
        ("warp/shfl", "0x181f", "0x1f"),
        ("tensor/load-64B-f16", "mov.s32 %x1, 5", "mov.s32 %x1, 6"),
        ("wgmma/layout-b-mn-64B", "%db, %s, 0", "%db, %s, 1"),
    ],
)
def test_a_fault_is_found(tmp_path: Path, name: str, old: str, new: str) -> None:
    case = CASES[name]
    assert old in case.ptx
    kept = stored(tmp_path, case, {b: run(case).buffers[b] for b in case.outputs})
    assert kept.fingerprints[name] == fingerprint(case)
    for ptx in (case.ptx, case.ptx.replace(old, new)):
        lines = [line for b in case.outputs for line in kept.differences(case, b, run(case, ptx).buffers[b])]
        assert bool(lines) == (ptx != case.ptx)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    for name in ("convert/tf32", "shared/mbarrier-counts", "cluster/shared-2"):
        case = CASES[name]
        output = run(case).buffers["out"]
        kept = stored(tmp_path, case, {"out": output})
        changed = output.copy()
        changed.reshape(-1).view(np.uint8)[changed.nbytes // 3] ^= 4
        assert not kept.differences(case, "out", output)
        assert len(kept.differences(case, "out", changed)) == 1
