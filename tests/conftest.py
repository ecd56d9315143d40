"""Threads for parallel runs, no deadlines for examples, and the skip of GPU tests where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# a machine that others use makes any example slow now and then; pytest-timeout ends what hangs
settings.register_profile("glu4", deadline=None)
settings.load_profile("glu4")


def pytest_configure(config: pytest.Config) -> None:
    # workers of a parallel run share the cores, so each takes its part of them
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
