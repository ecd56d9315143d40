"""What one CTA of sm100_dual_gemm_w4a4 does, as formulas of its configuration: copies, MMAs, waits and their order.

`describe` gives the program that `model_sm100` gives times to. It needs no CuTe DSL; tests/bench/test_program_sm100.py holds it
equal to what the emulator records of the compiled kernel, operation by operation, at several K.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields

from glu4.backends.blackwell.config import ATOM_ROWS, MMA_K, Config, legal
from glu4.errors import UnsupportedError
from glu4.problem import Problem

__all__ = ["KERNEL", "Form", "Op", "Program", "Signal", "check_known", "describe"]

Signal = tuple[str | int, ...]  # a name and which one of that name
LOAD, COPY, MMA, TMEM, STORE, TMA_STORE = "TMA loads", "tcgen05.cp", "MMA (tcgen05)", "TMEM ld/st", "stores", "TMA stores"
LEAVE, ASK, GATHER = "partial sums", "ticket", "reads of partial sums"  # of a split K
SCALE_COPY_BYTES = 512  # a tcgen05.cp.32x128b of one CTA
_ROWS = 128  # of the accumulators of one CTA

# values whose effect the program knows; a field or value that is not here is refused, not ignored
_KNOWN: dict[str, tuple[object, ...]] = {
    "order": ("interleaved", "by_matrix"),
    "barriers": ("joint", "separate"),
    "schedule": ("one_wave", "static", "launch_control"),
    "store": ("direct", "tma"),
    "silu": ("exp", "tanh"),
}
_FREE = (
    *("ctas", "tile_m", "tile_n", "tile_k", "stages", "load_width", "gate_first", "collector", "evict_first", "pdl"),
    *("early_weights", "prefetch_scales", "split"),
)


@dataclass(frozen=True, slots=True)
class Op:
    """One thing that a role does.

    kind          "wait" for a signal, "arrive" at one, "issue" an operation whose completion counts for it, or "run"
    unit          of an issue: the engine, as in the emulator's timeline, or "commit"
    bytes, macs   of an issue, of one CTA: bytes moved; products and sums
    shared_bytes  of an MMA: operands that the CTA's tensor core reads from shared memory
    instructions  of a run: of each of the four warps of the epilogue; special: exponentials and divisions among them
    """

    kind: str
    signal: Signal = ()
    unit: str = ""
    bytes: int = 0
    macs: int = 0
    shared_bytes: int = 0
    instructions: float = 0.0
    special: float = 0.0


@dataclass(frozen=True)
class Form:
    """What a kernel is that no field of Config says; the default is this project's.

    serial          one warp issues copies and products by turns, as in the contest's template
    instructions    PTX instructions for each element of C: the first number is of activation and product of two matrices, the
                    second of one matrix; special: exponentials and divisions for each element of two matrices
    per_piece       instructions for each group of `load_width` columns beside these
    accumulators    tiles whose sums tensor memory holds: with 2 the next tile is multiplied while the last one is written
    """

    serial: bool = False
    instructions: tuple[float, float] = (36.0, 5.0)
    special: float = 2.0
    per_piece: float = 45.0
    accumulators: int = 1


KERNEL = Form()
_TANH_INSTRUCTIONS, _TANH_SPECIAL = 23.0, 1.0  # of the kernel's silu "tanh" instead of "exp"
_GATE_SHARE = 22 / 36  # of the instructions of an element: what is done when gate's sum is there


@dataclass(frozen=True)
class Program:
    """Roles of one CTA (the first of a pair) that works on `tiles` tiles of `steps` steps along K, by name of the warps."""

    roles: dict[str, tuple[Op, ...]]
    tiles: int
    steps: int

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """By unit: (operations, bytes, products and sums); one operation stands for all four warps of the epilogue."""
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for op in (op for ops in self.roles.values() for op in ops if op.kind == "issue"):
            row = found[op.unit]
            row[0], row[1], row[2] = row[0] + 1, row[1] + op.bytes, row[2] + op.macs
        return {unit: (row[0], row[1], row[2]) for unit, row in found.items()}


def check_known(config: Config) -> None:
    """Raise UnsupportedError for a field or value of a configuration that the model knows no effect of."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _KNOWN:
            if value not in _KNOWN[field.name]:
                known = ", ".join(str(v) for v in _KNOWN[field.name])
                raise UnsupportedError(f"the performance model knows {field.name} {known}, and not {value}")
        elif field.name not in _FREE and value != field.default:
            raise UnsupportedError(f"the performance model does not know what {field.name} {value} does")
    if config.tile_m != config.ctas * _ROWS:
        raise UnsupportedError(f"the performance model knows {_ROWS} rows for each CTA, and not tile_m {config.tile_m}")


def describe(config: Config, problem: Problem, tiles: int = 1, form: Form = KERNEL) -> Program:
    """The program of one CTA for `tiles` tiles of `problem`: of a split K the CTA with the most steps, as if it came last.

    With launch control the requests for tiles are not part of it: they are made a tile ahead.
    Raises UnsupportedError with `legal`'s sentence for what the kernel does not run, and for what the model does not know.
    """
    if reason := legal(config, problem):
        raise UnsupportedError(reason)
    check_known(config)
    whole = -(-problem.k // config.tile_k)
    steps = -(-whole // config.split)
    return _Writer(config, problem.weight_matrices, steps, tiles, form).program()


class _Writer:
    def __init__(self, config: Config, weights: int, steps: int, tiles: int, form: Form) -> None:
        self.c, self.weights, self.steps, self.tiles, self.form = config, weights, steps, tiles, form
        self.pipes = 2 if config.barriers == "separate" else 1
        self.sums = 2 if config.gate_first else 1

    def program(self) -> Program:
        if self.form.serial:
            roles = {"load and multiply": tuple(self.together()), "write": tuple(self.write())}
        else:
            roles = {"load": tuple(self.load()), "multiply": tuple(self.multiply()), "write": tuple(self.write())}
        return Program(roles, self.tiles, self.steps)

    # ---- loads: what of A, gate and up comes to this CTA ----

    def copies(self, pipe: int, which: str) -> Iterator[tuple[str, int]]:
        """(operand, bytes) of a step's copies whose arrival the pipe counts; multicast scales come in halves."""
        c = self.c
        rows = {"a": c.tile_m // c.ctas, "gate": c.tile_n // c.ctas, "up": c.tile_n // c.ctas}
        for operand in ("a", "gate", "up")[: 1 + self.weights]:
            if (self.pipes == 2 and pipe != (operand == "up")) or operand not in which.split():
                continue
            yield operand, rows[operand] * c.tile_k // 2
            if operand == "a":
                yield operand, rows[operand] * c.tile_k // 16
            else:
                yield from [(operand, c.scale_rows * c.tile_k // 16 // c.ctas)] * c.ctas

    def fill(self, pipe: int, at: int, which: str = "a gate up") -> Iterator[Op]:
        for _, size in self.copies(pipe, which):
            yield Op("issue", ("filled", pipe, at), LOAD, size)

    def acquire(self, pipe: int, at: int) -> Iterator[Op]:
        """Until the stage is free; the first CTA of a pair arms the barrier for both."""
        if at >= self.c.stages:
            yield Op("wait", ("free", pipe, at - self.c.stages))
        yield Op("arrive", ("filled", pipe, at))

    def load(self) -> Iterator[Op]:
        total, early = self.tiles * self.steps, 0
        if self.c.early_weights:
            early = min(self.steps, self.c.stages)
            for at in range(early):
                for pipe in range(self.pipes):
                    yield from self.acquire(pipe, at)
                    yield from self.fill(pipe, at, "gate up")
        if self.c.pdl:
            yield Op("wait", ("front",))
        for at in range(early):
            yield from self.fill(0, at, "a")
        for at in range(early, total):
            for pipe in range(self.pipes):
                yield from self.acquire(pipe, at)
                yield from self.fill(pipe, at)
        for pipe in range(self.pipes):
            for at in range(max(0, total - self.c.stages), total):
                yield Op("wait", ("free", pipe, at))

    # ---- products ----

    def scale_copies(self, operand: str) -> Iterator[Op]:
        rows = ATOM_ROWS if operand == "a" else self.c.scale_rows
        for _ in range(rows // ATOM_ROWS * (self.c.tile_k // MMA_K)):
            yield Op("issue", ("issued",), COPY, SCALE_COPY_BYTES)

    def products(self, which: tuple[int, ...]) -> Iterator[Op]:
        c = self.c
        macs = _ROWS * c.tile_n * MMA_K
        a, weight = _ROWS * MMA_K // 2, c.tile_n // c.ctas * MMA_K // 2
        for _ in range(c.tile_k // MMA_K):
            for place, _w in enumerate(which):
                kept = c.collector and place > 0  # A is in the tensor core already
                yield Op("issue", ("issued",), MMA, 0, macs, weight if kept else a + weight)

    def release(self, at: int) -> Iterator[Op]:
        for pipe in range(self.pipes):
            yield Op("issue", ("free", pipe, at), "commit")

    def step(self, at: int) -> Iterator[Op]:
        yield Op("wait", ("filled", 0, at))
        yield from self.scale_copies("a")
        yield from self.scale_copies("gate")
        if self.weights == 1:
            yield from self.products((0,))
        else:
            if self.c.order == "by_matrix":
                yield from self.products((0,))
            if self.pipes == 2:
                yield Op("wait", ("filled", 1, at))
            yield from self.scale_copies("up")
            yield from self.products((0, 1) if self.c.order == "interleaved" else (1,))
        yield from self.release(at)

    def end(self, first: int, last: int) -> Iterator[Op]:
        """The last steps: gate's products of all, then up's."""
        for at in range(first, last):
            yield Op("wait", ("filled", 0, at))
            yield from self.scale_copies("a")
            yield from self.scale_copies("gate")
            yield from self.products((0,))
        yield Op("issue", ("done", 0, (last - 1) // self.steps), "commit")
        for at in range(first, last):
            if self.pipes == 2:
                yield Op("wait", ("filled", 1, at))
            yield from self.scale_copies("a")
            yield from self.scale_copies("up")
            yield from self.products((1,))
            yield from self.release(at)

    def tile(self, tile: int) -> Iterator[Op]:
        first, last = tile * self.steps, (tile + 1) * self.steps
        if tile >= self.form.accumulators:
            for d in range(self.sums):
                yield Op("wait", ("read", d, tile - self.form.accumulators))
        turn = max(first, last - self.c.gate_first)
        for at in range(first, turn):
            yield from self.step(at)
        if self.c.gate_first:
            yield from self.end(turn, last)
        yield Op("issue", ("done", self.sums - 1, tile), "commit")

    def multiply(self) -> Iterator[Op]:
        for tile in range(self.tiles):
            yield from self.tile(tile)
        for d in range(self.sums):
            yield Op("wait", ("read", d, self.tiles - 1))

    def together(self) -> Iterator[Op]:
        """One warp: all stages but one are filled ahead, then each step multiplies one and fills one."""
        total, ahead = self.tiles * self.steps, max(self.c.stages - 1, 1)
        filled = min(ahead, total)
        for at in range(filled):
            for pipe in range(self.pipes):
                yield from self.acquire(pipe, at)
                yield from self.fill(pipe, at)
        for tile in range(self.tiles):
            for op in self.tile(tile):
                yield op
                if op.unit == "commit" and op.signal[:2] == ("free", self.pipes - 1) and filled < total:
                    for pipe in range(self.pipes):
                        yield from self.acquire(pipe, filled)
                        yield from self.fill(pipe, filled)
                    filled += 1

    # ---- the epilogue: four warps at once, a row of the tile for each thread ----

    def read(self, serial: int) -> Iterator[Op]:
        yield Op("issue", ("columns", serial), TMEM, _ROWS * self.c.load_width * 4)

    def work(self, share: float, activates: bool) -> Op:
        """load_width columns; share: of an element's instructions."""
        form, width = self.form, self.c.load_width
        each, special = form.instructions[2 - self.weights], form.special if activates else 0.0
        if self.c.silu == "tanh":
            each, special = min(each, _TANH_INSTRUCTIONS), min(special, _TANH_SPECIAL)
        return Op("run", instructions=share * (each * width + form.per_piece), special=special * width)

    def put(self, piece: int) -> Iterator[Op]:
        """A piece of load_width columns to C, 16 bits an element."""
        c = self.c
        size = _ROWS * c.load_width * 2
        if c.store == "direct":
            yield Op("issue", ("stored", piece), STORE, size)
            return
        before = piece - (2 if c.tile_n > c.load_width else 1)  # this buffer has been read
        if before >= 0:
            yield Op("wait", ("stored", before))
        yield Op("issue", ("stored", piece), TMA_STORE, size)

    def write(self) -> Iterator[Op]:
        if self.c.pdl:
            yield Op("wait", ("front",))
        serial, pieces = 0, self.c.tile_n // self.c.load_width
        for tile in range(self.tiles):
            yield Op("wait", ("done", 0, tile))
            if self.c.gate_first:
                for _ in range(pieces):
                    yield from self.read(serial)
                    yield Op("wait", ("columns", serial))
                    yield self.work(_GATE_SHARE, True)
                    serial += 1
                yield Op("wait", ("done", 1, tile))
            share, reads = (1 - _GATE_SHARE, 1) if self.c.gate_first else (1.0, self.weights)
            for piece in range(tile * pieces, (tile + 1) * pieces):
                for _ in range(reads):
                    yield from self.read(serial)
                    serial += 1
                yield Op("wait", ("columns", serial - 1))
                yield self.work(share, self.weights == 2 and not self.c.gate_first)
                yield from self.put(piece)
            for d in range(self.sums):
                yield Op("arrive", ("read", d, tile))
        if self.c.store == "tma":
            yield Op("wait", ("stored", self.tiles * pieces - 1))
