"""glu4 as a contender: the call that a user makes, and single kernels of the Hopper backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import glu4
from glu4 import GatedWeights
from glu4.activation import SILU
from glu4.backends.hopper import launch, tuned
from glu4.backends.hopper.config import SHIPPED, Config, legal
from glu4.bench.contender import Contender
from glu4.bench.grouped import GroupedOperands
from glu4.bench.operands import Operands
from glu4.bench.timing import copies
from glu4.nvfp4 import NVFP4Tensor
from glu4.problem import Problem

__all__ = ["Prepared", "contenders", "fits", "grouped_contenders", "single"]


def _clone(w: NVFP4Tensor) -> NVFP4Tensor:
    return NVFP4Tensor(w.codes.clone(), w.block_scale.clone(), w.global_scale.clone())


@dataclass(eq=False)
class Prepared:
    """Prepared copies of one shape's weights, each in memory of its own; the contenders of one shape share them."""

    operands: Operands
    _held: list[GatedWeights] = field(default_factory=list)

    def weights(self, count: int) -> list[GatedWeights]:
        gate, up = self.operands.gate, self.operands.up
        while len(self._held) < count:
            self._held.append(GatedWeights(_clone(gate), _clone(up)).prepare(gate.device))
        return self._held[:count]


def _count(operands: Operands, x_format: str) -> int:
    problem = operands.problem(x_format)
    return copies(problem.bytes - operands.m * operands.n * problem.out_dtype.itemsize)


def _public(held: Prepared, x_format: str) -> list[Callable[[], Tensor]]:
    """The public call with prepared weights and a given output; NVFP4 tokens are decoded within it."""
    operands = held.operands
    count = _count(operands, x_format)
    out = operands.out(x_format)

    def call_with(x: Tensor | NVFP4Tensor, weights: GatedWeights) -> Callable[[], Tensor]:
        return lambda: glu4.dual_gemm(x, weights, out=out)

    return [call_with(x, w) for x, w in zip(operands.x(x_format, count), held.weights(count))]


def _insisted(held: Prepared, x_format: str, config: Config) -> list[Callable[[], Tensor]]:
    """One kernel of the Hopper backend."""
    operands = held.operands
    count = _count(operands, x_format)
    problem = operands.problem(x_format)
    out = operands.out(x_format)

    def call_with(x: Tensor | NVFP4Tensor, weights: GatedWeights) -> Callable[[], Tensor]:
        packed, scales = weights.packed, (weights.gate.global_scale, weights.up.global_scale)
        if packed is None:
            raise RuntimeError("the weights are not packed: no Hopper kernel is compiled here; run glu4 compile")

        def call() -> Tensor:
            launch.dense(out, x, packed, scales, (None, None), SILU, problem, config)
            return out

        return call

    return [call_with(x, w) for x, w in zip(operands.x(x_format, count), held.weights(count))]


def _grouped(operands: GroupedOperands, x_format: str) -> list[Callable[[], Tensor]]:
    """The public grouped call with prepared weights and a given output."""
    problem = operands.problem(x_format)
    explanation = glu4.explain(problem, operands.gate.device)
    if operands.gate.device.type == "cuda" and explanation.chosen == "portable":
        raise RuntimeError(
            "the portable backend reads the offsets on the host, which no CUDA graph can hold; " + str(explanation)
        )
    count = copies(problem.bytes - operands.m * operands.n * problem.out_dtype.itemsize)
    out = operands.out(x_format)

    def call_with(x: Tensor | NVFP4Tensor, weights: GatedWeights) -> Callable[[], Tensor]:
        return lambda: glu4.grouped_dual_gemm(x, weights, operands.offsets, out=out)

    held = [
        GatedWeights(_clone(operands.gate), _clone(operands.up)).prepare(operands.gate.device, free_original=True)
        for _ in range(count)
    ]
    return [call_with(x, w) for x, w in zip(operands.x(x_format, count), held)]


def grouped_contenders(operands: GroupedOperands, x_format: str) -> list[Contender]:
    """What a user gets of the grouped operation."""
    return [Contender("glu4", "nvfp4", x_format, 1, lambda _: _grouped(operands, x_format), specified=True)]


def single(held: Prepared, config: Config, x_format: str) -> Contender:
    """One kernel of the Hopper backend, whether or not it would be chosen."""

    def prepare(_: Operands) -> list[Callable[[], Tensor]]:
        return _insisted(held, x_format, config)

    return Contender("glu4", "nvfp4", x_format, 1, prepare, specified=True, config=config.name, chosen=False)


def fits(config: Config, problem: Problem) -> bool:
    """Whether `config` is worth measuring: it may run, and its token tile is at most twice and at least an eighth of M."""
    near = config.tokens <= 2 * max(problem.m, 8) and 8 * config.tokens >= min(problem.m, 512)
    return near and legal(config, problem) is None


def contenders(operands: Operands, x_format: str, configs: str) -> list[Contender]:
    """What a user gets, and after it, on a Hopper GPU, the kernels asked for.

    configs  "best": no others. "all": every shipped one that `fits`. Else the name of one.

    Raises ValueError naming the configurations there are.
    """
    problem = operands.problem(x_format)
    names = {c.name: c for c in SHIPPED}
    if configs not in ("best", "all", *names):
        raise ValueError(f"configs: expected best, all or one of {', '.join(names)}, got {configs!r}")
    device = operands.gate.device
    chosen = ""
    if glu4.explain(problem, device).chosen == "hopper":
        properties = torch.cuda.get_device_properties(device)
        chosen = next(tuned.ordered(problem, properties.name, properties.multi_processor_count)).name
    held = Prepared(operands)
    found = [Contender("glu4", "nvfp4", x_format, 1, lambda _: _public(held, x_format), specified=True, config=chosen)]
    wanted = {"best": (), "all": tuple(c for c in SHIPPED if fits(c, problem))}.get(configs) or ()
    if configs in names:
        wanted = (names[configs],)
    return found + [single(held, c, x_format) for c in wanted if c.name != chosen]
