"""What the emulator raises: all of it is the input's fault, and says where."""

from __future__ import annotations

__all__ = ["EmulatorError", "LaunchError", "PtxError"]


class EmulatorError(ValueError):
    """An input that cannot be run."""


class PtxError(EmulatorError):
    """PTX text that is malformed or holds an instruction that is not modelled.

    line: in the PTX text, from 1; 0 where the fault is in no single line.
    """

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(f"PTX line {line}: {message}" if line else message)
        self.line = line


class LaunchError(EmulatorError):
    """A launch description that does not fit the kernel."""
