"""The kernel that adds up each token's experts, in the emulator, against a plain loop in the same order."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backends.blackwell.exported import ExportedKernel
from backends.tokens.routed import device, run
from glu4.backends.tokens import launch
from glu4.compiled.cubin import resources
from glu4.emulator.capture import capture, pointer, scalar
from glu4.emulator.launch import load
from glu4.moe import Routing, moe_combine, sort_by_expert

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def by_hand(y: Tensor, routing: Routing, weights: Tensor) -> Tensor:
    """Fused multiply-adds in float32, one choice after the other. A product of these is exact in float64, and so is its sum with a
    float32 of about its size."""
    tokens, top_k = weights.shape
    last, rows = int(routing.group_offsets[-1]), y.double().numpy()
    found = np.zeros((tokens, y.shape[1]), np.float32)
    places = torch.empty_like(routing.order)
    places[routing.order] = torch.arange(len(routing.order))
    for t in range(tokens):
        for j in range(top_k):
            place = int(places[t * top_k + j])
            if place < last:
                found[t] = (found[t].astype(np.float64) + float(weights[t, j]) * rows[place]).astype(np.float32)
    return torch.from_numpy(found).to(y.dtype)


def case(seed: int, tokens: int, top_k: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Routing, Tensor]:
    """Rows of nobody, and the weights of choices of nobody, are NaN."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 6, (tokens, top_k), generator=generator)
    routing = sort_by_expert(ids, 5)
    y = torch.randn(tokens * top_k, columns, generator=generator).to(dtype)
    y[int(routing.group_offsets[-1]) :] = torch.nan
    weights = torch.rand(tokens, top_k, generator=generator)
    weights[(ids < 0) | (ids >= 5)] = torch.nan
    return y, routing, weights


def combine(kernels: dict[str, ExportedKernel], y: Tensor, routing: Routing, weights: Tensor, **options: Any) -> list[str]:
    """What is wrong."""
    with device(kernels) as recorder:
        out = moe_combine(y, routing, weights)
    ((_, launched),) = recorder.launches
    assert routing.places is not None
    memory = {"y": y, "places": routing.places, "weights": weights, "offsets": routing.group_offsets, "out": out}
    name = f"combine_tokens_{'bf16' if y.dtype == torch.bfloat16 else 'f16'}"
    result, found = run(kernels[name], launched, memory, **{"schedule_name": "random", "seed": 1, **options})
    right = torch.equal(found["out"].view(torch.int16), by_hand(y, routing, weights).view(torch.int16))
    return [str(h) for h in result.report.hazards] + ["numbers"] * (not right)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "columns"), [(1, 1, 8), (3, 8, 2048), (9, 2, 1032), (5, 3, 13), (2, 5, 1), (4, 1, 1025)]
)
def test_every_size(kernels: dict[str, ExportedKernel], name: str, tokens: int, top_k: int, columns: int) -> None:
    """One column and several CTAs of them, columns that are no multiple of 16 bytes."""
    for schedule in ("lazy", "random"):
        assert not combine(kernels, *case(1, tokens, top_k, columns, TYPES[name]), schedule_name=schedule)


def test_rows_that_begin_anywhere(kernels: dict[str, ExportedKernel]) -> None:
    y, routing, weights = case(2, 6, 2, 16, torch.float16)
    shifted = torch.zeros(y.numel() + 1, dtype=torch.float16)[1:].view(y.shape).copy_(y)
    assert not combine(kernels, shifted, routing, weights)


def test_nobody_is_chosen(kernels: dict[str, ExportedKernel]) -> None:
    routing = sort_by_expert(torch.full((3, 2), -1), 5)
    y, weights = torch.full((6, 16), torch.nan).half(), torch.full((3, 2), torch.nan)
    assert not combine(kernels, y, routing, weights)


# pattern, what it becomes, what is found
FAULTS = {
    "no wait for the kernel in front": (r"griddepcontrol\.wait;", "", "data race"),
    "products are not added": (r"(fma\.rn\.f32\s+%\w+, %\w+, %\w+), %\w+;", r"\1, 0f00000000;", "numbers"),
    "choices of nobody count": (r"setp\.(ge|le|gt|lt)\.s64\s+(%\w+), (%\w+), %\w+;", r"setp.\1.s64 \2, \3, 99;", "numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(kernels: dict[str, ExportedKernel], fault: str) -> None:
    old, new, kind = FAULTS[fault]
    made = kernels["combine_tokens_f16"]
    changed = re.sub(old, new, made.ptx)
    assert changed != made.ptx
    given = case(3, 12, 4, 32, torch.float16)
    assert not combine(kernels, *given)
    found = combine(kernels, *given, program=load(changed))
    assert found
    assert any(kind in f for f in found), found


def test_another_weight_is_found(kernels: dict[str, ExportedKernel]) -> None:
    y, routing, weights = case(4, 12, 4, 32, torch.float16)
    assert routing.places is not None
    wrong = routing._replace(places=routing.places.roll(1))
    assert "numbers" in combine(kernels, y, wrong, weights)


def test_what_torch_adds_instead(kernels: dict[str, ExportedKernel]) -> None:
    y, routing, weights = case(5, 4, 2, 16, torch.float16)
    with device(kernels) as recorder:
        assert launch.combines(y, torch.float16)
        for other, dtype in ((y.float(), torch.float32), (y, torch.float32), (y[:, :0], torch.float16)):
            assert not launch.combines(other, dtype)
            assert moe_combine(other, routing, weights, out_dtype=dtype).dtype == dtype
        assert torch.isfinite(moe_combine(y, routing, weights.nan_to_num(), backend="portable")).all()
        weights.requires_grad_()
        moe_combine(y, routing, weights).sum().backward()
        assert weights.grad is not None
    assert not recorder.launches
    assert not launch.combines(y, torch.float16), "no kernel runs on a CPU"


def test_parameters_are_those_of_the_host_code(kernels: dict[str, ExportedKernel]) -> None:
    for name, dtype in TYPES.items():
        made = kernels[f"combine_tokens_{name}"]
        y, routing, weights = case(6, 7, 3, 1100, dtype)
        given = [pointer(0x7000_0000_0000 + (i << 36)) for i in range(5)] + [scalar("i32", v) for v in (7, 3, 1100)]
        (theirs,) = capture(made.file(".o"), made.ptx, [*given, pointer(0)])
        with device(kernels) as recorder:
            moe_combine(y, routing, weights)
        ((_, ours),) = recorder.launches
        assert [len(p) for p in ours.params] == [len(p) for p in theirs.params] == made.description["params"]
        assert ours.params[5:] == theirs.params[5:]
        assert (ours.grid, ours.block) == (theirs.grid, theirs.block) == ((7, 2, 1), (128, 1, 1))
        assert ours.dynamic_smem == theirs.dynamic_smem == 0
        assert resources(made.cubin) == (made.description["registers"], 0)
