"""Registers that asynchronous operations in flight read or write, and instructions that touch them too early."""

from __future__ import annotations

from typing import Any

from glu4.emulator.flow import reads_and_writes
from glu4.emulator.hazards import Origin
from glu4.emulator.isa.registry import Context, Step
from glu4.emulator.split import Split

__all__ = ["watched"]


def watched(context: Context, step: Step, in_flight: set[int]) -> Step:
    """The step, reporting registers that an operation in flight still uses."""
    instruction = context.instruction
    if not in_flight or instruction.opcode == "wgmma":
        return step
    reads, writes = reads_and_writes(instruction)
    touched = (reads | writes) & in_flight
    if not touched:
        return step

    def run(w: Split) -> Any:
        pending = w.frame.pending
        if pending:
            for row in touched:
                if row in pending:
                    _, how = pending[row]
                    if how == "load":
                        _use_loaded(w, context, row, row in reads)
                    elif row in writes or how == "write":
                        name = context.function.function.registers[row].name
                        verb = "writes" if row in writes else "reads"
                        _report(w, context, f"{verb} {name}, which an operation in flight {_uses(how)}")
                        break
        return step(w)

    return run


def _use_loaded(w: Split, context: Context, row: int, read: bool) -> None:
    """Touch a register of a tcgen05.ld not waited for: a true dependency is respected, no other is (PTX ISA 9.7.16.6.4.5)."""
    group, _ = w.frame.pending.pop(row)
    if read:
        w.warp.cta.machine.complete(w.frame.loads[group])
    else:
        name = context.function.function.registers[row].name
        _report(w, context, f"writes {name}, which a tcgen05.ld not yet waited for will write")


def _uses(how: str) -> str:
    return "will write" if how == "write" else "has yet to read"


def _report(w: Split, context: Context, message: str) -> None:
    origin = Origin(context.instruction, w.warp, w.mask)
    w.warp.cta.machine.monitor.report("register in flight", message, origin)
