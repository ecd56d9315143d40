"""Launches on a Blackwell device made of Python (fake_blackwell): what is passed, what is copied, what is refused, host time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_blackwell import FakeBlackwell, compiled, fake_blackwell, values_of
from glu4 import NVFP4Tensor, quantize, reference
from glu4.activation import IDENTITY, SILU, clamped_silu, swiglu_oai
from glu4.backends.blackwell import launch
from glu4.backends.blackwell.config import Config
from glu4.backends.blackwell.spec import KernelSpec
from glu4.emulator.tensor_map import decode
from glu4.errors import UnsupportedError
from glu4.nvfp4 import _unchecked
from glu4.problem import GroupedProblem, Problem, dense_problem
from glu4.verify import Case, full_range_case

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBlackwell]:
    with fake_blackwell(monkeypatch) as fake:
        yield fake


def problem_of(case: Case) -> Problem:
    kwargs = {"dual": case.up is not None, "activation": case.activation, "out_dtype": case.out_dtype, "has_bias": False}
    return dense_problem(case.x, case.gate, **kwargs)


def run(case: Case, config: Config | None = None, out: Tensor | None = None) -> Tensor:
    weights = (case.gate,) if case.up is None else (case.gate, case.up)
    biases = (case.gate_bias, case.gate_bias if case.up is None else case.up_bias)
    target = torch.full(case.out_shape, torch.nan, dtype=case.out_dtype) if out is None else out
    launch.dense(target, case.x, weights, biases, case.activation, problem_of(case), config)
    return target


def expected(case: Case) -> Tensor:
    kwargs: dict[str, Any] = {"out_dtype": case.out_dtype}
    if case.up is None:
        return reference.linear(case.x, case.gate, bias=case.gate_bias, **kwargs)
    kwargs |= {"activation": case.activation, "gate_bias": case.gate_bias, "up_bias": case.up_bias}
    return reference.dual_gemm(case.x, case.gate, case.up, **kwargs)


# ---- results ----


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
def test_a_wrong_byte_would_give_a_wrong_result(cuda: FakeBlackwell, linear: bool, out_dtype: torch.dtype) -> None:
    case = full_range_case(1, 130, 72, 96, linear=linear, out_dtype=out_dtype, bias=True)
    assert torch.equal(run(case), expected(case))
    (made,) = cuda.made
    assert made.spec.out == {torch.float16: "f16", torch.bfloat16: "bf16"}[out_dtype]
    assert made.spec.dual is not linear
    assert (made.stream, made.device) == (7, -1)


CONFIGS = {
    "one CTA": Config(),
    "pair, static, pdl": Config(2, 256, 64, stages=3, schedule="static", pdl=True, early_weights=True),
    "launch control": Config(tile_n=64, schedule="launch_control"),
    "tma store": Config(tile_n=64, store="tma"),
    "split": Config(tile_n=64, split=2, tile_k=128),
    "stream-k": Config(tile_n=64, schedule="stream_k"),
    "single warp": Config(tile_n=64, warps="single"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_configuration(cuda: FakeBlackwell, name: str) -> None:
    case = full_range_case(2, 130, 72, 288, bias=True)
    assert torch.equal(run(case, CONFIGS[name]), expected(case))
    assert torch.equal(run(case, CONFIGS[name]), expected(case)), "a second launch uses the memory of the first"
    assert [made.spec.config for made in cuda.made] == [CONFIGS[name]] * 2
    clusters = {4: (CONFIGS[name].ctas, 1, 1)} if CONFIGS[name].ctas > 1 else {}
    assert [made.attributes for made in cuda.made] == [clusters] * 2, "weights are made here, so nothing may start early"


@pytest.mark.parametrize("activation", [SILU, clamped_silu(1.5), swiglu_oai(), IDENTITY], ids=lambda a: a.name)
def test_activations(cuda: FakeBlackwell, activation: Any) -> None:
    case = full_range_case(3, 5, 40, 64, activation=activation)
    assert torch.equal(run(case), expected(case))


@pytest.mark.parametrize("k", [16, 48, 80, 96, 1040])
@pytest.mark.parametrize("swizzled", [False, True])
def test_any_k(cuda: FakeBlackwell, k: int, swizzled: bool) -> None:
    """K beyond a multiple of 32 is padded; the padding of swizzled scales, here full of 448, must not count."""
    case = full_range_case(4, 9, 40, k)
    if swizzled:
        case = replace(case, x=poisoned(case.x), gate=poisoned(case.gate), up=poisoned(case.up))
    assert torch.equal(run(case), expected(case))
    assert values_of(cuda.made[0].spec, cuda.made[0].parameters).shape == (9, 40, -(-k // 32) * 32, 1)


def poisoned(x: Any) -> NVFP4Tensor:
    """Swizzled, with padding of another writer."""
    swizzled = x.to_swizzled()
    ours = swizzled.scale_layout.store(torch.ones_like(x.to_linear().block_scale, dtype=torch.uint8)).bool()
    stored = torch.where(ours, swizzled.block_scale.view(torch.uint8), 0x7E)
    return NVFP4Tensor.from_swizzled(x.codes, stored.view(torch.float8_e4m3fn), x.global_scale)


@pytest.mark.parametrize("each_x", [False, True])
@pytest.mark.parametrize("each_w", [False, True])
def test_batches(cuda: FakeBlackwell, each_x: bool, each_w: bool) -> None:
    """Global scales of each matrix, or one of all."""
    case = full_range_case(5, 20, 40, 96, batch=3, bias=True)
    x, gate, up = case.x, case.gate, case.up
    assert isinstance(x, NVFP4Tensor)
    assert up is not None
    if not each_x:
        x = NVFP4Tensor(x.codes, x.block_scale, x.global_scale[0].clone())
    if not each_w:
        gate, up = (NVFP4Tensor(w.codes, w.block_scale, w.global_scale[0].clone()) for w in (gate, up))
    case = replace(case, x=x, gate=gate, up=up)
    assert torch.equal(run(case), expected(case))
    assert len(cuda.made) == 1
    assert values_of(cuda.made[0].spec, cuda.made[0].parameters).flags & 6 == 2 * each_x + 4 * each_w


def test_one_weight_for_a_batch_of_tokens_is_a_launch_each(cuda: FakeBlackwell) -> None:
    case = full_range_case(6, 20, 40, 96, batch=3)
    case = replace(case, gate=case.gate[1], up=case.up[1])  # type: ignore[index]
    out = run(case)
    assert len(cuda.made) == 3
    assert torch.equal(out, expected(case))


# ---- what is copied ----


def test_operands_in_the_kernels_form_are_not_copied(cuda: FakeBlackwell) -> None:
    case = full_range_case(7, 130, 72, 96)
    ready = [launch.prepared(w) for w in (case.x, case.gate, case.up)]  # type: ignore[arg-type]
    assert all(launch.prepared(w) is w for w in ready)
    case = replace(case, x=ready[0], gate=ready[1], up=ready[2])
    run(case)
    maps = values_of(cuda.made[0].spec, cuda.made[0].parameters).maps
    assert [m.address for m in maps] == [t.data_ptr() for w in ready for t in (w.codes, w.block_scale)]


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_operands_at_odd_addresses_are_copied(cuda: FakeBlackwell, part: str) -> None:
    case = full_range_case(8, 130, 72, 96)
    x = launch.prepared(case.x)  # type: ignore[arg-type]
    source = x.codes if part == "codes" else x.block_scale.view(torch.uint8)
    moved = torch.zeros(source.numel() + 1, dtype=torch.uint8)[1:].view(source.shape)
    moved.copy_(source)
    odd = NVFP4Tensor.from_swizzled(moved if part == "codes" else x.codes, x.block_scale if part == "codes" else
                                    moved.view(torch.float8_e4m3fn), x.global_scale)  # fmt: skip
    case = replace(case, x=odd)
    assert torch.equal(run(case), expected(case))


@pytest.mark.parametrize("store", ["direct", "tma"])
def test_outputs_of_any_strides(cuda: FakeBlackwell, store: str) -> None:
    case = full_range_case(9, 33, 40, 64)
    config = Config(tile_n=64, store=store)
    right = torch.full((33, 48), 3.0, dtype=torch.float16)[:, :40]
    odd = torch.full((33, 41), 3.0, dtype=torch.float16)[:, 1:]
    turned = torch.full((40, 33), 3.0, dtype=torch.float16).t()
    for out in (right, odd, turned):
        assert torch.equal(run(case, config, out), expected(case))
    written = [values_of(made.spec, made.parameters).out for made in cuda.made]
    assert written[0] == right.data_ptr()
    assert (written[1] == odd.data_ptr()) == (store == "direct"), "TMA stores need rows at multiples of 16 bytes"
    assert written[2] != turned.data_ptr()


def test_a_single_row_of_any_stride(cuda: FakeBlackwell) -> None:
    """Its stride means nothing, but a tensor map holds one."""
    case = full_range_case(9, 1, 40, 64, batch=2)
    out = torch.full((2, 1, 48), 3.0, dtype=torch.float16).as_strided((2, 1, 40), (48, 41, 1))
    assert torch.equal(run(case, Config(tile_n=64, stages=2, store="tma"), out), expected(case))
    assert values_of(cuda.made[0].spec, cuda.made[0].parameters).out == out.data_ptr()


def test_an_empty_output_launches_nothing(cuda: FakeBlackwell) -> None:
    case = full_range_case(9, 4, 40, 64)
    launch.dense(torch.empty(0, 40), case.x, (case.gate,), (None, None), SILU, problem_of(case))  # type: ignore[arg-type]
    assert not cuda.made


def test_programmatic_launch_waits_where_operands_are_made_just_before(cuda: FakeBlackwell) -> None:
    case = full_range_case(10, 20, 40, 96)
    config = Config(tile_n=64, pdl=True, early_weights=True)
    run(case, config)
    ready = replace(case, gate=launch.prepared(case.gate), up=launch.prepared(case.up))  # type: ignore[arg-type]
    run(ready, config)
    assert [6 in made.attributes for made in cuda.made] == [False, True]


def test_threads_have_launches_of_their_own(cuda: FakeBlackwell) -> None:
    """Two at once: a launch reads its memory some time after it was filled."""
    cases = [full_range_case(20 + i, 20, 40, 96) for i in range(4)]
    results: dict[int, Tensor] = {}
    cuda.pause = 0.02

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = run(cases[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(results[i], expected(cases[i])) for i in range(4))


# ---- refusals ----


def form(seed: int = 11) -> tuple[NVFP4Tensor, NVFP4Tensor, NVFP4Tensor]:
    case = full_range_case(seed, 130, 72, 96)
    x, gate, up = (launch.prepared(w) for w in (case.x, case.gate, case.up))  # type: ignore[arg-type]
    return x, gate, up


def submit(x: NVFP4Tensor, gate: NVFP4Tensor, up: NVFP4Tensor, out: Tensor, config: Config) -> None:
    problem = Problem(130, 72, 96, out_dtype=torch.float16)
    launch.submit(launch.choice(problem, out, config), out, x, (gate, up), (None, None), SILU)


def test_operands_that_are_not_in_the_kernels_form_are_refused(cuda: FakeBlackwell) -> None:
    x, gate, up = form()
    out = torch.empty(130, 72, dtype=torch.float16)
    narrow = full_range_case(11, 130, 72, 48).x
    assert isinstance(narrow, NVFP4Tensor)
    wide = torch.zeros(72, 64, dtype=torch.uint8)[:, :48]
    off = torch.zeros(up.codes.numel() + 4, dtype=torch.uint8)[4:].view(up.codes.shape)
    apart = gate.block_scale.view(torch.uint8).repeat_interleave(2, 1)[:, ::2].view(torch.float8_e4m3fn)
    assert not apart.is_contiguous()
    for bad, message in (
        ((x.to_linear(), gate, up), r"x: the kernel reads block scales in 128x4 layout; use to_swizzled\(\)"),
        ((narrow.to_swizzled(), gate, up), r"x: rows of codes must be 32 bytes apart, dense otherwise .*got strides \[24, 1\] of "
         r"shape \[130, 24\]; use with_aligned_rows\(\)"),
        ((x, NVFP4Tensor.from_swizzled(wide, gate.block_scale, gate.global_scale), up), r"gate: rows of codes must be 48 bytes"),
        ((x, gate, NVFP4Tensor.from_swizzled(off, up.block_scale, up.global_scale)),
         "up: codes must begin at a multiple of 16 bytes, got address 0x"),
        ((x, _unchecked(gate.codes, apart, gate.global_scale), up), "gate: block scales must be contiguous"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            submit(*bad, out, Config())
    assert not cuda.made


def test_outputs_that_cannot_be_written_are_refused(cuda: FakeBlackwell) -> None:
    operands = form()
    with pytest.raises(ValueError, match=r"out: elements of a row must be side by side, got strides \[1, 130\]"):
        submit(*operands, torch.empty(72, 130, dtype=torch.float16).t(), Config())
    odd = torch.empty(130, 73, dtype=torch.float16)[:, 1:]
    with pytest.raises(ValueError, match=r'out: store "tma" needs rows that begin at multiples of 16 bytes, got address'):
        submit(*operands, odd, Config(stages=2, store="tma"))
    assert not cuda.made


def test_a_wrong_architecture_or_configuration_is_refused_before_any_launch(
    cuda: FakeBlackwell, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = torch.empty(130, 72, dtype=torch.float16)
    problem = Problem(130, 72, 96, out_dtype=torch.float16)
    with pytest.raises(
        UnsupportedError, match="no Blackwell kernel for this problem: tile_m 64: a block-scaled MMA of one CTA"
    ):
        launch.choice(problem, out, Config(tile_m=64))
    with pytest.raises(UnsupportedError, match="float16 activations: the block-scaled MMA takes 4-bit operands on both sides"):
        launch.choice(replace(problem, x_format="float16"), out)
    with pytest.raises(UnsupportedError, match="float32 output: the kernel writes float16 or bfloat16"):
        launch.choice(replace(problem, out_dtype=torch.float32), out)
    monkeypatch.setattr(launch, "architecture", lambda device: None)
    with pytest.raises(
        UnsupportedError, match=r"Blackwell kernels need a GPU of compute capability 10.0 or 10.3, and this is cpu"
    ):
        launch.choice(problem, out)
    assert launch.refusal(problem, CPU) == "needs a GPU of compute capability 10.0 or 10.3"
    assert not cuda.made


def test_grouped_problems_are_refused(cuda: FakeBlackwell) -> None:
    assert launch.refusal(GroupedProblem(1, 2, 8, 48), CPU) is None
    assert "float16 activations" in str(launch.refusal(GroupedProblem(1, 2, 8, 32, "float16"), CPU))


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_without_kernels_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    with fake_blackwell(monkeypatch, found=lambda spec: None, arch=arch):
        out = torch.empty(130, 72, dtype=torch.float16)
        for config in (None, Config()):
            with pytest.raises(
                UnsupportedError, match=f"no compiled Blackwell kernel for this problem; run glu4 compile --arch {arch}"
            ):
                launch.choice(Problem(130, 72, 96, out_dtype=torch.float16), out, config)
        assert not launch.available(True, torch.float16, CPU)


def test_driver_errors_are_raised(cuda: FakeBlackwell) -> None:
    case = full_range_case(12, 20, 40, 96)
    cuda.failures["cuTensorMapEncodeTiled"] = 1
    with pytest.raises(RuntimeError, match=r"cuTensorMapEncodeTiled of \(96, 20, 1\) with strides .* failed: CUDA_ERROR_FAKE"):
        run(case)
    cuda.failures["cuLaunchKernelEx"] = 719
    with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx failed: CUDA_ERROR_FAKE \(719\)"):
        run(case)
    assert torch.equal(run(case), expected(case))


def test_a_kernel_that_takes_other_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(spec: KernelSpec) -> Any:
        found = compiled(spec)
        assert found is not None
        return found[0], {**found[1], "params": found[1]["params"][1:]}

    with fake_blackwell(monkeypatch, found=older), pytest.raises(RuntimeError, match="the kernel takes parameters of"):
        run(full_range_case(12, 20, 40, 96))


# ---- which kernel ----


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_shipped_kernels_are_all_that_the_dispatch_can_choose(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    with fake_blackwell(monkeypatch, arch=arch):
        shipped = set(launch.shipped(arch=arch))
        assert {spec.arch for spec in shipped} == {arch}
        for dual in (True, False):
            assert set(launch.shipped(dual, arch)) == {s for s in shipped if s.dual is dual}
            for out in (torch.float16, torch.bfloat16):
                operation = "dual_gemm" if dual else "linear"
                for m in (1, 64, 200, 4096, 65536):
                    for n, k in ((8, 16), (101, 48), (4096, 7168), (512, 256)):
                        problem = Problem(m, n, k, operation=operation, out_dtype=out)
                        assert launch.choice(problem, torch.empty(1, dtype=out)).spec in shipped


def test_only_kernels_that_are_there_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(256, 4096, 7168, out_dtype=torch.float16)
    out = torch.empty(1, dtype=torch.float16)
    with fake_blackwell(monkeypatch):
        best = launch.choice(problem, out).spec
    with fake_blackwell(monkeypatch, found=lambda s: None if s == best else compiled(s)):
        other = launch.choice(problem, out).spec
        assert other != best
        assert launch.available(True, torch.float16, CPU)
    with fake_blackwell(monkeypatch, found=lambda s: compiled(s) if s.out == "bf16" else None):
        assert not launch.available(True, torch.float16, CPU)
        assert launch.available(True, torch.bfloat16, CPU)


def test_load_makes_every_kernel_ready(cuda: FakeBlackwell) -> None:
    x, gate, up = form()
    launch.load(True, gate)
    assert cuda.calls.count("cuLibraryLoadData") == len(launch.shipped(True))
    before = cuda.calls.count("cuLibraryLoadData")
    out = torch.empty(130, 72, dtype=torch.bfloat16)
    launch.dense(out, x, (gate, up), (None, None), SILU, Problem(130, 72, 96))
    assert cuda.calls.count("cuLibraryLoadData") == before


# ---- repeated launches ----


def test_a_launch_after_the_first_encodes_no_map(cuda: FakeBlackwell) -> None:
    case = full_range_case(13, 130, 72, 96)
    run(case)
    before = cuda.calls.count("cuTensorMapEncodeTiled")
    other = full_range_case(14, 130, 72, 96)
    assert torch.equal(run(other), expected(other))
    assert cuda.calls.count("cuTensorMapEncodeTiled") == before
    first, second = ([decode(p).address for p in made.parameters if len(p) == 128] for made in cuda.made)
    assert first != second


def test_quantized_tokens_need_no_copy(cuda: FakeBlackwell) -> None:
    """`quantize(..., layout="swizzled")` gives the kernel's form for K beyond a multiple of 64."""
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(1))
    made = quantize(x, layout="swizzled")
    assert launch.prepared(made) is made
