"""Checks a GPU MODE style submission, a FILE.py with `custom_kernel(data)`, against the specification.

The file runs in its own process (`glu4.verify.worker`) with a time limit on every call, so that a crash, a hang or noise on
stdout stays there. This process makes the data, keeps it, and checks every element of what comes back with
`glu4.verify.checker`. Besides right numbers a submission must leave its inputs and its earlier results alone, and must not
answer new contents of a buffer with the result of old ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

import glu4
from glu4.nvfp4 import NVFP4Tensor
from glu4.verify import contest
from glu4.verify.case import Case
from glu4.verify.checker import check
from glu4.verify.contest import DualData, DualShape, GroupData, GroupShape
from glu4.verify.worker import save_data

__all__ = ["PROBLEMS", "Outcome", "SubmissionError", "SubmissionReport", "Trial", "detect_problem", "run", "trials"]

PROBLEMS = ("dual_gemm", "group_gemm")
_MAKERS: dict[tuple[str, str], Callable[..., DualData | GroupData]] = {
    ("dual_gemm", "public"): contest.public_dual,
    ("dual_gemm", "full range"): contest.full_range_dual,
    ("dual_gemm", "exact"): contest.exact_dual,
    ("group_gemm", "public"): contest.public_group,
    ("group_gemm", "full range"): contest.full_range_group,
    ("group_gemm", "exact"): contest.exact_group,
}
# outputs of the largest shape that --quick keeps, and of the largest that gets exact data: checking costs microseconds each
_QUICK = 1 << 19
_EXACT = 1 << 20
_START = 120.0  # seconds for Python and torch to start


class SubmissionError(RuntimeError):
    """The submission could not be run to the end, so nothing is known of its results; the message says why and what to do."""


@dataclass(frozen=True)
class Trial:
    """One call of `custom_kernel`: data of a kind ("public", "full range", "exact") and seed at a shape.

    reuse  the new contents go into the buffers of the call before, at the same addresses
    """

    problem: str
    shape: DualShape | GroupShape
    data: Literal["public", "full range", "exact"]
    seed: int
    reuse: bool = False

    @property
    def name(self) -> str:
        again = ", buffers of the call before" if self.reuse else ""
        return f"{self.shape}, {self.data} data, seed {self.seed}{again}"

    def make(self, device: str) -> DualData | GroupData:
        return _MAKERS[self.problem, self.data](self.shape, self.seed, device)


@dataclass(frozen=True)
class Outcome:
    """What one trial showed: `findings` is empty when all is right. `seconds` is the time of the call, None when unknown.

    outside  elements that the public problem's own tolerance would reject; a right result may have some, because that
             tolerance is about one unit in the last place of float16
    """

    trial: Trial
    findings: tuple[str, ...]
    seconds: float | None = None
    outside: int = 0

    @property
    def ok(self) -> bool:
        return not self.findings


@dataclass(frozen=True)
class SubmissionReport:
    """All outcomes of one file."""

    path: Path
    problem: str
    device: str
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when every trial is right; a report without trials is not."""
        return bool(self.outcomes) and all(outcome.ok for outcome in self.outcomes)


# ---- what is run ----


def detect_problem(path: Path) -> str:
    """The problem that a `#!POPCORN leaderboard NAME` line of the file names, else "dual_gemm".

    Raises SubmissionError for a file that cannot be read and for a leaderboard that is neither of the two problems.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SubmissionError(f"{path}: cannot be read ({reason}); give the path of a Python file") from None
    named = re.search(r"^#!POPCORN\s+leaderboards?\s+(\S+)", text, re.MULTILINE)
    if named is None:
        return "dual_gemm"
    for problem in PROBLEMS:
        if named[1].endswith(f"nvfp4_{problem}"):
            return problem
    raise SubmissionError(
        f"{path.name} is for the leaderboard {named[1]!r}; glu4 checks nvfp4_dual_gemm and nvfp4_group_gemm "
        "(--problem overrides what the file says)"
    )


def trials(problem: str, seed: int, quick: bool = False) -> list[Trial]:
    """The calls to make, smallest shapes first: public data at every listed test shape (once where the problem lists it
    twice), full-range data there as well, exact data at the smaller ones; and after the first shape's full-range call
    another one in the same buffers. `quick` leaves the large shapes out. Raises ValueError for an unknown problem."""
    if problem not in PROBLEMS:
        raise ValueError(f"problem: expected one of {', '.join(PROBLEMS)}, got {problem!r}")
    listed: tuple[DualShape | GroupShape, ...] = contest.DUAL_TESTS if problem == "dual_gemm" else contest.GROUP_TESTS
    planned: list[Trial] = []
    for i, shape in enumerate(sorted(dict.fromkeys(listed), key=_products)):
        if quick and _outputs(shape) > _QUICK:
            continue
        planned.append(Trial(problem, shape, "public", contest.SEED))
        planned.append(Trial(problem, shape, "full range", seed + 10 * i))
        if i == 0:
            planned.append(Trial(problem, shape, "full range", seed + 1, reuse=True))
        if _outputs(shape) <= _EXACT:
            planned.append(Trial(problem, shape, "exact", seed + 10 * i + 2))
    return planned


def _products(shape: DualShape | GroupShape) -> int:
    """Multiply-adds of one matrix product, over all groups."""
    sizes = [(shape.batch * shape.m, shape.n, shape.k)] if isinstance(shape, DualShape) else shape.sizes
    return sum(m * n * k for m, n, k in sizes)


def _outputs(shape: DualShape | GroupShape) -> int:
    sizes = [(shape.batch * shape.m, shape.n, shape.k)] if isinstance(shape, DualShape) else shape.sizes
    return sum(m * n for m, n, _ in sizes)


def run(
    path: str | Path,
    problem: str | None = None,
    *,
    seed: int = 0,
    quick: bool = False,
    timeout: float = 120.0,
    device: str | None = None,
    log: str | Path | None = None,
    on_outcome: Callable[[Outcome], None] = lambda _: None,
    only: Sequence[Trial] | None = None,
) -> SubmissionReport:
    """Run a submission on every trial and check what it returns.

    problem  "dual_gemm" or "group_gemm"; None asks the file (`detect_problem`)
    seed     of the full-range and exact data; the public data has the seed of the problem
    timeout  seconds that the import, and each call, may take
    device   "cuda" or "cpu"; None means CUDA where there is a device
    log      file that receives what the submission prints, and its tracebacks
    only     these trials instead of all

    Raises SubmissionError when the file cannot be run to the end: unreadable, no `custom_kernel`, an exception, a call beyond
    the time limit, a process that died.
    """
    file = Path(path).resolve()
    chosen = detect_problem(file) if problem is None else problem
    if not file.is_file():
        raise SubmissionError(f"{path}: no such file; give the path of a Python file with custom_kernel(data)")
    if not timeout > 0:  # NaN too
        raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    planned = trials(chosen, seed, quick) if only is None else list(only)
    report = SubmissionReport(file, chosen, where)
    with tempfile.TemporaryDirectory(prefix="glu4-verify-") as scratch:
        place = Path(scratch)
        sink = Path(log).resolve() if log is not None else place / "log"
        sink.write_bytes(b"")  # the worker appends
        try:
            with _Worker(file, where, sink, timeout) as worker:
                for trial in planned:
                    diagnose = all(outcome.ok for outcome in report.outcomes)
                    outcome = _attempt(worker, trial, place, diagnose)
                    if not outcome.ok and report.outcomes and diagnose:
                        outcome = _alone(outcome, worker, place)
                    report.outcomes.append(outcome)
                    on_outcome(outcome)
        except SubmissionError as error:
            known = next((o for o in report.outcomes if not o.ok), None)
            if known is None:
                raise
            raise SubmissionError(f"{error}; before that it was wrong on {known.trial.name}: {known.findings[0]}") from None
    return report


# ---- one trial ----


def _attempt(worker: _Worker, trial: Trial, place: Path, diagnose: bool) -> Outcome:
    data = trial.make(worker.device)
    request = {"input": str(place / "input"), "output": str(place / "output"), "reuse": trial.reuse}
    save_data(data, place / "input")
    (place / "output").unlink(missing_ok=True)
    answer = worker.ask(request, f"on {trial.name}")
    if "wrong" in answer:
        return Outcome(trial, (answer["wrong"],))
    results = load_file(place / "output", device=worker.device)
    findings = (
        [f"the call changed its input {', '.join(answer['changed'])}; it may write to c only"] if answer["changed"] else []
    )
    if answer["overwrote"]:
        findings.append("the call overwrote the tensor that the call before had returned: calls share one output buffer")
    outside = 0
    for i, (label, case, initial) in enumerate(_cases(trial, data)):
        output = results[str(i)].reshape(case.out_shape)
        if trial.data == "public":
            outside += contest.public_mismatches(output, _public_reference(case))
        if _same_bits(output, initial):
            findings.append(f"{label}c came back as it was passed: the submission did not write to it")
            continue
        verdict = check(case, output, initial=initial, diagnose=diagnose)
        if not verdict.ok:
            findings.append(label + verdict.summary().removeprefix("wrong: "))
    return Outcome(trial, tuple(findings), answer["seconds"], outside)


def _cases(trial: Trial, data: DualData | GroupData) -> Iterator[tuple[str, Case, Tensor]]:
    """(prefix of its findings, case, c before the call) of each product in the data; matrices lose a batch of one."""

    def plain(matrix: NVFP4Tensor) -> NVFP4Tensor:
        return matrix[0] if matrix.shape[0] == 1 else matrix

    common: dict[str, Any] = {"seed": trial.seed, "kind": "contest", "exact": trial.data == "exact"}
    if isinstance(data, DualData):
        c = data.c[0] if data.c.shape[0] == 1 else data.c
        yield "", Case(name=trial.name, x=plain(data.a), gate=plain(data.b1), up=plain(data.b2), **common), c
        return
    for i, (a, b, c) in enumerate(data.groups):
        label = f"group {i} (m {a.rows}, n {b.rows}, k {a.k}): "
        yield label, Case(name=f"{trial.name}, group {i}", x=a[0], gate=b[0], up=None, **common), c[0]


def _public_reference(case: Case) -> Tensor:
    """What the public problems compare with: products summed in float32, rounded to float16 at the end."""
    assert isinstance(case.x, NVFP4Tensor)
    x = case.x.decode()
    gate = x @ case.gate.decode().mT
    return (gate if case.up is None else case.activation(gate, x @ case.up.decode().mT)).to(torch.float16)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return x.numel() > 0 and torch.equal(x.contiguous().view(torch.int16), y.contiguous().view(torch.int16))


def _alone(outcome: Outcome, used: _Worker, place: Path) -> Outcome:
    """The outcome, with a finding more when the same trial is right in a process that made no call before it."""
    trial = outcome.trial
    fresh = Trial(trial.problem, trial.shape, trial.data, trial.seed)
    try:
        with _Worker(used.file, used.device, used.log, used.timeout) as worker:
            right = _attempt(worker, fresh, place, diagnose=False).ok
    except SubmissionError:
        return outcome
    if not right:
        return outcome
    where = "the same buffers held other data in the call before" if trial.reuse else "other calls came before it"
    sentence = f"right in a new process, wrong where {where}: something is cached by address or by shape across calls"
    return Outcome(trial, (sentence, *outcome.findings), outcome.seconds, outcome.outside)


# ---- the process ----


class _Worker:
    """A running submission; `ask` sends one request and waits for its answer, no longer than the time limit."""

    def __init__(self, file: Path, device: str, log: Path, timeout: float) -> None:
        self.file = file
        self.device = device
        self.log = log
        self.timeout = timeout
        package = str(Path(glu4.__file__).parent.parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "glu4.verify.worker", str(file), device, str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # so that a compiler it started goes with it
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> _Worker:
        try:
            self._answer("before it was imported", max(self.timeout, _START))
            self.ask({}, "while it was imported")
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._kill()

    def _read(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed under it by _kill
            for line in stdout:
                self._lines.put(line)
        self._lines.put(None)

    def ask(self, request: dict[str, Any], when: str) -> dict[str, Any]:
        """The answer to one request; raises SubmissionError, naming `when`, for an exception, a hang or a death."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead process is reported below
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        return self._answer(when, self.timeout)

    def _answer(self, when: str, limit: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            raise SubmissionError(
                f"{self.file.name} ran longer than {limit:g} s {when} and was stopped; --timeout allows more"
            ) from None
        if line is None:
            raise SubmissionError(f"{self.file.name} {self._death()} {when}; --log FILE keeps what it printed")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise SubmissionError(
                f"{self.file.name} broke the channel to glu4 {when}: it may not write to other files' descriptors"
            ) from None
        if "error" in answer:
            raise SubmissionError(_explain(answer, self.file, self.device, when))
        return answer

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.returncode
        if code is None or code >= 0:
            return f"ended its process (exit code {code})"
        hint = " (out of memory, perhaps)" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


def _explain(answer: dict[str, Any], file: Path, device: str, when: str) -> str:
    """One line for an exception in the submission, with what to do."""
    at = f" at line {answer['line']}" if answer["line"] else ""
    message = " ".join(answer["message"].split())[:400]
    what = f"{file.name} raised {answer['error']}{at} {when}: {message}"
    if device == "cpu" and re.search(r"cuda|nvidia|triton|cutlass|no gpu", message + (answer["missing"] or ""), re.IGNORECASE):
        return f"{what}; it needs a CUDA device and this machine has none: run it where its GPU is"
    if answer["missing"]:
        return f"{what}; install {answer['missing'].partition('.')[0]} beside glu4, in {sys.prefix}"
    return f"{what}; --log FILE keeps the traceback"
