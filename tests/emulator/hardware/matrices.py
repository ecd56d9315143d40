"""wgmma and mma.sync: every N, both sources of A, layouts in shared memory, types, signs, and scale-d.

Shared memory, A's registers and D are given as they are, so that no layout is assumed: an element taken from another place
changes the result. Small integers make every sum exact, whatever its order; other values are compared within the bound of
float32 accumulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emulator.hardware.case import Case, copy_in, kernel

__all__ = ["cases"]

_ROOM = 40960
_SWIZZLES = {"none": 0, "128B": 1, "64B": 2, "32B": 3}


@dataclass(frozen=True)
class _Operand:
    """A matrix in shared memory: byte offset of its start, strides in bytes, swizzle, and whether MN is contiguous."""

    start: int
    leading: int
    stride: int
    swizzle: str = "128B"
    transposed: bool = False

    @property
    def fixed(self) -> int:
        """The descriptor without the address of shared memory."""
        return self.leading // 16 << 16 | self.stride // 16 << 32 | _SWIZZLES[self.swizzle] << 62


_A = _Operand(32768, 16, 1024)
_B = _Operand(0, 16, 1024)


def _exact(kind: str) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Small integers as 16-bit codes."""

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        numbers = rng.integers(-4, 5, count).astype(np.float32)
        return _codes(numbers, kind)

    return draw


def _any(kind: str) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Normal numbers of moderate size, some subnormal or zero."""

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        numbers = (rng.standard_normal(count) * np.exp2(rng.integers(-6, 3, count))).astype(np.float32)
        numbers = np.where(rng.random(count) < 0.05, numbers * np.float32(2.0**-20), numbers).astype(np.float32)
        return _codes(numbers, kind)

    return draw


def _codes(numbers: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return numbers.astype(np.float16).view(np.uint16)
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _wgmma(name: str, n: int, kind: str = "f16", d_type: str = "f32", a: _Operand | None = _A, b: _Operand = _B,
           steps: tuple[tuple[int, int, int], ...] = ((1, 1, 1), (1, 1, 1)), exact: bool = True) -> Case:  # fmt: skip
    """Products in a row into one accumulator; steps: (scale-d, imm-scale-a, imm-scale-b). a: None for registers."""
    count = n // 2 if d_type == "f32" else n // 4
    registers = ", ".join(f"%d{i}" for i in range(count))
    code = [
        f".shared .align 1024 .b8 room[{_ROOM}]; .reg .b32 %t, %x, %d<{count}>, %f<4>; .reg .b64 %da, %db, %s, %at; .reg .pred %keep; mov.u32 %t, %tid.x;"
    ]
    code.append(copy_in(_ROOM, 128) + "fence.proxy.async; bar.sync 0; mov.u32 %x, room; shr.u32 %x, %x, 4; cvt.u64.u32 %s, %x;")
    code.append(f"add.u64 %db, %s, {b.start // 16}; or.b64 %db, %db, {b.fixed:#x};")
    if a is not None:
        code.append(f"add.u64 %da, %s, {a.start // 16}; or.b64 %da, %da, {a.fixed:#x};")
        source, flags = "%da", f"{int(a.transposed)}, {int(b.transposed)}"
    else:
        code.append("ld.param.u64 %at, [pa]; mad.wide.u32 %at, %t, 16, %at; ld.global.v4.b32 {%f0, %f1, %f2, %f3}, [%at];")
        source, flags = "{%f0, %f1, %f2, %f3}", f"{int(b.transposed)}"
    code.append(f"ld.param.u64 %at, [pd]; mad.wide.u32 %at, %t, {4 * count}, %at;")
    code += [f"ld.global.b32 %d{i}, [%at+{4 * i}];" for i in range(count)]
    code.append("wgmma.fence.sync.aligned;")
    for scale, sign_a, sign_b in steps:
        code.append(f"setp.ne.u32 %keep, {scale}, 0;")
        code.append(
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.{d_type}.{kind}.{kind} {{{registers}}}, {source}, %db, %keep, {sign_a}, {sign_b}, {flags};"
        )
    code.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;")
    code.append(f"ld.param.u64 %at, [pout]; mad.wide.u32 %at, %t, {4 * count}, %at;")
    code += [f"st.global.b32 [%at+{4 * i}], %d{i};" for i in range(count)]
    draw = _exact(kind) if exact else _any(kind)

    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        room, registers = draw(rng, _ROOM // 2), draw(rng, 128 * 8).reshape(128, 8)
        start = rng.integers(-8, 9, (128, n // 2)).astype(np.float32)
        start = start if exact else start * np.float32(0.37)
        return {"in": room, "a": registers, "d": start if d_type == "f32" else start.astype(np.float16)}

    dtype = "float32" if d_type == "f32" else "float16"
    launch = {
        "grid": [1],
        "block": [128],
        "buffers": {"out": {"dtype": dtype, "shape": [128, n // 2]}},
        "params": [{"ptr": "in"}, {"ptr": "a"}, {"ptr": "d"}, {"ptr": "out"}],
    }
    extra = {"additions": 16 * len(steps) + 1, "d_type": d_type, "roundings": len(steps)}
    ptx = kernel("\n".join(code), ("pin", "pa", "pd", "pout"))
    return Case(f"wgmma/{name}", ptx, launch, make, compare="bits" if exact else "matrix", full=not exact, extra=extra)


def _layouts() -> list[Case]:
    found = []
    operands = {
        "k-none": _Operand(0, 128, 256, "none"),
        "k-none-wide": _Operand(48, 4224, 272, "none"),
        "k-32B": _Operand(0, 16, 256, "32B"),
        "k-32B-apart": _Operand(512, 16, 768, "32B"),
        "k-64B": _Operand(0, 16, 512, "64B"),
        "k-64B-second": _Operand(32, 16, 1024, "64B"),
        "k-128B": _Operand(0, 16, 1024, "128B"),
        "k-128B-second": _Operand(32, 16, 1024, "128B"),
        "k-128B-fourth": _Operand(1024 + 96, 16, 2048, "128B"),
        "mn-none": _Operand(0, 2048, 128, "none", True),
        "mn-none-wide": _Operand(80, 4112, 144, "none", True),
        "mn-32B": _Operand(0, 1024, 256, "32B", True),
        "mn-32B-apart": _Operand(256, 512, 2304, "32B", True),
        "mn-64B": _Operand(0, 1024, 512, "64B", True),
        "mn-64B-apart": _Operand(512, 2560, 1024, "64B", True),
        "mn-128B": _Operand(0, 2048, 1024, "128B", True),
        "mn-128B-apart": _Operand(1024, 3072, 5120, "128B", True),
    }
    for name, operand in operands.items():
        kind = "bf16" if len(found) % 4 < 2 else "f16"
        found.append(_wgmma(f"layout-a-{name}", 24, kind, a=operand, b=_Operand(16384, 128, 256, "none")))
        found.append(
            _wgmma(f"layout-b-{name}", 96 if operand.transposed else 72, kind, a=_Operand(32768, 16, 512, "64B"), b=operand)
        )
    wide = _Operand(32768, 2048, 1024, "128B", True), _Operand(0, 2048, 1024, "128B", True)
    found += [_wgmma(f"transposed-{n}", n, "bf16", a=wide[0], b=wide[1]) for n in (64, 128, 256)]
    return found


def _products() -> list[Case]:
    found = [_wgmma(f"shared-n{n}", n, "f16" if n % 16 else "bf16") for n in range(8, 257, 8)]
    for n in (8, 16, 24, 32, 64, 72, 128, 192, 248, 256):
        found.append(_wgmma(f"registers-n{n}", n, "bf16" if n % 16 else "f16", a=None))
        found.append(_wgmma(f"half-n{n}", n, d_type="f16", a=_A if n % 3 else None))
    transposed = _Operand(0, 2048, 1024, "128B", True)
    found += [_wgmma(f"registers-transposed-n{n}", n, a=None, b=transposed) for n in (16, 64)]
    scales = {"overwrite": ((0, 1, 1), (1, 1, 1)), "overwrite-last": ((1, 1, 1), (0, 1, 1)), "minus-a": ((1, -1, 1),),
              "minus-b": ((1, 1, -1), (1, 1, 1), (1, 1, -1)), "minus-both": ((0, -1, -1), (1, 1, -1))}  # fmt: skip
    for name, steps in scales.items():
        found.append(_wgmma(f"scale-{name}", 40, "bf16", steps=steps))
        found.append(_wgmma(f"scale-{name}-registers", 16, "f16", a=None, steps=steps))
        found.append(_wgmma(f"scale-{name}-half", 24, "f16", "f16", steps=steps))
    for kind in ("f16", "bf16"):
        for n in (8, 32):
            found.append(_wgmma(f"real-{kind}-n{n}", n, kind, exact=False))
            found.append(
                _wgmma(f"real-registers-{kind}-n{n}", n, kind, a=None, exact=False, steps=((0, 1, 1), *((1, 1, 1),) * 7))
            )
    found.append(_wgmma("real-half-n32", 32, "f16", "f16", exact=False))
    return found


def _mma(name: str, k: int, kind: str, d_type: str, exact: bool) -> Case:
    """mma.sync by 8 warps on data of their own, twice in a row."""
    count = 4 if d_type == "f32" else 2
    a, b, d = ([f"%{x}{i}" for i in range(c)] for x, c in (("a", k // 4), ("b", k // 8), ("d", count)))
    code = [f".reg .b32 %t, %a<{k // 4}>, %b<{k // 8}>, %d<{count}>; .reg .b64 %at; mov.u32 %t, %tid.x;"]
    for pointer, registers in (("pa", a), ("pb", b), ("pd", d)):
        code.append(f"ld.param.u64 %at, [{pointer}]; mad.wide.u32 %at, %t, {4 * len(registers)}, %at;")
        code += [f"ld.global.b32 {r}, [%at+{4 * i}];" for i, r in enumerate(registers)]
    vectors = ["{" + ", ".join(r) + "}" for r in (d, a, b, d)]
    code.append(f"mma.sync.aligned.m16n8k{k}.row.col.{d_type}.{kind}.{kind}.{d_type} {', '.join(vectors)};" * 2)
    code.append(f"ld.param.u64 %at, [pout]; mad.wide.u32 %at, %t, {4 * count}, %at;")
    code += [f"st.global.b32 [%at+{4 * i}], {r};" for i, r in enumerate(d)]
    draw = _exact(kind) if exact else _any(kind)

    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        start = rng.integers(-8, 9, (256, 4)).astype(np.float32) * np.float32(1 if exact else 0.37)
        given = {"a": draw(rng, 256 * k // 2), "b": draw(rng, 256 * k // 4)}
        return {**given, "d": start if d_type == "f32" else start.astype(np.float16)}

    dtype = "float32" if d_type == "f32" else "float16"
    launch = {
        "grid": [1],
        "block": [256],
        "buffers": {"out": {"dtype": dtype, "shape": [256, 4]}},
        "params": [{"ptr": p} for p in ("a", "b", "d", "out")],
    }
    extra = {"additions": 2 * k + 1, "d_type": d_type, "roundings": 2}
    ptx = kernel("\n".join(code), ("pa", "pb", "pd", "pout"))
    return Case(f"mma/{name}", ptx, launch, make, compare="bits" if exact else "matrix", full=not exact, extra=extra)


def cases() -> list[Case]:
    shapes = [(k, kind, d) for k in (8, 16) for kind, d in (("f16", "f32"), ("bf16", "f32"), ("f16", "f16"))]
    products = [
        _mma(f"k{k}-{kind}-{d}{'' if exact else '-real'}", k, kind, d, exact)
        for k, kind, d in shapes
        for exact in (True, False)
    ]
    return [*products, *_products(), *_layouts()]
