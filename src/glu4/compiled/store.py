"""Compiled kernels on disk: one file each, checked when read, written atomically, found by what it was made from.

A file is the line "glu4 kernel 1", a JSON line that describes it with the SHA-256 of what follows, and the cubin. Its name
holds the key of its sources, so that another version of glu4 never finds it.

Where: `glu4/kernels/` of the package (a wheel that carries kernels), then the cache: $GLU4_CACHE_DIR, else
$XDG_CACHE_HOME/glu4, else ~/.cache/glu4. GLU4_CACHE_DIR=off turns the cache off.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from glu4.errors import UnsupportedError

__all__ = ["DSL_VERSION", "Spec", "cache_directory", "compile_missing", "find", "packaged_directory", "read", "write"]

DSL_VERSION = "4.8.1"  # the nvidia-cutlass-dsl release whose output is tested; its API moves between releases
_MAGIC = b"glu4 kernel 1\n"


class Spec(Protocol):
    """What a backend says of one of its kernels.

    name     identifies it to people
    key      a hash of the sources, configuration, architecture and tool version it is made from
    arch     the target, as CuTe DSL takes it
    builder  the module that compiles it: `python -m builder SPECS_JSON DIRECTORY`, a line on stdout for each one done
    """

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def builder(self) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


def packaged_directory() -> Path:
    """Where a wheel carries kernels."""
    return Path(__file__).parent.parent / "kernels"


def cache_directory() -> Path | None:
    """Where kernels are cached; None when the cache is turned off."""
    chosen = os.environ.get("GLU4_CACHE_DIR")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "glu4"


def _file(directory: Path, spec: Spec) -> Path:
    return directory / f"{spec.name}-{spec.key}.kernel"


def write(directory: Path, spec: Spec, cubin: bytes, description: dict[str, Any]) -> Path:
    """Write one kernel; another process sees the whole file or none. Raises OSError where that is not possible."""
    directory.mkdir(parents=True, exist_ok=True)
    described = {**description, "key": spec.key, "sha256": hashlib.sha256(cubin).hexdigest()}
    descriptor, temporary = tempfile.mkstemp(dir=directory, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(_MAGIC + json.dumps(described).encode() + b"\n" + cubin)
        os.chmod(temporary, 0o644)  # a shared cache is read by others
        os.replace(temporary, _file(directory, spec))
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return _file(directory, spec)


def read(path: Path, spec: Spec) -> tuple[bytes, dict[str, Any]] | None:
    """(cubin, description) of a kernel file; None when there is none, or it is damaged or of another kernel."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(_MAGIC):
        return None
    line, separator, cubin = content[len(_MAGIC) :].partition(b"\n")
    try:
        description = json.loads(line)
        right = description["sha256"] == hashlib.sha256(cubin).hexdigest() and description["key"] == spec.key
    except (ValueError, KeyError, TypeError):
        return None
    return (cubin, description) if separator and right else None


def find(spec: Spec) -> tuple[bytes, dict[str, Any]] | None:
    """A packaged or cached kernel; None when it has to be compiled first."""
    directories = [d for d in (packaged_directory(), cache_directory()) if d is not None]
    return next((found for d in directories if (found := read(_file(d, spec), spec)) is not None), None)


def compile_missing(
    specs: Sequence[Spec], directory: Path | None = None, on_done: Callable[[str], None] = lambda name: None
) -> int:
    """Compile the kernels that are neither packaged nor in `directory` (by default the cache); returns how many.

    Raises UnsupportedError when CuTe DSL is missing, compiling fails, or there is nowhere to write.
    """
    target = directory or cache_directory()
    if target is None:
        raise UnsupportedError("GLU4_CACHE_DIR is off, so there is nowhere to put a compiled kernel; set it to a directory")
    missing = [s for s in specs if (read(_file(target, s), s) if directory else find(s)) is None]
    if not missing:
        return 0
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnsupportedError(f"{target}: {error.strerror}; set GLU4_CACHE_DIR to a directory that can be written") from error
    with tempfile.TemporaryDirectory() as scratch:
        listing = Path(scratch) / "specs.json"
        listing.write_text(json.dumps([s.to_dict() for s in missing]))
        command = [sys.executable, "-m", missing[0].builder, str(listing), str(target)]
        environment = {**os.environ, "CUTE_DSL_ARCH": missing[0].arch, "CUTE_DSL_DISABLE_FILE_CACHING": "1"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                on_done(line.strip())
            errors = process.stderr.read()
        if process.returncode:
            raise UnsupportedError(_failure(errors))
    return len(missing)


def _failure(errors: str) -> str:
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
    if "No module named 'cutlass" in errors or "No module named 'cuda" in errors:
        return f"compiling kernels needs CuTe DSL: pip install nvidia-cutlass-dsl=={DSL_VERSION}, then glu4 compile"
    return f"compiling a kernel failed: {last.strip()}"
