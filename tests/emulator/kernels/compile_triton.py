"""Compiles triton_kernels.py to ptx/triton_*.ptx and launches/triton_*.json, without a GPU: python compile_triton.py

Needs Triton 3.8 or later (3.9.0 was used) and nothing else. A tensor descriptor argument becomes a tensor map, its shape
(32-bit) and its strides (64-bit) in the kernel's parameters; two pointers to scratch memory, unused here, come last. What
the tensor map must hold, Triton's host code reads from the metadata of the compiled kernel, as this script does.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton_kernels as kernels
from launches import Problem, write
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ELEMENT_TYPES = {0: "u8", 1: "u16", 6: "f16", 10: "bf16"}
SWIZZLES = ("none", "32B", "64B", "128B")
TRITON_TYPES = {"u8": "u8", "f16": "fp16", "bf16": "bf16", "e4m3": "fp8e4nv", "e5m2": "fp8e5"}
BYTES = {"u8": 1, "f16": 2, "bf16": 2, "e4m3": 1, "e5m2": 1}


@dataclass
class Case:
    """One kernel to compile: tile, problem and options. Buffers are named as the kernel's parameters."""

    name: str
    kernel: Any
    tile: tuple[int, int, int]
    problem: Problem
    constants: dict[str, Any] = field(default_factory=dict)
    scales: str = "pointer"  # or descriptor
    stages: int = 2
    warps: int = 4


def arguments(case: Case) -> dict[str, tuple[str, Any]]:
    """Name of each run-time parameter: (Triton type, what it is): a buffer, a descriptor's block, or a number."""
    p, (bm, bn, bk) = case.problem, case.tile
    pack = 2 if p.element == "e2m1" else 1
    operand = "u8" if p.element == "e2m1" else p.element
    out: dict[str, tuple[str, Any]] = {}
    for name in case.kernel.arg_names:
        rows = bm if name.endswith("a") or name == "c" else bn
        if name == "k_size" or name == "n_size":
            out[name] = ("i32", p.k if name == "k_size" else p.n)
        elif name.startswith("global_"):
            out[name] = ("fp32", p.global_scales[0 if name == "global_gate" else 1])
        elif name.startswith("scale_"):
            kind = "fp8e4nv" if p.scale == "ue4m3" else "u8"
            if case.scales == "descriptor":
                block = (1, rows // 128, bk // 64, 2, 256)
                out[name] = (f"tensordesc<{kind}{list(block)}>", "descriptor")
            else:
                out[name] = (f"*{kind}", "pointer")
        elif name in ("a", "b", "gate", "up", "c"):
            kind, width = (p.out, bn) if name == "c" else (operand, bk // pack)
            if case.kernel is kernels.gemm_pointers:
                out[name] = (f"*{TRITON_TYPES[kind]}", "pointer")
            else:
                out[name] = (f"tensordesc<{TRITON_TYPES[kind]}[{rows}, {width}]>", "descriptor")
    return out


def compile_case(case: Case) -> Any:
    runtime = arguments(case)
    signature = {name: runtime[name][0].replace(" ", "") if name in runtime else "constexpr" for name in case.kernel.arg_names}
    constants = dict(zip(("BM", "BN", "BK"), case.tile)) | case.constants
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i32"
    }
    source = ASTSource(case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", 100, 32), options={"num_warps": case.warps, "num_stages": case.stages}
    )


def tensor_map(name: str, shape: tuple[int, ...], element_bytes: int, meta: dict[str, Any]) -> dict[str, Any]:
    strides = [element_bytes]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return {
        "buffer": name,
        "element_type": ELEMENT_TYPES[meta["elem_type"]],
        "global_shape": list(reversed(shape)),
        "global_strides_bytes": strides[1:],
        "box_shape": list(reversed(meta["block_size"])),
        "element_strides": [1] * len(shape),
        "swizzle": SWIZZLES[meta["swizzle"]],
        "interleave": "none",
        "oob_fill": "zero",
    }


def parameters(case: Case, metadata: Any) -> list[dict[str, Any]]:
    params: list[dict[str, Any]] = []
    descriptors = iter(metadata.tensordesc_meta)
    for name, (kind, value) in arguments(case).items():
        if value == "pointer":
            params.append({"ptr": name.upper()})
        elif value == "descriptor":
            shape = case.problem.shape(name.upper())
            size = BYTES.get(case.problem.out, 1) if name == "c" else BYTES.get(case.problem.element, 1)
            size = 1 if name.startswith("scale_") else size
            params.append({"tensor_map": tensor_map(name.upper(), shape, size, next(descriptors))})
            strides = [1]
            for extent in reversed(shape[1:]):
                strides.insert(0, strides[0] * extent)
            params += [{"u32": extent} for extent in shape] + [{"u64": stride} for stride in strides]
        else:
            params.append({"f32" if kind == "fp32" else "i32": value})
    return [*params, {"u64": 0}, {"u64": 0}]


def clean(ptx: str) -> str:
    """PTX without debug sections and folders, but with `.loc`."""
    ptx = re.sub(r"^\t\.section\t.*?^\t\}\n", "", ptx, flags=re.M | re.S)
    ptx = re.sub(r'^(\t\.file\t\d+ )"[^"]*?([^/"]+)"', r'\1"\2"', ptx, flags=re.M)
    return re.sub(r"[ \t]*//[^\n]*", "", ptx)


def cases() -> list[Case]:
    def nvfp4(tile: tuple[int, int, int], k: int, **options: Any) -> Problem:
        return Problem(2 * tile[0], 2 * tile[1], k, "e2m1", "ue4m3", 16, **options)

    dual = {"out": "bf16", "global_scales": (3 / 8192, 11 / 8192)}
    one = {"PACK": 2, "BLOCK": 16, "FORMAT": "e2m1"}
    return [
        Case("gemm_pointers", kernels.gemm_pointers, (128, 128, 128), nvfp4((128, 128, 128), 512)),
        Case("gemm_128x256x64", kernels.gemm_descriptors, (128, 256, 64), nvfp4((128, 256, 64), 256), one),
        Case("gemm_256x64x128", kernels.gemm_descriptors, (256, 64, 128), nvfp4((256, 64, 128), 384), one),
        Case("gemm_64x128x128", kernels.gemm_descriptors, (64, 128, 128), nvfp4((64, 128, 128), 384), one),
        Case(
            "gemm_mxfp4", kernels.gemm_descriptors, (128, 128, 256), Problem(256, 256, 768, "e2m1", "ue8m0", 32),
            {"PACK": 2, "BLOCK": 32, "FORMAT": "e2m1"},
        ),
        Case(
            "gemm_mxfp8", kernels.gemm_descriptors, (128, 64, 128), Problem(256, 128, 384, "e4m3", "ue8m0", 32),
            {"PACK": 1, "BLOCK": 32, "FORMAT": "e4m3"},
        ),
        Case(
            "gemm_blocked", kernels.gemm_blocked_scales, (128, 128, 256), nvfp4((128, 128, 256), 1024, scale_layout="128x4"),
            {"SPECIALIZE": False}, scales="descriptor", stages=3,
        ),
        Case(
            "gemm_specialized", kernels.gemm_blocked_scales, (128, 128, 256),
            nvfp4((128, 128, 256), 1024, scale_layout="128x4"), {"SPECIALIZE": True}, scales="descriptor", stages=3,
        ),
        # a part of a tile in every direction
        Case(
            "gemm_ragged", kernels.gemm_blocked_scales, (128, 128, 256),
            Problem(200, 136, 960, "e2m1", "ue4m3", 16, "128x4"), {"SPECIALIZE": True}, scales="descriptor", stages=2,
        ),
        Case("dual_linear", kernels.dual_linear_scales, (128, 128, 128), nvfp4((128, 128, 128), 512, **dual), stages=3),
        Case(
            "dual_blocked", kernels.dual_blocked_scales, (128, 128, 256),
            nvfp4((128, 128, 256), 1024, scale_layout="128x4", **dual), scales="descriptor",
        ),
        Case("gemm_bf16", kernels.gemm_unscaled, (128, 128, 64), Problem(256, 256, 256, "bf16")),
        Case("gemm_e5m2", kernels.gemm_unscaled, (128, 64, 128), Problem(256, 128, 512, "e5m2")),
    ]  # fmt: skip


def main() -> None:
    for case in cases():
        compiled = compile_case(case)
        metadata = compiled.metadata
        p, (bm, bn, _) = case.problem, case.tile
        text = clean(compiled.asm["ptx"])
        # warp specialisation adds warps
        threads = int(re.findall(r"\.reqntid (\d+)", text)[0])
        launch = {
            "entry": metadata.name,
            "grid": [-(-p.m // bm), -(-p.n // bn), 1],
            "block": [threads, 1, 1],
            "dynamic_smem": metadata.shared,
            "params": parameters(case, metadata),
        }
        write(f"triton_{case.name}", text, launch, p)


if __name__ == "__main__":
    main()
