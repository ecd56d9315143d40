"""A Hopper device made of Python for the tests of this folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from backends.hopper.calls import Long
from fake_hopper import FakeCuda, fake_hopper
from glu4 import ops


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_hopper(monkeypatch) as fake, warnings.catch_warnings():
        warnings.simplefilter("error")
        yield fake


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that do not take the short way fail."""

    def refuse(*_: object, **__: object) -> None:
        raise Long

    monkeypatch.setattr(ops, "check_dense", refuse)
