"""Compile kernels for mixtures of experts: `python -m glu4.backends.blackwell.moe_build SPECS_JSON OUTPUT [--export]`.

No GPU is needed. A process of its own, for the reasons that `build` gives. With --export the output holds PTX, cubin,
description, and CuTe DSL's host object, with whose launches tests compare.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from glu4.backends.blackwell.build import _param_sizes
from glu4.backends.blackwell.moe_spec import MoeSpec
from glu4.compiled.cubin import resources
from glu4.compiled.store import DSL_VERSION, write

__all__ = ["compile_moe", "main"]


def compile_moe(spec: MoeSpec, directory: str) -> tuple[Any, dict[str, Any]]:
    """(CuTe DSL's result, description) of one kernel; `directory` takes the compiler's intermediate files.

    Raises RuntimeError for a kernel that spills registers.
    """
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream, make_ptr

    from glu4.backends.blackwell.dual_gemm import E2M1, E4M3
    from glu4.backends.blackwell.moe_gemm import MoeGemm

    out, config = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}[spec.out], spec.config

    def pointer(element: Any, align: int) -> Any:
        return make_ptr(element, 0, cute.AddressSpace.gmem, assumed_align=align)

    operands = [pointer(t, 16) for _ in range(3) for t in (E2M1, E4M3)]
    floats_of = [pointer(cutlass.Float32, 4) for _ in range(5)]  # global scales and biases
    numbers = [cutlass.Int64(0), cutlass.Int32(0), *(cutlass.Float32(0.0) for _ in range(3))]
    numbers += [cutlass.Int32(0) for _ in range(6)]
    made = cute.compile(
        MoeGemm(config, out), *operands, pointer(cutlass.Int32, 16), *floats_of, pointer(out, 2), *numbers, make_fake_stream(),
        options=f"--gpu-arch {spec.arch} --keep-ptx --keep-cubin --dump-dir={directory}",
    )  # fmt: skip
    ptx = made.artifacts.PTX
    registers, frame_bytes = resources(bytes(made.artifacts.CUBIN))
    if frame_bytes:
        raise RuntimeError(f"{spec.name}: {registers} registers and {frame_bytes} bytes of stack, expected no stack")
    entry = re.search(r"\.entry\s+([\w$]+)\s*\(", ptx)
    assert entry is not None
    description = {
        "spec": spec.to_dict(),
        "entry": entry.group(1),
        "params": _param_sizes(ptx),
        "threads": config.grouped.mma.threads,
        "cluster": [config.ctas, 1, 1],
        "shared_bytes": config.shared_bytes,
        "registers": registers,
        "pdl": config.pdl,
        "tool": f"nvidia-cutlass-dsl {DSL_VERSION}",
    }
    return made, description


def main() -> None:
    """Compile the specs listed in a JSON file into a directory; one line of progress each on stdout."""
    directory = Path(sys.argv[2])
    for listed in json.loads(Path(sys.argv[1]).read_text()):
        spec = MoeSpec.from_dict(listed)
        with tempfile.TemporaryDirectory() as scratch:
            made, description = compile_moe(spec, scratch)
            if sys.argv[3:] == ["--export"]:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / f"{spec.name}.ptx").write_text(made.artifacts.PTX)
                (directory / f"{spec.name}.cubin").write_bytes(bytes(made.artifacts.CUBIN))
                (directory / f"{spec.name}.json").write_text(json.dumps(description))
                made.export_to_c(file_path=str(directory), file_name=spec.name, function_prefix=spec.name)
            else:
                write(directory, spec, bytes(made.artifacts.CUBIN), description)
        print(spec.name, flush=True)


if __name__ == "__main__":
    main()
