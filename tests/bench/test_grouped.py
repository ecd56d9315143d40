"""Grouped cases: what is drawn, what an output is held to, and each peer handed the right operands, by stand-ins for its library.

A stand-in decodes what it is given, so that an operand in a wrong place gives a wrong result.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench.fake_gpu import FakeGpu, contender, right
from glu4 import NVFP4Tensor, explain, reference
from glu4.activation import SILU
from glu4.bench import ours, peers
from glu4.bench.contender import Row
from glu4.bench.devices import device
from glu4.bench.grouped import GroupedOperands, GroupedShape, draw_grouped, zipf_sizes
from glu4.bench.operands import FORMATS
from glu4.bench.peers import grouped, humming
from glu4.bench.report import lines, off_reference
from glu4.bench.run import METHOD, Settings, run
from glu4.bench.suites import GROUPED_SUITES
from glu4.bench.timing import copies
from glu4.problem import GroupedProblem

BY_NAME = {p.name: p for p in grouped.PEERS}
SIZES = (5, 0, 3, 9)
SHAPE = GroupedShape("four", 32, 64, SIZES)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("COLD_BYTES", 10_000), ("WARM_UPS", 1), ("TIMED", 3)):
        monkeypatch.setattr(f"glu4.bench.timing.{name}", value)


@pytest.fixture
def operands() -> GroupedOperands:
    return draw_grouped(SHAPE, "cpu")


# ---- cases ----


def test_the_suites_are_the_cases_of_the_tables() -> None:
    seed, moe = GROUPED_SUITES["grouped-seed"], GROUPED_SUITES["moe"]
    assert [(c.case, sum(c.drawn(0))) for c in seed] == [
        ("seed g8 N4096 K7168", 1024),
        ("seed g8 N7168 K2048", 1024),
        ("seed g2 N3072 K4096", 512),
        ("seed g2 N4096 K1536", 512),
    ]
    assert seed[0].sizes == (80, 176, 128, 72, 64, 248, 96, 160)
    drawn = {c.case: c.drawn(0) for c in moe}
    assert {name: (len(sizes), sum(sizes)) for name, sizes in drawn.items()} == {
        "E128 x4 N768 K2048": (128, 512),
        "E128 x64 N768 K2048": (128, 8192),
        "E128 zipf 512 N768 K2048": (128, 512),
        "E128 zipf 8192 N768 K2048": (128, 8192),
        "E32 x4 N2048 K7168": (32, 128),
        "E32 x128 N2048 K7168": (32, 4096),
        "E32 zipf 128 N2048 K7168": (32, 128),
        "E32 zipf 4096 N2048 K7168": (32, 4096),
    }
    for name, sizes in drawn.items():
        assert (len(set(sizes)) > 2) == ("zipf" in name)


def test_zipf_choices_are_different_ones_in_proportion_to_rank() -> None:
    experts, tokens = 8, 20_000
    sizes = zipf_sizes(experts, tokens, 1, 3)
    assert sizes == zipf_sizes(experts, tokens, 1, 3) != zipf_sizes(experts, tokens, 1, 4)
    harmonic = sum(1 / r for r in range(1, experts + 1))
    for rank, size in enumerate(sorted(sizes, reverse=True), 1):
        p = 1 / (rank * harmonic)
        assert abs(size - tokens * p) < 5 * (tokens * p * (1 - p)) ** 0.5  # five standard deviations
    # of different experts each token chooses at most once: with as many as there are, all of them
    assert zipf_sizes(experts, 10, experts, 0) == (10,) * experts
    assert max(zipf_sizes(experts, 50, 3, 0)) <= 50


def test_operands_are_the_same_by_seed_with_scales_of_their_own(operands: GroupedOperands) -> None:
    again, other = draw_grouped(SHAPE, "cpu"), draw_grouped(SHAPE, "cpu", seed=1)
    assert torch.equal(operands.gate.codes, again.gate.codes)
    assert not torch.equal(operands.gate.codes, other.gate.codes)
    assert operands.offsets.tolist() == [0, 5, 5, 8, 17]
    assert operands.offsets.dtype == torch.int32
    assert (operands.m, operands.active) == (17, 3)
    big = draw_grouped(GroupedShape("many", 1, 16, (1,) * 64), "cpu")
    assert (big.gate.global_scale != big.up.global_scale).all()
    for w in (big.gate, big.up):
        assert set(w.global_scale.tolist()) == {0.5, 1.0, 2.0}


def test_peers_weights_are_the_same_values_exactly(operands: GroupedOperands) -> None:
    exact = [torch.stack([w[e].dequantize(torch.float64) for e in range(4)]) for w in (operands.gate, operands.up)]
    for dtype in (torch.float16, torch.bfloat16):
        assert all(torch.equal(a.double(), b) for a, b in zip(operands.decoded(dtype), exact, strict=True))
    codes, scales = operands.stacked()
    for e in range(4):
        one = NVFP4Tensor(codes[e], scales[e], operands.smaller_scales()[e]).dequantize(torch.float64)
        assert torch.equal(one, torch.cat((exact[0][e], exact[1][e])))


@pytest.mark.parametrize("x_format", list(FORMATS))
def test_expected_is_the_specification(operands: GroupedOperands, x_format: str) -> None:
    x = operands.x(x_format, 1)[0]
    dtype = FORMATS[x_format]
    specified = reference.grouped_dual_gemm(x, operands.gate, operands.up, operands.offsets, out_dtype=dtype)
    assert torch.equal(right(operands, x_format), specified)
    found = operands.check(specified, x_format, 1, True)
    assert found.wrong == ""
    assert 0 < found.fro_rel_err < torch.finfo(dtype).eps


@pytest.mark.parametrize("part", ["gate", "up"])
def test_another_experts_scale_is_wrong(operands: GroupedOperands, part: str) -> None:
    w = getattr(operands, part)
    turned = NVFP4Tensor(w.codes, w.block_scale, w.global_scale.roll(1))
    assert not torch.equal(turned.global_scale, w.global_scale)
    gate, up = (turned, operands.up) if part == "gate" else (operands.gate, turned)
    out = reference.grouped_dual_gemm(operands.x("float16", 1)[0], gate, up, operands.offsets)
    assert operands.check(out, "float16", 3, False).wrong.startswith("relative error")


def test_faults_of_few_rows_are_found_where_the_norm_passes(operands: GroupedOperands) -> None:
    out = right(operands, "float16").clone()
    smallest = int(out.abs().amax(1).argmin())
    out[smallest] = out[smallest] * (1 + 2.0**-7)
    one = operands.check(out, "float16", 3, False)
    assert one.wrong == ""
    assert "cannot be right" in operands.check(out, "float16", 3, True).wrong
    left = right(operands, "float16").clone()
    left[4] = torch.nan  # a row that was never written
    assert operands.check(left, "float16", 3, False).wrong


def test_bytes_and_flops_leave_out_experts_without_tokens() -> None:
    sizes = {"us": 10.0, "us_min": 9.0, "x_format": "float16", "case": "four", "experts": 3}
    rows = {kind: Row("peer", 17, 32, 64, weights=kind, **sizes) for kind in ("nvfp4", "16-bit")}
    row = rows["nvfp4"]
    assert isinstance(row.problem, GroupedProblem)
    assert row.shape == (17, 32, 64, "four")
    nbytes = 2 * 17 * 64 + 2 * 17 * 32 + 3 * 2 * 32 * 64 * 9 // 16
    assert row.gb_s == pytest.approx(nbytes / 10e-6 / 1e9)
    assert row.tflops == pytest.approx(4 * 17 * 32 * 64 / 10e-6 / 1e12)
    assert rows["16-bit"].gb_s - row.gb_s == pytest.approx(3 * 2 * 32 * 64 * (2 - 9 / 16) / 10e-6 / 1e9)
    assert row.to_dict()["experts"] == 3
    assert "experts" not in Row("peer", 17, 32, 64, us=1.0, us_min=1.0).to_dict()


# ---- a run ----


@pytest.mark.parametrize("x_format", list(FORMATS))
def test_a_run_measures_the_public_call(x_format: str) -> None:
    gpu = FakeGpu(tick=8.0)
    settings = Settings([(2, 32, 64)], x_format, grouped=[SHAPE, GroupedShape("skewed", 16, 32, None, 4, 6, 2)])
    others, of_groups = [contender("dense", gpu)], [contender("groups", gpu)]
    found = list(run(settings, device("h100"), gpu, "cpu", others, of_groups))
    assert [[row.peer for row in rows] for rows in found] == [["glu4", "dense"], ["glu4", "groups"], ["glu4", "groups"]]
    assert [rows[0].case for rows in found] == ["", "four", "skewed"]
    for rows in found:
        assert [row.note for row in rows] == ["", ""]
        assert rows[0].us > 0
    row = found[1][0]
    assert (row.m, row.n, row.k, row.experts, row.x_format, row.backend) == (17, 32, 64, 3, x_format, "portable")
    assert row.limit_us > 0
    (dense, four, skewed) = lines([row for rows in found for row in rows])
    assert (four.shape, four.peer.peer, skewed.shape[3], dense.shape) == ((17, 32, 64, "four"), "groups", "skewed", (2, 32, 64))
    assert off_reference([row for rows in found for row in rows], "h100") == []


def test_glu4_is_given_offsets_a_place_and_other_weights_in_each_call(operands: GroupedOperands) -> None:
    (mine,) = ours.grouped_contenders(operands, "float16")
    calls = mine.prepare(operands)
    problem = operands.problem("float16")
    assert len(calls) == copies(problem.bytes - 2 * 17 * 32)
    outputs = {call().data_ptr() for call in calls}
    assert len(outputs) == 1
    assert operands.check(calls[-1](), "float16", 1, True).wrong == ""
    assert explain(problem).chosen == "portable"


def test_a_backend_that_no_graph_can_hold_says_so(operands: GroupedOperands, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(operands, "gate", on_cuda)
    monkeypatch.setattr("glu4.explain", lambda problem, device: SimpleNamespace(chosen="portable"))
    with pytest.raises(RuntimeError, match="the portable backend reads the offsets on the host, which no CUDA graph can hold"):
        ours._grouped(operands, "float16")


def test_the_method_states_the_scales() -> None:
    assert "different global scales of 1/2, 1 or 2" in METHOD


# ---- peers ----


def test_torchs_grouped_product_is_always_among_them() -> None:
    assert [p.name for p in peers.select("none", grouped=True)] == ["torch_grouped_mm_bf16"]
    assert [p.name for p in peers.select("auto", grouped=True)] == list(BY_NAME)
    some = "quack_gated_varlen_bf16,cublas_bf16"
    assert [p.name for p in peers.select(some, grouped=True)] == ["torch_grouped_mm_bf16", "quack_gated_varlen_bf16"]
    assert [p.name for p in peers.select(some)] == ["cublas_fp16", "cublas_bf16"]
    with pytest.raises(ValueError, match=r"torch_grouped_mm_bf16, .*humming_moe_bf16, got 'marlin'"):
        peers.select("marlin", grouped=True)


def test_each_says_what_it_holds_and_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: (p.weights, p.x_format, p.roundings) for name, p in BY_NAME.items()} == {
        "torch_grouped_mm_bf16": ("16-bit", "bfloat16", 3),
        "cublas_loop_bf16": ("16-bit", "bfloat16", 3),
        "quack_gated_varlen_bf16": ("16-bit", "bfloat16", 1),
        "humming_moe_bf16": ("nvfp4", "bfloat16", 3),
    }
    monkeypatch.setattr(grouped, "find_spec", lambda name: None)
    no_triton = "Triton is not installed; it comes with CUDA builds of torch"
    assert [BY_NAME[n].missing() for n in ("torch_grouped_mm_bf16", "cublas_loop_bf16")] == [no_triton] * 2
    monkeypatch.delattr(torch, "_grouped_mm")
    assert BY_NAME["torch_grouped_mm_bf16"].missing() == f"torch {torch.__version__} has no _grouped_mm"
    for name, distribution in (("quack_gated_varlen_bf16", "quack-kernels"), ("humming_moe_bf16", "humming-kernels")):
        peers.not_usable.cache_clear()
        assert f"{distribution} " in (BY_NAME[name].missing() or f"{distribution} is there")


def _silu_mul(both: Tensor, out: Tensor) -> None:
    gate, up = both.double().chunk(2, 1)
    out.copy_(SILU(gate, up))


def _gemm_gated(
    x: Tensor, weight: Tensor, *, activation: str, cu_seqlens_m: Tensor, store_preact: bool, tuned: bool
) -> tuple[None, Tensor]:
    assert (activation, store_preact, tuned, cu_seqlens_m.dtype) == ("swiglu", False, False, torch.int32)
    out = x.new_empty(x.shape[0], weight.shape[2] // 2)
    for e, (a, b) in enumerate(pairwise(cu_seqlens_m.tolist())):
        both = x[a:b].double() @ weight[e].double()
        out[a:b] = SILU(both[:, 0::2], both[:, 1::2])
    return None, out


class _HummingLayer:
    """The shapes are those of humming's own parameters: one second scale an expert."""

    def __init__(self, **kwargs: object) -> None:
        assert kwargs.pop("weight_config") == {"quant_method": "modelopt", "quant_algo": "nvfp4"}
        self.humming_config = SimpleNamespace(**kwargs)
        self.locks = torch.zeros(4)

    def cuda(self) -> _HummingLayer:
        return self

    def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
        c = self.humming_config
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        assert shapes == {
            "weight": (c.num_experts, c.shape_n, c.shape_k // 2),
            "weight_scale": (c.num_experts, c.shape_n, c.shape_k // 16),
            "weight_scale_2": (c.num_experts,),
        }
        self.tensors = tensors

    def transform(self) -> None:
        for name, tensor in self.tensors.items():
            setattr(self, name, tensor)


def _humming_forward(
    config: SimpleNamespace,
    *,
    inputs: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    locks: Tensor,
    expert_layout: Tensor,
    valid_shape_m: int,
    compute_config: dict[str, object],
    tuning_config: dict[str, object],
) -> Tensor:
    assert (valid_shape_m, compute_config) == (inputs.shape[0], {"gemm_type": "grouped_contiguous"})
    assert tuning_config == {"for": (inputs.shape[0], "grouped_contiguous")}
    assert config.torch_dtype == inputs.dtype
    out = inputs.new_empty(inputs.shape[0], config.shape_n)
    for e, (a, b) in enumerate(pairwise(expert_layout.tolist())):
        out[a:b] = inputs[a:b].float() @ NVFP4Tensor(weight[e], weight_scale[e], weight_scale_2[e]).dequantize().t()
    return out


def _heuristics(*, layer_config: object, shape_m: int, gemm_type: str, device: object) -> dict[str, object]:
    return {"for": (shape_m, gemm_type)}


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "glu4.bench.peers.silu_mul": {"silu_mul": _silu_mul},
        "quack": {},
        "quack.gemm_interface": {"gemm_gated": _gemm_gated},
        "humming": {},
        "humming.layer": {"HummingLayer": _HummingLayer},
        "humming.tune": {"get_heuristics_config": _heuristics},
        "humming.forward": {"humming_forward": _humming_forward},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        for key, value in contents.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_peer_is_handed_the_right_operands(name: str, operands: GroupedOperands) -> None:
    peer = BY_NAME[name]
    calls = peer.prepare(operands)
    nbytes = 3 * 2 * 32 * 64 * (2 if peer.weights == "16-bit" else 9 / 16)
    second = 4 * 4 * 3 // 4 if peer.weights == "nvfp4" else 0  # a float32 scale an expert
    assert len(calls) == copies(int(nbytes) + second + 2 * 17 * 64)
    for call in (calls[0], calls[-1]):
        found = operands.check(call(), peer.x_format, peer.roundings, peer.specified)
        assert found.wrong == ""
        assert 0 < found.fro_rel_err < 2 * torch.finfo(FORMATS[peer.x_format]).eps


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("fault", ["exchanged", "scales", "sizes"])
def test_wrong_operands_would_be_seen(name: str, fault: str, operands: GroupedOperands) -> None:
    peer = BY_NAME[name]
    gate, up, sizes = operands.gate, operands.up, SIZES
    if fault == "exchanged":
        gate, up = up, gate
    elif fault == "scales":
        gate = NVFP4Tensor(gate.codes, gate.block_scale, gate.global_scale.roll(1))
    else:
        sizes = (5, 3, 0, 9)
    wrong = GroupedOperands(17, 32, 64, gate, up, operands.normal, case="wrong", sizes=sizes)
    assert operands.check(peer.prepare(wrong)[0](), peer.x_format, peer.roundings, peer.specified).wrong


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(BY_NAME))
def test_on_a_gpu_with_the_real_library(name: str) -> None:
    peer = BY_NAME[name]
    reason = peer.missing()
    if reason is not None:
        pytest.skip(reason)
    case = draw_grouped(GroupedShape("gpu", 256, 512, (24, 0, 3, 130)), "cuda")
    assert case.check(peer.prepare(case)[0](), peer.x_format, peer.roundings, peer.specified).wrong == ""


def test_humming_is_missing_for_the_same_reason_as_its_dense_kernel() -> None:
    assert BY_NAME["humming_moe_bf16"].missing is humming.PEERS[0].missing
