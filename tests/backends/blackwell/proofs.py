"""What is run in the emulator to prove the Blackwell kernels, and the table of `make prove-all`'s part in docs/blackwell.md.

`python -m backends.blackwell.proofs FOLDER`, in tests/, runs all of it, keeps compiled kernels in FOLDER and writes the table.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from backends.blackwell.kernels import DTYPES, FIELD_SHAPE, FIELDS, PROCESSORS, SENTINEL, Kernels, default, operands
from backends.blackwell.tanh import outside
from glu4.backends.blackwell.config import Config, legal
from glu4.backends.blackwell.emulation import Exported
from glu4.backends.blackwell.spec import KernelSpec
from glu4.nvfp4 import NVFP4Tensor
from glu4.problem import Problem
from glu4.verify import Case, check, full_range_case
from glu4.verify.contest import DUAL_BENCHMARKS, DUAL_TESTS, DualShape

DOCUMENT = Path(__file__).parents[3] / "docs" / "blackwell.md"
BEGIN, END = "<!-- proofs: begin -->\n", "<!-- proofs: end -->\n"
Schedule = tuple[str, int]
Tile = tuple[int, int]
RANDOM = [("random", seed) for seed in range(1, 19)]
FIVE, TWENTY = RANDOM[:5], [("eager", 0), ("lazy", 0), *RANDOM]
WHOLE = DualShape(256, 512, 256)  # of the public problem's test shapes the one that CI runs whole
# beside the public shapes, of which none has any: tails in M, N and K
TAILS = (DualShape(500, 4024, 7072), DualShape(250, 3000, 4064))


@dataclass(frozen=True)
class Proof:
    """One kernel and problem, by schedules; tiles: along M and N, None for all."""

    name: str
    spec: KernelSpec
    shape: DualShape
    schedules: Sequence[Schedule]
    tiles: tuple[Tile, ...] | None = None


def proofs() -> Iterator[Proof]:
    """What `make prove-all` runs of these kernels beside CI's part."""
    for name, spec in FIELDS.items():
        yield Proof(name, spec, FIELD_SHAPE, TWENTY)
    for shape in dict.fromkeys((*DUAL_TESTS, *DUAL_BENCHMARKS, *TAILS)):
        spec = default(shape)
        if shape == WHOLE:
            yield Proof("test shape, whole", spec, shape, TWENTY)
        else:
            kind = "test shape" if shape in DUAL_TESTS else "benchmark" if shape in DUAL_BENCHMARKS else "with tails"
            yield Proof(kind, spec, shape, TWENTY[1:3], chosen(spec.config, shape, 4))


def chosen(c: Config, shape: DualShape, count: int) -> tuple[Tile, ...]:
    """`count` different tiles or all: the corners, then, drawn by a seed, others."""
    across, down = -(-shape.m // c.tile_m), -(-shape.n // c.tile_n)
    corners = list(dict.fromkeys(itertools.product((0, across - 1), (0, down - 1))))
    rest = [tile for tile in itertools.product(range(across), range(down)) if tile not in corners]
    more = np.random.default_rng(across * down).permutation(len(rest))[: max(0, count - len(corners))]
    return tuple(corners + [rest[i] for i in more])[: max(count, 1)]


def case_of(proof: Proof) -> Case:
    """A full-range case of a proof's problem."""
    spec, shape = proof.spec, proof.shape
    operation = "dual_gemm" if spec.dual else "linear"
    problem = Problem(shape.m, shape.n, shape.k, operation=operation, out_dtype=DTYPES[spec.out])
    assert legal(spec.config, problem) is None
    return full_range_case(21, shape.m, shape.n, shape.k, out_dtype=DTYPES[spec.out], linear=not spec.dual)


@dataclass
class Outcome:
    """Of one proof: CTAs and warp instructions of a run, seconds of all."""

    ctas: int
    instructions: int
    seconds: float


def prove(kernel: Exported, proof: Proof) -> Outcome:
    """Run it by every schedule; AssertionError for a hazard, a wrong element, or anything written elsewhere."""
    case, c = case_of(proof), proof.spec.config
    m, n = case.out_shape
    ctas = None
    if proof.tiles is not None:
        assert c.schedule == "one_wave"
        ctas = [(c.ctas * i + half, j, 0) for i, j in proof.tiles for half in range(c.ctas)]
    outcome = Outcome(0, 0, 0.0)
    for schedule, seed in proof.schedules:
        out = np.full((1, m + 2, n + 8), SENTINEL, np.uint16)
        result, got = kernel.run(
            operands(case), out, processors=PROCESSORS, ctas=ctas, schedule_name=schedule, seed=seed
        )  # fmt: skip
        assert result.report.clean, str(result.report)
        rest = result.buffers["out"].copy()
        for part, rows, cols in parts(case, c, proof.tiles):
            actual = got[0, rows, cols]
            if c.silu == "exp":
                verdict = check(part, actual)
                assert verdict.ok, f"{schedule}, seed {seed}, rows {rows}, columns {cols}: {verdict.summary()}"
            else:
                assert not outside(part, actual).any()
            rest[0, rows, cols] = SENTINEL
        assert (rest == SENTINEL).all(), "written outside of C or of the chosen tiles"
        grid = c.grid(m, n, 1, PROCESSORS)
        outcome.ctas = len(ctas) if ctas else grid[0] * grid[1] * grid[2]
        outcome.instructions = result.report.instructions
        outcome.seconds += result.report.seconds
    return outcome


def parts(case: Case, c: Config, tiles: tuple[Tile, ...] | None) -> Iterator[tuple[Case, slice, slice]]:
    """(the call that gives a tile, its rows, its columns), or all of it."""
    m, n = case.out_shape
    if tiles is None:
        yield case, slice(0, m), slice(0, n)
        return
    assert isinstance(case.x, NVFP4Tensor)
    assert case.up is not None
    for i, j in tiles:
        rows, cols = slice(i * c.tile_m, min(m, (i + 1) * c.tile_m)), slice(j * c.tile_n, min(n, (j + 1) * c.tile_n))
        gate, up = (w.narrow_rows(cols.start, cols.stop - cols.start) for w in (case.gate, case.up))
        yield replace(case, x=case.x.narrow_rows(rows.start, rows.stop - rows.start), gate=gate, up=up), rows, cols


# ---- the table ----

HEAD = """\
| what | kernel | M, N, K | tiles | schedules | CTAs of a run | warp instructions of a run | verdict |
|---|---|---|---|---|---|---|---|
"""


def row(proof: Proof, outcome: Outcome) -> str:
    tiles = "all" if proof.tiles is None else " ".join(f"({i}, {j})" for i, j in proof.tiles)
    cells = (
        proof.name, proof.spec.name, proof.shape, tiles, len(proof.schedules), outcome.ctas, outcome.instructions, "right, clean",
    )  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def main() -> None:
    torch.set_num_threads(1)
    root = Path(__file__).parents[3]
    listed = list(proofs())
    kernels = Kernels({p.spec.name: p.spec for p in listed}, Path(sys.argv[1]).absolute())
    rows, seconds = "", 0.0
    for proof in listed:
        outcome = prove(kernels[proof.spec.name], proof)
        rows, seconds = rows + row(proof, outcome), seconds + outcome.seconds
        print(row(proof, outcome), end="", flush=True)
    paths = ["src/glu4/backends/blackwell", "src/glu4/emulator"]
    changed = subprocess.run(["git", "status", "--short", *paths], cwd=root, capture_output=True, text=True, check=True).stdout
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    state = f"{commit.strip()}{' with changes' if changed else ''}"
    said = f"\nRun at commit {state}: {seconds / 60:.0f} minutes in the emulator.\n"
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text.split(BEGIN)[0] + BEGIN + HEAD + rows + said + END + text.split(END)[1])


if __name__ == "__main__":
    main()
