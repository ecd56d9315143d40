"""Record what the static verifier SentryWard says of the good kernels and of every fault.

    python -m venv ../sentryward && ../sentryward/bin/pip install sentryward==0.1.1
    PYTHONPATH=src:tests python tests/emulator/mutations/record_sentryward.py ../sentryward/bin/sentryward

It looks at one cluster of each launch. The collector qualifier of tcgen05.mma that is the default is left out of the text,
since SentryWard 0.1.1 does not take it; everything else is as the emulator gets it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from emulator.mutations.faults import FAULTS
from emulator.mutations.judge import mutant
from emulator.mutations.kernels import Kernel, kernel
from glu4.emulator.ptx import parse

RESULT = Path(__file__).parent.parent / "fixtures" / "sentryward.json"
SECONDS, MEBIBYTES, TOGETHER = 120, 6144, 2


def describe(good: Kernel) -> dict[str, Any]:
    """Its input file: a launch of one cluster. Parameters that are structures cannot be given and are left out."""
    entry = parse(good.text).entry(good.launch.get("entry"))
    cluster = [*good.launch.get("cluster", ()), 1, 1, 1][:3]
    arguments: list[dict[str, Any]] = []
    declarations: list[dict[str, Any]] = []
    maps: list[dict[str, Any]] = []
    for parameter, described in zip(entry.params, good.launch["params"]):
        kind, value = next(iter(described.items()))
        common = {"parameter": parameter.name}
        if kind == "tensor_map":
            fields = {name: field for name, field in value.items() if name != "buffer"}
            maps.append({**common, "object": value["buffer"], "rank": len(value["global_shape"]), **fields})
        elif kind == "ptr":
            declarations.append({**common, "type": "pointer", "space": "global", "object": value})
        elif parameter.count == 1 and not re.search(rf"\.ptr[^,)]*\b{parameter.name}\b", good.text):
            number = int.from_bytes(bytes.fromhex(value), "little") if kind == "bytes" else value
            arguments.append({**common, "type": parameter.type, "value": number})
    return {
        "schema": "spverify.kernel-input/v1",
        "entry": entry.name,
        "launch": {
            "grid_dim": cluster,
            "block_dim": [*good.launch["block"], 1, 1][:3],
            "cluster_dim": cluster,
            "dynamic_shared_bytes": good.launch.get("dynamic_smem", 0),
        },
        "arguments": arguments,
        "declarations": declarations,
        "tma_descriptors": maps,
    }


def verdict(program: str, case: Kernel) -> str:
    """What SentryWard says, with the first diagnostic's code where it does not check the kernel."""
    with tempfile.TemporaryDirectory() as scratch:
        text, given = Path(scratch, "kernel.ptx"), Path(scratch, "input.json")
        text.write_text(case.text.replace(".collector::a::discard", ""))
        given.write_text(json.dumps(describe(case)))
        command = [program, str(text), "--input", str(given), "--timeout", str(SECONDS), "--memory-limit-mib", str(MEBIBYTES)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS)
    answer = json.loads(done.stdout)
    word = str(answer["result"])
    codes = [str(d.get("code")) for d in answer.get("diagnostics") or []]
    return f"{word}: {codes[0]}" if word in ("unsupported", "invalid_input", "tool_failure") and codes else word


def main(program: str) -> None:
    version = subprocess.run([str(Path(program).parent / "python"), "-c", "import importlib.metadata as m; print(m.version('sentryward'))"],
                             capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    names = sorted({fault.kernel for fault in FAULTS})
    cases = {name: kernel(name) for name in names} | {fault.key: mutant(fault) for fault in FAULTS}
    with ThreadPoolExecutor(TOGETHER) as pool:
        found = dict(zip(cases, pool.map(lambda case: verdict(program, case), cases.values())))
    whole = {
        "version": version,
        "kernels": {name: found[name] for name in names},
        "faults": {fault.key: found[fault.key] for fault in FAULTS},
    }
    RESULT.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
