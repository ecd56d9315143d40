"""W4A4 through both of its ways, tokens decoded by the kernel that multiplies and ahead of it: values, bits, memory, order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fake_hopper import fake_hopper
from glu4 import NVFP4Tensor
from glu4.backends.hopper import launch, tokens
from glu4.backends.hopper.config import SHIPPED, Config
from glu4.verify.case import Case
from glu4.verify.cases import exact_sum_case, full_range_case
from gpu import proofs, w4a4
from gpu.conftest import _ON_HOPPER
from gpu.harness import HOPPER, PORTABLE, Call, Operand, Target, assert_checked, same_bits

FAKE = Target("hopper", "cpu", SHIPPED, full=False)
TARGETS = [
    pytest.param(PORTABLE, id="portable"),
    pytest.param(FAKE, id="fake"),
    pytest.param(HOPPER, id="hopper", marks=_ON_HOPPER),
]
# several of the steps that one warp decodes and more than all stages hold; one step; half of one; a last step of one unit
KS = (64, 128, 192, 1088, 3328)


@pytest.fixture(params=TARGETS)
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """The Hopper backend on its GPU, and on a device made of Python; and the portable one."""
    target: Target = request.param
    if target is not FAKE:
        yield target
        return
    with fake_hopper(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield target


def configs_of(target: Target) -> tuple[Config | None, ...]:
    """The choice of the dispatch, and what decodes tokens itself."""
    return (None,) if target is PORTABLE else (None, *w4a4.OWN)


def bits_case(target: Target, m: int, n: int, k: int, linear: bool = False) -> Case:
    """A case whose bits show the order of additions; on a CPU one that any order gives."""
    make = full_range_case if target.full else exact_sum_case
    return make(5, m, n, k, x_format="nvfp4", linear=linear)


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
def test_exact_sums_in_every_form(anywhere: Target, linear: bool) -> None:
    for k in anywhere.some((*KS, 80, 208), 4):
        case = exact_sum_case(k, 66, 72, k, x_format="nvfp4", linear=linear)
        ms = (1, 2, 7, 8, 9, 16, 23, 66) if anywhere.full else (1, 9)
        configs = dict.fromkeys((*configs_of(anywhere), *anywhere.some(anywhere.configs)))
        w4a4.exact_in_every_form(anywhere, tuple(configs), case, ms)


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
def test_exact_sums_for_every_m(anywhere: Target, linear: bool) -> None:
    proofs.exact_for_every_m(anywhere, configs_of(anywhere), "nvfp4", linear, anywhere.some(range(1, 301), 5), 192)


def test_one_hot_weights_show_every_decoded_token(anywhere: Target) -> None:
    configs = dict.fromkeys((*configs_of(anywhere), *anywhere.some(anywhere.configs)))
    w4a4.decodes_every_token(anywhere, tuple(configs), anywhere.some((64, 128, 320, 16, 80, 1040), 3))


def with_far_scales(case: Case) -> Case:
    """Block scales of the tokens that are subnormal, small or the largest: 2^-7 of many values is subnormal in fp16, beside sums
    of which a tensor core then truncates as much as can be."""
    assert isinstance(case.x, NVFP4Tensor)
    far = torch.tensor([0x01, 0x02, 0x05, 0x07, 0x08, 0x11, 0x30, 0x7E], dtype=torch.uint8)
    shape = case.x.linear_block_scale().shape
    drawn = far[torch.randint(0, len(far), shape, generator=torch.Generator().manual_seed(case.seed))]
    return replace(case, x=NVFP4Tensor(case.x.codes, drawn.view(torch.float8_e4m3fn), case.x.global_scale))


@pytest.mark.parametrize("scales", ["drawn", "far"])
@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
def test_every_form_gives_the_bits_of_decoded_tokens(anywhere: Target, linear: bool, scales: str) -> None:
    for m, k in anywhere.some([(1, 64), (7, 7168), (8, 1088), (8, 1040), (20, 2048), (130, 2048)], 2):
        case = bits_case(anywhere, m, 264 if anywhere.full else 72, k if anywhere.full else min(k, 192), linear)
        case = with_far_scales(case) if scales == "far" and anywhere.full else case
        w4a4.same_bits_in_every_form(anywhere, anywhere.configs, replace(case, out_dtype=torch.bfloat16))


def test_the_whole_range_for_every_m_to_40(anywhere: Target) -> None:
    case = full_range_case(300, 40, 72, 192, x_format="nvfp4", bias=True)
    proofs.right_for_every_m(anywhere, case, anywhere.some(range(1, 41), 3))


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
def test_outputs_are_written_whole_and_nothing_else_is(anywhere: Target, linear: bool) -> None:
    def place(form: str) -> Callable[[Operand], Operand]:
        return lambda x: w4a4.formed(x, form) if isinstance(x, NVFP4Tensor) else x

    for config in configs_of(anywhere):
        for form in ("linear", "swizzled"):  # NaN scales are around both, and codes
            proofs.writes_all_and_no_more(anywhere, config, "nvfp4", linear, 320, place(form))


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
def test_extreme_global_scales(anywhere: Target, linear: bool) -> None:
    proofs.right_with_extreme_scales(anywhere, "nvfp4", linear, 192)


@pytest.mark.parametrize("linear", [False, True], ids=["dual_gemm", "linear"])
def test_rows_and_columns_do_not_depend_on_the_others(anywhere: Target, linear: bool) -> None:
    case = bits_case(anywhere, 70, 264 if anywhere.full else 72, 2048 if anywhere.full else 192, linear)
    for config in configs_of(anywhere)[-1:]:
        proofs.rows_do_not_depend_on_m(anywhere, config, case)
        proofs.columns_do_not_depend_on_n(anywhere, config, case)


@pytest.mark.parametrize("form", ["linear", "linear, codes at 4 bytes", "swizzled", "codes at 1 byte, by torch"])
@pytest.mark.parametrize(("m", "k"), [(5, 128), (5, 144), (70, 128)])
def test_batches(anywhere: Target, m: int, k: int, form: str) -> None:
    w4a4.right_in_batches(anywhere, full_range_case(3, m, 72, k, batch=3, x_format="nvfp4", bias=False), form)


def test_many_tokens_are_decoded_ahead(anywhere: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many CTAs as several waves of them, and a ragged last one."""
    if anywhere.backend == "portable":  # kernels may be there all the same
        monkeypatch.setattr(tokens, "decoder", lambda: None)
    m, k = (3001, 7184) if anywhere.full else (131, 208)
    case = full_range_case(1, m, 8, k, x_format="nvfp4")
    assert isinstance(case.x, NVFP4Tensor)
    expected = case.x.decode(torch.float16)
    here = case.x.to(anywhere.device)
    index = here.codes.get_device()
    for x in (here, here.to_swizzled(), w4a4.formed(here, "linear, scales at 1 byte")):
        got = tokens.prepared(x, False, index)
        assert isinstance(got, Tensor)
        assert same_bits(got.cpu(), expected)


# ---- on a GPU ----


def forms_of(case: Case) -> dict[str, NVFP4Tensor]:
    """A case's tokens on the GPU for either way."""
    assert isinstance(case.x, NVFP4Tensor)
    x = case.x.to("cuda")
    return {"own": x.to_linear(), "ahead": x.to_swizzled()}


@pytest.mark.parametrize("way", ["own", "ahead"])
@pytest.mark.parametrize("m", [1, 8, 33])
def test_the_same_bits_fifty_times_beside_other_work(hopper: Target, m: int, way: str) -> None:
    stream, a = torch.cuda.Stream(), torch.randn(1536, 1536, device="cuda")
    result = torch.empty_like(a)

    def queue() -> None:
        with torch.cuda.stream(stream):
            torch.mm(a, a, out=result)

    case = full_range_case(4, m, 264, 7168, x_format="nvfp4")
    case = replace(case, x=forms_of(case)[way])
    torch.cuda.synchronize()
    for config in configs_of(hopper):
        proofs.same_bits_every_time(hopper, config, case, 50, queue)


@pytest.mark.parametrize("way", ["own", "ahead"])
@pytest.mark.parametrize("m", [1, 8, 64, 300])
def test_a_call_waits_for_its_stream(hopper: Target, m: int, way: str) -> None:
    """Tokens that are still being written by work queued before, and written again right after."""
    case = full_range_case(10, m, 136, 1088, x_format="nvfp4")
    call = Call(hopper, case)
    right = forms_of(case)[way]
    expected = call(right)
    assert_checked(case, expected)
    x = right._map(torch.clone)
    zeros = right._map(torch.zeros_like)
    stream, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            x.codes.copy_(zeros.codes)
            x.global_scale.copy_(zeros.global_scale)
            busy = busy @ busy * 1e-3
            for mine, its in ((x.codes, right.codes), (x.block_scale, right.block_scale), (x.global_scale, right.global_scale)):
                mine.copy_(its)
            got = call(x)
            x.codes.zero_()
            assert same_bits(got, expected)


@pytest.mark.parametrize("way", ["own", "ahead"])
@pytest.mark.parametrize("m", [1, 8, 64, 300])
def test_calls_one_after_the_other_do_not_disturb_one_another(hopper: Target, m: int, way: str) -> None:
    """Launches may overlap: a decoder and the kernel of the call before, and memory of decoded tokens that is used again."""
    cases = [full_range_case(seed, m, 520, 2048, x_format="nvfp4") for seed in range(4)]
    calls = [Call(hopper, case) for case in cases]
    xs = [forms_of(case)[way] for case in cases]
    expected = []
    for call, x in zip(calls, xs, strict=True):
        expected.append(call(x))
        torch.cuda.synchronize()
    for case, out in zip(cases, expected, strict=True):
        assert_checked(case, out)
    outs = [torch.empty_like(expected[0]) for _ in range(200)]
    torch.cuda.synchronize()
    for i, out in enumerate(outs):
        calls[i % 4](xs[i % 4], out=out)
    torch.cuda.synchronize()
    assert all(same_bits(out, expected[i % 4]) for i, out in enumerate(outs))


@pytest.mark.parametrize("way", ["own", "ahead"])
@pytest.mark.parametrize("m", [1, 8, 64])
def test_a_graph_replays_with_changed_inputs(hopper: Target, m: int, way: str) -> None:
    case = full_range_case(8, m, 136, 192, x_format="nvfp4", bias=True)
    call, x = Call(hopper, case), forms_of(case)[way]
    out = torch.full((m, 136), float("nan"), dtype=torch.float16, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(x, out=out)
    for seed in (8, 9, 10):
        other = forms_of(full_range_case(seed, m, 136, 192, x_format="nvfp4"))[way]
        for mine, its in ((x.codes, other.codes), (x.block_scale, other.block_scale), (x.global_scale, other.global_scale)):
            mine.copy_(its)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(out, call(other)), f"replay with the tokens of seed {seed}"


def test_the_kernels_of_both_ways_are_compiled(hopper: Target) -> None:
    """Without them the proofs here would pass by other kernels."""
    assert tokens.decoder() is not None
    for dual in (True, False):
        for out in (torch.float16, torch.bfloat16):
            for config in w4a4.OWN:
                chosen = launch._choice(config, 1, 8, tokens.NVFP4, out, dual)
                assert chosen is not None
                assert chosen.nvfp4


# ---- planted faults ----


def _wrong_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder takes swizzled scales for linear ones."""
    right = tokens._decoded

    def decoded(x: NVFP4Tensor, index: int) -> Tensor:
        if x.is_swizzled:
            flat = x.block_scale.view(torch.uint8).flatten()[: x.codes.numel() // 8]
            flat = torch.where(flat == w4a4.NAN_SCALE, 0, flat)
            x = NVFP4Tensor(x.codes, flat.view(*x.codes.shape[:-1], -1).view(torch.float8_e4m3fn), x.global_scale)
        return right(x, index)

    monkeypatch.setattr(tokens, "_decoded", decoded)


def _one_block_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's last block is not written."""
    right = tokens._decoded

    def decoded(x: NVFP4Tensor, index: int) -> Tensor:
        out = right(x, index)
        out.view(-1, 16)[-1] = 0
        return out

    monkeypatch.setattr(tokens, "_decoded", decoded)


def _batch_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of a batch that decodes itself reads the first matrix."""
    right = tokens.source
    monkeypatch.setattr(launch, "source", lambda x, item=None: right(x, item if isinstance(x, Tensor) or item is None else 0))


PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = [
    (_wrong_scales, lambda: w4a4.exact_in_every_form(FAKE, (None,), exact_sum_case(1, 9, 40, 128, x_format="nvfp4"), (9,))),
    (_wrong_scales, lambda: w4a4.decodes_every_token(FAKE, (None,), (64,))),
    (_wrong_scales, lambda: w4a4.same_bits_in_every_form(FAKE, SHIPPED[:1], exact_sum_case(1, 9, 40, 128, x_format="nvfp4"))),
    (_one_block_short, lambda: w4a4.decodes_every_token(FAKE, SHIPPED[1:2], (80,))),
    (_batch_of_the_first, lambda: w4a4.right_in_batches(FAKE, full_range_case(3, 5, 40, 128, batch=3), "linear")),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "proof"), PLANTED, ids=[f"{i}-{f.__name__.strip('_')}" for i, (f, _) in enumerate(PLANTED)])
def test_a_planted_fault_fails_its_proof(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None], proof: Callable[[], None]
) -> None:
    with fake_hopper(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        proof()
        fault(monkeypatch)
        with pytest.raises(AssertionError):
            proof()
