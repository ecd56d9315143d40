"""The launch that a CuTe DSL host function would make: grid, cluster, attributes and the bytes of every kernel parameter.

`compiled.export_to_c(...)` of CuTe DSL writes an object file whose host code makes tensor maps itself and calls a few CUDA
functions. Here those functions only record. The object is linked with them into a program by the system's C compiler, and the
program is run: no GPU, no driver and no CuTe DSL are needed, and host code that crashes takes nothing with it.

Facts of the object (CuTe DSL 4.8.1): the eight functions that it imports have the signatures of the CUDA runtime functions of
their names, with an underscore before; its entries take an array of pointers to their arguments, the last to an int that
receives the return code.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glu4.emulator import tensor_map
from glu4.emulator.ptx import parse

__all__ = ["CapturedLaunch", "capture", "describe", "pointer", "scalar", "tensor"]

_CLUSTER = 4  # cudaLaunchAttributeClusterDimension
_TIMEOUT_SECONDS = 60

STUB = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { uint32_t grid[3], block[3]; size_t shared; void *stream; const uint8_t *attributes; uint32_t count; } config;
typedef struct { char *name; uint32_t count; uint32_t *sizes; } kernel;

static kernel *kernels;
static uint32_t kernel_count;
static FILE *out;

static void put(const void *data, size_t size) { fwrite(data, 1, size, out); }
static void put32(uint32_t value) { put(&value, 4); }
static void get(void *data, size_t size) { if (fread(data, 1, size, stdin) != size) exit(90); }
static uint32_t get32(void) { uint32_t value; get(&value, 4); return value; }

int _cudaLibraryLoadData(void **library, const void *code, void *a, void **b, unsigned c, void *d, void **e, unsigned f) {
  *library = (void *)code;
  return 0;
}
int _cudaLibraryGetKernel(void **found, void *library, const char *name) {
  for (uint32_t i = 0; i < kernel_count; i++)
    if (!strcmp(kernels[i].name, name)) { *found = &kernels[i]; return 0; }
  fprintf(stderr, "kernel %s is not in the PTX", name);
  exit(91);
}
int _cuKernelGetAttribute(int *value, int attribute, void *k, int device) { *value = 0; return 0; }
int _cudaKernelSetAttributeForDevice(void *k, int attribute, int value, int device) { return 0; }
int _cudaFuncSetAttribute(void *k, int attribute, int value) { return 0; }
/* 97: shared memory that one block may opt in to */
int _cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 97 ? 232448 : 0; return 0; }
int _cudaGetDevice(int *device) { *device = 0; return 0; }
int _cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int _cudaLaunchKernelEx(const config *c, void *function, void **arguments) {
  kernel *k = function;
  put32(1);
  put32((uint32_t)strlen(k->name));
  put(k->name, strlen(k->name));
  put(c->grid, 12);
  put(c->block, 12);
  put32((uint32_t)c->shared);
  put32(c->count);
  /* an attribute is a 4-byte id, padding to 8, and a 64-byte value */
  for (uint32_t i = 0; i < c->count; i++) { put(c->attributes + 72 * i, 4); put(c->attributes + 72 * i + 8, 64); }
  put32(k->count);
  for (uint32_t i = 0; i < k->count; i++) { put32(k->sizes[i]); put(arguments[i], k->sizes[i]); }
  return 0;
}

extern void INIT(void *);
extern void LOAD(void *);
extern void ENTRY(void **, int32_t);

int main(int argc, char **argv) {
  out = fopen(argv[1], "wb");
  kernel_count = get32();
  kernels = calloc(kernel_count, sizeof(kernel));
  for (uint32_t i = 0; i < kernel_count; i++) {
    uint32_t length = get32();
    kernels[i].name = calloc(length + 1, 1);
    get(kernels[i].name, length);
    kernels[i].count = get32();
    kernels[i].sizes = calloc(kernels[i].count + 1, 4);
    for (uint32_t j = 0; j < kernels[i].count; j++) kernels[i].sizes[j] = get32();
  }
  int code = 0, device = 0;
  void *library = 0, *place = &library;
  struct { void **library; int *code; } init = {&place, &code};
  INIT(&init);
  struct { void **library; int *device; int *code; } load = {&place, &device, &code};
  if (!code) LOAD(&load);
  uint32_t count = get32();
  void **arguments = calloc(count + 1, sizeof(void *));
  for (uint32_t i = 0; i < count; i++) {
    uint32_t size = get32();
    arguments[i] = calloc(1, size + 16);
    get(arguments[i], size);
  }
  arguments[count] = &code;
  if (!code) ENTRY(arguments, (int32_t)count + 1);
  put32(0);
  put32((uint32_t)code);
  return 0;
}
"""


@dataclass(frozen=True)
class CapturedLaunch:
    """One launch. cluster: None if the host code asks for none.

    attributes: cudaLaunchAttributeID to its 64 bytes, of which those past the used field are garbage.
    params: bytes of each kernel parameter, in .param order; bytes past a structure's fields are garbage, and so are the upper
    64 of a tensor map.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] | None
    dynamic_smem: int
    attributes: dict[int, bytes]
    params: tuple[bytes, ...]


def pointer(address: int) -> bytes:
    """An argument that is a pointer or a stream."""
    return struct.pack("<Q", address)


def scalar(kind: str, value: float) -> bytes:
    """An argument that is a number; `kind` as in a launch description: i32, u32, i64, u64, f32, f64."""
    formats = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "f32": "<f", "f64": "<d"}
    if kind not in formats:
        raise ValueError(f"scalar: {kind!r} is unknown; known are {', '.join(formats)}")
    return struct.pack(formats[kind], value)


def tensor(address: int, shape: Sequence[int], strides: Sequence[int]) -> bytes:
    """An argument that is a tensor: its address, then the extents and strides that were not fixed at compile time."""
    head = struct.pack(f"<Q{len(shape)}i", address, *shape)
    return head + bytes(-len(head) % 8) + struct.pack(f"<{len(strides)}q", *strides)


def _entries(header: str) -> dict[str, str]:
    """Macros that name the object's three functions."""
    found = {
        macro: re.findall(rf"^(?:extern \"C\"\s*)?void\s+(\w*{suffix}\w*)\(", header, re.MULTILINE)
        for macro, suffix in (("INIT", "_cuda_init"), ("LOAD", "_cuda_load_to_device"), ("ENTRY", "_mlir_ciface_"))
    }
    for macro, names in found.items():
        if len(names) != 1:
            raise ValueError(f"header: expected one function for {macro}, found {names}; was it made by export_to_c?")
    return {macro: names[0] for macro, names in found.items()}


def _link(object_file: Path, header: str, folder: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("capturing a launch needs a C compiler named cc; there is none on PATH")
    source, program = folder / "stub.c", folder / "launch"
    source.write_text(STUB)
    macros = [f"-D{macro}={name}" for macro, name in _entries(header).items()]
    command = [compiler, "-O1", "-w", *macros, str(source), str(object_file), "-o", str(program), "-lm"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    if made.returncode:
        missing = sorted(set(re.findall(r"undefined reference to [`'](\w+)'", made.stderr)))
        if missing:
            raise RuntimeError(f"the host code calls {', '.join(missing)}, which is not recorded")
        raise RuntimeError(f"{object_file.name} cannot be linked: {made.stderr.strip()[-500:]}")
    return program


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise RuntimeError("the captured program ended before its record was whole")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def triple(self) -> tuple[int, int, int]:
        return self.number(), self.number(), self.number()


def _read_launch(r: _Reader) -> CapturedLaunch:
    kernel = r.take(r.number()).decode()
    grid, block, shared = r.triple(), r.triple(), r.number()
    attributes = {}
    for _ in range(r.number()):
        identity = r.number()
        attributes[identity] = r.take(64)
    params = tuple(r.take(r.number()) for _ in range(r.number()))
    cluster = None
    if _CLUSTER in attributes:
        x, y, z = struct.unpack("<3I", attributes[_CLUSTER][:12])
        cluster = (x, y, z)
    return CapturedLaunch(kernel, grid, block, cluster, shared, attributes, params)


def _words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def capture(object_file: str | Path, ptx: str, arguments: Sequence[bytes]) -> list[CapturedLaunch]:
    """Runs the host function of an exported object and returns its launches, in order.

    object_file: NAME.o as export_to_c wrote it, with NAME.h beside it. ptx: the kernels' PTX, for the sizes of their
    parameters. arguments: memory of each argument of the host function, in the order of NAME.h, without the final return
    code: `pointer`, `scalar` and `tensor` make them; addresses may be invented. Raises ValueError for a header that is not of
    export_to_c, RuntimeError if there is no C compiler or the program fails.
    """
    path = Path(object_file)
    header = path.with_suffix(".h").read_text()
    kernels = [function for function in parse(ptx).functions.values() if function.entry]
    request = _words(len(kernels))
    for function in kernels:
        sizes = [parameter.size for parameter in function.params]
        name = function.name.encode()
        request += _words(len(name)) + name + _words(len(sizes), *sizes)
    request += _words(len(arguments)) + b"".join(_words(len(blob)) + blob for blob in arguments)
    with tempfile.TemporaryDirectory() as scratch:
        program, record = _link(path.resolve(), header, Path(scratch)), Path(scratch) / "record"
        ran = subprocess.run([str(program), str(record)], input=request, capture_output=True, timeout=_TIMEOUT_SECONDS)
        if ran.returncode:
            detail = ran.stderr.decode(errors="replace").strip()[-500:]
            raise RuntimeError(f"the host code of {path.name} failed ({ran.returncode}): {detail or 'no message'}")
        reader = _Reader(record.read_bytes())
    launches = []
    while reader.number():
        launches.append(_read_launch(reader))
    code = reader.number()
    if code:
        raise RuntimeError(f"the host function of {path.name} returned error {code}")
    return launches


def _place(address: int, buffers: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
    """A pointer as a buffer and an offset into it; None if it points into none."""
    for name, (start, size) in buffers.items():
        if start <= address < start + size:
            return {"ptr": name, "offset": address - start} if address > start else {"ptr": name}
    return None


def _describe_map(data: bytes, buffers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    t = tensor_map.decode(data)
    place = _place(t.address, buffers)
    if place is None:
        raise ValueError(f"tensor map: address {t.address:#x} is in none of the buffers {', '.join(buffers)}")
    return {
        "tensor_map": {
            "buffer": place["ptr"],
            **({"offset": place["offset"]} if "offset" in place else {}),
            "element_type": t.element_type,
            "global_shape": list(t.global_shape),
            "global_strides_bytes": list(t.global_strides),
            "box_shape": list(t.box_shape),
            "element_strides": list(t.element_strides),
            "swizzle": t.swizzle,
            "interleave": t.interleave,
            "oob_fill": t.oob_fill,
        }
    }


def _describe_bytes(data: bytes, buffers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Bytes with the pointers among them, which lie at multiples of 8, named."""
    parts: list[dict[str, Any]] = []
    plain = b""
    for at in range(0, len(data), 8):
        word = data[at : at + 8]
        place = _place(int.from_bytes(word, "little"), buffers) if len(word) == 8 else None
        if place is None:
            plain += word
            continue
        parts += [{"bytes": plain.hex()}] * bool(plain) + [place]
        plain = b""
    parts += [{"bytes": plain.hex()}] * bool(plain)
    return parts[0] if len(parts) == 1 else {"pack": parts}


def describe(launch: CapturedLaunch, buffers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The launch description of a captured launch, in which pointers and tensor maps name buffers; without "buffers".

    buffers: name to (address given to the host function, bytes). A parameter of 128 bytes is a tensor map. Raises ValueError
    for a map that cannot be decoded or points into no buffer.
    """
    params = [_describe_map(data, buffers) if len(data) == 128 else _describe_bytes(data, buffers) for data in launch.params]
    return {
        "entry": launch.kernel,
        "grid": list(launch.grid),
        "block": list(launch.block),
        **({"cluster": list(launch.cluster)} if launch.cluster else {}),
        "dynamic_smem": launch.dynamic_smem,
        "params": params,
    }
