"""combine_tokens: of each token the weighted sum of its experts' rows. Device code, in CuTe DSL.

A thread has eight neighbouring columns of a token, 16 bytes of each row, and adds the experts one after the other with fused
multiply-adds in float32: the same bits from run to run.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

Int32, Int64, Float32 = cutlass.Int32, cutlass.Int64, cutlass.Float32

THREADS = 128
_COLUMNS = 8  # of a thread


@dsl_user_op
def fused(a: Any, b: Any, c: Any, *, loc: Any = None, ip: Any = None) -> Any:
    """a * b + c in float32, rounded once; written out, since the assembler fuses a product and a sum or does not."""
    values = [Float32(v).ir_value(loc=loc, ip=ip) for v in (a, b, c)]
    result = llvm.inline_asm(
        T.f32(), values, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", has_side_effects=False, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return Float32(result)


class CombineTokens:
    """One kernel, for rows and results of one 16-bit type.

    Arguments at launch, device pointers: y [rows, columns], a row after the other; places int64 [tokens, top_k]; weights
    float32 [tokens, top_k]; last, int32, the number of rows that experts have; out [tokens, columns], as y. Then tokens, top_k
    and columns. A place that is not below `last` counts nothing, whatever its weight.
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    @cute.jit
    def __call__(
        self, y: cute.Pointer, places: cute.Pointer, weights: cute.Pointer, last: cute.Pointer, out: cute.Pointer,
        tokens: Int32, top_k: Int32, columns: Int32, stream: CUstream,
    ):  # fmt: skip
        grid = (tokens, cute.ceil_div(columns, THREADS * _COLUMNS), 1)
        self.kernel(y, places, weights, last, out, top_k, columns).launch(
            grid=grid, block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self, y: cute.Pointer, places: cute.Pointer, weights: cute.Pointer, last: cute.Pointer, out: cute.Pointer, top_k: Int32,
        columns: Int32,
    ):  # fmt: skip
        thread, _, _ = cute.arch.thread_idx()
        token, part, _ = cute.arch.block_idx()
        column = (part * THREADS + thread) * _COLUMNS
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if column < columns:
            aligned = ((y.toint() | out.toint() | Int64(columns) * 2) & 15) == 0
            rows = cute.make_tensor(last, cute.make_layout(1))[0]
            sums = cute.make_rmem_tensor((_COLUMNS,), Float32)
            for i in cutlass.range_constexpr(_COLUMNS):
                sums[i] = Float32(0.0)
            chosen = cute.make_tensor(places + Int64(token) * top_k, cute.make_layout(top_k))
            factors = cute.make_tensor(weights + Int64(token) * top_k, cute.make_layout(top_k))
            for choice in cutlass.range(top_k, unroll=4):
                place, factor = chosen[choice], factors[choice]
                if place < rows:
                    values = self.load(y, place * columns + column, columns - column, aligned)
                    for i in cutlass.range_constexpr(_COLUMNS):
                        sums[i] = fused(factor, values[i].to(Float32), sums[i])
            self.store(out, Int64(token) * columns + column, columns - column, aligned, sums)

    @cute.jit
    def load(self, y, start, left, aligned):
        """A thread's values of a row, as far as there are columns."""
        values = cute.make_rmem_tensor((_COLUMNS,), self.dtype)
        for i in cutlass.range_constexpr(_COLUMNS):
            values[i] = self.dtype(0.0)
        if aligned:
            there = cute.make_ptr(self.dtype, (y + start).toint(), cute.AddressSpace.gmem, assumed_align=16)
            cute.autovec_copy(cute.make_tensor(there, cute.make_layout(_COLUMNS)), values)
        else:
            one = cute.make_tensor(y + start, cute.make_layout(_COLUMNS))
            for i in cutlass.range_constexpr(_COLUMNS):
                if i < left:
                    values[i] = one[i]
        return values

    @cute.jit
    def store(self, out, start, left, aligned, sums):
        rounded = cute.make_rmem_tensor((_COLUMNS,), self.dtype)
        for i in cutlass.range_constexpr(_COLUMNS):
            rounded[i] = sums[i].to(self.dtype)
        if aligned:
            there = cute.make_ptr(self.dtype, (out + start).toint(), cute.AddressSpace.gmem, assumed_align=16)
            cute.autovec_copy(rounded, cute.make_tensor(there, cute.make_layout(_COLUMNS)))
        else:
            one = cute.make_tensor(out + start, cute.make_layout(_COLUMNS))
            for i in cutlass.range_constexpr(_COLUMNS):
                if i < left:
                    one[i] = rounded[i]
