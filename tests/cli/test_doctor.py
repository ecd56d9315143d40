"""`glu4 doctor`: it reports what is there, and its self-test can fail."""

from __future__ import annotations

import json
import platform
import warnings

import pytest
import torch
from typer.testing import CliRunner

import glu4
from fake_blackwell import fake_blackwell
from glu4 import dispatch
from glu4.backends.hopper import tuned
from glu4.cli import app, doctor, output
from glu4.compiled import store
from glu4.dispatch import Candidate, Explanation, every_kernel
from glu4.nvfp4 import NVFP4Tensor

RUNNER = CliRunner()


def test_a_healthy_machine_is_exit_code_0_with_versions_devices_and_backends():
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for text in (
        platform.python_version(),
        torch.__version__,
        "cpu: ",
        "portable runs",
        "self-test: right",
        "Hopper kernels: ",
        "kernel cache: ",
    ):
        assert text in result.stdout


def test_json_is_one_document_with_the_reason_for_each_backend():
    result = RUNNER.invoke(app, ["doctor", "--json"])
    document = json.loads(result.stdout)
    assert document["status"] == "right"
    assert document["versions"]["torch"] == torch.__version__
    cpu = document["devices"][0]
    assert (cpu["device"], cpu["faults"]) == ("cpu", [])
    assert cpu["backends"]["dual_gemm W4A4"]["chosen"] == "portable"
    assert cpu["backends"]["grouped_dual_gemm W4A16"]["candidates"]["portable"]["reason"]


def test_a_wrong_decode_is_found_and_exit_code_1(monkeypatch):
    right = NVFP4Tensor.decode

    def saturating(self: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return right(self, dtype).clamp(-2600, 2600)

    monkeypatch.setattr(NVFP4Tensor, "decode", saturating)
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "decoding e2m1 x e4m3 gives wrong values" in result.stdout


def test_a_wrong_product_is_found_and_exit_code_1(monkeypatch):
    right = glu4.dual_gemm
    monkeypatch.setattr(glu4, "dual_gemm", lambda *args, **options: right(*args, **options).mul_(1.001))
    result = RUNNER.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["status"] == "wrong"
    assert document["devices"][0]["faults"] == ["dual_gemm by portable of exact operands differs from the specification"]


def test_a_device_that_cannot_run_the_self_test_is_a_fault(monkeypatch):
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(glu4, "dual_gemm", broken)
    assert doctor._faults(torch.device("cpu")) == ["dual_gemm by portable cannot run: no kernel image is available"]
    monkeypatch.setattr(NVFP4Tensor, "decode", broken)
    assert doctor._faults(torch.device("cpu"))[0] == "the self-test cannot run: no kernel image is available"


def test_missing_packages_and_an_old_torch_become_hints(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    hints = doctor._hints(dict.fromkeys(doctor._PACKAGES), ["cpu"])
    assert "gguf is not installed: for demo: pip install 'glu4[hf]'" in hints
    assert any(hint.startswith("torch 2.9.1+cpu is older than 2.11") for hint in hints)
    assert any(hint.startswith("glu4 runs from a source tree") for hint in hints)
    assert not any("triton" in hint for hint in hints)


@pytest.mark.parametrize(("built", "words"), [("12.8", "is built for CUDA 12.8 but sees no device"), (None, "CPU")])
def test_a_machine_without_a_visible_gpu_gets_one_hint_why(monkeypatch, built, words):
    monkeypatch.setattr(torch.version, "cuda", built)
    hints = doctor._hints(dict.fromkeys(doctor._PACKAGES, "1.0"), ["cpu"])
    assert len(hints) == 1
    assert words in hints[0]
    assert doctor._hints(dict.fromkeys(doctor._PACKAGES, "1.0"), ["cpu", "cuda:0"]) == []


@pytest.mark.parametrize(
    ("version", "older"), [("2.10.0", True), ("2.11.0+cu130", False), ("2.13.0a0+git1", False), ("3.0", False)]
)
def test_versions_are_compared_as_numbers(version, older):
    assert doctor._older(version) is older


# ---- compiled kernels ----


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLU4_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(output.console, "width", 300)
    monkeypatch.setattr(store, "packaged_directory", lambda: tmp_path / "package")
    return tmp_path / "cache"


def hints_on_a_hopper_gpu() -> list[str]:
    return doctor._kernel_hints(doctor._kernels(), [{"hopper": False}, {"hopper": True}])


def test_kernels_are_counted_and_the_missing_ones_named(own_cache):
    for spec in every_kernel()[:-2]:
        store.write(own_cache, spec, b"cubin", {})
    store.write(store.packaged_directory(), every_kernel()[0], b"cubin", {})
    damaged = store.file_of(own_cache, every_kernel()[3])
    damaged.write_bytes(damaged.read_bytes()[:-1])
    outdated = own_cache / "sm90_dual_gemm_of_another_version-0123.kernel"
    outdated.write_bytes(b"")
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    count = len(every_kernel())
    assert f"{count} shipped; 1 in the package, {count - 4} in the cache, 3 missing, 1 damaged" in result.stdout
    assert f"missing: {every_kernel()[3].name}, {every_kernel()[-2].name}, {every_kernel()[-1].name}\n" in result.stdout
    assert f"kernel cache: {own_cache} (can be written)" in result.stdout
    assert f"hint: damaged kernel files are not loaded, and glu4 compile replaces them: {damaged}" in result.stdout
    assert f"hint: kernel files of another version of glu4, which may be deleted: {outdated}\n" in result.stdout
    assert "are not compiled" not in result.stdout  # there is no Hopper GPU that would want them
    kernels = json.loads(RUNNER.invoke(app, ["doctor", "--json"]).stdout)["kernels"]
    assert (kernels["packaged"], kernels["cached"], len(kernels["missing"])) == (1, count - 4, 3)
    assert kernels["damaged"] == [str(damaged)]


def test_a_hopper_gpu_without_kernels_is_told_the_command(own_cache, monkeypatch):
    count = f"{len(every_kernel())} of {len(every_kernel())} Hopper kernels are not compiled"
    wheel = "or install a wheel of glu4 that carries them"
    install = "pip install nvidia-cutlass-dsl==4.8.1"
    monkeypatch.setattr(store, "installed_dsl", lambda: store.DSL_VERSION)
    assert hints_on_a_hopper_gpu() == [f"{count}: glu4 compile; {wheel}"]
    for version in (None, "4.9.0"):
        monkeypatch.setattr(store, "installed_dsl", lambda version=version: version)
        assert hints_on_a_hopper_gpu() == [f"{count}: {install}, then glu4 compile; {wheel}"]
    monkeypatch.setenv("GLU4_CACHE_DIR", "off")
    place = "set GLU4_CACHE_DIR to a directory that can be written"
    assert hints_on_a_hopper_gpu() == [f"{count}: {place} (the cache is off), then {install}, then glu4 compile; {wheel}"]
    own_cache.write_text("a file")
    monkeypatch.setenv("GLU4_CACHE_DIR", str(own_cache))
    assert f"{place} ({own_cache} is not a directory), then" in hints_on_a_hopper_gpu()[0]
    for spec in every_kernel():
        store.write(store.packaged_directory(), spec, b"cubin", {})
    assert hints_on_a_hopper_gpu() == []


def blackwell_hints(*architectures: str | None) -> list[str]:
    return doctor._blackwell_hints(doctor._kernels(), doctor._blackwell_kernels(architectures))


def test_a_blackwell_gpu_without_kernels_is_told_the_command(own_cache, monkeypatch):
    specs = every_kernel("sm_103a")
    wheel = "or install a wheel of glu4 that carries them"
    monkeypatch.setattr(store, "installed_dsl", lambda: store.DSL_VERSION)
    assert blackwell_hints(None) == []
    what = f"{len(specs)} of {len(specs)} sm_103a Blackwell kernels are not compiled"
    assert blackwell_hints(None, "sm_103a") == [f"{what}: glu4 compile --arch sm_103a; {wheel}"]
    assert [hint.split()[3] for hint in blackwell_hints("sm_100a", "sm_103a", "sm_100a")] == ["sm_100a", "sm_103a"]
    monkeypatch.setattr(store, "installed_dsl", lambda: None)
    install = "pip install nvidia-cutlass-dsl==4.8.1"
    assert blackwell_hints("sm_103a") == [f"{what}: {install}, then glu4 compile --arch sm_103a; {wheel}"]
    for spec in specs:
        store.write(own_cache, spec, b"cubin", {})
    assert blackwell_hints("sm_103a") == []
    damaged = store.file_of(own_cache, specs[0])
    damaged.write_bytes(damaged.read_bytes()[:-1])
    told = blackwell_hints("sm_103a")
    assert told[0].startswith(f"1 of {len(specs)} sm_103a Blackwell kernels")
    assert told[1] == f"damaged kernel files are not loaded, and glu4 compile --arch sm_103a replaces them: {damaged}"


def test_a_blackwell_device_made_of_python_has_its_line_its_hint_and_its_self_test(own_cache, monkeypatch):
    """Without kernels the portable backend runs there."""
    monkeypatch.setattr(store, "installed_dsl", lambda: store.DSL_VERSION)
    count = len(every_kernel("sm_100a"))
    line = f"Blackwell kernels (sm_100a): {count} shipped; 0 in the package, 0 in the cache, "
    with fake_blackwell(monkeypatch, found=lambda spec: None):
        result = RUNNER.invoke(app, ["doctor"])
        document = json.loads(RUNNER.invoke(app, ["doctor", "--json"]).stdout)
    assert result.exit_code == 0, result.output
    assert line + f"{count} missing, 0 damaged\n" in result.stdout
    assert "sm_100a Blackwell kernels are not compiled: glu4 compile --arch sm_100a; or install" in result.stdout
    assert document["devices"][0]["blackwell"] == "sm_100a"
    assert document["blackwell_kernels"]["sm_100a"]["device"]
    with fake_blackwell(monkeypatch):
        result = RUNNER.invoke(app, ["doctor"])
    assert "dual_gemm W4A4: blackwell runs" in result.stdout
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("version", "line"),
    [
        (None, "CuTe DSL: not installed; only compiling needs it"),
        ("4.8.1", "CuTe DSL: 4.8.1\n"),
        ("4.9.0", "CuTe DSL: 4.9.0, which is not the tested 4.8.1: it compiles nothing"),
    ],
)
def test_the_compiler_is_named_with_what_its_release_means(own_cache, monkeypatch, version, line):
    monkeypatch.setattr(store, "installed_dsl", lambda: version)
    assert line in RUNNER.invoke(app, ["doctor"]).stdout


def test_a_cache_that_is_off_or_cannot_be_written_is_said(own_cache, monkeypatch):
    own_cache.write_text("a file")
    assert f"kernel cache: {own_cache} ({own_cache} is not a directory)" in RUNNER.invoke(app, ["doctor"]).stdout
    monkeypatch.setenv("GLU4_CACHE_DIR", "off")
    assert "kernel cache: off\n" in RUNNER.invoke(app, ["doctor"]).stdout


def test_doctor_compiles_nothing(own_cache, monkeypatch):
    def compile_missing(*_: object, **__: object) -> int:
        raise AssertionError

    monkeypatch.setattr(store, "compile_missing", compile_missing)
    assert RUNNER.invoke(app, ["doctor"]).exit_code == 0


def test_every_backend_that_can_run_is_tested(monkeypatch):
    both = (Candidate("hopper", True, "here"), Candidate("portable", True, "everywhere"))
    monkeypatch.setattr(dispatch, "explain", lambda problem, device: Explanation(problem, str(device), both))
    right = glu4.dual_gemm

    def of_a_wrong_driver(*args: object, backend: str, **options: object) -> torch.Tensor:
        if backend == "hopper":
            raise RuntimeError("cuLibraryLoadData failed: CUDA_ERROR_INVALID_IMAGE (200)")
        return right(*args, **options)

    monkeypatch.setattr(glu4, "dual_gemm", of_a_wrong_driver)
    expected = "dual_gemm by hopper cannot run: cuLibraryLoadData failed: CUDA_ERROR_INVALID_IMAGE (200)"
    assert doctor._faults(torch.device("cpu")) == [expected]


def test_little_free_memory_is_a_hint():
    devices = [
        {"device": "cuda:0", "free_gib": 0.3},
        {"device": "cuda:1", "free_gib": 70.0},
        {"device": "cpu", "free_gib": None},
    ]
    assert doctor._memory_hints(devices) == ["cuda:0 has 0.3 GiB of free memory, too little for most models: see nvidia-smi"]


def test_a_measured_table_that_is_refused_is_a_hint(own_cache):
    name = "NVIDIA H200"
    (own_cache / "tuned").mkdir(parents=True)
    path = own_cache / "tuned" / tuned.file_name(name)
    path.write_text("{")
    tuned.forget()
    devices = [{"hopper": False, "name": None}, {"hopper": True, "name": name}, {"hopper": True, "name": name}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (hint,) = doctor._table_hints(devices)
    assert hint.startswith(f"a measured table is not used: {path}: not JSON: ")
    assert hint.endswith("; measure again with glu4 tune, or delete it")
    assert doctor._table_hints(devices[:1]) == []
    tuned.forget()
