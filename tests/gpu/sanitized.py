"""Every shipped kernel once, on a small problem, for compute-sanitizer to watch: python -m gpu.sanitized [--planted]

Operands are made and packed on the CPU, so that the kernels are the only ones that run. Each problem has two ragged tiles of
tokens and of weight rows and more of K than all stages hold, so that every barrier is used again. Results are compared bit for
bit. `--planted` gives one kernel an output whose memory ends a row too early: its shape says how many rows the kernel writes.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from glu4 import NVFP4Tensor
from glu4.backends.hopper import launch
from glu4.backends.hopper.config import SHIPPED, TILE_K, Config
from glu4.backends.hopper.pack import pack_gated, pack_matrix
from glu4.problem import dense_problem
from glu4.verify.case import Case
from glu4.verify.cases import exact_sum_case
from gpu.watched import asks_for_a_fault

TYPES = (("float16", torch.float16), ("bfloat16", torch.bfloat16))
# NVFP4 tokens, which a kernel decodes, or another ahead of it from linear and from swizzled scales
OWN, AHEAD, SWIZZLED = "nvfp4", "nvfp4 decoded ahead", "nvfp4 decoded ahead, swizzled"


def types(config: Config) -> tuple[tuple[str, torch.dtype], ...]:
    """Tokens and outputs that a configuration is watched with."""
    own = ((OWN, torch.float16), (OWN, torch.bfloat16), (AHEAD, torch.float16), (SWIZZLED, torch.float16))
    return TYPES + own * config.takes_nvfp4


def problem(config: Config, linear: bool, x_format: str, out_dtype: torch.dtype) -> Case:
    """Two ragged tiles either way, and two stages more of K than there are, the last one in part."""
    n = config.rows * (64 if linear else 32) + 8
    # a kernel that decodes takes K in steps of 64
    k = TILE_K * config.stage_units * (config.stages + 1) * config.splits + (TILE_K if x_format == OWN else 16)
    kind = "nvfp4" if x_format.startswith("nvfp4") else x_format
    case = exact_sum_case(config.tokens, config.tokens + 3, n, k, x_format=kind, out_dtype=out_dtype, linear=linear)
    if isinstance(case.x, NVFP4Tensor):
        case = replace(case, x=case.x.to_swizzled() if x_format == SWIZZLED else case.x.to_linear())
    return case


def run(case: Case, config: Config, out: Tensor) -> Tensor:
    """The case with one kernel into `out`, which is on the GPU; back on the CPU."""
    packed = pack_matrix(case.gate) if case.up is None else pack_gated(case.gate, case.up)
    spare = torch.empty(packed.numel() + 576, dtype=torch.int32, device="cuda")  # a last stage may read one unit more
    spare.copy_(torch.cat((packed.flatten(), torch.zeros(576, dtype=torch.int32))))
    here = case.to("cuda")
    second = here.gate if here.up is None else here.up
    form = {"dual": here.up is not None, "activation": case.activation, "out_dtype": case.out_dtype, "has_bias": False}
    scales = (here.gate.global_scale, second.global_scale)
    weights = spare[: packed.numel()].view(packed.shape)
    launch.dense(out, here.x, weights, scales, (None, None), case.activation, dense_problem(here.x, here.gate, **form), config)
    torch.cuda.synchronize()
    return out.cpu()


def main() -> None:
    planted = asks_for_a_fault(__doc__)
    wrong = 0
    for config in SHIPPED:
        for linear in (False, True):
            for x_format, dtype in types(config):
                case = problem(config, linear, x_format, dtype)
                m, n = case.out_shape
                out = torch.full((m, n), float("nan"), dtype=dtype).to("cuda")
                if planted:
                    out.untyped_storage().resize_((m - 1) * n * dtype.itemsize)
                got = run(case, config, out)
                if planted:
                    return
                right = torch.equal(got, case.expected())
                wrong += not right
                print(
                    f"{config.name} {'linear' if linear else 'dual_gemm'} {x_format}: {'right' if right else 'WRONG'}",
                    flush=True,
                )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
