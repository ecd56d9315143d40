"""Configurations of the Blackwell kernel that the tests compile, and runs of them in the emulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backends.blackwell.exported import ExportedMapping
from glu4.backends.blackwell.config import Config, candidates
from glu4.backends.blackwell.emulation import Exported, Operands
from glu4.backends.blackwell.spec import KernelSpec
from glu4.emulator.launch import Result
from glu4.nvfp4 import NVFP4Tensor
from glu4.problem import Problem
from glu4.verify import Case
from glu4.verify.contest import DUAL_BENCHMARKS, DualShape

PROCESSORS = 4  # so that a persistent kernel's CTAs have several tiles each
SENTINEL = 0x7E55  # a NaN with a payload in both 16-bit types: where nothing was written it stays
_TOGETHER = 4  # kernels that one process compiles

# every value of every field, several at once; problems with tails in M, N and K and more steps than stages
KERNELS: dict[str, tuple[KernelSpec, tuple[int, int, int]]] = {
    "one CTA": (KernelSpec(Config(stages=2), "f16"), (130, 132, 800)),
    "n 64": (
        KernelSpec(Config(tile_n=64, stages=3, order="by_matrix", load_width=16, evict_first=True), "bf16"),
        (130, 190, 1056),
    ),
    "n 32": (KernelSpec(Config(tile_n=32, stages=1, load_width=8, pdl=True), "f16"), (64, 101, 544)),
    "k 128": (KernelSpec(Config(tile_k=128, stages=8, barriers="separate", load_width=64), "f16"), (200, 72, 1312)),
    "gate first": (KernelSpec(Config(stages=3, gate_first=2, collector=True, pdl=True), "f16"), (129, 40, 1056)),
    "pair": (KernelSpec(Config(2, 256, 128, stages=5, barriers="separate", order="by_matrix"), "bf16"), (300, 40, 1568)),
    "pair, n 64": (KernelSpec(Config(2, 256, 64, stages=2), "f16"), (260, 90, 800)),
    "pair, n 32": (KernelSpec(Config(2, 256, 32, stages=3, barriers="separate"), "f16"), (129, 70, 1056)),
    "published": (
        KernelSpec(Config(2, 256, 64, stages=6, barriers="separate", gate_first=3, collector=True, evict_first=True), "f16"),
        (256, 72, 2080),
    ),
    "static": (KernelSpec(Config(tile_n=64, stages=3, schedule="static"), "f16"), (300, 260, 544)),
    "static, pair": (
        KernelSpec(Config(2, 256, 64, stages=4, gate_first=2, collector=True, pdl=True, schedule="static"), "bf16"),
        (300, 200, 800),
    ),
    "weights early": (
        KernelSpec(Config(tile_n=64, stages=3, barriers="separate", pdl=True, early_weights=True), "f16"),
        (130, 190, 1056),
    ),
    "static, weights early": (
        KernelSpec(Config(2, 256, 64, stages=2, pdl=True, early_weights=True, prefetch_scales=True, schedule="static"), "bf16"),
        (300, 200, 800),
    ),
    "tma store": (KernelSpec(Config(tile_n=64, stages=2, load_width=16, store="tma"), "f16"), (130, 104, 544)),
    "tma store, pair": (
        KernelSpec(Config(2, 256, 64, stages=3, load_width=64, gate_first=2, schedule="static", store="tma"), "bf16"),
        (300, 136, 800),
    ),
    "tma store, one piece": (
        KernelSpec(Config(tile_n=32, stages=2, schedule="static", store="tma"), "f16", dual=False),
        (300, 72, 288),
    ),
    "split": (KernelSpec(Config(tile_n=64, stages=2, split=3), "f16"), (130, 72, 1056)),
    "split, pair": (
        KernelSpec(Config(2, 256, 64, stages=2, load_width=16, pdl=True, store="tma", split=2), "bf16"),
        (260, 72, 1056),
    ),
    "split, linear": (KernelSpec(Config(tile_n=32, stages=2, load_width=16, split=2), "f16", dual=False), (130, 72, 544)),
    "stream-k": (KernelSpec(Config(tile_n=64, stages=2, schedule="stream_k"), "f16"), (300, 132, 800)),
    "stream-k, pair": (
        KernelSpec(
            Config(2, 256, 64, stages=3, barriers="separate", pdl=True, early_weights=True, store="tma", schedule="stream_k"),
            "bf16",
        ),
        (300, 136, 1568),
    ),
    "stream-k, linear": (
        KernelSpec(Config(tile_n=32, stages=1, load_width=8, schedule="stream_k"), "f16", dual=False),
        (130, 72, 288),
    ),
    "single warp": (KernelSpec(Config(tile_n=64, stages=3, warps="single"), "f16"), (130, 72, 1312)),
    "single warp, one stage": (
        KernelSpec(Config(tile_n=32, stages=1, gate_first=1, schedule="static", warps="single"), "f16"),
        (300, 72, 800),
    ),
    "single warp, pair": (
        KernelSpec(
            Config(
                *(2, 256, 64),
                stages=3,
                barriers="separate",
                gate_first=3,
                collector=True,
                pdl=True,
                early_weights=True,
                schedule="static",
                warps="single",
            ),
            "bf16",
        ),
        (300, 136, 1312),
    ),
    "single warp, launch control": (
        KernelSpec(Config(2, 256, 64, stages=2, schedule="launch_control", warps="single"), "f16"),
        (300, 136, 800),
    ),
    "launch control": (KernelSpec(Config(tile_n=64, stages=3, schedule="launch_control"), "f16"), (300, 260, 544)),
    "launch control, pair": (
        KernelSpec(
            Config(
                2,
                256,
                64,
                stages=2,
                gate_first=2,
                pdl=True,
                early_weights=True,
                prefetch_scales=True,
                store="tma",
                schedule="launch_control",
            ),
            "bf16",
        ),
        (300, 136, 800),
    ),
    "linear": (KernelSpec(Config(tile_n=256, stages=2), "f16", dual=False), (130, 264, 800)),
    "linear, pair": (KernelSpec(Config(2, 256, 64, stages=3, order="by_matrix"), "bf16", dual=False), (260, 90, 1056)),
}

# one value of one field each, beside this base: four steps of 480 run through three stages; M and N have tails
BASE = Config(tile_n=64, tile_k=128, stages=3, load_width=16)
FIELD_SHAPES = (DualShape(130, 40, 480), DualShape(130, 72, 480))  # one CTA a tile: two tiles; persistent ones: four
FIELDS: dict[str, KernelSpec] = {
    "base": KernelSpec(BASE, "f16"),
    "bf16": KernelSpec(BASE, "bf16"),
    "linear": KernelSpec(BASE, "f16", dual=False),
    "ctas 2, tile_m 256": KernelSpec(replace(BASE, ctas=2, tile_m=256), "f16"),
    "tile_n 256": KernelSpec(replace(BASE, tile_n=256), "f16", dual=False),
    **{
        f"{field} {value}": KernelSpec(replace(BASE, **{field: value}), "f16")
        for field, values in {
            "tile_n": (32, 128),
            "tile_k": (256,),
            "stages": (1, 2, BASE.most_stages()),
            "order": ("by_matrix",),
            "barriers": ("separate",),
            "load_width": (8, 32, 64),
            "gate_first": (1, 3),
            "collector": (True,),
            "evict_first": (True,),
            "pdl": (True,),
            "schedule": ("static", "launch_control", "stream_k"),
            "prefetch_scales": (True,),
            "store": ("tma",),
            "silu": ("tanh",),
            "split": (2, 4),
            "warps": ("single",),
        }.items()
        for value in values
    },
    "early_weights True, pdl True": KernelSpec(replace(BASE, pdl=True, early_weights=True), "f16"),
}


def default(shape: DualShape) -> KernelSpec:
    """The kernel of a shape."""
    return KernelSpec(next(candidates(Problem(shape.m, shape.n, shape.k))), "f16")


DEFAULTS = {str(shape): default(shape) for shape in DUAL_BENCHMARKS}

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def operands(case: Case) -> Operands:
    assert isinstance(case.x, NVFP4Tensor)
    return Operands(case.x, case.gate, case.up, case.activation, case.gate_bias, case.up_bias)


def run(kernel: Exported, case: Case, **options: Any) -> tuple[Result, torch.Tensor]:
    """(result, output) of a case, written into a larger buffer, of which nothing else may change."""
    m, n = case.out_shape[-2:]
    batch = torch.Size(case.out_shape[:-2]).numel()
    out = np.full((batch, m + 2, n + 8), SENTINEL, np.uint16)
    result, got = kernel.run(operands(case), out, processors=PROCESSORS, **options)
    around = result.buffers["out"].copy()
    around[:, :m, :n] = SENTINEL
    assert (around == SENTINEL).all(), "written outside of C"
    return result, got.reshape(case.out_shape)


def exchanged(case: Case) -> Case:
    """Gate and up exchanged."""
    assert case.up is not None
    return replace(case, gate=case.up, up=case.gate)


class Kernels(ExportedMapping[Exported]):
    """Of kernels that CuTe DSL's own host code launches."""

    suffixes = (".ptx", ".cubin", ".o", ".h")
    together = _TOGETHER

    def kernel(self, spec: KernelSpec, place: Path) -> Exported:
        return Exported(spec, place)
