"""Right results raise no alarm, whatever the order and hardware; each layer sees faults that the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from glu4 import IDENTITY, Activation, NVFP4Tensor
from glu4.verify import Case, check, check_backend, exact_sum_case, full_range_case, one_hot_case, random_cases
from glu4.verify import saturated_exact_case as saturated
from glu4.verify.case import Block


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- right results: simulated hardware ----


def perturbed(t: Tensor, ulps: float, gen: torch.Generator) -> Tensor:
    """float32 with random relative errors of up to `ulps` * 2^-24."""
    noise = torch.rand(t.shape, generator=gen, dtype=torch.float64) * 2 - 1
    return (t.double() * (1 + noise * ulps * 2.0**-24)).float()


def activate(act: Activation, g: Tensor, u: Tensor, gen: torch.Generator, approximate: bool) -> Tensor:
    """The activation in float32, by torch or as a GPU does it: ex2.approx and rcp.approx at their documented errors."""
    if act.kind == "identity":
        return g * u
    if act.limit != float("inf"):
        g, u = g.clamp(max=act.limit), u.clamp(-act.limit, act.limit)
    if act.beta:
        u = u + torch.tensor(act.beta)
    t = g * torch.tensor(act.alpha)
    if not approximate:
        return g * torch.sigmoid(t) * u
    e = perturbed(torch.exp2(t * torch.tensor(-1.4426950408889634)), 5, gen)
    return g * u * perturbed(1 / (1 + e), 3, gen)


def any_order(a: Tensor, b: Tensor, gen: torch.Generator) -> Tensor:
    """float32 sums in a random order of k: one product at a time, or in one to four parts by torch.matmul."""
    order = torch.randperm(a.shape[-1], generator=gen)
    a, b = a[:, order], b[:, order]
    parts = int(torch.randint(0, 5, (), generator=gen))
    if parts == 0:
        out = torch.zeros(a.shape[0], b.shape[0])
        for k in range(a.shape[1]):
            out = out + a[:, k, None] * b[None, :, k]
        return out
    cuts = [i * a.shape[1] // parts for i in range(parts + 1)]
    return sum((a[:, i:j] @ b[:, i:j].T for i, j in pairwise(cuts)), torch.zeros(a.shape[0], b.shape[0]))


def tensor_core(a: Tensor, b: Tensor, bits: int = 24, step: int = 16) -> Tensor:
    """Steps of 16 products and the accumulator, aligned to the largest and cut to `bits`; the sum cut too."""

    def cut(x: Tensor, largest: Tensor) -> Tensor:
        unit = torch.exp2(torch.frexp(largest).exponent.double() - bits)
        return torch.trunc(x / unit) * unit

    a, b = a.double(), b.double()
    acc = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    for k in range(0, a.shape[1], step):
        addends = torch.cat((a[:, None, k : k + step] * b[None, :, k : k + step], acc.unsqueeze(-1)), -1)
        total = cut(addends, addends.abs().amax(-1, keepdim=True)).sum(-1)
        acc = cut(total, total)
    return acc.float()


def sound(case: Case, gen: torch.Generator, hardware: str) -> Tensor:
    """A right output: any order of float32 additions, or a cutting tensor core; scales applied in any order."""
    rows, n = torch.Size(case.out_shape[:-1]).numel(), case.gate.rows
    out = torch.zeros(rows, n, dtype=case.out_dtype)

    def product(block: Block, w: NVFP4Tensor, bias: Tensor | None) -> Tensor:
        is_fp4 = isinstance(block.x, NVFP4Tensor)
        a = block.x.decode() if is_fp4 else block.x.float()
        acc = tensor_core(a, w.decode()) if hardware == "tensor core" else any_order(a, w.decode(), gen)
        gx, gw = block.x.global_scale if is_fp4 else torch.tensor(1.0), w.global_scale
        p = (acc * (gx * gw), acc * gx * gw, acc * gw * gx)[int(torch.randint(0, 3, (), generator=gen))]
        return p if bias is None else p + bias.float()

    for block in case.blocks():
        c = product(block, block.gate, block.gate_bias)
        if block.up is not None:
            u = product(block, block.up, block.up_bias)
            c = activate(case.activation, c, u, gen, bool(torch.randint(0, 2, (), generator=gen)))
        out[block.rows, block.cols] = c.to(case.out_dtype)
    return out.view(case.out_shape)


def alarms(seed: int, count: int) -> list[str]:
    gen = torch.Generator().manual_seed(seed)
    found = []
    for i, case in enumerate(random_cases(seed, count)):
        hardware = ("tensor core", "float32", "float32")[i % 3]
        verdict = check(case, sound(case, gen, hardware), diagnose=False)
        if not verdict.ok:
            found.append(f"{case.name} seed {case.seed} on {hardware}: {verdict.summary()}")
    return found


def test_no_alarm_in_300_right_results() -> None:
    assert alarms(1, 300) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [2, 5, *(pytest.param(s, marks=pytest.mark.long) for s in (6, 7))])
def test_no_alarm_in_10000_right_results(seed: int) -> None:
    """A quarter of them; CI does half."""
    assert alarms(seed, 2500) == []


@pytest.mark.parametrize("hardware", ["tensor core", "float32"])
def test_no_alarm_at_large_k(hardware: str) -> None:
    gen = torch.Generator().manual_seed(3)
    for seed in range(3):
        case = full_range_case(seed, 24, 24, 7168)
        verdict = check(case, sound(case, gen, hardware))
        assert verdict.ok, verdict.summary()


@pytest.mark.parametrize("hardware", ["tensor core", "float32"])
def test_exact_cases_are_exact_on_any_hardware(hardware: str) -> None:
    gen = torch.Generator().manual_seed(4)
    for seed in range(6):
        k = 32 << seed
        cases = [
            exact_sum_case(seed, 20, 24, k, x_format=("nvfp4", "float16", "bfloat16")[seed % 3]),
            exact_sum_case(seed, 20, 24, k, out_dtype=torch.bfloat16, linear=True),
            exact_sum_case(seed, 12, 24, k, group_sizes=[5, 0, 7]),
            saturated(seed, 20, 24, k),
            saturated(seed, 20, 24, k, batch=2),
            one_hot_case(seed, which="up"),
            one_hot_case(seed, x_format="bfloat16", out_dtype=torch.bfloat16),
        ]
        for case in cases:
            verdict = check(case, sound(case, gen, hardware))
            assert verdict.ok, f"{case.name}: {verdict.summary()}"
            assert verdict.stats["inexact"] == 0


# ---- each layer's own faults ----


def layers(case: Case, out: Tensor) -> set[str]:
    return {f.layer for f in check(case, out, diagnose=False).findings}


def preactivations(case: Case) -> tuple[Tensor, Tensor]:
    (block,) = case.blocks()
    g, u = block.preactivations()
    assert u is not None
    return g, u


def test_only_the_element_bound_sees_a_saturated_overflow() -> None:
    case = full_range_case(5, 32, 32, 128, activation=IDENTITY)
    big = Case(case.name, case.seed, case.x, case.gate, case.up, IDENTITY, up_bias=torch.full((32,), 3e5))
    right = big.expected()
    assert bool(right.isinf().any())
    assert layers(big, right) == set()
    assert layers(big, right.clamp(-65504, 65504)) == {"element"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_only_the_element_bound_sees_a_stray_non_finite_value(value: float) -> None:
    case = full_range_case(6, 32, 32, 128)
    out = case.expected()
    out[3, 4] = value
    assert layers(case, out) == {"element"}


def test_nan_of_the_specification_must_be_there() -> None:
    case = full_range_case(7, 16, 16, 64, x_format="float16")
    assert isinstance(case.x, Tensor)
    case.x[2, 5] = torch.nan
    right = case.expected()
    assert bool(right[2].isnan().all())
    assert layers(case, right) == set()
    wrong = right.clone()
    wrong[2] = 0
    assert layers(case, wrong) == {"element"}


@pytest.mark.parametrize("k", [2048, 7168])
def test_only_the_norms_see_a_second_16_bit_rounding(k: int) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        case = full_range_case(8, 48, 64, k, out_dtype=dtype)
        g, u = (t.to(dtype).double() for t in preactivations(case))
        out = (g * torch.sigmoid(g) * u).to(dtype)
        verdict = check(case, out, diagnose=False)
        assert not verdict.ok
        assert "norm" in [f.layer for f in verdict.findings]
        # 11 or 8 bits: the second rounding is well seen, and the bound of an element, 2.25 K u S, does not see it in float16
        assert verdict.stats["relative_error"] > 1.4 * verdict.stats["rounding_error"]
        if dtype == torch.float16:
            assert {f.layer for f in verdict.findings} == {"norm"}


def test_the_norms_see_a_coarse_sigmoid() -> None:
    # tanh.approx: relative error up to 2^-11; sigmoid(g) = (1 + tanh(g / 2)) / 2
    case = full_range_case(9, 64, 64, 1024)
    g, u = preactivations(case)
    gen = torch.Generator().manual_seed(0)
    noise = torch.rand(g.shape, generator=gen, dtype=torch.float64) * 2 - 1
    coarse = 0.5 + 0.5 * torch.tanh(g / 2) * (1 + noise * 2.0**-11)
    assert "norm" in layers(case, (g * coarse * u).half())


def test_only_the_row_norm_sees_one_row_rounded_twice() -> None:
    for seed in range(2):
        case = full_range_case(seed, 48, 1024, 1024)
        g, u = preactivations(case)
        out = case.expected()
        out[17] = (torch.nn.functional.silu(g[17].half().double()) * u[17].half().double()).half()
        verdict = check(case, out, diagnose=False)
        assert [f.layer for f in verdict.findings] == ["norm"]
        assert verdict.stats["frobenius"] < 1
        assert verdict.stats["ulp row"] > 1


def short_accumulator(case: Case, bits: int) -> Tensor:
    assert case.up is not None
    assert isinstance(case.x, NVFP4Tensor)
    g, u = (
        tensor_core(case.x.decode(), w.decode(), bits) * (case.x.global_scale * w.global_scale) for w in (case.gate, case.up)
    )
    return (g * u if case.activation == IDENTITY else activate(case.activation, g, u, torch.Generator(), False)).half()


@pytest.mark.parametrize("bits", [14, 18, 19])
def test_exact_cases_see_a_short_accumulator(bits: int) -> None:
    for case in (exact_sum_case(11, 32, 32, 1024), saturated(11, 32, 32, 1024)):
        assert "exact" in layers(case, short_accumulator(case, bits))


def test_only_exact_cases_see_the_last_bits() -> None:
    # 19 bits kept instead of 24: far below the float16 rounding of a random case
    random = full_range_case(11, 32, 32, 1024)
    assert layers(random, short_accumulator(random, 19)) == set()
    # one ulp in float32 is allowed to any order of additions, but not where every order is exact
    wide = exact_sum_case(12, 32, 32, 256, out_dtype=torch.float32)
    out = wide.expected()
    out[4, 9] = torch.nextafter(out[4, 9], torch.tensor(torch.inf))
    assert layers(wide, out) == {"exact"}


def test_one_hot_sees_one_wrong_weight_value() -> None:
    case = one_hot_case(13)
    out = case.expected()
    out[3, 40] = torch.nextafter(out[3, 40].float(), torch.tensor(torch.inf)).half() + out[3, 40].abs() * 2**-9
    assert "exact" in layers(case, out)


# ---- form, stats, reports ----


def test_wrong_shape_and_dtype_are_findings() -> None:
    case = full_range_case(14, 8, 16, 64)
    (finding,) = check(case, torch.zeros(8, 15).half()).findings
    assert finding.message == "the output has shape [8, 15], expected [8, 16]"
    (finding,) = check(case, torch.zeros(8, 16)).findings
    assert finding.message == "the output has dtype torch.float32, expected torch.float16"
    with pytest.raises(TypeError, match=r"output: expected a torch\.Tensor, got list"):
        check(case, [0.0])


def test_grouped_rows_beyond_the_last_offset_are_not_looked_at() -> None:
    case = full_range_case(15, 12, 16, 64, group_sizes=[5, 0, 7])
    assert case.group_offsets is not None
    fewer = Case(case.name, case.seed, case.x, case.gate, case.up, group_offsets=torch.tensor([0, 5, 5, 9], dtype=torch.int32))
    out = torch.full((12, 16), torch.nan).half()
    out[:9] = fewer.expected()
    assert fewer.out_shape == (9, 16)
    assert check(fewer, out).ok


def test_empty_output_is_right() -> None:
    case = full_range_case(16, 0, 16, 64)
    assert check(case, torch.zeros(0, 16).half()).ok


def test_report_and_summaries() -> None:
    cases = [full_range_case(seed, 8, 16, 64) for seed in range(3)]
    report = check_backend(lambda case: case.expected(), cases)
    assert report.ok
    assert report.summary() == "all 3 cases right"
    report = check_backend(lambda case: case.expected() * (1 if case.seed else 2), cases)
    assert not report.ok
    assert report.summary().startswith("1 of 3 cases wrong; first full_range 8x16x64 nvfp4 (seed 0): wrong: ")
    assert "right: relative error" in report.verdicts[1][1].summary()
