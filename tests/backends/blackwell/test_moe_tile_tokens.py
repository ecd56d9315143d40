"""The kernel that numbers tiles and lays out scales, compiled here and run in the emulator, against its twin of torch operations."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.blackwell.exported import ExportedKernel, ExportedKernels
from backends.blackwell.test_group_gemm import TWENTY, changed
from backends.blackwell.test_moe_tokens import CASES, routing
from backends.blackwell.tile_tokens import TileCall
from glu4.backends.blackwell.emulation import export
from glu4.backends.blackwell.moe_config import most_tiles
from glu4.backends.blackwell.moe_launch import shipped_tiles
from glu4.backends.blackwell.moe_spec import TileSpec, spec_from_dict
from glu4.compiled.cubin import resources
from glu4.compiled.store import compile_missing, file_of, read
from glu4.emulator.capture import capture, pointer, scalar
from glu4.emulator.launch import load
from glu4.moe import sort_by_expert

if importlib.util.find_spec("cutlass") is None:
    pytest.skip("needs CuTe DSL to compile the Blackwell kernels", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SIZES = (32, 64, 128)


class TileKernels(ExportedKernels):
    """With CuTe DSL's host objects."""

    suffixes = (*ExportedKernels.suffixes, ".o", ".h")


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> TileKernels:
    specs = {str(n): TileSpec(n) for n in SIZES} | {f"gather {n}": TileSpec(n, gather=True) for n in SIZES}
    return TileKernels(specs, compiled)


def scales(seed: int, rows: int, columns: int) -> Tensor:
    """No zero among them: what is zero afterwards was written as padding. NaN is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (rows, columns), dtype=torch.uint8, generator=generator)


def wrong(call: TileCall, schedule: tuple[str, int] = ("random", 1), **options: Any) -> list[str]:
    """What is: hazards, the table as far as it is read, every byte of the scales."""
    result, table, tiled = call.run(schedule_name=schedule[0], seed=schedule[1], **options)
    expected_table, expected_scales = call.expected()
    count = 1 + int(expected_table[0, 0])
    findings = [str(h) for h in result.report.hazards]
    findings += ["table"] * (not torch.equal(table[:count], expected_table[:count]))
    findings += ["rows of tiles that are not there"] * bool(table[count:].any())
    if call.unsorted is not None:
        findings += ["codes"] * (not torch.equal(call.memory["found"], call.expected_codes()))
    return findings + ["scales"] * (not torch.equal(tiled, expected_scales))


def numbers(description: dict[str, Any]) -> list[int]:
    """The parameters behind the pointers."""
    return [int.from_bytes(bytes.fromhex(p["bytes"]), "little") for p in description["params"][4:]]


@pytest.mark.parametrize("tile_n", SIZES)
@pytest.mark.parametrize(("offsets", "rows"), [c for c in CASES if len(c[0]) < 50], ids=str)
def test_routings_right_and_wrong(kernels: TileKernels, offsets: list[int], rows: int, tile_n: int) -> None:
    """The offsets that the twin is tested with."""
    assert not wrong(TileCall(kernels[str(tile_n)], offsets, scales(1, rows, 6)))


@pytest.mark.parametrize("tile_n", SIZES)
def test_several_blocks_of_experts(kernels: TileKernels, tile_n: int) -> None:
    """More experts than a CTA has threads, no multiple of them: the first CTAs, the last, and some between."""
    offsets, rows = routing(9, 300, 9000), 9000
    call = TileCall(kernels[str(tile_n)], offsets, scales(2, rows, 4))
    expected_table, expected_scales = call.expected()
    count = int(expected_table[0, 0])
    assert count > 200
    per_atom = 128 // tile_n
    firsts = [0, 40, 100, count // per_atom - 1]  # atoms, all of whose CTAs run
    ctas = sorted({atom * per_atom + i for atom in firsts for i in range(per_atom)})
    result, table, tiled = call.run(ctas=ctas, schedule_name="random", seed=3)
    assert result.report.clean, str(result.report)
    assert torch.equal(table[0], expected_table[0])
    assert torch.equal(table[[1 + c for c in ctas]], expected_table[[1 + c for c in ctas]])
    ran = sorted({c // per_atom for c in ctas if c < count})
    assert torch.equal(tiled[ran], expected_scales[ran])


def test_more_wrong_tiles_than_32_bits_hold(kernels: TileKernels) -> None:
    """Every second expert is said to have all of 2^30 rows; no scale of theirs is read by the one CTA that runs."""
    rows, experts = 1 << 30, 640
    offsets = [0, rows] * (experts // 2) + [0]
    call = TileCall(kernels["128"], offsets, scales(3, 1, 4).expand(1, 4))
    most = most_tiles(rows, experts, 128)

    def claim(description: dict[str, Any]) -> None:
        assert numbers(description)[1:4] == [1, experts, most_tiles(1, experts, 128)]
        for place, value in ((5, rows), (7, most)):
            description["params"][place] = {"bytes": value.to_bytes(4, "little").hex()}

    result, table, _ = call.run(ctas=[0], change=claim, max_instructions=100_000)
    assert {h.kind for h in result.report.hazards} <= {"out of bounds"}
    assert table[0].tolist() == [most, 0, 0, 0]
    assert table[1].tolist() == [0, 0, 0, rows]


# (columns, bytes from row to row, first byte): words of four scales, bytes where rows are no multiple of four or begin between
LAYOUTS = [(4, 4, 0), (36, 36, 0), (5, 5, 0), (7, 8, 0), (8, 8, 1), (8, 11, 0), (8, 12, 4), (1, 1, 0), (2, 64, 2)]


@pytest.mark.parametrize(("columns", "stride", "start"), LAYOUTS)
def test_scales_anywhere_in_memory(kernels: TileKernels, columns: int, stride: int, start: int) -> None:
    for n in SIZES:
        offsets = [0, 3, 3, 3 + n + 2, 170]
        assert not wrong(TileCall(kernels[str(n)], offsets, scales(4, 180, columns), stride, start))


@pytest.mark.parametrize("schedule", TWENTY, ids=str)
def test_twenty_schedules(kernels: TileKernels, schedule: tuple[str, int]) -> None:
    assert not wrong(TileCall(kernels["64"], [0, 3, 3, 70, 130, 131], scales(5, 140, 12)), schedule)


def test_nobody_has_a_row(kernels: TileKernels) -> None:
    assert not wrong(TileCall(kernels["32"], [0, 0, 0], scales(6, 40, 8)))


# ---- the gather ----


def routed(seed: int, tokens: int, top_k: int, experts: int) -> tuple[Tensor, list[int]]:
    """(order `[T, top_k]`, offsets) of random choices, some of no expert."""
    ids = torch.randint(-1, experts, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    routing = sort_by_expert(ids, experts)
    return routing.order.view(tokens, top_k), routing.group_offsets.tolist()


@pytest.mark.parametrize("tile_n", SIZES)
@pytest.mark.parametrize(("tokens", "top_k", "columns"), [(60, 3, 8), (1, 8, 4), (33, 1, 5), (20, 8, 34)])
def test_rows_are_found_by_their_index(kernels: TileKernels, tile_n: int, tokens: int, top_k: int, columns: int) -> None:
    """Scales and codes, by words and by bytes, of K up to 544; rows of no expert are not written."""
    order, offsets = routed(1, tokens, top_k, 5)
    codes = scales(2, tokens, -(-columns // 2) * 16)
    call = TileCall(kernels[f"gather {tile_n}"], offsets, scales(3, tokens, columns), unsorted=(order, codes))
    for schedule in (("lazy", 0), ("random", 1)):
        assert not wrong(call, schedule)


@pytest.mark.parametrize("offsets", [[0, 3, 1, 12], [0, 99, 100, 101], [-5, 2, 4, 9], [4, 3, 2, 1]], ids=str)
def test_wrong_offsets_gather_nothing_outside(kernels: TileKernels, offsets: list[int]) -> None:
    """Where two experts have one row, both write what it is."""
    order, _ = routed(2, 7, 2, 3)
    call = TileCall(kernels["gather 32"], offsets, scales(4, 7, 8), unsorted=(order, scales(5, 7, 64)))
    assert [f for f in wrong(call) if "data race" not in f] == []


def test_another_token_is_found(kernels: TileKernels) -> None:
    order, offsets = routed(3, 30, 2, 4)
    call = TileCall(kernels["gather 64"], offsets, scales(6, 30, 8), unsorted=(order, scales(7, 30, 64)))
    assert not wrong(call)
    other = TileCall(call.kernel, offsets, call.scales, unsorted=(order.roll(1, 0), call.unsorted[1]))  # type: ignore[index]
    found = other.run()
    expected = call.expected()
    assert not torch.equal(found[2], expected[1])
    assert not torch.equal(other.memory["found"], call.expected_codes())


# ---- faults: pattern, what it becomes, before which line (the last match ahead of it), what is found ----

FAULTS = {
    "no wait for the kernel in front": (r"griddepcontrol\.wait.*", "", None, "data race"),
    "no barrier before the sums are read": (r"bar(rier)?\.(cta\.)?sync.*", "", r"ld\.shared\.v4.*\+16", "data race"),
    "no barrier before the record is read": (r"bar(rier)?\.(cta\.)?sync.*", "", r"ld\.shared\.v4.*\[%r1\]", "data race"),
    "offsets not kept above zero": (r"max\.s32\s+(%\w+), (%\w+), 0;", r"mov.b32 \1, \2;", None, "out of bounds"),
    "ends not kept below the rows": (r"min\.s32\s+(%\w+), (%\w+), %\w+;", r"mov.b32 \1, \2;", r"sub\.s32", "out of bounds"),
    "a lane beside": (r"(st\.global\S*\s+\[%\w+)\], \{?%r", r"\1+16], {%r", None, "out of bounds"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(kernels: TileKernels, fault: str) -> None:
    pattern, new, before, kind = FAULTS[fault]
    kernel = kernels["128"]
    program = load(changed(kernel.ptx, pattern, new, before, 1))
    call = TileCall(kernel, [-9, 3, 3, 140, 4000], scales(7, 300, 8))
    assert not wrong(call)
    found = wrong(call, program=program)
    assert found
    assert kind == "numbers" or any(kind in f for f in found), found


def test_another_offset_is_found(kernels: TileKernels) -> None:
    """Of the check itself: tables and scales differ for each offset that differs."""
    offsets = [0, 3, 3, 70, 130]
    call = TileCall(kernels["32"], offsets, scales(8, 140, 8))
    expected = call.expected()
    for e, more in itertools.product((1, 3, 4), (-1, 1)):
        other = TileCall(kernels["32"], [o + more * (i == e) for i, o in enumerate(offsets)], scales(8, 140, 8))
        _, table, tiled = other.run()
        assert not torch.equal(table[: len(expected[0])], expected[0]) or not torch.equal(tiled, expected[1])


# ---- what is compiled ----


def test_parameters_are_those_of_the_host_code(kernels: TileKernels) -> None:
    for n in SIZES:
        kernel, call = kernels[str(n)], TileCall(kernels[str(n)], [0, 3, 3, 70, 130], scales(9, 140, 12), 16)
        most = most_tiles(140, 4, n)
        given = [pointer(0x7000_0000_0000 + (i << 36)) for i in range(4)] + [scalar("i64", 16)]
        given += [scalar("i32", v) for v in (140, 4, most, 12, 0, 0)] + [pointer(0)]
        (launched,) = capture(kernel.file(".o"), kernel.ptx, given)
        seen: dict[str, Any] = {}
        call.run(ctas=[0], change=seen.update)
        assert numbers(seen) == [16, 140, 4, most, 12]
        assert [int.from_bytes(p, "little") for p in launched.params[4:]] == [16, 140, 4, most, 12]
        assert launched.grid == tuple(seen["grid"]) == (-(-most * n // 128) * 128 // n, 1, 1)
        assert launched.block == tuple(seen["block"]) == (128, 1, 1)
        assert launched.dynamic_smem == kernel.description["shared_bytes"] == 32


def test_parameters_of_the_gather_are_those_of_the_host_code(kernels: TileKernels) -> None:
    order, offsets = routed(5, 70, 2, 4)
    kernel = kernels["gather 64"]
    call = TileCall(kernel, offsets, scales(9, 70, 12), unsorted=(order, scales(8, 70, 96)))
    most = most_tiles(140, 4, 64)
    places = [pointer(0x7000_0000_0000 + (i << 36)) for i in range(7)]
    given = [*places[:4], scalar("i64", 12), *(scalar("i32", v) for v in (140, 4, most, 12)), *places[4:]]
    (launched,) = capture(kernel.file(".o"), kernel.ptx, [*given, scalar("i32", 2), scalar("i32", 96), pointer(0)])
    seen: dict[str, Any] = {}
    call.run(ctas=[0], change=seen.update)
    values = [p for p in seen["params"] if "bytes" in p]
    ours = [int.from_bytes(bytes.fromhex(p["bytes"]), "little") for p in values]
    theirs = [int.from_bytes(p, "little") for i, p in enumerate(launched.params) if i in (4, 5, 6, 7, 8, 12, 13)]
    assert ours == theirs == [12, 140, 4, most, 12, 2, 96]
    named = [p["ptr"] for p in seen["params"] if "ptr" in p]
    assert named == ["offsets", "scales", "table", "tiled", "order", "codes", "found"]


def test_loads_and_stores_are_wide(kernels: TileKernels) -> None:
    """A lane stores all that lies side by side at once, and no register is spilled."""
    for n, vector in ((32, r"st\.global\.b32"), (64, r"st\.global\.v2\.b32"), (128, r"st\.global\.v4\.b32")):
        kernel: ExportedKernel = kernels[str(n)]
        assert re.search(vector, kernel.ptx)
        assert "local" not in kernel.ptx
        assert resources(kernel.cubin) == (kernel.description["registers"], 0)


def test_compiled_for_the_cache(tmp_path: Path) -> None:
    one = TileSpec(64, "sm_103a")
    assert compile_missing([one], tmp_path) == 1
    found = read(file_of(tmp_path, one), one)
    assert found is not None
    assert (found[1]["threads"], found[1]["shared_bytes"], found[1]["pdl"]) == (128, 32, True)
    assert spec_from_dict(found[1]["spec"]) == one
    assert compile_missing([one], tmp_path) == 0
    export([one], tmp_path)  # type: ignore[list-item]
    assert ".target sm_103a" in (tmp_path / f"{one.name}.ptx").read_text()
    assert [(s.tile_n, s.gather) for s in shipped_tiles("sm_103a")] == [(n, g) for g in (False, True) for n in SIZES]
