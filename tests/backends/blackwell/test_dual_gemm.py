"""The Blackwell kernel, compiled here and run in the emulator: numbers, hazards, resources, and faults that are found."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.blackwell.kernels import DTYPES, KERNELS, PROCESSORS, Kernels, exchanged, run
from glu4.activation import IDENTITY, clamped_silu, swiglu_oai
from glu4.backends.blackwell.config import Config, legal
from glu4.backends.blackwell.emulation import Exported, export
from glu4.backends.blackwell.spec import KernelSpec
from glu4.compiled.cubin import resources
from glu4.compiled.store import compile_missing, file_of, read
from glu4.emulator.isa import tma
from glu4.emulator.launch import load
from glu4.errors import UnsupportedError
from glu4.nvfp4 import NVFP4Tensor
from glu4.problem import Problem
from glu4.verify import Case, check, exact_sum_case, full_range_case, one_hot_case

if importlib.util.find_spec("cutlass") is None:
    pytest.skip("needs CuTe DSL to compile the Blackwell kernels", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # CI's longer proofs are where CuTe DSL is

SCHEDULES = (("eager", 0), ("lazy", 0), ("random", 1), ("random", 2))
SLOWEST_AND_RANDOM = SCHEDULES[1:3]  # all four and more: test_fields.py


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> Kernels:
    return Kernels({name: spec for name, (spec, _) in KERNELS.items()}, compiled)


def prove(kernel: Exported, case: Case, schedules: Any = SLOWEST_AND_RANDOM) -> None:
    for schedule, seed in schedules:
        result, out = run(kernel, case, schedule_name=schedule, seed=seed)
        assert result.report.clean, str(result.report)
        verdict = check(case, out)
        assert verdict.ok, f"{schedule}, seed {seed}: {verdict.summary()}"


# ---- numbers ----


# each of these switches is proven without the others in CI; pairs of them by prove-all
TOGETHER = (
    "static, pair", "stream-k, pair", "launch control, pair", "tma store, pair", "static, weights early", "split, pair",
    "pair, n 64", "pair, n 32", "single warp, pair",
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in TOGETHER else n for n in KERNELS])
def test_full_range_with_tails(kernels: Kernels, name: str) -> None:
    spec, (m, n, k) = KERNELS[name]
    operation = "dual_gemm" if spec.dual else "linear"
    assert legal(spec.config, Problem(m, n, k, operation=operation, out_dtype=DTYPES[spec.out])) is None
    prove(kernels[name], full_range_case(2, m, n, k, out_dtype=DTYPES[spec.out], linear=not spec.dual))


@pytest.mark.parametrize("which", ["gate", "up"])
def test_every_code_under_every_scale(kernels: Kernels, which: Any) -> None:
    """128 rows of x pick 128 of K; 128 weights of 8 blocks run through all 127 scales and all 16 codes."""
    prove(kernels["one CTA"], one_hot_case(3, 128, 128, 128, which=which), SCHEDULES[1:2])


@pytest.mark.parametrize("name", ["one CTA", "published", "linear"])
def test_exact_sums(kernels: Kernels, name: str) -> None:
    prove(kernels[name], exact_sum_case(4, 130, 72, 1056, linear=not KERNELS[name][0].dual), SCHEDULES[1:2])


@pytest.mark.parametrize("activation", [clamped_silu(1.5), swiglu_oai(), IDENTITY], ids=lambda a: a.name)
def test_activations(kernels: Kernels, activation: Any) -> None:
    prove(kernels["n 32"], full_range_case(5, 32, 32, 256, activation=activation), SCHEDULES[:1])


@pytest.mark.parametrize("name", ["n 32", "gate first", "static, pair", "linear", "split, pair", "stream-k"])
def test_batches_and_biases(kernels: Kernels, name: str) -> None:
    """Three products with their own global scales and biases, more than a persistent kernel's pairs."""
    spec = KERNELS[name][0]
    case = full_range_case(10, 40, 40, 288, batch=3, bias=True, linear=not spec.dual, out_dtype=DTYPES[spec.out])
    prove(kernels[name], case, SCHEDULES[2:3])


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_few_steps(kernels: Kernels, steps: int) -> None:
    """Fewer steps than stages, and than those whose gate products come first."""
    prove(kernels["published"], full_range_case(11, 20, 40, 256 * steps - 32), SCHEDULES[1:2])


@pytest.mark.parametrize("name", ["split", pytest.param("split, pair", marks=pytest.mark.long), "stream-k",
                                  pytest.param("stream-k, pair", marks=pytest.mark.long)])  # fmt: skip
def test_shared_sums_do_not_depend_on_who_is_last(kernels: Kernels, name: str) -> None:
    """The same bits under every schedule, each launch with the workspace that the one before left.

    Three tiles of three steps: 4 workers of stream-K, or 2 pairs, share some of them.
    """
    case = full_range_case(14, 40, 136, 544, out_dtype=DTYPES[KERNELS[name][0].out])
    first = workspace = None
    for schedule, seed in (*SCHEDULES, ("random", 3)):
        result, out = run(kernels[name], case, schedule_name=schedule, seed=seed, workspace=workspace)
        assert result.report.clean, str(result.report)
        assert check(case, out).ok
        first = out if first is None else first
        assert torch.equal(out.view(torch.int16), first.view(torch.int16))
        workspace = result.buffers["workspace"].view("int32")


@pytest.mark.parametrize(("name", "k"), [("stream-k", 512), ("stream-k, pair", 256)])
def test_more_workers_than_steps(kernels: Kernels, name: str, k: int) -> None:
    """Four CTAs for two steps, or two pairs for one: some have nothing to do."""
    prove(kernels[name], full_range_case(16, 20, 40, k, out_dtype=DTYPES[KERNELS[name][0].out]), SCHEDULES[1:3])


def test_a_ticket_that_stays_is_found(kernels: Kernels) -> None:
    """A planted fault: nobody is last in a second launch, so nothing is written."""
    spec, (m, n, k) = KERNELS["split"]
    case = full_range_case(14, m, n, k, out_dtype=DTYPES[spec.out])
    program = load(changed(kernels["split"].ptx, r"st\.global\.\w+\s+\[%rd\d+\], (0|%r\d+);", "", r"tcgen05\.relinquish"))
    result, out = run(kernels["split"], case, program=program)
    assert check(case, out, diagnose=False).ok
    _, out = run(kernels["split"], case, program=program, workspace=result.buffers["workspace"].view("int32"))
    assert not check(case, out, diagnose=False).ok


def gates(values: torch.Tensor, up: float) -> Case:
    """Outputs silu(value) * up in bfloat16, `[32, 32]`, each value representable by one product."""
    k = 256
    codes = torch.zeros((32, k // 2), dtype=torch.uint8)
    codes[:, 0] = 0x02  # 1.0 in the first element
    one = torch.full((32, k // 16), 1.0).to(torch.float8_e4m3fn)
    x = NVFP4Tensor(codes, one, torch.tensor(1.0))
    signs = torch.where(values < 0, 0x0A, 0x02).to(torch.uint8)
    gate_codes = codes.clone()
    gate_codes[:, 0] = signs
    gate = NVFP4Tensor(
        gate_codes, values.abs().unsqueeze(1).expand(32, k // 16).to(torch.float8_e4m3fn).contiguous(), torch.tensor(1.0)
    )
    return Case("gates", 0, x, gate, NVFP4Tensor(codes, one, torch.tensor(up)), out_dtype=torch.bfloat16)  # fmt: skip


def test_silu_of_large_gates(kernels: Kernels) -> None:
    """exp(-gate) overflows float32 below -88.7, where silu(gate) * up need not vanish; nothing may become NaN."""
    magnitudes = torch.tensor([1.0, 20, 64, 80, 88, 96, 104, 448]).repeat(2)
    values = torch.cat([magnitudes, -magnitudes])
    case = gates(values, 2.0**60)
    prove(kernels["n 64"], case, SCHEDULES[:1])
    _, out = run(kernels["n 64"], case)
    assert out.isfinite().all()
    assert bool((out[0, 16:21] < 0).all())


def test_products_of_global_scales_beyond_float32(kernels: Kernels) -> None:
    """2^66 * 2^66 overflows where the gate does not; 2^66 * 2^-149 takes a subnormal scale."""
    case = full_range_case(6, 16, 32, 256, out_dtype=torch.bfloat16, activation=IDENTITY)

    def least(t: NVFP4Tensor, exponent: int) -> NVFP4Tensor:
        scale = torch.full_like(t.linear_block_scale().view(torch.uint8), 1).view(torch.float8_e4m3fn)
        return NVFP4Tensor(t.codes, scale, torch.tensor(2.0**exponent, dtype=torch.float64).float())

    assert isinstance(case.x, NVFP4Tensor)
    assert case.up is not None
    case = replace(case, x=least(case.x, 66), gate=least(case.gate, 66), up=least(case.up, -149))
    prove(kernels["n 64"], case, SCHEDULES[:1])
    assert bool((run(kernels["n 64"], case)[1].abs() > 1).any())


def test_a_nan_scale_poisons_its_own_row_or_column(kernels: Kernels) -> None:
    case = full_range_case(7, 64, 64, 544)
    assert isinstance(case.x, NVFP4Tensor)
    x, gate = case.x.to_linear(), case.gate.to_linear()
    x.block_scale.view(torch.uint8)[5, 33] = 0x7F
    gate.block_scale.view(torch.uint8)[40, 0] = 0x7F
    _, out = run(kernels["n 32"], replace(case, x=x, gate=gate))
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[5], expected[:, 40] = True, True
    assert torch.equal(out.isnan(), expected)


# ---- what is loaded and compiled ----


def count(kernel: Exported, pattern: str) -> int:
    return len(re.findall(pattern, kernel.ptx))


def test_prefetches_are_of_scales_that_are_loaded_later(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each CTA prefetches what it loads of scales, once, but for the steps that the first stages hold."""
    fetched: list[Any] = []
    loaded: list[Any] = []
    load_tensor = tma._load_tensor

    def prefetch(context: Any, mods: Any) -> Any:
        mods.words.clear()
        maps, coordinates = tma._map_operand(context, context.operands(1, 4)[0], 4, "tile")

        def step(w: Any) -> None:
            ((lane, only),) = tma._lanes(w)  # one thread
            tensor = tma._fetch_map(w, tma.Issue(w, context, only), maps(w).tolist()[0], 4, "tile")
            fetched.append((w.warp.cta, id(tensor), *(int(w.r[tma.S][row][lane]) for row in coordinates)))

        return step

    def load_box(w: Any, issue: Any, target: Any, tensor: Any, at: list[int]) -> None:
        if len(at) == 4 and target.cta is w.warp.cta:  # of a multicast's copies one
            loaded.append((w.warp.cta, id(tensor), *at))
        load_tensor(w, issue, target, tensor, at)

    monkeypatch.setattr(tma, "_prefetch", prefetch)
    monkeypatch.setattr(tma, "_load_tensor", load_box)
    spec, (m, n, k) = KERNELS["static, weights early"]
    c = spec.config
    kernel = kernels["static, weights early"]
    run(kernel, full_range_case(13, m, n, k, out_dtype=DTYPES[spec.out]), program=load(kernel.ptx))
    later = Counter(entry for entry in loaded if entry[3] >= c.stages * c.tile_k // 64)
    assert Counter(fetched) == later
    assert len({entry[:2] for entry in fetched}) == 3 * PROCESSORS


@pytest.mark.parametrize("name", ["one CTA", "pair"])
def test_a_is_loaded_once(kernels: Kernels, name: str) -> None:
    """Bytes that arrive in shared memory: each stage once, and in it A once for both products."""
    spec, (_, _, k) = KERNELS[name]
    c = spec.config
    case = full_range_case(1, c.tile_m, c.tile_n, k, out_dtype=DTYPES[spec.out])
    result, _ = run(kernels[name], case, record=True)
    assert result.recording is not None
    events = [e for e in result.recording.timed().events if e.lane.name == "TMA loads" and e.bytes]
    steps = -(-k // c.tile_k)
    assert sum(e.bytes for e in events) == steps * c.ctas * c.stage_bytes()
    own = 128 * c.tile_k // 2
    weight = c.tile_n // c.ctas * c.tile_k // 2
    assert sum(e.bytes == own for e in events) == steps * c.ctas * (3 if weight == own else 1)


def test_compiled_for_the_cache(tmp_path: Path) -> None:
    """As `glu4 compile` would: one file, found by its key, with what a launch has to know."""
    spec = KERNELS["pair, n 64"][0]
    assert compile_missing([spec], tmp_path) == 1
    found = read(file_of(tmp_path, spec), spec)
    assert found is not None
    cubin, description = found
    assert resources(cubin) == (description["registers"], 0)
    assert (description["threads"], description["cluster"], description["pdl"]) == (192, [2, 1, 1], False)
    assert description["shared_bytes"] == spec.config.shared_bytes()
    assert description["params"].count(128) == 6  # tensor maps
    assert compile_missing([spec], tmp_path) == 0


def test_sm_103a(tmp_path: Path) -> None:
    """The same source compiles for the other architecture of the family, to the same instructions."""
    spec = replace(KERNELS["pair, n 64"][0], arch="sm_103a")
    (kernel,) = export([spec], tmp_path)
    assert ".target sm_103a" in kernel.ptx
    assert resources(kernel.cubin)[1] == 0
    assert count(kernel, r"tcgen05\.mma\.cta_group::2\.kind::mxf4nvf4\.block_scale\.block16") == 8


def test_a_kernel_that_the_compiler_refuses(tmp_path: Path) -> None:
    """M 64: the toolchain's own words."""
    with pytest.raises(UnsupportedError, match="compiling for the emulator failed") as caught:
        export([KernelSpec(Config(tile_m=64), "f16")], tmp_path)
    assert "expects the M-mode to be 128, but got 64" in str(caught.value)


# ---- faults ----


def changed(ptx: str, pattern: str, new: str, before: str | None = None, which: int = 0) -> str:
    """The PTX with one line's match replaced: the first, or the last ahead of the line that matches `before` for the which-th time."""
    lines = ptx.splitlines()
    end = len(lines) if before is None else [i for i, line in enumerate(lines) if re.search(before, line)][which]
    found = [i for i, line in enumerate(lines[:end]) if re.search(pattern, line)]
    at = found[0 if before is None else -1]
    lines[at] = re.sub(pattern, new, lines[at])
    return "\n".join(lines)


WAIT, PASSED = r"mbarrier\.try_wait\.parity\S*\s+(\w+), .*", r"setp.eq.u32 \1, 0, 0;"
TO_C = r"cp\.async\.bulk\.tensor\.3d\.global"
# kernel, what is changed, what it becomes, before which line, and what must be found
FAULTS = {
    "no wait for a full stage": ("one CTA", WAIT, PASSED, r"tcgen05\.cp", "missing wait"),
    "no wait for a free stage": ("one CTA", WAIT, PASSED, r"cp\.async\.bulk\.tensor", "missing wait"),
    "no wait for the accumulators": ("one CTA", WAIT, PASSED, r"tcgen05\.ld", "data race"),
    "no tcgen05.wait::ld": ("one CTA", r"tcgen05\.wait::ld.*", "", None, "missing wait"),
    "no commit of a stage": ("one CTA", r".*tcgen05\.commit.*", "", None, "deadlock"),
    "no commit of a pair's stage": ("pair", r".*tcgen05\.commit.*", "", None, "deadlock"),
    "scales of the columns beside": ("pair, n 64", r"(tcgen05\.mma.*, \[%\w+\], \[%\w+)\]", r"\1+1]", None, "numbers"),
    "scales of A for gate": ("one CTA", r"(tcgen05\.mma.*), \[(%\w+)\], \[%\w+\]", r"\1, [\2], [\2]", None, "numbers"),
    "no wait for the kernel in front": ("n 32", r"griddepcontrol\.wait.*", "", None, "data race"),
    "gate's sums are not done": ("gate first", WAIT, PASSED, r"tcgen05\.ld", "data race"),
    "no wait until the last tile's sums are read": ("static", WAIT, PASSED, r"tcgen05\.cp", "data race"),
    "no wait for the kernel in front before A": ("weights early", r"griddepcontrol\.wait.*", "", None, "data race"),
    "no wait for a buffer's last copy": ("tma store", r"cp\.async\.bulk\.wait_group\.read\s+1;", "", None, "missing wait"),
    "no barrier before a buffer is filled": ("tma store", r"bar\.sync\s+3, 128;", "", r"st\.shared\.v4", "missing wait"),
    "no barrier before C is copied": ("tma store", r"bar\.sync\s+3, 128;", "", TO_C, "data race"),
    "no proxy fence before C is copied": ("tma store", r"fence\.proxy\.async\.shared::cta;", "", None, "missing proxy fence"),
    "no wait for C's last copies": (
        "tma store", r"cp\.async\.bulk\.wait_group\.read\s+0;", "", None, "exit with work outstanding",
    ),
    "no barrier before the ticket": ("split", r"bar\.sync\s+3, 128;", "", r"atom\.acq_rel", "data race"),
    "a ticket without order": ("split", r"atom\.acq_rel", "atom.relaxed", None, "data race"),
    "no barrier before a worker's ticket": ("stream-k", r"bar\.sync\s+3, 128;", "", r"atom\.acq_rel", "data race"),
    "a worker's ticket without order": ("stream-k", r"atom\.acq_rel", "atom.relaxed", None, "data race"),
    "one warp, no wait for a full stage": ("single warp", WAIT, PASSED, r"tcgen05\.cp", "missing wait"),
    "gate's sum into up's": ("one CTA", r"(tcgen05\.mma\S+\s+\[%\w+)\]", r"\1+128]", None, "numbers"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(kernels: Kernels, fault: str) -> None:
    name, pattern, new, before, kind = FAULTS[fault]
    spec, _ = KERNELS[name]
    c = spec.config
    steps = 2 * c.stages + (c.schedule == "stream_k")  # no multiple of the workers
    case = full_range_case(8, c.tile_m, c.tile_n, 256 * steps, out_dtype=DTYPES[spec.out])
    program = load(changed(kernels[name].ptx, pattern, new, before))
    result, out = run(kernels[name], case, program=program, schedule_name="random", seed=1, max_instructions=300_000)
    found = {h.kind for h in result.report.hazards}
    if kind == "numbers":
        assert not check(case, out, diagnose=False).ok
    else:
        assert kind in found, str(result.report)


def test_one_warp_that_overtakes_its_products_is_found(kernels: Kernels) -> None:
    """No wait before the copies of the main loop, which follow those ahead of the first products, six of each."""
    case = full_range_case(8, 128, 64, 256 * 6)
    ptx = changed(kernels["single warp"].ptx, WAIT, PASSED, r"cp\.async\.bulk\.tensor", 6)
    result, _ = run(kernels["single warp"], case, program=load(ptx), schedule_name="random", seed=1, max_instructions=300_000)
    assert "missing wait" in {h.kind for h in result.report.hazards}, str(result.report)


LAUNCH_FAULTS = {
    "no wait for a response": (
        WAIT,
        PASSED,
        r"clusterlaunchcontrol\.query",
        {"missing wait", "data race", "uninitialised read"},
    ),
    "the row of the tile for its column": (r"get_first_ctaid::y", "get_first_ctaid::z", None, {"numbers"}),
}


@pytest.mark.parametrize("fault", LAUNCH_FAULTS)
def test_faults_of_taking_over_tiles_are_found(kernels: Kernels, fault: str) -> None:
    """Ten tiles, two CTAs at a time: most are taken over."""
    pattern, new, before, kinds = LAUNCH_FAULTS[fault]
    case = full_range_case(15, 130, 260, 256)
    program = load(changed(kernels["launch control"].ptx, pattern, new, before))
    result, out = run(kernels["launch control"], case, program=program, resident=2, max_instructions=300_000)
    found = {h.kind for h in result.report.hazards} | (set() if check(case, out, diagnose=False).ok else {"numbers"})
    assert found & kinds, str(result.report)


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_few_ctas_take_over_all_tiles(kernels: Kernels, resident: int) -> None:
    case = full_range_case(15, 130, 260, 256)
    result, out = run(kernels["launch control"], case, resident=resident, schedule_name="random", seed=1)
    assert result.report.clean, str(result.report)
    assert check(case, out).ok


def test_gate_and_up_exchanged(kernels: Kernels) -> None:
    case = full_range_case(9, 128, 128, 512)
    _, out = run(kernels["one CTA"], exchanged(case))
    verdict = check(case, out)
    assert not verdict.ok
    assert "the activation is applied to up instead of gate" in verdict.summary()
