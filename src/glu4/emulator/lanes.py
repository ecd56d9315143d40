"""Sets of lanes of a warp, as bool arrays [32] that nobody changes in place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["FULL", "FULL_KEY", "LANES", "NONE", "Mask", "bits_of", "mask_of", "one_lane", "some"]

LANES = 32
Mask = NDArray[np.bool_]
FULL: Mask = np.ones(LANES, dtype=np.bool_)
FULL.flags.writeable = False
FULL_KEY = FULL.tobytes()
NONE = bytes(LANES)


def some(mask: NDArray[np.bool_]) -> bool:
    """mask.any(), in a tenth of the time where there are few lanes."""
    return b"\1" in mask.tobytes()


def bits_of(mask: Mask) -> int:
    """Bit i is lane i."""
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


def mask_of(bits: int) -> Mask:
    return np.unpackbits(np.frombuffer((bits & 0xFFFFFFFF).to_bytes(4, "little"), np.uint8), bitorder="little").astype(np.bool_)


def one_lane(lane: int) -> Mask:
    return mask_of(1 << lane)
