"""A launch's parameters are, byte for byte, what CuTe DSL's own host code passes for the same call."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.blackwell.kernels import KERNELS, PROCESSORS, Kernels
from fake_blackwell import FakeBlackwell, fake_blackwell
from glu4.backends.blackwell import arguments
from glu4.backends.blackwell.arguments import ADDRESSES, Shape
from glu4.backends.blackwell.config import Config
from glu4.backends.blackwell.spec import KernelSpec
from glu4.compiled.building import param_sizes
from glu4.emulator.capture import capture, pointer, scalar
from glu4.emulator.tensor_map import decode, encode

needs_dsl = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs CuTe DSL to compile the kernels")
CONSTANTS = (1.702, 1.0, 7.0)
PLACES = {name: 0x7000_0000_0000 + (i << 36) for i, name in enumerate(ADDRESSES)}
# two matrices whose sizes differ, a tail in each extent, and strides of C beyond its own
SHAPES = (Shape(1, 130, 72, 1056, 72, 9360), Shape(3, 257, 136, 288, 144, 144 * 260))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBlackwell]:
    with fake_blackwell(monkeypatch) as fake:
        yield fake


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> Kernels:
    return Kernels({name: spec for name, (spec, _) in KERNELS.items()}, compiled)


def captured(kernels: Kernels, name: str, shape: Shape, flags: int) -> Any:
    """The launch that the compiled host function makes."""
    kernel = kernels[name]
    order = ("a", "scale_a", "gate", "scale_gate", "up", "scale_up", "global_a", "global_gate", "global_up", "gate_bias",
             "up_bias", "out", "workspace")  # fmt: skip
    given = [pointer(PLACES[part]) for part in order]
    given += [scalar("i64", shape.row_stride), scalar("i64", shape.batch_stride), scalar("i32", flags)]
    given += [scalar("f32", v) for v in CONSTANTS] + [scalar("i32", PROCESSORS)]
    given += [scalar("i32", v) for v in (shape.batch, shape.m, shape.n, shape.k)] + [pointer(0)]
    (launch,) = capture(kernel.directory / f"{kernel.spec.name}.o", kernel.ptx, given)
    return launch


def canonical(data: bytes) -> bytes:
    """Of a tensor map what hardware reads: 64 bytes, without the bit that varies with the writer."""
    return encode(decode(data)) if len(data) == 128 else data


@pytest.mark.slow
@needs_dsl
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=["one", "batch"])
def test_parameters_are_those_of_the_host_code(cuda: FakeBlackwell, kernels: Kernels, name: str, shape: Shape) -> None:
    spec = KERNELS[name][0]
    launch = captured(kernels, name, shape, 29)
    ours = arguments.parameters(spec, shape, PLACES, 29, CONSTANTS)
    assert [len(b) for b in ours] == [len(b) for b in launch.params] == arguments.sizes(spec) == param_sizes(kernels[name].ptx)
    for i, (mine, theirs) in enumerate(zip(ours[2:], launch.params[2:], strict=True)):  # two tiled MMAs hold nothing
        assert canonical(mine) == canonical(theirs), f"parameter {i + 2}"
    c = spec.config
    assert launch.grid == c.grid(shape.m, shape.n, shape.batch, PROCESSORS)
    assert launch.block == (c.threads, 1, 1)
    assert launch.cluster == ((2, 1, 1) if c.ctas == 2 else None)
    assert launch.dynamic_smem == c.shared_bytes(spec.weights)
    assert launch.attributes[6][:4] == struct.pack("=i", c.pdl)  # programmatic stream serialization, asked for or not


@pytest.mark.slow
@needs_dsl
def test_every_other_byte_would_be_found(cuda: FakeBlackwell, kernels: Kernels) -> None:
    """Planted faults: one number changed each."""
    spec, shape = KERNELS["tma store"][0], SHAPES[1]
    right = [canonical(b) for b in captured(kernels, "tma store", shape, 29).params[2:]]
    for field in ("batch", "m", "n", "k", "row_stride", "batch_stride"):
        step = 32 if field == "k" else 8 if "stride" in field else 128
        changed = Shape(**{**vars(shape), field: getattr(shape, field) + step})
        assert [canonical(b) for b in arguments.parameters(spec, changed, PLACES, 29, CONSTANTS)[2:]] != right
    for name in ADDRESSES:
        moved = {**PLACES, name: PLACES[name] + 64}
        assert [canonical(b) for b in arguments.parameters(spec, shape, moved, 29, CONSTANTS)[2:]] != right
    assert [canonical(b) for b in arguments.parameters(spec, shape, PLACES, 28, CONSTANTS)[2:]] != right


# ---- without CuTe DSL ----


@pytest.mark.parametrize("store", ["direct", "tma"])
@pytest.mark.parametrize("dual", [True, False])
def test_addresses_stand_where_addresses_of_says(cuda: FakeBlackwell, store: str, dual: bool) -> None:
    spec = KernelSpec(Config(tile_n=64, stages=2, store=store), "f16", dual)
    values = arguments.parameters(spec, SHAPES[1], PLACES, 0, CONSTANTS)
    assert [len(v) for v in values] == arguments.sizes(spec)
    places = arguments.addresses_of(spec)
    assert {i for i, _ in places} == {
        i for i, v in enumerate(values) if v[:8] in {struct.pack("=Q", p) for p in PLACES.values()}
    }
    for i, name in places:
        assert values[i][:8] == struct.pack("=Q", PLACES[name])
    used = {name for _, name in places}
    assert set(ADDRESSES) - used == (set() if dual else {"up", "scale_up"})


def test_a_map_that_the_driver_refuses_is_an_error(cuda: FakeBlackwell) -> None:
    with pytest.raises(RuntimeError, match=r"cuTensorMapEncodeTiled of \(40, 130, 1\) with strides \(20, 2600\) and box"):
        arguments.parameters(KernelSpec(Config(), "f16"), Shape(1, 130, 72, 40, 72, 9360), PLACES, 0, CONSTANTS)
