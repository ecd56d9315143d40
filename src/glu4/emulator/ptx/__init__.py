"""PTX text to a typed Module."""

from glu4.emulator.ptx.module import Function, Instruction, Module
from glu4.emulator.ptx.parser import parse

__all__ = ["Function", "Instruction", "Module", "parse"]
