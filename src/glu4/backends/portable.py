"""The portable backend: torch only, on the CPU and as the fallback on every other device.

Weights are decoded a block at a time, exactly, and multiplied by torch's own matmul with float32 accumulation; the whole
decoded weight never exists. One workspace of fixed size serves a call, so that the extra memory stays under 64 MiB at any
problem size:

    token block    512 rows x 8192 of K    16 MiB float32
    weight block   256 rows x 8192 of K    8 MiB float32
    indices        one a packed byte       4 MiB int32
    scales, accumulators and temporaries   a few MiB
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.nvfp4 import BLOCK, E2M1_VALUES, NVFP4Tensor
from glu4.scale_layout import SwizzledLayout

__all__ = ["dense", "grouped"]

# multiples of 128 rows and 64 of K, so that a block of a swizzled tensor is a run of whole atoms
_M_BLOCK = 512
_N_BLOCK = 256
_K_BLOCK = 8192

Operand = Tensor | NVFP4Tensor


# ---- exact decode of a block ----


class _Workspace:
    """The buffers of one call, and the table that gives a packed byte's two values in one lookup."""

    def __init__(self, x: Operand, m: int, n: int, k: int) -> None:
        self.device = x.device
        self.dtype = _operand_dtype(x)
        self.table = self._code_table()
        k_block = min(k, _K_BLOCK)
        self.tokens = self._buffer(min(m, _M_BLOCK) * k_block, self.dtype)
        self.weights = self._buffer(min(n, _N_BLOCK) * k_block, self.dtype)
        self.index = self._buffer(min(max(m, n), _N_BLOCK) * k_block // 2, torch.int32)

    def _buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def _code_table(self) -> Tensor:
        values = torch.tensor(E2M1_VALUES, dtype=self.dtype, device=self.device)
        byte = torch.arange(256, device=self.device)
        pairs = torch.stack((values[byte & 0xF], values[byte >> 4]), dim=-1)
        return pairs.view(_pair_dtype(self.dtype)).flatten()

    def decode(self, buffer: Tensor, w: NVFP4Tensor, rows: slice, k: slice) -> Tensor:
        """e2m1 * e4m3 of one block, `[rows, k]`, in `buffer`: exact in fp16, bf16 and float32."""
        height, width = rows.stop - rows.start, k.stop - k.start
        block = buffer[: height * width].view(height, width)
        # at most as many rows at once as there are indices for
        for part in _blocks(height, _N_BLOCK):
            codes = w.codes[rows.start + part.start : rows.start + part.stop, k.start // 2 : k.stop // 2]
            index = self.index[: codes.numel()].view(codes.shape).copy_(codes)
            pairs = block[part].view(_pair_dtype(self.dtype)).view(-1)
            torch.index_select(self.table, 0, index.view(-1), out=pairs)
        block.view(height, -1, BLOCK).mul_(_block_scales(w, rows, k).to(self.dtype).unsqueeze(-1))
        return block


def _pair_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float32 else torch.int32


def _block_scales(w: NVFP4Tensor, rows: slice, k: slice) -> Tensor:
    """The linear block scales of a block that starts on an atom."""
    if not w.is_swizzled:
        return w.block_scale[rows, k.start // BLOCK : k.stop // BLOCK]
    count, cols = rows.stop - rows.start, (k.stop - k.start) // BLOCK
    layout = SwizzledLayout(count, cols)
    first_row, first_col = rows.start // 128, k.start // 64
    atoms = w.block_scale[first_row : first_row + layout.rest_rows, first_col : first_col + layout.rest_cols]
    return layout.load(atoms)


def _blocks(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


# ---- matrix products ----


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Float32 products in float32, whatever autocast and torch.set_float32_matmul_precision say: 16 bits or TF32 round x."""
    autocast = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if autocast else nullcontext(), _ieee(device):
        yield


@contextmanager
def _ieee(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time
    elif device.type == "cuda":
        matmul = torch.backends.cuda.matmul
    else:
        yield
        return
    before = matmul.fp32_precision
    if before in ("none", "ieee"):
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _operand_dtype(x: Operand) -> torch.dtype:
    """What the product runs in: 16 bits on CUDA's tensor cores where that holds x exactly, else float32."""
    if x.device.type != "cuda":
        return torch.float32
    return torch.float16 if isinstance(x, NVFP4Tensor) else x.dtype


def _matmul(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b^T, accumulated and returned in float32."""
    if a.dtype == torch.float32:
        return a @ b.t() if total is None else total.addmm_(a, b.t())
    part = torch.mm(a, b.t(), out_dtype=torch.float32)
    return part if total is None else total.add_(part)


class _Tokens:
    """One block of rows of x, decoded or converted into the workspace when asked for; kept for as long as K stays."""

    def __init__(self, workspace: _Workspace, x: Operand, rows: slice) -> None:
        self.workspace, self.x, self.rows = workspace, x, rows
        self.k: slice | None = None
        self.block = workspace.tokens

    def at(self, k: slice) -> Tensor:
        if self.k != k:
            if isinstance(self.x, NVFP4Tensor):
                self.block = self.workspace.decode(self.workspace.tokens, self.x, self.rows, k)
            else:
                part = self.x[self.rows, k]
                self.block = self.workspace.tokens[: part.numel()].view(part.shape).copy_(part)
            self.k = k
        return self.block


def _accumulate(tokens: _Tokens, w: NVFP4Tensor, rows: slice) -> Tensor:
    """x @ w[rows]^T without global scales, float32."""
    workspace = tokens.workspace
    total: Tensor | None = None
    for k in _blocks(w.k, _K_BLOCK):
        block = tokens.at(k)
        total = _matmul(total, block, workspace.decode(workspace.weights, w, rows, k))
    assert total is not None  # K is at least 16
    return total


# ---- epilogue ----


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, exact; exponents clamp to the normal range."""
    return ((exponent.clamp(-126, 127) + 127).to(torch.int32) << 23).view(torch.float32)


def _scale_factors(x: Operand, w: NVFP4Tensor) -> tuple[Tensor, ...]:
    """Float32 factors whose product is x's global scale times w's.

    For two scales the product itself may overflow or vanish where the result does not, so its exponent is shared out
    evenly: no factor is then infinite, and an intermediate is lost only if the result is.
    """
    if not isinstance(x, NVFP4Tensor):
        return (w.global_scale,)
    mantissa_x, exponent_x = torch.frexp(x.global_scale)
    mantissa_w, exponent_w = torch.frexp(w.global_scale)
    exponent = exponent_x + exponent_w
    half = torch.div(exponent, 2, rounding_mode="floor")
    return (mantissa_x * mantissa_w * _power_of_two(half), _power_of_two(exponent - half))


def _apply_scales(total: Tensor, factors: tuple[Tensor, ...], rows: slice, bias: Tensor | None, columns: slice) -> Tensor:
    for factor in factors:
        # one factor for all, or one a token
        total *= factor[rows].unsqueeze(-1) if factor.ndim else factor
    if bias is not None:
        total += bias[columns]
    return total


def _dense_2d(
    out: Tensor,
    x: Operand,
    gate: NVFP4Tensor,
    up: NVFP4Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: Activation,
) -> None:
    """Fill `out [M, N]`; x `[M, K]`, its global scale `[]` or `[M]`; weights `[N, K]`; without `up`, one product."""
    workspace = _Workspace(x, out.shape[0], gate.rows, gate.k)
    gate_factors = _scale_factors(x, gate)
    up_factors = () if up is None else _scale_factors(x, up)
    for rows in _blocks(out.shape[0], _M_BLOCK):
        tokens = _Tokens(workspace, x, rows)
        for columns in _blocks(gate.rows, _N_BLOCK):
            total = _accumulate(tokens, gate, columns)
            result = _apply_scales(total, gate_factors, rows, gate_bias, columns)
            if up is not None:
                total = _accumulate(tokens, up, columns)
                result = activation(result, _apply_scales(total, up_factors, rows, up_bias, columns))
            out[rows, columns] = result


# ---- entry points ----


def _item(tensor: Tensor | None, index: int) -> Tensor | None:
    return None if tensor is None else tensor[index]


def dense(
    out: Tensor,
    x: Operand,
    gate: NVFP4Tensor,
    up: NVFP4Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: Activation,
) -> None:
    """Fill `out` with act(x @ gate^T + gate_bias) * (x @ up^T + up_bias), or with x @ gate^T + gate_bias without `up`.

    Shapes: x `[M, K]` with weights `[N, K]`, or x `[L, M, K]` with weights `[L, N, K]`.
    """
    with _full_float32(out.device):
        if gate.ndim == 2:
            _dense_2d(out, x, gate, up, gate_bias, up_bias, activation)
            return
        for i in range(gate.shape[0]):
            up_i = None if up is None else up[i]
            _dense_2d(out[i], x[i], gate[i], up_i, _item(gate_bias, i), _item(up_bias, i), activation)


def grouped(
    out: Tensor,
    x: Operand,
    gate: NVFP4Tensor,
    up: NVFP4Tensor | None,
    group_offsets: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: Activation,
) -> None:
    """Fill rows group_offsets[e] to group_offsets[e + 1] of `out` by expert e, and no others; one product where `up` is None.

    Reads the offsets on the host, so on a device other than the CPU it synchronises and cannot be captured in a graph. As the
    kernels do, it takes each offset for the nearest row there is and an end before its start for an empty expert: wrong
    offsets (`problem.check_offsets` finds them) give wrong rows, but no access beyond x and `out`.
    """
    ends = [min(max(end, 0), x.shape[0]) for end in group_offsets.tolist()]
    with _full_float32(out.device):
        for e, (start, end) in enumerate(itertools.pairwise(ends)):
            if start >= end:
                continue
            rows = x.narrow_rows(start, end - start) if isinstance(x, NVFP4Tensor) else x[start:end]
            up_e = None if up is None else up[e]
            _dense_2d(out[start:end], rows, gate[e], up_e, _item(gate_bias, e), _item(up_bias, e), activation)
