"""The kernels of this folder: what each computes, its inputs by seed, its result by NumPy, and how far off a result may be.

A kernel is ptx/NAME.ptx with launches/NAME.json: a launch description as `glu4 emulate` takes it, and under "problem" what is
needed to make inputs and check outputs. Nothing of the emulator is used here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
STORAGE = {"f16": "float16", "bf16": "uint16", "f32": "float32"}  # dtype of the buffer C


@dataclass(frozen=True)
class Problem:
    """C = A @ B^T, or with global scales silu(g1 * A @ GATE^T) * (g2 * A @ UP^T); A is [m, k], the others [n, k].

    element: e2m1 (two a byte, low nibble first), e4m3, e5m2, f16, bf16, tf32 (in float32). scale: "", ue4m3 or ue8m0, one for
    each `block` elements of a row. scale_layout: linear [rows, k / block], or 128x4: blocks of 128 rows by 4 scales, 512 bytes
    each. k_major: of A and of the others; those that are not are stored [k, rows].
    """

    m: int
    n: int
    k: int
    element: str
    scale: str = ""
    block: int = 0
    scale_layout: str = "linear"
    out: str = "f16"
    global_scales: tuple[float, float] | None = None
    seed: int = 0
    k_major: tuple[bool, bool] = (True, True)

    @property
    def weights(self) -> tuple[str, ...]:
        return ("GATE", "UP") if self.global_scales else ("B",)

    def shape(self, buffer: str) -> tuple[int, ...]:
        """Shape of a buffer, in elements of its dtype."""
        if buffer == "C":
            return (self.m, self.n)
        rows = self.m if buffer.endswith("A") else self.n
        if not buffer.startswith("SCALE_"):
            shape = (rows, self.k // 2 if self.element == "e2m1" else self.k)
            return shape if self.k_major[buffer != "A"] else shape[::-1]
        if self.scale_layout == "128x4":
            return (1, -(-rows // 128), -(-self.k // self.block // 4), 2, 256)
        return (rows, self.k // self.block)

    def buffers(self) -> dict[str, dict[str, Any]]:
        """The "buffers" of a launch description."""
        names = ["A", *self.weights]
        names += [f"SCALE_{name}" for name in names] if self.scale else []
        wide = {"bf16": "uint16", "f16": "uint16", "tf32": "uint32"}.get(self.element, "uint8")
        found = {n: {"dtype": "uint8" if n.startswith("SCALE_") else wide, "shape": list(self.shape(n))} for n in names}
        return found | {"C": {"dtype": STORAGE[self.out], "shape": [self.m, self.n]}}


def _text(launch: dict[str, Any]) -> str:
    """JSON with a line for each field, buffer and parameter."""
    lines = []
    for key, value in launch.items():
        if key in ("buffers", "params"):
            keys = value if isinstance(value, dict) else [None] * len(value)
            items = value.values() if isinstance(value, dict) else value
            rows = [(f"{json.dumps(k)}: " if k else "") + json.dumps(item) for k, item in zip(keys, items)]
            opening, closing = "{}" if isinstance(value, dict) else "[]"
            lines.append(f"{json.dumps(key)}: {opening}\n  " + ",\n  ".join(rows) + f"\n{closing}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def write(name: str, ptx: str, launch: dict[str, Any], problem: Problem) -> None:
    """Writes one kernel; the launch description gets its buffers and problem."""
    (FOLDER / "ptx").mkdir(exist_ok=True)
    (FOLDER / "launches").mkdir(exist_ok=True)
    (FOLDER / "ptx" / f"{name}.ptx").write_text(ptx)
    described = asdict(problem)
    if all(problem.k_major):
        del described["k_major"]
    whole = {**launch, "buffers": problem.buffers(), "problem": described}
    (FOLDER / "launches" / f"{name}.json").write_text(_text(whole) + "\n")
    print(name, len(ptx), "bytes of PTX")


def names() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "launches").glob("*.json"))


def load(name: str) -> tuple[str, dict[str, Any], Problem]:
    """(PTX, launch description without "problem", problem)."""
    launch = json.loads((FOLDER / "launches" / f"{name}.json").read_text())
    values = launch.pop("problem")
    if values["global_scales"]:
        values["global_scales"] = tuple(values["global_scales"])
    values["k_major"] = tuple(values.get("k_major", (True, True)))
    return (FOLDER / "ptx" / f"{name}.ptx").read_text(), launch, Problem(**values)


def _small_float(codes: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Values of finite codes of a signed format with subnormals."""
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    magnitude = np.where(
        exponent > 0,
        np.ldexp(1 + mantissa / 2.0**mantissa_bits, exponent - bias),
        np.ldexp(mantissa / 2.0**mantissa_bits, 1 - bias),
    )
    return np.where(codes >> (exponent_bits + mantissa_bits) & 1, -magnitude, magnitude)


def _values(p: Problem, data: np.ndarray) -> np.ndarray:
    if p.element == "e2m1":
        return E2M1[np.stack([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1)]
    if p.element == "bf16":
        return (data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if p.element in ("f16", "tf32"):
        return data.view(np.float16 if p.element == "f16" else np.float32).astype(np.float64)
    return _small_float(data.astype(np.int64), *{"e4m3": (4, 3), "e5m2": (5, 2)}[p.element])


def _scale_values(p: Problem, codes: np.ndarray) -> np.ndarray:
    codes = codes.astype(np.int64)
    return _small_float(codes, 4, 3) if p.scale == "ue4m3" else np.ldexp(1.0, codes - 127)


def _linear_scales(p: Problem, stored: np.ndarray, rows: int) -> np.ndarray:
    """Stored scales as [rows, k / block]."""
    if p.scale_layout == "linear":
        return stored
    row, scale = np.arange(rows)[:, None], np.arange(p.k // p.block)[None, :]
    blocks_along_k = -(-(p.k // p.block) // 4)
    block = row // 128 * blocks_along_k + scale // 4
    return stored.reshape(-1)[block * 512 + row % 32 * 16 + row // 32 % 4 * 4 + scale % 4]


def make_inputs(p: Problem) -> dict[str, np.ndarray]:
    """Every input buffer: all element codes that are finite, scales over eight powers of two, wide elements from -2 to 2."""
    rng = np.random.default_rng(p.seed)
    out = {}
    for name, spec in p.buffers().items():
        shape = tuple(spec["shape"])
        if name == "C":
            continue
        if name.startswith("SCALE_"):
            low, high = (0x18, 0x58) if p.scale == "ue4m3" else (120, 128)
            out[name] = rng.integers(low, high, shape, dtype=np.uint8)
        elif p.element == "bf16":
            out[name] = (rng.uniform(-2, 2, shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        elif p.element == "f16":
            out[name] = rng.uniform(-2, 2, shape).astype(np.float16).view(np.uint16)
        elif p.element == "tf32":
            out[name] = rng.uniform(-2, 2, shape).astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        elif p.element == "e2m1":
            out[name] = rng.integers(0, 256, shape, dtype=np.uint8)
        else:
            # without the largest exponents, whose products would leave float16, and without NaN
            magnitude = rng.integers(0, {"e4m3": 0x48, "e5m2": 0x44}[p.element], shape, dtype=np.uint8)
            out[name] = magnitude | rng.integers(0, 2, shape, dtype=np.uint8) << 7
    return out


def operand(p: Problem, inputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    """An operand as the numbers it stands for, float64 [rows, k]."""
    values = _values(p, inputs[name])
    if not p.k_major[name != "A"]:
        values = values.T
    if not p.scale:
        return values
    scales = _scale_values(p, _linear_scales(p, inputs[f"SCALE_{name}"], values.shape[0]))
    return np.asarray((values.reshape(*scales.shape, p.block) * scales[:, :, None]).reshape(values.shape))


def expect(p: Problem, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(result in float64, how far a right kernel may be from it), both [m, n].

    The bound allows float32 accumulation in any order with truncation (2^-23 an addition, of the sum of magnitudes), the
    rounding to C, and for the gated product float32 evaluation: silu changes by at most 1.1 times its argument, and its
    argument's roundings go through exp, which makes them relative errors of |x| 2^-23, besides eight of 2^-23 elsewhere.
    """
    a = operand(p, inputs, "A")
    products = []
    for name in p.weights:
        b = operand(p, inputs, name)
        additions = p.k + 1
        products.append((a @ b.T, np.abs(a) @ np.abs(b).T * additions * 2.0**-23 * 1.001))
    if p.global_scales is None:
        result, error = products[0]
    else:
        (gate, up), (gate_error, up_error) = ([g * pair[i] for g, pair in zip(p.global_scales, products)] for i in (0, 1))
        with np.errstate(over="ignore"):
            silu = gate / (1 + np.exp(-gate))
        result = silu * up
        evaluation = (np.abs(gate) + 8) * 2.0**-23
        error = 1.1 * gate_error * np.abs(up) + (np.abs(silu) + 1.1 * gate_error) * up_error + evaluation * np.abs(result)
    half_unit = {"f16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134), "f32": (0.0, 0.0)}[p.out]
    return result, error + (np.abs(result) + error) * half_unit[0] + half_unit[1]


def read_out(p: Problem, stored: np.ndarray) -> np.ndarray:
    """The buffer C as float64 [m, n]."""
    if p.out in ("f16", "f32"):
        return stored.view(STORAGE[p.out]).astype(np.float64)
    return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
