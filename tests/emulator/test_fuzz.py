"""Damaged PTX and launch descriptions: an error that says where, or a run within its limits, and never anything else."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

from emulator import fuzzing
from emulator.kernels import launches
from emulator.runner import kinds, module, run
from emulator.test_divergence import FUNCTIONS
from emulator.test_tcgen05 import GOOD as TENSOR_MEMORY
from glu4.emulator import LaunchError, PtxError, emulate, load

Kernel = tuple[str, Mapping[str, Any], Mapping[str, Any]]  # text, launch, buffers
EXAMPLE = files("glu4.emulator") / "example"
POINTER = ".reg .b64 %out; ld.param.b64 %out, [p_out];\n"


def small_kernels() -> list[Kernel]:
    """A bulk copy with an mbarrier, tensor memory, calls and recursion, all quick to run."""
    out = np.zeros((128, 2), np.uint32)
    launch = {"grid": [1], "block": [128], "params": [{"ptr": "out"}]}
    calls = """.reg .b32 %t, %r; .reg .b64 %at; mov.u32 %t, %tid.x; mul.wide.u32 %at, %t, 4; add.u64 %at, %out, %at; and.b32 %t, %t, 7;
    { .param .b32 a; .param .b32 b; .param .b32 c; st.param.b32 [a], 3; st.param.b32 [b], %t; call.uni (c), power, (a, b); ld.param.b32 %r, [c]; }
    st.global.b32 [%at], %r;"""
    x = np.random.default_rng(0).standard_normal(4096, np.float32)
    return [
        ((EXAMPLE / "scale.ptx").read_text(), json.loads((EXAMPLE / "launch.json").read_text()), {"X": x}),
        (module(POINTER + TENSOR_MEMORY, ".param .u64 p_out"), launch, {"out": out}),
        (module(POINTER + calls, ".param .u64 p_out", top=FUNCTIONS), {**launch, "block": [32]}, {"out": out}),
    ]


def large_kernel(name: str) -> Kernel:
    text, launch, problem = launches.load(name)
    return text, {**launch, "ctas": [[0, 0, 0]]}, launches.make_inputs(problem)


def tally(kernels: list[Kernel], seeds: Iterable[int]) -> Counter[str]:
    """Outcomes of one mutant of some kernel for each seed; anything else than an outcome fails, naming the seed."""
    found: Counter[str] = Counter()
    for seed in seeds:
        text, launch, buffers = kernels[seed % len(kernels)]
        try:
            found[fuzzing.outcome(fuzzing.mutant(text, seed), launch, buffers, seed)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    return found


def test_kernels_run_before_they_are_damaged() -> None:
    for text, launch, buffers in [*small_kernels(), large_kernel("triton_gemm_e5m2")]:
        result = emulate(load(text), launch, buffers)
        assert not {"time limit", "deadlock", "trap"} & set(kinds(result)), str(result.report)


def test_mutants_of_small_kernels() -> None:
    found = tally(small_kernels(), range(400))
    assert min(found[kind] for kind in ("refused", "clean", "hazards")) > 20  # so that the seeds reach all of the emulator


def test_mutants_of_a_compilers_kernel() -> None:
    assert tally([large_kernel("triton_gemm_e5m2")], range(12)).total() == 12


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(1000, 2000), pytest.param(range(2000, 6000), marks=pytest.mark.long)], ids=str)
def test_many_mutants_of_small_kernels(seeds: range) -> None:
    assert tally(small_kernels(), seeds).total() == len(seeds)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 12), marks=pytest.mark.long)], ids=str)
def test_mutants_of_every_compilers_kernel(seeds: range) -> None:
    for i, name in enumerate(launches.names()):
        assert tally([large_kernel(name)], [100 * i + seed for seed in seeds]).total() == len(seeds)


def test_damaged_launches() -> None:
    """Each is refused with a LaunchError, or runs."""
    kernels = [*small_kernels(), large_kernel("triton_gemm_blocked")]
    programs = [load(text) for text, _, _ in kernels]
    refused = 0
    for seed in range(600):
        which = seed % 3 if seed % 50 else 3
        _, launch, buffers = kernels[which]
        changed = fuzzing.damaged(launch, seed)
        try:
            with fuzzing.alarm(30):
                emulate(programs[which], changed, buffers, max_instructions=3000, memory_limit=1 << 28)
        except LaunchError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error} of {changed}") from error
    assert 100 < refused < 580


def test_a_hang_or_a_stray_exception_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, by faults planted in what it calls."""
    kernel = small_kernels()[0]
    monkeypatch.setattr(fuzzing, "load", lambda text: time.sleep(30))
    with pytest.raises(TimeoutError, match="still running after 1 s"):
        fuzzing.outcome(*kernel, seed=0, hang=1)
    monkeypatch.setattr(fuzzing, "load", lambda text: text.no_such_attribute)
    with pytest.raises(AssertionError, match="seed 7: AttributeError"):
        tally([kernel], range(7, 8))


def test_mutants_repeat_by_seed_and_differ() -> None:
    text = small_kernels()[0][0]
    made = [fuzzing.mutant(text, seed) for seed in range(200)]
    assert made == [fuzzing.mutant(text, seed) for seed in range(200)]
    assert len({*made, text}) > 150


# what fuzzing has found


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %x, [%at+1.5];", "expected an integer constant"),
        ("ld.global.b32 %x, [%at+1e400];", "expected an integer constant"),
        ("mov.u32 %x, 99999999999999999999;", "integer 99999999999999999999 does not fit 64 bits"),
        ("ld.global.b32 %w, [%at];", "register %w is .b128, expected 32 bits"),
        ("st.global.b64 [%at], %w;", "register %w is .b128, expected 64 bits"),
        (f"mov.u32 %x, {'9' * 5000};", "integer 9{80} does not fit 64 bits"),
    ],
)
def test_operands_out_of_range(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        load(module(".reg .b32 %x; .reg .b64 %at; .reg .b128 %w;\n" + body))


@pytest.mark.parametrize(
    ("top", "message"),
    [
        (".global .b32 x[1e400];", "expected an integer constant"),
        (".global .b32 x = 1e400;", "PTX line 4: inf in an array of integers"),
    ],
)
def test_variables_with_constants_out_of_range(top: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        load(module("ret;", top=top))


def test_constants_of_another_width() -> None:
    top = ".global .f16 x[2] = {0f3f800000, 0d7ff0000000000000}; .global .b64 y = x - 0x7fffffffffffffff;"
    program = load(module(".reg .f32 %x; mov.f32 %x, 1e300; ret;", top=top))
    assert program.module.variables["x"].data == np.array([1, np.inf], np.float16).tobytes()
    assert emulate(program, {"grid": [1], "block": [32]}).report.clean


def test_offsets_wrap_at_64_bits() -> None:
    r = run("ld.global.b32 %r, [%a+0xfffffffffffffffc]; st.global.b32 [%a], %r;", {"a": [1]}, declarations=".reg .b32 %r;")
    assert kinds(r) == ["out of bounds"]


def test_a_float_in_a_wider_register_is_its_low_half() -> None:
    body = ".reg .b64 %v; .reg .f32 %d; mov.b64 %v, 0x123456783fc00000; cvt.rpi.f32.f32 %d, %v; st.global.f32 [%out], %d;"
    assert run(body, {"out": np.zeros(1, np.float32)}).buffers["out"] == 2.0


LOOP = """.reg .b32 %t, %x, %i; .reg .pred %q; .reg .b64 %at, %o; mov.u32 %t, %tid.x; mov.u32 %i, 0;
L: add.u32 %x, %i, %t; and.b32 %x, %x, 63; mul.wide.u32 %o, %x, 4; add.u64 %at, %a, %o; ld.global.b32 %x, [%at]; add.u32 %i, %i, 1;
setp.lt.u32 %q, %i, 1000; @%q bra L;"""


def test_what_is_kept_of_a_loops_reads_is_bounded() -> None:
    """Each byte is read a thousand times by changing lanes that never meet."""
    monitor = run(LOOP, {"a": np.zeros(64, np.uint32)}).machine.monitor
    assert len(monitor.records) > 1000
    assert max(map(len, monitor.sets)) < 20


APART = """.shared .align 8 .b64 bar; .shared .b32 room; .reg .b32 %t, %x, %i; .reg .pred %p, %q; mov.u32 %t, %tid.x; mov.u32 %i, 0; setp.ne.u32 %p, %t, 0;
@!%p mbarrier.init.shared.b64 [bar], 31; bar.warp.sync 0xffffffff; @%p bra Other;
L: st.shared.b32 [room], %i; ld.shared.b32 %x, [room]; add.u32 %i, %i, 1; setp.lt.u32 %q, %i, 1000; @%q bra L; bra Meet;
Other: mbarrier.arrive.shared.b64 _, [bar]; add.u32 %i, %i, 1; setp.lt.u32 %q, %i, 100; @%q bra Other; Meet: bar.sync 0;"""


@pytest.mark.parametrize(("name", "seed"), [("eager", 0), ("lazy", 0), ("random", 1), ("random", 2)])
def test_a_lane_does_not_race_with_itself_while_others_arrive(name: str, seed: int) -> None:
    assert run(APART, schedule_name=name, seed=seed).report.clean
    race = APART.replace("Other: ", "Other: st.shared.b32 [room], %i; ")  # and with the others it does
    assert "data race" in kinds(run(race, schedule_name=name, seed=seed))


def test_texts_that_nest_or_never_end() -> None:
    rng = random.Random(0)
    for opening in ("{", "(", "[", "-", "!", "~", "(.s64)", '"', "/*", "@", ".reg .b32 %r<70000>;"):
        text = module(f"mov.u32 %x, {opening * 20000};" if opening[0] != "." else opening * 3)
        with pytest.raises(PtxError), fuzzing.alarm(20):
            load(text[: rng.randrange(len(text) // 2, len(text))])
