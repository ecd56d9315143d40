#!POPCORN leaderboard nvfp4_dual_gemm
"""A right, plain submission for GPU MODE's nvfp4_dual_gemm in torch alone, for any device: decode, multiply, activate.

    glu4 verify --submission examples/submission_torch.py --quick

Every decoded value is exact in float32; what is left to chance is the order in which matmul adds.
"""

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float4_e2m1fn_x2 (R, K/2, L) and float8_e4m3fn (R, K/16, L) to float32 [L, R, K]."""
    packed = codes.view(torch.uint8).permute(2, 0, 1)
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)  # even k is the low nibble
    values = torch.tensor(E2M1, device=codes.device)[nibbles.int()]
    return values * scales.permute(2, 0, 1).float().repeat_interleave(16, dim=-1)


def custom_kernel(data: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """c = silu(a @ b1^T) * (a @ b2^T), float16 (M, N, L), written to the c that was passed."""
    a, b1, b2, sfa, sfb1, sfb2, _, _, _, c = data
    x = decode(a, sfa)
    gate = x @ decode(b1, sfb1).mT
    up = x @ decode(b2, sfb2).mT
    return c.copy_((torch.nn.functional.silu(gate) * up).permute(1, 2, 0))
