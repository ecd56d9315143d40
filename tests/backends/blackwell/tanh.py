"""The error bound of SiLU by tanh.approx, which follows from the instruction's own.

tanh.approx.f32 has a relative error of at most 2^-11 (PTX ISA, tanh), so sigmoid(t) = (1 + tanh(t / 2)) / 2 has an absolute
one of at most 2^-12 |tanh(t / 2)|, on top of what the checker allows a float32 evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glu4.reference import round_once
from glu4.verify import Case
from glu4.verify.metrics import SECOND_ORDER, _operand, block_terms

SIGMOID_ERROR = 2.0**-12
STEEPEST = 1.2  # of g tanh(g / 2): tanh(x) + x / cosh(x)^2 is at most 1.1997


def outside(case: Case, out: Tensor) -> Tensor:
    """bool `[m, n]`: elements that no tanh within its error explains."""
    wrong = torch.zeros(case.out_shape, dtype=torch.bool)
    for block in case.blocks():
        terms, (gate, up) = block_terms(block, case.activation), block.preactivations()
        assert block.up is not None
        assert up is not None
        moved = _operand(block.x, block.gate, gate, block.gate_bias).bound
        factor = _operand(block.x, block.up, up, block.up_bias).bound + up.abs() + abs(case.activation.beta)
        gate = gate.clamp(max=case.activation.limit)
        sigmoid = SIGMOID_ERROR * ((gate * torch.tanh(case.activation.alpha * gate / 2)).abs() + STEEPEST * moved)
        bound = SECOND_ORDER * (terms.bound + sigmoid * factor)
        low, high = (round_once(v, case.out_dtype).double() for v in (terms.value - bound, terms.value + bound))
        actual = out[block.rows, block.cols].double()
        wrong[block.rows, block.cols] = ~((actual >= low) & (actual <= high))
    return wrong
