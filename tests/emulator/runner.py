"""Small kernels around single instructions, for the tests of the emulator."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from glu4.emulator.launch import Result, emulate

HEAD = """.version 8.8
.target sm_100a
.address_size 64
"""
_BITS = {"pred": 32, "8": 8, "16": 16, "32": 32, "64": 64}


def module(body: str, params: str = "", declarations: str = "", directives: str = "", top: str = "") -> str:
    """A module with one kernel k."""
    return f"{HEAD}{top}\n.visible .entry k({params})\n{directives}\n{{\n{declarations}\n{body}\n}}\n"


def run(body: str, buffers: Mapping[str, Any] | None = None, *, declarations: str = "", top: str = "", directives: str = "",
        launch: Mapping[str, Any] | None = None, **options: Any) -> Result:  # fmt: skip
    """Run a kernel body whose parameters are pointers to the buffers, by name; %name holds each address."""
    buffers = dict(buffers or {})
    params = ", ".join(f".param .u64 p_{name}" for name in buffers)
    loads = "".join(f".reg .b64 %{name}; ld.param.b64 %{name}, [p_{name}];\n" for name in buffers)
    text = module(loads + body, params, declarations, directives, top)
    whole = {"grid": [1], "block": [32], "params": [{"ptr": name} for name in buffers], **(launch or {})}
    return emulate(text, whole, buffers, **options)


def op(text: str, out: str, *inputs: tuple[str, Sequence[Any] | np.ndarray], guard: str = "") -> np.ndarray:
    """Results of one instruction on many operands: out and each input's kind give the width of a register, such as b32.

    In the text %d is the result, %a, %b, %c, %e the operands. Returns unsigned integers.
    """
    count = len(inputs[0][1])
    names = "abce"
    buffers: dict[str, Any] = {}
    code = [
        ".reg .b32 %i, %n; .reg .b64 %at; .reg .pred %q; mov.u32 %i, %tid.x; mov.u32 %n, %ctaid.x; mad.lo.u32 %i, %n, 32, %i;"
    ]
    code += [f"setp.ge.u32 %q, %i, {count}; @%q exit;"]
    for name, (kind, values) in zip(names, inputs):
        bits = _width(kind)
        buffers[name] = _unsigned(values, bits)
        reg = f"%{name}" if kind != "pred" else f"%{name}_"
        code.append(
            f".reg .b{bits} {reg}; mul.wide.u32 %at, %i, {bits // 8}; add.u64 %at, %at, %p{name}; ld.global.b{bits} {reg}, [%at];"
        )
        if kind == "pred":
            code.append(f".reg .pred %{name}; setp.ne.b32 %{name}, %{name}_, 0;")
    bits = _width(out)
    code.append(f".reg .{'pred' if out == 'pred' else f'b{bits}'} %d;")
    code.append(guard + text)
    if out == "pred":
        code.append(".reg .b32 %d_; selp.b32 %d_, 1, 0, %d;")
    code.append(
        f"mul.wide.u32 %at, %i, {bits // 8}; add.u64 %at, %at, %out; st.global.b{bits} [%at], {'%d_' if out == 'pred' else '%d'};"
    )
    buffers["out"] = np.zeros(count, dtype=f"u{bits // 8}")
    body = "\n".join(code).replace("%pa", "%a__").replace("%pb", "%b__").replace("%pc", "%c__").replace("%pe", "%e__")
    renamed = {f"{n}__" if n in names else n: v for n, v in buffers.items()}
    result = run(body, renamed, launch={"grid": [-(-count // 32)]})
    assert result.report.clean, str(result.report)
    return result.buffers["out"]


def _width(kind: str) -> int:
    return 32 if kind == "pred" else int(kind.lstrip("busf"))


def _unsigned(values: Any, bits: int) -> np.ndarray:
    if isinstance(values, np.ndarray) and (values.dtype.kind == "f" or values.itemsize * 8 == bits):
        return np.ascontiguousarray(values).view(f"u{bits // 8}")
    return np.array([int(v) & (1 << bits) - 1 for v in values], dtype=f"u{bits // 8}")


def kinds(result: Result) -> list[str]:
    """Classes of the hazards that were found."""
    return sorted({h.kind for h in result.report.hazards})


# the C library as an oracle of directed rounding

_LIBM = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
_MODES = {"rn": 0x000, "rm": 0x400, "rp": 0x800, "rz": 0xC00}  # <fenv.h> on x86-64
for _name, _type, _count in (
    ("fmaf", ctypes.c_float, 3),
    ("fma", ctypes.c_double, 3),
    ("sqrtf", ctypes.c_float, 1),
    ("sqrt", ctypes.c_double, 1),
):
    getattr(_LIBM, _name).restype = _type
    getattr(_LIBM, _name).argtypes = [_type] * _count


@contextmanager
def rounding(mode: str) -> Iterator[None]:
    _LIBM.fesetround(_MODES[mode])
    try:
        yield
    finally:
        _LIBM.fesetround(0)


def libm(name: str, mode: str, *operands: np.ndarray) -> np.ndarray:
    """A function of the C library on arrays, rounded in a direction."""
    function = getattr(_LIBM, name)
    lists = [[float(v) for v in o] for o in operands]
    out = []
    for values in zip(*lists):
        _LIBM.fesetround(_MODES[mode])
        out.append(function(*values))
        _LIBM.fesetround(0)
    return np.array(out, dtype=np.float32 if name.endswith("f") else np.float64)
