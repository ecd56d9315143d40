"""GatedWeights and LinearWeight: consistency, prepare, the packed form alone, shards, copies, and the state dict round trip."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_hopper import FakeCuda, fake_hopper
from glu4 import GatedWeights, LinearWeight, NVFP4Tensor, dual_gemm, grouped_linear, linear, quantize, reference
from glu4.backends.hopper.pack import pack_gated, pack_matrix
from glu4.nvfp4 import BLOCK, _unchecked, unpack_codes
from glu4.weights import pack, unpack
from operands import full_range


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_hopper(monkeypatch) as fake:
        yield fake


def weights(*shape: int, **kwargs: torch.Tensor) -> GatedWeights:
    return GatedWeights(full_range(1, *shape), full_range(2, *shape), **kwargs)


def test_state_dict_round_trip() -> None:
    w = weights(3, 8, 32, input_scale=torch.rand(3) + 0.1, gate_bias=torch.randn(3, 8))
    back = GatedWeights.from_state_dict(w.state_dict())
    for key, value in w.state_dict().items():
        assert torch.equal(back.state_dict()[key].view(torch.uint8), value.view(torch.uint8))
    assert back.up_bias is None
    state = w.state_dict()
    state["gate.code"] = state.pop("gate.codes")
    with pytest.raises(ValueError, match=r"missing \['gate.codes'\], unknown \['gate.code'\]"):
        GatedWeights.from_state_dict(state)


@pytest.mark.parametrize("swizzled", [False, True])
def test_shards_concatenate_to_the_whole(swizzled: bool) -> None:
    w = weights(48, 64, gate_bias=torch.randn(48))
    if swizzled:
        w = GatedWeights(w.gate.to_swizzled(), w.up.to_swizzled(), gate_bias=w.gate_bias)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = [dual_gemm(x, w.shard(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat(parts, -1), dual_gemm(x, w))
    with pytest.raises(ValueError, match="world: N = 48 does not divide into 5 shards"):
        w.shard(0, 5)
    with pytest.raises(ValueError, match="rank: expected 0 <= rank < 3, got 3"):
        w.shard(3, 3)


def test_prepare_checks_values_and_can_free_the_original() -> None:
    w = weights(8, 32)
    prepared = w.prepare("cpu", free_original=True)
    assert prepared.shape == (8, 32)
    assert not hasattr(w, "gate")
    for use in (lambda: w.shape, lambda: repr(w), lambda: dual_gemm(torch.zeros(1, 32), w)):
        with pytest.raises(AttributeError, match=r"emptied by prepare\(free_original=True\); use the weights it returned"):
            use()
    t = full_range(1, 8, 32)
    bad = _unchecked(t.codes, t.block_scale.view(torch.uint8).fill_(0x7F).view(torch.float8_e4m3fn), t.global_scale)
    with pytest.raises(ValueError, match="16 of 16 e4m3 scales are NaN"):
        GatedWeights(full_range(2, 8, 32), bad).prepare("cpu")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GatedWeights(full_range(1, 8, 32), full_range(1, 8, 16)), ValueError, "gate and up must have one shape"),
        (lambda: GatedWeights(full_range(1, 8, 32), torch.zeros(8, 32)), TypeError, "up: expected an NVFP4Tensor, got Tensor"),
        (lambda: weights(8, 32, gate_bias=torch.zeros(9)), ValueError, r"gate_bias: expected shape \[8\], got \[9\]"),
        (lambda: weights(8, 32, up_bias=[0.0] * 8), TypeError, "up_bias: expected a torch.Tensor, got list"),
        (lambda: weights(8, 32, input_scale=0.5), TypeError, "input_scale: expected a torch.Tensor, got float"),
        (lambda: weights(8, 32, gate_bias=torch.zeros(8, device="meta")), ValueError, "gate_bias is on meta, gate is on cpu"),
        (
            lambda: weights(8, 32, input_scale=torch.tensor(0.0)),
            ValueError,
            "input_scale: expected positive finite multipliers",
        ),
        (
            lambda: weights(2, 8, 32, input_scale=torch.ones(3)),
            ValueError,
            r"input_scale: expected float32 of shape \[\] or \[2\]",
        ),
        (lambda: weights(2, 2, 8, 32), ValueError, r"gate, up: expected \[N, K\] or \[E, N, K\]"),
    ],
)
def test_bad_weights(make, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        make()


def test_repr_and_bytes() -> None:
    w = weights(8, 32)
    assert repr(w) == "GatedWeights(shape=[8, 32], input_scale=dynamic, device=cpu)"
    assert w.nbytes == 2 * (8 * 16 + 8 * 2 + 4)
    assert isinstance(w.to("cpu").gate, NVFP4Tensor)


# ---- the packed form ----


@given(
    seed=st.integers(0, 999),
    batch=st.sampled_from([(), (1,), (3,)]),
    n=st.integers(1, 150),
    blocks=st.integers(1, 9),
    one=st.booleans(),
    swizzled=st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packing_by_parts_is_packing_at_once(monkeypatch: pytest.MonkeyPatch, seed: int, batch: tuple[int, ...], n: int,
                                             blocks: int, one: bool, swizzled: bool) -> None:  # fmt: skip
    """Rows are packed a part at a time, here of 64, so that little extra memory is needed."""
    monkeypatch.setattr("glu4.weights._ROWS_AT_ONCE", 64)
    matrices = tuple(full_range(seed + i, *batch, n, 16 * blocks) for i in range(1 if one else 2))
    given_form = tuple(m.to_swizzled() if swizzled else m for m in matrices)
    packed = pack(given_form)
    stack = [tuple(m[i] for m in matrices) for i in range(batch[0])] if batch else [matrices]
    at_once = [pack_matrix(*m) if one else pack_gated(*m) for m in stack]
    assert torch.equal(packed, torch.stack(at_once) if batch else at_once[0])
    spare = packed.untyped_storage().nbytes() - packed.nbytes
    assert spare == 2304  # what the last stage of a kernel may read
    if not batch:
        assert_same_values(unpack(packed, n, 16 * blocks, tuple(m.global_scale for m in matrices)), matrices)


def assert_same_values(got: tuple[NVFP4Tensor, ...], want: tuple[NVFP4Tensor, ...]) -> None:
    """The same codes, scales and global scales, but for the codes of blocks with scale zero, which are zero."""
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.block_scale.view(torch.uint8), b.linear_block_scale().view(torch.uint8))
        assert torch.equal(a.global_scale, b.global_scale)
        used = (b.linear_block_scale().view(torch.uint8) != 0).repeat_interleave(BLOCK, -1)
        assert torch.equal(unpack_codes(a.codes), unpack_codes(b.codes) * used)


def test_weights_are_packed_besides_unless_the_original_is_freed(hopper: FakeCuda) -> None:
    w = weights(40, 80, gate_bias=torch.randn(40))
    both = w.prepare("cpu")
    assert both.gate is w.gate
    assert both.nbytes == w.nbytes + 2 * 2 * 2304 + 2304
    only = w.prepare("cpu", free_original=True)
    assert only.matrices is None
    assert only.nbytes == 2 * 2 * 2304 + 2304 + 8
    assert (only.shape, only.device, repr(only)) == (both.shape, both.device, repr(both))
    assert_same_values((only.gate, only.up), (both.gate, both.up))
    assert torch.equal(only.scales[1], both.up.global_scale)
    again = both.prepare("cpu")
    assert again.packed is both.packed  # nothing is packed twice
    assert only.prepare("cpu").matrices is None
    assert both.to("cpu") is both


@pytest.mark.parametrize(("n", "k"), [(512, 512), (64, 2048), (1088, 192)])
def test_memory_of_the_packed_form_alone(hopper: FakeCuda, n: int, k: int) -> None:
    """N and K multiples of 64: as many bytes as NVFP4, and one unit of 2304 for a read past the end, here under 2 %."""
    for one in (False, True):
        w = LinearWeight(full_range(1, n, k)) if one else weights(n, k)
        nvfp4 = w.nbytes
        prepared = w.prepare("cpu", free_original=True)
        assert prepared.nbytes == nvfp4 + 2304
        assert one or prepared.nbytes <= 1.02 * nvfp4


def test_the_memory_of_the_original_is_given_back(hopper: FakeCuda) -> None:
    """No tensor of NVFP4 codes is left anywhere in the prepared object."""
    prepared = weights(512, 512).prepare("cpu", free_original=True)
    held: set[int] = set()

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            held.add(value.untyped_storage().nbytes())
        elif isinstance(value, NVFP4Tensor):
            for part in (value.codes, value.block_scale, value.global_scale):
                visit(part)
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item)

    for value in vars(prepared).values():
        visit(value)
    assert prepared.packed is not None
    assert sorted(held) == [1, 4, prepared.packed.untyped_storage().nbytes()]


def test_what_needs_the_original_unpacks_it(hopper: FakeCuda) -> None:
    w = weights(48, 64, gate_bias=torch.randn(48), input_scale=torch.tensor(0.5))
    kept = GatedWeights(w.gate, w.up, gate_bias=w.gate_bias, input_scale=w.input_scale)
    only = w.prepare("cpu", free_original=True)
    x = torch.randn(5, 64).half()
    want = dual_gemm(x, kept)
    for rank in range(3):
        assert torch.equal(dual_gemm(x, only.shard(rank, 3)), want[:, 16 * rank : 16 * rank + 16])
    back = GatedWeights.from_state_dict(only.state_dict())
    assert_same_values((back.gate, back.up), (kept.gate, kept.up))
    assert torch.equal(back.input_scale, kept.input_scale)  # type: ignore[arg-type]
    moved = only.to("meta")
    assert (moved.device.type, moved.packed) == ("meta", None)
    for made in (pickle.loads(pickle.dumps(only)), saved_and_loaded(only)):
        assert made.packed is made.direct is None
        assert_same_values((made.gate, made.up), (kept.gate, kept.up))
        assert torch.equal(dual_gemm(x, made), want)


def saved_and_loaded(value: object) -> GatedWeights:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    loaded: GatedWeights = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("free", [False, True])
def test_copies_of_prepared_weights(hopper: FakeCuda, free: bool) -> None:
    w = weights(40, 80).prepare("cpu", free_original=free)
    x = torch.randn(5, 80).half()
    want = dual_gemm(x, w)
    deep, shallow = copy.deepcopy(w), copy.copy(w)
    assert w.packed is not None
    assert deep.packed is not None
    assert shallow.packed is w.packed
    assert deep.packed.data_ptr() != w.packed.data_ptr()
    assert deep.packed.untyped_storage().nbytes() == w.packed.untyped_storage().nbytes()
    w.packed.zero_()
    assert torch.equal(dual_gemm(x, deep), want)
    assert hopper.launches[-1].parameters[2] == deep.packed.data_ptr()
    assert (deep.matrices is None) == free
    assert deep.direct is not None


def test_stacks_are_packed_too(hopper: FakeCuda) -> None:
    """One packed form serves dual_gemm and grouped_dual_gemm; without the originals a mixture of experts is held once."""
    w = weights(3, 40, 80)
    x = torch.randn(3, 5, 80).half()
    want = dual_gemm(x, copy.copy(w))
    prepared = w.prepare("cpu", free_original=True)
    assert prepared.packed is not None
    assert prepared.matrices is None
    assert prepared.nbytes == prepared.packed.untyped_storage().nbytes() + 2 * 3 * 4
    assert torch.equal(dual_gemm(x, prepared), want)
    assert prepared.gate.shape == (3, 40, 80)


@pytest.mark.parametrize("n", [40, 1088])  # one tile, cut short; more rows than are packed at once
def test_stacks_of_one_matrix_are_packed_too(hopper: FakeCuda, n: int) -> None:
    """One packed form serves linear and grouped_linear, each matrix packed as one alone, and unpacks to the same values."""
    matrix, x, offsets = full_range(5, 3, n, 80), torch.randn(3, 5, 80).half(), torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    w = LinearWeight(matrix).prepare("cpu", free_original=True)
    assert w.packed is not None
    assert w.matrices is None
    assert w.nbytes == w.packed.untyped_storage().nbytes() + 3 * 4
    for e in range(3):
        assert torch.equal(w.packed[e], pack_matrix(matrix[e]))
    assert_same_values((w.matrix,), (matrix,))
    want = reference.linear(x, matrix, out_dtype=torch.float16)
    for made in (w, copy.deepcopy(w), pickle.loads(pickle.dumps(w)), LinearWeight(matrix)):
        assert torch.equal(linear(x, made), want)
        assert torch.equal(grouped_linear(x.flatten(0, 1), made, offsets), want.flatten(0, 1))
        assert made.packed is not None


def test_weights_cannot_be_replaced_beside_what_is_packed() -> None:
    w = weights(8, 32)
    with pytest.raises(AttributeError, match="property 'gate' of 'GatedWeights' object has no setter"):
        w.gate = w.up  # type: ignore[misc]


def test_linear_weight(hopper: FakeCuda) -> None:
    matrix = full_range(1, 40, 80)
    w = LinearWeight(matrix)
    assert (w.shape, w.nbytes, repr(w)) == ((40, 80), matrix.nbytes, "LinearWeight(shape=[40, 80], device=cpu)")
    assert w.matrix is matrix
    assert w.to("cpu") is w
    assert w.to("meta").device.type == "meta"
    prepared = w.prepare("cpu", free_original=True)
    assert_same_values((prepared.matrix,), (matrix,))
    assert_same_values((pickle.loads(pickle.dumps(prepared)).matrix,), (matrix,))
    with pytest.raises(AttributeError, match=r"emptied by prepare\(free_original=True\); use the weights it returned"):
        _ = w.matrix
    with pytest.raises(TypeError, match="matrix: expected an NVFP4Tensor, got Tensor"):
        LinearWeight(torch.zeros(8, 16))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"matrix: expected \[N, K\] or \[L, N, K\], got shape \[2, 2, 8, 16\]"):
        LinearWeight(quantize(torch.ones(2, 2, 8, 16)))
    t = full_range(1, 8, 32)
    bad = _unchecked(t.codes, t.block_scale.view(torch.uint8).fill_(0x7F).view(torch.float8_e4m3fn), t.global_scale)
    with pytest.raises(ValueError, match="16 of 16 e4m3 scales are NaN"):
        LinearWeight(bad).prepare("cpu")
