"""CUDA graphs, streams, threads, several devices and torch.compile, through the public functions."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import glu4
from glu4 import NVFP4Tensor
from glu4.verify.cases import full_range_case
from gpu import proofs
from gpu.harness import FORMATS, FORMS, Call, Operand, Target, assert_checked, same_bits, with_tokens


def copy_into(x: Operand, other: Operand) -> None:
    """`other`'s tokens where x's are."""
    if isinstance(x, NVFP4Tensor) and isinstance(other, NVFP4Tensor):
        for mine, its in ((x.codes, other.codes), (x.block_scale, other.block_scale), (x.global_scale, other.global_scale)):
            mine.copy_(its)
    elif isinstance(x, Tensor) and isinstance(other, Tensor):
        x.copy_(other)


def linear_scales(x: Operand) -> Operand:
    return x.to_linear() if isinstance(x, NVFP4Tensor) else x


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
@pytest.mark.parametrize("m", [1, 20, 200])
@pytest.mark.parametrize("x_format", FORMATS)
def test_a_graph_replays_with_changed_inputs(hopper: Target, x_format: str, m: int, linear: bool) -> None:
    case = full_range_case(8, m, 136, 144, x_format=x_format, linear=linear, bias=True)
    case = with_tokens(case, linear_scales(case.x))
    call = Call(hopper, case)
    out = torch.full((m, 136), float("nan"), dtype=torch.float16, device="cuda")
    call(out=out)  # the first call may load a kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out=out)
    for seed in (8, 9, 10):
        other = with_tokens(case, linear_scales(full_range_case(seed, m, 136, 144, x_format=x_format).x))
        copy_into(call.case.x, other.to("cuda").x)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        expected = Call(hopper, other)()
        assert same_bits(out, expected), f"replay with the tokens of seed {seed}"
        assert_checked(case, out) if seed == 8 else None


CAPTURE_FIRST = """
import sys
import torch
from glu4.verify.cases import full_range_case
from gpu.harness import HOPPER, Call, assert_checked
case = full_range_case(3, 37, 136, int(sys.argv[2]), x_format=sys.argv[1])
call = Call(HOPPER, case)
out = torch.full((37, 136), float("nan"), dtype=torch.float16, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    call(out=out)
graph.replay()
torch.cuda.synchronize()
assert_checked(case, out)
"""


@pytest.mark.parametrize(("x_format", "k"), [*((x, 144) for x in FORMATS), ("nvfp4", 128)])
def test_the_first_call_of_a_process_can_be_captured(
    hopper: Target, x_format: str, k: int, pytestconfig: pytest.Config
) -> None:
    command = [sys.executable, "-c", CAPTURE_FIRST, x_format, str(k)]
    done = subprocess.run(
        command, cwd=pytestconfig.rootpath / "tests", capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-1500:]


def test_side_streams_and_threads(hopper: Target) -> None:
    case = full_range_case(9, 60, 264, 1040, x_format="bfloat16", out_dtype=torch.bfloat16)
    call = Call(hopper, case)
    expected = call()
    assert_checked(case, expected)
    torch.cuda.synchronize()

    def work(_: int) -> list[Tensor]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [call() for _ in range(25)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(8)):
            assert all(same_bits(r, expected) for r in results)


def test_a_call_waits_for_its_stream(hopper: Target) -> None:
    """Tokens that are still being written by work queued before, on the call's own stream."""
    case = full_range_case(10, 64, 136, 208, x_format="float16")
    call = Call(hopper, case)
    expected, right = call(), call.case.x
    assert isinstance(right, Tensor)
    x, busy = torch.zeros_like(right), torch.randn(4096, 4096, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            busy = busy @ busy * 1e-3
        x.copy_(right)
        got = call(x)
        x.zero_()
    stream.synchronize()
    assert same_bits(got, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [1, 64, 300])
def test_chains_of_calls_wait_for_one_another(hopper: Target, m: int, form: str) -> None:
    """Each call reads what the one before wrote and writes what that one read; launches may overlap, results may not change."""
    case = full_range_case(14, m, 1040, 1040, x_format="float16", linear=True)
    first = case.x.to("cuda")
    assert isinstance(first, Tensor)
    gain = float(Call(hopper, case)().float().std() / first.float().std())
    call = Call(hopper, replace(case, gate=proofs.with_scale(case.gate, float(case.gate.global_scale) / gain)), form)

    def chain(wait: bool) -> list[Tensor]:
        buffers = [first.clone(), torch.zeros_like(first)]
        kept = []
        for i in range(24):
            call(buffers[i % 2], out=buffers[(i + 1) % 2])
            if wait:
                torch.cuda.synchronize()
            if i % 8 == 7:
                kept.append(buffers[(i + 1) % 2].clone())
        torch.cuda.synchronize()
        return kept

    expected = chain(wait=True)
    assert all(bool(t.isfinite().all()) and float(t.float().std()) > 0 for t in expected)
    for _ in range(10):
        assert all(same_bits(a, b) for a, b in zip(expected, chain(wait=False), strict=True))


def test_weights_packed_by_a_call_are_whole_before_it_reads_them(hopper: Target) -> None:
    for seed in range(20):
        case = full_range_case(seed, 8, 520, 2064, x_format="bfloat16")
        expected = Call(hopper, case)()
        for form in ("object", "tensors"):
            assert same_bits(Call(hopper, case, form)(), expected), f"seed {seed}, weights {form}"


def test_two_devices(hopper: Target) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = full_range_case(11, 33, 136, 208, x_format="float16")
    results = []
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        call = Call(Target("hopper", device, hopper.configs, full=True), case)
        results.append(call())  # the current device stays the first
        assert results[-1].device == torch.device(device)
        assert_checked(case, results[-1])
    assert same_bits(results[0].cpu(), results[1].cpu())


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_of_a_whole_graph(target: Target, compiler: str, linear: bool) -> None:
    if compiler == "inductor" and (target.device == "cpu" or shutil.which("cc") is None):
        pytest.skip("inductor is tried on a GPU, and needs a C compiler")
    case = full_range_case(12, 20, 136, 128, x_format="float16", linear=linear)
    call = Call(target, case)

    def model(x: Tensor) -> Tensor:
        return call(x * 2.0) + 1.0

    x = call.case.x
    assert isinstance(x, Tensor)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    assert same_bits(compiled(x), model(x))
    assert same_bits(compiled(x[:7]), model(x[:7]))


def test_the_backend_is_chosen_without_being_asked_for(hopper: Target) -> None:
    case = full_range_case(13, 17, 72, 208, x_format="bfloat16")
    call = Call(hopper, case)
    assert isinstance(call.weights, glu4.GatedWeights)
    assert same_bits(glu4.dual_gemm(call.case.x, call.weights, out_dtype=torch.float16), call())
