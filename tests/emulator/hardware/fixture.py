"""The recording of a GPU's outputs: whole where they are needed, else a digest of each row and a few of its values."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emulator.hardware.case import Case

__all__ = ["Recording", "fingerprint", "rows_of", "save"]

_SAMPLE = 8  # values of a row that are kept beside its digest
_DIGEST = 16  # bytes of SHA-256


def fingerprint(case: Case) -> str:
    """Of everything that decides a case's outputs: a recording counts for the case as it was."""
    text = json.dumps([case.ptx, case.launch], sort_keys=True)
    found = hashlib.sha256(text.encode())
    for name, array in sorted(case.inputs.items()):
        found.update(name.encode() + array.tobytes())
    return found.hexdigest()[:16]


def rows_of(case: Case, output: np.ndarray) -> np.ndarray:
    """An output as [rows, values], unsigned integers: a row for each form of an elementwise kernel, else one."""
    flat = np.ascontiguousarray(output)
    flat = flat.reshape(-1).view(f"u{flat.itemsize}")
    return flat.reshape(max(len(case.rows), 1), -1)


def digest(row: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(row).tobytes()).digest()[:_DIGEST]


def places(count: int) -> np.ndarray:
    """Indices of the values that are kept of a row."""
    return np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)


def save(
    path: Path,
    meta: dict[str, Any],
    table: dict[str, Case],
    outputs: dict[str, dict[str, np.ndarray]],
    failures: dict[str, str],
) -> None:
    """Write a recording. outputs: case to buffer to array; failures: case to what the driver said."""
    index: list[Any] = []
    blobs: list[bytes] = []
    place = 0
    for name, buffers in outputs.items():
        case = table[name]
        entry: dict[str, Any] = {"case": name, "fingerprint": fingerprint(case), "buffers": []}
        for buffer, output in buffers.items():
            rows = rows_of(case, output)
            whole = case.full or case.compare == "probe" or rows.nbytes <= 64 * len(rows)
            kept = rows.tobytes() if whole else b"".join(digest(r) + r[places(r.size)].tobytes() for r in rows)
            entry["buffers"].append([buffer, rows.dtype.str, list(rows.shape), whole, place])
            place += len(kept)
            blobs.append(kept)
        index.append(entry)
    refused = [name for name in failures if table[name].compare == "refused"]
    index += [{"case": name, "fingerprint": fingerprint(table[name]), "buffers": []} for name in refused]
    text = json.dumps({"meta": meta, "cases": index, "failures": failures}, separators=(",", ":"))
    data = np.frombuffer(b"".join(blobs), dtype=np.uint8)
    np.savez_compressed(path, index=np.frombuffer(text.encode(), dtype=np.uint8), data=data)


@dataclass(frozen=True)
class _Stored:
    dtype: str
    shape: tuple[int, int]
    whole: bool
    place: int


class Recording:
    """A recording that was saved. meta: device, driver, commit; failures: cases that gave no output, and why."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            described = json.loads(stored["index"].tobytes())
            self.data = stored["data"].tobytes()
        self.meta: dict[str, Any] = described["meta"]
        self.failures: dict[str, str] = described["failures"]
        self.fingerprints = {c["case"]: c["fingerprint"] for c in described["cases"]}
        self.buffers = {
            (c["case"], name): _Stored(dtype, (shape[0], shape[1]), whole, place)
            for c in described["cases"]
            for name, dtype, shape, whole, place in c["buffers"]
        }

    def whole(self, case: str, buffer: str) -> np.ndarray:
        """An output that was kept whole, [rows, values]."""
        stored = self.buffers[case, buffer]
        if not stored.whole:
            raise ValueError(f"{case}: of {buffer} only digests were recorded")
        count = stored.shape[0] * stored.shape[1]
        return np.frombuffer(self.data, stored.dtype, count, stored.place).reshape(stored.shape)

    def differences(self, case: Case, buffer: str, output: np.ndarray) -> list[str]:
        """What differs between a recorded output and another, a line for each row."""
        stored = self.buffers[case.name, buffer]
        rows = rows_of(case, output)
        if rows.shape != stored.shape:
            return [f"{buffer}: shape {rows.shape}, recorded {stored.shape}"]
        names = case.rows or (buffer,)
        if stored.whole:
            expected = self.whole(case.name, buffer)
            return [
                _line(n, e, r, np.flatnonzero(e != r)) for n, e, r in zip(names, expected, rows) if not np.array_equal(e, r)
            ]
        found = []
        kept = places(rows.shape[1])
        size = _DIGEST + len(kept) * rows.itemsize
        for i, (name, row) in enumerate(zip(names, rows)):
            raw = self.data[stored.place + i * size : stored.place + (i + 1) * size]
            if raw[:_DIGEST] != digest(row):
                sample = np.frombuffer(raw[_DIGEST:], stored.dtype)
                found.append(_line(name, sample, row[kept], np.flatnonzero(sample != row[kept]), kept))
        return found


def _line(name: str, expected: np.ndarray, got: np.ndarray, wrong: np.ndarray, where: np.ndarray | None = None) -> str:
    shown = ", ".join(f"[{i if where is None else where[i]}] {expected[i]:#x} not {got[i]:#x}" for i in wrong[:4])
    return f"{name}: hardware gives {shown}" if shown else f"{name}: differs outside the values that were kept"
