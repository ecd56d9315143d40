"""The public contest's shapes with their default kernels, in the emulator at full K."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from backends.blackwell.kernels import Kernels, default
from backends.blackwell.proofs import DOCUMENT, FIVE, RANDOM, WHOLE, Proof, chosen, proofs, prove, recorded
from glu4.verify.contest import DUAL_BENCHMARKS, DUAL_TESTS, DualShape

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs CuTe DSL to compile the kernel")
LONG = [p for p in proofs() if p.shape in (*DUAL_TESTS, *DUAL_BENCHMARKS) or p.name == "with tails"]


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> Kernels:
    return Kernels({p.spec.name: p.spec for p in LONG}, compiled)


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", DUAL_BENCHMARKS, ids=str)
def test_a_corner_of_a_benchmark_at_full_k(kernels: Kernels, shape: DualShape) -> None:
    spec = default(shape)
    last = chosen(spec.config, shape, 4)[-1:]
    prove(kernels[spec.name], Proof("benchmark", spec, shape, RANDOM[:1], last))


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(900)
def test_a_small_test_shape_whole(kernels: Kernels) -> None:
    spec = default(WHOLE)
    prove(kernels[spec.name], Proof("whole", spec, WHOLE, FIVE[:2]))


@pytest.mark.slow
@pytest.mark.long
@needs_compiler
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("proof", LONG, ids=lambda p: f"{p.shape}")
def test_tiles_of_every_public_shape_at_full_k(kernels: Kernels, proof: Proof) -> None:
    prove(kernels[proof.spec.name], proof)


def test_tiles_are_corners_and_more() -> None:
    spec = default(DUAL_BENCHMARKS[1])
    tiles = chosen(spec.config, DUAL_BENCHMARKS[1], 5)
    down = -(-4096 // spec.config.tile_n)
    assert tiles[:4] == ((0, 0), (0, down - 1), (1, 0), (1, down - 1))
    assert len(set(tiles)) == 5
    assert chosen(spec.config, DualShape(1, 1, 32), 4) == ((0, 0),)


def test_what_is_recorded_is_what_is_run() -> None:
    """Each row of docs/blackwell.md's table is one of `make prove-all`'s kernels, shapes and numbers of schedules, in its order."""
    rows = [(name, kernel, shape, count) for name, kernel, shape, _, count, *_ in recorded(DOCUMENT.read_text())]
    assert rows
    run = iter([(p.name, p.spec.name, str(p.shape), str(len(p.schedules))) for p in proofs()])
    assert all(row in run for row in rows)
