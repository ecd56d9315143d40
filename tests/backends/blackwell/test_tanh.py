"""SiLU by tanh.approx, against the error bound that follows from the instruction's own.

tanh.approx.f32 has a relative error of at most 2^-11 (PTX ISA, tanh), so sigmoid(t) = (1 + tanh(t / 2)) / 2 has an absolute
one of at most 2^-12 |tanh(t / 2)|, on top of what the checker allows a float32 evaluation.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backends.blackwell.kernels import DTYPES, run
from glu4.activation import SILU, Activation, clamped_silu, swiglu_oai
from glu4.backends.blackwell.config import Config, candidates
from glu4.backends.blackwell.emulation import Exported, export
from glu4.backends.blackwell.spec import KernelSpec
from glu4.emulator.isa import INSTRUCTIONS, arithmetic
from glu4.emulator.launch import load
from glu4.problem import Problem
from glu4.reference import round_once
from glu4.verify import Case, check, full_range_case
from glu4.verify.metrics import SECOND_ORDER, _operand, block_terms

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs CuTe DSL to compile the kernel")

SIGMOID_ERROR = 2.0**-12
STEEPEST = 1.2  # of g tanh(g / 2): tanh(x) + x / cosh(x)^2 is at most 1.1997


def outside(case: Case, out: Tensor) -> Tensor:
    """bool `[m, n]`: elements that no tanh within its error explains."""
    wrong = torch.zeros(case.out_shape, dtype=torch.bool)
    for block in case.blocks():
        terms, (gate, up) = block_terms(block, case.activation), block.preactivations()
        assert block.up is not None
        assert up is not None
        moved = _operand(block.x, block.gate, gate, block.gate_bias).bound
        factor = _operand(block.x, block.up, up, block.up_bias).bound + up.abs() + abs(case.activation.beta)
        gate = gate.clamp(max=case.activation.limit)
        sigmoid = SIGMOID_ERROR * ((gate * torch.tanh(case.activation.alpha * gate / 2)).abs() + STEEPEST * moved)
        bound = SECOND_ORDER * (terms.bound + sigmoid * factor)
        low, high = (round_once(v, case.out_dtype).double() for v in (terms.value - bound, terms.value + bound))
        actual = out[block.rows, block.cols].double()
        wrong[block.rows, block.cols] = ~((actual >= low) & (actual <= high))
    return wrong


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    narrow = Config(tile_n=32, stages=2, load_width=16, silu="tanh")
    pair = Config(2, 256, 64, stages=3, gate_first=2, collector=True, schedule="static", silu="tanh")
    specs = {"narrow": KernelSpec(narrow, "f16"), "pair": KernelSpec(pair, "bf16")}
    return dict(zip(specs, export(list(specs.values()), tmp_path_factory.mktemp("tanh"))))


def of(kernel: Exported, seed: int, m: int, n: int, k: int, activation: Activation = SILU) -> Case:
    """A full-range case whose gates are small enough for the sigmoid to matter: most of its own have |gate| above 100."""
    case = full_range_case(seed, m, n, k, out_dtype=DTYPES[kernel.spec.out], activation=activation)
    size = float(next(iter(case.blocks())).preactivations()[0].abs().median())
    return replace(case, gate=replace(case.gate, global_scale=case.gate.global_scale / size))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("name", "shape"), [("narrow", (64, 40, 544)), ("pair", (260, 72, 800))])
def test_within_the_stated_error(kernels: dict[str, Exported], name: str, shape: tuple[int, int, int]) -> None:
    case = of(kernels[name], 2, *shape)
    for schedule, seed in (("eager", 0), ("lazy", 0), ("random", 1)):
        result, out = run(kernels[name], case, schedule_name=schedule, seed=seed)
        assert result.report.clean, str(result.report)
        assert not outside(case, out).any()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("activation", [clamped_silu(1.5), swiglu_oai()], ids=lambda a: a.name)
def test_other_activations(kernels: dict[str, Exported], activation: Activation) -> None:
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
def test_the_bound_is_neither_too_small_nor_too_large(kernels: dict[str, Exported], monkeypatch: pytest.MonkeyPatch) -> None:
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
