"""The table of hardware cases: every instruction family that Hopper has and the emulator models."""

from __future__ import annotations

from emulator.hardware import atomic, cluster, control, conversion, floating, integer, matrices, shared, tensor, warp
from emulator.hardware.case import Case

__all__ = ["CASES"]

_PARTS = (integer, floating, conversion, warp, atomic, shared, tensor, cluster, matrices, control)


def _table() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for part in _PARTS:
        for case in part.cases():
            if case.name in found:
                raise ValueError(f"two cases are called {case.name}")
            found[case.name] = case
    return found


CASES = _table()
