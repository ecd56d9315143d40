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
def bulk_store(there: Any, here: Any, size: int, *, loc: Any = None, ip: Any = None) -> None:
    """Start a bulk copy of `size` bytes from shared to global memory, all multiples of 16; of this thread's bulk group."""
    values = [v.ir_value(loc=loc, ip=ip) for v in (Int64(there), Uint32(here), Uint32(size))]
    llvm.inline_asm(
        None, values, "cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], $2;", "l,r,r", has_side_effects=True,
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
    """cp.async of 4, 8 or 16 bytes (`size`) from global `here` to shared `there`; zeros instead where `valid` is 0, not `size`.

    16 bytes pass L1 by, which may hold what the kernel before this one has overwritten since.
    """
    values = [v.ir_value(loc=loc, ip=ip) for v in (Uint32(there), Int64(here), Uint32(valid))]
    level = "cg" if size == 16 else "ca"
    llvm.inline_asm(
        None, values, f"cp.async.{level}.shared.global [$0], [$1], {size}, $2;", "r,l,r", has_side_effects=True,
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


@dsl_user_op
def multiply_by_width(
    sums: Any, fragment: Any, tokens: Any, width: Any, widths: Any, kind: str, *, loc: Any = None, ip: Any = None
) -> list[Any]:
    """wgmma of 64 rows by some steps of 16 of K with the first `width` tokens, one of `widths`: started, not waited for.

    sums      float32 [widths[-1] / 2], a thread's; returned with the first width / 2 changed
    fragment  four words a step, matrix A
    tokens    shared address of the first step in rows of 64, 128 bytes each, swizzled
    kind      "f16" or "bf16"

    One piece of assembly, so that all widths name the same registers: where each has its own code, ptxas gives each registers
    of its own, has too few, and runs the products one by one (its note C7512).
    """
    count, steps = len(sums), range(len(fragment) // 4)
    inputs = range(2 * count, 2 * count + len(fragment))
    address, chosen = inputs.stop, inputs.stop + 1

    def products(n: int) -> str:
        d = ", ".join(f"${i}" for i in range(n // 2))
        lines = ["wgmma.fence.sync.aligned;"]
        for s in steps:
            a = ", ".join(f"${i}" for i in inputs[4 * s : 4 * s + 4])
            lines.append(f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{d}}}, {{{a}}}, there{s}, 1, 1, 1, 0;")
        return "\n".join((*lines, "wgmma.commit_group.sync.aligned;", "bra.uni done;"))

    def choose(first: int, last: int) -> str:
        if first == last:
            return products(widths[first])
        middle = (first + last) // 2
        test = f"setp.gt.u32 wider, ${chosen}, {widths[middle]};\n@wider bra.uni over{middle};"
        return "\n".join((test, choose(first, middle), f"over{middle}:", choose(middle + 1, last)))

    # matrix descriptors (PTX ISA, wgmma): start / 16, leading offset not used, 1024 bytes between eights of rows, 128-byte
    # swizzle
    code = "\n".join((
        f"{{ .reg .b32 low<{len(steps)}>, high; .reg .b64 there<{len(steps)}>; .reg .pred wider; mov.u32 high, 0x40000040;",
        f"shr.u32 low0, ${address}, 4; and.b32 low0, low0, 0x3fff; or.b32 low0, low0, 0x10000;",
        *(f"add.u32 low{s}, low0, {2 * s};" for s in steps[1:]),
        *(f"mov.b64 there{s}, {{low{s}, high}};" for s in steps),
        choose(0, len(widths) - 1), "done: }",
    ))  # fmt: skip
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * (len(fragment) + 2))
    values = [Float32(v).ir_value(loc=loc, ip=ip) for v in sums]
    values += [Uint32(v).ir_value(loc=loc, ip=ip) for v in (*fragment, tokens, width)]
    result = llvm.inline_asm(
        llvm.StructType.get_literal([MlirType.f32()] * count), values, code, constraints, has_side_effects=True,
        is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return [Float32(llvm.extractvalue(MlirType.f32(), result, [i], loc=loc, ip=ip)) for i in range(count)]


@dsl_user_op
def arrive_if(barrier: Any, condition: Any, *, loc: Any = None, ip: Any = None) -> None:
    """One arrival at an mbarrier of this CTA where `condition` is not 0, without a branch: beside products that run, ptxas
    takes a branch for a reason to run them one by one (its note C7513)."""
    values = [Uint32(v).ir_value(loc=loc, ip=ip) for v in (barrier, condition)]
    llvm.inline_asm(
        None, values, "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p mbarrier.arrive.release.cta.shared::cta.b64 _, [$0]; }", "r,r",
        has_side_effects=True, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def raise_flag(address: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Store 1 to an int32 in global memory; who awaits it sees all that this thread knew."""
    values = [Int64(address).ir_value(loc=loc, ip=ip)]
    llvm.inline_asm(
        None, values, "st.release.gpu.global.u32 [$0], 1;", "l", has_side_effects=True, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def await_flag(address: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Load an int32 in global memory until it is not 0."""
    values = [Int64(address).ir_value(loc=loc, ip=ip)]
    code = "{ .reg .pred p; .reg .b32 v; again: ld.acquire.gpu.global.u32 v, [$0]; setp.eq.u32 p, v, 0; @p bra again; }"
    llvm.inline_asm(
        None, values, code, "l", has_side_effects=True, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def load_relaxed(address: Any, *, loc: Any = None, ip: Any = None) -> Any:
    """An int32 of global memory as it is now: past L1, and not what an earlier load of this thread found."""
    result = llvm.inline_asm(
        MlirType.i32(), [Int64(address).ir_value(loc=loc, ip=ip)], "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l",
        has_side_effects=True, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return cutlass.Int32(result)
