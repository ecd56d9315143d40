"""Tokens of a mixture of experts that kernels find by an index: the bits of copied rows, in graphs too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glu4 import GatedWeights, NVFP4Tensor, moe_gate_up, quantize
from glu4.backends.hopper import tokens
from glu4.backends.hopper.grouped_config import grouped_candidates
from glu4.backends.hopper.grouped_launch import grouped_kernel
from glu4.backends.hopper.spec import GroupedSpec
from glu4.nvfp4 import gather_rows
from glu4.problem import GroupedProblem
from glu4.verify.case import Case
from glu4.verify.checker import check
from gpu.harness import SENTINEL, Target
from operands import full_range

WAYS = [("float16", "load"), ("bfloat16", "load"), ("nvfp4", "load"), ("nvfp4", "decode")]
# experts, tokens, top_k, N, K: tails of both; more tokens than the widest tile has; half of the experts without any
LAYERS = [(9, 33, 3, 104, 208), (3, 700, 2, 136, 144), (5, 600, 1, 40, 1040), (256, 7, 8, 72, 64)]


def stack(seed: int, experts: int, n: int, k: int) -> NVFP4Tensor:
    parts = [full_range(seed + e, n, k) for e in range(experts)]
    scales = torch.stack([p.block_scale.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn)
    own = torch.rand(experts, generator=torch.Generator().manual_seed(seed)) * 1e-4 + 1e-5
    return NVFP4Tensor(torch.stack([p.codes for p in parts]), scales, own)


class Layer:
    """Operands of one call on the GPU; choices are of no expert now and then, and never of the last."""

    def __init__(self, kind: str, experts: int, count: int, top_k: int, n: int, k: int) -> None:
        self.gate, self.up = stack(1, experts, n, k), stack(1000, experts, n, k)
        self.weights = GatedWeights(self.gate, self.up).prepare("cuda")
        self.experts, self.k, self.top_k, self.kind = experts, k, top_k, kind
        self.dtype = torch.bfloat16 if kind == "bfloat16" else torch.float16
        self.ids, self.x = self.choices(0, count), self.tokens(0, count)
        self.out = torch.full((count * top_k, n), SENTINEL, dtype=torch.int16, device="cuda").view(self.dtype)

    def choices(self, seed: int, count: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(-1, self.experts - 1, (count, self.top_k), generator=draw).cuda()

    def tokens(self, seed: int, count: int) -> Tensor | NVFP4Tensor:
        values = torch.randn(count, self.k, generator=torch.Generator().manual_seed(seed))
        return quantize(values).to("cuda") if self.kind == "nvfp4" else values.to(self.dtype).cuda()

    def __call__(self, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(output, order `[T, top_k]`, offsets)."""
        hidden, routing = moe_gate_up(self.x, self.ids, self.weights, out=out, out_dtype=self.dtype, backend="hopper")
        return hidden, routing.order.view(self.ids.shape), routing.group_offsets


def need_kernels(kind: str, layer: tuple[int, ...]) -> None:
    experts, count, top_k, n, k = layer
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float16
    config = next(grouped_candidates(GroupedProblem(count * top_k, experts, n, k), gather=True))
    if grouped_kernel(GroupedSpec.of(config, dtype, dtype)) is None or tokens.gatherer() is None:
        pytest.skip("the kernels that gather are not compiled")


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("kind", "how"), WAYS)
def test_the_bits_are_those_of_copied_rows(
    hopper: Target, monkeypatch: pytest.MonkeyPatch, kind: str, how: str, layer: tuple[int, int, int, int, int]
) -> None:
    need_kernels(kind, layer)
    call = Layer(kind, *layer)
    results = []
    for chosen in ("copy", how, how):
        monkeypatch.setenv("GLU4_GATHER", chosen)
        results.append(call(call.out.clone())[0].view(torch.int16))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])
    _, order, offsets = call()
    last = int(offsets[-1])
    assert (results[1][last:] == SENTINEL).all()
    whole = Case("gathered", 0, gather_rows(call.x, order), call.gate.to("cuda"), call.up.to("cuda"),
                 out_dtype=call.dtype, group_offsets=offsets)  # fmt: skip
    rows = torch.linspace(0, last - 1, min(last, 48), device="cuda").long().unique()
    columns = torch.linspace(0, layer[3] - 1, min(layer[3], 48), device="cuda").long().unique()
    verdict = check(whole.sample(rows, columns).to("cpu"), results[1].view(call.dtype)[rows][:, columns].cpu())
    assert verdict.ok, verdict.summary()


@pytest.mark.parametrize(("kind", "how"), WAYS)
def test_one_graph_serves_every_routing(hopper: Target, monkeypatch: pytest.MonkeyPatch, kind: str, how: str) -> None:
    layer = LAYERS[0]
    need_kernels(kind, layer)
    call = Layer(kind, *layer)
    monkeypatch.setenv("GLU4_GATHER", how)
    call()
    torch.cuda.synchronize()
    graph, out = torch.cuda.CUDAGraph(), call.out.clone()
    with torch.cuda.graph(graph):
        call(out)
    for seed in (1, 2, 3):
        call.ids.copy_(call.choices(seed, layer[1]))
        out.copy_(call.out)
        graph.replay()
        monkeypatch.setenv("GLU4_GATHER", "copy")
        want, _, offsets = call(call.out.clone())
        assert torch.equal(out.view(torch.int16), want.view(torch.int16)), f"routing {seed}"
        assert int(offsets[-1]) > 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("kind", "how"), [("float16", "load"), ("nvfp4", "decode")])
def test_compiled_to_one_graph(hopper: Target, monkeypatch: pytest.MonkeyPatch, kind: str, how: str, backend: str) -> None:
    need_kernels(kind, LAYERS[0])
    call = Layer(kind, *LAYERS[0])
    monkeypatch.setenv("GLU4_GATHER", how)

    def traced(x: Tensor | NVFP4Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden, routing = moe_gate_up(x, ids, call.weights, out_dtype=call.dtype)
        return hidden, routing.group_offsets

    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(traced, fullgraph=True, backend=backend)
    for seed in (0, 1):
        ids = call.choices(seed, LAYERS[0][1])
        (got, offsets), (want, _) = compiled(call.x, ids), traced(call.x, ids)
        last = int(offsets[-1])
        assert torch.equal(got[:last], want[:last])
