"""Record what the static verifier SentryWard says of the default kernels: a table of docs/blackwell.md.

    python -m venv ../sentryward && ../sentryward/bin/pip install sentryward==0.1.1
    cd tests && python -m backends.blackwell.record_sentryward FOLDER ../../sentryward/bin/sentryward

It looks at one CTA or pair and one tile, with all steps that `gate_first` puts last and two before them, or three. Of the text, qualifiers
of the collector buffer are left out, which it does not take; and C is said to be aligned to 16 bytes, since it follows no branch
that depends on an address. Compiled kernels are kept in FOLDER.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from backends.blackwell.kernels import Kernels, operands
from backends.blackwell.table import DOCUMENT, SPECS
from emulator.mutations.kernels import Kernel
from emulator.mutations.record_sentryward import describe
from glu4.backends.blackwell.emulation import Exported
from glu4.verify import full_range_case

BEGIN, END = "<!-- sentryward: begin -->\n", "<!-- sentryward: end -->\n"
SECONDS, MEBIBYTES = 240, 6144
STEPS = 5  # along K; 3 where no products come first
HEAD = "| kernel | M, N, K | verdict | seconds |\n|---|---|---|---|\n"


def simplified(ptx: str) -> str:
    """Without collector qualifiers, and with C aligned to 16 bytes."""
    text = re.sub(r"\.collector::a::\w+", "", ptx)
    return re.sub(r"and\.b64(\s+%rd\d+), %rd\d+, 14;", r"mov.b64\1, 0;", text)


def row(program: str, kernel: Exported) -> str:
    """A line of the table."""
    spec, c = kernel.spec, kernel.spec.config
    shape = (c.tile_m, c.tile_n, (STEPS if c.gate_first else 3) * c.tile_k)
    case = full_range_case(1, *shape, linear=not spec.dual)
    launch = kernel.launch(operands(case), np.zeros((1, c.tile_m, c.tile_n), np.int16))
    given = describe(Kernel(spec.name, kernel.ptx, launch, {}, lambda _: True))
    with tempfile.TemporaryDirectory() as scratch:
        text, listing = Path(scratch, "kernel.ptx"), Path(scratch, "input.json")
        text.write_text(simplified(kernel.ptx))
        listing.write_text(json.dumps(given))
        command = [program, str(text), "--input", str(listing), "--timeout", str(SECONDS), "--memory-limit-mib", str(MEBIBYTES)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS)
    answer = json.loads(done.stdout)
    codes = {str(d.get("code")): str(d.get("message", "")) for d in answer.get("diagnostics") or []}
    said = str(answer["result"]) + "".join(f"; {code}: {message}" for code, message in codes.items())
    return f"| {spec.name} | {', '.join(map(str, shape))} | {said} | {answer['elapsed_seconds']:.0f} |\n"


def main() -> None:
    kernels = Kernels(SPECS, Path(sys.argv[1]).absolute())
    rows = ""
    for name in SPECS:
        if name == SPECS[name].name:  # the defaults
            rows += row(sys.argv[2], kernels[name])
            print(rows.splitlines()[-1], flush=True)
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text.split(BEGIN)[0] + BEGIN + HEAD + rows + END + text.split(END)[1])


if __name__ == "__main__":
    main()
