"""Run dense problems with packed weights on a Hopper device.

`dense` takes what the operators take; `direct` is the short way for plain eager calls.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.backends.hopper import tokens, tuned
from glu4.backends.hopper.config import SHIPPED, TILE_K, Config
from glu4.backends.hopper.pack import UNIT_WORDS
from glu4.backends.hopper.spec import KernelSpec, shipped
from glu4.backends.hopper.tokens import DECODED, NVFP4, Format, Source, format_of, prepared, source
from glu4.compiled import store
from glu4.compiled.driver import Kernel, Repeat
from glu4.errors import UnsupportedError
from glu4.nvfp4 import NVFP4Tensor
from glu4.problem import Problem

__all__ = [
    "Choice",
    "Plan",
    "available",
    "choice",
    "dense",
    "float32",
    "forget",
    "is_hopper",
    "keep",
    "load",
    "plans",
    "submit",
]

_C = torch._C
_X_SCALE, _GATE_BIAS, _UP_BIAS, _IDENTITY = 1, 2, 4, 8
# parameters after the tensor map: m, k; weights; three scales; two biases; flags; alpha, beta, limit; out; a byte not read
_PARAMETERS = ("ii", "QiiQ", "Q", "Q", "Q", "Qi4x", "Qi4x", "i", "f", "f", "f", "QiiQ", "x")
_NVFP4_PARAMETERS = ("QiiQ", "QiiQ", *_PARAMETERS[1:])  # of a kernel that decodes tokens: their codes and scales instead
_VARIED = (1, 4, 5, 13)  # of these, in 64-bit words: the addresses of the weights, of gate's and up's scale, and of the output
_FORMATS = {torch.float16: "float16", torch.bfloat16: "bfloat16", NVFP4: "nvfp4", DECODED: "nvfp4"}


class Choice(NamedTuple):
    """nvfp4: whether the kernel decodes NVFP4 tokens itself."""

    kernel: Kernel
    grid: tuple[int, int, int]
    nvfp4: bool


# ---- devices and kernels ----


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _properties(index: int) -> tuple[str, int]:
    """Name and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


def is_hopper(device: torch.device) -> bool:
    """Whether `device` is a CUDA device of compute capability 9.0."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return _capability(torch.cuda.current_device() if device.index is None else device.index) == (9, 0)


@cache
def _kernel(spec: KernelSpec) -> Kernel | None:
    found = store.find(spec)
    if found is None:
        return None
    c = spec.config
    cluster = (1, c.cluster, c.splits)
    if spec.nvfp4:
        return Kernel(*found, _NVFP4_PARAMETERS, cluster=cluster)
    dtype = torch.bfloat16 if spec.x == "bf16" else torch.float16
    return Kernel(*found, _PARAMETERS, dtype, (c.box_tokens, TILE_K), cluster)


def _spec(config: Config, x: Format, out: torch.dtype, dual: bool) -> KernelSpec:
    nvfp4 = x == NVFP4 and config.takes_nvfp4
    # NVFP4 tokens are decoded to fp16, which holds them exactly
    return KernelSpec.of(config, x if isinstance(x, torch.dtype) else torch.float16, out, dual, nvfp4)


def _choice(config: Config, m: int, n: int, x: Format, out: torch.dtype, dual: bool) -> Choice | None:
    spec = _spec(config, x, out, dual)
    kernel = _kernel(spec)
    return None if kernel is None else Choice(kernel, config.grid(m, n, dual), spec.nvfp4)


@lru_cache(maxsize=1 << 14)
def choice(m: int, n: int, k: int, dual: bool, x: Format, out: torch.dtype, index: int) -> Choice | None:
    """The best kernel that is packaged or cached, for one matrix pair (or matrix) on one device; None when there is none."""
    problem = Problem(m, n, k, operation="dual_gemm" if dual else "linear", x_format=_FORMATS[x], out_dtype=out)
    for config in tuned.ordered(problem, *_properties(index)):
        found = _choice(config, m, n, x, out, dual)
        if found is not None:
            return found
    return None


def available(dual: bool, x: Format, out: torch.dtype) -> bool:
    """Whether any kernel of an operation for x of a format and that output type is packaged or cached."""
    x = DECODED if x == NVFP4 else x  # a kernel that decodes cannot take all NVFP4 tokens
    return any(_kernel(_spec(config, x, out, dual)) is not None for config in SHIPPED)


def load(dual: bool, packed: Tensor) -> None:
    """Load every kernel of an operation onto the device of `packed`, so that no later call has to, nor a captured graph."""
    kernels = [_kernel(spec) for spec in shipped(dual) if isinstance(spec, KernelSpec)]
    for kernel in (*kernels, tokens.decoder()):
        if kernel is not None:
            kernel.load(packed.get_device())


def forget() -> None:
    """Look for kernels and measured tables again at the next use, for those that were made since."""
    tuned.forget()
    tokens.forget()
    _kernel.cache_clear()
    choice.cache_clear()
    for remembered in _plans.values():
        remembered.clear()


# ---- launching ----


def submit(
    chosen: Choice,
    index: int,
    x: Source,
    packed: Tensor,
    scales: tuple[Tensor, Tensor],
    x_scale: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    out: tuple[int, int, int, int],
    overlap: bool,
) -> None:
    """One launch on device `index`, in its current stream.

    biases   float32, dense, or None
    out      address, M, N and row stride in elements
    overlap  False when work just before in the stream writes `packed`: kernels may read weights before it is done
    """
    gate, up = scales[0].data_ptr(), scales[1].data_ptr()
    flags = 0
    x_scale_address = gate_bias = up_bias = gate  # addresses that are not read
    if x_scale is not None:
        flags |= _X_SCALE
        x_scale_address = x_scale.data_ptr()
    if biases[0] is not None:
        flags |= _GATE_BIAS
        gate_bias = biases[0].data_ptr()
    if biases[1] is not None:
        flags |= _UP_BIAS
        up_bias = biases[1].data_ptr()
    params = x.params + _params(packed, (gate, up), x_scale_address, (gate_bias, up_bias), activation, flags, out)
    chosen.kernel.launch(index, _C._cuda_getCurrentRawStream(index), chosen.grid, x.matrix, params, overlap)


def _params(
    packed: Tensor,
    scales: tuple[int, int],
    x_scale: int,
    biases: tuple[int, int],
    activation: Activation,
    flags: int,
    out: tuple[int, int, int, int],
) -> tuple[int | float, ...]:
    """The parameters from the weights on, as `_PARAMETERS` packs them; scales and biases are addresses."""
    tiles, units, _ = packed.shape
    n = out[2]
    flags |= _IDENTITY if activation.kind == "identity" else 0
    return (
        packed.data_ptr(), tiles, units, units * UNIT_WORDS, *scales, x_scale, biases[0], n, biases[1], n, flags,
        activation.alpha, activation.beta, activation.limit, *out,
    )  # fmt: skip


@cache
def _unread(device: torch.device) -> Tensor:
    """Memory whose address stays valid."""
    return torch.zeros(4, device=device)


class Plan:
    """What calls with one shape and type of x `[..., M, K]` in 16 bits, dense, without biases, have in common.

    shape, dtype  of the output `[..., M, N]`, dense
    """

    __slots__ = ("_index", "_repeat", "activation", "dtype", "in_bytes", "out_bytes", "shape")

    def __init__(
        self, chosen: Choice, x: Tensor, packed: Tensor, activation: Activation, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        tokens = source(x)
        m, k, n = tokens.m, tokens.k, shape[-1]
        self.activation, self.shape, self.dtype = activation, shape, dtype
        self.in_bytes, self.out_bytes = 2 * m * k, 2 * m * n
        self._index = x.get_device()
        assert tokens.matrix is not None
        unread = _unread(x.device).data_ptr()
        params = tokens.params + _params(packed, (unread, unread), unread, (unread, unread), activation, 0, (0, m, n, n))
        self._repeat = Repeat(chosen.kernel, self._index, chosen.grid, tokens.matrix, params, _VARIED)

    def launch(self, x: int, packed: int, gate: int, up: int, out: int) -> None:
        """One launch in the device's current stream, with these addresses, as `submit` with `overlap` makes it."""
        self._repeat(_C._cuda_getCurrentRawStream(self._index), x, packed, gate, up, out)


Plans = dict[tuple[torch.Size, torch.dtype, torch.dtype | None], Plan]
_PLANS = 1 << 12  # of one shape of weights
_plans: dict[tuple[int, int, bool, int], Plans] = {}


def plans(n: int, k: int, dual: bool, index: int) -> Plans:
    """The plans of all weights of one shape on one device, by x's shape and dtype and the dtype asked for."""
    return _plans.setdefault((n, k, dual, index), {})


def keep(remembered: Plans, key: tuple[torch.Size, torch.dtype, torch.dtype | None], plan: Plan) -> None:
    """Remember a plan, and no more than so many."""
    if len(remembered) >= _PLANS:
        remembered.clear()
    remembered[key] = plan


def _item(t: Tensor, index: int, ndim: int) -> Tensor:
    """Matrix `index`'s part of what is one a batch, `ndim` dimensions, or one a matrix."""
    return t[index] if t.ndim > ndim else t


def float32(bias: Tensor | None) -> Tensor | None:
    """A bias as the kernel reads it."""
    return None if bias is None else bias.to(torch.float32).contiguous()


def dense(
    out: Tensor,
    x: Tensor | NVFP4Tensor,
    packed: Tensor,
    scales: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    problem: Problem,
    config: Config | None = None,
    overlap: bool = True,
) -> None:
    """Fill `out [M, N]` from x `[M, K]`, or `[L, M, N]` from `[L, M, K]`: L launches, each with its own weights, or its own
    global scale of x, or both.

    packed   of `pack_gated` or `pack_matrix`, or `[L, ...]` of them, followed by one spare unit
    scales   gate's and up's, `[]` or `[L]`; for one matrix the same twice
    biases   `[N]` or `[L, N]`, or None; for one matrix the same twice
    config   insists on one kernel
    overlap  False when work just before in the stream writes `packed`: kernels may read weights before it is done
    """
    if out.numel() == 0:
        return
    if out.stride(-1) != 1:
        dense_out = torch.empty_like(out, memory_format=torch.contiguous_format)
        dense(dense_out, x, packed, scales, biases, activation, problem, config, overlap)
        out.copy_(dense_out)
        return
    index, dual = out.get_device(), problem.operation == "dual_gemm"
    m, n, k, x_format = out.shape[-2], out.shape[-1], x.shape[-1], format_of(x)
    if config is None:
        chosen = choice(m, n, k, dual, x_format, out.dtype, index)
    else:
        chosen = _choice(config, m, n, x_format, out.dtype, dual)
    if chosen is None:
        raise UnsupportedError("no compiled Hopper kernel for this problem; run glu4 compile")
    x_scale = x.global_scale if isinstance(x, NVFP4Tensor) else None
    floats = (float32(biases[0]), float32(biases[1]))
    x = prepared(x, chosen.nvfp4, index)
    if out.ndim == 2:
        tokens, target = source(x), (out.data_ptr(), m, n, out.stride(0))
        submit(chosen, index, tokens, packed, scales, x_scale, floats, activation, target, overlap)
        return
    for i in range(out.shape[0]):
        own = packed[i] if packed.ndim == 4 else packed
        own_scales = (_item(scales[0], i, 0), _item(scales[1], i, 0))
        own_x_scale = None if x_scale is None else _item(x_scale, i, 0)
        own_biases = (_optional_item(floats[0], i), _optional_item(floats[1], i))
        tokens, target = source(x, i), (out[i].data_ptr(), m, n, out.stride(1))
        submit(chosen, index, tokens, own, own_scales, own_x_scale, own_biases, activation, target, overlap)


def _optional_item(bias: Tensor | None, index: int) -> Tensor | None:
    return None if bias is None else _item(bias, index, 1)
