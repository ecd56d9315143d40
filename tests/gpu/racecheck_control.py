"""One stage of shared memory, filled by bulk copies and read by 128 threads, with every way to order a copy after the reads before
it: what racecheck says of these it says of the tool, not of a kernel. Needs the driver only: python -m gpu.racecheck_control NAME

The kernel is PTX, compiled by the driver. Threads 0 to 127 read, one of warp 4 writes; every round has its full barrier, or all
rounds share one, phase by phase. The result is checked: rounds are read in order, except where nothing orders them.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CONTROLS", "Control", "expected", "main", "ptx", "source"]

READERS, PRODUCER, ROUNDS = 128, 128, 4  # threads, a thread, rounds
STAGE = 4 * READERS  # bytes


@dataclass(frozen=True)
class Control:
    """order  what a write waits for: "all" or "warps" arrive at an mbarrier, "bar" (bar.sync), or "none": a race, planted
    copies    bulk copies write, or plain stores of warp 4
    shared    one full barrier for all rounds"""

    order: str
    copies: bool = True
    shared: bool = False

    @property
    def ordered(self) -> bool:
        return self.order != "none"


CONTROLS = {
    "bulk-all-arrive": Control("all"),
    "bulk-warps-arrive": Control("warps"),
    "bulk-warps-arrive-one-full": Control("warps", shared=True),
    "bulk-bar-sync": Control("bar"),
    "bulk-unordered": Control("none"),
    "store-all-arrive": Control("all", copies=False),
    "store-unordered": Control("none", copies=False),
}


def _wait(barrier: str, parity: int, label: str) -> str:
    return f"{label}: mbarrier.try_wait.parity.shared::cta.b64 %p, [{barrier}], {parity}; @!%p bra {label};"


def _full(control: Control, i: int) -> tuple[str, int]:
    """(the full barrier of round i, the parity to wait for)."""
    return ("full", i & 1) if control.shared else (f"full+{8 * i}", 0)


def _produce(control: Control, i: int) -> list[str]:
    """Round i of warp 4, whose lane 0 has %lead."""
    full, parity = _full(control, i)
    lines = []
    if i and control.order == "bar":
        lines.append(f"bar.sync 1, {READERS + 32};")
    elif i and control.order == "none":  # the copy before has arrived; nobody says that it was read
        before, parity = _full(control, i - 1)
        lines.append(_wait(before, parity, f"P{i}"))
    elif i:
        lines.append(_wait("empty", (i - 1) & 1, f"P{i}"))
    if control.copies:
        lines += [
            f"@%lead mbarrier.arrive.expect_tx.shared::cta.b64 _, [{full}], {STAGE};",
            f"@%lead cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [stage], [%source], {STAGE}, [{full}];",
        ]
    else:
        lines += [
            "ld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%mine];",
            "st.shared.v4.b32 [%slot], {%v0, %v1, %v2, %v3};",
            "bar.warp.sync 0xffffffff;",
            f"@%lead mbarrier.arrive.shared::cta.b64 _, [{full}];",
        ]
    return [*lines, f"add.u64 %source, %source, {STAGE};", f"add.u64 %mine, %mine, {STAGE};"]


def _consume(control: Control, i: int) -> list[str]:
    """Round i of the readers: 3 * sum + value."""
    full, parity = _full(control, i)
    lines = [_wait(full, parity, f"C{i}"), "ld.shared.b32 %v, [%at];", "mad.lo.u32 %sum, %sum, 3, %v;"]
    if control.order == "all":
        lines.append("mbarrier.arrive.shared::cta.b64 _, [empty];")
    elif control.order == "warps":
        lines += ["bar.warp.sync 0xffffffff;", "@%lead mbarrier.arrive.shared::cta.b64 _, [empty];"]
    elif control.order == "bar" and i + 1 < ROUNDS:
        lines.append(f"bar.sync 1, {READERS + 32};")
    return lines


def ptx(control: Control, target: str = "sm_90") -> str:
    """The kernel, `control(source, output)`, for one CTA of 160 threads."""
    arrivals = READERS if control.order == "all" else READERS // 32
    body = "\n".join(
        [
            *(f"@%first mbarrier.init.shared::cta.b64 [full+{8 * i}], 1;" for i in range(ROUNDS)),
            f"@%first mbarrier.init.shared::cta.b64 [empty], {arrivals};",
            "@%first fence.proxy.async.shared::cta;",
            "bar.sync 0;",
            f"setp.lt.u32 %p, %t, {READERS};",
            "@%p bra READ;",
            *(line for i in range(ROUNDS) for line in _produce(control, i)),
            "bra.uni END;",
            "READ:",
            "mov.b32 %sum, 0;",
            *(line for i in range(ROUNDS) for line in _consume(control, i)),
            "st.global.b32 [%result], %sum;",
            "END: ret;",
        ]
    )
    return f""".version 8.6
.target {target}
.address_size 64
.shared .align 128 .b8 stage[{STAGE}];
.shared .align 8 .b64 full[{ROUNDS}];
.shared .align 8 .b64 empty;
.visible .entry control(.param .u64 source, .param .u64 output)
{{
.reg .pred %p, %first, %lead;
.reg .b32 %t, %lane, %at, %slot, %v, %v0, %v1, %v2, %v3, %sum;
.reg .b64 %source, %mine, %result, %offset;
ld.param.b64 %source, [source];
ld.param.b64 %result, [output];
cvta.to.global.u64 %source, %source;
cvta.to.global.u64 %result, %result;
mov.u32 %t, %tid.x;
and.b32 %lane, %t, 31;
setp.eq.u32 %first, %t, 0;
setp.eq.u32 %lead, %lane, 0;
mul.wide.u32 %offset, %lane, 16;
add.u64 %mine, %source, %offset;
mul.wide.u32 %offset, %t, 4;
add.u64 %result, %result, %offset;
mov.u32 %at, stage;
mad.lo.u32 %slot, %lane, 16, %at;
mad.lo.u32 %at, %t, 4, %at;
{body}
}}
"""


def source() -> list[int]:
    """What is copied, round after round."""
    return [1000 * i + t for i in range(ROUNDS) for t in range(READERS)]


def expected() -> list[int]:
    """What each reader writes where rounds are ordered."""
    values, sums = source(), [0] * READERS
    for i in range(ROUNDS):
        sums = [3 * s + values[i * READERS + t] for t, s in enumerate(sums)]
    return sums


class _Driver:
    """libcuda on the first device; every call is checked."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self("cuCtxSetCurrent", context)

    def __call__(self, name: str, *args: object) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            raise RuntimeError(f"{name} failed with {status}")

    def memory(self, nbytes: int) -> ctypes.c_uint64:
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address


def launch(control: Control) -> list[int]:
    """What the readers wrote."""
    cuda = _Driver()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    cuda("cuModuleLoadData", ctypes.byref(module), ptx(control).encode())
    cuda("cuModuleGetFunction", ctypes.byref(function), module, b"control")
    given = (ctypes.c_uint32 * (READERS * ROUNDS))(*source())
    taken = (ctypes.c_uint32 * READERS)()
    data, output = cuda.memory(ctypes.sizeof(given)), cuda.memory(ctypes.sizeof(taken))
    cuda("cuMemcpyHtoD_v2", data, given, ctypes.c_size_t(ctypes.sizeof(given)))
    pointers = (ctypes.c_void_p * 2)(*(ctypes.addressof(a) for a in (data, output)))
    cuda("cuLaunchKernel", function, 1, 1, 1, READERS + 32, 1, 1, 0, None, pointers, None)
    cuda("cuCtxSynchronize")
    cuda("cuMemcpyDtoH_v2", taken, output, ctypes.c_size_t(ctypes.sizeof(taken)))
    return list(taken)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTROLS)
    control = CONTROLS[parser.parse_args(arguments).name]
    right = launch(control) == expected()
    print("right" if right else "other values" if not control.ordered else "WRONG", flush=True)
    return 0 if right or not control.ordered else 1


if __name__ == "__main__":
    sys.exit(main())
