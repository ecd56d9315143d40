"""The grouped Blackwell kernel, compiled here and run in the emulator as the package's host code launches it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.blackwell import grouped_table, machine_code
from backends.blackwell.exported import ExportedKernel, ExportedKernels
from backends.blackwell.grouped import DTYPES, Call, full_range, run, spec, wrong
from backends.blackwell.test_dual_gemm import PASSED, WAIT
from glu4.activation import IDENTITY, clamped_silu, swiglu_oai
from glu4.backends.blackwell.emulation import export
from glu4.backends.blackwell.grouped_config import Size, candidates, grouped_legal, tiles
from glu4.backends.blackwell.grouped_launch import grouped_sizes
from glu4.backends.blackwell.grouped_spec import GroupSpec
from glu4.compiled.cubin import resources
from glu4.compiled.store import compile_missing, file_of, read
from glu4.emulator.launch import load
from glu4.nvfp4 import NVFP4Tensor
from glu4.verify import Case, exact_sum_case, one_hot_case
from glu4.verify.contest import GROUP_BENCHMARKS, GROUP_TESTS, GroupShape

if importlib.util.find_spec("cutlass") is None:
    pytest.skip("needs CuTe DSL to compile the Blackwell kernels", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCHEDULES = (("eager", 0), ("lazy", 0), ("random", 1), ("random", 2))
SLOWEST_AND_RANDOM = SCHEDULES[1:3]
TWENTY = (("eager", 0), ("lazy", 0), *(("random", seed) for seed in range(1, 19)))

# M, N and K differ from group to group, with tails in each; more steps along K than stages in one group, fewer in another
TWO: list[Size] = [(130, 136, 800), (40, 261, 288)]
FOUR: list[Size] = [(33, 101, 288), (0, 300, 256), (72, 130, 1056), (8, 72, 96)]
# every value of every field, several at once
KERNELS: dict[str, tuple[GroupSpec, list[Size]]] = {
    "base": (spec(2, stages=2), TWO),
    "n 64": (spec(4, "bf16", tile_n=64, stages=3, load_width=16, evict_first=True), FOUR),
    "n 32": (spec(4, tile_n=32, stages=1, load_width=8, store="direct", pdl=True), FOUR),
    "n 256": (spec(2, tile_n=256, stages=2, load_width=64), [(300, 130, 544), (20, 90, 800)]),
    "k 128": (spec(2, "bf16", tile_k=128, stages=5, store="direct"), TWO),
    "pair": (spec(2, "bf16", ctas=2, tile_m=256, stages=3), [(130, 300, 1056), (40, 261, 288)]),
    "pair, n 64": (spec(4, ctas=2, tile_m=256, tile_n=64, stages=2, evict_first=True, pdl=True), FOUR),
    "pair, n 32": (spec(2, ctas=2, tile_m=256, tile_n=32, stages=3, store="direct", load_width=16), TWO),
    "pair, n 256": (spec(2, ctas=2, tile_m=256, tile_n=256, stages=2), [(300, 130, 544), (20, 270, 800)]),
    "one wave": (spec(2, schedule="one_wave", stages=2), TWO),
    "gated": (spec(2, gated=True, stages=2), TWO),
    "gated, n 32": (spec(4, "bf16", gated=True, tile_n=32, stages=3, load_width=8, store="direct"), FOUR),
    "gated, pair": (spec(2, gated=True, ctas=2, tile_m=256, stages=2, load_width=16), [(130, 300, 1056), (40, 261, 288)]),
    "gated, pair, n 64": (
        spec(4, "bf16", gated=True, ctas=2, tile_m=256, tile_n=64, stages=2, schedule="launch_control", evict_first=True),
        FOUR,
    ),
    "launch control": (spec(4, schedule="launch_control", tile_n=64, stages=3), FOUR),
    "launch control, pair": (
        spec(2, "bf16", ctas=2, tile_m=256, tile_n=64, schedule="launch_control", stages=2, pdl=True),
        TWO,
    ),
}
DEFAULTS = {str(shape): GroupSpec(next(candidates(shape.sizes))) for shape in (*GROUP_TESTS, *GROUP_BENCHMARKS)}


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> ExportedKernels:
    return ExportedKernels({name: one for name, (one, _) in KERNELS.items()}, compiled)


@pytest.fixture(scope="module")
def defaults(compiled: Path) -> ExportedKernels:
    return ExportedKernels(DEFAULTS, compiled)


def prove(kernel: ExportedKernel, cases: Sequence[Case], schedules: Any = SLOWEST_AND_RANDOM, **options: Any) -> None:
    call = Call(cases, kernel)
    assert grouped_legal(kernel.spec.config, call.sizes) is None
    for schedule, seed in schedules:
        result, found = run(call, schedule_name=schedule, seed=seed, **options)
        assert result.report.clean, str(result.report)
        assert not wrong(call, found), f"{schedule}, seed {seed}: {wrong(call, found)}"


# ---- numbers ----


@pytest.mark.parametrize("name", KERNELS)
def test_full_range_with_tails(kernels: ExportedKernels, name: str) -> None:
    """Each group's global scales are its own; every hazard check is on."""
    one, sizes = KERNELS[name]
    prove(kernels[name], full_range(2, sizes, one.out, one.config.gated))


@pytest.mark.long
@pytest.mark.parametrize("name", KERNELS)
def test_twenty_schedules(kernels: ExportedKernels, name: str) -> None:
    one, sizes = KERNELS[name]
    prove(kernels[name], full_range(2, sizes, one.out, one.config.gated), TWENTY)


@pytest.mark.parametrize("name", ["base", "pair", "launch control", "gated", "gated, pair"])
def test_exact_sums(kernels: ExportedKernels, name: str) -> None:
    one, sizes = KERNELS[name]
    cases = [exact_sum_case(4 + g, max(m, 1), n, k, linear=not one.config.gated) for g, (m, n, k) in enumerate(sizes)]
    prove(kernels[name], [replace(case, out_dtype=DTYPES[one.out]) for case in cases], SCHEDULES[1:2])


def test_every_code_under_every_scale(kernels: ExportedKernels) -> None:
    """128 tokens pick 128 of K; 128 weights of 8 blocks run through all 127 scales and all 16 codes, in the second group."""
    prove(kernels["base"], [*full_range(5, [(40, 72, 288)]), one_hot_case(3, 128, 128, 128, linear=True)], SCHEDULES[1:2])


@pytest.mark.parametrize("which", ["gate", "up"])
def test_every_code_under_every_scale_of_two_weights(kernels: ExportedKernels, which: Any) -> None:
    cases = [one_hot_case(3 + g, 128, 128, 128, which=which) for g in range(2)]
    for case in cases:  # one a launch, since a launch has one activation
        prove(kernels["gated"], [case, replace(case, name="again")], SCHEDULES[1:2])


@pytest.mark.parametrize("activation", [clamped_silu(1.5), swiglu_oai(), IDENTITY], ids=lambda a: a.name)
def test_activations(kernels: ExportedKernels, activation: Any) -> None:
    prove(kernels["gated, n 32"], full_range(5, [(40, 72, 288), *FOUR[1:]], "bf16", True, activation), SCHEDULES[1:2])


def test_a_nan_scale_poisons_its_own_row_or_column_of_its_group(kernels: ExportedKernels) -> None:
    first, second = full_range(7, [(64, 72, 544), (64, 72, 288)])
    assert isinstance(second.x, NVFP4Tensor)
    x, weights = second.x.to_linear(), second.gate.to_linear()
    x.block_scale.view(torch.uint8)[5, 17] = 0x7F
    weights.block_scale.view(torch.uint8)[40, 0] = 0x7F
    call = Call([first, replace(second, x=x, gate=weights)], kernels["base"])
    _, (one, two) = run(call)
    assert not one[:64, :72].view(DTYPES["f16"]).isnan().any()
    poisoned = two[:64, :72].view(DTYPES["f16"]).isnan()
    assert poisoned[5].all()
    assert poisoned[:, 40].all()
    assert int(poisoned.sum()) == 64 + 72 - 1


@pytest.mark.parametrize("processors", [1, 2, 5, 148])
def test_any_number_of_processors(kernels: ExportedKernels, processors: int) -> None:
    """One CTA for everything, or more than there are tiles; the bits are the same."""
    call = Call(full_range(3, TWO), kernels["base"])
    result, found = run(call, processors=processors, schedule_name="random", seed=1)
    assert result.report.clean, str(result.report)
    assert not wrong(call, found)
    _, again = run(call, processors=3, schedule_name="lazy")
    assert all(bool((a == b).all()) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_few_ctas_take_over_all_tiles(kernels: ExportedKernels, resident: int) -> None:
    call = Call(full_range(3, KERNELS["launch control"][1]), kernels["launch control"])
    result, found = run(call, resident=resident, schedule_name="random", seed=1)
    assert result.report.clean, str(result.report)
    assert not wrong(call, found)


@pytest.mark.parametrize("name", ["base", "launch control", "one wave"])
def test_nothing_to_do(kernels: ExportedKernels, name: str) -> None:
    sizes = [(0, 8, 32)] * KERNELS[name][0].config.groups
    prove(kernels[name], full_range(1, sizes), SCHEDULES[1:3])


# ---- the public problem ----


@pytest.mark.parametrize("processors", [148, pytest.param(6, marks=pytest.mark.long)])
@pytest.mark.parametrize("shape", GROUP_TESTS, ids=str)
def test_public_test_shapes_whole(defaults: ExportedKernels, shape: GroupShape, processors: int) -> None:
    """The default kernel: a CTA or pair for each tile, as on a B200; and three pairs or six CTAs for all."""
    schedule = SCHEDULES[1:2] if processors == 148 else SCHEDULES[2:3]
    prove(defaults[str(shape)], full_range(11, shape.sizes), schedule, processors=processors)


@pytest.mark.parametrize("shape", GROUP_BENCHMARKS, ids=str)
def test_public_benchmark_shapes_at_sampled_tiles(defaults: ExportedKernels, shape: GroupShape) -> None:
    """On 148 processors: the first and the last worker and one between, each with all its tiles, at full M, N and K."""
    kernel = defaults[str(shape)]
    c = kernel.spec.config
    call = Call(full_range(12, shape.sizes), kernel)
    everything = tiles(c, shape.sizes)
    workers = c.grid(shape.sizes)[0] // c.ctas
    for worker, (schedule, seed) in zip((0, workers - 1, workers // 3), (*SLOWEST_AND_RANDOM, SCHEDULES[3])):
        ctas = [(c.ctas * worker + half, 0, 0) for half in range(c.ctas)]
        result, found = run(call, 148, ctas=ctas, schedule_name=schedule, seed=seed)
        assert result.report.clean, str(result.report)
        assert not wrong(call, found, everything[worker::workers])


# ---- faults ----


def exchange(*pairs: tuple[int, int]) -> Any:
    """Parameters exchanged."""

    def change(description: dict[str, Any]) -> None:
        for i, j in pairs:
            params = description["params"]
            params[i], params[j] = params[j], params[i]

    return change


GROUPS, MAPS = 2, 2  # of "base"; its first map's number
OUTS = MAPS + 4 * GROUPS + 4
# the first parameter of each kind is the first group's: codes of B, scales of B, codes of A, scales of A, C
WRONG_PARAMETERS = {
    **{f"{what} of the other group": exchange((MAPS + i, MAPS + 4 + i)) for i, what in enumerate(("B", "scales of B", "A", "scales of A"))},
    "C of the other group": exchange((OUTS, OUTS + 1)),
    "row stride of the other group": exchange((OUTS + GROUPS, OUTS + GROUPS + 1)),
    "M of the other group": exchange((OUTS + 2 * GROUPS, OUTS + 2 * GROUPS + 3)),
    "N of the other group": exchange((OUTS + 2 * GROUPS + 1, OUTS + 2 * GROUPS + 4)),
    "K of the other group": exchange((OUTS + 2 * GROUPS + 2, OUTS + 2 * GROUPS + 5)),
}  # fmt: skip


def test_parameters_of_up_for_those_of_gate_are_found(kernels: ExportedKernels) -> None:
    """Maps of codes, of scales, and global scales, exchanged in one group."""
    call = Call(full_range(8, [(40, 72, 288), (24, 136, 544)], gated=True), kernels["gated"])
    last = len(call.kernel.description["params"]) - 4  # of the activation
    for pairs in (((2, 6),), ((3, 7),), ((last - 2, last - 1),)):
        result, found = run(call, change=exchange(*pairs))
        assert wrong(call, found) or not result.report.clean
    assert not wrong(call, run(call)[1])


@pytest.mark.parametrize("fault", WRONG_PARAMETERS)
def test_parameters_of_another_group_are_found(kernels: ExportedKernels, fault: str) -> None:
    call = Call(full_range(8, [(40, 72, 288), (24, 136, 544)]), kernels["base"])
    result, found = run(call, change=WRONG_PARAMETERS[fault], max_instructions=300_000)
    assert wrong(call, found) or not result.report.clean


def test_global_scales_of_another_group_are_found(kernels: ExportedKernels) -> None:
    cases = full_range(8, [(40, 72, 288), (24, 136, 544)])
    call = Call(cases, kernels["base"])
    for name in ("global_a", "global_b"):
        right = call.memory[name].clone()
        call.memory[name].copy_(right.flip(0))
        assert wrong(call, run(call)[1]), name
        call.memory[name].copy_(right)
    assert not wrong(call, run(call)[1])


# kernel, what is changed, what it becomes, before which line, and what must be found; the last match before it, but for
# those told in BACK
SELECTED, ALWAYS = r"selp\.b64(\s+%rd\d+), (%rd\d+), %rd\d+, %p\d+;", r"mov.b64\1, \2;"
FAULTS = {
    **{
        f"{what} by one group's map": ("base", SELECTED, ALWAYS, r"cp\.async\.bulk\.tensor", "numbers")
        for what in ("scales of A", "A", "scales of B", "B")
    },
    "no wait for a full stage": ("base", WAIT, PASSED, r"tcgen05\.cp", "missing wait"),
    "no wait for a free stage": ("base", WAIT, PASSED, r"cp\.async\.bulk\.tensor", "missing wait"),
    "no wait for the sums": ("base", WAIT, PASSED, r"tcgen05\.ld", "data race"),
    "no wait until the last tile's sums are read": ("base", WAIT, PASSED, r"tcgen05\.cp", "data race"),
    "no tcgen05.wait::ld": ("base", r"tcgen05\.wait::ld.*", "", r"st\.shared\.b16", "missing wait"),
    "no commit of a stage": ("base", r".*tcgen05\.commit.*", "", None, "deadlock"),
    "no commit of a pair's stage": ("pair", r".*tcgen05\.commit.*", "", None, "deadlock"),
    "scales of the tokens beside": ("pair, n 64", r"(tcgen05\.mma.*, \[%\w+\], \[%\w+)\]", r"\1+1]", None, "numbers"),
    "scales of B for A": ("base", r"(tcgen05\.mma.*), \[(%\w+)\], \[%\w+\]", r"\1, [\2], [\2]", None, "numbers"),
    "no barrier between writing and reading a buffer": ("base", r"bar\.warp\.sync.*", "", r"ld\.shared\.v4", "data race"),
    "no barrier before the next tile's buffer": ("base", r"bar\.warp\.sync.*", "", r"tcgen05\.ld", "data race"),
    "gate's map for up": ("gated", SELECTED, ALWAYS, r"cp\.async\.bulk\.tensor", "numbers"),
    "gate's sum into up's": ("gated", r"(tcgen05\.mma\S+\s+\[%\w+)\]", r"\1+128]", None, "numbers"),
    "two weights, no wait for a full stage": ("gated", WAIT, PASSED, r"tcgen05\.cp", "missing wait"),
    "two weights, no wait for a free stage": ("gated", WAIT, PASSED, r"cp\.async\.bulk\.tensor", "missing wait"),
    "no wait for the kernel in front": ("n 32", r"griddepcontrol\.wait.*", "", None, "data race"),
    "no wait for a response": ("launch control", WAIT, PASSED, r"clusterlaunchcontrol\.query", "a response"),
    "not the tile that a response names": ("launch control", r"get_first_ctaid::x", "get_first_ctaid::y", None, "numbers"),
}  # fmt: skip
BACK = {
    "A by one group's map": 2, "scales of B by one group's map": 3, "B by one group's map": 4,
    "no wait until the last tile's sums are read": 2,
}  # fmt: skip
RESPONSE = {"missing wait", "data race", "uninitialised read"}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(kernels: ExportedKernels, fault: str) -> None:
    """Each at one place, in a launch of several tiles a CTA, of groups with more and with fewer steps than stages."""
    name, pattern, new, before, kind = FAULTS[fault]
    sizes: list[Size] = [(130, 136, 1312), (30, 261, 1056), (70, 200, 800), (130, 300, 288)][: KERNELS[name][0].config.groups]
    one = KERNELS[name][0]
    call = Call(full_range(8, sizes, one.out, one.config.gated), kernels[name])
    program = load(changed(kernels[name].ptx, pattern, new, before, BACK.get(fault, 1)))
    result, found = run(call, program=program, schedule_name="random", seed=1, max_instructions=400_000, resident=2)
    kinds = {h.kind for h in result.report.hazards}
    if kind == "numbers":
        assert wrong(call, found)
    elif kind == "a response":
        assert kinds & RESPONSE, str(result.report)
    else:
        assert kind in kinds, str(result.report)


def changed(ptx: str, pattern: str, new: str, before: str | None, back: int) -> str:
    """The PTX with one line's match replaced: the first, or the `back`-th ahead of the first line that matches `before`."""
    lines = ptx.splitlines()
    end = len(lines) if before is None else next(i for i, line in enumerate(lines) if re.search(before, line))
    found = [i for i, line in enumerate(lines[:end]) if re.search(pattern, line)]
    at = found[0 if before is None else -back]
    lines[at] = re.sub(pattern, new, lines[at])
    return "\n".join(lines)


# ---- what is compiled ----


def count(kernel: ExportedKernel, pattern: str) -> int:
    return len(re.findall(pattern, kernel.ptx))


@pytest.mark.parametrize("name", KERNELS)
def test_instructions(kernels: ExportedKernels, name: str) -> None:
    """However many groups: one loop of copies and one of products, no other MMA, no spill."""
    kernel = kernels[name]
    c = kernel.spec.config
    kind = rf"tcgen05\.mma\.cta_group::{c.ctas}\.kind::mxf4nvf4\.block_scale\.block16"
    assert count(kernel, kind) == count(kernel, r"tcgen05\.mma") == c.tile_k // 64 * (1 + c.gated)
    assert count(kernel, r"cp\.async\.bulk\.tensor\.[23]d\S*shared::") == c.maps
    assert count(kernel, r"tcgen05\.ld") == 1 + c.gated
    assert count(kernel, r"\.param \.align 64 \.b8 \S+\[128\]") == c.maps * c.groups
    assert resources(kernel.cubin) == (kernel.description["registers"], 0)
    assert kernel.description["params"] == grouped_sizes(c)


@pytest.mark.skipif(machine_code.disassembler() is None, reason="needs nvidia-cuda-nvdisasm")
def test_the_table_of_the_documentation(compiled: Path) -> None:
    kernels = ExportedKernels(grouped_table.SPECS, compiled)
    assert grouped_table.written() == grouped_table.table(kernels)
    for name in kernels:
        found = machine_code.counts(kernels[name].cubin)
        assert (found["spills"], found["other MMAs"], found["TMA loads"]) == (0, 0, 4)


def test_compiled_for_the_cache(tmp_path: Path) -> None:
    one = KERNELS["pair, n 64"][0]
    assert compile_missing([one], tmp_path) == 1
    found = read(file_of(tmp_path, one), one)
    assert found is not None
    cubin, description = found
    assert resources(cubin) == (description["registers"], 0)
    assert (description["threads"], description["cluster"], description["pdl"]) == (192, [2, 1, 1], True)
    assert description["shared_bytes"] == one.config.shared_bytes
    assert compile_missing([one], tmp_path) == 0


def test_sm_103a(tmp_path: Path) -> None:
    one = replace(KERNELS["pair, n 64"][0], arch="sm_103a")
    export([one], tmp_path)  # type: ignore[list-item]
    assert ".target sm_103a" in (tmp_path / f"{one.name}.ptx").read_text()
