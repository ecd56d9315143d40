"""capture.py: launches of a host object made here in C, which calls what CuTe DSL's calls, and of a real one."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emulator.kernels import launches
from glu4.emulator import capture as module
from glu4.emulator.capture import CapturedLaunch, capture, describe, pointer, scalar, tensor
from glu4.emulator.tensor_map import TensorMap, encode

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler named cc")

PTX = """
.version 8.6
.target sm_100a
.address_size 64
.visible .entry first(.param .u64 a, .param .align 8 .b8 b[24], .param .align 64 .b8 map[128]) { ret; }
.visible .entry second(.param .u32 n, .param .f32 x) { ret; }
"""

HEADER = """
void _mlir_host_cuda_init(void **);
void _mlir_host_cuda_load_to_device(void **);
void _mlir_host__mlir_ciface_run_long_name(void **args, int32_t num_args);
"""

HOST = """
#include <stdint.h>
#include <string.h>
typedef struct { uint32_t grid[3], block[3]; uint64_t shared; void *stream, *attributes; uint32_t count; } config;
typedef struct { uint32_t id, pad; uint8_t value[64]; } attribute;
extern int _cudaLibraryLoadData(), _cudaLibraryGetKernel(), _cudaLaunchKernelEx(), _cudaDeviceGetAttribute();
extern int _cudaFuncSetAttribute(), _cudaKernelSetAttributeForDevice(), _cuKernelGetAttribute(), _cudaGetDevice();
static void *first, *second;
void _mlir_host_cuda_init(void **a) {
  void *library = 0;
  *(int *)a[1] = _cudaLibraryLoadData(&library, "code", 0, 0, 0, 0, 0, 0);
  _cudaLibraryGetKernel(&first, library, "first");
  _cudaLibraryGetKernel(&second, library, "SECOND");
}
void _mlir_host_cuda_load_to_device(void **a) {
  int shared = 0, fixed = 1, device = 7;
  _cudaGetDevice(&device);
  _cudaDeviceGetAttribute(&shared, 97, device);
  _cuKernelGetAttribute(&fixed, 1, first, device);
  _cudaKernelSetAttributeForDevice(first, 8, shared - fixed, device);
  _cudaFuncSetAttribute(first, 14, 1);
  *(int *)a[2] = shared == 232448 && fixed == 0 && device == 0 ? 0 : 3;
}
void _mlir_host__mlir_ciface_run_long_name(void **args, int32_t count) {
  struct { void *data; int32_t shape[2]; int64_t stride; } *t = args[1];
  int32_t n = *(int32_t *)args[2];
  attribute attributes[2];
  memset(attributes, 0xEE, sizeof attributes);
  attributes[0].id = 6; *(uint32_t *)attributes[0].value = 1;
  attributes[1].id = 4; uint32_t cluster[3] = {2, 1, 1}; memcpy(attributes[1].value, cluster, 12);
  config c = {{n, 2, 1}, {192, 1, 1}, 4096, 0, attributes, 2};
  uint8_t map[128];
  memcpy(map, args[3], 64);
  memset(map + 64, 0xCC, 64);
  void *given[3] = {args[0], t, map};
  EXTRA
  int code = _cudaLaunchKernelEx(&c, first, given);
  float x = t->shape[0] + 0.5f;
  config d = {{1, 1, 1}, {32, 1, 1}, 0, 0, 0, 0};
  void *others[2] = {&t->shape[1], &x};
  *(int *)args[count - 1] = code | _cudaLaunchKernelEx(&d, second, others);
}
"""

MAP = TensorMap(0x7000_0000_1000, "bf16", (64, 32), (128,), (64, 8), (1, 1), "128B")


def build(folder: Path, *edits: tuple[str, str], header: str = HEADER) -> Path:
    """host.o with host.h, the C source changed by replacements."""
    text = HOST.replace("SECOND", "second")
    for old, new in edits:
        text = text.replace(old, new)
    (folder / "host.c").write_text(text.replace("EXTRA", ""))
    (folder / "host.h").write_text(header)
    subprocess.run(["cc", "-w", "-c", str(folder / "host.c"), "-o", str(folder / "host.o")], check=True)
    return folder / "host.o"


ARGUMENTS = [
    pointer(0x7000_0000_0000),
    tensor(0x7100_0000_0040, (5, 9), (77,)),
    scalar("i32", 6),
    encode(MAP)[:64],
]


@needs_compiler
def test_launches_are_recorded_with_their_parameters(tmp_path: Path) -> None:
    first, second = capture(build(tmp_path), PTX, ARGUMENTS)
    assert (first.kernel, first.grid, first.block, first.cluster) == ("first", (6, 2, 1), (192, 1, 1), (2, 1, 1))
    assert first.dynamic_smem == 4096
    assert first.attributes[6][:4] == b"\1\0\0\0"
    assert first.params[0] == pointer(0x7000_0000_0000)
    assert first.params[1] == struct.pack("<QiiQ", 0x7100_0000_0040, 5, 9, 77)
    assert first.params[2] == encode(MAP)[:64] + b"\xcc" * 64
    assert (second.kernel, second.grid, second.cluster, second.attributes) == ("second", (1, 1, 1), None, {})
    assert second.params == (b"\x09\0\0\0", struct.pack("<f", 5.5))


@needs_compiler
def test_a_captured_launch_becomes_a_description(tmp_path: Path) -> None:
    first, second = capture(build(tmp_path), PTX, ARGUMENTS)
    described = describe(first, {"A": (0x7000_0000_0000, 8192), "T": (0x7100_0000_0000, 256)})
    assert described == {
        "entry": "first",
        "grid": [6, 2, 1],
        "block": [192, 1, 1],
        "cluster": [2, 1, 1],
        "dynamic_smem": 4096,
        "params": [
            {"ptr": "A"},
            {"pack": [{"ptr": "T", "offset": 64}, {"bytes": "05000000090000004d00000000000000"}]},
            {
                "tensor_map": {
                    "buffer": "A",
                    "offset": 4096,
                    "element_type": "bf16",
                    "global_shape": [64, 32],
                    "global_strides_bytes": [128],
                    "box_shape": [64, 8],
                    "element_strides": [1, 1],
                    "swizzle": "128B",
                    "interleave": "none",
                    "oob_fill": "zero",
                }
            },
        ],
    }
    plain = describe(second, {})
    assert "cluster" not in plain
    assert plain["params"] == [{"bytes": "09000000"}, {"bytes": "0000b040"}]


def test_pointers_at_the_edge_of_a_buffer() -> None:
    data = struct.pack("<4Q", 0x5000, 0x500F, 0x5010, 0x4FFF)
    launch = CapturedLaunch("k", (1, 1, 1), (32, 1, 1), None, 0, {}, (data, b"\1\2\3", b""))
    got = describe(launch, {"X": (0x5000, 16)})["params"]
    assert got == [
        {"pack": [{"ptr": "X"}, {"ptr": "X", "offset": 15}, {"bytes": struct.pack("<2Q", 0x5010, 0x4FFF).hex()}]},
        {"bytes": "010203"},
        {"pack": []},
    ]


def test_a_tensor_map_elsewhere_is_refused() -> None:
    launch = CapturedLaunch("k", (1, 1, 1), (32, 1, 1), None, 0, {}, (encode(MAP),))
    with pytest.raises(ValueError, match="address 0x700000001000 is in none of the buffers X"):
        describe(launch, {"X": (0x5000, 16)})


@needs_compiler
@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            [("EXTRA", "extern int _cudaGraphLaunch(void); _cudaGraphLaunch();")],
            "the host code calls _cudaGraphLaunch, which is not",
        ),
        ([("EXTRA", "*(volatile int *)0 = 1;")], r"the host code of host.o failed \(-11\): no message"),
        ([('"second"', '"third"')], "failed .91.: kernel third is not in the PTX"),
        ([("code | _cuda", "35 | _cuda")], "the host function of host.o returned error 35"),
        ([("shared == 232448", "0")], "the host function of host.o returned error 3"),
        ([("EXTRA", "exit(0);")], "ended before its record was whole"),
    ],
)
def test_host_code_that_fails_says_how(tmp_path: Path, edits: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        capture(build(tmp_path, *edits), PTX, ARGUMENTS)


@needs_compiler
def test_a_foreign_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one function for ENTRY, found .*was it made by export_to_c"):
        capture(build(tmp_path, header=HEADER.replace("_mlir_ciface_", "_other_")), PTX, ARGUMENTS)


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "host.h").write_text(HEADER)
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="needs a C compiler named cc; there is none on PATH"):
        capture(tmp_path / "host.o", PTX, ARGUMENTS)


def test_arguments_are_laid_out_as_in_c() -> None:
    assert tensor(1, (2,), (3, 4)) == struct.pack("<Qi4xqq", 1, 2, 3, 4)
    assert tensor(1, (), ()) == pointer(1)
    assert [len(scalar(kind, 1)) for kind in ("i32", "u32", "f32", "i64", "u64", "f64")] == [4, 4, 4, 8, 8, 8]
    with pytest.raises(ValueError, match="scalar: 'f16' is unknown"):
        scalar("f16", 1)


RECOMPILE = """
import json, sys, tempfile
sys.path.insert(0, sys.argv[1])
import compile_cute
kernel, problem = compile_cute.CASES["gemm"]
with tempfile.TemporaryDirectory() as folder:
    text, (launch, buffers) = compile_cute.compile_case("gemm", kernel, problem, folder)
print(json.dumps(compile_cute.describe(launch, buffers)))
"""


@needs_compiler
def test_a_kernel_of_cute_dsl_is_captured_as_committed(tmp_path: Path) -> None:
    if importlib.util.find_spec("cutlass") is None:
        pytest.skip("needs CuTe DSL")
    command = [sys.executable, "-c", RECOMPILE, str(launches.FOLDER)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    got: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    _, committed, _ = launches.load("cute_gemm")
    assert {k: v for k, v in got.items() if k != "entry"} == {
        k: v for k, v in committed.items() if k not in ("entry", "buffers")
    }
