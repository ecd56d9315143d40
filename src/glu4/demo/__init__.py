"""The demonstration: NVFP4 gate and up in a real model, measured, checked against the specification, and written up."""

from glu4.demo.measure import DemoResult, LayerCheck, Quality, run

__all__ = ["DemoResult", "LayerCheck", "Quality", "run"]
