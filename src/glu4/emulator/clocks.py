"""Vector clocks: what a thread knows to have happened.

An entity is something whose accesses come in order: a warp through the generic proxy, its stream of tensor-core operations,
its groups of bulk copies, or the operations that complete on one mbarrier (their time is its phase). A clock holds, for each
entity of the cluster, the last time that is known to have happened; one row for each way of knowing it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ACQUIRED",
    "ALLOC",
    "ASYNC",
    "BEFORE",
    "BULK_READ",
    "BULK_WRITE",
    "COPY",
    "FENCED",
    "GENERIC",
    "INIT",
    "KNOWN",
    "LOAD",
    "PER_WARP",
    "PREVIOUS_GRID",
    "STORE",
    "STREAM",
    "TENSOR",
    "WGMMA",
    "Clock",
    "Message",
    "combine",
    "combine_foreign",
]  # fmt: skip

# rows
KNOWN = 0  # happened before, in base causality order
ASYNC = 1  # of these, what a proxy fence has made visible to the async proxy
TENSOR = 2  # of these, what tcgen05.fence::after_thread_sync has ordered before tcgen05 instructions
FENCED = 3  # KNOWN and ASYNC at the last release fence, for relaxed stores and arrivals
ACQUIRED = 5  # KNOWN and ASYNC that relaxed loads have seen, for the next acquire fence
BEFORE = 7  # completed tcgen05 operations that tcgen05.fence::before_thread_sync has yet to order
_ROWS = 8

PREVIOUS_GRID = 0  # the first entity of every cluster: the grid in front, at time 1 once griddepcontrol.wait has returned

# entities of a warp
GENERIC, INIT, STREAM, LOAD, STORE, WGMMA, COPY, BULK_READ, BULK_WRITE, ALLOC = range(10)
PER_WARP = 10

Message = NDArray[Any]  # [2, entities]: KNOWN and ASYNC as they travel from a release to an acquire


class Clock:
    """Rows by entities. Vectors may be shorter than the number of entities: the rest is zero."""

    __slots__ = ("_known", "foreign", "rows")

    def __init__(self, rows: NDArray[Any], foreign: dict[int, Message] | None = None) -> None:
        self.rows = rows
        self.foreign = foreign  # knowledge of other clusters
        self._known: NDArray[Any] | None = None

    @classmethod
    def new(cls, entities: int) -> Clock:
        return cls(np.zeros((_ROWS, entities), dtype=np.int32))

    def copy(self) -> Clock:
        copy = Clock(self.rows.copy(), dict(self.foreign) if self.foreign else None)
        copy._known = self._known
        return copy

    def known(self) -> NDArray[Any]:
        """KNOWN as it was when this clock last learned of others; its owner's own time may be older. Not to be changed."""
        if self._known is None:
            self._known = self.rows[KNOWN].copy()
        return self._known

    def fit(self, entities: int) -> NDArray[Any]:
        """The rows, at least that long."""
        missing = entities - self.rows.shape[1]
        if missing > 0:
            self.rows = np.pad(self.rows, ((0, 0), (0, missing + 32)))
        return self.rows

    def merge(self, other: Clock) -> None:
        """All that another part of the same warp knows."""
        mine = self.fit(other.rows.shape[1])
        part = mine[:, : other.rows.shape[1]]
        np.maximum(part, other.rows, out=part)
        self._known = None
        self.merge_foreign(other.foreign)

    def intersect(self, other: Clock) -> None:
        """Keep only what another part knows too."""
        size = min(self.rows.shape[1], other.rows.shape[1])
        self.rows = np.minimum(self.rows[:, :size], other.rows[:, :size])
        self._known = None

    def merge_foreign(self, foreign: dict[int, Message] | None) -> None:
        if not foreign:
            return
        self.foreign = self.foreign or {}
        for cluster, message in foreign.items():
            self.foreign[cluster] = combine(self.foreign.get(cluster), message)

    def receive(self, message: Message, row: int = KNOWN) -> None:
        """Take KNOWN and ASYNC of a release into the two rows from `row` on."""
        size = message.shape[1]
        part = self.fit(size)[row : row + 2, :size]
        np.maximum(part, message, out=part)
        self._known = None

    def acquire_fence(self) -> None:
        """What relaxed loads and waits have seen is known from here on."""
        rows = self.rows
        np.maximum(rows[KNOWN : KNOWN + 2], rows[ACQUIRED : ACQUIRED + 2], out=rows[KNOWN : KNOWN + 2])
        self._known = None

    def message(self, row: int = KNOWN) -> Message:
        return self.rows[row : row + 2].copy()

    def know(self, entity: int, time: int) -> None:
        """Something completed and is visible in both proxies."""
        rows = self.fit(entity + 1)
        self._known = None
        if rows[KNOWN, entity] < time:
            rows[KNOWN, entity] = time
        if rows[ASYNC, entity] < time:
            rows[ASYNC, entity] = time


def combine(a: Message | None, b: Message) -> Message:
    """The larger of two messages, as a new array."""
    if a is None:
        return b.copy()
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    out = a.copy()
    part = out[:, : b.shape[1]]
    np.maximum(part, b, out=part)
    return out


def combine_foreign(a: dict[int, Message] | None, b: dict[int, Message] | None) -> dict[int, Message] | None:
    """Knowledge of other clusters from two sides."""
    if not a or not b:
        return dict(b) if b else a
    return {cluster: combine(a.get(cluster), b[cluster]) if cluster in b else a[cluster] for cluster in a.keys() | b.keys()}
