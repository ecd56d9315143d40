"""Which backend runs a problem on a device, and the reason when another cannot."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from glu4.backends.blackwell import launch as blackwell
from glu4.backends.blackwell import moe_launch
from glu4.backends.hopper import grouped_launch
from glu4.backends.hopper import launch as hopper
from glu4.backends.hopper.config import SHIPPED, legal
from glu4.backends.hopper.grouped_config import GROUPED_SHIPPED, grouped_legal
from glu4.backends.hopper.spec import shipped, shipped_grouped
from glu4.backends.tokens import launch as tokens_launch
from glu4.backends.tokens import spec as token_kernels
from glu4.compiled import store
from glu4.errors import UnsupportedError
from glu4.problem import GroupedProblem, Problem

__all__ = ["BACKENDS", "Candidate", "Explanation", "arranges", "explain", "packs", "select", "warn_once"]

BACKENDS = ("hopper", "blackwell", "portable")


@dataclass(frozen=True)
class Candidate:
    """One backend's answer for a problem: it can run it, or the reason why not."""

    backend: str
    can_run: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The backends for a problem on a device, best first; `chosen` is the first that can run it."""

    problem: Problem | GroupedProblem
    device: str
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> str:
        return next(c.backend for c in self.candidates if c.can_run)

    def __str__(self) -> str:
        lines = [f"{self.problem.operation} on {self.device}: {self.chosen}"]
        lines += [f"  {c.backend}: {'yes' if c.can_run else 'no'}, {c.reason}" for c in self.candidates]
        return "\n".join(lines)


def _describe(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, sm_{major}{minor})"


_SLOW = "this is a {} GPU, but the portable backend runs on it, many times slower: "
_NOT_COMPILED = "its kernels are not compiled here; run glu4 compile"
_BLACKWELL = "block-scaled tensor cores, weights as prepare arranges them; executed in emulation only so far"
_HOPPER = "weights packed by prepare, decoded in registers"
_TO_COMPILE = "its kernels are not compiled yet; the first call compiles them"


def _hopper_refusal(problem: Problem | GroupedProblem, device: torch.device) -> str | None:
    """Why the Hopper kernels cannot run `problem` on `device`, compiled or not; None when they can."""
    if not hopper.is_hopper(device):
        return "needs a GPU of compute capability 9.0"
    if isinstance(problem, GroupedProblem):
        reasons = [grouped_legal(config, problem) for config in GROUPED_SHIPPED]
    else:
        reasons = [legal(config, problem) for config in SHIPPED]
    return None if None in reasons else reasons[0]


def _can_compile() -> bool:
    """Whether the release of CuTe DSL that kernels are compiled with is installed; it is not imported."""
    return store.installed_dsl() == store.DSL_VERSION


@cache
def _provide(dual: bool, x: str | torch.dtype, out: torch.dtype) -> str | None:
    """Why there is no kernel for an operation and its types; None when there is one.

    Without one, compiles all of the operation's if CuTe DSL is installed: once a process, whether that works or not.
    """
    if hopper.available(dual, x, out):
        return None
    return _compile(dual) or (None if hopper.available(dual, x, out) else _NOT_COMPILED)


@cache
def _provide_grouped(dual: bool, x: str | torch.dtype, out: torch.dtype) -> str | None:
    """As `_provide`, of the kernels for mixtures of experts."""
    if grouped_launch.available(dual, x, out):
        return None
    return _compile_grouped(dual) or (None if grouped_launch.available(dual, x, out) else _NOT_COMPILED)


@cache
def _provide_blackwell(dual: bool, out: torch.dtype, arch: str, device: torch.device) -> str | None:
    """As `_provide`, of Blackwell kernels, whose tokens are NVFP4."""
    if blackwell.available(dual, out, device):
        return None
    return _compile(dual, arch) or (None if blackwell.available(dual, out, device) else _not_compiled(arch))


@cache
def _provide_blackwell_grouped(dual: bool, out: torch.dtype, arch: str, device: torch.device) -> str | None:
    """As `_provide_blackwell`, of the kernels for mixtures of experts."""
    if moe_launch.available(out, device, dual):
        return None
    return _compile_grouped(dual, arch) or (None if moe_launch.available(out, device, dual) else _not_compiled(arch))


def _not_compiled(arch: str = "") -> str:
    return _NOT_COMPILED + (f" --arch {arch}" if arch else "")


@cache
def _compile(dual: bool, arch: str = "") -> str | None:
    """Compile an operation's kernels with a line of progress on stderr; why that was not possible, or None.

    arch: of Blackwell kernels; without it Hopper's.
    """
    if not _can_compile():
        return _not_compiled(arch)
    products: Sequence[store.Spec] = blackwell.shipped(dual, arch) if arch else shipped(dual)
    specs = [*products, *token_kernels.quantizers(arch or "sm_90a")]
    return _compile_all(specs, "dual_gemm" if dual else "linear", arch)


@cache
def _compile_grouped(dual: bool, arch: str = "") -> str | None:
    """As `_compile`, of the kernels for mixtures of experts."""
    if not _can_compile():
        return _not_compiled(arch)
    specs: list[store.Spec] = [*shipped_grouped(dual), *token_kernels.shipped("sm_90a")]
    if arch:
        specs = [*moe_launch.shipped(arch, dual), *moe_launch.shipped_tiles(arch), *token_kernels.shipped(arch)]
    return _compile_all(specs, "grouped_dual_gemm" if dual else "grouped_linear", arch)


def _compile_all(specs: Sequence[store.Spec], operation: str, arch: str) -> str | None:
    command = f"glu4 compile --arch {arch}" if arch else "glu4 compile"
    what = f"glu4: compiling {len(specs)} {operation} kernels, once ({command} does it beforehand)"
    done: list[str] = []

    def report(name: str) -> None:
        done.append(name)
        print(f"\r{what}: {len(done)}", end="", file=sys.stderr, flush=True)

    print(what, end="", file=sys.stderr, flush=True)
    try:
        store.compile_missing(specs, on_done=report)
    except UnsupportedError as error:
        return f"its kernels are not compiled here, and cannot be: {error}"
    finally:
        print(file=sys.stderr)
        hopper.forget()
        grouped_launch.forget()
        blackwell.forget()
        moe_launch.forget()
        tokens_launch.forget()
    return None


@cache
def warn_once(message: str) -> None:
    """A UserWarning, the first time in this process."""
    warnings.warn(f"glu4: {message}", stacklevel=3)


def _portable_reason(problem: Problem | GroupedProblem, device: torch.device) -> str:
    how = "decodes exactly, a block at a time, and uses torch.matmul"
    if device.type == "cpu":
        return how
    reason = f"fallback on every device: {how}"
    if isinstance(problem, GroupedProblem):
        reason += "; reads group_offsets on the host, so it synchronises and cannot be captured in a CUDA graph"
    return reason


def every_kernel(arch: str = "sm_90a") -> list[store.Spec]:
    """All that can be chosen on an architecture, by `select` or around a mixture of experts: what `glu4 compile` compiles."""
    return [*(shipped() if arch == "sm_90a" else moe_launch.all_shipped(arch)), *token_kernels.shipped(arch)]


def explain(problem: Problem | GroupedProblem, device: torch.device | str = "cpu") -> Explanation:
    """The backends that could run `problem` on `device`, which one is chosen, and why not the others.

    The Hopper backend packs weights, the Blackwell backend arranges their scales and rows: once, when `GatedWeights` or
    `LinearWeight` are prepared or first used, or at every call.
    """
    if not isinstance(problem, (Problem, GroupedProblem)):
        raise TypeError(f"problem: expected a glu4.Problem or glu4.GroupedProblem, got {type(problem).__name__}")
    device = torch.device(device)
    refusal = _hopper_refusal(problem, device)
    if refusal is None and not _compiled(problem):
        refusal = _TO_COMPILE if _can_compile() else _NOT_COMPILED
    other = blackwell.refusal(problem, device)
    if other is None and not _compiled_blackwell(problem, device):
        other = _TO_COMPILE if _can_compile() else _not_compiled(blackwell.architecture(device) or "")
    candidates = (
        Candidate("hopper", refusal is None, refusal or _HOPPER),
        Candidate("blackwell", other is None, other or _BLACKWELL),
        Candidate("portable", True, _portable_reason(problem, device)),
    )
    return Explanation(problem, _describe(device), candidates)


def _compiled(problem: Problem | GroupedProblem) -> bool:
    """Whether a Hopper kernel for it is packaged or cached."""
    dual, x, out = _kind(problem)
    grouped = isinstance(problem, GroupedProblem)
    return grouped_launch.available(dual, x, out) if grouped else hopper.available(dual, x, out)


def _compiled_blackwell(problem: Problem | GroupedProblem, device: torch.device) -> bool:
    """Whether a Blackwell kernel for it is packaged or cached."""
    if isinstance(problem, GroupedProblem):
        return moe_launch.available(problem.out_dtype, device, problem.weight_matrices == 2)
    return blackwell.available(problem.operation == "dual_gemm", problem.out_dtype, device)


def _kind(problem: Problem | GroupedProblem) -> tuple[bool, str | torch.dtype, torch.dtype]:
    """What decides which kernels there have to be: whether there are two matrices, x's format, the output's type."""
    x = "nvfp4" if problem.x_format == "nvfp4" else getattr(torch, problem.x_format)
    return problem.weight_matrices == 2, x, problem.out_dtype


def arranges(device: torch.device, dual: bool, stacked: bool = False) -> bool:
    """Whether weights on `device` are to be in Blackwell's form, which every backend reads: it is such a GPU. Where kernels are
    missing and can be compiled, they are compiled now.

    stacked  `[E, N, K]`: the kernels of mixtures of experts are meant
    """
    arch = blackwell.architecture(device)
    if arch is None:
        return False
    types = (torch.bfloat16, torch.float16)
    provide = _provide_blackwell_grouped if stacked else _provide_blackwell
    reasons = [provide(dual, t, arch, device) for t in types]
    if all(reasons):
        warn_once(_SLOW.format("Blackwell") + str(reasons[0]))
    return True


def packs(device: torch.device, dual: bool, stacked: bool = False) -> bool:
    """Whether weights on `device` are to be packed: it is a Hopper GPU, and kernels are there or can be compiled now.

    stacked  `[E, N, K]`, for the kernels of mixtures of experts
    """
    if not hopper.is_hopper(device):
        return False
    types = (torch.bfloat16, torch.float16)
    reasons = [(_provide_grouped if stacked else _provide)(dual, t, t) for t in types]
    if all(reasons):
        warn_once(_SLOW.format("Hopper") + str(reasons[0]))
    return not all(reasons)


def select(problem: Problem | GroupedProblem, device: torch.device, backend: str | None) -> str:
    """The backend for a call: "hopper" or "blackwell" where it can run, else "portable".

    Raises ValueError for an unknown `backend`, UnsupportedError when the one insisted on cannot run.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "portable":
        return "portable"
    arch = blackwell.architecture(device)
    name = backend or ("hopper" if arch is None else "blackwell")
    refusal = (_hopper_refusal if name == "hopper" else blackwell.refusal)(problem, device)
    if refusal is None:
        dual, x, out = _kind(problem)
        grouped = isinstance(problem, GroupedProblem)
        if name == "hopper":
            refusal = (_provide_grouped if grouped else _provide)(dual, x, out)
        else:
            refusal = (_provide_blackwell_grouped if grouped else _provide_blackwell)(dual, out, str(arch), device)
        if refusal is None:
            return name
        if backend is None:
            warn_once(_SLOW.format(name.capitalize()) + refusal)
    if backend is not None:
        raise UnsupportedError(f"backend {backend}: {refusal}")
    return "portable"
