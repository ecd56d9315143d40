"""Sorted tokens of experts on a GPU, gate and up or one matrix: right by the checker, the same bits again, one graph for all."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from glu4 import GatedWeights, LinearWeight, NVFP4Tensor, grouped_dual_gemm, grouped_linear, quantize
from glu4.backends.hopper import grouped_launch
from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED, GroupedConfig
from glu4.moe import sort_by_expert
from glu4.verify.case import Case
from glu4.verify.checker import check
from gpu.harness import SENTINEL, Target
from operands import full_range

# tokens of each expert, N, K: tails of both, tiles that several CTAs share, most experts without a token, tiles of every width
# beside them, one round of tiles of two and three row groups
LAYERS: list[tuple[tuple[int, ...], int, int]] = [
    ((3, 0, 9, 1, 17), 72, 208),
    ((300, 0, 61, 5), 264, 1040),
    ((3, 0, 130, 1, 40), 264, 8208),
    ((1, *[0] * 63, 2, *[0] * 63), 104, 64),
    ((0, *range(8, 257, 8), 0, *range(255, 0, -8), 0, 0, 700), 40, 320),
    ((192, 320), 1072, 1040),
]
NAMES = ("few", "many", "shared", "empty", "widths", "fitting")
OPERATIONS = ("dual", "linear")
FORMATS = ("float16", "bfloat16", "nvfp4")


class Experts:
    """Operands of one call on the GPU, two rows of no expert after the last."""

    def __init__(self, operation: str, x_format: str, counts: tuple[int, ...], n: int, k: int) -> None:
        self.dual = operation == "dual"
        if not grouped_launch.available(self.dual, "nvfp4", torch.float16):
            pytest.skip("the grouped kernels are not compiled")
        draw, rows = torch.Generator().manual_seed(3), sum(counts) + 2
        values = torch.randn(rows, k, generator=draw)
        self.gate, self.up = (self.stack(seed, len(counts), n, k) for seed in (1, 2))
        self.bias, self.up_bias = (torch.randn(len(counts), n, generator=draw) for _ in range(2))
        self.gated = GatedWeights(self.gate, self.up, gate_bias=self.bias, up_bias=self.up_bias).prepare("cuda")
        self.one, self.one_bias = LinearWeight(self.gate).prepare("cuda"), self.bias.cuda()
        self.dtype = torch.bfloat16 if x_format == "bfloat16" else torch.float16
        self.x: Tensor | NVFP4Tensor = (quantize(values) if x_format == "nvfp4" else values.to(self.dtype)).to("cuda")
        self.out = torch.full((rows, n), SENTINEL, dtype=torch.int16, device="cuda").view(self.dtype)
        self.offsets = self.ends(counts)

    @staticmethod
    def stack(seed: int, experts: int, n: int, k: int) -> NVFP4Tensor:
        """Of full range, global scales of each expert's own."""
        w = full_range(seed, experts, n, k)
        own = torch.rand(experts, generator=torch.Generator().manual_seed(seed)) * 1e-4 + 1e-5
        return NVFP4Tensor(w.codes, w.block_scale, own)

    @staticmethod
    def ends(counts: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32).cuda()

    def __call__(self, out: Tensor) -> Tensor:
        if self.dual:
            return grouped_dual_gemm(self.x, self.gated, self.offsets, out=out, backend="hopper")
        return grouped_linear(self.x, self.one, self.offsets, bias=self.one_bias, out=out, backend="hopper")

    def wrong(self, out: Tensor) -> str:
        """What is not as specified, nothing where all is."""
        last, n = int(self.offsets[-1]), out.shape[1]
        if not (out[last:].view(torch.int16) == SENTINEL).all():
            return "rows beyond the last expert's were written"
        up, up_bias = (self.up.to("cuda"), self.up_bias.cuda()) if self.dual else (None, None)
        whole = Case("experts", 0, self.x, self.gate.to("cuda"), up, gate_bias=self.bias.cuda(), up_bias=up_bias,
                     out_dtype=self.dtype, group_offsets=self.offsets)  # fmt: skip
        rows = torch.linspace(0, last - 1, min(last, 256), device="cuda").long().unique()
        columns = torch.linspace(0, n - 1, min(n, 96), device="cuda").long().unique()
        verdict = check(whole.sample(rows, columns).to("cpu"), out[rows][:, columns].cpu())
        return "" if verdict.ok else verdict.summary()


@pytest.mark.parametrize("layer", LAYERS, ids=NAMES)
@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_right_and_the_same_bits_again(
    hopper: Target, operation: str, x_format: str, layer: tuple[tuple[int, ...], int, int]
) -> None:
    call = Experts(operation, x_format, *layer)
    outs = [call(call.out.clone()) for _ in range(3)]
    assert call.wrong(outs[0]) == ""
    assert all(torch.equal(out.view(torch.int16), outs[0].view(torch.int16)) for out in outs)


@pytest.mark.parametrize("config", GROUPED_SHIPPED, ids=lambda c: c.name)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_configuration_takes_every_width(
    hopper: Target, monkeypatch: pytest.MonkeyPatch, operation: str, config: GroupedConfig
) -> None:
    """Also those that the dispatch would not choose."""
    monkeypatch.setattr(grouped_launch, "grouped_candidates", lambda *_: iter((config,)))
    for layer in LAYERS[4:]:
        call = Experts(operation, "float16", *layer)
        assert call.wrong(call(call.out.clone())) == ""


@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_graph_serves_every_routing(hopper: Target, operation: str, x_format: str) -> None:
    counts, n, k = LAYERS[0]
    call = Experts(operation, x_format, counts, n, k)
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


@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_offsets_that_the_kernel_in_front_writes(hopper: Target, operation: str, x_format: str) -> None:
    """The kernel looks at the offsets before the sort in front of it has ended, and finds those of another routing there, for
    memory is used again: launches on end, each of which must see its own."""
    layer = Experts(operation, x_format, (37, 0, 61, 5, 100, 1), 1072, 1040)
    experts, rows = layer.offsets.numel() - 1, layer.x.shape[0]
    draw = torch.Generator().manual_seed(7)
    choices = []
    for i in range(24):
        few = torch.randperm(experts, generator=draw)[: 1 + i % experts]
        choices.append(few[torch.randint(0, few.numel(), (rows, 1), generator=draw)].int().cuda())
    outs = [torch.zeros(rows, 1072, dtype=layer.dtype, device="cuda") for _ in range(2 * len(choices))]

    for ids, out in zip(choices, outs, strict=False):
        layer.offsets = sort_by_expert(ids, experts).group_offsets
        torch.cuda.synchronize()
        layer(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for ids, out in zip(choices, outs[len(choices) :], strict=True):
            layer.offsets = sort_by_expert(ids, experts).group_offsets
            layer(out)
    for _ in range(5):
        for out in outs[len(choices) :]:
            out.zero_()
        graph.replay()
        for alone, together in zip(outs, outs[len(choices) :], strict=False):
            assert torch.equal(alone.view(torch.int16), together.view(torch.int16))
