"""Full-range operands for tests, drawn by seed and not by the quantiser."""

from __future__ import annotations

import torch

from glu4 import NVFP4Tensor

# zero, every subnormal, the smallest and largest normal, 448
_EDGE_SCALES = torch.tensor([0x00, *range(0x01, 0x08), 0x08, 0x38, 0x77, 0x7E], dtype=torch.uint8)


def full_range(seed: int, *shape: int, scaled: bool = True) -> NVFP4Tensor:
    """All 16 codes, all scales 0x00..0x7E with the edges drawn often, and a global scale for each matrix."""
    gen = torch.Generator().manual_seed(seed)
    *batch, rows, k = shape
    codes = torch.randint(0, 256, (*batch, rows, k // 2), dtype=torch.uint8, generator=gen)
    scale = torch.randint(0, 0x7F, (*batch, rows, k // 16), dtype=torch.uint8, generator=gen)
    edge = _EDGE_SCALES[torch.randint(0, len(_EDGE_SCALES), scale.shape, generator=gen)]
    scale = torch.where(torch.rand(scale.shape, generator=gen) < 0.3, edge, scale)
    g = torch.exp2(torch.rand(batch, generator=gen) * 4 - 12) if scaled else torch.ones(batch)
    return NVFP4Tensor(codes, scale.view(torch.float8_e4m3fn), g.to(torch.float32))
