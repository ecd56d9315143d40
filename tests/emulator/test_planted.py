"""Faults that tests plant in the sources of the Hopper kernels: each still has its one place there, and leaves Python.

Most are compiled by longer proofs alone, which would tell of a text that has moved only there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from emulator import (
    test_hopper_gather,
    test_hopper_grouped,
    test_hopper_grouped_linear,
    test_hopper_kernels,
    test_hopper_switches,
)
from glu4.backends import hopper

SOURCES = Path(hopper.__file__).parent
GROUPED = ("grouped_schedule", "grouped_gemm")


def edits() -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    """(fault, modules one of which has the text, the text, what stands there instead)."""
    for module in (test_hopper_grouped, test_hopper_grouped_linear, test_hopper_gather):
        for name, fault in module.FAULTS.items():
            yield name, GROUPED, fault[0], fault[1]
    for name, fault in (test_hopper_grouped.FIT_FAULTS | test_hopper_grouped.LATE_FAULTS).items():
        yield name, GROUPED, fault[0], fault[1]
    for name, (old, new, _) in test_hopper_gather.GATHERER_FAULTS.items():
        yield name, ("decode_tokens",), old, new
    for name, ((old, new), _) in (test_hopper_switches.BULK_FAULTS | test_hopper_switches.ALONE_FAULTS).items():
        yield name, ("dual_gemm",), old, new
    dense = [(name, edit) for name, (edit, _) in test_hopper_kernels.W4A4_FAULTS.items()]
    dense += [(name, edit) for name, several in test_hopper_kernels.DECODER_FAULTS.items() for edit in several]
    dense += [(name, edit) for name, (several, _) in test_hopper_kernels.DECODER_ALARMS.items() for edit in several]
    for name, (module, old, new) in dense:
        yield name, (module,), old, new


def place(modules: tuple[str, ...], old: str, new: str) -> str:
    """The source with the fault. Raises AssertionError where the text is not there once, SyntaxError where no Python is left."""
    sources = [(SOURCES / f"{module}.py").read_text() for module in modules]
    assert sum(source.count(old) for source in sources) == 1, f"{modules}: {[s.count(old) for s in sources]} of {old!r}"
    (source,) = (source for source in sources if old in source)
    changed = source.replace(old, new)
    ast.parse(changed)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), f"{old!r} and {new!r} are the same program"
    return changed


@pytest.mark.parametrize(
    ("modules", "old", "new"), [pytest.param(*edit, id=f"{i} {name}") for i, (name, *edit) in enumerate(edits())]
)
def test_a_planted_fault_has_its_place(modules: tuple[str, ...], old: str, new: str) -> None:
    assert new in place(modules, old, new)


def test_a_text_that_has_moved_is_found() -> None:
    with pytest.raises(AssertionError, match="0, 0"):
        place(GROUPED, "no such text", "")
    with pytest.raises(AssertionError, match="of 'self'"):
        place(GROUPED, "self", "")


def test_half_a_line_is_found() -> None:
    with pytest.raises(IndentationError):
        place(GROUPED, "                warpgroup.wait_group(1)\n", "")
