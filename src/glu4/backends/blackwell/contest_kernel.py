"""`custom_kernel` of GPU MODE's problem nvfp4_dual_gemm, by the package's own kernel and host code.

`glu4 export-submission` writes this module and all that it uses into one file (glu4.verify.export). Form of the data, device
pointers throughout: glu4.verify.contest. Nothing is copied; a call after the first of its shape encodes and compiles nothing.
"""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any, NamedTuple

import torch

from glu4.backends.blackwell import arguments
from glu4.backends.blackwell.arguments import Shape
from glu4.backends.blackwell.build import compile_spec
from glu4.backends.blackwell.config import Config
from glu4.backends.blackwell.launch import Choice, Plan
from glu4.compiled.driver import Kernel

__all__ = ["ARCH", "FALLBACK", "TABLE", "custom_kernel"]

ARCH = "sm_100a"
TABLE: dict[tuple[int, int, int, int], Config] = {}  # (M, N, K, L) to a configuration; written by the export
FALLBACK = Config()  # of other shapes: legal for every M, N and L, and every K that is a multiple of 32
_SILU = (1.0, 0.0, float("inf"))  # alpha, beta, limit


class Spec(NamedTuple):
    """What `compile_spec` and launches read of a kernel's specification."""

    config: Config
    out: str = "f16"
    dual: bool = True
    arch: str = ARCH
    weights: int = 2
    name: str = "submission"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name}


@cache
def _kernel(config: Config) -> Kernel:
    """Compiled now, once in this process."""
    spec: Any = Spec(config)
    with tempfile.TemporaryDirectory() as scratch:
        cubin, description = compile_spec(spec, scratch)
    formats = [f"{size}s" for size in arguments.sizes(spec)]
    return Kernel(cubin, description, formats, cluster=(config.ctas, 1, 1))


@cache
def _one(device: torch.device) -> torch.Tensor:
    """The global scale of every operand."""
    return torch.ones(1, dtype=torch.float32, device=device)


@cache
def _plan(m: int, n: int, k: int, batch: int, device: torch.device) -> tuple[Plan, int, int]:
    """(the plan of a launch, the device's number, the address of a float32 one)."""
    config = TABLE.get((m, n, k, batch), FALLBACK)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 148
    spec: Any = Spec(config)
    one = _one(device)
    plan = Plan(Choice(_kernel(config), spec, processors), Shape(batch, m, n, k, n, m * n), 0, _SILU)
    return plan, one.get_device(), one.data_ptr()


def custom_kernel(data: Any) -> torch.Tensor:
    """C = silu(A B1^T) * (A B2^T) into data's c, float16 `(M, N, L)`, which is returned."""
    a, b1, b2, _, _, _, sfa, sfb1, sfb2, c = data
    m, n, batch = c.shape
    plan, index, one = _plan(m, n, 2 * a.shape[1], batch, c.device)
    addresses = (
        a.data_ptr(), sfa.data_ptr(), b1.data_ptr(), sfb1.data_ptr(), b2.data_ptr(), sfb2.data_ptr(), c.data_ptr(), one,
        one, one, one, one, one,
    )  # fmt: skip
    plan.launch(index, torch._C._cuda_getCurrentRawStream(index), addresses, True)
    return c  # type: ignore[no-any-return]
