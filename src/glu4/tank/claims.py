"""What a ledger says of each claim now, of each run, and of the distance to the floor over time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from glu4.bench.devices import DEVICES
from glu4.pages.numbers import interval, ratio
from glu4.tank.ledger import EntryRecord, Ledger, RoundRecord, ShapeResult, Verdict

__all__ = ["Claim", "History", "Moment", "Run", "claims", "histories", "learned", "mean", "read", "status"]

_TIMED = ("faster", "slower", "no difference")
# found before the clock is asked, wherever it was found; "not run" says nothing of an entry
_OUT = ("wrong result", "does not compile", "crashed", "hung", "out of memory", "changed global state")


@dataclass(frozen=True)
class Claim:
    """An entry of a run with its verdict, if it has one; `samples`: how many pairs were timed; `status`: of this verdict."""

    round: RoundRecord
    entry: EntryRecord
    verdict: Verdict | None
    shapes: list[ShapeResult]
    samples: int
    judged: int = 1

    @property
    def status(self) -> str:
        return status(self.entry.claimed_speedup, self.verdict, short(self.round.environment.device))

    @property
    def kind(self) -> str:
        """The style of its status: good, bad or none."""
        word = self.status
        return "good" if word == "held" else "bad" if word.startswith("refuted") or word in _OUT else ""

    @property
    def outcome_kind(self) -> str:
        """The style of its outcome, which may be good though the claim was not reached."""
        word = self.verdict.outcome if self.verdict else ""
        return "good" if word == "faster" else "bad" if word == "slower" or word in _OUT else ""


@dataclass(frozen=True)
class Run:
    """One run of a round with all its entries, in the order of the file."""

    record: RoundRecord
    claims: list[Claim]

    @property
    def learned(self) -> list[str]:
        return learned(self.claims)


def read(ledger: Ledger) -> list[Run]:
    """All runs, oldest first."""
    found = []
    for record in ledger.rounds():
        verdicts = {v.entry: v for v in ledger.verdicts(record.run)}
        shapes, samples = ledger.shapes(record.run), Counter(s.entry for s in ledger.samples(record.run))
        of_run = [
            Claim(record, e, verdicts.get(e.entry), [s for s in shapes if s.entry == e.entry], samples[e.entry])
            for e in ledger.entries(record.run)
        ]
        found.append(Run(record, of_run))
    return found


def short(device: str) -> str:
    """A device as people call it: H100 for NVIDIA H100 80GB HBM3; else as it is."""
    words = device.lower().split()
    return next((d.name.upper() for d in DEVICES if d.name in words), device)


def status(claimed: float | None, verdict: Verdict | None, device: str) -> str:
    """What a verdict makes of a claim.

    A measured claim held when the entry is faster and its interval reaches the claimed speedup or lies above it, and is refuted
    when the whole interval lies below it or the entry is slower; what the interval leaves open is undecided. A claim without a
    number says "faster". Whatever was not measured is predicted or emulated only, and a wrong entry is that, wherever it ran.
    """
    if verdict is None:
        return "not judged yet"
    if verdict.outcome in _OUT or verdict.outcome == "not run":
        return verdict.outcome
    if verdict.basis != "measured":
        return "emulated only" if verdict.basis == "emulated" else "predicted only"
    if verdict.outcome not in _TIMED:
        return "correct, not timed"
    high = math.inf if verdict.high is None else verdict.high
    if verdict.outcome == "slower" and (claimed is None or claimed >= 1):
        return f"refuted on {device}"
    if claimed is not None and high < claimed:
        return f"refuted on {device}"
    if verdict.outcome == "faster" or (claimed is not None and claimed < 1):
        return "held"
    return f"undecided on {device}"


def claims(runs: Sequence[Run]) -> list[Claim]:
    """Each claim of each round once, with the verdict that counts now: the newest that was measured or put the entry out; else
    the newest that was predicted or emulated; else the newest."""
    found: dict[tuple[str, str], list[Claim]] = {}
    for run in runs:
        for claim in run.claims:
            found.setdefault((run.record.name, claim.entry.entry), []).append(claim)
    return [_counting(group) for group in found.values()]


def _counting(group: Sequence[Claim]) -> Claim:
    def weight(claim: Claim) -> tuple[int, float]:
        verdict = claim.verdict
        if verdict is None:
            return 0, claim.round.started
        if verdict.basis == "measured" or verdict.outcome in _OUT:
            return 3, verdict.finished
        return (1 if verdict.outcome == "not run" else 2), verdict.finished

    best = max(group, key=weight)
    judged = sum(c.verdict is not None for c in group)
    return Claim(best.round, best.entry, best.verdict, best.shapes, best.samples, judged)


def learned(found: Sequence[Claim]) -> list[str]:
    """What one run teaches, a sentence each, from its verdicts alone."""
    judged = [c for c in found if c.verdict is not None]
    said = []
    if judged:
        counts = Counter(c.status for c in judged)
        words = ", ".join(f"{n} {word}" for word, n in counts.most_common())
        said.append(f"Of {len(judged)} judged {'entry' if len(judged) == 1 else 'entries'}: {words}.")
    timed = [c for c in judged if c.verdict is not None and c.verdict.outcome in _TIMED and c.verdict.speedup]
    said += _fastest(timed)
    compared = [(c.entry.claimed_speedup, c.verdict.speedup) for c in timed if c.verdict and c.verdict.basis == "measured"]
    gaps = [claimed / speedup for claimed, speedup in compared if claimed and claimed > 0 and speedup]
    if gaps:
        said.append(f"What was claimed is {ratio(mean(gaps))} what was measured, in the geometric mean.")
    said += [sentence for c in timed if (sentence := _mixed(c))]
    if len(judged) < len(found):
        said.append(
            f"{len(found) - len(judged)} of {len(found)} entries have no verdict yet: the run was interrupted or goes on."
        )
    return said


def _fastest(timed: Sequence[Claim]) -> list[str]:
    """The fastest entry, by its mean; or that none was faster than the baseline."""
    if not timed:
        return []
    faster = [c.verdict for c in timed if c.verdict and c.verdict.outcome == "faster"]
    if not faster:
        return ["No entry was faster than the baseline."]
    best = max(faster, key=lambda v: v.speedup or 0.0)
    spread = interval(best.low, best.high)
    basis = "" if best.basis == "measured" else f", {best.basis}"
    return [f"Fastest: {best.entry}, {ratio(best.speedup)} the baseline's speed{f' ({spread})' if spread else ''}{basis}."]


def _mixed(claim: Claim) -> str:
    """That an entry helps at some shapes and costs at others: no rule for all of them; empty where it does not."""
    faster = [s.shape for s in claim.shapes if s.outcome == "faster"]
    slower = [s.shape for s in claim.shapes if s.outcome == "slower"]
    if not (faster and slower):
        return ""
    return f"{claim.entry.entry} depends on the shape: faster at {'; '.join(faster)}, slower at {'; '.join(slower)}."


def mean(values: Iterable[float]) -> float:
    """The geometric mean of positive values, which ratios have."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


@dataclass(frozen=True)
class Moment:
    """A timed verdict: times over the floor, geometric means over its shapes; `best`: the least so far, of a baseline or of an
    entry that was faster than one."""

    position: int
    finished: float
    name: str
    baseline: float
    entry: float
    best: float


@dataclass(frozen=True)
class History:
    """Timed verdicts of one device, one set of shapes and one basis, in the order of time: what can be compared."""

    name: str
    moments: list[Moment]


def histories(runs: Sequence[Run]) -> list[History]:
    """The distance to the floor over time; verdicts without a floor at every shape are left out."""
    timed = sorted(
        (c for run in runs for c in run.claims if c.verdict is not None and _has_floors(c)),
        key=lambda c: (c.verdict.finished if c.verdict else 0.0, c.entry.position),
    )
    groups: dict[tuple[str, str, frozenset[str]], list[Moment]] = {}
    for position, claim in enumerate(timed):
        verdict = claim.verdict
        assert verdict is not None
        key = (short(claim.round.environment.device), verdict.basis, frozenset(s.shape for s in claim.shapes))
        group = groups.setdefault(key, [])
        baseline = mean(s.baseline_us / s.floor_us for s in claim.shapes if s.floor_us)
        entry = mean(s.entry_us / s.floor_us for s in claim.shapes if s.floor_us)
        reached = [baseline, *([entry] if verdict.outcome == "faster" else []), *([group[-1].best] if group else [])]
        name = f"{claim.round.name}: {claim.entry.entry}"
        group.append(Moment(position, verdict.finished, name, baseline, entry, min(reached)))
    return [History(_group_name(*key), moments) for key, moments in groups.items()]


def _has_floors(claim: Claim) -> bool:
    return bool(claim.shapes) and all(s.floor_us and min(s.floor_us, s.baseline_us, s.entry_us) > 0 for s in claim.shapes)


def _group_name(device: str, basis: str, shapes: frozenset[str]) -> str:
    first = min(shapes, key=lambda s: (len(s), s))
    what = first if len(shapes) == 1 else f"{len(shapes)} shapes ({first}, …)"
    return f"{device}, {what}{'' if basis == 'measured' else f', {basis}'}"
