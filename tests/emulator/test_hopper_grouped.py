"""The grouped Hopper kernel, compiled here: every expert's own weights and scales, no alarm, and planted faults that are found."""

from __future__ import annotations

import itertools
import struct
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emulator.dsl import compile_for_hopper
from glu4.activation import SILU
from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED, MAX_EXPERTS, GroupedConfig
from glu4.backends.hopper.pack import UNIT_WORDS, pack_gated
from glu4.emulator.launch import Result, emulate, load
from glu4.nvfp4 import NVFP4Tensor
from glu4.verify.case import Case
from glu4.verify.checker import check
from grouped_twin import cuts, fit, pieces, plan
from operands import full_range

MOST = 300_000  # warp instructions of a kernel with a fault
CONFIG = GroupedConfig(32, 4, 8, 8, 2, least=1, share=0)
SENTINEL = 0x7BCD
COMPILE = """
import sys, tempfile
from pathlib import Path
from importlib.util import find_spec, module_from_spec, spec_from_file_location
old, new = sys.argv[3:5]
if old:
    names = [f"glu4.backends.hopper.grouped_{part}" for part in ("schedule", "gemm")]
    sources = {name: Path(find_spec(name).origin).read_text() for name in names}
    assert [s.count(old) for s in sources.values()] in ([0, 1], [1, 0]), old
    name = next(name for name in names if old in sources[name])
    path = Path(sys.argv[1]).with_name(name.split(".")[-1] + ".py")
    path.write_text(sources[name].replace(old, new))
    spec = spec_from_file_location(name, path)
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
from cutlass import cute
from glu4.backends.hopper.grouped_build import arguments
from glu4.backends.hopper.grouped_config import GroupedConfig
with tempfile.TemporaryDirectory() as scratch:
    given = arguments(eval(sys.argv[2]), "f16", "f16", sys.argv[5] == "dual")
    made = cute.compile(*given, options=f"--keep-ptx --dump-dir={scratch}")
Path(sys.argv[1]).write_text(made.artifacts.PTX)
"""


@cache
def ptx(config: GroupedConfig, old: str = "", new: str = "", dual: bool = True) -> str:
    """PTX of the kernel of gate and up, or of one matrix, with a fault planted in its source."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "kernel.ptx")
        arguments = ["-c", COMPILE, str(path), repr(config), old, new, "dual" if dual else "single"]
        compile_for_hopper(arguments, scratch, 400)
        return path.read_text()


def fields(form: str, *values: Any) -> dict[str, str]:
    return {"bytes": struct.pack("<" + form, *values).hex()}


class Experts:
    """Weights of full range, scales and biases of each expert's own, and sorted tokens with rows to spare."""

    def __init__(self, counts: list[int], n: int, k: int, spare_rows: int = 2) -> None:
        g = torch.Generator().manual_seed(5)
        self.n, self.k, self.experts = n, k, len(counts)
        self.gates = [self._weight(2 * e, n, k) for e in range(self.experts)]
        self.ups = [self._weight(2 * e + 1, n, k) for e in range(self.experts)]
        self.x = torch.randn(sum(counts) + spare_rows, k, generator=g).half()
        self.biases = torch.randn(2, self.experts, n, generator=g)
        self.offsets = [0, *itertools.accumulate(counts)]

    @staticmethod
    def _weight(seed: int, n: int, k: int) -> NVFP4Tensor:
        w = full_range(100 + seed, n, k)
        return NVFP4Tensor(w.codes, w.block_scale, torch.tensor(0.0002 * (seed + 1)))

    def tokens(self, config: GroupedConfig) -> list[dict[str, Any]]:
        """The parameters that describe x."""
        rows, k = self.x.shape
        box = {
            "buffer": "x", "element_type": "f16", "global_shape": [k, rows], "global_strides_bytes": [2 * k],
            "box_shape": [64, config.box], "swizzle": "128B",
        }  # fmt: skip
        return [{"tensor_map": box}, fields("ii", rows, k)]

    def packed(self) -> torch.Tensor:
        """int32 `[E, tiles, units, 576]`."""
        return torch.stack([pack_gated(g, u) for g, u in zip(self.gates, self.ups)])

    def x_scale(self) -> float | None:
        """What all products are multiplied by."""
        return None

    def index(self) -> list[dict[str, Any]]:
        """The parameters after all others."""
        return []

    def sources(self) -> dict[str, np.ndarray]:
        return {"x": self.x.view(torch.uint16).numpy()}

    def run(self, text: str, config: GroupedConfig, ctas: int = 3, schedule: str = "eager", seed: int = 0,
            offsets: list[int] | None = None, **options: Any) -> Result:  # fmt: skip
        n, experts, rows = self.n, self.experts, self.x.shape[0]
        packed, x_scale = self.packed(), self.x_scale()
        _, tiles, units, _ = packed.shape
        words = fields("iii4xqq", experts, tiles, units, tiles * units * UNIT_WORDS, units * UNIT_WORDS)
        sizes = {"partials": ctas * config.rows * 64 * config.tokens, "ready": ctas * config.rows}
        scales = [{"pack": [{"ptr": name}, fields("i4x", experts)]} for name in ("gate", "up")]
        biases = [{"pack": [{"ptr": name}, fields("iiq", experts, n, n)]} for name in ("gate_bias", "up_bias")]
        params = [
            *self.tokens(config), {"pack": [{"ptr": "w"}, words]},
            {"pack": [{"ptr": "offsets"}, fields("i4x", experts + 1)]}, *scales, {"ptr": "x_scale"}, *biases,
            {"i32": 6 if x_scale is None else 7},
            {"f32": SILU.alpha}, {"f32": SILU.beta}, {"f32": SILU.limit},
            {"pack": [{"ptr": "c"}, fields("iiq", rows, n, n)]},
            *({"pack": [{"ptr": name}, fields("i4x", size)]} for name, size in sizes.items()), *self.index(),
        ]  # fmt: skip
        buffers = self.sources() | {
            "w": np.concatenate([packed.numpy().view(np.uint32).ravel(), np.zeros(UNIT_WORDS, np.uint32)]),
            "offsets": np.array(offsets or self.offsets, np.int32),
            "gate": torch.stack([w.global_scale for w in self.gates]).numpy(),
            "up": torch.stack([w.global_scale for w in self.ups]).numpy(),
            "x_scale": np.array([np.nan if x_scale is None else x_scale], np.float32),
            "gate_bias": self.biases[0].numpy(),
            "up_bias": self.biases[1].numpy(),
            "c": np.full((rows, n), SENTINEL, np.uint16),
            "partials": np.full(sizes["partials"], np.nan, np.float32),
            "ready": np.zeros(sizes["ready"], np.int32),
        }
        launch = {
            "grid": [ctas], "block": [config.threads], "dynamic_smem": config.shared_bytes, "params": params,
            "dependent": [*self.sources(), "offsets", "c", "partials", "ready"],
        }  # fmt: skip
        return emulate(load(text), launch, buffers, schedule_name=schedule, seed=seed, **options)

    def case(self, e: int, first: int, end: int) -> Case:
        """What is specified of an expert's rows."""
        biases = {"gate_bias": self.biases[0, e], "up_bias": self.biases[1, e]}
        return Case("expert", e, self.x[first:end], self.gates[e], self.ups[e], out_dtype=torch.float16, **biases)

    def wrong(self, result: Result) -> list[str]:
        """What is not as specified, expert by expert, and whether rows of no expert were touched."""
        out = torch.from_numpy(result.buffers["c"].view(np.int16)).view(torch.float16)
        found = []
        for e, (first, end) in enumerate(itertools.pairwise(self.offsets)):
            if first < end:
                verdict = check(self.case(e, first, end), out[first:end])
                found += [] if verdict.ok else [f"expert {e}: {verdict.summary()}"]
        if not (result.buffers["c"][self.offsets[-1] :] == SENTINEL).all():
            found.append("rows beyond the last expert's were written")
        if result.buffers["ready"].any():
            found.append("a flag was left up")
        return found


@pytest.mark.parametrize(
    ("counts", "schedule", "seed"),
    [([0, 0, 5], "eager", 0), ([0, 0], "eager", 0)]
    + [pytest.param([3, 0, 9, 1, 17], *s, marks=pytest.mark.slow) for s in (("eager", 0), ("random", 1), ("random", 2))]
    # lazily, copies are held back until nothing else runs, and a warp that awaits a flag runs
    + [pytest.param([3, 0, 9, 1, 17], "lazy", 0, marks=(pytest.mark.slow, pytest.mark.long))],
)
def test_every_expert_has_its_own(counts: list[int], schedule: str, seed: int) -> None:
    experts = Experts(counts, 72, 208)
    result = experts.run(ptx(CONFIG), CONFIG, schedule=schedule, seed=seed)
    assert result.report.clean, str(result.report)
    assert experts.wrong(result) == []


@pytest.mark.slow
@pytest.mark.parametrize("config", GROUPED_SHIPPED, ids=lambda c: c.name)
def test_shipped_tiles(config: GroupedConfig) -> None:
    experts = Experts([5, 130, 0, 64], 104, 144)
    result = experts.run(ptx(config), config, ctas=2)
    assert result.report.clean, str(result.report)
    assert experts.wrong(result) == []


@pytest.mark.slow
def test_more_experts_than_threads_of_a_cta() -> None:
    counts = [1 if e % 37 == 0 else 0 for e in range(MAX_EXPERTS)]
    experts = Experts(counts, 32, 64)
    result = experts.run(ptx(CONFIG), CONFIG)
    assert result.report.clean, str(result.report)
    assert experts.wrong(result) == []


@pytest.mark.slow
@pytest.mark.parametrize("offsets", [[0, 3, 1, 12], [0, 99, 100, 101], [-5, 2, 4, 9], [4, 3, 2, 1]], ids=str)
def test_wrong_offsets_lead_to_no_access_outside(offsets: list[int]) -> None:
    """Some rows may be written twice, by several experts; memory beyond x and out is never touched."""
    result = Experts([3, 5, 4], 40, 64).run(ptx(CONFIG), CONFIG, offsets=offsets)
    assert {h.kind for h in result.report.hazards} <= {"data race"}, str(result.report)


@pytest.mark.slow
def test_bits_do_not_depend_on_the_number_of_ctas_where_no_tile_is_shared() -> None:
    experts, config = Experts([3, 0, 9, 1], 72, 144), replace(CONFIG, share=(1 << 20) - 1)
    few, many = (experts.run(ptx(config), config, ctas=c).buffers["c"] for c in (1, 7))
    assert (few == many).all()


@pytest.mark.slow
@pytest.mark.parametrize("ctas", [5, 16])
def test_tiles_that_several_ctas_share(ctas: int) -> None:
    """Those CTAs leave sums that the twin says; the same bits again, whatever comes first."""
    config = GroupedConfig(32, 1, 8, 8, 4, least=1, share=0)
    experts = Experts([3, 0, 9, 33], 40, 640)
    results = [experts.run(ptx(config), config, ctas=ctas, schedule="random", seed=seed) for seed in (1, 2)]
    left = ~np.isnan(results[0].buffers["partials"]).reshape(ctas, -1).all(1)
    steps = -(-640 // 128)
    tiles, costs = plan(experts.offsets, experts.offsets[-1], 2, config)
    rounds, found = cuts(costs, steps, ctas, config)
    expected = [any(p.end < steps for p in pieces(cta, ctas, len(tiles), steps, rounds, found)) for cta in range(ctas)]
    assert left.tolist() == expected
    assert any(expected)
    for result in results:
        assert result.report.clean, str(result.report)
        assert experts.wrong(result) == []
        assert (result.buffers["c"] == results[0].buffers["c"]).all()


FIT = GroupedConfig(32, 3, 8, 8, 4, fit=True)


@pytest.mark.slow
@pytest.mark.parametrize("ctas", [13, pytest.param(18, marks=pytest.mark.long)])
def test_tiles_that_fit(ctas: int) -> None:
    """Tiles of 2 and 3 row groups, one a CTA; no sums are left; the bits are those of other tiles, whatever comes first."""
    experts = Experts([3, 0, 9, 61], 136, 640)
    found = fit(experts.offsets, 75, 5, ctas, FIT)
    assert found is not None
    assert {t.groups for t in found if t} == {2, 3}
    other = experts.run(ptx(CONFIG), replace(CONFIG, share=(1 << 20) - 1), ctas=2)
    for seed in (1, 2):
        result = experts.run(ptx(FIT), FIT, ctas=ctas, schedule="random", seed=seed)
        assert result.report.clean, str(result.report)
        assert experts.wrong(result) == []
        assert np.isnan(result.buffers["partials"]).all()
        assert (result.buffers["c"] == other.buffers["c"]).all()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 4])
def test_one_set_of_fragments(rows: int) -> None:
    """A fragment is written once the products that read it are done; the bits are those of two sets."""
    one = GroupedConfig(32, rows, 8, 8, 4, least=1, share=0, sets=1)
    experts = Experts([3, 0, 9, 33], 72, 640)
    two = experts.run(ptx(CONFIG), CONFIG, ctas=5)
    for seed in (1, 2):
        result = experts.run(ptx(one), one, ctas=5, schedule="random", seed=seed)
        assert result.report.clean, str(result.report)
        assert experts.wrong(result) == []
        if rows == CONFIG.rows:
            assert (result.buffers["c"] == two.buffers["c"]).all()


# what lies where the offsets will be when the kernel looks before the one in front has ended
EARLIER = {
    "the same": [0, 3, 3, 12, 73],
    "none": [0, 0, 0, 0, 0],
    "another mixture": [0, 40, 41, 41, 73],
    "more than there is": [0, 1 << 20, 1 << 21, 1 << 22, (1 << 31) - 1],
    "no offsets at all": [-7, 60, -(1 << 31), 12, 5],
}
COUNTS = [3, 0, 9, 61]


def looks(name: str, config: GroupedConfig) -> list[pytest.MarkDecorator]:
    """One is quick, one more is of CI."""
    if (name, config) == ("another mixture", CONFIG):
        return []
    return [pytest.mark.slow] if (name, config) == ("no offsets at all", FIT) else [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    ("earlier", "config"),
    [pytest.param(n, c, marks=looks(n, c), id=f"{n}-{c.name}") for c in (CONFIG, FIT, *GROUPED_SHIPPED) for n in EARLIER],
)
def test_offsets_that_come_late(earlier: str, config: GroupedConfig) -> None:
    """Copies that were started for other offsets are passed by; bits and alarms as if the right ones had been there."""
    experts = Experts(COUNTS, 136, 640 if config in (CONFIG, FIT) else 144)
    before = {"offsets": np.array(EARLIER[earlier], np.int32)}
    for ctas, schedule, seed in ((13, "eager", 0), (3, "random", 1)):
        result = experts.run(ptx(config), config, ctas=ctas, schedule=schedule, seed=seed, before=before)
        assert result.report.clean, str(result.report)
        assert experts.wrong(result) == []


LATE_FAULTS = {
    "the first look is never doubted": ("        return plan[_STALE] == 1, now\n", "        return plan[_STALE] == 2, now\n"),
    "copies of no tile are multiplied": (
        "                if stale:  # what is on",
        "                if ahead < 0:  # what is on",
    ),
    "copies of no tile are counted": ("sent = Int32(0) if stale else ahead", "sent = ahead"),
    "the second look is the first": ("self.read(offsets, thread)\n        if (now", "own\n        if (now"),
    "one of two offsets is compared": (" | (now[1] != own[1])", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.long if i else ()) for i, f in enumerate(LATE_FAULTS)])
def test_planted_faults_in_looking_early_are_found(fault: str) -> None:
    experts, before = Experts(COUNTS, 136, 640), [0, 3, 3, 12, 70]
    options = {"ctas": 13, "max_instructions": MOST, "before": {"offsets": np.array(before, np.int32)}}
    result = experts.run(ptx(CONFIG, *LATE_FAULTS[fault]), CONFIG, **options)
    assert not result.report.clean or experts.wrong(result)


FIT_FAULTS = {
    "bytes of an idle row group": ("groups * (g.weight_bytes // c.rows)", "Int32(g.weight_bytes)"),
    "an idle row group releases nothing": (
        "            self.release(pipe, stage, lane)\n            stage += 1\n",
        "            stage += 1\n",
    ),
    "another tile's first row group": (
        "from_group, row_tile = row_tile, Int32(0)",
        "from_group, row_tile = Int32(0), Int32(0)",
    ),
    "outputs of another row group": ("(row_tile if g.fit else row_tile * c.rows) + group", "group"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.long if i else ()) for i, f in enumerate(FIT_FAULTS)])
def test_planted_faults_in_tiles_that_fit_are_found(fault: str) -> None:
    experts = Experts([3, 0, 9, 61], 136, 640)
    result = experts.run(ptx(FIT, *FIT_FAULTS[fault]), FIT, ctas=13, max_instructions=MOST)
    assert not result.report.clean or experts.wrong(result)


@pytest.mark.slow
def test_a_fragment_written_too_early_is_found() -> None:
    old = "                    warpgroup.wait_group(0)\n                    if"
    one = GroupedConfig(32, 1, 8, 8, 4, least=1, share=0, sets=1)
    result = Experts([3, 9], 40, 640).run(ptx(one, old, "                    if"), one, ctas=2, max_instructions=MOST)
    assert "register in flight" in {h.kind for h in result.report.hazards}, str(result.report)


FAULTS = {
    "another expert's scale": ("self.scales(up_scale[expert], x_scale, flags)", "self.scales(up_scale[0], x_scale, flags)"),
    "another expert's weights": ("weights[(expert, from_group, 0, None)]", "weights[(0, from_group, 0, None)]"),
    "another expert's bias": ("up_bias[(expert, None)]", "up_bias[(0, None)]"),
    "rows of the next expert": ("cutlass.min(end, first + width), width", "first + width, width"),
    "tokens from x's start": ("cute.domain_offset((first, 0), x)", "cute.domain_offset((0, 0), x)"),
    "sums that start at one": ("sums.fill(0.0)", "sums.fill(1.0)"),
    "a tile too few": (
        "            tiles = (count + (most - 1)) // most\n",
        "            tiles = (count + (most - 2)) // most\n",
    ),
    "too narrow a product": ("            width = place * grain\n", "            width = cutlass.max(place - 1, 1) * grain\n"),
    "experts of one width in one place": ("        rank = before + Int32", "        rank = Int32"),
    "sums of another CTA left out": ("sums[token // 2 + i] + theirs[i]", "sums[token // 2 + i]"),
    "sums collected without waiting": (
        "        await_flag(ready.iterator.toint() + (part * c.rows + row) * 4)\n",
        "",
    ),
    "a flag raised before the sums are there": (
        "        cute.arch.barrier(barrier_id=2 + row, number_of_threads=WARPGROUP)\n        if lane == 0:\n            raise_flag",
        "        if lane == 0:\n            raise_flag",
    ),
    "a flag left up": ("            ready[part * c.rows + row] = 0  # for the next launch\n", "            pass\n"),
    "a flag taken down before all warps saw it": (
        "        cute.arch.barrier(barrier_id=2 + row, number_of_threads=WARPGROUP)\n        if lane == 0:\n            ready",
        "        if lane == 0:\n            ready",
    ),
    "no wait for the kernel before": ("        cute.arch.griddepcontrol_wait()\n", ""),
    "a stage released before its products are done": ("                    warpgroup.wait_group(1)\n", ""),
    "no release of a tile's last stage": ("                    self.release(pipe, before, lane)\n", ""),
    "one tensor copy too few": ("            if i < count:\n", "            if i < count - 1:\n"),
}
QUICK = ("another expert's scale",)
# what CI plants besides; a fault is a kernel that has to be compiled
SHORT = (
    "another expert's weights", "rows of the next expert", "sums of another CTA left out", "sums collected without waiting",
    "a flag left up", "no wait for the kernel before", "a stage released before its products are done",
)  # fmt: skip


def planted(fault: str) -> Any:
    longer = () if fault in SHORT else (pytest.mark.long,)
    return pytest.param(fault, marks=() if fault in QUICK else (pytest.mark.slow, *longer))


@pytest.mark.parametrize("fault", [planted(f) for f in FAULTS])
def test_planted_faults_are_found(fault: str) -> None:
    experts = Experts([3, 0, 9, 1, 17], 72, 208)
    # three times what it takes where nothing is wrong; some faults wait for ever
    result = experts.run(ptx(CONFIG, *FAULTS[fault]), CONFIG, max_instructions=MOST)
    assert not result.report.clean or experts.wrong(result)
