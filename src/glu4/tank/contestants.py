"""What is timed and checked: a configuration, a kernel file or a GPU MODE submission as calls on given operands."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import glu4
from glu4 import weights as packing
from glu4.activation import SILU
from glu4.backends.blackwell import config as blackwell
from glu4.backends.blackwell import launch as blackwell_launch
from glu4.backends.hopper import launch as hopper_launch
from glu4.backends.hopper.config import Config
from glu4.bench.operands import replica
from glu4.nvfp4 import NVFP4Tensor
from glu4.problem import Problem
from glu4.tank.kernels import config_of
from glu4.verify.contest import DualData

__all__ = ["Call", "Inputs", "Maker", "loaded", "maker"]

Call = Callable[[], Tensor]


class Inputs:
    """Operands of one problem, and copies of them in memory of their own; all contestants of a shape share them.

    x: NVFP4Tensor or 16 bits `[m, k]`; gate, up `[n, k]`.
    """

    def __init__(self, x: NVFP4Tensor | Tensor, gate: NVFP4Tensor, up: NVFP4Tensor, problem: Problem, count: int = 1) -> None:
        self.problem = problem
        self.count = count
        self.x = [_copy(x) for _ in range(count)]
        self.gate = [_copy(gate) for _ in range(count)]
        self.up = [_copy(up) for _ in range(count)]
        self._packed: list[Tensor] = []

    def out(self) -> Tensor:
        """Memory for an output, full of NaN."""
        p = self.problem
        return torch.full((p.m, p.n), torch.nan, dtype=p.out_dtype, device=self.gate[0].device)

    def packed(self) -> list[Tensor]:
        """Weights as Hopper kernels read them, packed once for all contestants."""
        if not self._packed:
            self._packed = [packing.pack(pair) for pair in zip(self.gate, self.up)]
        return self._packed


def _copy(t: Any) -> Any:
    if isinstance(t, NVFP4Tensor):
        return NVFP4Tensor(t.codes.clone(), t.block_scale.clone(), t.global_scale.clone())
    return replica(t)


Maker = Callable[[Inputs], list[Call]]


def maker(change: dict[str, Any], backend: str) -> Maker:
    """What makes the calls of a change, one for each copy of the operands; a file's code runs now.

    change: {"kind", "fields", "path"}.
    """
    if change["kind"] == "config":
        config = config_of(backend, change["fields"])
        return lambda inputs: _configured(inputs, config)
    if change["kind"] == "kernel":
        prepare = _function(loaded(Path(change["path"])), "prepare")
        return lambda inputs: _filed(inputs, prepare)
    kernel = _function(loaded(Path(change["path"])), "custom_kernel")
    return lambda inputs: _submitted(inputs, kernel)


def loaded(path: Path) -> ModuleType:
    """The module of a Python file; files beside it can be imported."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"tank_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if not callable(found):
        raise AttributeError(f"{module.__name__.removeprefix('tank_')}.py defines no function {name}")
    return found  # type: ignore[no-any-return]


def _configured(inputs: Inputs, config: Config | blackwell.Config | None) -> list[Call]:
    problem, out = inputs.problem, inputs.out()

    def call_of(i: int) -> Call:
        x, gate, up = inputs.x[i], inputs.gate[i], inputs.up[i]

        def hopper() -> Tensor:
            assert isinstance(config, Config)
            scales = (gate.global_scale, up.global_scale)
            hopper_launch.dense(out, x, inputs.packed()[i], scales, (None, None), SILU, problem, config)
            return out

        def on_blackwell() -> Tensor:
            assert isinstance(config, blackwell.Config)
            blackwell_launch.dense(out, x, (gate, up), (None, None), SILU, problem, config)
            return out

        if config is None:
            held = glu4.GatedWeights(gate, up)
            return lambda: glu4.dual_gemm(x, held, out=out, backend="portable")
        return hopper if isinstance(config, Config) else on_blackwell

    return [call_of(i) for i in range(inputs.count)]


def _filed(inputs: Inputs, prepare: Callable[..., Any]) -> list[Call]:
    """A kernel file: `prepare(x, gate, up, out)` returns a function without arguments that fills `out` `[m, n]`."""
    out = inputs.out()

    def call_of(run: Callable[[], object]) -> Call:
        def call() -> Tensor:
            run()
            return out

        return call

    return [call_of(prepare(x, gate, up, out)) for x, gate, up in zip(inputs.x, inputs.gate, inputs.up)]


def _submitted(inputs: Inputs, kernel: Callable[..., Any]) -> list[Call]:
    """A GPU MODE submission: the ten tensors of the dual problem, which has no global scales."""
    out = inputs.out()

    def call_of(i: int) -> Call:
        a, b1, b2 = (NVFP4Tensor(t.codes[None], t.block_scale[None], t.global_scale) for t in _operands(inputs, i))
        data = DualData(a, b1, b2, out[None]).as_tuple()
        return lambda: kernel(data)[:, :, 0]

    return [call_of(i) for i in range(inputs.count)]


def _operands(inputs: Inputs, i: int) -> list[NVFP4Tensor]:
    return [t for t in (inputs.x[i], inputs.gate[i], inputs.up[i]) if isinstance(t, NVFP4Tensor)]
