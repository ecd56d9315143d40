"""Kernels that the tests of this folder compile, where CuTe DSL is installed."""

from __future__ import annotations

import importlib.util

import pytest

from backends.blackwell.exported import ExportedKernel
from backends.tokens.routed import compiled


@pytest.fixture(scope="session", params=["sm_90a", "sm_100a"])
def kernels(request: pytest.FixtureRequest) -> dict[str, ExportedKernel]:
    """By name. The files stay from run to run, in pytest's cache."""
    return _kernels(request)


@pytest.fixture(scope="session", params=["sm_90a", pytest.param("sm_100a", marks=pytest.mark.long)])
def one_source(request: pytest.FixtureRequest) -> dict[str, ExportedKernel]:
    """As `kernels`, for proofs that one architecture says as much of as both, their source being one."""
    return _kernels(request)


def _kernels(request: pytest.FixtureRequest) -> dict[str, ExportedKernel]:
    if importlib.util.find_spec("cutlass") is None:
        pytest.skip("needs CuTe DSL to compile the kernels")
    assert request.config.cache is not None
    return compiled(request.config.cache.mkdir("routing"), request.param)
