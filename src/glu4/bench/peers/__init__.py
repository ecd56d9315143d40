"""What glu4 is measured against: one adapter each, which imports its library only when it is asked for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from glu4.bench.contender import Contender

__all__ = ["not_installed", "select"]

ALWAYS = "cublas_fp16"


def not_installed(distribution: str, tested: str) -> str | None:
    """Why a peer of that distribution is left out; None when it is installed. Nothing is imported."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return f"{distribution} is not installed (measured with {tested}); docs/benchmarks.md says how"
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
