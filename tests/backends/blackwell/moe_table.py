"""The table of kernels for mixtures of experts in docs/blackwell.md. `python -m backends.blackwell.moe_table FOLDER` writes it.

Run in tests/, with CuTe DSL and nvidia-cuda-nvdisasm installed; compiled kernels are kept in FOLDER.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from backends.blackwell import machine_code
from backends.blackwell.exported import ExportedKernel
from backends.blackwell.grouped_table import SHOWN
from backends.blackwell.moe import MoeKernels
from backends.blackwell.table import DOCUMENT
from glu4.backends.blackwell.moe_launch import shipped
from glu4.compiled.cubin import resources

BEGIN, END = "<!-- kernels of experts: begin -->\n", "<!-- kernels of experts: end -->\n"
HEAD = f"""\
| kernel | shared bytes | TMEM columns, used of allocated | registers | stack | {" | ".join(SHOWN)} |
|{"---|" * (5 + len(SHOWN))}
"""
SPECS = {spec.name: spec for spec in shipped() if spec.out == "f16"}


def table(kernels: Mapping[str, ExportedKernel]) -> str:
    """A row for each kernel; instructions are of the machine code."""
    rows = []
    for name, spec in SPECS.items():
        c, cubin = spec.config.grouped, kernels[name].cubin
        found = machine_code.counts(cubin)
        cells = [name, c.shared_bytes, f"{c.used_columns} of {c.columns}", *resources(cubin), *(found[w] for w in SHOWN)]
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |\n")
    return HEAD + "".join(rows)


def written() -> str:
    """What the document has."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]


def main() -> None:
    found = table(MoeKernels(SPECS, Path(sys.argv[1]).absolute()))
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text.split(BEGIN)[0] + BEGIN + found + END + text.split(END)[1])


if __name__ == "__main__":
    main()
