"""What glu4 is measured against: one adapter each, which imports its library only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from glu4.bench.contender import Contender
from glu4.bench.timing import describe

__all__ = ["not_installed", "not_usable", "select"]

ALWAYS = "cublas_fp16"


def not_installed(distribution: str, tested: str) -> str | None:
    """Why a peer of that distribution is left out; None when it is installed. Nothing is imported."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return f"{distribution} is not installed (measured with {tested}); docs/benchmarks.md says how"
    return None


@cache
def not_usable(distribution: str, tested: str, modules: Sequence[str], ready: Callable[[], object] | None = None) -> str | None:
    """Why a peer of that distribution cannot run here, though it may be installed; None when it can.

    Its modules are imported, which finds what they need and is not there; then `ready` is called, which raises for what they
    look for later. Asked once in a process.
    """
    absent = not_installed(distribution, tested)
    if absent is not None:
        return absent
    try:
        for name in modules:
            import_module(name)
    except Exception as error:
        return f"{distribution} {version(distribution)} cannot be imported: {describe(error)}"
    try:
        if ready is not None:
            ready()
    except Exception as error:
        return f"{distribution} {version(distribution)} cannot run here: {describe(error)}"
    return None


def select(names: str) -> list[Contender]:
    """The peers of "auto" (all there are), "none" (cuBLAS fp16 alone), or a comma-separated list of names.

    cublas_fp16 is always among them; whether one is installed, it says itself. Raises ValueError naming those there are.
    """
    from glu4.bench.peers import cublas, humming, quack

    peers = {p.name: p for p in (*cublas.PEERS, *quack.PEERS, *humming.PEERS)}
    if names == "auto":
        return list(peers.values())
    wanted = [] if names == "none" else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in peers]
    if unknown:
        raise ValueError(f"peers: expected auto, none or some of {', '.join(peers)}, got {', '.join(map(repr, unknown))}")
    return [p for name, p in peers.items() if name == ALWAYS or name in wanted]
