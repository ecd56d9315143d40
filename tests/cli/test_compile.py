"""`glu4 compile`: where it writes, what it refuses, what it lists; and a wheel that carries kernels."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compiled.test_cubin import FRAME_SIZE, REGISTERS, of_info, sized
from glu4 import dispatch
from glu4.backends.blackwell import arguments
from glu4.backends.blackwell import launch as blackwell
from glu4.backends.hopper.config import DECODE_THREADS, SHIPPED, Config
from glu4.backends.hopper.grouped_config import GATHER_CONFIGS, GROUPED_SHIPPED
from glu4.backends.hopper.spec import DecodeSpec, GroupedSpec, KernelSpec
from glu4.backends.tokens.spec import CombineSpec, QuantizeSpec, SortSpec
from glu4.cli import app, output
from glu4.compiled import store
from glu4.dispatch import every_kernel
from gpu.proofs import sum_order

RUNNER = CliRunner()
ROOT = Path(__file__).parents[2]
CUBIN = of_info(sized(REGISTERS, 168), sized(FRAME_SIZE, 0))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLU4_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(output.console, "width", 300)
    monkeypatch.setattr(store, "packaged_directory", lambda: tmp_path / "package")
    return tmp_path / "cache"


def fill(directory: Path, count: int | None = None) -> None:
    for spec in every_kernel()[:count]:
        threads, _, shared_bytes = resources(spec)
        store.write(directory, spec, CUBIN, {"threads": threads, "shared_bytes": shared_bytes})


def resources(spec: store.Spec) -> tuple[int, int | None, int]:
    """Threads, registers (None where a limit is all that is asked for) and shared bytes that a kernel should have."""
    if isinstance(spec, (DecodeSpec, CombineSpec, QuantizeSpec)):
        return DECODE_THREADS if isinstance(spec, DecodeSpec) else 128, None, 0
    if isinstance(spec, SortSpec):
        return 1024, None, spec.shared_bytes
    if isinstance(spec, GroupedSpec):
        return spec.config.threads, spec.config.launch_registers, spec.config.shared_bytes
    assert isinstance(spec, KernelSpec)
    c, nvfp4 = spec.config, spec.nvfp4
    return c.cta_threads(nvfp4), c.launch_registers(nvfp4), c.shared_bytes(nvfp4)


@pytest.mark.parametrize("given", [["--arch", "sm_120a"], ["--arch", "sm_90"], ["--arch", ""]])
def test_other_architectures_are_refused_by_name(given: list[str]) -> None:
    result = RUNNER.invoke(app, ["compile", *given])
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == f"--arch: kernels exist for sm_90a, sm_100a, sm_103a, got {given[1]!r}"


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_blackwell_kernels_are_a_set_of_their_own(own_cache: Path, arch: str) -> None:
    """Hopper's in the same cache are neither counted nor outdated."""
    fill(own_cache)
    specs = every_kernel(arch)
    rows = json.loads(RUNNER.invoke(app, ["compile", "--arch", arch, "--list", "--json"]).stdout)["kernels"]
    assert [row["name"] for row in rows] == [spec.name for spec in specs]
    assert {row["place"] for row in rows} == {"missing"}
    listed = RUNNER.invoke(app, ["compile", "--arch", arch, "--list"]).stdout
    assert f"0 of {len(specs)} kernels are there; glu4 compile --arch {arch} makes the others" in listed
    for spec in specs:
        store.write(own_cache, spec, CUBIN, {"threads": 192, "shared_bytes": 1})
    result = RUNNER.invoke(app, ["compile", "--arch", arch])
    assert f"0 of {len(specs)} kernels compiled, the others were there: {own_cache}" in result.stdout
    assert store.inventory(specs).outdated == store.inventory(every_kernel()).outdated == []


@pytest.mark.slow
@pytest.mark.skipif(store.installed_dsl() is None, reason="needs CuTe DSL")
def test_a_blackwell_kernel_that_is_compiled_can_be_launched(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the builder writes of parameters is what a launch passes; the driver is one made of Python."""
    specs = blackwell.shipped(arch="sm_103a")[:1]
    monkeypatch.setattr(dispatch, "every_kernel", lambda arch: specs)
    result = RUNNER.invoke(app, ["compile", "--arch", "sm_103a"])
    assert "1 of 1 kernels compiled" in result.stdout, result.output
    found = store.find(specs[0])
    assert found is not None
    assert found[1]["params"] == arguments.sizes(specs[0])


def test_two_places_are_refused() -> None:
    result = RUNNER.invoke(app, ["compile", "--into-package", "--output", "x"])
    assert str(result.exception) == "--into-package and --output name two places; give one"


def test_nothing_to_do(own_cache: Path) -> None:
    fill(own_cache)
    result = RUNNER.invoke(app, ["compile", "--arch", "sm_90a"])
    assert result.exit_code == 0
    assert f"0 of {len(every_kernel())} kernels compiled, the others were there: {own_cache}" in result.stdout
    document = json.loads(RUNNER.invoke(app, ["compile", "--json"]).stdout)
    assert document == {"arch": "sm_90a", "kernels": len(every_kernel()), "compiled": 0, "directory": str(own_cache)}


def test_into_package_copies_what_is_compiled_and_says_how_a_wheel_is_made(own_cache: Path) -> None:
    fill(own_cache)
    result = RUNNER.invoke(app, ["compile", "--into-package"])
    assert result.exit_code == 0, result.output
    assert "a wheel that is built now carries them: pip wheel . --no-deps" in result.stdout
    assert store.inventory(every_kernel()).packaged == [s.name for s in every_kernel()]


def test_without_cute_dsl_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "installed_dsl", lambda: None)
    result = RUNNER.invoke(app, ["compile"])
    assert "compiling kernels needs CuTe DSL: pip install nvidia-cutlass-dsl==" in str(result.exception)


def test_the_options_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given: list[object] = []

    def compile_missing(specs, directory, on_done, jobs, on_wait):  # type: ignore[no-untyped-def]
        given.extend([len(specs), directory, jobs])
        on_done("a kernel")
        on_wait()
        return 1

    monkeypatch.setattr(store, "compile_missing", compile_missing)
    assert RUNNER.invoke(app, ["compile", "--output", str(tmp_path / "here"), "--jobs", "3"]).exit_code == 0
    assert given == [len(every_kernel()), tmp_path / "here", 3]
    assert RUNNER.invoke(app, ["compile", "--jobs", "0"]).exit_code == 2


def test_the_list_has_every_kernels_resources(own_cache: Path) -> None:
    fill(own_cache, 3)
    result = RUNNER.invoke(app, ["compile", "--list"])
    assert result.exit_code == 0, result.output
    first = next(line for line in result.stdout.splitlines() if every_kernel()[0].name in line).split()
    threads, _, shared_bytes = resources(every_kernel()[0])
    expected = [every_kernel()[0].name, "cached", str(threads), "168", str(shared_bytes), "0", str(len(CUBIN))]
    assert first == expected
    assert f"3 of {len(every_kernel())} kernels are there; glu4 compile makes the others" in result.stdout
    rows = json.loads(RUNNER.invoke(app, ["compile", "--list", "--json"]).stdout)["kernels"]
    assert [row["place"] for row in rows] == ["cached"] * 3 + ["missing"] * (len(every_kernel()) - 3)
    assert rows[0]["registers"] == 168
    assert "registers" not in rows[3]


def test_the_list_of_a_directory(tmp_path: Path) -> None:
    fill(tmp_path / "here", 2)
    rows = json.loads(RUNNER.invoke(app, ["compile", "--list", "--json", "--output", str(tmp_path / "here")]).stdout)["kernels"]
    assert [row["place"] for row in rows][:3] == ["there", "there", "missing"]


FOUND = """
import glu4, sys
from glu4.backends.hopper.spec import shipped
from glu4.compiled import store
from glu4.dispatch import every_kernel
assert glu4.__file__.startswith(sys.argv[1]), glu4.__file__
found = store.inventory(every_kernel())
print(len(found.packaged), len(found.missing), len(found.damaged))
"""


@pytest.mark.slow
def test_a_wheel_carries_the_kernels_of_the_package(tmp_path: Path) -> None:
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building without isolation needs setuptools 77 or later here")
    tree, wheels, site = tmp_path / "tree", tmp_path / "wheels", tmp_path / "site"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "kernels")
    shutil.copytree(ROOT / "src", tree / "src", ignore=ignored)
    packaged = tree / "src" / "glu4" / "kernels"
    fill(packaged)
    (packaged / ".lock").touch()
    (packaged / "tmpx.part").touch()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(wheels), "-q"], cwd=tree, check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "-q", "--target", str(site), str(wheel)], check=True)
    assert sorted(p.suffix for p in (site / "glu4" / "kernels").iterdir()) == [".kernel"] * len(every_kernel())
    environment = {**os.environ, "PYTHONPATH": str(site), "GLU4_CACHE_DIR": "off"}
    command = [sys.executable, "-c", FOUND, str(site)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(every_kernel())), "0", "0"]


# ---- what is recorded ----

RECORDED = ROOT / "benchmarks" / "results" / "kernels-sm_90a.json"
HOW = f"record again: glu4 compile && glu4 compile --list --json > {RECORDED.relative_to(ROOT)}"


def rows_of(ending: str, w4a4: bool = False) -> list[dict[str, Any]]:
    """The recorded kernels of one configuration that take 16-bit tokens, or that decode NVFP4 tokens."""
    rows = json.loads(RECORDED.read_text())["kernels"]
    return [row for row in rows if row["name"].endswith(f"_{ending}") and ("_w4a4_" in row["name"]) == w4a4]


def order_of_sums(c: Config) -> str:
    """The parts of a configuration's name that decide the order of its additions."""
    parts = c.k_groups * c.splits
    return f"g{c.k_groups}" + (f"u{c.stage_units}" if parts > 1 else "") + (f"s{c.splits}" if c.splits > 1 else "")


def test_the_recorded_resources_are_those_of_the_shipped_set() -> None:
    recorded = {row["name"]: row for row in json.loads(RECORDED.read_text())["kernels"]}
    assert recorded.keys() == {s.name for s in every_kernel()}, HOW
    for spec in every_kernel():
        row, (threads, registers, shared_bytes) = recorded[spec.name], resources(spec)
        found = [row["threads"], row["shared_bytes"], row["stack_bytes"]]
        assert found == [threads, shared_bytes, 0], f"{spec.name}: {HOW}"
        # the decoder's limit leaves room for all of an SM's 2048 threads: 65536 registers
        most = 32 if isinstance(spec, DecodeSpec) else 64
        assert row["registers"] == registers if registers else row["registers"] <= most, f"{spec.name}: {HOW}"


def line(name: str, rows: list[dict[str, Any]], order: str) -> str:
    """A row of the table."""
    (shared,) = {tuple(row[f] for f in ("threads", "registers", "shared_bytes", "stack_bytes")) for row in rows}
    sizes = sorted({row["cubin_bytes"] // 1000 for row in rows})
    size = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    return f"| {' | '.join(map(str, (name, *shared)))} | {size} | {order} |"


def test_the_table_in_the_documentation_is_the_recorded_one() -> None:
    lines = [line(c.name, rows_of(c.name), order_of_sums(c)) for c in SHIPPED]
    lines += [line(f"{c.name}, W4A4", rows_of(c.name, True), order_of_sums(c)) for c in SHIPPED if c.takes_nvfp4]
    lines += [line(f"grouped {c.name}", rows_of(c.name), "g1, parts") for c in (*GROUPED_SHIPPED, *GATHER_CONFIGS)]
    lines += [line(name, rows_of(f"{name}_nvfp4_f16"), "none") for name in ("decode_tokens", "gather_tokens")]
    table = "\n".join(lines)
    assert table in (ROOT / "docs" / "kernels.md").read_text(), f"docs/kernels.md should hold\n{table}"


def test_the_order_of_sums_in_the_documentation_is_the_one_that_is_tested() -> None:
    for a, b in itertools.product(SHIPPED, SHIPPED):
        assert (order_of_sums(a) == order_of_sums(b)) == (sum_order(a) == sum_order(b)), f"{a.name}, {b.name}"
