"""Launches for mixtures of experts: parameters against CuTe DSL's own host code, and calls on a device made of Python."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backends.blackwell.grouped import recording
from backends.blackwell.moe import MoeKernels, spec
from backends.blackwell.test_arguments import canonical
from fake_blackwell import FakeBlackwell, compiled, fake_blackwell
from glu4 import reference
from glu4.activation import IDENTITY, SILU, clamped_silu, swiglu_oai
from glu4.backends.blackwell import launch, moe_launch
from glu4.backends.blackwell.moe_config import MoeConfig, most_tiles
from glu4.backends.blackwell.moe_launch import MoePlan, MoeShape, addresses_of, moe_parameters, parameters_of
from glu4.backends.blackwell.moe_spec import MoeSpec, TileSpec
from glu4.emulator.capture import capture, pointer, scalar
from glu4.errors import UnsupportedError
from glu4.nvfp4 import NVFP4Tensor, _unchecked
from glu4.problem import GroupedProblem, grouped_problem
from glu4.verify import Case, full_range_case

PLACES = {name: 0x7000_0000_0000 + (i << 36) for i, name in enumerate(addresses_of(MoeConfig()))}
CONSTANTS = (1.702, 1.0, 7.0)
SHAPE = MoeShape(130, 5, 136, 288, 200)
HOSTS = {
    "n 64": spec("bf16", tile_n=64, stages=3, load_width=16, evict_first=True),
    "n 32": spec(tile_n=32, stages=1, load_width=8, store="direct", pdl=True),
    "pair, n 32": spec(ctas=2, tile_m=256, tile_n=32, stages=3, store="direct", load_width=16, evict_first=True),
    "base": spec(stages=2),
    "pair": spec("bf16", ctas=2, tile_m=256, stages=2),
    "k 128": spec("bf16", tile_n=64, tile_k=128, stages=5, store="direct", load_width=64),
    "controlled": spec("bf16", ctas=2, tile_m=256, tile_n=32, stages=2, load_width=8, schedule="launch_control", pdl=True),
    "one matrix": spec("bf16", gated=False, ctas=2, tile_m=256, tile_n=64, stages=3, pdl=True),
}  # fmt: skip


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBlackwell]:
    with fake_blackwell(monkeypatch) as fake:
        yield fake


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs CuTe DSL to compile the kernels")
@pytest.mark.parametrize(
    "name", [n if i in (0, 1, len(HOSTS) - 1) else pytest.param(n, marks=pytest.mark.long) for i, n in enumerate(HOSTS)]
)
def test_parameters_are_those_of_the_host_code(compiled: Path, name: str) -> None:
    kernel = MoeKernels(HOSTS, compiled)[name]
    c, processors, (rows, experts, n, k, stride) = kernel.spec.config, 5, SHAPE
    names = [n for n in addresses_of(c) if n != "out"]
    places = {n: PLACES[n] for n in addresses_of(c)}
    given = [pointer(places[n]) for n in (*names, "out")] + [scalar("i64", stride), scalar("i32", 25)]
    given += [scalar("f32", v) for v in CONSTANTS]
    given += [scalar("i32", v) for v in (processors, rows, most_tiles(rows, experts, c.tile_n), n, k, experts)] + [pointer(0)]
    (launched,) = capture(kernel.file(".o"), kernel.ptx, given)
    with recording():
        ours = moe_parameters(c, SHAPE, places, 25, CONSTANTS)
    assert [len(b) for b in ours] == [len(b) for b in launched.params] == list(parameters_of(c))
    for i, (mine, theirs) in enumerate(zip(ours[2:], launched.params[2:], strict=True)):  # two tiled MMAs hold nothing
        assert canonical(mine) == canonical(theirs), f"parameter {i + 2}"
    assert launched.grid == c.grid(rows, experts, n, processors)
    assert (launched.block, launched.cluster) == ((192, 1, 1), (2, 1, 1) if c.ctas == 2 else None)
    assert launched.dynamic_smem == c.shared_bytes


# ---- calls ----

COUNTS = [3, 0, 130, 1, 40]


def run(case: Case, out: Tensor | None = None, config: MoeConfig | None = None, offsets: Tensor | None = None) -> Tensor:
    problem = grouped_problem(
        case.x, case.gate, dual=case.up is not None, activation=case.activation, out_dtype=case.out_dtype, has_bias=False
    )
    target = torch.zeros((case.x.shape[0], case.gate.rows), dtype=case.out_dtype) if out is None else out
    at, biases = case.group_offsets if offsets is None else offsets, (case.gate_bias, case.up_bias)
    assert at is not None
    weights = tuple(w for w in (case.gate, case.up) if w is not None)
    moe_launch.grouped(target, case.x, weights, at, biases[: len(weights)], case.activation, problem, config)  # type: ignore[arg-type]
    return target


def expected(case: Case) -> Tensor:
    found = torch.zeros((case.x.shape[0], case.gate.rows), dtype=case.out_dtype)
    for e, (begin, end) in enumerate(itertools.pairwise(case.group_offsets.tolist())):  # type: ignore[union-attr]
        biases = {
            "gate_bias": None if case.gate_bias is None else case.gate_bias[e],
            "up_bias": None if case.up_bias is None else case.up_bias[e],
        }
        rows = case.x.narrow_rows(begin, end - begin)  # type: ignore[union-attr]
        if case.up is None:
            found[begin:end] = reference.linear(rows, case.gate[e], bias=biases["gate_bias"], out_dtype=case.out_dtype)
            continue
        found[begin:end] = reference.dual_gemm(
            rows, case.gate[e], case.up[e], activation=case.activation, out_dtype=case.out_dtype, **biases
        )
    return found


@pytest.mark.parametrize("name", HOSTS)
def test_every_kind_of_configuration(cuda: FakeBlackwell, name: str) -> None:
    one = HOSTS[name]
    out = torch.bfloat16 if one.out == "bf16" else torch.float16
    case = full_range_case(1, sum(COUNTS), 72, 96, group_sizes=COUNTS, out_dtype=out, bias=True, linear=not one.config.gated)
    assert torch.equal(run(case, config=one.config), expected(case))
    assert torch.equal(run(case, config=one.config), expected(case)), "a second launch uses the memory of the first"
    assert [made.spec for made in cuda.made] == [TileSpec(one.config.tile_n), one] * 2
    held = ({4: (2, 1, 1)} if one.config.ctas == 2 else {}) | ({6: (1, 0, 0)} if one.config.pdl else {})
    assert [made.attributes for made in cuda.made] == [{6: (1, 0, 0)}, held] * 2
    assert {(made.stream, made.device) for made in cuda.made} == {(7, -1)}


@pytest.mark.parametrize("activation", [SILU, clamped_silu(1.5), swiglu_oai(), IDENTITY], ids=lambda a: a.name)
def test_activations(cuda: FakeBlackwell, activation: Any) -> None:
    case = full_range_case(2, 44, 40, 64, group_sizes=[3, 0, 41], activation=activation)
    assert torch.equal(run(case), expected(case))


@pytest.mark.parametrize("missing", ["gate_bias", "up_bias"])
def test_one_bias(cuda: FakeBlackwell, missing: str) -> None:
    case = replace(full_range_case(3, 44, 40, 64, group_sizes=[3, 0, 41], bias=True), **{missing: None})
    assert torch.equal(run(case), expected(case))


@pytest.mark.parametrize("k", [16, 48, 80, 1040])
def test_any_k(cuda: FakeBlackwell, k: int) -> None:
    case = full_range_case(4, 44, 40, k, group_sizes=[3, 0, 41])
    assert torch.equal(run(case), expected(case))


def test_operands_anywhere_in_memory(cuda: FakeBlackwell) -> None:
    """Codes that begin at an odd address, one global scale for all experts, rows of C apart, and columns of C apart."""
    case = full_range_case(5, 44, 40, 64, group_sizes=[3, 0, 41])
    assert isinstance(case.x, NVFP4Tensor)
    codes = torch.zeros(44 * 32 + 1, dtype=torch.uint8)[1:].view(44, 32).copy_(case.x.codes)
    gate = NVFP4Tensor(case.gate.codes, case.gate.block_scale, case.gate.global_scale[0].clone())
    case = replace(case, x=_unchecked(codes, case.x.block_scale, case.x.global_scale), gate=gate)
    same = replace(case, gate=NVFP4Tensor(gate.codes, gate.block_scale, gate.global_scale.expand(3).clone()))
    out = torch.full((44, 50), 3.0, dtype=torch.float16)
    assert torch.equal(run(case, out[:, 5:45]), expected(same))
    assert (out[:, :5] == 3).all()
    assert (out[:, 45:] == 3).all()
    turned = torch.full((40, 44), 3.0, dtype=torch.float16)
    assert torch.equal(run(case, turned.T), expected(same))


def test_rows_of_nobody_keep_what_they_hold(cuda: FakeBlackwell) -> None:
    case = full_range_case(6, 44, 40, 64, group_sizes=[3, 0, 41])
    offsets = torch.tensor([2, 5, 5, 40], dtype=torch.int32)
    for strides in ((40, 1), (1, 44)):
        out = torch.empty_strided((44, 40), strides, dtype=torch.float16).fill_(3)
        found = run(case, out, offsets=offsets)
        assert (found[:2] == 3).all()
        assert (found[40:] == 3).all()
        assert not (found[2:40] == 3).all(1).any()


@pytest.mark.parametrize("offsets", [[0, 3, 1, 12], [0, 99, 100, 101], [-5, 2, 4, 9], [4, 3, 2, 1]], ids=str)
def test_wrong_offsets_are_the_portable_backends(cuda: FakeBlackwell, offsets: list[int]) -> None:
    """The same rows are written, with the same experts' results; rows of two experts are the later's in both."""
    from glu4.backends import portable

    case = full_range_case(7, 12, 40, 64, group_sizes=[3, 5, 4])
    at, out = torch.tensor(offsets, dtype=torch.int32), torch.full((12, 40), 3.0, dtype=torch.float16)
    portable.grouped(out, case.x, case.gate, case.up, at, None, None, SILU)  # type: ignore[arg-type]
    found = run(case, torch.full((12, 40), 3.0, dtype=torch.float16), offsets=at)
    torch.testing.assert_close(found, out, rtol=2e-3, atol=1e-6)
    assert torch.equal(found == 3, out == 3)


class _NoReads(TorchDispatchMode):
    """The operations by which the host reads a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::item"), func
        assert "masked_select" not in func.name()
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_by_the_host(cuda: FakeBlackwell) -> None:
    case = full_range_case(8, 44, 40, 64, group_sizes=[3, 0, 41])
    cuda.compute = False
    with _NoReads():
        run(case)
    assert len(cuda.made) == 2
    with pytest.raises(AssertionError), _NoReads():  # what the mode is there for
        int(case.group_offsets[0])  # type: ignore[index]


def test_a_later_launch_has_its_own_addresses_and_no_other_difference(cuda: FakeBlackwell) -> None:
    cuda.compute = False
    problem = GroupedProblem(SHAPE.rows, SHAPE.experts, SHAPE.n, SHAPE.k)
    chosen = moe_launch.choice(problem, torch.empty(1, dtype=torch.float16))
    plan = MoePlan(chosen, SHAPE, 25, CONSTANTS)
    moved = {name: address + 4096 * (i + 1) for i, (name, address) in enumerate(PLACES.items())}
    for addresses in (PLACES, moved, PLACES):
        plan.launch(-1, 0, list(addresses.values()))
    first, second, third = (made.parameters for made in cuda.made)
    assert second[2:] == moe_parameters(chosen.config, SHAPE, moved, 25, CONSTANTS)[2:]
    assert first == third != second


def test_nothing_to_launch(cuda: FakeBlackwell) -> None:
    case = full_range_case(11, 44, 40, 64, group_sizes=[3, 0, 41])
    empty = replace(case, x=case.x.narrow_rows(0, 0))  # type: ignore[union-attr]
    assert run(empty, offsets=torch.zeros(4, dtype=torch.int32)).shape == (0, 40)
    assert not cuda.made


# ---- what is refused ----


def test_configurations_and_devices_that_are_refused(cuda: FakeBlackwell) -> None:
    case = full_range_case(12, 44, 40, 64, group_sizes=[3, 0, 41])
    with pytest.raises(UnsupportedError, match=r"no Blackwell kernel for this problem: 99 stages take \d+ bytes of shared"):
        run(case, config=MoeConfig(stages=99))
    with pytest.raises(
        UnsupportedError, match=r"Blackwell kernels need a GPU of compute capability 10\.0 or 10\.3, and this is meta"
    ):
        run(case, torch.empty((44, 40), dtype=torch.float16, device="meta"))
    float32 = torch.empty((44, 40))
    with pytest.raises(UnsupportedError, match="no Blackwell kernel for this problem: float32 output"):
        run(replace(case, out_dtype=torch.float32), float32)


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    case = full_range_case(13, 44, 40, 64, group_sizes=[3, 0, 41])
    with fake_blackwell(monkeypatch, found=lambda spec: None, arch="sm_103a"):
        with pytest.raises(
            UnsupportedError, match="no compiled Blackwell kernel for this problem; run glu4 compile --arch sm_103a"
        ):
            run(case)
        assert not moe_launch.available(torch.float16, torch.device("cpu"))


def test_another_kernel_runs_where_the_first_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = full_range_case(14, 44, 40, 64, group_sizes=[3, 0, 41])
    last = [s for s in moe_launch.shipped(gated=True) if s.out == "f16"][-1]
    with fake_blackwell(monkeypatch, found=lambda s: compiled(s) if s == last else None) as fake:
        assert torch.equal(run(case), expected(case))
        assert [made.spec for made in fake.made] == [last], "tiles are numbered by torch"


def test_what_is_shipped() -> None:
    for arch in ("sm_100a", "sm_103a"):
        shipped = moe_launch.shipped(arch)
        assert {(s.arch, s.out) for s in shipped} == {(arch, "f16"), (arch, "bf16")}
        tiles = [TileSpec(tile_n, arch, gather) for gather in (False, True) for tile_n in (32, 64, 128)]
        assert moe_launch.all_shipped(arch) == [*launch.shipped(arch=arch), *shipped, *tiles]
    assert MoeSpec.from_dict(shipped[0].to_dict()) == shipped[0]
    assert len({s.key for s in shipped}) == len(shipped) == 12
