"""What finds, sorts and adds up tokens of a mixture of experts, for compute-sanitizer to watch.

    python -m gpu.sanitized_tokens [--planted]

The grouped kernels that gather and the one that decodes as it gathers, on the right and the wrong offsets of `sanitized_grouped`;
the kernels that sort choices, add up results and quantise. Nothing has a byte to spare. Results on right offsets are checked. `--planted`
gives the kernel that adds up an output of one row too few.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor

from glu4 import nvfp4
from glu4.activation import SILU
from glu4.backends.hopper import grouped_launch, tokens
from glu4.backends.hopper.grouped_config import GATHER_CONFIGS, GROUPED_SHIPPED
from glu4.backends.tokens import launch as routing
from glu4.moe import Routing, moe_combine, sort_by_expert
from glu4.nvfp4 import Layout, NVFP4Tensor, gather_rows
from glu4.problem import grouped_problem
from glu4.quantizer import quantize
from glu4.verify.case import Case
from glu4.verify.checker import check
from glu4.weights import pack
from gpu.sanitized_grouped import SIZES, WRONG, N, operands
from gpu.watched import asks_for_a_fault

TOP_K = 2
SORTED = ((1, 1, 1), (87, 2, 5), (700, 8, 512))  # tokens, top_k, experts
ADDED = ((1, 1, 8), (87, 2, 264), (9, 3, 1033))  # tokens, top_k, columns
QUANTISED = ((1, 16), (87, 144), (2, 129, 80))  # x's shape
RIGHT = len(GATHER_CONFIGS) * 2 + len(GROUPED_SHIPPED) + len(SORTED) * 2 + len(ADDED) * 2 + len(QUANTISED) * 4
RUNS = RIGHT + (len(GATHER_CONFIGS) * 2 + len(GROUPED_SHIPPED)) * len(WRONG)


def gathering(x_format: str) -> int:
    """Run every kernel that gathers; how many results are wrong."""
    x, gate, up = operands(x_format)
    rows = sum(SIZES)
    x = x[: rows // TOP_K] if isinstance(x, Tensor) else x.narrow_rows(0, rows // TOP_K)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).view(-1, TOP_K)
    packed_here = pack((gate, up))
    spare = torch.zeros(packed_here.numel() + 576, dtype=torch.int32)  # a last stage may read one unit more
    spare[: packed_here.numel()] = packed_here.flatten()
    packed = spare.to("cuda")[: packed_here.numel()].view(packed_here.shape)
    scales = (gate.global_scale.to("cuda"), up.global_scale.to("cuda"))
    problem = grouped_problem(x, gate, activation=SILU, out_dtype=torch.float16, has_bias=False)
    here, order_there, wrong = x.to("cuda"), order.to("cuda"), 0
    index = order_there.get_device()
    x_scale = here.global_scale if isinstance(here, NVFP4Tensor) else None
    ways = [("load", config) for config in GATHER_CONFIGS]
    ways += [("decode", config) for config in GROUPED_SHIPPED] if x_format == "nvfp4" else []
    for (way, config), (name, offsets) in itertools.product(
        ways, {"right": (0, *itertools.accumulate(SIZES)), **WRONG}.items()
    ):
        on_device = torch.tensor(offsets, dtype=torch.int32).to("cuda")
        out = torch.full((rows, N), float("nan"), dtype=torch.float16).to("cuda")
        if way == "decode":
            assert isinstance(here, NVFP4Tensor)
            values: Tensor | NVFP4Tensor | None = tokens.gathered(here, order_there, index)
        else:
            values = tokens.prepared(here, False, index)
        kernel = grouped_launch.grouped_kernel(grouped_launch._spec(config, torch.float16, torch.float16, True))
        assert isinstance(values, Tensor)
        assert kernel is not None
        grouped_launch.submit(
            kernel, config, index, values, packed, on_device, scales, x_scale, (None, None), SILU, out,
            order_there if way == "load" else None,
        )  # fmt: skip
        torch.cuda.synchronize()
        verdict = "ran"
        if name == "right":
            case = Case("gather", 0, gather_rows(x, order), gate, up, out_dtype=torch.float16, group_offsets=on_device.cpu())
            verdict = "right" if check(case, out.cpu()).ok else "WRONG"
            wrong += verdict == "WRONG"
        print(f"{way} {config.name} {x_format} {problem.rows} {name}: {verdict}", flush=True)
    return wrong


def sorting() -> int:
    wrong = 0
    for (count, top_k, experts), dtype in itertools.product(SORTED, (torch.int32, torch.int64)):
        draw = torch.Generator().manual_seed(2)
        ids = torch.randint(-1, experts + 1, (count, top_k), generator=draw, dtype=dtype)
        there = ids.to("cuda")
        assert routing.sorts(there.device, there.numel(), experts)
        found, want = sort_by_expert(there, experts), sort_by_expert(ids, experts)
        right = all(torch.equal(a.cpu(), b) for a, b in zip(found, want, strict=True))  # type: ignore[union-attr,arg-type]
        print(f"sort {count} x {top_k} among {experts}, {dtype}: {'right' if right else 'WRONG'}", flush=True)
        wrong += not right
    return wrong


def results(count: int, top_k: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Routing, Tensor]:
    """y, whose rows of no expert are NaN, a routing and the router's weights, on the CPU."""
    draw = torch.Generator().manual_seed(3)
    routed = sort_by_expert(torch.randint(-1, 5, (count, top_k), generator=draw), 5)
    y = torch.randn(count * top_k, columns, generator=draw).to(dtype)
    y[int(routed.group_offsets[-1]) :] = torch.nan
    return y, routed, torch.rand(count, top_k, generator=draw)


def adding() -> int:
    wrong = 0
    for (count, top_k, columns), dtype in itertools.product(ADDED, (torch.float16, torch.bfloat16)):
        y, routed, router = results(count, top_k, columns, dtype)
        there = Routing(*(t.to("cuda") for t in routed if t is not None))
        assert routing.combines(y.to("cuda"), dtype)
        found = moe_combine(y.to("cuda"), there, router.to("cuda")).cpu()
        right = torch.allclose(found.float(), moe_combine(y.float(), routed, router), rtol=2.0**-7, atol=2.0**-10)
        print(f"add {count} x {top_k} of {columns}, {dtype}: {'right' if right else 'WRONG'}", flush=True)
        wrong += not right
    return wrong


def quantising() -> int:
    wrong = 0
    layouts: tuple[Layout, ...] = ("linear", "swizzled")
    for shape, dtype, layout in itertools.product(QUANTISED, (torch.float16, torch.bfloat16), layouts):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        g = torch.rand(shape[:-2], generator=torch.Generator().manual_seed(5)) + 0.01
        there = x.to("cuda")
        assert routing.quantizes(there)
        found = quantize(there, g.to("cuda"), layout=layout, nonfinite="propagate").to("cpu")
        want = nvfp4.quantize(x, g, layout=layout)
        right = torch.equal(found.codes, want.codes)
        right &= torch.equal(found.block_scale.view(torch.uint8), want.block_scale.view(torch.uint8))
        print(f"quantise {list(shape)} {layout}, {dtype}: {'right' if right else 'WRONG'}", flush=True)
        wrong += not right
    return wrong


def plant() -> None:
    """Add up into an output of one row too few."""
    y, routed, router = results(87, 2, 264, torch.float16)
    assert routed.places is not None
    operands_there = [t.to("cuda") for t in (y, routed.places, router, routed.group_offsets[-1:])]
    routing.combine(*operands_there, torch.empty((86, 264), dtype=torch.float16).to("cuda"))
    torch.cuda.synchronize()


def main() -> None:
    planted = asks_for_a_fault(__doc__)
    if planted:
        plant()
        return
    wrong = sorting() + adding() + quantising() + gathering("float16") + gathering("nvfp4")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
