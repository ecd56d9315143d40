"""The process of one entry: it runs the entry's code, hands back an output to be checked, and, when told to, times it.

Started as `python -m glu4.tank.worker REQUEST_JSON FOLDER LOG` by `glu4.tank.process`. Answers leave as lines of JSON on what
was stdout; what the entry itself prints goes to LOG. The process dies with the one that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from glu4.bench.operands import FORMATS, Operands, draw
from glu4.bench.timing import Cuda, Recorder, copies
from glu4.errors import UnsupportedError
from glu4.nvfp4 import NVFP4Tensor, quantize
from glu4.problem import Problem
from glu4.tank import clock, contestants, emulated
from glu4.tank.contestants import Inputs
from glu4.tank.kernels import config_of
from glu4.tank.state import changed, snapshot
from glu4.verify.case import Case
from glu4.verify.cases import full_range_case

__all__ = ["Stopped", "case_of", "check_outputs", "main", "timed"]

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_SUBMISSION_SHAPE = (128, 128, 256)  # multiples of what the contest's problem asks for


class Stopped(Exception):
    """The entry is out: `outcome` of the ledger, and why."""

    def __init__(self, outcome: str, sentence: str) -> None:
        super().__init__(sentence)
        self.outcome = outcome


def case_of(request: dict[str, Any]) -> Case:
    """The full-range case that an entry is checked on first; the judge makes the same one."""
    submitted = request["entry"]["kind"] == "submission"
    m, n, k = _SUBMISSION_SHAPE if submitted else request["emulated"]
    x_format = request["x_format"]
    out = FORMATS[x_format]
    return full_range_case(request["seed"], m, n, k, x_format=x_format, out_dtype=out, unit_global_scale=submitted)


def check_outputs(request: dict[str, Any]) -> tuple[Tensor, str]:
    """(output of the entry on `case_of`, a hazard or nothing)."""
    case, entry = case_of(request), request["entry"]
    if request["where"] == "emulate" and entry["kind"] == "config":
        config = config_of(request["backend"], entry["fields"])
        assert config is not None
        return emulated.run(config, case)
    here = case.to("cuda" if request["where"] == "cuda" else "cpu")
    assert here.up is not None
    m, n = case.out_shape
    problem = Problem(m, n, case.k, x_format=request["x_format"], out_dtype=case.out_dtype)
    inputs = Inputs(here.x, here.gate, here.up, problem)
    before = [t.clone() for t in _memory(inputs)]
    (call,) = contestants.maker(entry, request["backend"])(inputs)
    out = call()
    if not isinstance(out, Tensor):
        raise Stopped("wrong result", f"expected a tensor, got {type(out).__name__}")
    if any(not torch.equal(a, b) for a, b in zip(before, _memory(inputs))):
        raise Stopped("wrong result", "the call changed its inputs; it may write to its output only")
    return out.detach().cpu().contiguous(), ""


def _memory(inputs: Inputs) -> list[Tensor]:
    """The bits of the operands."""
    found = []
    for t in (inputs.x[0], inputs.gate[0], inputs.up[0]):
        parts = (t.codes, t.block_scale) if isinstance(t, NVFP4Tensor) else (t,)
        found += [p.contiguous().view(torch.uint8) for p in parts]
    return found


# ---- timing ----


class _Unit(Operands):
    """Operands whose NVFP4 tokens have the global scale 1 too, which submissions cannot be given."""

    def x(self, x_format: str, count: int) -> list[Tensor | NVFP4Tensor]:
        if x_format != "nvfp4":
            return super().x(x_format, count)
        if x_format not in self._x:
            self._x[x_format] = [quantize(self.normal, 1.0)]
        return self._x[x_format] * count


@dataclass(frozen=True)
class _Both:
    baseline: contestants.Maker
    entry: contestants.Maker


def timed(request: dict[str, Any], recorder: Recorder) -> Iterator[dict[str, Any]]:
    """Pairs of every shape in turn, each checked before and after; raises Stopped."""
    try:
        baseline = contestants.maker(request["baseline"], request["backend"])
    except Exception as error:
        raise Stopped("not run", f"the baseline does not run: {type(error).__name__}: {error}") from error
    both = _Both(baseline, contestants.maker(request["entry"], request["backend"]))
    for m, n, k in request["shapes"]:
        yield {"shape": [m, n, k], "pairs": _shape(request, both, recorder, m, n, k)}


def _shape(request: dict[str, Any], both: _Both, recorder: Recorder, m: int, n: int, k: int) -> list[tuple[float, float, bool]]:
    x_format = request["x_format"]
    device = "cuda" if request["where"] == "cuda" else "cpu"
    drawn = draw(m, n, k, device, request["seed"])
    operands = _Unit(m, n, k, drawn.gate, drawn.up, drawn.normal)
    problem = operands.problem(x_format)
    nbytes = problem.bytes - m * n * problem.out_dtype.itemsize
    inputs = Inputs(operands.x(x_format, 1)[0], drawn.gate, drawn.up, problem, copies(nbytes) if device == "cuda" else 2)
    try:
        first = both.baseline(inputs)
        _right(operands, first[0](), x_format, "the baseline")
    except Stopped as error:
        raise Stopped("not run", str(error)) from error
    second = both.entry(inputs)
    expected = second[0]().clone()
    _right(operands, expected, x_format, "the entry")
    found = clock.pairs(first, second, recorder, request["pairs"], request["seed"])
    for call in (second[0], second[-1]):  # all copies hold the same numbers
        if not torch.equal(call(), expected):
            raise Stopped("wrong result", f"at {m}, {n}, {k} the result differs from call to call")
    return [(p.baseline_us, p.entry_us, p.entry_first) for p in found]


def _right(operands: Operands, out: Tensor, x_format: str, whose: str) -> None:
    found = operands.check(out, x_format, 1, specified=True)
    if found.wrong:
        at = f"{operands.m}, {operands.n}, {operands.k}"
        raise Stopped("wrong result", f"{whose} is wrong at {at}: {found.wrong}")


# ---- the process ----


def _failure(error: BaseException, request: dict[str, Any]) -> tuple[str, str]:
    """(outcome, sentence) of an exception."""
    if isinstance(error, Stopped):
        return error.outcome, str(error)
    text = " ".join(str(error).split())[:600]
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
    if memory or "out of memory" in text.lower():
        return "out of memory", f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, UnsupportedError):
        return "does not compile", text
    path = request["entry"].get("path")
    if isinstance(error, (SyntaxError, ImportError)) or "compil" in type(error).__name__.lower():
        return "does not compile", f"{type(error).__name__}: {text}"
    if request["where"] != "cuda" and any(w in text.lower() for w in ("cuda", "nvidia", "no gpu")):
        return "not run", f"it needs a CUDA device, and this machine has none ({type(error).__name__}: {text})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if path is not None and f.filename == path]
    at = f" at line {frames[-1].lineno}" if frames else ""
    return "crashed", f"{type(error).__name__}{at}: {text}"


def _limit_memory(gib: float) -> None:
    """Of addresses beyond those that are taken now. Not where CUDA is used, which reserves more than there is memory."""
    import resource

    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _die_with_parent(parent: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _steps(request: dict[str, Any], folder: Path, say: Callable[[dict[str, Any]], None], go: Callable[[], bool]) -> None:
    before = snapshot()
    out, hazard = check_outputs(request)
    if found := changed(before):
        raise Stopped("changed global state", f"the entry changed {', '.join(found[:3])}")
    save_file({"out": out}, folder / "out.safetensors")
    say({"checked": True, "hazard": hazard})
    if not go() or request["where"] == "emulate":
        return
    recorder: Recorder = clock.Wall()
    if request["where"] == "cuda":
        recorder = Cuda()
    for shape in timed(request, recorder):
        if found := changed(before):
            raise Stopped("changed global state", f"the entry changed {', '.join(found[:3])}")
        say(shape)
    say({"done": True})


def main() -> None:
    """Answer one request."""
    request_path, folder, log = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    request: dict[str, Any] = json.loads(request_path.read_text())
    _die_with_parent(request["parent"])
    commands = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    null, sink = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in ((null, 0), (sink, 1), (sink, 2)):  # of compilers and C code too
        os.dup2(source, target)
    # imported and started before the limit and the snapshot, because both count what an entry adds
    if request["where"] == "cuda":
        torch.zeros(1, device="cuda")
    else:
        torch.zeros(64, 64) @ torch.zeros(64, 64)
        _limit_memory(request["memory_gib"])

    def say(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")

    try:
        _steps(request, folder, say, lambda: commands.readline().strip() == "go")
    except BaseException as error:  # SystemExit too: an entry must not end the process unheard
        traceback.print_exc()
        outcome, sentence = _failure(error, request)
        say({"outcome": outcome, "sentence": sentence})
    sys.stdout.flush()
    os._exit(0)  # threads and exit handlers that an entry left have no say


if __name__ == "__main__":
    main()
