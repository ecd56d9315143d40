"""Run every hardware case on the GPU of this machine and record what it gives.

    PYTHONPATH=src python3 tests/emulator/hardware/record.py --output hardware_h100.npz --commit COMMIT

writes the recording and, beside it, the same with every output whole (`..._full.npz`), to look into a difference. Cases run in
a few processes at once; one in which a case fails or hangs is ended, and the next case runs in a fresh one. `--dry-run` does
all of it but the GPU's part, and assembles each kernel where ptxas is found.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from emulator.hardware.case import Case
from emulator.hardware.cases import CASES
from emulator.hardware.fixture import save
from emulator.hardware.gpu import Blank, Gpu

_TESTS = str(Path(__file__).resolve().parents[2])
_LANES = 4
_SECONDS = {"start": 60.0, "load": 20.0, "run": 3.0}  # limits of each step of a worker
_TOTAL_SECONDS = 150.0


def serve(pipe: Any, dry: bool) -> None:
    """In a process of its own: run the cases whose names come through the pipe, and send their outputs or their errors."""
    try:
        device = Blank() if dry else Gpu()
        pipe.send(("ready", {"device": device.name, "driver": device.driver}))
        while name := pipe.recv():
            try:
                pipe.send(("done", device.run(CASES[name], lambda: pipe.send(("loaded", None)))))
            except Exception as error:
                pipe.send(("error", f"{error}"[:2000]))
    except (EOFError, KeyboardInterrupt):
        pass


class Worker:
    """A process that runs cases; after a failure it is replaced, since its context may be broken."""

    def __init__(self, context: Any, dry: bool) -> None:
        self.context = context
        self.dry = dry
        self.process: Any = None
        self.device: dict[str, Any] = {}

    def start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=serve, args=(theirs, self.dry), daemon=True)
        self.process.start()
        theirs.close()
        self.device = self.answer("start", "ready")

    def answer(self, step: str, *expected: str) -> Any:
        """The next message; raises RuntimeError for an error or none in time."""
        if not self.pipe.poll(_SECONDS[step]):
            raise RuntimeError(f"{step}: no answer after {_SECONDS[step]:.0f} s")
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{step}: the process ended") from None
        if kind not in expected:
            raise RuntimeError(str(value))
        return value

    def run(self, name: str) -> dict[str, np.ndarray]:
        """Outputs of a case. Raises RuntimeError saying why there are none."""
        try:
            if self.process is None:
                self.start()
            self.pipe.send(name)
            self.answer("load", "loaded")
            found: dict[str, np.ndarray] = self.answer("run", "done")
        except (RuntimeError, OSError) as error:
            self.end()
            raise RuntimeError(str(error)) from None
        return found

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
        self.process = None


Outputs = dict[str, dict[str, np.ndarray]]


def run_all(names: list[str], dry: bool) -> tuple[Outputs, dict[str, str], dict[str, float], dict[str, Any]]:
    """(outputs, failures, seconds of each family, device) of the cases."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_TESTS, os.environ.get("PYTHONPATH", ""))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["emulator.hardware.cases", "emulator.hardware.gpu"])
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        left.put(name)
    end = time.monotonic() + _TOTAL_SECONDS
    outputs: Outputs = {}
    failures: dict[str, str] = {}
    seconds: dict[str, float] = {}

    def lane() -> dict[str, Any]:
        worker = Worker(context, dry)
        while not left.empty():
            try:
                name = left.get_nowait()
            except queue.Empty:
                break
            start = time.monotonic()
            try:
                if start > end:
                    raise RuntimeError("not run: out of time")
                outputs[name] = worker.run(name)
            except RuntimeError as error:
                failures[name] = str(error)
            family = CASES[name].family
            seconds[family] = seconds.get(family, 0.0) + time.monotonic() - start
        worker.end()
        return worker.device

    with ThreadPoolExecutor(_LANES) as pool:
        devices = list(pool.map(lambda _: lane(), range(_LANES)))
    in_order: Outputs = {n: outputs[n] for n in names if n in outputs}
    return in_order, {n: failures[n] for n in names if n in failures}, seconds, next(filter(None, devices), {})


def assemble(names: list[str]) -> dict[str, str]:
    """What ptxas says of each kernel that it refuses; nothing without ptxas."""
    tool = shutil.which("ptxas")
    found: dict[str, str] = {}
    if tool is None:
        print("no ptxas here: kernels are not assembled")
        return found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        for name in names:
            path.write_text(CASES[name].ptx)
            command = [tool, "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or "warning" in done.stderr:
                found[name] = done.stderr.strip()[:500]
    return found


def unexpected(names: list[str], failures: dict[str, str], dry: bool) -> dict[str, str]:
    """Failures but the illegal instructions of cases that hardware refuses, and those of them that it ran."""
    found = {}
    for name in names:
        refused = CASES[name].compare == "refused" and not dry
        if name in failures and not (refused and "ILLEGAL_INSTRUCTION" in failures[name]):
            found[name] = failures[name]
        elif refused and name not in failures:
            found[name] = "ran, and should have been refused"
    return found


def summary(names: list[str], wrong: dict[str, str], seconds: dict[str, float]) -> None:
    for name, why in wrong.items():
        print(f"FAILED {name}: {why}")
    print(f"{'family':12} {'cases':>6} {'failed':>7} {'seconds':>8}")
    for family, spent in seconds.items():
        members = [n for n in names if CASES[n].family == family]
        print(f"{family:12} {len(members):6} {sum(n in wrong for n in members):7} {spent:8.1f}")
    print(f"{'all':12} {len(names):6} {len(wrong):7} {sum(seconds.values()):8.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if given.output is None and not given.dry_run:
        parser.error("--output is needed")
    chosen: list[Case] = [c for c in CASES.values() if given.only in c.name]
    names = [c.name for c in chosen]
    start = time.monotonic()
    outputs, failures, seconds, device = run_all(names, given.dry_run)
    took = time.monotonic() - start
    wrong = unexpected(names, failures, given.dry_run)
    if given.dry_run:
        wrong |= assemble(names)
    meta = device | {"commit": given.commit, "cases": len(names), "failed": len(wrong)}
    with tempfile.TemporaryDirectory() as folder:
        path = given.output or Path(folder) / "recording.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, meta, CASES, outputs, failures)
        whole = {f"{n.replace('/', '|')}|{b}": a for n, buffers in outputs.items() for b, a in buffers.items()}
        full = path.with_name(path.stem + "_full.npz")
        np.savez_compressed(full, **whole)  # type: ignore[arg-type]
        print(f"{path.name}: {path.stat().st_size} bytes; {full.name}: {full.stat().st_size} bytes")
    summary(names, wrong, seconds)
    print(json.dumps(meta | {"seconds": round(took, 1)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
