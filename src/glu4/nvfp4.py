"""NVFP4: e2m1 codes, one e4m3 scale per 16 values along K, one float32 scale per matrix.

    value = e2m1(code) * e4m3(block_scale) * global_scale

global_scale is always a multiplier here. The product of the first two factors needs at most 6 significant bits, so it
is exact in fp16, bf16 and float32 (`NVFP4Tensor.decode`). Sources: OCP Microscaling Formats 1.0 (e2m1), PTX ISA
"Block scaling for tcgen05.mma" (block of 16, ue4m3), compressed-tensors `nvfp4-pack-quantized` (packing on disk).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glu4.scale_layout import ATOM_COLS, LinearLayout, SwizzledLayout

__all__ = ["BLOCK", "E2M1_VALUES", "NVFP4Tensor", "canonicalize_scales", "pack_codes", "quantize", "unpack_codes"]

BLOCK = 16  # values that share one block scale
ROW_ALIGNMENT = 16  # bytes: strides of a tensor map are multiples of it (CUDA driver API, cuTensorMapEncodeTiled)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # smallest subnormal
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# below this the product of a global scale and the smallest block scale would be subnormal in float32
_MIN_GLOBAL_SCALE = 2.0**-117
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

NibbleOrder = Literal["low_first", "high_first"]
ScaleSign = Literal["reject", "strip", "fold"]
Method = Literal["nearest", "four_over_six"]
Layout = Literal["linear", "swizzled"]
NonFinite = Literal["error", "propagate"]


def _choice(argument: str, given: str, accepted: tuple[str, ...]) -> None:
    if given not in accepted:
        raise ValueError(f"{argument}: expected one of {', '.join(accepted)}, got {given!r}")


def _in_blocks(x: Tensor) -> Tensor:
    """`[..., K]` to `[..., K/16, 16]`."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def unpack_codes(codes: Tensor) -> Tensor:
    """Packed uint8 `[..., K/2]` to one code a byte, uint8 `[..., K]`: even k is the low nibble."""
    return torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)


def pack_codes(codes: Tensor) -> Tensor:
    """One code a byte, uint8 `[..., K]`, to packed uint8 `[..., K/2]`."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def row_bytes(k: int) -> int:
    """Of K codes in rows that are aligned."""
    return -(-k // (2 * ROW_ALIGNMENT)) * ROW_ALIGNMENT


@dataclass(frozen=True, eq=False)
class NVFP4Tensor:
    """A matrix `[rows, K]`, or a batch or stack of them `[L, rows, K]`, in NVFP4.

    codes         uint8 (or float4_e2m1fn_x2, viewed as uint8) `[..., rows, K/2]`; even k in the low nibble
    block_scale   float8_e4m3fn `[..., rows, K/16]` (linear), or `[..., ceil(rows/128), ceil(K/64), 32, 4, 4]` (swizzled); of
                  these a copy whose padding is zero is held where K is not a multiple of 64
    global_scale  float32 multiplier, shape `[]` or the leading dimensions

    Raises TypeError for a wrong dtype and ValueError for a wrong shape, mixed devices, or K not a multiple of 16. Values
    of a CPU tensor are checked here too: block scales must not be NaN or negative, global scales must be positive and
    finite. Tensors on other devices are checked by `check_values`, which synchronises.
    """

    codes: Tensor
    block_scale: Tensor
    global_scale: Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype == torch.float4_e2m1fn_x2:
            object.__setattr__(self, "codes", self.codes.view(torch.uint8))
        _check_metadata(self)
        if self.is_swizzled and self.k // BLOCK % ATOM_COLS:
            # a scale beyond K that holds NaN would reach results: tensor cores multiply whole atoms
            layout = self.scale_layout
            object.__setattr__(self, "block_scale", layout.store(layout.load(self.block_scale)))
        if self.codes.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_values()

    # ---- shape ----

    @property
    def shape(self) -> torch.Size:
        """Logical shape `[..., rows, K]`."""
        return torch.Size((*self.codes.shape[:-1], self.k))

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def rows(self) -> int:
        return self.codes.shape[-2]

    @property
    def k(self) -> int:
        return self.codes.shape[-1] * 2

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def is_swizzled(self) -> bool:
        return self.block_scale.ndim == self.codes.ndim + 3

    @property
    def scale_layout(self) -> LinearLayout | SwizzledLayout:
        """How this tensor's block scales lie in memory."""
        kind = SwizzledLayout if self.is_swizzled else LinearLayout
        return kind(self.rows, self.k // BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, block scales (padding included) and global scales."""
        return self.codes.nbytes + self.block_scale.nbytes + self.global_scale.nbytes

    def __repr__(self) -> str:
        layout = "swizzled" if self.is_swizzled else "linear"
        return f"NVFP4Tensor(shape={list(self.shape)}, scales={layout}, device={self.device})"

    # ---- values ----

    def linear_block_scale(self) -> Tensor:
        """Block scales as float8_e4m3fn `[..., rows, K/16]`, whatever the layout."""
        return self.scale_layout.load(self.block_scale)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """e2m1 * e4m3 without the global scale, `[..., rows, K]`: exact in every dtype of 6 significant bits or more."""
        table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=self.device)
        values = table[unpack_codes(self.codes).to(torch.int32)]
        scale = self.linear_block_scale().to(torch.float32)
        return (_in_blocks(values) * scale.unsqueeze(-1)).flatten(-2).to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values `[..., rows, K]`: exact in float64; otherwise one float32 product, then rounded to `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.decode(wide) * self.global_scale.to(wide)[..., None, None]).to(dtype)

    def check_values(self) -> None:
        """Raise ValueError for NaN or negative block scales and for global scales that are not positive and finite.

        Reads every scale; on a device other than the CPU it synchronises. On the meta device there is nothing to read.
        """
        g = self.global_scale
        if g.is_meta:
            return
        if not bool((torch.isfinite(g) & (g > 0)).all()):
            bad = g.flatten()[~(torch.isfinite(g) & (g > 0)).flatten()][0].item()
            raise ValueError(f"global_scale: expected positive finite multipliers, found {bad}")
        scale = self.linear_block_scale().view(torch.uint8)
        nan = (scale & 0x7F) == 0x7F
        if bool(nan.any()):
            raise ValueError(
                f"block_scale: {int(nan.sum())} of {scale.numel()} e4m3 scales are NaN (0x7F); the file is damaged"
            )
        negative = scale >= 0x80
        if bool(negative.any()):
            raise ValueError(
                f"block_scale: {int(negative.sum())} of {scale.numel()} e4m3 scales have the sign bit set; if that is "
                'meant, build the tensor with from_packed(..., scale_sign="strip" or "fold")'
            )

    # ---- other forms ----

    def _map(self, change: Callable[[Tensor], Tensor]) -> NVFP4Tensor:
        return _unchecked(change(self.codes), change(self.block_scale), change(self.global_scale))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NVFP4Tensor:
        """The same tensor on another device; there is no other dtype, which is a TypeError (`dequantize` gives floats)."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"device: an NVFP4Tensor cannot be cast to {device}; dequantize({device}) gives its values")
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def contiguous(self) -> NVFP4Tensor:
        """The same tensor with every part contiguous."""
        return self._map(lambda t: t.contiguous())

    def to_swizzled(self) -> NVFP4Tensor:
        """The same tensor with block scales in the 128x4 layout, padding zeroed; itself if already so."""
        if self.is_swizzled:
            return self
        layout = SwizzledLayout(self.rows, self.k // BLOCK)
        return _unchecked(self.codes, layout.store(self.block_scale), self.global_scale)

    def with_aligned_rows(self) -> NVFP4Tensor:
        """The same tensor with rows of codes a multiple of 16 bytes apart in memory; itself if already so.

        Blackwell's tensor copies need that (CUDA driver API, cuTensorMapEncodeTiled). Codes are copied only where K is not a
        multiple of 32: 8 bytes of zero codes then follow each row, beyond the K of `shape`.
        """
        if self.has_aligned_rows:
            return self
        padded = self.codes.new_zeros((*self.codes.shape[:-1], self.row_bytes))
        codes = padded[..., : self.k // 2]
        codes.copy_(self.codes)
        return _unchecked(codes, self.block_scale, self.global_scale)

    @property
    def row_bytes(self) -> int:
        """Bytes from one row of codes to the next in memory where rows are aligned: K / 2, rounded up to a multiple of 16."""
        return row_bytes(self.k)

    @property
    def has_aligned_rows(self) -> bool:
        """Whether the codes lie `row_bytes` from row to row without other gaps, and the last row's padding is memory too."""
        strides, size = [1], self.row_bytes
        for extent in reversed(self.codes.shape[:-1]):
            strides.append(size)
            size *= extent
        matters = zip(self.codes.shape, self.codes.stride(), reversed(strides), strict=True)
        if any(have != want for extent, have, want in matters if extent > 1):
            return False
        return self.codes.storage_offset() + size <= self.codes.untyped_storage().nbytes()

    def to_linear(self) -> NVFP4Tensor:
        """The same tensor with block scales row-major; itself if already so."""
        return _unchecked(self.codes, self.linear_block_scale(), self.global_scale) if self.is_swizzled else self

    def __reduce__(self) -> tuple[Callable[..., NVFP4Tensor], tuple[Tensor, ...]]:
        # scales as bytes: torch cannot pickle float8 tensors by itself (it can save them)
        return _from_bytes, (self.codes, self.block_scale.view(torch.uint8), self.global_scale)

    def __getitem__(self, index: int | slice) -> NVFP4Tensor:
        """One matrix, or a slice, of a batch or stack; raises IndexError on a plain matrix, TypeError for other indices."""
        if self.ndim < 3:
            raise IndexError(f"only a batch or stack of matrices can be indexed; this one has shape {list(self.shape)}")
        if isinstance(index, bool) or not isinstance(index, (int, slice)):
            raise TypeError(f"index: expected one integer or slice, got {type(index).__name__}")
        g = self.global_scale[index] if self.global_scale.ndim else self.global_scale
        return _unchecked(self.codes[index], self.block_scale[index], g)

    def narrow_rows(self, start: int, length: int) -> NVFP4Tensor:
        """Rows `start` to `start + length`, with linear block scales."""
        scale = self.linear_block_scale().narrow(-2, start, length)
        return _unchecked(self.codes.narrow(-2, start, length), scale, self.global_scale)

    @classmethod
    def from_packed(
        cls,
        codes: Tensor,
        block_scale: Tensor,
        global_scale: Tensor,
        *,
        nibble_order: NibbleOrder = "low_first",
        scale_sign: ScaleSign = "reject",
    ) -> NVFP4Tensor:
        """Build from data of another convention.

        nibble_order  "high_first" for files that keep even k in the high nibble (ComfyUI writes such files)
        scale_sign    "strip" takes the magnitude of every block scale (as NeMo-RL does), "fold" moves a set sign bit
                      into the 16 codes of its block, which keeps every value; "reject" leaves the error to the check
        """
        _choice("nibble_order", nibble_order, ("low_first", "high_first"))
        _choice("scale_sign", scale_sign, ("reject", "strip", "fold"))
        codes = codes.view(torch.uint8) if codes.dtype == torch.float4_e2m1fn_x2 else codes
        if nibble_order == "high_first":
            codes = (codes << 4) | (codes >> 4)
        if scale_sign != "reject":
            codes, block_scale = canonicalize_scales(codes, block_scale, fold=scale_sign == "fold")
        return cls(codes, block_scale, global_scale)

    @classmethod
    def from_swizzled(cls, codes: Tensor, block_scale: Tensor, global_scale: Tensor) -> NVFP4Tensor:
        """Build from 128x4-swizzled block scales in any shape that holds whole padded atoms, batch dimensions first.

        Raises ValueError when the bytes are not those of the padded size: ceil(rows/128) * ceil(K/64) * 512 a matrix.
        """
        layout = SwizzledLayout(codes.shape[-2], codes.shape[-1] * 2 // BLOCK)
        batch = tuple(codes.shape[:-2])
        shape = (*batch, *layout.storage_shape)
        if block_scale.numel() != torch.Size(shape).numel():
            raise ValueError(
                f"block_scale: swizzled scales of codes {list(codes.shape)} take {torch.Size(shape).numel()} bytes, "
                f"padding to 128 rows x 4 scales included, got {block_scale.numel()}"
            )
        return cls(codes, block_scale.contiguous().view(shape), global_scale)


def _unchecked(codes: Tensor, block_scale: Tensor, global_scale: Tensor) -> NVFP4Tensor:
    """An NVFP4Tensor of parts that are valid by construction: nothing is read or checked again."""
    made = object.__new__(NVFP4Tensor)
    object.__setattr__(made, "codes", codes)
    object.__setattr__(made, "block_scale", block_scale)
    object.__setattr__(made, "global_scale", global_scale)
    return made


def _from_bytes(codes: Tensor, block_scale: Tensor, global_scale: Tensor) -> NVFP4Tensor:
    return _unchecked(codes, block_scale.view(torch.float8_e4m3fn), global_scale)


def _check_metadata(t: NVFP4Tensor) -> None:
    for name, tensor, dtype in (
        ("codes", t.codes, torch.uint8),
        ("block_scale", t.block_scale, torch.float8_e4m3fn),
        ("global_scale", t.global_scale, torch.float32),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            hint = "; NVFP4 scales are e4m3fn even where a text says e4m3fnuz" if name == "block_scale" else ""
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}{hint}")
        if tensor.device != t.codes.device:
            raise ValueError(f"{name} is on {tensor.device}, codes are on {t.codes.device}: one device is needed")
    if t.codes.ndim < 2:
        raise ValueError(f"codes: expected [..., rows, K/2], got shape {list(t.codes.shape)}")
    batch = tuple(t.codes.shape[:-2])
    if t.k == 0 or t.k % BLOCK:
        raise ValueError(f"codes: K must be a positive multiple of {BLOCK}, got K = {t.k} from shape {list(t.codes.shape)}")
    linear = (*batch, *LinearLayout(t.rows, t.k // BLOCK).storage_shape)
    swizzled = (*batch, *SwizzledLayout(t.rows, t.k // BLOCK).storage_shape)
    if tuple(t.block_scale.shape) not in (linear, swizzled):
        raise ValueError(
            f"block_scale: codes {list(t.codes.shape)} need {list(linear)} (linear) or {list(swizzled)} (swizzled), "
            f"got {list(t.block_scale.shape)}"
        )
    if tuple(t.global_scale.shape) not in ((), batch):
        raise ValueError(f"global_scale: expected shape [] or {list(batch)}, got {list(t.global_scale.shape)}")


def canonicalize_scales(codes: Tensor, block_scale: Tensor, *, fold: bool) -> tuple[Tensor, Tensor]:
    """Clear the sign bit of linear block scales `[..., rows, K/16]`; with `fold`, flip their 16 codes' signs instead
    of changing the values. Returns (codes, block_scale)."""
    raw = block_scale.view(torch.uint8)
    if fold:
        flip = ((raw >> 7) * 0x88).repeat_interleave(BLOCK // 2, dim=-1)
        codes = codes ^ flip
    return codes, (raw & 0x7F).view(torch.float8_e4m3fn)


# ---- quantisers ----


def _round_to_e2m1(y: Tensor) -> Tensor:
    """Codes 0..7 of the magnitudes `y` (float32, not negative): to nearest, ties to the even code, saturating at 6.

    Each of the three terms is the rounding of one binade (steps 0.5, 1, 2); the smallest is the one that applies.
    """
    code = torch.minimum((y * 2).round(), y.round() + 2)
    return torch.minimum(code, (y * 0.5).round() + 4).clamp(max=7).to(torch.uint8)


def _block_scale(block_amax: Tensor, largest: float, g: Tensor) -> Tensor:
    """float32 values of the e4m3 scales that map each block's maximum to `largest`; 0 only for all-zero blocks."""
    scale = (block_amax / (largest * g)).clamp(E4M3_MIN, E4M3_MAX)
    scale = torch.where(block_amax == 0, 0.0, scale)
    return scale.to(torch.float8_e4m3fn).to(torch.float32)


def _encode(blocks: Tensor, scale: Tensor, g: Tensor) -> Tensor:
    """Codes with sign of `blocks` `[..., 16]` under float32 scales `[...]`; codes of zero-scale blocks are 0 or 8."""
    unit = (scale * g).unsqueeze(-1)
    magnitude = torch.where(unit > 0, blocks.abs() / unit, 0.0)
    return _round_to_e2m1(magnitude) | (torch.signbit(blocks).to(torch.uint8) << 3)


def _squared_error(blocks: Tensor, codes: Tensor, scale: Tensor, g: Tensor) -> Tensor:
    """Sum over each block of (x / g - e2m1 * scale)^2 in float32, added pairwise so that every device agrees."""
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=blocks.device)
    d = blocks / g.unsqueeze(-1) - table[codes.to(torch.int32)] * scale.unsqueeze(-1)
    d = d * d
    for half in (8, 4, 2, 1):
        d = d[..., :half] + d[..., half : 2 * half]
    return d.squeeze(-1)


def default_global_scale(x: Tensor, method: Method) -> Tensor:
    """amax / (6 * 448), or amax / (6 * 256) for four-over-six, a matrix; 1 where everything is zero."""
    if x.shape[-2] == 0:
        return torch.ones(x.shape[:-2], dtype=torch.float32, device=x.device)
    return global_scale_of(x.abs().amax((-2, -1)), method)


def global_scale_of(amax: Tensor, method: Method) -> Tensor:
    """`default_global_scale` of matrices whose largest magnitudes are `amax`, float32."""
    top = E2M1_MAX * (E4M3_MAX if method == "nearest" else 256.0)
    return torch.where(amax == 0, 1.0, (amax / top).clamp(min=_MIN_GLOBAL_SCALE))


def quantize(
    x: Tensor,
    global_scale: Tensor | float | None = None,
    method: Method = "nearest",
    *,
    layout: Layout = "linear",
    nonfinite: NonFinite = "error",
) -> NVFP4Tensor:
    """The specification of `glu4.quantize`, whose arguments and errors these are, in torch alone.

    All arithmetic is float32 in the stated order: s = e4m3(clamp(block_amax / (6 * g), 2^-9, 448)), code =
    e2m1(x / (s * g)). All-zero blocks have scale 0; an all-zero or empty matrix has global scale 1. Signs of zeros are
    kept (code 8).
    """
    return quantized(x, checked_global_scale(x, global_scale, method, layout, nonfinite), method, layout, nonfinite)


def quantized(x: Tensor, given: Tensor | None, method: Method, layout: Layout, nonfinite: NonFinite) -> NVFP4Tensor:
    """`quantize` of what `checked_global_scale` has seen."""
    finite = torch.isfinite(x)
    if nonfinite == "error":
        refuse_nonfinite(finite)
    values = x.detach().float()
    if nonfinite == "propagate":
        values = torch.where(finite, values, 0.0)
    per_matrix = default_global_scale(values, method) if given is None else given
    g = per_matrix[..., None, None]
    blocks = _in_blocks(values)
    block_amax = blocks.abs().amax(-1)
    scale = _block_scale(block_amax, 6.0, g)
    codes = _encode(blocks, scale, g)
    if method == "four_over_six":
        scale4 = _block_scale(block_amax, 4.0, g)
        codes4 = _encode(blocks, scale4, g)
        better = _squared_error(blocks, codes4, scale4, g) < _squared_error(blocks, codes, scale, g)
        scale = torch.where(better, scale4, scale)
        codes = torch.where(better.unsqueeze(-1), codes4, codes)
    if nonfinite == "propagate":
        scale = torch.where(_in_blocks(finite).all(-1), scale, torch.nan)
    made = _unchecked(pack_codes(codes.flatten(-2)), scale.to(torch.float8_e4m3fn), per_matrix)
    return made.to_swizzled().with_aligned_rows() if layout == "swizzled" else made


def checked_global_scale(
    x: Tensor, global_scale: Tensor | float | None, method: Method, layout: Layout, nonfinite: NonFinite
) -> Tensor | None:
    """The given global scale as a tensor on x's device; raises what `quantize` does for its arguments, values of x aside."""
    _choice("method", method, ("nearest", "four_over_six"))
    _choice("layout", layout, ("linear", "swizzled"))
    _choice("nonfinite", nonfinite, ("error", "propagate"))
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x: expected float16, bfloat16 or float32, got {x.dtype}")
    if x.ndim < 2 or x.shape[-1] == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"x: expected [..., rows, K] with K a positive multiple of {BLOCK}, got shape {list(x.shape)}")
    return _given_global_scale(global_scale, x.shape[:-2], x.device)


def refuse_nonfinite(finite: Tensor) -> None:
    """Raise ValueError unless all of `finite` holds; synchronises a GPU."""
    if not bool(finite.all()):
        raise ValueError('x: holds NaN or infinity, which NVFP4 cannot represent; nonfinite="propagate" marks such blocks')


def _given_global_scale(given: Tensor | float | None, batch: torch.Size, device: torch.device) -> Tensor | None:
    if given is None:
        return None
    if not isinstance(given, Tensor):
        if not isinstance(given, (int, float)):
            raise TypeError(f"global_scale: expected a float, a float32 tensor or None, got {type(given).__name__}")
        # float32 turns smaller ones into zero and larger ones into infinity
        if not 2.0**-149 <= given <= torch.finfo(torch.float32).max:
            raise ValueError(f"global_scale: expected a positive finite float32 multiplier, got {given}")
        return torch.full((), given, dtype=torch.float32, device=device)
    if given.dtype != torch.float32 or tuple(given.shape) not in ((), tuple(batch)):
        raise ValueError(
            f"global_scale: expected float32 of shape [] or {list(batch)}, got {given.dtype} of shape {list(given.shape)}"
        )
    if given.device != device:
        raise ValueError(f"global_scale is on {given.device}, x is on {device}: one device is needed")
    if given.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = given[~(torch.isfinite(given) & (given > 0))]
        if bad.numel():
            raise ValueError(f"global_scale: expected positive finite multipliers, got {bad.flatten()[0].item()}")
    return given


def gather_rows(x: Tensor | NVFP4Tensor, order: Tensor) -> Tensor | NVFP4Tensor:
    """Rows order // top_k of x `[T, K]`, `[T * top_k, K]`, by torch; of NVFP4 the codes and the scales, under the one global
    scale. order: int64 `[T, top_k]`."""
    rows = torch.div(order.flatten(), max(1, order.shape[1]), rounding_mode="floor")
    if not isinstance(x, NVFP4Tensor):
        return x.index_select(0, rows)
    # as bytes: torch gathers no float8 on some devices
    scale = x.block_scale.view(torch.uint8).index_select(0, rows).view(torch.float8_e4m3fn)
    return _unchecked(x.codes.index_select(0, rows), scale, x.global_scale)
