"""Kernels of grouped products that the tests compile, and runs of them in the emulator, launched by the package's own host code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.blackwell.exported import ExportedKernel
from glu4.activation import SILU, Activation
from glu4.backends.blackwell.grouped_config import GroupConfig, Size, Tile
from glu4.backends.blackwell.grouped_launch import GroupChoice, GroupPlan, grouped_sizes
from glu4.backends.blackwell.grouped_spec import GroupSpec
from glu4.compiled import driver
from glu4.compiled.driver import Kernel
from glu4.emulator.capture import CapturedLaunch, describe
from glu4.emulator.launch import Result, emulate
from glu4.emulator.program import Program
from glu4.nvfp4 import NVFP4Tensor
from glu4.verify import Case, check, full_range_case
from glu4.verify.recorder import Recorder

PROCESSORS = 3  # so that a persistent kernel's CTAs have several tiles, of several groups
SENTINEL = 0x7E55  # a NaN with a payload in both 16-bit types: where nothing was written it stays
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


# ---- a launch ----


@contextmanager
def recording() -> Iterator[Recorder]:
    """A libcuda that records, and the CPU as the current device."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_cuda", lambda: recorder)
        patch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
        yield recorder


@dataclass(frozen=True, eq=False)
class Call:
    """Operands and outputs of one call: for each group a case of one weight or of gate and up, and C `[m + 2, n + 8]` full of
    SENTINEL."""

    cases: Sequence[Case]
    kernel: ExportedKernel

    @property
    def sizes(self) -> list[Size]:
        return [(case.x.shape[-2], case.gate.rows, case.k) for case in self.cases]

    @cached_property
    def outs(self) -> list[Tensor]:
        return [torch.full((m + 2, n + 8), SENTINEL, dtype=torch.int16) for m, n, _ in self.sizes]

    @cached_property
    def memory(self) -> dict[str, Tensor]:
        """Every buffer by name, bytes and float32."""
        found: dict[str, Tensor] = {}
        for g, case in enumerate(self.cases):
            assert isinstance(case.x, NVFP4Tensor)
            for name, matrix in ((f"b{g}", case.gate), (f"a{g}", case.x), (f"up{g}", case.up))[: self.matrices]:
                assert matrix is not None
                whole = matrix.to_swizzled()
                # one byte more than nothing, so that an empty group has an address
                codes, scale = whole.codes.contiguous(), whole.block_scale.contiguous().view(torch.uint8).flatten()
                found |= {name: _padded(codes), f"scale_{name}": _padded(scale)}
            found[f"c{g}"] = self.outs[g]
        found["global_a"] = torch.stack([case.x.global_scale for case in self.cases])  # type: ignore[union-attr]
        found["global_b"] = torch.stack([case.gate.global_scale for case in self.cases])
        if self.matrices == 3:
            found["global_up"] = torch.stack([case.up.global_scale for case in self.cases])  # type: ignore[union-attr]
        return found

    @property
    def matrices(self) -> int:
        """Of each group."""
        return self.kernel.spec.config.maps // 2

    def addresses(self) -> list[int]:
        which = ("b", "a", "up")[: self.matrices]
        each = [(*(part + name for name in which for part in ("", "scale_")), "c") for _ in self.cases]
        names = [f"{name}{g}" for g, own in enumerate(each) for name in own] + [f"global_{name}" for name in ("a", "b", "up")]
        return [self.memory[name].data_ptr() for name in names if name in self.memory]

    def captured(self, processors: int = PROCESSORS) -> CapturedLaunch:
        """What the package's host code launches."""
        config = self.kernel.spec.config
        with recording() as recorder:
            recorder.remember(self.kernel.cubin, self.kernel.ptx)
            formats = [f"{size}s" for size in grouped_sizes(config)]
            made = Kernel(self.kernel.cubin, self.kernel.description, formats, cluster=(config.ctas, 1, 1))
            strides = [out.stride(0) for out in self.outs]
            act = self.cases[0].activation
            numbers = (int(act.kind == "identity"), act.alpha, act.beta, act.limit)
            GroupPlan(GroupChoice(made, config, processors), self.sizes, strides, numbers).launch(-1, 0, self.addresses())
        ((_, launch),) = recorder.launches
        return launch


def _padded(t: Tensor) -> Tensor:
    return t if t.numel() else torch.zeros(16, dtype=torch.uint8)


def run(
    call: Call,
    processors: int = PROCESSORS,
    program: Program | None = None,
    change: Any = lambda description: None,
    ctas: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> tuple[Result, list[Tensor]]:
    """(result, C of each group with the rest of its buffer); change: edits the launch, options: the emulator's.

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
    return result, [torch.from_numpy(result.buffers[f"c{g}"]) for g in range(len(call.cases))]


def full_range(
    seed: int, sizes: Sequence[Size], out: str = "f16", gated: bool = False, activation: Activation = SILU
) -> list[Case]:
    """A full-range case for each group, with global scales of its own."""
    given: dict[str, Any] = {"linear": not gated, "out_dtype": DTYPES[out], "activation": activation}
    cases = [
        full_range_case(seed + 17 * g, m, n, k, **given) if m and n else _empty(m, n, k, given)
        for g, (m, n, k) in enumerate(sizes)
    ]
    scales = [float(case.x.global_scale) * float(case.gate.global_scale) for case in cases if case.x.shape[0]]  # type: ignore[union-attr]
    assert len(set(scales)) == len(scales)
    return cases


def _empty(m: int, n: int, k: int, given: dict[str, Any]) -> Case:
    case = full_range_case(0, 8, 8, k, **given)
    return replace(case, name="empty", x=_zeros(m, k), gate=_zeros(n, k), up=None if case.up is None else _zeros(n, k))


def _zeros(rows: int, k: int) -> NVFP4Tensor:
    codes = torch.zeros((rows, k // 2), dtype=torch.uint8)
    return NVFP4Tensor(codes, torch.zeros((rows, k // 16)).to(torch.float8_e4m3fn), torch.ones(()))


# ---- judgement ----


def wrong(call: Call, found: Sequence[Tensor], pieces: Sequence[Tile] | None = None) -> list[str]:
    """What is wrong: elements of C by the checker's limits, and anything that was written elsewhere.

    pieces: the tiles that were run; all without.
    """
    findings: list[str] = []
    c, dtype = call.kernel.spec.config, DTYPES[call.kernel.spec.out]
    for g, (case, buffer, (m, n, _)) in enumerate(zip(call.cases, found, call.sizes, strict=True)):
        rest = buffer.clone()
        own = [(slice(0, m), slice(0, n))] if pieces is None else [
            (slice(y * c.tile_n, min(m, (y + 1) * c.tile_n)), slice(x * c.tile_m, min(n, (x + 1) * c.tile_m)))
            for group, x, y in pieces if group == g
        ]  # fmt: skip
        for rows, cols in own:
            if rows.stop > rows.start and cols.stop > cols.start:
                verdict = check(_part(case, rows, cols), buffer[rows, cols].contiguous().view(dtype), diagnose=False)
                findings += [f"group {g}, {rows}, {cols}: {verdict.summary()}"] * (not verdict.ok)
            rest[rows, cols] = SENTINEL
        findings += [f"group {g}: written outside"] * (not bool((rest == SENTINEL).all()))
    return findings


def _part(case: Case, rows: slice, cols: slice) -> Case:
    assert isinstance(case.x, NVFP4Tensor)
    x = case.x.narrow_rows(rows.start, rows.stop - rows.start)
    gate, up = (None if w is None else w.narrow_rows(cols.start, cols.stop - cols.start) for w in (case.gate, case.up))
    assert gate is not None
    return replace(case, x=x, gate=gate, up=up)


def spec(groups: int, out: str = "f16", **fields: Any) -> GroupSpec:
    return GroupSpec(GroupConfig(groups, **fields), out)
