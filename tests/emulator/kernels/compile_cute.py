"""Compiles cute_kernels.py to ptx/cute_*.ptx and launches/cute_*.json, without a GPU: python compile_cute.py

Needs CuTe DSL (`pip install glu4[compile]`; 4.8.1 was used) and a C compiler: the launch descriptions are those that the
exported host functions make, captured by glu4.emulator.capture.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

os.environ["CUTE_DSL_ARCH"] = "sm_100a"  # must be the target before the import: export_to_c fails otherwise
os.environ.setdefault("CUTE_DSL_DISABLE_FILE_CACHING", "1")

import cutlass
import numpy as np
from cute_kernels import BF16, E2M1, E4M3, BlockScaledGemm
from cutlass import cute
from cutlass.cute.runtime import make_fake_stream, make_ptr
from launches import Problem, write

from glu4.emulator.capture import capture, describe, pointer, scalar

# two CTAs or pairs along M and N, K steps beyond the stages
CASES = {
    "gemm": (BlockScaledGemm(1, (128, 128), 3, False), Problem(256, 256, 1024, "e2m1", "ue4m3", 16, "128x4", "bf16")),
    "gemm_pair": (BlockScaledGemm(2, (256, 256), 2, False), Problem(512, 512, 768, "e2m1", "ue4m3", 16, "128x4", "bf16")),
    "gemm_narrow": (BlockScaledGemm(1, (128, 64), 3, False), Problem(256, 256, 768, "e2m1", "ue4m3", 16, "128x4", "bf16")),
    "dual": (
        BlockScaledGemm(1, (128, 128), 2, True),
        Problem(256, 256, 768, "e2m1", "ue4m3", 16, "128x4", "bf16", (3 / 8192, 11 / 8192)),
    ),
    "dual_pair": (
        BlockScaledGemm(2, (256, 128), 3, True),
        Problem(512, 256, 1024, "e2m1", "ue4m3", 16, "128x4", "bf16", (3 / 8192, 11 / 8192)),
    ),
    "dual_narrow_pair": (
        BlockScaledGemm(2, (256, 64), 3, True),
        Problem(512, 192, 768, "e2m1", "ue4m3", 16, "128x4", "bf16", (3 / 8192, 11 / 8192)),
    ),
}


def compile_case(name: str, kernel: BlockScaledGemm, problem: Problem, folder: str) -> tuple[str, list]:
    pointers = [make_ptr(t, 0, cute.AddressSpace.gmem, assumed_align=32) for t in (E2M1,) * 3 + (E4M3,) * 3 + (BF16,)]
    numbers = [cutlass.Float32(1), cutlass.Float32(1), *(cutlass.Int32(x) for x in (problem.m, problem.n, problem.k))]
    options = f"--gpu-arch sm_100a --keep-ptx --dump-dir={folder}"
    compiled = cute.compile(kernel, *pointers, *numbers, make_fake_stream(), options=options)
    compiled.export_to_c(file_path=folder, file_name=name, function_prefix=name)
    text = compiled.artifacts.PTX
    sizes = {n: int(np.prod(b["shape"])) * np.dtype(b["dtype"]).itemsize for n, b in problem.buffers().items()}
    # invented addresses, far enough apart
    buffers = {n: (0x7000_0000_0000 + (i << 36), size) for i, (n, size) in enumerate(sizes.items())}
    at = {n: pointer(address) for n, (address, _) in buffers.items()}
    first, last = problem.weights[0], problem.weights[-1]
    arguments = [at[name] for name in ("A", first, last, "SCALE_A", f"SCALE_{first}", f"SCALE_{last}", "C")]
    arguments += [scalar("f32", g) for g in problem.global_scales or (1.0, 1.0)]
    arguments += [scalar("i32", x) for x in (problem.m, problem.n, problem.k)] + [pointer(0)]
    (launch,) = capture(Path(folder) / f"{name}.o", text, arguments)
    return text, [launch, buffers]


def main() -> None:
    for name, (kernel, problem) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            text, (launch, buffers) = compile_case(name, kernel, problem, folder)
        described = describe(launch, buffers)
        # the mangled name is as long as the types of all arguments
        text = text.replace(launch.kernel, f"block_scaled_{name}")
        text = re.sub(r"[ \t]*//[^\n]*", "", text)
        write(f"cute_{name}", text, described | {"entry": f"block_scaled_{name}"}, problem)


if __name__ == "__main__":
    main()
