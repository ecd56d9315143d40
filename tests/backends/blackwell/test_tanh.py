"""SiLU by tanh.approx, against the error bound that follows from the instruction's own (backends.blackwell.tanh)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.blackwell.kernels import DTYPES, Kernels, run
from backends.blackwell.tanh import outside
from glu4.activation import SILU, Activation, clamped_silu, swiglu_oai
from glu4.backends.blackwell.config import Config, candidates
from glu4.backends.blackwell.emulation import Exported
from glu4.backends.blackwell.spec import KernelSpec
from glu4.emulator.isa import INSTRUCTIONS, arithmetic
from glu4.emulator.launch import load
from glu4.problem import Problem
from glu4.verify import Case, check, full_range_case

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs CuTe DSL to compile the kernel")


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> Kernels:
    narrow = Config(tile_n=32, stages=2, load_width=16, silu="tanh")
    pair = Config(2, 256, 64, stages=3, gate_first=2, collector=True, schedule="static", silu="tanh")
    specs = {"narrow": KernelSpec(narrow, "f16"), "pair": KernelSpec(pair, "bf16")}
    return Kernels(specs, compiled)


def of(kernel: Exported, seed: int, m: int, n: int, k: int, activation: Activation = SILU) -> Case:
    """A full-range case whose gates are small enough for the sigmoid to matter: most of its own have |gate| above 100."""
    case = full_range_case(seed, m, n, k, out_dtype=DTYPES[kernel.spec.out], activation=activation)
    size = float(next(iter(case.blocks())).preactivations()[0].abs().median())
    return replace(case, gate=replace(case.gate, global_scale=case.gate.global_scale / size))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("name", "shape"), [("narrow", (64, 40, 544)), ("pair", (260, 72, 800))])
def test_within_the_stated_error(kernels: Kernels, name: str, shape: tuple[int, int, int]) -> None:
    case = of(kernels[name], 2, *shape)
    for schedule, seed in (("eager", 0), ("lazy", 0), ("random", 1)):
        result, out = run(kernels[name], case, schedule_name=schedule, seed=seed)
        assert result.report.clean, str(result.report)
        assert not outside(case, out).any()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("activation", [clamped_silu(1.5), swiglu_oai()], ids=lambda a: a.name)
def test_other_activations(kernels: Kernels, activation: Activation) -> None:
    case = of(kernels["narrow"], 3, 32, 40, 256, activation)
    assert not outside(case, run(kernels["narrow"], case)[1]).any()


def worse(error: float) -> tuple[Callable[[Any], Any], tuple[str, ...]]:
    """A tanh whose relative error is `error`, away from zero and towards it by turns of the last bit of its operand."""

    def tanh(x: Any) -> Any:
        signs = np.where(np.asarray(x, np.float32).view(np.uint32) & 1, 1.0, -1.0)
        return (np.tanh(x.astype(np.float64)) * (1 + error * signs)).astype(x.dtype)

    return tanh, ("f32",)


@pytest.mark.slow
@needs_compiler
def test_the_bound_is_neither_too_small_nor_too_large(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction as bad as the ISA allows passes; one twice as bad is found. The checker's bound takes neither."""
    case = of(kernels["narrow"], 4, 64, 40, 544)
    found = {}
    for error in (2.0**-11, 2.0**-10):
        monkeypatch.setitem(arithmetic._APPROXIMATE, "tanh", worse(error))
        monkeypatch.setitem(INSTRUCTIONS, "tanh", arithmetic._approximate("tanh"))
        out = run(kernels["narrow"], case, program=load(kernels["narrow"].ptx))[1]
        found[error] = int(outside(case, out).sum())
        assert not check(case, out, diagnose=False).ok
    assert found[2.0**-11] == 0
    assert found[2.0**-10] > case.out_shape[0] * case.out_shape[1] // 20


def test_never_a_default() -> None:
    for shape in ((256, 4096, 7168), (512, 4096, 7168), (8, 256, 256), (4096, 768, 512)):
        assert {c.silu for c in candidates(Problem(*shape))} == {"exp"}
