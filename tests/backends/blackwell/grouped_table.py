"""The table of grouped kernels in docs/blackwell.md. `python -m backends.blackwell.grouped_table FOLDER` writes it.

Run in tests/, with CuTe DSL and nvidia-cuda-nvdisasm installed; compiled kernels are kept in FOLDER.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from backends.blackwell import machine_code
from backends.blackwell.exported import ExportedKernel, ExportedKernels
from backends.blackwell.table import COLUMNS, DOCUMENT
from glu4.backends.blackwell.grouped_config import candidates
from glu4.backends.blackwell.grouped_spec import GroupSpec
from glu4.compiled.cubin import resources
from glu4.verify.contest import GROUP_BENCHMARKS, GROUP_TESTS

BEGIN, END = "<!-- grouped kernels: begin -->\n", "<!-- grouped kernels: end -->\n"
SHOWN = [name for name in COLUMNS if name not in ("prefetches", "TMA stores")]  # of which it has none
HEAD = f"""\
| kernel | benchmarks, tests that it runs | shared bytes | TMEM columns, used of allocated | registers | stack | {" | ".join(SHOWN)} |
|{"---|" * (6 + len(SHOWN))}
"""
DEFAULTS = {shape: GroupSpec(next(candidates(shape.sizes))) for shape in (*GROUP_BENCHMARKS, *GROUP_TESTS)}
SPECS = {spec.name: spec for spec in DEFAULTS.values()}


def table(kernels: Mapping[str, ExportedKernel]) -> str:
    """A row for each kernel; instructions are of the machine code."""
    rows = []
    for name, spec in SPECS.items():
        c, cubin = spec.config.mma, kernels[name].cubin
        found = machine_code.counts(cubin)
        runs = [sum(DEFAULTS[shape] == spec for shape in shapes) for shapes in (GROUP_BENCHMARKS, GROUP_TESTS)]
        columns = f"{c.used_columns(1)} of {c.columns(1)}"
        cells = [name, f"{runs[0]}, {runs[1]}", c.shared_bytes(1), columns, *resources(cubin), *(found[w] for w in SHOWN)]
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |\n")
    return HEAD + "".join(rows)


def written() -> str:
    """What the document has."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]


def main() -> None:
    found = table(ExportedKernels(SPECS, Path(sys.argv[1]).absolute()))
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text.split(BEGIN)[0] + BEGIN + found + END + text.split(END)[1])


if __name__ == "__main__":
    main()
