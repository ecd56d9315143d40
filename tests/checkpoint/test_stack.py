"""Stacks of experts: read one expert at a time, names of Qwen3-MoE and Mixtral, down projections of either kind."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint.directories import FORMATS, parts, standard
from glu4 import CheckpointError, NVFP4Tensor
from glu4.checkpoint import open_checkpoint
from glu4.checkpoint.files import TensorFiles
from glu4.checkpoint.stack import Stack, stack_plain
from operands import full_range

QWEN, MIXTRAL = "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts"
LEAVES = {QWEN: ("gate_proj", "up_proj", "down_proj"), MIXTRAL: ("w1", "w3", "w2")}


def tensors(format: str, prefix: str, count: int, n: int = 32, k: int = 64, down: str = "nvfp4") -> dict[str, Tensor]:
    """Gate, up and down of `count` experts; stored scales differ everywhere."""
    found: dict[str, Tensor] = {}
    gate, up, last = LEAVES[prefix]
    for e in range(count):
        for i, (leaf, shape) in enumerate(((gate, (n, k)), (up, (n, k)), (last, (k, n)))):
            name, stored = f"{prefix}.{e}.{leaf}", 0.5 + 0.25 * (3 * e + i)
            if leaf == last and down == "plain":
                found[f"{name}.weight"] = torch.full(shape, float(e)).bfloat16()
            else:
                found |= parts(format, name, full_range(3 * e + i, *shape), stored=stored, input_stored=stored)
    return found


@pytest.mark.parametrize("prefix", [QWEN, MIXTRAL])
@pytest.mark.parametrize("format", FORMATS)
def test_down_projections(tmp_path: Path, format: str, prefix: str) -> None:
    path = standard(tmp_path, format, tensors(format, prefix, 11), shards=3)  # eleven: names sort as 0, 1, 10, 2
    with open_checkpoint(path) as checkpoint:
        down, scale = checkpoint.load_down(prefix)
        some, _ = checkpoint.load_down(prefix, [7, 2])
    assert isinstance(down, NVFP4Tensor)
    assert isinstance(some, NVFP4Tensor)
    assert scale is not None
    assert (list(down.shape), list(scale.shape)) == ([11, 64, 32], [11])
    for e in range(11):
        expected, stored = full_range(3 * e + 2, 64, 32), 0.5 + 0.25 * (3 * e + 2)
        g = 1 / torch.tensor(stored) if format == "compressed-tensors" else torch.tensor(stored)
        assert torch.equal(down[e].codes, expected.codes)
        assert torch.equal(down[e].block_scale.float(), expected.block_scale.float())
        assert (down[e].global_scale, scale[e]) == (g, g)
    for place, e in enumerate((7, 2)):
        assert torch.equal(some[place].codes, down[e].codes)


@pytest.mark.parametrize("format", FORMATS)
def test_down_projections_that_are_not_quantised(tmp_path: Path, format: str) -> None:
    path = standard(tmp_path, format, tensors(format, QWEN, 3, down="plain"))
    with open_checkpoint(path) as checkpoint:
        down, scale = checkpoint.load_down(QWEN)
    assert isinstance(down, Tensor)
    assert scale is None
    assert down.dtype == torch.bfloat16
    assert down[:, 0, 0].tolist() == [0.0, 1.0, 2.0]


def refused(path: Path, prefix: str, message: str) -> None:
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.load_down(prefix)


def test_down_projections_that_do_not_fit_together(tmp_path: Path) -> None:
    good = tensors("modelopt", QWEN, 2)
    odd = good | parts("modelopt", f"{QWEN}.1.down_proj", full_range(1, 64, 48))
    message = r"experts.1.down_proj is \[64, 48\], other experts' is \[64, 32\]"
    refused(standard(tmp_path / "a", "modelopt", odd), QWEN, message)
    lacking = {name: t for name, t in good.items() if ".1.down_proj" not in name}
    refused(standard(tmp_path / "b", "modelopt", lacking), QWEN, r"no NVFP4 matrix at .*experts\.1\.down_proj")
    plain = tensors("modelopt", QWEN, 2, down="plain")
    plain[f"{QWEN}.1.down_proj.weight"] = torch.zeros(64, 16).bfloat16()
    message = r"experts.1.down_proj is torch.bfloat16 \[64, 16\], other experts' is torch.bfloat16 \[64, 32\]"
    refused(standard(tmp_path / "c", "modelopt", plain), QWEN, message)
    message = r"model\.layers\.0\.mlp is a dense MLP; load_matrix reads its down_proj"
    refused(standard(tmp_path / "d", "modelopt"), "model.layers.0.mlp", message)


@pytest.mark.parametrize("prefix", [QWEN, MIXTRAL])
@pytest.mark.parametrize("format", FORMATS)
def test_one_experts_tensors_at_a_time(tmp_path: Path, format: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of one expert is forgotten before the next one's is: eight tensors of gate and up, four of a down."""
    path = standard(tmp_path, format, tensors(format, prefix, 9))
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    load = TensorFiles.load

    def counted(self: TensorFiles, name: str) -> Tensor:
        nonlocal most
        tensor = load(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(t() is not None for t in alive))
        return tensor

    monkeypatch.setattr(TensorFiles, "load", counted)
    with open_checkpoint(path) as checkpoint:
        most = 0
        weights = checkpoint.load_gated(prefix)
        # the next expert's gate is read while the last pair is still held by the loop
        assert most <= 2 * 8
        most, alive[:] = 0, []
        checkpoint.load_down(prefix)
        assert most <= 2 * 4
    assert list(weights.shape) == [9, 32, 64]


def test_peak_memory_is_the_stack_and_little_more(tmp_path: Path) -> None:
    import subprocess
    import sys

    count, n, k = 24, 512, 1024
    path = standard(tmp_path, "modelopt", tensors("modelopt", QWEN, count, n, k))
    code = f"""
import torch
torch.set_num_threads(1)
from glu4.checkpoint import open_checkpoint
from glu4.checkpoint.files import TensorFiles
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
peak, load = 0, TensorFiles.load
def watched(self, name):
    global peak
    peak = max(peak, anonymous())
    return load(self, name)
TensorFiles.load = watched
with open_checkpoint({str(path)!r}) as checkpoint:
    checkpoint.load_gated("{QWEN}", [0])
    before = anonymous()
    stack = checkpoint.load_gated("{QWEN}")
    print((max(peak, anonymous()) - before) * 1024 / stack.nbytes)
"""
    ratio = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    # one expert is a 24th of it; two stacks at once would be 2
    assert 0.8 < ratio < 1.3


def test_a_stack_is_whole_or_an_error() -> None:
    stack = Stack(2)
    assert (stack.shape, stack.fits(full_range(1, 8, 32))) == ([], True)
    stack.add(full_range(1, 8, 32))
    assert (stack.shape, stack.fits(full_range(1, 8, 48))) == ([8, 32], False)
    with pytest.raises(ValueError, match="stack: 1 of 2 matrices are there"):
        stack.matrices()
    held: dict[str, Any] = {"a": torch.zeros(2), "b": torch.zeros(2).half()}
    with pytest.raises(CheckpointError, match=r"b is torch.float16 \[2\], other experts' is torch.float32 \[2\]"):
        stack_plain(held.__getitem__, ["a", "b"])
