"""tensormap.replace: the fields it changes, and a kernel that makes its own tensor map (PTX ISA 9.7.9.28, 9.7.13.16)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.runner import kinds, run
from emulator.test_divergence import SCHEDULES
from emulator.test_tma import tensor_map, with_map
from glu4.emulator.errors import PtxError
from glu4.emulator.isa.tensormap import replaced
from glu4.emulator.tensor_map import TensorMap, encode

BASE = TensorMap(0x10000, "u16", (64, 32, 8), (128, 4096), (16, 4, 2), (1, 1, 2))
# Table 33 of the ISA
ELEMENTS = ["u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f32_ftz", "f64", "bf16", "tf32", "tf32_ftz"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, (1 << 40) - 1), st.integers(1, 1 << 32), st.integers(0, 2), st.integers(1, 256), st.integers(1, 8),
    st.integers(0, (1 << 36) - 1), st.integers(0, 1),
)  # fmt: skip
def test_a_replaced_field_is_as_encoded_anew(
    address: int, size: int, at: int, box: int, step: int, stride: int, which: int
) -> None:
    def put(values: tuple[int, ...], value: int, index: int = at) -> tuple[int, ...]:
        return (*values[:index], value, *values[index + 1 :])

    data = encode(BASE)
    fields = {
        "address": 16 * address,
        "global_shape": put(BASE.global_shape, size),
        "element_strides": put(BASE.element_strides, step),
    }
    new = replaced(data, "global_address", 0, 16 * address)
    new = replaced(new, "global_dim", at, size & 0xFFFFFFFF)  # 2^32 is zero in a register of 32 bits
    new = replaced(new, "element_stride", at, step)
    if at:  # a box stays whole 16 bytes
        new = replaced(new, "box_dim", at, box)
        fields["box_shape"] = put(BASE.box_shape, box)
    new = replaced(new, "global_stride", which, 16 * stride)
    fields["global_strides"] = put(BASE.global_strides, 16 * stride, which)
    try:
        expected = encode(dataclasses.replace(BASE, **fields))
    except ValueError:  # a box that shared memory cannot hold
        return
    assert new == expected


def test_kinds_of_elements_swizzles_and_fills() -> None:
    for number, name in enumerate(ELEMENTS):
        wide = dataclasses.replace(BASE, element_type=name, box_shape=(16, 4, 2))
        assert replaced(encode(BASE), "elemtype", 0, number) == encode(wide)
    for number, name in enumerate(("none", "32B", "64B", "128B")):
        assert replaced(encode(BASE), "swizzle_mode", 0, number) == encode(dataclasses.replace(BASE, swizzle=name))
    full = dataclasses.replace(BASE, swizzle="128B")
    for number, name in enumerate(("128B", "128B_atom_32B", "128B_atom_32B_flip_8B", "128B_atom_64B")):
        assert replaced(encode(full), "swizzle_atomicity", 0, number) == encode(dataclasses.replace(BASE, swizzle=name))
    half = dataclasses.replace(BASE, element_type="f16")
    assert replaced(encode(half), "fill_mode", 0, 1) == encode(dataclasses.replace(half, oob_fill="nan"))
    flat = TensorMap(0x10000, "u16", (64, 32), (128,), (16, 4), (1, 1))
    # what belongs to dimensions beyond the rank stays as it is
    assert replaced(encode(flat), "rank", 0, 0)[:12] == encode(TensorMap(0x10000, "u16", (64,), (), (16,), (1,)))[:12]


# Each warp of 32 threads makes a map of rows of `b` from the map of `a` given as a parameter, then loads a box by it.
MAKE = """.shared .align 128 .b8 made[128]; .shared .align 128 .b8 room[1024]; .shared .align 8 .b64 bar;
.reg .b32 %t, %x, %s, %r, %bb, %d; .reg .b64 %at, %o; .reg .pred %p, %one; mov.u32 %t, %tid.x; mov.u32 %s, made; mov.u32 %r, room; mov.u32 %bb, bar;
setp.eq.u32 %one, %t, 0; @%one mbarrier.init.shared.b64 [%bb], 1;
mul.wide.u32 %o, %t, 4; add.u64 %at, %map, %o; ld.b32 %x, [%at]; mad.lo.u32 %d, %t, 4, %s; st.shared.b32 [%d], %x; bar.sync 0;
@%one tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%s], %b;
@%one tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%s], 1, 5;
@%one tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%s], 0, 128; bar.sync 0;
"""
FUSED = "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%g], [%s], 128;\n"
BY_HAND = """ld.shared.b32 %x, [%d]; add.u64 %at, %g, %o; st.global.b32 [%at], %x; bar.sync 0;
fence.proxy.tensormap::generic.release.gpu;\n"""
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%g], 128;\n"
LOAD = """fence.proxy.async; @%one mbarrier.arrive.expect_tx.shared.b64 _, [%bb], 512;
@%one cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r], [%g, {0, 1}], [%bb];
{ W: mbarrier.try_wait.parity.shared.b64 %p, [%bb], 0; @!%p bra W; }
mad.lo.u32 %d, %t, 16, %r; mul.wide.u32 %o, %t, 16; add.u64 %at, %out, %o; .reg .b32 %v<4>; ld.shared.v4.b32 {%v0, %v1, %v2, %v3}, [%d];
st.global.v4.b32 [%at], {%v0, %v1, %v2, %v3};
"""


def make(body: str, **options: Any) -> Any:
    rng = np.random.default_rng(1)
    buffers = {
        "a": rng.integers(0, 256, (64, 64), dtype=np.uint8),
        "b": rng.integers(0, 256, (8, 128), dtype=np.uint8),
        "g": np.zeros(128, np.uint8),
        "out": np.zeros((8, 64), np.uint8),
    }
    described = tensor_map(global_shape=[64, 64], global_strides_bytes=[64], box_shape=[64, 8])
    return with_map(body, buffers, described, **options), buffers


@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
@pytest.mark.parametrize("copy", [FUSED, BY_HAND])
def test_a_kernel_that_makes_its_tensor_map(copy: str, name: str, seed: int) -> None:
    r, buffers = make(MAKE + copy + ACQUIRE + LOAD, schedule_name=name, seed=seed)
    assert r.report.clean, str(r.report)
    expected = np.zeros((8, 64), np.uint8)
    expected[:4] = buffers["b"][1:5, :64]  # five rows are in bounds, of which the box starts at the second
    np.testing.assert_array_equal(r.buffers["out"], expected)
    no_acquire, _ = make(MAKE + copy + LOAD, schedule_name=name, seed=seed)
    assert "missing proxy fence" in kinds(no_acquire)
    assert "acquire" in str(no_acquire.report)
    late, _ = make(MAKE + ACQUIRE + copy + LOAD, schedule_name=name, seed=seed)
    assert "missing proxy fence" in kinds(late)


def test_the_release_is_needed() -> None:
    body = MAKE + BY_HAND.replace("fence.proxy.tensormap::generic.release.gpu;", "") + ACQUIRE + LOAD
    r, _ = make(body)
    assert kinds(r) == ["missing proxy fence"]
    assert "fence.proxy.tensormap::generic.release" in str(r.report)


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("bar.sync 0;\n@%one tensormap.replace", "\n@%one tensormap.replace", "data race"),
        ("shared::cta.b1024.b64 [%s], %b", "shared::cta.b1024.b64 [%s+32], %b", "misaligned address"),
        ("shared::cta.b1024.b64 [%s], %b", "shared::cta.b1024.b64 [%s+9984], %b", "out of bounds"),
        ("shared::cta.b1024.b64 [%s], %b", "b1024.b64 [%map], %b", "tensor map"),
    ],
)  # fmt: skip
def test_faults_are_found(old: str, new: str, kind: str) -> None:
    assert old in MAKE
    r, _ = make(MAKE.replace(old, new) + FUSED + ACQUIRE + LOAD)
    assert kind in kinds(r), str(r.report)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensormap.replace.tile.box_dim.global.b1024.b32 [%at], 5, %x;", "ordinal 5 of .box_dim does not exist"),
        ("tensormap.replace.tile.swizzle_mode.global.b1024.b32 [%at], 4;", "value 4 of .swizzle_mode"),
        ("tensormap.replace.tile.swizzle_mode.global.b1024.b32 [%at], %x;", "expected an integer constant"),
        ("tensormap.replace.im2col.rank.global.b1024.b32 [%at], %x;", "only .tile is"),
        ("tensormap.replace.tile.rank.global.b1024.b64 [%at], %at;", "expected one of .b32"),
    ],
)
def test_malformed_ones_are_refused(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(".reg .b64 %at; .reg .b32 %x;" + text)
