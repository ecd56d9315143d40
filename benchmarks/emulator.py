"""Time the PTX emulator on kernels of tests/emulator/kernels: warp instructions a second, and seconds a CTA, on one core.

    python benchmarks/emulator.py [--kernels cute_dual_pair ...] [--rounds 5] [--output benchmarks/results/emulator-1-core.json]

Hazard checks are on and the schedule is eager. One cluster of each launch runs, as `--ctas` of `glu4 emulate` would choose it;
parsing is timed apart. The process is pinned to one core, so that NumPy's products use one as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# before NumPy starts threads, which would wait for each other on one core
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")

import numpy as np

import glu4

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "emulator" / "kernels"))

import launches

from glu4.emulator.launch import emulate, load

# a gated product of 128 x 128 for each CTA with K 1024 is the case that the emulator's speed is promised for
KERNELS = ["cute_dual_pair", "cute_dual", "cute_gemm_pair", "cute_dense_pair", "triton_dual_linear", "triton_gemm_specialized"]


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Medians and minima of one kernel; the first round warms up."""
    ptx, launch, problem = launches.load(name)
    inputs = launches.make_inputs(problem)
    cluster = launch.get("cluster", [1])
    ctas = int(np.prod(cluster))
    start = time.perf_counter()
    program = load(ptx)
    loading = time.perf_counter() - start
    seconds = []
    for i in range(rounds + 1):
        result = emulate(program, {**launch, "ctas": [[0, 0, 0]]}, inputs)
        if not result.report.clean:
            raise SystemExit(f"{name}: {result.report}")
        if i:
            seconds.append(result.report.seconds)
    median = statistics.median(seconds)
    return {
        "kernel": name,
        "m": problem.m,
        "n": problem.n,
        "k": problem.k,
        "threads": int(np.prod(launch["block"])),
        "ctas": ctas,
        "warp_instructions": result.report.instructions,
        "load_seconds": round(loading, 3),
        "seconds_per_cta": round(median / ctas, 4),
        "seconds_per_cta_min": round(min(seconds) / ctas, 4),
        "warp_instructions_per_second": round(result.report.instructions / median),
    }


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=False).stdout
    return (done.stdout.strip() or "unknown") + (" with changes" if changed.strip() else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=launches.names(), metavar="KERNEL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = []
    print(f"{'':26}{'M,N,K':>14} {'instructions':>13} {'s/CTA':>8} {'min':>8} {'instr/s':>9} {'load s':>7}")
    for name in args.kernels:
        row = measure(name, args.rounds)
        rows.append(row)
        shape = f"{row['m']},{row['n']},{row['k']}"
        times = f"{row['seconds_per_cta']:8.3f} {row['seconds_per_cta_min']:8.3f} {row['warp_instructions_per_second']:9,}"
        print(f"{name:26}{shape:>14} {row['warp_instructions']:13,} {times} {row['load_seconds']:7.2f}", flush=True)
    if args.output:
        document = {
            "device": _cpu_name(),
            "cores": 1,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "glu4": glu4.__version__,
            "commit": _commit(),
            "method": "one cluster of each launch, eager schedule, hazard checks on, pinned to one core; median and minimum "
            f"of {args.rounds} rounds after a warm-up round",
            "rows": rows,
        }
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
