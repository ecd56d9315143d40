"""The model's program of a CTA is what the compiled kernel does in the emulator, operation by operation."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from glu4.backends.blackwell.config import Config
from glu4.bench.program_sm100 import (
    ASK,
    COPY,
    GATHER,
    LEAVE,
    LOAD,
    MMA,
    TMA_STORE,
    TMEM,
    Op,
    Piece,
    Program,
    check_known,
    describe,
    share,
)
from glu4.errors import UnsupportedError
from glu4.problem import Problem

PROCESSORS = 4  # as in backends.blackwell.kernels
# configuration, whether there are two matrices, tiles of the first CTA or pair, of stream-K those of all
CONFIGS: dict[str, tuple[Config, bool, int]] = {
    "one CTA": (Config(stages=2), True, 1),
    "by matrix, separate": (Config(tile_n=64, stages=3, order="by_matrix", barriers="separate", load_width=16), True, 1),
    "published": (Config(2, 256, 64, stages=3, barriers="separate", gate_first=2, collector=True), True, 1),
    "static": (Config(2, 256, 64, stages=2, schedule="static", pdl=True, early_weights=True, store="tma"), True, 3),
    "linear": (Config(tile_n=256, stages=2, load_width=64, store="tma"), False, 1),
    "split": (Config(tile_n=64, stages=2, split=2, store="tma"), True, 1),
    "stream-K": (Config(tile_n=64, stages=2, load_width=16, schedule="stream_k"), True, 7),
    "single": (Config(tile_n=64, stages=3, order="by_matrix", warps="single"), True, 1),
}
# what these hold in other numbers; too long for CI
LONG: dict[str, tuple[Config, bool, int]] = {
    "n 32, k 128": (Config(tile_n=32, tile_k=128, stages=4, load_width=8, silu="tanh"), True, 1),
    "pair": (Config(2, 256, 128, stages=2, load_width=64), True, 1),
    "gate first, static": (Config(tile_n=64, stages=3, gate_first=2, schedule="static", collector=True), True, 2),
    "stream-K, linear pair": (Config(2, 256, 64, stages=3, schedule="stream_k", load_width=64, store="tma"), False, 3),
    "single, one stage": (Config(tile_n=32, stages=1, warps="single", schedule="static", pdl=True), True, 2),
    "single, gate first": (
        Config(
            *(2, 256, 64),
            stages=3,
            barriers="separate",
            gate_first=2,
            pdl=True,
            early_weights=True,
            warps="single",
            schedule="static",
        ),
        True,
        2,
    ),
}
NAMES = [*CONFIGS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]
CONFIGS |= LONG
STEPS = (1, 5)  # fewer than stages and more; the program is a formula of them


def problem(config: Config, dual: bool, tiles: int, steps: int) -> Problem:
    """One tile, or `tiles` for each of the CTAs or pairs that the tests' device holds; `steps` for each part of K."""
    each = PROCESSORS // config.ctas if tiles > 1 and config.schedule != "stream_k" else 1
    operation = "dual_gemm" if dual else "linear"
    return Problem(config.tile_m, config.tile_n * tiles * each, config.tile_k * steps * config.split, operation=operation)


def described(name: str, steps: int, last: bool = True) -> Program:
    """last: whether it comes last of those that share a tile."""
    config, dual, tiles = CONFIGS[name]
    work: tuple[Piece, ...] = (Piece(steps, config.split),) * tiles
    if config.schedule == "stream_k":
        work = share(tiles, steps, PROCESSORS // config.ctas, 0)
    work = tuple(replace(p, last=last or p.parts == 1) for p in work)
    return describe(config, problem(config, dual, tiles, steps), work=work)


_NO_BARRIER = ("front", "columns", "stored", "ticket", "gathered")


def sequence(ops: tuple[Op, ...]) -> list[tuple[Any, ...]]:
    """Waits for mbarriers, arrivals at them, and issues of asynchronous operations with what they move."""
    found: list[tuple[Any, ...]] = []
    for op in ops:
        if op.kind == "issue" and op.unit not in ("stores", LEAVE, ASK, GATHER):
            found.append(("issue", op.unit, op.bytes, op.macs))
        elif op.kind in ("wait", "arrive") and op.signal[0] not in _NO_BARRIER:
            found.append((op.kind,))
    return found


# ---- without CuTe DSL ----


def test_counts_are_formulas_of_the_configuration() -> None:
    counts = described("one CTA", 5).counts()
    assert counts[LOAD] == (30, 5 * Config().stage_bytes(), 0)
    assert counts[COPY] == (60, 60 * 512, 0)
    assert counts[MMA] == (40, 0, 2 * 128 * 128 * 1280)
    assert counts[TMEM] == (8, 2 * 128 * 128 * 4, 0)
    assert counts["stores"] == (4, 128 * 128 * 2, 0)
    assert counts["commit"] == (6, 0, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_wait_is_for_something_that_comes(name: str) -> None:
    for steps in STEPS:
        ops = [op for role in described(name, steps).roles.values() for op in role]
        given = {op.signal for op in ops if op.kind in ("arrive", "issue")} | {("front",)}
        assert {op.signal for op in ops if op.kind == "wait"} <= given


@pytest.mark.parametrize(("tiles", "steps", "workers"), [(7, 5, 4), (1, 9, 4), (3, 1, 8), (64, 28, 74), (6, 4, 3), (2, 2, 4)])
def test_shares_of_stream_k_are_all_steps_of_all_tiles_once(tiles: int, steps: int, workers: int) -> None:
    shares = [share(tiles, steps, workers, worker) for worker in range(workers)]
    counts = [sum(p.steps for p in work) for work in shares]
    assert sum(counts) == tiles * steps
    assert max(counts) - min(counts) <= 1
    assert all(p.steps > 0 for work in shares for p in work)
    found, done, held = [], 0, []
    for piece in (p for work in shares for p in work):
        done += piece.steps
        held.append(piece)
        if done == steps:  # a tile is complete
            assert [p.parts for p in held] == [len(held)] * len(held)
            assert [p.last for p in held] == [True] + [False] * (len(held) - 1)
            found.append(held)
            done, held = 0, []
    assert len(found) == tiles
    assert not held


def test_who_comes_last_adds_up_and_writes_and_others_leave_their_sums() -> None:
    config = Config(tile_n=64, stages=2, split=2, store="tma")
    last, other = (describe(config, Problem(128, 64, 1024), work=[Piece(2, 2, is_last)]).counts() for is_last in (True, False))
    size = 2 * 128 * 64 * 4  # float32 of both matrices
    assert (last[LEAVE][1], last[GATHER][1], last[ASK][0], last[TMA_STORE][1]) == (size, 2 * size, 1, 128 * 64 * 2)
    assert (other[LEAVE][1], GATHER in other, other[ASK][0], TMA_STORE in other) == (size, False, 1, False)


def test_what_is_not_known_is_refused() -> None:
    @dataclass(frozen=True)
    class Wider(Config):
        stream_k: int = 0

    assert describe(Wider(), Problem(128, 128, 512)).steps == 2
    with pytest.raises(UnsupportedError, match="does not know what stream_k 3 does"):
        describe(Wider(stream_k=3), Problem(128, 128, 512))
    odd = Config()
    object.__setattr__(odd, "schedule", "by moonlight")
    with pytest.raises(UnsupportedError, match=r"knows schedule one_wave, static.*, and not by moonlight"):
        check_known(odd)
    with pytest.raises(UnsupportedError, match="128 rows for each CTA, and not tile_m 128"):
        check_known(Config(ctas=2))
    with pytest.raises(UnsupportedError, match=r"99 stages take \d+ bytes of shared memory"):
        describe(Config(stages=99), Problem(128, 128, 512))


# ---- against the emulator ----


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """Compiled a few at a time, once for all workers of a parallel run."""
    if importlib.util.find_spec("cutlass") is None:
        pytest.skip("needs CuTe DSL to compile the Blackwell kernels")
    from backends.blackwell.kernels import Kernels
    from glu4.backends.blackwell.spec import KernelSpec

    assert request.config.cache is not None
    specs = {name: KernelSpec.of(config, torch.float16, dual) for name, (config, dual, _) in CONFIGS.items()}
    return Kernels(specs, request.config.cache.mkdir("blackwell"))


def recorded(kernel: Any, name: str, steps: int) -> Any:
    from backends.blackwell.kernels import run
    from glu4.verify import full_range_case

    config, dual, tiles = CONFIGS[name]
    p = problem(config, dual, tiles, steps)
    result, _ = run(kernel, full_range_case(2, p.m, p.n, p.k, linear=not dual), record=True, hazards=False)
    return result.recording


def of_warp(recording: Any, warp: int) -> list[tuple[Any, ...]]:
    """As `sequence`, of the first CTA."""
    units = {id(u.starts): u for u in recording.units}
    found: list[tuple[Any, ...]] = []
    for node in (n for t in recording.traces if t.cta == (0, 0, 0) and t.warp == warp for n in t.nodes):
        if node.kind == "issue":
            u = units[id(node.gives)]
            if u.kind.endswith(": write"):  # the other half of a store
                continue
            found.append(("issue", u.engine or "commit", u.bytes // len(u.ctas), u.macs // len(u.ctas)))
        elif node.kind in ("wait", "arrive") and all(s.kind == "phase" for s in (*node.needs, *filter(None, [node.gives]))):
            found.append((node.kind,))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", STEPS)
def test_program_is_the_recording_of_the_compiled_kernel(kernels: Mapping[str, Any], name: str, steps: int) -> None:
    recording = recorded(kernels[name], name, steps)
    copies, products = (described(name, steps).roles.get(role) for role in ("load", "multiply"))
    if copies is None or products is None:
        assert of_warp(recording, 4) == sequence(described(name, steps).roles["load and multiply"])
    else:
        assert of_warp(recording, 5) == sequence(copies)
        assert of_warp(recording, 4) == sequence(products)
    # who comes last of those that share a tile depends on the schedule, and this CTA adds up or does not
    assert any(is_written(of_warp(recording, 0), described(name, steps, last)) for last in (True, False))


def is_written(found: list[tuple[Any, ...]], program: Program) -> bool:
    # the program's epilogue is of four warps at once; a TMA store is one thread's
    written = [
        e if e[0] != "issue" or e[1] == TMA_STORE else (*e[:2], e[2] // 4, e[3]) for e in sequence(program.roles["write"])
    ]
    return epilogue(found, written) == written


def epilogue(found: list[tuple[Any, ...]], like: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Without what ends a pair: the arrival at and the wait for the barrier of both CTAs that frees tensor memory."""
    return found[: len(like)] if found[len(like) :] in ([], [("arrive",), ("wait",)]) else found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_instructions_of_the_epilogue_are_near_the_recording(kernels: Mapping[str, Any], name: str) -> None:
    """Within 15 %: the model has one number for each element and one for each piece; registers and addresses vary."""
    config, steps = CONFIGS[name][0], 5 if CONFIGS[name][0].schedule == "stream_k" else 1  # with 1 no tile is shared
    recording = recorded(kernels[name], name, steps)
    found: dict[str, float] = defaultdict(float)
    reading = False
    for trace in (t for t in recording.traces if t.cta == (0, 0, 0) and t.warp == 0):
        for node in trace.nodes:
            reading = reading or (node.kind == "wait" and "tcgen05.wait::ld" in node.text)
            if reading:
                found["special"] += node.counts[1]
                found["all"] += node.counts[0] + node.counts[1]
    # in the emulator's order of CTAs stream-K's first comes last of those that share its tile, a split K's does not
    runs = [op for op in described(name, steps, last=config.split == 1).roles["write"] if op.kind == "run"]
    divisions = 8 if config.schedule in ("static", "stream_k") else 0  # by which these find their tiles
    assert sum(op.special for op in runs) == pytest.approx(found["special"], rel=0.01, abs=divisions)
    assert sum(op.instructions for op in runs) == pytest.approx(found["all"], rel=0.15)
