"""Keys of kernels: the same for the same sources, name, target and tool, another for any other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from glu4.compiled import sources
from glu4.compiled.sources import kernel_key, source_hash

FILES = ("errors.py", "compiled/sources.py")
ROOT = Path(sources.__file__).parents[1]


def test_a_hash_is_of_names_and_contents_in_order() -> None:
    text = b"".join(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0" for name in FILES)
    assert source_hash(FILES) == hashlib.sha256(text).hexdigest()
    assert len({source_hash(FILES), source_hash(FILES[::-1]), source_hash(FILES[:1])}) == 3


def test_a_key_tells_sources_names_targets_and_tools_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    key = kernel_key("a", "sm_90a", FILES)
    assert key == kernel_key("a", "sm_90a", FILES)
    assert len(key) == len(f"{int(key, 16):016x}") == 16
    others = [kernel_key("b", "sm_90a", FILES), kernel_key("a", "sm_100a", FILES), kernel_key("a", "sm_90a", FILES[:1])]
    monkeypatch.setattr(sources, "DSL_VERSION", "0.0.0")
    assert len({key, *others, kernel_key("a", "sm_90a", FILES)}) == 5


def test_a_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        source_hash(("nothing.py",))
