"""Instruction families. INSTRUCTIONS: opcode to the builder of its steps."""

from glu4.emulator.isa import (
    alu,
    arithmetic,
    atomics,
    bits,
    cluster_launch,
    compare,
    control,
    convert,
    matrices,
    mbarrier,
    memory,
    mma_sync,
    tcgen05,
    tensormap,
    transfer,
    warpwide,
    wgmma,
)
from glu4.emulator.isa.registry import Builder

__all__ = ["INSTRUCTIONS"]

INSTRUCTIONS: dict[str, Builder] = {
    **alu.INSTRUCTIONS,
    **arithmetic.INSTRUCTIONS,
    **bits.INSTRUCTIONS,
    **compare.INSTRUCTIONS,
    **convert.INSTRUCTIONS,
    **control.INSTRUCTIONS,
    **warpwide.INSTRUCTIONS,
    **memory.INSTRUCTIONS,
    **atomics.INSTRUCTIONS,
    **transfer.INSTRUCTIONS,
    **matrices.INSTRUCTIONS,
    **mbarrier.INSTRUCTIONS,
    **mma_sync.INSTRUCTIONS,
    **wgmma.INSTRUCTIONS,
    **tcgen05.INSTRUCTIONS,
    **cluster_launch.INSTRUCTIONS,
    **tensormap.INSTRUCTIONS,
}
