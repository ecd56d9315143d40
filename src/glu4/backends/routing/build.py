"""Compile the kernels that sort and combine: `python -m glu4.backends.routing.build SPECS_JSON OUTPUT [--export]`.

See `glu4.compiled.building`.
"""

from __future__ import annotations

from typing import Any

from glu4.backends.routing.spec import CombineSpec, SortSpec, spec_from_dict
from glu4.compiled.building import compiled, main, pointer


def _make(spec: SortSpec | CombineSpec, directory: str) -> tuple[Any, dict[str, Any]]:
    """One kernel as `building.compiled` gives it."""
    import cutlass
    from cutlass.cute.runtime import make_fake_stream

    from glu4.backends.routing import combine_tokens, sort_tokens

    i32, i64 = cutlass.Int32, cutlass.Int64
    if isinstance(spec, SortSpec):
        kernel: Any = sort_tokens.SortTokens(spec.ctas)
        types: tuple[Any, ...] = (i32, i64, i64, i32)
        launched = {"threads": sort_tokens.THREADS, "shared_bytes": spec.shared_bytes, "pdl": True}
    else:
        dtype = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}[spec.dtype]
        kernel = combine_tokens.CombineTokens(dtype)
        types = (dtype, i64, cutlass.Float32, i32, dtype)
        launched = {"threads": combine_tokens.THREADS, "shared_bytes": 0, "pdl": True}
    pointers = [pointer(t, t.width // 8) for t in types]
    return compiled(spec, (kernel, *pointers, *(i32(0) for _ in range(3)), make_fake_stream()), launched, directory)


if __name__ == "__main__":
    main(spec_from_dict, _make)
