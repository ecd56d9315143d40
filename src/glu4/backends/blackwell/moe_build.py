"""Compile kernels for mixtures of experts: `python -m glu4.backends.blackwell.moe_build SPECS_JSON OUTPUT [--export]`.

See `glu4.compiled.building`.
"""

from __future__ import annotations

from typing import Any

from glu4.backends.blackwell.moe_spec import MoeSpec, TileSpec, spec_from_dict
from glu4.compiled.building import compiled, main, pointer


def _make(spec: MoeSpec | TileSpec, directory: str) -> tuple[Any, dict[str, Any]]:
    """One kernel as `building.compiled` gives it."""
    if isinstance(spec, MoeSpec):
        c = spec.config
        launched = {"threads": c.grouped.mma.threads, "cluster": [c.ctas, 1, 1], "shared_bytes": c.shared_bytes, "pdl": c.pdl}
        return compiled(spec, _arguments(spec), launched, directory)
    from glu4.backends.blackwell.moe_tile_tokens import SHARED_BYTES, THREADS

    launched = {"threads": THREADS, "cluster": [1, 1, 1], "shared_bytes": SHARED_BYTES, "pdl": True}
    return compiled(spec, _tile_arguments(spec), launched, directory)


def _arguments(spec: MoeSpec) -> tuple[Any, ...]:
    """What cute.compile takes: the kernel's host function and stand-ins for its arguments."""
    import cutlass
    from cutlass.cute.runtime import make_fake_stream

    from glu4.backends.blackwell.dual_gemm import E2M1, E4M3
    from glu4.backends.blackwell.moe_gemm import MoeGemm

    out = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}[spec.out]
    operands = [pointer(t, 16) for _ in range(3) for t in (E2M1, E4M3)]
    floats_of = [pointer(cutlass.Float32, 4) for _ in range(5)]  # global scales and biases
    if not spec.config.gated:  # nothing of up
        operands[4:] = floats_of[2::2] = None, None
    numbers = [cutlass.Int64(0), cutlass.Int32(0), *(cutlass.Float32(0.0) for _ in range(3))]
    numbers += [cutlass.Int32(0) for _ in range(6)]
    kernel, table = MoeGemm(spec.config, out), pointer(cutlass.Int32, 16)
    return kernel, *operands, table, *floats_of, pointer(out, 2), *numbers, make_fake_stream()


def _tile_arguments(spec: TileSpec) -> tuple[Any, ...]:
    """As `_arguments`."""
    import cutlass
    from cutlass.cute.runtime import make_fake_stream

    from glu4.backends.blackwell.moe_tile_tokens import TileTokens

    pointers = [
        pointer(t, align) for t, align in ((cutlass.Int32, 4), (cutlass.Uint8, 1), (cutlass.Int32, 16), (cutlass.Uint8, 16))
    ]
    numbers = [cutlass.Int64(0), *(cutlass.Int32(0) for _ in range(4))]
    index: list[Any] = [None] * 3
    if spec.gather:
        index = [pointer(cutlass.Int64, 8), *(pointer(cutlass.Uint8, 16) for _ in range(2))]
    index += [cutlass.Int32(0) for _ in range(2)]
    return TileTokens(spec.tile_n, spec.gather), *pointers, *numbers, *index, make_fake_stream()


if __name__ == "__main__":
    main(spec_from_dict, _make)
