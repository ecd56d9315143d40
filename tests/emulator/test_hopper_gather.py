"""The Hopper kernels that find tokens by an index: the same bits as of sorted tokens, no alarm, and faults that are found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from emulator.runner import kinds
from emulator.test_hopper_grouped import CONFIG, Experts, fields, ptx
from emulator.test_hopper_kernels import ptx_of
from glu4.backends.hopper.config import DECODE_THREADS
from glu4.backends.hopper.grouped_config import GATHER_CONFIGS, GroupedConfig
from glu4.backends.hopper.spec import DecodeSpec
from glu4.emulator.launch import Result, emulate, load
from glu4.moe import sort_by_expert
from glu4.nvfp4 import NVFP4Tensor, gather_rows
from operands import full_range

GATHER = replace(CONFIG, gather=True)
SCHEDULES = (("random", 1), ("eager", 0), ("lazy", 0), ("random", 2))


class Routed(Experts):
    """Tokens `[T, K]` as they came, of which `ids [T, top_k]` chose some; `x` are the rows that the sort by expert asks for.

    Tokens that nobody chose are NaN, and so is what lies between rows, which are `pad` values longer than K.
    """

    def __init__(self, ids: torch.Tensor, experts: int, n: int, k: int, pad: int = 8) -> None:
        order, offsets, _ = sort_by_expert(ids, experts)
        super().__init__(offsets.diff().tolist(), n, k, 0)
        chosen = ((ids >= 0) & (ids < experts)).any(1, keepdim=True)
        drawn = torch.randn(ids.shape[0], k, generator=torch.Generator().manual_seed(6)).where(chosen, torch.nan)
        self.unsorted = torch.nn.functional.pad(drawn, (0, pad), value=torch.nan).half()
        self.order, self.top_k = order, ids.shape[1]
        self.x = self.unsorted[order // self.top_k, :k].contiguous()

    def sorted(self) -> Experts:
        """The same problem with x gathered."""
        plain = Experts(np.diff(self.offsets).tolist(), self.n, self.k, 0)
        plain.x = self.x
        return plain

    def tokens(self, config: GroupedConfig) -> list[dict[str, Any]]:
        count, row = self.unsorted.shape
        return [{"pack": [{"ptr": "x"}, fields("iiq", count, self.k, row)]}]

    def index(self) -> list[dict[str, Any]]:
        return [{"pack": [{"ptr": "order"}, fields("iiq", self.unsorted.shape[0], self.top_k, self.top_k)]}]

    def sources(self) -> dict[str, np.ndarray]:
        return {"x": self.unsorted.view(torch.uint16).numpy(), "order": self.order.numpy()}


def choices(seed: int, tokens: int, top_k: int, experts: int) -> torch.Tensor:
    """Ids that may be of no expert, or twice the same; the last expert has none."""
    return torch.randint(-1, experts - 1, (tokens, top_k), generator=torch.Generator().manual_seed(seed))


def proven(routed: Routed, config: GroupedConfig, schedule: str = "eager", seed: int = 0, ctas: int = 3) -> None:
    result = routed.run(ptx(config), config, ctas, schedule, seed)
    assert result.report.clean, str(result.report)
    assert routed.wrong(result) == []


LONG = (pytest.mark.slow, pytest.mark.long)


def test_tokens_are_found_by_their_index() -> None:
    routed = Routed(choices(1, 7, 2, 4), 4, 40, 80)
    assert len(set(routed.offsets)) < 5  # an expert without tokens
    assert routed.offsets[-1] < 14  # choices of no expert
    proven(routed, GATHER)


@pytest.mark.parametrize(
    ("schedule", "seed"), [pytest.param(*s, marks=LONG if i else pytest.mark.slow) for i, s in enumerate(SCHEDULES)]
)
def test_more_stages_than_the_ring_has(schedule: str, seed: int) -> None:
    proven(Routed(choices(1, 7, 2, 4), 4, 40, 1296), GATHER, schedule, seed, ctas=1)


def test_no_choice_of_an_expert_here() -> None:
    proven(Routed(torch.full((3, 2), -1), 2, 40, 64), GATHER)


@pytest.mark.parametrize(
    ("top_k", "k", "pad"),
    [pytest.param(1, 16, 0, marks=LONG), pytest.param(3, 208, 8, marks=pytest.mark.slow), pytest.param(4, 144, 48, marks=LONG)],
)
def test_the_bits_are_those_of_sorted_tokens(top_k: int, k: int, pad: int) -> None:
    """Of more tokens to an expert than a tile has, and of tiles that several CTAs share."""
    routed = Routed(choices(2, 40, top_k, 3), 3, 72, k, pad)
    both = [problem.run(ptx(c), c, 5) for problem, c in ((routed, GATHER), (routed.sorted(), CONFIG))]
    assert all(r.report.clean for r in both), str(both[0].report)
    assert routed.wrong(both[0]) == []
    assert (both[0].buffers["c"] == both[1].buffers["c"]).all()


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=LONG if i else pytest.mark.slow, id=c.name) for i, c in enumerate(GATHER_CONFIGS)]
)
def test_gather_tiles(config: GroupedConfig) -> None:
    """As many tokens as the widest tile has, and a few more."""
    ids = torch.zeros(config.tokens + 3, 1, dtype=torch.int64)
    ids[::17] = 1
    proven(Routed(ids, 2, 104, 144), config, ctas=2)


WAIT = "                    pipe.sync_object_empty.wait(state.index, state.phase)\n                    place"
INDEX = "cutlass.min(first + 32 * i + lane, end - 1)"
ARRIVAL = "cute.arch.cp_async_mbarrier_arrive_noinc(pipe.producer_get_barrier(state))"
# what has to be among the alarms; "numbers" where only the results tell
FAULTS: dict[str, tuple[str, str, str]] = {
    "no index": ("Uint32(tokens_of.iterator[" + INDEX + "])", "Uint32(" + INDEX + ")", "numbers"),
    "a choice for a token": ("choice // Uint32(tokens_of.shape[1]) *", "choice *", "out of bounds"),
    "rows of another tile": (INDEX, INDEX.replace("first + ", ""), "numbers"),
    "an index that another lane has": ("row % 32 + lane // 8", "row % 8 + lane // 8", "numbers"),
    "columns beyond K": ("        there = column * 8 < x.shape[1]  # zeros beyond K\n", "        there = column >= 0\n", "numbers"),
    "chunks not swizzled": ("(chunk ^ (half + row)) * 16", "chunk * 16", "numbers"),
    "fours of rows exchanged": ("targets[row // 4 % 2]", "targets[1 - row // 4 % 2]", "numbers"),
    "half of the columns": ("            if first < width:\n", "            if 2 * first < width:\n", "numbers"),
    "no proxy fence": ('            cute.arch.fence_proxy("async.shared", space="cta")\n', "            pass\n", "missing proxy fence"),
    "arrival before the copies are done": (
        ARRIVAL, "cute.arch.mbarrier_arrive(pipe.producer_get_barrier(state))", "missing wait"),
    "no arrival": (ARRIVAL, "pass", "deadlock"),
    "a stage is not waited for": (WAIT, WAIT.split("\n")[1], "data race"),
    "rows beyond the last expert's end": (INDEX, "first + 32 * i + lane", "out of bounds"),
}  # fmt: skip
IN_CI = ("no index", "arrival before the copies are done")


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow if f in IN_CI else LONG) for f in FAULTS])
def test_faults_in_the_gather_are_found(fault: str) -> None:
    """Some schedule tells."""
    *edit, kind = FAULTS[fault]
    wrap = fault == "a stage is not waited for"
    routed = Routed(choices(3, 17, 2, 3), 3, 40, 1360 if wrap else 208)
    told: set[str] = set()
    for schedule, seed in (s for s in SCHEDULES if s[0] != "lazy"):
        result = routed.run(ptx(GATHER, *edit), GATHER, 1 if wrap else 3, schedule, seed)
        told |= set(kinds(result)) | ({"numbers"} if kind == "numbers" and routed.wrong(result) else set())
        if kind in told:
            return
    pytest.fail(f"{kind} is not among {told}")


# ---- sm90_gather_tokens ----


def decoded(program: Any, x: NVFP4Tensor, order: torch.Tensor, pads: tuple[int, int], schedule: str = "eager") -> Result:
    """The launch that `tokens` makes, of rows with so many words and scales more than K has, which are NaN."""
    (rows, top_k), words, blocks = order.shape, x.k // 8, x.k // 16
    codes = torch.nn.functional.pad(x.codes, (0, 4 * pads[0]), value=0x77)
    scales = torch.nn.functional.pad(x.block_scale.view(torch.uint8), (0, pads[1]), value=0x7F)
    launch = {
        "grid": [order.numel(), -(-words // DECODE_THREADS)],
        "block": [DECODE_THREADS],
        "buffers": {"out": {"dtype": "uint16", "shape": [order.numel(), x.k]}},
        "params": [
            {"pack": [{"ptr": "codes"}, fields("iiq", rows, words, words + pads[0])]},
            {"pack": [{"ptr": "scales"}, fields("iiq", rows, blocks, blocks + pads[1])]},
            {"pack": [{"ptr": "order"}, fields("iiq", rows, top_k, top_k)]},
            {"pack": [{"ptr": "out"}, fields("i4x", 4 * order.numel() * words)]},
        ],
        "dependent": ["codes", "scales", "order", "out"],
    }
    given = {"codes": codes.numpy(), "scales": scales.numpy(), "order": order.numpy()}
    return emulate(program, launch, given, schedule_name=schedule, seed=1)


def right(result: Result, x: NVFP4Tensor, order: torch.Tensor) -> bool:
    """Bit for bit."""
    got = torch.from_numpy(result.buffers["out"].view(np.int16))
    want = gather_rows(x, order)
    assert isinstance(want, NVFP4Tensor)
    return torch.equal(got, want.decode(torch.float16).view(torch.int16))


def drawn(rows: int, top_k: int, k: int) -> tuple[NVFP4Tensor, torch.Tensor]:
    order = torch.randperm(rows * top_k, generator=torch.Generator().manual_seed(k)).view(rows, top_k)
    return full_range(7, rows, k), order


@pytest.mark.parametrize(("rows", "top_k", "k", "pads"), [(5, 3, 1072, (3, 5)), (1, 1, 16, (0, 0)), (4, 1, 2048, (0, 0))])
def test_decoded_rows_are_found_by_their_index(rows: int, top_k: int, k: int, pads: tuple[int, int]) -> None:
    program, (x, order) = load(ptx_of((DecodeSpec(gather=True), ()))[0]), drawn(rows, top_k, k)
    for schedule in ("eager", "random"):
        result = decoded(program, x, order, pads, schedule)
        assert result.report.clean, str(result.report)
        assert right(result, x, order)


GATHERER_FAULTS: dict[str, tuple[str, str, str]] = {
    "no index": ("Uint32(order.iterator[row]) //", "Uint32(row) //", "numbers"),
    "a choice for a token": (" // Uint32(order.shape[1]))", ")", "out of bounds"),
    "words past the last": ("        if word < words:\n", "        if word < 99999:\n", "out of bounds"),
    "scales of another block": ("scales[token, word // 2]", "scales[token, (word + 1) // 2]", "numbers"),
    "rows one after the other without their length": ("Int64(row) * words + word", "Int64(row) * 64 + word", "numbers"),
    "the kernel in front is not waited for": (
        "        cute.arch.griddepcontrol_wait()\n        if word", "        if word", "data race"),
}  # fmt: skip


@pytest.mark.slow
def test_faults_in_the_kernel_that_decodes_by_an_index() -> None:
    x, order = drawn(5, 3, 1072)
    edits = [("decode_tokens", old, new) for old, new, _ in GATHERER_FAULTS.values()]
    programs = ptx_of(*((DecodeSpec(gather=True), (edit,)) for edit in edits))
    for (fault, (_, _, kind)), text in zip(GATHERER_FAULTS.items(), programs, strict=True):
        result = decoded(load(text), x, order, (0, 0))
        assert kind in kinds(result) or (kind == "numbers" and not right(result, x, order)), (fault, kinds(result))
