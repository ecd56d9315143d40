"""compressed-tensors `nvfp4-pack-quantized`: names on disk, and what quantization_config says of each module.

Source: compressed-tensors, NVFP4PackedCompressor (names, packing), QuantizationConfig and utils/match.py (targets: a
module name, "re:" and a regular expression matched from the start, or a class name such as Linear). Both float32 scales
are divisors: 448 * 6 / amax. `dynamic: "local"` means block scales at run time under a stored (static) global scale.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glu4.checkpoint.common import NVFP4, Activations, Names, Scheme, field, refused, strings
from glu4.errors import CheckpointError
from glu4.nvfp4 import BLOCK

__all__ = ["NAMES", "CompressedTensorsConfig", "parse"]

NAMES = Names("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", divisors=True)
FORMAT = "nvfp4-pack-quantized"
_FORMAT_SCHEMES = {
    "mxfp4-pack-quantized": "MXFP4",
    "float-quantized": "FP8",
    "pack-quantized": "INT (pack-quantized)",
    "int-quantized": "INT8",
    "marlin-24": "sparse 2:4 (marlin-24)",
    "dense": "dense",
}


@dataclass(frozen=True)
class _Group:
    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]
    classes: frozenset[str]
    scheme: Scheme


@dataclass(frozen=True)
class CompressedTensorsConfig:
    """A parsed quantization_config; see `common.Config`."""

    groups: tuple[_Group, ...]
    ignored_names: frozenset[str]
    ignored_patterns: tuple[re.Pattern[str], ...]

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of the group that targets `module`: by name before pattern before class."""
        for group in self.groups:
            if module in group.names:
                return group.scheme
        for group in self.groups:
            if any(p.match(module) for p in group.patterns):
                return group.scheme
        # class targets: files do not tell classes, but whatever holds packed weights is a Linear
        by_class = [g.scheme for g in self.groups if "Linear" in g.classes]
        if by_class:
            return by_class[0]
        every = {g.scheme for g in self.groups}
        if len(every) == 1:
            return next(iter(every))
        return refused("unknown", "no config group targets it, and the groups differ") if every else None

    def ignored_by(self, module: str) -> str | None:
        if module in self.ignored_names:
            return module
        return next((f"re:{p.pattern}" for p in self.ignored_patterns if p.match(module)), None)


def parse(document: dict[str, Any], file: Path) -> CompressedTensorsConfig:
    """Read the quantization_config of a config.json; raises CheckpointError for a malformed one."""
    raw = field(document, "config_groups", dict, file, {})
    top = field(document, "format", str, file, "")
    overall = _overall(document, file)
    groups = tuple(_group(str(key), value, top, overall, file) for key, value in raw.items())
    names, patterns, classes = _targets(field(document, "ignore", list, file, []), "ignore", file)
    return CompressedTensorsConfig(groups, names | classes, patterns)


def _overall(document: dict[str, Any], file: Path) -> Scheme | None:
    """What refuses every layer at once, if anything does."""
    transforms = field(document, "transform_config", dict, file, {})
    if transforms.get("config_groups", transforms):
        return refused("NVFP4 with transforms", "transform_config rotates activations at run time (Hadamard)")
    sparsity = field(field(document, "sparsity_config", dict, file, {}), "format", str, file, "dense")
    return None if sparsity == "dense" else refused(f"NVFP4 with {sparsity}", "the packed codes are compressed further")


def _group(key: str, value: Any, top: str, overall: Scheme | None, file: Path) -> _Group:
    if isinstance(value, list):  # a preset name that maps straight to its targets
        scheme = {"NVFP4": Scheme(NVFP4, True, "static"), "NVFP4A16": Scheme("NVFP4A16", True)}.get(key)
        group: dict[str, Any] = {"targets": value}
        scheme = scheme or refused(key, "glu4 reads nvfp4-pack-quantized only")
    elif isinstance(value, dict):
        group, scheme = value, _scheme(value, top, file)
    else:
        raise CheckpointError(f"{file}: config group {key} must be an object, found {type(value).__name__}; correct the file")
    if overall is not None and scheme.supported:
        scheme = overall
    names, patterns, classes = _targets(field(group, "targets", list, file, ["Linear"]), "targets", file)
    return _Group(names, patterns, classes, scheme)


def _targets(values: list[Any], key: str, file: Path) -> tuple[frozenset[str], tuple[re.Pattern[str], ...], frozenset[str]]:
    names, patterns, classes = set(), [], set()
    for target in strings(values, key, file):
        if target.startswith("re:"):
            try:
                patterns.append(re.compile(target.removeprefix("re:")))
            except (re.error, RecursionError, OverflowError) as error:
                raise CheckpointError(f"{file}: {key} holds {target!r}, no regular expression ({error})") from error
        elif "." not in target and target[:1].isupper():
            classes.add(target)
        else:
            names.add(target)
    return frozenset(names), tuple(patterns), frozenset(classes)


def _scheme(group: dict[str, Any], top: str, file: Path) -> Scheme:
    kind = field(group, "format", str, file, top)
    weights = field(group, "weights", dict, file, {})
    if kind == "mixed-precision":
        kind = ""
    if kind and kind != FORMAT:
        return refused(_FORMAT_SCHEMES.get(kind, kind), f"format {kind}; glu4 reads {FORMAT}")
    bits, number = _given(weights, "num_bits", 4), _given(weights, "type", "float")
    if bits != 4 or number != "float":
        return refused(f"{str(number).upper()}{bits}", f"{bits}-bit {number} weights; glu4 reads 4-bit float ones")
    size = _given(weights, "group_size", BLOCK)
    if size != BLOCK:
        name = "MXFP4" if size == 32 else f"FP4 group {size}"
        return refused(name, f"group_size {size}; NVFP4 shares a scale between {BLOCK} values")
    if _given(weights, "strategy", "tensor_group") != "tensor_group":
        return refused(f"FP4 {weights['strategy']}", f"strategy {weights['strategy']}; NVFP4 is tensor_group")
    if weights.get("actorder"):
        return refused("NVFP4 with actorder", f"actorder {weights['actorder']} permutes the input channels")
    if _given(weights, "symmetric", True) is not True:
        return refused("asymmetric FP4", "weights with zero points")
    if "float8_e4m3fn" not in str(weights.get("scale_dtype") or "float8_e4m3fn"):
        return refused(f"FP4 with {weights['scale_dtype']} scales", "NVFP4 block scales are float8_e4m3fn")
    if group.get("output_activations"):
        return refused("NVFP4 with quantised outputs", "output_activations are quantised")
    return _with_inputs(field(group, "input_activations", dict, file))


def _given(args: dict[str, Any], key: str, default: Any) -> Any:
    value = args.get(key)
    return default if value is None else value


def _with_inputs(inputs: dict[str, Any] | None) -> Scheme:
    if inputs is None:
        return Scheme("NVFP4A16", True, "none")
    bits, number = _given(inputs, "num_bits", 4), _given(inputs, "type", "float")
    size = _given(inputs, "group_size", BLOCK)
    if bits != 4 or number != "float" or size != BLOCK:
        return refused(
            f"W4A{bits}", f"activations of {bits}-bit {number} in groups of {size}; glu4 computes NVFP4 or 16-bit ones"
        )
    activations: Activations = "dynamic" if inputs.get("dynamic") is True else "static"
    return Scheme(NVFP4, True, activations)
