"""Keys of kernels: what they are made from, so that another version of glu4 never finds them."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

from glu4.compiled.store import DSL_VERSION

__all__ = ["kernel_key", "source_hash"]


def kernel_key(name: str, arch: str, sources: tuple[str, ...]) -> str:
    """Sources (files of the package), name with the configuration, architecture and tool version, as 16 hexadecimal digits."""
    text = f"{source_hash(sources)} {name} {arch} nvidia-cutlass-dsl {DSL_VERSION}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def source_hash(sources: tuple[str, ...]) -> str:
    """SHA-256 of files of the package, with their names."""
    root = files("glu4")
    digest = hashlib.sha256()
    for name in sources:
        digest.update(name.encode() + b"\0" + root.joinpath(name).read_bytes() + b"\0")
    return digest.hexdigest()
