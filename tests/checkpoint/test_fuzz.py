"""Fuzzing of the readers: flipped bytes, truncation, random headers and configurations.

Nothing but CheckpointError, UnsupportedError or ValueError may escape. A value may differ from the original only where the
file's own bytes of that very value were changed, and is then what those bytes say; elsewhere it is equal, or an error, or
reported as an oddity of its module.
"""

from __future__ import annotations

import copy
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoint.directories import FORMATS, GATE, UP, ct_config, dense, mo_config, parts, standard, write
from glu4 import GatedWeights
from glu4.checkpoint import Checkpoint, open_checkpoint
from glu4.errors import CheckpointError, UnsupportedError
from operands import full_range

EXPECTED = (CheckpointError, UnsupportedError, ValueError)
both = pytest.mark.parametrize("format", FORMATS)
MLP = "model.layers.0.mlp"
LAYERS = (GATE, UP, "m.experts.0.w1", "m.experts.0.w3")


def tensors_of(format: str) -> dict[str, Tensor]:
    out = dense(format, 4, 32)
    for i, leaf in enumerate(("w1", "w3")):
        out |= parts(format, f"m.experts.0.{leaf}", full_range(9 + i, 4, 32))
    return out | {f"{GATE}.bias": torch.randn(4), "model.norm.weight": torch.randn(6)}


def values(checkpoint: Checkpoint, module: str) -> tuple[Tensor, ...]:
    """(codes, block scale bytes, global scale, input scale) of one module; an input scale of None is an empty tensor."""
    matrix, input_scale = checkpoint.load_matrix(module)
    absent = torch.empty(0) if input_scale is None else input_scale
    return matrix.codes.clone(), matrix.block_scale.view(torch.uint8).clone(), matrix.global_scale.clone(), absent.clone()


def everything(path: Path) -> dict[str, Any]:
    """Module -> values, or the exception; "oddities" -> the modules they are about."""
    found: dict[str, Any] = {}
    with open_checkpoint(path) as checkpoint:
        for module in LAYERS:
            try:
                found[module] = values(checkpoint, module)
            except EXPECTED as error:
                found[module] = error
        for prefix in (MLP, "m"):
            try:
                found[prefix] = checkpoint.load_gated(prefix)
            except EXPECTED as error:
                found[prefix] = error
        found["oddities"] = {o.where for o in checkpoint.oddities}
    return found


def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def split(data: bytes) -> tuple[int, dict[str, tuple[int, int]]]:
    """(where the data begins, file offsets of every tensor) of a valid safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return 8 + size, {n: (8 + size + v["data_offsets"][0], 8 + size + v["data_offsets"][1]) for n, v in header.items()}


class Case:
    """One valid directory, its values, and a scratch directory for damaged copies."""

    def __init__(self, format: str, root: Path) -> None:
        self.format = format
        self.path = standard(root / "good", format, tensors_of(format))
        self.data = (self.path / "model.safetensors").read_bytes()
        self.start, self.spans = split(self.data)
        self.good = everything(self.path)
        self.bad = standard(root / "bad", format, tensors_of(format))

    def damaged(self, data: bytes) -> Path:
        # a new file each time: the old one may still be mapped
        file = self.bad / "model.safetensors"
        file.unlink()
        file.write_bytes(data)
        return self.bad


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest) -> Any:
    with tempfile.TemporaryDirectory() as root:
        made = Case(request.param, Path(root))
        assert all(isinstance(made.good[module], tuple) for module in LAYERS)
        yield made


def check(case: Case, found: dict[str, Any], touched: str | None) -> None:
    """`touched` is the tensor whose bytes were changed, None when it was the header or a configuration."""
    for module in LAYERS:
        now, before = found[module], case.good[module]
        if isinstance(now, Exception) or (touched is not None and touched.startswith(f"{module}.")):
            continue
        if equal(now, before):
            continue
        # the input scale alone may be gone, and then it is told
        assert equal(now[:3], before[:3]), f"{module} changed silently"
        assert now[3].numel() == 0
        assert module in found["oddities"], f"{module} lost its input scale silently"

    for prefix, gate, up in ((MLP, GATE, UP), ("m", LAYERS[2], LAYERS[3])):
        weights = found[prefix]
        if isinstance(weights, GatedWeights):
            for matrix, module in ((weights.gate, gate), (weights.up, up)):
                expected = found[module]
                assert not isinstance(expected, Exception), f"{prefix} loads although {module} does not"
                assert torch.equal(matrix.codes.reshape(expected[0].shape), expected[0])
                assert torch.equal(matrix.global_scale.reshape(()), expected[2])


def check_touched(case: Case, data: bytes, found: dict[str, Any], name: str) -> None:
    """The changed tensor, where it loads at all, is exactly what its bytes now say."""
    module, _, part = name.rpartition(".")
    if module not in LAYERS or isinstance(found[module], Exception):
        return
    start, end = case.spans[name]
    raw = torch.frombuffer(bytearray(data[start:end]), dtype=torch.uint8)
    codes, scale, g, input_scale = found[module]
    divisor = case.format == "compressed-tensors"
    if part in ("weight_packed", "weight"):
        assert torch.equal(codes.flatten(), raw)
    elif part == "weight_scale":
        assert torch.equal(scale.flatten(), raw)
        assert not bool(((raw & 0x7F) == 0x7F).any() | (raw >= 0x80).any())
    elif part in ("weight_global_scale", "weight_scale_2"):
        stored = raw.view(torch.float32)[0]
        assert bool(torch.isfinite(stored) & (stored > 0))
        assert torch.equal(g, 1 / stored if divisor else stored)
    elif part != "bias":
        stored = raw.view(torch.float32)[0]
        usable = 1 / stored if divisor else stored
        if bool(torch.isfinite(stored) & torch.isfinite(usable) & (usable > 0)):
            assert torch.equal(input_scale, usable)
        else:
            assert input_scale.numel() == 0
            assert module in found["oddities"]


def attempt(path: Path) -> dict[str, Any] | None:
    try:
        return everything(path)
    except EXPECTED:
        return None


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_flipped_bytes(case: Case, data: st.DataObject) -> None:
    where = data.draw(st.integers(0, len(case.data) - 1) | st.integers(0, case.start - 1))
    changed = bytearray(case.data)
    changed[where] ^= data.draw(st.integers(1, 255))
    found = attempt(case.damaged(bytes(changed)))
    touched = next((name for name, (a, b) in case.spans.items() if a <= where < b), None)
    if found is None:
        # a flip in the payload is never a reason not to open the rest
        assert touched is None
        return
    check(case, found, touched)
    if touched is not None:
        check_touched(case, bytes(changed), found, touched)


def test_a_silent_change_would_be_seen(case: Case) -> None:
    """The check itself: one changed value of an untouched tensor, and a lost input scale, are both caught."""
    for part, change in ((0, lambda t: t ^ 1), (2, lambda t: t * 2), (3, lambda t: t.new_empty(0))):
        found = copy.copy(case.good)
        moved = list(found[UP])
        moved[part] = change(moved[part])
        found[UP] = tuple(moved)
        with pytest.raises(AssertionError, match="silently"):
            check(case, found, touched=f"{GATE}.weight_scale")


def test_every_truncation(case: Case) -> None:
    for length in [*range(16), *range(16, len(case.data), 37), len(case.data) - 1]:
        with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read as safetensors"):
            open_checkpoint(case.damaged(case.data[:length]))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rewritten_headers(case: Case, data: st.DataObject) -> None:
    """One field of one tensor's header entry, or its name, replaced by something plausible."""
    size = struct.unpack("<Q", case.data[:8])[0]
    header = json.loads(case.data[8 : 8 + size])
    names = sorted(n for n in header if n != "__metadata__")
    name = data.draw(st.sampled_from(names))
    entry = header[name]
    kind = data.draw(st.sampled_from(("dtype", "shape", "data_offsets", "name", "swap", "drop")))
    if kind == "dtype":
        entry["dtype"] = data.draw(
            st.sampled_from(["U8", "I8", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F16", "F32", "BOOL", "", "U4"])
        )
    elif kind == "shape":
        entry["shape"] = data.draw(st.lists(st.integers(-1, 64), max_size=4) | st.permutations(entry["shape"]))
    elif kind == "data_offsets":
        entry["data_offsets"] = data.draw(st.lists(st.integers(0, len(case.data)), min_size=0, max_size=3))
    elif kind == "name":
        header[data.draw(st.sampled_from(names) | st.text(max_size=60))] = header.pop(name)
    elif kind == "drop":
        header.pop(name)
    else:
        other = data.draw(st.sampled_from(names))
        header[name], header[other] = header[other], header[name]
    text = json.dumps(header).encode()
    found = attempt(case.damaged(struct.pack("<Q", len(text)) + text + case.data[case.start :]))
    if found is not None and kind not in ("swap", "name"):  # these two give other bytes the name, which no reader can see
        check(case, found, None)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 64)
    | st.floats()
    | st.sampled_from(["", "local", "float", "int", "NVFP4", "re:(", "re:.*", "FP8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def nodes(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    for key in document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ():
        found += nodes(document[key], (*path, key))
    return found


def replace(document: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(document)
    out = copy.copy(document)
    out[path[0]] = replace(document[path[0]], path[1:], change)
    return out


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_configurations(case: Case, data: st.DataObject) -> None:
    """Configurations refuse layers or drop static input scales, each told; they never change a value."""
    file, document = (
        ("config.json", ct_config()) if case.format == "compressed-tensors" else ("hf_quant_config.json", mo_config())
    )
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(nodes(document)))
        document = replace(document, path, lambda _: data.draw(json_values))
    case.damaged(case.data)
    original = (case.bad / file).read_text()
    (case.bad / file).write_text(json.dumps(document))
    try:
        found = attempt(case.bad)
    finally:
        (case.bad / file).write_text(original)
    if found is not None:
        check(case, found, None)


@settings(max_examples=100, deadline=None)
@given(name=st.text(max_size=80), kind=st.sampled_from(FORMATS))
def test_any_tensor_name(name: str, kind: str) -> None:
    """Names are looked up, never interpreted: an odd one is an error or a plain tensor."""
    with tempfile.TemporaryDirectory() as root:
        try:
            path = write(Path(root) / "c", dense(kind, 4, 32) | {name: torch.ones(2)})
        except Exception:  # safetensors itself refuses the name, such as __metadata__
            return
        try:
            with open_checkpoint(path) as checkpoint:
                if name in checkpoint.plain_names():
                    assert torch.equal(checkpoint.load_plain(name), torch.ones(2))
                checkpoint.load_gated(MLP)
        except EXPECTED:
            pass
