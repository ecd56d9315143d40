"""Compile the kernels that sort and combine: `python -m glu4.backends.routing.build SPECS_JSON OUTPUT [--export]`.

No GPU is needed. With --export the output holds PTX, cubin, description, and CuTe DSL's host object, with whose launches tests
compare.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from glu4.backends.routing.spec import SORT_BYTES, CombineSpec, SortSpec, spec_from_dict
from glu4.compiled.cubin import resources
from glu4.compiled.store import DSL_VERSION, write

__all__ = ["compile_routing", "main"]


def compile_routing(spec: SortSpec | CombineSpec, directory: str) -> tuple[Any, dict[str, Any]]:
    """(CuTe DSL's result, description); `directory` takes the compiler's intermediate files.

    Raises RuntimeError where registers are spilled.
    """
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream, make_ptr

    from glu4.backends.routing import combine_tokens, sort_tokens

    i32, i64 = cutlass.Int32, cutlass.Int64
    if isinstance(spec, SortSpec):
        kernel: Any = sort_tokens.SortTokens()
        types: tuple[Any, ...] = (i32, i64, i64, i32)
        threads, shared_bytes = sort_tokens.THREADS, SORT_BYTES
    else:
        dtype = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}[spec.dtype]
        kernel = combine_tokens.CombineTokens(dtype)
        types = (dtype, i64, cutlass.Float32, i32, dtype)
        threads, shared_bytes = combine_tokens.THREADS, 0
    pointers = [make_ptr(t, 0, cute.AddressSpace.gmem, assumed_align=t.width // 8) for t in types]
    made = cute.compile(
        kernel, *pointers, *(i32(0) for _ in range(3)), make_fake_stream(),
        options=f"--gpu-arch {spec.arch} --keep-ptx --keep-cubin --dump-dir={directory}",
    )  # fmt: skip
    ptx = made.artifacts.PTX
    registers, frame_bytes = resources(bytes(made.artifacts.CUBIN))
    if frame_bytes:
        raise RuntimeError(f"{spec.name}: {registers} registers and {frame_bytes} bytes of stack, expected no stack")
    entry = re.search(r"\.entry\s+([\w$]+)\s*\(", ptx)
    assert entry is not None
    description = {
        "spec": spec.to_dict(), "entry": entry.group(1), "params": _param_sizes(ptx), "threads": threads,
        "shared_bytes": shared_bytes, "registers": registers, "pdl": True, "tool": f"nvidia-cutlass-dsl {DSL_VERSION}",
    }  # fmt: skip
    return made, description


def _param_sizes(ptx: str) -> list[int]:
    """Bytes of each kernel parameter, in order."""
    head = ptx[ptx.index(".entry") :]
    return [int(bits) // 8 for bits in re.findall(r"\.param\s+\.[a-z](\d+)\s", head[: head.index("\n)")])]


def main() -> None:
    """Compile the specs listed in a JSON file into a directory; one line of progress each on stdout."""
    directory = Path(sys.argv[2])
    for listed in json.loads(Path(sys.argv[1]).read_text()):
        spec = spec_from_dict(listed)
        with tempfile.TemporaryDirectory() as scratch:
            made, description = compile_routing(spec, scratch)
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
