"""glu4: the gated half of a transformer MLP from NVFP4 operands, C = silu(A @ B1^T) * (A @ B2^T)."""

from importlib.metadata import PackageNotFoundError, version

from glu4.activation import IDENTITY, SILU, Activation, clamped_silu, swiglu_oai
from glu4.checkpoint import load_gated_weights
from glu4.dispatch import explain
from glu4.errors import CheckpointError, UnsupportedError
from glu4.moe import Routing, moe_combine, moe_gate_up
from glu4.nvfp4 import NVFP4Tensor
from glu4.ops import dual_gemm, group_gemm, grouped_dual_gemm, grouped_linear, linear
from glu4.problem import GroupedProblem, Problem
from glu4.quantizer import quantize
from glu4.weights import GatedWeights, LinearWeight

try:
    __version__ = version("glu4")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "IDENTITY",
    "SILU",
    "Activation",
    "CheckpointError",
    "GatedWeights",
    "GroupedProblem",
    "LinearWeight",
    "NVFP4Tensor",
    "Problem",
    "Routing",
    "UnsupportedError",
    "__version__",
    "clamped_silu",
    "dual_gemm",
    "explain",
    "group_gemm",
    "grouped_dual_gemm",
    "grouped_linear",
    "linear",
    "load_gated_weights",
    "moe_combine",
    "moe_gate_up",
    "quantize",
    "swiglu_oai",
]
