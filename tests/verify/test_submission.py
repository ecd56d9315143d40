"""The submission adapter: right files pass, and every way to be wrong or not to run gives its sentence."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from glu4 import reference
from glu4.verify import contest, submission
from glu4.verify.checker import check
from glu4.verify.contest import DualShape, GroupShape
from glu4.verify.submission import SubmissionError, SubmissionReport, Trial, _attempt, detect_problem, run, trials
from glu4.verify.worker import _Session, _Wrong, load_data, save_data

EXAMPLE = Path(__file__).parents[2] / "examples" / "submission_torch.py"
SHAPE = DualShape(128, 128, 256)
GROUPS = GroupShape(((40, 128, 256), (136, 72, 320)))
PUBLIC = Trial("dual_gemm", SHAPE, "public", contest.SEED)
FULL = Trial("dual_gemm", SHAPE, "full range", 5)
REUSE = Trial("dual_gemm", SHAPE, "full range", 6, reuse=True)
EXACT = Trial("dual_gemm", SHAPE, "exact", 7)

# two right kernels, from which the faults below are made; `decode` is that of the example
PRELUDE = EXAMPLE.read_text().partition("def custom_kernel")[0].replace("#!POPCORN", "# was")
DUAL = """
def custom_kernel(data):
    a, b1, b2, sfa, sfb1, sfb2, _, _, _, c = data
    x = decode(a, sfa)
    c.copy_((torch.nn.functional.silu(x @ decode(b1, sfb1).mT) * (x @ decode(b2, sfb2).mT)).permute(1, 2, 0))
    return c
"""
GROUP = """
def custom_kernel(data):
    abc, scales, _, sizes = data
    for (a, b, c), (sfa, sfb) in zip(abc, scales):
        c.copy_((decode(a, sfa.to(a.device)) @ decode(b, sfb.to(b.device)).mT).permute(1, 2, 0))
    return [c for _, _, c in abc]
"""


def write(tmp_path: Path, body: str, prelude: str = PRELUDE) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(prelude + textwrap.dedent(body))
    return file


@pytest.fixture
def no_diagnosis(monkeypatch):
    """The real check without its search for a cause, which takes seconds and has its own tests."""
    monkeypatch.setattr(submission, "check", lambda *args, diagnose, **options: check(*args, diagnose=False, **options))


def kernel_of(body: str) -> Any:
    space: dict[str, Any] = {}
    exec(PRELUDE + textwrap.dedent(body), space)
    return space["custom_kernel"]


class InProcess:
    """A worker without a process, for faults that need none."""

    device = "cpu"

    def __init__(self, body: str) -> None:
        self.session = _Session(kernel_of(body), "cpu")

    def ask(self, request: dict[str, Any], when: str) -> dict[str, Any]:
        try:
            return self.session.call(request)
        except _Wrong as wrong:
            return {"wrong": str(wrong)}


def findings(tmp_path: Path, body: str, *planned: Trial, diagnose: bool = False) -> list[str]:
    worker = InProcess(body)
    found: list[str] = []
    for trial in planned:
        found += _attempt(worker, trial, tmp_path, diagnose).findings  # type: ignore[arg-type]
    return found


# ---- right ----


def test_the_example_is_right_on_every_kind_of_data():
    report = run(EXAMPLE, only=[PUBLIC, FULL, REUSE, EXACT])
    assert (report.problem, report.device) == ("dual_gemm", "cuda" if torch.cuda.is_available() else "cpu")
    assert [outcome.findings for outcome in report.outcomes] == [(), (), (), ()]
    assert report.ok
    assert all(outcome.seconds > 0 for outcome in report.outcomes)


def test_a_right_group_submission_is_right_and_noise_on_stdout_goes_to_the_log(tmp_path):
    noise = """
    import os, subprocess, sys
    from task import input_t, output_t
    print("noise while importing")
    os.write(1, b'{"error": "forged"}\\n')
    subprocess.run([sys.executable, "-c", "print('noise of a child')"], check=True)
    """
    file = write(tmp_path, textwrap.dedent(noise) + GROUP, "#!POPCORN leaderboard nvfp4_group_gemm\n" + PRELUDE)
    kinds = ("public", "full range", "exact")
    report = run(file, only=[Trial("group_gemm", GROUPS, kind, 3) for kind in kinds], log=tmp_path / "log")
    assert report.ok
    assert report.problem == "group_gemm"
    printed = (tmp_path / "log").read_text()
    assert all(text in printed for text in ("noise while importing", "forged", "noise of a child"))


def test_right_kernels_have_no_findings_in_this_process(tmp_path):
    assert findings(tmp_path, DUAL, PUBLIC, FULL, REUSE, EXACT, PUBLIC) == []
    batched = DualShape(128, 128, 256, batch=2)
    assert findings(tmp_path, DUAL, Trial("dual_gemm", batched, "full range", 1)) == []
    reuse = Trial("group_gemm", GROUPS, "full range", 3, reuse=True)
    assert findings(tmp_path, GROUP, Trial("group_gemm", GROUPS, "public", 2), reuse) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_example_is_right_at_all_listed_shapes(quick):
    assert run(EXAMPLE, quick=quick, seed=1).ok


# ---- wrong numbers ----


@pytest.mark.parametrize(
    ("old", "new", "trial"),
    [
        ("(x @ decode(b2, sfb2).mT)", "(x @ decode(b1, sfb1).mT)", PUBLIC),
        ("torch.nn.functional.silu(x @ decode(b1, sfb1).mT)", "(x @ decode(b1, sfb1).mT)", PUBLIC),
        # right on the public data, whose codes 4 to 7 and larger scales never occur
        ("decode(b1, sfb1)", "decode(b1, sfb1).clamp(-1.5, 1.5)", FULL),
        ("decode(a, sfa)", "decode(a.view(torch.uint8) & 0xBB, sfa)", FULL),
        # one element in the exact data off by one unit in the last place
        ("return c", "c[5, 6] = torch.nextafter(c[5, 6], c[5, 6] * 2 + 1); return c", EXACT),
        ("return c", "c[100:] = float('nan'); return c", FULL),
    ],
    ids=["up is gate", "no silu", "values clamped", "codes masked", "one unit", "rows NaN"],
)
def test_wrong_numbers_are_found(tmp_path, old, new, trial):
    assert old in DUAL
    assert findings(tmp_path, DUAL, trial) == []
    assert len(findings(tmp_path, DUAL.replace(old, new), trial)) == 1


def test_masked_codes_pass_the_public_data_and_only_that(tmp_path):
    body = DUAL.replace("decode(a, sfa)", "decode(a.view(torch.uint8) & 0xBB, sfa)")
    assert findings(tmp_path, body, PUBLIC) == []
    assert len(findings(tmp_path, body, FULL)) == 1


def test_the_diagnosis_names_the_fault(tmp_path):
    no_silu = DUAL.replace("torch.nn.functional.silu(x @ decode(b1, sfb1).mT)", "(x @ decode(b1, sfb1).mT)")
    (finding,) = findings(tmp_path, no_silu, FULL, diagnose=True)
    assert "activation" in finding


def test_elements_outside_the_public_tolerance_are_counted_on_public_data(tmp_path):
    right, wrong = (
        _attempt(InProcess(body), PUBLIC, tmp_path, diagnose=False)  # type: ignore[arg-type]
        for body in (DUAL, DUAL.replace("return c", "return c.mul_(1.01)"))
    )
    assert (right.ok, right.outside) == (True, 0)
    assert not wrong.ok
    # one percent is beyond 1e-3 + 1e-3 |c| where |c| is above 1/9; float16 rounding blurs that a little
    data = contest.public_dual(SHAPE, device="cpu")
    c = reference.dual_gemm(data.a, data.b1, data.b2).abs()
    assert int((c > 0.15).sum()) <= wrong.outside <= int((c > 0.08).sum())


def test_a_wrong_group_is_named(tmp_path):
    body = GROUP.replace("    return [", "    abc[1][2].mul_(1.01)\n    return [")
    (finding,) = findings(tmp_path, body, Trial("group_gemm", GROUPS, "public", 1))
    assert finding.startswith("group 1 (m 136, n 72, k 320): ")


def test_adding_to_c_is_found_because_c_is_poisoned(tmp_path):
    body = DUAL.replace("c.copy_(", "c.add_(")
    assert len(findings(tmp_path, body, FULL)) == 1


# ---- wrong conduct ----


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("def custom_kernel(data):\n    return data[-1]", "c came back as it was passed"),
        ("def custom_kernel(data):\n    pass", "the result must be a tensor; custom_kernel returned NoneType"),
        (
            "def custom_kernel(data):\n    return data[-1][..., 0]",
            "must have shape (128, 128, 1), (M, N, L); it has (128, 128)",
        ),
        ("def custom_kernel(data):\n    return data[-1].float()", "the result must be torch.float16; it is torch.float32"),
        ("def custom_kernel(data):\n    return data[-1].to('meta')", "must be on cpu as its inputs are; it is on meta"),
    ],
)
@pytest.mark.parametrize("trial", [PUBLIC, FULL], ids=["public", "full range"])
def test_a_result_outside_the_contract_is_wrong(tmp_path, body, sentence, trial):
    (finding,) = findings(tmp_path, body, trial)
    assert sentence in finding


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "def custom_kernel(data):\n    return data[0][0][2]",
            "must return a list of 2 tensors, one a group; it returned Tensor",
        ),
        (
            "def custom_kernel(data):\n    return [data[0][0][2]]",
            "must return a list of 2 tensors, one a group; it returned 1 entries",
        ),
        (
            "def custom_kernel(data):\n    return [data[0][1][2], data[0][0][2]]",
            "the result of group 0 must have shape (40, 128, 1), (M, N, L); it has (136, 72, 1)",
        ),
        (
            "def custom_kernel(data):\n    return [c for _, _, c in data[0]]",
            "group 0 (m 40, n 128, k 256): c came back as it was",
        ),
    ],
)
def test_a_group_result_outside_the_contract_is_wrong(tmp_path, body, sentence):
    assert sentence in findings(tmp_path, body, Trial("group_gemm", GROUPS, "public", 1))[0]


def test_changed_inputs_are_named(tmp_path):
    body = DUAL.replace("return c", "sfb1.zero_(); data[6].zero_(); return c")
    assert findings(tmp_path, body, FULL) == ["the call changed its input sfb1, sfa_permuted; it may write to c only"]


def test_editing_the_list_of_a_group_call_is_no_way_round_the_check(tmp_path):
    body = GROUP.replace("    abc, scales", "    data[0][0] = tuple(t.clone() for t in data[0][0])\n    abc, scales")
    assert findings(tmp_path, body, Trial("group_gemm", GROUPS, "public", 1)) == []


def test_one_output_buffer_for_all_calls_is_found(tmp_path):
    body = "HELD = torch.empty(128, 128, 1, dtype=torch.float16)\n" + DUAL.replace("    x =", "    c = HELD\n    x =")
    found = findings(tmp_path, body, PUBLIC, FULL)
    assert found == ["the call overwrote the tensor that the call before had returned: calls share one output buffer"]


@pytest.mark.parametrize(
    ("cached", "key"),
    [("c.clone()", "c.data_ptr()"), ("decode(b1, sfb1)", "b1.data_ptr()"), ("decode(b1, sfb1)", "b1.shape")],
    ids=["result by address", "weights by address", "weights by shape"],
)
@pytest.mark.usefixtures("no_diagnosis")
def test_what_is_cached_across_calls_is_found_and_said(tmp_path, cached, key):
    if cached.startswith("c"):
        body = "CACHE = {}\ndef custom_kernel(data):\n    key = data[-1].data_ptr()\n"
        body += "    if key not in CACHE:\n        CACHE[key] = inner(data).clone()\n    return CACHE[key].clone()\n"
        body += DUAL.replace("custom_kernel", "inner")
    else:
        body = "CACHE = {}\n" + DUAL.replace(cached, f"CACHE.setdefault({key}, {cached})")
    report = run(write(tmp_path, body), only=[FULL, REUSE], seed=1)
    first, second = report.outcomes
    assert first.ok
    assert second.findings[0].startswith(
        "right in a new process, wrong where the same buffers held other data in the call before"
    )
    assert "cached by address or by shape" in second.findings[0]
    assert not report.ok


# ---- not to be run ----


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("raise ValueError('no\\nluck')", r"mine.py raised ValueError at line \d+ while it was imported: no luck; --log FILE"),
        ("def f(:", r"mine.py raised SyntaxError at line \d+ while it was imported: .*; --log FILE keeps the traceback"),
        ("import absent_package.x", r"raised ModuleNotFoundError .*install absent_package beside glu4"),
        ("def kernel(data): pass", r"mine.py defines no function custom_kernel\(data\)"),
        ("import sys\nsys.exit(0)", r"mine.py raised SystemExit at line \d+ while it was imported"),
        ("import os\nos._exit(3)", r"mine.py ended its process \(exit code 3\) while it was imported"),
        (
            "def custom_kernel(data):\n    raise RuntimeError('bad tile')",
            r"mine.py raised RuntimeError at line \d+ on 128,128,256, public data, seed 1111: bad tile",
        ),
        (
            "import os\ndef custom_kernel(data):\n    os.kill(os.getpid(), 9)",
            r"mine.py was killed by SIGKILL \(out of memory, perhaps\) on 128,128,256, public data",
        ),
        (
            "import ctypes\ndef custom_kernel(data):\n    ctypes.string_at(0)",
            r"mine.py was killed by SIGSEGV on 128,128,256, public data",
        ),
    ],
    ids=["raises at import", "syntax", "missing module", "no function", "exits", "exits hard", "raises", "killed", "crashes"],
)
def test_a_submission_that_cannot_run_says_why_in_one_line(tmp_path, body, sentence):
    with pytest.raises(SubmissionError, match=sentence) as raised:
        run(write(tmp_path, body), only=[PUBLIC])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "body",
    ["import time\ntime.sleep(600)", "def custom_kernel(data):\n    while True: pass"],
    ids=["import", "call"],
)
def test_a_submission_that_hangs_is_stopped(tmp_path, body):
    with pytest.raises(SubmissionError, match=r"mine.py ran longer than 1 s .*was stopped; --timeout allows more"):
        run(write(tmp_path, body, ""), only=[PUBLIC], timeout=1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_submission_that_needs_cuda_says_so(tmp_path):
    body = "def custom_kernel(data):\n    return data[-1].cuda()"
    with pytest.raises(SubmissionError, match=r"it needs a CUDA device and this machine has none: run it where its GPU is"):
        run(write(tmp_path, body), only=[PUBLIC])


def test_the_traceback_is_kept_in_the_log(tmp_path):
    with pytest.raises(SubmissionError):
        run(write(tmp_path, "raise ValueError('this one')"), only=[PUBLIC], log=tmp_path / "log")
    assert "Traceback" in (tmp_path / "log").read_text()
    assert "this one" in (tmp_path / "log").read_text()


@pytest.mark.usefixtures("no_diagnosis")
def test_a_fault_found_before_the_process_failed_is_not_lost(tmp_path):
    body = DUAL.replace("    x =", "    if data[0].shape[0] == 256: raise MemoryError('full')\n    x =").replace(
        "return c", "return c.neg_()"
    )
    larger = Trial("dual_gemm", DualShape(256, 128, 256), "public", 1)
    with pytest.raises(SubmissionError, match=r"raised MemoryError .*; before that it was wrong on 128,128,256, public data"):
        run(write(tmp_path, body), only=[PUBLIC, larger])


def test_a_missing_file_an_odd_file_and_a_bad_limit_are_refused(tmp_path):
    with pytest.raises(SubmissionError, match=r"absent.py: cannot be read \(No such file or directory\)"):
        run(tmp_path / "absent.py")
    with pytest.raises(SubmissionError, match="no such file; give the path of a Python file"):
        run(tmp_path, "dual_gemm")
    (tmp_path / "odd.py").write_bytes(b"\xff\xfe")
    with pytest.raises(SubmissionError, match=r"odd.py: cannot be read \(it is not UTF-8 text\)"):
        run(tmp_path / "odd.py")
    with pytest.raises(ValueError, match=r"timeout: expected a positive number of seconds, got 0"):
        run(EXAMPLE, timeout=0)
    with pytest.raises(ValueError, match=r"timeout: expected a positive number of seconds, got nan"):
        run(EXAMPLE, timeout=float("nan"))
    with pytest.raises(ValueError, match=r"problem: expected one of dual_gemm, group_gemm, got 'gemv'"):
        run(EXAMPLE, "gemv")


def test_the_problem_is_read_from_the_file(tmp_path):
    file = tmp_path / "s.py"
    for line, problem in (
        ("", "dual_gemm"),
        ("#!POPCORN leaderboard nvfp4_group_gemm\n", "group_gemm"),
        ("#!POPCORN gpu NVIDIA\n#!POPCORN leaderboard modal_nvfp4_dual_gemm\n", "dual_gemm"),
    ):
        file.write_text(line + "x = 1\n")
        assert detect_problem(file) == problem
    file.write_text("#!POPCORN leaderboard nvfp4_gemv\n")
    with pytest.raises(
        SubmissionError, match="is for the leaderboard 'nvfp4_gemv'; glu4 checks nvfp4_dual_gemm and nvfp4_group_gemm"
    ):
        detect_problem(file)


# ---- the plan, and data as files ----


@pytest.mark.parametrize(("problem", "listed"), [("dual_gemm", contest.DUAL_TESTS), ("group_gemm", contest.GROUP_TESTS)])
def test_the_plan_holds_every_listed_shape_with_public_and_full_range_data(problem, listed):
    planned = trials(problem, 100)
    for kind in ("public", "full range"):
        assert {t.shape for t in planned if t.data == kind} == set(listed)
    assert all(t.seed == 1111 for t in planned if t.data == "public")
    assert len({t.seed for t in planned if t.data != "public"}) == sum(t.data != "public" for t in planned)
    assert sum(t.reuse for t in planned) == 1
    before = planned[[t.reuse for t in planned].index(True) - 1]
    assert before.data == "full range"
    assert any(t.data == "exact" for t in planned)
    quick = trials(problem, 100, quick=True)
    assert 0 < len(quick) <= len(planned)
    assert set(quick) <= set(planned)


def test_a_report_without_trials_is_not_right():
    assert not SubmissionReport(EXAMPLE, "dual_gemm", "cpu").ok


@pytest.mark.parametrize(
    "data",
    [contest.full_range_dual(SHAPE, 1), contest.public_group(GROUPS, 2), contest.full_range_group(GROUPS, 3)],
    ids=["dual", "group", "group full range"],
)
def test_data_travels_as_a_file_bit_for_bit(tmp_path, data):
    save_data(data, tmp_path / "data")

    def flat(value: Any) -> list[Any]:
        return [x for item in value for x in flat(item)] if isinstance(value, (list, tuple)) else [value]

    for x, y in zip(flat(data.as_tuple()), flat(load_data(tmp_path / "data", "cpu").as_tuple()), strict=True):
        if isinstance(x, torch.Tensor):
            assert x.stride() == y.stride()
            assert torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (x, y)))
        else:
            assert x == y
