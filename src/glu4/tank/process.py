"""An entry's process as the judge sees it: a time limit, a memory limit, captured output, and one line a step."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import glu4
from glu4.tank.worker import Stopped

__all__ = ["Process", "started"]

_POLL_SECONDS = 0.2


class Process:
    """A running worker. `answer` raises Stopped when the entry is out: crashed, hung, out of memory, or by its own word."""

    def __init__(self, request: dict[str, Any], folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self._limit = float(request["time_limit"])
        self._deadline = time.monotonic() + self._limit
        self._memory = int(request["memory_gib"] * 2**30)
        (folder / "request.json").write_text(json.dumps(request | {"parent": os.getpid()}))
        paths = [str(Path(glu4.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "glu4.tank.worker", str(folder / "request.json"), str(folder), str(self.log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("wb"),
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # so that what it starts goes with it
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def go(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line."""
        while True:
            try:
                line = self._lines.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                if time.monotonic() > self._deadline:
                    raise Stopped("hung", f"it ran longer than {self._limit:g} s and was stopped") from None
                if self._resident() > self._memory:
                    limit = f"{self._memory / 2**30:g} GiB"
                    raise Stopped("out of memory", f"it took more than {limit} of memory and was stopped") from None
        if line is None:
            raise Stopped("crashed", self._death())
        try:
            document: dict[str, Any] = json.loads(line)
        except ValueError:
            raise Stopped("crashed", "it broke the channel to the judge with output of its own") from None
        if "outcome" in document:
            raise Stopped(document["outcome"], document["sentence"])
        return document

    def _resident(self) -> int:
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.returncode
        if code is not None and code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        errors = (self.folder / "stderr").read_text(errors="replace").strip().splitlines()
        return f"its process ended by itself (exit code {code}){': ' + errors[-1] if errors else ''}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


@contextmanager
def started(request: dict[str, Any]) -> Iterator[Process]:
    """A worker for one request, which is gone at the end, as are its files."""
    with tempfile.TemporaryDirectory(prefix="glu4-tank-") as scratch, _terminable():
        process = Process(request, Path(scratch))
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the judge as Ctrl-C does, so that no worker outlives it."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
