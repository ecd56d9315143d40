"""Launch descriptions, reports, repeatability and limits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import glu4.emulator
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
        ({"ctas": [[-1]]}, "ctas: .* is outside the grid"),
        ({"ctas": [["x"]]}, "ctas: expected up to three integers for each CTA, got"),
        ({"ctas": "0,0"}, "ctas: expected a list of indices"),
        ({"ctas": []}, "ctas: expected a list of indices"),
        ({"grid": [1, 70000]}, "grid: .* is more than the device allows"),
        ({"grid": "4"}, "grid: expected up to three integers, got '4'"),
        ({"grid": [4.5]}, "grid: expected up to three integers"),
        ({"grid": [True]}, "grid: expected up to three integers"),
        ({"grid": None}, "grid: missing"),
        ({"block": [1, 1, 65]}, "block: 65 threads, more than"),
        ({"dynamic_smem": True}, "dynamic_smem: expected a number of bytes, got True"),
        ({"dependent": "A"}, "dependent: expected a list"),
        ({"dependent": ["Z"]}, "dependent: there is no buffer 'Z'"),
        ({"params": "abc"}, "params: k takes 3, got 3"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"f32": 1e300}]}, r"params\[2\]: 1e\+300 is not a f32"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"u32": 1, "i32": 1}]}, r"params\[2\]: u32 and i32 in one"),
        ({"params": [{"ptr": "A", "offest": 4}, {"ptr": "B"}, {"u32": 1}]}, r"params\[0\]: ptr and offest in one"),
        ({"params": [{"ptr": "A", "offset": "4"}, {"ptr": "B"}, {"u32": 1}]}, r"params\[0\]: offset: expected a number of bytes"),
        ({"params": [{"ptr": ["A"]}, {"ptr": "B"}, {"u32": 1}]}, r"params\[0\]: there is no buffer \['A'\]"),
        ({"params": [7, {"ptr": "B"}, {"u32": 1}]}, r"params\[0\]: expected an object, got 7"),
        ({"params": [{"pack": 5}, {"ptr": "B"}, {"u32": 1}]}, r"params\[0\]: pack: expected a list"),
        ({"params": [{"tensor_map": 3}, {"ptr": "B"}, {"u32": 1}]}, r"params\[0\]: tensor_map: expected an object"),
        ({"params": [{"tensor_map": {"swizle": "none"}}, {"ptr": "B"}, {"u32": 1}]}, r"params\[0\]: tensor_map: unknown field swizle"),
        ({"params": [{"tensor_map": {"buffer": "A", "element_type": "u8", "global_shape": 4, "box_shape": [1]}}, {"ptr": "B"}, {"u32": 1}]}, "global_shape: expected a list"),
        ({"params": [{"tensor_map": {"buffer": "A", "element_type": 8, "global_shape": [4], "box_shape": [1]}}, {"ptr": "B"}, {"u32": 1}]}, "element_type: expected a name"),
        ({"params": [{"tensor_map": {"buffer": "A", "element_type": "u9", "global_shape": [4], "box_shape": [1]}}, {"ptr": "B"}, {"u32": 1}]}, "element_type 'u9' is unknown"),
        ({"buffers": ["B"]}, "buffers: expected an object with a dtype and a shape for each name"),
        ({"buffers": {"B": {"dtype": "object", "shape": [1]}}}, "buffers: B needs .* not a type of plain numbers"),
        ({"buffers": {"B": {"dtype": ">u4", "shape": [1]}}}, "buffers: B needs .* native byte order"),
        ({"buffers": {"B": {"dtype": "uint8", "shape": [-1]}}}, "buffers: B: shape: expected up to 32 sizes"),
        ({"buffers": {"B": {"dtype": "uint8", "shape": [1 << 50]}}}, r"memory: about 1.15e\+07 GiB would be needed"),
        ({"buffers": {"A": {"dtype": "uint32", "shape": [64]}}}, r"buffers: A is given as uint32 \[128\], and described as uint32 \[64\]"),
        ({"buffers": {"A": {"dtype": "int32", "shape": [128]}}}, r"buffers: A is given as uint32 \[128\], and described as int32 \[128\]"),
        ({"params": [{"ptr": "A"}]}, "params: k takes 3, got 1"),
        ({"params": [{"ptr": "C"}, {"ptr": "B"}, {"u32": 1}]}, r"params\[0\]: there is no buffer 'C'"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"u32": -1}]}, r"params\[2\]: -1 is not a u32"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"u64": 1}]}, "params: k has 4 bytes, got 8"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"word": 1}]}, r"params\[2\]: unknown kind word"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"bytes": "xy"}]}, r"params\[2\]: bytes are hexadecimal"),
        ({"params": [{"ptr": "A"}, {"ptr": "B"}, {"tensor_map": {"buffer": "A"}}]}, r"params\[2\]: tensor_map: missing"),
        ({"buffers": {"B": {"dtype": "nothing", "shape": [1]}}}, "buffers: B needs a dtype and a shape"),
    ],
)  # fmt: skip
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


MOVE = module(
    """.reg .b64 %a, %b, %o; .reg .b32 %x; .reg .b8 %v; ld.param.u64 %a, [a]; ld.param.u64 %b, [b]; mov.u32 %x, %tid.x; cvt.u64.u32 %o, %x;
    add.u64 %a, %a, %o; add.u64 %b, %b, %o; ld.global.u8 %v, [%a]; st.global.u8 [%b], %v;""",
    ".param .u64 a, .param .u64 b",
)


def moved(array: Any, described: str, count: int) -> np.ndarray:
    """The first 64 bytes of an array, through a kernel, as a buffer of a described type."""
    launch = {"grid": [1], "block": [64], "params": [{"ptr": "A"}, {"ptr": "B"}]}
    buffers = {"A": {"dtype": described, "shape": [count]}, "B": {"dtype": described, "shape": [count]}}
    result = emulate(MOVE, {**launch, "buffers": buffers}, {"A": array})
    assert result.report.clean
    assert (result.buffers["A"] == result.buffers["B"]).all()
    return result.buffers["B"]


@pytest.mark.parametrize(
    ("name", "stored"),
    [("bfloat16", "uint16"), ("float8_e4m3fn", "uint8"), ("float8_e5m2", "uint8"), ("float8_e8m0fnu", "uint8"), ("float16", "float16"), ("float32", "float32"), ("int64", "int64"), ("uint16", "uint16")],
)  # fmt: skip
def test_torch_tensors_of_every_type(name: str, stored: str) -> None:
    """Types that NumPy lacks are described by their own name or that of their storage, and come back as storage."""
    count = 64 // np.dtype(stored).itemsize
    raw = torch.randint(0, 100, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor = raw.view(getattr(torch, name))
    for described in (name, stored):
        out = moved(tensor, described, count)
        assert out.dtype == stored
        assert out.tobytes() == raw.numpy().tobytes()


def test_torch_tensors_that_are_views_or_need_gradients() -> None:
    whole = torch.arange(32, dtype=torch.float32, requires_grad=True)
    assert moved(whole[::2], "float32", 16).tolist() == list(range(0, 32, 2))
    assert moved(torch.view_as_complex(torch.ones(8, 2)).conj(), "complex64", 8).tolist() == [1 - 1j] * 8


def test_unusual_arrays() -> None:
    assert moved(list(range(8)), "int64", 8).tolist() == list(range(8))
    opaque = np.arange(32, dtype=np.uint16).view("V2")  # how numpy.load gives the bfloat16 of other packages
    assert moved(opaque, "bfloat16", 32).tolist() == list(range(32))
    assert moved(np.arange(64, dtype=np.float32)[::4], "float32", 16).tolist() == list(range(0, 64, 4))
    r = emulate(MOVE, {"grid": [1], "block": [4], "params": [{"ptr": "A"}, {"ptr": "B"}], "buffers": {"B": {"dtype": "f4", "shape": []}}}, {"A": np.float32(3)})  # fmt: skip
    assert r.buffers["B"].shape == r.buffers["A"].shape == ()
    assert r.buffers["B"] == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1], [1, 2]], "buffers: A cannot be used"),
        (np.array([None]), "buffers: A cannot be used: object is not a type of plain numbers"),
        (np.zeros(4, ">u4"), "native byte order"),
        (np.zeros(4, "u4,u4"), "not a type of plain numbers"),
        ("text", "not a type of plain numbers"),
        (torch.zeros(4, device="meta"), "it is on meta; give a CPU tensor"),
        (torch.eye(3).to_sparse(), "buffers: A cannot be used"),
    ],
)
def test_arrays_that_cannot_be_used(value: Any, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        emulate(COPY, LAUNCH, {"A": value})
    with pytest.raises(LaunchError, match="buffers: expected arrays by name, got list"):
        emulate(COPY, LAUNCH, [value])  # type: ignore[arg-type]


def test_a_chosen_cta_of_the_largest_grid_runs_at_once() -> None:
    body = ".reg .b32 %x, %y; mov.u32 %x, %ctaid.x; mov.u32 %y, %ctaid.z; st.global.v2.b32 [%out], {%x, %y};"
    launch = {"grid": [2**31 - 1, 65535, 65535], "ctas": [[2**31 - 2, 7, 65534]]}
    assert run(body, {"out": np.zeros(2, np.uint32)}, launch=launch).buffers["out"].tolist() == [2**31 - 2, 65534]


ENDLESS = ".reg .b32 %x; mov.u32 %x, 0; L: add.u32 %x, %x, 1; st.global.b32 [%out], %x; bra L;"


def test_seconds_are_limited() -> None:
    r = run(ENDLESS, {"out": A}, time_limit=0.2)
    (hazard,) = (h for h in r.report.hazards if h.kind == "time limit")
    assert hazard.message.startswith("stopped after 0.2 s and ")
    assert 0.2 < r.report.seconds < 10


def test_memory_is_limited() -> None:
    r = run(ENDLESS, {"out": A}, memory_limit=4 << 20)
    (hazard,) = (h for h in r.report.hazards if h.kind == "memory limit")
    assert "accesses, about 4 MiB, are kept" in hazard.message
    for text, options in (
        ({"declarations": ".local .b8 deep[100000000];"}, {}),
        ({"declarations": ".reg .b64 %many<100000>;", "launch": {"block": [1024]}}, {"memory_limit": 1 << 30}),
        ({"top": "".join(f".global .b8 room{i}[200000000]; " for i in range(8))}, {}),
        ({"launch": {"grid": [8], "cluster": [8], "dynamic_smem": 200000}}, {"memory_limit": 10 << 20}),
    ):
        with pytest.raises(LaunchError, match=r"memory: about .* GiB would be needed, .* of it for buffers; the limit is"):
            run("ret;", **text, **options)
    with pytest.raises(LaunchError, match=r"memory: about 4\.3 GiB would be needed, 4\.3 of it for buffers; the limit is 4"):
        emulate(COPY, {**LAUNCH, "buffers": {"B": {"dtype": "uint8", "shape": [400 << 20]}}}, {"A": A}, memory_limit=4 << 30)


def test_a_report_as_a_document() -> None:
    r = run(".loc 1 42 7\n" + RACY, {"out": np.zeros(64, np.uint32)}, top='.file 1 "kernel.py"', launch={"block": [64]})
    document = r.report.to_dict()
    assert (document["schedule"], document["seed"], document["clean"]) == ("eager", 0, False)
    assert {h["class"] for h in document["hazards"]} == {"data race", "uninitialised read"}
    found = next(h for h in document["hazards"] if h["class"] == "data race")
    assert (found["source"], found["cta"], found["count"]) == ("kernel.py:42", (0, 0, 0), 1)
    sides = {(side["instruction"], side["line"]) for side in (found, found["other"])}
    assert sides == {("st.shared.b32", 11), ("ld.shared.b32", 12)}
    assert {found["warp"], found["other"]["warp"]} == {0, 1}
    assert found["thread"] // 32 == found["warp"]
    writer = next(side["warp"] for side in (found, found["other"]) if side["instruction"] == "st.shared.b32")
    assert found["address"] == found["other"]["address"] == f"shared[0, 0, 0]+{128 * writer}"
    empty = run("trap;").report.to_dict()["hazards"][0]
    assert set(empty) == set(found)


def test_the_packages_names() -> None:
    assert glu4.emulator.emulate is emulate
    assert {*glu4.emulator.__all__} <= {*dir(glu4.emulator)}
    assert all(getattr(glu4.emulator, name) for name in glu4.emulator.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'emulator'"):
        glu4.emulator.emulator  # noqa: B018


def test_importing_the_package_imports_no_machine() -> None:
    code = "import sys, glu4.emulator; before = 'glu4.emulator.machine' in sys.modules; glu4.emulator.load; print(before, 'glu4.emulator.machine' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
