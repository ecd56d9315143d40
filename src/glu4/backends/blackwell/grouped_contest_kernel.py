"""`custom_kernel` of GPU MODE's problem nvfp4_group_gemm, by the package's own kernel and host code.

`glu4 export-submission --problem group_gemm` writes this module and all that it uses into one file (glu4.verify.export). The
form of the data: glu4.verify.contest. Nothing is copied; a call after the first of its sizes encodes and compiles nothing.
"""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any, NamedTuple

import torch

from glu4.backends.blackwell.grouped_build import compile_grouped
from glu4.backends.blackwell.grouped_config import GroupConfig
from glu4.backends.blackwell.grouped_launch import GroupChoice, GroupPlan, grouped_sizes
from glu4.compiled.driver import Kernel

__all__ = ["ARCH", "TABLE", "custom_kernel"]

ARCH = "sm_100a"
# (M, N, K, L) of every group to a configuration; written by the export
TABLE: dict[tuple[tuple[int, int, int, int], ...], GroupConfig] = {}


class Spec(NamedTuple):
    """What `compile_grouped` reads of a kernel's specification."""

    config: GroupConfig
    out: str = "f16"
    arch: str = ARCH
    name: str = "submission"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name}


@cache
def _kernel(config: GroupConfig) -> Kernel:
    """Compiled now, once in this process."""
    spec: Any = Spec(config)
    with tempfile.TemporaryDirectory() as scratch:
        cubin, _, description = compile_grouped(spec, scratch)
    formats = [f"{size}s" for size in grouped_sizes(config)]
    return Kernel(cubin, description, formats, cluster=(config.ctas, 1, 1))


@cache
def _ones(groups: int, device: torch.device) -> torch.Tensor:
    """The global scales of every operand."""
    return torch.ones(groups, dtype=torch.float32, device=device)


@cache
def _plan(sizes: tuple[tuple[int, int, int, int], ...], device: torch.device) -> tuple[GroupPlan, int, int]:
    """(the plan of a launch, the device's number, the address of as many float32 ones as there are groups).

    Raises ValueError for sizes that the kernel does not take.
    """
    if any(k % 32 or batch != 1 for _, _, k, batch in sizes):
        raise ValueError(f"problem sizes: expected K a multiple of 32, and L 1, of every group, got {list(sizes)}")
    config = TABLE.get(sizes) or GroupConfig(len(sizes))  # which is legal for all of these
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 148
    ones = _ones(len(sizes), device)
    choice = GroupChoice(_kernel(config), config, processors)
    plan = GroupPlan(choice, [size[:3] for size in sizes], [n for _, n, _, _ in sizes])
    return plan, ones.get_device(), ones.data_ptr()


def custom_kernel(data: Any) -> list[torch.Tensor]:
    """C = A B^T of every group into data's c, float16 `(M, N, 1)`, all of which are returned."""
    matrices, _, scales, sizes = data
    plan, index, ones = _plan(tuple(map(tuple, sizes)), matrices[0][2].device)
    addresses: list[int] = []
    for (a, b, c), (scale_a, scale_b) in zip(matrices, scales):
        addresses += (b.data_ptr(), scale_b.data_ptr(), a.data_ptr(), scale_a.data_ptr(), c.data_ptr())
    addresses += (ones, ones)
    plan.launch(index, torch._C._cuda_getCurrentRawStream(index), addresses)
    return [c for _, _, c in matrices]
