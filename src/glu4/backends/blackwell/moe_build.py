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
from glu4.backends.blackwell.moe_spec import MoeSpec, TileSpec, spec_from_dict
from glu4.compiled.cubin import resources
from glu4.compiled.store import DSL_VERSION, write

__all__ = ["compile_moe", "main"]


def compile_moe(spec: MoeSpec | TileSpec, directory: str) -> tuple[Any, dict[str, Any]]:
    """(CuTe DSL's result, description) of one kernel; `directory` takes the compiler's intermediate files.

    Raises RuntimeError for a kernel that spills registers.
    """
    from cutlass import cute

    made = cute.compile(
        *(_arguments(spec) if isinstance(spec, MoeSpec) else _tile_arguments(spec)),
        options=f"--gpu-arch {spec.arch} --keep-ptx --keep-cubin --dump-dir={directory}",
    )
    ptx = made.artifacts.PTX
    registers, frame_bytes = resources(bytes(made.artifacts.CUBIN))
    if frame_bytes:
        raise RuntimeError(f"{spec.name}: {registers} registers and {frame_bytes} bytes of stack, expected no stack")
    entry = re.search(r"\.entry\s+([\w$]+)\s*\(", ptx)
    assert entry is not None
    if isinstance(spec, MoeSpec):
        c = spec.config
        launched = {"threads": c.grouped.mma.threads, "cluster": [c.ctas, 1, 1], "shared_bytes": c.shared_bytes, "pdl": c.pdl}
    else:
        from glu4.backends.blackwell.moe_tile_tokens import SHARED_BYTES, THREADS

        launched = {"threads": THREADS, "cluster": [1, 1, 1], "shared_bytes": SHARED_BYTES, "pdl": True}
    description = {
        "spec": spec.to_dict(), "entry": entry.group(1), "params": _param_sizes(ptx), **launched, "registers": registers,
        "tool": f"nvidia-cutlass-dsl {DSL_VERSION}",
    }  # fmt: skip
    return made, description


def _pointer(element: Any, align: int) -> Any:
    from cutlass import cute
    from cutlass.cute.runtime import make_ptr

    return make_ptr(element, 0, cute.AddressSpace.gmem, assumed_align=align)


def _arguments(spec: MoeSpec) -> tuple[Any, ...]:
    """What cute.compile takes: the kernel's host function and stand-ins for its arguments."""
    import cutlass
    from cutlass.cute.runtime import make_fake_stream

    from glu4.backends.blackwell.dual_gemm import E2M1, E4M3
    from glu4.backends.blackwell.moe_gemm import MoeGemm

    out = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}[spec.out]
    operands = [_pointer(t, 16) for _ in range(3) for t in (E2M1, E4M3)]
    floats_of = [_pointer(cutlass.Float32, 4) for _ in range(5)]  # global scales and biases
    if not spec.config.gated:  # nothing of up
        operands[4:] = floats_of[2::2] = None, None
    numbers = [cutlass.Int64(0), cutlass.Int32(0), *(cutlass.Float32(0.0) for _ in range(3))]
    numbers += [cutlass.Int32(0) for _ in range(6)]
    kernel, table = MoeGemm(spec.config, out), _pointer(cutlass.Int32, 16)
    return kernel, *operands, table, *floats_of, _pointer(out, 2), *numbers, make_fake_stream()


def _tile_arguments(spec: TileSpec) -> tuple[Any, ...]:
    """As `_arguments`."""
    import cutlass
    from cutlass.cute.runtime import make_fake_stream

    from glu4.backends.blackwell.moe_tile_tokens import TileTokens

    pointers = [
        _pointer(t, align) for t, align in ((cutlass.Int32, 4), (cutlass.Uint8, 1), (cutlass.Int32, 16), (cutlass.Uint8, 16))
    ]
    numbers = [cutlass.Int64(0), *(cutlass.Int32(0) for _ in range(4))]
    index: list[Any] = [None] * 3
    if spec.gather:
        index = [_pointer(cutlass.Int64, 8), *(_pointer(cutlass.Uint8, 16) for _ in range(2))]
    index += [cutlass.Int32(0) for _ in range(2)]
    return TileTokens(spec.tile_n, spec.gather), *pointers, *numbers, *index, make_fake_stream()


def main() -> None:
    """Compile the specs listed in a JSON file into a directory; one line of progress each on stdout."""
    directory = Path(sys.argv[2])
    for listed in json.loads(Path(sys.argv[1]).read_text()):
        spec = spec_from_dict(listed)
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
