"""wgmma from shared memory and registers against NumPy, and what a missing fence, commit or wait does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emulator.runner import kinds, run
from emulator.test_divergence import SCHEDULES
from glu4.emulator.errors import PtxError
from glu4.emulator.launch import Result

# A [64, 16] and B [n, 16], K contiguous: without swizzle as 8 x 16-byte pieces, 128 bytes each, the two along K `LBO` apart
FILL = """.shared .align 1024 .b8 room[16384]; .reg .b32 %t, %x, %y, %z, %s; .reg .b64 %at, %o, %da, %db; .reg .pred %p, %keep; mov.u32 %t, %tid.x; mov.u32 %s, room;
{ .reg .b32 %i, %r, %c, %g; mov.u32 %i, %t; L: setp.ge.u32 %p, %i, COUNT; @%p bra E; shr.u32 %r, %i, 3; and.b32 %c, %i, 7; mul.wide.u32 %o, %i, 4; add.u64 %at, %a, %o; ld.global.b32 %x, [%at];
shr.u32 %g, %r, 3; shl.b32 %y, %g, 8; and.b32 %g, %r, 7; shl.b32 %g, %g, 4; add.u32 %y, %y, %g; shr.u32 %g, %c, 2; shl.b32 %g, %g, 7; add.u32 %y, %y, %g; and.b32 %g, %c, 3; shl.b32 %g, %g, 2; add.u32 %y, %y, %g;
add.u32 %y, %y, %s; st.shared.b32 [%y], %x; add.u32 %i, %i, 128; bra L; E: }
FENCE bar.sync 0; shr.u32 %x, %s, 4; cvt.u64.u32 %da, %x; or.b64 %da, %da, 0x1000080000; add.u64 %db, %da, 128;
"""
# 64 rows are 8 groups of 256 bytes: A is 2048 bytes, so B starts 128 units of 16 bytes later


def fp8(mantissa_bits: int) -> Any:
    """Codes of magnitudes up to 3 and their values."""

    def draw(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        one = (7 if mantissa_bits == 3 else 15) << mantissa_bits
        codes = rng.choice([0, one, one + (1 << mantissa_bits - 1), one + (1 << mantissa_bits)], (rows, 32)).astype(np.uint8)
        magnitude = np.array([0, 1, 1.5, 2])[
            np.searchsorted([0, one, one + (1 << mantissa_bits - 1), one + (1 << mantissa_bits)], codes)
        ]
        negative = rng.integers(0, 2, codes.shape)
        return codes | (negative << 7).astype(np.uint8), np.where(negative, -magnitude, magnitude)

    return draw


def plain(kind: str, k: int, low: int = -4, high: int = 5) -> Any:
    def draw(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        values = rng.integers(low, high, (rows, k))
        return values.astype(kind), values.astype(np.float64)

    return draw


# type: (seeded, rows) -> (storage of 32 bytes a row, values [rows, k])
OPERANDS = {
    "f16": plain("<f2", 16), "tf32": plain("<f4", 8), "u8": plain("u1", 32, 0, 256), "s8": plain("i1", 32, -128, 128),
    "e4m3": fp8(3), "e5m2": fp8(2),
}  # fmt: skip


def product(
    n: int,
    d_type: str = "f32",
    source: str = "shared",
    data: int = 0,
    types: tuple[str, str] = ("f16", "f16"),
    saturate: str = "",
    faults: tuple[tuple[str, str], ...] = (),
    **options: object,
) -> tuple[Result, np.ndarray, np.ndarray]:
    """D = A B^T + A B^T by two wgmmas, the second accumulating; (result, D, exact D)."""
    rng = np.random.default_rng(data)
    words, values = OPERANDS[types[0]](rng, 64)
    b_words, b_values = OPERANDS[types[1]](rng, n)
    a, b = (w.view(np.uint8).reshape(-1, 32) for w in (words, b_words))
    count = n // 4 if d_type == "f16" else n // 2
    d = ", ".join(f"%d{i}" for i in range(count))
    body = FILL.replace("COUNT", str((64 + n) * 8)).replace("FENCE", "fence.proxy.async;")
    body += f".reg .b32 %d<{count}>, %f<4>; setp.ne.u32 %keep, 0, 0;\n" + "".join(f"mov.b32 %d{i}, 0;" for i in range(count))
    if source == "shared":
        first, flags = "%da", ", 1, 1, 0, 0"
    else:
        # the fragment of A: rows g and g + 8 of the warp's 16, two columns from 2 q, and from 8 + 2 q
        body += """{ .reg .b32 %g, %q, %w; shr.u32 %w, %t, 5; shl.b32 %w, %w, 4; and.b32 %g, %t, 31; shr.u32 %g, %g, 2; add.u32 %g, %g, %w; and.b32 %q, %t, 3; shl.b32 %q, %q, 2; mad.lo.u32 %g, %g, 32, %q;
        mul.wide.u32 %o, %g, 1; add.u64 %at, %a, %o; ld.global.b32 %f0, [%at]; ld.global.b32 %f1, [%at+256]; ld.global.b32 %f2, [%at+16]; ld.global.b32 %f3, [%at+272]; }"""
        first, flags = "{%f0, %f1, %f2, %f3}", ", 1, 1, 0"
    k = values.shape[1]
    if k != 16:  # no transposition, and for integers no negation
        flags = "" if d_type == "s32" else ", 1, 1"
    shape = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}{saturate}.{d_type}.{types[0]}.{types[1]}"
    body += f"wgmma.fence.sync.aligned;\n{shape} {{{d}}}, {first}, %db, %keep{flags};\nsetp.eq.u32 %keep, 0, 0; {shape} {{{d}}}, {first}, %db, %keep{flags};\n"
    body += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    body += f"mul.wide.u32 %o, %t, {4 * count}; add.u64 %at, %out, %o;" + "".join(
        f"st.global.b32 [%at+{4 * i}], %d{i};" for i in range(count)
    )
    for old, new in faults:
        assert old in body
        body = body.replace(old, new)
    r = run(body, {"a": np.concatenate((a, b)), "out": np.zeros((128, count), np.uint32)}, launch={"block": [128]}, **options)  # type: ignore[arg-type]
    got = np.zeros((64, n))
    raw = r.buffers["out"]
    for t in range(128):
        for i in range(n // 2):
            row = 16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2)
            column = 8 * (i // 4) + 2 * (t % 4) + i % 2
            got[row, column] = raw[t].view({"f32": np.float32, "s32": np.int32, "f16": np.float16}[d_type])[i]
    return r, got, 2 * (values @ b_values.T)


@pytest.mark.parametrize("source", ["shared", "registers"])
@pytest.mark.parametrize("n", [8, 24, 64, 128, 256])
def test_products(n: int, source: str) -> None:
    for name, seed in SCHEDULES[:3]:
        r, got, exact = product(n, source=source, data=n, schedule_name=name, seed=seed)
        assert r.report.clean, str(r.report)
        assert (got == exact).all()


TYPES = [("tf32", "tf32", "f32"), ("e4m3", "e5m2", "f32"), ("e5m2", "e4m3", "f16"), ("u8", "s8", "s32"), ("s8", "s8", "s32")]


@pytest.mark.parametrize("source", ["shared", "registers"])
@pytest.mark.parametrize(("a", "b", "d"), TYPES)
def test_other_types(a: str, b: str, d: str, source: str) -> None:
    for n in (16, 96):
        r, got, exact = product(n, d, source, n, (a, b))
        assert r.report.clean, str(r.report)
        assert (got == exact).all()


def test_integers_stop_or_wrap() -> None:
    big = ("mov.b32 %d0, 0;", "mov.b32 %d0, 0x7FFFFFF0;"), ("setp.ne.u32 %keep, 0, 0;", "setp.eq.u32 %keep, 0, 0;")
    wrapped, stopped = (product(8, "s32", "shared", 1, ("u8", "u8"), saturate, big) for saturate in ("", ".satfinite"))
    assert wrapped[0].report.clean
    assert stopped[0].report.clean
    first = wrapped[2][0::1, 0] + 0x7FFFFFF0
    rows = [r for r in range(64) if r % 16 < 8]  # %d0 of the threads with columns 0 and 1
    assert (wrapped[1][rows, 0] == first[rows] - 2**32).all()
    assert (stopped[1][rows, 0] == 2**31 - 1).all()


@pytest.mark.parametrize(
    "types",
    [("f16", "bf16", "f32"), ("e4m3", "s8", "s32"), ("tf32", "tf32", "f16"), ("bf16", "bf16", "f16"), ("u8", "u8", "f32")],
)
def test_types_that_do_not_go_together_are_refused(types: tuple[str, str, str]) -> None:
    k = {"f16": 16, "bf16": 16, "tf32": 8}.get(types[0], 32)
    text = f".reg .b32 %d<4>; .reg .b64 %a; .reg .pred %p; wgmma.mma_async.sync.aligned.m64n8k{k}.{types[2]}.{types[0]}.{types[1]} {{%d0, %d1, %d2, %d3}}, %a, %a, %p, 1, 1;"
    with pytest.raises(PtxError, match="is not modelled"):
        run(text)


def test_half_accumulators() -> None:
    r, got, exact = product(32, "f16")
    assert r.report.clean
    assert (got == exact).all()


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (("fence.proxy.async;", ""), "missing proxy fence"),
        (("fence.proxy.async; bar.sync 0;", "fence.proxy.async;"), "data race"),
        (("wgmma.fence.sync.aligned;\n", ""), "missing wgmma.fence"),
        (("wgmma.commit_group.sync.aligned;\n", ""), "register in flight"),
        (("wgmma.wait_group.sync.aligned 0;\n", ""), "register in flight"),
        (("wgmma.wait_group.sync.aligned 0;\n", "wgmma.wait_group.sync.aligned 1;\n"), "register in flight"),
        (("wgmma.commit_group", "mov.b32 %f2, 0; wgmma.commit_group"), "register in flight"),
        (("wgmma.wait_group.sync.aligned 0;\n", "st.shared.b32 [%s], %t; wgmma.wait_group.sync.aligned 0;\n"), "data race"),
        (("0x1000080000", "0x8001000080000"), "malformed descriptor"),
        (("add.u64 %db, %da, 128;", "add.u64 %db, %da, 1024;"), "out of bounds"),
    ],
)
def test_faults_are_found_under_every_schedule(fault: tuple[str, str], kind: str) -> None:
    source = "registers" if "%f2" in fault[1] else "shared"
    for name, seed in SCHEDULES:
        r, _, _ = product(32, source=source, faults=(fault,), schedule_name=name, seed=seed)
        assert kind in kinds(r), (name, str(r.report))


def test_a_warp_that_does_not_take_part_is_a_deadlock() -> None:
    r, _, _ = product(
        8, faults=(("wgmma.fence.sync.aligned;\n", "setp.ge.u32 %p, %t, 96; @%p exit; wgmma.fence.sync.aligned;\n"),)
    )
    assert kinds(r) == ["deadlock"]
