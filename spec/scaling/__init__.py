"""RoPE scaling methods, one pure function and one file each."""

from .linear import linear
from .none import none
from .yarn import yarn

__all__ = ["linear", "none", "yarn"]
