"""From addresses to bytes: the common part of everything that touches memory through the generic proxy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glu4.emulator.hazards import Origin
from glu4.emulator.isa.registry import Context, Place, S, U
from glu4.emulator.memory import CONST_BASE, LOCAL_BASE, PARAM_BASE, SHARED_BASE, WINDOW, Block

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["POISON", "SPACES", "Fault", "Spot", "addresses", "fault", "find", "locate", "shared_offset", "touch"]

SPACES = ("generic", "global", "const", "local", "param", "shared", "shared::cta", "shared::cluster")
POISON = 0xD7  # what a faulty load returns, in every byte
_TOP = {"shared": SHARED_BASE, "local": LOCAL_BASE, "param": PARAM_BASE, "const": CONST_BASE}

Lanes = NDArray[Any]
Spot = tuple[Block, Lanes]
Locate = Callable[["Split", Lanes], Spot]


class Fault(Exception):
    """An address of some lane is not one that the instruction may use. kind, message: of the hazard."""

    def __init__(self, kind: str, message: str, address: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.address = address


def addresses(place: Place) -> Callable[[Split], Lanes]:
    """A function that gives the addresses of the active lanes, int64."""
    row, offset, wide = place

    def compute(w: Split) -> Lanes:
        values = w.r[S][row] if wide else w.r[U][row].astype(np.int64)
        if not w.full:
            values = values[w.mask]
        return values + offset

    return compute


def find(w: Split, space: str, address: int) -> tuple[Block, int]:
    """(block, offset) of one address in a space, without limits checked; raises Fault if nothing is there.

    Local memory is not found here: its place depends on the lane.
    """
    cta = w.warp.cta
    if space == "generic":
        space, address = window(address)
    if space.startswith("shared"):
        rank = address >> 24
        if rank == cta.rank:
            return cta.shared, address - cta.shared.base
        if space == "shared::cluster" and 0 <= rank < len(cta.cluster.ctas):
            other = cta.cluster.ctas[rank]
            if other.alive == 0:
                raise Fault("cluster lifetime", "access to shared memory of a CTA that has exited", address)
            return other.shared, address - other.shared.base
        raise Fault("out of bounds", f"shared address {address:#x} is in no CTA that .{space} reaches", address)
    if space == "param":
        block = cta.machine.params
        return block, address
    found = cta.machine.memory.find(address)
    if found is None or found.space != space:
        raise Fault("out of bounds", f"no {space} memory at {address:#x}", address)
    return found, address - found.base


def window(address: int) -> tuple[str, int]:
    """State space and address in it of a generic address."""
    for space, base in _TOP.items():
        if base <= address < base + WINDOW:
            return ("shared::cluster" if space == "shared" else space), address if space == "const" else address - base
    return "global", address


def locate(space: str, unit: int) -> Locate:
    """A function from addresses of active lanes to (block, index in units of `unit` bytes).

    It raises Fault, or leaves an index out of range, if any lane's address is bad; `fault` then sorts the lanes.
    """
    shift = unit.bit_length() - 1
    low = unit - 1

    def finish(block: Block, offsets: Lanes, first: int) -> Spot:
        together = int(np.bitwise_or.reduce(offsets))
        if together & low:
            raise Fault("misaligned address", f"address is not a multiple of {unit}", first)
        if together < 0:
            raise Fault("out of bounds", f"outside {block.name}", first)
        return block, offsets >> shift

    def shared(w: Split, where: Lanes) -> Spot:
        block = w.warp.cta.shared
        return finish(block, where - block.base, int(where[0]))

    def local(w: Split, where: Lanes) -> Spot:
        block = w.warp.local
        size = block.thread_bytes
        if (where < 0).any() or (where > size - unit).any():
            raise Fault("out of bounds", f"outside the {size} bytes of local memory", int(where[0]))
        return finish(block, where + np.flatnonzero(w.mask) * size, int(where[0]))

    def general(w: Split, where: Lanes) -> Spot:
        first = int(where[0])
        block, offset = find(w, space, first)
        return finish(block, where - (first - offset), first)

    def generic(w: Split, where: Lanes) -> Spot:
        kind, _ = window(int(where[0]))
        if kind == "local":
            return local(w, where - LOCAL_BASE)
        return general(w, where)

    if space in ("shared", "shared::cta"):
        return shared
    if space == "local":
        return local
    return generic if space == "generic" else general


def touch(
    w: Split, context: Context, spot: Spot, unit: int, write: bool, strong: bool, same: Callable[[], bool] | None = None
) -> None:
    """Tell the monitor of an access, before it is made. Raises IndexError for an index out of range."""
    block, index = spot
    if block.writes.size:
        w.warp.cta.machine.monitor.generic(w, context.instruction, block, index, unit, write, strong, w.mask, same)


def fault(w: Split, context: Context, space: str, where: Lanes, unit: int) -> list[tuple[int, Spot]]:
    """After a failed access: report each bad lane; returns (position among active lanes, spot) of the good ones."""
    good: list[tuple[int, Spot]] = []
    monitor = w.warp.cta.machine.monitor
    lanes = np.flatnonzero(w.mask)
    one = locate(space, unit)
    for position, lane in enumerate(lanes.tolist()):
        try:
            if space == "local" or (space == "generic" and window(int(where[position]))[0] == "local"):
                offset = int(where[position]) - (LOCAL_BASE if space == "generic" else 0)
                size = w.warp.local.thread_bytes
                if not 0 <= offset <= size - unit or offset % unit:
                    raise Fault("out of bounds", f"outside the {size} bytes of local memory", offset)
                spot: Spot = (w.warp.local, np.array([(lane * size + offset) // unit]))
            else:
                spot = one(w, where[position : position + 1])
            if int(spot[1][0]) >= spot[0].size // unit:
                raise Fault(
                    "out of bounds", f"{unit} bytes past the end of {spot[0].name} ({spot[0].size} bytes)", int(where[position])
                )
            good.append((position, spot))
        except Fault as problem:
            origin = Origin(context.instruction, w.warp, w.mask)
            monitor.report(problem.kind, problem.message, origin, f"{problem.address:#x}", w.warp.first_thread + lane)
    return good


def shared_offset(w: Split, address: int) -> tuple[Any, int]:
    """(CTA, offset in its shared block) of a shared::cluster address; raises Fault."""
    cta = w.warp.cta
    rank = address >> 24
    if not 0 <= rank < len(cta.cluster.ctas):
        raise Fault("out of bounds", f"shared address {address:#x} is in no CTA of the cluster", address)
    owner = cta.cluster.ctas[rank]
    offset = address - owner.shared.base
    if not 0 <= offset < owner.shared.size:
        raise Fault("out of bounds", f"shared address {address:#x} is outside the {owner.shared.size} bytes there are", address)
    return owner, offset
