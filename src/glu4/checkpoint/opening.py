"""Open a checkpoint: find out its format from configuration files and tensor names, which must agree."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glu4.checkpoint import compressed_tensors, modelopt
from glu4.checkpoint.checkpoint import Checkpoint
from glu4.checkpoint.common import CheckpointFormat, Config, Oddity, field
from glu4.checkpoint.files import TensorFiles, read_json
from glu4.errors import CheckpointError, UnsupportedError
from glu4.nvfp4 import NibbleOrder, ScaleSign
from glu4.weights import GatedWeights

__all__ = ["load_gated_weights", "open_checkpoint"]


def open_checkpoint(
    path: str | Path, *, nibble_order: NibbleOrder = "low_first", scale_sign: ScaleSign = "reject"
) -> Checkpoint:
    """Open a .safetensors file, or a directory of one or several, with or without an index. Reads headers only.

    nibble_order, scale_sign  how its codes and block scales deviate from the format, as in `NVFP4Tensor.from_packed`

    The format is found out from config.json, hf_quant_config.json and the tensors' names, which must agree. Raises
    CheckpointError when they do not, when a file is missing or damaged, or when there is no NVFP4 layer;
    UnsupportedError when everything quantised in it is of another scheme.
    """
    files = TensorFiles(path)
    try:
        checkpoint = _open(files, nibble_order, scale_sign)
    except BaseException:
        files.close()
        raise
    return checkpoint


def load_gated_weights(
    path: str | Path,
    prefix: str,
    experts: Iterable[int] | None = None,
    *,
    nibble_order: NibbleOrder = "low_first",
    scale_sign: ScaleSign = "reject",
) -> GatedWeights:
    """Gate and up weights of one gated MLP of a checkpoint: `open_checkpoint` and `Checkpoint.load_gated` in one."""
    with open_checkpoint(path, nibble_order=nibble_order, scale_sign=scale_sign) as checkpoint:
        return checkpoint.load_gated(prefix, experts)


def _open(files: TensorFiles, nibble_order: NibbleOrder, scale_sign: ScaleSign) -> Checkpoint:
    config_file, own_file = files.root / "config.json", files.root / "hf_quant_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    own = read_json(own_file) if own_file.exists() else None
    mirror = field(config, "quantization_config", dict, config_file)
    evidence = _evidence(files)
    claims = _claims(own, own_file, mirror, config_file)
    for claimed, file in claims.items():
        if evidence is not None and claimed != evidence:
            raise CheckpointError(
                f"{file} says {claimed}, but the tensors are named as {evidence} names them, and the two store reciprocal "
                "global scales; correct or remove the quantization configuration"
            )
    format = evidence or next(iter(claims), None)
    if format == "modelopt":
        names = modelopt.NAMES
    else:
        format, names = "compressed-tensors", compressed_tensors.NAMES
    configuration: Config | None = None
    if format == "modelopt" and (own is not None or mirror is not None):
        configuration = modelopt.parse(own, own_file, mirror, config_file)
    elif format == "compressed-tensors" and mirror is not None:
        configuration = compressed_tensors.parse(mirror, config_file)
    checkpoint = Checkpoint(files, format, names, configuration, config, nibble_order=nibble_order, scale_sign=scale_sign)
    _require_layers(checkpoint, mirror)
    for note in files.notes:
        checkpoint.report(Oddity(files.path.name, note))
    if configuration is None:
        checkpoint.report(Oddity(files.path.name, "no quantization configuration; schemes are taken from the tensors alone"))
    return checkpoint


def _require_layers(checkpoint: Checkpoint, mirror: dict[str, Any] | None) -> None:
    if checkpoint.layers():
        return
    others = sorted({scheme.name for scheme in checkpoint.modules.other_quantized.values()})
    if others:
        raise UnsupportedError(f"{checkpoint.path}: quantised as {', '.join(others)}, which glu4 does not read; it reads NVFP4")
    if any(name.endswith("_blocks") for name in checkpoint.tensor_names()):
        raise UnsupportedError(
            f"{checkpoint.path}: quantised as MXFP4 (blocks of 32), which glu4 does not read; it reads NVFP4"
        )
    method = (mirror or {}).get("quant_method")
    kind = f"its quant_method is {method}" if method else "its weights are not quantised"
    raise CheckpointError(f"{checkpoint.path}: holds no NVFP4 layer ({kind}); give an NVFP4 checkpoint, or quantise the model")


def _claims(
    own: dict[str, Any] | None, own_file: Path, mirror: dict[str, Any] | None, mirror_file: Path
) -> dict[CheckpointFormat, Path]:
    """The formats that configuration files name, and which file does."""
    claims: dict[CheckpointFormat, Path] = {}
    if own is not None:
        claims["modelopt"] = own_file
    if mirror is not None:
        method = str(mirror.get("quant_method") or mirror.get("quant_library") or "").lower()
        if method.startswith("modelopt"):
            claims.setdefault("modelopt", mirror_file)
        elif method == "compressed-tensors":
            claims["compressed-tensors"] = mirror_file
    if len(claims) > 1:
        raise CheckpointError(f"{own_file} says modelopt, {mirror_file} says compressed-tensors; remove the one that is wrong")
    return claims


def _evidence(files: TensorFiles) -> CheckpointFormat | None:
    """The format that tensor names show; None when they show none."""
    found: dict[CheckpointFormat, str] = {}
    for name in files:
        part = name.rpartition(".")[2]
        if part in ("weight_packed", "weight_global_scale", "input_global_scale"):
            found.setdefault("compressed-tensors", name)
        elif part == "weight_scale_2":
            found.setdefault("modelopt", name)
    if len(found) > 1:
        raise CheckpointError(
            f"{files.path}: holds names of both formats, {found['compressed-tensors']} and {found['modelopt']}; one of "
            "them stores reciprocal scales, so separate the files"
        )
    return next(iter(found), None)
