"""What surrounds the products of a mixture of experts: sorting choices and adding results, by one kernel each or by torch.

    python benchmarks/routing_trials.py --output FILE       # on a Hopper GPU with compiled kernels; CuTe DSL is not needed

sorts    `sort_by_expert` of more and more choices, drawn by seed: by one CTA, by a cluster, by torch
sort     of a layer's T x top_k choices
combine  `moe_combine` of T x top_k rows
layer    gate and up, down projection (NVFP4) and both of these, 16-bit tokens
quantise `quantize` of bf16 tokens under a given global scale, with --quantise alone

Each way is checked against torch on the CPU before it is timed: order and offsets exactly, sums to a unit in the last place of
their type. Times: `glu4.bench.timing`, CUDA graphs over copies that leave L2 cold, median and minimum.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from glu4 import GatedWeights, LinearWeight, NVFP4Tensor, grouped_linear, moe_combine, moe_gate_up, nvfp4, quantize
from glu4.backends.tokens import launch
from glu4.bench.grouped import GroupedShape, draw_grouped
from glu4.bench.machine import environment
from glu4.bench.timing import Cuda, copies, interleaved, listed
from glu4.moe import Routing, sort_by_expert

# experts, N, K, tokens, top_k: layers of Qwen3-30B-A3B, and a rank's 32 experts of DeepSeek-V3
LAYERS = {
    "E128 x4": (128, 768, 2048, 64, 8), "E128 x64": (128, 768, 2048, 1024, 8), "E128 x512": (128, 768, 2048, 8192, 8),
    "E32 x4": (32, 2048, 7168, 16, 8), "E32 x128": (32, 2048, 7168, 512, 8),
}  # fmt: skip
# choices, experts
QUANTISED = [(1, 7168), (64, 7168), (1024, 4096), (8192, 2048), (16384, 7168)]  # rows, K
SORTS = [(1 << bits, experts) for experts in (32, 128, 512) for bits in (9, 10, 11, 13, 16, 17)]


@contextmanager
def by_torch() -> Iterator[None]:
    with patch.object(launch, "sorts", lambda *_: False), patch.object(launch, "combines", lambda *_: False):
        yield


class Case:
    """Operands of one layer, in copies of which each call takes the next."""

    def __init__(self, name: str, seed: int = 0) -> None:
        experts, n, k, tokens, top_k = LAYERS[name]
        draw = torch.Generator("cuda").manual_seed(seed)
        operands = draw_grouped(GroupedShape(name, n, k, (1,) * experts), "cuda", seed)
        down = draw_grouped(GroupedShape(name, k, n, (1,) * experts), "cuda", seed + 1).gate
        self.count = copies(3 * experts * n * k * 9 // 16)
        pairs = [(GatedWeights(operands.gate, operands.up), LinearWeight(down)) for _ in range(self.count)]
        self.weights = [(g.prepare("cuda", free_original=True), d.prepare("cuda", free_original=True)) for g, d in pairs]
        self.x = [torch.randn(tokens, k, generator=draw, device="cuda").bfloat16() for _ in range(self.count)]
        choices = [torch.rand(tokens, experts, generator=draw, device="cuda").topk(top_k, 1) for _ in range(self.count)]
        self.ids, self.router = [c.indices for c in choices], [c.values for c in choices]
        self.experts = experts
        with by_torch():
            self.routing = [sort_by_expert(ids, experts) for ids in self.ids]
        self.y = [torch.randn(tokens * top_k, k, generator=draw, device="cuda").bfloat16() for _ in range(self.count)]

    def sort(self, i: int) -> Routing:
        return sort_by_expert(self.ids[i], self.experts)

    def combine(self, i: int) -> Tensor:
        return moe_combine(self.y[i], self.routing[i], self.router[i])

    def layer(self, i: int) -> Tensor:
        gated, down = self.weights[i]
        hidden, routing = moe_gate_up(self.x[i], self.ids[i], gated)
        return moe_combine(grouped_linear(hidden, down, routing.group_offsets), routing, self.router[i])

    def wrong(self) -> str:
        """What is not as torch has it on the CPU."""
        got, want = self.sort(0), sort_by_expert(self.ids[0].cpu(), self.experts)
        if not all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True)):  # type: ignore[union-attr,arg-type]
            return "sort"
        sums = moe_combine(self.y[0].cpu().float(), want, self.router[0].cpu())
        if not torch.allclose(self.combine(0).cpu().float(), sums, rtol=2.0**-7, atol=2.0**-10):
            return "combine"
        return ""


def contenders(case: Case) -> dict[str, list[Callable[[], object]]]:
    found: dict[str, list[Callable[[], object]]] = {}
    for part in ("sort", "combine", "layer"):
        call: Callable[[int], object] = getattr(case, part)

        def torch_call(i: int, call: Callable[[int], object] = call) -> object:
            with by_torch():
                return call(i)

        found[part] = [lambda i=i, call=call: call(i) for i in range(case.count)]  # type: ignore[misc]
        found[f"{part} torch"] = [lambda i=i, call=torch_call: call(i) for i in range(case.count)]  # type: ignore[misc]
    return found


def sorts(choices: int, experts: int, seed: int = 0) -> dict[str, object]:
    """Times of one sort by each way, and which are wrong."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (choices // 8, 8), generator=draw)
    there, want = [ids.cuda() for _ in range(4)], sort_by_expert(ids, experts)
    row: dict[str, object] = {"choices": choices, "experts": experts}
    calls: dict[str, list[Callable[[], object]]] = {}
    for name, alone in {"one CTA": choices, "cluster": 0, "torch": None}.items():

        def call(i: int, alone: int | None = alone) -> Routing:
            most = 0 if alone is None else choices
            with patch.object(launch, "ALONE", alone or 0), patch.object(launch, "MOST_CHOICES", most):
                return sort_by_expert(there[i], experts)

        if not all(torch.equal(a.cpu(), b) for a, b in zip(call(0), want, strict=True)):  # type: ignore[union-attr,arg-type]
            row["wrong"] = name
        calls[name] = [lambda i=i, call=call: call(i) for i in range(4)]  # type: ignore[misc]
    for name, timing in interleaved(calls, Cuda()).items():
        row[name] = listed(timing)
    return row


def quantising(rows: int, k: int, seed: int = 0) -> dict[str, object]:
    """Times of one `quantize` by the kernel and by torch."""
    draw = torch.Generator("cuda").manual_seed(seed)
    g = torch.tensor(0.02, device="cuda")
    count = min(64, copies(rows * k * 2))  # few tokens lie in L2 where a kernel before has written them
    xs = [torch.randn(rows, k, generator=draw, device="cuda").bfloat16() for _ in range(count)]
    row: dict[str, object] = {"rows": rows, "k": k}
    calls: dict[str, list[Callable[[], object]]] = {}
    for name, backend in {"kernel": None, "torch": "portable"}.items():

        def call(i: int, backend: str | None = backend) -> NVFP4Tensor:
            return quantize(xs[i], g, nonfinite="propagate", backend=backend)

        found, want = call(0).to("cpu"), nvfp4.quantize(xs[0].cpu(), 0.02)
        same = torch.equal(found.block_scale.view(torch.uint8), want.block_scale.view(torch.uint8))
        if not (same and torch.equal(found.codes, want.codes)):
            row["wrong"] = name
        calls[name] = [lambda i=i, call=call: call(i) for i in range(len(xs))]  # type: ignore[misc]
    for name, timing in interleaved(calls, Cuda()).items():
        row[name] = listed(timing)
    return row


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="layers whose names hold this; sorts for no layer")
    parser.add_argument("--quantise", action="store_true", help="that alone")
    parser.add_argument("--layers", action="store_true", help="no sorts beside layers")
    options = parser.parse_args()
    if not launch.sorts(torch.device("cuda", 0), 512, 128):
        raise SystemExit("no kernel that sorts: glu4 compile, then GLU4_CACHE_DIR")
    rows: list[dict[str, object]] = []
    for shape in QUANTISED if options.quantise else ():
        rows.append(quantising(*shape))
        print(rows[-1], flush=True)
        write(options.output, rows)
    if options.quantise:
        return
    for choices, experts in () if options.layers else SORTS:
        rows.append(sorts(choices, experts))
        print(rows[-1], flush=True)
        write(options.output, rows)
    for name in (n for n in LAYERS if options.only in n):
        case = Case(name)
        row = {"case": name, "wrong": case.wrong()}
        rows.append(row)
        if not row["wrong"]:
            for way, timing in interleaved(contenders(case), Cuda()).items():
                row[way] = listed(timing)
        print(name, row["wrong"] or {k: v for k, v in row.items() if isinstance(v, list)}, flush=True)
        write(options.output, rows)
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
