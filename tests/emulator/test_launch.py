"""Launch descriptions, reports, repeatability and limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from emulator.runner import kinds, module, run
from glu4.emulator.errors import LaunchError
from glu4.emulator.launch import emulate, load

COPY = module(
    """.reg .b64 %a, %b, %o; .reg .b32 %t, %x, %k; ld.param.u64 %a, [a]; ld.param.u64 %b, [b]; ld.param.u32 %k, [k]; mov.u32 %t, %ctaid.x; mov.u32 %x, %tid.x; mad.lo.u32 %t, %t, 32, %x;
    mul.wide.u32 %o, %t, 4; add.u64 %a, %a, %o; add.u64 %b, %b, %o; ld.global.u32 %x, [%a]; mul.lo.u32 %x, %x, %k; st.global.u32 [%b], %x;""",
    ".param .u64 a, .param .u64 b, .param .u32 k",
)
LAUNCH: dict[str, Any] = {
    "entry": "k", "grid": [4, 1, 1], "block": [32, 1, 1], "buffers": {"B": {"dtype": "uint32", "shape": [128]}},
    "params": [{"ptr": "A"}, {"ptr": "B"}, {"u32": 7}],
}  # fmt: skip
A = np.arange(128, dtype=np.uint32)


def test_buffers_in_and_out() -> None:
    r = emulate(COPY, LAUNCH, {"A": A})
    assert r.report.clean
    assert (r.buffers["B"] == 7 * A).all()
    assert (emulate(COPY, LAUNCH, {"A": torch.arange(128, dtype=torch.int32)}).buffers["B"] == 7 * A).all()
    only = emulate(COPY, {**LAUNCH, "ctas": [[2, 0, 0]]}, {"A": A}).buffers["B"]
    assert (only[64:96] == 7 * A[64:96]).all()
    assert (only[:64] == 0xD7D7D7D7).all()


def test_reading_an_unwritten_buffer_is_a_hazard() -> None:
    launch = {**LAUNCH, "buffers": {**LAUNCH["buffers"], "A": {"dtype": "uint32", "shape": [128]}}}
    assert kinds(emulate(COPY, launch)) == ["uninitialised read"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entry": "other"}, "entry: expected one of k, got other"),
        ({"gird": [1]}, "launch: unknown field gird"),
        ({"grid": [0]}, "grid: expected up to three positive integers"),
        ({"block": [2048]}, "block: 2048 threads"),
        ({"cluster": [3]}, "cluster: .* does not divide the grid"),
        ({"dynamic_smem": -1}, "dynamic_smem: expected a number of bytes"),
        ({"dynamic_smem": 400000}, "dynamic_smem: 400000 bytes of shared memory in all"),
        ({"ctas": [[9, 0, 0]]}, "ctas: .* is outside the grid"),
        ({"params": [{"ptr": "A"}]}, "params: k takes 3, got 1"),
        ({"params": [{"ptr": "C"}, {"ptr": "B"}, {"u32": 1}]}, r"params\[0\]: there is no buffer 'C'"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"u32": -1}]}, r"params\[2\]: -1 is not a u32"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"u64": 1}]}, "params: k has 4 bytes, got 8"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"word": 1}]}, r"params\[2\]: unknown kind word"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"bytes": "xy"}]}, r"params\[2\]: bytes are hexadecimal"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"tensor_map": {"buffer": "A"}}]}, r"params\[2\]: tensor_map: missing"),
        ({"buffers": {"B": {"dtype": "nothing", "shape": [1]}}}, "buffers: B needs a dtype and a shape"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        emulate(COPY, {**LAUNCH, **change}, {"A": A})


def test_directives_are_held_to() -> None:
    with pytest.raises(LaunchError, match=r"block: the kernel needs \(64, 1, 1\)"):
        run("ret;", directives=".reqntid 64, 1, 1")
    with pytest.raises(LaunchError, match=r"cluster: the kernel needs \(2, 1, 1\)"):
        run("ret;", directives=".reqnctapercluster 2, 1, 1", launch={"cluster": [1]})


RACY = """.shared .b32 room[64]; .reg .b32 %t, %x, %s; mov.u32 %t, %tid.x; mov.u32 %s, room; mad.lo.u32 %s, %t, 4, %s; st.shared.b32 [%s], %t;
xor.b32 %x, %t, 32; mov.u32 %s, room; mad.lo.u32 %s, %x, 4, %s; ld.shared.b32 %x, [%s]; .reg .b64 %o, %at; mul.wide.u32 %o, %t, 4; add.u64 %at, %out, %o; st.global.b32 [%at], %x;"""


def test_a_schedule_and_seed_repeat_a_run() -> None:
    """Of a kernel whose result depends on the order of its warps."""
    out = {"out": np.zeros(64, np.uint32)}
    seen = set()
    for seed in range(12):
        first, again = (run(RACY, out, launch={"block": [64]}, schedule_name="random", seed=seed) for _ in range(2))
        assert (first.buffers["out"] == again.buffers["out"]).all()
        assert [str(h) for h in first.report.hazards] == [str(h) for h in again.report.hazards]
        seen.add(first.buffers["out"].tobytes())
    assert len(seen) > 1
    with pytest.raises(ValueError, match="schedule: expected one of eager, lazy, random, got often"):
        run(RACY, out, schedule_name="often")


def test_reports_name_lines_sources_and_threads() -> None:
    body = ".loc 1 42 7\n.reg .b32 %x; .shared .b32 room[4];\nld.shared.b32 %x, [room+8];"
    r = run(body, top='.file 1 "kernel.py"', launch={"block": [64]})
    (hazard,) = r.report.hazards
    assert hazard.access is not None
    assert (hazard.access.line, hazard.access.source, hazard.access.address) == (11, "kernel.py:42", "shared[0, 0, 0]+8")
    assert hazard.count == 2
    assert "uninitialised read" in str(r.report)


def test_time_is_limited() -> None:
    r = run(
        ".reg .b32 %x; mov.u32 %x, 0; L: add.u32 %x, %x, 1; st.global.b32 [%out], %x; bra L;",
        {"out": A},
        max_instructions=20000,
    )
    assert "time limit" in kinds(r)


def test_traps_stop_the_kernel() -> None:
    assert kinds(run("trap;")) == ["trap"]


def test_hazards_can_be_left_out() -> None:
    r = run(RACY, {"out": np.zeros(64, np.uint32)}, launch={"block": [64]}, hazards=False)
    assert r.report.clean


def test_a_program_runs_many_times() -> None:
    program = load(COPY)
    for factor in (2, 3):
        launch = {**LAUNCH, "params": [{"ptr": "A"}, {"ptr": "B"}, {"u32": factor}]}
        assert (emulate(program, launch, {"A": A}).buffers["B"] == factor * A).all()
