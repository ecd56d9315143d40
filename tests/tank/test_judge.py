"""The judge: every way in which an entry can fail becomes a verdict, and the round goes on; real processes throughout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fake_hopper as fake
from glu4.tank import judge as judging
from glu4.tank import run as running
from glu4.tank.clock import Wall
from glu4.tank.judge import judge
from glu4.tank.ledger import Ledger, LedgerError, Verdict
from glu4.tank.round import Round, find, parse, read
from glu4.tank.run import again, run_round
from glu4.tank.stages import StagesSpec
from glu4.tank.worker import Stopped, timed

RIGHT = """
import glu4
def prepare(x, gate, up, out):
    weights = glu4.GatedWeights(gate, up)
    return lambda: glu4.dual_gemm(x, weights, out=out, backend="portable")
"""
KERNELS = {
    "right": RIGHT,
    "single": """
def prepare(x, gate, up, out):
    return lambda: out.copy_(x.double() @ gate.dequantize(out.dtype).double().mT)
""",
    "crash": "import os, signal\ndef prepare(*_):\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
    "noise": "import os, sys\ndef prepare(*_):\n    os.write(1, bytes(range(256)) * 9999)\n    print('{')\n    sys.exit(0)\n",
    "hang": "import time\ndef prepare(*_):\n    time.sleep(1000)\n",
    "hog": "import torch\ndef prepare(*_):\n    return torch.ones(1 << 32)\n",
    "state": "import torch\ntorch.set_default_dtype(torch.float64)\n" + RIGHT,
    "clock": "import time\ntime.perf_counter = lambda: 0.0\n" + RIGHT,
    "judge": "import glu4.verify.checker as c\nc.check.__code__ = (lambda *a, **k: None).__code__\n" + RIGHT,
    "inputs": RIGHT.replace("return lambda:", "gate.codes.zero_()\n    return lambda:"),
    "syntax": "def prepare(:\n",
    "nothing": "x = 1\n",
    "raises": "def prepare(*_):\n    raise KeyError('tile')\n",
    "shape": "def prepare(x, gate, up, out):\n    return lambda: out.zero_()\n",
}
EXPECTED = {
    "single": ("wrong result", "computes A@B1 only: second product, SiLU and multiply are missing"),
    "crash": ("crashed", "killed by SIGSEGV"),
    "noise": ("crashed", "SystemExit at line 5"),
    "hang": ("hung", "ran longer than"),
    "hog": ("out of memory", "allocate"),
    "state": ("changed global state", "the default dtype"),
    "clock": ("changed global state", "time.perf_counter"),
    "judge": ("changed global state", "glu4.verify.checker.check"),
    "inputs": ("wrong result", "changed its inputs"),
    "syntax": ("does not compile", "SyntaxError"),
    "nothing": ("crashed", "defines no function prepare"),
    "raises": ("crashed", "KeyError at line 2: 'tile'"),
    "shape": ("wrong result", "never written"),
}
QUICK = ("single", "crash", "judge")


def made(folder: Path, *names: str, limit: float = 120.0) -> Round:
    text = f'title = "t"\ndevice = "cpu"\nshapes = [[8, 32, 64]]\npairs = 6\ntime_limit = {limit}\nmemory_gib = 2\n'
    text += "[baseline]\nconfig = {}\n"
    for name in names:
        (folder / f"{name}.py").write_text(KERNELS[name])
        text += f'[[entries]]\nname = "{name}"\nhypothesis = "h"\nclaimed_speedup = 9.0\nkernel = "{name}.py"\n'
    (folder / "r.toml").write_text(text)
    return read(folder / "r.toml")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXPECTED])
def test_whatever_an_entry_does_is_a_verdict(tmp_path, name):
    r = made(tmp_path, name, limit=30.0 if name == "hang" else 120.0)
    found = judge(r, r.entries[0], "run", "cpu")
    assert (found.verdict.outcome, found.samples) == (EXPECTED[name][0], [])
    assert EXPECTED[name][1] in found.verdict.sentence


def test_a_right_entry_is_timed_beside_the_baseline(tmp_path):
    r = made(tmp_path, "right")
    found = judge(r, r.entries[0], "run", "cpu")
    assert found.verdict.outcome in ("faster", "slower", "no difference")
    assert found.verdict.basis == "measured"
    assert (len(found.samples), [s.shape for s in found.shapes]) == (6, ["8, 32, 64"])
    assert found.verdict.low < found.verdict.speedup < found.verdict.high


def test_the_kernel_that_started_it_all_is_named():
    r = read(find("correct-hopper"))
    found = judge(r, r.entries[0], "run", "emulate").verdict
    assert found.outcome == "wrong result"
    assert found.sentence.startswith("computes A@B1 only: second product, SiLU and multiply are missing")


# ---- without processes ----


def test_a_tile_is_refused_with_the_tools_message_and_the_rule(monkeypatch):
    monkeypatch.setattr(judging.store, "installed_dsl", lambda: judging.store.DSL_VERSION)

    def refuse(*_):
        raise judging.UnsupportedError("error: expects the M-mode to be 128, but got 64")

    monkeypatch.setattr(judging, "export", refuse)
    r = read(find("tiles-blackwell"))
    found = judge(r, r.entries[0], "run", "emulate").verdict
    assert (found.outcome, found.basis) == ("does not compile", "none")
    assert (
        "expects the M-mode to be 128, but got 64; the rule: tile_m 64: a block-scaled MMA of one CTA has 128" in found.sentence
    )
    r = read(find("tiles-hopper"))
    found = judge(r, r.entries[3], "run", "emulate").verdict
    assert (found.outcome, "tokens: expected one of (8, 16" in found.sentence) == ("does not compile", True)


def test_predictions_are_labelled_and_of_the_same_problem():
    r = read(find("stages-blackwell"))
    found = judging._predicted(r, r.entries[0], "run", "emulated")
    assert (found.verdict.basis, found.verdict.low, found.samples) == ("predicted", None, [])
    assert "no b200 has run it" in found.verdict.sentence
    assert [s.floor_us for s in found.shapes] == [judging._floor(r, *shape) for shape in r.shapes]
    r = read(find("streamk-blackwell"))
    found = judging._predicted(r, r.entries[1], "run", "emulated")
    assert (found.verdict.basis, len(found.shapes)) == ("predicted", len(r.shapes)), "stream-K"


REQUEST = {
    "where": "cpu", "backend": "hopper", "x_format": "float16", "shapes": [[16, 64, 128]], "seed": 0, "pairs": 5,
    "baseline": {"kind": "config", "fields": {"tokens": 8, "rows": 1}, "path": None},
    "entry": {"kind": "config", "fields": {"tokens": 16, "rows": 1, "stages": 3}, "path": None},
}  # fmt: skip


@pytest.fixture
def hopper(monkeypatch):
    plain = fake.spec_from_dict
    monkeypatch.setattr(fake, "spec_from_dict", lambda d: StagesSpec.from_dict(d) if "config" in d else plain(d))
    with fake.fake_hopper(monkeypatch) as cuda:
        yield cuda


def test_hopper_kernels_are_launched_checked_and_timed(hopper):
    (shape,) = timed(REQUEST, Wall())
    assert (shape["shape"], len(shape["pairs"])) == ([16, 64, 128], 5)
    launched = {launch.spec.name for launch in hopper.launches}
    assert any(name.endswith("t16r1g1f2u2d3") for name in launched), launched


def test_a_baseline_that_is_wrong_puts_no_entry_out(hopper, tmp_path):
    (tmp_path / "single.py").write_text(KERNELS["single"])
    wrong = {"kind": "kernel", "fields": {}, "path": str(tmp_path / "single.py")}
    with pytest.raises(Stopped, match="the baseline is wrong at 16, 64, 128") as stopped:
        list(timed(REQUEST | {"baseline": wrong}, Wall()))
    assert stopped.value.outcome == "not run"
    with pytest.raises(Stopped, match="the entry is wrong at 16, 64, 128") as stopped:
        list(timed(REQUEST | {"entry": wrong}, Wall()))
    assert stopped.value.outcome == "wrong result"


# ---- rounds ----


@pytest.fixture
def judged(monkeypatch):
    """Entries as they are judged, by a judge that finds every one correct."""
    found: list[str] = []

    def instead(r, entry, run, at):
        found.append(entry.name)
        verdict = Verdict(run, entry.name, "correct", "none", "s", None, None, None, float(len(found)))
        return SimpleNamespace(verdict=verdict, shapes=[], samples=[])

    monkeypatch.setattr(running, "judge", instead)
    return found


def test_an_interrupted_round_goes_on_where_it_stopped(tmp_path, judged, monkeypatch):
    r, ledger = made(tmp_path, "right", "crash", "hang"), Ledger(tmp_path / "l")
    instead = running.judge

    def interrupted(r, entry, run, at):
        if entry.name == "crash":
            raise KeyboardInterrupt
        return instead(r, entry, run, at)

    monkeypatch.setattr(running, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_round(r, ledger)
    monkeypatch.setattr(running, "judge", instead)
    run = run_round(r, ledger)
    assert judged == ["right", "crash", "hang"]
    assert run_round(r, ledger) == run
    assert (len(judged), len(ledger.rounds())) == (3, 1)


def test_another_file_or_other_sources_begin_another_run(tmp_path, judged, monkeypatch):
    ledger = Ledger(tmp_path / "l")
    run_round(made(tmp_path, "right"), ledger)
    (tmp_path / "right.py").write_text(RIGHT + "# changed\n")
    run_round(read(tmp_path / "r.toml"), ledger)
    monkeypatch.setattr(running, "source_hash", lambda: "other")
    run_round(read(tmp_path / "r.toml"), ledger)
    assert len(ledger.rounds()) == 3


def test_a_replay_needs_nothing_but_the_ledger(tmp_path, judged):
    ledger = Ledger(tmp_path / "l")
    first = run_round(made(tmp_path, "right"), ledger)
    (tmp_path / "right.py").unlink()
    (tmp_path / "r.toml").unlink()
    second = again("r", ledger)
    assert ledger.rounds()[1].replay_of == first
    assert ledger.verdict(first, "right") is not None
    assert ledger.verdict(second, "right") is not None
    with pytest.raises(LedgerError, match="none: the ledger holds no such round or run; its rounds: r"):
        again("none", ledger)


def test_a_run_says_where_it_ran_and_from_what(tmp_path, judged):
    ledger = Ledger(tmp_path / "l")
    run_round(parse(find("stages-hopper").read_text(), find("stages-hopper")), ledger)
    (record,) = ledger.rounds()
    assert record.environment.device == "h100 (emulator)" or torch.cuda.is_available()
    assert {"sources", "commit", "method", "torch"} <= set(record.environment.details)
