"""Hopper kernels that store by bulk copies, or that have no producers: the bits of the kernel without the switch, no alarm, and
planted faults that are found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from emulator.runner import kinds
from emulator.test_hopper_kernels import Edit, case_of, launch_of, output, ptx_of
from glu4.backends.hopper.config import Config
from glu4.backends.hopper.spec import KernelSpec
from glu4.emulator.launch import Result, emulate, load
from glu4.verify.case import Case
from glu4.verify.checker import check

SCHEDULES = (("eager", 0), ("lazy", 0), ("random", 1), ("random", 2))
BULK, ALONE = Config(16, 2, store="bulk"), Config(128, 2, producers="none")
# with and without tails of M, N and K, with one product too
CASES = [
    (BULK, "float16", (20, 40, 80), True),  # the last tile has four tokens, and of its second row group a quarter
    (BULK, "float16", (5, 44, 80), True),  # rows of 88 bytes: element stores
    (Config(8, 1, 3, 1, 2, store="bulk"), "nvfp4", (3, 24, 192), True),
    (ALONE, "float16", (9, 40, 1040), True),  # nine steps of four stages, by two and one over; the last step has one unit
    (ALONE, "float16", (3, 8, 16), True),  # less than a stage
]
MORE = [
    (replace(ALONE, tokens=256, rows=1, store="bulk"), "float16", (20, 24, 656), True),  # three stages, one step a pass
    (BULK, "float16", (20, 80, 208), True),
    (BULK, "float16", (16, 64, 256), True),
    (BULK, "float16", (20, 136, 144), False),
    (BULK, "float16", (3, 45, 80), False),
    (Config(32, 2, splits=2, store="bulk"), "float16", (41, 72, 528), True),
    (Config(16, 1, 2, 1, 2, cluster=2, store="bulk"), "float16", (20, 40, 208), True),
    (Config(256, 2, store="bulk"), "float16", (259, 72, 80), True),  # two copies a thread
    (ALONE, "float16", (131, 80, 1040), True),
    (ALONE, "float16", (128, 64, 512), True),  # all stages once
    (ALONE, "float16", (9, 136, 640), False),
    (replace(ALONE, fragment_sets=1), "float16", (9, 44, 1168), True),
    (replace(ALONE, stage_units=1, fragment_sets=1), "float16", (5, 40, 784), True),
    (replace(ALONE, tokens=256), "float16", (20, 40, 656), True),
    (replace(ALONE, store="bulk"), "float16", (20, 72, 656), True),
]


def job(config: Config, x_format: str, dual: bool, *edits: Edit) -> tuple[KernelSpec, tuple[Edit, ...]]:
    return KernelSpec(config, "nvfp4" if x_format == "nvfp4" else "f16", "f16", dual), edits


def given(x_format: str, shape: tuple[int, int, int], dual: bool) -> Case:
    case = case_of(x_format, *shape)
    return case if dual else replace(case, up=None, gate_bias=None, up_bias=None)  # one matrix takes its bias twice


def run(text: str, config: Config, case: Case, schedule: str = "eager", seed: int = 0) -> Result:
    launch, buffers = launch_of(config, case)
    launch["cluster"] = [1, config.cluster, config.splits]
    return emulate(load(text), launch, buffers, schedule_name=schedule, seed=seed, max_instructions=4_000_000)


def bits(result: Result) -> torch.Tensor:
    return output(result).view(torch.int16)


def name(value: object) -> str:
    return value.name if isinstance(value, Config) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "x_format", "shape", "dual"), [*CASES, *(pytest.param(*c, marks=pytest.mark.long) for c in MORE)], ids=name
)
def test_a_switch_changes_no_bit(config: Config, x_format: str, shape: tuple[int, int, int], dual: bool) -> None:
    case, plain = given(x_format, shape, dual), replace(config, store="threads", producers="warps")
    before, text = ptx_of(job(plain, x_format, dual), job(config, x_format, dual))
    expected = run(before, plain, case)
    verdict = check(case, output(expected))
    assert verdict.ok, verdict.summary()
    for schedule, seed in SCHEDULES:
        result = run(text, config, case, schedule, seed)
        assert result.report.clean, str(result.report)
        assert torch.equal(bits(result), bits(expected)), schedule


FENCE = ('cute.arch.fence_proxy("async.shared", space="cta")  # what is staged', "pass  # what is staged")
BULK_FAULTS: dict[str, tuple[tuple[str, str], str]] = {
    "no proxy fence": (FENCE, "missing proxy fence"),
    "rows of another token": (("base + token * pitch, size)", "base, size)"), "numbers"),
    "no bulk copy": (("bulk_store(out.iterator.toint() + offset * 2", "(lambda *_: None)(out.iterator.toint() + offset * 2"), "numbers"),
    "columns past the last": (("cutlass.min(columns, n - first_column)", "columns"), "out of bounds"),
    "tokens past the last": (
        ("(token < count) & (first_token + token < tokens) & (size > 0)", "(token < count) & (size > 0)"), "out of bounds"),
    "rows that are not aligned": (("bulk = aligned & (n % 8 == 0)", "bulk = n % 8 >= 0"), "misaligned address"),
    "no wait before the end": (
        ("cute.arch.cp_async_bulk_wait_group(0, read=True)", "pass"), "exit with work outstanding"),
    "no barrier": (
        ("cute.arch.barrier(barrier_id=2 + row, number_of_threads=WARPGROUP)\n        tokens, n", "tokens, n"), "data race"),
}  # fmt: skip
ALONE_FAULTS: dict[str, tuple[tuple[str, str], str]] = {
    "a stage is not waited for": (
        ("pipe.producer_acquire(state)\n            self.load_weights(weights, s_weights, pipe, state, row_tile, ahead)",
         "pipe.sync_object_full.arrive(state.index, pipe.producer_mask)\n"
         "            self.load_weights(weights, s_weights, pipe, state, row_tile, ahead)"), "data race"),
    "another phase": (("released = phase ^ 1 if before > stage else phase", "released = phase"), "deadlock"),
    "a step is left out": (("ahead = step + (self.config.stages - 1)", "ahead = step + self.config.stages"), "deadlock"),
    "a step twice": (
        ("pipe, state, row_tile, ahead)\n            self.load_tokens(load_x, from_global, to_shared, pipe, state, ahead)",
         "pipe, state, row_tile, ahead)\n            self.load_tokens(load_x, from_global, to_shared, pipe, state, ahead - 1)"),
        "numbers"),
    "the kernel in front is not waited for": (
        ("cute.arch.griddepcontrol_wait()\n            cute.arch.griddepcontrol_launch_dependents()\n            state",
         "cute.arch.griddepcontrol_launch_dependents()\n            state"), "data race"),
}  # fmt: skip


def told(text: str, config: Config, case: Case, kind: str) -> set[str]:
    """What some schedule tells."""
    found: set[str] = set()
    for schedule, seed in SCHEDULES:
        result = run(text, config, case, schedule, seed)
        found |= set(kinds(result))
        if not check(case, output(result)).ok:
            found.add("numbers")
        if kind in found:
            break
    return found


def some(faults: dict[str, tuple[tuple[str, str], str]], *quick: str) -> list[object]:
    return [fault if fault in quick else pytest.param(fault, marks=pytest.mark.long) for fault in faults]


@pytest.mark.slow
@pytest.mark.parametrize("fault", some(BULK_FAULTS, "no proxy fence", "tokens past the last"))
def test_faults_in_bulk_stores(fault: str) -> None:
    (old, new), kind = BULK_FAULTS[fault]
    case = given("float16", (20, 44 if "not aligned" in fault else 80, 80), True)
    (text,) = ptx_of(job(BULK, "float16", True, ("dual_gemm", old, new)))
    assert kind in told(text, BULK, case, kind)


@pytest.mark.slow
@pytest.mark.parametrize("fault", some(ALONE_FAULTS, "a stage is not waited for"))
def test_faults_without_producers(fault: str) -> None:
    (old, new), kind = ALONE_FAULTS[fault]
    config, case = Config(256, 1, producers="none"), given("float16", (5, 24, 912), True)  # eight steps of three stages
    (text,) = ptx_of(job(config, "float16", True, ("dual_gemm", old, new)))
    assert kind in told(text, config, case, kind)
