"""What a run says: the JSON document, a line a shape, and what a reader must be told besides."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from glu4.bench.contender import Row, Shape

__all__ = ["Line", "Recorded", "best_peer", "chosen", "document", "joined", "lines", "off_reference", "read", "reference"]

OFF_PERCENT = 5.0


def reference(device: str) -> dict[tuple[str, int, int, int], float]:
    """Median microseconds of (peer, m, n, k) that were measured before on a device of that name; empty where none were."""
    table = files("glu4.bench.peers") / f"{device}.csv"
    if not table.is_file():
        return {}
    entries = csv.DictReader(line for line in table.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return {(e["peer"], int(e["m"]), int(e["n"]), int(e["k"])): float(e["us"]) for e in entries if e["us"]}


@dataclass(frozen=True)
class Line:
    """One shape: glu4's row and the fastest peer's, None where nothing was timed."""

    shape: Shape
    ours: Row | None
    peer: Row | None

    @property
    def speed_up(self) -> float | None:
        """The fastest peer's median over glu4's: above 1 where glu4 is faster."""
        if self.ours is None or self.peer is None or not self.ours.us or not self.peer.us:
            return None
        return self.peer.us / self.ours.us


def shapes(rows: Iterable[Row]) -> list[Shape]:
    """The shapes of a run, each once, in its order."""
    return list(dict.fromkeys(row.shape for row in rows))


def chosen(rows: Sequence[Row], shape: Shape) -> Row | None:
    """glu4's row that a user gets, when it was timed."""
    return next((r for r in rows if r.peer == "glu4" and r.chosen and r.shape == shape and r.us), None)


def best_peer(rows: Sequence[Row], shape: Shape) -> Row | None:
    """The fastest peer's row, by median."""
    timed = [r for r in rows if r.peer != "glu4" and r.shape == shape and r.us]
    return min(timed, key=lambda r: r.us or 0.0, default=None)


def lines(rows: Sequence[Row]) -> list[Line]:
    """One for each shape."""
    return [Line(shape, chosen(rows, shape), best_peer(rows, shape)) for shape in shapes(rows)]


def off_reference(rows: Sequence[Row], device: str) -> list[str]:
    """Peers more than 5 % off what was measured before on such a device, one sentence each: these need an explanation."""
    known = reference(device)
    found = []
    for row in rows:
        before = None if row.case else known.get((row.peer, row.m, row.n, row.k))
        if before is None or not row.us:
            continue
        percent = 100 * (row.us / before - 1)
        if abs(percent) > OFF_PERCENT:
            size = ",".join(map(str, row.shape))
            side = "above" if percent > 0 else "below"
            found.append(f"{row.peer} at {size}: {row.us:.1f} us, {abs(percent):.1f} % {side} the reference {before:.1f} us")
    return found


@dataclass(frozen=True)
class Recorded:
    """A run read back from its file. roofs: bandwidth (bytes/s) and flops (1/s) measured in it, or None."""

    device: str
    rows: list[Row]
    roofs: dict[str, float] | None
    setting: dict[str, Any]


def document(environment: dict[str, Any], method: str, rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """The JSON document of a run."""
    return {**environment, "method": method, **more, "rows": [row.to_dict() for row in rows]}


def read(path: Path) -> Recorded:
    """A recorded run, of an earlier form too. Raises ValueError for a file that is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        device, entries = content["device"], content["rows"]
        rows = [Row.read(entry) for entry in entries]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a recorded run of glu4 bench: {error}") from error
    setting = {k: v for k, v in content.items() if k not in ("rows", "roofs")}
    return Recorded(device, rows, content.get("roofs"), setting)


def joined(runs: Sequence[Recorded]) -> Recorded:
    """Runs of one device as one: all rows, and the setting and roofs of the first. Raises ValueError for several devices."""
    first, *others = runs
    for other in others:
        if other.device != first.device:
            raise ValueError(f"runs of several devices, {first.device} and {other.device}; report each on its own")
    return Recorded(first.device, [row for run in runs for row in run.rows], first.roofs, first.setting)
