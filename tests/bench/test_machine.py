"""What a run says of its machine, and the roofs it measures."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from bench.fake_gpu import FakeGpu
from glu4.bench import machine
from glu4.bench.devices import device


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("Arc", "arc"),
    ],
)
def test_a_device_has_a_short_name(name: str, expected: str) -> None:
    assert machine.slug(name) == expected


def test_limits_use_the_projects_rates_where_there_are_some() -> None:
    roofs = {"bandwidth": 1e12, "flops": 1e14}
    assert machine.device_of("NVIDIA H100 80GB HBM3", roofs) is device("h100")
    assert machine.device_of("NVIDIA L4", None) is None
    found = machine.device_of("NVIDIA L4", roofs)
    assert found is not None
    assert (found.name, found.bandwidth, found.flops) == ("l4", 1e12, 1e14)


def _smi(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = directory / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(directory), prepend=":")


def test_clocks_are_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _smi(tmp_path, 'echo "$@" > "$0.asked"; echo "1755 MHz, 2619 MHz, 41, 310.50 W"\n', monkeypatch)
    expected = {"clocks.sm": "1755 MHz", "clocks.mem": "2619 MHz", "temperature.gpu": "41", "power.draw": "310.50 W"}
    assert machine.clocks() == expected
    asked = (tmp_path / "nvidia-smi.asked").read_text()
    assert "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv,noheader" in asked


def test_without_nvidia_smi_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.clocks() == {}
    assert machine.commit() == ""


def test_the_commit_is_the_source_trees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "glu4").mkdir()
    file = tmp_path / "glu4" / "__init__.py"
    file.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(machine.glu4, "__file__", str(file))
    assert machine.commit() == git("rev-parse", "--short", "HEAD")
    file.write_text("1\n")
    assert machine.commit().endswith("-dirty")


def test_roofs_are_rates_of_what_was_moved_and_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_COPIED_BYTES", 1000)
    monkeypatch.setattr(machine, "_SIDE", 16)
    # the fake device takes 2 ms for whatever it is asked to do
    found = machine.measured_roofs(FakeGpu(tick=2.0), "cpu")
    assert found == {"bandwidth": pytest.approx(2 * 1000 / 2e-3), "flops": pytest.approx(2 * 16**3 / 2e-3)}


@pytest.mark.gpu
def test_the_environment_of_a_gpu() -> None:
    found = machine.environment()
    assert found["device"]
    assert found["torch"]
    assert "clocks.sm" in machine.clocks()
