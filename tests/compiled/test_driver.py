"""Launching through libcuda: what cuLaunchKernelEx is given byte by byte, threads, contexts and failures, with a recorder in its
place (`fake_hopper`); tensor maps against those that a driver wrote."""

from __future__ import annotations

import ctypes
import json
import shutil
import struct
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_hopper import (
    CONTEXT,
    DECODER_PARAMETERS,
    GATHERER_PARAMETERS,
    GATHERING_PARAMETERS,
    NVFP4_PARAMETERS,
    PARAMETERS,
    SIZES,
    FakeCuda,
    description,
    fake_hopper,
)
from glu4 import UnsupportedError
from glu4.backends.hopper.config import Config
from glu4.backends.hopper.grouped_config import GATHER_CONFIGS
from glu4.backends.hopper.grouped_launch import _GATHERING
from glu4.backends.hopper.launch import _NVFP4_PARAMETERS, _PARAMETERS, _VARIED
from glu4.backends.hopper.spec import DecodeSpec, GroupedSpec, KernelSpec, Spec
from glu4.backends.hopper.tokens import _DECODER_PARAMETERS, _GATHERER_PARAMETERS
from glu4.compiled import driver
from glu4.compiled.driver import Kernel, Repeat

MAPS = json.loads((Path(__file__).parent / "tensor_maps.json").read_text())["groups"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    with fake_hopper(monkeypatch) as fake:
        yield fake


class Recorder(FakeCuda):
    """Keeps what a launch was given and computes nothing."""

    template: bytes = b""
    sizes: tuple[int, ...] = tuple(SIZES)  # of parameters, a tensor map first where there is one

    def cuTensorMapEncodeTiled(self, target: Any, *_: object, **__: object) -> int:
        ctypes.memmove(target.value, self.template, 128)
        return self._done("cuTensorMapEncodeTiled")

    def cuLaunchKernelEx(self, config: int, handle: int, pointers: int, extra: None) -> int:
        status = self._done("cuLaunchKernelEx")
        if self.context != CONTEXT:
            return 201
        at = (ctypes.c_void_p * len(self.sizes)).from_address(pointers)
        self.parts = [ctypes.string_at(p, n) for p, n in zip(at, self.sizes, strict=True)]
        mapped = self.sizes[0] == 128
        self.map = self.parts[0] if mapped else b""
        self.config = ctypes.string_at(config, 56)
        self.parameters = b"".join(self.parts[mapped:])
        attributes, count = struct.unpack_from("=QI", self.config, 40)
        self.attributes = [ctypes.string_at(attributes + 72 * i, 20) for i in range(count)]
        self.addresses = (config, pointers)
        return status


def recorder(monkeypatch: pytest.MonkeyPatch, **form: Any) -> tuple[Recorder, Kernel]:
    fake = Recorder()
    fake.template = bytes.fromhex(MAPS[0]["maps"][0][4])
    monkeypatch.setattr(driver, "_cuda", lambda: fake)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: fake.device, raising=False)
    c = Config(64, 1, 2, 2, 2)
    spec = KernelSpec(c, "f16", "f16", True)
    cluster = form.pop("cluster", (1, 1, 1))
    made = {**description(spec), **form}
    return fake, Kernel(b"image", made, _PARAMETERS, torch.float16, (64, 64), cluster)


VALUES = (3, 32, 1 << 40, 5, 6, 7, 11, 12, 13, 14, 8, 15, 8, 9, 1.5, 2.5, 3.5, 16, 3, 8, 17)
MATRIX = (0x7F0000000010, 3, 32, 64)


def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    """Sizes and offsets as a C compiler sees them in cuda.h, where there is one; else the numbers it gave."""
    numbers = [driver._CONFIG_BYTES, driver._ATTRIBUTE_BYTES, driver._MAP_BYTES, 8, 32, 40, 48, 4, 6, 2, 8, 201]
    assert numbers[:7] == [56, 72, 128, 8, 32, 40, 48]
    assert [driver._CLUSTER, driver._PROGRAMMATIC, driver._RELAXED, driver._MAX_DYNAMIC_SHARED] == [4, 6, 2, 8]
    header = next(iter(sorted(Path("/usr/local").glob("cuda*/include/cuda.h"))), None)
    compiler = shutil.which("cc")
    if header is None or compiler is None:
        pytest.skip("needs cuda.h and a C compiler")
    source = """
#include <cuda.h>
#include <stddef.h>
#include <stdio.h>
int main(void) {
  printf("%zu %zu %zu %zu %zu %zu %zu %d %d %d %d %d", sizeof(CUlaunchConfig), sizeof(CUlaunchAttribute), sizeof(CUtensorMap),
         offsetof(CUlaunchAttribute, value), offsetof(CUlaunchConfig, hStream), offsetof(CUlaunchConfig, attrs),
         offsetof(CUlaunchConfig, numAttrs), CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
         CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, CU_STREAM_CAPTURE_MODE_RELAXED,
         CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CUDA_ERROR_INVALID_CONTEXT);
}
"""
    (tmp_path / "sizes.c").write_text(source)
    command = [compiler, f"-I{header.parent}", str(tmp_path / "sizes.c"), "-o", str(tmp_path / "sizes")]
    subprocess.run(command, check=True)
    said = subprocess.run([str(tmp_path / "sizes")], capture_output=True, text=True, check=True).stdout
    assert [int(v) for v in said.split()] == numbers


@pytest.mark.parametrize("group", MAPS, ids=lambda g: "x".join(map(str, g["box"])))
def test_patched_maps_are_those_that_the_driver_writes(monkeypatch: pytest.MonkeyPatch, group: dict[str, Any]) -> None:
    """From any of a group's maps, launching with another's matrix makes that one's 128 bytes."""
    for start in (0, len(group["maps"]) // 2, -1):
        fake, kernel = recorder(monkeypatch)
        fake.template = bytes.fromhex(group["maps"][start][4])
        for address, columns, rows, row_bytes, expected in group["maps"]:
            kernel.launch(-1, 7, (1, 1, 1), (address, rows, columns, row_bytes), VALUES)
            assert fake.map.hex() == expected


def test_what_a_launch_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, kernel = recorder(monkeypatch)
    kernel.launch(-1, 0x1234_5678_9ABC, (3, 5, 2), MATRIX, VALUES)
    assert fake.parameters == struct.pack(PARAMETERS + "x", *VALUES)
    sizes = struct.unpack("=7I4xQQI4x", fake.config)
    assert sizes[:8] == (3, 5, 2, kernel.threads, 1, 1, kernel.shared_bytes, 0x1234_5678_9ABC)
    assert fake.attributes == [struct.pack("=I4xi8x", 6, 1)]
    address, columns, rows = struct.unpack_from("=Q24xII", fake.map)
    assert (address, columns + 1, rows + 1) == (0x7F0000000010, 32, 3)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("cluster", [(1, 1, 1), (1, 2, 1), (1, 1, 4)])
def test_attributes(monkeypatch: pytest.MonkeyPatch, pdl: bool, cluster: tuple[int, int, int]) -> None:
    fake, kernel = recorder(monkeypatch, pdl=pdl, cluster=cluster)
    clustered = [struct.pack("=I4x3I", 4, *cluster)] if cluster != (1, 1, 1) else []
    for overlap in (True, False, True):
        kernel.launch(-1, 7, (4, 4, 4), MATRIX, VALUES, overlap)
        assert fake.attributes == clustered + [struct.pack("=I4xi8x", 6, 1)] * (pdl and overlap)


UNMAPPED = (
    (KernelSpec(Config(8, 1, 3, 1, 2), "nvfp4", "f16", True), _NVFP4_PARAMETERS, NVFP4_PARAMETERS + "x"),
    (DecodeSpec(), _DECODER_PARAMETERS, DECODER_PARAMETERS),
    (DecodeSpec(gather=True), _GATHERER_PARAMETERS, GATHERER_PARAMETERS),
    (GroupedSpec(GATHER_CONFIGS[0], "f16", "f16"), _GATHERING, GATHERING_PARAMETERS),
)


@pytest.mark.parametrize(("spec", "formats", "form"), UNMAPPED, ids=["nvfp4", "decoder", "gatherer", "gathering"])
@pytest.mark.parametrize("cluster", [(1, 1, 1), (1, 2, 1)])
def test_what_a_launch_without_a_tensor_map_is_given(
    monkeypatch: pytest.MonkeyPatch, spec: Spec, formats: Sequence[str], form: str, cluster: tuple[int, int, int]
) -> None:
    fake, _ = recorder(monkeypatch)
    kernel = Kernel(b"image", description(spec), formats, cluster=cluster)
    fake.sizes = tuple(description(spec)["params"])
    assert not kernel.mapped
    count = len(struct.unpack(form, bytes(struct.calcsize(form))))
    for round_ in range(3):
        values = tuple(100 * round_ + i for i in range(count))
        kernel.launch(-1, 0x1234_5678_9ABC, (3, 5, 2), None, values)
        assert fake.parameters == struct.pack(form, *values)
        sizes = struct.unpack("=7I4xQQI4x", fake.config)
        assert sizes[:8] == (3, 5, 2, kernel.threads, 1, 1, kernel.shared_bytes, 0x1234_5678_9ABC)
        clustered = [struct.pack("=I4x3I", 4, *cluster)] if cluster != (1, 1, 1) else []
        assert fake.attributes == [*clustered, struct.pack("=I4xi8x", 6, 1)]
    assert "cuTensorMapEncodeTiled" not in fake.calls
    assert len(kernel.frames) == 1


def test_a_description_with_a_tensor_map_is_refused_where_none_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other way round."""
    recorder(monkeypatch)
    spec, formats, _ = UNMAPPED[0]
    with pytest.raises(RuntimeError, match=r"takes parameters of \[128, 8, 24.*\] bytes, this version passes \[24, 24, 24"):
        Kernel(b"image", description(KernelSpec(Config(64, 1, 2, 2, 2), "f16", "f16", True)), formats)
    with pytest.raises(RuntimeError, match=r"takes parameters of \[24, 24, 24.*\] bytes, this version passes \[128, 24, 24"):
        Kernel(b"image", description(spec), formats, torch.float16, (8, 64))


def told(fake: Recorder) -> tuple[object, ...]:
    """All that a launch was given, but for where in memory."""
    return fake.parameters, fake.config[:40], fake.config[48:], fake.map, fake.attributes


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("cluster", [(1, 1, 1), (1, 2, 1)])
def test_a_repeat_is_byte_for_byte_what_launch_makes(
    monkeypatch: pytest.MonkeyPatch, pdl: bool, cluster: tuple[int, int, int]
) -> None:
    """Two repeats and plain launches take turns with the same memory; each is told what a launch of its own values is."""
    fake, kernel = recorder(monkeypatch, pdl=pdl, cluster=cluster)
    _, alone = recorder(monkeypatch, pdl=pdl, cluster=cluster)
    forms = (
        ((4, 4, 4), (16, 3, 32, 64), VALUES, True),
        ((7, 2, 1), (32, 9, 640, 1 << 35), (9, 640, *VALUES[2:13], 8, -0.5, 0.0, 7.0, 16, 9, 640, 641), False),
    )
    monkeypatch.setattr(driver, "_cuda", lambda: fake)
    repeats = [Repeat(kernel, -1, grid, matrix, params, _VARIED, overlap) for grid, matrix, params, overlap in forms]
    alone._launch = fake.cuLaunchKernelEx
    for i, which in enumerate((0, 0, 1, 1, 0, 2, 0, 1, 2, 1)):
        stream, address, addresses = 7 + i, 16 * i, [(1 << 63) + 100 * i + j for j in range(4)]
        if which == 2:
            kernel.launch(-1, 3, (1, 1, 1), MATRIX, VALUES)
            continue
        repeats[which](stream, address, *addresses)
        got = told(fake)
        grid, matrix, params, overlap = forms[which]
        own = list(params)
        for at, value in zip((2, 6, 7, 17), addresses):
            own[at] = value
        alone.launch(-1, stream, grid, (address, *matrix[1:]), tuple(own), overlap)
        assert got == told(fake)
    assert len(kernel.frames) == 1


def test_repeats_in_threads_never_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _, kernel = recorder(monkeypatch)
    repeats = [Repeat(kernel, -1, (1, 1, 1), MATRIX, VALUES, _VARIED) for _ in range(2)]

    def slow(config: int, handle: int, pointers: int, extra: None) -> int:
        before = ctypes.string_at(config, 40)
        time.sleep(0.001)  # lets another thread in
        assert ctypes.string_at(config, 40) == before
        at = (ctypes.c_void_p * len(SIZES)).from_address(pointers)
        (packed,) = struct.unpack("=Q", ctypes.string_at(at[2], 8))
        assert (packed,) == struct.unpack_from("=Q", before, 32)
        return 0

    kernel._launch = slow
    with ThreadPoolExecutor(8) as pool:
        for one in [pool.submit(repeats[i % 2], i, 16, i, 0, 0, 0) for i in range(200)]:
            one.result()
    assert 2 <= len(kernel.frames) <= 8


def test_a_description_of_other_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RuntimeError, match=r"the kernel takes parameters of \[128, 8\] bytes, this version passes \[128, 8, 24"
    ):
        recorder(monkeypatch, params=[128, 8])


def test_threads_never_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of eight threads finds its own values where it launched, though others launch the same kernel meanwhile."""
    _, kernel = recorder(monkeypatch)
    seen: set[tuple[int, int]] = set()

    def slow(config: int, handle: int, pointers: int, extra: None) -> int:
        before = ctypes.string_at(config, 40)
        seen.add((config, pointers))
        time.sleep(0.001)  # lets another thread in
        assert ctypes.string_at(config, 40) == before
        at = (ctypes.c_void_p * len(SIZES)).from_address(pointers)
        (m,) = struct.unpack("=i", ctypes.string_at(at[1], 4))
        (stream,) = struct.unpack_from("=Q", before, 32)
        assert m == stream
        return 0

    kernel._launch = slow
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(kernel.launch, -1, i, (1, 1, 1), MATRIX, (i, *VALUES[1:])) for i in range(200)]
        for one in done:
            one.result()
    assert 2 <= len(seen) <= 8
    assert len(kernel.frames) == len(seen)


def test_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, kernel = recorder(monkeypatch)
    addresses = set()
    for m in range(1, 200):
        kernel.launch(-1, 7, (1, 1, 1), (16 * m, m, 32, 64), (m, *VALUES[1:]))
        addresses.add(fake.addresses)
    assert len(addresses) == len(kernel.frames) == 1


def test_a_thread_without_a_context_gets_the_one_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, kernel = recorder(monkeypatch)
    kernel.load(-1)
    fake.context = 0
    driver._primary_context.cache_clear()
    kernel.launch(-1, 7, (1, 1, 1), MATRIX, VALUES)
    assert fake.context == CONTEXT
    assert fake.calls[-5:] == [
        "cuLaunchKernelEx", "cuCtxGetCurrent", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuLaunchKernelEx",
    ]  # fmt: skip
    fake.context = 5  # another library's, and not to be replaced
    with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx failed: CUDA_ERROR_FAKE \(201\)"):
        kernel.launch(-1, 7, (1, 1, 1), MATRIX, VALUES)
    assert fake.context == 5


@pytest.mark.parametrize("call", ["cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelSetAttribute", "cuKernelGetFunction"])
def test_a_failed_load_says_which_call_and_can_be_tried_again(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    fake, _ = recorder(monkeypatch)
    form = description(KernelSpec(Config(64, 1, 2, 2, 2), "f16", "f16", True))
    fake.failures[call] = 2

    def load_and_launch() -> None:
        made = Kernel(b"image", form, _PARAMETERS, torch.float16, (64, 64))
        made.launch(-1, 7, (1, 1, 1), MATRIX, VALUES)

    with pytest.raises(RuntimeError, match=rf"{call} failed: CUDA_ERROR_FAKE \(2\)"):
        load_and_launch()
    assert fake.mode == 0
    load_and_launch()


def test_loading_is_relaxed_and_restores_the_capture_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA forbids loading while a graph is captured in the stricter modes; the thread's own mode comes back."""
    fake, kernel = recorder(monkeypatch)
    assert fake.calls[:4] == [
        "cuThreadExchangeStreamCaptureMode", "cuLibraryLoadData", "cuLibraryGetKernel", "cuThreadExchangeStreamCaptureMode",
    ]  # fmt: skip
    del fake.calls[:]
    kernel.load(-1)
    assert fake.calls == [
        "cuThreadExchangeStreamCaptureMode", "cuCtxGetCurrent", "cuKernelSetAttribute", "cuKernelGetFunction",
        "cuThreadExchangeStreamCaptureMode",
    ]  # fmt: skip
    del fake.calls[:]
    kernel.load(-1)
    kernel.launch(-1, 7, (1, 1, 1), MATRIX, VALUES)
    assert fake.calls == ["cuTensorMapEncodeTiled", "cuLaunchKernelEx"]


def test_a_failed_launch_says_so_and_leaves_the_kernel_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, kernel = recorder(monkeypatch)
    fake.failures["cuLaunchKernelEx"] = 700
    with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx failed: CUDA_ERROR_FAKE \(700\)"):
        kernel.launch(-1, 7, (1, 1, 1), MATRIX, VALUES)
    kernel.launch(-1, 7, (1, 1, 1), MATRIX, VALUES)


def test_another_current_device_is_switched_from_and_back(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, kernel = recorder(monkeypatch)
    where: list[int] = []
    kernel._launch = lambda *args: where.append(fake.device) or Recorder.cuLaunchKernelEx(fake, *args)
    monkeypatch.setattr(torch.cuda, "device", lambda index: _Switch(fake, index))
    fake.device = 3
    kernel.launch(-1, 7, (1, 1, 1), MATRIX, VALUES)
    assert (where, fake.device) == ([-1], 3)


class _Switch:
    def __init__(self, fake: FakeCuda, index: int) -> None:
        self.fake, self.index = fake, index

    def __enter__(self) -> None:
        self.before, self.fake.device = self.fake.device, self.index

    def __exit__(self, *_: object) -> None:
        self.fake.device = self.before


def test_without_a_driver_the_error_names_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver._cuda.cache_clear()
    with pytest.raises(
        UnsupportedError, match=r"the NVIDIA driver library libcuda.so.1 cannot be loaded: libcuda.so.1: cannot"
    ):
        driver._cuda()
