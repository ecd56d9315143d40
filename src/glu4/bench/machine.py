"""What a measurement ran on: device, driver, clocks, versions, and the two rates of the roofline, measured."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

import glu4
from glu4.bench.devices import DEVICES, Device
from glu4.bench.timing import Call, Recorder

__all__ = ["clocks", "commit", "device_of", "environment", "measured_roofs", "slug"]

_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
_ROUNDS = 10
_COPIED_BYTES = 1 << 32
_SIDE = 8192


def _output_of(*command: str) -> str:
    """What a command prints; nothing when it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _smi(*fields: str) -> dict[str, str]:
    index = str(torch.cuda.current_device()) if torch.cuda.is_available() else "0"
    line = _output_of("nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return dict(zip(fields, (part.strip() for part in line.split(",")))) if line else {}


def clocks() -> dict[str, str]:
    """SM and memory clock, temperature and power now, as nvidia-smi says them; empty without it."""
    return _smi(*_CLOCKS)


def commit() -> str:
    """The commit of the source tree that glu4 is imported from, "-dirty" when it was changed; empty without git."""
    return _output_of("git", "-C", str(Path(glu4.__file__).parent), "describe", "--always", "--dirty", "--exclude=*")


def environment() -> dict[str, Any]:
    """Device, driver, largest clocks and the versions of what was measured."""
    packages = ("triton", "quack-kernels", "humming-kernels", "nvidia-cutlass-dsl")
    return {
        "device": torch.cuda.get_device_name(),
        **_smi("driver_version", "clocks.max.sm", "clocks.max.mem"),
        "glu4": glu4.__version__,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: found for name in packages if (found := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def slug(name: str) -> str:
    """A device's name in file names: "h100" for NVIDIA H100 80GB HBM3, else its words joined by hyphens."""
    words = name.lower().removeprefix("nvidia ").split()
    known = {d.name for d in DEVICES}
    return next((word for word in words if word in known), "-".join(words))


def device_of(name: str, roofs: dict[str, float] | None) -> Device | None:
    """The rates that limits are computed with: the project's for a device it has measured, else this run's own; or None."""
    for known in DEVICES:
        if known.name == slug(name):
            return known
    if roofs is None:
        return None
    return Device(slug(name), roofs["bandwidth"], roofs["flops"], "float16", "Measured in this run.")


def measured_roofs(recorder: Recorder, device: torch.device | str = "cuda") -> dict[str, float]:
    """Rates of this device now, medians of 10: bandwidth, bytes per second of a 4 GiB copy, read and written; flops of a bf16
    product of 8192^3 normal values. Both are what torch reaches, not limits of the hardware."""

    def seconds(work: Call) -> float:
        return median([recorder.elapsed(work) for _ in range(3 + _ROUNDS)][3:]) * 1e-3

    def copied() -> float:
        source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        return seconds(lambda: target.copy_(source))

    def multiplied() -> float:
        a, b = (torch.randn(_SIDE, _SIDE, device=device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        return seconds(lambda: torch.mm(a, b, out=out))

    return {"bandwidth": 2 * _COPIED_BYTES / copied(), "flops": 2 * _SIDE**3 / multiplied()}
