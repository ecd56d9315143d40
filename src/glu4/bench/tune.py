"""Measure which configuration is fastest, shape by shape, and write the table that `backends.hopper.tuned` reads."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glu4.backends.hopper import launch, tuned
from glu4.backends.hopper.config import SHIPPED
from glu4.bench.contender import Contender, Row
from glu4.bench.operands import Operands
from glu4.bench.ours import Prepared, fits, single

__all__ = ["LADDER", "MARGIN", "contenders", "entries", "merged", "write"]

# M of a table: powers of two and what lies halfway, denser where the token tile changes
LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
MARGIN = 0.25  # who takes that share more than the fastest at a first look has no turn; looks are a few percent off


def contenders(operands: Operands, x_format: str) -> list[Contender]:
    """Every shipped configuration that `ours.fits` the shape."""
    held = Prepared(operands)
    problem = operands.problem(x_format)
    return [single(held, config, x_format) for config in SHIPPED if fits(config, problem)]


def entries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Table entries of measured rows: for each N, K and activation format the fastest configuration at each M, by median, and
    every median there is, so that a reader sees how close it was. An M where nothing was timed is left out."""
    groups: dict[tuple[int, int, str], dict[int, list[Row]]] = {}
    for row in rows:
        if row.us:
            groups.setdefault((row.n, row.k, row.x_format), {}).setdefault(row.m, []).append(row)
    made = []
    for (n, k, x_format), by_m in groups.items():
        ordered = {m: sorted(by_m[m], key=lambda r: r.us or 0.0) for m in sorted(by_m)}
        made.append(
            {"operation": "dual_gemm", "n": n, "k": k, "x_format": x_format, "m": list(ordered)}
            | {"config": [found[0].config for found in ordered.values()]}
            | {"us": [{r.config: r.us for r in found} for found in ordered.values()]}
        )
    return made


def merged(old: str | None, device: str, found: list[dict[str, Any]], setting: dict[str, Any]) -> dict[str, Any]:
    """A table of `device` with the entries `found`, and those of the table `old` (its text) that were not measured again.

    Each entry keeps what it was measured with. Raises ValueError when `old` is no table of this device.
    """
    kept: list[dict[str, Any]] = []
    if old is not None:
        tuned.parse(old, device)
        kept = json.loads(old)["entries"]
    again = {_key(entry) for entry in found}
    both = [e for e in kept if _key(e) not in again] + [{**e, "measured": setting} for e in found]
    return {"format": tuned.FORMAT, "device": device, "entries": sorted(both, key=_key)}


def _key(entry: dict[str, Any]) -> tuple[str, int, int, str]:
    return entry["operation"], entry["n"], entry["k"], entry["x_format"]


def write(directory: Path, device: str, found: list[dict[str, Any]], setting: dict[str, Any]) -> Path:
    """Write or extend the table of `device` in `directory`; another process sees the old table or the new one.

    Raises ValueError when what is there is no table of this device, OSError when the directory cannot be written.
    """
    path = directory / tuned.file_name(device)
    try:
        document = merged(path.read_text(encoding="utf-8") if path.is_file() else None, device, found, setting)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete it to start a new one") from error
    directory.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=directory, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as f:
            f.write(json.dumps(document, indent=1) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    tuned.forget()
    launch.forget()
    return path
