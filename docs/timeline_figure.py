"""Draw the timeline of docs/emulator.md: the first CTA of a compiled kernel of tests/emulator.

    python docs/timeline_figure.py [--kernel cute_dual] [--output docs/img/timeline.svg]

The kernel runs in the emulator; times come from the nominal rates of glu4.emulator.replay.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from emulator.kernels import launches  # noqa: E402
from glu4.emulator.launch import emulate  # noqa: E402
from glu4.emulator.timeline import picture  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="cute_dual", choices=launches.names())
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "img" / "timeline.svg")
    arguments = parser.parse_args()
    ptx, launch, problem = launches.load(arguments.kernel)
    result = emulate(ptx, {**launch, "ctas": [[0, 0, 0]]}, launches.make_inputs(problem), record=True)
    assert result.recording is not None
    arguments.output.write_text(picture(result.recording), encoding="utf-8")
    print(arguments.output)


if __name__ == "__main__":
    main()
