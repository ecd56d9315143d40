"""Compiled kernels on disk: one file each, checked when read, written atomically, found by what it was made from.

A file is the line "glu4 kernel 2", a line with the SHA-256 of all that follows, a JSON line that describes the kernel, and the
cubin. Its name holds the key of its sources, so that another version of glu4 never finds it.

Where: `glu4/kernels/` of the package (a wheel that carries kernels), then the cache: $GLU4_CACHE_DIR, else
$XDG_CACHE_HOME/glu4, else ~/.cache/glu4. GLU4_CACHE_DIR=off turns the cache off.
"""

from __future__ import annotations

import hashlib
import json
import os
import site
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from glu4.errors import UnsupportedError

__all__ = [
    "DSL_VERSION",
    "HOW_TO_INSTALL",
    "Inventory",
    "Spec",
    "cache_directory",
    "compile_missing",
    "file_of",
    "find",
    "installed_dsl",
    "inventory",
    "packaged_directory",
    "read",
    "unwritable",
    "write",
]

DSL_VERSION = "4.8.1"  # the nvidia-cutlass-dsl release whose output is tested; its API moves between releases
HOW_TO_INSTALL = f"pip install nvidia-cutlass-dsl=={DSL_VERSION}"
_MAGIC = b"glu4 kernel 2\n"
_SUFFIX, _PARTIAL = ".kernel", ".part"
_LEFTOVER_SECONDS = 3600
_LOCK = ".lock"
_LOCK_SECONDS = 900.0  # longer than the whole set takes on one slow core; a holder that dies frees the lock at once
_KERNELS_A_PROCESS = 4  # at least, since each spends a second or more on importing the compiler


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


# ---- where ----


def packaged_directory() -> Path:
    """Where a wheel carries kernels."""
    return Path(__file__).parent.parent / "kernels"


def cache_directory() -> Path | None:
    """Where kernels are cached; None when the cache is turned off, or there is no home directory to put it in.

    A relative $XDG_CACHE_HOME is ignored, as the XDG base directory specification asks.
    """
    chosen = os.environ.get("GLU4_CACHE_DIR")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "glu4"
    try:
        return Path.home() / ".cache" / "glu4"
    except RuntimeError:
        return None


def unwritable(directory: Path) -> str | None:
    """Why nothing can be written to a directory, in a few words; None when it can be, after making it where it is not there."""
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists() or p.is_symlink())
    if not existing.is_dir():
        return f"{existing} is not a directory"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written"


def file_of(directory: Path, spec: Spec) -> Path:
    """A kernel's file in a directory."""
    return directory / f"{spec.name}-{spec.key}{_SUFFIX}"


def _places() -> Iterator[tuple[str, Path]]:
    yield "packaged", packaged_directory()
    cache = cache_directory()
    if cache is not None:
        yield "cached", cache


# ---- one kernel ----


def write(directory: Path, spec: Spec, cubin: bytes, description: dict[str, Any]) -> Path:
    """Write one kernel; another process sees the whole file or none. Raises OSError where that is not possible."""
    directory.mkdir(parents=True, exist_ok=True)
    body = json.dumps({**description, "key": spec.key}).encode() + b"\n" + cubin
    descriptor, temporary = tempfile.mkstemp(dir=directory, suffix=_PARTIAL)
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(_MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        os.chmod(temporary, 0o644)  # a shared cache is read by others
        os.replace(temporary, file_of(directory, spec))
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return file_of(directory, spec)


def read(path: Path, spec: Spec) -> tuple[bytes, dict[str, Any]] | None:
    """(cubin, description) of a kernel file; None when there is none, it is another kernel's, or any byte of it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(_MAGIC):
        return None
    checksum, _, body = content[len(_MAGIC) :].partition(b"\n")
    if checksum != hashlib.sha256(body).hexdigest().encode():
        return None
    line, _, cubin = body.partition(b"\n")
    description = json.loads(line)
    return (cubin, description) if description["key"] == spec.key else None


def find(spec: Spec) -> tuple[bytes, dict[str, Any]] | None:
    """A packaged or cached kernel; None when it has to be compiled first."""
    return next((found for _, d in _places() if (found := read(file_of(d, spec), spec)) is not None), None)


# ---- all of them ----


@dataclass(frozen=True)
class Inventory:
    """What there is of a set of kernels, by name: `packaged` or `cached` (a packaged one counts as packaged only) or `missing`.
    `damaged` are files that are there and refused, `outdated` those of its architectures that no kernel of the set has."""

    packaged: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    outdated: list[Path] = field(default_factory=list)


def inventory(specs: Sequence[Spec]) -> Inventory:
    """Read every kernel of `specs` in the package and the cache."""
    found = Inventory()
    places = list(_places())
    for spec in specs:
        state = "missing"
        for place, directory in places:
            path = file_of(directory, spec)
            if read(path, spec) is None:
                found.damaged.extend([path] if path.exists() else [])
            elif state == "missing":
                state = place
        getattr(found, state).append(spec.name)
    current = {file_of(directory, spec) for _, directory in places for spec in specs}
    families = {spec.name.split("_")[0] for spec in specs}  # the architecture begins a name
    held = {p for _, d in places for family in families for p in d.glob(f"{family}_*{_SUFFIX}")}
    found.outdated.extend(sorted(held - current))
    return found


def _remove_leftovers(directory: Path) -> None:
    """Remove what writers that were killed left behind more than an hour ago."""
    for partial in directory.glob(f"*{_PARTIAL}"):
        try:
            if time.time() - partial.stat().st_mtime > _LEFTOVER_SECONDS:
                partial.unlink()
        except OSError:
            continue  # another process was first, or it is not ours to remove


# ---- compiling ----


def installed_dsl() -> str | None:
    """The installed nvidia-cutlass-dsl release; None without it."""
    try:
        return version("nvidia-cutlass-dsl")
    except PackageNotFoundError:
        return None


def compile_missing(
    specs: Sequence[Spec],
    directory: Path | None = None,
    on_done: Callable[[str], None] = lambda name: None,
    jobs: int | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> int:
    """Compile the kernels that are neither packaged nor in `directory` (by default the cache); returns how many.

    directory  gets every kernel of `specs`: those that are packaged or cached elsewhere are copied
    on_done    called with a kernel's name when it is compiled, from any thread, one at a time
    jobs       processes; by default one a core, where each has a few kernels to compile
    on_wait    called when another process is compiling into the same directory, which is waited for

    Raises UnsupportedError when CuTe DSL is missing or another release than the tested one, compiling fails, or there is
    nowhere to write.
    """
    target = directory or cache_directory()
    if target is None:
        raise UnsupportedError("GLU4_CACHE_DIR is off, so there is nowhere to put a compiled kernel; set it to a directory")
    if not _missing(specs, target, directory is not None):
        return 0
    _make(target)
    with _only_one(target, on_wait):
        _remove_leftovers(target)
        missing = _missing(specs, target, directory is not None)
        if directory is not None:
            missing = [s for s in missing if not _copied(s, target)]
        if missing:
            _check_dsl()
            _compile(missing, target, jobs, on_done)
            left = _missing(missing, target, True)
            if left:
                raise UnsupportedError(f"compiling left {len(left)} of {len(missing)} kernels undone: {left[0].name}")
        return len(missing)


# ---- what is to be compiled ----


def _missing(specs: Sequence[Spec], target: Path, there: bool) -> list[Spec]:
    """Those not in `target` itself (`there`), or neither packaged nor cached."""
    return [s for s in specs if (read(file_of(target, s), s) if there else find(s)) is None]


def _make(target: Path) -> None:
    reason = unwritable(target)
    try:
        if reason is None:
            target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{target}: {error.strerror or error}"
    if reason is not None:
        raise UnsupportedError(
            f"compiled kernels have no place: {reason}; set GLU4_CACHE_DIR to a directory that can be written"
        )


def _copied(spec: Spec, target: Path) -> bool:
    found = find(spec)
    if found is not None:
        write(target, spec, *found)
    return found is not None


def _check_dsl() -> None:
    found = installed_dsl()
    if found is None:
        raise UnsupportedError(f"compiling kernels needs CuTe DSL: {HOW_TO_INSTALL}, then glu4 compile")
    if found != DSL_VERSION:
        tested = f"kernels are tested with nvidia-cutlass-dsl {DSL_VERSION} only, and {found} is installed"
        raise UnsupportedError(f"{tested}: {HOW_TO_INSTALL}, then glu4 compile")


@contextmanager
def _only_one(target: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the directory's lock. Files are replaced atomically, so that it saves work and nothing depends on it: a file system
    without locks, or a wait that is too long, is no error."""
    lock = FileLock(target / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        with suppress(Timeout):
            lock.acquire(timeout=_LOCK_SECONDS)
    except (NotImplementedError, OSError):
        pass
    try:
        yield
    finally:
        lock.release()


# ---- processes ----


def _compile(specs: Sequence[Spec], target: Path, jobs: int | None, on_done: Callable[[str], None]) -> None:
    jobs = max(1, jobs or os.cpu_count() or 1)
    one_at_a_time = threading.Lock()

    def report(name: str) -> None:
        with one_at_a_time:
            on_done(name)

    with ThreadPoolExecutor(jobs) as pool:
        failures = list(pool.map(lambda part: _run_builder(part, target, report), _parts(specs, jobs)))
    errors = next((e for e in failures if e is not None), None)
    if errors is not None:
        raise UnsupportedError(_failure(errors))


def _parts(specs: Sequence[Spec], jobs: int) -> list[list[Spec]]:
    """What a process each compiles: kernels of one builder, as many processes of it as jobs where there are enough."""
    by_builder: dict[str, list[Spec]] = {}
    for spec in specs:
        by_builder.setdefault(spec.builder, []).append(spec)
    parts = []
    for own in by_builder.values():
        count = max(1, min(jobs, len(own) // _KERNELS_A_PROCESS))
        parts += [own[i::count] for i in range(count)]
    return parts


def _run_builder(specs: Sequence[Spec], target: Path, on_done: Callable[[str], None]) -> str | None:
    """Compile `specs`, all of one builder, in a process; what it wrote to stderr when it failed."""
    environment = {**os.environ, "CUTE_DSL_ARCH": specs[0].arch, "CUTE_DSL_DISABLE_FILE_CACHING": "1"}
    root = str(Path(__file__).parents[2])
    if root not in (*site.getsitepackages(), site.getusersitepackages()):  # so that it finds this very glu4
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "stderr").open("w+") as errors:
        listing = Path(scratch) / "specs.json"
        listing.write_text(json.dumps([s.to_dict() for s in specs]))
        command = [sys.executable, "-P", "-m", specs[0].builder, str(listing), str(target)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                on_done(line.strip())
        errors.seek(0)
        return errors.read() if process.returncode else None


def _failure(errors: str) -> str:
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
    if "No module named 'cutlass" in errors or "No module named 'cuda" in errors:
        return f"CuTe DSL is installed in part only ({last.strip()}): {HOW_TO_INSTALL} --force-reinstall, then glu4 compile"
    return f"compiling a kernel failed: {last.strip()}"
