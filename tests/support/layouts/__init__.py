"""Checkpoints as the world lays them out."""

from . import families, files, quantized, tensors
from .families import FAMILIES
from .layout import LAYOUTS, Layout, Tensors, Verdict

__all__ = ["FAMILIES", "LAYOUTS", "Layout", "Tensors", "Verdict"]
