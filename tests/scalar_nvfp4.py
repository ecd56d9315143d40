"""An independent scalar NVFP4 quantiser: tables and exact comparisons of fractions, sharing no code with glu4.

Only the order of the float32 operations is taken from the documentation of `glu4.quantize`.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


def e4m3_value(byte: int) -> Fraction:
    """Value of a non-negative e4m3fn byte that is not NaN."""
    exponent, mantissa = byte >> 3, byte & 7
    if exponent == 0:
        return Fraction(mantissa, 8) / 2**6
    return (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


E4M3 = [e4m3_value(b) for b in range(0x7F)]


def nearest_even(value: Fraction, table: list[Fraction]) -> int:
    """Index of the nearest entry of an ascending table, ties to the even index, saturating at the end."""
    low, high = 0, len(table) - 1
    if value >= table[high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if table[middle] <= value else (low, middle)
    below, above = value - table[low], table[high] - value
    if below == above:
        return low if low % 2 == 0 else high
    return low if below < above else high


def block_scale(amax: np.float32, largest: float, g: np.float32) -> int:
    """The e4m3 byte of a block with this maximum."""
    if amax == 0:
        return 0
    ratio = np.float32(amax / np.float32(np.float32(largest) * g))
    return nearest_even(min(max(Fraction(float(ratio)), E4M3[1]), E4M3[-1]), E4M3)


def encode(x: np.float32, scale: int, g: np.float32) -> int:
    """The e2m1 code, with sign, of one value."""
    sign = 8 if np.signbit(x) else 0
    unit = np.float32(np.float32(float(E4M3[scale])) * g)
    if unit == 0:
        return sign
    return sign | nearest_even(Fraction(float(np.float32(abs(x) / unit))), E2M1)


def decode(code: int, scale: int, g: np.float32) -> np.float32:
    """One value: the exact product of code and scale, times g in float32."""
    exact = E2M1[code & 7] * E4M3[scale] * (-1 if code & 8 else 1)
    value = np.float32(np.float32(float(exact)) * g)
    return -abs(value) if code & 8 else value


def quantize_block(block: np.ndarray, g: np.float32, four_over_six: bool) -> tuple[list[int], int]:
    """Codes and scale byte of 16 float32 values."""
    amax = np.abs(block).max()
    candidates = []
    for largest in (6.0, 4.0) if four_over_six else (6.0,):
        scale = block_scale(amax, largest, g)
        codes = [encode(v, scale, g) for v in block]
        candidates.append((squared_error(block, codes, scale, g), codes, scale))
    best = candidates[0]
    if four_over_six and candidates[1][0] < candidates[0][0]:
        best = candidates[1]
    return best[1], best[2]


def squared_error(block: np.ndarray, codes: list[int], scale: int, g: np.float32) -> np.float32:
    """Float32 squares added pairwise: i with i + 8, then i + 4, i + 2, i + 1."""
    terms = []
    for v, code in zip(block, codes, strict=True):
        signed = float(E2M1[code & 7]) * (-1 if code & 8 else 1)
        d = np.float32(np.float32(v / g) - np.float32(np.float32(signed) * np.float32(float(E4M3[scale]))))
        terms.append(np.float32(d * d))
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [np.float32(terms[i] + terms[half + i]) for i in range(half)]
    return terms[0]
