"""Run a submission without a GPU: its own host code makes launches, which are recorded and emulated, a few tiles of each.

`run` starts a process (`python -m glu4.verify.emulated`) in which libcuda is `glu4.verify.recorder`'s and the data lies on the
CPU. Every element that an emulated CTA or cluster writes is checked against the specification, with hazards watched.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glu4.emulator.capture import CapturedLaunch, describe
from glu4.emulator.launch import emulate, load
from glu4.verify import contest
from glu4.verify.case import Case
from glu4.verify.contest import DualData, DualShape, GroupData, GroupShape
from glu4.verify.recorder import Recorder
from glu4.verify.submission import SubmissionError
from glu4.verify.tiles import UNWRITTEN, Tile, check_written, sample, spread
from glu4.verify.worker import _load, _named_inputs, _outputs_before, _raw

__all__ = ["Emulated", "run", "shapes"]

Shape = DualShape | GroupShape
_ARCH = "sm_100a"
_QUICK = 1 << 19  # outputs of the largest shape that a quick run keeps


@dataclass(frozen=True)
class Emulated:
    """What one shape's launch showed. findings is empty when all is right; launch: the grid; tiles: what was checked."""

    shape: str
    findings: tuple[str, ...]
    grid: tuple[int, int, int]
    cluster: tuple[int, int, int]
    tiles: tuple[str, ...]
    instructions: int
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.findings


def shapes(quick: bool = False, problem: str = "dual_gemm") -> list[Shape]:
    """The public test shapes of a problem, the fewest products first; quick: without large outputs."""
    tests: tuple[Shape, ...] = contest.DUAL_TESTS if problem == "dual_gemm" else contest.GROUP_TESTS
    return [s for s in sorted(dict.fromkeys(tests), key=_products) if not quick or _outputs(s) <= _QUICK]


def run(
    path: str | Path,
    chosen: Sequence[Shape],
    *,
    seed: int = 0,
    tiles: int = 2,
    schedule: str = "random",
    log: str | Path | None = None,
    on_outcome: Callable[[Emulated], None] = lambda _: None,
) -> list[Emulated]:
    """Emulate a submission's launches at `chosen` shapes, of one problem, up to `tiles` CTAs or clusters of each.

    Raises SubmissionError when the file cannot be run to the end.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise SubmissionError(f"{path}: no such file; give the path of a Python file with custom_kernel(data)")
    request = {"shapes": [asdict(s) for s in chosen], "seed": seed, "tiles": tiles, "schedule": schedule}
    package = str(Path(__file__).parents[2])
    environment = {**os.environ, "CUTE_DSL_ARCH": _ARCH, "CUTE_DSL_DISABLE_FILE_CACHING": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    outcomes: list[Emulated] = []
    with tempfile.TemporaryDirectory(prefix="glu4-emulate-") as scratch:
        sink = Path(log).resolve() if log is not None else Path(scratch) / "log"
        command = [sys.executable, "-P", "-m", "glu4.verify.emulated", str(file), json.dumps(request)]
        with (
            sink.open("w") as errors,
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                answer = json.loads(line)
                if "error" in answer:
                    raise SubmissionError(f"{file.name}: {answer['error']}")
                made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in answer.items()}
                outcomes.append(Emulated(**made))
                on_outcome(outcomes[-1])
        if process.returncode or len(outcomes) < len(chosen):
            lines = [line for line in sink.read_text(errors="replace").splitlines() if line.strip()]
            raise SubmissionError(
                f"{file.name} ended its process (exit code {process.returncode}): {(lines or ['no message'])[-1]}"
            )
    return outcomes


# ---- in the submission's process ----


def _prepare(recorder: Recorder) -> None:
    """Put the recorder in the place of libcuda, and the CPU in the place of the current device."""
    from cutlass import cute

    real = ctypes.CDLL
    ctypes.CDLL = lambda name, *a, **k: recorder if name == "libcuda.so.1" else real(name, *a, **k)  # type: ignore[misc,assignment]
    cute.compile = recorder.compile(cute.compile)
    torch._C._cuda_getDevice = lambda: -1
    torch._C._cuda_getCurrentRawStream = lambda device: 0


def _arrays(launch: CapturedLaunch, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The memory of every tensor that may be behind a pointer: those given, and all others that are alive."""
    found = dict(given)
    known = {t.untyped_storage().data_ptr() for t in given.values()}
    words = {p[i : i + 8] for p in launch.params for i in range(0, len(p) - 7, 8)}
    for t in gc.get_objects():
        if type(t) is not Tensor or t.device.type != "cpu" or t.data_ptr() in known:
            continue
        if t.data_ptr().to_bytes(8, "little") in words:
            found[f"tensor {len(found)}"] = t
            known.add(t.data_ptr())
    return found


def _bytes_of(t: Tensor) -> np.ndarray[Any, Any]:
    storage = t.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _unwritten(c: Tensor) -> Tensor:
    return torch.full(c.shape, UNWRITTEN, dtype=torch.int16).view(torch.float16)


def _full_range(shape: Shape, seed: int) -> tuple[Any, list[tuple[str, Case]]]:
    """(what `custom_kernel` receives, c unwritten; a name and the case of each c)."""
    if isinstance(shape, DualShape):
        dual = contest.full_range_dual(shape, seed)
        case = Case(f"{shape}", seed, _plain(dual.a), _plain(dual.b1), _plain(dual.b2))
        return DualData(dual.a, dual.b1, dual.b2, _unwritten(dual.c)).as_tuple(), [("", case)]
    data = contest.full_range_group(shape, seed)
    groups = tuple((a, b, _unwritten(c)) for a, b, c in data.groups)
    cases = [(f"group {i}, ", Case(f"{shape}, group {i}", seed, a[0], b[0], None)) for i, (a, b, _) in enumerate(groups)]
    return GroupData(groups, data.padding).as_tuple(), cases


def _is_own(result: Any, outputs: list[Tensor], listed: bool) -> bool:
    """Whether a call returned data's c, or the list of them."""
    if listed and not isinstance(result, (list, tuple)):
        return False
    given = list(result) if listed else [result]
    return len(given) == len(outputs) and all(
        isinstance(r, Tensor) and r.shape == c.shape and r.data_ptr() == c.data_ptr() for r, c in zip(given, outputs)
    )


def _emulate_shape(
    kernel: Callable[[Any], Any], recorder: Recorder, shape: Shape, seed: int, tiles: int, schedule: str
) -> Emulated:
    start = time.perf_counter()
    arguments, cases = _full_range(shape, seed)
    inputs, outputs, listed = _named_inputs(arguments), _outputs_before(arguments), isinstance(shape, GroupShape)
    before = {name: _raw(t) for name, t in inputs.items()}
    recorder.launches.clear()
    # a copy of the lists, so that a submission which edits them does not change what is compared
    result = kernel(tuple(list(part) for part in arguments) if listed else arguments)
    findings = [f"the call changed its input {n}" for n, t in inputs.items() if not torch.equal(_raw(t), before[n])]
    if not _is_own(result, outputs, listed):
        findings.append("emulation needs custom_kernel to return data's own c")
    if len(recorder.launches) != 1:
        findings.append(f"emulation knows calls of one launch; this one made {len(recorder.launches)}")
    grid, cluster, checked, instructions = (0, 0, 0), (1, 1, 1), [], 0
    if not findings:
        ptx, launch = recorder.launches[0]
        grid, cluster = launch.grid, launch.cluster or (1, 1, 1)
        memory = _arrays(launch, {**inputs, **{f"c{i}": c for i, c in enumerate(outputs)}})
        buffers = {n: (t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for n, t in memory.items()}
        description, program = describe(launch, buffers), load(ptx)
        for i, cta in enumerate((spread if listed else sample)(grid, cluster, tiles)):
            arrays = {n: _bytes_of(t) for n, t in memory.items()}
            one = {**description, "ctas": [list(cta)]}
            ran = emulate(program, one, arrays, schedule_name=schedule, seed=seed + i)
            instructions += ran.report.instructions
            findings += [str(h) for h in ran.report.hazards]
            for name, tile in _written(cases, outputs, ran.buffers):
                checked.append(name)
                findings += [f"{name}: {tile.finding}"] * bool(tile.finding)
    seconds = time.perf_counter() - start
    return Emulated(str(shape), tuple(findings), grid, cluster, tuple(checked), instructions, seconds)


def _written(cases: list[tuple[str, Case]], outputs: list[Tensor], buffers: dict[str, Any]) -> list[tuple[str, Tile]]:
    """(name, tile) of what a launch wrote, of all c together at least one."""
    found = []
    for i, ((name, case), c) in enumerate(zip(cases, outputs, strict=True)):
        written = torch.from_numpy(buffers[f"c{i}"].view(np.int16)).view(torch.float16)
        m, n, batch = c.shape
        found += [(name + tile.name, tile) for tile in check_written(case, written.view(batch, m, n))]
    some = [(name, tile) for name, tile in found if tile.rows[1]]
    return some or [("all of c", found[0][1])]


def _products(shape: Shape) -> int:
    """Multiply-adds of one matrix product, over all groups."""
    sizes = ((shape.batch * shape.m, shape.n, shape.k),) if isinstance(shape, DualShape) else shape.sizes
    return sum(m * n * k for m, n, k in sizes)


def _outputs(shape: Shape) -> int:
    sizes = ((shape.batch * shape.m, shape.n, shape.k),) if isinstance(shape, DualShape) else shape.sizes
    return sum(m * n for m, n, _ in sizes)


def _shape(request: dict[str, Any]) -> Shape:
    """What `asdict` made of a shape, and JSON of that."""
    return GroupShape(tuple((m, n, k) for m, n, k in request["sizes"])) if "sizes" in request else DualShape(**request)


def _plain(matrix: Any) -> Any:
    return matrix[0] if matrix.shape[0] == 1 else matrix


def main() -> None:
    """Answer with a line of JSON for each shape."""
    path, request = Path(sys.argv[1]), json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what the submission prints goes to the log
    recorder = Recorder()
    try:
        _prepare(recorder)
        kernel = _load(path)
        for shape in request["shapes"]:
            found = _emulate_shape(kernel, recorder, _shape(shape), request["seed"], request["tiles"], request["schedule"])
            answers.write(json.dumps(asdict(found)) + "\n")
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}) + "\n")


if __name__ == "__main__":
    main()
