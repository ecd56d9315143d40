"""The table of docs/blackwell.md: what was compiled. `python -m backends.blackwell.table FOLDER` writes it.

Run in tests/, with CuTe DSL and nvidia-cuda-nvdisasm installed; compiled kernels are kept in FOLDER.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from backends.blackwell import machine_code
from backends.blackwell.kernels import DEFAULTS, KERNELS, Kernels
from glu4.backends.blackwell.config import candidates
from glu4.backends.blackwell.emulation import Exported
from glu4.backends.blackwell.spec import KernelSpec
from glu4.compiled.cubin import resources
from glu4.problem import Problem

DOCUMENT = Path(__file__).parents[3] / "docs" / "blackwell.md"
BEGIN, END = "<!-- kernels: begin -->\n", "<!-- kernels: end -->\n"
COLUMNS = ("TMA loads", "prefetches", "TMA stores", "scale copies", "MMAs", "TMEM loads", "stores of 16 bytes")
HEAD = f"""\
| kernel | shared bytes | TMEM columns, used of allocated | registers | stack | {" | ".join(COLUMNS)} |
|{"---|" * (5 + len(COLUMNS))}
"""
# what is compiled ahead, in fp16: `candidates` of a shape are these in another order
_CHOSEN = [
    KernelSpec(config, "f16", operation == "dual_gemm")
    for operation in ("dual_gemm", "linear")
    for config in candidates(Problem(256, 4096, 7168, operation=operation))
]
SPECS: dict[str, KernelSpec] = {
    **{name: spec for name, (spec, _) in KERNELS.items()},
    **{spec.name: spec for spec in (*DEFAULTS.values(), *_CHOSEN)},
}


def table(kernels: Mapping[str, Exported]) -> str:
    """A row for each kernel; instructions are of the machine code."""
    rows = []
    for kernel in (kernels[name] for name in kernels):
        c, weights = kernel.spec.config, kernel.spec.weights
        found = machine_code.counts(kernel.cubin)
        columns = f"{c.used_columns(weights)} of {c.columns(weights)}"
        cells = [kernel.spec.name, c.shared_bytes(weights), columns, *resources(kernel.cubin), *(found[w] for w in COLUMNS)]
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |\n")
    return HEAD + "".join(rows)


def written() -> str:
    """What the document has."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]


def main() -> None:
    found = table(Kernels(SPECS, Path(sys.argv[1]).absolute()))
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + found + END + after)


if __name__ == "__main__":
    main()
