"""The kernel that sorts a router's choices, in the emulator, against a plain loop."""

from __future__ import annotations

import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from backends.blackwell.exported import ExportedKernel
from backends.blackwell.test_group_gemm import TWENTY
from backends.tokens.routed import device, run
from glu4.backends.tokens import launch
from glu4.backends.tokens.spec import CLUSTER, MAX_KEYS
from glu4.compiled.cubin import resources
from glu4.emulator.capture import capture, pointer, scalar
from glu4.emulator.launch import load
from glu4.moe import sort_by_expert
from test_moe import sorted_by_hand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


ALONE, TOGETHER = "sort_tokens", f"sort_tokens_c{CLUSTER}"
both = pytest.mark.parametrize("kernel", [ALONE, TOGETHER])


def sort(kernels: dict[str, ExportedKernel], kernel: str, ids: Tensor, experts: int, **options: Any) -> list[str]:
    """What is wrong: hazards, the order, its inverse, the offsets."""
    with device(kernels) as recorder, patch.object(launch, "ALONE", 0 if kernel == TOGETHER else launch.MOST_CHOICES):
        routing = sort_by_expert(ids, experts)
    ((_, launched),) = recorder.launches
    assert routing.places is not None
    memory = {"ids": ids, "order": routing.order, "places": routing.places, "offsets": routing.group_offsets}
    result, found = run(kernels[kernel], launched, memory, **{"schedule_name": "random", "seed": 1, **options})
    order, offsets = sorted_by_hand(ids.tolist(), experts)
    findings = [str(h) for h in result.report.hazards]
    findings += ["order"] * (found["order"].tolist() != order)
    findings += ["places"] * (found["places"][found["order"].clamp(0, len(order) - 1)].tolist() != list(range(len(order))))
    return findings + ["offsets"] * (found["offsets"].tolist() != offsets)


def draw(seed: int, tokens: int, top_k: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(low, high, (tokens, top_k), generator=torch.Generator().manual_seed(seed), dtype=dtype)


CASES = [
    (1, 1, 1, torch.int32), (1, 8, 128, torch.int64), (64, 8, 128, torch.int32), (37, 3, 5, torch.int64), (1000, 1, 1, torch.int32),
    (700, 10, 300, torch.int64), (260, 4, 1023, torch.int32), (4100, 2, 2, torch.int32),
]  # fmt: skip


@both
@pytest.mark.parametrize(("tokens", "top_k", "experts", "dtype"), CASES)
def test_any_routing(
    kernels: dict[str, ExportedKernel], tokens: int, top_k: int, experts: int, dtype: torch.dtype, kernel: str
) -> None:
    """Ids below 0 and above the experts among them, one choice and thousands, one expert and as many as there may be."""
    assert not sort(kernels, kernel, draw(1, tokens, top_k, -2, experts + 2, dtype), experts)


@both
def test_ids_at_the_ends_of_their_type_are_no_experts(kernels: dict[str, ExportedKernel], kernel: str) -> None:
    ends = [[2**63 - 1, -(2**63), 2**32], [2**32 + 1, 1, -(2**32)], [0, 2**31, 2]]
    assert not sort(kernels, kernel, torch.tensor(ends), 3)
    assert not sort(kernels, kernel, torch.tensor([[2**31 - 1, 1], [-(2**31), 0]], dtype=torch.int32), 2)


@both
def test_all_choose_one_expert(kernels: dict[str, ExportedKernel], kernel: str) -> None:
    for chosen in (-1, 0, 6, 7):
        assert not sort(kernels, kernel, torch.full((333, 2), chosen), 7)


@pytest.mark.parametrize("schedule", TWENTY, ids=str)
def test_twenty_schedules(one_source: dict[str, ExportedKernel], schedule: tuple[str, int]) -> None:
    ids = draw(2, 150, 8, -1, 33, torch.int64)
    assert not sort(one_source, ALONE, ids, 32, schedule_name=schedule[0], seed=schedule[1])


@pytest.mark.parametrize("schedule", [*TWENTY[:4], *(pytest.param(s, marks=pytest.mark.long) for s in TWENTY[4:])], ids=str)
def test_twenty_schedules_of_a_cluster(one_source: dict[str, ExportedKernel], schedule: tuple[str, int]) -> None:
    ids = draw(2, 150, 8, -1, 33, torch.int64)
    assert not sort(one_source, TOGETHER, ids, 32, schedule_name=schedule[0], seed=schedule[1])


# the CTA behind, so that those in front are done long before it
LATE = """
  .reg .pred %late;
  .reg .b32 %turns;
  mov.u32 %turns, %ctaid.x;
  shl.b32 %turns, %turns, 7;
$late:
  setp.eq.u32 %late, %turns, 0;
  @%late bra $on;
  sub.u32 %turns, %turns, 1;
  bra $late;
$on:
"""
WAITS = r"barrier\.cluster\.wait;((?s:.*?))barrier\.cluster\.arrive;((?s:.*?))barrier\.cluster\.wait;"
# kernel, pattern, what it becomes, at which of its places, what must be found
FAULTS = {
    "no wait for the kernel in front": (ALONE, r"griddepcontrol\.wait.*", "", slice(1), "data race"),
    "no barrier before the sums": (ALONE, r"bar(rier)?\.(cta\.)?sync.*", "", slice(1), "data race"),
    "no barrier before the sums of warps": (ALONE, r"bar(rier)?\.(cta\.)?sync.*", "", slice(1, 2), "data race"),
    "no barrier before the places": (ALONE, r"bar(rier)?\.(cta\.)?sync.*", "", slice(2, 3), "data race"),
    "no meeting of lanes before a count": (ALONE, r"bar\.warp\.sync.*", "", slice(1, 2), "data race"),
    "lanes of another expert counted": (ALONE, r"(match\.any\.sync\.b32\s+%\w+, )%\w+,", r"\g<1>0,", slice(1), "order"),
    "high words are not read": (ALONE, r"setp\.(eq|ne)\.b32\s+(%\w+), (%\w+), 2;", r"setp.\1.b32 \2, \3, 7;", slice(None), ""),
    "no meeting of CTAs before their counts": (TOGETHER, r"barrier\.cluster\.(arrive|wait).*", "", slice(2), "data race"),
    "leaving while others read": (TOGETHER, WAITS, rf"barrier.cluster.wait;{LATE}\1\2", slice(1), "cluster lifetime"),
    "another CTA's counts": (TOGETHER, r"(mapa\S*\s+%\w+, %\w+), 1;", r"\1, 0;", slice(1), "order"),
    "own counts among the earlier": (TOGETHER, r"setp\.gt\.(u32\s+%\w+, %\w+), 1;", r"setp.ge.\1, 1;", slice(1), "order"),
}  # fmt: skip


def planted(text: str, fault: str) -> str:
    """The PTX with a fault."""
    _, pattern, new, which, _ = FAULTS[fault]
    for place in reversed(list(re.finditer(pattern, text))[which]):
        text = text[: place.start()] + place.expand(new) + text[place.end() :]
    return text


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(one_source: dict[str, ExportedKernel], fault: str) -> None:
    kernel, kind = FAULTS[fault][0], FAULTS[fault][-1]
    ids = draw(3, 200, 8, -1, 33, torch.int64)
    ids[5, 3] = 2**32 + 4
    assert not sort(one_source, kernel, ids, 32)
    text = planted(one_source[kernel].ptx, fault)
    assert text != one_source[kernel].ptx
    found = sort(one_source, kernel, ids, 32, program=load(text))
    assert found
    assert any(kind in f for f in found), found


def test_what_torch_sorts_instead(kernels: dict[str, ExportedKernel]) -> None:
    cpu = torch.device("cpu")
    with device(kernels) as recorder:
        assert launch.sorts(cpu, 1, MAX_KEYS - 1)
        assert launch.sorts(cpu, launch.MOST_CHOICES, 128)
        assert not launch.sorts(cpu, 0, 128)
        assert not launch.sorts(cpu, launch.MOST_CHOICES + 1, 128)
        assert not launch.sorts(cpu, 512, MAX_KEYS)
        assert sort_by_expert(torch.tensor([[1, 0]]), 2, backend="portable").order.tolist() == [1, 0]
        assert sort_by_expert(torch.zeros((0, 2), dtype=torch.int64), 3).group_offsets.tolist() == [0] * 4
    assert not recorder.launches
    assert not launch.sorts(cpu, 512, 128), "no kernel runs on a CPU"


@both
def test_parameters_are_those_of_the_host_code(kernels: dict[str, ExportedKernel], kernel: str) -> None:
    made = kernels[kernel]
    given = [pointer(0x7000_0000_0000 + (i << 36)) for i in range(4)] + [scalar("i32", v) for v in (80, 2, 5)] + [pointer(0)]
    (theirs,) = capture(made.file(".o"), made.ptx, given)
    with device(kernels) as recorder, patch.object(launch, "ALONE", 0 if kernel == TOGETHER else 80):
        sort_by_expert(draw(4, 10, 8, 0, 5, torch.int64), 5)
    ((_, ours),) = recorder.launches
    assert [len(p) for p in ours.params] == [len(p) for p in theirs.params] == made.description["params"]
    assert ours.params[4:] == theirs.params[4:]
    assert (ours.grid, ours.block) == (theirs.grid, theirs.block) == ((made.spec.ctas, 1, 1), (1024, 1, 1))
    assert ours.cluster == theirs.cluster
    assert ours.dynamic_smem == theirs.dynamic_smem == made.spec.shared_bytes
    assert resources(made.cubin) == (made.description["registers"], 0)
    assert made.description["registers"] <= 64, "1024 threads have 64 registers each"
