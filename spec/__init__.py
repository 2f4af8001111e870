"""The definition: exact attention and RoPE scaling as pure functions of tensors."""

from . import masks, scaling
from .append import append
from .attention import attention
from .bounds import Bounds, bounds, visible
from .hadamard import hadamard, random_signs
from .paged import attention_paged
from .quantise import Quantised, attention_quantised, dequantise, quantise
from .rope import Rotation, angle, angle_of_turns, inv_freq, rerotate, rotate, rotate_qk, turns
from .state import AttentionState, add_sink, merge
from .tiled import attention_tiled
from .varlen import attention_varlen

__all__ = [
    "AttentionState", "Bounds", "Quantised", "Rotation", "add_sink", "angle", "angle_of_turns", "append", "attention",
    "attention_paged", "attention_quantised", "attention_tiled", "attention_varlen", "bounds", "dequantise", "hadamard",
    "inv_freq", "masks", "merge", "quantise", "random_signs", "rerotate", "rotate", "rotate_qk", "scaling", "turns",
    "visible",
]  # fmt: skip
