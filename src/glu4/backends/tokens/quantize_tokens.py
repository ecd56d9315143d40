"""quantize_tokens: activations to NVFP4, bit for bit as `glu4.nvfp4.quantize` under a given global scale. Device code, in CuTe
DSL.

A thread has one block: 16 neighbouring values, two loads of 16 bytes; it writes 8 bytes of codes and a scale.

A code is e2m1 of x / u rounded to float32, u the block's scale times the global one. The division is correctly rounded without
dividing 16 times: with y the rounded 1 / u, and q within one unit in the last place of x / u, fma(fma(-q, u, x), y, q) is x / u
rounded, as long as nothing over- or underflows (Markstein; Handbook of Floating-Point Arithmetic, 2nd edition, section 4.7).
A power of two brings u near 1 first. It may lose bits of x that are far below the smallest code, and values beyond the largest
code are capped, so neither reaches a result.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

Int32, Int64, Uint32, Float32 = cutlass.Int32, cutlass.Int64, cutlass.Uint32, cutlass.Float32

THREADS = 128
_BLOCK = 16
_EXPONENT, _MAGNITUDE, _ONE = 0x7F800000, 0x7FFFFFFF, 0x3F800000  # of float32: the exponent, all but the sign, 1.0
_TO_E4M3 = "{ .reg .b16 both; cvt.rn.satfinite.e4m3x2.f32 both, $1, $1; cvt.u32.u16 $0, both; }"
_OF_E4M3 = (
    "{ .reg .b16 both; .reg .b32 halves; cvt.u16.u32 both, $1; cvt.rn.f16x2.e4m3x2 halves, both; "
    "mov.b32 {both, _}, halves; cvt.f32.f16 $0, both; }"
)
_TO_E2M1 = "{ .reg .b8 both; cvt.rn.satfinite.e2m1x2.f32 both, $1, $2; cvt.u32.u8 $0, both; }"
_LOW_F16 = "{ .reg .b16 low; mov.b32 {low, _}, $1; cvt.f32.f16 $0, low; }"
_HIGH_F16 = "{ .reg .b16 high; mov.b32 {_, high}, $1; cvt.f32.f16 $0, high; }"


@dsl_user_op
def real(text: str, *operands: Any, loc: Any = None, ip: Any = None) -> Any:
    """One instruction that gives a float32; written out, since the assembler would fuse a product and a sum."""
    return Float32(_assembled(text, T.f32(), operands, loc, ip))


@dsl_user_op
def word(text: str, *operands: Any, loc: Any = None, ip: Any = None) -> Any:
    """One instruction that gives 32 bits."""
    return Uint32(_assembled(text, T.i32(), operands, loc, ip))


def _assembled(text: str, kind: Any, operands: tuple[Any, ...], loc: Any, ip: Any) -> Any:
    assert all(isinstance(o, (Float32, Uint32)) for o in operands), "an integer of another width would be converted"
    kinds = ",".join(["=f" if kind == T.f32() else "=r", *("f" if isinstance(o, Float32) else "r" for o in operands)])
    return llvm.inline_asm(
        kind, [o.ir_value(loc=loc, ip=ip) for o in operands], text, kinds, has_side_effects=False, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


def bits(value: Any) -> Any:
    """Of a float32."""
    return word("mov.b32 $0, $1;", value)


def floating(value: Any) -> Any:
    """The float32 of 32 bits."""
    return real("mov.b32 $0, $1;", value)


class QuantizeTokens:
    """Arguments at launch, device pointers: x, of a 16-bit type, rows `x_row` elements apart, each aligned to 16 bytes; global
    scales float32; codes, eight bytes a block, rows `code_row` blocks apart; scales, a byte a block. Then

    matrices     of `rows` rows and `blocks` blocks each, one after the other
    step         from a matrix's global scale to the next one's: 0 or 1
    swizzled     0 or 1: scales of each matrix in the 128x4 layout (`glu4.scale_layout`), its padding zero

    brain: x is bfloat16, not float16; converts: the architecture has cvt to e2m1 (PTX ISA: sm_100a and sm_103a).
    """

    def __init__(self, brain: bool, converts: bool) -> None:
        self.brain, self.converts = brain, converts

    @cute.jit
    def __call__(
        self, x: cute.Pointer, global_scales: cute.Pointer, codes: cute.Pointer, scales: cute.Pointer, matrices: Int32,
        rows: Int32, blocks: Int32, x_row: Int32, code_row: Int32, step: Int32, swizzled: Int32, stream: CUstream,
    ):  # fmt: skip
        tall, wide = self.padded(rows, blocks, swizzled)
        self.kernel(x, global_scales, codes, scales, matrices, rows, blocks, x_row, code_row, step, swizzled).launch(
            grid=(cute.ceil_div(matrices * tall * wide, THREADS), 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.jit
    def padded(self, rows, blocks, swizzled):
        """Rows and columns of the scales of a matrix."""
        tall, wide = rows, blocks
        if swizzled != 0:
            tall, wide = (rows + 127) // 128 * 128, (blocks + 3) // 4 * 4
        return tall, wide

    @cute.kernel
    def kernel(
        self, x: cute.Pointer, global_scales: cute.Pointer, codes: cute.Pointer, scales: cute.Pointer, matrices: Int32,
        rows: Int32, blocks: Int32, x_row: Int32, code_row: Int32, step: Int32, swizzled: Int32,
    ):  # fmt: skip
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        place = cta * THREADS + thread
        tall, wide = self.padded(rows, blocks, swizzled)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if place < matrices * tall * wide:
            line, block = Uint32(place) // Uint32(wide), Int32(Uint32(place) % Uint32(wide))
            matrix, row = Int32(line // Uint32(tall)), Int32(line % Uint32(tall))
            scale = Uint32(0)
            if (row < rows) & (block < blocks):
                one = cute.make_tensor(global_scales + matrix * step, cute.make_layout(1))
                at = Int64(matrix) * rows + row
                loaded = self.load(x.toint() + (at * x_row + block * _BLOCK) * 2)
                low, high, scale = self.encode(loaded, one[0])
                into = cute.make_ptr(
                    Uint32, codes.toint() + (at * code_row + block) * 8, cute.AddressSpace.gmem, assumed_align=8
                )
                both = cute.make_rmem_tensor((2,), Uint32)
                both[0], both[1] = low, high
                cute.autovec_copy(both, cute.make_tensor(into, cute.make_layout(2)))
            if swizzled != 0:
                atom = (matrix * (tall // 128) + row // 128) * (wide // 4) + block // 4
                place = atom * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
            cute.make_tensor(scales + place, cute.make_layout(1))[0] = cutlass.Uint8(scale)

    @cute.jit
    def load(self, address):
        """A block, two values to a word."""
        words = cute.make_rmem_tensor((_BLOCK // 2,), Uint32)
        there = cute.make_ptr(Uint32, address, cute.AddressSpace.gmem, assumed_align=16)
        for half in cutlass.range_constexpr(2):
            four = cute.make_rmem_tensor((4,), Uint32)
            cute.autovec_copy(cute.make_tensor(there + half * 4, cute.make_layout(4)), four)
            for i in cutlass.range_constexpr(4):
                words[4 * half + i] = four[i]
        return words

    @cute.jit
    def encode(self, words, global_scale):
        """(codes of the first eight values, of the others, the scale's byte)."""
        values = cute.make_rmem_tensor((_BLOCK,), Float32)
        largest = Uint32(0)  # magnitude; of floats that are not negative the order is that of their bits
        for i in cutlass.range_constexpr(_BLOCK):
            values[i] = self.value(words[i // 2], i % 2)
            largest = word("max.u32 $0, $1, $2;", largest, bits(values[i]) & _MAGNITUDE)
        whole = largest < _EXPONENT
        if not whole:
            largest = Uint32(0)
            for i in cutlass.range_constexpr(_BLOCK):
                magnitude = bits(values[i]) & _MAGNITUDE
                if magnitude < _EXPONENT:
                    largest = word("max.u32 $0, $1, $2;", largest, magnitude)
                else:  # NaN or infinity
                    values[i] = Float32(0.0)
        largest = floating(largest)
        wanted = real("div.rn.f32 $0, $1, $2;", largest, real("mul.rn.f32 $0, $1, $2;", Float32(6.0), global_scale))
        wanted = real("min.f32 $0, $1, $2;", real("max.f32 $0, $1, $2;", wanted, Float32(2.0**-9)), Float32(448.0))
        scale = word(_TO_E4M3, wanted) & 0xFF
        if largest == 0.0:
            scale = Uint32(0)
        unit = real("mul.rn.f32 $0, $1, $2;", real(_OF_E4M3, scale), global_scale)
        factor = Float32(1.0)
        if unit < 2.0**-40:
            factor = Float32(2.0**80)
        if unit > 2.0**40:
            factor = Float32(2.0**-80)
        unit = real("mul.rn.f32 $0, $1, $2;", unit, factor)
        cap = real("mul.rn.f32 $0, $1, $2;", unit, Float32(6.0))
        if unit == 0.0:  # all is zero, or too small for float32
            unit = Float32(1.0)
        inverse = real("rcp.rn.f32 $0, $1;", unit)
        codes = cute.make_rmem_tensor((2,), Uint32)
        for half in cutlass.range_constexpr(2):
            codes[half] = Uint32(0)
            for pair in cutlass.range_constexpr(4):
                i = 8 * half + 2 * pair
                first = self.quotient(values[i], factor, cap, unit, inverse)
                second = self.quotient(values[i + 1], factor, cap, unit, inverse)
                byte = self.rounded(first, second, values[i], values[i + 1])
                codes[half] = codes[half] | (byte << (8 * pair))
        if not whole:
            scale = Uint32(0x7F)  # NaN
        return codes[0], codes[1], scale

    @cute.jit
    def value(self, two, which: cutlass.Constexpr):
        """The lower or the higher of two values, exact in float32."""
        if cutlass.const_expr(self.brain):
            found = floating(two & Uint32(0xFFFF0000) if which else two << 16)
        else:
            found = real(_HIGH_F16 if which else _LOW_F16, two)
        return found

    @cute.jit
    def quotient(self, value, factor, cap, unit, inverse):
        """|value| * factor / unit, rounded to float32; where it is more than 6, 6 or a bit more or less."""
        a = real("mul.rn.f32 $0, $1, $2;", real("abs.f32 $0, $1;", value), factor)
        a = real("min.f32 $0, $1, $2;", a, cap)
        minus = real("neg.f32 $0, $1;", unit)
        q = real("mul.rn.f32 $0, $1, $2;", a, inverse)
        for _ in cutlass.range_constexpr(2):
            q = real("fma.rn.f32 $0, $1, $2, $3;", real("fma.rn.f32 $0, $1, $2, $3;", q, minus, a), inverse, q)
        return q

    @cute.jit
    def rounded(self, first, second, first_value, second_value):
        """Two codes in a byte, the first the low nibble: of quotients, with the signs of values."""
        signs = (bits(first_value) >> 28 & 8) | (bits(second_value) >> 24 & 0x80)
        if cutlass.const_expr(self.converts):
            byte = word(_TO_E2M1, second, first)
        else:
            byte = self.code(first) | (self.code(second) << 4)
        return byte | signs

    @cute.jit
    def code(self, q):
        """e2m1 of 0 <= q < 7, to nearest, ties to even.

        Added is a power of two beside which float32 has no bits finer than e2m1's step at q: 0.5 up to 2, 1 up to 4, 2 above.
        The sum's lowest bits count steps, of which each binade above the first repeats two.
        """
        binade = bits(q) & _EXPONENT
        if binade < _ONE:
            binade = Uint32(_ONE)
        shift = binade + (22 << 23)
        return bits(real("add.rn.f32 $0, $1, $2;", q, floating(shift))) - shift + ((binade - _ONE) >> 22)
