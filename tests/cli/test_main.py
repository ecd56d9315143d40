"""The `glu4` entry itself, as a process: exit codes, one-line errors, and that help imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MAIN = "from glu4.cli import main; main()"


def glu4(*arguments: str, code: str = MAIN) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_a_command_prints_on_stdout_and_exits_0():
    result = glu4("roofline", "--device", "h100")
    assert (result.returncode, result.stderr) == (0, "")
    assert "602.802" in result.stdout


def test_an_error_is_one_line_on_stderr_and_exit_code_2():
    result = glu4("roofline", "--device", "tpu")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "glu4: error: device: expected one of b200-contest, h100, h200, got 'tpu'\n"


def test_a_missing_submission_is_exit_code_2():
    result = glu4("verify", "--submission", "absent.py")
    assert result.returncode == 2
    assert result.stderr.endswith("absent.py: cannot be read (No such file or directory); give the path of a Python file\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("roofline", "--device", "h100"),  # rich
        ("compile", "--list", "--json"),  # sys.stdout
        ("--help",),  # typer
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_reader_that_stops_reading_ends_it_without_a_word(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", MAIN, *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_names_every_command_and_imports_no_optional_package():
    code = (
        "import sys\nimport torch\nbefore = set(sys.modules)\nfrom glu4.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted({'transformers', 'matplotlib', 'triton', 'cutlass', 'cuda'} & roots))"
    )
    result = glu4(code=code)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in ("doctor", "demo", "inspect", "verify", "roofline", "eval"))
    assert result.stdout.endswith("[]\n")
