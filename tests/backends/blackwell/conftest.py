"""Where compiled kernels are kept for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> Path:
    """A folder that stays from run to run: pytest's cache."""
    assert request.config.cache is not None
    return request.config.cache.mkdir("blackwell")
