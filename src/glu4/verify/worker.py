"""The process that a submission runs in: it loads the file, calls `custom_kernel` on request and hands back plain tensors.

Started as `python -m glu4.verify.worker FILE PROBLEM DEVICE LOG` by `glu4.verify.submission`. Requests come as lines of JSON on
stdin, answers leave as lines of JSON on what was stdout; whatever the submission itself prints goes to the file LOG. Tensors
travel as safetensors files, so that nothing a submission returns is ever unpickled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glu4.nvfp4 import NVFP4Tensor
from glu4.verify.contest import DualData, GroupData

__all__ = ["load_data", "main", "save_data"]

Data = DualData | GroupData
_DUAL_NAMES = ("a", "b1", "b2", "sfa", "sfb1", "sfb2", "sfa_permuted", "sfb1_permuted", "sfb2_permuted")


# ---- data as a file ----


def save_data(data: Data, path: Path) -> None:
    """Write the operands as one safetensors file; `load_data` is the inverse."""
    state: dict[str, Tensor] = {}
    if isinstance(data, DualData):
        parts = {"a": data.a, "b1": data.b1, "b2": data.b2}
        state["c"] = data.c
    else:
        parts = {}
        for i, ((a, b, c), (pad_a, pad_b)) in enumerate(zip(data.groups, data.padding, strict=True)):
            parts |= {f"{i}.a": a, f"{i}.b": b}
            state |= {f"{i}.c": c, f"{i}.pad_a": pad_a, f"{i}.pad_b": pad_b}
    for name, matrix in parts.items():
        state |= {f"{name}.codes": matrix.codes, f"{name}.scale": matrix.block_scale}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def load_data(path: Path, device: str) -> Data:
    """The operands that `save_data` wrote, on `device`."""
    state = load_file(path, device=device)

    def matrix(name: str) -> NVFP4Tensor:
        one = torch.ones((), dtype=torch.float32, device=device)
        return NVFP4Tensor(state[f"{name}.codes"], state[f"{name}.scale"], one)

    if "c" in state:
        return DualData(matrix("a"), matrix("b1"), matrix("b2"), state["c"])
    count = sum(name.endswith(".c") for name in state)
    groups = tuple((matrix(f"{i}.a"), matrix(f"{i}.b"), state[f"{i}.c"]) for i in range(count))
    return GroupData(groups, tuple((state[f"{i}.pad_a"], state[f"{i}.pad_b"]) for i in range(count)))


# ---- calling the submission ----


class _Wrong(Exception):
    """The submission ran, and what it returned is not of the contract; the message is the finding."""


def _load(path: Path) -> Callable[[Any], Any]:
    """`custom_kernel` of the file, imported as the contest does: as module `submission`, beside a module `task`."""
    sys.path.insert(0, str(path.parent))
    if importlib.util.find_spec("task") is None:
        task = types.ModuleType("task")
        task.input_t = task.output_t = Any  # type: ignore[attr-defined]
        sys.modules["task"] = task
    spec = importlib.util.spec_from_file_location("submission", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["submission"] = module
    spec.loader.exec_module(module)
    kernel = getattr(module, "custom_kernel", None)
    if not callable(kernel):
        raise AttributeError(f"{path.name} defines no function custom_kernel(data)")
    return kernel  # type: ignore[no-any-return]


def _named_inputs(arguments: Any) -> dict[str, Tensor]:
    """Every tensor of the arguments that a call must leave as it is: all but c."""
    if isinstance(arguments, tuple) and isinstance(arguments[0], Tensor):
        return dict(zip(_DUAL_NAMES, arguments[:-1], strict=True))
    abc, scales, permuted, _ = arguments
    names: dict[str, Tensor] = {}
    for i, ((a, b, _), sf, sfp) in enumerate(zip(abc, scales, permuted, strict=True)):
        tensors = {"a": a, "b": b, "sfa": sf[0], "sfb": sf[1], "sfa_permuted": sfp[0], "sfb_permuted": sfp[1]}
        names |= {f"{name} of group {i}": tensor for name, tensor in tensors.items()}
    return names


def _outputs_before(arguments: Any) -> list[Tensor]:
    """The c tensors of the arguments."""
    return [arguments[-1]] if isinstance(arguments[0], Tensor) else [c for _, _, c in arguments[0]]


def _raw(tensor: Tensor) -> Tensor:
    """A copy of the bits, for comparing NaN with NaN."""
    return tensor.view(torch.int16 if tensor.dtype == torch.float16 else torch.uint8).clone()


def _refill(previous: Any, arguments: Any) -> Any:
    """The previous call's arguments, at their old addresses, with the contents of `arguments`."""
    old = [*_named_inputs(previous).values(), *_outputs_before(previous)]
    new = [*_named_inputs(arguments).values(), *_outputs_before(arguments)]
    for target, source in zip(old, new, strict=True):
        target.copy_(source)
    return previous


def _checked(result: Any, arguments: Any) -> list[Tensor]:
    """The returned tensors when they are of the contract's form; _Wrong says how they are not."""
    expected = _outputs_before(arguments)
    if isinstance(arguments[0], Tensor):
        results, names = [result], ["the result"]
    else:
        if not isinstance(result, (list, tuple)) or len(result) != len(expected):
            given = f"{len(result)} entries" if isinstance(result, (list, tuple)) else type(result).__name__
            raise _Wrong(f"custom_kernel must return a list of {len(expected)} tensors, one a group; it returned {given}")
        results, names = list(result), [f"the result of group {i}" for i in range(len(expected))]
    for name, given, c in zip(names, results, expected, strict=True):
        if not isinstance(given, Tensor):
            raise _Wrong(f"{name} must be a tensor; custom_kernel returned {type(given).__name__}")
        if given.shape != c.shape:
            raise _Wrong(f"{name} must have shape {tuple(c.shape)}, (M, N, L); it has {tuple(given.shape)}")
        if given.dtype != c.dtype:
            raise _Wrong(f"{name} must be {c.dtype}; it is {given.dtype}")
        if given.device != c.device:
            raise _Wrong(f"{name} must be on {c.device} as its inputs are; it is on {given.device}")
    return [r.detach() for r in results]


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class _Session:
    """What one call leaves for the next: its arguments, to be reused, and its results, which must stay as they are."""

    def __init__(self, kernel: Callable[[Any], Any], device: str) -> None:
        self.kernel = kernel
        self.device = device
        self.arguments: Any = None
        self.results: list[Tensor] = []
        self.bits: list[Tensor] = []

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run one request and write its results; the answer names inputs and earlier results that the call changed."""
        arguments = load_data(Path(request["input"]), self.device).as_tuple()
        if request["reuse"] and self.arguments is not None:
            arguments = _refill(self.arguments, arguments)
            self.results, self.bits = [], []  # c is the same memory, so the earlier result is meant to go
        inputs = _named_inputs(arguments)
        before = {name: _raw(tensor) for name, tensor in inputs.items()}
        _synchronize(self.device)
        start = time.perf_counter()
        # a copy of the containers, so that a submission which edits them does not change what is compared
        passed = arguments if isinstance(arguments[0], Tensor) else tuple(list(part) for part in arguments)
        result = self.kernel(passed)
        _synchronize(self.device)
        seconds = time.perf_counter() - start
        results = _checked(result, arguments)
        save_file({str(i): r.permute(2, 0, 1).contiguous() for i, r in enumerate(results)}, request["output"])
        answer = {
            "seconds": seconds,
            "changed": [name for name, tensor in inputs.items() if not torch.equal(_raw(tensor), before[name])],
            "overwrote": any(not torch.equal(_raw(r), bits) for r, bits in zip(self.results, self.bits, strict=True)),
        }
        self.arguments, self.results, self.bits = arguments, results, [_raw(r) for r in results]
        return answer


def _failure(error: BaseException, path: Path) -> dict[str, Any]:
    """An exception as an answer, with the last line of the submission that it passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return {"error": type(error).__name__, "message": str(error), "line": line, "missing": missing}


def main() -> None:
    """Answer requests until stdin ends."""
    path, device, log = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    # from here on fd 0 is empty, and fds 1 and 2, which compilers and C code write to as well, are the log
    null, sink = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in ((null, 0), (sink, 1), (sink, 2)):
        os.dup2(source, target)

    def answer(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")

    answer({"ready": True})
    session: _Session | None = None
    for line in requests:
        try:
            if session is None:
                session = _Session(_load(path), device)
                answer({"seconds": 0.0})
            else:
                answer(session.call(json.loads(line)))
        except _Wrong as wrong:
            answer({"wrong": str(wrong)})
        except BaseException as error:  # SystemExit too: the parent wants to hear of it
            traceback.print_exc()
            sys.stderr.flush()
            answer(_failure(error, path))


if __name__ == "__main__":
    main()
