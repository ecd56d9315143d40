"""Compiling what is missing: once for all who miss it, in as many processes as asked for, and clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from compiled.slow_builder import CUBIN, SlowSpec
from fake_hopper import description as described
from glu4 import UnsupportedError
from glu4.backends.hopper.spec import GroupedSpec, KernelSpec, Spec, shipped
from glu4.compiled import store
from glu4.compiled.cubin import resources
from glu4.dispatch import every_kernel

SPEC = shipped()[0]
TESTS = str(Path(__file__).parents[1])
RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels-sm_90a.json"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLU4_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TESTS, *(p for p in sys.path if p)]))
    monkeypatch.setattr(store, "packaged_directory", lambda: tmp_path / "package")
    monkeypatch.setattr(store, "installed_dsl", lambda: store.DSL_VERSION)
    return tmp_path / "cache"


def slow(tmp_path: Path, count: int, seconds: float = 0.0) -> list[SlowSpec]:
    return [SlowSpec(f"kernel{i}", str(tmp_path / "log"), seconds) for i in range(count)]


def begun(tmp_path: Path) -> list[str]:
    return sorted(line.split()[0] for line in (tmp_path / "log").read_text().splitlines())


def test_what_is_missing_is_compiled_once_and_reported(tmp_path: Path, own_cache: Path) -> None:
    specs = slow(tmp_path, 9)
    store.write(own_cache, specs[4], CUBIN, {})
    done: list[str] = []
    assert store.compile_missing(specs, on_done=done.append, jobs=2) == 8
    names = sorted(s.name for i, s in enumerate(specs) if i != 4)
    assert sorted(done) == begun(tmp_path) == names
    assert all((store.find(s) or (b"",))[0] == CUBIN for s in specs)
    assert store.compile_missing(specs) == 0
    assert begun(tmp_path) == names


def test_a_damaged_kernel_is_compiled_again(tmp_path: Path, own_cache: Path) -> None:
    specs = slow(tmp_path, 2)
    store.compile_missing(specs)
    store.file_of(own_cache, specs[1]).write_bytes(b"glu4 kernel 2\nrubbish")
    assert store.compile_missing(specs) == 1
    assert begun(tmp_path) == ["kernel0", "kernel1", "kernel1"]
    assert store.inventory(specs).cached == ["kernel0", "kernel1"]


@pytest.mark.parametrize(("jobs", "processes"), [(1, 1), (2, 2), (8, 3)])
def test_processes_share_the_work_four_kernels_or_more_each(tmp_path: Path, jobs: int, processes: int) -> None:
    specs = slow(tmp_path, 12)
    assert store.compile_missing(specs, jobs=jobs) == 12
    assert begun(tmp_path) == sorted(s.name for s in specs)
    assert len({line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}) == processes


def test_each_kernel_is_compiled_by_its_own_builder() -> None:
    """Blackwell's set is of three builders, each of which would read the others' kernels as something else."""
    specs = every_kernel("sm_100a")
    for jobs in (1, 2, 5):
        parts = store._parts(specs, jobs)
        assert all(len({s.builder for s in part}) == 1 for part in parts)
        assert sorted(s.name for part in parts for s in part) == sorted(s.name for s in specs)
    assert len({s.builder for s in specs}) == 3


def test_a_builder_that_leaves_kernels_undone_is_an_error(tmp_path: Path) -> None:
    class Forgotten(SlowSpec):
        builder = "this"  # a module that does nothing

    specs = [*slow(tmp_path, 2), Forgotten("other", str(tmp_path / "log"), 0.0)]
    with pytest.raises(UnsupportedError, match="compiling left 1 of 3 kernels undone: other"):
        store.compile_missing(specs)


@pytest.mark.slow
def test_blackwells_kernels_of_every_builder(tmp_path: Path, own_cache: Path) -> None:
    pytest.importorskip("cutlass")
    every = every_kernel("sm_100a")
    specs = [next(s for s in every if type(s) is kind) for kind in dict.fromkeys(type(s) for s in every)]
    assert len(specs) == 6, "dense, experts, their tiles, and what quantises, sorts and combines"
    assert store.compile_missing(specs, jobs=2) == 6
    for spec in specs:
        found = store.find(spec)
        assert found is not None
        assert found[1]["spec"] == spec.to_dict()
        assert resources(found[0])[1] == 0


PROCESS = """
import sys
from compiled.slow_builder import SlowSpec, without_torch
without_torch()
from glu4.compiled import store
store.installed_dsl = lambda: store.DSL_VERSION
specs = [SlowSpec(f"kernel{i}", sys.argv[1], 0.4) for i in range(4)]
waited = []
print(store.compile_missing(specs, on_wait=lambda: waited.append(1)), len(waited))
"""


def test_two_processes_that_miss_the_same_kernels_compile_them_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "log")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(p.communicate(timeout=100)[0].split() for p in both)
    assert [p.returncode for p in both] == [0, 0]
    assert [count for count, _ in said] == ["0", "4"]
    assert begun(tmp_path) == [f"kernel{i}" for i in range(4)]


def hold(target: Path, until: threading.Event) -> threading.Thread:
    """Another holder of the directory's lock."""
    target.mkdir(parents=True, exist_ok=True)
    held = threading.Event()

    def run() -> None:
        with FileLock(target / ".lock"):
            held.set()
            until.wait(20)

    thread = threading.Thread(target=run)
    thread.start()
    assert held.wait(5)
    return thread


def test_a_lock_that_is_held_too_long_stops_nobody(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_LOCK_SECONDS", 0.2)
    waited: list[int] = []
    until = threading.Event()
    thread = hold(own_cache, until)
    try:
        assert store.compile_missing(slow(tmp_path, 1), on_wait=lambda: waited.append(1)) == 1
        assert thread.is_alive()  # which still holds the lock
    finally:
        until.set()
        thread.join()
    assert waited == [1]


def test_what_another_compiled_meanwhile_is_not_compiled_again(tmp_path: Path, own_cache: Path) -> None:
    specs, until = slow(tmp_path, 2), threading.Event()
    thread = hold(own_cache, until)

    def the_other_is_done() -> None:
        store.write(own_cache, specs[0], CUBIN, {})
        until.set()

    assert store.compile_missing(specs, on_wait=the_other_is_done) == 1
    thread.join()
    assert begun(tmp_path) == ["kernel1"]


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), NotImplementedError()])
def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert store.compile_missing(slow(tmp_path, 1)) == 1


def test_a_directory_of_its_own_gets_copies_of_what_there_is(tmp_path: Path, own_cache: Path) -> None:
    specs = slow(tmp_path, 3)
    store.compile_missing(specs[:2])
    assert store.compile_missing(specs, tmp_path / "kernels") == 1
    assert begun(tmp_path) == ["kernel0", "kernel1", "kernel2"]
    assert all(store.read(store.file_of(tmp_path / "kernels", s), s) for s in specs)
    assert store.find(specs[2]) is None


def test_a_builder_that_fails_says_why_and_the_others_stay(tmp_path: Path) -> None:
    specs = slow(tmp_path, 8)
    specs[5] = SlowSpec("kernel5", str(tmp_path / "log"), error="RuntimeError: 176 registers and 40 bytes of stack")
    with pytest.raises(UnsupportedError, match="compiling a kernel failed: RuntimeError: 176 registers and 40 bytes of stack"):
        store.compile_missing(specs, jobs=2)
    assert store.inventory(specs).cached == ["kernel0", "kernel1", "kernel2", "kernel3", "kernel4", "kernel6"]


def test_a_builder_that_talks_much_does_not_block(tmp_path: Path) -> None:
    spec = SlowSpec("kernel0", str(tmp_path / "log"), noise=1_000_000)
    assert store.compile_missing([spec]) == 1


def test_leftovers_of_a_killed_builder_are_removed(tmp_path: Path, own_cache: Path) -> None:
    own_cache.mkdir()
    leftover = own_cache / "tmpx.part"
    leftover.write_bytes(b"half")
    os.utime(leftover, (time.time() - 4000,) * 2)
    store.compile_missing(slow(tmp_path, 1))
    assert sorted(p.name for p in own_cache.iterdir()) == [".lock", "kernel0-key-kernel0.kernel"]


# ---- where it cannot be ----


def test_without_a_cache_there_is_nowhere_to_put_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLU4_CACHE_DIR", "off")
    with pytest.raises(UnsupportedError, match="GLU4_CACHE_DIR is off"):
        store.compile_missing([SPEC])


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLU4_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        UnsupportedError, match="file is not a directory; set GLU4_CACHE_DIR to a directory that can be written"
    ):
        store.compile_missing([SPEC])


def test_a_place_that_turns_out_not_to_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UnsupportedError, match="Read-only file system; set GLU4_CACHE_DIR to a directory"):
        store.compile_missing([SPEC])


def test_a_disk_that_fills_up_is_named(tmp_path: Path) -> None:
    spec = SlowSpec("kernel0", str(tmp_path / "log"), error="OSError: [Errno 28] No space left on device")
    with pytest.raises(UnsupportedError, match="No space left on device"):
        store.compile_missing([spec])


def test_a_read_only_cache_still_serves_what_it_has(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(own_cache, SPEC, CUBIN, {})
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert store.find(SPEC) is not None
    assert store.compile_missing([SPEC]) == 0


# ---- CuTe DSL ----


def test_without_cute_dsl_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "installed_dsl", lambda: None)
    with pytest.raises(UnsupportedError, match=r"needs CuTe DSL: pip install nvidia-cutlass-dsl==[\d.]+, then glu4 compile"):
        store.compile_missing([SPEC])


def test_another_release_of_cute_dsl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "installed_dsl", lambda: "4.9.0")
    with pytest.raises(UnsupportedError, match=r"nvidia-cutlass-dsl 4.8.1 only, and 4.9.0 is installed: pip install nvidia-c"):
        store.compile_missing([SPEC])


def test_a_broken_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finder = "import sys\nclass Finder:\n    def find_spec(self, name, *_):\n        if name == 'cutlass':\n            "
    finder += "raise ModuleNotFoundError(\"No module named 'cutlass'\")\nsys.meta_path.insert(0, Finder())\n"
    (tmp_path / "sitecustomize.py").write_text(finder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    with pytest.raises(UnsupportedError, match=r"CuTe DSL is installed in part only .*pip install .* --force-reinstall"):
        store.compile_missing([SPEC])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", ["types that differ", pytest.param("all", marks=pytest.mark.long)])
def test_the_shipped_set_compiles_without_spills_as_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """In CI every configuration with every type of tokens and every type of outputs, but not with both the same."""
    monkeypatch.undo()
    if store.installed_dsl() != store.DSL_VERSION:
        pytest.skip(f"needs nvidia-cutlass-dsl {store.DSL_VERSION}")
    monkeypatch.setenv("GLU4_CACHE_DIR", "off")
    target = tmp_path / "kernels"
    recorded = {row["name"]: row for row in json.loads(RECORDED.read_text())["kernels"]}
    specs = every_kernel()
    assert recorded.keys() == {s.name for s in specs}, "record again: glu4 compile --list --json"
    if part != "all":
        specs = [s for s in specs if not isinstance(s, KernelSpec | GroupedSpec) or s.x != s.out]
    assert store.compile_missing(specs, target) == len(specs) - len(store.inventory(specs).packaged)
    for spec in specs:
        cubin, description = store.read(store.file_of(target, spec), spec) or (b"", {})
        row = recorded[spec.name]
        assert resources(cubin) == (row["registers"], row["stack_bytes"]) == (description["registers"], 0), spec.name
        assert row["threads"] == description["threads"], spec.name
        assert row["shared_bytes"] == description["shared_bytes"], spec.name
        if isinstance(spec, Spec):
            assert description["params"] == described(spec)["params"], spec.name
        if isinstance(spec, KernelSpec):
            c, nvfp4 = spec.config, spec.nvfp4
            expected = [c.cta_threads(nvfp4), c.launch_registers(nvfp4), c.shared_bytes(nvfp4)]
            assert [description[f] for f in ("threads", "registers", "shared_bytes")] == expected, spec.name
        elif isinstance(spec, GroupedSpec):
            g = spec.config
            expected = [g.threads, g.launch_registers, g.shared_bytes]
            assert [description[f] for f in ("threads", "registers", "shared_bytes")] == expected, spec.name
