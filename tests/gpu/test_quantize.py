"""The kernel that quantises tokens, on a GPU: torch's bits on the CPU, again and again, from a graph, and in a compiled one."""

from __future__ import annotations

import pytest
import torch

import glu4
from glu4 import nvfp4
from glu4.backends.tokens import launch
from glu4.nvfp4 import Layout, NVFP4Tensor
from gpu.harness import Target

SHAPES = [(1, 7168), (33, 48), (2, 130, 2064), (4096, 7168)]


def same(found: NVFP4Tensor, want: NVFP4Tensor) -> bool:
    here = found.to("cpu")
    scales = (t.block_scale.view(torch.uint8) for t in (here, want))
    return torch.equal(here.codes, want.codes) and torch.equal(*scales) and torch.equal(here.global_scale, want.global_scale)


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Half of it any bit pattern, NaN and infinity too."""
    draw = torch.Generator().manual_seed(1)
    wild = torch.randint(-(2**15), 2**15, shape, generator=draw, dtype=torch.int16).view(dtype)
    return torch.where(torch.rand(*shape[:-1], 1, generator=draw) < 0.5, wild, torch.randn(shape, generator=draw).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["linear", "swizzled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_the_cpu(hopper: Target, dtype: torch.dtype, layout: Layout, shape: tuple[int, ...]) -> None:
    x = drawn(shape, dtype)
    on_gpu = x.cuda()
    if not launch.quantizes(on_gpu):
        pytest.skip("the kernel that quantises is not compiled")
    for g in (0.02, 2.0**-149, torch.rand(shape[:-2]) + 0.1):
        want = nvfp4.quantize(x, g, layout=layout, nonfinite="propagate")
        there = g.cuda() if isinstance(g, torch.Tensor) else torch.tensor(g).cuda()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = glu4.quantize(on_gpu, there, layout=layout, nonfinite="propagate")
        for run in range(4):
            found = captured if run % 2 else glu4.quantize(on_gpu, there, layout=layout, nonfinite="propagate")
            if run % 2:
                graph.replay()
            assert same(found, want)
        assert same(glu4.quantize(on_gpu, there, layout=layout, nonfinite="propagate", backend="portable"), want)


def test_a_default_scale_and_a_refusal(hopper: Target) -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2)).half()
    assert same(glu4.quantize(x.cuda()), nvfp4.quantize(x))
    x[1, 2, 3] = torch.inf
    assert same(glu4.quantize(x.cuda(), nonfinite="propagate"), nvfp4.quantize(x, nonfinite="propagate"))
    with pytest.raises(ValueError, match="x: holds NaN or infinity"):
        glu4.quantize(x.cuda())


def test_in_a_compiled_graph(hopper: Target) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def parts(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = glu4.quantize(x, g, nonfinite="propagate")
        return made.codes, made.block_scale.view(torch.uint8)

    x, g = drawn((7, 96), torch.bfloat16), torch.tensor(0.3)
    want = nvfp4.quantize(x, g, nonfinite="propagate")
    codes, scales = parts(x.cuda(), g.cuda())
    assert torch.equal(codes.cpu(), want.codes)
    assert torch.equal(scales.cpu(), want.block_scale.view(torch.uint8))
