"""Where the GPU proofs run, and the option that asks for a planted memory fault."""

from __future__ import annotations

import pytest

from gpu.harness import HOPPER, PORTABLE, Target, no_hopper


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--planted", action="store_true", help="let a kernel write past its output, for compute-sanitizer to find")


# a hung kernel cannot be interrupted, so a time limit ends the process
_ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(no_hopper() is not None, reason=no_hopper() or ""),
    pytest.mark.timeout(120, method="thread"),
]


@pytest.fixture(params=[pytest.param(PORTABLE, id="portable"), pytest.param(HOPPER, id="hopper", marks=_ON_HOPPER)])
def target(request: pytest.FixtureRequest) -> Target:
    """The Hopper backend on its GPU; and the portable one on the CPU with few cases, which exercises the proofs themselves."""
    chosen: Target = request.param
    return chosen


@pytest.fixture(params=[pytest.param(HOPPER, id="hopper", marks=_ON_HOPPER)])
def hopper(request: pytest.FixtureRequest) -> Target:
    """The Hopper backend on its GPU, for what only a GPU has."""
    chosen: Target = request.param
    return chosen
