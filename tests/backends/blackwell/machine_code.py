"""Machine code of compiled kernels, as NVIDIA's disassembler prints it (PyPI: nvidia-cuda-nvdisasm; the CUDA toolkit has it too)."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

# of sm_100; what the instructions of PTX become
NAMES = {
    "MMAs": r"UTCOMMA\.(?:2CTA\.)?4X",
    "scale copies": r"UTCCP\.",
    "TMA loads": r"UTMALDG\.",
    "TMA stores": r"UTMASTG\.",
    "prefetches": r"UTMAPF\.",
    "TMEM loads": r"LDTM\.",
    "stores of 16 bytes": r"STG\.E\.128",
    "spills": r"(?:LDL|STL)\b",
    "other MMAs": r"UTC[A-Z]*MMA(?!\.(?:2CTA\.)?4X)",
}


def disassembler() -> str | None:
    """Where nvdisasm is; None where it is not."""
    if found := shutil.which("nvdisasm"):
        return found
    package = importlib.util.find_spec("nvidia")
    places = [] if package is None else list(package.submodule_search_locations or ())
    return next((str(file) for place in places for file in Path(place).glob("*/bin/nvdisasm")), None)


def counts(cubin: bytes) -> dict[str, int]:
    """Instructions of each of NAMES."""
    program = disassembler()
    assert program is not None
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "kernel.cubin")
        file.write_bytes(cubin)
        text = subprocess.run([program, "--print-code", str(file)], capture_output=True, text=True, check=True).stdout
    lines = [line for line in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    assert lines, "no instructions in what nvdisasm prints"
    return {name: sum(bool(re.search(rf"\b{pattern}", line)) for line in lines) for name, pattern in NAMES.items()}
