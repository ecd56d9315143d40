"""`glu4 doctor`: what is installed, which devices there are, what would run on them, and whether it computes right."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
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

    from glu4.compiled.store import Spec

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
    "triton": "",  # glu4 needs it nowhere; submissions may
    "nvidia-cutlass-dsl": "",  # to compile kernels; what follows from its absence stands with the kernels
}
_TORCH = (2, 11)
_EXACT = (64, 128, 256)  # M, N, K of the self-test
_NAMES_SHOWN = 4
_SCARCE_GIB = 1.0  # of free GPU memory: too little for one layer of most models and what a call needs


def command(json: JsonOption = False) -> None:
    """Show versions, compiled kernels, devices and the backend each would use, and run a short self-test on every device.

    Exit code 0: the self-test is right everywhere. 1: it is not.
    """
    devices = [_device(device) for device in _devices()]
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    versions["torch"] = _torch_version()
    kernels, blackwell = _kernels(), _blackwell_kernels([entry["blackwell"] for entry in devices])
    hints = _hints(versions, [entry["device"] for entry in devices]) + _kernel_hints(kernels, devices)
    hints += _blackwell_hints(kernels, blackwell)
    hints += _table_hints(devices) + _memory_hints(devices)
    right = all(not entry["faults"] for entry in devices)
    if json:
        emit_json(
            {"status": "right" if right else "wrong", "platform": platform.platform(), "executable": sys.executable}
            | {"versions": versions, "devices": devices, "kernels": kernels}
            | {"blackwell_kernels": blackwell, "hints": hints}
        )
    else:
        _print(versions, kernels, blackwell, devices, hints)
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

    from glu4.backends.blackwell.launch import architecture
    from glu4.backends.hopper.launch import is_hopper
    from glu4.dispatch import explain
    from glu4.problem import GroupedProblem, Problem

    problems: dict[str, Problem | GroupedProblem] = {
        "dual_gemm W4A4": Problem(256, 4096, 7168),
        "dual_gemm W4A16": Problem(256, 4096, 7168, x_format="float16"),
        "linear W4A16": Problem(256, 4096, 7168, operation="linear", x_format="float16"),
        "grouped_dual_gemm W4A16": GroupedProblem(256, 8, 4096, 7168, x_format="float16"),
        "grouped_linear W4A16": GroupedProblem(256, 8, 7168, 4096, x_format="float16", operation="grouped_linear"),
    }
    backends = {}
    for name, problem in problems.items():
        explanation = explain(problem, device)
        reasons = {c.backend: {"can_run": c.can_run, "reason": c.reason} for c in explanation.candidates}
        backends[name] = {"chosen": explanation.chosen, "candidates": reasons}
    model = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        model = properties.name
        major_minor = f"sm_{properties.major}{properties.minor}"
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        description = f"{properties.name}, {major_minor}, {free:.1f} GiB free of {properties.total_memory / 2**30:.1f}"
    else:
        free = None
        description = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    entry = {"device": str(device), "description": description, "free_gib": free, "hopper": is_hopper(device), "name": model}
    return {**entry, "blackwell": architecture(device), "backends": backends, "faults": _faults(device)}


def _kernels() -> dict[str, Any]:
    """The compiled kernels that there are and are not, and what could be done about it."""
    from glu4.compiled import store
    from glu4.dispatch import every_kernel

    cache = store.cache_directory()
    return {
        **_inventory(every_kernel()),
        "cache_directory": None if cache is None else str(cache),
        "cache_problem": "the cache is off" if cache is None else store.unwritable(cache),
        "compiler": store.installed_dsl(),
        "tested_compiler": store.DSL_VERSION,
    }


def _blackwell_kernels(architectures: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """By target, the same of the Blackwell kernels: of the devices that there are, or else of the first target."""
    from glu4.backends.blackwell import launch
    from glu4.dispatch import every_kernel

    there = dict.fromkeys(arch for arch in architectures if arch is not None)
    targets = list(there) or [next(iter(launch.ARCHITECTURES.values()))]
    return {arch: _inventory(every_kernel(arch)) | {"device": arch in there} for arch in targets}


def _inventory(specs: Sequence[Spec]) -> dict[str, Any]:
    from glu4.compiled import store

    found = store.inventory(specs)
    return {
        "shipped": len(specs),
        "packaged": len(found.packaged),
        "cached": len(found.cached),
        "missing": found.missing,
        "damaged": [str(p) for p in found.damaged],
        "outdated": [str(p) for p in found.outdated],
    }


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


def _kernel_hints(kernels: dict[str, Any], devices: list[dict[str, Any]]) -> list[str]:
    """What is to be done about Hopper kernels, one sentence each."""
    hints = _file_hints(kernels, "glu4 compile")
    if kernels["missing"] and any(entry["hopper"] for entry in devices):
        hints.insert(0, _missing(kernels, kernels, "Hopper", "glu4 compile"))
    return hints


def _blackwell_hints(kernels: dict[str, Any], blackwell: dict[str, dict[str, Any]]) -> list[str]:
    """The same of Blackwell kernels; `kernels` says where they are put and by what."""
    hints = []
    for arch, found in blackwell.items():
        command = f"glu4 compile --arch {arch}"
        if found["missing"] and found["device"]:
            hints.append(_missing(kernels, found, f"{arch} Blackwell", command))
        hints += _file_hints(found, command)
    return hints


def _missing(kernels: dict[str, Any], found: dict[str, Any], family: str, command: str) -> str:
    from glu4.compiled.store import HOW_TO_INSTALL

    place = kernels["cache_problem"]
    steps = [f"set GLU4_CACHE_DIR to a directory that can be written ({place})"] if place else []
    if kernels["compiler"] != kernels["tested_compiler"]:
        steps.append(HOW_TO_INSTALL)
    what = f"{len(found['missing'])} of {found['shipped']} {family} kernels are not compiled"
    return f"{what}: {', then '.join([*steps, command])}; or install a wheel of glu4 that carries them"


def _file_hints(found: dict[str, Any], command: str) -> list[str]:
    """Of kernel files that are not loaded."""
    hints = []
    if found["damaged"]:
        hints.append(f"damaged kernel files are not loaded, and {command} replaces them: {', '.join(found['damaged'])}")
    if found["outdated"]:
        first, rest = found["outdated"][0], len(found["outdated"]) - 1
        more = f" and {rest} more" if rest else ""
        hints.append(f"kernel files of another version of glu4, which may be deleted: {first}{more}")
    return hints


def _table_hints(devices: list[dict[str, Any]]) -> list[str]:
    """Why measured tables of these devices are not used."""
    import warnings

    from glu4.backends.hopper import tuned

    names = dict.fromkeys(entry["name"] for entry in devices if entry["hopper"] and entry["name"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same sentence, which is a hint here
        return [f"a measured table is not used: {reason}" for name in names for reason in tuned.refusals(name)]


def _memory_hints(devices: list[dict[str, Any]]) -> list[str]:
    return [
        f"{entry['device']} has {entry['free_gib']:.1f} GiB of free memory, too little for most models: see nvidia-smi"
        for entry in devices
        if entry["free_gib"] is not None and entry["free_gib"] < _SCARCE_GIB
    ]


def _older(torch_version: str) -> bool:
    major, minor = torch_version.split(".")[:2]
    return (int(major), int(minor)) < _TORCH


# ---- self-test ----


def _faults(device: torch.device) -> list[str]:
    """What the self-test found wrong on a device; a backend that cannot run it is a fault too."""
    import torch

    from glu4.dispatch import explain
    from glu4.problem import Problem

    faults = []
    try:
        if not _decodes(device):
            faults.append("decoding e2m1 x e4m3 gives wrong values")
    except (RuntimeError, TypeError, NotImplementedError) as error:
        faults.append(f"the self-test cannot run: {_one_line(error)}")
    # kernels that are missing are no fault, and nothing is compiled here
    candidates = explain(Problem(*_EXACT, out_dtype=torch.float16), device).candidates
    for backend in [c.backend for c in candidates if c.can_run]:
        try:
            if not _multiplies(device, backend):
                faults.append(f"dual_gemm by {backend} of exact operands differs from the specification")
        except (RuntimeError, TypeError, NotImplementedError) as error:
            faults.append(f"dual_gemm by {backend} cannot run: {_one_line(error)}")
    return faults


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


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


def _multiplies(device: torch.device, backend: str) -> bool:
    """Whether a backend gives a result that has one right bit pattern."""
    import torch

    import glu4
    from glu4 import reference
    from glu4.verify.contest import DualShape, exact_dual

    data = exact_dual(DualShape(*_EXACT), seed=0)
    expected = reference.dual_gemm(data.a, data.b1, data.b2)[0]
    a, gate, up = (operand[0].to(device) for operand in (data.a, data.b1, data.b2))
    got = glu4.dual_gemm(a, glu4.GatedWeights(gate, up), out_dtype=torch.float16, backend=backend)
    return torch.equal(got.cpu(), expected)


# ---- printing ----


def _print(
    versions: dict[str, str | None],
    kernels: dict[str, Any],
    blackwell: dict[str, dict[str, Any]],
    devices: list[dict[str, Any]],
    hints: list[str],
) -> None:
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
    _print_counts(kernels, "Hopper kernels", "glu4 compile")
    for arch, inventory in blackwell.items():
        _print_counts(inventory, f"Blackwell kernels ({arch})", f"glu4 compile --arch {arch}")
    _print_tool(kernels)
    for hint in hints:
        console.print(f"hint: {escape(hint)}", soft_wrap=True)


def _print_counts(found: dict[str, Any], family: str, command: str) -> None:
    missing, damaged = len(found["missing"]), len(found["damaged"])
    counts = f"{found['packaged']} in the package, {found['cached']} in the cache, {missing} missing, {damaged} damaged"
    console.print(f"{family}: {found['shipped']} shipped; {counts}", highlight=False)
    if 0 < missing < found["shipped"]:
        shown = found["missing"][:_NAMES_SHOWN]
        rest = f" and {missing - len(shown)} more ({command} --list)" if missing > len(shown) else ""
        console.print(f"  missing: {', '.join(shown)}{rest}", highlight=False)


def _print_tool(kernels: dict[str, Any]) -> None:
    directory, problem = kernels["cache_directory"], kernels["cache_problem"]
    place = "off" if directory is None else f"{directory} ({problem or 'can be written'})"
    console.print(f"kernel cache: {escape(place)}", highlight=False, soft_wrap=True)
    found, tested = kernels["compiler"], kernels["tested_compiler"]
    tool = "not installed; only compiling needs it" if found is None else found
    suffix = "" if found in (None, tested) else f", which is not the tested {tested}: it compiles nothing"
    console.print(f"CuTe DSL: {tool}{suffix}", highlight=False)
