"""Run a Blackwell kernel in the emulator: its PTX, with the launch that its own host code makes. No GPU is needed.

`export` compiles in a process of its own; `Exported.run` needs a C compiler, which links the host object with functions that
record (glu4.emulator.capture).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glu4.activation import Activation
from glu4.backends.blackwell.spec import KernelSpec
from glu4.emulator.capture import capture, describe, pointer, scalar
from glu4.emulator.launch import Result, emulate, load
from glu4.emulator.program import Program
from glu4.errors import UnsupportedError
from glu4.nvfp4 import NVFP4Tensor

__all__ = ["Exported", "Operands", "export"]

_OPERANDS = ("a", "scale_a", "gate", "scale_gate", "up", "scale_up")
_GLOBAL = ("global_a", "global_gate", "global_up")
_BIASES = ("gate_bias", "up_bias")
_IDENTITY, _A_SCALES, _WEIGHT_SCALES, _GATE_BIAS, _UP_BIAS = 1, 2, 4, 8, 16  # as the kernel's `flags`
_BASE, _APART = 0x7000_0000_0000, 1 << 36  # invented addresses of the buffers


def export(specs: Sequence[KernelSpec], directory: Path) -> list[Exported]:
    """Compile kernels of one architecture into `directory`; raises UnsupportedError with the compiler's message."""
    environment = {**os.environ, "CUTE_DSL_ARCH": specs[0].arch, "CUTE_DSL_DISABLE_FILE_CACHING": "1"}
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        listing = Path(scratch) / "specs.json"
        listing.write_text(json.dumps([s.to_dict() for s in specs]))
        command = [sys.executable, "-P", "-m", specs[0].builder, str(listing), str(directory), "--export"]
        made = subprocess.run(command, env=environment, capture_output=True, text=True)
    if made.returncode:
        raise UnsupportedError(f"compiling for the emulator failed: {_message(made.stderr)}")
    return [Exported(spec, directory) for spec in specs]


def _message(stderr: str) -> str:
    """The last line that names an error, without colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d+m", "", stderr).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no message")


@dataclass(frozen=True, eq=False)
class Operands:
    """One call: tokens x `[m, k]` or `[l, m, k]`, weights `[n, k]` or `[l, n, k]`, biases `[n]` or `[l, n]`, an activation."""

    x: NVFP4Tensor
    gate: NVFP4Tensor
    up: NVFP4Tensor | None  # None: one matrix, `gate`
    activation: Activation
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(l, m, n, k)."""
        return self.x.shape[:-2].numel(), self.x.shape[-2], self.gate.rows, self.x.k

    @property
    def flags(self) -> int:
        """The kernel's: activation, which global scales are one for each matrix, which biases there are."""
        each = (self.x.global_scale.ndim, max(w.global_scale.ndim for w in (self.gate, self.up) if w is not None))
        present = (self.activation.kind == "identity", *each, self.gate_bias is not None, self.up_bias is not None)
        return sum(bit for bit, there in zip((_IDENTITY, _A_SCALES, _WEIGHT_SCALES, _GATE_BIAS, _UP_BIAS), present) if there)

    def buffers(self) -> dict[str, np.ndarray[Any, Any]]:
        """What the kernel reads: codes, 128x4 block scales, global scales, biases (one zero for none)."""
        found: dict[str, np.ndarray[Any, Any]] = {}
        up = self.gate if self.up is None else self.up  # not read where there is one matrix
        # gate's and up's global scales have one form
        shape = max(self.gate.global_scale.shape, up.global_scale.shape, key=len)
        scales = (self.x.global_scale, self.gate.global_scale.expand(shape), up.global_scale.expand(shape))
        for name, t, scale in zip(("a", "gate", "up"), (self.x, self.gate, up), scales):
            whole = t.to_swizzled()
            found[name] = whole.codes.contiguous().numpy()
            found[f"scale_{name}"] = whole.block_scale.contiguous().view(torch.uint8).flatten().numpy()
            found[f"global_{name}"] = scale.contiguous().reshape(-1).numpy()
        for name, bias in zip(_BIASES, (self.gate_bias, self.up_bias)):
            found[name] = (torch.zeros(1) if bias is None else bias.float().contiguous().flatten()).numpy()
        return found


@dataclass(frozen=True)
class Exported:
    """A kernel as `export` wrote it."""

    spec: KernelSpec
    directory: Path

    def _file(self, suffix: str) -> Path:
        return self.directory / f"{self.spec.name}{suffix}"

    @cached_property
    def ptx(self) -> str:
        return self._file(".ptx").read_text()

    @cached_property
    def cubin(self) -> bytes:
        return self._file(".cubin").read_bytes()

    @cached_property
    def program(self) -> Program:
        return load(self.ptx)

    def workspace(self, operands: Operands, processors: int = 148) -> np.ndarray[Any, Any]:
        """Tickets of zero, then sums that are NaN until they are written; int32."""
        c, (batch, m, n, _) = self.spec.config, operands.shape
        made = np.full(c.workspace_bytes(m, n, batch, self.spec.weights, processors) // 4, 0x7FC00000, np.int32)
        if c.shares_tiles:
            made[: c.tickets(m, n, batch)] = 0
        return made

    def launch(self, operands: Operands, out: np.ndarray[Any, Any], processors: int = 148) -> dict[str, Any]:
        """The launch description for `out` `[l, rows >= m, stride >= n]`, 16 bits an element, named "out".

        processors: how many CTAs of a persistent kernel may run at once.
        """
        a = operands.activation
        sizes = {name: array.nbytes for name, array in operands.buffers().items()}
        sizes |= {"out": out.nbytes, "workspace": self.workspace(operands, processors).nbytes}
        buffers = {name: (_BASE + i * _APART, size) for i, (name, size) in enumerate(sizes.items())}
        arguments = [pointer(buffers[name][0]) for name in (*_OPERANDS, *_GLOBAL, *_BIASES, "out", "workspace")]
        arguments += [scalar("i64", out.shape[-1]), scalar("i64", out.shape[-2] * out.shape[-1])]
        arguments += [scalar("i32", operands.flags), *(scalar("f32", v) for v in (a.alpha, a.beta, a.limit))]
        arguments += [scalar("i32", v) for v in (processors, *operands.shape)] + [pointer(0)]
        (launch,) = capture(self._file(".o"), self.ptx, arguments)
        # what the kernel in front may still be writing or reading
        c = self.spec.config
        weights = ("gate", "scale_gate", "up", "scale_up") if c.early_weights else ()
        return describe(launch, buffers) | ({"dependent": [b for b in buffers if b not in weights]} if c.pdl else {})

    def run(
        self,
        operands: Operands,
        out: np.ndarray[Any, Any],
        program: Program | None = None,
        processors: int = 148,
        workspace: np.ndarray[Any, Any] | None = None,
        ctas: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> tuple[Result, Tensor]:
        """(the emulator's result, output `[l, m, n]`); `program` runs instead of the kernel, options are the emulator's.

        workspace: as a launch before left it; a new one without. ctas: the only ones to run, with those of their pairs.
        """
        _, m, n, _ = operands.shape
        inputs = {**operands.buffers(), "out": out}
        inputs["workspace"] = self.workspace(operands, processors) if workspace is None else workspace
        launch = self.launch(operands, out, processors)
        if ctas is not None:
            launch["ctas"] = [list(c) for c in ctas]
        result = emulate(program or self.program, launch, inputs, **options)
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[self.spec.out]
        return result, torch.from_numpy(result.buffers["out"].view(np.int16)).view(dtype)[:, :m, :n]
