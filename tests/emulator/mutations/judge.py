"""Run a fault and say what detected it."""

from __future__ import annotations

import copy

from emulator.mutations.faults import NUMBERS, Fault
from emulator.mutations.kernels import Kernel, kernel
from glu4.emulator.launch import Result

__all__ = ["detected", "mutant", "named"]

# a mutant that polls for ever ends with a report; the good kernels run fewer than a tenth of these instructions
_LIMIT = 300_000


def mutant(fault: Fault) -> Kernel:
    """The kernel with the fault planted. Raises EditError where the fault does not fit the kernel."""
    good = kernel(fault.kernel)
    launch = copy.deepcopy(good.launch)
    if fault.launch is not None:
        fault.launch(launch)
    text = good.text if fault.edit is None else fault.edit(good.text)
    return Kernel(good.name, text, launch, good.buffers, good.right)


def detected(broken: Kernel, result: Result) -> set[str]:
    """Classes of the hazards found, and NUMBERS if the result is wrong."""
    found = {h.kind for h in result.report.hazards}
    return found if broken.right(result.buffers) else found | {NUMBERS}


def named(fault: Fault, schedule: str, seed: int, broken: Kernel | None = None) -> list[str]:
    """Which of the classes that name the fault one run finds."""
    broken = broken or mutant(fault)
    result = broken.run(schedule_name=schedule, seed=seed, max_instructions=_LIMIT)
    return sorted(detected(broken, result) & set(fault.names))
