"""What programs have in common that compute-sanitizer watches."""

from __future__ import annotations

import argparse
import os
import sys

__all__ = ["asks_for_a_fault"]


def asks_for_a_fault(description: str | None) -> bool:
    """Whether the command line has `--planted`; ends the program where torch's pools would hide what is out of bounds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", action="store_true")
    planted = bool(parser.parse_args().planted)
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        sys.exit("set PYTORCH_NO_CUDA_MEMORY_CACHING=1: inside torch's own pools nothing is out of bounds")
    return planted
