"""Time the Hopper kernels against cuBLAS fp16 on weights decoded beforehand, on the GPU of this machine.

    python benchmarks/hopper.py [--suite seed|decode|all] [--configs best|all] [--output benchmarks/results/NAME.json]

Method: one CUDA graph over round-robin copies of weights and activations (at least 200 MB, so that L2 is cold), enough rounds
for about 8 ms a replay, 3 warm-up replays, 15 timed; median and minimum, divided by the number of calls. cuBLAS runs in the
same process between ours: one product with gate and up concatenated, then a Triton kernel for silu(gate) * up. Activations are
normal, codes and block scales over the whole format.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

import glu4
from glu4.backends.hopper import launch
from glu4.backends.hopper.config import SHIPPED, Config, candidates
from glu4.backends.hopper.pack import pack_gated
from glu4.bench.devices import device as device_named
from glu4.bench.roofline import limit
from glu4.problem import Problem

SEED = ((256, 4096, 7168), (512, 4096, 7168), (256, 3072, 4096), (512, 3072, 7168))
DECODE = tuple((m, 4096, 7168) for m in (1, 16, 64, 128, 1024, 4096))
COLD_BYTES = 200_000_000


@triton.jit
def _silu_mul(both, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + row * 2 * n + col, mask=col < n).to(tl.float32)
    up = tl.load(both + row * 2 * n + n + col, mask=col < n).to(tl.float32)
    tl.store(out + row * n + col, (gate * tl.sigmoid(gate) * up).to(tl.float16), mask=col < n)


def graph_times(calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """(median, minimum) microseconds a call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    rounds = max(1, round(8 / (start.elapsed_time(end) + 1e-3)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for i in range(18):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / rounds / len(calls) * 1e3)
    return statistics.median(times), min(times)


def operand(n: int, k: int) -> glu4.NVFP4Tensor:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scale = torch.randint(0, 0x7F, (n, k // 16), dtype=torch.uint8, device="cuda")
    return glu4.NVFP4Tensor(codes, scale.view(torch.float8_e4m3fn), torch.tensor(2.0**-14, device="cuda"))


def measure(m: int, n: int, k: int, configs: str, device: str) -> list[dict[str, Any]]:
    """Rows for one shape, cuBLAS first."""
    problem = Problem(m, n, k, x_format="float16")
    gate, up = operand(n, k), operand(n, k)
    packed = pack_gated(gate, up)
    copies = max(2, -(-COLD_BYTES // (packed.nbytes + m * k * 2)))
    weights = [torch.cat((packed.flatten(), packed.new_zeros(576)))[: packed.numel()].view(packed.shape) for _ in range(copies)]
    x = [torch.randn(m, k, device="cuda").half() for _ in range(copies)]
    out = torch.empty(m, n, dtype=torch.float16, device="cuda")
    wide = max(2, -(-COLD_BYTES // (4 * n * k)))
    decoded = [torch.randn(2 * n, k, device="cuda").half() for _ in range(wide)]
    both = torch.empty(m, 2 * n, dtype=torch.float16, device="cuda")

    def cublas(i: int) -> Callable[[], object]:
        def call() -> None:
            torch.mm(x[i % copies], decoded[i].t(), out=both)
            _silu_mul[(m, triton.cdiv(n, 1024))](both, out, n, 1024)

        return call

    def ours(i: int, config: Config) -> Callable[[], object]:
        scales = (gate.global_scale, up.global_scale)
        return lambda: launch.dense(out, x[i], weights[i], scales, (None, None), glu4.SILU, problem, config)

    bound = limit(problem, device_named(device)).time_s * 1e6
    base, base_min = graph_times([cublas(i) for i in range(wide)])
    shape = {"m": m, "n": n, "k": k, "limit_us": round(bound, 2)}
    rows = [{"peer": "cublas_fp16", **shape, "us": round(base, 2), "us_min": round(base_min, 2), "ratio": 1.0}]
    best = next(candidates(problem))
    for config in SHIPPED if configs == "all" else (best,):
        if config != best and (config.tokens > 2 * max(m, 8) or 8 * config.tokens < min(m, 512)):
            continue
        us, us_min = graph_times([ours(i, config) for i in range(copies)])
        row = {"peer": "glu4", "config": config.name, "chosen": config == best, **shape}
        rows.append({**row, "us": round(us, 2), "us_min": round(us_min, 2), "ratio": round(us / base, 3)})
    return rows


def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("seed", "decode", "all"), default="all")
    parser.add_argument("--configs", choices=("best", "all"), default="best")
    parser.add_argument("--commit", default="", help="recorded with the result where there is no git")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    device = "h200" if "H200" in name else "h100"
    shapes = {"seed": SEED, "decode": DECODE, "all": SEED + DECODE}[args.suite]
    rows = []
    for m, n, k in shapes:
        for row in measure(m, n, k, args.configs, device):
            rows.append(row)
            label = row.get("config", "") + (" *" if row.get("chosen") else "")
            print(
                f"{m:5d},{n},{k}  {row['peer']:12} {label:14} {row['us']:8.1f} us (min {row['us_min']:.1f})"
                f"  x{row['ratio']:.2f} cuBLAS  {100 * row['limit_us'] / row['us']:.0f} % of limit",
                flush=True,
            )
    if args.output:
        query = "driver_version,clocks.max.sm,clocks.max.mem"
        document = {
            "device": name,
            "driver, max clocks": _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": args.commit or _output_of("git", "rev-parse", "--short", "HEAD"),
            "method": " ".join((__doc__ or "").split("Method: ")[1].split()),
            "rows": rows,
        }
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
