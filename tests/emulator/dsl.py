"""A Python process in which CuTe DSL compiles for Hopper: its target is read when it is imported, and nothing else of ours is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest


def compile_for_hopper(arguments: list[str], home: str, timeout: float) -> None:
    """Run Python with `arguments`; skips the test where CuTe DSL is not installed."""
    if importlib.util.find_spec("cutlass") is None:
        pytest.skip("needs CuTe DSL to compile the Hopper kernels")
    environment = {"CUTE_DSL_ARCH": "sm_90a", "CUTE_DSL_DISABLE_FILE_CACHING": "1", "PATH": "/usr/bin:/bin", "HOME": home}
    subprocess.run([sys.executable, *arguments], check=True, env=environment, timeout=timeout)
