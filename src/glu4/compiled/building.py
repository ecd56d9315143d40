"""What builders of kernels have in common: compile by CuTe DSL with no GPU, describe, write. A builder is a process of its own.

`python -m BUILDER SPECS_JSON OUTPUT` puts kernels into a kernel directory; with --export OUTPUT holds PTX, cubin, description
and CuTe DSL's host object, with whose launches tests compare.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glu4.compiled.cubin import resources
from glu4.compiled.store import DSL_VERSION, Spec, write

__all__ = ["Made", "compiled", "main", "param_sizes", "pointer"]

Made = tuple[Any, dict[str, Any]]  # CuTe DSL's result, description
# .param .align 64 .b8 NAME[128], or .param .u32 NAME, or .param .u64 .ptr .global .align 2 NAME
_POINTER = r"(?:\s+\.ptr(?:\s+\.(?:[a-z]+|align\s+\d+))*)?"
_PARAM = re.compile(rf"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+){_POINTER}\s+[\w$]+(?:\[(\d+)\])?")


def pointer(element: Any, align: int) -> Any:
    """A stand-in for an argument: a pointer into global memory."""
    from cutlass import cute
    from cutlass.cute.runtime import make_ptr

    return make_ptr(element, 0, cute.AddressSpace.gmem, assumed_align=align)


def compiled(spec: Spec, arguments: tuple[Any, ...], launched: dict[str, Any], directory: str) -> Made:
    """One kernel and its description; `directory` takes the compiler's intermediate files.

    arguments  what cute.compile takes: the kernel's host function and stand-ins for its arguments
    launched   of the description what a launch asks for: threads, shared_bytes, pdl, of a cluster its shape

    Raises RuntimeError for a kernel that spills registers.
    """
    from cutlass import cute

    made = cute.compile(*arguments, options=f"--gpu-arch {spec.arch} --keep-ptx --keep-cubin --dump-dir={directory}")
    ptx = made.artifacts.PTX
    registers, frame_bytes = resources(bytes(made.artifacts.CUBIN))
    if frame_bytes:
        raise RuntimeError(f"{spec.name}: {registers} registers and {frame_bytes} bytes of stack, expected no stack")
    entry = re.search(r"\.entry\s+([\w$]+)\s*\(", ptx)
    assert entry is not None
    description = {
        "spec": spec.to_dict(),
        "entry": entry.group(1),
        "params": param_sizes(ptx),
        **launched,
        "registers": registers,
    }
    return made, description | {"tool": f"nvidia-cutlass-dsl {DSL_VERSION}"}


def param_sizes(ptx: str) -> list[int]:
    """Bytes of each kernel parameter, in order."""
    head = ptx[ptx.index(".entry") :]
    listing = head[head.index("(") : head.index("\n)")]
    return [int(bits) // 8 * int(count or 1) for bits, count in _PARAM.findall(listing)]


def main(spec_of: Callable[[dict[str, Any]], Spec], make: Callable[[Any, str], Made]) -> None:
    """Compile the specs listed in a JSON file into a directory; one line of progress each on stdout."""
    directory = Path(sys.argv[2])
    for listed in json.loads(Path(sys.argv[1]).read_text()):
        spec = spec_of(listed)
        with tempfile.TemporaryDirectory() as scratch:
            made, description = make(spec, scratch)
            cubin = bytes(made.artifacts.CUBIN)
            if sys.argv[3:] == ["--export"]:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / f"{spec.name}.ptx").write_text(made.artifacts.PTX)
                (directory / f"{spec.name}.cubin").write_bytes(cubin)
                (directory / f"{spec.name}.json").write_text(json.dumps(description))
                made.export_to_c(file_path=str(directory), file_name=spec.name, function_prefix=spec.name)
            else:
                write(directory, spec, cubin, description)
        print(spec.name, flush=True)
