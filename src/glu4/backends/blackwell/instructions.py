"""PTX instructions in forms that CuTe DSL does not offer. Device code; needs nvidia-cutlass-dsl."""

from typing import Any

import cutlass
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import tcgen05
from cutlass.cutlass_dsl import T, dsl_user_op

Int32, Int64, Float32 = cutlass.Int32, cutlass.Int64, cutlass.Float32

# L2 cache policies, as createpolicy would make them for a whole tensor (CUTLASS, TMA::CacheHintSm90)
EVICT_NORMAL, EVICT_FIRST = 0x1000000000000000, 0x12F0000000000000


def instruction_descriptor(m: int, n: int) -> int:
    """Of kind mxf4nvf4 with e2m1 operands, ue4m3 scales and K 64 (PTX ISA, table of tcgen05.mma's instruction descriptor)."""
    return 1 << 7 | 1 << 10 | n >> 3 << 17 | m >> 7 << 27


@dsl_user_op
def block_scaled_mma(
    ctas: int, collector: str, descriptor: int, sums: Any, a: Any, b: Any, a_scales: Any, b_scales: Any, accumulate: Any, *,
    loc: Any = None, ip: Any = None,
) -> None:  # fmt: skip
    """One MMA with a hint what becomes of A in the collector buffer; by one thread.

    sums, a_scales, b_scales: addresses in tensor memory; a, b: fragments (descriptors of shared memory).
    """
    code = (
        "{ .reg .pred p; setp.ne.b32 p, $6, 0; "
        f"tcgen05.mma.cta_group::{ctas}.kind::mxf4nvf4.block_scale.block16.collector::a::{collector} "
        "[$0], $1, $2, $3, [$4], [$5], p; }"
    )
    matrices = [tcgen05.smem_descriptor_to_int(t.iterator, loc=loc, ip=ip) for t in (a, b)]
    words = [Int32(v).ir_value(loc=loc, ip=ip) for v in (sums, descriptor, a_scales, b_scales, Int32(accumulate))]
    values = [words[0], *(Int64(d).ir_value(loc=loc, ip=ip) for d in matrices), *words[1:]]
    llvm.inline_asm(
        None, values, code, "r,l,l,r,r,r,r", has_side_effects=True, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def tanh_approx(x: Any, *, loc: Any = None, ip: Any = None) -> Any:
    """tanh of a float32 with a maximum relative error of 2^-11 (PTX ISA, tanh)."""
    result = llvm.inline_asm(
        T.f32(), [Float32(x).ir_value(loc=loc, ip=ip)], "tanh.approx.f32 $0, $1;", "=f,f", has_side_effects=False,
        is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return Float32(result)


@dsl_user_op
def take_ticket(pointer: Any, *, loc: Any = None, ip: Any = None) -> Any:
    """Add 1 to an int32 in global memory and return what it was; release and acquire for the whole device.

    CuTe DSL's own writes its qualifiers in an order that the PTX ISA (atom) does not have.
    """
    address = pointer.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip)
    result = llvm.inline_asm(
        T.i32(), [address], "atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;", "=r,l", has_side_effects=True,
        is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return Int32(result)


__all__ = ["EVICT_FIRST", "EVICT_NORMAL", "block_scaled_mma", "instruction_descriptor", "take_ticket", "tanh_approx"]
