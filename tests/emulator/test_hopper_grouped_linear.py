"""The grouped Hopper kernel of one matrix an expert: right numbers, no alarm, and planted faults that are found."""

from __future__ import annotations

import pytest
import torch

from emulator.test_hopper_grouped import CONFIG, Experts, ptx
from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED, GroupedConfig
from glu4.backends.hopper.pack import pack_matrix
from glu4.nvfp4 import NVFP4Tensor, quantize
from glu4.verify.case import Case

LONG = (pytest.mark.slow, pytest.mark.long)
SHARED = GroupedConfig(32, 1, 8, 8, 4, least=1, share=0)  # one row group, so that several CTAs share tiles


class Down(Experts):
    """One matrix an expert, of full range, scales and biases of its own; x in 16 bits, or NVFP4 that a kernel decoded before."""

    def __init__(self, counts: list[int], n: int, k: int, nvfp4: bool = False) -> None:
        super().__init__(counts, n, k)
        self.ups = self.gates  # each half of a tile's rows has a scale and a bias, which are the same
        self.biases[1] = self.biases[0]
        self.quantized = quantize(self.x.float() * 3) if nvfp4 else None
        if self.quantized is not None:
            self.x = self.quantized.decode(torch.float16)

    def packed(self) -> torch.Tensor:
        return torch.stack([pack_matrix(w) for w in self.gates])

    def x_scale(self) -> float | None:
        return None if self.quantized is None else float(self.quantized.global_scale)

    def case(self, e: int, first: int, end: int) -> Case:
        rows = self.x[first:end] if self.quantized is None else self.quantized.narrow_rows(first, end - first)
        return Case("expert", e, rows, self.gates[e], None, gate_bias=self.biases[0, e], out_dtype=torch.float16)


class Exact(Down):
    """Rows of x with a single one, powers of two for scales and no bias: every output is a weight, scaled and rounded once."""

    def __init__(self, counts: list[int], n: int, k: int) -> None:
        super().__init__(counts, n, k)
        rows = self.x.shape[0]
        self.x = torch.zeros(rows, k).half()
        self.x[torch.arange(rows), torch.arange(rows) * 37 % k] = 1.0
        scaled = [NVFP4Tensor(w.codes, w.block_scale, torch.tensor(2.0 ** (-3 - e))) for e, w in enumerate(self.gates)]
        self.gates = self.ups = scaled
        self.biases.zero_()

    def case(self, e: int, first: int, end: int) -> Case:
        return Case("expert", e, self.x[first:end], self.gates[e], None, out_dtype=torch.float16, exact=True)


def proven(
    experts: Experts, config: GroupedConfig = CONFIG, schedule: str = "eager", seed: int = 0, ctas: int = 3
) -> torch.Tensor:
    """The output, after it was found right."""
    result = experts.run(ptx(config, dual=False), config, ctas, schedule, seed)
    assert result.report.clean, str(result.report)
    assert experts.wrong(result) == []
    return torch.from_numpy(result.buffers["c"])


# one row group and a warp's first half of another; less than 8 columns, in rows that do not begin at 16 bytes
@pytest.mark.parametrize(("n", "k"), [(72, 208), pytest.param(260, 144, marks=pytest.mark.slow)])
def test_every_expert_has_its_own(n: int, k: int) -> None:
    proven(Down([3, 0, 9], n, k))


@pytest.mark.parametrize(("schedule", "seed"), [("random", 1), ("random", 2), ("lazy", 0)])
@pytest.mark.slow
@pytest.mark.long
def test_any_order(schedule: str, seed: int) -> None:
    proven(Down([3, 0, 9, 1, 17], 72, 208), CONFIG, schedule, seed)


def test_one_weight_alone_bit_for_bit() -> None:
    proven(Exact([3, 0, 9], 72, 208))


def test_experts_without_a_row() -> None:
    assert (proven(Down([0, 0], 72, 208)) == 0x7BCD).all()


def test_decoded_tokens_have_a_scale() -> None:
    proven(Down([2, 5], 72, 80, nvfp4=True))


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=LONG if i else pytest.mark.slow, id=c.name) for i, c in enumerate(GROUPED_SHIPPED)]
)
def test_shipped_tiles(config: GroupedConfig) -> None:
    proven(Down([5, 130, 0, 64], 200, 144), config, ctas=2)


@pytest.mark.slow
@pytest.mark.parametrize("offsets", [[0, 3, 1, 12], [0, 99, 100, 101], [-5, 2, 4, 9], [4, 3, 2, 1]], ids=str)
def test_wrong_offsets_lead_to_no_access_outside(offsets: list[int]) -> None:
    """Some rows may be written twice, by several experts; memory beyond x and out is never touched."""
    result = Down([3, 5, 4], 40, 64).run(ptx(CONFIG, dual=False), CONFIG, offsets=offsets)
    assert {h.kind for h in result.report.hazards} <= {"data race"}, str(result.report)


@pytest.mark.parametrize("ctas", [5, 16])
@pytest.mark.slow
@pytest.mark.long
def test_tiles_that_several_ctas_share(ctas: int) -> None:
    """The same bits again, whatever comes first."""
    experts = Down([3, 0, 9, 33], 72, 640)
    one, other = (proven(experts, SHARED, "random", seed, ctas) for seed in (1, 2))
    assert (one == other).all()


READ = "                cute.arch.barrier(barrier_id=2 + group, number_of_threads=WARPGROUP)  # what was staged before has been read\n"
FAULTS = {
    "halves exchanged": ("2 * w + in_warp // 8 % 2", "2 * w + 1 - in_warp // 8 % 2"),
    "both halves in one place": ("2 * w + in_warp // 8 % 2", "2 * w"),
    "half of a tile's columns": ("column = row * self.outputs", "column = row * 32"),
    "columns beyond the last": ("if column + e < n:", "if column < n:"),
    "rows beyond the last": ("(at < tokens) & (column < n)", "(column < n)"),
    "tokens staged before those before are read": (READ, ""),
    "a chunk read where it was not staged": (
        "source = staging + self.staged(token_of, chunk)",
        "source = staging + token_of * (chunks * 16) + chunk * 16",
    ),
    "another expert's scale": ("self.scales(up_scale[expert], x_scale, flags)", "self.scales(up_scale[0], x_scale, flags)"),
    "another expert's bias": ("up_bias[(expert, None)]", "up_bias[(0, None)]"),
    "another expert's weights": ("weights[(expert, from_group, 0, None)]", "weights[(0, from_group, 0, None)]"),
}
QUICK, IN_CI = ("halves exchanged",), ("columns beyond the last",)


def _marks(fault: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if fault in QUICK else (pytest.mark.slow,) if fault in IN_CI else LONG


@pytest.mark.parametrize("fault", [pytest.param(f, marks=_marks(f)) for f in FAULTS])
def test_planted_faults_are_found(fault: str) -> None:
    experts = Down([3, 0, 30], 76 if fault == "columns beyond the last" else 72, 208)
    result = experts.run(ptx(CONFIG, *FAULTS[fault], dual=False), CONFIG)
    assert not result.report.clean or experts.wrong(result)
