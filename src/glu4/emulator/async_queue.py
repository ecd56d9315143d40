"""Asynchronous operations: issued by an instruction, done when the schedule says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from glu4.emulator.hazards import Origin

if TYPE_CHECKING:
    from glu4.emulator.split import Split

__all__ = ["AsyncQueue", "Operation", "Work"]


class Work(NamedTuple):
    """What an operation keeps busy, for a recording. ctas: whose engine, () for the issuer's; macs: in all of them."""

    engine: str
    bytes: int = 0
    macs: int = 0
    ctas: tuple[Any, ...] = ()
    product: str = ""
    text: str = ""


class Operation:
    """One operation in flight. run: does it, reading its operands only then; after: those that the ISA completes before it."""

    __slots__ = ("after", "columns", "done", "issued", "name", "origin", "record", "run", "waiters", "work")

    def __init__(self, name: str, origin: Origin, run: Callable[[], Any], after: Sequence[Operation] = (),
                 work: Work | None = None) -> None:  # fmt: skip
        self.name = name
        self.origin = origin
        self.run = run
        self.done = False
        self.after = tuple(o for o in after if not o.done)
        self.issued = 0
        self.columns: dict[int, int] = {}  # of tensor memory that it uses: rank of the CTA -> bits
        self.waiters: list[Split] = []
        self.work = work
        self.record: Any = None  # its Unit in a recording


class AsyncQueue:
    """What is in flight, in order of issue."""

    def __init__(self) -> None:
        self.pending: list[Operation] = []

    def add(self, operation: Operation, now: int) -> None:
        operation.issued = now
        self.pending.append(operation)

    def eligible(self) -> list[Operation]:
        """Those that may complete next."""
        return [o for o in self.pending if all(p.done for p in o.after)]

    def complete(self, operation: Operation) -> None:
        self.pending.remove(operation)
        operation.done = True
        operation.after = ()
        operation.run()
        waiters, operation.waiters = operation.waiters, []
        for split in waiters:
            split.wake()
