"""GatedWeights: the gate and up matrices of one gated MLP, or of a stack of experts, as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from glu4 import dispatch
from glu4.backends.hopper.pack import pack_gated
from glu4.nvfp4 import NVFP4Tensor

__all__ = ["GatedWeights"]

_PARTS = ("codes", "block_scale", "global_scale")


class GatedWeights:
    """Gate and up weights `[N, K]`, or stacked by expert `[E, N, K]`, each with its own global scale.

    input_scale  float32 multiplier for quantising activations, `[]` or `[E]`; None means dynamic (from amax)
    gate_bias    `[N]` or `[E, N]`, float16, bfloat16 or float32; added before the activation, as is up_bias

    Raises TypeError or ValueError when gate and up differ in shape or device, or a bias or scale does not fit.
    """

    def __init__(
        self,
        gate: NVFP4Tensor,
        up: NVFP4Tensor,
        input_scale: Tensor | None = None,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
    ) -> None:
        for name, w in (("gate", gate), ("up", up)):
            if not isinstance(w, NVFP4Tensor):
                raise TypeError(f"{name}: expected an NVFP4Tensor, got {type(w).__name__}")
        if gate.shape != up.shape:
            raise ValueError(f"gate and up must have one shape, got {list(gate.shape)} and {list(up.shape)}")
        if gate.ndim not in (2, 3):
            raise ValueError(f"gate, up: expected [N, K] or [E, N, K], got shape {list(gate.shape)}")
        if gate.device != up.device:
            raise ValueError(f"gate is on {gate.device}, up is on {up.device}: one device is needed")
        for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
            if bias is not None:
                _check_vector(name, bias, gate)
                if tuple(bias.shape) != tuple(gate.shape[:-1]):
                    raise ValueError(f"{name}: expected shape {list(gate.shape[:-1])}, got {list(bias.shape)}")
        if input_scale is not None:
            _check_vector("input_scale", input_scale, gate)
            _check_input_scale(input_scale, tuple(gate.shape[:-2]))
        self.gate = gate
        self.up = up
        self.input_scale = input_scale
        self.gate_bias = gate_bias
        self.up_bias = up_bias
        self.packed: Tensor | None = None  # what `prepare` made for a backend that wants its own order

    @property
    def shape(self) -> torch.Size:
        """`[N, K]` or `[E, N, K]`, of gate and of up alike."""
        return self.gate.shape

    @property
    def device(self) -> torch.device:
        return self.gate.device

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices with their scales."""
        return self.gate.nbytes + self.up.nbytes

    def __repr__(self) -> str:
        scale = "dynamic" if self.input_scale is None else "static"
        return f"GatedWeights(shape={list(self.shape)}, input_scale={scale}, device={self.device})"

    def __getattr__(self, name: str) -> Any:
        # reached only for attributes that are not there
        if name in ("gate", "up", "input_scale", "gate_bias", "up_bias", "shape", "device", "nbytes"):
            raise AttributeError("these weights were emptied by prepare(free_original=True); use the weights it returned")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _map(self, matrix: Callable[[NVFP4Tensor], NVFP4Tensor], vector: Callable[[Tensor], Tensor]) -> GatedWeights:
        def optional(t: Tensor | None) -> Tensor | None:
            return None if t is None else vector(t)

        made = GatedWeights(matrix(self.gate), matrix(self.up), None, optional(self.gate_bias), optional(self.up_bias))
        made.input_scale = self.input_scale
        return made

    def to(self, device: torch.device | str) -> GatedWeights:
        """The same weights on another device."""
        moved = self._map(lambda w: w.to(device), lambda t: t.to(device))
        moved.input_scale = None if self.input_scale is None else self.input_scale.to(device)
        return moved

    def prepare(self, device: torch.device | str, free_original: bool = False) -> GatedWeights:
        """These weights on `device`, checked once and in the form its backend wants.

        On a Hopper GPU whose kernels are compiled, weights `[N, K]` are packed once into their order, besides the NVFP4 form.
        The portable backend reads NVFP4 as it is, so elsewhere preparing is a move and a check of every scale, which
        synchronises. `free_original` empties this object, so that only the prepared one holds memory.
        Raises ValueError for NaN, negative or infinite scales.
        """
        prepared = self.to(device)
        prepared.gate.check_values()
        prepared.up.check_values()
        if prepared.gate.ndim == 2 and dispatch.packs(prepared.device):
            prepared.packed = pack_gated(prepared.gate, prepared.up)
        if free_original:
            self.packed = None
            del self.gate, self.up, self.gate_bias, self.up_bias, self.input_scale
        return prepared

    def shard(self, rank: int, world: int) -> GatedWeights:
        """Rows N of one tensor-parallel rank; raises ValueError when N does not divide by `world`."""
        n = self.gate.rows
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 <= rank < {world}, got {rank}")
        if n % world:
            raise ValueError(f"world: N = {n} does not divide into {world} shards")
        size = n // world
        return self._map(
            lambda w: w.narrow_rows(rank * size, size).contiguous(), lambda t: t.narrow(-1, rank * size, size).contiguous()
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors, for safetensors or torch.save; `from_state_dict` is the inverse."""
        state = {f"{name}.{part}": getattr(w, part) for name, w in (("gate", self.gate), ("up", self.up)) for part in _PARTS}
        for name in ("input_scale", "gate_bias", "up_bias"):
            value = getattr(self, name)
            if value is not None:
                state[name] = value
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> GatedWeights:
        """Weights from what `state_dict` gave; raises ValueError naming missing or unknown entries."""
        optional = ("input_scale", "gate_bias", "up_bias")
        required = [f"{name}.{part}" for name in ("gate", "up") for part in _PARTS]
        missing = [key for key in required if key not in state]
        unknown = [key for key in state if key not in required and key not in optional]
        if missing or unknown:
            raise ValueError(f"state: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
        gate, up = (NVFP4Tensor(*(state[f"{name}.{part}"] for part in _PARTS)) for name in ("gate", "up"))
        return cls(gate, up, **{name: state.get(name) for name in optional})


def _check_vector(name: str, value: Tensor, gate: NVFP4Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.device != gate.device:
        raise ValueError(f"{name} is on {value.device}, gate is on {gate.device}: one device is needed")


def _check_input_scale(scale: Tensor, batch: tuple[int, ...]) -> None:
    if scale.dtype != torch.float32 or tuple(scale.shape) not in ((), batch):
        raise ValueError(
            f"input_scale: expected float32 of shape [] or {list(batch)}, got {scale.dtype} of shape {list(scale.shape)}"
        )
    checked = scale.device.type == "cpu" and not torch.compiler.is_compiling()
    if checked and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"input_scale: expected positive finite multipliers, got {scale.flatten()[:4].tolist()}")
