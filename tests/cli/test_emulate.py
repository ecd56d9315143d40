"""`glu4 emulate`: clean runs and found races, reports that repeat, limits, and one line for each unusable input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emulator.runner import module
from emulator.test_launch import ENDLESS, RACY
from glu4.cli import emulate as command
from glu4.cli import main

DOCS = Path(__file__).parents[2] / "docs" / "emulator.md"
SECTION = "## Use it on your own kernel"
POINTER = ".reg .b64 %out; ld.param.b64 %out, [p_out];\n"
# each thread takes a ticket: clean, but who gets which depends on the schedule
TICKETS = """.reg .b32 %t, %x; .reg .b64 %at; mov.u32 %t, %tid.x; atom.global.add.u32 %x, [%out], 1;
mul.wide.u32 %at, %t, 4; add.u64 %at, %out, %at; st.global.b32 [%at+4], %x;"""


@pytest.fixture
def glu4(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run the command as its entry point does: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["glu4", "emulate", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture
def example(glu4: Any) -> list[str]:
    """Arguments that run the example's kernel."""
    assert glu4("--example", "demo")[0] == 0
    return ["demo/scale.ptx", "--launch", "demo/launch.json", "--inputs", "demo/in.npz"]


def write(body: str, launch: dict[str, Any] | None = None, **buffers: Any) -> list[str]:
    """Arguments that run a kernel body whose parameter is the buffer out."""
    Path("k.ptx").write_text(module(POINTER + body, ".param .u64 p_out"))
    described = {"grid": [1], "block": [64], "params": [{"ptr": "out"}], **(launch or {})}
    Path("launch.json").write_text(json.dumps(described))
    np.savez("in.npz", **(buffers or {"out": np.zeros(65, np.uint32)}))
    return ["k.ptx", "--launch", "launch.json", "--inputs", "in.npz"]


# the example and the docs


def test_the_example_is_clean_and_right_and_its_twin_is_not(glu4: Any, example: list[str]) -> None:
    code, out, err = glu4(*example, "--outputs", "out.npz", "--report", "report.json")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "no hazard under 3 schedules"
    x = np.load("demo/in.npz")["X"]
    with np.load("out.npz") as found:
        assert set(found) == {"X", "Y"}
        assert (found["X"] == x).all()
        assert (found["Y"] == x * np.float32(2.5)).all()
    document = json.loads(Path("report.json").read_text())
    assert (document["tool"], document["clean"], document["entry"], document["ctas"]) == ("glu4 emulate", True, "scale", None)
    assert document["version"] == __import__("glu4").__version__
    names = [(s["schedule"], s["seed"], s["hazards"], s["repeat"]) for s in document["schedules"]]
    assert names == [
        ("eager", 0, [], "--schedule eager"),
        ("lazy", 0, [], "--schedule lazy"),
        ("random", 0, [], "--schedule random --seed 0"),
    ]
    assert all(s["instructions"] > 1000 and 0 < s["seconds"] < 60 for s in document["schedules"])

    code, out, err = glu4("demo/racy.ptx", *example[1:], "--report", "report.json")
    assert (code, err) == (3, "")
    assert "data race: " in out
    (hazard,) = json.loads(Path("report.json").read_text())["schedules"][0]["hazards"]
    assert hazard["class"] == "data race"
    lines = Path("demo/racy.ptx").read_text().splitlines()
    sides = sorted(lines[side["line"] - 1].strip() for side in (hazard, hazard["other"]))
    assert sides == ["@%first cp.async.bulk.global.shared::cta.bulk_group [%y], [tile], 4096;", "st.shared.f32 [%at], %value;"]


def test_the_example_overwrites_nothing(glu4: Any, example: list[str]) -> None:
    code, _, err = glu4("--example", "demo")
    assert (code, err) == (2, "glu4: error: demo/scale.ptx: exists; --example writes into a new directory\n")


def blocks(language: str) -> list[str]:
    section = DOCS.read_text().partition(SECTION)[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def plain(text: str) -> str:
    """What a command prints, without what differs from run to run."""
    return re.sub(r"\d+\.\d+ s\b", "0.00 s", text).strip()


def test_the_documentations_commands_and_their_output(tmp_path: Path) -> None:
    """As written, one after another, in a shell."""
    commands, outputs = blocks("sh"), blocks("text")
    assert len(commands) == len(outputs) == 2
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "80"}
    for block, expected, code in zip(commands, outputs, (0, 3)):
        done = subprocess.run(
            ["bash", "-ec", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (code, "")
        assert plain(done.stdout) == plain(expected)
    assert (tmp_path / "demo" / "timeline.html").read_text().startswith("<!")
    (python,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert "data race" in done.stdout


# schedules


def test_schedules_are_eager_lazy_and_then_random(glu4: Any, example: list[str]) -> None:
    def ran(*arguments: str) -> list[tuple[str, int]]:
        code, out, _ = glu4(*example, *arguments, "--json")
        assert code == 0
        return [(s["schedule"], s["seed"]) for s in json.loads(out)["schedules"]]

    assert ran("--schedules", "1") == [("eager", 0)]
    assert ran("--schedules", "5", "--seed", "7") == [("eager", 7), ("lazy", 7), ("random", 7), ("random", 8), ("random", 9)]
    assert ran("--schedule", "random", "--seed", "3") == [("random", 3)]
    assert ran("--schedule", "random", "--seed", "3", "--schedules", "2") == [("random", 3), ("random", 4)]
    assert ran("--schedule", "lazy") == [("lazy", 0)]


def test_a_reported_schedule_repeats(glu4: Any) -> None:
    """Of a kernel whose output depends on the order of its warps."""
    arguments = [*write(RACY, out=np.zeros(64, np.uint32)), "--report", "report.json", "--outputs", "out.npz"]
    seen = {}
    for seed in range(8):
        code, _, _ = glu4(*arguments, "--schedule", "random", "--seed", str(seed))
        assert code == 3
        seen[np.load("out.npz")["out"].tobytes()] = json.loads(Path("report.json").read_text())["schedules"][0]
    assert len(seen) > 1
    for values, first in seen.items():
        glu4(*arguments, *first["repeat"].split())
        again = json.loads(Path("report.json").read_text())["schedules"][0]
        assert np.load("out.npz")["out"].tobytes() == values
        assert again | {"seconds": 0} == first | {"seconds": 0}


def test_the_first_runs_buffers_are_written(glu4: Any) -> None:
    arguments = [*write(TICKETS), "--outputs", "out.npz", "--seed", "1"]
    glu4(*arguments, "--schedule", "eager")
    alone = np.load("out.npz")["out"]
    glu4(*arguments, "--schedules", "6")
    assert (np.load("out.npz")["out"] == alone).all()


def test_results_that_depend_on_the_schedule_are_found(glu4: Any) -> None:
    arguments = write(TICKETS)
    code, out, _ = glu4(*arguments, "--schedules", "12", "--report", "report.json", "--outputs", "out.npz")
    assert code == 3
    assert "results differ between schedules: out[" in out
    document = json.loads(Path("report.json").read_text())
    first, *others = document["schedules"]
    assert first["clean"]
    assert {h["class"] for s in others for h in s["hazards"]} == {"results differ between schedules"}
    bad = next(s for s in others if not s["clean"])
    message = bad["hazards"][0]["message"]
    pattern = rf"out\[(\d+)\] is (\d+) under {bad['schedule']} seed {bad['seed']}, (\d+) under eager"
    ((place, mine, theirs),) = re.findall(pattern, message)
    before = np.load("out.npz")["out"]
    assert before[int(place)] == int(theirs)
    glu4(*arguments, *bad["repeat"].split(), "--outputs", "out.npz")
    after = np.load("out.npz")["out"]
    assert after[int(place)] == int(mine)
    assert (before[: int(place)] == after[: int(place)]).all()
    assert message.endswith(f"{np.count_nonzero(before != after)} of 65 elements differ")
    # each of the runs is clean on its own
    assert glu4(*arguments, *bad["repeat"].split())[0] == 0


def test_unequal_results_of_racing_runs_are_no_finding_of_their_own(glu4: Any) -> None:
    _, out, _ = glu4(*write(RACY, out=np.zeros(64, np.uint32)), "--schedules", "8")
    assert "data race" in out
    assert command.DIFFERENT not in out


def test_equal_hazards_are_shown_once(glu4: Any, example: list[str]) -> None:
    _, out, _ = glu4("demo/racy.ptx", *example[1:], "--schedules", "10")
    assert 1 <= out.count("data race: ") <= 2
    assert re.search(r"\n  in \d+ of 10 schedules; again: --schedule eager\n", out)


# what is run, and its limits


def test_chosen_ctas(glu4: Any, example: list[str]) -> None:
    code, _, _ = glu4(*example, "--ctas", "3;1,0,0", "--outputs", "out.npz", "--report", "report.json")
    assert code == 0
    tiles = np.load("out.npz")["Y"].reshape(4, 1024)
    x = np.load("demo/in.npz")["X"].reshape(4, 1024)
    assert (tiles[[1, 3]] == x[[1, 3]] * np.float32(2.5)).all()
    assert (tiles[[0, 2]].view(np.uint32) == 0xD7D7D7D7).all()
    assert json.loads(Path("report.json").read_text())["ctas"] == [[3], [1, 0, 0]]


def test_buffers_that_are_only_described_start_unwritten(glu4: Any, example: list[str]) -> None:
    code, out, _ = glu4(*example[:3])
    assert code == 3
    assert "uninitialised read: read of memory that nothing wrote" in out


@pytest.mark.parametrize(
    ("limit", "kind"),
    [(["--max-instructions", "5000"], "time limit: stopped after "), (["--time-limit", "0.1"], "time limit: stopped after 0.1 s and "), (["--memory-limit", "0.004"], "memory limit: stopped after ")],
)  # fmt: skip
def test_limits_end_a_run_that_would_not_end(glu4: Any, limit: list[str], kind: str) -> None:
    code, out, err = glu4(*write(ENDLESS), "--schedules", "1", *limit)
    assert (code, err) == (3, "")
    assert kind in out


def test_more_memory_than_allowed_is_refused(glu4: Any, example: list[str]) -> None:
    code, _, err = glu4(*example, "--memory-limit", "0.0001")
    assert code == 2
    assert re.fullmatch(r"glu4: error: demo/launch.json: memory: about .* GiB would be needed, .*; the limit is 0.0001\n", err)


def test_a_buffer_may_have_any_name(glu4: Any) -> None:
    names = ("file", "args", "allow_pickle", "a b", "é")
    params = [{"ptr": "out"}]
    write("ret;", {"params": params, "buffers": {n: {"dtype": "float16", "shape": [2, 3]} for n in ("out", *names)}})
    code, _, err = glu4("k.ptx", "--launch", "launch.json", "--outputs", "out.npz")
    assert (code, err) == (0, "")
    assert set(np.load("out.npz")) == {"out", *names}


def test_a_text_that_ends_in_a_zero_byte_is_ptx(glu4: Any) -> None:
    arguments = write("ret;")
    Path("k.ptx").write_bytes(Path("k.ptx").read_bytes() + b"\0")
    assert glu4(*arguments)[0] == 0


def test_what_a_terminal_would_obey_is_not_printed(glu4: Any) -> None:
    arguments = write(".loc 1 3 0\n.reg .b32 %x; .shared .b32 room; ld.shared.b32 %x, [room];")
    text = Path("k.ptx").read_text().replace(".address_size 64\n", '.address_size 64\n.file 1 "a\x1b[31mb[red].py"\n')
    Path("k.ptx").write_text(text)
    code, out, _ = glu4(*arguments)
    assert code == 3
    assert r"(a\x1b[31mb[red].py:3)" in out


def test_the_timeline_is_of_the_run_that_found_something(glu4: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = glu4(*write(TICKETS), "--schedules", "8", "--timeline", "t.html")
    assert code == 3
    page = Path("t.html").read_text()
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", page)
    schedule = re.search(r"again: --schedule (\w+)(?: --seed (\d+))?", out)
    assert schedule is not None
    assert f"k.ptx: {schedule[1]}, seed {schedule[2] or 0}" in page
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert (
        glu4(*write(TICKETS), "--timeline", "t.html")[2] == "glu4: error: --timeline needs jinja2: pip install 'glu4[report]'\n"
    )


# unusable input

HEAD = ".version 8.6\n.target sm_90\n.address_size 64\n"


@pytest.mark.parametrize(
    ("files", "line", "message"),
    [
        ({}, "absent.ptx --launch launch.json", "absent.ptx: cannot be read (No such file or directory)"),
        ({"k.ptx": HEAD + ".visible .entry k() { frob.b32 %x; }"}, "", "k.ptx: PTX line 4: instruction frob.b32 is not modelled"),
        ({"k.ptx": b"\x7fELF\x02\x01\xff\xfe"}, "", r"k.ptx: PTX line 1: unexpected '\x7fELF"),
        ({"k.ptx": ""}, "", "k.ptx: no .version: this is not PTX"),
        ({"launch.json": '{"grid": [1], }'}, "", "launch.json: not JSON (Expecting property name"),
        ({"launch.json": "[" * 100000}, "", "launch.json: not JSON ("),
        ({"launch.json": "[1]"}, "", "launch.json: expected an object with grid, block, buffers and params"),
        ({"launch.json": '{"grid": [1], "block": [32], "params": [{"ptr": "C"}]}'}, "", "launch.json: params[0]: there is no buffer 'C'; known are out"),
        ({"launch.json": '{"block": [32]}'}, "", "launch.json: grid: missing"),
        ({"launch.json": '{"grid": [1], "block": [32], "entry": "other"}'}, "", "launch.json: entry: expected one of k, got other"),
        ({"launch.json": '{"grid": [1], "block": [32], "smem": 0}'}, "", "launch.json: launch: unknown field smem; known are entry,"),
        ({"launch.json": '{"grid": [1], "block": [32], "params": [{"ptr": "out"}], "buffers": {"out": {"dtype": "float32", "shape": [64]}}}'}, "", "launch.json: buffers: out is given as uint32 [65], and described as float32 [64]"),
        ({"in.npz": b"PK\x03\x04 and no more"}, "", "in.npz: cannot be read as .npz ("),
        ({"in.npz": b"no archive"}, "", "in.npz: cannot be read as .npz ("),
        ({}, "k.ptx --launch launch.json --inputs absent.npz", "absent.npz: cannot be read as .npz (No such file or directory)"),
        ({}, "k.ptx --launch absent.json", "absent.json: cannot be read (No such file or directory)"),
        ({}, "k.ptx --launch .", ".: cannot be read (Is a directory)"),
        ({}, "k.ptx", "give KERNEL.ptx and --launch FILE; --example DIR writes a pair to start from"),
        ({}, "k.ptx --launch launch.json --inputs in.npz --ctas 1,x", "--ctas: expected indices such as 0,0;3,1, got '1,x'"),
        ({}, "k.ptx --launch launch.json --inputs in.npz --ctas 5", "launch.json: ctas: (5, 0, 0) is outside the grid (1, 1, 1)"),
        ({}, "k.ptx --launch launch.json --schedule often", "--schedule: expected one of eager, lazy, random, got 'often'"),
        ({}, "k.ptx --launch launch.json --schedule lazy --schedules 4", "--schedules: there is one schedule lazy; leave --schedules out"),
        ({}, "k.ptx --launch launch.json --outputs no/out.npz", "no/out.npz: there is no directory"),
        ({}, "k.ptx --launch launch.json --inputs in.npz --report .", ".: cannot be written (Is a directory)"),
    ],
)  # fmt: skip
def test_unusable_input_is_one_line_and_exit_code_2(glu4: Any, files: dict[str, Any], line: str, message: str) -> None:
    write("ret;")
    for name, content in files.items():
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    code, out, err = glu4(*(line or "k.ptx --launch launch.json --inputs in.npz").split())
    assert (code, out) == (2, "")
    assert err.startswith(f"glu4: error: {message}")
    assert err.count("\n") == 1


def test_arrays_that_are_no_plain_numbers_are_refused(glu4: Any) -> None:
    arguments = write("ret;")
    with zipfile.ZipFile("in.npz", "w") as out, out.open("out.npy", "w") as member:
        np.lib.format.write_array(member, np.array([{}]), allow_pickle=True)
    code, _, err = glu4(*arguments)
    assert code == 2
    assert err.startswith("glu4: error: in.npz: cannot be read as .npz (Object arrays cannot be loaded")
    np.savez("in.npz", out=np.zeros(4, "S3"))
    assert glu4(*arguments)[2].startswith(
        "glu4: error: launch.json: buffers: out cannot be used: |S3 is not a type of plain numbers"
    )
    np.save("in.npz.npy", np.zeros(4))
    Path("in.npz.npy").rename("in.npz")
    assert "it holds one array without a name; write it with numpy.savez" in glu4(*arguments)[2]
