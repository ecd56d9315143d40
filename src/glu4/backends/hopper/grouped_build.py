"""The arguments with which CuTe DSL compiles the grouped kernel, sizes open."""

from __future__ import annotations

from typing import Any

from glu4.backends.hopper.grouped_config import GroupedConfig

__all__ = ["arguments"]


def arguments(config: GroupedConfig, x: str, out: str, dual: bool = True) -> tuple[Any, ...]:
    """What cute.compile takes: the kernel's host function and stand-ins for its arguments. x, out: "f16" or "bf16"; dual: gate
    and up, or one matrix."""
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

    from glu4.backends.hopper.grouped_gemm import GroupedGemm
    from glu4.backends.hopper.pack import UNIT_WORDS

    types = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}
    m, n, k, experts = cute.sym_int(), cute.sym_int(), cute.sym_int(divisibility=16), cute.sym_int()
    words = [cute.sym_int64(divisibility=UNIT_WORDS) for _ in range(2)]
    tokens = make_fake_tensor(types[x], (m, k), (cute.sym_int64(divisibility=8), 1), assumed_align=16)
    units = (experts, cute.sym_int(), cute.sym_int(), UNIT_WORDS)
    weights = make_fake_tensor(cutlass.Uint32, units, (*words, UNIT_WORDS, 1), assumed_align=16)
    offsets = make_fake_tensor(cutlass.Int32, (cute.sym_int(),), (1,), assumed_align=4)
    scales = [make_fake_tensor(cutlass.Float32, (size,), (1,), assumed_align=4) for size in (experts, experts, 1)]
    biases = [make_fake_tensor(cutlass.Float32, (experts, n), (cute.sym_int64(), 1), assumed_align=4) for _ in range(2)]
    partials = make_fake_tensor(cutlass.Float32, (cute.sym_int(),), (1,), assumed_align=16)
    ready = make_fake_tensor(cutlass.Int32, (cute.sym_int(),), (1,), assumed_align=4)
    constants = [cutlass.Float32(0.0) for _ in range(3)]
    order = (
        make_fake_tensor(cutlass.Int64, (m, cute.sym_int()), (cute.sym_int64(), 1), assumed_align=8) if config.gather else None
    )
    rows = cute.sym_int() if config.gather else m
    result = make_fake_tensor(types[out], (rows, n), (cute.sym_int64(), 1), assumed_align=2)
    kernel = GroupedGemm(config, types[x], types[out], dual)
    return (
        kernel, tokens, weights, offsets, *scales, *biases, cutlass.Int32(0), *constants, result, partials,
        ready, cutlass.Int32(1), order, make_fake_stream(),
    )  # fmt: skip
