"""NVIDIA ModelOpt: names on disk, and what hf_quant_config.json (mirrored in config.json) says of each module.

Source: TensorRT-Model-Optimizer, export/quant_utils.py (names, per-layer configuration, quant_algo values) and
export/convert_hf_config.py (the mirror). Both float32 scales are multipliers: amax / (6 * 448). exclude_modules are
shell-style globs on module names.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from glu4.checkpoint.common import NVFP4, Names, Scheme, field, refused, strings
from glu4.errors import CheckpointError
from glu4.nvfp4 import BLOCK

__all__ = ["NAMES", "ModelOptConfig", "parse"]

NAMES = Names("weight", "weight_scale", "weight_scale_2", "input_scale", divisors=False)
MIXED = "MIXED_PRECISION"
_REFUSED = {
    "NVFP4_SVD": "adds a low-rank 16-bit product to every layer, which GatedWeights does not hold",
    "W4A8_NVFP4_FP8": "quantises activations to FP8, which glu4 does not compute",
}


@dataclass(frozen=True)
class ModelOptConfig:
    """A parsed ModelOpt configuration; see `common.Config`.

    layers  quant_algo and group_size of single modules or whole subtrees, of MIXED_PRECISION checkpoints
    """

    algorithm: str
    group_size: int | None
    dynamic_inputs: bool
    layers: dict[str, tuple[str, int | None]]
    excluded: tuple[str, ...]

    def scheme(self, module: str) -> Scheme | None:
        if self.algorithm == MIXED:
            entry = self._layer(module)
            if entry is None:
                return refused(MIXED, "quantized_layers does not list it, so how its activations are meant is unknown")
            return _scheme(*entry, self.dynamic_inputs)
        return _scheme(self.algorithm, self.group_size, self.dynamic_inputs) if self.algorithm else None

    def _layer(self, module: str) -> tuple[str, int | None] | None:
        name = module
        while name:  # an entry for a module covers what lies below it, as experts do
            if name in self.layers:
                return self.layers[name]
            name = name.rpartition(".")[0]
        return next((entry for glob, entry in self.layers.items() if fnmatchcase(module, glob)), None)

    def ignored_by(self, module: str) -> str | None:
        return next((glob for glob in self.excluded if fnmatchcase(module, glob)), None)


def parse(own: dict[str, Any] | None, own_file: Path, mirror: dict[str, Any] | None, mirror_file: Path) -> ModelOptConfig:
    """Read hf_quant_config.json (`own`) and the quantization_config of config.json (`mirror`); either may be missing.

    Raises CheckpointError for malformed ones, or when the two name different algorithms.
    """
    first = _read(field(own, "quantization", dict, own_file, {}), own_file) if own is not None else None
    second = None
    if mirror is not None:
        second = _read(field(mirror, "quantization", dict, mirror_file, mirror), mirror_file)
    if first is None or second is None:
        return first or second or ModelOptConfig("", None, False, {}, ())
    if first.algorithm and second.algorithm and first.algorithm != second.algorithm:
        raise CheckpointError(
            f"{own_file} says quant_algo {first.algorithm}, {mirror_file} says {second.algorithm}; correct one of them"
        )
    return ModelOptConfig(
        first.algorithm or second.algorithm,
        first.group_size if first.group_size is not None else second.group_size,
        first.dynamic_inputs or second.dynamic_inputs,
        first.layers or second.layers,
        tuple(dict.fromkeys(first.excluded + second.excluded)),
    )


def _read(document: dict[str, Any], file: Path) -> ModelOptConfig:
    layers: dict[str, tuple[str, int | None]] = {}
    for name, entry in field(document, "quantized_layers", dict, file, {}).items():
        if not isinstance(entry, dict):
            raise CheckpointError(f"{file}: quantized_layers[{name!r}] must be an object; correct the file")
        layers[str(name)] = (_algorithm(entry, file), field(entry, "group_size", int, file))
    excluded = [*field(document, "exclude_modules", list, file, []), *field(document, "ignore", list, file, [])]
    groups = [g for g in field(document, "config_groups", dict, file, {}).values() if isinstance(g, dict)]
    inputs = [i for g in groups if (i := field(g, "input_activations", dict, file)) is not None]
    dynamic = document.get("activation_scheme") == "dynamic" or (bool(inputs) and all(i.get("dynamic") is True for i in inputs))
    sizes = [field(field(g, "weights", dict, file, {}), "group_size", int, file) for g in groups]
    size = field(document, "group_size", int, file, next((s for s in sizes if s is not None), None))
    return ModelOptConfig(_algorithm(document, file), size, dynamic, layers, strings(excluded, "exclude_modules", file))


def _algorithm(document: dict[str, Any], file: Path) -> str:
    return str(field(document, "quant_algo", str, file, "")).upper()


def _scheme(algorithm: str, group_size: int | None, dynamic: bool) -> Scheme:
    if algorithm in _REFUSED:
        return refused(algorithm, _REFUSED[algorithm])
    if algorithm not in (NVFP4, "W4A16_NVFP4", "NVFP4_AWQ"):
        return refused(algorithm or "unknown", "glu4 reads NVFP4, W4A16_NVFP4 and NVFP4_AWQ")
    if group_size not in (None, BLOCK):
        return refused(
            f"{algorithm} group {group_size}", f"group_size {group_size}; NVFP4 shares a scale between {BLOCK} values"
        )
    if algorithm == "W4A16_NVFP4":
        return Scheme(algorithm, True, "none")
    return Scheme(algorithm, True, "dynamic" if dynamic else "static")
