"""The tables of docs/emulator.md about the comparison with an H100, made from the cases and the recording.

    PYTHONPATH=src python tests/emulator/hardware/document.py

writes them between their marks; test_hardware.py tests that they are there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from emulator.hardware.approximations import Limit, measure
from emulator.hardware.case import Case
from emulator.hardware.cases import CASES
from emulator.hardware.fixture import Recording, rows_of
from glu4.emulator.launch import emulate

__all__ = ["approximations", "families", "section"]

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "emulator.md"
FIXTURE = Path(__file__).with_name("hardware_h100.npz")
_HOW = {
    "bits": "bit for bit",
    "matrix": "within the bound of float32 accumulation",
    "approximate": "within the documented error, bit for bit at special values",
    "refused": "an illegal instruction there, a hazard here",
    "probe": "recorded only",
}
_UNDOCUMENTED = ("rcp.approx f64", "rsqrt.approx f64")


def families() -> str:
    """A row for each family: cases, instructions or kernels, and how they are compared."""
    lines = ["| family | cases | rows | compared |", "|---|---|---|---|"]
    for family in dict.fromkeys(c.family for c in CASES.values()):
        members = [c for c in CASES.values() if c.family == family]
        ways = [w for w in _HOW if any(c.compare == w for c in members)]
        counts = [f"{sum(c.compare == w for c in members)} " if len(ways) > 1 else "" for w in ways]
        how = "; ".join(n + _HOW[w] for n, w in zip(counts, ways))
        lines.append(f"| {family} | {len(members)} | {sum(max(len(c.rows), 1) for c in members)} | {how} |")
    rows = sum(max(len(c.rows), 1) for c in CASES.values())
    return "\n".join([*lines, f"| all | {len(CASES)} | {rows} | |"])


def _size(limit: Limit, error: float) -> str:
    """An error, rounded up."""
    if limit.measure == "ulp":
        return f"{math.ceil(error * 100) / 100:g} ulp"
    return f"2^{math.ceil(math.log2(error) * 100) / 100:g}" if error else "0"


def _bound(limit: Limit) -> str:
    return f"{limit.bound:g} ulp" if limit.measure == "ulp" else f"2^{math.log2(limit.bound):g}"


def approximations(hardware: Callable[[Case], np.ndarray]) -> str:
    """A row for each documented bound: the largest errors of all variants of an instruction. hardware: recorded rows."""
    worst: dict[tuple[str, str], tuple[Limit, list[float]]] = {}
    for case in CASES.values():
        if case.compare != "approximate":
            continue
        ours = rows_of(case, emulate(case.ptx, case.launch, case.inputs).buffers["out"])
        theirs = hardware(case)
        for i, text in enumerate(case.rows):
            words = text.split(".")
            name = f"{words[0]}.{words[1]} {words[-1].removesuffix('x2')}"
            for (limit, there), (_, here) in zip(measure(case, i, theirs[i]).errors, measure(case, i, ours[i]).errors):
                _, found = worst.setdefault((name, limit.where), (limit, [0.0, 0.0]))
                found[:] = [max(found[0], there), max(found[1], here)]
    lines = ["| instruction | operands | error | documented | H100 | emulator |", "|---|---|---|---|---|---|"]
    for (name, where), (limit, (there, here)) in worst.items():
        documented = "none" if name in _UNDOCUMENTED else _bound(limit)
        kind = "" if limit.measure == "ulp" else limit.measure
        operands = where.replace("|", "\\|")
        lines.append(f"| {name} | {operands} | {kind} | {documented} | {_size(limit, there)} | {_size(limit, here)} |")
    return "\n".join(lines)


def section(text: str, name: str) -> tuple[int, int]:
    """Where a table lies in the document, between its marks."""
    begin, end = f"<!-- {name}: begin -->\n\n", f"\n\n<!-- {name}: end -->"
    return text.index(begin) + len(begin), text.index(end)


def main() -> None:
    recording = Recording(FIXTURE)
    text = DOCUMENT.read_text()
    tables = {"families": families(), "approximations": approximations(lambda case: recording.whole(case.name, "out"))}
    for name, table in tables.items():
        start, stop = section(text, name)
        text = text[:start] + table + text[stop:]
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        main()
