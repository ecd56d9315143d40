"""What is to be computed: shapes, formats, activation; every validation of a call, and its flops and bytes.

A call is validated once, here. Only metadata is looked at, so nothing synchronises with a device; `check_offsets`, which reads
values, runs where that is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glu4.activation import SILU, Activation
from glu4.nvfp4 import BLOCK, NVFP4Tensor

__all__ = [
    "GroupedProblem",
    "Problem",
    "check_dense",
    "check_grouped",
    "check_offsets",
    "dense_problem",
    "grouped_problem",
]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def _nvfp4_bytes(rows: int, k: int) -> int:
    return rows * k // 2 + rows * k // BLOCK


def _check_formats(k: int, x_format: str, out_dtype: torch.dtype) -> None:
    if x_format not in ("nvfp4", *_NAMES.values()):
        raise ValueError(f"x_format: expected nvfp4, float16, bfloat16 or float32, got {x_format!r}")
    if k <= 0 or k % BLOCK:
        raise ValueError(f"k: expected a positive multiple of {BLOCK}, got {k}")
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: expected float16, bfloat16 or float32, got {out_dtype}")


@dataclass(frozen=True)
class Problem:
    """One dense call: x `[m, k]` times weights `[n, k]`, or `batch` such pairs with weights of their own.

    batched    weights are `[batch, n, k]`; otherwise `[n, k]`, and batch is 1
    operation  "dual_gemm" (gate and up, activation) or "linear" (one matrix)
    x_format   "nvfp4", "float16", "bfloat16" or "float32"
    """

    m: int
    n: int
    k: int
    batch: int = 1
    operation: str = "dual_gemm"
    x_format: str = "nvfp4"
    out_dtype: torch.dtype = torch.float16
    activation: Activation = SILU
    has_bias: bool = False
    batched: bool = False

    def __post_init__(self) -> None:
        if self.operation not in ("dual_gemm", "linear"):
            raise ValueError(f"operation: expected dual_gemm or linear, got {self.operation!r}")
        if min(self.m, self.n, self.batch) < 0:
            raise ValueError(f"m, n, batch: expected non-negative sizes, got {self.m}, {self.n}, {self.batch}")
        if self.batch != 1 and not self.batched:
            raise ValueError(f"batch: expected 1 without batched weights, got {self.batch}")
        _check_formats(self.k, self.x_format, self.out_dtype)

    @property
    def weight_matrices(self) -> int:
        """2 for gate and up, 1 for linear."""
        return 2 if self.operation == "dual_gemm" else 1

    @property
    def out_shape(self) -> tuple[int, int, int]:
        return (self.batch, self.m, self.n)

    @property
    def flops(self) -> int:
        """Multiplies and adds of the matrix products."""
        return 2 * self.weight_matrices * self.batch * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Bytes that must move: operands read once, without layout padding, and the output written once."""
        x = _nvfp4_bytes(self.m, self.k) if self.x_format == "nvfp4" else self.m * self.k * _itemsize(self.x_format)
        weights = self.weight_matrices * _nvfp4_bytes(self.n, self.k)
        return self.batch * (x + weights + self.m * self.n * self.out_dtype.itemsize)


@dataclass(frozen=True)
class GroupedProblem:
    """One mixture-of-experts call: `rows` tokens sorted by expert, stacked weights `[experts, n, k]`.

    operation  "grouped_dual_gemm" (gate and up, activation) or "grouped_linear" (one matrix an expert)

    How the rows are spread over experts lives on the device and is not part of the problem.
    """

    rows: int
    experts: int
    n: int
    k: int
    x_format: str = "nvfp4"
    out_dtype: torch.dtype = torch.float16
    activation: Activation = SILU
    has_bias: bool = False
    operation: str = "grouped_dual_gemm"

    def __post_init__(self) -> None:
        if self.operation not in ("grouped_dual_gemm", "grouped_linear"):
            raise ValueError(f"operation: expected grouped_dual_gemm or grouped_linear, got {self.operation!r}")
        if min(self.rows, self.experts, self.n) < 0:
            raise ValueError(f"rows, experts, n: expected non-negative sizes, got {self.rows}, {self.experts}, {self.n}")
        _check_formats(self.k, self.x_format, self.out_dtype)

    @property
    def weight_matrices(self) -> int:
        """2 for gate and up, 1 for grouped_linear."""
        return 2 if self.operation == "grouped_dual_gemm" else 1

    @property
    def out_shape(self) -> tuple[int, int]:
        return (self.rows, self.n)

    @property
    def flops(self) -> int:
        """Multiplies and adds when every row belongs to an expert."""
        return 2 * self.weight_matrices * self.rows * self.n * self.k

    @property
    def bytes(self) -> int:
        """Bytes that must move when every expert has at least one token."""
        x = _nvfp4_bytes(self.rows, self.k) if self.x_format == "nvfp4" else self.rows * self.k * _itemsize(self.x_format)
        weights = self.experts * self.weight_matrices * _nvfp4_bytes(self.n, self.k)
        return x + weights + self.rows * self.n * self.out_dtype.itemsize


def _itemsize(x_format: str) -> int:
    return {"float16": 2, "bfloat16": 2, "float32": 4}[x_format]


# ---- validation of a call ----


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _check_x(x: Tensor | NVFP4Tensor) -> None:
    if isinstance(x, NVFP4Tensor):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected an NVFP4Tensor or a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x: expected float16, bfloat16 or float32, or an NVFP4Tensor (glu4.quantize), got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x: expected a dense tensor, got {x.layout}; x.to_dense() makes one")
    if x.ndim < 2:
        raise ValueError(f"x: expected [..., M, K], got shape {list(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x requires grad, and glu4 has no backward pass yet: call under torch.no_grad() or detach x")


def _out_dtype(x: Tensor | NVFP4Tensor, out_dtype: torch.dtype | None, out: Tensor | None) -> torch.dtype:
    default = torch.bfloat16 if isinstance(x, NVFP4Tensor) else x.dtype
    if out is not None:
        _check_tensor("out", out)
    if out_dtype is None:
        return out.dtype if out is not None and out.dtype in FLOAT_DTYPES else default
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: expected float16, bfloat16 or float32, got {out_dtype}")
    return out_dtype


def _check_weights(names: Sequence[str], weights: Sequence[NVFP4Tensor]) -> None:
    for name, w in zip(names, weights, strict=True):
        if not isinstance(w, NVFP4Tensor):
            raise TypeError(f"{name}: expected an NVFP4Tensor, got {type(w).__name__}")
        if w.ndim not in (2, 3):
            raise ValueError(f"{name}: expected [N, K] or [L, N, K], got shape {list(w.shape)}")
        if w.shape != weights[0].shape:
            raise ValueError(f"{names[0]} and {name} must have one shape, got {list(weights[0].shape)} and {list(w.shape)}")


def _check_device(name: str, tensor: Tensor | NVFP4Tensor, x: Tensor | NVFP4Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}: move one with .to(device)")


def _check_biases(x: Tensor | NVFP4Tensor, shape: tuple[int, ...], biases: dict[str, Tensor | None]) -> None:
    for name, bias in biases.items():
        if bias is None:
            continue
        _check_tensor(name, bias)
        if bias.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {bias.dtype}")
        if tuple(bias.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(bias.shape)}")
        if bias.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, and glu4 has no backward pass yet: call under torch.no_grad()")
        _check_device(name, bias, x)


def _check_out(x: Tensor | NVFP4Tensor, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if out is None:
        return
    if tuple(out.shape) != shape:
        raise ValueError(f"out: expected shape {list(shape)}, got {list(out.shape)}")
    if out.dtype != dtype:
        raise TypeError(f"out: expected {dtype}, got {out.dtype}")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires grad, and glu4 has no backward pass yet: pass a tensor that does not")
    _check_device("out", out, x)
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError("out: several of its elements are one in memory (it is expanded); pass a tensor of its own memory")
    parts = (x,) if isinstance(x, Tensor) else (x.codes, x.block_scale)
    if not torch.compiler.is_compiling() and any(_overlap(out, part) for part in parts):
        raise ValueError("out overlaps x in memory, and x is read again after out is first written; pass another tensor")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the first or last element of one is an element of the other: true only of tensors that share memory."""
    if not a.numel() or not b.numel() or a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    return any(_holds(s, end) for s, t in ((a, b), (b, a)) for end in _ends(t))


def _ends(t: Tensor) -> tuple[int, int]:
    """Byte offsets in its storage of a tensor's first and last element."""
    first = t.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return int(first * t.itemsize), int(last * t.itemsize)


def _holds(t: Tensor, offset: int) -> bool:
    """Whether a byte of its storage belongs to an element of `t`."""
    rest = offset - t.storage_offset() * t.itemsize
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True), reverse=True):
        if stride:
            rest -= max(0, min(rest // (stride * t.itemsize), size - 1)) * stride * t.itemsize
    return 0 <= rest < t.itemsize


def check_dense(
    x: Tensor | NVFP4Tensor,
    weights: dict[str, NVFP4Tensor],
    *,
    biases: dict[str, Tensor | None],
    activation: Activation = SILU,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> torch.dtype:
    """Validate a dense call; returns the output's dtype.

    It builds no Problem: torch.compile traces this, and older releases cannot trace the making of nested dataclasses.

    `weights` holds gate and up (dual_gemm) or weight (linear), by argument name. Weights `[N, K]` serve all leading
    dimensions of x, which count as rows; weights `[L, N, K]` pair with x `[L, M, K]`.
    """
    _check_x(x)
    _check_weights(list(weights), list(weights.values()))
    first_name, first = next(iter(weights.items()))
    n, k = first.rows, first.k
    if x.shape[-1] != k:
        raise ValueError(f"x has K = {x.shape[-1]} and {first_name} has K = {k}: they must be equal")
    if first.ndim == 3 and (x.ndim != 3 or x.shape[0] != first.shape[0]):
        raise ValueError(f"{first_name} {list(first.shape)} needs x [{first.shape[0]}, M, {k}], got {list(x.shape)}")
    for name, w in weights.items():
        _check_device(name, w, x)
    if not isinstance(activation, Activation):
        raise TypeError(f"activation: expected a glu4.Activation such as glu4.SILU, got {activation!r}")
    dtype = _out_dtype(x, out_dtype, out)
    _check_biases(x, (*first.shape[:-2], n), biases)
    _check_out(x, out, (*x.shape[:-1], n), dtype)
    return dtype


def dense_problem(
    x: Tensor | NVFP4Tensor, weight: NVFP4Tensor, *, dual: bool, activation: Activation, out_dtype: torch.dtype, has_bias: bool
) -> Problem:
    """The Problem of a dense call that has been checked."""
    batched = weight.ndim == 3
    return Problem(
        m=x.shape[-2] if batched else x.shape[:-1].numel(),
        n=weight.rows,
        k=weight.k,
        batch=x.shape[0] if batched else 1,
        operation="dual_gemm" if dual else "linear",
        x_format="nvfp4" if isinstance(x, NVFP4Tensor) else _NAMES[x.dtype],
        out_dtype=out_dtype,
        activation=activation,
        has_bias=has_bias,
        batched=batched,
    )


def check_grouped(
    x: Tensor | NVFP4Tensor,
    weights: dict[str, NVFP4Tensor],
    group_offsets: Tensor,
    *,
    biases: dict[str, Tensor | None],
    activation: Activation = SILU,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    rows: int | None = None,
) -> torch.dtype:
    """Validate a mixture-of-experts call; returns the output's dtype. rows: of the output, where x has others.

    `weights` holds gate and up (grouped_dual_gemm) or weight (grouped_linear), by argument name. The values of
    `group_offsets` stay on the device and are not looked at.
    """
    _check_x(x)
    _check_weights(list(weights), list(weights.values()))
    first_name, first = next(iter(weights.items()))
    if first.ndim != 3:
        raise ValueError(f"{', '.join(weights)}: expected stacked [E, N, K], got shape {list(first.shape)}")
    if x.ndim != 2:
        raise ValueError(f"x: expected [rows, K], sorted by expert, got shape {list(x.shape)}")
    if x.shape[-1] != first.k:
        raise ValueError(f"x has K = {x.shape[-1]} and {first_name} has K = {first.k}: they must be equal")
    if isinstance(x, NVFP4Tensor) and x.is_swizzled:
        raise ValueError("x: grouped activations need linear block scales, got swizzled ones; use x.to_linear()")
    experts = first.shape[0]
    _check_tensor("group_offsets", group_offsets)
    if group_offsets.dtype != torch.int32 or tuple(group_offsets.shape) != (experts + 1,):
        raise ValueError(
            f"group_offsets: expected int32 of shape [{experts + 1}] (experts + 1), "
            f"got {group_offsets.dtype} of shape {list(group_offsets.shape)}"
        )
    for name, weight in weights.items():
        _check_device(name, weight, x)
    _check_device("group_offsets", group_offsets, x)
    if not isinstance(activation, Activation):
        raise TypeError(f"activation: expected a glu4.Activation such as glu4.SILU, got {activation!r}")
    dtype = _out_dtype(x, out_dtype, out)
    _check_biases(x, (experts, first.rows), biases)
    _check_out(x, out, (x.shape[0] if rows is None else rows, first.rows), dtype)
    return dtype


def check_offsets(group_offsets: Tensor, rows: int) -> None:
    """Raise ValueError unless int32 `[E + 1]` offsets start at 0, do not decrease and end within `rows`.

    Reads them on the host, which synchronises with a device.
    """
    ends = group_offsets.tolist()
    wrong = "" if ends[0] == 0 else f"[0] is {ends[0]}"
    for i, (before, end) in enumerate(itertools.pairwise(ends)):
        if not wrong and end < before:
            wrong = f"[{i + 1}] = {end} is below [{i}] = {before}"
    if not wrong and ends[-1] > rows:
        wrong = f"[{len(ends) - 1}] is {ends[-1]}"
    if wrong:
        raise ValueError(
            f"group_offsets: expected 0 first, non-decreasing, at most {rows} (rows of x), got {_some(ends)}: {wrong}"
        )


def _some(values: list[int]) -> str:
    return str(values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]).replace("'", "")


def grouped_problem(
    x: Tensor | NVFP4Tensor,
    weight: NVFP4Tensor,
    *,
    dual: bool = True,
    activation: Activation,
    out_dtype: torch.dtype,
    has_bias: bool,
) -> GroupedProblem:
    """The GroupedProblem of a call that has been checked."""
    return GroupedProblem(
        rows=x.shape[0],
        experts=weight.shape[0],
        n=weight.rows,
        k=weight.k,
        x_format="nvfp4" if isinstance(x, NVFP4Tensor) else _NAMES[x.dtype],
        out_dtype=out_dtype,
        activation=activation,
        has_bias=has_bias,
        operation="grouped_dual_gemm" if dual else "grouped_linear",
    )
