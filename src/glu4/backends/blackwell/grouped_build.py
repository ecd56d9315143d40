"""Compile grouped kernels, with no GPU: `python -m glu4.backends.blackwell.grouped_build SPECS_JSON OUTPUT [--export]`.

A process of its own, for the reasons that `build` gives. With --export the output holds PTX, cubin and description, for the
emulator.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from glu4.backends.blackwell.grouped_spec import GroupSpec
from glu4.compiled.building import param_sizes
from glu4.compiled.cubin import resources
from glu4.compiled.store import DSL_VERSION, write

__all__ = ["compile_grouped", "main"]


def compile_grouped(spec: GroupSpec, directory: str) -> tuple[bytes, str, dict[str, Any]]:
    """(cubin, PTX, description) of one kernel; `directory` takes the compiler's intermediate files.

    Raises RuntimeError for a kernel that spills registers.
    """
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream, make_ptr

    from glu4.backends.blackwell.dual_gemm import E2M1, E4M3
    from glu4.backends.blackwell.grouped_gemm import GroupGemm

    out, config = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}[spec.out], spec.config

    def pointer(element: Any, align: int) -> Any:
        return make_ptr(element, 0, cute.AddressSpace.gmem, assumed_align=align)

    each = range(config.groups)
    operands = tuple(tuple(pointer(t, 16) for _ in range(config.maps // 2) for t in (E2M1, E4M3)) for _ in each)
    outs, strides = tuple(pointer(out, 2) for _ in each), tuple(cutlass.Int64(0) for _ in each)
    sizes = tuple((cutlass.Int32(0), cutlass.Int32(0), cutlass.Int32(0)) for _ in each)
    scales = tuple(pointer(cutlass.Float32, 4) for _ in range(config.maps // 2))
    activation = (cutlass.Int32(0), *(cutlass.Float32(0.0) for _ in range(3))) if config.gated else ()
    made = cute.compile(
        GroupGemm(config, out), operands, outs, strides, sizes, scales, activation, cutlass.Int32(0), make_fake_stream(),
        options=f"--gpu-arch {spec.arch} --keep-ptx --keep-cubin --dump-dir={directory}",
    )  # fmt: skip
    cubin, ptx = bytes(made.artifacts.CUBIN), made.artifacts.PTX
    registers, frame_bytes = resources(cubin)
    if frame_bytes:
        raise RuntimeError(f"{spec.name}: {registers} registers and {frame_bytes} bytes of stack, expected no stack")
    entry = re.search(r"\.entry\s+([\w$]+)\s*\(", ptx)
    assert entry is not None
    description = {
        "spec": spec.to_dict(),
        "entry": entry.group(1),
        "params": param_sizes(ptx),
        "threads": config.mma.threads,
        "cluster": [config.ctas, 1, 1],
        "shared_bytes": config.shared_bytes,
        "registers": registers,
        "pdl": config.pdl,
        "tool": f"nvidia-cutlass-dsl {DSL_VERSION}",
    }
    return cubin, ptx, description


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
