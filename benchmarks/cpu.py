"""Time glu4.dual_gemm on the CPU against torch.matmul in float32 on weights decoded beforehand.

    python benchmarks/cpu.py [--m 1 16 256] [--n 4096] [--k 7168] [--rounds 7] [--output benchmarks/results/cpu.json]

Both run in turn on the same inputs, so that a drifting machine drifts for both; the ratio of the medians is the result. The
float32 side gets its weights decoded for free and applies SiLU and the product as glu4 does, so it is the lower bound of
anything that decodes. W4A16 takes bfloat16 activations, W4A4 quantised ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import glu4


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(m: int, n: int, k: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of medians and minima, in milliseconds, for one shape."""
    gen = torch.Generator().manual_seed(m + n + k)
    gate, up = (glu4.quantize(torch.randn(n, k, generator=gen)) for _ in range(2))
    weights = glu4.GatedWeights(gate, up)
    x = torch.randn(m, k, generator=gen).bfloat16()
    decoded = torch.cat((gate.dequantize(), up.dequantize()))

    def float32() -> torch.Tensor:
        g, u = (x.float() @ decoded.t()).split(n, dim=-1)
        return (torch.nn.functional.silu(g) * u).bfloat16()

    x4 = glu4.quantize(x)
    runs: dict[str, Callable[[], object]] = {
        "torch_float32": float32,
        "glu4_w4a16": lambda: glu4.dual_gemm(x, weights),
        "glu4_w4a4": lambda: glu4.dual_gemm(x4, weights),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            seconds = _seconds(run)
            if i:  # the first round warms up
                times[name].append(seconds * 1e3)
    base = statistics.median(times["torch_float32"])
    return [
        {
            "peer": name,
            "m": m,
            "n": n,
            "k": k,
            "ms": round(statistics.median(t), 3),
            "ms_min": round(min(t), 3),
            "ratio": round(statistics.median(t) / base, 3),
        }
        for name, t in times.items()
    ]


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=7168)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{'M,N,K':>16}  {'':14} {'ms':>9} {'ms min':>9} {'ratio':>6}")
    for m in args.m:
        for row in compare(m, args.n, args.k, args.rounds):
            rows.append(row)
            shape = f"{m},{args.n},{args.k}"
            print(f"{shape:>16}  {row['peer']:14} {row['ms']:9.2f} {row['ms_min']:9.2f} {row['ratio']:6.2f}", flush=True)
    if args.output:
        document = {
            "device": _cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "glu4": glu4.__version__,
            "commit": _commit(),
            "method": f"interleaved, median and minimum of {args.rounds} rounds after a warm-up round; ratio of medians",
            "rows": rows,
        }
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
