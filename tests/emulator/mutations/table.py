"""The table of faults in docs/emulator.md: recorded runs of the emulator, with SentryWard's verdicts beside them.

PYTHONPATH=src:tests python tests/emulator/mutations/table.py --record   # run every fault under every schedule
PYTHONPATH=src:tests python tests/emulator/mutations/table.py --write    # write the table into the docs
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from emulator.mutations.faults import FAULTS, NUMBERS, Fault
from emulator.mutations.judge import mutant, named

__all__ = ["RECORD", "SCHEDULES", "document", "render"]

FIXTURES = Path(__file__).parent.parent / "fixtures"
RECORD, VERDICTS = FIXTURES / "mutations.json", FIXTURES / "sentryward.json"
DOCUMENT = Path(__file__).parents[3] / "docs" / "emulator.md"
BEGIN, END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"
SCHEDULES = (("eager", 0), ("lazy", 0), *(("random", seed) for seed in range(1, 9)))


def record(fault: Fault) -> dict[str, list[str]]:
    """Schedule to the classes that named the fault."""
    broken = mutant(fault)
    return {f"{name} {seed}": named(fault, name, seed, broken) for name, seed in SCHEDULES}


def _verdict(fault: Fault, verdicts: dict[str, Any]) -> tuple[str, str]:
    """(missed, found, stops or not checked; SentryWard's word in the table)."""
    said, good = str(verdicts["faults"][fault.key]), str(verdicts["kernels"][fault.kernel])
    word, _, code = said.partition(": ")
    if word == "race_free":
        return "missed", "missed"
    if said == good:  # what it says of the good kernel, too
        return "not checked", "not checked"
    if code:
        return "stops", f"stops: {code.replace('_', ' ')}"
    return "found", word.replace("_", " ")


def render() -> str:
    """The table and what it sums up to."""
    recorded: dict[str, dict[str, list[str]]] = json.loads(RECORD.read_text())
    verdicts = json.loads(VERDICTS.read_text())
    rows = []
    counts: dict[str, int] = {}
    silent = 0  # missed faults that break no rule
    for fault in FAULTS:
        runs = recorded[fault.key]
        found = [classes for classes in runs.values() if classes]
        classes = sorted({name for run in found for name in run})
        kind, said = _verdict(fault, verdicts)
        counts[kind] = counts.get(kind, 0) + 1
        silent += kind == "missed" and classes == [NUMBERS]
        rows.append(f"| {fault.name} | {fault.kernel} | {', '.join(classes)} | {len(found)} of {len(runs)} | {said} |")
    every = sum(all(runs.values()) for runs in recorded.values())
    kernels = sorted({fault.kernel for fault in FAULTS})
    lines = [
        f"{len(FAULTS)} faults in {len(kernels)} kernels, each run under {len(SCHEDULES)} schedules (eager, lazy, eight random "
        f"ones); {every} are found under every one. SentryWard {verdicts['version']} finds {counts.get('found', 0)}, stops with a "
        f"diagnostic at {counts.get('stops', 0)} more, misses {counts.get('missed', 0)} ({silent} of them wrong numbers, which it "
        f"cannot see without a reference), and does not check {counts.get('not checked', 0)}, in kernels that it does not take when "
        "they are good.",
        "",
        "| fault | kernel | detected by | schedules | SentryWard |",
        "|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def document(text: str) -> str:
    """The document with the table between its marks. Raises ValueError where they are missing."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"{DOCUMENT.name}: the marks of the table are missing")
    return before + BEGIN + "\n" + render() + "\n" + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--record", action="store_true", help="run every fault and store what found it")
    parser.add_argument("--write", action="store_true", help="write the table into the docs")
    parser.add_argument("--only", default="", help="with --record: only faults whose kernel and name hold this")
    given = parser.parse_args()
    if given.record:
        chosen = [fault for fault in FAULTS if given.only in fault.key]
        known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        with ProcessPoolExecutor(2) as pool:
            known |= dict(zip((fault.key for fault in chosen), pool.map(_record_key, (fault.key for fault in chosen))))
        rows = [f"{json.dumps(fault.key)}: {json.dumps(known[fault.key])}" for fault in FAULTS]
        RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    if given.write:
        DOCUMENT.write_text(document(DOCUMENT.read_text()))


def _record_key(key: str) -> dict[str, list[str]]:
    return record(next(fault for fault in FAULTS if fault.key == key))  # edits are functions, which do not travel


if __name__ == "__main__":
    main()
