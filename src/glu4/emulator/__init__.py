"""Runs a kernel's own PTX on a machine without a GPU, for its numbers and for its bugs; docs/emulator.md says how.

from glu4.emulator import emulate
result = emulate(text, launch, {"A": a})
result.buffers["C"], result.report.clean, str(result.report)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glu4.emulator.errors import EmulatorError, LaunchError, PtxError

if TYPE_CHECKING:
    from glu4.emulator.hazards import Access, Hazard
    from glu4.emulator.launch import Report, Result, emulate, load

__all__ = ["Access", "EmulatorError", "Hazard", "LaunchError", "PtxError", "Report", "Result", "emulate", "load"]

_PLACES = {"Access": "hazards", "Hazard": "hazards"} | dict.fromkeys(("Report", "Result", "emulate", "load"), "launch")


def __getattr__(name: str) -> Any:
    """The names above, imported when they are first used: parts of the emulator are of use without the machine."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
