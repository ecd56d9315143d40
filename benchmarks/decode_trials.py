"""sm90_decode_tokens with more words of eight codes a thread, by itself and in front of the grouped kernel, on one GPU.

    python benchmarks/decode_trials.py --compile DIRECTORY                  # with CuTe DSL, no GPU
    python benchmarks/decode_trials.py --kernels DIRECTORY --output FILE    # on a Hopper GPU with the shipped kernels

One word a thread was the fastest of up to 256 tokens (docs/notebook-hopper.md, section 6); mixtures of experts decode thousands
of rows. Each is checked against torch first. Times as in evict_trials.py.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")  # CuTe DSL reads it when it is imported

import torch
from torch import Tensor

from glu4 import GatedWeights, dual_gemm, grouped_dual_gemm, quantize
from glu4.backends.hopper import tokens
from glu4.backends.hopper.spec import DecodeSpec
from glu4.bench.grouped import draw_grouped
from glu4.bench.machine import environment
from glu4.bench.ours import _clone
from glu4.bench.suites import GROUPED_SUITES
from glu4.bench.timing import Cuda, copies, interleaved, listed
from glu4.compiled.driver import Kernel
from glu4.nvfp4 import NVFP4Tensor

WORDS = (1, 2, 4)
SHAPES = [
    (64, 7168),
    (128, 2048),
    (256, 4096),
    (256, 7168),
    (512, 4096),
    (512, 7168),
    (1024, 2048),
    (1024, 7168),
    (8192, 2048),
    (4096, 7168),
    (65536, 2048),
]  # rows, K
DENSE = [(m, n, k) for n, k in ((4096, 7168), (3072, 4096)) for m in (64, 128, 256, 512, 1024, 4096)]  # M, N, K
CASES = ("E128 x64 N768 K2048", "E32 x128 N2048 K7168")


def compile_into(directory: Path) -> None:
    """words{n}.json and words{n}.cubin."""
    from glu4.backends.hopper import decode_tokens
    from glu4.backends.hopper.build import compile_spec

    directory.mkdir(parents=True, exist_ok=True)
    for words in WORDS:
        with patch.object(decode_tokens, "DECODE_WORDS", words), tempfile.TemporaryDirectory() as scratch:
            cubin, description = compile_spec(DecodeSpec(), scratch)
        (directory / f"words{words}.cubin").write_bytes(cubin)
        (directory / f"words{words}.json").write_text(json.dumps(description))
        print(words, description["registers"], len(cubin), flush=True)


def with_words(kernels: dict[int, Kernel], words: int, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with patch.object(tokens, "decoder", lambda: kernels[words]), patch.object(tokens, "DECODE_WORDS", words):
            return call()

    return run


def alone(rows: int, k: int) -> list[Callable[[], Tensor]]:
    draw = torch.Generator("cuda").manual_seed(0)
    x = quantize(torch.randn(rows, k, generator=draw, device="cuda").half(), backend="portable")
    xs: list[NVFP4Tensor] = [_clone(x) for _ in range(copies(x.nbytes))]
    return [lambda x=x: tokens.prepared(x, False, 0) for x in xs]  # type: ignore[misc]


def product(case: str, x_format: str) -> list[Callable[[], Tensor]]:
    (shape,) = (s for s in (*GROUPED_SUITES["grouped-seed"], *GROUPED_SUITES["moe"]) if s.case == case)
    operands = draw_grouped(shape, "cuda")
    count = copies(operands.gate.nbytes * 2)
    held = [GatedWeights(_clone(operands.gate), _clone(operands.up)).prepare("cuda", free_original=True) for _ in range(count)]
    xs, out = operands.x(x_format, count), operands.out(x_format)
    return [lambda x=x, w=w: grouped_dual_gemm(x, w, operands.offsets, out=out) for x, w in zip(xs, held)]  # type: ignore[misc]


def dense(shape: tuple[int, int, int], x_format: str) -> list[Callable[[], Tensor]]:
    m, n, k = shape
    draw = torch.Generator("cuda").manual_seed(0)
    pair = [quantize(torch.randn(n, k, generator=draw, device="cuda").half()) for _ in range(2)]
    count = copies(sum(w.nbytes for w in pair))
    weights = [GatedWeights(*(_clone(w) for w in pair)).prepare("cuda", free_original=True) for _ in range(count)]
    values = torch.randn(m, k, generator=draw, device="cuda").half()
    x = quantize(values) if x_format == "nvfp4" else values
    xs = [_clone(x) if isinstance(x, NVFP4Tensor) else x.clone() for _ in weights]
    return [lambda x=x, w=w: dual_gemm(x, w, out_dtype=torch.float16) for x, w in zip(xs, weights)]  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", type=Path)
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.compile:
        compile_into(options.compile)
        return
    torch.zeros(1, device="cuda")  # kernels load into its context
    kernels = {}
    for words in WORDS:
        description = json.loads((options.kernels / f"words{words}.json").read_text())
        cubin = (options.kernels / f"words{words}.cubin").read_bytes()
        kernels[words] = Kernel(cubin, description, tokens._DECODER_PARAMETERS)
    rows: list[dict[str, object]] = []
    for name in (*SHAPES, *DENSE, *CASES):
        made = product if isinstance(name, str) else dense
        calls = alone(*name) if len(name) == 2 else made(name, "nvfp4")  # type: ignore[operator]
        contenders = {f"{words} words": [with_words(kernels, words, call) for call in calls] for words in WORDS}
        with patch.object(tokens, "decoder", lambda: None):
            want = calls[0]().clone()
        wrong = [way for way, runs in contenders.items() if not torch.equal(runs[0](), want)]
        if len(name) != 2:
            contenders["float16 tokens"] = made(name, "float16")  # type: ignore[operator]
        row: dict[str, object] = {"case": name, "wrong": wrong}
        for way, timing in interleaved(contenders, Cuda()).items() if not wrong else ():
            row[way] = listed(timing)
        rows.append(row)
        print(row, flush=True)
        options.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
        del calls, contenders
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
