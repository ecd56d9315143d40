"""Addresses of tensor maps among kernel parameters. Device code; needs nvidia-cutlass-dsl."""

from typing import Any

import cutlass
from cutlass._mlir.dialects import cute as cute_ir
from cutlass._mlir.dialects import cute_nvgpu as nvgpu_ir
from cutlass.cutlass_dsl import dsl_user_op

_ALIGNMENT = 64  # of a tensor map (CUDA driver API, CUtensorMap)


def _pointer_type() -> Any:
    space = cute_ir.AddressSpace.generic
    return cute_ir.PtrType.get(nvgpu_ir.TmaDescriptorTiledType.get(), space, _ALIGNMENT)


@dsl_user_op
def tensor_map_address(atom: Any, *, loc: Any = None, ip: Any = None) -> Any:
    """The generic address of a tensor copy's map, as a number, of which a group's can be selected."""
    made = nvgpu_ir.atom_make_exec_tma(atom._trait.value, loc=loc, ip=ip)
    return nvgpu_ir.get_tma_desc_addr(_pointer_type(), made, loc=loc, ip=ip).toint(loc=loc, ip=ip)


@dsl_user_op
def tensor_map_pointer(address: Any, *, loc: Any = None, ip: Any = None) -> Any:
    """The pointer that cute.copy takes as `tma_desc_ptr`."""
    number = cutlass.Int64(address).ir_value(loc=loc, ip=ip)
    aligned = cute_ir.assume(cute_ir.ConstrainedIntType.get(_ALIGNMENT, 64), number, loc=loc, ip=ip)
    return cute_ir.inttoptr(_pointer_type(), aligned, loc=loc, ip=ip)


__all__ = ["tensor_map_address", "tensor_map_pointer"]
