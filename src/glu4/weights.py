"""Weights as one value, in NVFP4 and in the order that a kernel wants: GatedWeights for a gated MLP, and LinearWeight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from glu4 import dispatch
from glu4.backends.blackwell import launch as blackwell
from glu4.backends.blackwell import moe_launch
from glu4.backends.blackwell.direct import Direct as BlackwellDirect
from glu4.backends.hopper import grouped_launch
from glu4.backends.hopper import launch as hopper
from glu4.backends.hopper.direct import Direct
from glu4.backends.hopper.pack import UNIT_WORDS, pack_gated, pack_matrix, unpack_gated, unpack_matrix
from glu4.backends.tokens import launch as tokens_launch
from glu4.errors import UnsupportedError
from glu4.nvfp4 import BLOCK, Layout, NVFP4Tensor, _unchecked

__all__ = ["GatedWeights", "LinearWeight", "outline", "pack", "unpack"]

_PARTS = ("codes", "block_scale", "global_scale")
_OPTIONAL = ("input_scale", "gate_bias", "up_bias")
_ROWS_AT_ONCE = 1024  # packing takes some 10 bytes of temporary memory a value


# ---- the packed form ----


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse_capture(device: torch.device) -> None:
    if _capturing(device):
        raise UnsupportedError(
            "weights: a CUDA graph is being captured, and these are not packed yet; prepare GatedWeights or a LinearWeight "
            "before"
        )


def pack(matrices: tuple[NVFP4Tensor, ...]) -> Tensor:
    """Gate and up, or one matrix, `[N, K]` or `[L, N, K]`, as the Hopper kernels read them: of `pack_gated` or `pack_matrix`.

    Returns int32 `[tiles, units, 576]` or `[L, tiles, units, 576]`, followed in memory by one spare unit. Refuses to run while
    a CUDA graph is captured, because each replay would pack again.
    """
    _refuse_capture(matrices[0].device)
    make, rows = (pack_gated, 32) if len(matrices) == 2 else (pack_matrix, 64)
    first = matrices[0]
    stack = tuple(m.to_linear() for m in matrices)
    shape = (*first.shape[:-2], -(-first.rows // rows), -(-first.k // 64), UNIT_WORDS)
    size = torch.Size(shape).numel()
    buffer = torch.zeros(size + UNIT_WORDS, dtype=torch.int32, device=first.device)
    packed = buffer[:size].view(shape)
    for i, target in enumerate(packed.view(-1, *shape[-3:])):
        one = stack if first.ndim == 2 else tuple(m[i] for m in stack)
        for start in range(0, first.rows, _ROWS_AT_ONCE):
            part = make(*(m.narrow_rows(start, min(_ROWS_AT_ONCE, first.rows - start)) for m in one))
            target[start // rows : start // rows + part.shape[0]] = part
    return packed


def unpack(packed: Tensor, n: int, k: int, scales: tuple[Tensor, ...]) -> tuple[NVFP4Tensor, ...]:
    """The inverse of `pack`, given N, K and the global scales; codes of blocks with scale zero come back as zero."""
    if packed.ndim == 4:
        items = [unpack(own, n, k, tuple(s[i] for s in scales)) for i, own in enumerate(packed)]
        return tuple(_stacked(parts, scale) for parts, scale in zip(zip(*items, strict=True), scales, strict=True))
    if len(scales) == 2:
        return unpack_gated(packed, n, k, scales[0], scales[1])
    return (unpack_matrix(packed, n, k, scales[0]),)


def _stacked(parts: Sequence[NVFP4Tensor], scale: Tensor) -> NVFP4Tensor:
    scales = torch.stack([p.block_scale.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn)
    return _unchecked(torch.stack([p.codes for p in parts]), scales, scale)


def outline(n: int, k: int, global_scale: Tensor) -> NVFP4Tensor:
    """A matrix `[N, K]`, or a stack of as many as there are global scales, with a shape and a device but no memory: what
    validation looks at when only the packed form is kept."""
    # not zeros: filling one byte is a launch, and calls on packed weights make an outline each
    byte = torch.empty(1, 1, dtype=torch.uint8, device=global_scale.device)
    codes, scales = (*global_scale.shape, n, k // 2), (*global_scale.shape, n, k // BLOCK)
    return _unchecked(byte.expand(codes), byte.view(torch.float8_e4m3fn).expand(scales), global_scale)


class _Weights:
    """Matrices of one shape in NVFP4, in packed form, or in both.

    `matrices` is None when only the packed form is kept. `outlines` have the matrices' shapes, device and global scales; where
    the originals are kept, they are these.
    """

    _names: ClassVar[tuple[str, ...]]

    outlines: tuple[NVFP4Tensor, ...]
    packed: Tensor | None
    direct: Direct | BlackwellDirect | None
    matrices: tuple[NVFP4Tensor, ...] | None

    def _hold(self, *matrices: NVFP4Tensor) -> None:
        self.matrices = self.outlines = matrices
        self.packed = self.direct = None

    def __getattr__(self, name: str) -> Any:
        # reached only for attributes that are not there
        if name in (
            *self._names,
            *_OPTIONAL,
            "outlines",
            "packed",
            "direct",
            "matrices",
            "scales",
            "shape",
            "device",
            "nbytes",
        ):
            raise AttributeError("these weights were emptied by prepare(free_original=True); use the weights it returned")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def shape(self) -> torch.Size:
        """`[N, K]`, or `[L, N, K]` of a stack, of each matrix."""
        return self.outlines[0].shape

    @property
    def device(self) -> torch.device:
        return self.outlines[0].device

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """The global scale of each matrix."""
        return tuple(o.global_scale for o in self.outlines)

    @property
    def nbytes(self) -> int:
        """Bytes held: the matrices with their scales, and their packed form."""
        packed = 0 if self.packed is None else self.packed.untyped_storage().nbytes()
        matrices = self.matrices
        return packed + sum(s.nbytes for s in self.scales) if matrices is None else packed + sum(m.nbytes for m in matrices)

    def originals(self) -> tuple[NVFP4Tensor, ...]:
        """The matrices in NVFP4, unpacked now where only the packed form is kept."""
        if self.matrices is not None:
            return self.matrices
        assert self.packed is not None
        return unpack(self.packed, self.shape[-2], self.shape[-1], self.scales)

    # ---- prepared ----

    @property
    def x_layout(self) -> Layout:
        """How the kernel of these weights wants the block scales of NVFP4 tokens, so that no call has to rearrange them."""
        return "swizzled" if isinstance(self.direct, BlackwellDirect) else "linear"

    def _on(self, device: torch.device | str) -> Self:
        """These weights on `device` in a new object: sharing everything, the packed form too, if they are there already."""
        raise NotImplementedError

    def prepare(self, device: torch.device | str, free_original: bool = False) -> Self:
        """These weights on `device`, checked once and in the form its backend wants.

        On a Hopper GPU they are packed into their kernel's order, and kept in NVFP4 too. Returns when that is done:
        kernels may start to read weights before the work ahead of them in the stream has ended. All kernels of the operation
        are loaded, so that a CUDA graph may be captured at once; if none are compiled, they are compiled now (see
        glu4.dispatch): of stacks `[E, N, K]` those of mixtures of experts. On a Blackwell GPU weights and stacks stay
        NVFP4Tensors, with block scales in the 128x4 layout and rows 16 bytes apart. The portable backend reads NVFP4 as it
        is, so elsewhere preparing is a move and a check.

        free_original  empties this object, so that only the prepared one holds memory, and drops the NVFP4 form of what is
                       packed. Whatever needs that (attributes, state_dict, to, shard, pickling, another backend) then
                       unpacks it: the same values, but the codes of blocks with scale zero are zero.

        Later changes to codes or block scales in place do not reach the packed form. Raises ValueError for NaN, negative or
        infinite scales; if memory runs out, torch's OutOfMemoryError leaves this object as it was.
        """
        prepared = self._on(device)
        if prepared.packed is None:
            for matrix in prepared.originals():
                matrix.check_values()
            dual = len(self._names) == 2
            stacked = len(prepared.shape) == 3
            if dispatch.packs(prepared.device, dual, stacked):
                prepared._pack()
            elif dispatch.arranges(prepared.device, dual, stacked):
                prepared._arrange()
        if free_original:
            if prepared.packed is not None:
                prepared.outlines = tuple(outline(prepared.shape[-2], prepared.shape[-1], s) for s in prepared.scales)
                prepared.matrices = None
            self.__dict__.clear()
        return prepared

    def _pack(self) -> None:
        """Add the packed form."""
        self.packed = pack(self.originals())
        dual = len(self._names) == 2
        stacked = len(self.shape) == 3
        if stacked:
            grouped_launch.load(dual, self.packed.get_device())
        tokens_launch.load(self.device, experts=stacked)
        if not stacked or not dual:
            hopper.load(dual, self.packed)
        self._connect()

    def _arrange(self) -> None:
        """Bring the matrices into the form of Blackwell kernels, which everything else reads too."""
        self._hold(*(blackwell.prepared(m) for m in self.originals()))
        blackwell.load(len(self._names) == 2, self.outlines[0])
        stacked = len(self.shape) == 3
        if stacked:
            moe_launch.load(self.outlines[0], len(self._names) == 2)
        tokens_launch.load(self.device, experts=stacked)
        self._connect()

    def remember_arranged(self) -> None:
        """What `prepare` does, for weights that reach a Blackwell kernel without it."""
        if all(blackwell.is_prepared(m) for m in self.originals()):
            return
        _refuse_capture(self.device)
        for matrix in self.originals():
            matrix.check_values()
        self._arrange()

    def remember_packed(self) -> None:
        """What `prepare` does, for weights that reach a Hopper kernel without it: they are packed once and remembered."""
        _refuse_capture(self.device)
        for matrix in self.originals():
            matrix.check_values()
        self._pack()

    def _connect(self) -> None:
        """Wait for the prepared form, and make the short way to the kernel."""
        matrices = self.matrices or ()
        arranged = self.packed is None and blackwell.is_blackwell(self.device) and all(map(blackwell.is_prepared, matrices))
        if self.packed is None and not arranged:
            return
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        if arranged and len(self.shape) == 2:
            self.direct = BlackwellDirect(matrices)
        elif self.packed is not None and len(self.shape) == 2:
            scales = self.scales
            self.direct = Direct(self.packed, (self.shape[0], self.shape[1]), (scales[0], scales[-1]), len(scales) == 2)

    # ---- copies ----

    def _copy(self) -> Self:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __copy__(self) -> Self:
        return self._copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update({k: deepcopy(v, memo) for k, v in self.__dict__.items() if k != "direct"})
        made.direct = None
        made._connect()
        return made

    def __getstate__(self) -> dict[str, Any]:
        # a file holds NVFP4 alone: what is packed belongs to one device and version
        matrices = self.originals()
        return {**self.__dict__, "matrices": matrices, "outlines": matrices, "packed": None, "direct": None}


def _same_device(here: torch.device, there: torch.device | str) -> bool:
    there = torch.device(there)
    if here.type == "cuda" and str(there) == "cuda":
        there = torch.device("cuda", torch.cuda.current_device())
    return here == there


class LinearWeight(_Weights):
    """The weight of a linear layer `[N, K]`, or a stack of them `[L, N, K]`, that can be prepared: for glu4.linear.

    Raises TypeError or ValueError for what is not such an NVFP4Tensor.
    """

    _names = ("matrix",)

    def __init__(self, matrix: NVFP4Tensor) -> None:
        if not isinstance(matrix, NVFP4Tensor):
            raise TypeError(f"matrix: expected an NVFP4Tensor, got {type(matrix).__name__}")
        if matrix.ndim not in (2, 3):
            raise ValueError(f"matrix: expected [N, K] or [L, N, K], got shape {list(matrix.shape)}")
        self._hold(matrix)

    @property
    def matrix(self) -> NVFP4Tensor:
        """The weight in NVFP4."""
        return self.originals()[0]

    def __repr__(self) -> str:
        return f"LinearWeight(shape={list(self.shape)}, device={self.device})"

    def to(self, device: torch.device | str) -> LinearWeight:
        """The same weight on another device, not prepared; itself if it is there."""
        return self if _same_device(self.device, device) else LinearWeight(self.matrix.to(device))

    def _on(self, device: torch.device | str) -> LinearWeight:
        return self._copy() if _same_device(self.device, device) else self.to(device)


class GatedWeights(_Weights):
    """Gate and up weights `[N, K]`, or stacked by expert `[E, N, K]`, each with its own global scale.

    input_scale  float32 multiplier for quantising activations, `[]` or `[E]`; None means dynamic (from amax)
    gate_bias    `[N]` or `[E, N]`, float16, bfloat16 or float32; added before the activation, as is up_bias

    Raises TypeError or ValueError when gate and up differ in shape or device, or a bias or scale does not fit.
    """

    _names = ("gate", "up")

    input_scale: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None

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
        self._hold(gate, up)
        self.input_scale = input_scale
        self.gate_bias = gate_bias
        self.up_bias = up_bias

    @property
    def gate(self) -> NVFP4Tensor:
        """Gate in NVFP4."""
        return self.originals()[0]

    @property
    def up(self) -> NVFP4Tensor:
        """Up in NVFP4."""
        return self.originals()[1]

    def __repr__(self) -> str:
        scale = "dynamic" if self.input_scale is None else "static"
        return f"GatedWeights(shape={list(self.shape)}, input_scale={scale}, device={self.device})"

    def _map(self, matrix: Callable[[NVFP4Tensor], NVFP4Tensor], vector: Callable[[Tensor], Tensor]) -> GatedWeights:
        def optional(t: Tensor | None) -> Tensor | None:
            return None if t is None else vector(t)

        gate, up = self.originals()
        made = GatedWeights(matrix(gate), matrix(up), None, optional(self.gate_bias), optional(self.up_bias))
        made.input_scale = self.input_scale
        return made

    def to(self, device: torch.device | str) -> GatedWeights:
        """The same weights on another device, not prepared; themselves if they are there."""
        if _same_device(self.device, device):
            return self
        moved = self._map(lambda w: w.to(device), lambda t: t.to(device))
        moved.input_scale = None if self.input_scale is None else self.input_scale.to(device)
        return moved

    def _on(self, device: torch.device | str) -> GatedWeights:
        return self._copy() if _same_device(self.device, device) else self.to(device)

    def shard(self, rank: int, world: int) -> GatedWeights:
        """Rows N of one tensor-parallel rank, not prepared; raises ValueError when N does not divide by `world`."""
        n = self.shape[-2]
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
        pair = zip(self._names, self.originals(), strict=True)
        state = {f"{name}.{part}": getattr(_as_files_have(w), part) for name, w in pair for part in _PARTS}
        for name in _OPTIONAL:
            value = getattr(self, name)
            if value is not None:
                state[name] = value
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> GatedWeights:
        """Weights from what `state_dict` gave; raises ValueError naming missing or unknown entries."""
        required = [f"{name}.{part}" for name in ("gate", "up") for part in _PARTS]
        missing = [key for key in required if key not in state]
        unknown = [key for key in state if key not in required and key not in _OPTIONAL]
        if missing or unknown:
            raise ValueError(f"state: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
        gate, up = (NVFP4Tensor(*(state[f"{name}.{part}"] for part in _PARTS)) for name in ("gate", "up"))
        return cls(gate, up, **{name: state.get(name) for name in _OPTIONAL})


def _as_files_have(w: NVFP4Tensor) -> NVFP4Tensor:
    """Linear block scales, dense rows; itself where it has them."""
    return w.to_linear().contiguous() if w.is_swizzled else w


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
