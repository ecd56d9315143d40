"""Compile kernels with CuTe DSL, with no GPU: `python -m glu4.backends.hopper.build SPEC_JSON OUTPUT`, one process a batch.

A process of its own, because CuTe DSL takes its target from the environment when it is imported, and so that importing glu4
never imports it.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from glu4.backends.hopper.config import DECODE_THREADS
from glu4.backends.hopper.grouped_build import arguments
from glu4.backends.hopper.spec import DecodeSpec, GroupedSpec, KernelSpec, Spec, spec_from_dict
from glu4.compiled.cubin import resources
from glu4.compiled.store import DSL_VERSION, write

__all__ = ["compile_spec", "main"]

_PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z]+)(\d+)\s+[\w$]+(?:\[(\d+)\])?")


def _param_sizes(ptx: str) -> list[int]:
    """Bytes of each kernel parameter, in order."""
    head = ptx[ptx.index(".entry") :]
    listing = head[head.index("(") : head.index("\n)")]
    return [int(bits) // 8 * int(count or 1) for _, bits, count in _PARAM.findall(listing)]


def compile_spec(spec: Spec, directory: str) -> tuple[bytes, dict[str, Any]]:
    """(cubin, description) of one kernel; `directory` takes the compiler's intermediate files."""
    from cutlass import cute

    made = cute.compile(*_arguments(spec), options=f"--keep-ptx --keep-cubin --dump-dir={directory}")
    ptx = made.artifacts.PTX
    entry = re.search(r"\.entry\s+([\w$]+)\s*\(", ptx)
    assert entry is not None
    cubin = bytes(made.artifacts.CUBIN)
    registers, frame_bytes = resources(cubin)
    if isinstance(spec, KernelSpec):
        # with fewer registers at launch than setmaxnreg counts on, it would wait for ever
        limit = spec.config.launch_registers(spec.nvfp4)
        expected, right = str(limit), registers == limit
        if spec.config.producers == "none":  # nothing is moved
            expected, right = f"at most {limit}", registers <= limit
        threads, shared_bytes = spec.config.cta_threads(spec.nvfp4), spec.config.shared_bytes(spec.nvfp4)
    elif isinstance(spec, GroupedSpec):
        expected, right = str(spec.config.launch_registers), registers == spec.config.launch_registers
        threads, shared_bytes = spec.config.threads, spec.config.shared_bytes
    else:
        # with more, fewer CTAs would be on an SM, each of which waits for memory most of its time
        expected, right = "at most 32", registers <= 32
        threads, shared_bytes = DECODE_THREADS, 0
    if frame_bytes or not right:
        raise RuntimeError(f"{spec.name}: {registers} registers and {frame_bytes} bytes of stack, expected {expected} and 0")
    description = {
        "spec": spec.to_dict(),
        "entry": entry.group(1),
        "params": _param_sizes(ptx),
        "threads": threads,
        "shared_bytes": shared_bytes,
        "registers": registers,
        "pdl": True,  # it waits for the kernel before it, and lets the next one start, by griddepcontrol
        "tool": f"nvidia-cutlass-dsl {DSL_VERSION}",
    }
    return cubin, description


def _arguments(spec: Spec) -> tuple[Any, ...]:
    """What cute.compile takes: the kernel's host function and stand-ins for its arguments, sizes open."""
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

    from glu4.backends.hopper.decode_tokens import DecodeTokens, GatherTokens
    from glu4.backends.hopper.dual_gemm import DualGemm
    from glu4.backends.hopper.pack import UNIT_WORDS

    if isinstance(spec, GroupedSpec):
        return arguments(spec.config, spec.x, spec.out, spec.dual)
    if isinstance(spec, DecodeSpec):
        words, scale_bytes = cute.sym_int(), cute.sym_int()
        codes = make_fake_tensor(cutlass.Uint32, (words,), (1,), assumed_align=4)
        scales = make_fake_tensor(cutlass.Uint8, (scale_bytes,), (1,), assumed_align=1)
        out = make_fake_tensor(cutlass.Uint32, (cute.sym_int(),), (1,), assumed_align=16)
        if spec.gather:
            rows = cute.sym_int()
            codes = make_fake_tensor(cutlass.Uint32, (rows, words), (cute.sym_int64(), 1), assumed_align=4)
            scales = make_fake_tensor(cutlass.Uint8, (rows, scale_bytes), (cute.sym_int64(), 1), assumed_align=1)
            order = make_fake_tensor(cutlass.Int64, (rows, cute.sym_int()), (cute.sym_int64(), 1), assumed_align=8)
            return GatherTokens(), codes, scales, order, out, make_fake_stream()
        return DecodeTokens(), codes, scales, out, cutlass.Int32(0), make_fake_stream()
    types = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}
    m, n, k = cute.sym_int(), cute.sym_int(), cute.sym_int(divisibility=16)
    if spec.x == "nvfp4":
        blocks = (m, cute.sym_int())
        x = make_fake_tensor(cutlass.Uint64, blocks, (cute.sym_int64(), 1), assumed_align=8)
        block_scales = make_fake_tensor(cutlass.Uint8, blocks, (cute.sym_int64(), 1), assumed_align=1)
    else:
        x = make_fake_tensor(types[spec.x], (m, k), (cute.sym_int64(divisibility=8), 1), assumed_align=16)
        block_scales = None
    units = (cute.sym_int(), cute.sym_int(), UNIT_WORDS)
    strides = (cute.sym_int64(divisibility=UNIT_WORDS), UNIT_WORDS, 1)
    weights = make_fake_tensor(cutlass.Uint32, units, strides, assumed_align=16)
    scale = [make_fake_tensor(cutlass.Float32, (1,), (1,), assumed_align=4) for _ in range(3)]
    bias = [make_fake_tensor(cutlass.Float32, (n,), (1,), assumed_align=4) for _ in range(2)]
    out = make_fake_tensor(types[spec.out], (m, n), (cute.sym_int64(), 1), assumed_align=2)
    constants = [cutlass.Float32(0.0) for _ in range(3)]
    kernel = DualGemm(spec.config, types.get(spec.x), types[spec.out], spec.dual)
    return kernel, x, block_scales, weights, *scale, *bias, cutlass.Int32(0), *constants, out, make_fake_stream()


def main() -> None:
    """Compile the specs listed in a JSON file into a directory; one line of progress each on stdout."""
    specs = [spec_from_dict(d) for d in json.loads(Path(sys.argv[1]).read_text())]
    with tempfile.TemporaryDirectory() as scratch:
        for spec in specs:
            cubin, description = compile_spec(spec, scratch)
            write(Path(sys.argv[2]), spec, cubin, description)
            print(spec.name, flush=True)


if __name__ == "__main__":
    main()
