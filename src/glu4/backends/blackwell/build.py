"""Compile kernels with CuTe DSL, with no GPU: `python -m glu4.backends.blackwell.build SPECS_JSON OUTPUT [--export]`.

A process of its own, because CuTe DSL takes its target from the environment (CUTE_DSL_ARCH) when it is imported, and so that
importing glu4 never imports it. With --export the output holds PTX, cubin and CuTe DSL's host object, for the emulator.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from glu4.backends.blackwell.spec import KernelSpec
from glu4.compiled.building import Made, compiled, pointer
from glu4.compiled.store import write

__all__ = ["compile_spec", "export", "main"]


def _compile(spec: KernelSpec, directory: str) -> Made:
    """One kernel as `building.compiled` gives it."""
    import cutlass
    from cutlass.cute.runtime import make_fake_stream

    from glu4.backends.blackwell.dual_gemm import E2M1, E4M3, DualGemm

    out = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}[spec.out]

    operands = [pointer(t, 16) for _ in range(3) for t in (E2M1, E4M3)]
    floats_of = [pointer(cutlass.Float32, 4) for _ in range(5)]  # global scales and biases
    written = [pointer(out, 16 if spec.config.store == "tma" else 2), pointer(cutlass.Int32, 4)]  # C, the workspace
    integers, floats = [cutlass.Int32(0) for _ in range(6)], [cutlass.Float32(0.0) for _ in range(3)]
    numbers = [cutlass.Int64(0), cutlass.Int64(0), integers[0], *floats, *integers[1:]]
    kernel = DualGemm(spec.config, out, spec.dual)
    launched = {
        "threads": spec.config.threads,
        "cluster": [spec.config.ctas, 1, 1],
        "shared_bytes": spec.config.shared_bytes(spec.weights),
        "pdl": spec.config.pdl,
    }
    return compiled(spec, (kernel, *operands, *floats_of, *written, *numbers, make_fake_stream()), launched, directory)


def compile_spec(spec: KernelSpec, directory: str) -> tuple[bytes, dict[str, Any]]:
    """(cubin, description) of one kernel; `directory` takes the compiler's intermediate files."""
    made, description = _compile(spec, directory)
    return bytes(made.artifacts.CUBIN), description


def export(spec: KernelSpec, directory: Path) -> None:
    """Write NAME.ptx, NAME.cubin, and NAME.o with NAME.h, the host function as glu4.emulator.capture takes it."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        made, _ = _compile(spec, scratch)
        made.export_to_c(file_path=str(directory), file_name=spec.name, function_prefix=spec.name)
        (directory / f"{spec.name}.ptx").write_text(made.artifacts.PTX)
        (directory / f"{spec.name}.cubin").write_bytes(bytes(made.artifacts.CUBIN))


def main() -> None:
    """Compile the specs listed in a JSON file into a directory; one line of progress each on stdout."""
    specs = [KernelSpec.from_dict(d) for d in json.loads(Path(sys.argv[1]).read_text())]
    for spec in specs:
        if sys.argv[3:] == ["--export"]:
            export(spec, Path(sys.argv[2]))
        else:
            with tempfile.TemporaryDirectory() as scratch:
                cubin, description = compile_spec(spec, scratch)
            write(Path(sys.argv[2]), spec, cubin, description)
        print(spec.name, flush=True)


if __name__ == "__main__":
    main()
