"""NVFP4 checkpoints on disk: read compressed-tensors and ModelOpt directories, write both."""

from glu4.checkpoint.checkpoint import Checkpoint
from glu4.checkpoint.common import Oddity, Scheme
from glu4.checkpoint.opening import load_gated_weights, open_checkpoint
from glu4.checkpoint.writer import write_checkpoint

__all__ = ["Checkpoint", "Oddity", "Scheme", "load_gated_weights", "open_checkpoint", "write_checkpoint"]
