"""What becomes of a claim, which verdict counts, what a run teaches, and the distance to the floor over time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glu4.tank.claims import Claim, Run, claims, histories, learned, short, status
from glu4.tank.ledger import BASES, OUTCOMES, EntryRecord, Environment, RoundRecord, ShapeResult, Verdict


def claim(
    outcome: str = "faster", basis: str = "measured", speedup: float | None = 1.2, claimed: float | None = 1.1, *, run: str = "r",
    entry: str = "e", at: float = 1.0, device: str = "NVIDIA H100 80GB HBM3", shapes: tuple[tuple[str, float], ...] = (),
) -> Claim:  # fmt: skip
    """A claim; `shapes` are (name, speedup) of shapes that take their baseline 20 us, with a floor of 10 us."""
    low, high = (None, None) if speedup is None else (speedup - 0.05, speedup + 0.05)
    found = Verdict(run, entry, outcome, basis, "why", speedup, low, high, at)
    record = RoundRecord(run, "round", "", "h100", "", "", 0, at, None, Environment(device, {}))
    sizes = [
        ShapeResult(run, entry, name, "faster" if s > 1 else "slower", s, s, s, 20.0, 20.0 / s, 10.0) for name, s in shapes
    ]
    return Claim(record, EntryRecord(run, entry, 0, "", claimed, ""), found, sizes, 0)


@pytest.mark.parametrize(
    ("outcome", "basis", "speedup", "claimed", "expected"),
    [
        ("faster", "measured", 1.2, 1.1, "held"),
        ("faster", "measured", 1.2, 1.24, "held"),  # the interval, 1.15 to 1.25, reaches the claim
        ("faster", "measured", 1.2, 1.26, "refuted on H100"),
        ("faster", "measured", 1.2, None, "held"),
        ("slower", "measured", 0.8, None, "refuted on H100"),
        ("slower", "measured", 0.97, 1.0, "refuted on H100"),
        ("slower", "measured", 0.8, 0.8, "held"),  # claimed to be slower
        ("no difference", "measured", 1.0, 1.5, "refuted on H100"),
        ("no difference", "measured", 1.0, 1.02, "undecided on H100"),
        ("no difference", "measured", 1.0, None, "undecided on H100"),
        ("faster", "predicted", 1.2, 1.1, "predicted only"),
        ("slower", "predicted", 0.8, 1.1, "predicted only"),
        ("correct", "emulated", None, 1.1, "emulated only"),
        ("correct", "measured", None, 1.1, "correct, not timed"),
        ("wrong result", "emulated", None, 1.1, "wrong result"),
        ("wrong result", "measured", None, 1.1, "wrong result"),
        ("does not compile", "none", None, 1.1, "does not compile"),
        ("not run", "none", None, 1.1, "not run"),
    ],
)
def test_status(outcome, basis, speedup, claimed, expected):
    assert claim(outcome, basis, speedup, claimed).status == expected


def test_every_outcome_has_a_status_and_no_verdict_too():
    for outcome in OUTCOMES:
        for basis in BASES:
            assert status(1.5, Verdict("r", "e", outcome, basis, "", None, None, None, 0.0), "H100")
    assert status(1.5, None, "H100") == "not judged yet"


def test_a_device_is_named_as_people_name_it():
    assert [short(d) for d in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "AMD EPYC")] == ["H100", "H200", "AMD EPYC"]


def test_a_measured_verdict_counts_before_a_newer_prediction_and_a_newer_wrong_result_before_both():
    measured, predicted = claim(at=1.0), claim("faster", "predicted", at=2.0)
    runs = [Run(c.round, [c]) for c in (measured, predicted)]
    (now,) = claims(runs)
    assert (now.status, now.judged) == ("held", 2)
    wrong = claim("wrong result", "none", None, at=3.0)
    (now,) = claims([*runs, Run(wrong.round, [wrong])])
    assert now.status == "wrong result"
    mended = claim("faster", at=4.0)
    (now,) = claims([Run(mended.round, [mended]), *runs, Run(wrong.round, [wrong])])
    assert now.status == "held"


def test_an_unfinished_run_does_not_hide_the_verdict_of_an_older_one():
    old, new = claim(at=1.0), replace(claim(at=9.0), verdict=None)
    not_run = claim("not run", "none", None, at=10.0)
    (now,) = claims([Run(c.round, [c]) for c in (old, new, not_run)])
    assert (now.status, now.judged) == ("held", 2)


def test_learned_says_what_the_verdicts_say():
    run = [
        claim(entry="a", speedup=1.2, claimed=2.4, shapes=(("x", 1.5), ("y", 0.9))),
        claim("slower", entry="b", speedup=0.8, claimed=1.6, shapes=(("x", 0.8),)),
        replace(claim(entry="c"), verdict=None),
    ]
    assert learned(run) == [
        "Of 2 judged entries: 2 refuted on H100.",
        "Fastest: a, 1.20x the baseline's speed (1.15 to 1.25).",
        "What was claimed is 2.00x what was measured, in the geometric mean.",
        "a depends on the shape: faster at x, slower at y.",
        "1 of 3 entries have no verdict yet: the run was interrupted or goes on.",
    ]
    assert learned([claim("slower", speedup=0.9, claimed=None)])[1:] == ["No entry was faster than the baseline."]
    assert learned([]) == []


def test_the_best_so_far_only_falls_and_never_to_a_slower_entry():
    two = (("x", 1.25), ("y", 1.25))
    steps = [
        claim(entry="a", at=1.0, shapes=two),
        claim("slower", entry="b", at=2.0, speedup=0.5, shapes=(("x", 0.5), ("y", 0.5))),
        claim("no difference", entry="c", at=3.0, shapes=(("x", 1.6), ("y", 1.6))),
        claim(entry="d", at=4.0, shapes=(("y", 1.6), ("x", 1.6))),
    ]
    (history,) = histories([Run(steps[0].round, steps[::-1])])
    assert [round(m.entry, 3) for m in history.moments] == [1.6, 4.0, 1.25, 1.25]
    assert [m.baseline for m in history.moments] == pytest.approx([2.0] * 4)
    assert [m.best for m in history.moments] == pytest.approx([1.6, 1.6, 1.6, 1.25])


def test_what_cannot_be_compared_is_never_in_one_history():
    different = [
        claim(shapes=(("x", 1.1),)),
        claim(shapes=(("x", 1.1), ("y", 1.1)), entry="b"),
        claim(shapes=(("x", 1.1),), device="NVIDIA H200", entry="c"),
        claim(shapes=(("x", 1.1),), basis="predicted", entry="d"),
    ]
    found = histories([Run(different[0].round, different)])
    assert [h.name for h in found] == ["H100, x", "H100, 2 shapes (x, …)", "H200, x", "H100, x, predicted"]


def test_a_verdict_without_a_floor_at_every_shape_is_left_out():
    whole = claim(shapes=(("x", 1.1), ("y", 1.1)))
    assert (
        histories([Run(whole.round, [replace(whole, shapes=[whole.shapes[0], replace(whole.shapes[1], floor_us=None)])])]) == []
    )
    assert histories([Run(whole.round, [replace(whole, shapes=[])])]) == []
