"""Compile grouped kernels, with no GPU: `python -m glu4.backends.blackwell.grouped_build SPECS_JSON OUTPUT [--export]`.

A process of its own, for the reasons that `build` gives. With --export the output holds PTX, cubin and description, for the
emulator.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from glu4.backends.blackwell.grouped_spec import GroupSpec
from glu4.compiled.building import compiled, pointer
from glu4.compiled.store import write

__all__ = ["compile_grouped", "main"]


def compile_grouped(spec: GroupSpec, directory: str) -> tuple[bytes, str, dict[str, Any]]:
    """(cubin, PTX, description) of one kernel; `directory` takes the compiler's intermediate files.

    Raises RuntimeError for a kernel that spills registers.
    """
    import cutlass
    from cutlass.cute.runtime import make_fake_stream

    from glu4.backends.blackwell.dual_gemm import E2M1, E4M3
    from glu4.backends.blackwell.grouped_gemm import GroupGemm

    out, config = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}[spec.out], spec.config

    each = range(config.groups)
    operands = tuple(tuple(pointer(t, 16) for _ in range(config.maps // 2) for t in (E2M1, E4M3)) for _ in each)
    outs, strides = tuple(pointer(out, 2) for _ in each), tuple(cutlass.Int64(0) for _ in each)
    sizes = tuple((cutlass.Int32(0), cutlass.Int32(0), cutlass.Int32(0)) for _ in each)
    scales = tuple(pointer(cutlass.Float32, 4) for _ in range(config.maps // 2))
    activation = (cutlass.Int32(0), *(cutlass.Float32(0.0) for _ in range(3))) if config.gated else ()
    kernel = (GroupGemm(config, out), operands, outs, strides, sizes, scales, activation, cutlass.Int32(0), make_fake_stream())
    launched = {
        "threads": config.mma.threads,
        "cluster": [config.ctas, 1, 1],
        "shared_bytes": config.shared_bytes,
        "pdl": config.pdl,
    }
    made, description = compiled(spec, kernel, launched, directory)
    return bytes(made.artifacts.CUBIN), made.artifacts.PTX, description


def main() -> None:
    """Compile the specs listed in a JSON file into a directory; one line of progress each on stdout."""
    directory = Path(sys.argv[2])
    for listed in json.loads(Path(sys.argv[1]).read_text()):
        spec = GroupSpec.from_dict(listed)
        with tempfile.TemporaryDirectory() as scratch:
            cubin, ptx, description = compile_grouped(spec, scratch)
        if sys.argv[3:] == ["--export"]:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{spec.name}.ptx").write_text(ptx)
            (directory / f"{spec.name}.cubin").write_bytes(cubin)
            (directory / f"{spec.name}.json").write_text(json.dumps(description))
        else:
            write(directory, spec, cubin, description)
        print(spec.name, flush=True)


if __name__ == "__main__":
    main()
