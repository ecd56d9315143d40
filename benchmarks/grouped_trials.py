"""Correctness, then times, of several configurations of the grouped Hopper kernel on one GPU.

    python benchmarks/grouped_trials.py --compile DIRECTORY                  # with CuTe DSL, no GPU
    python benchmarks/grouped_trials.py --kernels DIRECTORY ... --output FILE    # on a Hopper GPU; CuTe DSL is not needed

Kernels are found by name, whatever sources they were made from: a trial may carry kernels of sources that are not here, and
those of several directories are compared in turns. W4A16, fp16, random codes and scales; each expert's gate and up have global
scales of their own. Times: CUDA graph over copies of weights and tokens that leave L2 cold, about 8 ms a replay, median and
minimum over replays. Peers in bf16: torch._grouped_mm and a loop of matrix products, silu and multiply by torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glu4.activation import SILU
from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED, GroupedConfig
from glu4.backends.hopper.grouped_launch import made_kernel, submit
from glu4.backends.hopper.spec import GroupedSpec
from glu4.bench.grouped import GroupedShape
from glu4.bench.machine import environment
from glu4.bench.suites import GROUPED_SUITES
from glu4.compiled import store
from glu4.nvfp4 import NVFP4Tensor
from glu4.verify.case import Case
from glu4.verify.checker import check
from glu4.weights import pack

CONFIGS = (
    *GROUPED_SHIPPED,
    # larger boxes
    GroupedConfig(192, 3, 64, 8, 4, fit=True),
    GroupedConfig(192, 3, 96, 8, 4, fit=True),
    GroupedConfig(256, 2, 64, 16, 4),
    # without fitting
    GroupedConfig(192, 3, 32, 8, 4),
)
SPECS = tuple(GroupedSpec(c, "f16", "f16") for c in CONFIGS)


def routed(experts: int, mean: int, n: int, k: int) -> GroupedShape:
    """Tokens that choose among experts of equal chances."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(0, experts, (experts * mean,), generator=draw).bincount(minlength=experts)
    return GroupedShape(f"routed E{experts} x{mean} N{n} K{k}", n, k, tuple(counts.tolist()))


# where the dispatch goes from one configuration to the next
ROUTED = (
    *(routed(128, mean, 768, 2048) for mean in (16, 24, 32, 48, 96, 192, 256)),
    *(routed(32, mean, 2048, 7168) for mean in (24, 48, 160, 192, 224, 256, 384)),
    *(routed(8, mean, 14336, 4096) for mean in (24, 64, 128, 160, 192, 256, 384, 512)),
)
CASES = (*GROUPED_SUITES["grouped-seed"], *GROUPED_SUITES["moe"], *ROUTED)
SENTINEL = 0x5AA5
SPARE = 3  # rows of no expert
COLD_BYTES, REPLAY_US = 200_000_000, 8000.0


def load_kernel(directory: Path, spec: GroupedSpec) -> Any:
    """The newest kernel of that name, of any sources; None when there is none."""
    found = sorted(directory.glob(f"{spec.name}-*.kernel"), key=lambda p: p.stat().st_mtime)
    if not found:
        return None
    _, _, line, cubin = found[-1].read_bytes().split(b"\n", 3)
    return made_kernel(spec, cubin, json.loads(line)), spec.config


class Operands:
    """x `[rows, K]` sorted by expert, weights of random codes, scales of each expert's own."""

    def __init__(self, sizes: tuple[int, ...], n: int, k: int, seed: int = 0) -> None:
        draw = torch.Generator("cuda").manual_seed(seed)
        experts = len(sizes)
        self.sizes, self.n, self.k = sizes, n, k
        self.offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device="cuda")
        self.x = torch.randn(sum(sizes) + SPARE, k, generator=draw, device="cuda").half()
        self.x[sum(sizes) :] = float("nan")
        self.weights = []
        for _ in range(2):
            codes = torch.randint(0, 256, (experts, n, k // 2), generator=draw, dtype=torch.uint8, device="cuda")
            scales = torch.randint(24, 56, (experts, n, k // 16), generator=draw, dtype=torch.uint8, device="cuda")
            own = torch.rand(experts, generator=draw, device="cuda") * 0.02 + 0.005
            self.weights.append(NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), own))
        self.packed = pack(tuple(self.weights))

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Packed weights and x that leave none of one in L2 when its turn comes again."""
        buffer = self.packed.untyped_storage()
        count = max(2, -(-COLD_BYTES // (buffer.nbytes() + self.x.nbytes)))
        whole = torch.empty(0, dtype=torch.int32, device="cuda").set_(buffer)
        more = [whole.clone()[: self.packed.numel()].view(self.packed.shape) for _ in range(count - 1)]
        return [(self.packed, self.x), *((w, self.x.clone()) for w in more)]

    def run(self, kernel: Any, out: Tensor, held: tuple[Tensor, Tensor] | None = None) -> None:
        scales = (self.weights[0].global_scale, self.weights[1].global_scale)
        packed, x = held or (self.packed, self.x)
        submit(*kernel, 0, x, packed, self.offsets, scales, None, (None, None), SILU, out)

    def poisoned(self) -> Tensor:
        return torch.full((self.x.shape[0], self.n), SENTINEL, dtype=torch.int16, device="cuda").view(torch.float16)

    def reference(self) -> Tensor:
        """By torch in float32 on decoded weights; expert by expert."""
        whole = torch.zeros(sum(self.sizes), self.n, device="cuda")
        for e, (a, b) in enumerate(itertools.pairwise(self.offsets.tolist())):
            if a < b:
                gate, up = (self.x[a:b].float() @ w[e].dequantize(torch.float32).T for w in self.weights)
                whole[a:b] = torch.nn.functional.silu(gate) * up
        return whole


def wrong(data: Operands, kernel: Any, expected: Tensor) -> str:
    """What is not as specified; empty when all is."""
    rows = sum(data.sizes)
    out = data.poisoned()
    data.run(kernel, out)
    torch.cuda.synchronize()
    if not (out[rows:].view(torch.int16) == SENTINEL).all():
        return "rows of no expert were written"
    error = float((out[:rows].double() - expected.double()).norm() / expected.double().norm())
    if not error < 1e-3:
        per = (out[:rows].double() - expected.double()).abs().amax(1)
        return f"relative error {error:.2e}; rows {per.topk(min(4, rows)).indices.tolist()}"
    gate, up = data.weights
    whole = Case("trial", 0, data.x, gate, up, out_dtype=torch.float16, group_offsets=data.offsets)
    picked = torch.linspace(0, rows - 1, min(rows, 24), device="cuda").long().unique()
    columns = torch.linspace(0, data.n - 1, 48, device="cuda").long()
    verdict = check(whole.sample(picked, columns).to("cpu"), out[picked][:, columns].cpu())
    if not verdict.ok:
        return verdict.summary()
    for i in range(20):
        again = data.poisoned()
        data.run(kernel, again)
        if not torch.equal(again.view(torch.int16), out.view(torch.int16)):
            return f"run {i + 1} gave other bits"
    graph, again = torch.cuda.CUDAGraph(), data.poisoned()
    with torch.cuda.graph(graph):
        data.run(kernel, again)
    graph.replay()
    torch.cuda.synchronize()
    return "" if torch.equal(again.view(torch.int16), out.view(torch.int16)) else "a graph's replay gave other bits"


def timed(calls: list[Callable[[], object]], replays: int = 21) -> tuple[float, float]:
    """(median, minimum) microseconds a call, in a CUDA graph over all of `calls`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def captured(rounds: int) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        return graph.replay

    def once(replay: Callable[[], None]) -> float:
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000

    short = captured(1)
    once(short)
    rounds = max(1, round(REPLAY_US / once(short)))
    replay = captured(rounds)
    times = [once(replay) / rounds / len(calls) for _ in range(replays + 10)][10:]
    return statistics.median(times), min(times)


def peers(data: Operands) -> dict[str, list[Callable[[], object]]]:
    """16-bit peers on decoded weights, gate's rows first."""
    n, experts = data.n, len(data.sizes)
    both = torch.empty(experts, 2 * n, data.k, dtype=torch.bfloat16, device="cuda")
    for e in range(experts):
        both[e, :n], both[e, n:] = (w[e].dequantize(torch.float32).bfloat16() for w in data.weights)
    x, ends, spans = data.x[: sum(data.sizes)].bfloat16(), data.offsets[1:], data.offsets.tolist()
    weights = [both, both.clone()] if both.nbytes < 6e9 else [both]

    def finish(y: Tensor) -> Tensor:
        return torch.nn.functional.silu(y[:, :n]) * y[:, n:]

    def loop(w: Tensor) -> Tensor:
        y = torch.empty(x.shape[0], 2 * n, dtype=torch.bfloat16, device="cuda")
        for e, (a, b) in enumerate(itertools.pairwise(spans)):
            if a < b:
                torch.mm(x[a:b], w[e].T, out=y[a:b])
        return finish(y)

    return {
        "torch_grouped": [lambda w=w: finish(torch._grouped_mm(x, w.transpose(1, 2), ends)) for w in weights],
        "cublas_loop": [lambda w=w: loop(w) for w in weights],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", type=Path)
    parser.add_argument("--kernels", type=Path, nargs="+")
    parser.add_argument("--turns", type=int, default=1, help="of each kernel in each case")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--config", default="", help="one configuration, by name")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    if options.compile:
        store.compile_missing(SPECS, options.compile, on_done=lambda name: print(name, flush=True), jobs=2)
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.zeros(1, device="cuda")  # kernels load into its context
    chosen = [s for s in SPECS if options.config in ("", s.config.name)]
    several = len(options.kernels) > 1
    kernels = {
        (f"{directory.name} " if several else "") + s.config.name: k
        for s, directory in itertools.product(chosen, options.kernels)
        if (k := load_kernel(directory, s)) is not None
    }
    print("kernels", list(kernels), flush=True)
    rows: list[dict[str, Any]] = []
    broken: set[str] = set()
    for sizes, n, k in (((3, 0, 9, 130, 0, 17, 257, 64), 416, 1040), ((0, 0, 1), 40, 64), ((1,) * 300 + (90,), 64, 192)):
        data = Operands(sizes, n, k, seed=n)
        expected = data.reference()
        for name, kernel in kernels.items():
            reason = wrong(data, kernel, expected) if len(sizes) <= kernel[1].max_experts else ""
            if reason:
                broken.add(name)
                rows.append({"case": f"{len(sizes)} experts N{n} K{k}", "config": name, "wrong": reason})
                print("WRONG", rows[-1], flush=True)
    for shape in (s for s in CASES if options.only in s.case):
        begin = time.time()
        data = Operands(shape.drawn(0), shape.n, shape.k)
        expected, copies, outs = data.reference(), data.copies(), data.poisoned()
        for name, kernel in kernels.items():
            try:
                reason = "skipped" if name in broken else wrong(data, kernel, expected)
            except RuntimeError:
                print("FAILED", shape.case, name, flush=True)  # which leaves the process no device
                raise
            row = {"case": shape.case, "config": name, "wrong": reason}
            rows.append(row)
        ready = [(row, kernels[row["config"]]) for row in rows if row["case"] == shape.case and not row["wrong"]]
        for row, kernel in ready * options.turns:
            us, us_min = timed([partial(data.run, kernel, outs, held) for held in copies])
            row.setdefault("turns", []).append(us)
            row["us"], row["us_min"] = statistics.median(row["turns"]), min(us_min, row.get("us_min", us_min))
        del copies
        if not options.no_peers:
            for name, calls in peers(data).items():
                try:
                    us, us_min = timed(calls)
                    rows.append({"case": shape.case, "config": name, "wrong": "", "us": us, "us_min": us_min})
                except RuntimeError as error:
                    rows.append({"case": shape.case, "config": name, "wrong": str(error)[:200]})
        print(shape.case, f"{time.time() - begin:.1f} s", flush=True)
        options.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
    for case in dict.fromkeys(r["case"] for r in rows):
        mine = [r for r in rows if r["case"] == case]
        line = " ".join(
            f"{r['config']}={r['us']:.1f}({r['us_min']:.1f})" if "us" in r else f"{r['config']}:{r['wrong'][:90]}" for r in mine
        )
        print(f"{case}: {line}")


if __name__ == "__main__":
    main()
