"""The Blackwell kernel for mixtures of experts, compiled here and run in the emulator as the package's host code launches it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.blackwell import machine_code, moe_table
from backends.blackwell.exported import ExportedKernel
from backends.blackwell.grouped import SENTINEL
from backends.blackwell.moe import DTYPES, PROCESSORS, Call, MoeKernels, full_range, run, spec, tiles, wrong
from backends.blackwell.test_dual_gemm import PASSED, WAIT
from backends.blackwell.test_group_gemm import SCHEDULES, SLOWEST_AND_RANDOM, TWENTY, changed
from glu4.activation import IDENTITY, clamped_silu, swiglu_oai
from glu4.backends.blackwell.emulation import export
from glu4.backends.blackwell.moe_config import moe_legal
from glu4.backends.blackwell.moe_launch import parameters_of, shipped
from glu4.backends.blackwell.moe_spec import MoeSpec
from glu4.compiled.cubin import resources
from glu4.compiled.store import compile_missing, file_of, read
from glu4.emulator.launch import load
from glu4.nvfp4 import NVFP4Tensor
from glu4.problem import GroupedProblem
from glu4.verify import Case, exact_sum_case, one_hot_case
from glu4.verify.case import take_rows

if importlib.util.find_spec("cutlass") is None:
    pytest.skip("needs CuTe DSL to compile the Blackwell kernels", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# rows of each expert: none, one, more than a tile, a tile and one, and tiles that end within the next expert's rows
COUNTS = [0, 1, 130, 0, 33, 40]
# every value of every field, several at once; N and K have tails, K more steps than stages and fewer
KERNELS: dict[str, tuple[MoeSpec, tuple[int, int]]] = {
    "n 64": (spec("bf16", tile_n=64, stages=3, load_width=16, evict_first=True), (72, 1056)),
    "n 32": (spec(tile_n=32, stages=1, load_width=8, store="direct", pdl=True), (101, 288)),
    "pair, n 32": (spec(ctas=2, tile_m=256, tile_n=32, stages=3, store="direct", load_width=16, evict_first=True), (72, 288)),
    "controlled, pair": (
        spec("bf16", ctas=2, tile_m=256, tile_n=32, stages=2, load_width=8, schedule="launch_control", pdl=True),
        (136, 288),
    ),
    "one matrix, pair": (
        spec(gated=False, ctas=2, tile_m=256, tile_n=32, stages=3, load_width=16, evict_first=True),
        (72, 1056),
    ),
    "base": (spec(stages=2), (136, 800)),
    "k 128": (spec("bf16", tile_n=64, tile_k=128, stages=5, store="direct", load_width=64), (136, 544)),
    "pair": (spec("bf16", ctas=2, tile_m=256, stages=2), (300, 800)),
    "pair, n 64": (spec(ctas=2, tile_m=256, tile_n=64, stages=2, load_width=64, pdl=True), (264, 1056)),
    "one matrix": (
        spec("bf16", gated=False, stages=3, store="direct", schedule="launch_control", pdl=True),
        (136, 544),
    ),
    "controlled": (spec(tile_n=64, stages=2, schedule="launch_control", evict_first=True), (136, 544)),
}
SHORT = (
    "n 64",
    "n 32",
    "pair, n 32",
    "controlled, pair",
)  # those that CI runs, the first in KERNELS, which are compiled together


def short(names: Iterable[str], those: Sequence[str] = SHORT) -> list[Any]:
    """Parameters of which CI runs `those`."""
    return [name if name in those else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> MoeKernels:
    return MoeKernels({name: one for name, (one, _) in KERNELS.items()}, compiled)


@pytest.fixture(scope="module")
def shipped_kernels(compiled: Path) -> MoeKernels:
    return MoeKernels(moe_table.SPECS, compiled)


def case_of(name: str, seed: int = 2, counts: Sequence[int] = COUNTS, **fields: Any) -> Case:
    one, (n, k) = KERNELS[name]
    return full_range(seed, counts, n, k, one.out, linear=not one.config.gated, **fields)


def prove(call: Call, schedules: Any = SLOWEST_AND_RANDOM, **options: Any) -> Tensor:
    """C of all schedules, whose bits are the same."""
    case, config = call.case, call.kernel.spec.config
    problem = GroupedProblem(
        call.x.shape[0], case.gate.shape[0], case.gate.rows, case.k, out_dtype=case.out_dtype,
        operation="grouped_dual_gemm" if config.gated else "grouped_linear",
    )  # fmt: skip
    assert moe_legal(config, problem) is None
    first: Tensor | None = None
    for schedule, seed in schedules:
        result, found = run(call, schedule_name=schedule, seed=seed, **options)
        assert result.report.clean, str(result.report)
        assert not wrong(call, found), f"{schedule}, seed {seed}: {wrong(call, found)}"
        assert first is None or torch.equal(first, found)
        first = found
    assert first is not None
    return first


# ---- numbers ----


@pytest.mark.parametrize("name", short(KERNELS))
def test_full_range_with_tails(kernels: MoeKernels, name: str) -> None:
    """Each expert's global scales and biases are its own; rows of nobody have NaN scales; every hazard check is on."""
    prove(Call(case_of(name), kernels[name]), SCHEDULES[2:3])


@pytest.mark.long
@pytest.mark.parametrize("name", KERNELS)
def test_twenty_schedules(kernels: MoeKernels, name: str) -> None:
    prove(Call(case_of(name), kernels[name]), TWENTY)


@pytest.mark.parametrize("name", short(["n 32", "controlled, pair", "pair, n 64", "controlled", "one matrix"]))
def test_random_routing(kernels: MoeKernels, name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 16, (40,), generator=generator).bincount(minlength=16)  # 40 tokens choose among 16 experts
    counts[3] = 0
    prove(Call(case_of(name, 3, counts.tolist()), kernels[name]), SCHEDULES[2:3])


@pytest.mark.parametrize("name", short(["n 64", "one matrix, pair", "base", "pair"]))
def test_exact_sums(kernels: MoeKernels, name: str) -> None:
    one, (n, k) = KERNELS[name]
    case = exact_sum_case(4, sum(COUNTS), n, k, group_sizes=COUNTS, out_dtype=DTYPES[one.out], linear=not one.config.gated)
    prove(Call(case, kernels[name]), SCHEDULES[1:2])


def _joined(parts: list[NVFP4Tensor], how: Any, scale: Tensor) -> NVFP4Tensor:
    codes, scales = how([p.codes for p in parts]), how([p.block_scale.view(torch.uint8) for p in parts])
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), scale.contiguous())


@pytest.mark.parametrize("which", ["gate", "up"])
def test_every_code_under_every_scale(kernels: MoeKernels, which: Any) -> None:
    """128 tokens pick 128 of K; 128 weights of 8 blocks run through all 127 scales and all 16 codes, of the second expert."""
    one = one_hot_case(3, 128, 128, 128, which=which)
    assert isinstance(one.x, NVFP4Tensor)
    assert one.up is not None
    x = _joined([one.x.narrow_rows(0, 5), one.x], torch.cat, one.x.global_scale)
    # the first expert's rows are the second's in reverse
    gate, up = (
        _joined([take_rows(w, torch.arange(127, -1, -1)), w], torch.stack, w.global_scale.expand(2)) for w in (one.gate, one.up)
    )
    case = replace(one, x=x, gate=gate, up=up, group_offsets=torch.tensor([0, 5, 133], dtype=torch.int32))
    prove(Call(case, kernels["n 32"]), SCHEDULES[1:2])


@pytest.mark.long
@pytest.mark.parametrize("activation", [clamped_silu(1.5), swiglu_oai(), IDENTITY], ids=lambda a: a.name)
def test_activations(kernels: MoeKernels, activation: Any) -> None:
    prove(Call(case_of("n 32", 5, [3, 0, 40], activation=activation), kernels["n 32"]), SCHEDULES[1:2])


@pytest.mark.long
@pytest.mark.parametrize("which", ["gate_bias", "up_bias", "both"])
def test_without_biases(kernels: MoeKernels, which: str) -> None:
    case = case_of("n 32", 6, [3, 0, 40])
    without: dict[str, Any] = {name: None for name in ("gate_bias", "up_bias") if which in (name, "both")}
    prove(Call(replace(case, **without), kernels["n 32"]), SCHEDULES[1:2])


@pytest.mark.parametrize("processors", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(148, marks=pytest.mark.long)])
def test_any_number_of_processors(kernels: MoeKernels, processors: int) -> None:
    """One CTA for everything, or more than there are tiles; the bits are the same."""
    call = Call(case_of("n 32", counts=[3, 0, 40]), kernels["n 32"])
    found = prove(call, SCHEDULES[2:3], processors=processors)
    assert torch.equal(found, run(call, PROCESSORS, schedule_name="lazy")[1])


@pytest.mark.parametrize("name", short(["n 64", "pair, n 32", "base", "controlled, pair", "controlled"]))
def test_nothing_to_do(kernels: MoeKernels, name: str) -> None:
    """No expert has a row: nothing is written."""
    case = case_of(name, counts=[4, 3])
    _, found = run(Call(case, kernels[name], [0, 0, 0]), schedule_name="random", seed=1)
    call = Call(replace(case, group_offsets=torch.zeros(3, dtype=torch.int32)), kernels[name])
    assert not wrong(call, found)


def test_512_experts(kernels: MoeKernels) -> None:
    """Most of few tokens each: three of 148 CTAs, each with all its tiles."""
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, 512, (600,), generator=generator).bincount(minlength=512).tolist()
    call = Call(full_range(7, counts, 200, 96), kernels["n 32"])
    everything = tiles(call)
    assert len(everything) > 148
    for cta, (schedule, seed) in zip((0, 147, 50), (*SLOWEST_AND_RANDOM, SCHEDULES[3])):
        result, found = run(call, 148, ctas=[(cta, 0, 0)], schedule_name=schedule, seed=seed)
        assert result.report.clean, str(result.report)
        assert not wrong(call, found, everything[cta::148])


@pytest.mark.long
@pytest.mark.parametrize("name", moe_table.SPECS)
def test_shipped_kernels_at_a_layers_size(shipped_kernels: MoeKernels, name: str) -> None:
    """N and K of Qwen3-30B-A3B, 12 experts, of 1 / rank of the tokens each: all tiles of three of 74 pairs."""
    counts = [int(160 / rank) if rank != 5 else 0 for rank in range(1, 13)]
    gated = moe_table.SPECS[name].config.gated
    n, k = (768, 2048) if gated else (2048, 768)
    call = Call(full_range(15, counts, n, k, linear=not gated), shipped_kernels[name])
    everything = tiles(call)
    last = min(74, len(everything)) - 1
    for worker, (schedule, seed) in zip((0, last, last // 3), (*SLOWEST_AND_RANDOM, SCHEDULES[3])):
        ctas = [(2 * worker + half, 0, 0) for half in range(2)]
        result, found = run(call, 148, ctas=ctas, schedule_name=schedule, seed=seed)
        assert result.report.clean, str(result.report)
        assert not wrong(call, found, everything[worker::74])


# ---- offsets ----

WRONG = {"not monotone": [0, 3, 1, 12], "beyond x": [0, 99, 100, 101], "below zero": [-5, 2, 4, 9], "falling": [4, 3, 2, 1]}


@pytest.mark.parametrize("offsets", WRONG.values(), ids=list(WRONG))
def test_wrong_offsets_lead_to_no_access_outside(kernels: MoeKernels, offsets: list[int]) -> None:
    """Rows of two experts may be written by both; memory beyond x and C is never touched. Rows that one expert has are right."""
    case = full_range(9, [3, 5, 4], 40, 96)
    call = Call(case, kernels["n 32"], offsets)
    result, found = run(call, schedule_name="random", seed=1)
    assert {h.kind for h in result.report.hazards} <= {"data race"}, str(result.report)
    rows = case.x.shape[0]
    ends = [min(max(end, 0), call.x.shape[0]) for end in offsets]
    owners = [[e for e in range(3) if ends[e] <= row < ends[e + 1]] for row in range(call.x.shape[0] + 2)]
    for e in range(3):
        own = [row for row in range(rows) if owners[row] == [e]]
        if own:
            block = slice(own[0], own[-1] + 1)
            assert own == list(range(block.start, block.stop))
            assert not wrong_rows(call, found, e, block)
    nobody = [row for row, own in enumerate(owners) if not own]
    assert (found[nobody] == SENTINEL).all()
    assert (found[:, 40:] == SENTINEL).all()


def wrong_rows(call: Call, found: Tensor, expert: int, rows: slice) -> list[str]:
    rest = torch.full_like(found, SENTINEL)
    rest[rows, : call.case.gate.rows] = found[rows, : call.case.gate.rows]
    return wrong(call, rest, [(expert, rows.start, rows.stop, 0)])


def test_offsets_that_are_not_clamped_are_found(kernels: MoeKernels) -> None:
    """What would be if `tile_table` trusted them: the emulator names the access outside."""
    call = Call(full_range(9, [3, 5, 4], 40, 96), kernels["n 32"], [0, 5, 5, 12])
    assert run(call, schedule_name="random", seed=1)[0].report.clean
    for record in ([2, 1, 5, 99], [2, 1, 4000, 4007], [4000, 1, 5, 12]):
        call.table[2] = torch.tensor(record, dtype=torch.int32)
        result, _ = run(call, schedule_name="random", seed=1)
        assert "out of bounds" in {h.kind for h in result.report.hazards}, record


# ---- faults ----

SMALL = [3, 0, 40, 5]


def small(kernels: MoeKernels) -> Call:
    return Call(full_range(8, SMALL, 101, 288), kernels["n 32"])


def exchange(*pairs: tuple[int, int]) -> Any:
    """Parameters exchanged."""

    def change(description: dict[str, Any]) -> None:
        for i, j in pairs:
            params = description["params"]
            params[i], params[j] = params[j], params[i]

    return change


# 2 to 7 are maps of gate, x and up, 15 to 17 global scales, 18 and 19 biases, 24 and 25 N and K
WRONG_PARAMETERS = {
    "codes of up for gate's": exchange((2, 6)), "scales of up for gate's": exchange((3, 7)), "x's global scale for gate's": exchange((15, 16)),
    "up's global scales for gate's": exchange((16, 17)), "up's biases for gate's": exchange((18, 19)), "K for N": exchange((24, 25)),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("fault", WRONG_PARAMETERS)
def test_exchanged_parameters_are_found(kernels: MoeKernels, fault: str) -> None:
    call = small(kernels)
    result, found = run(call, change=WRONG_PARAMETERS[fault], max_instructions=300_000)
    assert wrong(call, found) or not result.report.clean


OPERANDS = ("gate", "scale_gate", "up", "scale_up", "global_gate", "global_up", "gate_bias", "up_bias")


@pytest.mark.parametrize("name", short(OPERANDS, ("scale_gate", "global_up", "up_bias")))
def test_another_experts_operand_is_found(kernels: MoeKernels, name: str) -> None:
    call = small(kernels)
    call.memory[name] = call.memory[name].roll(1, 0)
    assert wrong(call, run(call, schedule_name="random", seed=1)[1])


# (row of the table, column, what is added): rows 2 to 4 are of 40 tokens and of 5
WRONG_TABLES = {
    "another expert": (2, 0, -1), "another tile's scales": (2, 1, -1), "a row further": (4, 2, 1), "a row before": (4, 2, -1),
    "a row less": (4, 3, -1), "a row more": (4, 3, 1), "a tile less": (0, 0, -1),
}  # fmt: skip


@pytest.mark.parametrize("fault", short(WRONG_TABLES, ("another expert", "another tile's scales", "a row more")))
def test_wrong_tables_are_found(kernels: MoeKernels, fault: str) -> None:
    call = small(kernels)
    row, column, more = WRONG_TABLES[fault]
    assert call.table[:, 0].tolist()[:5] == [4, 0, 2, 2, 3]
    call.table[row, column] += more
    assert wrong(call, run(call, schedule_name="random", seed=1)[1])


# kernel, what is changed, what it becomes, before which line, and what must be found; the last match before it, but for those
# told in BACK
FAULTS = {
    "no wait for a full stage": ("n 64", WAIT, PASSED, r"tcgen05\.cp", "missing wait"),
    "no wait for a free stage": ("n 64", WAIT, PASSED, r"cp\.async\.bulk\.tensor", "missing wait"),
    "no wait for the sums": ("n 64", WAIT, PASSED, r"tcgen05\.ld", "data race"),
    "no wait until the last tile's sums are read": ("n 64", WAIT, PASSED, r"tcgen05\.cp", "data race"),
    "no tcgen05.wait::ld": ("n 64", r"tcgen05\.wait::ld.*", "", r"st\.shared\.b16", "missing wait"),
    "no commit of a stage": ("n 64", r".*tcgen05\.commit.*", "", None, "deadlock"),
    "no commit of a pair's stage": ("pair, n 32", r".*tcgen05\.commit.*", "", None, "deadlock"),
    "scales of the tokens beside": ("n 32", r"(tcgen05\.mma.*, \[%\w+\], \[%\w+)\]", r"\1+1]", None, "numbers"),
    "gate's sum into up's": ("n 32", r"(tcgen05\.mma\S+\s+\[%\w+)\]", r"\1+32]", None, "numbers"),
    "no barrier between writing and reading a buffer": ("n 64", r"bar\.warp\.sync.*", "", r"ld\.shared\.v4", "data race"),
    "copies do not wait for the kernel in front": ("n 32", r"griddepcontrol\.wait.*", "", r"cp\.async\.bulk\.tensor", "data race"),
    "products do not wait for the kernel in front": ("n 32", r"griddepcontrol\.wait.*", "", r"tcgen05\.cp", "data race"),
    "stores do not wait for the kernel in front": ("n 32", r"griddepcontrol\.wait.*", "", r"tcgen05\.ld", "data race"),
}  # fmt: skip
BACK = {"no wait until the last tile's sums are read": 2}
SHORT_FAULTS = ("no wait for a free stage", "no wait for the sums", "products do not wait for the kernel in front")


@pytest.mark.parametrize("fault", short(FAULTS, SHORT_FAULTS))
def test_planted_faults_are_found(kernels: MoeKernels, fault: str) -> None:
    """Each at one place, in a launch of several tiles a CTA, with more steps than stages."""
    name, pattern, new, before, kind = FAULTS[fault]
    call = Call(case_of(name, 8, [30, 0, 70, 1]), kernels[name])
    program = load(changed(kernels[name].ptx, pattern, new, before, BACK.get(fault, 1)))
    result, found = run(call, program=program, schedule_name="random", seed=1, max_instructions=400_000)
    if kind == "numbers":
        assert wrong(call, found)
    else:
        assert kind in {h.kind for h in result.report.hazards}, str(result.report)


# ---- what is compiled ----


def count(kernel: ExportedKernel, pattern: str) -> int:
    return len(re.findall(pattern, kernel.ptx))


@pytest.mark.parametrize("name", short(KERNELS))
def test_instructions(kernels: MoeKernels, name: str) -> None:
    """One loop of copies and one of products, no other MMA, no spill."""
    kernel = kernels[name]
    c = kernel.spec.config
    kind = rf"tcgen05\.mma\.cta_group::{c.ctas}\.kind::mxf4nvf4\.block_scale\.block16"
    assert count(kernel, kind) == count(kernel, r"tcgen05\.mma") == c.tile_k // 64 * (1 + c.gated)
    assert count(kernel, r"cp\.async\.bulk\.tensor\.[234]d\S*shared::") == (6 if c.gated else 4)
    assert count(kernel, r"tcgen05\.ld") == 1 + c.gated
    assert count(kernel, r"ld\.global\.v4\.b32") <= 3
    assert resources(kernel.cubin) == (kernel.description["registers"], 0)
    assert kernel.description["params"] == list(parameters_of(c))


@pytest.mark.long
@pytest.mark.skipif(machine_code.disassembler() is None, reason="needs nvidia-cuda-nvdisasm")
def test_the_table_of_the_documentation(shipped_kernels: MoeKernels) -> None:
    assert moe_table.written() == moe_table.table(shipped_kernels)
    for kernel in shipped_kernels.values():
        found = machine_code.counts(kernel.cubin)
        assert (found["spills"], found["other MMAs"], found["TMA loads"]) == (0, 0, 6 if kernel.spec.config.gated else 4), (
            kernel.spec.name
        )


@pytest.mark.long
def test_sm_103a(tmp_path: Path) -> None:
    one = shipped("sm_103a")[0]
    export([one], tmp_path)  # type: ignore[list-item]
    assert ".target sm_103a" in (tmp_path / f"{one.name}.ptx").read_text()


@pytest.mark.long
def test_compiled_for_the_cache(tmp_path: Path) -> None:
    one = KERNELS["n 32"][0]
    assert compile_missing([one], tmp_path) == 1
    found = read(file_of(tmp_path, one), one)
    assert found is not None
    cubin, description = found
    assert resources(cubin) == (description["registers"], 0)
    assert (description["threads"], description["cluster"], description["pdl"]) == (192, [1, 1, 1], True)
    assert description["shared_bytes"] == one.config.shared_bytes
    assert compile_missing([one], tmp_path) == 0
