"""The rates a roofline is drawn with, one `Device` each, and where each pair of numbers comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DEVICES", "Device", "device"]


@dataclass(frozen=True)
class Device:
    """Two rates of one device.

    bandwidth  bytes per second to and from device memory
    flops      floating-point operations per second, multiplies and adds counted apart, of the MMA that `x_format` uses
    x_format   the activations its tables take by default: "nvfp4" (W4A4) or "float16" (W4A16)
    source     where the rates come from, in one sentence
    """

    name: str
    bandwidth: float
    flops: float
    x_format: Literal["nvfp4", "float16"]
    source: str

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.flops > 0):
            raise ValueError(f"bandwidth, flops: expected positive rates, got {self.bandwidth} and {self.flops}")


DEVICES = (
    Device(
        "b200-contest",
        bandwidth=7.68e12,
        flops=6.9005e15,
        x_format="nvfp4",
        source=(
            "GPU MODE nvfp4_dual_gemm and nvfp4_group_gemm: 7.68 TB/s is 8192 bit x 7.5 Gb/s; 6.9005 PFLOP/s is fitted to "
            "the two compute-bound times the problem lists (its origin is not documented)."
        ),
    ),
    Device(
        "h100",
        bandwidth=3.0e12,
        flops=798e12,
        x_format="float16",
        source="Measured on an H100 80GB: bf16 matmul 8192^3 on random data; copy, bytes read plus written.",
    ),
    Device(
        "h200",
        bandwidth=4.3e12,
        flops=790e12,
        x_format="float16",
        source="Measured on an H200: bf16 matmul 8192^3 on random data; copy, bytes read plus written.",
    ),
)


def device(name: str) -> Device:
    """The device of that name; raises ValueError naming those there are."""
    for candidate in DEVICES:
        if candidate.name == name:
            return candidate
    raise ValueError(f"device: expected one of {', '.join(d.name for d in DEVICES)}, got {name!r}")
