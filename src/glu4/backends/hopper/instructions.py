"""PTX instructions that CuTe DSL has no name for. Device code; needs nvidia-cutlass-dsl."""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T as MlirType
from cutlass.cutlass_dsl import dsl_user_op

Int64, Uint32, Float32 = cutlass.Int64, cutlass.Uint32, cutlass.Float32


@dsl_user_op
def asm_u32(code: str, a: Any, b: Any, *, loc: Any = None, ip: Any = None) -> Any:
    """One 32-bit result ($0) of two 32-bit operands ($1, $2)."""
    values = [Uint32(v).ir_value(loc=loc, ip=ip) for v in (a, b)]
    result = llvm.inline_asm(
        MlirType.i32(), values, code, "=r,r,r", has_side_effects=False, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return Uint32(result)


@dsl_user_op
def store_remote(address: Any, a: Any, b: Any, c: Any, d: Any, *, loc: Any = None, ip: Any = None) -> None:
    """16 bytes into the shared memory of a CTA of the cluster; `address` is of mapa."""
    values = [Uint32(address).ir_value(loc=loc, ip=ip), *(Float32(v).ir_value(loc=loc, ip=ip) for v in (a, b, c, d))]
    llvm.inline_asm(
        None, values, "st.shared::cluster.v4.f32 [$0], {$1, $2, $3, $4};", "r,f,f,f,f", has_side_effects=True,
        is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def store_transposed(address: Any, *matrices: Any, loc: Any = None, ip: Any = None) -> None:
    """stmatrix of 1, 2 or 4 transposed 8x8 matrices; lane i gives the address of row i % 8 of matrix i / 8."""
    count = len(matrices)
    values = [Uint32(v).ir_value(loc=loc, ip=ip) for v in (address, *matrices)]
    names = ", ".join(f"${i + 1}" for i in range(count))
    llvm.inline_asm(
        None, values, f"stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [$0], {{{names}}};", "r" + ",r" * count,
        has_side_effects=True, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def store_16_bytes(address: Any, words: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Four words to an aligned global address."""
    values = [Int64(address).ir_value(loc=loc, ip=ip), *(Uint32(words[i]).ir_value(loc=loc, ip=ip) for i in range(4))]
    llvm.inline_asm(
        None, values, "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r", has_side_effects=True,
        is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def store_shared_16_bytes(address: Any, words: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Four words to an aligned address of the CTA's shared memory."""
    values = [Uint32(address).ir_value(loc=loc, ip=ip), *(Uint32(words[i]).ir_value(loc=loc, ip=ip) for i in range(4))]
    llvm.inline_asm(
        None, values, "st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", has_side_effects=True,
        is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def copy_async(there: Any, here: Any, size: int, valid: Any, *, loc: Any = None, ip: Any = None) -> None:
    """cp.async of 4 or 8 bytes (`size`) from global `here` to shared `there`; zeros instead where `valid` is 0, not `size`."""
    values = [v.ir_value(loc=loc, ip=ip) for v in (Uint32(there), Int64(here), Uint32(valid))]
    llvm.inline_asm(
        None, values, f"cp.async.ca.shared.global [$0], [$1], {size}, $2;", "r,l,r", has_side_effects=True,
        is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def load_shared(kind: str, address: Any, *, loc: Any = None, ip: Any = None) -> Any:
    """32 bits of shared memory, or 8 with zeros above; kind: "b32" or "u8"."""
    values = [Uint32(address).ir_value(loc=loc, ip=ip)]
    result = llvm.inline_asm(
        MlirType.i32(), values, f"ld.shared.{kind} $0, [$1];", "=r,r", has_side_effects=True, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return Uint32(result)
