"""PTX of this project's Hopper kernels, with no GPU: `python compile_hopper.py JOBS OUTPUT`, in a process of its own.

JOBS is a JSON list of {"spec": as its to_dict, "edits": [[module, old, new], ...]}: each edit replaces the one occurrence of a text
in the source of a module of glu4.backends.hopper, to plant a fault. Kernel i is written to OUTPUT/i.ptx.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

PACKAGE = "glu4.backends.hopper"
DEVICE_CODE = ("instructions", "decode_tokens", "dual_gemm")  # in the order in which they import each other


def compile_job(job: dict[str, Any], scratch: Path) -> str:
    """PTX of one job; modules are made anew, so that edits of others are gone."""
    from cutlass import cute

    from glu4.backends.hopper import build
    from glu4.backends.hopper.spec import spec_from_dict

    for name in DEVICE_CODE:
        text = Path(build.__file__).with_name(f"{name}.py").read_text()
        for module, old, new in job["edits"]:
            if module == name:
                assert text.count(old) == 1, f"{module}: {text.count(old)} of {old!r}"
                text = text.replace(old, new)
        path = scratch / f"{name}.py"
        path.write_text(text)
        spec = spec_from_file_location(f"{PACKAGE}.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    made = cute.compile(*build._arguments(spec_from_dict(job["spec"])), options=f"--keep-ptx --dump-dir={scratch}")
    return str(made.artifacts.PTX)


def main() -> None:
    jobs, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for i, job in enumerate(jobs):
        with tempfile.TemporaryDirectory() as scratch:
            (output / f"{i}.ptx").write_text(compile_job(job, Path(scratch)))


if __name__ == "__main__":
    main()
