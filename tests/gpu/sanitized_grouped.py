"""Every shipped grouped kernel on right and on wrong offsets, for compute-sanitizer to watch.

    python -m gpu.sanitized_grouped [--planted]

Operands are made and packed on the CPU, so that the kernels are the only ones that run. x and out have not a row to spare, so that
whatever a wrong offset leads to beyond them is out of bounds. Right offsets have an empty expert, one of one token, and tiles that
are shared along K; their results are checked, those of wrong ones are nobody's. `--planted` gives a kernel an output that is
one row too short.
"""

from __future__ import annotations

import itertools
import sys

import torch

from glu4.activation import SILU
from glu4.backends.hopper import grouped_launch
from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED
from glu4.nvfp4 import NVFP4Tensor, quantize
from glu4.problem import grouped_problem
from glu4.verify.case import Case
from glu4.verify.checker import check
from glu4.weights import pack
from gpu.watched import asks_for_a_fault
from operands import full_range

SIZES = (3, 0, 130, 1, 40)
N, K = 264, 8208  # enough of K that every configuration shares tiles
WRONG = {
    "descending": (0, 120, 60, 90, 30, 174),
    "beyond the rows": (0, 3, 3, 400, 2**31 - 1, 2**31 - 1),
    "negative": (-7, -(2**31), 3, 133, 134, 174),
    "first not 0": (50, 60, 60, 100, 170, 173),
}
X_FORMATS = ("float16", "nvfp4")
OPERATIONS = ("dual_gemm", "linear")  # gate and up, or gate alone
RIGHT = len(GROUPED_SHIPPED) * len(X_FORMATS) * len(OPERATIONS)
RUNS = RIGHT * (1 + len(WRONG))


def operands(x_format: str) -> tuple[torch.Tensor | NVFP4Tensor, NVFP4Tensor, NVFP4Tensor]:
    """x `[rows, K]`, gate and up `[E, N, K]` with scales of each expert's own."""
    draw = torch.Generator().manual_seed(7)
    experts, rows = len(SIZES), sum(SIZES)
    gate, up = (full_range(seed, experts, N, K) for seed in (1, 2))
    x = torch.randn(rows, K, generator=draw)
    return quantize(x) if x_format == "nvfp4" else x.half(), gate, up


def main() -> None:
    planted = asks_for_a_fault(__doc__)
    right = (0, *itertools.accumulate(SIZES))
    wrong = 0
    for operation, x_format in itertools.product(OPERATIONS, X_FORMATS):
        x, gate, up = operands(x_format)
        dual = operation == "dual_gemm"
        packed_here = pack((gate, up) if dual else (gate,))
        spare = torch.zeros(packed_here.numel() + 576, dtype=torch.int32)  # a last stage may read one unit more
        spare[: packed_here.numel()] = packed_here.flatten()
        packed = spare.to("cuda")[: packed_here.numel()].view(packed_here.shape)
        scales = (gate.global_scale.to("cuda"), (up if dual else gate).global_scale.to("cuda"))
        problem = grouped_problem(x, gate, dual=dual, activation=SILU, out_dtype=torch.float16, has_bias=False)
        here = x.to("cuda")
        for config in GROUPED_SHIPPED:
            for name, offsets in {"right": right, **WRONG}.items():
                on_device = torch.tensor(offsets, dtype=torch.int32).to("cuda")
                out = torch.full((sum(SIZES) - planted, N), float("nan"), dtype=torch.float16).to("cuda")
                grouped_launch.grouped(out, here, packed, on_device, scales, (None, None), SILU, problem, config)
                torch.cuda.synchronize()
                if planted:
                    return
                verdict = "ran"
                if name == "right":
                    case = Case(
                        "sanitized", 0, x, gate, up if dual else None, out_dtype=torch.float16, group_offsets=on_device.cpu()
                    )
                    verdict = "right" if check(case, out.cpu()).ok else "WRONG"
                    wrong += verdict == "WRONG"
                print(f"{operation} {config.name} {x_format} {name}: {verdict}", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
