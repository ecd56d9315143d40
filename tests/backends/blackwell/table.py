"""The table of docs/blackwell.md: what was compiled, from PTX and cubin. `python -m backends.blackwell.table` writes it.

Run in tests/, with CuTe DSL installed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from backends.blackwell.kernels import DEFAULTS, KERNELS
from glu4.backends.blackwell.emulation import Exported, export
from glu4.compiled.cubin import resources

DOCUMENT = Path(__file__).parents[3] / "docs" / "blackwell.md"
BEGIN, END = "<!-- kernels: begin -->\n", "<!-- kernels: end -->\n"
LOADS, STORES = (rf"cp\.async\.bulk\.tensor\S*{how}" for how in ("complete_tx", "bulk_group"))
PREFETCHES = r"cp\.async\.bulk\.prefetch\.tensor"
HEAD = """\
| kernel | shared bytes | TMEM columns, used of allocated | registers | stack | TMA loads | prefetches | TMA stores | scale copies | MMAs | stores of 16 bytes |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def table(kernels: Mapping[str, Exported]) -> str:
    """A row for each kernel."""
    rows = []
    for kernel in kernels.values():
        c, weights = kernel.spec.config, kernel.spec.weights
        registers, stack = resources(kernel.cubin)
        patterns = (LOADS, PREFETCHES, STORES, r"tcgen05\.cp\.", r"tcgen05\.mma", r"st\.global\.v4")
        counts = [len(re.findall(pattern, kernel.ptx)) for pattern in patterns]
        columns = f"{c.used_columns(weights)} of {c.columns(weights)}"
        cells = [kernel.spec.name, c.shared_bytes(weights), columns, registers, stack, *counts]
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |\n")
    return HEAD + "".join(rows)


def written() -> str:
    """What the document has."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]


def main() -> None:
    specs = {name: spec for name, (spec, _) in KERNELS.items()} | DEFAULTS
    with tempfile.TemporaryDirectory() as scratch:
        found = table(dict(zip(specs, export(list(specs.values()), Path(scratch)))))
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + found + END + after)


if __name__ == "__main__":
    main()
