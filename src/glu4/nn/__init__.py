"""NVFP4 in models: GatedMLP, GatedExperts and NVFP4Linear, and Hugging Face models that use them."""

from glu4.nn.convert import ConversionReport, convert
from glu4.nn.experts import ExpertsLinear, GatedExperts, NVFP4ExpertsLinear
from glu4.nn.load import load
from glu4.nn.modules import GatedMLP, Mode, NVFP4Linear, free_originals, set_mode
from glu4.nn.save import save

__all__ = [
    "ConversionReport",
    "ExpertsLinear",
    "GatedExperts",
    "GatedMLP",
    "Mode",
    "NVFP4ExpertsLinear",
    "NVFP4Linear",
    "convert",
    "free_originals",
    "load",
    "save",
    "set_mode",
]
