"""What one CTA of sm100_dual_gemm_w4a4 does, as formulas of its configuration: copies, MMAs, waits and their order.

`describe` gives the program that `model_sm100` gives times to. It needs no CuTe DSL; tests/bench/test_program_sm100.py holds it
equal to what the emulator records of the compiled kernel, operation by operation, at several K.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate

from glu4.backends.blackwell.config import ATOM_ROWS, MMA_K, Config, legal
from glu4.errors import UnsupportedError
from glu4.problem import Problem

__all__ = ["KERNEL", "Form", "Op", "Piece", "Program", "Signal", "check_known", "describe", "share"]

Signal = tuple[str | int, ...]  # a name and which one of that name
LOAD, COPY, MMA, TMEM, STORE, TMA_STORE = "TMA loads", "tcgen05.cp", "MMA (tcgen05)", "TMEM ld/st", "stores", "TMA stores"
LEAVE, ASK, GATHER = "partial sums", "ticket", "reads of partial sums"  # of tiles that several CTAs share
SCALE_COPY_BYTES = 512  # a tcgen05.cp.32x128b of one CTA
_ROWS = 128  # of the accumulators of one CTA

# values whose effect the program knows; a field or value that is not here is refused, not ignored
_KNOWN: dict[str, tuple[object, ...]] = {
    "order": ("interleaved", "by_matrix"),
    "barriers": ("joint", "separate"),
    "schedule": ("one_wave", "static", "launch_control", "stream_k"),
    "store": ("direct", "tma"),
    "silu": ("exp", "tanh"),
    "warps": ("specialised", "single"),
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
class Piece:
    """What one CTA does of a tile: `steps` along K. parts: CTAs that share the tile; last: it is the last of them to finish,
    and so adds up and writes."""

    steps: int
    parts: int = 1
    last: bool = True


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
# of a sum in tensor memory that is left in the workspace, of one that is read from there and added, and of a ticket
_LEAVE_INSTRUCTIONS, _GATHER_INSTRUCTIONS, _TICKET_INSTRUCTIONS = 1.0, 2.0, 24.0


@dataclass(frozen=True)
class Program:
    """Roles of one CTA (the first of a pair) by name of the warps; tiles: that it works on, steps: along K, of the longest."""

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


def share(tiles: int, steps: int, workers: int, worker: int) -> tuple[Piece, ...]:
    """What one of stream-K's workers does: its part of all steps of all tiles in one row, as the kernel's `Tiles` has it.

    Taken for the last of a tile is who begins it: it does so after all else, and those that end it do that first of all.
    """
    each, more = divmod(tiles * steps, workers)

    def first_of(number: int) -> int:
        return number * each + min(number, more)

    def worker_of(unit: int) -> int:
        large = more * (each + 1)
        return unit // (each + 1) if unit < large else more + (unit - large) // max(each, 1)

    found = []
    unit, end = first_of(worker), first_of(worker + 1)
    while unit < end:
        start = unit // steps * steps
        count = min(start + steps, end) - unit
        parts = worker_of(start + steps - 1) - worker_of(start) + 1
        found.append(Piece(count, parts, unit == start))
        unit += count
    return tuple(found)


def describe(
    config: Config, problem: Problem, tiles: int = 1, form: Form = KERNEL, work: Sequence[Piece] | None = None
) -> Program:
    """The program of one CTA for `work`; without it for `tiles` tiles of `problem`, of a split K each as if it came last.

    With launch control the requests for tiles are not part of it: they are made a tile ahead.
    Raises UnsupportedError with `legal`'s sentence for what the kernel does not run, and for what the model does not know.
    """
    if reason := legal(config, problem):
        raise UnsupportedError(reason)
    check_known(config)
    whole = -(-problem.k // config.tile_k)
    # of a split K the longest part
    pieces = (Piece(-(-whole // config.split), config.split),) * tiles if work is None else tuple(work)
    return _Writer(config, problem.weight_matrices, pieces, form).program()


def _nothing(tile: int, at: int) -> Iterator[Op]:
    return iter(())


class _Writer:
    def __init__(self, config: Config, weights: int, work: tuple[Piece, ...], form: Form) -> None:
        self.c, self.weights, self.work, self.form = config, weights, work, form
        self.pipes = 2 if config.barriers == "separate" else 1
        self.sums = 2 if config.gate_first else 1
        self.total = sum(piece.steps for piece in work)
        # one warp that does both leaves the stage free whose products it issued last
        self.ahead = config.stages if config.warps == "specialised" else max(config.stages - 1, 1)

    def program(self) -> Program:
        if self.form.serial or self.c.warps == "single":
            both = self.together() if self.form.serial else self.by_turns()
            roles = {"load and multiply": tuple(both), "write": tuple(self.write())}
        else:
            roles = {"load": tuple(self.load()), "multiply": tuple(self.multiply()), "write": tuple(self.write())}
        return Program(roles, len(self.work), max((piece.steps for piece in self.work), default=0))

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

    def begin_loads(self) -> tuple[list[Op], int]:
        """(what comes before the first stage that is loaded as a whole, stages that are loaded so far)."""
        ops: list[Op] = []
        early = min(self.work[0].steps, self.ahead) if self.c.early_weights and self.work else 0
        for at in range(early):
            for pipe in range(self.pipes):
                ops += [*self.acquire(pipe, at), *self.fill(pipe, at, "gate up")]
        if self.c.pdl:
            ops.append(Op("wait", ("front",)))
        for at in range(early):
            ops += self.fill(0, at, "a")
        return ops, early

    def load_steps(self, first: int, end: int) -> Iterator[Op]:
        for at in range(first, end):
            for pipe in range(self.pipes):
                yield from self.acquire(pipe, at)
                yield from self.fill(pipe, at)

    def end_loads(self) -> Iterator[Op]:
        for pipe in range(self.pipes):
            for at in range(max(0, self.total - self.c.stages), self.total):
                yield Op("wait", ("free", pipe, at))

    def load(self) -> Iterator[Op]:
        ops, early = self.begin_loads()
        yield from ops
        yield from self.load_steps(early, self.total)
        yield from self.end_loads()

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

    def end(self, tile: int, first: int, last: int, after: Callable[[int], Iterator[Op]]) -> Iterator[Op]:
        """The last steps: gate's products of all, then up's."""
        for at in range(first, last):
            yield Op("wait", ("filled", 0, at))
            yield from self.scale_copies("a")
            yield from self.scale_copies("gate")
            yield from self.products((0,))
            yield from after(at)
        yield Op("issue", ("done", 0, tile), "commit")
        for at in range(first, last):
            if self.pipes == 2:
                yield Op("wait", ("filled", 1, at))
            yield from self.scale_copies("a")
            yield from self.scale_copies("up")
            yield from self.products((1,))
            yield from self.release(at)

    def tiles(
        self, after: Callable[[int, int], Iterator[Op]] = lambda tile, at: iter(())
    ) -> Iterator[tuple[int, Iterator[Op]]]:
        """(first step, products) of each tile in turn; after: what follows the products of a tile's step."""
        first = 0
        for tile, piece in enumerate(self.work):
            yield first, self.tile(tile, first, first + piece.steps, partial(after, tile))
            first += piece.steps

    def tile(self, tile: int, first: int, last: int, after: Callable[[int], Iterator[Op]]) -> Iterator[Op]:
        if tile >= self.form.accumulators:
            for d in range(self.sums):
                yield Op("wait", ("read", d, tile - self.form.accumulators))
        turn = max(first, last - self.c.gate_first)
        for at in range(first, turn):
            yield from self.step(at)
            yield from after(at)
        if self.c.gate_first:
            yield from self.end(tile, turn, last, after)
        yield Op("issue", ("done", self.sums - 1, tile), "commit")

    def end_products(self) -> Iterator[Op]:
        for d in range(self.sums if self.work else 0):
            yield Op("wait", ("read", d, len(self.work) - 1))

    def multiply(self) -> Iterator[Op]:
        for _, ops in self.tiles():
            yield from ops
        yield from self.end_products()

    def by_turns(self) -> Iterator[Op]:
        """One warp: of each tile the first `ahead` steps are loaded, then after each step's products the one so much later."""
        ops, early = self.begin_loads()
        yield from ops
        ends = list(accumulate(piece.steps for piece in self.work))

        def next_load(tile: int, at: int) -> Iterator[Op]:
            return self.load_steps(at + self.ahead, min(at + self.ahead + 1, ends[tile]))

        for (first, products), end in zip(self.tiles(next_load), ends):
            yield from self.load_steps(max(first, early), min(first + self.ahead, end))
            yield from products
        yield from self.end_loads()
        yield from self.end_products()

    def together(self) -> Iterator[Op]:
        """One warp of a kernel as the template: all stages but one are filled ahead, then each step multiplies one and fills
        one, of the next tile too."""
        total, ahead = self.total, max(self.c.stages - 1, 1)
        filled = min(ahead, total)
        for at in range(filled):
            for pipe in range(self.pipes):
                yield from self.acquire(pipe, at)
                yield from self.fill(pipe, at)
        for _, ops in self.tiles():
            for op in ops:
                yield op
                if op.unit == "commit" and op.signal[:2] == ("free", self.pipes - 1) and filled < total:
                    for pipe in range(self.pipes):
                        yield from self.acquire(pipe, filled)
                        yield from self.fill(pipe, filled)
                    filled += 1

    # ---- the epilogue: four warps at once, a row of the tile for each thread ----

    def read(self, serial: int) -> Iterator[Op]:
        yield Op("issue", ("columns", serial), TMEM, _ROWS * self.c.load_width * 4)

    def work_of(self, share: float, activates: bool) -> Op:
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
        serial = written = 0
        pieces = self.c.tile_n // self.c.load_width
        for tile, part in enumerate(self.work):
            yield Op("wait", ("done", 0, tile))
            if part.parts > 1:
                yield from self.leave(tile, serial)
                serial += pieces * self.weights
                for i in range(written, written + pieces if part.last else written):
                    yield from self.add_up(i, part.parts)
                    yield self.work_of(1.0, self.weights == 2)
                    yield from self.put(i)
            else:
                yield from self.whole(tile, serial, written)
                serial += pieces * self.weights
            written += pieces if part.last else 0
            for d in range(self.sums):
                yield Op("arrive", ("read", d, tile))
        if self.c.store == "tma" and written:
            yield Op("wait", ("stored", written - 1))

    def whole(self, tile: int, serial: int, written: int) -> Iterator[Op]:
        """The epilogue of a tile that is this CTA's alone."""
        pieces = self.c.tile_n // self.c.load_width
        if self.c.gate_first:
            for _ in range(pieces):
                yield from self.read(serial)
                yield Op("wait", ("columns", serial))
                yield self.work_of(_GATE_SHARE, True)
                serial += 1
            yield Op("wait", ("done", 1, tile))
        share, reads = (1 - _GATE_SHARE, 1) if self.c.gate_first else (1.0, self.weights)
        for piece in range(written, written + pieces):
            for _ in range(reads):
                yield from self.read(serial)
                serial += 1
            yield Op("wait", ("columns", serial - 1))
            yield self.work_of(share, self.weights == 2 and not self.c.gate_first)
            yield from self.put(piece)

    # ---- tiles that several CTAs share ----

    def leave(self, tile: int, serial: int) -> Iterator[Op]:
        """Sums to the workspace, then a ticket, which tells who is the last."""
        size = self.weights * self.c.load_width
        for _ in range(self.c.tile_n // self.c.load_width):
            for _ in range(self.weights):
                yield from self.read(serial)
                serial += 1
            yield Op("wait", ("columns", serial - 1))
            yield Op("run", instructions=_LEAVE_INSTRUCTIONS * size)
            yield Op("issue", ("left", tile), LEAVE, _ROWS * size * 4)
        yield Op("run", instructions=_TICKET_INSTRUCTIONS)
        yield Op("issue", ("ticket", tile), ASK)
        yield Op("wait", ("ticket", tile))

    def add_up(self, piece: int, parts: int) -> Iterator[Op]:
        """load_width columns of all parts, in the order of K: each is waited for before the next one is read."""
        size = self.weights * self.c.load_width
        for part in range(parts):
            yield Op("issue", ("gathered", piece, part), GATHER, _ROWS * size * 4)
            yield Op("wait", ("gathered", piece, part))
            yield Op("run", instructions=_GATHER_INSTRUCTIONS * size)
