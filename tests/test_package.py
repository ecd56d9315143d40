"""What importing glu4 costs and brings in."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()  # importing is the processor's work; wall time would count other processes too
import glu4
seconds = time.process_time() - start
heavy = ("cuda", "cutlass", "triton", "transformers", "matplotlib", "safetensors", "typer", "rich")
print(json.dumps([seconds, [name for name in heavy if name in set(sys.modules) - before], glu4.__version__, sorted(glu4.__all__)]))
"""


def test_import_is_quick_and_light() -> None:
    runs = [json.loads(subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True).stdout) for _ in range(3)]
    assert min(run[0] for run in runs) < 0.3
    _, heavy, version, names = runs[0]
    assert heavy == []
    assert version != "0.0.0"
    assert {"dual_gemm", "grouped_dual_gemm", "linear", "quantize", "explain", "NVFP4Tensor"} <= set(names)
