"""Compiles cute_kernels.py and cute_dense.py to ptx/cute_*.ptx and launches/cute_*.json, without a GPU.

    python compile_cute.py [NAME ...]

Needs CuTe DSL (`pip install glu4[compile]`; 4.8.1 was used) and a C compiler: the launch descriptions are those that the
exported host functions make, captured by glu4.emulator.capture.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["CUTE_DSL_ARCH"] = "sm_100a"  # must be the target before the import: export_to_c fails otherwise
os.environ.setdefault("CUTE_DSL_DISABLE_FILE_CACHING", "1")

import cutlass
import numpy as np
from cute_dense import DenseGemm, tcgen05
from cute_kernels import BF16, E2M1, E4M3, BlockScaledGemm
from cutlass import cute
from cutlass.cute.runtime import make_fake_stream, make_ptr
from launches import Problem, write

from glu4.emulator.capture import capture, describe, pointer, scalar

E8M0 = cutlass.Float8E8M0FNU
# two CTAs or pairs along M and N, K steps beyond the stages
CASES = {
    "gemm": (BlockScaledGemm(1, (128, 128), 3, False), Problem(256, 256, 1024, "e2m1", "ue4m3", 16, "128x4", "bf16")),
    "gemm_pair": (BlockScaledGemm(2, (256, 256), 2, False), Problem(512, 512, 768, "e2m1", "ue4m3", 16, "128x4", "bf16")),
    "gemm_narrow": (BlockScaledGemm(1, (128, 64), 3, False), Problem(256, 256, 768, "e2m1", "ue4m3", 16, "128x4", "bf16")),
    "gemm_mxfp8": (
        BlockScaledGemm(1, (128, 128), 3, False, E4M3, E8M0, 32),
        Problem(256, 256, 512, "e4m3", "ue8m0", 32, "128x4", "bf16"),
    ),
    "gemm_mxfp4_pair": (
        BlockScaledGemm(2, (256, 128), 2, False, E2M1, E8M0, 32),
        Problem(512, 128, 768, "e2m1", "ue8m0", 32, "128x4", "bf16"),
    ),
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

F16, F32, TF32 = cutlass.Float16, cutlass.Float32, cutlass.TFloat32
# persistent, tiles by cluster launch control; each reads its accumulators in another way
DENSE_CASES = {
    "dense": (
        DenseGemm(1, (128, 192), F16, F16, 3, ("K", "K"), tcgen05.Ld16x32bx2Op(tcgen05.Repetition.x16)),
        Problem(384, 384, 256, "f16", out="f16"),
    ),
    "dense_pair": (DenseGemm(2, (256, 128), BF16, BF16, 3), Problem(768, 384, 256, "bf16", out="bf16")),
    "dense_pair_halves": (
        DenseGemm(2, (128, 128), F16, BF16, 2, ("K", "MN")),
        Problem(384, 384, 192, "f16", out="bf16", k_major=(True, False)),
    ),
    "dense_64": (
        DenseGemm(1, (64, 192), BF16, BF16, 3, ("MN", "MN")),
        Problem(192, 384, 192, "bf16", out="bf16", k_major=(False, False)),
    ),
    "dense_e4m3": (
        DenseGemm(1, (128, 128), E4M3, F16, 3, ("K", "K"), tcgen05.Ld16x64bOp(tcgen05.Repetition.x16)),
        Problem(256, 384, 256, "e4m3", out="f16"),
    ),
    "dense_tf32": (
        DenseGemm(1, (128, 96), TF32, F32, 3, ("K", "K"), tcgen05.Ld16x128bOp(tcgen05.Repetition.x4)),
        Problem(256, 288, 128, "tf32", out="f32"),
    ),
}


def compile_case(name: str, kernel: BlockScaledGemm, problem: Problem, folder: str) -> tuple[str, list]:
    types = (kernel.element,) * 3 + (kernel.scale,) * 3 + (BF16,)
    pointers = [make_ptr(t, 0, cute.AddressSpace.gmem, assumed_align=32) for t in types]
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


def compile_dense(name: str, kernel: DenseGemm, problem: Problem, folder: str) -> tuple[str, list]:
    pointers = [make_ptr(t, 0, cute.AddressSpace.gmem, assumed_align=32) for t in (kernel.element, kernel.element, kernel.out)]
    sizes = [problem.m, problem.n, problem.k]
    options = f"--gpu-arch sm_100a --keep-ptx --dump-dir={folder}"
    compiled = cute.compile(kernel, *pointers, *map(cutlass.Int32, sizes), make_fake_stream(), options=options)
    compiled.export_to_c(file_path=folder, file_name=name, function_prefix=name)
    text = compiled.artifacts.PTX
    buffers = {
        n: (0x7000_0000_0000 + (i << 36), int(np.prod(b["shape"])) * np.dtype(b["dtype"]).itemsize)
        for i, (n, b) in enumerate(problem.buffers().items())
    }
    arguments = [*(pointer(buffers[n][0]) for n in "ABC"), *(scalar("i32", x) for x in sizes), pointer(0)]
    (launch,) = capture(Path(folder) / f"{name}.o", text, arguments)
    return text, [launch, buffers]


def main() -> None:
    chosen = sys.argv[1:]
    for name, (kernel, problem) in {**CASES, **DENSE_CASES}.items():
        if chosen and name not in chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            make = compile_dense if name in DENSE_CASES else compile_case
            text, (launch, buffers) = make(name, kernel, problem, folder)
        described = describe(launch, buffers)
        # the mangled name is as long as the types of all arguments
        entry = name if name in DENSE_CASES else f"block_scaled_{name}"
        text = text.replace(launch.kernel, entry)
        text = re.sub(r"[ \t]*//[^\n]*", "", text)
        write(f"cute_{name}", text, described | {"entry": entry}, problem)


if __name__ == "__main__":
    main()
