"""Kernels for mixtures of experts that the tests compile, and runs of them in the emulator, launched by the package's own code."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backends.blackwell.exported import ExportedKernel, ExportedKernels
from backends.blackwell.grouped import DTYPES, SENTINEL, recording
from glu4.activation import SILU, Activation
from glu4.backends.blackwell import launch
from glu4.backends.blackwell.moe_config import MoeConfig
from glu4.backends.blackwell.moe_launch import MoeChoice, MoePlan, MoeShape, addresses_of, made_kernel
from glu4.backends.blackwell.moe_spec import MoeSpec
from glu4.backends.blackwell.moe_tokens import tile_table, tiled_scales
from glu4.emulator.capture import CapturedLaunch, describe
from glu4.emulator.launch import Result, emulate
from glu4.emulator.program import Program
from glu4.nvfp4 import NVFP4Tensor, _unchecked
from glu4.verify import Case, check, full_range_case

PROCESSORS = 3  # so that CTAs have several tiles, of several experts
SPARE = 3  # rows of x that belong to nobody


class MoeKernels(ExportedKernels):
    """With CuTe DSL's host objects."""

    suffixes = (*ExportedKernels.suffixes, ".o", ".h")
    together = 5


def spec(out: str = "f16", **fields: Any) -> MoeSpec:
    return MoeSpec(MoeConfig(**fields), out)


# ---- a call ----


def full_range(
    seed: int, counts: Sequence[int], n: int, k: int, out: str = "f16", activation: Activation = SILU, bias: bool = True,
    linear: bool = False,
) -> Case:  # fmt: skip
    """A full-range case whose experts have global scales other than their neighbours'; linear: of one matrix an expert."""
    case = full_range_case(
        seed,
        sum(counts),
        n,
        k,
        group_sizes=list(counts),
        out_dtype=DTYPES[out],
        activation=activation,
        bias=bias,
        linear=linear,
    )
    # gate's and up's by turns: no neighbours are equal, of hundreds of experts some others are
    scales = torch.stack([w.global_scale for w in (case.gate, case.up) if w is not None], 1).flatten().tolist()
    assert all(a != b for step in (1, 2) for a, b in zip(scales, scales[step:]))
    return case


@dataclass(frozen=True, eq=False)
class Call:
    """Operands and output of one call: x has SPARE rows more than the case, of other values, and C `[rows + 2, n + 8]` is full
    of SENTINEL.

    offsets  other ones than the case's
    """

    case: Case
    kernel: ExportedKernel
    offsets: Sequence[int] | None = None

    @cached_property
    def x(self) -> NVFP4Tensor:
        """Every scale of the rows of nobody is NaN."""
        x = self.case.x
        assert isinstance(x, NVFP4Tensor)
        x = x.to_linear()
        codes = torch.cat((x.codes, torch.full((SPARE, x.k // 2), 0x77, dtype=torch.uint8)))
        scales = torch.cat((x.block_scale.view(torch.uint8), torch.full((SPARE, x.k // 16), 0x7F, dtype=torch.uint8)))
        return _unchecked(codes, scales.view(torch.float8_e4m3fn), x.global_scale)

    @cached_property
    def out(self) -> Tensor:
        return torch.full((self.x.shape[0] + 2, self.case.gate.rows + 8), SENTINEL, dtype=torch.int16)

    @cached_property
    def table(self) -> Tensor:
        offsets = self.case.group_offsets if self.offsets is None else torch.tensor(self.offsets, dtype=torch.int32)
        assert offsets is not None
        return tile_table(offsets, self.x.shape[0], self.kernel.spec.config.tile_n)

    @cached_property
    def memory(self) -> dict[str, Tensor]:
        """Every buffer by name."""
        case = self.case
        gate, up = (None if w is None else launch.prepared(w) for w in (case.gate, case.up))
        assert gate is not None
        scale_x = tiled_scales(self.x.block_scale, self.table, self.kernel.spec.config.tile_n)
        nothing = torch.zeros(1)
        found = {
            "gate": gate.codes, "scale_gate": gate.block_scale, "x": self.x.codes, "scale_x": scale_x, "table": self.table,
            "out": self.out, "global_x": self.x.global_scale, "global_gate": gate.global_scale,
            "gate_bias": nothing if case.gate_bias is None else case.gate_bias.float().contiguous(),
        }  # fmt: skip
        if up is not None:
            found |= {"up": up.codes, "scale_up": up.block_scale, "global_up": up.global_scale}
            found["up_bias"] = nothing if case.up_bias is None else case.up_bias.float().contiguous()
        ordered = {name: found[name] for name in addresses_of(self.kernel.spec.config)}
        assert len(ordered) == len(found)
        return {name: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for name, t in ordered.items()}

    @property
    def shape(self) -> MoeShape:
        return MoeShape(self.x.shape[0], self.case.gate.shape[0], self.case.gate.rows, self.case.k, self.out.stride(0))

    def captured(self, processors: int = PROCESSORS) -> CapturedLaunch:
        """What the package's host code launches."""
        case, act = self.case, self.case.activation
        with recording() as recorder:
            recorder.remember(self.kernel.cubin, self.kernel.ptx)
            made = made_kernel(self.kernel.spec, self.kernel.cubin, self.kernel.description)
            flags = launch.flags_of(act, False, False, case.gate_bias, case.up_bias)
            plan = MoePlan(
                MoeChoice(made, self.kernel.spec.config, processors), self.shape, flags, (act.alpha, act.beta, act.limit)
            )
            plan.launch(-1, 0, [t.data_ptr() for t in self.memory.values()])
        ((_, launched),) = recorder.launches
        return launched


def run(
    call: Call,
    processors: int = PROCESSORS,
    program: Program | None = None,
    change: Any = lambda description: None,
    ctas: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> tuple[Result, Tensor]:
    """(result, C with the rest of its buffer); change: edits the launch, options: the emulator's.

    ctas: the only ones to run, with those of their pairs.
    """
    buffers = {name: (t.data_ptr(), t.numel() * t.element_size()) for name, t in call.memory.items()}
    description = describe(call.captured(processors), buffers)
    if call.kernel.spec.config.pdl:
        description["dependent"] = list(buffers)
    if ctas is not None:
        description["ctas"] = [list(c) for c in ctas]
    change(description)
    arrays = {name: t.numpy() for name, t in call.memory.items()}
    result = emulate(program or call.kernel.program, description, arrays, **options)
    return result, torch.from_numpy(result.buffers["out"])


def tiles(call: Call) -> list[tuple[int, int, int, int]]:
    """(expert, first row, row after the last, first column) of each tile in the order of the schedule, in plain Python."""
    c, found = call.kernel.spec.config, []
    assert call.case.group_offsets is not None
    for e, (begin, end) in enumerate(itertools.pairwise(call.case.group_offsets.tolist())):
        for column in range(0, call.case.gate.rows, c.tile_m):
            found += [(e, row, min(row + c.tile_n, end), column) for row in range(begin, end, c.tile_n)]
    return found


def wrong(call: Call, found: Tensor, pieces: Sequence[tuple[int, int, int, int]] | None = None) -> list[str]:
    """What is wrong: elements of C by the checker's limits, and anything that was written elsewhere.

    pieces: the tiles that were run; all without.
    """
    case, dtype, n = call.case, DTYPES[call.kernel.spec.out], call.case.gate.rows
    rest, findings = found.clone(), []
    if pieces is None:
        rows = case.out_shape[0]
        if rows:
            verdict = check(case, found[:rows, :n].contiguous().view(dtype), diagnose=False)
            findings += [verdict.summary()] * (not verdict.ok)
        rest[:rows, :n] = SENTINEL
    for e, begin, end, column in pieces or ():
        columns = slice(column, min(column + call.kernel.spec.config.tile_m, n))
        one = _one(case, e, slice(begin, end), columns)
        verdict = check(one, found[begin:end, columns].contiguous().view(dtype), diagnose=False)
        findings += [f"expert {e}, rows {begin} to {end}, {columns}: {verdict.summary()}"] * (not verdict.ok)
        rest[begin:end, columns] = SENTINEL
    findings += ["written outside"] * (not bool((rest == SENTINEL).all()))
    return findings


def _one(case: Case, expert: int, rows: slice, columns: slice) -> Case:
    """A tile as a dense case."""
    assert isinstance(case.x, NVFP4Tensor)
    gate, up = (
        None if w is None else w[expert].narrow_rows(columns.start, columns.stop - columns.start) for w in (case.gate, case.up)
    )
    assert gate is not None
    gate_bias, up_bias = (None if b is None else b[expert, columns] for b in (case.gate_bias, case.up_bias))
    x = case.x.narrow_rows(rows.start, rows.stop - rows.start)
    return replace(case, x=x, gate=gate, up=up, gate_bias=gate_bias, up_bias=up_bias, group_offsets=None)
