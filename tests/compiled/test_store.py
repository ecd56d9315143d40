"""Kernels on disk: found by what they were made from, refused when damaged, written whole; and what a missing one says."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glu4 import UnsupportedError
from glu4.backends.hopper import spec as spec_module
from glu4.backends.hopper.spec import KernelSpec, shipped
from glu4.compiled import store
from glu4.compiled.cubin import resources

SPEC = shipped()[0]
CUBIN = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLU4_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_round_trip_and_names(own_cache: Path) -> None:
    assert store.find(SPEC) is None
    path = store.write(own_cache, SPEC, CUBIN, {"entry": "e"})
    assert path.name == f"{SPEC.name}-{SPEC.key}.kernel"
    cubin, description = store.find(SPEC) or (b"", {})
    assert cubin == CUBIN
    assert description["entry"] == "e"
    assert store.find(shipped()[1]) is None
    assert KernelSpec.from_dict(SPEC.to_dict()) == SPEC
    assert len({s.key for s in shipped()}) == len({s.name for s in shipped()}) == len(shipped())


@given(at=st.integers(0, 10_000), change=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_never_loaded(own_cache: Path, at: int, change: int, cut: bool) -> None:
    path = store.write(own_cache, SPEC, CUBIN, {})
    content = bytearray(path.read_bytes())
    at %= len(content)
    damaged = bytes(content[:at]) if cut else bytes(content[:at]) + bytes([content[at] ^ change]) + bytes(content[at + 1 :])
    path.write_bytes(damaged)
    found = store.find(SPEC)
    assert found is None or found[0] == CUBIN  # a change within the description leaves the kernel itself whole


def test_changed_sources_are_another_kernel(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    store.write(own_cache, SPEC, CUBIN, {})
    monkeypatch.setattr(spec_module, "_source_hash", lambda: "other")
    assert store.find(SPEC) is None


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GLU4_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_directory() == tmp_path / "glu4"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_directory() == Path.home() / ".cache" / "glu4"
    monkeypatch.setenv("GLU4_CACHE_DIR", "off")
    assert store.cache_directory() is None
    assert store.find(SPEC) is None
    with pytest.raises(UnsupportedError, match="GLU4_CACHE_DIR is off"):
        store.compile_missing([SPEC])


def test_nothing_is_compiled_twice(own_cache: Path) -> None:
    store.write(own_cache, SPEC, CUBIN, {})
    assert store.compile_missing([SPEC]) == 0


def test_writers_at_once_leave_one_whole_file(own_cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.write(own_cache, SPEC, CUBIN, {"n": i}), range(64)))
    assert [p.suffix for p in own_cache.iterdir()] == [".kernel"]
    assert (store.find(SPEC) or (b"",))[0] == CUBIN


def test_a_failed_write_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(own_cache, SPEC, CUBIN, {})
    assert not list(own_cache.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLU4_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(UnsupportedError, match="set GLU4_CACHE_DIR to a directory that can be written"):
        store.compile_missing([SPEC])


def test_without_cute_dsl_the_error_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finder = "import sys\nclass Finder:\n    def find_spec(self, name, *_):\n        if name == 'cutlass':\n            "
    finder += "raise ModuleNotFoundError(\"No module named 'cutlass'\")\nsys.meta_path.insert(0, Finder())\n"
    (tmp_path / "sitecustomize.py").write_text(finder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)]))
    with pytest.raises(UnsupportedError, match=r"needs CuTe DSL: pip install nvidia-cutlass-dsl==[\d.]+, then glu4 compile"):
        store.compile_missing([SPEC])


def test_what_is_no_cubin() -> None:
    with pytest.raises(ValueError, match="not a 64-bit ELF file"):
        resources(CUBIN)


@pytest.mark.slow
def test_every_shipped_kernel_compiles_without_spills(tmp_path: Path) -> None:
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    target = tmp_path / "kernels"
    assert store.compile_missing(shipped(), target) == len(shipped())
    for spec in shipped():
        cubin, description = store.read(target / f"{spec.name}-{spec.key}.kernel", spec) or (b"", {})
        assert resources(cubin) == (spec.config.launch_registers, 0)
        assert description["params"][0] == 128
