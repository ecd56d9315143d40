"""`glu4 doctor`: what is installed, which devices there are, what would run on them, and whether it computes right."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from glu4.cli.output import JsonOption, console, emit_json

if TYPE_CHECKING:
    import torch

__all__ = ["command"]

# distributions, not modules: their versions are read without importing them
_PACKAGES = {
    "glu4": "",
    "torch": "",
    "numpy": "",
    "safetensors": "",
    "transformers": "for demo, eval and nn.convert: pip install 'glu4[hf]'",
    "gguf": "for demo: pip install 'glu4[hf]'",
    "matplotlib": "for pictures in reports: pip install 'glu4[report]'",
    "triton": "",  # glu4 needs neither this nor the next; submissions may
    "nvidia-cutlass-dsl": "",
}
_TORCH = (2, 11)


def command(json: JsonOption = False) -> None:
    """Show versions, devices and the backend each would use, and run a short self-test on every device.

    Exit code 0: the self-test is right everywhere. 1: it is not.
    """
    devices = [_device(device) for device in _devices()]
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    versions["torch"] = _torch_version()
    hints = _hints(versions, [entry["device"] for entry in devices])
    right = all(not entry["faults"] for entry in devices)
    if json:
        emit_json(
            {"status": "right" if right else "wrong", "platform": platform.platform(), "executable": sys.executable}
            | {"versions": versions, "devices": devices, "kernel_cache": None, "hints": hints}
        )
    else:
        _print(versions, devices, hints)
    raise typer.Exit(0 if right else 1)


# ---- what there is ----


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch_version() -> str:
    """With the build, such as +cpu or +cu130, which the metadata may lack."""
    import torch

    return str(torch.__version__)


def _devices() -> list[torch.device]:
    import torch

    found = [torch.device("cpu")]
    found += [torch.device("cuda", i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def _device(device: torch.device) -> dict[str, Any]:
    """One device: its description, the backend of each kind of call with the reasons, and what the self-test found."""
    import torch

    from glu4.dispatch import explain
    from glu4.problem import GroupedProblem, Problem

    problems: dict[str, Problem | GroupedProblem] = {
        "dual_gemm W4A4": Problem(256, 4096, 7168),
        "dual_gemm W4A16": Problem(256, 4096, 7168, x_format="float16"),
        "linear W4A16": Problem(256, 4096, 7168, operation="linear", x_format="float16"),
        "grouped_dual_gemm W4A16": GroupedProblem(256, 8, 4096, 7168, x_format="float16"),
    }
    backends = {}
    for name, problem in problems.items():
        explanation = explain(problem, device)
        reasons = {c.backend: {"can_run": c.can_run, "reason": c.reason} for c in explanation.candidates}
        backends[name] = {"chosen": explanation.chosen, "candidates": reasons}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        major_minor = f"sm_{properties.major}{properties.minor}"
        description = f"{properties.name}, {major_minor}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        description = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {"device": str(device), "description": description, "backends": backends, "faults": _faults(device)}


def _hints(versions: dict[str, str | None], devices: list[str]) -> list[str]:
    """What a person could change, one sentence each."""
    import torch

    hints = [f"{name} is not installed: {_PACKAGES[name]}" for name in _PACKAGES if versions[name] is None and _PACKAGES[name]]
    if versions["glu4"] is None:
        hints.append("glu4 runs from a source tree that is not installed: pip install -e . gives it a version and the command")
    if _older(torch.__version__):
        hints.append(f"torch {torch.__version__} is older than 2.11, which glu4 is written for: pip install -U torch")
    if not any(name.startswith("cuda") for name in devices):
        if torch.version.cuda is None and Path("/proc/driver/nvidia/version").exists():
            hints.append(
                "this machine has an NVIDIA driver but torch is a CPU build: install a CUDA build of torch to use the GPU"
            )
        elif torch.version.cuda is not None:
            hints.append(
                f"torch is built for CUDA {torch.version.cuda} but sees no device: check nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        else:
            hints.append("no CUDA device: everything runs on the CPU")
    return hints


def _older(torch_version: str) -> bool:
    major, minor = torch_version.split(".")[:2]
    return (int(major), int(minor)) < _TORCH


# ---- self-test ----


def _faults(device: torch.device) -> list[str]:
    """What the self-test found wrong on a device; a device that cannot run it at all is a fault too."""
    try:
        faults = [] if _decodes(device) else ["decoding e2m1 x e4m3 gives wrong values"]
        if not _multiplies(device):
            faults.append("dual_gemm of exact operands differs from the specification")
    except (RuntimeError, TypeError, NotImplementedError) as error:
        faults = [f"the self-test cannot run: {' '.join(str(error).split())[:200]}"]
    return faults


def _decodes(device: torch.device) -> bool:
    """Whether every code under every scale decodes to the value that the bit fields mean, in three dtypes."""
    import torch

    from glu4.nvfp4 import NVFP4Tensor, pack_codes

    codes = pack_codes(torch.arange(16, dtype=torch.uint8).expand(127, 16))
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)
    decoded = NVFP4Tensor(codes, scales, torch.ones(())).to(device)
    expected = torch.tensor([[_e2m1(code) * _e4m3(scale) for code in range(16)] for scale in range(127)], dtype=torch.float64)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return all(torch.equal(decoded.decode(dtype).cpu().double(), expected) for dtype in dtypes)


def _e2m1(code: int) -> float:
    """Sign, two exponent bits of bias 1, one mantissa bit; exponent 0 is subnormal."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -magnitude if code & 8 else magnitude


def _e4m3(byte: int) -> float:
    """Four exponent bits of bias 7, three mantissa bits; exponent 0 is subnormal. For bytes without sign, not NaN."""
    exponent, mantissa = byte >> 3, byte & 7
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6


def _multiplies(device: torch.device) -> bool:
    """Whether the backend chosen for the device gives a result that has one right bit pattern."""
    import torch

    import glu4
    from glu4 import reference
    from glu4.verify.contest import DualShape, exact_dual

    data = exact_dual(DualShape(64, 128, 256), seed=0)
    expected = reference.dual_gemm(data.a, data.b1, data.b2)[0]
    a, gate, up = (operand[0].to(device) for operand in (data.a, data.b1, data.b2))
    return torch.equal(glu4.dual_gemm(a, glu4.GatedWeights(gate, up), out_dtype=torch.float16).cpu(), expected)


# ---- printing ----


def _print(versions: dict[str, str | None], devices: list[dict[str, Any]], hints: list[str]) -> None:
    table = Table(title="versions", title_justify="left", box=SIMPLE, pad_edge=False, show_header=False)
    for name, found in versions.items():
        table.add_row(name, found or "not installed")
    console.print(table)
    for entry in devices:
        console.print(f"[bold]{entry['device']}[/]: {escape(entry['description'])}")
        for operation, answer in entry["backends"].items():
            for backend, candidate in answer["candidates"].items():
                mark = "runs" if backend == answer["chosen"] else "can run" if candidate["can_run"] else "cannot run"
                console.print(f"  {operation}: {backend} {mark} ({escape(candidate['reason'])})")
        if entry["faults"]:
            for fault in entry["faults"]:
                console.print(f"  [bold red]WRONG[/]: {escape(fault)}")
        else:
            console.print("  self-test: right (all 16 codes x 127 scales, and an exact dual_gemm)")
    console.print("kernel cache: none; the portable backend compiles nothing")
    for hint in hints:
        console.print(f"hint: {escape(hint)}")
