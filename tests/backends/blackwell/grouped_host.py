"""CuTe DSL's own host function of the grouped kernel, exported: `python -m backends.blackwell.grouped_host SPEC_JSON FOLDER`.

CuTe DSL exports no function with tuples among its arguments, so this one takes the arguments of two groups one by one.
"""

import json
import sys
from pathlib import Path

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import cute
from cutlass.cute.runtime import make_fake_stream, make_ptr

from glu4.backends.blackwell.dual_gemm import E2M1, E4M3
from glu4.backends.blackwell.grouped_gemm import GroupGemm
from glu4.backends.blackwell.grouped_spec import GroupSpec

Int32, Int64, Float32, Pointer = cutlass.Int32, cutlass.Int64, cutlass.Float32, cute.Pointer


class TwoGroups:
    """Of a GroupGemm for two groups."""

    def __init__(self, kernel: GroupGemm) -> None:
        self.kernel = kernel

    @cute.jit
    def __call__(
        self, b0: Pointer, scale_b0: Pointer, a0: Pointer, scale_a0: Pointer, c0: Pointer, b1: Pointer, scale_b1: Pointer,
        a1: Pointer, scale_a1: Pointer, c1: Pointer, global_a: Pointer, global_b: Pointer, up0: Pointer, scale_up0: Pointer,
        up1: Pointer, scale_up1: Pointer, global_up: Pointer, stride0: Int64, stride1: Int64, m0: Int32, n0: Int32, k0: Int32,
        m1: Int32, n1: Int32, k1: Int32, flags: Int32, alpha: Float32, beta: Float32, limit: Float32, processors: Int32,
        stream: CUstream,
    ):  # fmt: skip
        first, second, scales, activation = (b0, scale_b0, a0, scale_a0), (b1, scale_b1, a1, scale_a1), (global_a, global_b), ()
        if cutlass.const_expr(self.kernel.grouped.gated):
            first, second = (*first, up0, scale_up0), (*second, up1, scale_up1)
            scales, activation = (*scales, global_up), (flags, alpha, beta, limit)
        self.kernel(
            (first, second), (c0, c1), (stride0, stride1), ((m0, n0, k0), (m1, n1, k1)), scales, activation, processors, stream
        )


def main() -> None:
    spec = GroupSpec.from_dict(json.loads(sys.argv[1]))
    directory = Path(sys.argv[2])

    def pointer(element, align):
        return make_ptr(element, 0, cute.AddressSpace.gmem, assumed_align=align)

    out = {"f16": cutlass.Float16, "bf16": cutlass.BFloat16}[spec.out]
    group = [(E2M1, 16), (E4M3, 16), (E2M1, 16), (E4M3, 16), (out, 2)]
    two = [(Float32, 4), (Float32, 4)]
    pointers = [pointer(*given) for given in (*group, *group, *two, *group[:2], *group[:2], two[0])]
    numbers = [Int64(0), Int64(0), *(Int32(0) for _ in range(7)), *(Float32(0.0) for _ in range(3)), Int32(0)]
    made = cute.compile(
        TwoGroups(GroupGemm(spec.config, out)), *pointers, *numbers, make_fake_stream(),
        options=f"--gpu-arch {spec.arch} --keep-ptx --keep-cubin --dump-dir={directory}",
    )  # fmt: skip
    made.export_to_c(file_path=str(directory), file_name=spec.name, function_prefix=spec.name)
    (directory / f"{spec.name}.ptx").write_text(made.artifacts.PTX)


if __name__ == "__main__":
    main()
