"""A grouped launch's parameters are what CuTe DSL's own host code passes, and a plan's later launches differ in addresses alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from backends.blackwell.grouped import recording, spec
from backends.blackwell.kernels import Kernels
from backends.blackwell.test_arguments import PLACES, canonical, captured
from glu4.backends.blackwell import arguments
from glu4.backends.blackwell.arguments import Shape
from glu4.backends.blackwell.config import Config
from glu4.backends.blackwell.grouped_config import GroupConfig, Size
from glu4.backends.blackwell.grouped_launch import GroupChoice, GroupPlan, grouped_parameters, grouped_sizes
from glu4.backends.blackwell.grouped_spec import GroupSpec
from glu4.backends.blackwell.spec import KernelSpec
from glu4.compiled.driver import Kernel
from glu4.emulator.capture import CapturedLaunch, capture, pointer, scalar
from glu4.emulator.tensor_map import decode
from glu4.verify.recorder import Recorder

needs_dsl = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs CuTe DSL to compile the kernels")
SIZES: list[Size] = [(130, 136, 288), (40, 261, 544)]
STRIDES = [200, 300]
PLACED = [0x7000_0000_0000 + (i << 36) for i in range(17)]
ADDRESSES = PLACED[:12]  # of two groups' B, A and C, and global scales; behind them of up
GATED = [*PLACED[:4], *PLACED[12:14], PLACED[4], *PLACED[5:9], *PLACED[14:16], PLACED[9], *PLACED[10:12], PLACED[16]]
ACTIVATION = (1, 1.702, 1.0, 7.0)
TESTS = Path(__file__).parents[2]


def host(one: GroupSpec, folder: Path, sizes: list[Size], processors: int) -> CapturedLaunch:
    """The launch of CuTe DSL's host code."""
    environment = {**os.environ, "CUTE_DSL_ARCH": one.arch, "CUTE_DSL_DISABLE_FILE_CACHING": "1"}
    command = [sys.executable, "-m", "backends.blackwell.grouped_host", json.dumps(one.to_dict()), str(folder)]
    made = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    given = [pointer(a) for a in PLACED] + [scalar("i64", s) for s in STRIDES]
    given += [scalar("i32", v) for size in sizes for v in size] + [scalar("i32", ACTIVATION[0])]
    given += [scalar("f32", v) for v in ACTIVATION[1:]] + [scalar("i32", processors), pointer(0)]
    (launch,) = capture(folder / f"{one.name}.o", (folder / f"{one.name}.ptx").read_text(), given)
    return launch


HOSTS: dict[str, dict[str, Any]] = {
    "one CTA": {"stages": 2},
    "n 32, k 128": {"tile_n": 32, "tile_k": 128, "schedule": "one_wave"},
    "pair, n 64": {"ctas": 2, "tile_m": 256, "tile_n": 64, "schedule": "launch_control", "pdl": True, "store": "direct"},
    "pair, n 256": {"ctas": 2, "tile_m": 256, "tile_n": 256, "stages": 2},
    "gated": {"gated": True, "tile_n": 64, "stages": 2},
    "gated, pair": {"gated": True, "ctas": 2, "tile_m": 256, "stages": 2},
}


@pytest.mark.slow
@needs_dsl
@pytest.mark.parametrize("name", HOSTS)
def test_parameters_are_those_of_the_host_code(tmp_path: Path, name: str) -> None:
    one = spec(2, **HOSTS[name])
    c, processors = one.config, 5
    launch = host(one, tmp_path, SIZES, processors)
    with recording():
        ours = grouped_parameters(c, SIZES, STRIDES, GATED if c.gated else ADDRESSES, ACTIVATION)
    assert [len(b) for b in ours] == [len(b) for b in launch.params] == grouped_sizes(c)
    for i, (mine, theirs) in enumerate(zip(ours[2:], launch.params[2:], strict=True)):  # two tiled MMAs hold nothing
        assert canonical(mine) == canonical(theirs), f"parameter {i + 2}"
    assert launch.grid == c.grid(SIZES, processors)
    assert (launch.block, launch.cluster) == ((192, 1, 1), (2, 1, 1) if c.ctas == 2 else None)
    assert launch.dynamic_smem == c.shared_bytes


@pytest.mark.slow
@needs_dsl
def test_a_pair_splits_two_atoms_of_scales_along_rows(compiled: Path) -> None:
    """The dense kernel's parameters too, for one matrix and 256 columns of C."""
    one = KernelSpec(Config(2, 256, 256, stages=2), "f16", dual=False)
    shape = Shape(1, 130, 300, 544, 304, 0)
    launch = captured(Kernels({"linear, pair, n 256": one}, compiled), "linear, pair, n 256", shape, 0)
    with recording():
        ours = arguments.parameters(one, shape, PLACES, 0, (1.702, 1.0, 7.0))
    assert [canonical(b) for b in ours[2:]] == [canonical(b) for b in launch.params[2:]]
    assert arguments.scale_box(one.config, 1) == (4, 1)
    assert arguments.scale_box(Config(2, 256, 64), 1) == (2, 1)


# ---- without CuTe DSL ----


def remembering(recorder: Recorder, config: GroupConfig) -> Kernel:
    """A kernel without code, whose launches are recorded."""
    listed = ",".join(
        f".param .align {64 if size == 128 else 4} .b8 p{i}[{size}]" for i, size in enumerate(grouped_sizes(config))
    )
    recorder.remember(b"code", f".version 8.8\n.target sm_100a\n.address_size 64\n.visible .entry f({listed})\n{{ ret; }}")
    description = {"entry": "f", "params": grouped_sizes(config), "threads": 192, "shared_bytes": 1000, "pdl": config.pdl}
    return Kernel(b"code", description, [f"{s}s" for s in grouped_sizes(config)], cluster=(config.ctas, 1, 1))


def test_a_later_launch_has_its_own_addresses_and_no_other_difference() -> None:
    config = GroupConfig(2, stages=2)
    with recording() as recorder:
        plan = GroupPlan(GroupChoice(remembering(recorder, config), config, 148), SIZES, STRIDES)
        moved = [a + 4096 * (i + 1) for i, a in enumerate(ADDRESSES)]
        for addresses in (ADDRESSES, moved, ADDRESSES):
            plan.launch(-1, 0, addresses)
        first, second, third = (launch for _, launch in recorder.launches)
        assert list(second.params[2:]) == grouped_parameters(config, SIZES, STRIDES, moved)[2:]
        assert first.params == third.params
    assert first.grid == (7, 1, 1)
    assert [decode(p).address for p in second.params if len(p) == 128] == [moved[i] for i in (0, 1, 2, 3, 5, 6, 7, 8)]


def test_a_later_launch_of_two_weights() -> None:
    config = GroupConfig(2, gated=True, stages=2)
    with recording() as recorder:
        plan = GroupPlan(GroupChoice(remembering(recorder, config), config, 148), SIZES, STRIDES, ACTIVATION)
        moved = [a + 4096 * (i + 1) for i, a in enumerate(GATED)]
        for addresses in (GATED, moved):
            plan.launch(-1, 0, addresses)
        assert list(recorder.launches[1][1].params[2:]) == grouped_parameters(config, SIZES, STRIDES, moved, ACTIVATION)[2:]


def test_threads_do_not_share_memory_of_a_launch() -> None:
    config = GroupConfig(2, stages=2)
    with recording() as recorder:
        plan = GroupPlan(GroupChoice(remembering(recorder, config), config, 148), SIZES, STRIDES)

        def launches(shift: int) -> None:
            for _ in range(50):
                plan.launch(-1, shift, [a + shift for a in ADDRESSES])

        threads = [threading.Thread(target=launches, args=(64 * i,)) for i in range(1, 5)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(recorder.launches) == 200
    for _, launch in recorder.launches:
        (shift,) = {decode(p).address - a for p, a in zip(launch.params[2:6], ADDRESSES)}
        assert int.from_bytes(launch.params[-1], "little") == ADDRESSES[-1] + shift


def test_empty_groups_have_maps_that_a_driver_takes() -> None:
    config = GroupConfig(2)
    with recording():
        values = grouped_parameters(config, [(0, 8, 64), (8, 0, 64)], [8, 8], ADDRESSES)
    assert [decode(p).global_shape for p in values if len(p) == 128][2:6] == [(64, 1), (256, 1, 1), (64, 1), (256, 1, 1)]


def test_a_map_that_the_driver_refuses_is_an_error() -> None:
    with recording(), pytest.raises(RuntimeError, match=r"cuTensorMapEncodeTiled of \(40, 136\) with strides \(20,\) and box"):
        grouped_parameters(GroupConfig(2), [(130, 136, 40), SIZES[1]], STRIDES, ADDRESSES)
