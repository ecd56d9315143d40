"""The tokens of a mixture of experts, gathered ahead of the grouped Hopper kernel, as they are decoded, or in its loads: times.

    python benchmarks/gather_trials.py --compile DIRECTORY      # with CuTe DSL, no GPU; then GLU4_CACHE_DIR=DIRECTORY
    python benchmarks/gather_trials.py --output FILE            # on a Hopper GPU; CuTe DSL is not needed

Each token chooses `top_k` different experts, drawn by seed, all alike. Ways, but for NVFP4 tokens without `decode`:

kernel  the grouped kernel on rows that lie gathered already, NVFP4 tokens decoded ahead of it: what no gather can undercut
copy    index, index_select (of NVFP4 codes and scales), then the same
decode  one kernel that decodes and gathers, then the grouped kernel
load    the grouped kernel gathers; NVFP4 tokens are decoded ahead of it, each once

and `moe_gate_up` with each, which sorts before. Before a layer is timed every way gives the bits of `copy`, in 20 runs and from
a CUDA graph, and leaves rows of no expert alone. Times: `glu4.bench.timing`, CUDA graphs over copies that leave L2 cold.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glu4 import GatedWeights, grouped_dual_gemm, moe_gate_up, ops, quantize
from glu4.activation import SILU
from glu4.backends.hopper import grouped_launch, tokens
from glu4.backends.hopper.grouped_config import grouped_candidates
from glu4.backends.hopper.spec import GroupedSpec, shipped_grouped
from glu4.bench.grouped import GroupedShape, draw_grouped
from glu4.bench.machine import environment
from glu4.bench.operands import FORMATS
from glu4.bench.timing import Cuda, Timing, copies, interleaved
from glu4.compiled import store
from glu4.moe import sort_by_expert
from glu4.nvfp4 import gather_rows
from glu4.problem import GroupedProblem

RERUNS = 20
SENTINEL = 0x5AA5
WAYS = {"bfloat16": ("copy", "load"), "nvfp4": ("copy", "decode", "load")}


@dataclass(frozen=True)
class Layer:
    name: str
    experts: int
    n: int
    k: int
    tokens: int
    top_k: int = 8


# layers of Qwen3-30B-A3B and, on a rank with 32 experts, of DeepSeek-V3: 4 and 64, 4 and 128 tokens to an expert
LAYERS = (
    Layer("E128 x4", 128, 768, 2048, 64),
    Layer("E128 x64", 128, 768, 2048, 1024),
    Layer("E32 x4", 32, 2048, 7168, 16),
    Layer("E32 x128", 32, 2048, 7168, 512),
)
# checked for their bits only: tails of K and N, experts without tokens and choices of none, the widest tile
ODD = (Layer("odd", 19, 104, 208, 33, 3), Layer("wide", 4, 136, 272, 400, 1))


def drawn(layer: Layer, seed: int) -> Tensor:
    """Choices int64 `[T, top_k]`; of odd layers some are of no expert."""
    draw = torch.Generator("cuda").manual_seed(seed)
    if layer in ODD:
        return torch.randint(-1, layer.experts - 1, (layer.tokens, layer.top_k), generator=draw, device="cuda")
    return torch.rand(layer.tokens, layer.experts, generator=draw, device="cuda").topk(layer.top_k, 1).indices


class Case:
    """One layer and activation format: copies of weights and tokens, a routing, and calls by every way."""

    def __init__(self, layer: Layer, x_format: str, seed: int = 0) -> None:
        self.layer, self.x_format, self.dtype = layer, x_format, FORMATS[x_format]
        operands = draw_grouped(GroupedShape(layer.name, layer.n, layer.k, (1,) * layer.experts), "cuda", seed)
        count = copies(2 * layer.experts * layer.n * layer.k * 9 // 16) if layer in LAYERS else 1
        self.weights = [GatedWeights(operands.gate, operands.up).prepare("cuda", free_original=True) for _ in range(count)]
        draw = torch.Generator("cuda").manual_seed(seed + 1)
        values = torch.randn(layer.tokens, layer.k, generator=draw, device="cuda")
        self.x = [quantize(values) if x_format == "nvfp4" else values.to(self.dtype, copy=True) for _ in range(count)]
        self.ids = drawn(layer, seed)
        self.routing = sort_by_expert(self.ids, layer.experts)
        self.order = self.routing.order.view(self.ids.shape)
        self.rows = [gather_rows(x, self.order) for x in self.x]
        self.out = self.poisoned()

    def problem(self) -> GroupedProblem:
        size = self.layer
        return GroupedProblem(self.ids.numel(), size.experts, size.n, size.k, x_format=self.x_format, out_dtype=self.dtype)

    def poisoned(self) -> Tensor:
        shape = (self.ids.numel(), self.layer.n)
        return torch.full(shape, SENTINEL, dtype=torch.int16, device="cuda").view(self.dtype)

    def kernel(self, i: int) -> Tensor:
        return grouped_dual_gemm(self.rows[i], self.weights[i], self.routing.group_offsets, out=self.out)

    def by(self, way: str, i: int, out: Tensor | None = None) -> Tensor:
        os.environ["GLU4_GATHER"] = way
        return ops.gathered_dual_gemm(
            self.x[i], self.weights[i], self.routing.group_offsets, self.order, activation=SILU, out_dtype=None,
            out=self.out if out is None else out, backend="hopper",
        )  # fmt: skip

    def layer_by(self, way: str, i: int) -> Tensor:
        os.environ["GLU4_GATHER"] = way
        return moe_gate_up(self.x[i], self.ids, self.weights[i], out=self.out, backend="hopper")[0]

    def config(self) -> str:
        """Of the kernel that every way runs; raises RuntimeError where its twin that gathers is missing, or the decoder."""
        x = "f16" if self.x_format == "nvfp4" else "bf16"
        out = "f16" if self.dtype is torch.float16 else "bf16"
        both = [next(grouped_candidates(self.problem(), gather=g)) for g in (False, True)]
        for config in both:
            if grouped_launch.grouped_kernel(GroupedSpec(config, x, out)) is None:
                raise RuntimeError(f"no kernel {config.name} for {x}, {out} in GLU4_CACHE_DIR")
        if None in (tokens.decoder(), tokens.gatherer()):
            raise RuntimeError("no kernel that decodes tokens in GLU4_CACHE_DIR")
        return both[0].name

    def wrong(self) -> str:
        """What is not as `copy` has it; empty when all is."""
        last = int(self.routing.group_offsets[-1])
        expected = self.by("copy", 0, self.poisoned()).view(torch.int16)
        if (expected[:last] == SENTINEL).all(1).any() or not (expected[last:] == SENTINEL).all():
            return "copy: rows are missing, or rows of no expert were written"
        for way in WAYS[self.x_format]:
            for run in range(RERUNS):
                out = self.by(way, 0, self.poisoned()).view(torch.int16)
                if not torch.equal(out, expected):
                    return f"{way}: run {run} has other bits in {int((out != expected).any(1).sum())} of {last} rows"
            graph, out = torch.cuda.CUDAGraph(), self.poisoned()
            with torch.cuda.graph(graph):
                self.by(way, 0, out)
            graph.replay()
            torch.cuda.synchronize()
            if not torch.equal(out.view(torch.int16), expected):
                return f"{way}: other bits from a graph"
        return ""

    def contenders(self) -> dict[str, list[Callable[[], object]]]:
        which, ways = range(len(self.weights)), WAYS[self.x_format]
        found: dict[str, list[Callable[[], object]]] = {"kernel": [partial(self.kernel, i) for i in which]}
        found |= {way: [partial(self.by, way, i) for i in which] for way in ways}
        return found | {f"moe {way}": [partial(self.layer_by, way, i) for i in which] for way in ways}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="", help="layers whose names hold this")
    parser.add_argument("--format", choices=list(WAYS), help="one activation format")
    options = parser.parse_args()
    if options.compile:
        store.compile_missing(shipped_grouped(dual=True), options.compile, on_done=lambda name: print(name, flush=True))
        return
    rows: list[dict[str, Any]] = []
    formats = [f for f in WAYS if options.format in (None, f)]
    for layer in (*ODD, *(one for one in LAYERS if options.only in one.name)):
        for x_format in formats:
            case = Case(layer, x_format)
            row: dict[str, Any] = {"case": layer.name, "x": x_format, "config": case.config(), "wrong": case.wrong()}
            rows.append(row)
            print(layer.name, x_format, row["wrong"] or "right", flush=True)
            if layer in LAYERS and not row["wrong"]:
                for way, timing in interleaved(case.contenders(), Cuda()).items():
                    row[way] = [timing.us, timing.us_min] if isinstance(timing, Timing) else timing.message
            del case
            torch.cuda.empty_cache()
            options.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
    for row in rows:
        times = {way: value for way, value in row.items() if isinstance(value, list)}
        told = "  ".join(f"{way} {us:.1f} ({low:.1f})" for way, (us, low) in times.items())
        print(f"{row['case']:9s} {row['x']:8s} {row['config']:16s} {row['wrong'] or told}")


if __name__ == "__main__":
    main()
