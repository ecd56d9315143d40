"""The kernels of tests/emulator/kernels: their launch descriptions fit their PTX, and their expected results are right."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import numpy as np
import pytest

from emulator.kernels import launches
from glu4.emulator.formats import decode
from glu4.emulator.ptx import parse
from glu4.emulator.tensor_map import TensorMap

SIZES = {"u32": 4, "i32": 4, "f32": 4, "u64": 8, "ptr": 8, "tensor_map": 128}
ALL = pytest.mark.parametrize("name", launches.names())


def test_both_compilers_and_every_kind_of_mma_are_there() -> None:
    assert len(launches.names()) >= 16
    text = "".join(launches.load(name)[0] for name in launches.names())
    for kind in ("f16", "tf32", "f8f6f4", "mxf8f6f4", "mxf4.block_scale", "mxf4nvf4"):
        assert f"kind::{kind}" in text
    for form in ("cta_group::2.kind::mxf4nvf4", "cta_group::2.kind::f16", "multicast::cluster", "setmaxnreg", "cp.async.ca",
                 "16x32bx2", "16x64b", "16x128b", "16x256b", "32x128b", "clusterlaunchcontrol"):  # fmt: skip
        assert form in text


@ALL
def test_files_are_small_and_name_no_place(name: str) -> None:
    ptx, _, _ = launches.load(name)
    assert len(ptx) < 300_000
    assert not re.search(r'"[^"]*/', ptx)
    assert "debug_info" not in ptx


@ALL
def test_descriptions_fit_their_ptx(name: str) -> None:
    ptx, launch, problem = launches.load(name)
    entry = parse(ptx).entry(launch["entry"])
    assert len(entry.params) == len(launch["params"])
    used = set()
    for parameter, described in zip(entry.params, launch["params"]):
        kind, value = next(iter(described.items()))
        assert parameter.size == (len(value) // 2 if kind == "bytes" else SIZES[kind])
        if kind == "ptr":
            used.add(value)
        if kind == "tensor_map":
            used.add(value["buffer"])
            buffer = launch["buffers"][value["buffer"]]
            tensor_map = TensorMap(
                0, value["element_type"], tuple(value["global_shape"]), tuple(value["global_strides_bytes"]),
                tuple(value["box_shape"]), tuple(value["element_strides"]), value["swizzle"],
            )  # fmt: skip
            size = math.prod(buffer["shape"]) * np.dtype(buffer["dtype"]).itemsize
            assert math.prod(tensor_map.global_shape) * tensor_map.bits // 8 == size
    assert used == set(launch["buffers"])
    assert launch["buffers"] == problem.buffers()
    assert set(launches.make_inputs(problem)) == set(launch["buffers"]) - {"C"}


def scale_place(p: launches.Problem, row: int, index: int) -> int:
    if p.scale_layout == "linear":
        return row * (p.k // p.block) + index
    atoms = math.ceil(p.k / p.block / 4)
    return (row // 128 * atoms + index // 4) * 512 + (row % 32) * 16 + (row // 32) % 4 * 4 + index % 4


def element(p: launches.Problem, inputs: dict[str, np.ndarray], name: str, row: int, k: int) -> Fraction:
    """One scaled element, from the bytes."""
    if p.element == "e2m1":
        value = decode("e2m1", inputs[name][row, k // 2] >> 4 * (k % 2))
    else:
        value = decode(p.element, inputs[name][(row, k) if p.k_major[name != "A"] else (k, row)])
    scale = 1.0
    if p.scale:
        scale = float(decode(p.scale, inputs[f"SCALE_{name}"].reshape(-1)[scale_place(p, row, k // p.block)]))
    return Fraction(float(value)) * Fraction(scale)


@ALL
def test_expected_results_equal_exact_sums(name: str) -> None:
    _, _, p = launches.load(name)
    inputs = launches.make_inputs(p)
    result, bound = launches.expect(p, inputs)
    assert np.isfinite(result).all()
    if p.out == "f16":
        assert np.abs(result).max() < 65504
    # a product does not change when both operands swap elements of a block, so the operands are looked at too
    for weight in ("A", *p.weights):
        elements = [float(element(p, inputs, weight, 1, k)) for k in range(p.k)]
        assert launches.operand(p, inputs, weight)[1].tolist() == elements
    rng = np.random.default_rng(5)
    for row, column in [(0, 0), (p.m - 1, p.n - 1), *zip(rng.integers(0, p.m, 3).tolist(), rng.integers(0, p.n, 3).tolist())]:
        totals = [
            sum(element(p, inputs, "A", row, k) * element(p, inputs, weight, column, k) for k in range(p.k))
            for weight in p.weights
        ]
        exact = float(totals[0])
        if p.global_scales:
            gate, up = (float(t) * g for t, g in zip(totals, p.global_scales))
            exact = gate / (1 + math.exp(-gate)) * up
        assert result[row, column] == pytest.approx(exact, rel=1e-12)
        assert bound[row, column] > 0


@ALL
def test_bounds_tell_a_wrong_kernel_from_a_right_one(name: str) -> None:
    """A result of the next row, or with one scale doubled, is out of bounds almost everywhere."""
    _, _, p = launches.load(name)
    inputs = launches.make_inputs(p)
    result, bound = launches.expect(p, inputs)
    assert (np.abs(np.roll(result, 1, axis=0) - result) > bound).mean() > 0.9
    if p.scale:
        changed = dict(inputs)
        changed["SCALE_A"] = inputs["SCALE_A"] + np.uint8(8 if p.scale == "ue4m3" else 1)  # every scale twice as large
        assert (np.abs(launches.expect(p, changed)[0] - result) > bound).mean() > 0.9


@ALL
def test_rounding_the_exact_result_is_within_the_bound(name: str) -> None:
    _, _, p = launches.load(name)
    result, bound = launches.expect(p, launches.make_inputs(p))
    if p.out in ("f16", "f32"):
        stored = result.astype(launches.STORAGE[p.out])
    else:
        bits = result.astype(np.float32).view(np.uint32).astype(np.uint64)
        stored = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    assert (np.abs(launches.read_out(p, stored) - result) <= bound).all()
