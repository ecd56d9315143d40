"""SHA-256 of the Hopper kernels' outputs on inputs by seed, to tell whether a change or a machine changes any bit.

    python benchmarks/digests.py --output benchmarks/results/h100-digests.json   # on a Hopper GPU with compiled kernels
    python benchmarks/digests.py --check benchmarks/results/h100-digests.json    # exit code 1 where a digest differs
    python benchmarks/digests.py --inputs benchmarks/results/digest-inputs.json  # of the inputs alone, on any machine

Inputs are made of integers drawn by torch's CPU generator and of powers of two, so they are the same bits everywhere; their
digests are recorded too. Each problem runs with every shipped configuration, as dual_gemm and as linear. Recorded besides: for
every configuration, whether rows have the same bits alone as in a batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import glu4
from glu4 import NVFP4Tensor
from glu4.backends.hopper import launch
from glu4.backends.hopper.config import SHIPPED, Config
from glu4.backends.hopper.pack import pack_gated, pack_matrix
from glu4.backends.hopper.spec import SOURCES
from glu4.compiled.sources import source_hash
from glu4.problem import dense_problem

# mean squares: of e2m1 over its 16 codes; of the e4m3 bytes 0x00 to 0x7E
_CODE_SQUARE = 8.59375
_SCALE_SQUARE = sum(float(torch.tensor(b, dtype=torch.uint8).view(torch.float8_e4m3fn)) ** 2 for b in range(127)) / 127


@dataclass(frozen=True)
class Case:
    """One problem. x: "nvfp4", "float16" or "bfloat16"; out: "float16" or "bfloat16"."""

    m: int
    n: int
    k: int
    x: str
    out: str

    @property
    def name(self) -> str:
        return f"{self.m},{self.n},{self.k} {self.x} {self.out}"


CASES = (
    *(
        Case(m, n, k, x, out)
        for m, n, k in ((1, 72, 208), (9, 136, 1040), (37, 264, 528), (130, 200, 2064), (300, 96, 7184))
        for x, out in (("float16", "float16"), ("bfloat16", "bfloat16"), ("nvfp4", "float16"))
    ),
    Case(7, 136, 1088, "nvfp4", "float16"),  # of a K with which kernels decode tokens themselves
    *(Case(m, 4096, 7168, x, x) for m in (1, 64, 256) for x in ("float16", "bfloat16")),
)


@dataclass(frozen=True)
class Inputs:
    """x `[m, k]`, gate and up `[n, k]`, on one device."""

    x: Tensor | NVFP4Tensor
    gate: NVFP4Tensor
    up: NVFP4Tensor

    @property
    def digest(self) -> str:
        """SHA-256 over all parts, as 16 hexadecimal digits."""
        return digest(*(p for t in (self.x, self.gate, self.up) for p in _parts(t)))


def _parts(t: Tensor | NVFP4Tensor) -> tuple[Tensor, ...]:
    return (t.codes, t.block_scale, t.global_scale) if isinstance(t, NVFP4Tensor) else (t,)


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' bytes, in order, as 16 hexadecimal digits."""
    total = hashlib.sha256()
    for t in tensors:
        total.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


@lru_cache(maxsize=4)
def inputs(case: Case) -> Inputs:
    """All codes and all e4m3 scales; float tokens of all significands, signs and eight binades; the gate's sums about one."""
    gen = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:6]))

    def matrix(rows: int, mean_square: float) -> NVFP4Tensor:
        codes = torch.randint(0, 256, (rows, case.k // 2), generator=gen, dtype=torch.uint8)
        scale = torch.randint(0, 127, (rows, case.k // 16), generator=gen, dtype=torch.uint8)
        exponent = round(-0.5 * math.log2(mean_square))
        return NVFP4Tensor(codes, scale.view(torch.float8_e4m3fn), torch.tensor(2.0**exponent))

    if case.x == "nvfp4":
        x: Tensor | NVFP4Tensor = matrix(case.m, _CODE_SQUARE * _SCALE_SQUARE)
        x_square = 1.0
    else:
        x, x_square = _floats(case, gen)
    square = case.k * x_square * _CODE_SQUARE * _SCALE_SQUARE
    gate = matrix(case.n, square)
    up = matrix(case.n, 4 * square)
    return Inputs(x, gate, up)


def _floats(case: Case, gen: torch.Generator) -> tuple[Tensor, float]:
    """Tokens of random bits with exponents of -6 to 1, and about their mean square."""
    dtype, bias, significand = (torch.float16, 15, 10) if case.x == "float16" else (torch.bfloat16, 127, 7)
    shape = (case.m, case.k)
    bits = torch.randint(0, 2**significand, shape, generator=gen, dtype=torch.int32)
    bits |= torch.randint(bias - 6, bias + 2, shape, generator=gen, dtype=torch.int32) << significand
    sign = torch.randint(0, 2, shape, generator=gen, dtype=torch.int32)
    return torch.where(sign == 1, bits - 32768, bits).to(torch.int16).view(dtype), 7 / 3 * 2 / 3


def runnable(case: Case) -> Iterator[Config]:
    """The configurations that are recorded: for large outputs those whose token tile is near M."""
    small = case.m * case.n < 100_000
    return (c for c in SHIPPED if small or case.m // 4 <= c.tokens <= max(8, 2 * case.m))


def rows(case: Case, device: str) -> Iterator[dict[str, Any]]:
    """The digest of every configuration's output for a case, dual_gemm and linear."""
    made = inputs(case)
    x, gate, up = (t.to(device) for t in (made.x, made.gate, made.up))
    out_dtype = getattr(torch, case.out)
    for operation in ("dual_gemm", "linear"):
        call = _prepared(gate, up, out_dtype, operation)
        for config in runnable(case):
            out = call(x, config)
            row = {"case": case.name, "operation": operation, "config": config.name}
            yield {**row, "finite": bool(out.isfinite().all()), "sha256": digest(out)}


def _prepared(
    gate: NVFP4Tensor, up: NVFP4Tensor, out_dtype: torch.dtype, operation: str
) -> Callable[[Tensor | NVFP4Tensor, Config], Tensor]:
    """A function that runs one configuration on tokens `[m, k]`, with weights packed once."""
    dual = operation == "dual_gemm"
    packed = pack_gated(gate, up) if dual else pack_matrix(gate)
    scales = (gate.global_scale, (up if dual else gate).global_scale)
    if packed.is_cuda:
        torch.cuda.synchronize(packed.device)  # kernels may read weights before the work ahead of them is done

    def call(x: Tensor | NVFP4Tensor, config: Config) -> Tensor:
        problem = dense_problem(x, gate, dual=dual, activation=glu4.SILU, out_dtype=out_dtype, has_bias=False)
        out = torch.full((x.shape[0], gate.rows), float("nan"), dtype=out_dtype, device=gate.device)
        launch.dense(out, x, packed, scales, (None, None), glu4.SILU, problem, config)
        return out

    return call


def rows_alone(device: str) -> dict[str, bool]:
    """Of every configuration, whether all rows of two cases (fp16 and bf16, dual_gemm and linear) have the bits they have when
    they are the only one."""
    same = dict.fromkeys((c.name for c in SHIPPED), True)
    for case in (Case(130, 200, 2064, x, x) for x in ("float16", "bfloat16")):
        made = inputs(case)
        x, gate, up = (t.to(device) for t in (made.x, made.gate, made.up))
        for operation in ("dual_gemm", "linear"):
            call = _prepared(gate, up, getattr(torch, case.out), operation)
            for config in SHIPPED:
                single = torch.cat([call(x[i : i + 1], config) for i in range(case.m)])
                same[config.name] &= digest(single) == digest(call(x, config))
    return same


def document(device: str, commit: str) -> dict[str, Any]:
    """What `--output` writes."""
    query = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": query.stdout.split("\n")[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "kernel_sources": source_hash(SOURCES)[:16],
        "inputs": {case.name: inputs(case).digest for case in CASES},
        "rows_have_the_same_bits_alone": rows_alone(device),
        "rows": [row for case in CASES for row in rows(case, device)],
    }


def differences(recorded: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs in the bits, a line each; a case or configuration that only one of them has counts."""

    def by_name(d: dict[str, Any]) -> dict[str, str]:
        outputs = {f"{row['case']} {row['operation']} {row['config']}": row["sha256"] for row in d["rows"]}
        return outputs | {f"inputs of {case}": value for case, value in d["inputs"].items()}

    before, now = by_name(recorded), by_name(found)
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return [f"{name}: {before.get(name, 'nothing')} recorded, {now.get(name, 'nothing')} found" for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--commit", default="", help="recorded with the result where there is no git")
    args = parser.parse_args()
    if args.inputs:
        args.inputs.write_text(json.dumps({case.name: inputs(case).digest for case in CASES}, indent=1) + "\n")
        return
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found = document("cuda", args.commit or git.stdout.strip())
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found['rows'])} outputs on {found['device']}, {sum(not r['finite'] for r in found['rows'])} not finite")
    if args.check:
        wrong = differences(json.loads(args.check.read_text()), found)
        print("\n".join(wrong) or "every bit is as recorded")
        sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
