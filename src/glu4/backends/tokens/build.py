"""Compile the kernels that quantise, sort and combine: `python -m glu4.backends.tokens.build SPECS_JSON OUTPUT [--export]`.

See `glu4.compiled.building`.
"""

from __future__ import annotations

from typing import Any

from glu4.backends.tokens.spec import CombineSpec, SortSpec, Spec, spec_from_dict
from glu4.compiled.building import compiled, main, pointer


def _make(spec: Spec, directory: str) -> tuple[Any, dict[str, Any]]:
    """One kernel as `building.compiled` gives it."""
    import cutlass
    from cutlass.cute.runtime import make_fake_stream

    from glu4.backends.tokens import combine_tokens, quantize_tokens, sort_tokens

    i32, i64 = cutlass.Int32, cutlass.Int64
    integers = 3
    if isinstance(spec, SortSpec):
        kernel: Any = sort_tokens.SortTokens(spec.ctas)
        types: tuple[Any, ...] = (i32, i64, i64, i32)
        launched = {"threads": sort_tokens.THREADS, "shared_bytes": spec.shared_bytes, "pdl": True}
    elif isinstance(spec, CombineSpec):
        dtype = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}[spec.dtype]
        kernel = combine_tokens.CombineTokens(dtype)
        types = (dtype, i64, cutlass.Float32, i32, dtype)
        launched = {"threads": combine_tokens.THREADS, "shared_bytes": 0, "pdl": True}
    else:
        kernel = quantize_tokens.QuantizeTokens(spec.dtype == "bf16", spec.arch != "sm_90a")
        types, integers = (cutlass.Uint16, cutlass.Float32, cutlass.Uint32, cutlass.Uint8), 7
        launched = {"threads": quantize_tokens.THREADS, "shared_bytes": 0, "pdl": True}
    pointers = [pointer(t, t.width // 8) for t in types]
    return compiled(spec, (kernel, *pointers, *(i32(0) for _ in range(integers)), make_fake_stream()), launched, directory)


if __name__ == "__main__":
    main(spec_from_dict, _make)
