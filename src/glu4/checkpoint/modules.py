"""Which modules of a checkpoint are NVFP4, and the scheme of every one, from tensors and configuration together."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from glu4.checkpoint.common import NVFP4, UNQUANTIZED, Config, Names, Scheme, refused
from glu4.checkpoint.files import TensorFiles
from glu4.errors import CheckpointError

__all__ = ["Modules"]

_PACKED = ("U8", "F4")
_FP8 = ("F8_E4M3", "F8_E5M2")
# further tensors of an NVFP4 module that change nothing, and those that change nothing while they hold one value only
_HARMLESS = frozenset({"bias", "weight_shape", "k_scale", "v_scale", "q_scale"})
_NEUTRAL = {"pre_quant_scale": 1.0, "weight_zero_point": 0.0, "input_zero_point": 0.0}
_SUSPICIOUS = re.compile(r"scale|zero_point|g_idx|lora|svd|hadamard|rotat|perm|transform")
_SCALE_LIKE = re.compile(r"scales?(_inv|_2)?$|_blocks$|qweight$|qzeros$")


class Modules:
    """Tensors grouped by module (the name up to its last dot).

    layers  the modules that hold NVFP4 weights: with a global scale, or with packed codes and e4m3 block scales.
            Complete or not, refused or not: a damaged layer is one that must not be mistaken for an unquantised one.
    note    called with (module, text) for what is odd but does not prevent loading
    """

    def __init__(
        self, files: TensorFiles, names: Names, configuration: Config | None, note: Callable[[str, str], None]
    ) -> None:
        self._files = files
        self._names = names
        self._configuration = configuration
        self._note = note
        self._schemes: dict[str, Scheme] = {}
        self.parts = _group_by_module(files)
        self.layers = self._find_layers()
        self._extras = self._find_extras()

    def scheme_of(self, module: str) -> Scheme:
        """How a module is quantised; raises CheckpointError when no tensor belongs to it."""
        if module not in self._schemes:
            if module in self.layers:
                self._schemes[module] = self._nvfp4_scheme(module)
            elif module in self.parts:
                self._schemes[module] = self._foreign_scheme(module) or UNQUANTIZED
            else:
                raise CheckpointError(f"{self._files.path}: no tensor belongs to a module {module!r}")
        return self._schemes[module]

    @cached_property
    def other_quantized(self) -> dict[str, Scheme]:
        """Modules whose weights are quantised in another way than NVFP4, all refused."""
        schemes = {m: self._foreign_scheme(m) for m in self.parts if m not in self.layers}
        return {module: scheme for module, scheme in schemes.items() if scheme is not None}

    def unclaimed_scales(self) -> list[str]:
        """Tensors with scale-like names that belong to no quantised module: a layout that is not recognised here."""
        known = self.layers.keys() | self.other_quantized.keys()
        found = []
        for name in self._files:
            module, _, part = name.rpartition(".")
            if _SCALE_LIKE.search(part) and part not in _HARMLESS and module not in known and self._owner(module) is None:
                found.append(name)
        return found

    # ---- grouping ----

    def _find_layers(self) -> dict[str, None]:
        names = self._names
        found: dict[str, None] = {}
        for module, parts in self.parts.items():
            if names.global_scale in parts:
                found[module] = None
            elif names.codes in parts and names.block_scale in parts:
                codes, scale = (self._files.describe(f"{module}.{part}")[0] for part in (names.codes, names.block_scale))
                if codes in _PACKED and scale == "F8_E4M3":
                    found[module] = None
        return found

    def _owner(self, module: str) -> str | None:
        """The nearest NVFP4 module at or above a name."""
        while module and module not in self.layers:
            module = module.rpartition(".")[0]
        return module or None

    def _find_extras(self) -> dict[str, list[str]]:
        """Tensors at or below an NVFP4 module that are none of its four parts, by names relative to it."""
        extras: dict[str, list[str]] = {}
        for module, parts in self.parts.items():
            owner = self._owner(module)
            if owner is not None:
                below = module[len(owner) + 1 :]
                names = [f"{below}.{p}" if below else p for p in sorted(parts) if below or p not in self._names.all]
                extras.setdefault(owner, []).extend(names)
        return extras

    # ---- schemes ----

    def _claim(self, module: str) -> Scheme | None:
        return self._configuration.scheme(module) if self._configuration is not None else None

    def _nvfp4_scheme(self, module: str) -> Scheme:
        has_input_scale = self._names.input_scale in self.parts[module]
        scheme = self._claim(module) or Scheme(NVFP4, True, "static" if has_input_scale else "none")
        if not scheme.supported:
            return scheme
        pattern = self._configuration.ignored_by(module) if self._configuration is not None else None
        if pattern is not None:
            self._note(module, f"the configuration excludes it ({pattern}), but it holds NVFP4 tensors; read as NVFP4")
        for extra in self._extras.get(module, ()):
            objection = self._objection(module, extra)
            if objection:
                return refused(f"{scheme.name} with {extra}", objection)
        return scheme

    def _objection(self, module: str, extra: str) -> str:
        """Why a further tensor makes a module something glu4 does not compute; empty when it does not."""
        leaf = module.rpartition(".")[2]
        if extra in _HARMLESS or (extra == "output_scale" and leaf in ("k_proj", "v_proj")):  # key-value cache scales
            return ""
        if extra in _NEUTRAL:
            if _holds_only(self._files.load(f"{module}.{extra}"), _NEUTRAL[extra]):
                return ""
            if extra == "pre_quant_scale":
                return (
                    "it scales every input channel before quantisation, which is exact only when folded into the layer "
                    "before; export with it folded"
                )
            return "zero points other than 0 are not NVFP4"
        if _SUSPICIOUS.search(extra):
            return f"tensor {module}.{extra} may change the result and is not understood"
        self._note(module, f"tensor {extra} is not understood and not used")
        return ""

    def _foreign_scheme(self, module: str) -> Scheme | None:
        """The refused scheme of a module that is quantised, but not as NVFP4; None for an unquantised one."""
        parts = self.parts[module]
        codes = "weight_packed" if "weight_packed" in parts else "weight"
        scales = sorted(p for p in parts if p.startswith("weight_scale"))
        if codes not in parts or not (scales or codes == "weight_packed"):
            return None
        claim = self._claim(module)
        if claim is not None and not claim.supported:
            return claim
        dtype = self._files.describe(f"{module}.{codes}")[0]
        scale_dtype = self._files.describe(f"{module}.{scales[0]}")[0] if scales else "no"
        if dtype in _PACKED and scale_dtype in ("U8", "F8_E8M0"):
            name = "MXFP4"
        elif dtype in _FP8:
            name = "FP8"
        else:
            name = f"{dtype} weights with {scale_dtype} scales"
        return refused(name, "glu4 reads NVFP4 weights only")


def _holds_only(tensor: Tensor, value: float) -> bool:
    try:
        return bool((tensor.to(torch.float32) == value).all())
    except RuntimeError:  # of a type that torch does not convert, such as float4
        return False


def _group_by_module(files: TensorFiles) -> dict[str, frozenset[str]]:
    modules: dict[str, set[str]] = {}
    for name in files:
        module, _, part = name.rpartition(".")
        modules.setdefault(module, set()).add(part)
    return {module: frozenset(parts) for module, parts in modules.items()}
