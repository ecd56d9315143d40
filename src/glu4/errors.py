"""Exceptions that are more than a plain ValueError or TypeError."""

__all__ = ["CheckpointError", "UnsupportedError"]


class UnsupportedError(RuntimeError):
    """The request is well formed, but nothing here can carry it out; the message says what can."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read as NVFP4 weights; the message names the file or tensor and the remedy."""
