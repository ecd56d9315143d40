"""Kernels on disk: found by what they were made from, refused when damaged, written whole, and counted."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiled.slow_builder import SlowSpec
from glu4.backends.hopper.config import SHIPPED
from glu4.backends.hopper.grouped_config import GATHER_CONFIGS, GROUPED_SHIPPED
from glu4.backends.hopper.spec import DecodeSpec, GroupedSpec, KernelSpec, shipped, shipped_grouped, spec_from_dict
from glu4.compiled import sources, store

SPEC, OTHER = shipped()[:2]
CUBIN = bytes(range(256)) * 40
DESCRIPTION = {"entry": "e", "threads": 512, "shared_bytes": 160768, "params": [128, 8, 24]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLU4_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "packaged_directory", lambda: tmp_path / "package")
    return tmp_path / "cache"


# ---- files ----


def test_round_trip_and_names(own_cache: Path) -> None:
    assert store.find(SPEC) is None
    path = store.write(own_cache, SPEC, CUBIN, DESCRIPTION)
    assert path == store.file_of(own_cache, SPEC)
    assert path.name == f"{SPEC.name}-{SPEC.key}.kernel"
    assert store.find(SPEC) == (CUBIN, {**DESCRIPTION, "key": SPEC.key})
    assert store.find(OTHER) is None
    assert isinstance(SPEC, KernelSpec)
    assert KernelSpec.from_dict(SPEC.to_dict()) == SPEC
    assert len({s.key for s in shipped()}) == len({s.name for s in shipped()}) == len(shipped())


def test_specs_survive_json() -> None:
    for spec in shipped():
        assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_the_shipped_set() -> None:
    """Every configuration for 16-bit tokens, kernels that decode tokens where one can, and those that decode ahead."""
    both = [s for s in shipped() if isinstance(s, KernelSpec)]
    assert len(both) == 2 * (4 * len(SHIPPED) + 2 * sum(c.takes_nvfp4 for c in SHIPPED))
    assert [s for s in shipped() if s not in both] == shipped_grouped()
    assert len(shipped_grouped()) == 4 * len((*GROUPED_SHIPPED, *GROUPED_SHIPPED, *GATHER_CONFIGS)) + 2
    assert shipped_grouped()[-2:] == [DecodeSpec(gather=True), DecodeSpec()]
    assert {(s.x, s.out, s.dual) for s in both} == set(product(("f16", "bf16", "nvfp4"), ("f16", "bf16"), (True, False)))
    assert all(s.config.takes_nvfp4 for s in both if s.nvfp4)
    for dual in (True, False):
        assert shipped(dual) == [s for s in both if s.dual == dual] + [DecodeSpec()]
    experts = [s for s in shipped_grouped() if isinstance(s, GroupedSpec)]
    for dual in (True, False):
        decoders = [DecodeSpec(gather=True), DecodeSpec()] if dual else [DecodeSpec()]
        assert shipped_grouped(dual) == [s for s in experts if s.dual == dual] + decoders
    assert not any(s.config.gather for s in experts if not s.dual)
    assert "sm90_grouped_linear_w4a16_bf16_f16_t64r4d4b32w8" in {s.name for s in experts}
    names = {s.name for s in both if s.config == SHIPPED[0] and s.dual}
    assert "sm90_dual_gemm_w4a4_bf16_t8r1g3f1u2" in names
    assert "sm90_dual_gemm_w4a16_bf16_f16_t8r1g3f1u2" in names


def test_any_cubin_is_kept_as_it_is(own_cache: Path) -> None:
    for cubin in (b"", b"\n", b"\n\n{}\n", CUBIN + b"\n"):
        store.write(own_cache, SPEC, cubin, {"text": "line\nbreak"})
        assert store.find(SPEC) == (cubin, {"text": "line\nbreak", "key": SPEC.key})


@given(data=st.data(), how=st.sampled_from(["change", "cut", "insert", "append", "swap"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_never_loaded(own_cache: Path, data: st.DataObject, how: str) -> None:
    path = store.write(own_cache, SPEC, CUBIN, DESCRIPTION)
    content = path.read_bytes()
    # half of the places in the lines before the cubin, where a change would alter how it is launched
    at = data.draw(st.one_of(st.integers(0, 300), st.integers(0, len(content) - 1)))
    extra = data.draw(st.binary(min_size=1, max_size=5))
    damaged = {
        "change": content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :],
        "cut": content[:at],
        "insert": content[:at] + extra + content[at:],
        "append": content + extra,
        "swap": content[at:] + content[:at],
    }[how]
    path.write_bytes(damaged)
    if damaged == content:  # swapped at 0
        assert store.find(SPEC) is not None
        return
    assert store.find(SPEC) is None
    assert store.inventory([SPEC]).damaged == [path]
    assert store.inventory([SPEC]).missing == [SPEC.name]


def test_every_byte_of_the_description_is_covered(own_cache: Path) -> None:
    path = store.write(own_cache, SPEC, CUBIN, DESCRIPTION)
    content = path.read_bytes()
    for old, new in ((b'"threads": 512', b'"threads": 112'), (b"160768", b"160769"), (b'"entry": "e"', b'"entry": "f"')):
        assert old in content
        path.write_bytes(content.replace(old, new))
        assert store.find(SPEC) is None


def test_a_file_of_the_first_format_is_refused(own_cache: Path) -> None:
    path = store.file_of(own_cache, SPEC)
    path.parent.mkdir()
    described = {**DESCRIPTION, "key": SPEC.key, "sha256": hashlib.sha256(CUBIN).hexdigest()}
    path.write_bytes(b"glu4 kernel 1\n" + json.dumps(described).encode() + b"\n" + CUBIN)
    assert store.find(SPEC) is None


def test_another_kernels_file_is_refused(own_cache: Path) -> None:
    path = store.write(own_cache, OTHER, CUBIN, {})
    path.rename(store.file_of(own_cache, SPEC))
    assert store.find(SPEC) is None
    assert store.inventory([SPEC]).damaged == [store.file_of(own_cache, SPEC)]


def test_a_directory_in_place_of_a_file_is_no_kernel(own_cache: Path) -> None:
    store.file_of(own_cache, SPEC).mkdir(parents=True)
    assert store.find(SPEC) is None


def test_changed_sources_are_another_kernel(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    path = store.write(own_cache, SPEC, CUBIN, {})
    assert store.inventory([SPEC]).outdated == []
    monkeypatch.setattr(sources, "source_hash", lambda *_: "other")
    assert store.find(SPEC) is None
    assert store.inventory([SPEC]).outdated == [path]


def test_the_package_comes_first(own_cache: Path) -> None:
    store.write(own_cache, SPEC, b"cached", {})
    store.write(store.packaged_directory(), SPEC, b"packaged", {})
    store.write(own_cache, OTHER, b"cached", {})
    assert (store.find(SPEC) or (b"",))[0] == b"packaged"
    assert (store.find(OTHER) or (b"",))[0] == b"cached"
    found = store.inventory(shipped())
    assert (found.packaged, found.cached) == ([SPEC.name], [OTHER.name])
    assert len(found.missing) == len(shipped()) - 2
    damaged = store.file_of(store.packaged_directory(), SPEC)
    damaged.write_bytes(b"")
    assert (store.find(SPEC) or (b"",))[0] == b"cached"
    found = store.inventory(shipped())
    assert (found.packaged, found.cached, found.damaged) == ([], [SPEC.name, OTHER.name], [damaged])


# ---- writing ----


def test_writers_at_once_leave_one_whole_file(own_cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.write(own_cache, SPEC, CUBIN, {"n": i}), range(64)))
    assert [p.suffix for p in own_cache.iterdir()] == [".kernel"]
    assert (store.find(SPEC) or (b"",))[0] == CUBIN


WRITER = """
import sys
from pathlib import Path
from compiled.slow_builder import SlowSpec, without_torch
without_torch()
from glu4.compiled import store
for i in range(400):
    store.write(Path(sys.argv[1]), SlowSpec("kernel", ""), bytes([i % 256]) * (1000 + 997 * (i % 50)), {"n": i})
"""


def test_a_reader_beside_two_writing_processes_sees_whole_files_only(own_cache: Path) -> None:
    spec = SlowSpec("kernel", "")
    store.write(own_cache, spec, b"first", {"n": -1})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(own_cache)], env=environment) for _ in range(2)]
    seen = set()
    while any(w.poll() is None for w in writers):
        found = store.find(spec)
        assert found is not None
        cubin, description = found
        n = description["n"]
        seen.add(n)
        assert cubin == (b"first" if n < 0 else bytes([n % 256]) * (1000 + 997 * (n % 50)))
    assert [w.returncode for w in writers] == [0, 0]
    assert len(seen) > 10


def test_a_failed_write_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(own_cache, SPEC, CUBIN, {})
    assert not list(own_cache.iterdir())


def test_leftovers_are_ignored_and_old_ones_removed(own_cache: Path) -> None:
    store.write(own_cache, SPEC, CUBIN, {})
    fresh, old = own_cache / "tmpa.part", own_cache / "tmpb.part"
    for path in (fresh, old):
        path.write_bytes(store.file_of(own_cache, SPEC).read_bytes()[:100])
    os.utime(old, (time.time() - 4000,) * 2)
    found = store.inventory([SPEC])
    assert (found.cached, found.damaged, found.outdated) == ([SPEC.name], [], [])
    store._remove_leftovers(own_cache)
    assert fresh.exists()
    assert not old.exists()


# ---- places ----


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GLU4_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_directory() == tmp_path / "glu4"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/cache")
    assert store.cache_directory() == Path.home() / ".cache" / "glu4"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_directory() == Path.home() / ".cache" / "glu4"
    monkeypatch.setenv("GLU4_CACHE_DIR", "")
    assert store.cache_directory() == Path.home() / ".cache" / "glu4"
    monkeypatch.setenv("GLU4_CACHE_DIR", "off")
    assert store.cache_directory() is None
    assert store.find(SPEC) is None


def test_no_home_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("GLU4_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert store.cache_directory() is None
    assert store.find(SPEC) is None


def test_what_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert store.unwritable(tmp_path) is None
    assert store.unwritable(tmp_path / "not" / "yet" / "there") is None
    assert store.unwritable(tmp_path / "file") == f"{tmp_path / 'file'} is not a directory"
    assert store.unwritable(tmp_path / "file" / "cache") == f"{tmp_path / 'file'} is not a directory"
    assert store.unwritable(tmp_path / "dangling" / "cache") == f"{tmp_path / 'dangling'} is not a directory"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for a read-only file system
    assert store.unwritable(tmp_path / "x") == f"{tmp_path} cannot be written"
    monkeypatch.chdir(tmp_path)
    assert store.unwritable(Path("x")) == f"{tmp_path} cannot be written"
