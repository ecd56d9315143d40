"""What an entry must leave as it found it: settings of the process, of torch, and the functions that judge and time it."""

from __future__ import annotations

import builtins
import os
import signal
import sys
import time
from types import FunctionType
from typing import Any

import torch

__all__ = ["changed", "snapshot"]

_JUDGES = ("glu4.verify", "glu4.bench", "glu4.tank", "glu4.reference", "glu4.nvfp4", "glu4.problem")
_TORCH = ("matmul", "mm", "bmm", "allclose", "equal", "isnan", "randn", "empty", "full", "tensor", "quantile")


def snapshot() -> dict[str, Any]:
    """By name: everything that is compared. Cheap to take, and nothing of it is a copy of large data."""
    found: dict[str, Any] = {
        "the working directory": os.getcwd(),
        "the environment": tuple(sorted(os.environ.items())),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "TF32 in cuDNN": torch.backends.cudnn.allow_tf32,
        "signal handlers": tuple(signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)),
        "the recursion limit": sys.getrecursionlimit(),
    }
    for name in ("perf_counter", "monotonic", "time", "sleep"):
        found[f"time.{name}"] = getattr(time, name)
    for name in ("print", "open", "isinstance", "len", "__import__"):
        found[f"builtins.{name}"] = getattr(builtins, name)
    for name in _TORCH:
        found[f"torch.{name}"] = getattr(torch, name, None)
    if torch.cuda.is_available():
        found["the current CUDA device"] = torch.cuda.current_device()
        found["the current CUDA stream"] = torch.cuda.current_stream().cuda_stream
    for name, module in list(sys.modules.items()):
        if name.startswith(_JUDGES):
            for key, value in list(vars(module).items()):
                if isinstance(value, FunctionType):
                    found[f"{name}.{key}"] = (value, value.__code__, value.__defaults__)
                elif isinstance(value, type) and value.__module__ == name:
                    for method, body in list(vars(value).items()):
                        if isinstance(body, FunctionType):
                            found[f"{name}.{key}.{method}"] = (body, body.__code__)
    return found


def changed(before: dict[str, Any]) -> list[str]:
    """Names of what is not as it was."""
    now = snapshot()
    return [name for name, value in before.items() if name in now and now[name] != value] + [
        name for name in before if name not in now
    ]
