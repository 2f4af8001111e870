"""Published Hugging Face configurations, read into rotations and layers."""

from .layers import Layer, layers, mask
from .rotations import rotations

__all__ = ["Layer", "layers", "mask", "rotations"]
