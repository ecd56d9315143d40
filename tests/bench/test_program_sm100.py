"""The model's program of a CTA is what the compiled kernel does in the emulator, operation by operation."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from glu4.backends.blackwell.config import Config
from glu4.bench.program_sm100 import COPY, LOAD, MMA, TMA_STORE, TMEM, Op, Program, check_known, describe
from glu4.errors import UnsupportedError
from glu4.problem import Problem

PROCESSORS = 4  # as in backends.blackwell.kernels
# configuration, whether there are two matrices, tiles of the first CTA or pair
CONFIGS: dict[str, tuple[Config, bool, int]] = {
    "one CTA": (Config(stages=2), True, 1),
    "by matrix, separate": (Config(tile_n=64, stages=3, order="by_matrix", barriers="separate", load_width=16), True, 1),
    "n 32, k 128": (Config(tile_n=32, tile_k=128, stages=4, load_width=8, silu="tanh"), True, 1),
    "published": (Config(2, 256, 64, stages=3, barriers="separate", gate_first=2, collector=True), True, 1),
    "pair": (Config(2, 256, 128, stages=2, load_width=64), True, 1),
    "static": (Config(2, 256, 64, stages=2, schedule="static", pdl=True, early_weights=True, store="tma"), True, 3),
    "gate first, static": (Config(tile_n=64, stages=3, gate_first=2, schedule="static", collector=True), True, 2),
    "linear": (Config(tile_n=256, stages=2, load_width=64, store="tma"), False, 1),
}
STEPS = (1, 5)  # fewer than stages and more; the program is a formula of them


def problem(config: Config, dual: bool, tiles: int, steps: int) -> Problem:
    """One tile, or `tiles` for each of the CTAs or pairs that the tests' device holds."""
    columns = config.tile_n * tiles * (PROCESSORS // config.ctas if tiles > 1 else 1)
    return Problem(config.tile_m, columns, config.tile_k * steps, operation="dual_gemm" if dual else "linear")


def described(name: str, steps: int) -> Program:
    config, dual, tiles = CONFIGS[name]
    return describe(config, problem(config, dual, tiles, steps), tiles)


def sequence(ops: tuple[Op, ...]) -> list[tuple[Any, ...]]:
    """Waits for mbarriers, arrivals at them, and issues with what they move."""
    found: list[tuple[Any, ...]] = []
    for op in ops:
        if op.kind == "issue" and op.unit != "stores":
            found.append(("issue", op.unit, op.bytes, op.macs))
        elif op.kind in ("wait", "arrive") and op.signal[0] not in ("front", "columns", "stored"):
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
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("cutlass") is None:
        pytest.skip("needs CuTe DSL to compile the Blackwell kernels")
    from glu4.backends.blackwell.emulation import export
    from glu4.backends.blackwell.spec import KernelSpec

    specs = [KernelSpec.of(config, torch.float16, dual) for config, dual, _ in CONFIGS.values()]
    return dict(zip(CONFIGS, export(specs, tmp_path_factory.mktemp("kernels"))))


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
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", STEPS)
def test_program_is_the_recording_of_the_compiled_kernel(kernels: dict[str, Any], name: str, steps: int) -> None:
    recording, program = recorded(kernels[name], name, steps), described(name, steps)
    assert of_warp(recording, 5) == sequence(program.roles["load"])
    assert of_warp(recording, 4) == sequence(program.roles["multiply"])
    # the program's epilogue is of four warps at once; a TMA store is one thread's
    written = [
        e if e[0] != "issue" or e[1] == TMA_STORE else (*e[:2], e[2] // 4, e[3]) for e in sequence(program.roles["write"])
    ]
    assert epilogue(of_warp(recording, 0), written) == written


def epilogue(found: list[tuple[Any, ...]], like: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Without what ends a pair: the arrival at and the wait for the barrier of both CTAs that frees tensor memory."""
    return found[: len(like)] if found[len(like) :] in ([], [("arrive",), ("wait",)]) else found


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_instructions_of_the_epilogue_are_near_the_recording(kernels: dict[str, Any], name: str) -> None:
    """Within 15 %: the model has one number for each element and one for each piece; registers and addresses vary."""
    recording, program = recorded(kernels[name], name, 1), described(name, 1)
    found: dict[str, float] = defaultdict(float)
    for trace in (t for t in recording.traces if t.cta == (0, 0, 0) and t.warp == 0):
        reading = False
        for node in trace.nodes:
            reading = reading or (node.kind == "wait" and "tcgen05.wait::ld" in node.text)
            if reading:
                found["special"] += node.counts[1]
                found["all"] += node.counts[0] + node.counts[1]
    runs = [op for op in program.roles["write"] if op.kind == "run"]
    assert sum(op.special for op in runs) == pytest.approx(found["special"], rel=0.01), (
        "static schedules divide for their tiles"
    )
    assert sum(op.instructions for op in runs) == pytest.approx(found["all"], rel=0.15)
