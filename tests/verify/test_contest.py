"""The public problems' data: forms, distribution, generator order, and what the cases beside it hold."""

from __future__ import annotations

import pytest
import torch

from glu4 import reference
from glu4.nvfp4 import NVFP4Tensor, unpack_codes
from glu4.scale_layout import SwizzledLayout
from glu4.verify import contest
from glu4.verify.contest import DualData, DualShape, GroupData, GroupShape

SHAPE = DualShape(256, 128, 512)
BATCHED = DualShape(128, 256, 256, batch=3)
RAGGED = GroupShape(((40, 128, 256), (200, 72, 320)))
DUAL_MAKERS = (contest.public_dual, contest.full_range_dual, contest.exact_dual)
GROUP_MAKERS = (contest.public_group, contest.full_range_group, contest.exact_group)


def raw(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


def same(x: NVFP4Tensor, y: NVFP4Tensor) -> bool:
    return torch.equal(x.codes, y.codes) and torch.equal(raw(x.block_scale), raw(y.block_scale))


def test_the_listed_shapes_are_those_of_the_problems():
    assert len(contest.DUAL_TESTS) == len(contest.GROUP_TESTS) == 10
    assert contest.DUAL_TESTS[0] == contest.DUAL_TESTS[2] == DualShape(1536, 512, 7168)
    assert all(s.k % 256 == 0 and s.m % 128 == 0 and s.n % 128 == 0 for s in contest.DUAL_TESTS + contest.DUAL_BENCHMARKS)
    assert [sum(m for m, _, _ in s.sizes) for s in contest.GROUP_BENCHMARKS] == [1024, 1024, 512, 512]
    # sums of m * n * k, taken from the problems' task.yml apart from this code
    dual = [sum(s.m * s.n * s.k for s in shapes) for shapes in (contest.DUAL_TESTS, contest.DUAL_BENCHMARKS)]
    group = [
        sum(m * n * k for s in shapes for m, n, k in s.sizes) for shapes in (contest.GROUP_TESTS, contest.GROUP_BENCHMARKS)
    ]
    assert dual == [75_296_145_408, 37_044_092_928]
    assert group == [537_919_488, 54_760_833_024]


@pytest.mark.parametrize("make", DUAL_MAKERS)
@pytest.mark.parametrize("shape", [SHAPE, BATCHED], ids=str)
def test_the_dual_tuple_has_the_stated_shapes_strides_and_dtypes(make, shape):
    m, n, k, batch = shape.m, shape.n, shape.k, shape.batch
    data = make(shape, 7).as_tuple()
    assert len(data) == 10
    for tensor, rows in zip(data[:3], (m, n, n)):
        assert tensor.dtype == torch.float4_e2m1fn_x2
        assert (tuple(tensor.shape), tensor.stride()) == ((rows, k // 2, batch), (k // 2, 1, rows * k // 2))
    for tensor, rows in zip(data[3:6], (m, n, n)):
        assert tensor.dtype == torch.float8_e4m3fn
        assert (tuple(tensor.shape), tensor.stride()) == ((rows, k // 16, batch), (k // 16, 1, rows * k // 16))
    for tensor, rows in zip(data[6:9], (m, n, n)):
        rest, rest_k = -(-rows // 128), -(-k // 64)
        assert tensor.dtype == torch.float8_e4m3fn
        assert tuple(tensor.shape) == (32, 4, rest, 4, rest_k, batch)
        assert tensor.stride() == (16, 4, rest_k * 512, 1, 512, rest * rest_k * 512)
    c = data[9]
    assert (c.dtype, tuple(c.shape), c.stride()) == (torch.float16, (m, n, batch), (n, 1, m * n))


@pytest.mark.parametrize("make", DUAL_MAKERS)
@pytest.mark.parametrize("shape", [SHAPE, BATCHED], ids=str)
def test_dual_data_goes_to_a_tuple_and_back(make, shape):
    data = make(shape, 3)
    back = DualData.from_tuple(data.as_tuple())
    assert all(same(x, y) for x, y in ((data.a, back.a), (data.b1, back.b1), (data.b2, back.b2)))
    assert torch.equal(raw(data.c), raw(back.c))


@pytest.mark.parametrize("make", GROUP_MAKERS)
def test_group_data_goes_to_lists_and_back(make):
    data = make(RAGGED, 3)
    abc, scales, permuted, sizes = data.as_tuple()
    assert sizes == [(40, 128, 256, 1), (200, 72, 320, 1)]
    assert abc[1][0].shape == (200, 160, 1)
    assert abc[1][2].shape == (200, 72, 1)
    assert scales[1][1].shape == (72, 20, 1)
    assert permuted[1][0].shape == (32, 4, 2, 4, 5, 1)
    back = GroupData.from_tuple((abc, scales, permuted, sizes))
    for (a, b, c), (a2, b2, c2) in zip(data.groups, back.groups):
        assert same(a, a2)
        assert same(b, b2)
        assert torch.equal(raw(c), raw(c2))
    again = back.as_tuple()
    for pair, pair2 in zip(permuted, again[2]):
        assert all(torch.equal(raw(x), raw(y)) for x, y in zip(pair, pair2)), "padding must survive the round trip"


def test_permuted_scales_hold_each_scale_where_the_problem_puts_it():
    data = contest.full_range_dual(BATCHED, 5)
    permuted = data.as_tuple()[7].view(torch.uint8)
    linear = data.b1.block_scale.view(torch.uint8)
    for i, j, batch in ((0, 0, 0), (37, 3, 1), (127, 15, 2), (128, 4, 0), (255, 9, 2)):
        assert permuted[i % 32, i % 128 // 32, i // 128, j % 4, j // 4, batch] == linear[batch, i, j]


def test_public_dual_data_is_drawn_in_the_problems_order():
    # the problem's generator, written out for the CPU: bytes of a, b1, b2, then c, then the scales
    torch.manual_seed(contest.SEED)
    drawn = [torch.randint(255, (1, rows, SHAPE.k // 2), dtype=torch.uint8) for rows in (SHAPE.m, SHAPE.n, SHAPE.n)]
    c = torch.randn((1, SHAPE.m, SHAPE.n), dtype=torch.float16)
    scales = [torch.rand((1, rows, SHAPE.k // 16)) for rows in (SHAPE.m, SHAPE.n, SHAPE.n)]
    data = contest.public_dual(SHAPE)
    for matrix, codes, scale in zip((data.a, data.b1, data.b2), drawn, scales):
        assert torch.equal(matrix.codes, codes & 0xBB)
        assert torch.equal(raw(matrix.block_scale), raw(scale.to(torch.float8_e4m3fn)))
    assert torch.equal(data.c, c)


def test_public_group_data_is_drawn_in_the_problems_order():
    torch.manual_seed(5)
    data = contest.public_group(RAGGED, 5)
    for (m, n, k), (a, b, c), pads in zip(RAGGED.sizes, data.groups, data.padding):
        for matrix, rows in ((a, m), (b, n)):
            assert torch.equal(matrix.codes, torch.randint(255, (1, rows, k // 2), dtype=torch.uint8) & 0xBB)
        assert torch.equal(c, torch.randn((1, m, n), dtype=torch.float16))
        for matrix, rows in ((a, m), (b, n)):
            drawn = torch.randint(1, 3, (1, rows, k // 16), dtype=torch.int8)
            assert torch.equal(matrix.block_scale.float(), drawn.float())
        for pad, rows in zip(pads, (m, n)):
            layout = SwizzledLayout(rows, k // 16)
            assert torch.equal(pad.float(), torch.randint(1, 3, (1, *layout.storage_shape), dtype=torch.int8).float())


def test_public_data_has_the_problems_values_only():
    dual = contest.public_dual(SHAPE)
    assert set(unpack_codes(dual.a.codes).unique().tolist()) == {0, 1, 2, 3, 8, 9, 10, 11}
    assert float(dual.b2.block_scale.float().max()) <= 1.0
    _, _, permuted, _ = contest.public_group(RAGGED).as_tuple()
    for pair in permuted:
        for tensor in pair:
            assert set(tensor.float().unique().tolist()) == {1.0, 2.0}, "padding is 1 or 2 as well"


def test_public_generators_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    contest.public_dual(SHAPE)
    contest.public_group(RAGGED)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
def test_public_data_on_a_gpu_are_the_problems_own_numbers():
    torch.manual_seed(contest.SEED)
    cuda = torch.device("cuda")
    rows = (SHAPE.m, SHAPE.n, SHAPE.n)
    drawn = [torch.randint(255, (1, r, SHAPE.k // 2), dtype=torch.uint8, device=cuda) for r in rows]
    c = torch.randn((1, SHAPE.m, SHAPE.n), dtype=torch.float16, device=cuda)
    scales = [torch.rand((1, r, SHAPE.k // 16), device=cuda) for r in rows]
    data = contest.public_dual(SHAPE, device=cuda)
    for matrix, codes, scale in zip((data.a, data.b1, data.b2), drawn, scales):
        assert torch.equal(matrix.codes, codes & 0xBB)
        assert torch.equal(raw(matrix.block_scale), raw(scale.to(torch.float8_e4m3fn)))
    assert torch.equal(data.c, c)
    assert all(tensor.is_cuda for tensor in data.as_tuple())


@pytest.mark.gpu
def test_public_group_data_on_a_gpu_takes_scales_from_the_cpus_generator():
    torch.manual_seed(contest.SEED)
    cuda = torch.device("cuda")
    data = contest.public_group(RAGGED, device=cuda)
    for (m, n, k), (a, b, c), pads in zip(RAGGED.sizes, data.groups, data.padding):
        for matrix, rows in ((a, m), (b, n)):
            codes = torch.randint(255, (1, rows, k // 2), dtype=torch.uint8, device=cuda)
            assert torch.equal(matrix.codes, codes & 0xBB)
        assert torch.equal(c, torch.randn((1, m, n), dtype=torch.float16, device=cuda))
        for matrix, rows in ((a, m), (b, n)):
            drawn = torch.randint(1, 3, (1, rows, k // 16), dtype=torch.int8)
            assert torch.equal(matrix.block_scale.float().cpu(), drawn.float())
        for pad, rows in zip(pads, (m, n)):
            shape = (1, *SwizzledLayout(rows, k // 16).storage_shape)
            assert torch.equal(pad.float(), torch.randint(1, 3, shape, dtype=torch.int8, device=cuda).float())
    assert not any(scale.is_cuda for pair in data.as_tuple()[1] for scale in pair)


@pytest.mark.parametrize("shape", [SHAPE, DualShape(64, 128, 7168), BATCHED], ids=str)
def test_full_range_data_covers_the_format_and_keeps_silu_curved(shape):
    data = contest.full_range_dual(shape, 11)
    for matrix in (data.a, data.b1, data.b2):
        assert unpack_codes(matrix.codes).unique().numel() == 16
        scales = matrix.block_scale.view(torch.uint8).unique().tolist()
        assert {0, 1, 2, 3, 4, 5, 6, 7, 0x7E} <= set(scales)
        assert len(scales) > 80
    assert bool(data.c.isnan().all())
    for weight in (data.b1, data.b2):
        assert 0.5 < float(reference.preactivation(data.a, weight).std()) < 4
    c = reference.dual_gemm(data.a, data.b1, data.b2)
    assert bool(c.isfinite().all())
    assert float((c != 0).double().mean()) > 0.99


def test_full_range_blocks_of_448_matter_to_the_result():
    data = contest.full_range_dual(SHAPE, 2)
    assert int((data.a.block_scale.float() == 448).sum()) >= 1
    # the same product with scales that saturate at 240, as e4m3fnuz does, is far off
    capped = NVFP4Tensor(data.a.codes, data.a.block_scale.float().clamp(max=240).to(torch.float8_e4m3fn), data.a.global_scale)
    right, wrong = (reference.preactivation(a, data.b1) for a in (data.a, capped))
    assert float((right - wrong).norm() / right.norm()) > 1e-2


@pytest.mark.parametrize("shape", [SHAPE, DualShape(64, 128, 7168)], ids=str)
def test_exact_data_has_one_right_result_in_any_order_of_addition(shape):
    data = contest.exact_dual(shape, 4)
    expected = reference.dual_gemm(data.a, data.b1, data.b2)[0]
    order = torch.randperm(shape.k, generator=torch.Generator().manual_seed(1))
    x, gate, up = (t.decode()[0] for t in (data.a, data.b1, data.b2))
    for columns in (torch.arange(shape.k), order, torch.arange(shape.k).flip(0)):
        g, u = (x[:, columns] @ w[:, columns].T for w in (gate, up))
        assert float(g.abs().min()) >= 32
        assert torch.equal((torch.nn.functional.silu(g) * u).half(), expected)
    assert bool((g < 0).any())
    assert bool(expected.isfinite().all())
    assert float((expected != 0).double().mean()) > 0.8


def test_exact_group_data_sums_exactly_in_float32():
    data = contest.exact_group(RAGGED, 4)
    for a, b, _ in data.groups:
        x, w = a.decode()[0], b.decode()[0]
        expected = reference.linear(a, b)[0]
        assert torch.equal((x.flip(1) @ w.flip(1).T).half(), expected)
        assert bool(expected.isfinite().all())


def test_the_same_seed_gives_the_same_data_and_another_seed_other():
    for make in (*DUAL_MAKERS, *GROUP_MAKERS):
        shape = SHAPE if make in DUAL_MAKERS else RAGGED
        first, again, other = (make(shape, seed) for seed in (8, 8, 9))
        one, two, three = (d.a if isinstance(d, DualData) else d.groups[0][0] for d in (first, again, other))
        assert same(one, two)
        assert not torch.equal(one.codes, three.codes)


def test_operands_with_a_global_scale_or_swizzled_scales_are_refused():
    data = contest.public_dual(SHAPE)
    scaled = NVFP4Tensor(data.b1.codes, data.b1.block_scale, torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"b1: the contest's forms carry no global scale; it must be 1, got 2"):
        DualData(data.a, scaled, data.b2, data.c)
    with pytest.raises(ValueError, match=r"a: expected \[L, rows, K\] with linear block scales"):
        DualData(data.a.to_swizzled(), data.b1, data.b2, data.c)


def test_tuples_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="passes 10 tensors, got 7"):
        DualData.from_tuple(contest.public_dual(SHAPE).as_tuple()[:7])
    with pytest.raises(ValueError, match="passes 4 lists, got 3"):
        GroupData.from_tuple(contest.public_group(RAGGED).as_tuple()[:3])


def test_the_public_tolerance_accepts_one_unit_and_sees_nan():
    expected = torch.tensor([1.0, 1000.0, 0.0, 5.0, torch.inf], dtype=torch.float16)
    one_up = torch.nextafter(expected, torch.full_like(expected, 2000))
    assert contest.public_mismatches(one_up[:4], expected[:4]) == 0
    assert contest.public_mismatches(expected, expected) == 0  # infinity minus itself is NaN, which is no mismatch there
    wrong = torch.tensor([1.01, torch.nan, 0.002, 5.0, -torch.inf], dtype=torch.float16)
    assert contest.public_mismatches(wrong, expected) == 4
