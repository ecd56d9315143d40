"""One NVFP4 matrix an expert on a GPU: right by the checker, the same bits again, and one graph for every routing."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from glu4 import LinearWeight, NVFP4Tensor, grouped_linear, quantize
from glu4.backends.hopper import grouped_launch
from glu4.verify.case import Case
from glu4.verify.checker import check
from gpu.harness import SENTINEL, Target
from operands import full_range

# tokens of each expert, N, K: tails of both, tiles that several CTAs share, most experts without a token
LAYERS: list[tuple[tuple[int, ...], int, int]] = [
    ((3, 0, 9, 1, 17), 72, 208),
    ((300, 0, 61, 5), 264, 1040),
    ((3, 0, 130, 1, 40), 264, 8208),
    ((1, *[0] * 63, 2, *[0] * 63), 104, 64),
]
FORMATS = ("float16", "bfloat16", "nvfp4")


class Down:
    """Operands of one call on the GPU, two rows of no expert after the last."""

    def __init__(self, x_format: str, counts: tuple[int, ...], n: int, k: int) -> None:
        if not grouped_launch.available(False, "nvfp4", torch.float16):
            pytest.skip("the kernels of grouped_linear are not compiled")
        draw, rows = torch.Generator().manual_seed(3), sum(counts) + 2
        self.matrix, values = full_range(1, len(counts), n, k), torch.randn(rows, k, generator=draw)
        self.weight = LinearWeight(self.matrix).prepare("cuda")
        self.bias = torch.randn(len(counts), n, generator=draw).cuda()
        self.dtype = torch.bfloat16 if x_format == "bfloat16" else torch.float16
        self.x: Tensor | NVFP4Tensor = (quantize(values) if x_format == "nvfp4" else values.to(self.dtype)).to("cuda")
        self.out = torch.full((rows, n), SENTINEL, dtype=torch.int16, device="cuda").view(self.dtype)
        self.offsets = self.ends(counts)

    @staticmethod
    def ends(counts: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32).cuda()

    def __call__(self, out: Tensor) -> Tensor:
        return grouped_linear(self.x, self.weight, self.offsets, bias=self.bias, out=out, backend="hopper")

    def wrong(self, out: Tensor) -> str:
        """What is not as specified, nothing where all is."""
        last, n = int(self.offsets[-1]), out.shape[1]
        if not (out[last:].view(torch.int16) == SENTINEL).all():
            return "rows beyond the last expert's were written"
        whole = Case("down", 0, self.x, self.matrix.to("cuda"), None, gate_bias=self.bias, out_dtype=self.dtype,
                     group_offsets=self.offsets)  # fmt: skip
        rows = torch.linspace(0, last - 1, min(last, 64), device="cuda").long().unique()
        columns = torch.linspace(0, n - 1, min(n, 96), device="cuda").long().unique()
        verdict = check(whole.sample(rows, columns).to("cpu"), out[rows][:, columns].cpu())
        return "" if verdict.ok else verdict.summary()


@pytest.mark.parametrize("layer", LAYERS, ids=("few", "many", "shared", "empty"))
@pytest.mark.parametrize("x_format", FORMATS)
def test_right_and_the_same_bits_again(hopper: Target, x_format: str, layer: tuple[tuple[int, ...], int, int]) -> None:
    call = Down(x_format, *layer)
    outs = [call(call.out.clone()) for _ in range(3)]
    assert call.wrong(outs[0]) == ""
    assert all(torch.equal(out.view(torch.int16), outs[0].view(torch.int16)) for out in outs)


@pytest.mark.parametrize("x_format", FORMATS)
def test_one_graph_serves_every_routing(hopper: Target, x_format: str) -> None:
    counts, n, k = LAYERS[0]
    call = Down(x_format, counts, n, k)
    call(call.out.clone())
    torch.cuda.synchronize()
    graph, out = torch.cuda.CUDAGraph(), call.out.clone()
    with torch.cuda.graph(graph):
        call(out)
    for routing in (counts, (0, 0, 0, 0, 30), (6, 6, 6, 6, 6), (1, 0, 0, 0, 0)):
        call.offsets.copy_(call.ends(routing))
        out.copy_(call.out)
        graph.replay()
        assert call.wrong(out) == "", f"routing {routing}"
