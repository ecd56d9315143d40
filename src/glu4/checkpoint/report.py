"""What `glu4 inspect` tells: one report for each NVFP4 matrix and each gated MLP, read one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from glu4.checkpoint.checkpoint import Checkpoint
from glu4.checkpoint.common import Oddity, Scheme
from glu4.errors import CheckpointError, UnsupportedError

__all__ = ["GatedReport", "LayerReport", "Survey", "survey"]

_CHUNK = 2**22  # block scales counted at once: bincount widens each to eight bytes
_LARGE_WEIGHT = 1e3  # no trained weight is this large; a divisor read as a multiplier makes them 1e6 and more
_UNREADABLE = ("weight_scale", "weight_scale_2", "weight_scale_inv")


@dataclass(frozen=True)
class LayerReport:
    """One NVFP4 matrix. Shares are of all its block scales; minimum and maximum are over the non-zero ones.

    largest_weight is 6 * block_scale_max * global_scale, an upper bound. `error` says why it cannot be loaded.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int] | None = None
    block_scale_min: float | None = None
    block_scale_max: float | None = None
    zero_share: float = 0.0
    subnormal_share: float = 0.0
    global_scale: float | None = None
    input_scale: float | None = None
    error: str = ""

    @property
    def largest_weight(self) -> float:
        return 6.0 * (self.block_scale_max or 0.0) * (self.global_scale or 0.0)


@dataclass(frozen=True)
class GatedReport:
    """One dense gated MLP (experts None) or stack of experts; ratios are gate / up global scales."""

    prefix: str
    experts: int | None
    shape: tuple[int, ...] | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    pairs: int = 0
    differing: int = 0
    input_scale: str = ""
    error: str = ""


@dataclass(frozen=True)
class Survey:
    """Everything `inspect` prints."""

    layers: tuple[LayerReport, ...]
    gated: tuple[GatedReport, ...]
    oddities: tuple[Oddity, ...]

    @property
    def unusable(self) -> bool:
        return any(o.unusable for o in self.oddities)

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "gated": [asdict(gated) for gated in self.gated],
            "oddities": [asdict(oddity) for oddity in self.oddities],
            "usable": not self.unusable,
        }


def survey(
    checkpoint: Checkpoint,
    wanted: Callable[[str], bool] = lambda name: True,
    advance: Callable[[int, str], None] = lambda steps, text: None,
) -> Survey:
    """Examine the wanted layers and gated MLPs, one at a time, and collect every oddity of the checkpoint.

    wanted   told a module name or gated prefix; with a selection, file-wide oddities are reported all the same
    advance  called after each layer and each gated MLP with (1, its name), for a progress bar
    """
    layers = []
    for name in sorted(filter(wanted, checkpoint.layers()), key=_natural):
        layers.append(_examine(checkpoint, name))
        advance(1, name)
    gated = []
    for prefix in sorted(filter(wanted, checkpoint.gated_mlps()), key=_natural):
        gated.append(_examine_gated(checkpoint, prefix))
        advance(1, prefix)
    found = [*checkpoint.oddities, *_file_oddities(checkpoint)]
    for layer in layers:
        found += _layer_oddities(layer)
    failed = {layer.name for layer in layers if layer.error}
    for report in gated:
        # an error that a layer's own line already tells is not told twice
        if report.error and not any(name in report.error for name in failed):
            found.append(Oddity(report.prefix, report.error, unusable=True))
    return Survey(tuple(layers), tuple(gated), tuple(dict.fromkeys(found)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]


def _examine(checkpoint: Checkpoint, name: str) -> LayerReport:
    scheme = checkpoint.scheme_of(name)
    try:
        matrix, input_scale = checkpoint.load_matrix(name)
    except (CheckpointError, UnsupportedError) as error:
        return LayerReport(name, scheme, error=str(error))
    counts = _histogram(matrix.block_scale)
    total = max(int(counts.sum()), 1)
    used = torch.nonzero(counts[1:128]).flatten() + 1
    values = used.to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    return LayerReport(
        name,
        scheme,
        (matrix.rows, matrix.k),
        float(values.min()) if len(values) else None,
        float(values.max()) if len(values) else None,
        int(counts[0]) / total,
        int(counts[1:8].sum()) / total,
        float(matrix.global_scale),
        None if input_scale is None else float(input_scale),
    )


def _histogram(block_scale: Tensor) -> Tensor:
    """How often each of the 256 bytes occurs, int64 `[256]`."""
    raw = block_scale.reshape(-1).view(torch.uint8)
    counts = torch.zeros(256, dtype=torch.int64)
    for chunk in torch.split(raw, _CHUNK):
        counts += torch.bincount(chunk.to(torch.int32), minlength=256)
    return counts


def _examine_gated(checkpoint: Checkpoint, prefix: str) -> GatedReport:
    site = checkpoint.gated_site(prefix)
    experts = None if site.experts is None else len(site.experts)
    try:
        shape, input_scale, ratios = checkpoint.check_gated(prefix)
    except (CheckpointError, UnsupportedError) as error:
        return GatedReport(prefix, experts, error=str(error))
    kind = "static" if input_scale is not None else "none" if _activations(checkpoint, prefix) == "none" else "dynamic"
    full = tuple(shape) if experts is None else (experts, *shape)
    differing = int((ratios != 1).sum())
    return GatedReport(prefix, experts, full, float(ratios.min()), float(ratios.max()), len(ratios), differing, kind)


def _activations(checkpoint: Checkpoint, prefix: str) -> str:
    site = checkpoint.gated_site(prefix)
    return checkpoint.scheme_of(site.modules(site.experts[0] if site.experts else None)[0]).activations


def _layer_oddities(layer: LayerReport) -> list[Oddity]:
    if layer.error:
        return [Oddity(layer.name, layer.error, unusable=True)]
    found = []
    if layer.block_scale_max is None:
        found.append(Oddity(layer.name, "every block scale is 0, so the whole matrix is 0"))
    elif layer.largest_weight > _LARGE_WEIGHT:
        largest, g = layer.largest_weight, layer.global_scale
        found.append(
            Oddity(layer.name, f"weights reach {largest:.3g}; its global scale, {g:.3g} as a multiplier, looks reciprocal")
        )
    if layer.input_scale == 1.0:
        found.append(
            Oddity(layer.name, "input scale is exactly 1.0, as exporters write for experts that calibration never reached")
        )
    return found


def _file_oddities(checkpoint: Checkpoint) -> list[Oddity]:
    found = [
        Oddity(module, f"quantised as {scheme.name}: {scheme.reason}", unusable=True)
        for module, scheme in checkpoint.modules.other_quantized.items()
    ]
    for name in checkpoint.modules.unclaimed_scales():
        lost = name.endswith(_UNREADABLE) or name.endswith(("_blocks", "_scales", "qweight", "qzeros"))
        found.append(Oddity(name, "named like a quantisation scale, but of no module that is recognised here", unusable=lost))
    return found
