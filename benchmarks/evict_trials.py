"""Packed weights that leave the L2 cache first, against the same kernels without that hint, on one GPU.

    python benchmarks/evict_trials.py --compile              # with CuTe DSL, no GPU; into the kernel cache (GLU4_CACHE_DIR)
    python benchmarks/evict_trials.py --output FILE          # on a Hopper GPU with those kernels and the shipped ones

For each case the kernel that would be chosen and its twin, fp16 and NVFP4 tokens. The hint changes no bit, which is checked
before anything is timed. Times: `glu4.bench.timing`, CUDA graphs over copies that leave L2 cold, in turns, median and minimum.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from glu4.activation import SILU
from glu4.backends.hopper import grouped_launch
from glu4.backends.hopper.config import SHIPPED, Config
from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED, grouped_candidates
from glu4.backends.hopper.spec import GroupedSpec, KernelSpec
from glu4.backends.hopper.tuned import ordered
from glu4.bench.grouped import GroupedShape, draw_grouped
from glu4.bench.machine import environment
from glu4.bench.operands import draw
from glu4.bench.ours import Prepared, _clone, single
from glu4.bench.suites import GROUPED_SUITES
from glu4.bench.timing import Cuda, copies, interleaved, listed
from glu4.compiled import store
from glu4.weights import GatedWeights

DENSE = [(m, 4096, 7168) for m in (1, 16, 64, 128, 256, 512, 4096)] + [(256, 3072, 4096), (512, 3072, 7168)]
GROUPED = [s for s in (*GROUPED_SUITES["grouped-seed"], *GROUPED_SUITES["moe"]) if "zipf" not in s.case.lower()]
FORMATS = ("float16", "nvfp4")
Calls = list[Callable[[], object]]


def twins() -> list[KernelSpec | GroupedSpec]:
    """The kernels to compile: of gate and up, fp16 out."""
    hinted = [replace(c, evict_first=True) for c in SHIPPED]
    made: list[KernelSpec | GroupedSpec] = [KernelSpec(c, "f16", "f16", True) for c in hinted]
    made += [KernelSpec(c, "nvfp4", "f16", True) for c in hinted if c.takes_nvfp4]
    return made + [GroupedSpec(replace(c, evict_first=True), "f16", "f16") for c in GROUPED_SHIPPED]


def dense(m: int, n: int, k: int, x_format: str) -> tuple[str, dict[str, Calls]]:
    operands = draw(m, n, k, "cuda")
    held, problem = Prepared(operands), operands.problem(x_format)
    problem = replace(problem, out_dtype=torch.float16)
    properties = torch.cuda.get_device_properties(0)
    config: Config = next(ordered(problem, properties.name, properties.multi_processor_count))
    both = {name: single(held, c, x_format) for name, c in (("plain", config), ("hint", replace(config, evict_first=True)))}
    return config.name, {name: list(one.prepare(operands)) for name, one in both.items()}


def grouped(shape: GroupedShape, x_format: str) -> tuple[str, dict[str, Calls]]:
    operands = draw_grouped(shape, "cuda")
    problem = replace(operands.problem(x_format), out_dtype=torch.float16)
    config = next(grouped_candidates(problem))
    count = copies(operands.gate.nbytes * 2)
    held = [GatedWeights(_clone(operands.gate), _clone(operands.up)).prepare("cuda", free_original=True) for _ in range(count)]
    xs = operands.x(x_format, count)
    out = torch.empty((operands.m, operands.n), dtype=torch.float16, device="cuda")
    scales = (operands.gate.global_scale, operands.up.global_scale)

    def call(i: int, hint: bool) -> Tensor:
        packed = held[i].packed
        assert packed is not None
        chosen = replace(config, evict_first=hint)
        grouped_launch.grouped(out, xs[i], packed, operands.offsets, scales, (None, None), SILU, problem, chosen)
        return out

    return config.name, {n: [lambda i=i, h=h: call(i, h) for i in range(count)] for n, h in (("plain", False), ("hint", True))}  # type: ignore[misc]


def cases() -> Iterator[tuple[str, str, Callable[[], tuple[str, dict[str, Calls]]]]]:
    for x_format in FORMATS:
        for shape in GROUPED:
            yield shape.case, x_format, lambda s=shape, f=x_format: grouped(s, f)  # type: ignore[misc]
        for m, n, k in DENSE:
            yield f"{m},{n},{k}", x_format, lambda m=m, n=n, k=k, f=x_format: dense(m, n, k, f)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    options = parser.parse_args()
    if options.compile:
        store.compile_missing(twins(), on_done=lambda name: print(name, flush=True), jobs=2)
        return
    torch.zeros(1, device="cuda")  # kernels load into its context
    rows: list[dict[str, object]] = []
    for case, x_format, make in cases():
        if options.only not in case:
            continue
        config, calls = make()
        results = [calls[name][0]().clone() for name in ("plain", "hint")]  # type: ignore[attr-defined]
        row: dict[str, object] = {"case": case, "x": x_format, "config": config, "same": torch.equal(*results)}
        for name, timing in interleaved(calls, Cuda()).items() if row["same"] else ():
            row[name] = listed(timing)
        rows.append(row)
        print(row, flush=True)
        options.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
        del calls, results
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
