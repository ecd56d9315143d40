"""Kernels of other compilers: right numbers, no alarm, and faults that are found."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import pytest

from emulator.kernels import launches
from emulator.runner import kinds
from glu4.emulator.launch import Result, emulate, load

SCHEDULES = (("eager", 0), ("lazy", 0), ("random", 1))


def run_kernel(name: str, edit: Any = None, **options: Any) -> tuple[Result, bool]:
    """(result, whether the numbers are right)."""
    ptx, launch, problem = launches.load(name)
    inputs = launches.make_inputs(problem)
    result = emulate(edit(ptx) if edit else ptx, launch, inputs, **options)
    exact, bound = launches.expect(problem, inputs)
    return result, bool((np.abs(launches.read_out(problem, result.buffers["C"]) - exact) <= bound).all())


@pytest.mark.parametrize("name", launches.names())
def test_blackwell_kernels(name: str) -> None:
    for schedule, seed in SCHEDULES:
        result, right = run_kernel(name, schedule_name=schedule, seed=seed)
        assert result.report.clean, str(result.report)
        assert right


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
def test_a_gated_tile_of_128_x_128_with_k_1024_takes_two_seconds_at_most(schedule: str) -> None:
    """For each CTA, with hazard checks; processor time, so that other processes do not count."""
    ptx, launch, problem = launches.load("cute_dual_pair")
    assert (problem.k, launch["block"], launch["cluster"]) == (1024, [192, 1, 1], [2, 1, 1])
    program, inputs = load(ptx), launches.make_inputs(problem)
    seconds = []
    for seed in range(2):
        start = time.process_time()
        result = emulate(program, {**launch, "ctas": [[0, 0, 0]]}, inputs, schedule_name=schedule, seed=seed)
        seconds.append((time.process_time() - start) / 2)  # of two CTAs
        assert result.report.clean, str(result.report)
        assert result.report.instructions > 20_000
    assert min(seconds) < 2


def without(pattern: str, which: int = 0, new: str = "") -> Any:
    """An edit that takes out one line (or what a pattern matches of it)."""

    def edit(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx, re.MULTILINE))
        assert len(found) > which, pattern
        return ptx[: found[which].start()] + found[which].expand(new) + ptx[found[which].end() :]

    return edit


FAULTS = {
    "no wait for the accumulator": (r"^.*mbarrier\.try_wait\.parity\S+\s+(\w+), \[%r118\].*$", r"setp.eq.u32 \1, 0, 0;", "missing wait"),
    "no wait::ld": (r"tcgen05\.wait::ld.*", "", "missing wait"),
    "no wait::st": (r"tcgen05\.wait::st.*", "", "missing wait"),
    "no commit": (r"^.*tcgen05\.commit.*$", "", "deadlock"),
    "no dealloc": (r"^.*tcgen05\.dealloc.*$", "", "tensor memory lifetime"),
    "half the allocation": (r"(tcgen05\.alloc\S+ \[%r8\]), 256", r"\1, 128", "tensor memory lifetime"),
    "no expect_tx": (r"^.*mbarrier\.arrive\.expect_tx.*$", "", "deadlock"),
    "half the bytes expected": (r"(mbarrier\.arrive\.expect_tx.*), 36864", r"\1, 18432", "mbarrier misuse"),
    "twice the bytes expected": (r"(mbarrier\.arrive\.expect_tx.*), 36864", r"\1, 73728", "deadlock"),
    "no proxy fence before the store": (r"fence\.proxy\.async.*", "", "missing proxy fence"),
    "no wait for the store": (r"cp\.async\.bulk\.wait_group.*", "", "exit with work outstanding"),
    "barrier initialised twice": (r"^(.*mbarrier\.init.*)$", r"\1\n\1", "mbarrier misuse"),
    "barrier for one more": (r"(mbarrier\.init\.\S+ \[%r118\]), 1", r"\1, 2", "deadlock"),
    "no wait for the stage": (r"^.*mbarrier\.try_wait\.parity\S+\s+(\w+), \[%r41\].*$", r"setp.eq.u32 \1, 0, 0;", "data race"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_a_warp_specialised_kernel(fault: str) -> None:
    pattern, new, kind = FAULTS[fault]
    for schedule, seed in SCHEDULES:
        result, _ = run_kernel("triton_gemm_specialized", without(pattern, 0, new), schedule_name=schedule, seed=seed)
        assert kind in kinds(result), f"{schedule}: {result.report}"


# a persistent kernel for pairs of CTAs, whose tiles come by cluster launch control
PERSISTENT_FAULTS = {
    "half of the response expected": (r"(mov\.b32\s+%r126), 16;", r"\1, 8;", ("mbarrier misuse",)),
    "no response for the other CTA": (r"\.multicast::cluster::all", "", ("deadlock",)),
    "no request": (r"^.*clusterlaunchcontrol\.try_cancel.*$", "", ("deadlock",)),
    "the response is not waited for": (r"mbarrier\.try_wait\.parity\.shared\.b64 P1, \[%r216\], %r497.*", "setp.eq.u32 P1, 0, 0;", ("missing wait", "data race", "uninitialised read")),
    "the response's place is not given back": (r"^.*mbarrier\.arrive\.shared::cluster\.b64 _, \[%r22\].*$", "", ("deadlock",)),
    "a refusal is not heeded": (r"@%p49 bra", "bra", ("cluster launch control",)),
    "stages go back to one CTA": (r"(tcgen05\.commit\S+\s+\[%r29\+24\]), %rs1;", r"\1, 1;", ("deadlock",)),
    "results for a third CTA": (r"(tcgen05\.commit\S+\s+\[%r215\]), %rs9;", r"\1, 7;", ("multicast",)),
    "one CTA gives columns back": (r"^.*(tcgen05\.dealloc.*)$", r".reg .pred %q; .reg .b32 %rank; mov.u32 %rank, %cluster_ctarank; setp.eq.u32 %q, %rank, 0; @%q \1", ("deadlock", "tensor memory lifetime")),
}  # fmt: skip


@pytest.mark.parametrize("fault", PERSISTENT_FAULTS)
def test_faults_in_a_persistent_kernel_for_pairs(fault: str) -> None:
    pattern, new, kind = PERSISTENT_FAULTS[fault]
    ptx, launch, problem = launches.load("cute_dense_pair")
    program, inputs = load(without(pattern, 0, new)(ptx)), launches.make_inputs(problem)
    # three pairs, of which one starts
    chosen = {**launch, "ctas": [[0, 0, 0], [2, 0, 0], [4, 0, 0]]}
    for schedule, seed in SCHEDULES:
        result = emulate(program, chosen, inputs, schedule_name=schedule, seed=seed, resident=1, max_instructions=400_000)
        assert set(kind) & set(kinds(result)), f"{schedule}: {result.report}"
