"""Draw the pictures of docs/format.md from the code's own tables and layouts.

    python docs/figures.py [--output docs/img]

Every number in a picture is computed: values by glu4.nvfp4, byte offsets by glu4.scale_layout.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from glu4.nvfp4 import E2M1_VALUES, NVFP4Tensor, pack_codes
from glu4.scale_layout import SwizzledLayout

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREEN, GREY, INK = "#4477aa", "#ee7733", "#228833", "#dddddd", "#222222"


def _cell(ax: Any, x: float, y: float, text: str, color: str, width: float = 1.0, height: float = 0.8, size: int = 9) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.5))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def _blank(ax: Any, width: float, height: float) -> None:
    ax.set_xlim(-0.2, width)
    ax.set_ylim(-0.2, height)
    ax.set_aspect("equal")
    ax.axis("off")


def bit_layout() -> Any:
    """One byte of codes, one scale byte, and what they decode to (s sign, e exponent, m mantissa)."""
    fig, ax = plt.subplots(figsize=(9, 4.6))
    _blank(ax, 18.2, 9.2)
    codes = torch.tensor([[5, 11] + [0] * 14], dtype=torch.uint8)
    scale = torch.tensor([[0x3C]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensor = NVFP4Tensor(pack_codes(codes), scale, torch.tensor(1.0))
    byte = int(tensor.codes[0, 0])
    ax.text(0, 8.7, f"a byte of codes, 0x{byte:02X}: two values along K", fontsize=11, color=INK)
    for bit in range(7, -1, -1):
        value = byte >> bit & 1
        color = "#99bbdd" if bit < 4 else "#ffccaa"
        _cell(ax, (7 - bit) * 1.1, 7.2, str(value), color)
        ax.text((7 - bit) * 1.1 + 0.5, 8.15, f"bit {bit}", ha="center", fontsize=7, color="#666666")
    names = ("s", "e", "e", "m")
    for i, name in enumerate(names * 2):
        ax.text(i * 1.1 + 0.5, 6.85, name, ha="center", fontsize=7, color="#666666")
    ax.text(
        2.2, 6.3, f"k odd: code {int(codes[0, 1])}, value {E2M1_VALUES[int(codes[0, 1])]:g}", ha="center", fontsize=9, color=INK
    )
    ax.text(
        6.6,
        6.3,
        f"k even: code {int(codes[0, 0])}, value {E2M1_VALUES[int(codes[0, 0])]:g}",
        ha="center",
        fontsize=9,
        color=INK,
    )
    raw = int(scale.view(torch.uint8))
    ax.text(9.8, 8.7, f"a block scale, 0x{raw:02X}: one for 16 values along K", fontsize=11, color=INK)
    for bit in range(7, -1, -1):
        color = GREY if bit == 7 else "#bbddbb" if bit >= 3 else "#ddeedd"
        _cell(ax, 9.8 + (7 - bit) * 1.02, 7.2, str(raw >> bit & 1), color)
    for i, name in enumerate(("0", *"eeee", *"mmm")):
        ax.text(9.8 + i * 1.02 + 0.5, 6.85, name, ha="center", fontsize=7, color="#666666")
    ax.text(13.9, 6.3, f"e4m3: {scale.float().item():g}", ha="center", fontsize=9, color=INK)
    ax.text(0, 5.2, "the 16 codes", fontsize=11, color=INK)
    for code, value in enumerate(E2M1_VALUES):
        color = "#99bbdd" if code < 8 else "#ffccaa"
        _cell(ax, code * 1.1, 3.7, str(code), color)
        sign = "\N{MINUS SIGN}" if code >= 8 else ""
        ax.text(code * 1.1 + 0.5, 3.3, f"{sign}{abs(value):g}", ha="center", fontsize=9, color=INK)
    product = tensor.decode()[0, :2].tolist()
    ax.text(0, 2.1, "value = e2m1(code) * e4m3(block scale) * global scale", fontsize=11, color=INK)
    ax.text(
        0,
        1.2,
        f"here {E2M1_VALUES[5]:g} * {scale.float().item():g} = {product[0]:g}"
        f" and {E2M1_VALUES[11]:g} * {scale.float().item():g} = {product[1]:g}, times the float32 global scale",
        fontsize=9,
        color=INK,
    )
    return fig


def swizzle() -> Any:
    """Where the scales of a 160 x 8 matrix lie: by row in the matrix, and by byte in memory."""
    rows, cols = 160, 8
    layout = SwizzledLayout(rows, cols)
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 5.2), width_ratios=(1, 1.25))
    left.set_title(f"{rows} x {cols} block scales\nbyte offset of each scale", fontsize=10, color=INK)
    shown = [0, 1, 2, 31, 32, 33, 63, 64, 96, 127, 128, 129, 159]
    colors = ("#99bbdd", "#ffccaa", "#bbddbb", "#e5c8e5")
    _blank(left, cols * 1.45 + 1.7, len(shown) + 1)
    for y, i in enumerate(reversed(shown)):
        left.text(0.9, y + 0.4, f"row {i}", ha="right", va="center", fontsize=7, color="#666666")
        for j in range(cols):
            _cell(left, 1.1 + j * 1.45, y, str(layout.offset(i, j)), colors[i % 128 // 32], 1.45, 0.9, 7)
    for j in range(cols):
        left.text(1.1 + j * 1.45 + 0.7, len(shown) + 0.1, f"{j}", ha="center", fontsize=7, color="#666666")
    right.set_title(
        "memory: the first bytes of atom 0, 16 a line\nrow,column of the scale in each byte", fontsize=10, color=INK
    )
    lines = 13
    _blank(right, 16 * 1.25 + 1.8, lines + 1)
    for line in range(lines):
        y = lines - 1 - line
        right.text(1.3, y + 0.4, str(line * 16), ha="right", va="center", fontsize=7, color="#666666")
        for b in range(16):
            at = layout.coordinates(line * 16 + b)
            text, color = ("", GREY) if at is None else (f"{at[0]},{at[1]}", colors[at[0] % 128 // 32])
            _cell(right, 1.5 + b * 1.25, y, text, color, 1.25, 0.9, 5)
    padded = f"{layout.rest_rows * 128} x {layout.rest_cols * 4}"
    fig.text(
        0.5,
        0.02,
        "colours: row % 128 // 32; an atom is 128 rows x 4 scales, 512 bytes; "
        f"this matrix is padded to {padded}, {layout.nbytes} bytes",
        ha="center",
        fontsize=8,
        color=INK,
    )
    fig.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.06, wspace=0.05)
    return fig


FIGURES = {"bit_layout": bit_layout, "swizzle": swizzle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "img")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    # the same picture gives the same file, so that a change in git is a change of the picture
    mpl.rcParams["svg.hashsalt"] = "glu4"
    for name, draw in FIGURES.items():
        fig = draw()
        fig.savefig(output / f"{name}.svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight")
        plt.close(fig)
        print(output / f"{name}.svg")


if __name__ == "__main__":
    main()
