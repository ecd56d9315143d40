"""What is run in the emulator to prove the Blackwell kernels, and the table of `make prove-all`'s part in docs/blackwell.md.

`python -m backends.blackwell.proofs FOLDER [PART PARTS]`, in tests/, runs all of it, or every PARTS-th beginning with number PART,
and writes the table of what is done. Compiled kernels and the outcomes are kept in FOLDER; what is there is not run again.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from backends.blackwell.kernels import DTYPES, FIELD_SHAPES, FIELDS, PROCESSORS, SENTINEL, Kernels, default, operands
from backends.blackwell.tanh import outside
from glu4.backends.blackwell.config import Config, legal
from glu4.backends.blackwell.emulation import Exported
from glu4.backends.blackwell.spec import KernelSpec
from glu4.nvfp4 import NVFP4Tensor
from glu4.problem import Problem
from glu4.verify import Case, check, full_range_case
from glu4.verify.contest import DUAL_BENCHMARKS, DUAL_TESTS, DualShape

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "blackwell.md"
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
    """One kernel and problem, by schedules; tiles: along M and N, None for all; processors: that a persistent kernel fills."""

    name: str
    spec: KernelSpec
    shape: DualShape
    schedules: Sequence[Schedule]
    tiles: tuple[Tile, ...] | None = None
    processors: int = PROCESSORS


def of_field(name: str, schedules: Sequence[Schedule]) -> Proof:
    """Of one of FIELDS. With three processors stream-K's share tiles, and a static schedule's have one or two."""
    spec = FIELDS[name]
    return Proof(name, spec, FIELD_SHAPES[spec.config.schedule != "one_wave"], schedules, processors=3)


def proofs() -> Iterator[Proof]:
    """What `make prove-all` runs of these kernels beside CI's part."""
    for name in FIELDS:
        yield of_field(name, TWENTY)
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
    """Of one proof: CTAs and warp instructions of a run, seconds of all; at which commit."""

    ctas: int
    instructions: int
    seconds: float
    commit: str = ""


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
            operands(case), out, processors=proof.processors, ctas=ctas, schedule_name=schedule, seed=seed
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
        grid = c.grid(m, n, 1, proof.processors)
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


def recorded(text: str) -> list[list[str]]:
    """Cells of each row of the document's table."""
    rows = text.split(BEGIN)[1].split(END)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows if line.startswith("|")]


def row(proof: Proof, outcome: Outcome) -> str:
    """A line of it."""
    tiles = "all" if proof.tiles is None else " ".join(f"({i}, {j})" for i, j in proof.tiles)
    cells = (
        proof.name, proof.spec.name, proof.shape, tiles, len(proof.schedules), outcome.ctas, outcome.instructions, "right, clean",
    )  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def commit() -> str:
    """Where the kernels and the emulator are."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--short", "--untracked-files=no", "src/glu4/backends/blackwell", "src/glu4/emulator")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]).absolute()
    part, count = (int(v) for v in sys.argv[2:4] or (0, 1))
    listed = list(proofs())
    kernels = Kernels({p.spec.name: p.spec for p in listed}, folder)
    files = [folder / f"proof-{p.spec.key}-{p.shape}-{len(p.schedules)}.json" for p in listed]
    for proof, file in list(zip(listed, files))[part::count]:
        if not file.exists():
            at = commit()
            outcome = prove(kernels[proof.spec.name], proof)
            file.write_text(json.dumps(asdict(replace(outcome, commit=at))))
            print(row(proof, outcome), end="", flush=True)
    done = [(proof, Outcome(**json.loads(file.read_text()))) for proof, file in zip(listed, files) if file.exists()]
    rows = "".join(row(proof, outcome) for proof, outcome in done)
    at = ", ".join(sorted({outcome.commit for _, outcome in done}))
    said = f"\nRun at commit {at}: {len(done)} of {len(listed)}, {sum(o.seconds for _, o in done) / 60:.0f} minutes in the emulator.\n"
    if len(done) < len(listed):
        said += "The others have not been run yet; the command above goes on with them.\n"
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text.split(BEGIN)[0] + BEGIN + HEAD + rows + said + END + text.split(END)[1])


if __name__ == "__main__":
    main()
