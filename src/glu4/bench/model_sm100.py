"""A prediction of the time of sm100_dual_gemm_w4a4 on a B200, from the operations of its CTAs and published rates.

The kernel has never run on a GPU: everything here is a prediction and none of it a measurement. Three layers:

    program_sm100   what a CTA does: copies, MMAs, waits and their order, held equal to the emulator's recording
    _Processor      a discrete-event simulation of one SM: roles wait for signals, engines serve one operation at a time
    predict         CTAs over SMs, what SMs share (device memory), and the cost of a launch

Two rates are calibrated, on public times of the contest's template and of one kernel (`published_sm100`); the others are
published or assumed, as `Rates` says of each. docs/model-sm100.md explains, compares and lists what is missed.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from glu4.backends.blackwell.config import Config
from glu4.bench.devices import device
from glu4.bench.program_sm100 import (
    ASK,
    COPY,
    GATHER,
    KERNEL,
    LEAVE,
    LOAD,
    MMA,
    STORE,
    TMA_STORE,
    TMEM,
    Form,
    Op,
    Piece,
    Program,
    Signal,
    describe,
    share,
)
from glu4.errors import UnsupportedError
from glu4.problem import GroupedProblem, Problem

__all__ = ["RATES", "Prediction", "Rates", "Run", "Shared", "predict", "predict_launch", "simulate"]

_CONTEST = device("b200-contest")
_SHARED_OF_SM = 228 * 1024  # bytes of an SM, of which each CTA takes 1 KiB more than it asks for (CUDA programming guide)
_TMEM_OF_SM = 512
_MOST_RESIDENT = 2  # CTAs of an SM; registers would allow more only below 168 a thread
_SATURATED = 0.85  # of the main loop: an engine that is busy for more bounds it


@dataclass(frozen=True)
class Rates:
    """Of a B200. us: microseconds; clock: cycles in a microsecond.

    launch_us       from the end of one launch to the start of the next one's CTAs; calibrated
    setup_us        a CTA's barriers, tensor memory and tensor maps, before its first copy; assumed, 0.5
    latency_us      from the issue of a tensor copy to its arrival, beyond the bytes' own time; calibrated
    clock           1965 MHz, the highest clock in the B200's data sheets; the tensor core's rate has its own
    processors      148 (GPU MODE's B200)
    flops           of one SM a second: 9e15 / 148, NVIDIA's figure for a B200 without sparsity; e2m1 operands
    device_flops    of all SMs together, which power holds below that: 6.9005e15, what the contest's own limit uses (`devices`)
    memory          bytes a second: 5.9148e12, measured on a B200 (gau-nernst/gpu-mode-kernels, nvidia/README.md)
    cache_bytes     126 MB of L2 (Chips and Cheese, "Nvidia's B200")
    l2_bytes        a cycle from L2 to one SM: 128; assumed. The calibration's times do not reach it
    shared_bytes    a cycle from shared memory to the tensor core: 128 (SemiAnalysis, "Dissecting Nvidia Blackwell", 2026:
                    MMAs with N < 128 are bound by it)
    tmem_bytes      a cycle by tcgen05.ld: 512, 4 for each lane; assumed
    special         exponentials and their kin a cycle: 16 (CUDA programming guide, arithmetic throughput); a warp's takes 8
                    cycles of its quarter
    store_bytes     a cycle of stores from registers: 32 bytes, one sector; a thread's 16 bytes use half; assumed
    cache_us        from a load to its arrival from L2, where sums of other CTAs are; a ticket takes two, one for the stores
                    before it; assumed, 0.3
    tensor_us       from the last MMA to who waits for its commit; assumed, 0.1
    pdl_us          by which a dependent launch starts before the end of the one in front; assumed, 1
    """

    launch_us: float = 3.378
    setup_us: float = 0.5
    latency_us: float = 0.943
    clock: float = 1965.0
    processors: int = 148
    flops: float = 9e15 / 148
    device_flops: float = _CONTEST.flops
    memory: float = 5.9148e12
    cache_bytes: float = 126e6
    l2_bytes: float = 128.0
    shared_bytes: float = 128.0
    tmem_bytes: float = 512.0
    special: float = 16.0
    store_bytes: float = 32.0
    cache_us: float = 0.3
    tensor_us: float = 0.1
    pdl_us: float = 1.0

    def busy(self, op: Op, shared: Shared) -> float:
        """Microseconds for which an operation holds its engine."""
        if op.unit == LOAD:
            return op.bytes / shared.loads
        if op.unit == MMA:
            return max(op.macs / shared.macs, op.shared_bytes / self.shared_bytes / self.clock)
        if op.unit == COPY:
            return op.bytes / self.shared_bytes / self.clock
        if op.unit == TMEM:
            return op.bytes / self.tmem_bytes / self.clock
        if op.unit == STORE:  # 16 of a sector's 32 bytes each
            return 2 * op.bytes / self.store_bytes / self.clock
        if op.unit == LEAVE:  # whole sectors
            return op.bytes / self.store_bytes / self.clock
        if op.unit in (TMA_STORE, GATHER):
            return op.bytes / self.l2_bytes / self.clock
        return 0.0

    def after(self, op: Op) -> float:
        """Microseconds from the end of an engine's work to the completion."""
        after = {LOAD: self.latency_us, "commit": self.tensor_us, GATHER: self.cache_us, ASK: 2 * self.cache_us}
        return after.get(op.unit, 0.0)

    def run(self, op: Op) -> float:
        """Microseconds of a role's own instructions: a warp issues one a cycle and shares nothing with the other three."""
        return max(op.instructions, op.special * 32 / (self.special / 4)) / self.clock


@dataclass(frozen=True)
class Shared:
    """What one SM has of what all share: bytes of loads, and products and sums, a microsecond."""

    loads: float
    macs: float


RATES = Rates()


@dataclass(frozen=True)
class Prediction:
    """A predicted time, no measurement.

    us         microseconds from launch to launch, as the contest counts: cold operands, calls back to back
    bound_by   "device memory", "L2 to SM", "tensor core", "copy latency" (too few bytes in flight) or "fixed costs"
    breakdown  microseconds: launch; fill, until the first MMA; main loop; epilogue, after the last MMA of all. They sum to us
    busy       share of the kernel's own time for which an SM's engines work
    """

    us: float
    bound_by: str
    breakdown: dict[str, float]
    busy: dict[str, float] = field(default_factory=dict)


# ---- one SM ----


@dataclass
class Run:
    """Times of a simulated SM in microseconds: its end, the first and last MMA's, and by engine how long it worked."""

    end: float = 0.0
    first_mma: float = -1.0
    last_mma: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class _Role:
    __slots__ = ("at", "cta", "ops", "time")

    def __init__(self, cta: int, ops: tuple[Op, ...], time: float) -> None:
        self.cta, self.ops, self.time, self.at = cta, ops, time, 0


class _Processor:
    """Engines take operations in the order of their issue; CTAs beyond those that fit start as others end."""

    def __init__(self, programs: Sequence[Program], resident: int, rates: Rates, shared: Shared, front: float) -> None:
        self.programs, self.rates, self.shared, self.front = programs, rates, shared, front
        self.free: dict[str, float] = defaultdict(float)
        self.missing: dict[tuple[int, Signal], int] = {}
        self.times: dict[tuple[int, Signal], float] = defaultdict(float)
        self.parked: dict[tuple[int, Signal], list[_Role]] = defaultdict(list)
        self.left: dict[int, int] = {}
        self.queue: list[tuple[float, int, _Role]] = []
        self.pushed = self.started = 0
        self.result = Run()
        for _ in range(min(resident, len(programs))):
            self.start(0.0)

    def start(self, time: float) -> None:
        """The next CTA."""
        cta, program = self.started, self.programs[self.started]
        self.started += 1
        self.left[cta] = len(program.roles)
        for ops in program.roles.values():
            for op in ops:
                if op.kind in ("arrive", "issue"):
                    key = (cta, op.signal)
                    self.missing[key] = self.missing.get(key, 0) + 1
        self.times[cta, ("front",)] = self.front
        for ops in program.roles.values():
            self.push(_Role(cta, ops, time + self.rates.setup_us))

    def push(self, role: _Role) -> None:
        self.pushed += 1
        heapq.heappush(self.queue, (role.time, self.pushed, role))

    def run(self) -> Run:
        while self.queue:
            _, _, role = heapq.heappop(self.queue)
            self.advance(role)
        if any(self.left.values()):
            raise RuntimeError("the program waits for what never comes")
        return self.result

    def advance(self, role: _Role) -> None:
        """One operation, so that roles and CTAs reach engines in the order of their times."""
        if role.at == len(role.ops):
            self.finish(role)
            return
        op = role.ops[role.at]
        key = (role.cta, op.signal)
        if op.kind == "wait" and self.missing.get(key, 0):
            self.parked[key].append(role)
            return
        role.at += 1
        if op.kind == "wait":
            role.time = max(role.time, self.times[key])
        elif op.kind == "run":
            role.time += self.rates.run(op)
            self.result.busy["epilogue warps"] += self.rates.run(op)
        elif op.kind == "arrive":
            self.give(key, role.time)
        else:
            self.issue(op, key, role.time)
        self.push(role)

    def issue(self, op: Op, key: tuple[int, Signal], time: float) -> None:
        # scale copies and commits keep their place among the MMAs (PTX ISA, tcgen05 memory model: pipelined instructions)
        # and a ticket among the stores before it
        engine = MMA if op.unit in (COPY, "commit") else STORE if op.unit in (LEAVE, ASK) else op.unit
        busy = self.rates.busy(op, self.shared)
        start = max(time, self.free[engine])
        end = self.free[engine] = start + busy
        self.result.busy[engine] += busy
        if op.unit == MMA:
            if self.result.first_mma < 0:
                self.result.first_mma = start
            self.result.last_mma = max(self.result.last_mma, end)
        self.result.end = max(self.result.end, end)
        self.give(key, end + self.rates.after(op))

    def give(self, key: tuple[int, Signal], time: float) -> None:
        self.times[key] = max(self.times[key], time)
        self.missing[key] -= 1
        if not self.missing[key]:
            for role in self.parked.pop(key, ()):
                self.push(role)

    def finish(self, role: _Role) -> None:
        self.result.end = max(self.result.end, role.time)
        self.left[role.cta] -= 1
        if not self.left[role.cta] and self.started < len(self.programs):
            self.start(role.time)


def simulate(programs: Sequence[Program], rates: Rates, shared: Shared, resident: int = 1, front: float = 0.0) -> Run:
    """One SM that runs CTAs one after the other, `resident` at a time.

    front: when the kernel in front has ended, in microseconds after the first CTA's start. Deterministic.
    """
    return _Processor(programs, resident, rates, shared, front).run()


# ---- all SMs ----


@dataclass(frozen=True)
class _Share:
    """CTAs of a launch over SMs. groups: SMs, or pairs of them; tiles: of C, or parts of them, over all; each: tiles of the
    busiest group."""

    groups: int
    tiles: int

    @property
    def each(self) -> int:
        return -(-self.tiles // self.groups)


def _tiles(problem: Problem, c: Config) -> int:
    return -(-problem.m // c.tile_m) * -(-problem.n // c.tile_n) * problem.batch


def _resident(c: Config, weights: int) -> int:
    """CTAs that fit on an SM at once."""
    by_shared = _SHARED_OF_SM // (c.shared_bytes(weights) + 1024)
    return max(1, min(by_shared, _TMEM_OF_SM // c.columns(weights), _MOST_RESIDENT))


def _memory_bytes(problems: Sequence[Problem], c: Config, groups: int, rates: Rates) -> float:
    """Bytes from and to device memory: operands once, or once a wave where they exceed the L2 cache, and C."""
    total = 0.0
    for p in problems:
        row = p.k * 9 / 16
        across, down = -(-p.m // c.tile_m), -(-p.n // c.tile_n)
        once = p.batch * row * (p.m + p.weight_matrices * p.n)
        waves = max(1.0, across * down * p.batch / groups)
        m_tiles = min(across, groups)
        n_tiles = min(down, -(-groups // m_tiles))
        wave = row * (min(p.m, m_tiles * c.tile_m) + p.weight_matrices * min(p.n, n_tiles * c.tile_n))
        total += p.batch * p.m * p.n * p.out_dtype.itemsize
        total += max(once, waves * wave) if once > rates.cache_bytes else once
    return total


def _shared(problems: Sequence[Problem], c: Config, share: _Share, rates: Rates) -> tuple[Shared, bool]:
    """(what one SM gets, whether device memory decides its loads).

    SMs that work share device memory evenly; what several of them load comes from there once, and from L2 to each. C's bytes
    are added to the loads': both go over the same pins.
    """
    loaded = sum(_tiles(p, c) * c.ctas * c.stage_bytes(p.weight_matrices) * -(-p.k // c.tile_k) for p in problems)
    sharing = loaded / max(_memory_bytes(problems, c, share.groups, rates), 1.0)
    working = min(share.groups, share.tiles) * c.ctas
    port, memory = rates.l2_bytes * rates.clock, rates.memory / 1e6 * sharing / working
    macs = min(rates.flops, rates.device_flops / working) / 2e6
    return Shared(min(port, memory), macs), memory < port


def _work(c: Config, tiles: int, steps: int, over: _Share) -> list[tuple[Piece, ...]]:
    """What the CTAs do that the busiest SM, or pair, runs one after the other."""
    if c.schedule == "stream_k":
        found = [share(tiles, steps, over.groups, worker) for worker in range(over.groups)]
        # all have as many steps, give or take one; what tells them apart is the sums that they leave and add up
        return [max(found, key=lambda work: sum(p.parts * p.last + 1 for p in work if p.parts > 1))]
    if c.schedule == "static":
        return [(Piece(steps),) * over.each]
    part = -(-steps // c.split)
    # of the parts of a tile one comes last; of an SM's CTAs the last does, if no other
    return [(Piece(part, c.split, i % c.split == c.split - 1 or i == over.each - 1),) for i in range(over.each)]


def predict(problem: Problem | GroupedProblem, config: Config, rates: Rates = RATES, form: Form = KERNEL) -> Prediction:
    """The predicted time of one call; raises UnsupportedError where `legal` refuses or the model knows no effect."""
    if isinstance(problem, GroupedProblem):
        raise UnsupportedError("grouped problems have no Blackwell kernel yet; predict_launch takes a list of dense problems")
    return predict_launch([problem], config, rates, form)


def predict_launch(
    problems: Sequence[Problem], config: Config, rates: Rates = RATES, form: Form = KERNEL, processors: int | None = None
) -> Prediction:
    """The predicted time of one launch over the tiles of several dense problems of one K, as a plain grouped GEMM has them.

    processors: SMs that a static schedule fills, or all. Raises as `predict`, and ValueError for no problem or several K.
    """
    shapes = {(p.k, p.weight_matrices) for p in problems}
    if len(shapes) != 1:
        raise ValueError(f"problems: expected one or more of one K and one operation, got {len(shapes)} kinds")
    c, (_, weights) = config, next(iter(shapes))
    describe(c, problems[0], 1, form)  # refuses before anything is computed
    if not (tiles := sum(_tiles(p, c) for p in problems)):
        return Prediction(
            rates.launch_us, "fixed costs", {"launch": rates.launch_us, "fill": 0.0, "main loop": 0.0, "epilogue": 0.0}
        )
    groups = min(processors or rates.processors, rates.processors) // c.ctas
    steps = -(-problems[0].k // c.tile_k)
    over = _Share(groups, tiles * (steps if c.schedule == "stream_k" else c.split))
    shared, by_memory = _shared(problems, c, over, rates)
    programs = [describe(c, problems[0], 1, form, work) for work in _work(c, tiles, steps, over)]
    lead = rates.pdl_us if c.pdl else 0.0
    run = simulate(programs, rates, shared, _resident(c, weights), lead)
    return _prediction(run, rates, lead, by_memory)


def _prediction(run: Run, rates: Rates, lead: float, by_memory: bool) -> Prediction:
    launch, main = rates.launch_us - lead, run.last_mma - run.first_mma
    parts = {"launch": launch, "fill": run.first_mma, "main loop": main, "epilogue": run.end - run.last_mma}
    us = launch + run.end
    loads, tensor = run.busy[LOAD], run.busy[MMA]
    if max(loads, tensor, main) < us / 2:
        bound = "fixed costs"
    elif tensor >= max(loads, _SATURATED * main):
        bound = "tensor core"
    elif loads >= _SATURATED * main:
        bound = "device memory" if by_memory else "L2 to SM"
    else:
        bound = "copy latency"
    return Prediction(us, bound, parts, {engine: busy / run.end for engine, busy in run.busy.items() if busy})
