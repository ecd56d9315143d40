"""What a round's configurations are: fields of a backend's Config, the kernels they make, and why one may not run a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

import torch

from glu4.backends.blackwell import config as blackwell
from glu4.backends.blackwell.spec import KernelSpec as BlackwellSpec
from glu4.backends.hopper import config as hopper
from glu4.backends.hopper.spec import DecodeSpec
from glu4.compiled.store import Spec
from glu4.problem import Problem
from glu4.tank.stages import StagesConfig, StagesSpec

__all__ = ["BACKENDS", "config_of", "config_type", "refusal", "specs_of"]

# of each device that a round may name, the backend whose Config its fields are
BACKENDS = {"cpu": "portable", "h100": "hopper", "h200": "hopper", "b200": "blackwell"}
_TYPES = {"hopper": StagesConfig, "blackwell": blackwell.Config}

Config = hopper.Config | blackwell.Config


def config_type(backend: str) -> dict[str, type]:
    """The fields of a backend's Config and their types; none for the portable backend, which has nothing to choose."""
    kind = _TYPES.get(backend)
    if kind is None:
        return {}
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    return {("stages" if name == "ring" else name): hints[name] for name in names}


def config_of(backend: str, given: Mapping[str, Any]) -> Config | None:
    """The Config of these fields; None for the portable backend. Raises ValueError, or TypeError for a missing field."""
    if backend == "portable":
        return None
    if backend == "blackwell":
        return blackwell.Config(**given)
    values = {("ring" if name == "stages" else name): value for name, value in given.items()}
    if "tokens" not in values:
        raise ValueError("tokens: missing; the Hopper Config has no default for it")
    return StagesConfig(**values)


def refusal(config: Config | None, problems: Sequence[Problem]) -> str | None:
    """The first rule that keeps `config` from running one of the problems, in one sentence; None when it may run all."""
    for problem in problems:
        if isinstance(config, blackwell.Config):
            reason = blackwell.legal(config, problem)
        else:
            reason = hopper.legal(config, problem) if config is not None else None
        if reason is not None:
            return reason
    return None


def specs_of(config: Config | None, x_format: str) -> list[Spec]:
    """The kernels to compile for calls of `config` with that activation format and its own 16-bit output."""
    if config is None:
        return []
    out = torch.bfloat16 if x_format == "bfloat16" else torch.float16
    if isinstance(config, blackwell.Config):
        return [BlackwellSpec.of(config, out)]
    nvfp4 = x_format == "nvfp4" and config.takes_nvfp4
    made: list[Spec] = [StagesSpec.of(config, out, out, True, nvfp4)]
    # NVFP4 tokens that the kernel does not decode are decoded ahead of it
    return made + ([DecodeSpec()] if x_format == "nvfp4" and not nvfp4 else [])
