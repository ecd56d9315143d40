"""The kernels that sort choices and add up results, on a GPU: torch's results on the CPU, again and again, and from a graph."""

from __future__ import annotations

import pytest
import torch

from glu4.backends.tokens import launch
from glu4.moe import Routing, moe_combine, sort_by_expert
from gpu.harness import Target

SIZES = [(1, 1, 1), (64, 8, 128), (1000, 3, 5), (8192, 8, 512), (333, 2, 1023)]  # tokens, top_k, experts


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), SIZES)
def test_choices_are_sorted(hopper: Target, dtype: torch.dtype, tokens: int, top_k: int, experts: int) -> None:
    if not launch.sorts(torch.device("cuda", 0), tokens * top_k, experts):
        pytest.skip("the kernel that sorts is not compiled")
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(-2, experts + 2, (tokens, top_k), generator=draw, dtype=dtype)
    want = sort_by_expert(ids, experts)
    on_gpu = ids.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sort_by_expert(on_gpu, experts)
    for run in range(20):
        found: Routing = captured if run % 2 else sort_by_expert(on_gpu, experts)
        if run % 2:
            graph.replay()
        for a, b in zip(found, want, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "top_k", "columns"), [(1, 1, 8), (64, 8, 2048), (9, 3, 1033), (512, 8, 7168)])
def test_results_are_added_up(hopper: Target, dtype: torch.dtype, tokens: int, top_k: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(-1, 17, (tokens, top_k), generator=draw)
    routing = sort_by_expert(ids, 16)
    y, router = torch.randn(tokens * top_k, columns, generator=draw).to(dtype), torch.rand(tokens, top_k, generator=draw)
    y[int(routing.group_offsets[-1]) :] = torch.nan
    want = moe_combine(y.double().float(), routing, router).double()
    on_gpu = Routing(*(t.cuda() for t in routing if t is not None))
    if not launch.combines(y.cuda(), dtype):
        pytest.skip("the kernel that combines is not compiled")
    found = moe_combine(y.cuda(), on_gpu, router.cuda())
    spacing = 2.0 ** (-10 if dtype == torch.float16 else -7)
    # half a unit in the last place of the type, and (top_k + 1) roundings of float32 of terms of up to 5
    assert ((found.cpu().double() - want).abs() <= spacing / 2 * want.abs() + (top_k + 1) * 5 * 2.0**-23 + 2.0**-25).all()
    for _ in range(20):
        assert torch.equal(moe_combine(y.cuda(), on_gpu, router.cuda()), found)
