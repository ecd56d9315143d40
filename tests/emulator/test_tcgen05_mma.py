"""tcgen05.mma, cp and shift, one instruction at a time, for one CTA and a pair.

What is expected comes from the ISA: shapes and alignments of the data path layouts A, B, D, E, F and G (9.7.16.10.5), whose
figures CUTLASS words as layouts (cute/atom/mma_traits_sm100_frag.hpp), the canonical K-major layout without swizzle (9.7.16.3),
scale factors (9.7.16.10.7), and the moves of cp (9.7.16.9). Nothing of the emulator's own layouts is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from emulator.runner import kinds, module, run
from emulator.test_divergence import SCHEDULES
from glu4.emulator.errors import PtxError
from glu4.emulator.launch import load

COLUMNS = 96  # of tensor memory that a kernel fills first and writes out at the end
B_AT = 8192  # of B in shared memory; A lies at the start
ROOM = 16384

# 128 threads fill shared and tensor memory from buffers, the first of the first CTA issues, all wait and write tensor memory out
KERNEL = """.shared .align 1024 .b8 room[16384]; .shared .align 8 .b64 bar; .shared .align 4 .b32 place;
.reg .b32 %t, %i, %s, %bb, %d, %x, %cta, %idesc, %v<4>, %w<32>; .reg .b64 %at, %o, %ad, %bd, %fixed; .reg .pred %p, %one, %on; .reg .b16 %mask;
mov.u32 %t, %tid.x; mov.u32 %cta, %cluster_ctarank; mov.u32 %s, room; mov.u32 %bb, bar; setp.eq.u32 %one, %t, 0;
@%one mbarrier.init.shared.b64 [%bb], 1; @%one fence.mbarrier_init.release.cluster;
mov.u32 %i, %t;
Fill: mad.lo.u32 %x, %cta, 1024, %i; mul.wide.u32 %o, %x, 16; add.u64 %at, %image, %o; ld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%at];
mad.lo.u32 %x, %i, 16, %s; st.shared.v4.b32 [%x], {%v0, %v1, %v2, %v3}; add.u32 %i, %i, 128; setp.lt.u32 %p, %i, 1024; @%p bra Fill;
setp.lt.u32 %p, %t, 32; mov.u32 %x, place; @%p tcgen05.alloc.cta_group::G.sync.aligned.shared::cta.b32 [%x], 128;
@%p tcgen05.relinquish_alloc_permit.cta_group::G.sync.aligned; bar.sync 0; ld.shared.b32 %d, [%x];
shr.u32 %v0, %t, 5; shl.b32 %v0, %v0, 21; add.u32 %v1, %v0, %d; mad.lo.u32 %x, %cta, 128, %t; mul.lo.u32 %x, %x, COLUMNS;
mul.wide.u32 %o, %x, 4; add.u64 %at, %cells, %o; mov.u32 %i, 0;
Put: LOAD tcgen05.st.sync.aligned.32x32b.x32.b32 [%v1], WORDS; add.u64 %at, %at, 128; add.u32 %v1, %v1, 32; add.u32 %i, %i, 32;
setp.lt.u32 %p, %i, COLUMNS; @%p bra Put; tcgen05.wait::st.sync.aligned;
fence.proxy.async; tcgen05.fence::before_thread_sync; barrier.cluster.arrive; barrier.cluster.wait; tcgen05.fence::after_thread_sync;
mov.u32 %idesc, IDESC; shr.u32 %x, %s, 4; and.b32 %x, %x, 0x3FFF; cvt.u64.u32 %ad, %x; mov.u64 %fixed, FIXED; or.b64 %ad, %ad, %fixed; add.u64 %bd, %ad, 512;
setp.eq.u32 %on, 0, ENABLE; setp.eq.u32 %p, %cta, 0; and.pred %p, %p, %one; @!%p bra Issued;
ISSUE
mov.u16 %mask, 3; COMMIT
Issued: mbarrier.try_wait.parity.shared.b64 %p, [%bb], 0; @!%p bra Issued; tcgen05.fence::after_thread_sync;
add.u32 %v1, %v0, %d; mad.lo.u32 %x, %cta, 128, %t; mul.lo.u32 %x, %x, COLUMNS; mul.wide.u32 %o, %x, 4; add.u64 %at, %out, %o; mov.u32 %i, 0;
Get: tcgen05.ld.sync.aligned.32x32b.x32.b32 WORDS, [%v1]; tcgen05.wait::ld.sync.aligned; STORE add.u64 %at, %at, 128; add.u32 %v1, %v1, 32; add.u32 %i, %i, 32;
setp.lt.u32 %p, %i, COLUMNS; @%p bra Get;
tcgen05.fence::before_thread_sync; barrier.cluster.arrive; barrier.cluster.wait; setp.lt.u32 %p, %t, 32;
@%p tcgen05.dealloc.cta_group::G.sync.aligned.b32 %d, 128;
"""
COMMIT = {
    1: "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%bb];",
    2: "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%bb], %mask;",
}
# no swizzle: 16-byte columns 128 bytes apart, groups of 8 rows 256 apart (two columns of a K step); version 1
FIXED = 128 // 16 << 16 | 256 // 16 << 32 | 1 << 46


def canonical(rows: np.ndarray) -> np.ndarray:
    """[rows, 32] bytes as bytes in the K-major layout without swizzle: 8 rows of 16 bytes, then the next 16 bytes of these."""
    count = rows.shape[0]
    return rows.reshape(count // 8, 8, 2, 16).transpose(0, 2, 1, 3).reshape(-1)


def kernel(issue: str, group: int, idesc: int = 0, accumulate: bool = True, fixed: int = FIXED, commit: str = "") -> str:
    text = (
        KERNEL.replace("ISSUE", issue).replace("COMMIT", commit or COMMIT[group]).replace("cta_group::G", f"cta_group::{group}")
    )
    fours = ["{" + ", ".join(f"%w{4 * i + j}" for j in range(4)) + "}" for i in range(8)]
    text = text.replace("WORDS", "{" + ", ".join(f"%w{i}" for i in range(32)) + "}")
    text = text.replace("LOAD", " ".join(f"ld.global.v4.b32 {four}, [%at+{16 * i}];" for i, four in enumerate(fours)))
    text = text.replace("STORE", " ".join(f"st.global.v4.b32 [%at+{16 * i}], {four};" for i, four in enumerate(fours)))
    for name, value in (("IDESC", idesc), ("FIXED", fixed), ("ENABLE", 0 if accumulate else 1), ("COLUMNS", COLUMNS)):
        text = text.replace(name, str(value))
    return text


def issue(
    text: str,
    group: int,
    images: list[np.ndarray],
    cells: np.ndarray | None = None,
    *,
    schedule: tuple[str, int] = ("eager", 0),
    issuer: int = 0,
    **options: Any,
) -> Any:
    """Run; images: shared memory of each CTA, as {offset: bytes}; cells: uint32 [ctas, 128, COLUMNS]."""
    image = np.zeros((group, ROOM), np.uint8)
    for r, parts in enumerate(images):
        for at, data in (parts if isinstance(parts, Mapping) else {0: parts}).items():
            image[r, at : at + data.size] = data
    if cells is None:
        cells = np.zeros((group, 128, COLUMNS), np.uint32)
    buffers = {"image": image, "cells": cells, "out": np.zeros((group, 128, COLUMNS), np.uint32)}
    launch = {"grid": [group], "block": [128], "cluster": [group]}
    name, seed = schedule
    code = kernel(text, group, **options).replace("setp.eq.u32 %p, %cta, 0; and", f"setp.eq.u32 %p, %cta, {issuer}; and")
    return run(code, buffers, launch=launch, schedule_name=name, seed=seed)


MMA = "tcgen05.mma.cta_group::{}.kind::{} [%d], %ad, %bd, %idesc, %on;"


def small(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers that every type here holds and whose sums of products are exact in float16."""
    return rng.integers(-3, 4, shape).astype(np.float64)


def halves(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint8).reshape(values.shape[0], -1)


def f16_idesc(m: int, n: int, d_f32: bool = True) -> int:
    return int(d_f32) << 4 | n // 8 << 17 | m // 16 << 24


Place = Callable[[int, int], tuple[int, int, int]]
# (CTA, lane, column) of an element of D; N is 64
LAYOUTS: dict[str, tuple[int, int, Place]] = {
    "A": (256, 2, lambda m, n: (m // 128, m % 128, n)),
    "B": (128, 2, lambda m, n: (m // 64, m % 64 + 64 * (n // 32), n % 32)),
    "D": (128, 1, lambda m, n: (0, m, n)),
    "F": (64, 1, lambda m, n: (0, m // 16 * 32 + m % 16, n)),
    "E": (64, 1, lambda m, n: (0, m + 64 * (n // 32), n % 32)),
    "G": (32, 1, lambda m, n: (0, m + 32 * (n // 16), n % 16)),
    "D ws": (128, 1, lambda m, n: (0, m, n)),
}
WS = ("E", "G", "D ws")


def split(values: np.ndarray, group: int) -> list[np.ndarray]:
    return np.split(values, group)


def images_of(a: np.ndarray, b: np.ndarray, group: int) -> list[Any]:
    """Each CTA's half of the rows of A and B, given as bytes [rows, 32]."""
    return [{0: canonical(x), B_AT: canonical(y)} for x, y in zip(split(a, group), split(b, group))]


@pytest.mark.parametrize(("name", "seed"), [SCHEDULES[0], SCHEDULES[1], SCHEDULES[2]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_d_lies(layout: str, name: str, seed: int) -> None:
    m, group, place = LAYOUTS[layout]
    rng = np.random.default_rng(m)
    a, b = small(rng, m, 16), small(rng, 64, 16)
    old = rng.integers(-9, 10, (group, 128, COLUMNS)).astype(np.float32)
    text = MMA.format(group, "f16")
    text = text.replace("mma.cta", "mma.ws.cta") if layout in WS else text
    r = issue(
        text, group, images_of(halves(a), halves(b), group), old.view(np.uint32), idesc=f16_idesc(m, 64), schedule=(name, seed)
    )
    assert r.report.clean, str(r.report)
    expected, product = old.copy(), a @ b.T
    for i in range(m):
        for j in range(64):
            expected[place(i, j)] += product[i, j]
    np.testing.assert_array_equal(r.buffers["out"].view(np.float32), expected)


@pytest.mark.parametrize("layout", ["A", "B"])
def test_either_cta_of_a_pair_may_issue(layout: str) -> None:
    m, _, place = LAYOUTS[layout]
    rng = np.random.default_rng(m)
    a, b = small(rng, m, 16), small(rng, 64, 16)
    r = issue(MMA.format(2, "f16"), 2, images_of(halves(a), halves(b), 2), idesc=f16_idesc(m, 64), accumulate=False, issuer=1)
    assert r.report.clean, str(r.report)
    out = r.buffers["out"].view(np.float32)
    np.testing.assert_array_equal([[out[place(i, j)] for j in range(64)] for i in range(m)], a @ b.T)


def test_m_64_lies_at_lane_16_too_and_in_float16() -> None:
    rng = np.random.default_rng(0)
    a, b = small(rng, 64, 16), small(rng, 64, 16)
    cells = rng.integers(0, 1 << 16, (1, 128, COLUMNS)).astype(np.uint32)
    text = "add.u32 %d, %d, 0x100004; " + MMA.format(1, "f16") + " sub.u32 %d, %d, 0x100004;"
    r = issue(text, 1, images_of(halves(a), halves(b), 1), cells, idesc=f16_idesc(64, 64, False), accumulate=False)
    assert r.report.clean, str(r.report)
    expected = cells.copy()
    for i in range(64):
        expected[0, i // 16 * 32 + 16 + i % 16, 4:68] = (a @ b.T)[i].astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(r.buffers["out"], expected)


@pytest.mark.parametrize(("a_kind", "b_kind"), [("u8", "u8"), ("s8", "u8"), ("s8", "s8")])
@pytest.mark.parametrize("saturate", [False, True])
def test_integers(a_kind: str, b_kind: str, saturate: bool) -> None:
    rng = np.random.default_rng(8)
    data = [rng.integers(0, 256, (rows, 32), dtype=np.uint8) for rows in (128, 64)]
    a, b = (d.view(np.int8 if kind == "s8" else np.uint8).astype(np.int64) for d, kind in zip(data, (a_kind, b_kind)))
    old = rng.choice([2**31 - 5, -(2**31) + 5, 7], (1, 128, COLUMNS)).astype(np.int32)
    idesc = 2 << 4 | (a_kind == "s8") << 7 | (b_kind == "s8") << 10 | 8 << 17 | 8 << 24 | saturate << 3
    r = issue(MMA.format(1, "i8"), 1, images_of(*data, 1), old.view(np.uint32), idesc=idesc)
    assert r.report.clean, str(r.report)
    total = a @ b.T + old[0, :, :64]
    total = np.clip(total, -(2**31), 2**31 - 1) if saturate else (total + 2**31) % 2**32 - 2**31
    np.testing.assert_array_equal(r.buffers["out"].view(np.int32)[0, :, :64], total)


@pytest.mark.parametrize("layout", ["A", "B", "D", "F"])
def test_operand_a_in_tensor_memory(layout: str) -> None:
    """Row r lies in the lane of its row of D; for layout B a second time in the other 64 lanes."""
    m, group, place = LAYOUTS[layout]
    rng = np.random.default_rng(3)
    a, b = small(rng, m, 16), small(rng, 64, 16)
    cells = np.zeros((group, 128, COLUMNS), np.uint32)
    words = a.astype(np.float16).view(np.uint32)
    for i in range(m):
        cta, lane, _ = place(i, 0)
        cells[cta, lane, 64:72] = words[i]
        if layout == "B":
            cells[cta, lane + 64, 64:72] = words[i]
    text = "add.u32 %x, %d, 64; " + MMA.format(group, "f16").replace("%ad", "[%x]")
    r = issue(
        text, group, images_of(np.zeros((m, 32), np.uint8), halves(b), group), cells, idesc=f16_idesc(m, 64), accumulate=False
    )
    assert r.report.clean, str(r.report)
    out = r.buffers["out"].view(np.float32)
    got = np.array([[out[place(i, j)] for j in range(64)] for i in range(m)])
    np.testing.assert_array_equal(got, a @ b.T)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e3m2(code: np.ndarray) -> np.ndarray:
    exponent, mantissa = code >> 2 & 7, code & 3
    magnitude = np.where(exponent > 0, (1 + mantissa / 4) * 2.0 ** (exponent - 3.0), mantissa / 4 * 2.0**-2)
    return np.where(code & 32, -magnitude, magnitude)


def test_narrow_types_in_tensor_memory_take_a_byte_each() -> None:
    """e2m1 in bits 2 to 5, e3m2 in bits 0 to 5; in shared memory sixteens are packed at the start of 16 bytes."""
    rng = np.random.default_rng(4)
    a4, b6 = rng.integers(0, 16, (128, 32)), rng.integers(0, 64, (64, 32))
    cells = np.zeros((1, 128, COLUMNS), np.uint32)
    cells[0, :, 64:72] = (a4 << 2).astype(np.uint8).view(np.uint32)
    packed = np.zeros((64, 2, 16), np.uint8)
    for row in range(64):
        for half in range(2):
            number = sum(int(code) << 6 * i for i, code in enumerate(b6[row, 16 * half : 16 * half + 16]))
            packed[row, half, :12] = np.frombuffer(number.to_bytes(12, "little"), np.uint8)
    idesc = 1 << 4 | 5 << 7 | 4 << 10 | 8 << 17 | 8 << 24
    text = "add.u32 %x, %d, 64; " + MMA.format(1, "f8f6f4").replace("%ad", "[%x]")
    r = issue(text, 1, [{B_AT: canonical(packed.reshape(64, 32))}], cells, idesc=idesc, accumulate=False)
    assert r.report.clean, str(r.report)
    np.testing.assert_array_equal(r.buffers["out"].view(np.float32)[0, :, :64], E2M1[a4] @ e3m2(b6).T)


@pytest.mark.parametrize("group", [1, 2])
def test_disabled_lanes_keep_their_values(group: int) -> None:
    rng = np.random.default_rng(5)
    a, b = small(rng, 128 * group, 16), small(rng, 64, 16)
    old = rng.integers(-9, 10, (group, 128, COLUMNS)).astype(np.float32)
    masks = rng.integers(0, 1 << 32, 4 * group)
    vector = "{" + ", ".join(f"%m{i}" for i in range(4 * group)) + "}"
    text = f".reg .b32 %m<8>; {' '.join(f'mov.u32 %m{i}, {v};' for i, v in enumerate(masks))}" + MMA.format(
        group, "f16"
    ).replace("%on;", f"{vector}, %on, 3;")
    r = issue(text, group, images_of(halves(a), halves(b), group), old.view(np.uint32), idesc=f16_idesc(128 * group, 64))
    assert r.report.clean, str(r.report)
    expected = old.copy()
    for cta in range(group):
        for lane in range(128):
            if not masks[4 * cta + lane // 32] >> lane % 32 & 1:  # and D times 2^-3
                expected[cta, lane, :64] = old[cta, lane, :64] / 8 + a[128 * cta + lane] @ b.T
    np.testing.assert_array_equal(r.buffers["out"].view(np.float32), expected)


# block scaling: kind, qualifier, K, scales a row, type of the scales
SCALED = [("mxf8f6f4", "block32", 32, 1, "ue8m0"), ("mxf8f6f4", "scale_vec::1X", 32, 1, "ue8m0"), ("mxf4", "", 64, 2, "ue8m0"),
          ("mxf4nvf4", "scale_vec::2X", 64, 2, "ue8m0"), ("mxf4nvf4", "scale_vec::4X", 64, 4, "ue4m3"), ("mxf4nvf4", "block16", 64, 4, "ue8m0")]  # fmt: skip


def scale_value(code: np.ndarray, kind: str) -> np.ndarray:
    if kind == "ue8m0":
        return np.asarray(2.0 ** (code.astype(np.float64) - 127))
    exponent, mantissa = code.astype(np.int64) >> 3, code.astype(np.int64) & 7
    return np.asarray(np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0), mantissa / 8 * 2.0**-6))


@pytest.mark.parametrize(("kind", "qualifier", "depth", "count", "scale"), SCALED)
@pytest.mark.parametrize("layout", ["A", "B", "D"])
def test_scales(kind: str, qualifier: str, depth: int, count: int, scale: str, layout: str) -> None:
    """Row r's scales lie in lane r mod 32 of each quarter, column r / 32, from the byte that the id names."""
    m, group, place = LAYOUTS[layout]
    rng = np.random.default_rng(6)
    for chosen in (0, 1, 3) if count == 1 else (0, 2) if count == 2 else (0,):
        a, b = (rng.integers(0, 256, (rows, 32), dtype=np.uint8) for rows in (m, 64))
        if depth == 64:
            x, y = (E2M1[np.stack([d & 15, d >> 4], axis=-1).reshape(len(d), 64)] for d in (a, b))
        else:  # e4m3 by e4m3, without NaN
            a, b = a & 0xBF, b & 0xBF
            x, y = ((-1.0) ** (d >> 7) * scale_value(d & 0x7F, "ue4m3") for d in (a, b))
        low, high = (120, 134) if scale == "ue8m0" else (0x20, 0x60)
        sa, sb = (rng.integers(low, high, (rows, count), dtype=np.uint8) for rows in (m, 64))
        cells = rng.integers(0, 1 << 32, (group, 128, COLUMNS), dtype=np.uint32)
        bytes_of = cells.view(np.uint8).reshape(group, 128, COLUMNS, 4)
        for cta in range(group):
            for quarter in range(4):
                for row in range(m // group):
                    bytes_of[cta, 32 * quarter + row % 32, 80 + row // 32, chosen : chosen + count] = sa[m // group * cta + row]
                half = 32 * (quarter // 2) if layout == "B" else 0  # each half of N beside the lanes of D that it belongs to
                for row in range(32 if layout == "B" else 64):
                    bytes_of[cta, 32 * quarter + row % 32, 88 + row // 32, chosen : chosen + count] = sb[half + row]
        types = 0 if depth == 32 else 1 << 7 | 1 << 10
        idesc = types | 8 << 17 | m // 128 << 27 | chosen << 29 | chosen << 4 | (scale == "ue8m0") << 23
        words = ".".join(filter(None, (kind, "block_scale", qualifier)))
        text = ".reg .b32 %sa, %sb; add.u32 %sa, %d, 80; add.u32 %sb, %d, 88; " + MMA.format(group, words).replace(
            "%on;", "[%sa], [%sb], %on;"
        )
        r = issue(text, group, images_of(a, b, group), cells, idesc=idesc, accumulate=False)
        assert r.report.clean, str(r.report)
        spread = [np.repeat(scale_value(s, scale), depth // count, axis=1) for s in (sa, sb)]
        expected = ((x * spread[0]) @ (y * spread[1]).T).astype(np.float32)
        out = r.buffers["out"].view(np.float32)
        got = np.array([[out[place(i, j)] for j in range(64)] for i in range(m)])
        # sums of up to 64 products in float64, in whatever order, then rounded to float32
        magnitude = np.abs(x * spread[0]) @ np.abs(y * spread[1]).T
        assert (np.abs(got - expected) <= magnitude * 2.0**-45 + np.abs(expected) * 2.0**-23).all()


# cp: rows of the source, bytes of a row, lanes that each row goes to
COPIES: dict[str, tuple[int, int, Callable[[int], list[int]]]] = {
    "128x256b": (128, 32, lambda r: [r]),
    "128x128b": (128, 16, lambda r: [r]),
    "4x256b": (4, 32, lambda r: [32 * r]),
    "64x128b.warpx2::02_13": (64, 16, lambda r: [r, r + 64]),
    "64x128b.warpx2::01_23": (64, 16, lambda r: [r % 32 + 64 * (r // 32), r % 32 + 64 * (r // 32) + 32]),
    "32x128b.warpx4": (32, 16, lambda r: [r, r + 32, r + 64, r + 96]),
}


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("shape", COPIES)
def test_copies_to_tensor_memory(shape: str, group: int) -> None:
    """Each CTA of a pair copies from its own shared memory."""
    rows, width, lanes = COPIES[shape]
    data = np.random.default_rng(7).integers(0, 256, (group, rows, width), dtype=np.uint8)
    images = []
    for cta in range(group):
        image = np.zeros(ROOM, np.uint8)
        for r in range(rows):
            for chunk in range(width // 16):
                at = r // 8 * 256 + chunk * 128 + r % 8 * 16
                image[at : at + 16] = data[cta, r, 16 * chunk : 16 * chunk + 16]
        images.append(image)
    text = f"add.u32 %x, %d, 12; tcgen05.cp.cta_group::{group}.{shape} [%x], %ad;"
    for schedule in SCHEDULES[:3]:
        r = issue(text, group, images, schedule=schedule)
        assert r.report.clean, str(r.report)
        expected = np.zeros((group, 128, COLUMNS), np.uint32)
        for cta in range(group):
            for row in range(rows):
                for lane in lanes(row):
                    expected[cta, lane, 12 : 12 + width // 4] = data[cta, row].view(np.uint32)
        np.testing.assert_array_equal(r.buffers["out"], expected)


def test_four_rows_refresh_the_lane_they_are_told_to() -> None:
    data = np.arange(128, dtype=np.uint8).reshape(4, 32)
    image = np.zeros(256, np.uint8)
    for r in range(4):
        for chunk in range(2):
            image[128 * chunk + 16 * r :][:16] = data[r, 16 * chunk : 16 * chunk + 16]
    r = issue("add.u32 %x, %d, 0x1F0000; tcgen05.cp.cta_group::1.4x256b [%x], %ad;", 1, [image])
    assert r.report.clean, str(r.report)
    np.testing.assert_array_equal(r.buffers["out"][0, 31::32, :8], data.view(np.uint32))


def test_six_bits_are_unpacked() -> None:
    codes = np.random.default_rng(8).integers(0, 64, (32, 16), dtype=np.uint8)
    image = np.zeros(ROOM, np.uint8)
    for row in range(32):
        number = sum(int(code) << 6 * i for i, code in enumerate(codes[row]))
        image[row // 8 * 256 + row % 8 * 16 :][:12] = np.frombuffer(number.to_bytes(12, "little"), np.uint8)
    r = issue("tcgen05.cp.cta_group::1.32x128b.warpx4.b8x16.b6x16_p32 [%d], %ad;", 1, [image])
    assert r.report.clean, str(r.report)
    np.testing.assert_array_equal(r.buffers["out"][0, :, :4], np.tile(codes.view(np.uint32), (4, 1)))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("words", ["down.cta_group::{}", "cta_group::{}.down"])
def test_shift(words: str, group: int) -> None:
    """31 of the 32 lanes of a quarter move by one, 8 columns of them."""
    cells = np.random.default_rng(9).integers(0, 1 << 32, (group, 128, COLUMNS), dtype=np.uint32)
    r = issue(f"add.u32 %x, %d, 0x200008; tcgen05.shift.{words.format(group)} [%x];", group, [{}] * group, cells)
    assert r.report.clean, str(r.report)
    expected = cells.copy()
    expected[:, 32:63, 8:16] = cells[:, 33:64, 8:16]
    np.testing.assert_array_equal(r.buffers["out"], expected)


def test_operations_on_the_same_columns_stay_in_order() -> None:
    """A copy, then a product that reads what it copied as A, then a shift of the result."""
    rng = np.random.default_rng(10)
    a, b = small(rng, 128, 16), small(rng, 64, 16)
    text = "add.u32 %x, %d, 64; tcgen05.cp.cta_group::1.128x256b [%x], %ad;" + MMA.format(1, "f16").replace("%ad", "[%x]")
    text += "tcgen05.shift.cta_group::1.down [%d];"
    for schedule in SCHEDULES:
        r = issue(text, 1, images_of(halves(a), halves(b), 1), idesc=f16_idesc(128, 64), accumulate=False, schedule=schedule)
        assert r.report.clean, str(r.report)
        expected = a @ b.T
        expected[:31, :8] = expected[1:32, :8]
        np.testing.assert_array_equal(r.buffers["out"].view(np.float32)[0, :, :64], expected)


FAULTS = {
    "another group": (lambda t: t.replace("tcgen05.mma.cta_group::2", "tcgen05.mma.cta_group::1"), 2, "tensor memory misuse"),
    "one CTA allocates": (lambda t: t.replace("setp.lt.u32 %p, %t, 32; mov", "setp.lt.u32 %p, %t, 32; setp.eq.and.u32 %p, %cta, 0, %p; mov"), 2, "deadlock"),
    "commit to one": (lambda t: t.replace("mov.u16 %mask, 3", "mov.u16 %mask, 1"), 2, "deadlock"),
    "commit to a third": (lambda t: t.replace("mov.u16 %mask, 3", "mov.u16 %mask, 7"), 2, "multicast"),
    "no fence before the product": (lambda t: t.replace("fence.proxy.async;", ""), 2, "missing proxy fence"),
    "no cluster barrier": (lambda t: t.replace("barrier.cluster.arrive; barrier.cluster.wait;", "bar.sync 0;", 1), 2, "data race"),
    "columns not allocated": (lambda t: t.replace("%idesc, %on;", "%idesc, %on;").replace("[%d], %ad", "[%d+96], %ad"), 2, "tensor memory lifetime"),
    "lane of D": (lambda t: t.replace("[%d], %ad", "[%d+0x100000], %ad"), 2, "malformed descriptor"),
    "beyond shared memory": (lambda t: t.replace("and.b32 %x, %x, 0x3FFF;", "and.b32 %x, %x, 0x3FFF; add.u32 %x, %x, 900;"), 2, "out of bounds"),
    "two threads": (lambda t: t.replace("and.pred %p, %p, %one;", ".reg .pred %q; setp.lt.u32 %q, %t, 2; and.pred %p, %p, %q;"), 2, "tensor core misuse"),
    "a pair without a cluster": (lambda t: t, 1, "tensor memory misuse"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_pair(fault: str) -> None:
    edit, ctas, kind = FAULTS[fault]
    good = kernel(MMA.format(2, "f16"), 2, f16_idesc(256, 64))
    image = np.zeros((2, ROOM), np.uint8)
    cells = np.zeros((2, 128, COLUMNS), np.uint32)
    for name, seed in SCHEDULES[:3]:
        buffers = {"image": image, "cells": cells, "out": cells}
        launch = {"grid": [2], "block": [128], "cluster": [ctas]}
        r = run(edit(good), buffers, launch=launch, schedule_name=name, seed=seed)
        assert kind in kinds(r), (name, str(r.report))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tcgen05.mma.sp.cta_group::1.kind::f16 [%d], %ad, %bd, [%d], %idesc, %on;", "is not modelled"),
        ("tcgen05.mma.ws.cta_group::2.kind::f16 [%d], %ad, %bd, %idesc, %on;", ".ws is for one CTA"),
        ("tcgen05.mma.ws.cta_group::1.kind::f16 [%d], %ad, %bd, %idesc, %on, %ad;", "a mask of zero columns is not modelled"),
        ("tcgen05.mma.ws.cta_group::1.kind::f16.collector::a::fill [%d], %ad, %bd, %idesc, %on;", "is not for this form"),
        ("tcgen05.mma.cta_group::1.kind::f16.collector::b1::fill [%d], %ad, %bd, %idesc, %on;", "is not for this form"),
        ("tcgen05.mma.cta_group::1.kind::f16.ashift [%d], [%d], %bd, %idesc, %on;", ".ashift is not"),
        ("tcgen05.mma.cta_group::1.kind::f16 [%d], %ad, %bd, %idesc, %on, 16;", "scale-input-d 16 is not possible"),
        ("tcgen05.mma.cta_group::1.kind::f8f6f4 [%d], %ad, %bd, %idesc, %on, 1;", "scale-input-d 1 is not possible"),
        ("tcgen05.mma.cta_group::1.kind::mxf4 [%d], %ad, %bd, %idesc, %on;", "is not modelled"),
        ("tcgen05.cp.cta_group::1.64x128b [%d], %ad;", "64x128b is not modelled"),
        ("tcgen05.cp.cta_group::1.128x128b.b8x16.b4x16_p64 [%d], %ad;", "figures alone show"),
    ],
)
def test_what_is_not_modelled_is_refused_with_its_line(text: str, message: str) -> None:
    body = ".reg .b32 %d, %idesc; .reg .b64 %ad, %bd; .reg .pred %on;\n" + text
    with pytest.raises(PtxError, match=message) as caught:
        load(module(body))
    assert caught.value.line == module(body).splitlines().index(text) + 1
