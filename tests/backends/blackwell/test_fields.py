"""Every value of every field alone, in the emulator: five random schedules in CI, twenty by `make prove-all`."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path

import pytest

from backends.blackwell.kernels import FIELDS, Kernels
from backends.blackwell.proofs import FIVE, TWENTY, of_field, prove
from glu4.backends.blackwell import config

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs CuTe DSL to compile the kernel")


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> Kernels:
    return Kernels(FIELDS, compiled)


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FIELDS)
def test_a_value_alone(kernels: Kernels, name: str) -> None:
    prove(kernels[name], of_field(name, FIVE))


@pytest.mark.slow
@pytest.mark.long
@needs_compiler
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FIELDS)
def test_a_value_alone_under_twenty_schedules(kernels: Kernels, name: str) -> None:
    prove(kernels[name], of_field(name, TWENTY))


def test_no_value_is_left_out() -> None:
    """Of fields with a list of values, and both of a switch."""
    for field in fields(config.Config):
        tried = {getattr(spec.config, field.name) for spec in FIELDS.values()}
        named = {
            "ctas": (1, 2), "tile_m": (128, 256), "tile_n": (32, 64, 128, 256), "tile_k": (128, 256), "order": config._ORDERS,
            "barriers": config._BARRIERS, "schedule": config._SCHEDULES, "store": config._STORES, "silu": config._SILUS,
            "warps": config._WARPS, "load_width": config._LOAD_WIDTHS,
        }  # fmt: skip
        values = named.get(field.name, (False, True) if isinstance(field.default, bool) else ())
        assert tried >= set(values), field.name
        assert len(tried) > 1, field.name
