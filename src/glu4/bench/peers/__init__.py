"""What glu4 is measured against: one adapter each, which imports its library only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from glu4.bench.contender import Contender
from glu4.bench.timing import describe

__all__ = ["not_installed", "not_usable", "select"]

ALWAYS, ALWAYS_GROUPED = "cublas_fp16", "torch_grouped_mm_bf16"


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


def select(names: str, grouped: bool = False) -> list[Contender]:
    """The peers, of dense shapes or of grouped cases, of "auto" (all there are), "none" (cuBLAS fp16 or torch's grouped product
    alone), or a comma-separated list of names of both kinds.

    Those two are always among them; whether one is installed, it says itself. Raises ValueError naming those there are.
    """
    from glu4.bench.peers import cublas, humming, quack
    from glu4.bench.peers import grouped as of_groups

    dense = {p.name: p for p in (*cublas.PEERS, *quack.PEERS, *humming.PEERS)}
    groups = {p.name: p for p in of_groups.PEERS}
    peers = groups if grouped else dense
    if names == "auto":
        return list(peers.values())
    wanted = [] if names == "none" else [name.strip() for name in names.split(",")]
    known = dense | groups
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"peers: expected auto, none or some of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    return [p for name, p in peers.items() if name in (ALWAYS, ALWAYS_GROUPED) or name in wanted]
