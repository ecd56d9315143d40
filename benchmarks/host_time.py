"""Time what the host spends on an eager call, and on loading a kernel, on the Hopper GPU of this machine.

    python benchmarks/host_time.py [--output benchmarks/results/h100-host-time.json]
    python benchmarks/host_time.py --dry   # no GPU: all but the driver and torch's CUDA allocator, on CPU tensors

Method: under torch.inference_mode, calls are queued 50 at a time without waiting for the GPU, 100 times over, the device
synchronised in between; median and minimum of the 100, divided by 50. Kernels are loaded one after the other, each for the
first time in this process: finding and checking its file, cuLibraryLoadData, and making it ready on the device.
Beside them, to tell a slow host from slow code: cuLaunchKernelEx alone, of a kernel that waits for those before it and of one
that may overlap them; torch's own calls of one element, of an empty output, of an empty module, and of linear in fp16.

A dry run puts functions that do nothing in libcuda's place: it tells the cost of Python and ctypes alone, and is no measurement
of a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import glu4
import glu4.nn
from glu4.backends.hopper import launch, tokens
from glu4.backends.hopper.spec import KernelSpec, Spec, shipped
from glu4.compiled import driver, store

CALLS, ROUNDS = 50, 100
SHAPES = ((4096, 7168), (64, 64))


class Nothing:
    """libcuda, doing nothing. Handles are 1; a launch goes through ctypes to a C function that compares two arguments."""

    def __init__(self) -> None:
        self.cuLaunchKernelEx = ctypes.CDLL(None).pthread_equal
        self.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            if name in ("cuLibraryLoadData", "cuLibraryGetKernel", "cuCtxGetCurrent"):
                args[0]._obj.value = 1
            return 0

        return call


def pretend() -> None:
    """Make the CPU a Hopper GPU on which nothing runs."""
    nothing = Nothing()
    behind = [24, 8, 8, 8, 16, 16, 4, 4, 4, 4, 24, 1]  # bytes of the parameters behind the tokens'
    sizes = {"w4a16": [128, 8, *behind], "w4a4": [24, 24, *behind], "decode": [16, 16, 16, 4]}

    def find(spec: Spec) -> tuple[bytes, dict[str, Any]]:
        kind = "decode" if not isinstance(spec, KernelSpec) else "w4a4" if spec.nvfp4 else "w4a16"
        return b"", {"entry": "", "params": sizes[kind], "threads": 256, "shared_bytes": 1000, "pdl": True}

    driver._cuda = lambda: nothing
    store.find = find
    launch.is_hopper = lambda device: True
    launch._properties = lambda index: ("nothing", 132)
    torch._C._cuda_getDevice = lambda: -1
    torch._C._cuda_getCurrentRawStream = lambda index: 7
    torch.cuda.synchronize = lambda: None
    torch.set_num_threads(1)


@contextmanager
def _no_collection() -> Any:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def host_time(call: Callable[[], object]) -> dict[str, float]:
    """Median and minimum microseconds a call."""
    for _ in range(CALLS):
        call()
    torch.cuda.synchronize()
    times = []
    with _no_collection():
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times.append((time.perf_counter() - start) / CALLS * 1e6)
            torch.cuda.synchronize()
    return {"us": round(statistics.median(times), 2), "us_min": round(min(times), 2)}


def load_times() -> dict[str, float]:
    """Median, minimum and maximum milliseconds for one kernel, of all that are compiled, each loaded for the first time."""
    torch.cuda.synchronize()
    times = []
    index = torch._C._cuda_getDevice()
    for spec in shipped():
        start = time.perf_counter()
        kernel = launch._kernel(spec) if isinstance(spec, KernelSpec) else tokens.decoder()
        if kernel is not None:
            kernel.load(index)
            times.append((time.perf_counter() - start) * 1e3)
    found = {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
    return {**{k: round(v, 3) for k, v in found.items()}, "kernels": len(times)}


def operand(n: int, k: int, device: str) -> glu4.NVFP4Tensor:
    return glu4.quantize(torch.randn(n, k, device=device))


def raw(x: Tensor, weights: glu4.GatedWeights) -> Callable[[], object]:
    """The launch alone, as an eager call makes it: the kernel chosen, the output there."""
    plan, out = planned(x, weights)
    packed, (gate, up) = weights.packed, weights.scales
    assert packed is not None
    return lambda: plan.launch(x.data_ptr(), packed.data_ptr(), gate.data_ptr(), up.data_ptr(), out.data_ptr())


def planned(x: Tensor, weights: glu4.GatedWeights) -> tuple[launch.Plan, Tensor]:
    """What an eager call remembers of its launch, and an output."""
    (m, k), n = x.shape, weights.shape[0]
    chosen = launch.choice(m, n, k, True, x.dtype, x.dtype, x.get_device())
    assert chosen is not None
    assert weights.packed is not None
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    return launch.Plan(chosen, x, weights.packed, glu4.SILU, (m, n), x.dtype), out


def driver_call(x: Tensor, weights: glu4.GatedWeights, overlap: bool) -> Callable[[], object]:
    """cuLaunchKernelEx alone: the same memory each time, nothing written into it."""
    (m, k), n = x.shape, weights.shape[0]
    chosen = launch.choice(m, n, k, True, x.dtype, x.dtype, x.get_device())
    assert chosen is not None
    _, out = planned(x, weights)
    frames = chosen[0].frames
    others = frames.copy()
    frames.clear()  # so that the next launch makes memory that nobody else gets
    packed, scales = weights.packed, (weights.scales[0], weights.scales[1])
    assert packed is not None
    target = (out.data_ptr(), m, n, n)
    launch.submit(chosen, x.get_device(), tokens.source(x), packed, scales, None, (None, None), glu4.SILU, target, overlap)
    frame = frames.pop()
    frames.extend(others)
    handle, function = chosen[0].handle, driver._cuda().cuLaunchKernelEx

    def call() -> None:
        if function(frame.config, handle, frame.pointers, None):
            raise RuntimeError(f"cuLaunchKernelEx failed with {out.shape}")  # and keeps `out`

    return call


def operator(x: Tensor, weights: glu4.GatedWeights) -> Callable[[], object]:
    """The operator itself, which is what a graph of torch.compile calls."""
    out = torch.empty(x.shape[0], weights.shape[0], dtype=x.dtype, device=x.device)
    gate, up = ([w.codes, w.block_scale.view(torch.uint8), w.global_scale] for w in (weights.gate, weights.up))
    rest = (weights.packed, None, None, "swish", [1.0, 0.0, float("inf")], "")
    return lambda: torch.ops.glu4.dual_gemm(out, [x], gate, up, *rest)


def calls(m: int, n: int, k: int, device: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    weights = glu4.GatedWeights(operand(n, k, device), operand(n, k, device)).prepare(device)
    one = glu4.LinearWeight(operand(n, k, device)).prepare(device)
    x = torch.randn(m, k, device=device).half()
    x4, out = glu4.quantize(x), torch.empty(m, n, dtype=x.dtype, device=device)
    ahead = x4.to_swizzled()
    mlp = glu4.nn.GatedMLP(weights, nn.Identity())
    linear = glu4.nn.NVFP4Linear(one.matrix)
    dense = torch.randn(n, k, device=device).half()
    one_element, nothing = x[0, :1].clone(), nn.Identity()
    return {
        "cuLaunchKernelEx alone": driver_call(x, weights, overlap=False),
        "cuLaunchKernelEx alone, overlapping": driver_call(x, weights, overlap=True),
        "raw launch": raw(x, weights),
        "dual_gemm W4A16": lambda: glu4.dual_gemm(x, weights),
        "dual_gemm W4A16, out given": lambda: glu4.dual_gemm(x, weights, out=out),
        "dual_gemm W4A4": lambda: glu4.dual_gemm(x4, weights, out_dtype=torch.float16),
        "dual_gemm W4A4, decoded ahead": lambda: glu4.dual_gemm(ahead, weights, out_dtype=torch.float16),
        "linear W4A16": lambda: glu4.linear(x, one),
        "linear W4A4": lambda: glu4.linear(x4, one, out_dtype=torch.float16),
        "GatedMLP, without its down_proj": lambda: mlp(x),
        "NVFP4Linear": lambda: linear(x),
        "torch.ops.glu4.dual_gemm": operator(x, weights),
        "torch.add_ of one element": lambda: one_element.add_(1),
        "torch.empty of the output": lambda: torch.empty(m, n, dtype=x.dtype, device=x.device),
        "torch.nn.Identity": lambda: nothing(x),
        "torch.nn.functional.linear fp16": lambda: nn.functional.linear(x, dense),
    }


def many_sizes(device: str, n: int, k: int) -> Callable[[], object]:
    """A call with another M each time, as a server makes them."""
    weights = glu4.GatedWeights(operand(n, k, device), operand(n, k, device)).prepare(device)
    x = torch.randn(512, k, device=device).half()
    sizes = [1 + i * 37 % 512 for i in range(512)]
    at = 0

    def call() -> None:
        nonlocal at
        at += 1
        glu4.dual_gemm(x[: sizes[at % 512]], weights)

    return call


def environment(dry: bool) -> dict[str, Any]:
    from glu4.bench.machine import commit
    from glu4.bench.machine import environment as gpu

    here = {"torch": str(torch.__version__), "python": platform.python_version()} if dry else gpu()
    return {**here, "cpu": platform.processor() or platform.machine(), "commit": commit()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--commit", default="", help="recorded with the result where there is no git")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.dry:
        pretend()
    else:
        torch.zeros(1, device="cuda")
    device, shapes = ("cpu", SHAPES[-1:]) if args.dry else ("cuda", SHAPES)
    loaded = load_times()
    print(f"kernel load     median {loaded['ms']:.3f} ms, maximum {loaded['ms_max']:.3f} ms, {loaded['kernels']} kernels")
    rows = []
    with torch.inference_mode():
        for n, k in shapes:
            print(f"N = {n}, K = {k}")
            timed = [(1, name, call) for name, call in calls(1, n, k, device).items()]
            timed.append((0, "dual_gemm W4A16, M from 1 to 512", many_sizes(device, n, k)))
            for m, name, call in timed:
                rows.append({"call": name, "m": m or None, "n": n, "k": k, **host_time(call)})
                print(f"{name:36} {rows[-1]['us']:8.2f} us (min {rows[-1]['us_min']:.2f})", flush=True)
    if args.output:
        document = {
            **environment(args.dry),
            **({"commit": args.commit} if args.commit else {}),
            "method": " ".join((__doc__ or "").split("Method: ")[1].split("A dry run")[0].split()),
            "kernel load": loaded,
            "rows": rows,
        }
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
