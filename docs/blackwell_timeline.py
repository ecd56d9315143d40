"""Draw the timeline of docs/blackwell.md: the first CTA of the kernel of the public contest's first benchmark, at a smaller K.

    python docs/blackwell_timeline.py [--output docs/img/blackwell-timeline.svg]

Needs CuTe DSL and a C compiler. The kernel runs in the emulator; times come from the nominal rates of glu4.emulator.replay.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from backends.blackwell.kernels import default, operands  # noqa: E402
from glu4.backends.blackwell.emulation import export  # noqa: E402
from glu4.emulator.timeline import picture  # noqa: E402
from glu4.verify import full_range_case  # noqa: E402
from glu4.verify.contest import DUAL_BENCHMARKS  # noqa: E402

STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "img" / "blackwell-timeline.svg")
    arguments = parser.parse_args()
    spec = default(DUAL_BENCHMARKS[0])
    c = spec.config
    case = full_range_case(1, c.tile_m, c.tile_n, STEPS * c.tile_k)
    with tempfile.TemporaryDirectory() as scratch:
        (kernel,) = export([spec], Path(scratch))
        result, _ = kernel.run(operands(case), np.zeros((1, c.tile_m, c.tile_n), np.uint16), record=True)
    assert result.recording is not None
    arguments.output.write_text(picture(result.recording), encoding="utf-8")
    print(arguments.output)


if __name__ == "__main__":
    main()
