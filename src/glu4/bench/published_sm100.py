"""Public times of NVFP4 kernels on a B200, what is known of each kernel, and how well the model puts them in order.

Times are as their authors or the contest's boards report them; none was measured here. `calibrate` fits the model's rates to
CALIBRATION only; `evaluate` compares its predictions for the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from glu4.backends.blackwell.config import Config, candidates, legal
from glu4.backends.blackwell.launch import aligned
from glu4.bench.devices import device
from glu4.bench.model_sm100 import RATES, Prediction, Rates, predict, predict_launch
from glu4.bench.program_sm100 import Form
from glu4.bench.roofline import limit
from glu4.bench.suites import dual_problem
from glu4.errors import UnsupportedError
from glu4.problem import Problem
from glu4.verify.contest import DUAL_BENCHMARKS, GROUP_BENCHMARKS, DualShape, GroupShape

__all__ = [
    "ABLATIONS",
    "BEST",
    "CALIBRATION",
    "HELD_OUT",
    "Agreement",
    "Public",
    "best_public",
    "calibrate",
    "evaluate",
    "label",
    "limits_agreement",
    "prediction",
    "spearman",
]

APART = 1.10  # pairs of times that are closer are not compared: the boards' noise and grid of 2 us
TEMPLATE_US = 19.94  # beyond what the model says, of the template's host code and epilogue; calibrated
_GAU = "gau-nernst/gpu-mode-kernels, nvidia"
_LEAN = Form(instructions=(5.0, 1.5), special=2.0, per_piece=20.0)  # y * x / (1 + exp(-x)), fast division, no global scales
_DSL = replace(_LEAN, per_piece=45.0)


@dataclass(frozen=True)
class Public:
    """One kernel's times in us, in the order of DUAL_BENCHMARKS or GROUP_BENCHMARKS.

    configs      of each shape, in this project's terms; known: they were published, otherwise assumed, as `source` says
    swapped      weights are the MMA's rows and tokens its columns
    as_template  its host code or epilogue is the template's, so TEMPLATE_US is added
    processors   CTAs of a static schedule, of each shape
    """

    name: str
    us: tuple[float, float, float, float]
    configs: tuple[Config, ...]
    source: str
    form: Form = _LEAN
    known: bool = True
    group: bool = False
    swapped: bool = False
    as_template: bool = False
    processors: tuple[int, ...] = (148,) * 4

    def problems(self, i: int) -> list[Problem]:
        """The i-th shape as this kernel sees it."""
        if not self.group:
            shape = DUAL_BENCHMARKS[i]
            return [Problem(shape.m, shape.n, shape.k)]
        sizes = GROUP_BENCHMARKS[i].sizes
        return [
            Problem(n, m, k, operation="linear") if self.swapped else Problem(m, n, k, operation="linear") for m, n, k in sizes
        ]

    def predicted(self, rates: Rates = RATES, template_us: float = TEMPLATE_US) -> tuple[float, ...]:
        """Predicted times in us."""
        extra = template_us if self.as_template else 0.0
        return tuple(
            predict_launch(self.problems(i), c, rates, self.form, processors=self.processors[i]).us + extra
            for i, c in enumerate(self.configs)
        )


def _full(config: Config, weights: int = 2) -> Config:
    """With as many stages as fit."""
    return replace(config, stages=config.most_stages(weights))


def _by_m(narrow: Config, wide: Config) -> tuple[Config, ...]:
    """Dual benchmarks alternate M 256 and M 512."""
    return (_full(narrow), _full(wide)) * 2


def _gau(**switches: Any) -> tuple[Config, ...]:
    """One CTA, 128 x 64 or 128 x 128."""
    return _by_m(Config(1, 128, 64, **switches), Config(1, 128, 128, **switches))


def _pairs(**switches: Any) -> tuple[Config, ...]:
    return _by_m(Config(2, 256, 64, **switches), Config(2, 256, 128, **switches))


_FINE = {"collector": True, "evict_first": True, "load_width": 8}
_STAGE = Config(stages=1)
_GROUP_PAIR = Config(2, 256, 128, schedule="static", evict_first=True)
_GROUP_ONE = _full(Config(1, 128, 128, load_width=32), 1)

CALIBRATION = (
    Public(
        "template, first line of a public log", (72.0, 70.0, 48.7, 69.6), (_STAGE,) * 4,
        "gpu-mode/reference-kernels, template: 128 x 128 x 256, one stage, 128 threads", replace(_DSL, serial=True),
        as_template=True,
    ),
    Public("gau-nernst v1g", (14.4, 16.6, 10.3, 16.4), _gau(**_FINE, prefetch_scales=True), f"{_GAU}/nvfp4_dual_gemm: v1g"),
)  # fmt: skip

HELD_OUT = (
    Public("gau-nernst v2", (12.4, 16.4, 9.43, 16.3), _pairs(**_FINE, prefetch_scales=True), f"{_GAU}/nvfp4_dual_gemm: v2"),
    Public(
        "guaguabear", (12.4, 15.3, 10.0, 14.4),
        _pairs(gate_first=3, barriers="separate", evict_first=True, silu="tanh"),
        "its author's account: pairs, stages that fill shared memory, separate barriers, last three steps reordered; load "
        "width assumed", _DSL,
    ),
    Public(
        "arseniivanov", (12.6, 16.5, 10.3, 16.4), _pairs(), "CuTe DSL; assumed: pairs and stages that fill shared memory", _DSL,
        known=False,
    ),
    Public(
        "Triton tl.dot_scaled", (22.7, 23.5, 16.6, 22.8), (Config(stages=3, order="by_matrix"),) * 4,
        "minimal effort; assumed: 128 x 128 x 256, Triton's default of 3 stages, one warp group", replace(_DSL, serial=True),
        known=False,
    ),
    Public(
        "template with 3 stages, last line of the log", (41.2, 45.2, 30.8, 42.9), (Config(stages=3),) * 4,
        "the template with warps of its own for copies and MMAs and 3 stages; its host code assumed", _DSL, as_template=True,
    ),
    Public(
        "gau-nernst group v6b", (27.9, 19.4, 8.48, 6.43),
        tuple(_full(replace(_GROUP_PAIR, tile_n=n, load_width=64), 1) for n in (128, 256, 128, 128)),
        f"{_GAU}/nvfp4_group_gemm: v6b", replace(_LEAN, accumulators=2), group=True, swapped=True,
        processors=(128, 112, 120, 128),
    ),
    Public(
        "NaregAmirianMegan group", (38.2, 25.2, 12.8, 9.1), (_GROUP_ONE,) * 4, "assumed: one CTA, 128 x 128, one wave", _LEAN,
        known=False, group=True,
    ),
    Public(
        "arseniivanov group", (43.3, 29.3, 14.8, 12.5), (replace(_GROUP_ONE, schedule="static"),) * 4,
        "CuTe DSL; assumed: one CTA, 128 x 128, static", _DSL, known=False, group=True,
    ),
    Public(
        "CuTe DSL group reference", (334.0, 334.0, 148.0, 132.0), (_STAGE,) * 4,
        "gpu-mode/reference-kernels: the template, one stage", replace(_DSL, serial=True), group=True, as_template=True,
    ),
)  # fmt: skip

# steps of one public worklog, each a switch of Config; not in the evaluation, since its last step is in the calibration
ABLATIONS = (
    Public("v1", (16.5, 18.6, 12.3, 18.5), _gau(evict_first=True, load_width=64), f"{_GAU}/nvfp4_dual_gemm: v1"),
    Public(
        "v1b: A stays in the collector", (15.6, 18.5, 11.0, 18.5), _gau(evict_first=True, collector=True, load_width=64),
        f"{_GAU}/nvfp4_dual_gemm: v1b",
    ),
    Public("v1c: narrow tcgen05.ld", (14.7, 18.5, 10.3, 17.5), _gau(**_FINE), f"{_GAU}/nvfp4_dual_gemm: v1c"),
)  # fmt: skip

BEST: dict[DualShape | GroupShape, tuple[float, str]] = {}
for _i, _dual in enumerate(DUAL_BENCHMARKS):
    BEST[_dual] = min((p.us[_i], p.name) for p in (*CALIBRATION, *HELD_OUT) if not p.group)
for _i, _shape in enumerate(GROUP_BENCHMARKS):
    BEST[_shape] = min((p.us[_i], p.name) for p in HELD_OUT if p.group)


def best_public(shape: DualShape | GroupShape) -> tuple[float, str] | None:
    """(us, whose) of the fastest public kernel for a benchmark shape on a B200; None for other shapes."""
    return BEST.get(shape)


def prediction(shape: DualShape | GroupShape, rates: Rates = RATES) -> tuple[Prediction, str]:
    """(prediction, configuration's name) of a shape on a B200: of a dual one, this project's kernel and its default.

    The model does not know the grouped kernel: of a group, the linear kernel as gau-nernst's v6b is arranged (weights are the
    MMA's rows, a pair, static, all stages). K is padded as a call pads it. Raises UnsupportedError where no configuration may
    run.
    """
    if isinstance(shape, DualShape):
        problem = aligned(dual_problem(shape))
        config = next(candidates(problem), None)
        if config is None:
            raise UnsupportedError(legal(Config(), problem) or f"no configuration runs {shape}")
        return predict(problem, config, rates), config.name
    config = _full(_GROUP_PAIR, 1)
    if len({(n, k) for _, n, k in shape.sizes}) != 1:
        raise UnsupportedError("the model takes groups of one N and one K")
    problems = [aligned(Problem(n, m, k, operation="linear")) for m, n, k in shape.sizes]
    return predict_launch(problems, config, rates), config.name


# ---- calibration ----


def calibrate() -> tuple[Rates, float]:
    """(rates, TEMPLATE_US) that fit CALIBRATION best: least squares of the logarithms, by Gauss and Newton.

    Three numbers, `launch_us`, `latency_us` and the template's own microseconds, for eight times.
    """
    found = _fit(_residuals, np.array([4.0, 1.0, 20.0]))
    return replace(RATES, launch_us=float(found[0]), latency_us=float(found[1])), float(found[2])


def _residuals(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rates = replace(RATES, launch_us=float(x[0]), latency_us=float(x[1]))
    return np.array([math.log(p / us) for k in CALIBRATION for p, us in zip(k.predicted(rates, float(x[2])), k.us)])


def _fit(residuals: Callable[[Any], Any], x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    for _ in range(40):
        now = residuals(x)
        slope = np.array([(residuals(x + step) - now) / step.sum() for step in np.diag(x * 1e-4)]).T
        change = np.linalg.lstsq(slope, -now, rcond=None)[0]
        x = np.maximum(x + 0.7 * change, 1e-2)
        if np.abs(change / x).max() < 1e-6:
            break
    return x


# ---- evaluation ----


@dataclass(frozen=True)
class Agreement:
    """Predicted and published order.

    points    (kernel, shape, published us, predicted us); rho: Spearman's rank correlation of the two
    ordered   of `pairs` of points whose published times are more than 10 % apart, those predicted in that order; wrong: the
              others, as (faster kernel, its shape, slower kernel, its shape)
    """

    points: tuple[tuple[str, str, float, float], ...]
    rho: float
    ordered: int
    pairs: int
    ordered_of_shape: int
    pairs_of_shape: int
    wrong: tuple[
        tuple[str, str, str, str], ...
    ]  # (faster kernel, its shape, slower kernel, its shape), predicted the other way


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank. Raises ValueError below two values or where all are equal."""
    if len(a) != len(b) or len(a) < 2 or len(set(a)) < 2 or len(set(b)) < 2:
        raise ValueError("rank correlation: expected two lists of one length with at least two different values each")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def evaluate(kernels: Sequence[Public] = HELD_OUT, rates: Rates = RATES) -> Agreement:
    """How well predictions order `kernels`, over all their points, and over those of one shape."""
    return _agreement([(k, k.predicted(rates)) for k in kernels])


def limits_agreement(kernels: Sequence[Public] = HELD_OUT) -> Agreement:
    """The same of the roofline's limits in place of predictions: what shapes alone say."""
    contest = device("b200-contest")
    return _agreement([(k, tuple(limit(k.problems(i), contest).time_s * 1e6 for i in range(4))) for k in kernels])


def _agreement(predicted: Sequence[tuple[Public, Sequence[float]]]) -> Agreement:
    points: list[tuple[str, str, float, float]] = []
    for kernel, times in predicted:
        shapes: Sequence[DualShape | GroupShape] = GROUP_BENCHMARKS if kernel.group else DUAL_BENCHMARKS
        points += [(kernel.name, label(s), us, p) for s, us, p in zip(shapes, kernel.us, times)]
    compared = []
    for a, b in itertools.combinations(points, 2):
        fast, slow = sorted((a, b), key=lambda point: point[2])
        if slow[2] >= APART * fast[2]:
            compared.append((fast, slow, fast[3] < slow[3]))
    of_shape = [right for fast, slow, right in compared if fast[1] == slow[1]]
    rho = spearman([p[2] for p in points], [p[3] for p in points])
    wrong = tuple((fast[0], fast[1], slow[0], slow[1]) for fast, slow, right in compared if not right)
    return Agreement(tuple(points), rho, len(compared) - len(wrong), len(compared), sum(of_shape), len(of_shape), wrong)


def label(shape: DualShape | GroupShape) -> str:
    """A benchmark shape's name in tables."""
    if isinstance(shape, DualShape):
        return str(shape)
    return f"g{len(shape.sizes)} N{shape.sizes[0][1]} K{shape.sizes[0][2]}"
