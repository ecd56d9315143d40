"""The peers: chosen by name, left out with a reason, and handed the right operands. Their libraries are replaced by stand-ins
that decode what they are given, so that an operand in a wrong place gives a wrong result."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from glu4.activation import SILU
from glu4.bench import peers
from glu4.bench.operands import FORMATS, Operands, draw
from glu4.bench.peers import cublas, humming, quack
from glu4.bench.timing import copies
from glu4.nvfp4 import NVFP4Tensor

BY_NAME = {p.name: p for p in (*cublas.PEERS, *quack.PEERS, *humming.PEERS)}


def test_cublas_fp16_is_always_among_them() -> None:
    assert [p.name for p in peers.select("none")] == ["cublas_fp16"]
    assert [p.name for p in peers.select("quack_w4a16, cublas_bf16")] == ["cublas_fp16", "cublas_bf16", "quack_w4a16"]
    assert [p.name for p in peers.select("auto")] == list(BY_NAME)


def test_an_unknown_name_is_refused_by_naming_what_there_is() -> None:
    with pytest.raises(
        ValueError,
        match=r"peers: expected auto, none or some of cublas_fp16, .*humming_bf16, torch_grouped_mm_bf16, .*, got 'marlin'",
    ):
        peers.select("cublas_bf16,marlin")


def test_one_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "no-such-thing is not installed (measured with 1.0); docs/benchmarks.md says how"
    assert peers.not_installed("no-such-thing", "1.0") == message
    assert peers.not_installed("torch", "2.11") is None
    monkeypatch.setattr(cublas, "find_spec", lambda name: None)
    assert BY_NAME["cublas_fp16"].missing() == "Triton is not installed; it comes with CUDA builds of torch"


def _installed(path: Path, name: str, text: str) -> None:
    """A distribution of that name, version 1.0, with one module."""
    (path / f"{name}.py").write_text(text)
    (path / f"{name}-1.0.dist-info").mkdir()
    (path / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def test_one_that_lacks_what_it_needs_is_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    _installed(tmp_path, "lacking_peer", "import no_such_dependency")
    _installed(tmp_path, "broken_peer", "raise OSError('libcute.so: cannot open shared object file')")
    _installed(tmp_path, "sound_peer", "")

    def no_compiler() -> None:
        raise RuntimeError("No suitable CUDA 13 environment found.")

    def reason(name: str, ready: Callable[[], object] | None = None) -> str | None:
        return peers.not_usable(name, "1.0", (name,), ready)

    assert reason("lacking_peer") == (
        "lacking_peer 1.0 cannot be imported: ModuleNotFoundError: No module named 'no_such_dependency'"
    )
    assert reason("broken_peer") == ("broken_peer 1.0 cannot be imported: OSError: libcute.so: cannot open shared object file")
    assert reason("sound_peer", no_compiler) == (
        "sound_peer 1.0 cannot run here: RuntimeError: No suitable CUDA 13 environment found."
    )
    assert reason("sound_peer") is None
    assert "absent_peer is not installed" in (reason("absent_peer") or "")


@pytest.mark.parametrize(("name", "module"), [("quack_w4a16", "quack.gemm_w4"), ("humming_fp16", "humming.forward")])
def test_each_imports_what_it_calls_before_it_is_chosen(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    imported: list[str] = []

    def pretend(module: str) -> object:
        imported.append(module)
        raise ModuleNotFoundError("No module named 'pydantic'")

    peers.not_usable.cache_clear()
    monkeypatch.setattr(peers, "version", lambda distribution: "0.0")
    monkeypatch.setattr(peers, "import_module", pretend)
    assert "0.0 cannot be imported: ModuleNotFoundError: No module named 'pydantic'" in (BY_NAME[name].missing() or "")
    assert imported[0].split(".")[0] == module.split(".")[0]
    monkeypatch.setattr(peers, "import_module", lambda module: imported.append(module))
    monkeypatch.setattr(humming, "import_module", lambda module: imported.append(module))
    peers.not_usable.cache_clear()
    reason = BY_NAME[name].missing()
    assert module in imported
    assert reason is None or "cannot run here" in reason  # of what humming compiles with, there is nothing here
    peers.not_usable.cache_clear()


def test_each_says_what_it_holds() -> None:
    assert {name: (p.weights, p.x_format, p.roundings) for name, p in BY_NAME.items()} == {
        "cublas_fp16": ("16-bit", "float16", 3),
        "cublas_bf16": ("16-bit", "bfloat16", 3),
        "quack_w4a16": ("nvfp4", "bfloat16", 3),
        "quack_gated_fp16": ("16-bit", "float16", 1),
        "quack_gated_bf16": ("16-bit", "bfloat16", 1),
        "humming_fp16": ("nvfp4", "float16", 3),
        "humming_bf16": ("nvfp4", "bfloat16", 3),
    }
    assert not any(p.specified for p in BY_NAME.values())


# ---- stand-ins ----


def _silu_mul(both: Tensor, out: Tensor) -> None:
    gate, up = both.double().chunk(2, 1)
    out.copy_(SILU(gate, up))


class _QuackW4:
    prepared = 0

    def prepare_w4_weight(self, codes: Tensor, scales: Tensor, wformat: str) -> tuple[Tensor, Tensor]:
        assert wformat == "nvfp4"
        self.prepared += 1
        return codes.clone(), scales.clone()

    def gemm_w4a16(self, x: Tensor, blob: Tensor, sf: Tensor, *, tensor_scale: float, out: Tensor, wformat: str) -> Tensor:
        weight = NVFP4Tensor(blob, sf, torch.tensor(tensor_scale)).dequantize(torch.float32)
        return out.copy_(x.float() @ weight.t())


def _gemm_gated(x: Tensor, weight: Tensor, *, activation: str, store_preact: bool, tuned: bool) -> tuple[None, Tensor]:
    assert (activation, store_preact, tuned) == ("swiglu", False, False)
    both = x.double() @ weight.double()
    return None, SILU(both[:, 0::2], both[:, 1::2]).to(x.dtype)


class _HummingLayer:
    def __init__(self, **kwargs: object) -> None:
        assert kwargs.pop("weight_config") == {"quant_method": "modelopt", "quant_algo": "nvfp4"}
        self.humming_config = SimpleNamespace(**kwargs)
        self.locks = torch.zeros(4)

    def cuda(self) -> _HummingLayer:
        return self

    def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def transform(self) -> None:
        self.weight, self.weight_scale = self.tensors["weight"], self.tensors["weight_scale"]
        self.weight_scale_2 = self.tensors["weight_scale_2"]


def _humming_forward(
    config: SimpleNamespace,
    *,
    inputs: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    locks: Tensor,
    compute_config: dict[str, object],
    tuning_config: list[list[object]],
) -> Tensor:
    assert (config.shape_n, config.shape_k, config.torch_dtype) == (weight.shape[0], 2 * weight.shape[1], inputs.dtype)
    assert tuning_config == [[8, 32, {"for": "this m"}]]
    decoded = NVFP4Tensor(weight, weight_scale, weight_scale_2[0]).dequantize(torch.float32)
    return (inputs.float() @ decoded.t()).to(inputs.dtype)


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    intervals = [[0, 8, {}], [8, 32, {"for": "this m"}], [32, 1 << 30, {}]]
    modules = {
        "glu4.bench.peers.silu_mul": {"silu_mul": _silu_mul},
        "quack": {},
        "quack.gemm_w4": {name: getattr(_QuackW4(), name) for name in ("prepare_w4_weight", "gemm_w4a16")},
        "quack.gemm_interface": {"gemm_gated": _gemm_gated},
        "humming": {},
        "humming.layer": {"HummingLayer": _HummingLayer},
        "humming.tune": {"get_heuristics_config": lambda layer_config, device: intervals},
        "humming.forward": {"humming_forward": _humming_forward},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        for key, value in contents.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> Operands:
    monkeypatch.setattr("glu4.bench.timing.COLD_BYTES", 200_000)
    return draw(24, 64, 128, "cpu")


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_peer_is_handed_the_right_operands(name: str, operands: Operands) -> None:
    peer = BY_NAME[name]
    calls = peer.prepare(operands)
    weight_bytes = 2 * 64 * 128 * (2 if peer.weights == "16-bit" else 9 / 16)
    assert len(calls) == copies(int(weight_bytes) + 2 * 24 * 128)
    for call in (calls[0], calls[-1]):
        found = operands.check(call(), peer.x_format, peer.roundings, peer.specified)
        assert found.wrong == ""
        assert 0 < found.fro_rel_err < torch.finfo(FORMATS[peer.x_format]).eps


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", list(BY_NAME))
def test_gate_and_up_exchanged_would_be_seen(name: str, operands: Operands) -> None:
    peer = BY_NAME[name]
    exchanged = Operands(operands.m, operands.n, operands.k, operands.up, operands.gate, operands.normal)
    assert operands.check(peer.prepare(exchanged)[0](), peer.x_format, peer.roundings, peer.specified).wrong


@pytest.mark.usefixtures("_stand_ins")
def test_quack_says_which_shapes_it_takes() -> None:
    with pytest.raises(ValueError, match="gemm_w4a16 takes 2N that is a multiple of 128, got N = 48"):
        BY_NAME["quack_w4a16"].prepare(draw(4, 48, 64, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(BY_NAME))
def test_on_a_gpu_with_the_real_library(name: str) -> None:
    peer = BY_NAME[name]
    reason = peer.missing()
    if reason is not None:
        pytest.skip(reason)
    operands = draw(24, 256, 512, "cuda")
    found = operands.check(peer.prepare(operands)[0](), peer.x_format, peer.roundings, peer.specified)
    assert found.wrong == ""
